"""Diversity over depth as one SVG, after figure 4 of arXiv:2301.00808: a line a checkpoint.

Networks of different depth share an axis from 0 (first block) to 1 (last), as there. matplotlib is the extra `report`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnx_deploy.diversity.run import NetworkDiversity
from cnx_deploy.plot_files import save_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_plot"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = {"act": "-", "grn": ":", "output": "-"}
STYLE: dict[str, Any] = {
    "svg.hashsalt": "cnx-deploy", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8.5,
    "font.sans-serif": ["DejaVu Sans", "Verdana"], "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "axes.titlelocation": "left",
    "legend.frameon": False,
}  # fmt: skip


def write_plot(found: Sequence[NetworkDiversity], path: Path, source: str) -> Path:
    """Draw into an SVG file, whole or not at all; the same data give the same bytes."""
    return save_svg(path, lambda: _figure(found, source), STYLE)


def _figure(found: Sequence[NetworkDiversity], source: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), facecolor="white", layout="constrained")
    figure.suptitle(f"Cosine distance of channels, {found[0].images} images ({source})", x=0.01, ha="left", size=11)
    hidden, output = figure.subplots(1, 2, sharey=True)
    for network, colour in zip(found, (COLOURS * len(found))[: len(found)], strict=True):
        for part, axes in (("act", hidden), ("grn", hidden), ("output", output)):
            _draw(axes, network, part, colour)
    hidden.set(title="hidden channels, after GELU (dotted: after GRN)", ylabel="mean pair-wise distance")
    output.set(title="the block's output")
    for axes in (hidden, output):
        axes.set(xlabel="depth: first block 0, last block 1")
    hidden.set_ylim(bottom=0.0, top=1.08 * hidden.get_ylim()[1])
    hidden.legend(fontsize=7.5)
    return figure


def _draw(axes: "Axes", network: NetworkDiversity, part: str, colour: str) -> None:
    tensors = network.part(part)
    if not tensors:
        return
    last = max(1, len(network.blocks) - 1)
    depth = [index / last for index, block in enumerate(network.blocks) if block in tensors]
    axes.plot(
        depth, [each.distance for each in tensors.values()], color=colour, linestyle=LINES[part], linewidth=1.2,
        marker="o" if part != "grn" else "", markersize=2.5, label=network.name if part == "act" else None,
    )  # fmt: skip
