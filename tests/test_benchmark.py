"""The benchmark cannot flatter: shown on runners whose speed is known because they move the clock themselves."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from cnx_deploy import benchmark
from cnx_deploy.benchmark import BenchSpec, Candidate, Timing, measure_together, peak_memory_mib, reset_peak_memory
from cnx_deploy.errors import InputError
from cnx_deploy.parity import GATES
from cnx_deploy.runners.base import InputSpec, RunnerInfo

CPU = torch.device("cpu")
INFO = RunnerInfo("double", "1", "clock", "fp32", "fp32")
INPUT = InputSpec("float", 32)
IMAGES = torch.zeros(4, 3, 32, 32)
LOGITS = torch.tensor([[3.0, 1.0, -2.0]]).repeat(4, 1)


class Clock:
    """A clock that stands still until a runner moves it; replaces the `time` module within `benchmark`."""

    def __init__(self) -> None:
        self.nanoseconds = 0

    def perf_counter_ns(self) -> int:
        return self.nanoseconds

    def perf_counter(self) -> float:
        return self.nanoseconds / 1e9


@dataclass
class KnownSpeed:
    """A runner whose call number `index` (from 0) takes `milliseconds(index)` and answers `logits`."""

    wait: Callable[[float], None]
    milliseconds: Callable[[int], float]
    logits: Tensor = field(default_factory=LOGITS.clone)
    calls: list[float] = field(default_factory=list)
    info: RunnerInfo = INFO
    input_spec: InputSpec = INPUT
    device: torch.device = CPU

    def run(self, images: Tensor) -> Tensor:
        duration = self.milliseconds(len(self.calls))
        self.calls.append(duration)
        self.wait(duration)
        return self.logits


def noise() -> list[float]:
    """Factors around 1 with a standard deviation of 0.1, drawn from a fixed seed."""
    draws = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    return (1.0 + 0.1 * draws).clamp(0.7, 1.3).tolist()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", clock)
    return clock


@pytest.fixture
def runner(clock) -> Callable[..., KnownSpeed]:
    """Make a runner that moves the clock by a constant or by what a function of the call's number says."""

    def wait(milliseconds: float) -> None:
        clock.nanoseconds += round(milliseconds * 1e6)

    def make(milliseconds: float | Callable[[int], float], **values: object) -> KnownSpeed:
        speed = milliseconds if callable(milliseconds) else lambda index: milliseconds
        return KnownSpeed(wait, speed, **values)

    return make


def timings(*runners: KnownSpeed, calls: int = 60, expected: Tensor | None = LOGITS, **options: object) -> list[Timing]:
    """Time the runners for exactly `calls` calls each."""
    candidates = [Candidate(f"runner {index}", item, 0.0, None, GATES["fp32"]) for index, item in enumerate(runners)]
    spec = BenchSpec(duration_seconds=1e-6, min_calls=calls)
    return measure_together(candidates, [IMAGES] * len(runners), spec, expected=expected, **options)


# What is reported


def test_latency_is_the_time_of_a_call_and_throughput_its_images(runner):
    timing = timings(runner(8.0))[0]
    assert (timing.median_ms, timing.min_ms, timing.images_per_second, timing.batch) == (8.0, 8.0, 500.0, 4)


@pytest.mark.parametrize(
    ("calls", "carried"),
    [
        (49, (False, False, False)),
        (50, (True, False, False)),
        (99, (True, False, False)),
        (100, (True, True, False)),
        (499, (True, True, False)),
        (500, (True, True, True)),
    ],
)
def test_a_percentile_is_none_when_the_sample_cannot_carry_it(runner, calls, carried):
    timing = timings(runner(8.0), calls=calls)[0]
    found = (timing.p90_ms, timing.p95_ms, timing.p99_ms)
    assert (timing.calls, tuple(value is not None for value in found)) == (calls, carried)


def test_percentiles_are_those_of_the_calls(runner):
    slow_tenth = timings(runner(lambda index: 100.0 if index % 8 == 0 else 10.0), calls=104)[0]
    assert (slow_tenth.median_ms, slow_tenth.p90_ms) == (10.0, 100.0)


def test_the_first_call_is_reported_and_not_in_the_sample(runner):
    timing = timings(runner(lambda index: 1000.0 if index == 0 else 10.0))[0]
    assert (timing.first_call_ms, timing.median_ms, timing.p90_ms) == (1000.0, 10.0, 10.0)


def test_slow_calls_at_the_start_are_warm_up(runner):
    settling = runner(lambda index: max(10.0, 30.0 - index))
    timing = measure_together(
        [Candidate("settling", settling, 0.0, None)], [IMAGES], BenchSpec(duration_seconds=2.0, warm_up_tries=20)
    )[0]
    assert (timing.min_ms, timing.p90_ms, timing.status) == (10.0, 10.0, "OK")


def test_the_duration_is_spent_on_each_candidate(runner):
    fast, slow = runner(10.0), runner(30.0)
    candidates = [Candidate("fast", fast, 0.0, None), Candidate("slow", slow, 0.0, None)]
    found = measure_together(candidates, [IMAGES, IMAGES], BenchSpec(duration_seconds=2.0))
    assert [timing.calls for timing in found] == [100, 100]  # 100 × (10 + 30) ms = 2 × 2 s


