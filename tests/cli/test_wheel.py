"""The wheel in an environment of its own, without the source tree and without a network."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from cnx_deploy import __version__
from tests.support.installations import ROOT, site_packages

CALLED = 97
NO_NETWORK = f'''
"""Ends a process with exit code {CALLED} as soon as it looks up a name or calls another machine."""
import os, sys

def hear(event, values):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(values[1], tuple)):
        os.write(2, f"{{event}} {{values}}".encode())
        os._exit({CALLED})

sys.addaudithook(hear)
'''


@pytest.mark.slow
def test_a_wheel_installs_and_exports_without_the_source_tree_and_without_a_network(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"cnx_deploy"}
    assert "cnx_deploy/py.typed" in names

    # The other packages are those of the tests' environment, by links.
    venv.create(tmp_path / "venv", with_pip=False)
    programs = tmp_path / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, capture_output=True, timeout=120)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "no_network.py").write_text(NO_NETWORK)
    (packages / "others.pth").write_text("\n".join([*map(str, site_packages()), "import no_network"]) + "\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TORCH"))}
    environment = {**kept, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    work = tmp_path / "work"
    work.mkdir()

    def run(program: str, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [programs / program, *words],
            cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout

    assert Path(run("python", "-c", "import cnx_deploy; print(cnx_deploy.__file__)")).is_relative_to(packages)
    assert __version__ in run("cnx-deploy", "--version")
    run("cnx-deploy", "export", "--variant", "atto", "--image-size", "64", "--precision", "fp32", "--no-verify")
    manifest = json.loads((work / "export" / "atto-64-fp32.json").read_text())
    assert manifest["tools"]["cnx-deploy"] == __version__
    assert "atto" in run("cnx-deploy", "inspect", "export/atto-64-fp32.onnx")
    run("cnx-deploy", "report", "--html", "page.html")  # needs the templates that lie beside the modules
    assert "<html" in (work / "page.html").read_text(encoding="utf-8")
    # The control: a command that is asked to fetch does call.
    published = ("--pretrained", "convnextv2_atto.fcmae_ft_in1k", "--name", "published")
    run("cnx-deploy", "export", "--variant", "atto", *published, code=CALLED)
