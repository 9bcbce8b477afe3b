"""A double of NVML whose energy counter moves with a clock of the test's own, and a runner on a GPU that moves it.

`test_bench_energy.py` checks that every function here exists in nvidia-ml-py and takes as many arguments.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cnx_deploy.bench import energy as bench_energy
from cnx_deploy.runners.base import HoldsNothing
from tests.known_speed import Clock, KnownSpeed

MIB = 1 << 20
CUDA = torch.device("cuda", 0)
OWN, STRANGER = os.getpid(), 4711


class DoubleError(Exception):
    """NVMLError."""


@dataclass
class DoubleGpu:
    """One GPU. `memory`: bytes by pid, None where the function is not supported; the counter moves every `step` s."""

    watts: float = 200.0
    step: float = 0.05
    memory: dict[int, int | None] | None = field(default_factory=lambda: dict[int, int | None]({OWN: 100 * MIB}))
    mig: int | None = None
    has_counter: bool = True
    lost_millijoules: int = 0


@dataclass
class DoubleNvml:
    """The functions of pynvml that are used; refuses a call before nvmlInit or after nvmlShutdown."""

    clock: Clock
    gpus: dict[str, DoubleGpu]
    driver_is_loaded: bool = True
    opened: int = 0
    asked: list[str] = field(default_factory=list)

    NVMLError = DoubleError
    NVMLLibraryMismatchError = type("NVMLLibraryMismatchError", (Exception,), {})

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver_is_loaded:
            raise DoubleError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:  # noqa: N802
        assert self.opened == 1
        self.asked.append(uuid)
        return self._supported(self.gpus.get(uuid.removeprefix("GPU-")), "Not Found")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: DoubleGpu) -> int:  # noqa: N802
        self._supported(handle.has_counter or None)
        steps = int(self.clock.nanoseconds / 1e9 / handle.step + 1e-9)
        return round(1000 * handle.watts * handle.step * steps) - handle.lost_millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, handle: DoubleGpu) -> list[Any]:  # noqa: N802
        found = self._supported(handle.memory)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in found.items()]

    def nvmlDeviceGetMigMode(self, handle: DoubleGpu) -> list[int]:  # noqa: N802
        return [self._supported(handle.mig), 0]

    def _supported(self, value: Any, otherwise: str = "Not Supported") -> Any:
        assert self.opened == 1
        if value is None:
            raise DoubleError(otherwise)
        return value


class GpuRunner(KnownSpeed, HoldsNothing):
    """A runner that says it is on a GPU."""


def installed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> DoubleNvml:
    """NVML in place of the real one, with one GPU, "a", which is torch's device 0; time is that of `clock`."""
    double = DoubleNvml(clock, {"a": DoubleGpu()})
    monkeypatch.setattr(bench_energy, "time", clock)
    monkeypatch.setitem(sys.modules, "pynvml", double)
    show_torch(monkeypatch, "a")
    return double


def show_torch(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    """Make these the CUDA devices that torch sees, in this order."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[torch.device(device).index or 0])
    )


def runner_of(
    clock: Clock, milliseconds: float = 10.0, device: torch.device = CUDA, at_call: Callable[[int], None] | None = None
) -> GpuRunner:
    """A runner on a GPU whose calls move the clock; `at_call` is told the number of each."""

    def speed(index: int) -> float:
        if at_call is not None:
            at_call(index)
        return milliseconds

    def wait(duration: float) -> None:
        clock.nanoseconds += round(duration * 1e6)

    return GpuRunner(wait, speed, device=device)
