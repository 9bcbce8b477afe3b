"""A run's figures as TensorBoard's events, beside whatever else is told of it."""

from pathlib import Path
from typing import Any

from cnx_deploy.core.errors import MissingRequirementError
from cnx_deploy.training.records import EpochRecord, Progress, StepReport

__all__ = ["TensorBoardLog"]


class TensorBoardLog:
    """A Progress that writes events into `folder` and passes everything on to `other`.

    Raises MissingRequirementError when tensorboard is not installed.
    """

    def __init__(self, folder: Path, other: Progress) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingRequirementError(
                "TensorBoard's events need the package tensorboard, which is not installed. Install it: "
                'pip install "cnx-deploy[tensorboard]", or leave --tensorboard out.'
            ) from error
        self.writer: Any = SummaryWriter(str(folder))
        self.other = other
        self.steps_per_epoch = 0

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Note the steps of an epoch."""
        self.steps_per_epoch = steps_per_epoch
        self.other.begin(epochs, steps_per_epoch, epochs_done)

    def step(self, report: StepReport) -> None:
        """Write the loss so far and the learning rate by step."""
        at = (report.epoch - 1) * self.steps_per_epoch + report.step
        self.writer.add_scalar("step/mean_loss", report.mean_loss, at)
        self.writer.add_scalar("step/learning_rate", report.learning_rate, at)
        self.other.step(report)

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """Write the record's figures by epoch."""
        for name, value in record.to_dict().items():
            if name != "epoch" and value is not None:
                self.writer.add_scalar(f"epoch/{name}", value, record.epoch)
        self.writer.flush()
        self.other.end_epoch(record, is_best)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
