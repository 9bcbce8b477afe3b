"""The page's charts: drawn by matplotlib, and put into the page as SVG that takes the page's colours.

A label that is not known to be short is cut, since every chart stands beside a table that has it whole.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cnx_deploy.bench.record import BenchmarkRecord
from cnx_deploy.core.plotting import BLUE, GREY, GRID, svg_bytes
from cnx_deploy.diagnosis.layer_record import LayerComparison
from cnx_deploy.report.html.documents import HeadroomDocument
from cnx_deploy.report.html.networks import Entry

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["headroom_chart", "layers_chart", "parity_chart", "percent", "printable", "ratio_chart", "stage_chart"]

WIDTH, ROW, FOOT, KEY_LINE = 7.2, 0.24, 0.35, 0.22
"""Inches: the chart, a row, below the rows, a line of the legend."""
LONGEST_LABEL = 40
LARGEST_POWER = 300
"""Powers of ten on an axis end here, so that 10.0 ** power stays a number."""
LARGEST_RATIO = 1e6
SETTINGS: dict[str, Any] = {
    "text.parse_math": False,  # a name may hold dollar signs
    "figure.facecolor": "none", "axes.facecolor": "none", "axes.spines.left": False, "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "ytick.major.size": 0, "legend.labelcolor": GREY,
}  # fmt: skip
PAPER = "#fffffe"
"""What is drawn in it takes the colour of the page: the inside of a hollow mark."""
THEME = {BLUE.lower(): "--accent", GREY.lower(): "--muted", GRID.lower(): "--line", PAPER: "--paper"}
"""Colours of a drawing and the page's variables for them, which are others in the dark."""
STAGES: Mapping[str, tuple[str, str]] = {
    "stem": ("#cfe0f3", "#0b1a2b"), "stage 1": ("#aecbeb", "#0b1a2b"), "stage 2": ("#86b1df", "#0b1a2b"),
    "stage 3": ("#5a92cf", "#0b1a2b"), "stage 4": ("#2c68ac", "#ffffff"), "head": ("#16406f", "#ffffff"),
    "other": ("#7a828c", "#010101"),
}  # fmt: skip
"""Parts of a bar with their colour and that of the text on it."""
BACKENDS: Mapping[str, tuple[str, str, str, str]] = {
    "torch": ("PyTorch in half", GREY, "o", PAPER), "onnxruntime": ("ONNX Runtime", GREY, "s", PAPER),
    "emulator": ("emulator", BLUE, "^", BLUE), "tensorrt": ("TensorRT", BLUE, "D", BLUE),
}  # fmt: skip
"""Each backend with a marker of its own, so that the chart reads without colour: label, edge, marker, face."""


def printable(value: str) -> str:
    """Return text with what cannot be seen written out: it could hide text, turn it around or break the file."""
    line = value.replace("\n", " ").replace("\t", " ")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def percent(share: float) -> str:
    """Return two digits below 10 %, whole numbers above."""
    value = 100.0 * share
    if 0.0 < value < 1e-3:
        return f"{value:.0e} %"
    return f"{value:,.0f} %" if value >= 10.0 else f"{value:#.2g} %"


def parity_chart(entries: Sequence[Entry]) -> "Markup":
    """Draw the relative L2 of every compared file, its gate beside it."""
    rows = [(entry.manifest.stem, entry.limits[0].found, entry.limits[0].limit) for entry in entries if entry.limits]

    def draw() -> "Figure":
        figure, axes = _rows([stem for stem, *_ in rows], 2)
        place = _log_axis(axes, [value for _, *pair in rows for value in pair], "{:.0e}".format)
        _marks(axes, [(place(value), at) for at, (_, value, _) in enumerate(rows)], BLUE, "o", "largest of the images")
        gates = [(place(gate), at) for at, (*_, gate) in enumerate(rows)]
        _marks(axes, gates, GREY, "|", "its gate", size=10)
        return _with_legend(figure, axes)

    return _inline("Relative L2 against PyTorch in FP32, less is better", draw)


