"""Where a chart's marks stand, in per cent of its width: no drawing, no text size, no colour.

A row is an SVG as wide as there is room, its label and its figure as text beside it. So type keeps its size from
a phone to a sheet of paper, a long name wraps, and every figure can be read without the drawing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

__all__ = [
    "Axis", "Chart", "ChartRow", "Key", "Mark", "Rule", "Segment", "Shape", "ShareChart", "ShareRow", "Tick", "Tone",
    "linear_axis", "log_axis", "segments",
]  # fmt: skip

Shape = Literal["dot", "square", "triangle", "diamond", "gate", "rule", "dashed"]
Tone = Literal["accent", "muted"]

MOST_TICKS = 7
LARGEST_POWER = 300
"""Of ten, on either side: a figure beyond it stands at the edge, and 10.0 ** power stays a number."""
CROWDED = 6
"""From so many ticks on, every second label stays away where a chart is as narrow as a phone, 360 px."""
LARGEST_LINEAR = 1e12
"""A figure beyond it stands at the edge of a linear axis and does not stretch it."""
SMALLEST_SPAN = 0.1
"""Of a linear axis: without it ratios that are all 1 would stand on an axis of rounding errors."""
LABELLED_SHARE = 0.12
"""A segment from this share on has room for its per cent there."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis, `at` in per cent of the width; `is_spare`: without its label on a phone."""

    at: float
    label: str
    is_spare: bool = False

    @property
    def anchor(self) -> str:
        """SVG's text-anchor that keeps the label within the width."""
        return "start" if self.at < 4.0 else "end" if self.at > 96.0 else "middle"


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high` over the whole width, linear or logarithmic."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[Tick, ...] = ()

    def at(self, value: float) -> float:
        """Where a value stands in per cent; what lies outside, and the 0 of a log axis, stands at the edge."""
        low, high = self.low, self.high
        if self.is_log:
            if value <= 0.0:
                return 0.0
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return round(100.0 * min(1.0, max(0.0, (value - low) / (high - low))), 2)


@dataclass(frozen=True, slots=True)
class Mark:
    """A shape `at` a place in per cent; `low` and `high` are the ends of its interval, equal to `at` without one."""

    shape: Shape
    tone: Tone
    at: float
    is_hollow: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class ChartRow:
    """A labelled row: its marks, its figure as text, and all of it in words.

    `is_strong`: it is ours among peers. `group`: a heading over the rows in a row that share it, "" for none.
    """

    label: str
    marks: tuple[Mark, ...]
    figure: str
    words: str
    is_strong: bool = False
    group: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """A line across all rows, dashed or not."""

    at: float
    is_dashed: bool


@dataclass(frozen=True, slots=True)
class Key:
    """What a mark or a line means."""

    shape: Shape
    tone: Tone
    is_hollow: bool
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Rows over one axis."""

    title: str
    axis: Axis
    rows: tuple[ChartRow, ...]
    keys: tuple[Key, ...]
    rules: tuple[Rule, ...] = ()
    label_head: str = ""
    figure_head: str = ""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar; `level` counts the parts from 1. Its per cent is written into it where that has room."""

    name: str
    share: float
    start: float
    width: float
    level: int

    @property
    def middle(self) -> float:
        """Of the segment, in per cent of the bar."""
        return round(self.start + self.width / 2, 2)

    @property
    def label(self) -> str:
        """Per cent, or nothing where it would not fit."""
        return f"{100 * self.share:.0f} %" if self.share >= LABELLED_SHARE else ""


@dataclass(frozen=True, slots=True)
class ShareRow:
    """A whole and its parts."""

    label: str
    segments: tuple[Segment, ...]
    figure: str
    words: str


@dataclass(frozen=True, slots=True)
class ShareChart:
    """Bars of equal length, each divided into the same parts."""

    title: str
    parts: tuple[str, ...]
    rows: tuple[ShareRow, ...]


def log_axis(values: Iterable[float], label: Callable[[float], str]) -> Axis:
    """Whole decades around the positive, finite values; a tick a decade, or every second, third, … where they crowd."""
    known = [math.log10(value) for value in values if value > 0.0 and math.isfinite(value)] or [0.0]
    first = max(-LARGEST_POWER, min(LARGEST_POWER - 1, math.floor(min(known))))
    last = max(first + 1, min(LARGEST_POWER, math.ceil(max(known))))
    step = math.ceil((last - first + 1) / MOST_TICKS)
    axis = Axis(10.0**first, 10.0**last, True)
    places = [10.0**power for power in range(first, last + 1, step)]
    return replace(axis, ticks=_ticks(axis, places, label))


def linear_axis(values: Iterable[float]) -> Axis:
    """Round numbers around the finite values, at steps of 1, 2 or 5 times a power of ten."""
    known = [value for value in values if abs(value) < LARGEST_LINEAR] or [0.0, 1.0]
    least, span = min(known), max(max(known) - min(known), SMALLEST_SPAN)
    magnitude = 10.0 ** math.floor(math.log10(span / (MOST_TICKS - 1)))
    step = next(magnitude * factor for factor in (1, 2, 5, 10, 20) if span / (magnitude * factor) <= MOST_TICKS - 2)
    first, last = math.floor(least / step + 1e-9), math.ceil(max(known) / step - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    axis = Axis(first * step, last * step, False)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    places = [at * step for at in range(first, last + 1)]
    return replace(axis, ticks=_ticks(axis, places, lambda place: f"{place:.{digits}f}"))


def segments(shares: Sequence[tuple[str, float]]) -> tuple[Segment, ...]:
    """The parts of a bar that is as long as all shares together."""
    total = sum(share for _, share in shares) or 1.0
    found, start = [], 0.0
    for level, (name, share) in enumerate(shares, 1):
        width = 100.0 * share / total
        found.append(Segment(name, share / total, round(start, 2), round(width, 2), level))
        start += width
    return tuple(found)


def _ticks(axis: Axis, places: Sequence[float], label: Callable[[float], str]) -> tuple[Tick, ...]:
    is_crowded = len(places) >= CROWDED
    return tuple(Tick(axis.at(at), label(at), is_crowded and bool(index % 2)) for index, at in enumerate(places))
