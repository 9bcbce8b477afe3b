"""What samples and sweeps can say: figures worked out by hand, and refusals where a sample is too small."""

import math

import numpy as np
import pytest

from cnx_deploy.bench.record import Ratio
from cnx_deploy.bench.statistics import disagreement, knees, latency_of, ratio_of, sweep_batches, sweep_is_over
from tests.support.bench_rows import row


def test_the_figures_are_those_of_the_sample() -> None:
    found = latency_of([float(value) for value in range(1, 502)])
    assert (found.calls, found.mean_ms, found.median_ms, found.min_ms, found.max_ms) == (501, 251.0, 251.0, 1.0, 501.0)
    assert (found.p90_ms, found.p95_ms, found.p99_ms) == (451.0, 476.0, 496.0)
    assert found.cv_percent == pytest.approx(100 * math.sqrt((501**2 - 1) / 12) / 251)


@pytest.mark.parametrize(
    ("calls", "carried"), [(49, ""), (50, "p90"), (99, "p90"), (100, "p90 p95"), (499, "p90 p95"), (500, "p90 p95 p99")]
)
def test_a_percentile_takes_five_samples_beyond_it(calls: int, carried: str) -> None:
    found = latency_of([1.0] * calls)
    assert [name for name in ("p90", "p95", "p99") if getattr(found, f"{name}_ms") is not None] == carried.split()


def test_the_medians_interval_covers_in_about_95_of_100_samples() -> None:
    generator = np.random.default_rng(0)
    samples = [generator.exponential(10.0, size=101) for _ in range(200)]
    intervals = [latency_of(sample.tolist()).median_interval for sample in samples]
    covered = sum(low <= 10.0 * math.log(2.0) <= high for low, high in intervals)
    assert 180 <= covered <= 198


def test_a_ratio_is_of_neighbours_and_says_how_many_times_as_fast() -> None:
    drift = np.linspace(1.0, 3.0, 100)  # the machine slows to a third; the neighbours' ratio stays
    found = ratio_of("slow", (20.0 * drift).tolist(), (10.0 * drift).tolist())
    assert found == Ratio("slow", pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0))


@pytest.mark.parametrize(
    ("windows", "found"),
    [
        ([[10.0]] * 2, "2 windows"),
        ([[10.0], [10.0], [11.0]], ""),
        ([[10.0], [10.0], [11.1]], "medians of 10, 10, 11.1 ms"),
        ([[99.0], [10.0], [10.0], [10.0]], ""),
        ([[10.0] * 90 + [20.0] * 10] * 3, ""),
        ([[10.0] * 100, [10.0] * 100, [10.0] * 90 + [20.0] * 10], "95th percentiles of 10, 10, 20 ms"),
        ([[10.0] * 99, [10.0] * 99, [10.0] * 89 + [20.0] * 10], ""),  # too few calls for a 95th percentile
    ],
)
def test_the_last_three_windows_agree_or_it_is_said_in_what_they_do_not(windows: list[list[float]], found: str) -> None:
    assert disagreement(windows, 0.10) == found
    assert disagreement([[10.0], [10.0], [10.6]], 0.05) == "medians of 10, 10, 10.6 ms"


@pytest.mark.parametrize(("largest", "batches"), [(1, (1,)), (8, (1, 2, 4, 8)), (10, (1, 2, 4, 8, 10))])
def test_batches_of_a_sweep_double_and_end_at_the_largest(largest: int, batches: tuple[int, ...]) -> None:
    assert sweep_batches(largest) == batches


@pytest.mark.parametrize(
    ("speeds", "over"),
    [
        ([100, 150, 200], False),
        ([100, 150, 130], False),  # one fall
        ([100, 150, 136, 134], False),  # falls of 9 % and one of 11 %
        ([100, 150, 130, 134], True),
        ([100, 150, 130, 160, 140], True),
    ],
)
def test_two_falls_of_a_tenth_end_a_sweep(speeds: list[float], over: bool) -> None:
    assert sweep_is_over([row(2**index, speed) for index, speed in enumerate(speeds)]) == over


@pytest.mark.parametrize(("milliseconds", "over"), [(10_000.0, False), (10_001.0, True)])
def test_a_call_of_over_ten_seconds_ends_a_sweep(milliseconds: float, over: bool) -> None:
    assert sweep_is_over([row(1, 1.0, milliseconds=[milliseconds])]) == over


def test_the_knee_is_the_smallest_batch_within_a_twentieth_of_the_best() -> None:
    (knee,) = knees([row(1, 50), row(2, 94), row(4, 95), row(8, 100), row(16, 99)])
    assert (knee.best_batch, knee.best_images_per_second, knee.knee_batch, knee.still_rising) == (8, 100, 4, False)
    assert knees([row(1, 50), row(2, 100)])[0].still_rising


def test_invalid_rows_do_not_count_and_unstable_ones_are_said() -> None:
    rows = [row(1, 50), row(2, 500, status="INVALID"), row(4, 60, status="UNSTABLE")]
    (knee,) = knees([*rows, row(1, 7, name="other", status="INVALID")])
    assert (knee.name, knee.best_batch, knee.is_unstable) == ("atto.onnx", 4, True)


TAIL = [10.0] * 490 + [50.0] * 10
"""Milliseconds whose 95th percentile is 10 and whose 99th is 50."""


@pytest.mark.parametrize(
    ("milliseconds", "slo_ms", "batch", "percentile"),
    [
        (TAIL, 49.0, 2, "p99"),
        (TAIL, 50.0, 4, "p99"),
        (TAIL[-100:] * 2, 60.0, 4, "p95"),
        ([10.0] * 10, 10.0, 4, "maximum"),
        (TAIL, 5.0, None, None),
    ],
)
def test_a_latency_limit_takes_the_highest_percentile_that_the_sample_carries(
    milliseconds: list[float], slo_ms: float, batch: int | None, percentile: str | None
) -> None:
    (knee,) = knees([row(2, 300), row(4, 400, milliseconds=milliseconds)], slo_ms)
    assert (knee.slo_batch, knee.slo_percentile, knee.slo_ms) == (batch, percentile, slo_ms)
