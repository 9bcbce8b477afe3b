"""Loss, accuracy and learning rate of a run as a picture. matplotlib is the extra `report`."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.plotting import BLUE, GREEN, GREY, RED, save_svg
from cnx_deploy.core.strict_json import LARGEST, bounded_content, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_curves", "read_table"]

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

COLUMNS = tuple(column for _, _, lines in PANELS for column, _, _ in lines)
PLAIN_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?(e[-+][0-9]{1,3})?|nan|-?inf")
"""As `run_folder.table_of` writes it."""


def draw_curves(run_dir: Path) -> Path:
    """Draw `metrics.csv` of a run into its `curves.svg`.

    Raises InputError without the table, CorruptArtifactError where it is none, MissingRequirementError without
    matplotlib.
    """
    rows = read_table(run_dir / "metrics.csv")
    return save_svg(run_dir / "curves.svg", lambda: _figure(rows, run_dir.name))


def read_table(table: Path) -> list[dict[str, float]]:
    """The figures of each epoch that are known and finite, by column; at least one epoch. Raises as `draw_curves`."""
    if not table.is_file():
        raise InputError(f"{table} is not there: expected a run of which an epoch is finished. Train first.")
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


def _rows(text: str) -> Iterator[dict[str, float]]:
    """The figures of each epoch that are known; ValueError names the line and column of what is none."""
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
        _draw_panel(axes, rows, lines)
        axes.set(title=label, xlabel="epoch", yscale=scale)
        if lines[0][1] and axes.lines:
            axes.legend()
    return figure


def _draw_panel(axes: "Axes", rows: list[dict[str, float]], lines: tuple[tuple[str, str, str], ...]) -> None:
    for column, label, colour in lines:
        known = [row for row in rows if column in row]
        if known:
            epochs, values = ([row[name] for row in known] for name in ("epoch", column))
            axes.plot(epochs, values, color=colour, label=label, marker="." if len(known) < 40 else "")
