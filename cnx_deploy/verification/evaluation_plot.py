"""An evaluation as one SVG: what is mistaken for what, and how often an answer of some confidence is right.

Up to 40 classes the whole confusion matrix is drawn; of more, the pairs that are confused most. Of a class for each
pixel the matrix is of pixels, and beside it stands each class's intersection over union. matplotlib is the extra
`report`; it is imported when something is drawn.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.plotting import BLUE, GREY, RED, save_svg
from cnx_deploy.model.tasks.classification_metrics import CalibrationBin, Evaluation
from cnx_deploy.model.tasks.segmentation_metrics import SegmentationEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MOST_CLASSES", "write_plot"]

MOST_CLASSES = 40
"""Classes whose matrix is still readable: a cell is then 4 mm wide."""
COUNTED_CLASSES = 20
"""Classes up to which the cells have their counts written in them."""
PAIRS = 25


def write_plot(found: Any, path: Path, title: str) -> Path:
    """Draw `found` into an SVG file, whole or not at all; the same data give the same bytes.

    Raises InputError for an evaluation without confusions.
    """
    if isinstance(found, SegmentationEvaluation):
        return save_svg(path, lambda: _map_figure(found, title))
    if not isinstance(found, Evaluation):
        raise InputError("There is no confusion to draw of this task's evaluation. Leave --plot out.")
    return save_svg(path, lambda: _figure(found, title))


def _figure(found: Evaluation, title: str) -> "Figure":
    from matplotlib.figure import Figure

    names = _names(found)
    shows_matrix = len(names) <= MOST_CLASSES
    side = max(4.0, 1.5 + 0.17 * len(names)) if shows_matrix else 6.0
    figure = Figure(figsize=(side + 4.2, max(4.6, side)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
    grid = figure.add_gridspec(2, 2, width_ratios=(side, 4.0), height_ratios=(3, 1))
    left = figure.add_subplot(grid[:, 0])
    if shows_matrix:
        _draw_matrix(left, found, names)
    else:
        _draw_pairs(left, found, len(names))
    reliability = figure.add_subplot(grid[0, 1])
    _draw_reliability(reliability, found)
    _draw_counts(figure.add_subplot(grid[1, 1], sharex=reliability), found.calibration.bins)
    return figure


def _map_figure(found: SegmentationEvaluation, title: str) -> "Figure":
    """The matrix of pixels, and the classes' intersection over union, lowest last; of many classes the lowest alone."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in found.per_class if not math.isnan(row.iou)), key=lambda row: -row.iou)[-MOST_CLASSES:]
    shows_matrix = len(found.per_class) <= MOST_CLASSES
    side = max(3.6, 1.5 + 0.17 * len(found.per_class)) if shows_matrix else 0.0
    figure = Figure(figsize=(side + 4.2, max(3.6, side, 1.0 + 0.17 * len(rows))), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
    ratios = (side, 4.0) if shows_matrix else (1.0,)
    cells = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    if shows_matrix:
        _draw_shares(cells[0], found.confusion, [row.name for row in found.per_class], "pixels")
    axes = cells[-1]
    axes.barh(range(len(rows)), [100 * row.iou for row in rows], color=BLUE, height=0.7)
    axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
    axes.invert_yaxis()
    axes.axvline(100 * found.mean_iou, color=RED, linestyle="--", linewidth=0.9)
    axes.grid(visible=False, axis="y")
    which = f"the {len(rows)} lowest of {len(found.per_class)} classes, " if len(rows) < len(found.per_class) else ""
    axes.set(xlim=(0, 100), xlabel="IoU %", title=f"{which}mIoU {100 * found.mean_iou:.2f} %")
    return figure


def _names(found: Evaluation) -> list[str]:
    """The data's classes, then those that were only predicted."""
    own = [each.name for each in found.per_class]
    return list(dict.fromkeys([*own, *(cell.predicted for cell in found.confusion)]))


def _draw_matrix(axes: "Axes", found: Evaluation, names: list[str]) -> None:
    place = {name: at for at, name in enumerate(names)}
    counts = [[0] * len(names) for _ in names]
    for cell in found.confusion:
        counts[place[cell.label]][place[cell.predicted]] = cell.count
    _draw_shares(axes, counts, names, "images")


def _draw_shares(axes: "Axes", confusion: Any, names: list[str], what: str) -> None:
    """A matrix of counts by the share of each row; of few classes images are written into it, of pixels shares."""
    import numpy as np

    counts = np.array(confusion, dtype=float)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    ticks, size = range(len(names)), 8.5 if len(names) <= COUNTED_CLASSES else 6
    axes.set_xticks(ticks, [_short(name) for name in names], rotation=90, size=size)
    axes.set_yticks(ticks, [_short(name) for name in names], size=size)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set(xlabel="predicted", ylabel="label", title=f"share of the label's {what}")
    if len(names) <= COUNTED_CLASSES:
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]:.0f}" if what == "images" else f"{shares[row, column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", size=7, color=colour)


def _draw_pairs(axes: "Axes", found: Evaluation, classes: int) -> None:
    from matplotlib.ticker import MaxNLocator

    pairs = found.confused_pairs
    shown = pairs[:PAIRS]
    axes.barh(range(len(shown)), [cell.count for cell in shown], color=RED, height=0.7)
    axes.set_yticks(range(len(shown)), [f"{_short(cell.label)} → {_short(cell.predicted)}" for cell in shown])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="images",
        title=f"{classes} classes are too many for a matrix:\n"
        f"the {len(shown)} most confused of {len(pairs)} pairs (label → predicted)",
    )


def _draw_reliability(axes: "Axes", found: Evaluation) -> None:
    filled = [each for each in found.calibration.bins if each.count]
    middles = [(each.lower + each.upper) / 2 for each in filled]
    width = found.calibration.bins[0].upper
    accuracies = [each.accuracy for each in filled]
    axes.bar(middles, accuracies, 0.9 * width, color=BLUE, label="accuracy")
    axes.plot(
        [each.confidence for each in filled], accuracies, linestyle="none", marker="o", markersize=3.5, color="black",
        label="at mean confidence",
    )  # fmt: skip
    axes.plot([0, 1], [0, 1], color=RED, linestyle="--", linewidth=0.9, label="calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    axes.set_title(
        f"calibration error {100 * found.calibration.expected_error:.2f} %, top-1 {found.top1_percent:.2f} %,\n"
        f"mean confidence {100 * found.calibration.mean_confidence:.2f} %"
    )
    axes.legend(loc="upper left", fontsize=7.5)
    axes.tick_params(labelbottom=False)


def _draw_counts(axes: "Axes", bins: tuple[CalibrationBin, ...]) -> None:
    middles = [(each.lower + each.upper) / 2 for each in bins]
    axes.bar(middles, [each.count for each in bins], 0.9 * bins[0].upper, color=GREY)
    axes.set(xlabel="confidence", ylabel="images")


def _short(name: str) -> str:
    """Without what matplotlib would read as a formula, at most 20 characters."""
    plain = name if len(name) <= 20 else f"{name[:19]}…"
    return plain.replace("$", r"\$")
