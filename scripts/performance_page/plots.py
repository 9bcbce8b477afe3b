"""The plots of docs/performance.md, as SVG whose bytes depend on the data and matplotlib's version alone.

A white background, so that they read on a dark page and in print; the Okabe–Ito colours with a shape for each series,
so that they read without colour; 5.6 inches wide, so that they read on a phone; text that stays text. Margins are
fixed: matplotlib's layout engines place axes anew in the last digit each time, and that changes the bytes.
"""

import io
import textwrap
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from matplotlib import __version__ as MATPLOTLIB
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, StrMethodFormatter

from cnx_deploy.core.errors import InputError
from performance_page.data import (
    BASELINE,
    GROWTHS,
    OURS,
    PEERS,
    Comparison,
    Document,
    Speed,
    comparisons,
    growth,
    shared_condition,
    speeds,
)

__all__ = ["MATPLOTLIB", "PLOTS"]

Name = TypeVar("Name", bound=Hashable)

WIDTH = 5.6
HEAD, FOOT, FOOTER_LINE = 1.02, 0.5, 0.13
"""Inches above the panels for title, what is drawn and legend; below them for ticks; for a line of the footer."""
FOOTER_COLUMNS = 105
BLUE, ORANGE, GREEN, PURPLE, GREY, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#555555", "#56B4E9"
STYLE = {
    "svg.hashsalt": "cnx-deploy", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # phones lack the first; the second has its widths
    "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 9.5, "legend.frameon": False, "legend.fontsize": 8.5,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Look:
    """How the points of one series are drawn. `face` None fills the shape with its colour."""

    color: str
    shape: str
    size: float = 6
    face: str | None = None

    def draw(self, axes: Axes, across: float, line: float) -> None:
        """One point."""
        axes.add_line(self.mark([across], [line]))
        axes.update_datalim([(across, line)])
        axes.autoscale_view()

    def mark(self, across: Sequence[float] = (), line: Sequence[float] = ()) -> Line2D:
        """The points, or without any the legend's sample."""
        return Line2D(
            across, line, linestyle="none", color=self.color, marker=self.shape, markersize=self.size,
            markerfacecolor=self.face or self.color, markeredgewidth=1.5 if self.shape == "|" else 1.0,
        )  # fmt: skip


SERIES = tuple(Look(*pair) for pair in zip((BLUE, SKY, ORANGE, GREEN, PURPLE, GREY), "oDs^vX", strict=True))
"""The first, second, … series of a plot."""
GRAPHS = {"timm": Look(ORANGE, "s", 8.5, "white"), "transformers": Look(GREEN, "^"), OURS: Look(BLUE, "o")}
LEGEND_MARKS = 4
"""What one line of a legend holds."""
FLOOR = Look(GREY, "|", 11)


def traffic_plot(document: Document, source: str) -> bytes:
    """Bytes an image over the better peer's, a line a variant: ours, the peers and the fused floor."""
    found = [comparison for comparison in comparisons(document) if comparison.best_peer is not None]
    drawn = f"bytes an image ÷ the better peer's, less is better; labels: ours, MB\n{shared_condition(found)}"
    with style.context(["default", STYLE]):
        figure, ((axes,),) = _figure((1, 1), 0.32 * len(found), "FP16 memory traffic", drawn, source)
        for line, comparison in enumerate(found):
            _traffic_line(axes, line, comparison)
        _ratio_axes(axes, [comparison.variant for comparison in found])
        axes.set_xlim(left=0)
        _legend(figure, {OURS: GRAPHS[OURS], **GRAPHS, "fused floor": FLOOR})
        return _svg(figure)


def targets_plot(document: Document, source: str) -> bytes:
    """Our ratio to the better peer: a panel a variant and size, a line a target, a mark a batch."""
    found = [comparison for comparison in comparisons(document) if comparison.ratio is not None]
    variants = list(dict.fromkeys(comparison.variant for comparison in found))
    sizes = sorted({comparison.image_size for comparison in found})
    targets = sorted({comparison.target for comparison in found}, key=lambda name: int(name.removeprefix("sm")))
    looks = _looks(sorted({comparison.batch for comparison in found}))
    drawn = "our bytes an image ÷ the better peer's, less is better\na mark a batch size"
    with style.context(["default", STYLE]):
        shape = (len(variants), len(sizes))
        figure, grid = _figure(shape, 0.3 * len(targets), "FP16 memory traffic by GPU generation", drawn, source)
        for comparison in found:
            axes = grid[variants.index(comparison.variant)][sizes.index(comparison.image_size)]
            line = targets.index(comparison.target) + _offset(list(looks).index(comparison.batch), len(looks))
            looks[comparison.batch].draw(axes, comparison.ratio or 0.0, line)
            axes.set_title(f"{comparison.variant}, {comparison.image_size} px")
        for axes in (axes for row in grid for axes in row):
            _ratio_axes(axes, targets)
        _legend(figure, {f"batch {batch}": look for batch, look in looks.items()})
        return _svg(figure)


def cpu_plot(document: Document, source: str) -> bytes:
    """How many times as fast as timm's model, with the interval: a panel a batch, a line a row; hollow where not OK."""
    found = sorted(
        (speed for speed in speeds(document) if speed.ratio is not None), key=lambda speed: not speed.is_ours
    )
    batches = sorted({speed.batch for speed in found})
    networks = list(dict.fromkeys(_network(speed) for speed in found))
    looks = _looks(list(dict.fromkeys(speed.kind for speed in found)))
    end = "; hollow: not OK" if len(looks) > LEGEND_MARKS else ", more is better\nhollow: UNSTABLE or INVALID"
    drawn = f"times as fast as {BASELINE}, with its 95 % interval{end}"
    with style.context(["default", STYLE]):
        height = 0.16 * len(networks) * (len(looks) + 1)
        figure, (panels,) = _figure((1, len(batches)), height, "Speed on a CPU", drawn, source)
        for axes, batch in zip(panels, batches, strict=True):
            for speed in (speed for speed in found if speed.batch == batch):
                offset = _offset(list(looks).index(speed.kind), len(looks))
                _interval(axes, speed, networks.index(_network(speed)) + offset, looks[speed.kind])
            axes.set_title(f"batch {batch}")
            _ratio_axes(axes, networks)
        _legend(figure, looks)
        return _svg(figure)


def cost_plot(document: Document, source: str) -> bytes:
    """Seconds and peak memory of export and build over the parameters, both axes logarithmic."""
    drawn = "by million parameters, both axes logarithmic"
    with style.context(["default", STYLE]):
        figure, ((seconds,), (memory,)) = _figure((2, 1), 2.1, "What export and build take", drawn, source)
        for axes, unit, title in ((seconds, "seconds", "seconds"), (memory, "peak_mib", "peak memory, MiB")):
            for stage, look in (("export", SERIES[0]), ("build", SERIES[2])):
                _growth_line(axes, document["rows"], f"{stage}_{unit}", look)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(title)
            axes.legend(loc="upper left")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        memory.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        memory.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
        memory.xaxis.set_minor_formatter(NullFormatter())
        return _svg(figure)


PLOTS = {"traffic": traffic_plot, "traffic-targets": targets_plot, "cpu": cpu_plot, "cost": cost_plot}
"""The plot of each section, by the name of its data file."""


def _figure(
    shape: tuple[int, int], panel_height: float, title: str, drawn: str, source: str
) -> tuple[Figure, Sequence[Sequence[Axes]]]:
    """A figure with rows × columns of panels, `panel_height` inches each, and the axes of them.

    Above stand the title and, in two lines at most, what is drawn; below, where the data come from. Raises InputError
    when there is nothing to draw.
    """
    rows, columns = shape
    if not rows * columns * panel_height:
        raise InputError("The data hold nothing to compare. Record them together with the peers.")
    lines = textwrap.wrap(source, FOOTER_COLUMNS, break_on_hyphens=False)
    foot = FOOT + FOOTER_LINE * len(lines)
    gap = 0.35
    height = HEAD + rows * panel_height + (rows - 1) * gap + foot
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    axes = figure.subplots(
        rows, columns, sharex=True, sharey="row", squeeze=False,
        gridspec_kw={
            "left": 0.14, "right": 0.97, "bottom": foot / height, "top": 1 - HEAD / height,
            "hspace": gap / panel_height, "wspace": 0.1,
        },
    )  # fmt: skip
    figure.text(0.02, 1 - 0.08 / height, title, size=11, weight="bold", va="top")
    figure.text(0.02, 1 - 0.28 / height, drawn, size=8.5, va="top")
    figure.text(0.02, 0.08 / height, "\n".join(lines), size=6.5, color=GREY)
    return figure, axes.tolist()


def _svg(figure: Figure) -> bytes:
    """No date in it, and ids from a fixed salt: the same data give the same bytes."""
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _legend(figure: Figure, looks: dict[str, Look]) -> None:
    """Below what is drawn: one line, or two of three marks where there are many, then what is drawn has one line."""
    in_two_lines = len(looks) > LEGEND_MARKS
    figure.legend(
        [look.mark() for look in looks.values()], list(looks), loc="upper left", columnspacing=1.0,
        ncols=-(-len(looks) // 2) if in_two_lines else len(looks), handletextpad=0.2, handlelength=1.4,
        bbox_to_anchor=(0.0, 1 - (0.37 if in_two_lines else 0.53) / figure.get_figheight()),
    )  # fmt: skip


def _looks(names: Sequence[Name]) -> dict[Name, Look]:
    """A colour and shape for each series."""
    if len(names) > len(SERIES):
        raise InputError(f"A plot has {len(SERIES)} marks and the data {len(names)} series: record fewer in one file.")
    return dict(zip(names, SERIES, strict=False))


def _ratio_axes(axes: Axes, names: Sequence[str]) -> None:
    """Names down the left side, the first on top, and a line at 1, where both sides are equal."""
    axes.axvline(1.0, color=GREY, linewidth=0.8)
    for line in range(1, len(names)):
        axes.axhline(line - 0.5, color="#eeeeee", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _offset(index: int, count: int) -> float:
    """Where in a line, from -0.5 to 0.5, the mark of a series stands."""
    return (index + 1) / (count + 1) - 0.5


def _network(speed: Speed) -> str:
    return speed.variant if speed.image_size == 224 else f"{speed.variant}\n{speed.image_size} px"


def _traffic_line(axes: Axes, line: int, found: Comparison) -> None:
    marks = [(GRAPHS[graph], found.share(found.megabytes(graph))) for graph in (*PEERS, OURS)]
    for look, share in (*marks, (FLOOR, found.share(found.floor))):
        if share is not None:
            look.draw(axes, share, line)
    if found.ratio is not None:
        text = f"{found.megabytes(OURS):.0f} MB"
        axes.annotate(text, (found.ratio, line), (6, 0), textcoords="offset points", va="center", fontsize=8)


def _interval(axes: Axes, speed: Speed, line: float, look: Look) -> None:
    if speed.ratio is not None:
        axes.plot((speed.ratio.low, speed.ratio.high), (line, line), "-", color=look.color, linewidth=1.5)
        face = None if speed.status == "OK" else "white"
        Look(look.color, look.shape, 5, face).draw(axes, speed.ratio.ratio, line)


def _growth_line(axes: Axes, rows: Sequence[Document], column: str, look: Look) -> None:
    known = [row for row in rows if row[column] is not None]
    slope = growth(rows, column)
    words = "" if slope is None else f": × {10**slope:.1f} for 10 × the parameters"
    axes.plot(
        [row["parameters"] for row in known], [row[column] for row in known], f"{look.shape}-", color=look.color,
        linewidth=1, label=GROWTHS[column] + words,
    )  # fmt: skip