def stage_chart(entries: Sequence[Entry]) -> "Markup":
    """Draw where the bytes of an image are, by stage, a bar an engine."""
    totals = [(entry.manifest.stem, entry.megabytes_by_stage) for entry in entries if entry.compiled is not None]

    def draw() -> "Figure":
        parts = [part for part in STAGES if any(part in shares for _, shares in totals)]
        figure, axes = _rows([stem for stem, _ in totals], len(parts), columns=len(parts))
        starts = [0.0] * len(totals)
        for part in parts:
            colour, ink = STAGES[part]
            shares = [100.0 * by_part.get(part, 0.0) / (sum(by_part.values()) or 1.0) for _, by_part in totals]
            bars = axes.barh(range(len(totals)), shares, 0.8, starts, color=colour, label=part)
            labels = [f"{share:.0f} %" if share >= 10 else "" for share in shares]
            axes.bar_label(bars, labels, label_type="center", color=ink, fontsize=8)
            starts = [start + share for start, share in zip(starts, shares, strict=True)]
        axes.set(xlim=(0, 100))
        axes.grid(visible=False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
        return _with_legend(figure, axes, columns=len(parts))

    return _inline("Bytes an image moves, by stage, as shares of each engine’s whole", draw)


def headroom_chart(document: HeadroomDocument) -> "Markup":
    """Draw the share of 65504 by block, in order of depth."""
    kinds = (
        ("norm", "naive: LayerNorm’s squared deviation", GREY, "^", PAPER),
        ("response", "naive: GRN’s sum of squares", GREY, "s", PAPER),
        ("stored", "largest value the FP16 file stores", BLUE, "o", BLUE),
    )

    def draw() -> "Figure":
        blocks = document.blocks
        figure, axes = _rows([block.name for block in blocks], 5)
        shares = {kind: [(block_range.share, at) for at, block in enumerate(blocks)
                         if (block_range := getattr(block, kind)) is not None and block_range.share is not None]
                  for kind, *_ in kinds}  # fmt: skip
        every = [share for pairs in shares.values() for share, _ in pairs]
        place = _log_axis(axes, [*every, 1.0], percent)
        for kind, label, colour, marker, face in kinds:
            _marks(axes, [(place(share), at) for share, at in shares[kind]], colour, marker, label, face=face)
        margin, limit = f"limit ÷ margin of {document.margin:g}", f"FP16’s limit, {document.limit:.0f}"
        axes.axvline(place(1.0 / document.margin), color=GREY, linestyle="--", linewidth=1, label=margin)
        axes.axvline(1.0, color=GREY, linewidth=1, label=limit)
        return _with_legend(figure, axes)

    return _inline("Share of FP16’s largest number by block, less is better", draw)


def ratio_chart(document: BenchmarkRecord, network: str) -> "Markup | str":
    """Draw times as fast as the baseline, with 95 % intervals; "" where nothing was compared."""
    rows = [row for row in document.rows_of(network) if row.ratio_to(document.baseline) or row.status == "INVALID"]
    files = document.networks[network].files
    if all(row.status == "INVALID" for row in rows):
        return ""

    def clipped(value: float) -> float:
        return min(LARGEST_RATIO, max(-LARGEST_RATIO, value))

    def draw() -> "Figure":
        figure, axes = _rows([f"{_short(row.name)}, batch {row.batch}" for row in rows], 4)
        named: set[str] = set()
        for at, row in enumerate(rows):
            colour, marker, label = (BLUE, "o", "our file, 95 % interval") if row.name in files else (GREY, "s", "peer")
            ratio = row.ratio_to(document.baseline)
            if ratio is None or row.status == "INVALID":
                axes.text(0.01, at, row.status, transform=axes.get_yaxis_transform(), va="center", color=GREY)
                continue
            axes.plot((clipped(ratio.low), clipped(ratio.high)), (at, at), "-", color=colour, linewidth=1.5)
            face = colour if row.status == "OK" else PAPER
            label = label if row.status == "OK" else "hollow: UNSTABLE"
            _marks(axes, [(clipped(ratio.ratio), at)], colour, marker, "" if label in named else label, face=face)
            named.add(label)
        axes.axvline(1.0, color=GREY, linewidth=1, label=f"1: as fast as {_short(document.baseline)}")
        return _with_legend(figure, axes)

    return _inline(f"Times as fast as {document.baseline}, more is better", draw)


def layers_chart(document: LayerComparison) -> "Markup":
    """Draw relative L2 by block, a mark a backend that ran."""

    def draw() -> "Figure":
        figure, axes = _rows(document.blocks, len(document.ran) + 1)
        results = [
            (backend.backend, at, result[1])
            for backend in document.ran
            for at, block in enumerate(document.blocks)
            if (result := backend.of_block(block)) is not None and result[1] is not None
        ]
        limits = sorted({backend.relative_l2_max for backend in document.ran})
        place = _log_axis(axes, [*(error for *_, error in results), *limits], "{:.0e}".format)
        for name in dict.fromkeys(backend.backend for backend in document.ran):
            label, colour, marker, face = BACKENDS.get(name, (name, GREY, "v", GREY))
            points = [(place(error), at) for backend, at, error in results if backend == name]
            _marks(axes, points, colour, marker, label, face=face)
        for limit in limits:
            axes.axvline(place(limit), color=GREY, linewidth=1, label=f"above {limit:g} a module fails")
        return _with_legend(figure, axes)

    return _inline(f"Relative L2 by block of {document.artifact}, less is better", draw)


def _rows(labels: Sequence[str], keys: int, columns: int = 2) -> "tuple[Figure, Axes]":
    """Return a figure with a labelled line a row, the first on top, and room for a legend of `keys` entries."""
    from matplotlib.figure import Figure

    shown = [_short(label) for label in labels]
    left = 0.15 + 0.075 * max(map(len, shown), default=0)  # inches; a letter has a twelfth of one at most
    head = KEY_LINE * math.ceil(keys / columns) + 0.1
    height = head + ROW * len(shown) + FOOT
    figure = Figure(figsize=(WIDTH, height))
    # Fixed margins: a layout engine moves the axes by the last digit each time, and that changes the bytes.
    axes = figure.add_axes((left / WIDTH, FOOT / height, 1 - (left + 0.3) / WIDTH, 1 - (FOOT + head) / height))
    axes.set_yticks(range(len(shown)), shown)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _log_axis(axes: "Axes", values: Iterable[float], label: Callable[[float], str]) -> Callable[[float], float]:
    """Give the axis whole decades around the positive values; return where on it a value stands.

    What lies outside, and the 0 that a logarithmic axis does not have, stands at the edge.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    known = [math.log10(value) for value in values if value > 0.0] or [0.0]
    first = max(-LARGEST_POWER, min(LARGEST_POWER - 1, math.floor(min(known))))
    last = max(first + 1, min(LARGEST_POWER, math.ceil(max(known))))
    low, high = 10.0**first, 10.0**last
    axes.set(xscale="log", xlim=(low, high))
    axes.xaxis.set_major_locator(LogLocator(numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: label(value))
    return lambda value: min(high, max(low, value))


def _marks(
    axes: "Axes", points: Sequence[tuple[float, float]], colour: str, marker: str, label: str, *, face: str = "",
    size: float = 6,
) -> None:  # fmt: skip
    across, down = zip(*points, strict=True) if points else ((), ())
    axes.plot(across, down, marker, color=colour, markerfacecolor=face or colour, markersize=size, label=label,
              markeredgewidth=1.3, clip_on=False)  # fmt: skip


def _with_legend(figure: "Figure", axes: "Axes", columns: int = 2) -> "Figure":
    top = 1 - 0.02 / figure.get_figheight()
    figure.legend(loc="upper left", ncols=columns, bbox_to_anchor=(0.0, top), borderaxespad=0, columnspacing=1.5)
    return figure


def _inline(title: str, draw: "Callable[[], Figure]") -> "Markup":
    """Return a figure for the page: no date, no address, no size of its own, ids that only this chart has."""
    from markupsafe import Markup, escape

    drawn = svg_bytes(draw, **SETTINGS).decode("utf-8")
    opening = drawn[drawn.index("<svg") : drawn.index(">", drawn.index("<svg"))]
    body = drawn[drawn.index(opening) + len(opening) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, count=2, flags=re.DOTALL)
    for colour, variable in THEME.items():
        body = body.replace(colour, f"var({variable})")
    # Ids that nothing refers to go; the others take a prefix, since a page has several charts.
    prefix = f"c{hashlib.sha256(drawn.encode()).hexdigest()[:8]}-"
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda id_: f' id="{prefix}{id_[1]}"' if id_[1] in referred else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", body)
    caption = escape(printable(title))
    (view,) = re.findall(r'viewBox="[^"]+"', opening)
    svg = f'<svg class="plot" role="img" aria-label="{caption}; the table has every figure" {view}>{body}'
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">{svg}</div>'
    # matplotlib escapes what it writes, and the title is escaped above.
    return Markup(f'<figure class="chart"><figcaption>{caption}</figcaption>{box}</figure>')


def _short(label: str) -> str:
    plain = printable(label)
    return plain if len(plain) <= LONGEST_LABEL else f"{plain[: LONGEST_LABEL - 1]}…"
