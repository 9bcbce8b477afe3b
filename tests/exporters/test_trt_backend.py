"""The adapter against the real classes of TensorRT-RTX, and what it says of machines that lack something."""

import importlib
import types

import pytest

from cnx_deploy.core.errors import MissingRequirementError
from cnx_deploy.core.system import Gpu
from cnx_deploy.exporters.trt import backend as backend_module
from cnx_deploy.exporters.trt.backend import Backend, load_backend

RTX = load_backend("tensorrt-rtx")


def test_the_targets_are_the_compute_capabilities_of_the_library() -> None:
    named = {f"SM{target.removeprefix('sm')}" for target in RTX.targets}
    assert named == set(RTX.trt.ComputeCapability.__members__) - {"NONE", "CURRENT"}
    assert "sm90" not in RTX.targets


def test_the_strongly_typed_flag_is_asked_for_wherever_it_exists() -> None:
    """TensorRT-RTX 1.7 sets it by itself; TensorRT 10 does not and would then build FP32."""
    flag = RTX.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert RTX.network_flags == 1 << int(flag)


def test_a_library_without_strongly_typed_networks_is_a_missing_requirement() -> None:
    old = types.ModuleType("tensorrt")
    old.__version__ = "8.6.1"
    with pytest.raises(MissingRequirementError, match=r"tensorrt 8.6.1 has no strongly typed networks.*10.12"):
        _ = Backend("tensorrt", old).network_flags


def test_a_selected_target_is_the_only_one_of_the_configuration() -> None:
    config = RTX.trt.Builder(RTX.recording_logger()).create_builder_config()
    RTX.select_target(config, "sm120")
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == RTX.trt.ComputeCapability.SM120


def test_the_logger_keeps_severity_and_text_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    logger = RTX.recording_logger()
    RTX.trt.Builder(logger)
    logger.log(RTX.trt.ILogger.Severity.ERROR, "something failed")
    assert logger.messages[-1] == ("ERROR", "something failed")
    assert capfd.readouterr() == ("", "")


def test_a_gpu_that_tensorrt_rtx_does_not_know_is_refused_as_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "find_gpus", lambda: (Gpu("NVIDIA H100", "sm90", "580.1", 81559),))
    with pytest.raises(MissingRequirementError, match=r"NVIDIA H100 is sm90.*--runtime tensorrt"):
        RTX.check_target("current")


def test_a_gpu_that_tensorrt_rtx_knows_is_taken_as_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "find_gpus", lambda: (Gpu("NVIDIA L4", "sm89", "580.1", 23034),))
    RTX.check_target("current")
    assert backend_module.default_targets(RTX) == ("current",)


def test_a_package_whose_library_does_not_load_is_a_missing_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", no_library)
    with pytest.raises(MissingRequirementError, match=r"libnvinfer.so.11.*pip install tensorrt-rtx"):
        load_backend("tensorrt-rtx")


def test_the_runtime_configuration_has_the_strategy_that_the_runner_sets() -> None:
    assert hasattr(RTX.trt.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    assert hasattr(RTX.trt.ICudaEngine, "create_runtime_config")


def test_an_interrupt_while_the_library_is_initialised_is_no_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> types.ModuleType:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr(importlib, "import_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_backend("tensorrt")
