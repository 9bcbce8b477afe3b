"""What a row on a GPU costs: joules an image and device memory, as the driver counts them (NVML, nvidia-ml-py).

The energy is the difference of the driver's counter (nvmlDeviceGetTotalEnergyConsumption, millijoules of the whole
board, Volta and newer) over a pass in which one candidate runs alone. The counter moves every 20 to 100 ms only, so
calls taken in turns cannot be told apart; both ends of the pass lie on a movement of it. Nothing is subtracted: what
the board draws when idle is in the figure.

Not run on a GPU by the machines this project was written on; doubles of NVML cover it.
"""

import importlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.runners.base import Runner

__all__ = ["DeviceMemory", "Energy", "measure_energy", "memory_before", "memory_grown_since", "process_memory_mib"]

STANDSTILL_SECONDS = 1.0
"""A counter that has not moved for this long, ten times its slowest step, does not count."""

BY_NVML = "this process, by NVML"
BY_CUDA = "fall of free memory, right only when alone on the GPU"
"""Where a figure of device memory is from."""

MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class Energy:
    """What the board drew while one candidate ran alone for `seconds`, its images already on the GPU.

    `watts` is the mean; `images` those of whole batches between two movements of the driver's counter.
    """

    joules_per_image: float
    watts: float
    seconds: float
    images: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory in use on CUDA's device `index` at one moment, in MiB.

    `process_mib`: this process's, None where NVML does not list it under its own number, as in most containers.
    `device_mib`: everybody's.
    """

    index: int
    process_mib: float | None
    device_mib: float


class _UnknownError(Exception):
    """NVML cannot say, for the reason in its message."""


@dataclass(frozen=True, slots=True)
class _Gpu:
    """A GPU as NVML knows it."""

    nvml: Any
    handle: Any

    def ask(self, function: str) -> Any:
        """The answer of a function of NVML about this GPU; _UnknownError where it has none."""
        try:
            return getattr(self.nvml, function)(self.handle)
        except (self.nvml.NVMLError, self.nvml.NVMLLibraryMismatchError) as error:
            raise _UnknownError(f"{function} answers {str(error)!r} on this GPU and driver") from error

    def memory_by_pid(self) -> dict[int, int | None]:
        """Processes that compute here, with their bytes of device memory where the driver tells them."""
        return {each.pid: each.usedGpuMemory for each in self.ask("nvmlDeviceGetComputeRunningProcesses")}

    def is_shared_out(self) -> bool:
        """Whether the GPU is in MIG mode, in which the counter is that of all its instances."""
        try:
            return bool(self.ask("nvmlDeviceGetMigMode")[0])
        except _UnknownError:
            return False  # a GPU without the mode


@dataclass(frozen=True, slots=True)
class _Movement:
    """The counter right after it moved: when, what it says, and the calls made while waiting for it."""

    seconds: float
    millijoules: int
    calls: int


def measure_energy(runner: Runner, images: Tensor, seconds: float) -> tuple[Energy | None, tuple[str, ...]]:
    """Run a batch that lies on the runner's CUDA device again and again, alone, for at least `seconds`.

    Returns the energy, or None without package, driver or counter, in MIG mode and where other processes compute on
    the same GPU; and remarks that say why, or what makes the figure doubtful.
    """
    try:
        with _gpu_of(runner.device) as gpu:
            return _metered(gpu, runner, images, seconds)
    except _UnknownError as error:
        return None, (f"energy not measured: {error}",)


def process_memory_mib(device: torch.device) -> float | None:
    """MiB of device memory that NVML says this process uses on a CUDA device; None where it does not say."""
    try:
        with _gpu_of(device) as gpu:
            used = gpu.memory_by_pid().get(os.getpid())
    except _UnknownError:
        return None
    return used / MIB if used else None  # in containers some drivers list the process with 0 bytes


def memory_before() -> DeviceMemory | None:
    """What is in use on torch's CUDA device before a runner is made; None without a usable GPU.

    CUDA's context is made here, so that it counts for no runner, and torch's unused blocks are given back, so that a
    runner's memory does not come from those of the one before.
    """
    if not torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        return _memory_now(torch.cuda.current_device())
    except RuntimeError:  # torch's word for a GPU that takes no process more
        return None


def memory_grown_since(before: DeviceMemory | None, device: torch.device) -> tuple[float | None, str]:
    """MiB by which the memory in use on a runner's device has grown, and where the figure is from.

    (None, "") on a CPU, on another device than before, and where it has not grown: then someone gave memory back.
    """
    if before is None or device.type != "cuda" or device.index not in (None, before.index):
        return None, ""
    now = _memory_now(before.index)
    if before.process_mib is not None and now.process_mib is not None:
        grown, source = now.process_mib - before.process_mib, BY_NVML
    else:
        grown, source = now.device_mib - before.device_mib, BY_CUDA
    return (grown, source) if grown > 0 else (None, "")


def _memory_now(index: int) -> DeviceMemory:
    free, total = torch.cuda.mem_get_info(index)
    return DeviceMemory(index, process_memory_mib(torch.device("cuda", index)), (total - free) / MIB)


@contextmanager
def _gpu_of(device: torch.device) -> Iterator[_Gpu]:
    """The GPU that torch calls `device`, by its UUID: CUDA_VISIBLE_DEVICES renumbers torch's GPUs and not NVML's."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError as error:
        raise _UnknownError('nvidia-ml-py is not installed: pip install "cnx-deploy[nvml]"') from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _UnknownError(f"NVML does not start ({error}): is the NVIDIA driver loaded?") from error
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except nvml.NVMLError as error:
            raise _UnknownError(f"NVML has no GPU-{uuid}, which is torch's {device} ({error})") from error
        yield _Gpu(nvml, handle)
    finally:
        nvml.nvmlShutdown()


