"""A benchmark over recorded artifacts: which runners take turns, on which images, and what could not run.

The artifacts of one network take turns with each other and with the peers that it is compared with. Every row is judged
against PyTorch's training form on the same images. A plan says what would run here, and measures nothing.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cnx_deploy.bench.bounds import Bound, bound_of, work_of
from cnx_deploy.bench.conditions import conditions_now, doubts, gpu_states, throttling
from cnx_deploy.bench.peers import PEERS, PeerSetup, place_of_peers
from cnx_deploy.bench.record import (
    BenchmarkRecord,
    CompiledFacts,
    FileFacts,
    NetworkFacts,
    NotRun,
    Plan,
    PlannedRow,
    Timing,
    WeightsFacts,
)  # fmt: skip
from cnx_deploy.bench.statistics import knees, sweep_batches, sweep_is_over
from cnx_deploy.bench.timing import Contender, Expected, Progress, TimingSpec, measure_together, open_contender
from cnx_deploy.core.artifacts import find_artifacts, open_artifact, select_artifacts
from cnx_deploy.core.devices import DEVICES, find_device
from cnx_deploy.core.errors import InputError, MissingRequirementError, RefusedArtifactError
from cnx_deploy.core.image_size import size_text
from cnx_deploy.core.manifest import Artifact, OnnxFacts
from cnx_deploy.core.precision import PRECISIONS, find_precision
from cnx_deploy.core.system import cpu_count, this_machine
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.exporters.trt.backend import require_gpu
from cnx_deploy.model.recorded import recorded_gate, recorded_outputs
from cnx_deploy.runners.registry import RunnerOptions, default_runner, find_runner, open_runner
from cnx_deploy.verification.originals import ReferenceNetwork, reference_network
from cnx_deploy.verification.parity import outputs_of

__all__ = ["BenchSpec", "bound_of_row", "gains_nothing", "plan_benchmark", "run_benchmark"]

Note = Callable[[str], None]

PROVES_ALONE = (
    "{} proves arithmetic here and takes seconds an image, so that it is not timed: a GPU is needed, or another backend"
)
NOT_JUDGED = "its outputs are not judged: it was calibrated on images, and these are made up. verify --data judges it"
REFERENCE_BATCH = 8
"""The reference runs in pieces of this size: a large batch of it would take the memory of the contenders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """What to time, and how. Without `files`, everything recorded in both folders.

    `compare`: words of `bench.peers.PEERS`; the first is the baseline of the table. `duration_seconds` is for a row.
    `backends`: runners of ONNX files (`runners.registry`), each of them a row; none means the usual one.
    `device`: "cpu" or "cuda", where ONNX files run.
    `sweep_to`: batches 1, 2, 4, … up to this one instead of `batches`; `slo_ms` finds the largest batch within it.
    `threads` None means all processors. `spin`, `thread_per_image`: see `runners.onnxruntime.OrtRunner`.
    `cuda_graph`: engines replay a captured graph. `allow_engine_code`: see `runners.tensorrt.TensorRTRunner`.
    `omp_threads`: the value of OMP_NUM_THREADS, to warn of.
    """

    files: tuple[Path, ...] = ()
    export_dir: Path = Path("export")
    engines_dir: Path = Path("engines")
    batches: tuple[int, ...] = (1, 8)
    sweep_to: int | None = None
    slo_ms: float | None = None
    compare: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    device: str = "cpu"
    duration_seconds: float = 3.0
    threads: int | None = None
    spin: bool = True
    thread_per_image: bool = True
    cuda_graph: bool = False
    allow_engine_code: bool = False
    seed: int = 0
    omp_threads: str | None = None

    def __post_init__(self) -> None:
        unknown = [word for word in self.compare if word not in PEERS]
        if unknown:
            raise InputError(f"compare takes {', '.join(PEERS)}, got {unknown[0]!r}.")
        for name in self.backends:
            find_runner(name)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batches to measure, in this order."""
        return self.batches if self.sweep_to is None else sweep_batches(self.sweep_to)

    @property
    def runner_options(self) -> RunnerOptions:
        """How files are opened. A thread gets images of its own only where a batch has one for each, as it costs."""
        alone = self.thread_per_image and max(self.batch_sizes) >= (self.threads or cpu_count())
        return RunnerOptions(
            device=self.device,
            threads=self.threads,
            spin=self.spin,
            thread_per_image=alone,
            cuda_graph=self.cuda_graph,
            allow_engine_code=self.allow_engine_code,
            hashes_hold=True,
        )


@dataclass(slots=True)
class _Network:
    """One network being measured: its artifacts, weights and open runners, and what has become of it so far."""

    name: str
    artifacts: Sequence[Artifact]
    facts: NetworkFacts
    reference: ReferenceNetwork
    contenders: list[Contender] = field(default_factory=list)
    rows: list[Timing] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)


def run_benchmark(spec: BenchSpec, note: Note, progress: Progress | None = None) -> BenchmarkRecord:
    """Time artifacts and their peers, network by network, and return the whole record.

    Args:
        spec: What to time, and how.
        note: Is told one line at a time: files that are missing, and reasons to doubt the figures.
        progress: Is told what is going on and the share of it that is done.

    Raises:
        InputError: Nothing is recorded, or a file that was named is no artifact.
        CorruptArtifactError: A file's hash is not the recorded one.
        MissingRequirementError: An engine was named and no GPU is here.
    """
    conditions = conditions_now(threads=spec.threads, duration_seconds=spec.duration_seconds, seed=spec.seed)
    warnings = list(doubts(conditions, spec.omp_threads))
    artifacts = list(select_artifacts(spec.files, spec.export_dir, spec.engines_dir, note))
    if spec.files and any(artifact.manifest.kind == "engine" for artifact in artifacts):
        require_gpu()  # an engine that was named is asked for
    if not spec.files:  # files that are named were hashed when they were selected
        artifacts = [open_artifact(artifact.path) for artifact in artifacts]
    before = torch.get_num_threads()
    torch.set_num_threads(conditions.threads)
    try:
        networks = [_measure_network(group, spec, progress) for group in _networks_of(artifacts)]
    finally:
        torch.set_num_threads(before)  # the caller's: idle threads of a process that goes on would spin
    warnings.extend(throttling(gpu_states()))
    for warning in warnings:
        note(f"Warning: {warning}.")
    rows = tuple(row for network in networks for row in network.rows)
    return BenchmarkRecord(
        environment=conditions,
        networks={network.name: network.facts for network in networks},
        rows=rows,
        not_run=tuple(missing for network in networks for missing in network.not_run),
        sweep=knees(rows, spec.slo_ms) if spec.sweep_to is not None else (),
        warnings=tuple(warnings),
    )


def plan_benchmark(spec: BenchSpec, note: Note) -> Plan:
    """Say what `run_benchmark` would measure, from manifests alone: a fresh clone has no files.

    The bounds are at the largest batch: of this machine's GPU where it is known, else of all GPUs in the table.
    """
    exported, built = find_artifacts(spec.export_dir, "onnx"), find_artifacts(spec.engines_dir, "engine")
    artifacts: list[Artifact] = [*exported, *built]
    if spec.files or not artifacts:
        artifacts = list(select_artifacts(spec.files, spec.export_dir, spec.engines_dir, note))
    groups = list(_networks_of(artifacts))
    conditions = conditions_now(threads=spec.threads, duration_seconds=spec.duration_seconds, seed=spec.seed)
    # The driver's tool gives a part of a divided GPU the name of the whole one.
    whole = [gpu.name for gpu in conditions.gpus if gpu.mig != "Enabled"]
    own = [device for name in whole if (device := find_device(name)) is not None]
    firsts = [group[0].manifest for group in groups if group[0].manifest.model.graph is None]
    shapes = dict.fromkeys(
        (first.model.variant, first.model.image_size, first.deploy.in_chans, first.deploy.passes) for first in firsts
    )
    works = [work_of(name, size, "fp16", 1000, channels, passes) for name, size, channels, passes in shapes]
    return Plan(
        environment=conditions,
        networks={_network_name(group[0]): _network_facts(group) for group in groups},
        planned=tuple(row for group in groups for row in _planned(group, spec)),
        roofline=tuple(
            bound_of(work, device, batch=max(spec.batch_sizes)) for work in works for device in own or DEVICES
        ),
    )


def _networks_of(artifacts: Sequence[Artifact]) -> Iterator[list[Artifact]]:
    """Artifacts that hold the same weights for the same input and answer, together; in the order they come in."""
    groups: dict[tuple[Any, ...], list[Artifact]] = {}
    for artifact in artifacts:
        model, deploy = artifact.manifest.model, artifact.manifest.deploy
        answer = (*deploy.answer.items(), deploy.outputs)
        key = (model.weights.sha256, model.image_size, deploy.input_kind, deploy.mean, deploy.std, answer)
        groups.setdefault(key, []).append(artifact)
    yield from groups.values()


def _network_name(artifact: Artifact) -> str:
    """`atto-224-1a2b3c4d`: variant, image size, the first digits of the weights' hash; then what is not the default.

    As in `atto-224-1a2b3c4d-uint8-flip-1.5`: input, test-time augmentation, temperature.
    """
    model, deploy = artifact.manifest.model, artifact.manifest.deploy
    kinds = (deploy.input_kind,) if deploy.input_kind != "float" else ()
    parts = (
        model.variant,
        size_text(model.image_size),
        model.weights.sha256[:8],
        *kinds,
        *deploy.answer.values(),
        *deploy.outputs,
    )
    return "-".join(map(str, parts))


def _network_facts(artifacts: Sequence[Artifact]) -> NetworkFacts:
    """What the record says of one network, from the manifests of its artifacts."""
    model, deploy = artifacts[0].manifest.model, artifacts[0].manifest.deploy
    channels = model.preprocessing.in_chans
    work = None
    if model.graph is None:
        work = work_of(model.variant, model.image_size, "fp32", model.num_classes, channels, deploy.passes)
    return NetworkFacts(
        variant=model.variant,
        image_size=model.image_size,
        num_classes=model.num_classes,
        input="uint8 NHWC" if deploy.input_kind == "uint8" else "float32 NCHW",
        in_chans=channels,
        weights=WeightsFacts(model.weights.origin, model.weights.sha256),
        parameters=None if work is None else work.parameters,
        gmacs=None if work is None else round(work.macs / 1e9, 3),
        macts=None if work is None else round(work.activations / 1e6, 2),
        files={artifact.path.name: _file_facts(artifact) for artifact in artifacts},
        passes=deploy.passes,
    )


def _file_facts(artifact: Artifact) -> FileFacts:
    facts, digest, precision = artifact.manifest.facts, artifact.sha256, artifact.manifest.precision.name
    if isinstance(facts, OnnxFacts):
        return FileFacts(digest, precision, tensors_by_type=facts.types)
    chosen = facts.compiled
    compiled = CompiledFacts(chosen.batch, chosen.kernels, chosen.megabytes_per_image) if chosen else CompiledFacts()
    return FileFacts(digest, precision, fp32_layers=facts.census.float_layers, compiled=compiled)


def _planned(group: Sequence[Artifact], spec: BenchSpec) -> Iterator[PlannedRow]:
    network = _network_name(group[0])
    _, precision = _place_of_peers(group)
    for batch in spec.batch_sizes:
        for peer in (PEERS[word] for word in spec.compare):
            yield PlannedRow(network, peer.row_name(precision), batch, peer.missing())
        for artifact in group:
            smallest, _, largest = artifact.manifest.batch
            for name, backend in _rows_of(artifact, spec) if smallest <= batch <= largest else ():
                missing = None
                if backend is not None:
                    entry = find_runner(backend)
                    reason = entry.reason_against(artifact, this_machine(spec.device))
                    missing = str(reason) if reason is not None else PROVES_ALONE.format(backend)
                    missing = missing if reason is not None or entry.is_slow else None
                else:
                    try:
                        default_runner(artifact, spec.device)
                    except MissingRequirementError as error:
                        missing = str(error)
                yield PlannedRow(network, name, batch, missing)


def _place_of_peers(artifacts: Sequence[Artifact]) -> tuple[str, str]:
    return place_of_peers(artifact.manifest.precision.name for artifact in artifacts)


def _measure_network(artifacts: Sequence[Artifact], spec: BenchSpec, progress: Progress | None) -> _Network:
    reference = reference_network(artifacts[0])
    network = _Network(_network_name(artifacts[0]), artifacts, _network_facts(artifacts), reference)
    with ExitStack() as stack:
        _open_peers(network, spec, stack)
        _open_artifacts(network, spec, stack)
        for batch in spec.batch_sizes:
            _measure(network, batch, spec, progress)
    return network


def _open_peers(network: _Network, spec: BenchSpec, stack: ExitStack) -> None:
    deploy, place = network.artifacts[0].manifest.deploy, _place_of_peers(network.artifacts)
    loaded = network.reference.loaded
    if loaded is None:
        if not spec.compare:
            return
        raise InputError(
            f"{network.artifacts[0].path.name} came as an ONNX file, so that there is no PyTorch network for "
            f"{', '.join(spec.compare)} to run. Leave --compare (compare) out."
        )
    for peer in (PEERS[word] for word in spec.compare):
        name, gate = peer.row_name(place[1]), find_precision(peer.precision_here(place[1])).gate
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # A model of its own: the peer may move it to a GPU, and the reference stays on the CPU.
        setup = PeerSetup(copy.deepcopy(loaded.model), deploy, spec.runner_options, folder, *place)
        try:
            make, gate = peer.prepare(setup), loaded.model.task.gate(gate)
            contender = open_contender(name, network.name, make, gate, stack)
        except MissingRequirementError as error:
            network.not_run.append(NotRun(name, network.name, None, None, None, str(error)))
        else:
            take = peer.input_from_pixels(deploy)
            network.contenders.append(replace(contender, is_peer=True, input_from_pixels=take))


def _open_artifacts(network: _Network, spec: BenchSpec, stack: ExitStack) -> None:
    rows = [(artifact, *row) for artifact in network.artifacts for row in _rows_of(artifact, spec)]
    for artifact, name, backend in rows:
        make = partial(open_runner, artifact, backend, spec.runner_options)
        try:
            if backend is not None and find_runner(backend).is_slow:
                raise MissingRequirementError(PROVES_ALONE.format(backend))
            is_eight = artifact.manifest.deploy.eight_bits is not None
            gate = None if is_eight else recorded_gate(artifact)
            contender = open_contender(name, network.name, make, gate, stack)
            if is_eight:
                contender = replace(contender, remarks=(NOT_JUDGED,))
            if artifact.manifest.deploy.input_kind == "normalised":
                take = partial(normalise, preprocessing=artifact.manifest.model.preprocessing)
                contender = replace(contender, input_from_pixels=take)
            network.contenders.append(contender)
        except (MissingRequirementError, InputError, RefusedArtifactError) as error:
            if isinstance(error, InputError) and backend is None:
                raise
            compiled = network.facts.files[artifact.path.name].compiled
            figures = (compiled.batch, compiled.kernels, compiled.megabytes_per_image)
            network.not_run.append(NotRun(name, network.name, *figures, str(error)))
    if not spec.compare and network.contenders:
        network.contenders[0] = replace(network.contenders[0], is_peer=True)


def _rows_of(artifact: Artifact, spec: BenchSpec) -> list[tuple[str, str | None]]:
    """The rows of an artifact: name and runner. `atto-224-fp32.onnx [fused]` where ONNX files have named backends."""
    if artifact.manifest.kind == "engine" or not spec.backends:
        return [(artifact.path.name, None)]
    return [(f"{artifact.path.name} [{backend}]", backend) for backend in spec.backends]


def _measure(network: _Network, batch: int, spec: BenchSpec, progress: Progress | None) -> None:
    """Time those contenders that take a batch of this size and whose sweep is not over."""
    fitting = []
    for contender in network.contenders:
        if spec.sweep_to is not None and sweep_is_over([row for row in network.rows if row.name == contender.name]):
            continue
        if contender.takes(batch):
            fitting.append(contender)
        elif spec.sweep_to is None:
            limits = contender.runner.input_spec
            reason = f"a batch of {batch} is outside its range of {limits.min_batch} to {limits.max_batch}"
            network.not_run.append(NotRun(contender.name, network.name, batch, None, None, reason))
    if not fitting:
        return
    deploy = network.artifacts[0].manifest.deploy
    pixels = next(
        image_like_batches(batch, deploy.image_size, batch_size=batch, seed=spec.seed, in_chans=deploy.in_chans)
    )
    with network.reference.open(deploy) as reference:
        preprocessing = network.artifacts[0].manifest.model.preprocessing
        pieces = torch.split(runner_input(pixels, deploy.input_kind, preprocessing), REFERENCE_BATCH)
        expected = Expected(outputs_of(reference, pieces), recorded_outputs(network.artifacts[0]))
    images = [contender.images_from_pixels(pixels) for contender in fitting]
    timing = TimingSpec(duration_seconds=spec.duration_seconds, seed=spec.seed)
    rows = measure_together(fitting, images, timing, expected=expected, progress=progress)
    rows = [replace(row, remarks=(*row.remarks, *gains_nothing(row, rows, network.facts))) for row in rows]
    network.rows.extend(replace(row, roofline=bound_of_row(row, network.facts)) for row in rows)


def gains_nothing(row: Timing, rows: Sequence[Timing], network: NetworkFacts) -> Iterator[str]:
    """Say of a file in eight bits that another of the network, in the same backend, is as fast or faster without."""
    own = network.file_of(row.name)
    if own is None or find_precision(own.precision).placement is None:
        return
    files = [(other, network.file_of(other.name)) for other in rows if other.backend == row.backend]
    wider = [other for other, file in files if file is not None and find_precision(file.precision).placement is None]
    fastest = max(wider, key=lambda other: other.images_per_second, default=None)
    if fastest is not None and (times := fastest.images_per_second / row.images_per_second) >= 1.0:
        name = own.precision.upper()
        yield f"{name} gains nothing here: {fastest.name} runs {times:.2f} times as many images a second"


def bound_of_row(row: Timing, network: NetworkFacts) -> Bound | None:
    """The bound of a row on a GPU of the table, with the measured share; None on other devices.

    The bytes are those of the compiled engine where it was inspected at this batch, else the fewest that are possible.
    """
    # Runners name their arithmetic by the precision's name or by torch's type.
    names = {name: precision.name for precision in PRECISIONS.values() for name in (precision.name, precision.dtype)}
    device, precision = find_device(row.device), names.get(row.arithmetic)
    if device is None or precision is None or device.peak_tflops(precision) is None:
        return None
    if network.parameters is None:  # the work of somebody else's graph is not counted
        return None
    work = work_of(
        network.variant, network.image_size, precision, network.num_classes, network.in_chans, network.passes
    )
    file = network.file_of(row.name)
    compiled = file.compiled if file is not None else CompiledFacts()
    known = compiled.megabytes_per_image if compiled.batch == row.batch else None
    moved = known * 1e6 if known else None
    return bound_of(work, device, batch=row.batch, compiled_bytes=moved, measured=row.images_per_second)
