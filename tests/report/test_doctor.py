"""The doctor's verdicts, on this machine and on machines that are described to it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from cnx_deploy.core.system import Gpu, find_gpus, package_version
from cnx_deploy.report import doctor
from cnx_deploy.report.needs import NEEDS

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
LAPTOP = Gpu("GeForce RTX 4070", "sm89", "580.65", 8188)
DATA_CENTRE = Gpu("H100", "sm90", "580.65", 81559)


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    return doctor.examine(tmp_path_factory.mktemp("work"))


def test_every_topic_is_reported_once(findings):
    topics = [finding.topic for finding in findings if finding.topic != "gpu"]
    assert len(topics) == len(set(topics))
    assert set(topics) >= {
        "python", "torch", "onnxruntime", "onnxruntime CPU", "tensorrt-rtx", "tensorrt", "training", "memory", "disk",
        "versions",
    }  # fmt: skip


def test_whatever_is_not_ok_has_a_remedy(findings):
    assert [finding.topic for finding in findings if finding.status != "ok" and not finding.remedy] == []


def test_the_tested_versions_are_those_of_the_constraints_file():
    lines = [line.partition("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line]
    pinned = {re.sub(r"[-_.]+", "-", name.lower()): version for name, _, version in lines}
    assert {name: pinned[name] for name in doctor.TESTED_VERSIONS} == doctor.TESTED_VERSIONS


def test_a_python_older_than_3_11_is_a_problem():
    assert doctor.python_finding((3, 10)).status == "problem"
    assert doctor.python_finding((3, 11)).status == "ok"


def test_both_onnxruntime_wheels_together_are_a_problem():
    both = doctor.wheel_finding({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    assert both.status == "problem"
    assert "pip uninstall" in both.remedy
    assert doctor.wheel_finding({"onnxruntime": None, "onnxruntime-gpu": "1.31.1"}).status == "ok"
    assert doctor.wheel_finding({"onnxruntime": None, "onnxruntime-gpu": None}).status == "missing"


def test_the_cpu_provider_runs_a_session():
    assert doctor.provider_finding("CPUExecutionProvider").status == "ok"


@pytest.mark.skipif(bool(find_gpus()), reason="has a GPU, so CUDA may load")
def test_a_provider_that_is_compiled_in_but_does_not_load_is_a_problem():
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider compiled in")
    assert doctor.provider_finding("CUDAExecutionProvider").status == "problem"


def test_a_provider_that_is_not_compiled_in_is_a_problem():
    assert doctor.provider_finding("NoSuchExecutionProvider").status == "problem"


@pytest.mark.skipif(bool(find_gpus()), reason="has a GPU, which torch may use")
def test_a_listed_gpu_that_torch_cannot_use_is_a_problem():
    found = doctor.torch_finding((LAPTOP,))
    assert found.status == "problem"
    assert "580.65" in found.what


def test_no_gpu_is_missing_and_a_gpu_is_named_with_driver_and_target():
    assert [finding.status for finding in doctor.gpu_findings(())] == ["missing"]
    (found,) = doctor.gpu_findings((LAPTOP,))
    assert found.what == "GeForce RTX 4070, sm89, driver 580.65, 8188 MiB"


@pytest.mark.skipif(not package_version("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
def test_tensorrt_rtx_builds_ahead_of_time_and_runs_on_a_gpu_of_its_targets():
    without, with_gpu = doctor.tensorrt_finding("tensorrt-rtx", ()), doctor.tensorrt_finding("tensorrt-rtx", (LAPTOP,))
    assert without.status == with_gpu.status == "ok"
    assert "sm89" in without.what
    assert without.what.endswith("runs no engine here")
    assert with_gpu.what.endswith("runs engines here")


@pytest.mark.skipif(not package_version("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
def test_a_data_centre_gpu_is_sent_to_the_other_tensorrt():
    found = doctor.tensorrt_finding("tensorrt-rtx", (DATA_CENTRE,))
    assert "sm90 is not among its targets" in found.what
    assert "cnx-deploy[tensorrt]" in found.remedy


@pytest.mark.skipif(bool(package_version("tensorrt")), reason="tensorrt is installed")
def test_a_tensorrt_that_is_not_installed_is_missing_with_its_extra_as_remedy():
    found = doctor.tensorrt_finding("tensorrt", ())
    assert found.status == "missing"
    assert "cnx-deploy[tensorrt]" in found.remedy


def test_training_without_one_of_its_packages_is_missing_and_names_it():
    found = doctor.train_finding({"lightning": "2.6.6", "torchmetrics": None})
    assert (found.status, found.what) == ("missing", "torchmetrics not installed")


def test_memory_is_held_against_what_each_variant_needs():
    assert doctor.memory_finding(16.0).status == "ok"
    some = doctor.memory_finding(4.0)
    assert some.status == "problem"
    assert "enough for atto to base; large takes 6.4 GB, huge takes 14 GB" in some.what
    assert "larger machine" in some.remedy
    assert "enough for no variant" in doctor.memory_finding(0.5).what


def test_disk_is_held_against_what_each_variant_needs(tmp_path):
    assert doctor.disk_finding(tmp_path, 100.0).status == "ok"
    found = doctor.disk_finding(tmp_path, 1.0)
    assert found.status == "problem"
    assert "enough for atto to base; large takes 1.6 GB, huge takes 5.3 GB" in found.what


def test_the_needs_are_those_that_were_measured():
    rows = json.loads((Path(__file__).parents[2] / "docs" / "data" / "cost.json").read_text())["rows"]
    measured = [(r["variant"], r["export_peak_mib"], r["build_peak_mib"], r["engine_megabytes"]) for r in rows]
    assert [(n.variant, n.export_mib, n.build_mib, n.engine_megabytes) for n in NEEDS] == measured


def test_another_release_than_the_tested_one_is_named_with_the_command_that_installs_it():
    found = doctor.versions_finding({"torch": "2.13.0+cpu", "onnx": doctor.TESTED_VERSIONS["onnx"]})
    assert found.status == "problem"
    assert found.remedy == f"pip install torch=={doctor.TESTED_VERSIONS['torch']}"


def test_another_patch_of_the_tested_release_and_an_absent_package_are_fine():
    patched = doctor.TESTED_VERSIONS["torch"].rpartition(".")[0] + ".99+cu130"
    assert doctor.versions_finding({"torch": patched, "onnx": None}).status == "ok"


def test_a_folder_that_does_not_exist_yet_has_the_free_disk_of_the_one_it_will_be_in(tmp_path):
    found = next(finding for finding in doctor.examine(tmp_path / "not" / "yet") if finding.topic == "disk")
    free_gb = shutil.disk_usage(tmp_path).free / 1e9
    assert float(found.what.split()[0]) == pytest.approx(free_gb, abs=1.0)