def _metered(gpu: _Gpu, runner: Runner, images: Tensor, seconds: float) -> tuple[Energy, tuple[str, ...]]:
    if gpu.is_shared_out():
        raise _UnknownError("the GPU is in MIG mode, and its counter is that of all instances")
    _refuse_company(gpu)
    start, calls = _next_movement(gpu, runner, images), 0
    while time.perf_counter() - start.seconds < seconds:
        runner.run(images)
        calls += 1
    end = _next_movement(gpu, runner, images)
    joules, duration = (end.millijoules - start.millijoules) / 1000.0, end.seconds - start.seconds
    if joules <= 0:
        raise _UnknownError(f"the counter went from {start.millijoules} to {end.millijoules} mJ: measure again")
    total = (calls + end.calls) * len(images)
    return Energy(joules / total, joules / duration, duration, total), _refuse_company(gpu)


def _next_movement(gpu: _Gpu, runner: Runner, images: Tensor) -> _Movement:
    """Make calls until the counter has moved after one of them."""
    counter = "nvmlDeviceGetTotalEnergyConsumption"
    before, begin, calls = gpu.ask(counter), time.perf_counter(), 0
    while True:
        runner.run(images)
        calls += 1
        found, now = gpu.ask(counter), time.perf_counter()
        if found != before:
            return _Movement(now, found, calls)
        if now - begin > STANDSTILL_SECONDS:
            raise _UnknownError(f"the GPU's energy counter stands still at {found} mJ")


def _refuse_company(gpu: _Gpu) -> tuple[str, ...]:
    """Raise _UnknownError where other processes compute on the GPU; returns a remark where nobody can tell.

    This process computes there. A sole entry is therefore this process, under the number that its host has for it.
    """
    try:
        pids = sorted(gpu.memory_by_pid())
    except _UnknownError:
        pids = []
    if not pids:
        return ("energy: NVML lists no process on this GPU, not even this one, so others cannot be ruled out",)
    if len(pids) == 1:
        return ()
    others = ", ".join(str(pid) for pid in pids if pid != os.getpid())
    own = "" if os.getpid() in pids else ", this one among them under its host's number"
    raise _UnknownError(f"other processes compute on this GPU (pid {others}{own}): end them and measure again")
