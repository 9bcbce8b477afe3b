"""Statistics of latencies: what a sample can say, when it is too small to say it, and where a sweep has its knee.

Nothing here measures or knows a runner: milliseconds or rows in, figures out. Intervals are 95 % bootstrap intervals of
a median from a fixed seed. The rule of stability is that of Triton's perf_analyzer: the last three windows agree.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cnx_deploy.bench.record import Knee, Latency, Ratio, Timing

__all__ = [
    "PERCENTILES", "WINDOWS", "disagreement", "knees", "latency_of", "ratio_of", "sweep_batches", "sweep_is_over",
]  # fmt: skip

Samples = np.ndarray[Any, np.dtype[np.float64]]

WINDOWS = 3
"""Windows in a row that have to agree, and that a result is made of."""

PERCENTILES = {90: 50, 95: 100, 99: 500}
"""A percentile and the fewest calls that carry it: five samples beyond it at least."""

BOOTSTRAP_DRAWS = 1000

FALL, FALLS = 0.10, 2
"""A sweep ends once images a second fell this often by this much below the best so far."""

SLOWEST_CALL_MS = 10_000.0
"""A sweep tries no batch larger than one that takes this long: it would take minutes and show the same."""

KNEE_SHARE = 0.95


def latency_of(milliseconds: Sequence[float], seed: int = 0) -> Latency:
    """Summarise a sample of at least one call."""
    values = np.asarray(milliseconds, dtype=np.float64)
    return Latency(
        calls=len(values),
        mean_ms=float(values.mean()),
        median_ms=float(np.median(values)),
        median_interval=_median_interval(values, seed),
        min_ms=float(values.min()),
        max_ms=float(values.max()),
        p90_ms=_percentile(values, 90),
        p95_ms=_percentile(values, 95),
        p99_ms=_percentile(values, 99),
        cv_percent=float(100.0 * values.std() / values.mean()),
    )


def ratio_of(peer: str, peer_ms: Sequence[float], own_ms: Sequence[float], seed: int = 0) -> Ratio:
    """Compare two samples of one run call by call: they are equally long, and neighbours ran in turn."""
    ratios = np.asarray(peer_ms, dtype=np.float64) / np.asarray(own_ms, dtype=np.float64)
    low, high = _median_interval(ratios, seed)
    return Ratio(peer, float(np.median(ratios)), low, high)


def disagreement(windows: Sequence[Sequence[float]], tolerance: float) -> str:
    """Say in what the last three windows of milliseconds disagree; empty where they agree.

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


def sweep_batches(largest: int) -> tuple[int, ...]:
    """1, 2, 4, … up to `largest`, which is itself the last."""
    return (*(2**exponent for exponent in range(largest.bit_length()) if 2**exponent < largest), largest)


def sweep_is_over(rows: Sequence[Timing]) -> bool:
    """Whether a contender's sweep is over: images/s fell by 10 % twice below the best so far, or a call is too slow."""
    best, falls = 0.0, 0
    for row in rows:
        falls += row.images_per_second < (1.0 - FALL) * best
        best = max(best, row.images_per_second)
    return falls >= FALLS or any(row.latency.median_ms > SLOWEST_CALL_MS for row in rows)


def knees(rows: Sequence[Timing], slo_ms: float | None = None) -> tuple[Knee, ...]:
    """Find the knee of every contender that has a valid row, in the order of the rows."""
    groups: dict[tuple[str, str], list[Timing]] = {}
    for row in rows:
        if row.status != "INVALID":
            groups.setdefault((row.network, row.name), []).append(row)
    return tuple(_knee(group, slo_ms) for group in groups.values())


def _knee(rows: Sequence[Timing], slo_ms: float | None) -> Knee:
    best = max(rows, key=lambda row: row.images_per_second)
    within = [row for row in rows if slo_ms is not None and row.latency.tail[0] <= slo_ms]
    largest = max(within, key=lambda row: row.batch, default=None)
    return Knee(
        network=best.network,
        name=best.name,
        best_batch=best.batch,
        best_images_per_second=best.images_per_second,
        knee_batch=min(row.batch for row in rows if row.images_per_second >= KNEE_SHARE * best.images_per_second),
        still_rising=best.batch == max(row.batch for row in rows),
        is_unstable=any(row.status == "UNSTABLE" for row in rows),
        slo_batch=largest.batch if largest is not None else None,
        slo_percentile=largest.latency.tail[1] if largest is not None else None,
        slo_ms=slo_ms,
    )


def _percentile(values: Samples, rank: int) -> float | None:
    return float(np.percentile(values, rank)) if len(values) >= PERCENTILES[rank] else None


def _median_interval(values: Samples, seed: int) -> tuple[float, float]:
    draws = np.random.default_rng(seed).choice(values, size=(BOOTSTRAP_DRAWS, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)
