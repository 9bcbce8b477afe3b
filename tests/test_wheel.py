"""The wheel in an environment of its own, without the source tree and without a network."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cnx_deploy import __version__
from tests.installations import PROJECT, ROOT, site_packages

pytestmark = pytest.mark.slow

WITNESS = '''
"""Writes down, at the end of a process, where this package came from and who was called."""
import atexit, errno, json, os, sys

CALLED = []


def hear(event, values):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(values[1], tuple)):
        CALLED.append(f"{event} {values[0] if event == 'socket.getaddrinfo' else values[1][0]}")
        if event == "socket.connect" and os.environ["WITNESS_BLOCKS"]:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")


def tell():
    modules = {name: getattr(each, "__file__", None) for name, each in list(sys.modules.items())}
    own = sorted({path for name, path in modules.items() if name.partition(".")[0] == "cnx_deploy" and path})
    with open(os.environ["WITNESS"], "a") as stream:
        stream.write(json.dumps({"called": CALLED, "own": own}) + "\\n")


if "WITNESS" in os.environ:
    sys.addaudithook(hear)
    atexit.register(tell)
'''


def network_namespace() -> list[str]:
    """What begins a command so that it has no network; empty where this system does not let a user do that."""
    try:
        done = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False, timeout=30)
    except OSError:
        return []
    return [] if done.returncode else ["unshare", "-rn"]


class CleanInstall:
    """A fresh virtual environment that has the wheel; the other packages are those of the tests' environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reports = folder, folder / "reports.jsonl"
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
        (self.wheel,) = (folder / "dist").glob("*.whl")
        venv.create(folder / "venv", with_pip=False)
        self.bin = folder / "venv" / "bin"
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", str(self.wheel)], check=True, capture_output=True, timeout=120)
        (self.packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (self.packages / "witness.py").write_text(WITNESS)
        links = [*map(str, site_packages()), "import witness"]
        (self.packages / "others.pth").write_text("\n".join(links) + "\n")
        self.work = folder / "work"
        self.work.mkdir()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in an empty folder, without a network where the system can do that."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TORCH"))}
        namespace = network_namespace()
        environment = {
            **kept,
            "HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # the other packages belong to another environment
            "WITNESS": str(self.reports),
            "WITNESS_BLOCKS": "" if namespace else "1",
        }
        command = [*namespace, str(self.bin / words[0]), *words[1:]]
        self.reports.unlink(missing_ok=True)
        return subprocess.run(
            command, cwd=self.work, env=environment, capture_output=True, text=True, check=False, timeout=300
        )  # fmt: skip

    def seen(self, key: str) -> set[str]:
        """What the processes of the last run saw: `own`, files of this package; `called`, names and addresses."""
        return {each for line in self.reports.read_text().splitlines() for each in json.loads(line)[key]}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return CleanInstall(tmp_path_factory.mktemp("clean"))


def assert_from_the_wheel(clean):
    own = clean.seen("own")
    assert own
    assert [path for path in own if not path.startswith(str(clean.packages / "cnx_deploy"))] == []
    assert clean.seen("called") == set()


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("variants",), ("export", "--help")])
def test_wheel_clean_install_answers_from_the_wheel(clean, words):
    done = clean.run("cnx-deploy", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"--help": "Usage: cnx-deploy", "--version": __version__, "variants": "atto", "export": "--no-verify"}[
        words[0]
    ] in done.stdout
    assert_from_the_wheel(clean)


def test_wheel_clean_install_exports_without_a_network(clean):
    words = ("export", "--variant", "atto", "--image-size", "64", "--precision", "fp32", "--no-verify")
    done = clean.run("cnx-deploy", *words)
    assert done.returncode == 0, done.stderr
    assert_from_the_wheel(clean)
    manifest = json.loads((clean.work / "export" / "atto-64-fp32.json").read_text())
    assert (clean.work / "export" / "atto-64-fp32.onnx").stat().st_size > 14e6
    assert manifest["tools"]["cnx-deploy"] == __version__
    assert clean.run("cnx-deploy", "inspect", "export/atto-64-fp32.onnx").returncode == 0


def test_wheel_clean_install_has_its_data_files(clean):
    pytest.importorskip("jinja2", reason="needs the extra report")
    done = clean.run("cnx-deploy", "report", "--html", "page.html")
    assert done.returncode == 0, done.stderr
    assert "<html" in (clean.work / "page.html").read_text(encoding="utf-8")
    assert_from_the_wheel(clean)


def test_wheel_clean_install_a_call_is_heard_and_the_network_is_gone(clean):
    code = "import socket, sys; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done = clean.run("python", "-c", code)
    assert done.returncode == 1
    assert clean.seen("called") == {"socket.connect 192.0.2.1", "socket.getaddrinfo 192.0.2.1"}
    assert "Network is unreachable" in done.stderr


def test_wheel_clean_install_published_weights_are_asked_for_and_their_absence_told(clean):
    # The negative control of "no call was heard": here one is, by the library that fetches.
    words = ("export", "--variant", "atto", "--pretrained", "convnextv2_atto.fcmae_ft_in1k", "--name", "published")
    done = clean.run("cnx-deploy", *words)
    assert done.returncode == 5
    assert "is not in the model hub's cache and could not be fetched" in done.stderr
    assert any(call.startswith("socket.getaddrinfo") for call in clean.seen("called"))


def test_wheel_clean_install_says_what_it_needs_in_its_metadata(clean):
    code = "from importlib import metadata; import json; print(json.dumps(metadata.requires('cnx-deploy')))"
    lines = json.loads(clean.run("python", "-c", code).stdout)
    assert _plain(line for line in lines if "extra ==" not in line) == _plain(PROJECT["dependencies"])


def _plain(lines):
    """Requirements as sets compare them: one spelling of names, ranges in one order."""
    return {(canonicalize_name(each.name), str(each.specifier), str(each.marker)) for each in map(Requirement, lines)}


@pytest.mark.parametrize(("name", "version"), [("torch", "2.9.1"), ("onnx", "1.20.0")])
def test_missing_or_wrong_dependency_is_refused_by_the_installed_wheel(clean, name, version):
    metadata = clean.packages / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    try:
        done = clean.run("cnx-deploy", "export", "--variant", "atto")
    finally:
        (metadata / "METADATA").unlink()
        metadata.rmdir()
    assert done.returncode == 5
    assert f"{name} {version} is installed, expected >=" in done.stderr
    assert clean.run("cnx-deploy", "variants").returncode == 0
