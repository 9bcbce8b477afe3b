"""Dependencies that are missing, too old or too new: refused before any command, told by the doctor."""

import json
import re

import click
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from cnx_deploy import requirements
from cnx_deploy.cli import COMMANDS, DIAGNOSTIC, cli
from cnx_deploy.doctor import requirements_finding
from cnx_deploy.errors import MissingRequirementError
from tests.installations import PROJECT, distribution, installation, run_command
from tests.message_rules import fault_of
from tests.test_imports import HEAVY, modules_after

BASE = [Requirement(line) for line in PROJECT["dependencies"]]
LAST_WITH_A_HOLE = {"torch": "2.9.1", "onnx": "1.20.1", "onnxruntime-gpu": "1.23.2", "pillow": "12.1.1"}


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """An installation that lacks nothing."""
    return installation(tmp_path_factory.mktemp("complete") / "packages")


@pytest.fixture(scope="module")
def click_alone(tmp_path_factory):
    """An installation of cnx-deploy and click, as `pip install --no-deps` leaves it, and what compares versions."""
    return installation(tmp_path_factory.mktemp("alone") / "packages", only=("click", "packaging"))


def with_release(complete, folder, name, version):
    """What a user has after `pip install name==version`: here metadata that come first."""
    distribution(folder, name, version)
    return f"{folder}:{complete}"


