"""A CUDA stream of a runner's own: what TensorRT is told to work on, how it is timed, and how its work is captured.

Not run by the machines this project was written on; `tests/support/trt_double.py` stands in for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["CudaStream"]


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

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy; one side in pinned host memory makes it asynchronous."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def pinned(self, like: Tensor) -> Tensor:
        """Page-locked host memory of the shape and type of `like`: the GPU copies from and to it by itself."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def mark(self) -> Any:
        """Enqueue a timing event and return it."""
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def milliseconds(self, earlier: Any, later: Any) -> float:
        """Time on the GPU between two marks that it has passed."""
        return float(earlier.elapsed_time(later))

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Record what `enqueue` puts on this stream as a CUDA graph, without running it."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local": another thread's harmless CUDA call, such as a logger's, does not spoil the capture.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            enqueue()
        return graph

    def replay(self, graph: Any) -> None:
        """Enqueue a captured graph: one launch for the whole network."""
        with torch.cuda.stream(self._stream):
            graph.replay()
