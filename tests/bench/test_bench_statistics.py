"""What a sample can say: figures worked out by hand, and refusals where it is too small."""

import math

import numpy as np
import pytest

from cnx_deploy.bench.statistics import Ratio, disagreement, latency_of, ratio_of


def test_the_figures_are_those_of_the_sample() -> None:
    found = latency_of([float(value) for value in range(1, 502)])
    assert (found.calls, found.mean_ms, found.median_ms, found.min_ms, found.max_ms) == (501, 251.0, 251.0, 1.0, 501.0)
    assert (found.p90_ms, found.p95_ms, found.p99_ms) == (451.0, 476.0, 496.0)
    assert found.cv_percent == pytest.approx(100 * math.sqrt((501**2 - 1) / 12) / 251)


@pytest.mark.parametrize(
    ("calls", "carried"),
    [
        (49, []),
        (50, ["p90"]),
        (99, ["p90"]),
        (100, ["p90", "p95"]),
        (499, ["p90", "p95"]),
        (500, ["p90", "p95", "p99"]),
    ],
)
def test_a_percentile_takes_five_samples_beyond_it(calls: int, carried: list[str]) -> None:
    found = latency_of([1.0] * calls)
    assert [name for name in ("p90", "p95", "p99") if getattr(found, f"{name}_ms") is not None] == carried


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


def test_a_stricter_tolerance_finds_more() -> None:
    windows = [[10.0], [10.0], [10.6]]
    assert disagreement(windows, 0.05)
    assert not disagreement(windows, 0.10)
