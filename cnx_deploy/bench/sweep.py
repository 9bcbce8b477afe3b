"""What a sweep over batch sizes shows: where more images a call stop paying, and what a latency limit allows."""

from collections.abc import Sequence
from dataclasses import dataclass

from cnx_deploy.bench.timing import Timing

__all__ = ["Knee", "is_over", "knee_of", "knees", "sweep_batches"]

FALL = 0.10
FALLS = 2
SLOWEST_CALL_MS = 10_000.0
"""A larger batch than one that takes this long is not tried: it would take minutes and show the same."""

KNEE_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Knee:
    """The sweep of one candidate: its best batch, and the smallest within 5 % of the best images a second.

    `still_rising`: the best batch is the largest measured, so a larger one may be better. `slo_batch`: the largest
    batch whose `slo_percentile` is within the limit; None where none is, or no limit was given. INVALID rows do not
    count, UNSTABLE ones do and `is_unstable` says so.
    """

    network: str
    name: str
    best_batch: int
    best_images_per_second: float
    knee_batch: int
    still_rising: bool
    is_unstable: bool
    slo_batch: int | None = None
    slo_percentile: str | None = None


def sweep_batches(largest: int) -> tuple[int, ...]:
    """1, 2, 4, … up to `largest`, which is itself the last."""
    powers = [2**exponent for exponent in range(largest.bit_length()) if 2**exponent < largest]
    return (*powers, largest)


def is_over(rows: Sequence[Timing]) -> bool:
    """Whether a candidate's sweep is over: images/s fell by 10 % twice below the best so far, or a call is too slow."""
    best, falls = 0.0, 0
    for row in rows:
        falls += row.images_per_second < (1.0 - FALL) * best
        best = max(best, row.images_per_second)
    return falls >= FALLS or any(row.latency.median_ms > SLOWEST_CALL_MS for row in rows)


def knees(rows: Sequence[Timing], slo_ms: float | None = None) -> list[Knee]:
    """The knee of every candidate that has a valid row, in the order of the rows."""
    groups: dict[tuple[str, str], list[Timing]] = {}
    for row in rows:
        if row.status != "INVALID":
            groups.setdefault((row.network, row.name), []).append(row)
    return [knee_of(group, slo_ms) for group in groups.values()]


def knee_of(rows: Sequence[Timing], slo_ms: float | None = None) -> Knee:
    """The knee of one candidate's rows, at least one."""
    best = max(rows, key=lambda row: row.images_per_second)
    near = [row.batch for row in rows if row.images_per_second >= KNEE_SHARE * best.images_per_second]
    within = [row for row in rows if slo_ms is not None and _tail(row)[0] <= slo_ms]
    largest = max(within, key=lambda row: row.batch, default=None)
    return Knee(
        network=best.network,
        name=best.name,
        best_batch=best.batch,
        best_images_per_second=best.images_per_second,
        knee_batch=min(near),
        still_rising=best.batch == max(row.batch for row in rows),
        is_unstable=any(row.status == "UNSTABLE" for row in rows),
        slo_batch=largest.batch if largest is not None else None,
        slo_percentile=_tail(largest)[1] if largest is not None else None,
    )


def _tail(row: Timing) -> tuple[float, str]:
    """The highest percentile that the sample carries, and its name; the maximum where it carries none."""
    latency = row.latency
    found = ((latency.p99_ms, "p99"), (latency.p95_ms, "p95"), (latency.p90_ms, "p90"), (latency.max_ms, "maximum"))
    return next((value, name) for value, name in found if value is not None)
