"""A measured headroom as one SVG: a panel a stage, the share of 65504 by tensor in order of depth.

matplotlib is the extra `report`; it is imported when something is drawn.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnx_deploy.core.plotting import BLUE, GREEN, GREY, GRID, RED, save_svg
from cnx_deploy.diagnosis.headroom.analysis import Headroom
from cnx_deploy.diagnosis.headroom.ranges import NormRange, ResponseRange, TensorRange, group_of, stage_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_plot"]

WIDTH, PANEL, GAP, HEAD, FOOT = 7.2, 1.45, 0.5, 0.95, 0.45
"""Inches: the figure, a panel's height, between panels, above them, below them."""
SERIES = (
    ("largest |x| stored in FP16", BLUE, "o", 3.5),
    ("naive: GRN's sum of squares", RED, "s", 4.0),
    ("naive: LayerNorm's |x-mean|²", GREEN, "^", 4.0),
)


def write_plot(found: Headroom, path: Path) -> Path:
    """Draw `found` into an SVG file, whole or not at all; the same data give the same bytes."""
    return save_svg(path, lambda: _figure(found))


def _figure(found: Headroom) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    height = HEAD + 4 * PANEL + 3 * GAP + FOOT
    figure = Figure(figsize=(WIDTH, height))
    panels = figure.subplots(
        4, 1, sharey=True,
        gridspec_kw={
            "left": 0.1, "right": 0.92, "bottom": FOOT / height, "top": 1 - HEAD / height, "hspace": GAP / PANEL
        },
    )  # fmt: skip
    for stage, axes in enumerate(panels):
        _draw_stage(axes, found, stage)
    weights = found.network["weights"]
    title = f"FP16 headroom of {found.network['variant']} at {found.image_size} px"
    drawn = f"share of 65504 in order of depth, less is better; {found.counted_images} ({found.source}), "
    drawn += f"weights {weights['origin']} {Path(weights['reference']).name}"
    figure.text(0.02, 1 - 0.08 / height, title, size=11, weight="bold", va="top")
    figure.text(0.02, 1 - 0.29 / height, drawn, size=8, va="top")
    marks = [Line2D([], [], linestyle="none", color=c, marker=m, markersize=s + 1) for _, c, m, s in SERIES]
    figure.legend(
        marks, [name for name, *_ in SERIES], loc="upper left", ncols=3, fontsize=8, handletextpad=0.2,
        columnspacing=1.2, bbox_to_anchor=(0.0, 1 - 0.43 / height),
    )  # fmt: skip
    figure.text(0.1, 0.1 / height, "block (s: stem, d: downsampling, h: pooling and head)", size=8, color=GREY)
    return figure


def _draw_stage(axes: "Axes", found: Headroom, stage: int) -> None:
    tensors = [each for each in found.tensors if stage_of(each.module) == stage]
    places = {each.module: place for place, each in enumerate(tensors)}
    _draw_series(axes, 0, list(enumerate(tensors)))
    statistics: tuple[Sequence[ResponseRange | NormRange], ...] = (found.responses, found.norms)
    for series, ranges in enumerate(statistics, start=1):
        own = [each for each in ranges if stage_of(each.module) == stage]
        # The stem's norm has no place of its own where it is computed on the patches.
        _draw_series(axes, series, [(places.get(each.module, 0), each) for each in own])
    axes.set_yscale("log")
    axes.grid(visible=False, axis="x")
    # One label above its line, one below: the lines are close where the axis is long.
    lines = [(1.0, "limit", "-", "bottom"), (1.0 / found.margin, f"1/{found.margin:g}", "--", "top")]
    for share, label, line, side in lines if found.margin > 1.0 else lines[:1]:
        axes.axhline(share, color="black", linewidth=0.9, linestyle=line)
        axes.annotate(
            label, (1.0, share), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va=side,
            fontsize=7.5, color="black",
        )  # fmt: skip
    _draw_blocks(axes, tensors)
    everything: tuple[TensorRange | ResponseRange | NormRange, ...] = (*found.tensors, *found.responses, *found.norms)
    hidden = sum(stage_of(each.module) == stage and not math.isfinite(each.share) for each in everything)
    axes.set_title(f"stage {stage + 1}" + (f": {hidden} NaN or infinite, not drawn" if hidden else ""))


def _draw_series(axes: "Axes", series: int, placed: Sequence[tuple[int, Any]]) -> None:
    """The points of one series; matplotlib leaves out what has no place on a logarithmic axis."""
    _, color, marker, size = SERIES[series]
    axes.plot(
        [place for place, _ in placed], [each.share for _, each in placed], linestyle="-" if series == 0 else "none",
        linewidth=0.5, color=color, marker=marker, markersize=size, markeredgewidth=0,
    )  # fmt: skip


def _draw_blocks(axes: "Axes", tensors: Sequence[TensorRange]) -> None:
    """A line before each block and its index below the middle of it."""
    groups = [group_of(each.module) for each in tensors]
    names = list(dict.fromkeys(groups))
    starts = [groups.index(name) for name in names]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=GRID, linewidth=0.8)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], len(groups)], strict=True)]
    axes.set_xticks(middles, [_block_label(name) for name in names])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.8, len(groups) - 0.2)


def _block_label(group: str) -> str:
    if group == "head":
        return "h"
    first, _, rest = group.partition(".")
    return rest.rpartition(".")[2] if first == "stages" else ("s" if rest == "0" else "d")
