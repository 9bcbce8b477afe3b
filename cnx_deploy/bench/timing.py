"""How fast a runner is, measured so that it cannot flatter (docs/decisions/0011-how-we-time.md).

A monotonic clock around calls that block until the logits are there; warm-up until the speed has settled; candidates
that are compared take turns in one run, so a machine that slows down slows all of them; measuring goes on until the
last three windows of every candidate agree; and the logits of the timed calls are judged, so a fast wrong answer is
INVALID.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from cnx_deploy.bench.candidate import Candidate
from cnx_deploy.bench.correctness import Correctness, KeptOutputs, judge
from cnx_deploy.bench.gpu import GpuTimes, gpu_times, limits_of
from cnx_deploy.bench.statistics import WINDOWS, Latency, Ratio, disagreement, latency_of, ratio_of
from cnx_deploy.core.errors import InputError
from cnx_deploy.runners.base import Runner, Split, SplitRunner

__all__ = ["BenchSpec", "Timing", "measure_together"]

Progress = Callable[[str, float], None]

AGREEMENT = {"cpu": 0.10, "cuda": 0.05}
"""How far the last three windows may lie apart, by the device of the runner."""

SLOW_CALL_MS = 100.0
"""Above it ten calls are a sample, since a hundred would take minutes; the row says so."""

SLOW_CALLS = 10

WARM_UP_SECONDS = 0.2
WARM_UP_CALLS = 10
REST_SECONDS = 0.01
"""Between the calls of candidates in turn: threads of the one before (OpenMP's spin for milliseconds) fall asleep."""

GPU_CV_PERCENT = 2.5
"""trtexec warns above this coefficient of variation of the compute time."""


@dataclass(frozen=True, slots=True)
class BenchSpec:
    """How long to measure. `duration_seconds` is per candidate and batch, rests included.

    The clock is `time.perf_counter_ns`. A third of the duration is a window. Up to `max_windows` are measured until the
    last three agree.
    """

    duration_seconds: float = 3.0
    min_calls: int = 100
    max_windows: int = 10
    warm_up_tries: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.duration_seconds <= 0 or self.min_calls < 1:
            raise InputError(
                "A measurement needs a positive duration and at least one call, not none. Give a longer --duration."
            )


@dataclass(frozen=True, slots=True)
class Timing:
    """One candidate at one batch size.

    `latency`: a whole batch on the host clock, images already on the runner's device. `images_per_second` is from its
    median. `cold_call_ms`: the runner's very first call, on its smallest batch; `first_call_ms`: the first of this one.
    `ratios`: to each peer of the same run on the same kind of device. `status` is OK, UNSTABLE (the last windows
    disagree, or a GPU's compute time varies) or INVALID (the timed logits fail their gate); `remarks` say why, and
    what was cut short. `device_memory_mib`: see `Candidate`.
    """

    name: str
    network: str
    backend: str
    version: str
    device: str
    precision: str
    arithmetic: str
    details: dict[str, str]
    batch: int
    images_per_second: float
    latency: Latency
    gpu: GpuTimes | None
    cold_call_ms: float | None
    first_call_ms: float
    create_seconds: float
    peak_memory_mib: float | None
    correctness: Correctness | None
    ratios: tuple[Ratio, ...]
    status: str
    remarks: tuple[str, ...]
    device_memory_mib: float | None = None

    def ratio_to(self, peer: str) -> Ratio | None:
        """The ratio to the peer of this name; None for that peer itself and where it did not run."""
        return next((ratio for ratio in self.ratios if ratio.peer == peer), None)

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return asdict(self)


@dataclass(slots=True)
class _Sample:
    """What is known so far of one candidate: `windows` of milliseconds, kept logits, CUDA's times where it has them."""

    candidate: Candidate
    images: Tensor
    on_host: Tensor
    outputs: KeptOutputs
    first_call_ms: float = 0.0
    settled_ms: float = 0.0
    windows: list[list[float]] = field(default_factory=list)
    splits: list[list[Split]] = field(default_factory=list)

    @property
    def milliseconds(self) -> list[float]:
        """The calls of the last three windows: what is reported."""
        return [value for window in self.windows[-WINDOWS:] for value in window]

    @property
    def disagreement(self) -> str:
        """In what the last windows disagree, empty where they agree."""
        return disagreement(self.windows, AGREEMENT[self.candidate.runner.device.type])

    def call(self) -> None:
        """One timed call into the newest window, and CUDA's own times of another."""
        milliseconds, logits = _timed_call(self.candidate.runner, self.images)
        self.windows[-1].append(milliseconds)
        self.outputs.add(logits)
        if isinstance(self.candidate.runner, SplitRunner):
            logits, split = self.candidate.runner.run_split(self.on_host)
            self.splits[-1].append(split)
            self.outputs.add(logits)


def measure_together(
    candidates: Sequence[Candidate],
    images: Sequence[Tensor],
    spec: BenchSpec,
    *,
    expected: Tensor | None = None,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time the candidates in turn (A B C A B C …) on one batch; `images` holds each candidate's own input.

    `expected` are the reference's logits for the batch, (N, num_classes); the first, a random and the last timed
    logits of each candidate are judged against them by its gate. `progress` is told a name and the share done.
    """
    samples = [
        _Sample(candidate, batch.to(candidate.runner.device), batch, KeptOutputs(spec.seed))
        for candidate, batch in zip(candidates, images, strict=True)
    ]
    for sample in samples:
        _warm_up(sample, spec, progress)
    while not _is_done(samples, spec):
        _measure_window(samples, spec, progress)
    peers = [sample for sample in samples if sample.candidate.is_peer]
    return [_timing(sample, peers, expected, spec) for sample in samples]


def _timed_call(runner: Runner, images: Tensor) -> tuple[float, Tensor]:
    start = time.perf_counter_ns()
    logits = runner.run(images)
    return (time.perf_counter_ns() - start) / 1e6, logits


def _warm_up(sample: _Sample, spec: BenchSpec, progress: Progress | None) -> None:
    """Call in windows until the last three agree, or the tries run out; at least 200 ms and ten calls.

    Where a call is slow, a window is one call, and a model that takes the whole duration settles within its first.
    """
    runner, windows = sample.candidate.runner, list[list[float]]()
    sample.first_call_ms, _ = _timed_call(runner, sample.images)
    while len(windows) < spec.warm_up_tries and disagreement(windows, AGREEMENT[runner.device.type]):
        windows.append([])
        while not _is_warm_window(windows[-1]):
            windows[-1].append(_timed_call(runner, sample.images)[0])
        if isinstance(runner, SplitRunner):
            runner.run_split(sample.on_host)
        if progress is not None:
            progress(f"warming up {sample.candidate.name}", len(windows) / spec.warm_up_tries)
        if windows[-1][-1] > SLOW_CALL_MS and sum(map(sum, windows)) > 1000.0 * spec.duration_seconds:
            break
    sample.settled_ms = statistics.median(value for window in windows[-WINDOWS:] for value in window)


def _is_warm_window(window: Sequence[float]) -> bool:
    if window and window[-1] > SLOW_CALL_MS:
        return True
    return len(window) * WINDOWS >= WARM_UP_CALLS and sum(window) * WINDOWS >= 1000.0 * WARM_UP_SECONDS


def _is_done(samples: Sequence[_Sample], spec: BenchSpec) -> bool:
    measured = len(samples[0].windows)
    return measured >= spec.max_windows or (measured >= WINDOWS and not any(sample.disagreement for sample in samples))


def _measure_window(samples: Sequence[_Sample], spec: BenchSpec, progress: Progress | None) -> None:
    """A third of the duration, and of the fewest calls, for every candidate in turn."""
    number = len(samples[0].windows)
    fewest = _fewest_calls(samples, spec)
    calls = fewest * (number + 1) // WINDOWS - fewest * number // WINDOWS
    seconds = spec.duration_seconds * len(samples) / WINDOWS
    for sample in samples:
        sample.windows.append([])
        sample.splits.append([])
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or len(samples[0].windows[-1]) < calls:
        for sample in samples:
            if len(samples) > 1:
                time.sleep(REST_SECONDS)
            sample.call()
        if progress is not None:
            share = (number + min(1.0, elapsed / seconds)) / max(WINDOWS, number + 1)
            progress(f"batch {len(samples[0].images)}", share)


def _fewest_calls(samples: Sequence[_Sample], spec: BenchSpec) -> int:
    """All candidates make the same number of calls, so the slowest one decides."""
    slow = any(sample.settled_ms > SLOW_CALL_MS for sample in samples)
    return min(spec.min_calls, SLOW_CALLS) if slow else spec.min_calls


def _timing(sample: _Sample, peers: Sequence[_Sample], expected: Tensor | None, spec: BenchSpec) -> Timing:
    candidate = sample.candidate
    info = candidate.runner.info
    latency = latency_of(sample.milliseconds, spec.seed)
    splits = [split for window in sample.splits[-WINDOWS:] for split in window]
    gpu = gpu_times(splits, spec.seed) if splits else None
    correctness = None if expected is None else judge(sample.outputs.all(), expected, candidate.gate)
    unsteady = _unsteady(sample, gpu)
    wrong = correctness.failures if correctness is not None else ()
    few = (
        (f"{latency.calls} calls only: one of the run takes over {SLOW_CALL_MS:g} ms",)
        if latency.calls < spec.min_calls
        else ()
    )
    return Timing(
        name=candidate.name,
        network=candidate.network,
        backend=info.backend,
        version=info.version,
        device=info.device,
        precision=info.precision,
        arithmetic=info.arithmetic,
        details=dict(info.details),
        batch=len(sample.images),
        images_per_second=len(sample.images) * 1000.0 / latency.median_ms,
        latency=latency,
        gpu=gpu,
        cold_call_ms=candidate.cold_call_ms,
        first_call_ms=sample.first_call_ms,
        create_seconds=candidate.create_seconds,
        peak_memory_mib=candidate.peak_memory_mib,
        correctness=correctness,
        ratios=tuple(
            ratio_of(peer.candidate.name, peer.milliseconds, sample.milliseconds, spec.seed)
            for peer in peers
            if peer is not sample and peer.candidate.runner.device.type == candidate.runner.device.type
        ),
        status="INVALID" if wrong else "UNSTABLE" if unsteady else "OK",
        remarks=(*wrong, *unsteady, *few, *(limits_of(gpu) if gpu is not None else ())),
        device_memory_mib=candidate.device_memory_mib,
    )


def _unsteady(sample: _Sample, gpu: GpuTimes | None) -> tuple[str, ...]:
    reasons = []
    if sample.disagreement:
        reasons.append(f"after {len(sample.windows)} windows the last three disagree: {sample.disagreement}")
    if gpu is not None and gpu.compute.cv_percent > GPU_CV_PERCENT:
        reasons.append(f"compute time varies by {gpu.compute.cv_percent:.1f} %, more than {GPU_CV_PERCENT:g} %")
    return tuple(reasons)
