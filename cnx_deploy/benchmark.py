"""How fast a runner is, measured so that it cannot flatter.

A monotonic clock around calls that block until the logits are there; warm-up until the speed has settled; medians and
only those percentiles that the sample can carry; candidates that are compared take turns in one run, so a machine
that slows down slows all of them; and the logits of the timed calls are judged, so a fast wrong answer is INVALID.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cnx_deploy.errors import InputError
from cnx_deploy.parity import Gate, differences
from cnx_deploy.runners.base import Runner

__all__ = ["BenchSpec", "Candidate", "Timing", "measure_together", "peak_memory_mib", "reset_peak_memory"]

WARM_UP_SECONDS = 0.2
WARM_UP_CALLS = 3
WINDOWS = 3
WINDOW_AGREEMENT = 0.10
PERCENTILES = ((90, 50), (95, 100), (99, 500))
"""A percentile and the fewest calls that carry it: five samples beyond it at least."""


@dataclass(frozen=True, slots=True)
class BenchSpec:
    """How long to measure. `duration_seconds` is per candidate and batch; the clock is `time.perf_counter_ns`."""

    duration_seconds: float = 3.0
    min_calls: int = 10
    warm_up_tries: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.duration_seconds <= 0 or self.min_calls < 1:
            raise InputError("A measurement needs a positive duration and at least one call.")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A runner to time, under the name its row has; `create_seconds` is what making it took."""

    name: str
    runner: Runner
    create_seconds: float
    peak_memory_mib: float | None
    gate: Gate | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Latency of one candidate at one batch size.

    Milliseconds of a whole batch on the host clock, transfers inside `run` included. Percentiles are None where the
    sample is too small. `speedup` is over the first candidate of the run: the median of the ratios of neighbouring
    calls, with its 95 % bootstrap interval. `status` is OK, UNSTABLE (the windows of the run disagree by more than
    10 %) or INVALID (the timed logits fail their gate).
    """

    name: str
    backend: str
    version: str
    device: str
    precision: str
    arithmetic: str
    batch: int
    calls: int
    images_per_second: float
    median_ms: float
    min_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    first_call_ms: float
    create_seconds: float
    peak_memory_mib: float | None
    relative_l2: float | None
    speedup: float | None
    speedup_interval: tuple[float, float] | None
    status: str

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return asdict(self)


def measure_together(
    candidates: Sequence[Candidate],
    images: Sequence[Tensor],
    spec: BenchSpec,
    *,
    expected: Tensor | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> list[Timing]:
    """Time the candidates in turn (A B C A B C …) on one batch; `images` holds each candidate's own input.

    `expected` are the reference's logits for the batch; each candidate's last timed logits are judged against them by
    its gate. `progress` is told a name and the share done.
    """
    batch = len(images[0])
    placed = [tensor.to(candidate.runner.device) for candidate, tensor in zip(candidates, images, strict=True)]
    first_calls = [
        _warm_up(candidate, tensor, spec, progress) for candidate, tensor in zip(candidates, placed, strict=True)
    ]
    latencies: list[list[float]] = [[] for _ in candidates]
    logits: list[Tensor | None] = [None for _ in candidates]
    budget = spec.duration_seconds * len(candidates)
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < budget or len(latencies[0]) < spec.min_calls:
        for index, candidate in enumerate(candidates):
            milliseconds, logits[index] = _timed_call(candidate.runner, placed[index])
            latencies[index].append(milliseconds)
        if progress is not None:
            progress(f"batch {batch}", min(1.0, elapsed / budget))
    return [
        _timing(candidate, batch, values, latencies[0] if index else None, first, output, expected, spec.seed)
        for index, (candidate, values, first, output) in enumerate(
            zip(candidates, latencies, first_calls, logits, strict=True)
        )
    ]


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


def _timed_call(runner: Runner, images: Tensor) -> tuple[float, Tensor]:
    start = time.perf_counter_ns()
    logits = runner.run(images)
    return (time.perf_counter_ns() - start) / 1e6, logits


def _warm_up(
    candidate: Candidate, images: Tensor, spec: BenchSpec, progress: Callable[[str, float], None] | None
) -> float:
    """Call until the last three windows agree within 10 %, or tries run out; returns the first call's milliseconds."""
    first, _ = _timed_call(candidate.runner, images)
    windows: list[float] = []
    for attempt in range(spec.warm_up_tries):
        calls, start = 0, time.perf_counter()
        while calls < WARM_UP_CALLS or time.perf_counter() - start < WARM_UP_SECONDS:
            candidate.runner.run(images)
            calls += 1
        windows.append((time.perf_counter() - start) / calls)
        if progress is not None:
            progress(f"warming up {candidate.name}", (attempt + 1) / spec.warm_up_tries)
        if len(windows) >= WINDOWS and _agree(windows[-WINDOWS:]):
            break
        if sum(windows) * WARM_UP_CALLS > spec.duration_seconds:  # a slow model settles within its first calls
            break
    return first


def _timing(
    candidate: Candidate,
    batch: int,
    latencies: Sequence[float],
    baseline: Sequence[float] | None,
    first_call_ms: float,
    logits: Tensor | None,
    expected: Tensor | None,
    seed: int,
) -> Timing:
    values = np.asarray(latencies)
    relative_l2, valid = _judged(candidate, logits, expected)
    ratio, interval = (None, None) if baseline is None else _speedup(np.asarray(baseline), values, seed)
    windows = [float(np.median(part)) for part in np.array_split(values, WINDOWS) if len(part)]
    info = candidate.runner.info
    percentiles = {rank: _percentile(values, rank, needed) for rank, needed in PERCENTILES}
    return Timing(
        name=candidate.name,
        backend=info.backend,
        version=info.version,
        device=info.device,
        precision=info.precision,
        arithmetic=info.arithmetic,
        batch=batch,
        calls=len(values),
        images_per_second=batch * 1000.0 / float(np.median(values)),
        median_ms=float(np.median(values)),
        min_ms=float(values.min()),
        p90_ms=percentiles[90],
        p95_ms=percentiles[95],
        p99_ms=percentiles[99],
        first_call_ms=first_call_ms,
        create_seconds=candidate.create_seconds,
        peak_memory_mib=candidate.peak_memory_mib,
        relative_l2=relative_l2,
        speedup=ratio,
        speedup_interval=interval,
        status="INVALID" if not valid else "OK" if _agree(windows) else "UNSTABLE",
    )


def _judged(candidate: Candidate, logits: Tensor | None, expected: Tensor | None) -> tuple[float | None, bool]:
    """Relative L2 of the timed logits and whether they pass; without a reference nothing is claimed."""
    if logits is None or expected is None:
        return None, True
    found = differences(logits, expected)
    passes = candidate.gate is None or not candidate.gate.failures(found)
    return (found.relative_l2_max if found.all_finite else None), passes and found.all_finite


def _percentile(values: np.ndarray[Any, Any], rank: int, needed: int) -> float | None:
    return float(np.percentile(values, rank)) if len(values) >= needed else None


def _agree(windows: Sequence[float]) -> bool:
    return max(windows) <= (1.0 + WINDOW_AGREEMENT) * min(windows)


def _speedup(
    baseline: np.ndarray[Any, Any], values: np.ndarray[Any, Any], seed: int
) -> tuple[float, tuple[float, float]]:
    """Median of baseline/value over neighbouring calls and its 95 % bootstrap interval."""
    ratios = baseline / values
    generator = np.random.default_rng(seed)
    draws = generator.choice(ratios, size=(1000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), (float(low), float(high))
