"""TensorRT runner: torch CUDA tensors bound as they are, every answer of the API checked.

What happens on a GPU was not run by the machines this project was written on; the order of calls follows the samples of
NVIDIA/TensorRT-RTX (samples/apiUsage) and is tested with a strict double of the runtime.
"""

import itertools
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cnx_deploy.core.artifacts import is_engine
from cnx_deploy.core.errors import (
    BuildError,
    CnxDeployError,
    CorruptArtifactError,
    InputError,
    MissingRequirementError,
    RefusedArtifactError,
)
from cnx_deploy.core.manifest import Artifact, EngineManifest, Launcher
from cnx_deploy.core.system import Machine
from cnx_deploy.data.input_spec import InputSpec, check_input
from cnx_deploy.exporters.graph_checks import ELEMENTS
from cnx_deploy.exporters.trt.backend import Backend, load_backend, require_gpu
from cnx_deploy.exporters.trt.plugins import prepare_runtime
from cnx_deploy.exporters.untrusted import describe_engine
from cnx_deploy.model.recorded import recorded_outputs
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.runners.base import PhaseTimes, RunnerInfo
from cnx_deploy.runners.cuda import CudaStream
from cnx_deploy.runners.registry import RunnerEntry, RunnerOptions, register_runner

__all__ = ["EngineSession", "TensorRTRunner"]


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Fixed memory for one batch size, on the GPU and pinned on the host, and the graph that works on it."""

    images: Tensor
    outputs: Outputs
    host_images: Tensor
    host_outputs: Outputs
    graph: Any | None


class EngineSession:
    """A deserialised plan and its execution context on `device`; every answer of TensorRT's API is checked.

    The runtime reads the plan with host code off, unless `launcher` says that the own kernels' launcher travels in it.
    A context serves one call at a time. Use it as a context manager.

    Raises CorruptArtifactError when the runtime refuses the plan, BuildError when a call to it fails.
    """

    def __init__(
        self, backend: Backend, plan: bytes, name: str, device: torch.device, launcher: Launcher | None = None
    ) -> None:
        self.device = device
        self._log = backend.recording_logger()
        self._runtime = backend.trt.Runtime(self._log)
        prepare_runtime(backend, self._runtime, launcher)
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise CorruptArtifactError(
                f"{backend.name} {backend.version} refuses {name}: {self._last_message()} Build it again with "
                "cnx-deploy build-trt --force."
            )
        self._context, self.specialisation = backend.execution_context(self.engine)
        if self._context is None:
            raise BuildError(
                f"{backend.name} made no execution context: {self._last_message()} Free GPU memory, or run a smaller "
                "batch."
            )
        self.stream = CudaStream(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The context must go before its engine, and the engine before its runtime.
        self._context = self.engine = self._runtime = None

    def tensor_types(self) -> dict[str, str]:
        """Return the type of each input and output by the tensor's name, as TensorRT calls it: "FLOAT", "HALF"."""
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        return {name: self.engine.get_tensor_dtype(name).name for name in names}

    def select_profile(self, index: int) -> None:
        """Change to another optimisation profile, where it is not the current one."""
        if self._context.active_optimization_profile != index:
            done = self._context.set_optimization_profile_async(index, self.stream.handle)
            self._check(done, "set_optimization_profile_async")

    def set_input_shape(self, images: Tensor, name: str = "images") -> None:
        """Tell the context the shape of a batch of images; `name` is that of the input."""
        self._check(self._context.set_input_shape(name, tuple(images.shape)), "set_input_shape")
        missing = self._context.infer_shapes()
        if missing:
            raise BuildError(
                f"The engine wants more inputs than images: {', '.join(missing)}. Build it from a file that "
                "cnx-deploy export wrote."
            )

    def empty(self, output: str, dtype: torch.dtype) -> Tensor:
        """Make a tensor for an output, of the shape that it has for the batch set by `set_input_shape`."""
        return torch.empty(tuple(self._context.get_tensor_shape(output)), dtype=dtype, device=self.device)

    def bind(self, **tensors: Tensor) -> None:
        """Give the context the address of each tensor by the name of the input or output."""
        for name, tensor in tensors.items():
            self._check(self._context.set_tensor_address(name, tensor.data_ptr()), f"set_tensor_address({name})")

    def execute(self) -> None:
        """Enqueue an inference on the bound tensors."""
        self._check(self._context.execute_async_v3(self.stream.handle), "execute_async_v3")

    def _check(self, done: bool, call: str) -> None:
        if not done:
            raise BuildError(f"TensorRT's {call} failed: {self._last_message()}")

    def _last_message(self) -> str:
        messages = [text for severity, text in self._log.messages if severity in ("ERROR", "INTERNAL_ERROR")]
        return " ".join(messages[-1].split()) if messages else "it gave no reason. Build the engine again."


