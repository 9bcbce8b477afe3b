"""A comparison by layer as a table by block, as JSON with every tap, and as one SVG.

matplotlib is the extra `report`; it is imported when something is drawn.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, save_svg
from cnx_deploy.diagnosis.layerwise.comparison import LayerComparison, SideResult, TapResult, block_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["document", "table", "write_plot"]

MARKS = {"ok": "", "jumps": "^", "fails": "!", "other order": "!", "not finite": "!", "not lined up": "!"}
LEGEND = (
    "! fails, ^ more than all before explain. Relative L2 against PyTorch in FP32, the largest of the block's modules"
)
LOOKS = {
    "torch": (BLUE, "o"), "onnxruntime": (ORANGE, "s"), "emulator": (GREEN, "^"),
    "tensorrt": (PURPLE, "D"),
}  # fmt: skip
"""Okabe–Ito colours with a shape each, so that the lines read without colour."""


def document(found: LayerComparison) -> dict[str, Any]:
    """The comparison as JSON has it: every tap of every side, and where it first diverges."""
    return {
        "artifact": found.artifact,
        "images": found.images,
        "passed": found.passed,
        "first_divergence": None if found.first is None else _place(*found.first),
        "missing": dict(found.missing),
        "sides": [_side(side) for side in found.sides],
    }


def table(found: LayerComparison) -> Iterator[str]:
    """Lines for a terminal: a row a block, a column a side that ran; then what each side is, and the verdict."""
    ran = [side for side in found.sides if side.taps]
    blocks = list(dict.fromkeys(block_of(tap.module) for side in ran for tap in side.taps))
    width = max([len(block) for block in blocks] + [len("block")])
    yield f"{found.artifact}, images: {found.images}"
    yield f"{'block':{width}}" + "".join(f" {side.side:>14}" for side in ran)
    for block in blocks:
        yield f"{block:{width}}" + "".join(f" {_cell(side, block):>14}" for side in ran).rstrip()
    yield LEGEND
    for side in found.sides:
        yield f"{side.side}: {_summary(side)}"
    for module, reason in found.missing.items():
        yield f"not lined up: {module}: {reason}"
    if found.first is not None:
        side, tap = found.first
        yield f"FIRST DIVERGENCE: {tap.module} (block {block_of(tap.module)}) on {side.side}: {_words(tap)}"
    else:
        yield "no side diverges" + (", but not every module was compared" if found.missing else "")


def write_plot(found: LayerComparison, path: Path) -> Path:
    """Draw relative L2 by depth, a line a side, whole or not at all; the same data give the same bytes."""
    return save_svg(path, lambda: _figure(found))


def _place(side: SideResult, tap: TapResult) -> dict[str, Any]:
    return {"side": side.side, "module": tap.module, "block": block_of(tap.module), "verdict": tap.verdict}


def _side(side: SideResult) -> dict[str, Any]:
    return {
        "side": side.side,
        "relative_l2_max": side.gate.relative_l2_max,
        "diverges": side.diverges,
        "begins": None if side.begins is None else side.begins.module,
        "not_run": side.not_run or None,
        "taps": [{**asdict(tap), "block": block_of(tap.module)} for tap in side.taps],
    }


def _cell(side: SideResult, block: str) -> str:
    """The largest relative L2 of a block's taps, and the gravest mark among them."""
    taps = [tap for tap in side.taps if block_of(tap.module) == block]
    mark = max((MARKS[tap.verdict] for tap in taps), key=("", "^", "!").index, default="")
    known = [tap.figures.relative_l2 for tap in taps if tap.figures is not None]
    if any(math.isnan(error) for error in known):
        return f"not finite{mark}"
    return f"{max(known):.1e}{mark or ' '}" if known else f"-{mark or ' '}"


