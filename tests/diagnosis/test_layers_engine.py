"""TensorRT's side of a comparison by layer: the real compiler, and a double of the runtime."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cnx_deploy.core.errors import BuildError, InputError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.diagnosis.layerwise import engine as layers_engine
from cnx_deploy.diagnosis.layerwise import sides as layers_sides
from cnx_deploy.diagnosis.layerwise.engine import Engine, compiled_plan
from cnx_deploy.diagnosis.layerwise.report import table
from cnx_deploy.diagnosis.layerwise.sides import SIDES, reference_form
from cnx_deploy.diagnosis.layerwise.taps import module_names, tapped_copy, taps_in_file
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.exporters.trt.network import NetworkBuild
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from tests.support import trt_double
from tests.support.layer_faults import (
    IMAGES,
    beginnings,
    compare,
    planted,
    shifted,
    spec_of,
    with_constant,
)


def test_the_tapped_copy_is_compiled_with_its_layers_as_outputs(
    tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2
) -> None:
    backend = load_backend("tensorrt-rtx")
    taps = taps_in_file(tiny_onnx_fp16.path, module_names(reference_form(tiny_model, spec_of(tiny_onnx_fp16))))
    with tapped_copy(tiny_onnx_fp16.path, taps.tensors) as copy:
        network = NetworkBuild(backend, copy).network
        names = {network.get_output(index).name for index in range(network.num_outputs)}
        assert names == set(taps.tensors)
        assert len(compiled_plan(backend, copy, "sm89", 2)) > 10_000


class DoubleOfAll(trt_double.DoubleContext):
    """The double's context for a network with further outputs."""

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self._shape is not None
        shapes = {each.name: each.shape for each in self._session.get_outputs()}
        return self._shape if name == "images" else (self._shape[0], *shapes[name][1:])

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle != 0, "the default stream"
        outputs = self._session.get_outputs()
        assert set(self._addresses) == {"images", *(each.name for each in outputs)}, "an address is missing"
        assert self._shape is not None
        if not self._answer("execute_async_v3"):
            return False
        images = trt_double._memory(self._addresses["images"], self._shape, np.float32)
        for each, values in zip(outputs, self._session.run(None, {"images": images}), strict=True):
            trt_double._memory(self._addresses[each.name], values.shape, values.dtype)[...] = values
        return True


def double_engine(path: Path, monkeypatch: pytest.MonkeyPatch, fail: str | None = None, kind: str = "HALF") -> Engine:
    """An engine whose runtime is the double: ONNX Runtime on `path`, which may have further outputs."""
    real = load_backend("tensorrt-rtx").trt
    module, context = trt_double.double_of(real, path, [(2, 2, 2)], fail=fail)
    types = {"tensor(float)": "FLOAT", "tensor(float16)": kind}
    context.__class__ = DoubleOfAll
    if module.Runtime.engine is not None:
        outputs = {each.name: types[each.type] for each in context._session.get_outputs()}
        module.Runtime.engine._types = {"images": "FLOAT", **outputs}
        module.Runtime.engine.num_io_tensors = len(outputs) + 1
    monkeypatch.setattr(layers_engine, "CudaStream", trt_double.DoubleStream)
    return Engine(Backend("tensorrt-rtx", module), b"plan", path.name, torch.device("cpu"))


@pytest.mark.parametrize("fault", [False, True])
def test_an_engine_is_compared_by_layer_like_the_other_sides(
    tiny_onnx_fp16: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    @contextlib.contextmanager
    def engine(path: Path, batch: int) -> Iterator[Engine]:
        assert batch == 2
        yield double_engine(path, monkeypatch)

    monkeypatch.setattr(layers_sides, "compiled_engine", engine)
    path = tiny_onnx_fp16.path
    if fault:
        path = planted(tiny_onnx_fp16, tmp_path, with_constant("stages.1.0.dwconv.bias", shifted))
    found = compare(tiny_onnx_fp16, path, sides=[side for side in SIDES if side.name == "tensorrt"])
    assert beginnings(found) == {"tensorrt": "stages.1.0.dwconv" if fault else None}


@pytest.mark.parametrize(
    "call",
    ["deserialize", "create_execution_context", "set_input_shape", "infer_shapes", "set_tensor_address(logits)",
     "execute_async_v3"],
)  # fmt: skip
def test_a_false_answer_of_the_runtime_is_an_error(
    tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with pytest.raises(BuildError, match=r"tensorrt-rtx|TensorRT|engine wants"):
        double_engine(tiny_onnx_fp16.path, monkeypatch, fail=call).run(IMAGES)


def test_an_output_of_a_type_that_no_layer_has_is_refused(
    tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2, monkeypatch: pytest.MonkeyPatch
) -> None:
    taps = taps_in_file(tiny_onnx_fp16.path, module_names(reference_form(tiny_model, spec_of(tiny_onnx_fp16))))
    with tapped_copy(tiny_onnx_fp16.path, taps.tensors) as copy, pytest.raises(InputError, match="is FP8"):
        double_engine(copy, monkeypatch, kind="FP8")


def test_without_a_gpu_tensorrt_is_not_run_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tiny_onnx_fp16: Artifact
) -> None:
    def no_gpu() -> None:
        raise MissingRequirementError("This needs an NVIDIA GPU.")

    monkeypatch.setattr(layers_engine, "require_gpu", no_gpu)
    found = compare(tiny_onnx_fp16, sides=SIDES[3:])
    assert (found.sides[0].taps, found.sides[0].not_run) == ((), "This needs an NVIDIA GPU.")
    assert "tensorrt: not run: This needs an NVIDIA GPU." in list(table(found))
