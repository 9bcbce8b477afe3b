"""Where a sweep ends, its knee, and what a latency limit allows: on rows with chosen figures."""

import pytest

from cnx_deploy.bench.sweep import is_over, knee_of, knees, sweep_batches
from tests.support.bench_rows import row


@pytest.mark.parametrize(
    ("largest", "batches"), [(1, (1,)), (8, (1, 2, 4, 8)), (10, (1, 2, 4, 8, 10)), (256, tuple(2**n for n in range(9)))]
)
def test_batches_double_and_end_at_the_largest(largest: int, batches: tuple[int, ...]) -> None:
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
    assert is_over([row(2**index, speed) for index, speed in enumerate(speeds)]) == over


@pytest.mark.parametrize(("milliseconds", "over"), [(10_000.0, False), (10_001.0, True)])
def test_a_call_of_over_ten_seconds_ends_a_sweep(milliseconds: float, over: bool) -> None:
    assert is_over([row(1, 1.0, milliseconds=[milliseconds])]) == over


def test_the_knee_is_the_smallest_batch_within_a_twentieth_of_the_best() -> None:
    knee = knee_of([row(1, 50), row(2, 94), row(4, 95), row(8, 100), row(16, 99)])
    assert (knee.best_batch, knee.best_images_per_second, knee.knee_batch, knee.still_rising) == (8, 100, 4, False)


def test_a_best_at_the_end_of_the_range_may_still_rise() -> None:
    assert knee_of([row(1, 50), row(2, 100)]).still_rising


def test_invalid_rows_do_not_count_and_unstable_ones_are_said() -> None:
    rows = [row(1, 50), row(2, 500, status="INVALID"), row(4, 60, status="UNSTABLE")]
    (knee,) = knees([*rows, row(1, 7, name="other", status="INVALID")])
    assert (knee.name, knee.best_batch, knee.is_unstable) == ("atto.onnx", 4, True)


def test_the_limit_takes_the_highest_percentile_that_the_sample_carries() -> None:
    tail = [10.0] * 490 + [50.0] * 10  # p95 10 ms, p99 50 ms
    many, few = row(4, 400, milliseconds=tail), row(4, 400, milliseconds=tail[-100:] * 2)
    assert (knee_of([row(2, 300), many], slo_ms=49.0).slo_batch) == 2
    allowed = knee_of([row(2, 300), many], slo_ms=50.0)
    assert (allowed.slo_batch, allowed.slo_percentile) == (4, "p99")
    assert knee_of([few], slo_ms=60.0).slo_percentile == "p95"
    assert knee_of([row(1, 1, milliseconds=[10.0] * 10)], slo_ms=10.0).slo_percentile == "maximum"
    assert knee_of([many], slo_ms=5.0).slo_batch is None