def _summary(side: SideResult) -> str:
    if side.not_run:
        return f"not run: {side.not_run}"
    finite = [tap for tap in side.taps if tap.figures is not None and not tap.figures.nonfinite]
    text = f"{sum(not tap.fails for tap in side.taps)} of {len(side.taps)} modules within {side.gate.relative_l2_max:g}"
    if finite:
        worst = max(finite, key=lambda tap: _error(tap))
        peak = max(finite, key=lambda tap: tap.figures.max_abs if tap.figures else 0.0)
        text += f", largest {_error(worst):.1e} at {worst.module}"
        text += f"; largest |x| {peak.figures.max_abs if peak.figures else 0.0:.3g} at {peak.module}"
    if side.begins is not None:
        text += f"; {'diverges from' if side.diverges else 'jumps at'} {side.begins.module}: {_words(side.begins)}"
    return text


def _words(tap: TapResult) -> str:
    if tap.figures is None:
        return f"{tap.verdict}: {tap.reason}"
    if tap.figures.nonfinite:
        return f"{tap.figures.nonfinite} values are NaN or infinite"
    numbers = f"relative L2 {tap.figures.relative_l2:.1e}, cosine {tap.figures.cosine:.6f}"
    return f"{tap.reason or tap.verdict}, {numbers}"


def _error(tap: TapResult) -> float:
    return tap.figures.relative_l2 if tap.figures is not None else math.nan


def _figure(found: LayerComparison) -> "Figure":
    from matplotlib.figure import Figure

    ran = [side for side in found.sides if side.taps]
    if not ran:
        raise InputError(
            f"No side of {found.artifact} ran, so there is nothing to draw. Leave --plot out, or name a side that "
            "runs here."
        )
    figure = Figure(figsize=(7.2, 3.6))
    axes = figure.add_axes((0.1, 0.26, 0.87, 0.51))
    modules = [tap.module for tap in ran[0].taps]
    for side in ran:
        _line(axes, side)
    axes.set_yscale("log")
    axes.set_ylabel("relative L2")
    axes.set_xlim(-1, len(modules))
    ticks = _ticks(modules)
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=45, ha="right")
    for limit in sorted({side.gate.relative_l2_max for side in ran}):
        axes.axhline(limit, color=GREY, linewidth=0.8, linestyle="--")
    figure.text(0.02, 0.96, f"{found.artifact} by layer", size=11, weight="bold", va="top")
    drawn = f"against PyTorch in FP32, worst of {found.images} images; dashed: what fails; at the top: not finite"
    figure.text(0.02, 0.89, drawn, size=8, va="top")
    if found.first is not None:
        _mark(axes, found.first[0].side, found.first[1], modules.index(found.first[1].module))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(ran), handlelength=1.6)
    return figure


def _line(axes: "Axes", side: SideResult) -> None:
    """A side's line; taps without a number are marks at the upper edge, and 0, which a log axis has not, a gap."""
    color, shape = LOOKS[side.side]
    errors = [_error(tap) or math.nan for tap in side.taps]
    axes.plot(range(len(errors)), errors, f"{shape}-", color=color, markersize=2.5, linewidth=0.9, label=side.side)
    lost = [at for at, tap in enumerate(side.taps) if math.isnan(_error(tap))]
    axes.plot(
        lost, [1.0] * len(lost), shape, color=color, markersize=4, transform=axes.get_xaxis_transform(), clip_on=False
    )


def _ticks(modules: Sequence[str]) -> dict[int, str]:
    """Where each stage's first module, the stem, a downsampling and the head stand."""
    ticks: dict[int, str] = {}
    for at, module in enumerate(modules):
        name = ".".join(module.split(".")[:2]) if "." in module else module
        name = "stem" if name == "downsample_layers.0" else name.replace("downsample_layers.", "downsampling ")
        if name not in ticks.values() and name not in ("norm", "head"):
            ticks[at] = name
    return ticks


def _mark(axes: "Axes", side: str, tap: TapResult, at: int) -> None:
    axes.axvline(at, color=RED, linewidth=1)
    words = f"{tap.module} on {side}: {tap.verdict}"
    axes.text(1.0, 1.03, words, transform=axes.transAxes, color=RED, size=8, ha="right")
