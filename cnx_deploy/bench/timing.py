"""How fast a runner is, measured so that it cannot flatter (docs/decisions/0011-how-we-time.md).

A monotonic clock stands around calls that block until the outputs are there. Warm-up goes on until the speed has
settled. Contenders take turns in one run, so a machine that slows down slows all of them. Measuring goes on until the
last three windows of every contender agree. The outputs of the timed calls are judged, so a fast wrong answer is
INVALID.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cnx_deploy.bench.record import Correctness, GpuTimes, Timing
from cnx_deploy.bench.statistics import WINDOWS, disagreement, latency_of, ratio_of
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import Gate, OutputSpec
from cnx_deploy.data import runner_input
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.runners.base import PhasedRunner, PhaseTimes, Runner
from cnx_deploy.verification.parity import comparable, verdicts, worst_verdict

__all__ = ["Contender", "Expected", "Progress", "TimingSpec", "measure_together", "open_contender"]

Progress = Callable[[str, float], None]
"""Told what is going on, and the share of it that is done."""

AGREEMENT = {"cpu": 0.10, "cuda": 0.05}
"""How far the last three windows may lie apart, by the device of the runner."""

SLOW_CALL_MS = 100.0
"""Above it ten calls are a sample, since a hundred would take minutes; the row says so."""
SLOW_CALLS = 10

WARM_UP_SECONDS = 0.2
WARM_UP_CALLS = 10
REST_SECONDS = 0.01
"""Between the calls of contenders in turn: threads of the one before (OpenMP's spin for milliseconds) fall asleep."""

GPU_CV_PERCENT = 2.5
"""trtexec warns above this coefficient of variation of the compute time."""
ENQUEUE_SHARE = 0.8
"""trtexec warns where enqueueing takes more than this share of the compute time."""

MIB = float(1 << 20)

NO_LIMITS = Gate("none", math.inf, -math.inf, -math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Expected:
    """The reference's outputs (N, ...) for a batch, and how the task declares them."""

    outputs: Mapping[str, Tensor]
    specs: Sequence[OutputSpec]


@dataclass(frozen=True, slots=True)
class TimingSpec:
    """How long to measure. `duration_seconds` is per contender and batch, rests included.

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
                "A measurement takes a positive duration and at least one call, "
                f"got {self.duration_seconds:g} s and {self.min_calls} calls."
            )


@dataclass(frozen=True, slots=True)
class Contender:
    """A runner to time, under the name of its row. `create_seconds` is what making it took, without its first call.

    `device_memory_mib` is what free device memory fell by from before it was made until after its first call, on its
    smallest batch and without CUDA's context. It is right only when the process is alone on the GPU, and None on a CPU
    and where free memory did not fall. `is_peer`: the others' speed is given as a ratio to this one.
    `input_from_pixels` makes another input than our files take of (N, S, S, C) uint8 pixels. `gate` None: its outputs
    are not judged, but for NaN and infinity. `remarks`: what else its row says.
    """

    name: str
    runner: Runner
    create_seconds: float = 0.0
    peak_memory_mib: float | None = None
    gate: Gate | None = None
    network: str = ""
    is_peer: bool = False
    cold_call_ms: float | None = None
    input_from_pixels: Callable[[Tensor], Tensor] | None = None
    device_memory_mib: float | None = None
    remarks: tuple[str, ...] = ()

    def images_from_pixels(self, pixels: Tensor) -> Tensor:
        """(N, S, S, C) uint8 pixels -> the batch this contender takes, in host memory."""
        if self.input_from_pixels is not None:
            return self.input_from_pixels(pixels)
        return runner_input(pixels, self.runner.input_spec.kind)

    def takes(self, batch: int) -> bool:
        """Whether the runner takes a batch of this size."""
        spec = self.runner.input_spec
        return spec.min_batch <= batch and (spec.max_batch is None or batch <= spec.max_batch)


def open_contender(
    name: str, network: str, make: Callable[[], Runner], gate: Gate | None, stack: ExitStack
) -> Contender:
    """Make a runner, which `stack` closes, and call it once on its smallest batch, which the memory includes.

    Where there is a GPU, CUDA's context is made before, and is in no runner's time or memory.
    """
    free_before = _free_device_mib()
    before = reset_peak_memory()
    start = time.perf_counter()
    runner = stack.enter_context(make())
    create_seconds = time.perf_counter() - start
    spec = runner.input_spec
    images = torch.zeros(spec.shape(spec.min_batch), dtype=spec.dtype, device=runner.device)
    start = time.perf_counter()
    runner.run(images)
    cold_call_ms = 1000.0 * (time.perf_counter() - start)
    peak = peak_memory_mib()
    taken, on_device = None if peak is None else max(0.0, peak - before), _taken_on_device(free_before, runner.device)
    return Contender(
        name, runner, create_seconds, taken, gate, network, cold_call_ms=cold_call_ms, device_memory_mib=on_device
    )


@dataclass(slots=True)
class _Sample:
    """What is known so far of one contender: `windows` of milliseconds, outputs, CUDA's times where it has them."""

    contender: Contender
    images: Tensor
    on_host: Tensor
    outputs: "_KeptOutputs"
    first_call_ms: float = 0.0
    settled_ms: float = 0.0
    windows: list[list[float]] = field(default_factory=list)
    phases: list[list[PhaseTimes]] = field(default_factory=list)

    @property
    def milliseconds(self) -> list[float]:
        """The calls of the last three windows: what is reported."""
        return [value for window in self.windows[-WINDOWS:] for value in window]

    @property
    def disagreement(self) -> str:
        """In what the last windows disagree, empty where they agree."""
        return disagreement(self.windows, AGREEMENT[self.contender.runner.device.type])

    def call(self) -> None:
        """One timed call into the newest window, and CUDA's own times of another."""
        milliseconds, outputs = _timed_call(self.contender.runner, self.images)
        self.windows[-1].append(milliseconds)
        self.outputs.add(outputs)
        if isinstance(self.contender.runner, PhasedRunner):
            outputs, times = self.contender.runner.run_phases(self.on_host)
            self.phases[-1].append(times)
            self.outputs.add(outputs)


class _KeptOutputs:
    """Copies of the first, the last and one seeded random output of a run whose length is not known beforehand."""

    def __init__(self, seed: int) -> None:
        self._count = 0
        self._generator = random.Random(seed)
        self._kept: dict[str, Outputs] = {}

    def add(self, outputs: Outputs) -> None:
        """Look at the outputs of one more call, which the runner may overwrite in its next."""
        self._count += 1
        last = self._kept["last"] = {name: output.clone() for name, output in outputs.items()}
        self._kept.setdefault("first", last)
        # Reservoir of one: each of n calls is kept with the chance 1/n.
        if self._generator.randrange(self._count) == 0:
            self._kept["random"] = last

    def judge(self, expected: Expected, gate: Gate | None) -> Correctness:
        """Compare the kept outputs with those expected; without a gate only NaN and infinity fail.

        The figures are of the output that fails, or else differs most.
        """
        calls = list(self._kept.values())
        given = {name: torch.cat([call[name].double().cpu() for call in calls]) for name in calls[0]}
        wanted = {name: torch.cat([output.double().cpu()] * len(calls)) for name, output in expected.outputs.items()}
        judged = verdicts(given, wanted, expected.specs, gate or NO_LIMITS, ("", ""), ())
        given, wanted = comparable(given, wanted, expected.specs)
        worst, failures = worst_verdict(judged), tuple(failure for result in judged for failure in result.failures)
        found, nonfinite = worst.differences, sum(result.differences.nonfinite_count for result in judged)
        if nonfinite:
            return Correctness(len(calls), None, None, None, None, nonfinite, failures)
        if found.detections is not None:  # of all outputs together: corners in pixels
            largest = found.detections.box_max
        else:
            largest = float((given[worst.output] - wanted[worst.output]).abs().max())
        return Correctness(
            calls=len(calls),
            max_abs=largest,
            relative_l2=found.relative_l2_max,
            centred_cosine=found.centred_cosine_min,
            top1_agreement=found.top1_agreement,
            nonfinite_count=0,
            failures=failures,
        )


def measure_together(
    contenders: Sequence[Contender],
    images: Sequence[Tensor],
    spec: TimingSpec,
    *,
    expected: Expected | None = None,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time the contenders in turn (A B C A B C …) on one batch.

    Args:
        contenders: Runners that are open and of one network.
        images: Each contender's own input, in host memory.
        spec: How long to measure.
        expected: The reference's outputs for the batch. The first, a random and the last timed outputs of each
            contender are judged against them by its gate.
        progress: Is told a name and the share done.
    """
    samples = [
        _Sample(contender, batch.to(contender.runner.device), batch, _KeptOutputs(spec.seed))
        for contender, batch in zip(contenders, images, strict=True)
    ]
    for sample in samples:
        _warm_up(sample, spec, progress)
    windows = samples[0].windows
    while len(windows) < spec.max_windows and (
        len(windows) < WINDOWS or any(sample.disagreement for sample in samples)
    ):
        _measure_window(samples, spec, progress)
    peers = [sample for sample in samples if sample.contender.is_peer]
    return [_timing(sample, peers, expected, spec) for sample in samples]


def _timed_call(runner: Runner, images: Tensor) -> tuple[float, Outputs]:
    start = time.perf_counter_ns()
    outputs = runner.run(images)
    return (time.perf_counter_ns() - start) / 1e6, outputs


def _warm_up(sample: _Sample, spec: TimingSpec, progress: Progress | None) -> None:
    """Call in windows until the last three agree, or the tries run out; at least 200 ms and ten calls.

    Where a call is slow, a window is one call, and a model that takes the whole duration settles within its first.
    """
    runner, windows = sample.contender.runner, list[list[float]]()
    sample.first_call_ms, _ = _timed_call(runner, sample.images)
    while len(windows) < spec.warm_up_tries and disagreement(windows, AGREEMENT[runner.device.type]):
        windows.append([])
        while not _is_warm_window(windows[-1]):
            windows[-1].append(_timed_call(runner, sample.images)[0])
        if isinstance(runner, PhasedRunner):
            runner.run_phases(sample.on_host)
        if progress is not None:
            progress(f"warming up {sample.contender.name}", len(windows) / spec.warm_up_tries)
        if windows[-1][-1] > SLOW_CALL_MS and sum(map(sum, windows)) > 1000.0 * spec.duration_seconds:
            break
    sample.settled_ms = statistics.median(value for window in windows[-WINDOWS:] for value in window)


def _is_warm_window(window: Sequence[float]) -> bool:
    if window and window[-1] > SLOW_CALL_MS:
        return True
    return len(window) * WINDOWS >= WARM_UP_CALLS and sum(window) * WINDOWS >= 1000.0 * WARM_UP_SECONDS


def _measure_window(samples: Sequence[_Sample], spec: TimingSpec, progress: Progress | None) -> None:
    """A third of the duration, and of the fewest calls, for every contender in turn."""
    number = len(samples[0].windows)
    # All contenders make the same number of calls, so the slowest one decides.
    is_slow = any(sample.settled_ms > SLOW_CALL_MS for sample in samples)
    fewest = min(spec.min_calls, SLOW_CALLS) if is_slow else spec.min_calls
    calls = fewest * (number + 1) // WINDOWS - fewest * number // WINDOWS
    seconds = spec.duration_seconds * len(samples) / WINDOWS
    for sample in samples:
        sample.windows.append([])
        sample.phases.append([])
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or len(samples[0].windows[-1]) < calls:
        for sample in samples:
            if len(samples) > 1:
                time.sleep(REST_SECONDS)
            sample.call()
        if progress is not None:
            share = (number + min(1.0, elapsed / seconds)) / max(WINDOWS, number + 1)
            progress(f"batch {len(samples[0].images)}", share)


def _timing(sample: _Sample, peers: Sequence[_Sample], expected: Expected | None, spec: TimingSpec) -> Timing:
    contender = sample.contender
    info = contender.runner.info
    latency = latency_of(sample.milliseconds, spec.seed)
    gpu = _gpu_times([times for window in sample.phases[-WINDOWS:] for times in window], spec.seed)
    correctness = None if expected is None else sample.outputs.judge(expected, contender.gate)
    wrong = correctness.failures if correctness is not None else ()
    unsteady, limits = [], []
    if sample.disagreement:
        unsteady.append(f"after {len(sample.windows)} windows the last three disagree: {sample.disagreement}")
    if latency.calls < spec.min_calls:
        limits.append(f"{latency.calls} calls only: one of the run takes over {SLOW_CALL_MS:g} ms")
    if gpu is not None:  # trtexec's rules for what else than the network limits the speed
        compute_ms = gpu.compute.median_ms
        if gpu.compute.cv_percent > GPU_CV_PERCENT:
            unsteady.append(f"compute time varies by {gpu.compute.cv_percent:.1f} %, more than {GPU_CV_PERCENT:g} %")
        if gpu.enqueue_ms > ENQUEUE_SHARE * compute_ms:
            limits.append(f"enqueue-bound ({gpu.enqueue_ms:.3g} of {compute_ms:.3g} ms): try --cuda-graph")
        if max(gpu.h2d_ms, gpu.d2h_ms) >= compute_ms:
            limits.append(f"transfer-bound from host memory ({gpu.h2d_ms:.3g} ms in, {gpu.d2h_ms:.3g} ms out)")
    return Timing(
        name=contender.name,
        network=contender.network,
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
        cold_call_ms=contender.cold_call_ms,
        first_call_ms=sample.first_call_ms,
        create_seconds=contender.create_seconds,
        peak_memory_mib=contender.peak_memory_mib,
        correctness=correctness,
        ratios=tuple(
            ratio_of(peer.contender.name, peer.milliseconds, sample.milliseconds, spec.seed)
            for peer in peers
            if peer is not sample and peer.contender.runner.device.type == contender.runner.device.type
        ),
        status="INVALID" if wrong else "UNSTABLE" if unsteady else "OK",
        remarks=(*wrong, *unsteady, *limits, *contender.remarks),
        device_memory_mib=contender.device_memory_mib,
    )


def _gpu_times(phases: Sequence[PhaseTimes], seed: int) -> GpuTimes | None:
    """Summarise CUDA's times of the calls; None where the runner does not take them."""
    if not phases:
        return None
    return GpuTimes(
        compute=latency_of([times.compute_ms for times in phases], seed),
        h2d_ms=statistics.median(times.h2d_ms for times in phases),
        d2h_ms=statistics.median(times.d2h_ms for times in phases),
        enqueue_ms=statistics.median(times.enqueue_ms for times in phases),
    )


def reset_peak_memory() -> float:
    """Set the process's peak memory to what it uses now; returns that in MiB, or 0 where the system cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return 0.0
    return peak_memory_mib() or 0.0


def peak_memory_mib() -> float | None:
    """Peak resident memory of this process in MiB since the last reset; None where the system cannot tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _free_device_mib() -> float | None:
    """Free memory of torch's CUDA device before a runner is made, in MiB; None without a usable GPU.

    CUDA's context is made here, so that it counts for no runner, and torch's unused blocks are given back, so that a
    runner's memory does not come from those of the one before.
    """
    if not torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / MIB
    except RuntimeError:  # a GPU that takes no further process
        return None


def _taken_on_device(free_before: float | None, device: torch.device) -> float | None:
    """MiB by which free memory has fallen on a runner's device; None where it is another device than before."""
    if free_before is None or device.type != "cuda" or device.index not in (None, torch.cuda.current_device()):
        return None
    taken = free_before - torch.cuda.mem_get_info()[0] / MIB
    return taken if taken > 0 else None  # another process gave memory back
