"""What a sample of latencies can say, and when it is too small to say it.

Nothing here measures or knows a runner: milliseconds in, figures out. Intervals are 95 % bootstrap intervals of a
median from a fixed seed. The rule of stability is that of Triton's perf_analyzer: the last three windows agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["PERCENTILES", "WINDOWS", "Latency", "Ratio", "disagreement", "latency_of", "ratio_of"]

Samples = np.ndarray[Any, np.dtype[np.float64]]

WINDOWS = 3
"""Windows in a row that have to agree, and that a result is made of."""

PERCENTILES = {90: 50, 95: 100, 99: 500}
"""A percentile and the fewest calls that carry it: five samples beyond it at least."""

BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds a call over a sample. A percentile is None where the sample is too small for it (`PERCENTILES`).

    `cv_percent`: standard deviation over mean. `median_interval`: 95 % bootstrap interval of the median.
    """

    calls: int
    mean_ms: float
    median_ms: float
    median_interval: tuple[float, float]
    min_ms: float
    max_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    cv_percent: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as `peer`: the median over neighbouring calls of one run, with its 95 % interval."""

    peer: str
    ratio: float
    low: float
    high: float


def latency_of(milliseconds: Sequence[float], seed: int = 0) -> Latency:
    """Summarise a sample of at least one call."""
    values = np.asarray(milliseconds, dtype=np.float64)
    percentiles = {rank: _percentile(values, rank) for rank in PERCENTILES}
    return Latency(
        calls=len(values),
        mean_ms=float(values.mean()),
        median_ms=float(np.median(values)),
        median_interval=_median_interval(values, seed),
        min_ms=float(values.min()),
        max_ms=float(values.max()),
        p90_ms=percentiles[90],
        p95_ms=percentiles[95],
        p99_ms=percentiles[99],
        cv_percent=float(100.0 * values.std() / values.mean()),
    )


def ratio_of(peer: str, peer_ms: Sequence[float], own_ms: Sequence[float], seed: int = 0) -> Ratio:
    """Compare two samples of one run, call by call: the samples are equally long, and neighbours ran in turn."""
    ratios = np.asarray(peer_ms, dtype=np.float64) / np.asarray(own_ms, dtype=np.float64)
    low, high = _median_interval(ratios, seed)
    return Ratio(peer, float(np.median(ratios)), low, high)


def disagreement(windows: Sequence[Sequence[float]], tolerance: float) -> str:
    """In what the last three windows of milliseconds disagree, in words; empty where they agree.

    Their medians, and their 95th percentiles where each window carries one, have to lie within `tolerance`, which is
    relative: at 0.1 the largest is at most 1.1 times the smallest. Fewer than three windows never agree.
    """
    if len(windows) < WINDOWS:
        return f"{len(windows)} windows"
    last = [np.asarray(window, dtype=np.float64) for window in windows[-WINDOWS:]]
    tails = [tail for window in last if (tail := _percentile(window, 95)) is not None]
    figures = {
        "medians": [float(np.median(window)) for window in last],
        "95th percentiles": tails if len(tails) == WINDOWS else [],
    }
    for name, values in figures.items():
        if values and max(values) > (1.0 + tolerance) * min(values):
            return f"{name} of {', '.join(f'{value:.3g}' for value in values)} ms"
    return ""


def _percentile(values: Samples, rank: int) -> float | None:
    return float(np.percentile(values, rank)) if len(values) >= PERCENTILES[rank] else None


def _median_interval(values: Samples, seed: int) -> tuple[float, float]:
    draws = np.random.default_rng(seed).choice(values, size=(BOOTSTRAP_DRAWS, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)
