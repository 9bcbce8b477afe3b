"""Artifacts against the network they were made from: which runners, which images, which gate.

The reference is always PyTorch's training form in FP32 with the weights that the manifest names.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.artifacts import is_onnx, open_artifact
from cnx_deploy.core.errors import CorruptArtifactError, GraphCheckError, InputError, MissingRequirementError
from cnx_deploy.core.gates import Gate, ParityResult
from cnx_deploy.core.manifest import (
    Artifact,
    EngineManifest,
    ModelRecord,
    OnnxManifest,
    TensorSpec,
    WeightsRecord,
    relative_reference,
)
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import find_variant
from cnx_deploy.data import (
    BrokenImage,
    find_images,
    image_like_batches,
    readable_batches,
    runner_input,
    validation_folder,
)
from cnx_deploy.data.batches import Batch
from cnx_deploy.data.dataset import evenly
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.exporters.graph_checks import GraphFacts, check_graph
from cnx_deploy.model.checkpoint import LoadedModel, hash_weights, load_checkpoint, load_pretrained
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions, find_runner, open_runner
from cnx_deploy.verification.batch_plan import batch_sizes, first_images, rebatched
from cnx_deploy.verification.parity import differences, logits_of
from cnx_deploy.verification.saved_results import OutputWriter, SavedOutputs

__all__ = [
    "TORCH_REFERENCE",
    "Candidate",
    "Reference",
    "Verification",
    "batch_sizes",
    "gate_of",
    "model_record",
    "rebatched",
    "recorded_model",
    "table_of",
    "verify_artifact",
]

EMULATED_IMAGES = 10
"""Unless it is asked for by name: the emulator takes seconds an image for the large variants."""

SAMPLES = 64
"""At least so many images, unless they have labels: then all."""

TORCH_REFERENCE = "torch float32"

HIDES_OVERFLOW = (
    "ONNX Runtime computes FP16 files in FP32 on a CPU: its row shows that the graph is right, not that FP16 is safe. "
    "The emulator's row and the graph check (no reduction in FP16) are the evidence."
)

Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked of one artifact. `not_run` says what could not be run here and what is missing."""

    artifact: str
    kind: str
    results: tuple[ParityResult, ...]
    not_run: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing that ran has failed."""
        return all(result.passed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """The verification as JSON has it."""
        return {
            "artifact": self.artifact,
            "kind": self.kind,
            "passed": self.passed,
            "results": [result.to_dict() for result in self.results],
            "not_run": list(self.not_run),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Candidate:
    """A runner of an artifact that is to be judged. `spec`: the batches it takes; `limit`: images at most."""

    artifact: Artifact
    runner: Runner
    spec: InputSpec
    gate: Gate
    limit: int | None = None

    @property
    def name(self) -> str:
        """Backend and precision."""
        return f"{self.runner.info.backend} {self.runner.info.precision}"


class Reference:
    """The recorded network's model and its logits on the comparison images, computed once and kept.

    `images` None means seeded image-like batches; else a folder of images. `samples` None means SAMPLES. `left_out`:
    files of the folder that could not be read so far, by their path.
    """

    def __init__(self, artifact: Artifact, images: Path | None = None, samples: int | None = None) -> None:
        self.loaded = recorded_model(artifact)
        self.record = artifact.manifest.model
        self.images = images
        self.asked = samples
        self.samples = SAMPLES if samples is None else samples
        self.left_out: dict[str, BrokenImage] = {}
        self._names: tuple[str, ...] = ()
        self._logits: dict[tuple[Any, ...], Tensor] = {}

    def matches(self, artifact: Artifact) -> bool:
        """Whether `artifact` holds the same network for the same image size."""
        other = artifact.manifest.model
        return (other.weights.sha256, other.image_size) == (self.record.weights.sha256, self.record.image_size)

    def batches(self, spec: InputSpec) -> list[Tensor]:
        """Raw images in batches of 1, 2, 7, the largest, and as many more as `samples` asks for."""
        preprocessing = self.record.preprocessing
        sizes = batch_sizes(spec.min_batch, spec.max_batch or 64, self.samples)
        total = sum(sizes)
        if self.images is None:
            source = image_like_batches(total, spec.image_size, batch_size=1)
            self._names = tuple(f"image-like {index} of seed 0" for index in range(total))
        else:
            found = self._read(self.images, preprocessing, total)
            source = (pixels for pixels, _, _ in found)
            self._names = tuple(str(path) for _, _, (path,) in found)
        batches = [batch for batch in rebatched(source, sizes) if len(batch) >= spec.min_batch]
        if not batches:
            raise InputError(f"{self.images} has fewer images than the {spec.min_batch} of one batch. Give more.")
        return [runner_input(batch, spec.kind) for batch in batches]

    def _read(self, root: Path, preprocessing: Preprocessing, limit: int) -> list[Batch]:
        """Images of a folder one by one, evenly taken; those that cannot be read are noted in `left_out`."""
        broken: list[BrokenImage] = []
        chosen = evenly(find_images(validation_folder(root))[1], limit)
        found = list(readable_batches(chosen, preprocessing, 1, broken))
        if not found:
            raise InputError(f"No image of {root} ({len(broken)}) can be read; the first: {broken[0].reason}")
        self.left_out.update((image.path, image) for image in broken)
        return found

    def batches_for(self, artifact: Artifact) -> list[Tensor]:
        """The batches that `artifact` is verified on."""
        deploy = artifact.manifest.deploy
        return self.batches(_profile_spec(artifact, InputSpec(deploy.input_kind, deploy.image_size)))

    def logits(self, artifact: Artifact, batches: Sequence[Tensor], progress: Progress | None = None) -> Tensor:
        """FP32 logits of the training form for `batches`; the same images are run once only."""
        spec = artifact.manifest.deploy
        key = (spec.input_kind, spec.mean, spec.std, sum(len(batch) for batch in batches))
        if key not in self._logits:
            with reference_runner(self.loaded.model, spec) as runner:
                # In small pieces: the reference needs no large batch, and memory is the candidate's.
                pieces = [piece for batch in batches for piece in torch.split(batch, 8)]
                self._logits[key] = logits_of(runner, pieces, _told(progress, "PyTorch reference"))
        return self._logits[key]

    def judge(
        self, candidate: Candidate, progress: Progress | None = None, writer: OutputWriter | None = None
    ) -> ParityResult:
        """Run the candidate on the comparison images; `writer` is given both sides' logits."""
        batches = self.batches(candidate.spec)
        expected = self.logits(candidate.artifact, batches, progress)
        if candidate.limit is not None:
            batches = first_images(batches, candidate.limit, candidate.spec.min_batch)
        sizes = [len(batch) for batch in batches]
        logits = logits_of(candidate.runner, batches, _told(progress, candidate.name))
        expected, gate = expected[: sum(sizes)], candidate.gate
        found = differences(logits, expected)
        batch = tuple(dict.fromkeys(sizes))
        result = ParityResult(candidate.name, TORCH_REFERENCE, gate, batch, found, gate.failures(found))
        if writer is not None:
            names = iter(self._names)
            for pair in zip(torch.split(logits, sizes), torch.split(expected, sizes), strict=True):
                writer.add(*pair, tuple(itertools.islice(names, len(pair[0]))))
            writer.close(result)
        return result


