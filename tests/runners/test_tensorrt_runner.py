"""The TensorRT runner, by a strict double of the runtime whose calls are those of the real classes."""

import inspect
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cnx_deploy.bench.timing import Contender, TimingSpec, measure_together
from cnx_deploy.core.errors import BuildError, CnxDeployError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact, Launcher, OwnKernel, OwnKernels
from cnx_deploy.core.system import Gpu
from cnx_deploy.exporters.trt import backend as backend_module
from cnx_deploy.exporters.trt import plugins
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.runners import tensorrt as tensorrt_runner
from cnx_deploy.runners.base import PhasedRunner
from cnx_deploy.runners.cuda import CudaStream
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.registry import open_runner
from cnx_deploy.runners.tensorrt import TensorRTRunner
from tests.support import trt_double

PROFILES = ((1, 1, 1), (1, 4, 8))


def make_runner(
    engine: Artifact,
    onnx: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    *,
    fail: str | None = None,
    images_type: str = "FLOAT",
    profiles: Sequence[tuple[int, int, int]] = PROFILES,
    cuda_graph: bool = False,
    host_code: bool = False,
) -> tuple[TensorRTRunner, trt_double.DoubleContext]:
    real = load_backend("tensorrt-rtx").trt
    words = {"fail": fail, "images_type": images_type, "host_code": host_code}
    module, context = trt_double.double_of(real, onnx.path, list(profiles), **words)
    monkeypatch.setattr(tensorrt_runner, "CudaStream", trt_double.DoubleStream)
    runner = TensorRTRunner.__new__(TensorRTRunner)
    request = replace(engine.manifest.request, batches=tuple(profiles))
    artifact = replace(engine, manifest=replace(engine.manifest, request=request))
    runner._start(artifact, Backend("tensorrt-rtx", module), torch.device("cpu"), cuda_graph)
    return runner, context


@pytest.mark.parametrize("batch", [1, 2, 7, 8])
def test_logits_are_those_of_the_same_file_on_onnx_runtime(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    runner, _ = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)
    images = torch.rand(batch, 3, 32, 32)
    expected = OrtRunner(tiny_onnx_fp16.path).run(images)["logits"]
    torch.testing.assert_close(runner.run(images)["logits"], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("launcher", ["python", "engine"])
def test_own_kernels_get_their_creator_or_host_code_before_the_engine_is_read(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch, launcher: Launcher
) -> None:
    kernel = OwnKernel(kernel="k", channels=8, target="sm89", tile=(8, 8, 8), warps=4, stages=1, sha256="0" * 64)
    own = OwnKernels(hidden=("stored",), kernels=(kernel,), compiler="triton", launcher=launcher, needs="")
    manifest = replace(tiny_engine.manifest, facts=replace(tiny_engine.manifest.facts, own_kernels=own))
    registered: list[Backend] = []
    monkeypatch.setattr(plugins, "register_creator", registered.append)
    engine = replace(tiny_engine, manifest=manifest)
    make_runner(engine, tiny_onnx_fp16, monkeypatch, host_code=launcher == "engine")
    assert len(registered) == (launcher == "python")


def test_a_permuted_view_gives_the_logits_of_its_values(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)
    view = torch.rand(3, 32, 32, 3).permute(0, 3, 1, 2)
    assert not view.is_contiguous()
    torch.testing.assert_close(runner.run(view)["logits"].clone(), runner.run(view.contiguous())["logits"])


def test_the_tightest_profile_serves_a_batch(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, context = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)
    runner.run(torch.rand(5, 3, 32, 32))
    assert context.active_optimization_profile == 1
    runner.run(torch.rand(1, 3, 32, 32))
    assert context.active_optimization_profile == 0


def test_calls_come_in_the_order_of_the_samples(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, context = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)
    runner.run(torch.rand(1, 3, 32, 32))
    assert context.calls == [
        "set_input_shape",
        "infer_shapes",
        "set_tensor_address(images)",
        "set_tensor_address(logits)",
        "execute_async_v3",
    ]
    assert runner._stream.calls == ["wait", "keep", "synchronize"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("deserialize", CorruptArtifactError),
        ("create_execution_context", BuildError),
        ("set_optimization_profile_async", BuildError),
        ("set_input_shape", BuildError),
        ("infer_shapes", BuildError),
        ("set_tensor_address(images)", BuildError),
        ("set_tensor_address(logits)", BuildError),
        ("execute_async_v3", BuildError),
    ],
)
def test_engine_truncated_a_null_or_false_answer_becomes_an_error(
    tiny_engine: Artifact,
    tiny_onnx_fp16: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    error: type[CnxDeployError],
) -> None:
    with pytest.raises(error, match=r"tensorrt-rtx|TensorRT|engine wants"):
        make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch, fail=call)[0].run(torch.rand(4, 3, 32, 32))["logits"]


