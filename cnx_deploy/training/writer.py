"""What is recorded and written after each epoch. Importing this module takes the `train` extra."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import lightning.pytorch as lightning

from cnx_deploy.core.errors import TrainingError
from cnx_deploy.core.strict_json import typed
from cnx_deploy.training.loop import Classifier
from cnx_deploy.training.records import EpochRecord, Progress, StepReport
from cnx_deploy.training.run_folder import keep_state
from cnx_deploy.training.sampling import EpochBatches

__all__ = ["EpochWriter", "RunWriter"]

REPORT_EVERY_STEPS = 10
"""Reading the loss waits for the GPU, so it is not read every step."""

WriteEpoch = Callable[[Classifier, list[EpochRecord]], None]


class _Record(Protocol):
    """One epoch as plain types and back."""

    def to_dict(self) -> dict[str, Any]: ...


Record = TypeVar("Record", bound=_Record)
Told = TypeVar("Told", bound=_Record, contravariant=True)


class _Listener(Protocol[Told]):
    """Who is told of a run whose epochs are such records."""

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None: ...
    def step(self, report: StepReport) -> None: ...
    def end_epoch(self, record: Told, is_best: bool) -> None: ...


class RunWriter(lightning.Callback, Generic[Record]):
    """After each epoch: its record, what a subclass's `finish_epoch` writes, and last of all the state to resume from.

    `batches` is told the epoch on resume, before Lightning fetches the first batch, which it does before it tells it.
    The state is also written before the first step, so a run can be resumed from its beginning. Of several processes
    the first one writes and reports. The module trained has a `mean_loss()`.
    """

    record_type: type[Any]

    def __init__(self, run_dir: Path, batches: EpochBatches, progress: "_Listener[Record]") -> None:
        self.run_dir = run_dir
        self.batches = batches
        self.progress = progress
        self.records: list[Record] = []
        self.clock = EpochClock()

    def finish_epoch(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> tuple[Record, bool]:
        """Add the epoch's record and write it (the first process); returns it and whether it is the best so far."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps with the state: the records."""
        return {"records": [record.to_dict() for record in self.records]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the records back."""
        self.records = typed(state_dict["records"], list[self.record_type])  # type: ignore[name-defined]
        self.batches.set_epoch(len(self.records))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the initial state of a fresh run."""
        if trainer.is_global_zero:
            self.progress.begin(trainer.max_epochs or 0, int(trainer.num_training_batches), len(self.records))
        if not self.records:
            keep_state(self.run_dir, trainer.save_checkpoint, writes=trainer.is_global_zero)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the epoch's clock, or stop waiting."""
        self.clock.batch_is_there(first=batch_idx == 0)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report how far the epoch is."""
        self.clock.batch_is_done(self.batches.joint_count(batch_idx))
        if batch_idx % REPORT_EVERY_STEPS == 0 and trainer.is_global_zero:
            loss: float = pl_module.mean_loss()  # type: ignore[operator]
            at = (trainer.current_epoch + 1, batch_idx + 1)
            self.progress.step(StepReport(*at, loss, self.rate(trainer), self.clock.images_per_second))

    def rate(self, trainer: lightning.Trainer) -> float:
        """The highest learning rate of any group now."""
        return max(float(group["lr"]) for group in trainer.optimizers[0].param_groups)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record and write."""
        record, is_best = self.finish_epoch(trainer, pl_module)
        keep_state(self.run_dir, trainer.save_checkpoint, writes=trainer.is_global_zero)
        if trainer.is_global_zero:
            self.progress.end_epoch(record, is_best)


class EpochWriter(RunWriter[EpochRecord]):
    """Of a classifier. `write_epoch` gets it and all records."""

    record_type = EpochRecord

    def __init__(self, run_dir: Path, batches: EpochBatches, write_epoch: WriteEpoch, progress: Progress) -> None:
        super().__init__(run_dir, batches, progress)
        self.write_epoch = write_epoch

    def finish_epoch(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> tuple[EpochRecord, bool]:
        """Losses and accuracy; TrainingError when the loss is no number any more."""
        if not isinstance(module, Classifier):
            raise TypeError(f"{type(module).__name__} is not a Classifier")
        figures: dict[str, Any] = module.epoch_figures()
        record = EpochRecord(
            epoch=trainer.current_epoch + 1,
            learning_rate=self.rate(trainer),
            seconds=self.clock.seconds,
            images_per_second=self.clock.images_per_second,
            data_wait_percent=self.clock.wait_percent,
            **figures,
        )
        if not (math.isfinite(record.train_loss) and math.isfinite(record.val_loss)):
            raise TrainingError(
                f"In epoch {record.epoch} the loss became {record.train_loss} (validation {record.val_loss}). "
                "Train again with a lower --learning-rate; what the epochs before wrote is kept."
            )
        is_best = all(_best_rank(record) > _best_rank(before) for before in self.records)
        self.records.append(record)
        if trainer.is_global_zero:
            self.write_epoch(module, self.records)
        return record, is_best


class EpochClock:
    """How long an epoch takes, and how much of its training time passes before images are there."""

    def __init__(self) -> None:
        self.started = self.last_done = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def batch_is_there(self, *, first: bool) -> None:
        now = time.perf_counter()
        if first:
            self.started, self.waited, self.images = now, 0.0, 0
        else:
            self.waited += now - self.last_done

    def batch_is_done(self, images: int) -> None:
        self.images += images
        self.last_done = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.last_done - self.started, 1e-9)

    @property
    def wait_percent(self) -> float:
        return 100.0 * self.waited / max(self.last_done - self.started, 1e-9)


def _best_rank(record: EpochRecord) -> tuple[float, float]:
    return max(record.rank, record.ema_rank)
