"""What training says of each epoch, whom it tells, and what it returns."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = ["EpochRecord", "Progress", "Silence", "StepReport", "TrainingResult"]

CONDITIONS = ("seconds", "images_per_second", "data_wait_percent")
"""Fields that say how the work went, not what was learned: two equal runs differ in them."""


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch, from 1. Losses are means over images: `train_loss` smoothed, mixed and augmented, `val_loss` none.

    `ema_…` are of the moving average, None without one. `learning_rate`: the last step's, of the last layers.
    `data_wait_percent`: share of the epoch's training time in which no image was there to be trained on.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_top1_percent: float
    val_top5_percent: float
    ema_val_loss: float | None
    ema_val_top1_percent: float | None
    learning_rate: float
    seconds: float
    images_per_second: float
    data_wait_percent: float

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: top-1, then validation loss."""
        return self.val_top1_percent, -self.val_loss

    @property
    def ema_rank(self) -> tuple[float, float]:
        """The same of the moving average; the lowest without one."""
        if self.ema_val_top1_percent is None or self.ema_val_loss is None:
            return -1.0, 0.0
        return self.ema_val_top1_percent, -self.ema_val_loss

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A run and how far it came. `best` and `last` are None when it was interrupted in its first epoch.

    `best` is the better of the best weights and the best moving average, where there is one.
    """

    run_dir: Path
    best: Path | None
    last: Path | None
    metrics: Path
    best_top1_percent: float | None
    epochs_run: int
    interrupted: bool


@dataclass(frozen=True, slots=True)
class StepReport:
    """How far an epoch is. Epochs and steps count from 1; `images_per_second` is the epoch's so far."""

    epoch: int
    step: int
    mean_loss: float
    learning_rate: float
    images_per_second: float


class Progress(Protocol):
    """Who is told how training goes."""

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Training starts or goes on."""

    def step(self, report: StepReport) -> None:
        """A step is done; not every step is reported."""

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """An epoch is done and written."""


class Silence:
    """A Progress that says nothing."""

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Say nothing."""

    def step(self, report: StepReport) -> None:
        """Say nothing."""

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """Say nothing."""