def verify_artifact(
    artifact: Artifact,
    reference: Reference,
    progress: Progress | None = None,
    *,
    runners: Sequence[str] = (),
    outputs: SavedOutputs | None = None,
) -> Verification:
    """Run an artifact here, as far as that is possible, and judge it against `reference`.

    `runners`: names of `runners.registry` for an ONNX file, by default those that prove most; engines run
    on their GPU alone. `outputs`: where both sides' logits are saved. Raises CorruptArtifactError when its bytes are
    not what the manifest says, GraphCheckError when its inputs or outputs are not; a runner that this machine lacks the
    hardware for is reported, not raised.
    """
    artifact = open_artifact(artifact.path)
    if not is_onnx(artifact):
        return _verify_engine(artifact, reference, progress, outputs)
    _check_promised(artifact, check_graph(artifact.path, artifact.file_names))
    row = artifact.manifest.precision
    results = []
    for name in runners or row.proven_by:
        with open_runner(artifact, name, RunnerOptions(hashes_hold=True)) as runner:
            few = find_runner(name).is_slow and not runners
            limit = max(EMULATED_IMAGES, reference.asked or 0) if few else None
            spec = _profile_spec(artifact, runner.input_spec)
            results.append(_judge(Candidate(artifact, runner, spec, row.gate, limit), reference, progress, outputs))
    computed_in_fp32 = row.dtype == "float16" and any(
        find_runner(name).widens_half for name in runners or row.proven_by
    )
    notes = (HIDES_OVERFLOW,) if computed_in_fp32 else ()
    return Verification(artifact.path.name, "onnx", tuple(results), notes=notes)


def table_of(found: Sequence[Verification]) -> Iterator[str]:
    """The verifications as the lines of a table, with what could not be run and the notes below."""
    yield f"{'artifact':34} {'run by':22} {'images':>6} {'rel. L2':>9} {'cosine':>10} {'top-1':>7} {'KL':>9}  verdict"
    for entry in found:
        for result in entry.results:
            numbers = result.differences
            yield (
                f"{entry.artifact:34} {result.candidate:22} {numbers.samples:>6} {numbers.relative_l2_max:>9.1e} "
                f"{numbers.centred_cosine_min:>10.7f} {numbers.top1_agreement:>7.2%} {numbers.mean_kl:>9.1e}  "
                f"{'pass' if result.passed else 'FAIL: ' + '; '.join(result.failures)}"
            )
            yield from (f"  {line}" for line in result.lines())
        for reason in entry.not_run:
            yield f"{entry.artifact:34} not run: {reason}"
    for line in dict.fromkeys(line for entry in found for line in entry.notes):
        yield f"Note: {line}"


