"""Training's progress on stderr: a bar on a terminal, a line an epoch elsewhere."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from cnx_deploy.training.records import EpochRecord, StepReport

__all__ = ["TerminalProgress"]


class TerminalProgress:
    """A `training.records.Progress`: loss, learning rate, images/s and the time that is left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("Reading images", total=None)
        self.epochs = self.steps_per_epoch = 0

    def __enter__(self) -> "TerminalProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Set the bar's length."""
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.bar.update(self.task, total=epochs * steps_per_epoch, completed=epochs_done * steps_per_epoch)

    def step(self, report: "StepReport") -> None:
        """Move the bar."""
        description = (
            f"Epoch {report.epoch}/{self.epochs}, loss {report.mean_loss:.3f}, rate {report.learning_rate:.2e}, "
            f"{report.images_per_second:.0f} images/s"
        )
        completed = (report.epoch - 1) * self.steps_per_epoch + report.step
        self.bar.update(self.task, completed=completed, description=description)

    def end_epoch(self, record: "EpochRecord", is_best: bool) -> None:
        """Print the epoch's line."""
        ema = "" if record.ema_val_top1_percent is None else f" (average {record.ema_val_top1_percent:.2f} %)"
        line = (
            f"Epoch {record.epoch}/{self.epochs}: loss {record.train_loss:.4f}, validation loss {record.val_loss:.4f}, "
            f"top-1 {record.val_top1_percent:.2f} %{ema}{' (best)' if is_best else ''}, {record.seconds:.1f} s, "
            f"{record.images_per_second:.0f} images/s"
        )
        self.console.print(line, highlight=False, soft_wrap=True)
