"""What pre-training says of each epoch, whom it tells, and what it returns."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from cnx_deploy.training.records import StepReport

__all__ = ["PretrainingProgress", "PretrainingRecord", "PretrainingResult", "SilentPretraining"]


@dataclass(frozen=True, slots=True)
class PretrainingRecord:
    """One epoch, from 1. Losses are mean squared errors of hidden patches, in units of each patch's variance.

    `held_loss`: of the held images, uncropped by chance and under the same masks in every epoch. `learning_rate`: the
    last step's. `images_per_second`: of training alone; `seconds`: of the whole epoch.
    """

    epoch: int
    loss: float
    held_loss: float
    learning_rate: float
    images_per_second: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PretrainingResult:
    """A run and how far it came. Without a finished epoch the files and losses are None.

    `best` and `last`: the encoder's weights, without a head. `first_loss`, `last_loss`: of the first and the last
    epoch.
    """

    run_dir: Path
    best: Path | None
    last: Path | None
    metrics: Path
    first_loss: float | None
    last_loss: float | None
    best_held_loss: float | None
    epochs_run: int
    interrupted: bool


class PretrainingProgress(Protocol):
    """Who is told how pre-training goes."""

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Training starts or goes on."""

    def step(self, report: StepReport) -> None:
        """A step is done; not every step is reported."""

    def end_epoch(self, record: PretrainingRecord, is_best: bool) -> None:
        """An epoch is done and written."""


class SilentPretraining:
    """A PretrainingProgress that says nothing."""

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Say nothing."""

    def step(self, report: StepReport) -> None:
        """Say nothing."""

    def end_epoch(self, record: PretrainingRecord, is_best: bool) -> None:
        """Say nothing."""