def test_a_real_clock_measures_at_least_what_a_runner_sleeps():
    sleeper = KnownSpeed(lambda milliseconds: time.sleep(milliseconds / 1000), lambda index: 5.0)
    timing = timings(sleeper, calls=10)[0]
    assert (timing.min_ms >= 5.0, timing.first_call_ms >= 5.0) == (True, True)


# What is not to be believed


def test_steady_right_answers_are_ok(runner):
    timing = timings(runner(8.0))[0]
    assert (timing.status, timing.relative_l2) == ("OK", 0.0)


def test_wrong_logits_make_a_timing_invalid(runner):
    timing = timings(runner(8.0, logits=LOGITS * 1.01))[0]
    assert (timing.status, timing.relative_l2) == ("INVALID", pytest.approx(0.01, rel=1e-4))


def test_logits_that_go_wrong_only_while_timed_make_a_timing_invalid(runner):
    class Spoiled(KnownSpeed):
        def run(self, images: Tensor) -> Tensor:
            right = super().run(images)
            return right if len(self.calls) < 20 else right * 2

    steady = runner(8.0)
    assert timings(Spoiled(steady.wait, steady.milliseconds), calls=200)[0].status == "INVALID"


def test_nan_logits_make_a_timing_invalid_without_a_gate(runner):
    broken = Candidate("nan", runner(8.0, logits=LOGITS * float("nan")), 0.0, None, gate=None)
    timing = measure_together([broken], [IMAGES], BenchSpec(0.1), expected=LOGITS)[0]
    assert (timing.status, timing.relative_l2) == ("INVALID", None)


def test_without_a_reference_nothing_is_claimed_of_the_logits(runner):
    assert timings(runner(8.0), expected=None)[0].relative_l2 is None


@pytest.mark.parametrize(("late_ms", "status"), [(8.7, "OK"), (9.0, "UNSTABLE"), (6.0, "UNSTABLE")])
def test_a_speed_that_changes_by_a_tenth_while_timed_is_unstable(runner, late_ms, status):
    steady = runner(8.0)
    warm_up = calls_of_warm_up(steady)
    changing = runner(lambda index: 8.0 if index < warm_up + 30 else late_ms)
    assert timings(changing, calls=60)[0].status == status


def calls_of_warm_up(steady: KnownSpeed) -> int:
    """Calls before the sample at this constant speed."""
    timings(steady, calls=60)
    return len(steady.calls) - 60


# Comparison


def test_a_candidate_of_half_the_speed_has_a_speedup_of_one_half(runner):
    first, second = timings(runner(10.0), runner(20.0))
    assert (first.speedup, second.speedup, second.speedup_interval) == (None, 0.5, (0.5, 0.5))


def test_the_interval_of_a_noisy_speedup_holds_it(runner):
    factors = noise()
    _, timing = timings(runner(10.0), runner(lambda index: 20.0 * factors[index]), calls=300)
    low, high = timing.speedup_interval
    assert (low < 0.5 < high, low <= timing.speedup <= high, high - low < 0.05) == (True, True, True)


def test_a_machine_that_slows_down_slows_both_and_leaves_the_speedup(clock, runner):
    start = 2e9  # nanoseconds; both are warm by then

    def speed(milliseconds: float) -> Callable[[int], float]:
        return lambda index: milliseconds * (1.0 + max(0.0, clock.nanoseconds - start) / 1e9)

    candidates = [Candidate(name, runner(speed(ms)), 0.0, None) for name, ms in (("a", 10.0), ("b", 20.0))]
    _, timing = measure_together(candidates, [IMAGES, IMAGES], BenchSpec(duration_seconds=5.0, warm_up_tries=3))
    assert (timing.status, timing.speedup) == ("UNSTABLE", pytest.approx(0.5, rel=0.02))


def test_candidates_take_turns(runner):
    order: list[str] = []

    class Noted(KnownSpeed):
        def run(self, images: Tensor) -> Tensor:
            order.append(self.info.backend)
            return super().run(images)

    wait = runner(1.0).wait
    infos = [RunnerInfo(name, "1", "clock", "fp32", "fp32") for name in "AB"]
    timings(*(Noted(wait, lambda index: 10.0, info=info) for info in infos), calls=20)
    assert "".join(order[-40:]) == "AB" * 20


def test_the_same_seed_gives_the_same_interval(runner):
    factors = noise()

    def interval() -> tuple[float, float] | None:
        return timings(runner(10.0), runner(lambda index: 20.0 * factors[index]))[1].speedup_interval

    assert interval() == interval()


def test_progress_ends_at_the_whole(runner):
    told: list[tuple[str, float]] = []
    timings(runner(8.0), progress=lambda name, share: told.append((name, share)))
    assert told[-1] == ("batch 4", 1.0)


# Limits and memory


@pytest.mark.parametrize("values", [{"duration_seconds": 0.0}, {"duration_seconds": -1.0}, {"min_calls": 0}])
def test_a_measurement_without_time_or_calls_is_refused(values):
    with pytest.raises(InputError, match="positive duration"):
        BenchSpec(**values)


def test_the_peak_memory_rises_by_what_is_used_and_falls_when_reset():
    if not reset_peak_memory():
        pytest.skip("this system does not let a process reset its peak memory")
    before = peak_memory_mib()
    held = bytearray(b"x") * (100 << 20)
    during = peak_memory_mib()
    del held
    after = reset_peak_memory()
    assert (during - before > 90, after < during - 50) == (True, True)
