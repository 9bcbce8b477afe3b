"""Loss, accuracy and learning rate of a run as a picture. matplotlib is the extra `report`."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnx_deploy.errors import InputError
from cnx_deploy.plot_files import save_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_curves"]

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "cnx-deploy",
}
PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Loss", "linear",
        (("train_loss", "training", "#7f7f7f"), ("val_loss", "validation", "#1f77b4"),
         ("ema_val_loss", "validation, average", "#d62728")),
    ),
    (
        "Top-1 %", "linear",
        (("val_top1_percent", "validation", "#1f77b4"), ("ema_val_top1_percent", "validation, average", "#d62728")),
    ),
    ("Learning rate", "log", (("learning_rate", "", "#2ca02c"),)),
)  # fmt: skip


def draw_curves(run_dir: Path) -> Path:
    """Draw `metrics.csv` of a run into its `curves.svg`.

    Raises InputError without the table, MissingRequirementError without matplotlib.
    """
    table = run_dir / "metrics.csv"
    if not table.is_file():
        raise InputError(f"{table} is not there: expected a run of which an epoch is finished. Train first.")
    with table.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return save_svg(run_dir / "curves.svg", lambda: _figure(rows, run_dir.name), STYLE)


def _figure(rows: list[dict[str, str]], title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 2.8), layout="constrained")
    figure.suptitle(title)
    for axes, (label, scale, lines) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _draw_panel(axes, rows, lines)
        axes.set(title=label, xlabel="epoch", yscale=scale)
        if lines[0][1]:
            axes.legend(frameon=False)
    return figure


def _draw_panel(axes: "Axes", rows: list[dict[str, str]], lines: tuple[tuple[str, str, str], ...]) -> None:
    for column, label, colour in lines:
        known = [row for row in rows if row.get(column)]
        if known:
            epochs, values = ([float(row[name]) for row in known] for name in ("epoch", column))
            axes.plot(epochs, values, color=colour, label=label, marker="." if len(known) < 40 else "")
