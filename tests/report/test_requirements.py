"""Base packages that are missing, too old or too new: what the doctor and the commands say of them."""

import json
import re

import pytest
from packaging.requirements import Requirement

from cnx_deploy.report.doctor import requirements_finding
from cnx_deploy.report.requirements import FLOOR_REASONS, shortfalls
from tests.support.installations import PROJECT, distribution, installation, run_python

CNX_DEPLOY = ("-m", "cnx_deploy")


@pytest.fixture(scope="module")
def click_alone(tmp_path_factory):
    """An installation of cnx-deploy, click, and packaging, which compares versions."""
    return installation(tmp_path_factory.mktemp("alone") / "packages", "click", "packaging")


@pytest.mark.parametrize(
    ("installed", "needed", "told"),
    [
        ("torch 2.9.1", "torch>=2.10", "torch 2.9.1 is installed, expected >=2.10 (before 2.10 a checkpoint can run"),
        ("torch 2.10.0rc1", "torch>=2.10", "torch 2.10.0rc1 is installed, expected >=2.10"),
        ("torch 2.10.0+cu130", "torch>=2.10", None),
        ("torch 2.15.0.dev20261120", "torch>=2.10", None),
        ("tensorrt-rtx 2.0", "tensorrt-rtx>=1.5,<2", "tensorrt-rtx 2.0 is installed, expected <2,>=1.5"),
        ("other 1.0", "no-such-package>=1", "no-such-package is not installed, expected >=1"),
        ("other 1.0", "no-such-package>=1; extra == 'train'", None),
        ("other 1.0", "no-such-package>=1; python_version < '3'", None),
        # Both wheels install into one folder, and which of them is imported is chance.
        ("onnxruntime 1.23.0", "onnxruntime-gpu>=1.24", "onnxruntime 1.23.0 is installed, expected >=1.24 (before"),
    ],
)
def test_a_release_outside_its_range_and_a_missing_package_are_a_shortfall(
    tmp_path, monkeypatch, installed, needed, told
):
    distribution(tmp_path, *installed.split())
    distribution(tmp_path, "cnx-deploy", "0.1.0", [needed])
    monkeypatch.syspath_prepend(tmp_path)
    assert [str(short).startswith(told or "") for short in shortfalls()] == ([True] if told else [])


def test_the_doctor_runs_with_click_alone_and_names_every_missing_package_and_its_remedy(click_alone, tmp_path):
    done = run_python(click_alone, *CNX_DEPLOY, "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = [entry for entry in json.loads(done.stdout)["findings"] if entry["topic"] == "requirements"]
    base = [Requirement(line) for line in PROJECT["dependencies"]]
    needed = {each.name for each in base if each.marker is None or each.marker.evaluate()} - {"click", "packaging"}
    assert found["status"] == "missing"
    assert {line.split()[0] for line in found["what"].split("; ")} == needed
    assert set(re.findall(r'"([\w-]+)', found["remedy"])) == needed


def test_a_source_tree_without_metadata_is_not_checked():
    assert "not checked" in requirements_finding(None).what


def test_a_command_whose_package_is_missing_ends_with_5_and_names_the_package_and_the_doctor(click_alone, tmp_path):
    done = run_python(click_alone, *CNX_DEPLOY, "export", "--variant", "atto", "--json", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["error"]) == (5, "MissingRequirementError")
    assert re.match(r"Error: The module \w+ is not installed\. `cnx-deploy doctor` lists", done.stderr)


def test_without_click_the_message_names_it(tmp_path):
    done = run_python(installation(tmp_path / "packages"), *CNX_DEPLOY, "--help", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == "Error: click is not installed, expected it. Install it: pip install click\n"


def test_the_help_of_every_command_needs_click_alone(click_alone, tmp_path):
    code = (
        "from cnx_deploy.cli import COMMANDS, cli\nfor name in COMMANDS: cli([name, '--help'], standalone_mode=False)"
    )
    done = run_python(click_alone, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_floor_with_a_reason_is_the_release_that_the_reason_names():
    for requirement in (Requirement(line) for line in PROJECT["dependencies"]):
        if requirement.name in FLOOR_REASONS:
            assert FLOOR_REASONS[requirement.name].startswith(f"before {str(requirement.specifier).lstrip('>=')} ")