class TensorRTRunner:
    """Run an engine on torch's current CUDA device; see `runners.base.Runner`.

    The engine is given to the deserialiser only after its hash has matched its manifest, with host code off.
    `allow_engine_code`: an engine with own kernels may run them, and the launcher that travels in it.
    `cuda_graph`: each batch size is captured at its first call and replayed with one launch from then on.
    `in_child_first`: have a child process read it before this one does, so that what ends the reader is an error.
    A context serves one call at a time, so threads that share a runner wait for each other in `run`. With a CUDA graph,
    and in `run_phases`, every call gives the same buffer: threads that read it later take a runner each.

    Raises RefusedArtifactError for own kernels that are not allowed; MissingRequirementError without a GPU, for an
    engine of another release or another GPU; CorruptArtifactError when the runtime refuses it all the same or it takes
    other types than its manifest says.
    """

    def __init__(
        self,
        artifact: Artifact[EngineManifest],
        *,
        cuda_graph: bool = False,
        in_child_first: bool = False,
        allow_engine_code: bool = False,
    ) -> None:
        _check_allowed(artifact, allow_engine_code)
        require_gpu()
        backend = load_backend(artifact.manifest.request.runtime)
        _check_release(artifact, backend)
        _check_gpu(artifact, _current_target())
        if in_child_first:
            describe_engine(artifact.path, backend.name, launcher=_launcher(artifact))
        # TensorRT deserialises onto the current device, so that is the one to name.
        self._start(artifact, backend, torch.device("cuda", torch.cuda.current_device()), cuda_graph)

    def _start(
        self, artifact: Artifact[EngineManifest], backend: Backend, device: torch.device, cuda_graph: bool
    ) -> None:
        """Deserialise and make the execution context; apart from the checks so that a double can stand in."""
        request = artifact.manifest.request
        self.device = device
        self._session = EngineSession(
            backend, artifact.path.read_bytes(), artifact.path.name, device, _launcher(artifact)
        )
        _check_types(self._session, artifact)
        self._profiles = list(request.batches)
        self._input = _input_name(artifact)
        self._outputs = {spec.name: getattr(torch, spec.dtype) for spec in recorded_outputs(artifact)}
        self._stream = self._session.stream
        self._cuda_graph = cuda_graph
        self._buffers: _Buffers | None = None
        self._one_call = threading.Lock()
        self.input_spec = InputSpec.of(
            request.onnx.deploy,
            min(low for low, _, _ in self._profiles),
            max(high for _, _, high in self._profiles),
        )
        self.info = RunnerInfo(
            backend=backend.name,
            version=backend.version,
            device=self._stream.device_name,
            precision=request.onnx.deploy.precision,
            arithmetic=request.onnx.deploy.precision,
            details=(
                ("kernel specialisation", self._session.specialisation),
                ("tf32", "on" if request.allow_tf32 else "off"),
                ("cuda graph", "on" if cuda_graph else "off"),
                *((("own kernels", request.fused),) if request.fused is not None else ()),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._buffers = None  # the graph must go before its context
        self._session.__exit__(kind, error, trace)

    def run(self, images: Tensor) -> Outputs:
        """Raw images on the GPU -> outputs on the GPU, float32 or int64; blocks until they are there."""
        with self._one_call:
            outputs = self.enqueue(images)
            self._stream.synchronize()
        return outputs

    def enqueue(self, images: Tensor) -> Outputs:
        """Start an inference on this runner's stream; the outputs are valid once the stream has been synchronised.

        The stream first waits for the current one, where the images are made. A view that is not contiguous is copied:
        TensorRT would read its memory in the wrong order without a word.
        """
        check_input(images, self.input_spec, self.device)
        images = images.contiguous()
        if self._cuda_graph:
            buffers = self._buffers_for(images)
            self._stream.wait_for_producer()
            self._stream.copy(buffers.images, images)
            self._stream.replay(buffers.graph)
            self._stream.keep(images)
            return buffers.outputs
        self._stream.wait_for_producer()
        outputs = self._bind(images)
        self._session.execute()
        self._stream.keep(images, *outputs.values())
        return outputs

    def run_phases(self, images: Tensor) -> tuple[Outputs, PhaseTimes]:
        """Images in host memory -> outputs in host memory, and the milliseconds of each part of the call.

        Both go through pinned memory; filling it is not timed. The outputs are overwritten by the next call.
        """
        check_input(images, self.input_spec)
        buffers = self._buffers_for(images)
        buffers.host_images.copy_(images)
        if buffers.graph is None:
            self._bind(buffers.images, buffers.outputs)
        stream, marks = self._stream, [self._stream.mark()]
        stream.copy(buffers.images, buffers.host_images)
        marks.append(stream.mark())
        start = time.perf_counter_ns()
        if buffers.graph is None:
            self._session.execute()
        else:
            stream.replay(buffers.graph)
        enqueue_ms = (time.perf_counter_ns() - start) / 1e6
        marks.append(stream.mark())
        for name, output in buffers.outputs.items():
            stream.copy(buffers.host_outputs[name], output)
        marks.append(stream.mark())
        stream.synchronize()
        h2d, compute, d2h = (stream.milliseconds(*pair) for pair in itertools.pairwise(marks))
        return buffers.host_outputs, PhaseTimes(h2d, compute, d2h, enqueue_ms)

    def _buffers_for(self, images: Tensor) -> _Buffers:
        """The buffers of this shape, made at its first call.

        One shape at a time: a graph is only good while the context it was captured from is not changed.
        """
        if self._buffers is None or self._buffers.images.shape != images.shape:
            self._stream.synchronize()  # the older buffers may be in use
            self._buffers = None
            inputs = torch.zeros(tuple(images.shape), dtype=images.dtype, device=self.device)
            self._stream.wait_for_producer()
            outputs = self._bind(inputs)
            graph = self._captured() if self._cuda_graph else None
            pinned = {name: self._stream.pinned(output) for name, output in outputs.items()}
            self._buffers = _Buffers(inputs, outputs, self._stream.pinned(inputs), pinned, graph)
        return self._buffers

    def _captured(self) -> Any:
        """A graph of one inference on the bound tensors; the run before it does what TensorRT puts off until then."""
        self._session.execute()
        self._stream.synchronize()
        try:
            return self._stream.capture(self._session.execute)
        except RuntimeError as error:  # torch's word for a capture that CUDA refused
            raise BuildError(f"The engine cannot be captured ({error}). Run it without a CUDA graph.") from error

    def _bind(self, images: Tensor, outputs: Outputs | None = None) -> Outputs:
        """Give the context shape and addresses of all tensors; outputs are made where there are none, and returned."""
        self._select_profile(len(images))
        self._session.set_input_shape(images, self._input)
        if outputs is None:
            outputs = {name: self._session.empty(name, dtype) for name, dtype in self._outputs.items()}
        self._session.bind(**{self._input: images}, **outputs)
        return outputs

    def _select_profile(self, batch: int) -> None:
        """The tightest profile that holds the batch."""
        holding = [index for index, (low, _, high) in enumerate(self._profiles) if low <= batch <= high]
        if not holding:
            raise InputError(
                f"No profile of the engine holds a batch of {batch}; its ranges are {self._profiles}. Build it "
                "again with a --batch range that does."
            )
        self._session.select_profile(min(holding, key=lambda index: self._profiles[index][2]))


def _check_allowed(artifact: Artifact[EngineManifest], allowed: bool) -> None:
    """Raise RefusedArtifactError for an engine with own kernels unless the user allows what it brings."""
    own = artifact.manifest.facts.own_kernels
    if own is not None and not allowed:
        brings = "host code that launches them" if own.launcher == "engine" else "code that this process launches"
        raise RefusedArtifactError(
            f"{artifact.path.name} is refused: it carries {len(own.kernels)} own kernels and {brings}. Its hash is "
            "that of its manifest; if you trust who wrote both, add --allow-engine-code (allow_engine_code=True)."
        )


def _launcher(artifact: Artifact[EngineManifest]) -> Launcher | None:
    own = artifact.manifest.facts.own_kernels
    return None if own is None else own.launcher


def _check_release(artifact: Artifact[EngineManifest], backend: Backend) -> None:
    built_with = artifact.manifest.facts.runtime_version
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


def _check_types(session: EngineSession, artifact: Artifact[EngineManifest]) -> None:
    """TensorRT reads a buffer as the type it was built for, whatever is in it: wrong outputs, no error."""
    found = session.tensor_types()
    images = "UINT8" if artifact.manifest.deploy.input_kind == "uint8" else "FLOAT"
    expected = {
        _input_name(artifact): images,
        **{spec.name: ELEMENTS[spec.dtype] for spec in recorded_outputs(artifact)},
    }
    if found != expected:
        raise CorruptArtifactError(
            f"{artifact.path.name} takes and gives {found}; its manifest promises {expected}. Build it again with "
            "cnx-deploy build-trt --force."
        )


def _input_name(artifact: Artifact) -> str:
    """What the engine's input is called: by us, or in the ONNX file that came from elsewhere."""
    graph = artifact.manifest.model.graph
    return "images" if graph is None else graph.input


def _check_gpu(artifact: Artifact[EngineManifest], found: str) -> None:
    built_for = artifact.manifest.target
    if built_for not in ("current", found):
        raise MissingRequirementError(
            f"{artifact.path.name} is for {built_for}; this GPU is {found}. "
            "Build for it: cnx-deploy build-trt --target current."
        )


def _reason(artifact: Artifact, machine: Machine) -> CnxDeployError | None:
    """No driver or no GPU; what only the runtime can tell is told when the engine is opened."""
    try:
        require_gpu()
    except MissingRequirementError as error:
        return error
    return None


def _opened(artifact: Artifact, options: RunnerOptions) -> TensorRTRunner:
    assert is_engine(artifact)
    return TensorRTRunner(
        artifact,
        cuda_graph=options.cuda_graph,
        in_child_first=options.in_child_first,
        allow_engine_code=options.allow_engine_code,
    )


register_runner(RunnerEntry(name="tensorrt", kinds=("engine",), can_run=_reason, open=_opened, is_default=True))
