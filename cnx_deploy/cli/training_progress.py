"""What `train` and `pretrain` show: the check of images, progress on stderr, and the result of a run."""

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cnx_deploy.cli import options
from cnx_deploy.training.records import Progress

if TYPE_CHECKING:
    from cnx_deploy.data import ImageCheck
    from cnx_deploy.training import EpochRecord, Launch, RunResult, StepReport

__all__ = ["TerminalProgress", "checked", "note_once", "tell"]

INTERRUPTED = 130
Images = TypeVar("Images")


def checked(check: "Callable[..., tuple[Images, ImageCheck]]", images: Images) -> tuple[Images, list[str]]:
    """Decode every image once; gives those that can be read, and lines that say which cannot."""
    with options.reporter("Checking images") as progress:
        images, report = check(images, progress=lambda done, total: progress(f"{done} of {total}", done / total))
    return images, report.lines() if report.broken else []


def note_once(lines: Iterable[str], launch: "Launch") -> None:
    """Print lines on stderr, in the first of several processes."""
    for line in lines if launch.rank == 0 else ():
        options.note(line)


def tell(result: "RunResult", launch: "Launch", *, as_json: bool) -> None:
    """Print the result, in the first of several processes, and end the command where Ctrl-C ended the run."""
    if launch.rank == 0:
        if as_json:
            options.echo_json(result.to_dict())
        else:
            options.echo(result.summary())
    if result.interrupted:
        options.note("Interrupted. Go on with the same command and --resume.")
        sys.exit(INTERRUPTED)


class TerminalProgress(Progress):
    """A bar on a terminal with loss, rate, images/s and time left; a line an epoch."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
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
        line = f"Epoch {record.epoch}/{self.epochs}: {record.summary(is_best=is_best)}"
        self.console.print(line, highlight=False, soft_wrap=True)
