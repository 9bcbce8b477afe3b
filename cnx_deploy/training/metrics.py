"""A run's figures: the table metrics.csv, and the curves drawn from it with matplotlib (the extra `report`)."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.plotting import BLUE, GREEN, GREY, RED, save_svg
from cnx_deploy.core.strict_json import bounded_content

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TABLE", "draw_curves", "read_table", "table_of"]

TABLE = "metrics.csv"
PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Loss", "linear",
        (("train_loss", "training", GREY), ("val_loss", "validation", BLUE),
         ("ema_val_loss", "validation, average", RED)),
    ),
    (
        "Top-1 %", "linear",
        (("val_top1_percent", "validation", BLUE), ("ema_val_top1_percent", "validation, average", RED),
         ("val_recall_percent", "mean recall of classes", GREEN)),
    ),
    (
        "mAP %", "linear",
        (("val_map_percent", "validation", BLUE), ("ema_val_map_percent", "validation, average", RED),
         ("val_f1_percent", "micro F1", GREEN)),
    ),
    (
        "mIoU %", "linear",
        (("val_miou_percent", "validation", BLUE), ("ema_val_miou_percent", "validation, average", RED),
         ("val_pixel_percent", "pixels that are right", GREEN)),
    ),
    (
        "COCO AP %", "linear",
        (("val_box_ap_percent", "boxes", BLUE), ("val_mask_ap_percent", "masks", GREEN),
         ("ema_val_box_ap_percent", "boxes, average", RED)),
    ),
    ("Learning rate", "log", (("learning_rate", "", GREEN),)),
)  # fmt: skip
"""Title, scale and lines of each panel; a line is a column, its label and its colour. One without columns is not drawn.
"""


def table_of(rows: Sequence[Mapping[str, float | None]]) -> str:
    """Write rows of the same columns as a CSV table; None is an empty cell."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[-1]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else f"{value:.6g}" for name, value in row.items()})
    return table.getvalue()


def read_table(table: Path) -> dict[str, list[float]]:
    """Read the figures of each epoch by column; an empty cell is NaN. There is at least one epoch.

    Raises:
        InputError: There is no table.
        CorruptArtifactError: The file is no such table.
    """
    if not table.is_file():
        raise InputError(f"{table} is not there: no epoch of the run is finished. Train first.")
    try:
        rows = list(csv.DictReader(io.StringIO(bounded_content(table).decode("utf-8"), newline=""), strict=True))
        columns = {name: [float(row[name] or "nan") for row in rows] for name in (rows[0] if rows else ())}
        if "epoch" not in columns:
            raise ValueError("it has no epoch")
    except (TypeError, ValueError, csv.Error) as error:  # a TypeError for cells beyond the last column
        raise CorruptArtifactError(
            f"{table} is no table of a run ({error}): expected the column epoch and numbers in all others. Write it "
            "again by going on with the run (--resume)."
        ) from error
    return columns


def draw_curves(run_dir: Path) -> Path:
    """Draw the table of a run into its `curves.svg`.

    Raises:
        InputError, CorruptArtifactError: See `read_table`.
        MissingRequirementError: matplotlib is not installed.
    """
    columns = read_table(run_dir / TABLE)

    def draw() -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.0, 2.8), layout="constrained")
        figure.suptitle(run_dir.name)
        epochs = columns["epoch"]
        marker = "." if len(epochs) < 40 else ""
        panels = [panel for panel in PANELS if any(column in columns for column, _, _ in panel[2])]
        for axes, (title, scale, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for column, label, colour in lines:
                if any(map(math.isfinite, columns.get(column, ()))):
                    axes.plot(epochs, columns[column], color=colour, label=label, marker=marker)
            axes.set(title=title, xlabel="epoch", yscale=scale)
            if lines[0][1] and axes.lines:
                axes.legend()
        return figure

    return save_svg(run_dir / "curves.svg", draw)
