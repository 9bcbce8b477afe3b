"""What comparison and timing know of a model: its input, and one call."""

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.model.tasks.base import Outputs

__all__ = ["HoldsNothing", "PhaseTimes", "PhasedRunner", "Runner", "RunnerInfo"]


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What a result has to say about who made it.

    `arithmetic` is the precision in which the backend really computes, which on ONNX Runtime's CPU provider is
    FP32 even for an FP16 file.
    """

    backend: str
    version: str
    device: str
    precision: str
    arithmetic: str
    details: tuple[tuple[str, str], ...] = ()


class Runner(Protocol):
    """A loaded model. Use it as a context manager; `run` blocks until the outputs are there."""

    info: RunnerInfo
    input_spec: InputSpec
    device: torch.device

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, images: Tensor) -> Outputs:
        """Images as `input_spec` says, on `device` -> the outputs of the task, (N, ...) float32 each, on `device`.

        A classifier gives "logits" (N, num_classes). The result may be overwritten by the next call. Raises InputError
        on another shape or dtype, and, for images in host memory, on NaN and infinity unless `input_spec` takes them.
        """
        ...


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Where the time of one call went, in milliseconds: CUDA events, and the host clock for `enqueue_ms`.

    `h2d_ms` and `d2h_ms` are the copies from and to pinned host memory, `compute_ms` what lies between.
    """

    h2d_ms: float
    compute_ms: float
    d2h_ms: float
    enqueue_ms: float


@runtime_checkable
class PhasedRunner(Protocol):
    """A runner that can also say where the time of a call goes."""

    def run_phases(self, images: Tensor) -> tuple[Outputs, PhaseTimes]:
        """Images in host memory -> outputs in host memory, as `run` gives them, and the parts of the call."""
        ...


class HoldsNothing:
    """The context manager of a runner that has nothing to give back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
