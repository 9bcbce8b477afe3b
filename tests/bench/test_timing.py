"""The benchmark cannot flatter: shown on runners whose speed is known because they move the clock themselves."""

import mmap
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cnx_deploy.bench import timing as benchmark
from cnx_deploy.bench.record import Timing
from cnx_deploy.bench.timing import (
    Contender,
    Expected,
    TimingSpec,
    measure_together,
    open_contender,
    peak_memory_mib,
    reset_peak_memory,
)
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES, OutputSpec
from cnx_deploy.runners.base import HoldsNothing, PhaseTimes, RunnerInfo
from tests.support.known_speed import IMAGES, LOGITS, Clock, KnownSpeed


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


EXPECTED = Expected({"logits": LOGITS}, (OutputSpec("logits", tuple(LOGITS.shape[1:]), "logit", "softmax"),))


def timings(
    *runners: KnownSpeed, calls: int = 60, expected: Expected | None = EXPECTED, **options: object
) -> list[Timing]:
    """Time the runners for exactly `calls` calls each where they are steady; the first is the peer."""
    contenders = [
        Contender(f"runner {index}", item, gate=GATES["fp32"], is_peer=index == 0) for index, item in enumerate(runners)
    ]
    spec = TimingSpec(duration_seconds=1e-6, min_calls=calls)
    return measure_together(contenders, [IMAGES] * len(runners), spec, expected=expected, **options)


def turns(*contenders: Contender, **values: float) -> list[Timing]:
    """Time these contenders for a tenth of a second each, or as told."""
    return measure_together(contenders, [IMAGES] * len(contenders), TimingSpec(**{"duration_seconds": 0.1, **values}))


# What is reported


def test_latency_is_the_time_of_a_call_throughput_its_images_and_right_answers_are_ok(runner):
    timing = timings(runner(8.0))[0]
    latency = timing.latency
    assert (latency.median_ms, latency.mean_ms, latency.min_ms, latency.max_ms) == (8.0, 8.0, 8.0, 8.0)
    assert (timing.images_per_second, timing.batch, latency.cv_percent) == (500.0, 4, 0.0)
    assert (timing.status, timing.correctness.relative_l2, timing.correctness.calls) == ("OK", 0.0, 3)
    assert timings(runner(8.0), expected=None)[0].correctness is None


def test_the_first_call_is_reported_and_not_in_the_sample(runner):
    timing = timings(runner(lambda index: 1000.0 if index == 0 else 10.0))[0]
    assert (timing.first_call_ms, timing.latency.median_ms, timing.latency.max_ms) == (1000.0, 10.0, 10.0)


def test_slow_calls_at_the_start_are_warm_up(runner):
    settling = runner(lambda index: max(10.0, 30.0 - index))
    (timing,) = turns(Contender("settling", settling), duration_seconds=2.0, warm_up_tries=20)
    assert (timing.latency.min_ms, timing.latency.max_ms, timing.status) == (10.0, 10.0, "OK")


def test_the_duration_is_spent_on_each_contender(runner):
    found = turns(Contender("fast", runner(10.0)), Contender("slow", runner(30.0)), duration_seconds=3.0)
    # Three windows of 34 rounds: 34 × 60 ms, rests included, is over 2 × 3 s / 3.
    assert [timing.latency.calls for timing in found] == [102, 102]


def test_a_real_clock_measures_at_least_what_a_runner_sleeps():
    sleeper = KnownSpeed(lambda milliseconds: time.sleep(milliseconds / 1000), lambda index: 5.0)
    timing = timings(sleeper, calls=10)[0]
    assert (timing.latency.min_ms >= 5.0, timing.first_call_ms >= 5.0) == (True, True)


# What is not to be believed


def test_bench_refuses_invalid_wrong_logits(runner):
    timing = timings(runner(8.0, logits=LOGITS * 1.01))[0]
    found = timing.correctness
    assert (timing.status, found.relative_l2) == ("INVALID", pytest.approx(0.01, rel=1e-4))
    assert found.max_abs == pytest.approx(0.03, rel=1e-4)  # FP32 of 3 * 1.01 - 3
    assert any("relative L2" in remark for remark in timing.remarks)


def test_bench_refuses_invalid_nan_logits(runner):
    broken = Contender("nan", runner(8.0, logits=LOGITS * float("nan")), gate=None)
    (timing,) = measure_together([broken], [IMAGES], TimingSpec(0.1), expected=EXPECTED)
    found = timing.correctness
    assert (timing.status, found.relative_l2, found.max_abs) == ("INVALID", None, None)
    assert found.nonfinite_count == 3 * LOGITS.numel()


