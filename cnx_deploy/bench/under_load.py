"""One runner under load as it arrives in use: who answers LoadGen's queries, and what a run of it says.

Images lie on the runner's device before the load begins, and an answer counts when its logits are in host memory.
Answers kept from the run are judged against the reference, so a fast wrong answer is INVALID.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cnx_deploy.bench.candidate import Candidate
from cnx_deploy.bench.comparison import BenchRequest
from cnx_deploy.bench.correctness import Correctness, KeptOutputs, judge
from cnx_deploy.bench.loadgen import Load, LoadResult, run_load
from cnx_deploy.bench.statistics import PERCENTILES
from cnx_deploy.bench.sweep import sweep_batches
from cnx_deploy.errors import InputError
from cnx_deploy.runners.base import InputSpec, RunnerInfo

__all__ = ["Reference", "ScenarioRequest", "ScenarioRow", "measure_under_load"]

Reference = Callable[[Tensor], Tensor]
"""Indices into a library of images, (M,) int64 -> the reference's logits of those images, (M, num_classes)."""

USUAL_BATCH = 8
"""The most images of a call where --batch does not say; fewer where the file takes fewer."""

WARM_UP_CALLS = 5
WARM_UP_SECONDS = 0.2

OFFLINE_TRIES = 3
"""Its one query is over too soon where others slowed the warm-up: then LoadGen is told the speed it found itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioRequest:
    """What `--scenario` takes. Of `bench` count the files, `duration`, `seed` and how runners are opened.

    `batch`: the most images of a call, None for `USUAL_BATCH`. `target_qps` (images a second) and `slo_ms` (which 99 %
    of the answers have to keep) are for the server and needed there; InputError otherwise.
    """

    scenario: str
    bench: BenchRequest
    batch: int | None = None
    target_qps: float | None = None
    slo_ms: float | None = None

    def __post_init__(self) -> None:
        given = (self.target_qps is not None, self.slo_ms is not None)
        if self.scenario == "server" and not all(given):
            raise InputError("A server needs a rate of arrival and a limit: give both --target-qps and --slo-ms.")
        if self.scenario != "server" and any(given):
            raise InputError(
                f"--target-qps and --slo-ms are for --scenario server; leave them out for {self.scenario}."
            )
        if self.scenario == "single-stream" and self.batch not in (None, 1):
            raise InputError(f"A single stream is one image a query: leave out --batch {self.batch}.")

    def batch_for(self, spec: InputSpec) -> int:
        """The most images of a call to a runner that takes `spec`."""
        if self.scenario == "single-stream":
            return 1
        return self.batch or min(USUAL_BATCH, spec.max_batch or USUAL_BATCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioRow:
    """One file under load; the fields are explained in `bench.scenario`."""

    name: str
    network: str
    runner: RunnerInfo
    batch: int
    mean_batch: float
    images: int
    images_per_second: float
    latency_ms: dict[str, float | None]
    p90_estimate_ms: float | None
    p99_within_slo: bool | None
    correctness: Correctness
    status: str
    remarks: tuple[str, ...]


@dataclass(slots=True)
class _Answers:
    """What LoadGen calls through: a batch from the library, its logits to host memory, some of them kept."""

    candidate: Candidate
    library: Tensor
    seed: int
    calls: int = 0
    asked: KeptOutputs = field(init=False)
    given: KeptOutputs = field(init=False)

    def __post_init__(self) -> None:
        # Of one seed, they keep the same calls.
        self.asked, self.given = KeptOutputs(self.seed), KeptOutputs(self.seed)

    def __call__(self, samples: Sequence[int]) -> None:
        indices = torch.tensor(samples)
        logits = self.candidate.runner.run(self.library[indices.to(self.library.device)]).cpu()
        self.calls += 1
        self.asked.add(indices)
        self.given.add(logits)

    def judged(self, reference: Reference) -> Correctness:
        """The first, a random and the last call against the reference's logits of their images."""
        given = self.given.all()
        expected = reference(torch.cat(self.asked.all()))
        return replace(judge((torch.cat(given),), expected, self.candidate.gate), calls=len(given))


def measure_under_load(
    candidate: Candidate, pixels: Tensor, reference: Reference, request: ScenarioRequest
) -> ScenarioRow:
    """Put one runner under load; `pixels` is the library, (N, S, S, 3) uint8.

    Raises MissingRequirementError without LoadGen, CnxDeployError where the runner fails.
    """
    runner, batch = candidate.runner, request.batch_for(candidate.runner.input_spec)
    library = candidate.images_from_pixels(pixels).to(runner.device)
    load = Load(
        scenario=request.scenario,
        samples=len(pixels),
        batch=batch,
        duration_seconds=request.bench.duration,
        images_per_second=_warm_up(candidate, library, batch),
        seed=request.bench.seed,
        target_qps=request.target_qps,
        slo_ms=request.slo_ms,
    )
    found, answers = _run(load, candidate, library)
    tries = 1
    while request.scenario == "offline" and not found.is_valid and tries < OFFLINE_TRIES:
        load, tries = replace(load, images_per_second=found.images_per_second), tries + 1
        found, answers = _run(load, candidate, library)
    correctness = answers.judged(reference)
    remarks = (*correctness.failures, *found.reasons)
    return ScenarioRow(
        name=candidate.name,
        network=candidate.network,
        runner=runner.info,
        batch=batch,
        mean_batch=found.images / answers.calls,
        images=found.images,
        images_per_second=found.images_per_second,
        latency_ms={
            f"p{rank}": value if found.images >= PERCENTILES.get(rank, 1) else None
            for rank, value in found.percentiles_ms.items()
        },
        p90_estimate_ms=found.p90_estimate_ms,
        p99_within_slo=found.slo_held,
        correctness=correctness,
        status="VALID" if found.is_valid and not correctness.failures else "INVALID",
        remarks=remarks,
    )


def _run(load: Load, candidate: Candidate, library: Tensor) -> tuple[LoadResult, _Answers]:
    answers = _Answers(candidate, library, load.seed)
    return run_load(load, answers), answers


def _warm_up(candidate: Candidate, library: Tensor, batch: int) -> float:
    """Call with every size up to `batch` that doubles, then with `batch`; returns the best images a second of that."""
    images = library[torch.arange(batch, device=library.device) % len(library)]
    for size in sweep_batches(batch):
        candidate.runner.run(images[:size])
    seconds = list[float]()
    while len(seconds) < WARM_UP_CALLS or sum(seconds) < WARM_UP_SECONDS:
        start = time.perf_counter()
        candidate.runner.run(images)
        seconds.append(time.perf_counter() - start)
    return batch / min(seconds)
