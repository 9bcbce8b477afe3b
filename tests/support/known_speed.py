"""Runners whose speed is known because they move the clock themselves, for tests of the benchmark."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.runners.base import RunnerInfo

CPU = torch.device("cpu")
INFO = RunnerInfo("double", "1", "clock", "fp32", "fp32")
INPUT = InputSpec("float", 32)
IMAGES = torch.zeros(4, 3, 32, 32)
LOGITS = torch.tensor([[3.0, 1.0, -2.0]]).repeat(4, 1)


class Clock:
    """A clock that stands still until a runner moves it; replaces the `time` module within `benchmark`."""

    def __init__(self) -> None:
        self.nanoseconds = 0

    def perf_counter_ns(self) -> int:
        return self.nanoseconds

    def perf_counter(self) -> float:
        return self.nanoseconds / 1e9

    def sleep(self, seconds: float) -> None:
        self.nanoseconds += round(seconds * 1e9)


@dataclass
class KnownSpeed:
    """A runner whose call number `index` (from 0) takes `milliseconds(index)` and answers `logits`."""

    wait: Callable[[float], None]
    milliseconds: Callable[[int], float]
    logits: Tensor = field(default_factory=LOGITS.clone)
    calls: list[float] = field(default_factory=list)
    info: RunnerInfo = INFO
    input_spec: InputSpec = INPUT
    device: torch.device = CPU

    def run(self, images: Tensor) -> dict[str, Tensor]:
        duration = self.milliseconds(len(self.calls))
        self.calls.append(duration)
        self.wait(duration)
        return {"logits": self.logits}
