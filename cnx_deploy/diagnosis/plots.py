"""Plots of the diagnoses, one SVG file each: FP16 ranges by stage, and relative L2 by layer.

matplotlib is the extra `report`; it is imported when something is drawn.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import size_text
from cnx_deploy.core.plotting import BLUE, GREEN, GREY, GRID, ORANGE, PURPLE, RED, save_svg
from cnx_deploy.diagnosis.headroom import Headroom
from cnx_deploy.diagnosis.layer_record import LayerComparison
from cnx_deploy.diagnosis.ranges import TensorRange, stage_of, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_headroom", "plot_layers"]

SERIES = (
    ("largest |x| stored in FP16", BLUE, "o", 3.5),
    ("naive: GRN's sum of squares", RED, "s", 4.0),
    ("naive: LayerNorm's |x-mean|²", GREEN, "^", 4.0),
)
LOOKS = {"torch": (BLUE, "o"), "onnxruntime": (ORANGE, "s"), "emulator": (GREEN, "^"), "tensorrt": (PURPLE, "D")}
"""Colours that colour-blind readers tell apart, with a shape each, so that the lines read without colour."""


def plot_headroom(headroom: Headroom, path: Path) -> Path:
    """Draw a panel a stage: each tensor's and statistic's share of 65504 in order of depth.

    The file is written whole or not at all; the same data give the same bytes.
    """
    return save_svg(path, lambda: _headroom_figure(headroom))


def plot_layers(comparison: LayerComparison, path: Path) -> Path:
    """Draw relative L2 by depth, a line a backend; the same data give the same bytes.

    Raises InputError where no backend ran.
    """
    if not comparison.ran:
        raise InputError(f"No backend ran {comparison.artifact} here, so there is nothing to draw: leave --plot out.")
    return save_svg(path, lambda: _layers_figure(comparison))


def _headroom_figure(headroom: Headroom) -> "Figure":
    from matplotlib.figure import Figure

    # Fixed margins: a layout engine moves axes by the last digit each time, and that changes the bytes.
    figure = Figure(figsize=(7.2, 8.7))
    panels = figure.subplots(4, 1, sharey=True)
    figure.subplots_adjust(left=0.1, right=0.92, bottom=0.05, top=0.885, hspace=0.35)
    for stage, axes in enumerate(panels):
        _draw_stage(axes, headroom, stage)
    weights = headroom.network["weights"]
    drawn = f"share of 65504 in order of depth, less is better; {headroom.counted_images} ({headroom.source}), "
    drawn += f"weights {weights['origin']} {Path(weights['reference']).name}"
    _write_title(
        figure, f"FP16 headroom of {headroom.network['variant']} at {size_text(headroom.image_size)} px", drawn
    )
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="upper left", ncols=3, fontsize=8, handletextpad=0.2,
        columnspacing=1.2, bbox_to_anchor=(0.0, 0.95),
    )  # fmt: skip
    figure.text(0.1, 0.012, "block (s: stem, d: downsampling, h: pooling and head)", size=8, color=GREY)
    return figure


def _draw_stage(axes: "Axes", headroom: Headroom, stage: int) -> None:
    tensors = [tensor for tensor in headroom.tensors if stage_of(tensor.module) == stage]
    # The stem's norm has no place of its own where it is computed on the patches.
    places = {tensor.module: place for place, tensor in enumerate(tensors)}
    hidden = 0
    ranges: tuple[Sequence[Any], ...] = (headroom.tensors, headroom.responses, headroom.norms)
    for (label, color, marker, size), every in zip(SERIES, ranges, strict=True):
        own = [entry for entry in every if stage_of(entry.module) == stage]
        across = range(len(own)) if every is headroom.tensors else [places.get(entry.module, 0) for entry in own]
        axes.plot(
            across, [entry.share for entry in own], linestyle="-" if every is headroom.tensors else "none",
            linewidth=0.5, color=color, marker=marker, markersize=size, markeredgewidth=0, label=label,
        )  # fmt: skip
        hidden += sum(not math.isfinite(entry.share) for entry in own)
    axes.set_yscale("log")
    axes.grid(visible=False, axis="x")
    # One label above its line, one below: the lines are close where the axis is long.
    lines = [(1.0, "limit", "-", "bottom"), (1.0 / headroom.margin, f"1/{headroom.margin:g}", "--", "top")]
    for share, label, line, side in lines if headroom.margin > 1.0 else lines[:1]:
        axes.axhline(share, color="black", linewidth=0.9, linestyle=line)
        axes.annotate(
            label, (1.0, share), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va=side,
            fontsize=7.5, color="black",
        )  # fmt: skip
    _draw_units(axes, tensors)
    axes.set_title(f"stage {stage + 1}" + (f": {hidden} NaN or infinite, not drawn" if hidden else ""))


def _draw_units(axes: "Axes", tensors: Sequence[TensorRange]) -> None:
    """Draw a line before each unit and its index below the middle of it."""
    units = [unit_of(tensor.module) for tensor in tensors]
    names = list(dict.fromkeys(units))
    starts = [units.index(name) for name in names]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=GRID, linewidth=0.8)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], len(units)], strict=True)]
    letters = {"head": "h", "downsample_layers.0": "s"}
    labels = [letters.get(name, name.rpartition(".")[2] if name.startswith("stages.") else "d") for name in names]
    axes.set_xticks(middles, labels)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.8, len(units) - 0.2)


def _write_title(figure: "Figure", title: str, below: str) -> None:
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.08 / height, title, size=11, weight="bold", va="top")
    figure.text(0.02, 1 - 0.29 / height, below, size=8, va="top")


def _layers_figure(comparison: LayerComparison) -> "Figure":
    from matplotlib.figure import Figure

    ran = comparison.ran
    figure = Figure(figsize=(7.2, 3.6))
    axes = figure.add_axes((0.1, 0.26, 0.87, 0.51))
    modules = [output.module for output in ran[0].outputs]
    for result in ran:
        color, shape = LOOKS[result.backend]
        errors = [output.relative_l2 for output in result.outputs]
        # What has no number is a mark at the upper edge, and 0, which a logarithmic axis has not, a gap.
        drawn = [error or math.nan for error in errors]
        axes.plot(
            range(len(errors)), drawn, f"{shape}-", color=color, markersize=2.5, linewidth=0.9, label=result.backend
        )
        lost = [at for at, error in enumerate(errors) if math.isnan(error)]
        edge = axes.get_xaxis_transform()
        axes.plot(lost, [1.0] * len(lost), shape, color=color, markersize=4, transform=edge, clip_on=False)
    axes.set_yscale("log")
    axes.set_ylabel("relative L2")
    axes.set_xlim(-1, len(modules))
    ticks = _stage_ticks(modules)
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=45, ha="right")
    for limit in sorted({result.relative_l2_max for result in ran}):
        axes.axhline(limit, color=GREY, linewidth=0.8, linestyle="--")
    below = f"against PyTorch in FP32, worst of {comparison.images} images; dashed: what fails; at the top: not finite"
    _write_title(figure, f"{comparison.artifact} by layer", below)
    if comparison.first is not None:
        result, output = comparison.first
        axes.axvline(modules.index(output.module), color=RED, linewidth=1)
        words = f"{output.module} on {result.backend}: {output.verdict}"
        axes.text(1.0, 1.03, words, transform=axes.transAxes, color=RED, size=8, ha="right")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(ran), handlelength=1.6)
    return figure


def _stage_ticks(modules: Sequence[str]) -> dict[int, str]:
    """Return where each stage's first module, the stem, a downsampling and the head stand."""
    ticks: dict[str, int] = {}
    for at, module in enumerate(modules):
        name = ".".join(module.split(".")[:2])
        name = "stem" if name == "downsample_layers.0" else name.replace("downsample_layers.", "downsampling ")
        if name not in ("norm", "head"):
            ticks.setdefault(name, at)
    return {at: name for name, at in ticks.items()}