def test_dynamic_batch_bounds_of_an_engines_profiles(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)
    with pytest.raises(InputError, match="batch of 9 is outside the model's range of 1 to 8"):
        runner.run(torch.rand(9, 3, 32, 32))


def test_a_captured_graph_gives_the_logits_of_each_new_batch(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, context = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch, cuda_graph=True)
    for batch in (2, 2, 5, 2):
        images = torch.rand(batch, 3, 32, 32)
        torch.testing.assert_close(
            runner.run(images)["logits"], OrtRunner(tiny_onnx_fp16.path).run(images)["logits"], rtol=0, atol=1e-3
        )
    assert runner._stream.calls.count("capture") == 3  # one when the batch size changes
    assert runner._stream.calls.count("replay") == 4
    assert context.calls.count("execute_async_v3") == 3 + 4  # once before each capture; the double replays by calling
    assert ("cuda graph", "on") in runner.info.details


def test_without_a_graph_nothing_is_captured(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)
    runner.run(torch.rand(2, 3, 32, 32))
    runner.run_phases(torch.rand(2, 3, 32, 32))
    assert not {"capture", "replay"} & set(runner._stream.calls)


def test_a_capture_that_cuda_refuses_is_one_error(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch, cuda_graph=True)
    runner._stream.refuses_capture = True
    with pytest.raises(BuildError, match=r"cannot be captured .*not permitted.*without a CUDA graph"):
        runner.run(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_split_call_has_the_same_logits_and_each_part_between_its_marks(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch, cuda_graph: bool
) -> None:
    runner, _ = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch, cuda_graph=cuda_graph)
    images = torch.rand(4, 3, 32, 32)
    expected = runner.run(images)["logits"].clone()
    runner._stream.calls.clear()
    outputs, split = runner.run_phases(images)
    torch.testing.assert_close(outputs["logits"], expected, rtol=0, atol=0)
    assert (split.h2d_ms, split.compute_ms, split.d2h_ms) == (3.0, 5.0, 7.0)  # marks at 1, 4, 9, 16 ms
    assert split.enqueue_ms > 0.0
    launch = ["replay"] if cuda_graph else []
    timed = ["mark", "copy", "mark", *launch, "mark", "copy", "mark", "synchronize"]
    assert runner._stream.calls[-len(timed) :] == timed


def test_a_split_call_after_another_batch_uses_its_own_buffers(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)
    first, second = torch.rand(3, 3, 32, 32), torch.rand(6, 3, 32, 32)
    runner.run_phases(first)
    logits = runner.run(second)["logits"].clone()
    torch.testing.assert_close(runner.run_phases(second)[0]["logits"], logits, rtol=0, atol=0)