def _check_promised(artifact: Artifact[OnnxManifest], graph: GraphFacts) -> None:
    """Raise GraphCheckError where the graph's inputs or outputs are not the recorded ones.

    ONNX Runtime is given one tensor and gives one, whatever they are called; an engine built from the file would not.
    """
    facts = artifact.manifest.facts
    for kind, found, recorded in (("inputs", graph.inputs, facts.inputs), ("outputs", graph.outputs, facts.outputs)):
        now = {name: TensorSpec(element, tuple(shape)) for name, (element, shape) in found.items()}
        if recorded == now:
            continue
        what = "called" if list(recorded) != list(now) else "of the type and shape"
        said = [", ".join(each) if what == "called" else str(each) for each in (now, dict(recorded))]
        raise GraphCheckError(
            f"The {kind} of {artifact.path.name} are {what} {said[0]}, and its manifest says {said[1]}. Export it "
            "again."
        )


def gate_of(artifact: Artifact) -> Gate:
    """What an artifact's results are judged by: its precision's gate, and for FP32 engines one for TF32 on or off."""
    manifest = artifact.manifest
    if isinstance(manifest, EngineManifest):
        return manifest.precision.gate_of_engine(allow_tf32=manifest.request.allow_tf32)
    return manifest.precision.gate


def model_record(
    loaded: LoadedModel, preprocessing: Preprocessing, manifest_dir: Path, checkpoint: Path | None = None
) -> ModelRecord:
    """What a manifest in `manifest_dir` says of a loaded model."""
    weights = loaded.weights
    if checkpoint is not None:
        reference = relative_reference(checkpoint, manifest_dir)
        weights = WeightsRecord("checkpoint", reference, weights.sha256, weights.licence)
    return ModelRecord(
        variant=loaded.model.variant.name,
        num_classes=loaded.model.num_classes,
        image_size=preprocessing.image_size,
        weights=weights,
        preprocessing=preprocessing,
        class_names=loaded.class_names,
        head_is_new=loaded.head_is_new,
    )


def recorded_model(artifact: Artifact) -> LoadedModel:
    """Load the weights that an artifact was made from and check that they are the same.

    Raises InputError when a checkpoint is not where the manifest says, CorruptArtifactError when it was changed.
    """
    record = artifact.manifest.model
    weights = record.weights
    if weights.origin == "random":
        model = random_model(find_variant(record.variant), record.num_classes, seed=int(weights.reference))
        loaded = LoadedModel(model, weights, record.class_names, record.preprocessing)
    elif weights.origin == "checkpoint":
        path = artifact.path.parent / weights.reference
        if not os.path.isfile(path):  # noqa: PTH113 - Path's own raises for a name that no system takes
            raise InputError(
                f"{artifact.path.name} was made from {path}, which is not there. Put it back or export again."
            )
        loaded = load_checkpoint(path, record.variant, **_head_of(record))
    else:
        loaded = load_pretrained(weights.reference, **_head_of(record))
    found = hash_weights(loaded.model)
    if found != weights.sha256:
        raise CorruptArtifactError(
            f"The weights behind {artifact.path.name} ({weights.origin} {weights.reference}) have changed: "
            f"hash {found[:12]}…, the manifest says {weights.sha256[:12]}…. Export again with --force."
        )
    return loaded


def _head_of(record: ModelRecord) -> dict[str, Any]:
    """How to get the same head again; a new one is drawn from a fixed seed."""
    return {"num_classes": record.num_classes, "reset_head": True} if record.head_is_new else {}


def _verify_engine(
    artifact: Artifact, reference: Reference, progress: Progress | None, outputs: SavedOutputs | None
) -> Verification:
    try:
        runner = open_runner(artifact, options=RunnerOptions(in_child_first=True, hashes_hold=True))
    except MissingRequirementError as error:
        return Verification(artifact.path.name, "engine", (), not_run=(str(error),))
    with runner:
        candidate = Candidate(artifact, runner, runner.input_spec, gate_of(artifact))
        result = _judge(candidate, reference, progress, outputs)
    return Verification(artifact.path.name, "engine", (result,))


def _judge(
    candidate: Candidate, reference: Reference, progress: Progress | None, outputs: SavedOutputs | None
) -> ParityResult:
    if outputs is None:
        return reference.judge(candidate, progress)
    names = (candidate.name, TORCH_REFERENCE)
    return reference.judge(candidate, progress, outputs.writer(candidate.artifact, candidate.runner.info, names))


def _profile_spec(artifact: Artifact, spec: InputSpec) -> InputSpec:
    smallest, _, largest = artifact.manifest.batch
    return InputSpec(spec.kind, spec.image_size, smallest, largest)


def _told(progress: Progress | None, what: str) -> Callable[[int], None] | None:
    return None if progress is None else lambda images: progress(what, images)