@pytest.mark.parametrize(("late_ms", "status", "calls"), [(8.7, "OK", 60), (9.0, "OK", 100), (6.0, "OK", 100)])
def test_measuring_goes_on_until_the_last_three_windows_agree(runner, late_ms, status, calls):
    steady = runner(8.0)
    warm_up = calls_of_warm_up(steady)
    changing = runner(lambda index: 8.0 if index < warm_up + 40 else late_ms)
    timing = timings(changing, calls=60)[0]
    measured = len(changing.calls) - warm_up
    # Windows of 20: two at 8 ms, then one or three at the new speed; three are reported.
    assert (timing.status, measured, timing.latency.calls) == (status, calls, 60)
    assert timing.latency.max_ms == late_ms if calls > 60 else timing.latency.min_ms == 8.0


def test_bench_refuses_invalid_a_speed_that_never_settles_is_unstable(runner):
    steady = runner(8.0)
    warm_up = calls_of_warm_up(steady)
    growing = runner(lambda index: 8.0 * 1.1 ** (max(0, index - warm_up) // 20))
    timing = timings(growing, calls=60)[0]
    assert (timing.status, len(growing.calls) - warm_up) == ("UNSTABLE", 200)
    assert "after 10 windows the last three disagree: medians of" in timing.remarks[0]


def calls_of_warm_up(steady: KnownSpeed) -> int:
    """Calls before the sample at this constant speed."""
    timings(steady, calls=60)
    return len(steady.calls) - 60


def test_a_slow_model_makes_ten_calls_and_the_row_says_so(runner):
    slow, fast = timings(runner(150.0), runner(5.0), calls=100)
    assert (slow.latency.calls, fast.latency.calls) == (10, 10)
    assert slow.remarks == fast.remarks == ("10 calls only: one of the run takes over 100 ms",)


def test_warm_up_is_ten_calls_and_a_fifth_of_a_second_at_least(runner):
    slow, fast = runner(50.0), runner(1.0)
    assert (calls_of_warm_up(slow), calls_of_warm_up(fast)) == (1 + 3 * 4, 1 + 3 * 67)


@pytest.mark.parametrize("wrong_call", [0, 59])
def test_one_wrong_call_of_those_judged_makes_the_timing_invalid(runner, wrong_call):
    """The first and the last timed call; every other call is right, and overwrites the buffer of the one before."""
    warm_up = calls_of_warm_up(runner(8.0))

    class OnceWrong(KnownSpeed):
        def run(self, images: Tensor) -> dict[str, Tensor]:
            super().run(images)
            self.logits.copy_(LOGITS * (2.0 if len(self.calls) - 1 == warm_up + wrong_call else 1.0))
            return {"logits": self.logits}

    steady = runner(8.0)
    timing = timings(OnceWrong(steady.wait, steady.milliseconds))[0]
    assert (timing.status, timing.correctness.relative_l2) == ("INVALID", pytest.approx(1.0))


# What a GPU adds, by a runner that says what its events would


@dataclass
class KnownSplit(KnownSpeed):
    """A runner on the CPU whose split call `index` takes what `split(index)` says."""

    split: Callable[[int], PhaseTimes] = lambda index: PhaseTimes(0.1, 8.0, 0.1, 0.5)
    split_calls: int = 0

    def run_phases(self, images: Tensor) -> tuple[dict[str, Tensor], PhaseTimes]:
        self.split_calls += 1
        return {"logits": self.logits}, self.split(self.split_calls)


def split_timing(runner: Callable[..., KnownSpeed], split: Callable[[int], PhaseTimes]) -> Timing:
    steady = runner(8.0)
    return timings(KnownSplit(steady.wait, steady.milliseconds, split=split))[0]


def test_a_runner_that_splits_its_time_has_the_medians_of_the_parts_in_its_row(runner):
    timing = split_timing(runner, lambda index: PhaseTimes(0.5 if index % 8 else 5.0, 8.0, 0.25, 1.0))
    parts = (timing.gpu.h2d_ms, timing.gpu.compute.median_ms, timing.gpu.d2h_ms, timing.gpu.enqueue_ms)
    assert (parts, timing.gpu.compute.calls) == ((0.5, 8.0, 0.25, 1.0), timing.latency.calls)
    assert (timing.status, timing.remarks) == ("OK", ())
    assert timings(runner(8.0))[0].gpu is None


def test_wrong_logits_of_the_split_call_alone_make_a_timing_invalid(runner):
    class WrongSplit(KnownSplit):
        def run_phases(self, images: Tensor) -> tuple[dict[str, Tensor], PhaseTimes]:
            return {"logits": LOGITS * 2}, super().run_phases(images)[1]

    steady = runner(8.0)
    assert timings(WrongSplit(steady.wait, steady.milliseconds))[0].status == "INVALID"


@pytest.mark.parametrize(("swing", "status"), [(0.02, "OK"), (0.03, "UNSTABLE")])
def test_compute_time_that_varies_by_more_than_a_fortieth_is_unstable(runner, swing, status):
    timing = split_timing(runner, lambda index: PhaseTimes(0.1, 8.0 * (1.0 + swing * (-1) ** index), 0.1, 0.5))
    assert timing.status == status
    assert any("compute time varies by 3.0 %" in remark for remark in timing.remarks) == (status == "UNSTABLE")


@pytest.mark.parametrize(
    ("split", "remark"),
    [
        (PhaseTimes(0.1, 1.0, 0.1, 0.79), None),
        (PhaseTimes(0.1, 1.0, 0.1, 0.81), "enqueue-bound"),
        (PhaseTimes(0.99, 1.0, 0.1, 0.1), None),
        (PhaseTimes(1.0, 1.0, 0.1, 0.1), "transfer-bound"),
        (PhaseTimes(0.1, 1.0, 1.0, 0.1), "transfer-bound"),
    ],
)
def test_what_else_limits_the_speed_is_said(runner, split, remark):
    timing = split_timing(runner, lambda index: split)
    assert timing.status == "OK"
    assert [remark in said for said in timing.remarks] == ([True] if remark else [])


# Comparison


def test_the_interval_of_a_noisy_speedup_holds_it(runner):
    factors = noise()
    _, timing = timings(runner(10.0), runner(lambda index: 20.0 * factors[index]), calls=300)
    found = timing.ratio_to("runner 0")
    assert found.low < 0.5 < found.high
    assert found.low <= found.ratio <= found.high < found.low + 0.05


def test_a_machine_that_slows_down_slows_both_and_leaves_the_speedup(clock, runner):
    start = 2e9  # nanoseconds; both are warm by then

    def speed(milliseconds: float) -> Callable[[int], float]:
        return lambda index: milliseconds * (1.0 + max(0.0, clock.nanoseconds - start) / 1e9)

    pair = Contender("a", runner(speed(10.0)), is_peer=True), Contender("b", runner(speed(20.0)))
    _, timing = turns(*pair, duration_seconds=5.0, warm_up_tries=3)
    assert (timing.status, timing.ratio_to("a").ratio) == ("UNSTABLE", pytest.approx(0.5, rel=0.02))


def test_every_peer_has_a_ratio_none_to_itself_and_nothing_without_a_peer(runner):
    speeds = (("torch", 40.0, True), ("timm", 20.0, True), ("ours", 10.0, False))
    found = turns(*(Contender(name, runner(ms), is_peer=peer, device_memory_mib=30.0) for name, ms, peer in speeds))
    assert {row.device_memory_mib for row in found} == {30.0}
    ratios = {row.name: {ratio.peer: ratio.ratio for ratio in row.ratios} for row in found}
    assert ratios == {"torch": {"timm": 0.5}, "timm": {"torch": 2.0}, "ours": {"torch": 4.0, "timm": 2.0}}
    assert [row.ratios for row in turns(*(Contender(name, runner(10.0)) for name in "ab"))] == [(), ()]


def test_a_peer_on_another_kind_of_device_is_none(runner, monkeypatch):
    monkeypatch.setitem(benchmark.AGREEMENT, "meta", 0.1)
    elsewhere = runner(30.0, device=torch.device("meta"))
    peers = Contender("elsewhere", elsewhere, is_peer=True), Contender("here", runner(20.0), is_peer=True)
    found = turns(*peers, Contender("ours", runner(10.0)))
    assert [[ratio.peer for ratio in row.ratios] for row in found] == [[], [], ["here"]]


def test_contenders_take_turns(runner):
    order: list[str] = []

    class Noted(KnownSpeed):
        def run(self, images: Tensor) -> dict[str, Tensor]:
            order.append(self.info.backend)
            return super().run(images)

    wait = runner(1.0).wait
    infos = [RunnerInfo(name, "1", "clock", "fp32", "fp32") for name in "AB"]
    timings(*(Noted(wait, lambda index: 10.0, info=info) for info in infos), calls=20)
    assert "".join(order[-40:]) == "AB" * 20


def test_progress_ends_at_the_whole(runner):
    told: list[tuple[str, float]] = []
    timings(runner(8.0), progress=lambda name, share: told.append((name, share)))
    assert told[-1] == ("batch 4", 1.0)


# Limits and memory


@pytest.mark.parametrize("values", [{"duration_seconds": 0.0}, {"duration_seconds": -1.0}, {"min_calls": 0}])
def test_a_measurement_without_time_or_calls_is_refused(values):
    with pytest.raises(InputError, match="positive duration"):
        TimingSpec(**values)


def test_the_peak_memory_rises_by_what_is_used_and_falls_when_reset():
    if not reset_peak_memory():
        pytest.skip("this system does not let a process reset its peak memory")
    before = peak_memory_mib()
    held = mmap.mmap(-1, 100 << 20)  # pages of its own: an allocator may have as many left over
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    during = peak_memory_mib()
    held.close()
    after = reset_peak_memory()
    assert (during - before > 90, after < during - 50) == (True, True)


class GpuRunner(KnownSpeed, HoldsNothing):
    """A runner that says it is on a GPU."""


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """Torch's answers about a GPU of 1000 MiB: `used` MiB are taken, `unused` of them by empty blocks of torch."""
    state = SimpleNamespace(used=300, unused=0)
    for name, answer in {
        "is_available": lambda: True,
        "init": lambda: None,
        "empty_cache": lambda: state.__dict__.update(used=state.used - state.unused, unused=0),
        "current_device": lambda: 0,
        "mem_get_info": lambda: ((1000 - state.used) << 20, 1000 << 20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: IMAGES[:1])
    return state


def opened_on(device: str, at_call: Callable[[int], float]) -> Contender:
    with ExitStack() as stack:
        make = lambda: GpuRunner(lambda milliseconds: None, at_call, device=torch.device(device))  # noqa: E731
        return open_contender("gpu", "atto", make, GATES["fp32"], stack)


@pytest.mark.parametrize(
    ("device", "unused", "used_after", "expected"),
    [
        ("cuda", 0, 370, 70.0),
        ("cuda:0", 0, 370, 70.0),
        ("cuda:0", 40, 300, 40.0),  # blocks that torch kept from the runner before hide nothing
        ("cuda:0", 0, 300, None),
        ("cuda:0", 0, 250, None),  # another process gave memory back
        ("cuda:1", 0, 370, None),
        ("cpu", 0, 370, None),
    ],
)
def test_device_memory_is_what_is_gone_after_the_first_call(gpu, device, unused, used_after, expected):
    def use_memory(index: int) -> float:
        gpu.used = used_after
        return 1.0

    gpu.unused = unused
    assert opened_on(device, use_memory).device_memory_mib == expected


def test_a_gpu_that_takes_no_process_more_does_not_stop_a_row(gpu, monkeypatch):
    def refuse() -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert opened_on("cpu", lambda index: 1.0).device_memory_mib is None


def test_detections_are_judged_by_their_partners_and_a_moved_box_is_told_in_pixels(clock, runner):
    shapes = {"boxes": (2, 4), "scores": (2,), "labels": (2,), "exact": (1,)}
    specs = tuple(OutputSpec(name, shape, "value") for name, shape in shapes.items())
    found = {
        "boxes": torch.tensor([[[0.0, 0.0, 20.0, 20.0], [30.0, 30.0, 60.0, 60.0]]]),
        "scores": torch.tensor([[0.9, 0.8]]), "labels": torch.tensor([[0, 1]]), "exact": torch.ones(1, 1),
    }  # fmt: skip
    moved = {**found, "boxes": found["boxes"] + 0.25}
    for answer, status, pixels in ((found, "OK", 0.0), (moved, "INVALID", 0.25)):

        class Detector(KnownSpeed):
            outputs = answer

            def run(self, images: Tensor) -> dict[str, Tensor]:
                super().run(images)
                return self.outputs

        steady = runner(8.0)
        (timing,) = timings(Detector(steady.wait, steady.milliseconds), expected=Expected(found, specs))
        assert (timing.status, timing.correctness.max_abs) == (status, pytest.approx(pixels))