def test_the_double_of_the_stream_has_the_real_streams_methods() -> None:
    def public(owner: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(owner, inspect.isfunction)
        return {name: list(inspect.signature(item).parameters) for name, item in methods if not name.startswith("_")}

    assert public(trt_double.DoubleStream) == public(CudaStream)


def test_specialisation_is_eager_and_said(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)
    eager = load_backend("tensorrt-rtx").trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert runner._session.engine.runtime_config.dynamic_shapes_kernel_specialization_strategy == eager
    assert ("kernel specialisation", "EAGER") in runner.info.details


@pytest.mark.parametrize(
    ("double", "real_name"),
    [
        (trt_double.DoubleContext, "IExecutionContext"),
        (trt_double.DoubleEngine, "ICudaEngine"),
        (trt_double.DoubleRuntime, "Runtime"),
    ],
)
def test_every_call_of_the_double_is_one_of_the_real_class(double: type, real_name: str) -> None:
    real = getattr(load_backend("tensorrt-rtx").trt, real_name)
    for name, member in inspect.getmembers(double, inspect.isfunction):
        if name.startswith("_"):
            continue
        documented = inspect.getdoc(getattr(real, name))
        assert documented is not None, f"{real_name}.{name}"
        wanted = [parameter for parameter in inspect.signature(member).parameters if parameter != "self"]
        signatures = re.findall(rf"{name}\(self: [^,)]+(?:, ([^)]*))?\) ->", documented)
        named = [re.findall(r"(\w+): ", signature) for signature in signatures]
        assert any(given[: len(wanted)] == wanted or set(wanted) <= set(given) for given in named), (
            name,
            wanted,
            named,
        )


@pytest.mark.parametrize(
    ("real_name", "attribute"),
    [
        ("IExecutionContext", "active_optimization_profile"),
        ("ICudaEngine", "num_io_tensors"),
        ("Runtime", "engine_host_code_allowed"),
    ],
)
def test_every_attribute_of_the_double_is_one_of_the_real_class(real_name: str, attribute: str) -> None:
    assert hasattr(getattr(load_backend("tensorrt-rtx").trt, real_name), attribute)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the refusal without one cannot be seen")
def test_no_gpu_behaviour_an_engine_is_refused_in_under_two_seconds(tiny_engine: Artifact) -> None:
    start = time.monotonic()
    with pytest.raises(MissingRequirementError, match="needs an NVIDIA GPU"):
        TensorRTRunner(tiny_engine)
    assert time.monotonic() - start < 2.0


def test_engine_wrong_runtime_version_is_refused_with_both(tiny_engine: Artifact) -> None:
    facts = replace(tiny_engine.manifest.facts, runtime_version="1.0.0.1")
    other = replace(tiny_engine, manifest=replace(tiny_engine.manifest, facts=facts))
    backend = load_backend("tensorrt-rtx")
    with pytest.raises(MissingRequirementError, match=f"1.0.0.1; {re.escape(backend.version)} is installed"):
        tensorrt_runner._check_release(other, backend)


def test_engine_wrong_sm_is_refused_with_both_names(
    tiny_engine: Artifact,
) -> None:
    with pytest.raises(MissingRequirementError, match="is for sm89; this GPU is sm75"):
        tensorrt_runner._check_gpu(tiny_engine, "sm75")


def test_a_gpu_that_torch_cannot_use_is_a_missing_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingRequirementError, match=r"torch .* cannot use it"):
        tensorrt_runner._current_target()


def test_an_engine_that_takes_another_type_than_its_manifest_says_is_refused(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CorruptArtifactError, match=r"'images': 'HALF'.*promises.*'images': 'FLOAT'"):
        make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch, images_type="HALF")


def test_images_on_another_device_are_refused(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, context = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)
    with pytest.raises(InputError, match="The images are on meta, the model on cpu"):
        runner.run(torch.rand(1, 3, 32, 32, device="meta"))
    assert context.calls == []


def test_dynamic_batch_bounds_between_two_profiles(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch, profiles=[(1, 1, 1), (4, 4, 8)])
    with pytest.raises(InputError, match="No profile of the engine holds a batch of 2"):
        runner.run(torch.rand(2, 3, 32, 32))


def test_engine_bit_flip_never_reaches_the_runtime(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / tiny_engine.path.name
    plan = bytearray(tiny_engine.path.read_bytes())
    plan[len(plan) // 2] ^= 1
    copy.write_bytes(plan)
    copy.with_suffix(".json").write_text(tiny_engine.path.with_suffix(".json").read_text())
    monkeypatch.setattr(backend_module, "find_gpus", lambda: (Gpu("NVIDIA L4", "sm89", "580.1", 23034),))
    monkeypatch.setattr(tensorrt_runner, "_current_target", lambda: "sm89")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    module, _ = trt_double.double_of(load_backend("tensorrt-rtx").trt, tiny_onnx_fp16.path, list(PROFILES))
    monkeypatch.setattr(tensorrt_runner, "load_backend", lambda name: Backend("tensorrt-rtx", module))
    with pytest.raises(CorruptArtifactError, match="was altered"):
        open_runner(replace(tiny_engine, path=copy))
    assert module.Runtime.plans == []


def test_the_benchmark_sees_that_this_runner_splits_its_time(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)
    assert isinstance(runner, PhasedRunner)
    assert not isinstance(OrtRunner(tiny_onnx_fp16.path), PhasedRunner)
    images = torch.rand(2, 3, 32, 32)
    contender = Contender("engine", runner)
    (timing,) = measure_together([contender], [images], TimingSpec(duration_seconds=0.01, min_calls=9))
    assert timing.gpu is not None
    assert timing.gpu.compute.calls == timing.latency.calls
