"""TensorRT runner: torch CUDA tensors bound as they are, every answer of the API checked.

What happens on a GPU was not run by the machines this project was written on; the order of calls follows the samples of
NVIDIA/TensorRT-RTX (samples/apiUsage) and is tested with a strict double of the runtime.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cnx_deploy.artifacts import Artifact, open_artifact
from cnx_deploy.errors import BuildError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.runners.base import InputSpec, RunnerInfo, check_input
from cnx_deploy.trt.backend import Backend, load_backend, require_gpu

__all__ = ["CudaStream", "TensorRTRunner"]


class CudaStream:
    """A stream of the engine's own, and what a runner asks of it. On the default stream TensorRT synchronises more."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.device_name: str = torch.cuda.get_device_name(device)

    @property
    def handle(self) -> int:
        """The stream as CUDA's API names it."""
        return int(self._stream.cuda_stream)

    def wait_for_producer(self) -> None:
        """Wait, on the GPU, for the stream on which the caller makes the images."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def keep(self, *tensors: Tensor) -> None:
        """Tell torch's allocator that this stream still uses the tensors: it frees blocks by its own streams."""
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def synchronize(self) -> None:
        """Block until all that was enqueued is done."""
        self._stream.synchronize()


class TensorRTRunner:
    """Run an engine on torch's current CUDA device; see `runners.base.Runner`.

    The engine is given to the deserialiser only after its hash has matched its manifest, with host code off.

    Raises MissingRequirementError without a GPU (in under two seconds), for an engine of another release or another
    GPU; CorruptArtifactError when the runtime refuses it all the same or it takes other types than its manifest says.
    """

    def __init__(self, artifact: Artifact) -> None:
        require_gpu()
        artifact = open_artifact(artifact.path)
        backend = load_backend(str(artifact.manifest.request["runtime"]))
        _check_release(artifact, backend)
        _check_gpu(artifact, _current_target())
        # TensorRT deserialises onto the current device, so that is the one to name.
        self._start(artifact, backend, torch.device("cuda", torch.cuda.current_device()))

    def _start(self, artifact: Artifact, backend: Backend, device: torch.device) -> None:
        """Deserialise and make the execution context; apart from the checks so that a double can stand in."""
        request = artifact.manifest.request
        self.device = device
        self._log = backend.recording_logger()
        self._runtime = backend.trt.Runtime(self._log)
        self._runtime.engine_host_code_allowed = False
        self._engine = self._runtime.deserialize_cuda_engine(artifact.path.read_bytes())
        if self._engine is None:
            raise CorruptArtifactError(
                f"{backend.name} {backend.version} refuses {artifact.path.name}: {self._last_message()} Build it again "
                "with cnx-deploy build-trt --force."
            )
        _check_types(self._engine, artifact)
        self._context, specialisation = backend.execution_context(self._engine)
        if self._context is None:
            raise BuildError(f"{backend.name} made no execution context: {self._last_message()} Is GPU memory free?")
        self._profiles = [tuple(sizes) for sizes in request["batches"]]
        self._classes = artifact.manifest.model.num_classes
        self._stream = CudaStream(device)
        self.input_spec = InputSpec(
            str(request["input_kind"]),
            artifact.manifest.model.image_size,
            min(low for low, _, _ in self._profiles),
            max(high for _, _, high in self._profiles),
        )
        self.info = RunnerInfo(
            backend=backend.name,
            version=backend.version,
            device=self._stream.device_name,
            precision=str(request["precision"]),
            arithmetic=str(request["precision"]),
            details=(
                ("kernel specialisation", specialisation),
                ("tf32", "on" if request["allow_tf32"] else "off"),
                ("cuda graph", "off"),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The context must go before its engine, and the engine before its runtime.
        self._context = self._engine = self._runtime = None

    def run(self, images: Tensor) -> Tensor:
        """Raw images on the GPU -> (N, num_classes) float32 logits on the GPU; blocks until they are there."""
        logits = self.enqueue(images)
        self._stream.synchronize()
        return logits

    def enqueue(self, images: Tensor) -> Tensor:
        """Start an inference on this runner's stream; the logits are valid once the stream has been synchronised.

        The stream first waits for the current one, where the images are made. A view that is not contiguous is copied:
        TensorRT would read its memory in the wrong order without a word.
        """
        check_input(images, self.input_spec)
        if images.device != self.device:
            raise InputError(f"The images are on {images.device}, the engine on {self.device}: move them there.")
        images = images.contiguous()
        self._stream.wait_for_producer()
        self._select_profile(len(images))
        self._check(self._context.set_input_shape("images", tuple(images.shape)), "set_input_shape")
        missing = self._context.infer_shapes()
        if missing:
            raise BuildError(f"The engine wants more inputs than images: {', '.join(missing)}.")
        shape = tuple(self._context.get_tensor_shape("logits"))
        logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        self._check(self._context.set_tensor_address("images", images.data_ptr()), "set_tensor_address(images)")
        self._check(self._context.set_tensor_address("logits", logits.data_ptr()), "set_tensor_address(logits)")
        self._check(self._context.execute_async_v3(self._stream.handle), "execute_async_v3")
        self._stream.keep(images, logits)
        return logits

    def _select_profile(self, batch: int) -> None:
        """The tightest profile that holds the batch."""
        holding = [index for index, (low, _, high) in enumerate(self._profiles) if low <= batch <= high]
        if not holding:
            raise InputError(f"No profile of the engine holds a batch of {batch}; it has {self._profiles}.")
        best = min(holding, key=lambda index: self._profiles[index][2])
        if self._context.active_optimization_profile != best:
            done = self._context.set_optimization_profile_async(best, self._stream.handle)
            self._check(done, "set_optimization_profile_async")

    def _check(self, done: bool, call: str) -> None:
        if not done:
            raise BuildError(f"TensorRT's {call} failed: {self._last_message()}")

    def _last_message(self) -> str:
        messages = [text for severity, text in self._log.messages if severity in ("ERROR", "INTERNAL_ERROR")]
        return " ".join(messages[-1].split()) if messages else "it gave no reason."


def _check_release(artifact: Artifact, backend: Backend) -> None:
    built_with = artifact.manifest.facts.get("runtime_version", "an unknown release")
    if built_with != backend.version:
        raise MissingRequirementError(
            f"{artifact.path.name} was built with {backend.name} {built_with}; {backend.version} is installed, and "
            "engines run on their own release only. Build it again (cnx-deploy build-trt --force) or install "
            f"{built_with}."
        )


def _current_target() -> str:
    """Compute capability of torch's current device, which CUDA_VISIBLE_DEVICES may have renumbered: "sm89"."""
    if not torch.cuda.is_available():
        raise MissingRequirementError(
            f"A GPU is here, but torch {torch.__version__} cannot use it: it was built for another CUDA or for none, "
            "or CUDA_VISIBLE_DEVICES hides it. `cnx-deploy doctor` says more."
        )
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _check_types(engine: Any, artifact: Artifact) -> None:
    """TensorRT reads a buffer as the type it was built for, whatever is in it: wrong logits, no error."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: engine.get_tensor_dtype(name).name for name in names}
    images = "UINT8" if artifact.manifest.request["input_kind"] == "uint8" else "FLOAT"
    expected = {"images": images, "logits": "FLOAT"}
    if found != expected:
        raise CorruptArtifactError(
            f"{artifact.path.name} takes and gives {found}; its manifest promises {expected}. Build it again with "
            "cnx-deploy build-trt --force."
        )


def _check_gpu(artifact: Artifact, found: str) -> None:
    target = str(artifact.manifest.request["target"])
    built_for = artifact.manifest.facts.get("gpu", target) if target == "current" else target
    if built_for not in ("current", found):
        raise MissingRequirementError(
            f"{artifact.path.name} is for {built_for}; this GPU is {found}. "
            "Build for it: cnx-deploy build-trt --target current."
        )
