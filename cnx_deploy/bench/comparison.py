"""A benchmark over recorded artifacts: which runners take turns, on which images, and what could not run.

Timing itself is `benchmark`; this puts the peers beside the artifacts of one network, judges what was timed, and
stops a sweep over batch sizes where going on would show nothing.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cnx_deploy.bench.candidate import Candidate, create
from cnx_deploy.bench.networks import network_facts, network_name, networks_of, precisions_of
from cnx_deploy.bench.peers import PEERS, OrtSettings, PeerSetup, place_of_peers
from cnx_deploy.bench.sweep import is_over, sweep_batches
from cnx_deploy.bench.timing import BenchSpec, Timing, measure_together
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact, EngineFacts
from cnx_deploy.core.system import cpu_count, find_gpus
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions, open_runner
from cnx_deploy.verification.parity import logits_of

__all__ = ["BenchRequest", "Benchmark", "NotRun", "bench_artifacts"]

Progress = Callable[[str, float], None]

REFERENCE_BATCH = 8
"""The reference runs in pieces of this size: a large batch of it would take the memory of the candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """What `cnx-deploy bench` takes. Without `files`, everything recorded in both folders.

    `compare`: words of `bench.peers.PEERS`, the first is the baseline of the table. `threads` None means all;
    `spin`, `thread_per_image`: see `runners.ort.OrtRunner`.
    `sweep`: batches 1, 2, 4, … to `max_batch` instead of `batches`. `cuda_graph`: engines replay a captured graph.
    """

    files: tuple[Path, ...] = ()
    export_dir: Path = Path("export")
    engines_dir: Path = Path("engines")
    batches: tuple[int, ...] = (1, 8)
    duration: float = 3.0
    compare: tuple[str, ...] = ()
    threads: int | None = None
    spin: bool = True
    thread_per_image: bool = True
    sweep: bool = False
    max_batch: int = 256
    cuda_graph: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [word for word in self.compare if word not in PEERS]
        if unknown:
            raise InputError(f"Nothing to compare with is called {unknown[0]!r}. Choose from: {', '.join(PEERS)}.")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batches to measure, in this order."""
        return sweep_batches(self.max_batch) if self.sweep else self.batches

    @property
    def gives_images_to_threads(self) -> bool:
        """Whether a thread gets images of its own: only where a batch has one for each, as it costs memory."""
        return self.thread_per_image and max(self.batch_sizes) >= (self.threads or cpu_count())


@dataclass(frozen=True, slots=True)
class NotRun:
    """Something that was not timed and why, with what its compiler says of it.

    `batch` is the one that it does not take, or that of the compiler's figures; None where no batch would do.
    """

    name: str
    network: str
    batch: int | None
    kernels: int | None
    megabytes_per_image: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Timed rows and rows that were not run; `networks` says what each network is, by the name rows have for it."""

    rows: tuple[Timing, ...]
    not_run: tuple[NotRun, ...]
    networks: dict[str, dict[str, Any]]


@dataclass(slots=True)
class _Network:
    """One network being measured: its artifacts, weights and open runners, and what has become of it so far."""

    name: str
    artifacts: Sequence[Artifact]
    loaded: LoadedModel
    candidates: list[Candidate] = field(default_factory=list)
    rows: list[Timing] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)


def bench_artifacts(
    artifacts: Sequence[Artifact], request: BenchRequest, progress: Progress | None = None
) -> Benchmark:
    """Time the artifacts network by network; those of one network take turns with each other and with the peers."""
    torch.set_num_threads(request.threads or cpu_count())
    measured = []
    for group in networks_of(artifacts):
        network = _Network(network_name(group[0]), group, recorded_model(group[0]))
        measured.append(network)
        with ExitStack() as stack:
            _open_peers(network, request, stack)
            _open_artifacts(network, request, stack)
            for batch in request.batch_sizes:
                _measure(network, batch, request, progress)
    return Benchmark(
        tuple(row for network in measured for row in network.rows),
        tuple(missing for network in measured for missing in network.not_run),
        {network.name: network_facts(network.artifacts) for network in measured},
    )


