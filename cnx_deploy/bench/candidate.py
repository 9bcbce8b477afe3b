"""What is timed: a runner under the name of its row, and what making it took in time and memory."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cnx_deploy.core.gates import Gate
from cnx_deploy.data import runner_input
from cnx_deploy.runners.base import Runner

__all__ = ["Candidate", "create", "peak_memory_mib", "reset_peak_memory"]

MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A runner to time, under the name its row has; `create_seconds` is what making it took, without its first call.

    `device_memory_mib`: what free device memory fell by from before it was made until after its first call, on its
    smallest batch, without CUDA's context: right only when alone on the GPU. None on a CPU and where it did not fall.
    `is_peer`: the others' speed is given as a ratio to this one. `input_from_pixels` makes another input than our
    files take of (N, S, S, 3) uint8 pixels.
    """

    name: str
    runner: Runner
    create_seconds: float
    peak_memory_mib: float | None
    gate: Gate | None = None
    network: str = ""
    is_peer: bool = False
    cold_call_ms: float | None = None
    input_from_pixels: Callable[[Tensor], Tensor] | None = None
    device_memory_mib: float | None = None

    def images_from_pixels(self, pixels: Tensor) -> Tensor:
        """(N, S, S, 3) uint8 pixels -> the batch this candidate takes, in host memory."""
        if self.input_from_pixels is not None:
            return self.input_from_pixels(pixels)
        return runner_input(pixels, self.runner.input_spec.kind)


def create(name: str, network: str, make: Callable[[], Runner], gate: Gate, stack: ExitStack) -> Candidate:
    """Make a runner, which `stack` closes, and call it once on its smallest batch, which the memory includes.

    Where there is a GPU, CUDA's context is made before, and is in no runner's time or memory.
    """
    free_before = _free_device_mib()
    before = reset_peak_memory()
    start = time.perf_counter()
    runner = stack.enter_context(make())
    create_seconds = time.perf_counter() - start
    spec = runner.input_spec
    images = torch.zeros(spec.shape(spec.min_batch), dtype=spec.dtype, device=runner.device)
    start = time.perf_counter()
    runner.run(images)
    cold_call_ms = 1000.0 * (time.perf_counter() - start)
    peak = peak_memory_mib()
    grown = None if peak is None else max(0.0, peak - before)
    return Candidate(
        name, runner, create_seconds, grown, gate, network, cold_call_ms=cold_call_ms,
        device_memory_mib=_taken_on_device(free_before, runner.device),
    )  # fmt: skip


def reset_peak_memory() -> float:
    """Set the process's peak memory to what it uses now; returns that in MiB, or 0 where the system cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return 0.0
    return peak_memory_mib() or 0.0


def peak_memory_mib() -> float | None:
    """Peak resident memory of this process in MiB since the last reset; None where the system cannot tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _free_device_mib() -> float | None:
    """Free memory of torch's CUDA device before a runner is made, in MiB; None without a usable GPU.

    CUDA's context is made here, so that it counts for no runner, and torch's unused blocks are given back, so that a
    runner's memory does not come from those of the one before.
    """
    if not torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / MIB
    except RuntimeError:  # torch's word for a GPU that takes no process more
        return None


def _taken_on_device(free_before: float | None, device: torch.device) -> float | None:
    """MiB by which free memory has fallen on a runner's device; None where it is another device than before."""
    if free_before is None or device.type != "cuda" or device.index not in (None, torch.cuda.current_device()):
        return None
    taken = free_before - torch.cuda.mem_get_info()[0] / MIB
    return taken if taken > 0 else None  # not where someone gave memory back
