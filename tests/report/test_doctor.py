"""The doctor's verdicts, on this machine and on machines and installations that are described to it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cnx_deploy.core.system import Gpu, find_gpus, package_version
from cnx_deploy.report import doctor
from tests.support.installations import PROJECT, ROOT, distribution, installation, run_python

LAPTOP = Gpu("GeForce RTX 4070", "sm89", "580.65", 8188)
DATA_CENTRE = Gpu("H100", "sm90", "580.65", 81559)
CNX_DEPLOY = ("-m", "cnx_deploy")


@pytest.fixture(scope="module")
def click_alone(tmp_path_factory):
    """An installation of cnx-deploy, click, and packaging, which compares versions."""
    return installation(tmp_path_factory.mktemp("alone") / "packages", "click", "packaging")


def test_every_topic_is_reported_once_and_what_is_not_ok_has_a_remedy(tmp_path):
    findings = doctor.examine(tmp_path / "not" / "yet")
    topics = [finding.topic for finding in findings if finding.topic != "gpu"]
    assert len(topics) == len(set(topics))
    assert set(topics) >= {
        "python", "torch", "onnxruntime", "onnxruntime CPU", "openvino", "tensorrt-rtx", "tensorrt", "training",
        "batch", "serve", "memory", "disk",
    }  # fmt: skip
    assert [finding.topic for finding in findings if finding.status != "ok" and not finding.remedy] == []
    disk = next(finding for finding in findings if finding.topic == "disk")
    assert float(disk.what.split()[0]) == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, abs=1.0)


def test_the_needs_are_those_that_were_measured():
    rows = json.loads((ROOT / "docs" / "data" / "cost.json").read_text())["rows"]
    measured = {r["variant"]: (r["export_peak_mib"], r["build_peak_mib"], r["engine_megabytes"]) for r in rows}
    assert measured == doctor.NEEDS


@pytest.mark.parametrize(
    ("finding", "status", "told"),
    [
        (lambda: doctor.python_finding("3.10.4"), "problem", "3.10"),
        (lambda: doctor.python_finding("3.11.7"), "ok", "3.11"),
        (lambda: doctor.requirements_finding(None), "ok", "not checked"),
        (lambda: doctor.wheel_finding({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}), "problem",
         "pip uninstall"),
        (lambda: doctor.wheel_finding({"onnxruntime": None, "onnxruntime-gpu": "1.31.1"}), "ok", "1.31.1"),
        (lambda: doctor.wheel_finding({"onnxruntime": None, "onnxruntime-gpu": None}), "missing", "pip install"),
        (lambda: doctor.provider_finding("CPUExecutionProvider"), "ok", "CPUExecutionProvider"),
        (lambda: doctor.provider_finding("NoSuchExecutionProvider"), "problem", "got none"),
        (lambda: doctor.gpu_findings(())[0], "missing", "no NVIDIA GPU"),
        (lambda: doctor.gpu_findings((LAPTOP,))[0], "ok", "GeForce RTX 4070, sm89, driver 580.65, 8188 MiB"),
        (lambda: doctor.packages_finding("training", "train", {"lightning": "2.6.6", "torchmetrics": None}), "missing",
         "torchmetrics not installed"),
        (lambda: doctor.memory_finding(16.0), "ok", "every variant fits"),
        (lambda: doctor.memory_finding(4.0), "problem",
         "not enough for all, large takes 6.4 GB, huge takes 14 GB"),
        (lambda: doctor.memory_finding(None), "ok", "unknown"),
        (lambda: doctor.disk_finding(Path(), 100.0), "ok", "every variant fits"),
        (lambda: doctor.disk_finding(Path(), 1.0), "problem",
         "not enough for all, large takes 1.6 GB, huge takes 5.3 GB"),
    ],
)  # fmt: skip
def test_a_machine_that_is_described_gets_the_verdict_it_deserves(finding, status, told):
    found = finding()
    assert (found.status, told in f"{found.what} {found.remedy}") == (status, True)


@pytest.mark.skipif(bool(find_gpus()), reason="has a GPU, which torch and CUDA may use")
def test_a_gpu_that_torch_and_a_provider_that_onnxruntime_cannot_use_are_problems():
    import onnxruntime

    found = doctor.torch_finding((LAPTOP,))
    assert (found.status, "580.65" in found.what) == ("problem", True)
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        assert doctor.provider_finding("CUDAExecutionProvider").status == "problem"


@pytest.mark.skipif(not package_version("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize(
    ("gpus", "end", "remedy"),
    [
        ((), "runs no engine here", ""),
        ((LAPTOP,), "runs engines here", ""),
        ((DATA_CENTRE,), "runs no engine here (sm90 is not among its targets)", "cnx-deploy[tensorrt]"),
    ],
)
def test_tensorrt_rtx_builds_ahead_of_time_and_runs_on_a_gpu_of_its_targets(gpus, end, remedy):
    found = doctor.tensorrt_finding("tensorrt-rtx", gpus)
    assert (found.status, "sm89" in found.what, found.what.endswith(end)) == ("ok", True, True)
    assert remedy in found.remedy


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
    assert [str(short).startswith(told or "") for short in doctor.shortfalls()] == ([True] if told else [])


def test_a_floor_with_a_reason_is_the_release_that_the_reason_names():
    for requirement in (Requirement(line) for line in PROJECT["dependencies"]):
        if reason := doctor.FLOOR_REASONS.get(requirement.name):
            assert reason.startswith(f"before {str(requirement.specifier).lstrip('>=')} ")


def test_the_doctor_runs_with_click_alone_and_names_every_missing_package_and_its_remedy(click_alone, tmp_path):
    done = run_python(click_alone, *CNX_DEPLOY, "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = [entry for entry in json.loads(done.stdout)["findings"] if entry["topic"] == "requirements"]
    base = [Requirement(line) for line in PROJECT["dependencies"]]
    needed = {each.name for each in base if each.marker is None or each.marker.evaluate()} - {"click", "packaging"}
    assert found["status"] == "missing"
    assert {line.split()[0] for line in found["what"].split("; ")} == needed
    assert set(re.findall(r'"([\w-]+)', found["remedy"])) == needed


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