def _open_peers(network: _Network, request: BenchRequest, stack: ExitStack) -> None:
    deploy = network.artifacts[0].manifest.deploy
    place = place_of_peers(precisions_of(network.artifacts))
    for peer in (PEERS[word] for word in request.compare):
        name, gate = peer.row_name(place[1]), GATES[peer.precision_here(place[1])]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # A model of its own: the peer may move it to a GPU, and the reference stays on the CPU.
        model = recorded_model(network.artifacts[0]).model
        settings = OrtSettings(request.threads, request.spin, request.gives_images_to_threads)
        setup = PeerSetup(model, deploy, settings, folder, *place)
        try:
            candidate = create(name, network.name, peer.prepare(setup), gate, stack)
            take = peer.input_from_pixels(deploy)
            network.candidates.append(replace(candidate, is_peer=True, input_from_pixels=take))
        except MissingRequirementError as error:
            network.not_run.append(NotRun(name, network.name, None, None, None, str(error)))


def _open_artifacts(network: _Network, request: BenchRequest, stack: ExitStack) -> None:
    for artifact in network.artifacts:
        try:
            make = partial(_artifact_runner, artifact, request)
            network.candidates.append(create(artifact.path.name, network.name, make, artifact.manifest.gate, stack))
        except MissingRequirementError as error:
            facts = artifact.manifest.facts
            compiled = facts.compiled if isinstance(facts, EngineFacts) else None
            figures = (
                (compiled.batch, compiled.kernels, compiled.megabytes_per_image) if compiled else (None, None, None)
            )
            reason = _reason_not_run(artifact, error)
            network.not_run.append(NotRun(artifact.path.name, network.name, figures[0], figures[1], figures[2], reason))
    if not request.compare and network.candidates:
        network.candidates[0] = replace(network.candidates[0], is_peer=True)


def _reason_not_run(artifact: Artifact, error: MissingRequirementError) -> str:
    """Why an artifact cannot be timed here, in few words where an engine has no GPU."""
    return "no GPU" if artifact.manifest.kind == "engine" and not find_gpus() else str(error)


def _artifact_runner(artifact: Artifact, request: BenchRequest) -> Runner:
    options = RunnerOptions(
        threads=request.threads,
        spin=request.spin,
        thread_per_image=request.gives_images_to_threads,
        cuda_graph=request.cuda_graph,
    )
    return open_runner(artifact, options=options)


def _measure(network: _Network, batch: int, request: BenchRequest, progress: Progress | None) -> None:
    """Time those candidates that take a batch of this size and whose sweep is not over."""
    going = [each for each in network.candidates if not (request.sweep and is_over(_rows_of(network, each)))]
    fitting = [candidate for candidate in going if _takes(candidate, batch)]
    if not request.sweep:
        network.not_run.extend(_outside_range(going, batch))
    if not fitting:
        return
    deploy = network.artifacts[0].manifest.deploy
    pixels = next(image_like_batches(batch, deploy.image_size, batch_size=batch, seed=request.seed))
    with reference_runner(network.loaded.model, deploy) as reference:
        pieces = torch.split(runner_input(pixels, deploy.input_kind), REFERENCE_BATCH)
        expected = logits_of(reference, pieces)
    images = [candidate.images_from_pixels(pixels) for candidate in fitting]
    spec = BenchSpec(duration_seconds=request.duration, seed=request.seed)
    network.rows.extend(measure_together(fitting, images, spec, expected=expected, progress=progress))


def _rows_of(network: _Network, candidate: Candidate) -> list[Timing]:
    return [row for row in network.rows if row.name == candidate.name]


def _outside_range(candidates: Sequence[Candidate], batch: int) -> Iterator[NotRun]:
    for candidate in candidates:
        if not _takes(candidate, batch):
            spec = candidate.runner.input_spec
            reason = f"a batch of {batch} is outside its range of {spec.min_batch} to {spec.max_batch}"
            yield NotRun(candidate.name, candidate.network, batch, None, None, reason)


def _takes(candidate: Candidate, batch: int) -> bool:
    spec = candidate.runner.input_spec
    return spec.min_batch <= batch and (spec.max_batch is None or batch <= spec.max_batch)
