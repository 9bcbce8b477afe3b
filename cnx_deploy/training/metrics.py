"""A run's figures: the table metrics.csv, the curves drawn from it, and TensorBoard's events.

matplotlib is the extra `report`, TensorBoard the extra `tensorboard`; each is imported when it is asked for.
"""

import contextlib
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnx_deploy.core.errors import CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.plotting import BLUE, GREEN, GREY, RED, save_svg
from cnx_deploy.core.strict_json import LARGEST, bounded_content, shortened
from cnx_deploy.training.records import EpochRecord, Progress, StepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["TABLE", "TensorBoardLog", "draw_curves", "read_table", "table_of"]

TABLE = "metrics.csv"
PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Loss", "linear",
        (("train_loss", "training", GREY), ("val_loss", "validation", BLUE),
         ("ema_val_loss", "validation, average", RED)),
    ),
    (
        "Top-1 %", "linear",
        (("val_top1_percent", "validation", BLUE), ("ema_val_top1_percent", "validation, average", RED)),
    ),
    ("Learning rate", "log", (("learning_rate", "", GREEN),)),
)  # fmt: skip
"""Title, scale and lines of each panel; a line is a column, its label and its colour."""
COLUMNS = tuple(column for _, _, lines in PANELS for column, _, _ in lines)
PLAIN_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?(e[-+][0-9]{1,3})?|nan|-?inf")
"""As `table_of` writes it."""


def table_of(rows: Sequence[Mapping[str, float | None]]) -> str:
    """Write rows of the same columns as a CSV table; None is an empty cell."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[-1]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else f"{value:.6g}" for name, value in row.items()})
    return table.getvalue()


def read_table(table: Path) -> list[dict[str, float]]:
    """Read the figures of each epoch that are known and finite, by column; there is at least one epoch.

    Raises:
        InputError: There is no table.
        CorruptArtifactError: The file is no such table.
    """
    if not table.is_file():
        raise InputError(f"{table} is not there: no epoch of the run is finished. Train first.")
    try:
        rows = list(_rows(bounded_content(table).decode("utf-8")))
        if not rows:
            raise ValueError("it has no epoch")
    except (ValueError, csv.Error) as error:
        raise CorruptArtifactError(
            f"{table} is no table of a run ({error}): expected the columns epoch and, of numbers, "
            f"{', '.join(COLUMNS)}. Write it again by going on with the run (--resume)."
        ) from error
    return rows


def draw_curves(run_dir: Path) -> Path:
    """Draw the table of a run into its `curves.svg`.

    Raises:
        InputError, CorruptArtifactError: See `read_table`.
        MissingRequirementError: matplotlib is not installed.
    """
    rows = read_table(run_dir / TABLE)
    return save_svg(run_dir / "curves.svg", lambda: _figure(rows, run_dir.name))


class TensorBoardLog(Progress, contextlib.AbstractContextManager["TensorBoardLog"]):
    """A Progress that writes events into `folder` and passes everything on to `other`.

    Raises:
        MissingRequirementError: tensorboard is not installed.
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

    def __exit__(self, *exception: object) -> None:
        self.writer.close()

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
        for name, value in asdict(record).items():
            if name != "epoch" and value is not None:
                self.writer.add_scalar(f"epoch/{name}", value, record.epoch)
        self.writer.flush()
        self.other.end_epoch(record, is_best)


def _rows(text: str) -> Iterator[dict[str, float]]:
    """Yield the figures of each epoch; ValueError names the line and column of what is no number."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    for row in reader:
        written = {name: value for name in ("epoch", *COLUMNS) if (value := row.get(name))}
        for name, value in written.items():
            if not PLAIN_NUMBER.fullmatch(value):
                raise ValueError(f"line {reader.line_num}, {name}: {shortened(repr(value))} is no number")
        known = {name: float(value) for name, value in written.items() if abs(float(value)) <= LARGEST}
        if "epoch" not in known:
            raise ValueError(f"line {reader.line_num} has no epoch")
        yield known


def _figure(rows: list[dict[str, float]], title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 2.8), layout="constrained")
    figure.suptitle(title)
    for axes, (label, scale, lines) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for line in lines:
            _draw_line(axes, rows, *line)
        axes.set(title=label, xlabel="epoch", yscale=scale)
        if lines[0][1] and axes.lines:
            axes.legend()
    return figure


def _draw_line(axes: "Axes", rows: list[dict[str, float]], column: str, label: str, colour: str) -> None:
    known = [row for row in rows if column in row]
    if known:
        epochs, values = ([row[name] for row in known] for name in ("epoch", column))
        axes.plot(epochs, values, color=colour, label=label, marker="." if len(known) < 40 else "")
