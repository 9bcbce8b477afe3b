"""A strict double of TensorRT's runtime: the calls of a real engine, answered by ONNX Runtime on the CPU.

`test_tensorrt_runner.py` checks that every method and attribute here exists on the real classes and takes the same
arguments. It refuses a call out of order, an address that was not set, and a shape outside the profile.
"""

import ctypes
import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime


class TensorIOMode(enum.Enum):
    """Names of the real enumeration."""

    INPUT = 1
    OUTPUT = 2


class DoubleContext:
    """IExecutionContext. `fail` names the call that answers False (or, for infer_shapes, a missing tensor)."""

    def __init__(self, session: Any, profiles: list[tuple[int, int, int]], fail: str | None) -> None:
        self._session = session
        self.profiles = profiles
        self._fail = fail
        self._shape: tuple[int, ...] | None = None
        self._addresses: dict[str, int] = {}
        self.active_optimization_profile = 0
        self.calls: list[str] = []

    def _answer(self, call: str) -> bool:
        self.calls.append(call)
        return call != self._fail

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.active_optimization_profile = profile_index
        self._shape = None
        return self._answer("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.profiles[self.active_optimization_profile]
        assert name == "images"
        assert low <= shape[0] <= high, "a shape outside the profile"
        self._shape = shape
        return self._answer("set_input_shape")

    def infer_shapes(self) -> list[str]:
        assert self._shape is not None, "infer_shapes before set_input_shape"
        return [] if self._answer("infer_shapes") else ["images"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self._shape is not None
        return self._shape if name == "images" else (self._shape[0], self._session.get_outputs()[0].shape[-1])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return self._answer(f"set_tensor_address({name})")

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle != 0, "the default stream"
        assert set(self._addresses) == {"images", "logits"}, "an address is missing"
        assert self._shape is not None
        if not self._answer("execute_async_v3"):
            return False
        kind = np.uint8 if "uint8" in self._session.get_inputs()[0].type else np.float32
        images = _memory(self._addresses["images"], self._shape, kind)
        logits = self._session.run(None, {"images": images})[0]
        _memory(self._addresses["logits"], logits.shape, np.float32)[...] = logits
        return True


class DoubleEngine:
    """ICudaEngine. `types` are those of its tensors, as TensorRT names them."""

    def __init__(self, context: DoubleContext | None, types: dict[str, str]) -> None:
        self._context = context
        self._types = types
        self.num_io_tensors = len(types)
        self.num_layers = 7
        self.num_optimization_profiles = 0 if context is None else len(context.profiles)
        self.runtime_config: Any = None

    def get_tensor_name(self, index: int) -> str:
        return list(self._types)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self._types[name])

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name == "images" else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3, 32, 32) if name == "images" else (-1, 10)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert self._context is not None
        assert name == "images", "only inputs have profiles"
        return [(batch, 3, 32, 32) for batch in self._context.profiles[profile_index]]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=None)

    def create_execution_context(self, runtime_config: Any = None) -> DoubleContext | None:
        self.runtime_config = runtime_config
        return self._context


class DoubleRuntime:
    """Runtime. Made by `double_of`, which gives it the engine it deserialises to."""

    engine: DoubleEngine | None = None
    plans: list[bytes]
    host_code = False

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.engine_host_code_allowed = not self.host_code  # so that a runner that forgets to set it is seen

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> DoubleEngine | None:
        assert self.engine_host_code_allowed is self.host_code, "host code must be off, or on for a launcher alone"
        self.plans.append(serialized_engine)
        return self.engine


class DoubleStream:
    """What `runners.tensorrt_runner.CudaStream` offers, without a GPU."""

    device_name = "double"
    handle = 7

    def __init__(self, device: Any) -> None:
        self.calls: list[str] = []
        self.marks = 0
        self.refuses_capture = False

    def wait_for_producer(self) -> None:
        self.calls.append("wait")

    def keep(self, *tensors: Any) -> None:
        self.calls.append("keep")

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def copy(self, target: Any, source: Any) -> None:
        self.calls.append("copy")
        target.copy_(source)

    def pinned(self, like: Any) -> Any:
        return like.clone()

    def mark(self) -> int:
        """The n-th mark lies at n² milliseconds, so that every distance is another."""
        self.calls.append("mark")
        self.marks += 1
        return self.marks**2

    def milliseconds(self, earlier: int, later: int) -> float:
        return float(later - earlier)

    def capture(self, enqueue: Any) -> Any:
        """What is enqueued is the graph; the real stream records it in the same order."""
        if self.refuses_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.calls.append("capture")
        return enqueue

    def replay(self, graph: Any) -> None:
        self.calls.append("replay")
        graph()


def double_of(
    real_trt: Any,
    onnx_path: Path,
    profiles: list[tuple[int, int, int]],
    *,
    fail: str | None = None,
    images_type: str = "FLOAT",
    host_code: bool = False,
) -> tuple[Any, DoubleContext]:
    """A module to take TensorRT's place, and the context it will hand out. `fail="deserialize"` gives no engine.

    `host_code`: whether it has to be allowed when an engine is read.
    """
    session = onnxruntime.InferenceSession(str(onnx_path), providers=["CPUExecutionProvider"])
    context = DoubleContext(session, profiles, fail)
    types = {"images": images_type, "logits": "FLOAT"}
    engine = DoubleEngine(None if fail == "create_execution_context" else context, types)
    runtime = type(
        "Runtime",
        (DoubleRuntime,),
        {"engine": None if fail == "deserialize" else engine, "plans": [], "host_code": host_code},
    )
    module = SimpleNamespace(
        __version__=real_trt.__version__,
        ILogger=real_trt.ILogger,
        Runtime=runtime,
        TensorIOMode=TensorIOMode,
        DynamicShapesKernelSpecializationStrategy=real_trt.DynamicShapesKernelSpecializationStrategy,
    )
    return module, context


def _memory(address: int, shape: tuple[int, ...], kind: Any) -> np.ndarray[Any, Any]:
    """The array that lies at an address."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    buffer = (ctypes.c_byte * size).from_address(address)
    return np.frombuffer(buffer, dtype=kind).reshape(shape)
