"""A throw-away engine with every output of an ONNX file: compiled for this machine's GPU, run, and forgotten.

Not run by the machines this project was written on; the order of calls is that of `runners.tensorrt_runner`, and a
double of the runtime stands in for it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.errors import BuildError, InputError, MissingRequirementError
from cnx_deploy.core.system import find_gpus
from cnx_deploy.exporters.trt.backend import Backend, load_backend, require_gpu
from cnx_deploy.exporters.trt.depthwise import written_for
from cnx_deploy.exporters.trt.network import NetworkBuild
from cnx_deploy.runners.cuda import CudaStream

__all__ = ["Engine", "compiled_engine", "compiled_plan"]

TORCH_TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "UINT8": torch.uint8}
"""By TensorRT's names: what a network of ours takes and gives."""


@contextlib.contextmanager
def compiled_engine(path: Path, batch: int) -> Iterator["Engine"]:
    """Compile an ONNX file for one batch size and this machine's GPU, and make it ready to run.

    Raises MissingRequirementError without a GPU that torch can use or without TensorRT, BuildError when TensorRT makes
    no engine.
    """
    require_gpu()
    if not torch.cuda.is_available():
        raise MissingRequirementError(
            f"A GPU is here, but torch {torch.__version__} cannot use it. `cnx-deploy doctor` says more."
        )
    backend = load_backend()
    plan = compiled_plan(backend, path, "current", batch)
    yield Engine(backend, plan, path.name, torch.device("cuda", torch.cuda.current_device()))


def compiled_plan(backend: Backend, path: Path, target: str, batch: int) -> bytes:
    """The plan of an ONNX file for `target` ("current" or "sm89") and one batch size; TF32 is off."""
    gpu = find_gpus()[0].target if target == "current" else target
    rewritten = written_for(path, gpu) if backend.name == "tensorrt-rtx" else contextlib.nullcontext(path)
    with rewritten as written:
        build = NetworkBuild(backend, written)
        return build.serialise(build.config(target, allow_tf32=False, batches=((batch, batch, batch),)))


class Engine:
    """A deserialised plan on `device`; `run` gives every output by name. Its one input is called images."""

    def __init__(self, backend: Backend, plan: bytes, name: str, device: torch.device) -> None:
        self._log = backend.recording_logger()
        self._runtime = backend.trt.Runtime(self._log)
        self._runtime.engine_host_code_allowed = False
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BuildError(f"{backend.name} refuses the engine that it made of {name}: {self._last_message()}")
        self._context, _ = backend.execution_context(self._engine)
        if self._context is None:
            raise BuildError(
                f"{backend.name} made no execution context: {self._last_message()} Free GPU memory, or run a smaller "
                "batch."
            )
        self._device, self._stream = device, CudaStream(device)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._types = {name: _torch_type(self._engine, name) for name in names}

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Raw images in host memory -> every output in host memory, in its own type."""
        images = images.contiguous().to(self._device)
        self._check(self._context.set_input_shape("images", tuple(images.shape)), "set_input_shape")
        if missing := self._context.infer_shapes():
            raise BuildError(
                f"The engine wants more inputs than images: {', '.join(missing)}. Build it from a file that "
                "cnx-deploy export wrote."
            )
        outputs = {
            name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=kind, device=self._device)
            for name, kind in self._types.items()
            if name != "images"
        }
        for name, tensor in {"images": images, **outputs}.items():
            self._check(self._context.set_tensor_address(name, tensor.data_ptr()), f"set_tensor_address({name})")
        self._stream.wait_for_producer()
        self._check(self._context.execute_async_v3(self._stream.handle), "execute_async_v3")
        self._stream.keep(images, *outputs.values())
        self._stream.synchronize()
        return {name: tensor.cpu() for name, tensor in outputs.items()}

    def _check(self, done: bool, call: str) -> None:
        if not done:
            raise BuildError(f"TensorRT's {call} failed: {self._last_message()}")

    def _last_message(self) -> str:
        messages = [text for severity, text in self._log.messages if severity in ("ERROR", "INTERNAL_ERROR")]
        return " ".join(messages[-1].split()) if messages else "it gave no reason. Build the engine again."


def _torch_type(engine: Any, name: str) -> torch.dtype:
    kind = engine.get_tensor_dtype(name).name
    if kind not in TORCH_TYPES:
        raise InputError(
            f"The tensor {name} of the engine is {kind}; a layer's output is one of {', '.join(TORCH_TYPES)}. Leave "
            "out this side."
        )
    return TORCH_TYPES[kind]