def test_missing_or_wrong_dependency_a_complete_installation_runs(complete, tmp_path):
    done = run_command(complete, "variants", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_missing_or_wrong_dependency_the_whole_message_of_one_that_is_too_old(complete, tmp_path):
    done = run_command(with_release(complete, tmp_path / "old", "torch", "2.9.0"), "variants", cwd=tmp_path)
    assert done.returncode == 5
    assert done.stdout == ""
    assert done.stderr == (
        "Error: This installation is not what cnx-deploy needs, so nothing was run:\n"
        "  torch 2.9.0 is installed, expected >=2.10 (before 2.10: CVE-2026-24747, a checkpoint can run code although "
        "only weights are loaded)\n"
        'Install it: pip install "torch>=2.10"\n'
    )
    assert fault_of(done.stderr.removeprefix("Error: ")) is None


@pytest.mark.parametrize(("name", "version"), LAST_WITH_A_HOLE.items())
def test_missing_or_wrong_dependency_the_last_release_with_a_hole_is_refused(complete, tmp_path, name, version):
    done = run_command(with_release(complete, tmp_path / "old", name, version), "variants", cwd=tmp_path)
    assert done.returncode == 5
    hole = requirements.HOLES[name]
    assert f"{name} {version} is installed, expected >={hole.fixed_in} (before {hole.fixed_in}: " in done.stderr
    assert f'Install it: pip install "{name}>={hole.fixed_in}"' in done.stderr


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0+cu130", "2.15.0.dev20261120", "3.0"])
def test_missing_or_wrong_dependency_releases_without_it_pass(complete, tmp_path, version):
    done = run_command(with_release(complete, tmp_path / "new", "torch", version), "variants", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("version", ["2.10.0a0+git1234567", "2.10.0rc1", "unknown"])
def test_missing_or_wrong_dependency_what_came_before_the_release_is_refused(complete, tmp_path, version):
    done = run_command(with_release(complete, tmp_path / "odd", "torch", version), "variants", cwd=tmp_path)
    assert done.returncode == 5
    assert f"torch {version} is installed, expected >=2.10 (" in done.stderr


def test_missing_or_wrong_dependency_too_new_a_release_has_no_hole_and_is_refused(complete, tmp_path):
    done = run_command(with_release(complete, tmp_path / "new", "tensorrt-rtx", "2.0"), "variants", cwd=tmp_path)
    assert done.returncode == 5
    assert "  tensorrt-rtx 2.0 is installed, expected <2,>=1.5\nInstall it" in done.stderr


def test_missing_or_wrong_dependency_one_that_is_not_installed_is_named(tmp_path):
    packages = installation(tmp_path / "packages", without=("torch", "filelock"))
    done = run_command(packages, "export", "--variant", "atto", cwd=tmp_path)
    assert done.returncode == 5
    assert "  filelock is not installed, expected >=3.13\n  torch is not installed, expected >=2.10\n" in done.stderr
    assert 'Install it: pip install "filelock>=3.13" "torch>=2.10"' in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "export").exists()


def test_missing_or_wrong_dependency_json_has_the_message_on_stdout(complete, tmp_path):
    done = run_command(with_release(complete, tmp_path / "old", "onnx", "1.20.1"), "variants", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert (document["error"], document["exit_code"]) == ("MissingRequirementError", done.returncode)
    assert "onnx 1.20.1 is installed, expected >=1.21" in document["message"]


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_missing_or_wrong_dependency_help_and_version_need_click_alone(click_alone, tmp_path, words):
    done = run_command(click_alone, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_missing_or_wrong_dependency_the_doctor_runs_with_click_alone_and_names_the_rest(click_alone, tmp_path):
    done = run_command(click_alone, "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = [each for each in json.loads(done.stdout)["findings"] if each["topic"] == "requirements"]
    missing = {line.split()[0] for line in found["what"].split("; ")}
    here = {each.name for each in BASE if each.marker is None or each.marker.evaluate()}
    assert found["status"] == "missing"
    assert missing == here - {"click", "packaging"}
    assert set(re.findall(r'"([\w-]+)', found["remedy"])) == missing


def test_missing_or_wrong_dependency_every_command_refuses_but_those_that_say_what_is_there(monkeypatch):
    monkeypatch.setattr(requirements, "declared_requirements", lambda: ("no-such-package>=1",))
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        if name in DIAGNOSTIC:
            assert "_run_checked" not in repr(command.callback)
            continue
        with pytest.raises(MissingRequirementError, match="no-such-package is not installed, expected >=1"):
            command.callback()


def test_missing_or_wrong_dependency_without_what_compares_versions_that_is_named(tmp_path):
    done = run_command(installation(tmp_path / "packages", without=("packaging",)), "variants", cwd=tmp_path)
    assert done.returncode == 5
    assert "packaging is not installed, expected >=" in done.stderr
    assert 'Install it: pip install "packaging>=' in done.stderr


def test_missing_or_wrong_dependency_without_what_reads_the_command_line_that_is_named(tmp_path):
    done = run_command(installation(tmp_path / "packages", without=("click",)), "--help", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == "Error: click is not installed, expected it. Install it: pip install click\n"


def test_a_source_tree_of_which_no_metadata_is_known_is_not_checked(tmp_path):
    packages = installation(tmp_path / "packages", only=("click",), is_installed=False)
    assert run_command(packages, "variants", cwd=tmp_path).returncode == 0
    assert "not checked" in requirements_finding((), is_installed=False).what


def test_either_wheel_of_onnxruntime_does(tmp_path):
    cpu_alone = installation(tmp_path / "cpu", without=("onnxruntime-gpu",), versions={"onnxruntime": "1.24.0"})
    assert run_command(cpu_alone, "variants", cwd=tmp_path).returncode == 0
    neither = installation(tmp_path / "none", without=("onnxruntime-gpu", "onnxruntime"))
    assert "is not installed, expected >=1.24" in run_command(neither, "variants", cwd=tmp_path).stderr


def test_an_old_wheel_of_onnxruntime_beside_a_new_one_is_refused(tmp_path):
    # Both install into one folder: which of them is imported is chance.
    both = installation(tmp_path / "both", versions={"onnxruntime": "1.23.0"})
    done = run_command(both, "variants", cwd=tmp_path)
    assert done.returncode == 5
    assert "onnxruntime 1.23.0 is installed, expected >=1.24 (before 1.24: " in done.stderr


def test_the_doctor_has_the_same_words(complete, tmp_path):
    done = run_command(with_release(complete, tmp_path / "old", "torch", "2.9.0"), "doctor", "--json", cwd=tmp_path)
    (found,) = [each for each in json.loads(done.stdout)["findings"] if each["topic"] == "requirements"]
    assert (done.returncode, found["status"], found["remedy"]) == (0, "problem", 'pip install "torch>=2.10"')
    assert found["what"].startswith("torch 2.9.0 is installed, expected >=2.10 (before 2.10: CVE-2026-24747")


def floors_below_a_hole(lines):
    """Names with a hole that no floor of these requirement lines closes."""
    ranges = [Requirement(line) for line in lines]
    return [
        name
        for name, hole in requirements.HOLES.items()
        if not (own := [each for each in ranges if each.name == name])
        or not all(
            any(each.operator == ">=" and Version(each.version) >= Version(hole.fixed_in) for each in one.specifier)
            for one in own
        )
    ]


def test_every_known_hole_is_closed_by_a_floor_in_pyproject():
    assert floors_below_a_hole(PROJECT["dependencies"]) == []


def test_a_floor_that_leaves_a_hole_open_is_found():
    lowered = [line.replace("torch>=2.10", "torch>=2.9") for line in PROJECT["dependencies"]]
    assert floors_below_a_hole(lowered) == ["torch"]
    assert floors_below_a_hole(line for line in PROJECT["dependencies"] if not line.startswith("pillow")) == ["pillow"]


def test_asking_imports_no_heavy_package():
    assert not modules_after("import cnx_deploy.requirements; cnx_deploy.requirements.shortfalls()") & set(HEAVY)
