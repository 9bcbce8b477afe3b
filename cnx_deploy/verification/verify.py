"""Artifacts against the network they were made from: which runners, on which images.

The reference is PyTorch's training form in FP32 with the weights that the manifest names; of a rescued ONNX file it is
the original in FP32, run by ONNX Runtime (`verification.originals`).
"""

import math
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.artifacts import is_onnx, open_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import (
    GraphCheckError,
    InputError,
    MissingRequirementError,
    ParityError,
    RefusedArtifactError,
)
from cnx_deploy.core.gates import GATES, Gate, OutputSpec, ParityResult
from cnx_deploy.core.image_size import size_text
from cnx_deploy.core.manifest import Artifact, OnnxManifest, TensorSpec
from cnx_deploy.core.preprocessing import BrokenImage, Preprocessing
from cnx_deploy.data import ImageBatch, ImageLike, ImageSource, InputSpec, evenly, images_to_run
from cnx_deploy.data.coco import InstanceFiles
from cnx_deploy.data.image_source import checked_sizes
from cnx_deploy.data.segmentation import SegmentationFiles
from cnx_deploy.exporters.graph_checks import GraphFacts, check_graph
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import parts_of
from cnx_deploy.model.recorded import recorded_gate, recorded_outputs, recorded_task
from cnx_deploy.model.tasks.base import Outputs, network_outputs
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.runners.registry import RunnerOptions, find_runner, open_runner
from cnx_deploy.verification.evaluation import assumed_order, class_positions
from cnx_deploy.verification.maps import comparison_by_labels
from cnx_deploy.verification.metrics import RunningComparison, Verification
from cnx_deploy.verification.originals import TORCH_REFERENCE, reference_network
from cnx_deploy.verification.parity import comparable, compare, outputs_of
from cnx_deploy.verification.saved_results import SavedResults

__all__ = ["TORCH_REFERENCE", "Candidate", "Reference", "verify_artifact", "verify_export"]

END_IMAGES = 10
"""Images of the smallest and of the largest size each, where sizes are open."""
EMULATED_IMAGES = 10
"""Unless it is asked for by name: the emulator takes seconds an image for the large variants."""
SAMPLES = 64
"""At least so many images, unless they have labels: then all."""
DENSE_SAMPLES = 10
"""The same of a task with an answer at each place, of which an image has thousands."""
PIECE = 8
"""Images that PyTorch runs at once: it needs no large batch, and memory is the candidate's."""
HIDES_OVERFLOW = (
    "ONNX Runtime computes FP16 files in FP32 on a CPU: its row shows that the graph is right, not that FP16 is safe. "
    "The emulator's row and the graph check (no reduction in FP16) are the evidence."
)
SEVERAL_LABELS = "The images have several labels each: neighbours are compared, and not how often they share a label."

Progress = Callable[[str, int], None]
"""Told a text, and the images that were run since the last time."""


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
        """Backend and precision, and of images of another size than the typical one that too."""
        size = self.spec.image_size
        other = f" at {size_text(size)} px" if size != self.artifact.manifest.deploy.image_size else ""
        return f"{self.runner.info.backend} {self.runner.info.precision}{other}"

    def at_ends(self) -> Iterator[Self]:
        """The same for the smallest and the largest images, where sizes are open: a few of them."""
        for size in self.artifact.manifest.deploy.checked_sizes[1:]:
            few = min(self.limit or END_IMAGES, END_IMAGES)
            yield replace(self, spec=replace(self.spec, image_size=size), limit=few)


class _OutputsFile:
    """Outputs by image, in a temporary file that vanishes with this object: one row of float32 holds all of an image's.

    Places of classes are exact in float32: there are far fewer than 2^24.
    """

    def __init__(self, specs: Sequence[OutputSpec]) -> None:
        self._stream = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the object
        weakref.finalize(self, self._stream.close)
        self._rows: dict[int, int] = {}
        self._shapes = {spec.name: spec.shape for spec in specs}
        self._widths = [math.prod(shape) for shape in self._shapes.values()]

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    def append(self, indices: Sequence[int], outputs: Mapping[str, Tensor]) -> None:
        flat = [outputs[name].detach().float().cpu().flatten(1) for name in self._shapes]
        written = len(self._rows)
        self._stream.seek(written * 4 * sum(self._widths))
        self._stream.write(torch.cat(flat, dim=1).numpy().tobytes())
        self._rows.update((index, written + at) for at, index in enumerate(indices))

    def rows(self, indices: Sequence[int]) -> Outputs:
        """The outputs (N, ...) of the images at `indices`."""
        rows = np.empty((len(indices), sum(self._widths)), dtype=np.float32)
        for row, index in zip(rows, indices, strict=True):
            self._stream.seek(self._rows[index] * row.nbytes)
            row[:] = np.frombuffer(self._stream.read(row.nbytes), dtype=np.float32)
        pieces = torch.split(torch.from_numpy(rows), self._widths, dim=1)
        return {
            name: piece.reshape(len(indices), *shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }


class Reference:
    """PyTorch's outputs of the network that an artifact records, on a source of images, computed once an image.

    Pixels are read again for each runner, so that memory is that of a batch. `broken`: images that could not be read
    so far, by their index in `images`. `assumed`: in which order classes without recorded names are taken.

    Args:
        artifact: any artifact of the network.
        data: a source, or a path that `data.find_images` reads; None makes images from a seed. Labels are used where
            there are any and the task has class scores (InputError when their classes are not the model's) or an
            embedding, of any classes.
        samples: images without labels to compare on, at least, None for SAMPLES or DENSE_SAMPLES; images with labels,
            and of an embedding those of `data`, at most, evenly spread, None for all.
        class_names: the network's, in place of the recorded ones.
        white_level: as in `core.preprocessing`, in place of the recorded one.
    """

    def __init__(
        self,
        artifact: Artifact,
        data: Path | str | ImageSource | None = None,
        samples: int | None = None,
        *,
        class_names: tuple[str, ...] | None = None,
        white_level: float | None = None,
    ) -> None:
        self.record = artifact.manifest.model
        self.task = recorded_task(self.record)
        self.images = ImageLike() if data is None else images_to_run(data, targets=self.task.targets)
        self.samples = samples
        self._few = DENSE_SAMPLES if self.task.is_dense else SAMPLES
        self.specs = recorded_outputs(artifact)
        self.chosen = artifact.manifest.deploy.outputs
        self.class_output = self.task.class_output_of([spec.name for spec in self.specs])
        self.class_names: tuple[str, ...] = ()
        self.assumed: tuple[str, ...] = ()
        self._white_level = self.record.preprocessing.white_level if white_level is None else white_level
        self.label_names = (class_names or self.record.class_names or ()) if self.task.takes_label_sets else ()
        # Several labels are compared one by one, with those of the reference.
        if self.images.class_names and self.class_output is not None and not self.task.takes_label_sets:
            names = class_names or self.record.class_names
            self.assumed = (assumed_order(self.images),) if names is None else ()
            self._positions = class_positions(self.images, names, self.record.num_classes)
            self.class_names = names or self.images.class_names
        self._by_labels = partial(comparison_by_labels, self.images, self.record, class_names)
        if self._by_labels() is not None and self.images.class_names and not (class_names or self.record.class_names):
            self.assumed = (assumed_order(self.images),)
        embeds = any(spec.unit == "embedding" for spec in self.specs)
        # What an image's label is called: a class of the network, or beside an embedding any.
        own_labels = embeds and self.images.label_sets is None
        self.group_names = self.class_names or (tuple(self.images.class_names) if own_labels else ())
        self._unused = (SEVERAL_LABELS,) if embeds and not own_labels else ()
        has_labels = bool(self.class_names) or isinstance(self.images, SegmentationFiles | InstanceFiles)
        self._takes_all = has_labels or (embeds and data is not None)
        self.network = reference_network(artifact)
        self.broken: dict[int, BrokenImage] = {}
        self._outputs: dict[tuple[Any, ...], _OutputsFile] = {}

    @property
    def loaded(self) -> LoadedModel:
        """The network in PyTorch. Raises InputError for one that came as an ONNX file."""
        if self.network.loaded is None:
            raise InputError("The network came as an ONNX file, so that there is none in PyTorch. verify takes it.")
        return self.network.loaded

    @property
    def notes(self) -> tuple[str, ...]:
        """How the images were understood, what was assumed, and what those that were read so far have shown."""
        return (*self.images.notes, *self.assumed, *self._unused, *self.images.observed())

    def matches(self, artifact: Artifact) -> bool:
        """Whether `artifact` holds the same network for images that are made the same way, and for the same classes."""
        other, own = artifact.manifest.model, self.record
        same_images = (other.image_size, other.preprocessing, artifact.manifest.deploy.outputs) == (
            own.image_size, own.preprocessing, self.chosen
        )  # fmt: skip
        same_classes = (other.class_names, other.thresholds) == (own.class_names, own.thresholds)
        return same_images and same_classes and other.weights.sha256 == own.weights.sha256

    def batches(
        self, deploy: DeploySpec, spec: InputSpec, limit: int | None = None, progress: Progress | None = None
    ) -> Iterator[tuple[ImageBatch, Outputs]]:
        """Batches of the sizes that are checked (1, 2, 7, the largest), each with PyTorch's outputs (n, ...).

        Args:
            deploy: the deploy form whose input normalisation PyTorch undoes.
            spec: the batches that the candidate takes.
            limit: so many of the images at most.
            progress: told of PyTorch's images.

        Raises InputError when no image can be read, or one can no longer.
        """
        chosen = self._readable(deploy, self._chosen(spec, limit), progress)
        outputs = self._outputs[_input_of(deploy)]
        for batch in self.images.batches(self._preprocessing(spec), spec, checked_sizes(spec), chosen):
            yield batch, outputs.rows(batch.indices)

    def pairs(
        self, artifact: Artifact, limit: int | None = None, progress: Progress | None = None
    ) -> Iterator[tuple[Tensor, Outputs]]:
        """Images as `artifact` takes them and PyTorch's outputs for each, copies that fill a batch up included.

        `limit` None is `samples`, or SAMPLES of labelled images: the caller may hold them all.
        """
        deploy, (smallest, _, largest) = artifact.manifest.deploy, artifact.manifest.batch
        spec = InputSpec.of(deploy, smallest, largest)
        if limit is None and self._takes_all:
            limit = self.samples or self._few
        for batch, outputs in self.batches(deploy, spec, limit, progress):
            at = torch.tensor([*range(len(batch)), *[0] * (len(batch.images) - len(batch))])
            yield batch.images, {name: output[at] for name, output in outputs.items()}

    def judge(
        self, candidate: Candidate, progress: Progress | None = None, saved: SavedResults | None = None
    ) -> tuple[ParityResult, ...]:
        """Run the candidate and compare each output; `saved` is given both sides' outputs.

        A batch below the candidate's smallest is filled up with copies, which are not counted. What is given for
        embeddings and for labelled images, see `RunningComparison.results`.
        """
        names, runner, done = (candidate.name, self.network.name), candidate.runner, 0
        class_output = self.class_output if self.class_names else None
        comparison = RunningComparison(
            self.specs, self.group_names, class_output, self.label_names, maps=self._by_labels()
        )
        run = None if saved is None else saved.new_run(candidate.artifact, runner.info, names, self.specs)
        deploy = replace(candidate.artifact.manifest.deploy, image_size=candidate.spec.image_size)
        for batch, expected in self.batches(deploy, candidate.spec, candidate.limit, progress):
            given = runner.run(batch.images.to(runner.device))
            outputs = {name: output[: len(batch)].float().cpu().clone() for name, output in given.items()}
            if comparison.maps is not None:
                comparison.maps.add(outputs, expected, batch.labels)
            outputs, expected = comparable(outputs, expected, self.specs)
            labels = batch.labels.tolist() if self.group_names else []
            labels = [self._positions[label] for label in labels] if self.class_names else labels
            comparison.add(outputs, expected, batch.names, labels, size=len(batch.images))
            if run is not None:
                run.add(outputs, expected, batch.names, labels)
            done += len(batch)
            if progress is not None:
                progress(f"{candidate.name}: {done} images", len(batch))
        available, broken = len(self.images), tuple(self.broken[index] for index in sorted(self.broken))
        results = comparison.results(names, candidate.gate, available=available, broken=broken)
        if saved is not None and run is not None:
            words = (class_output, self.group_names, available, broken, self.label_names)
            saved.keep(run.close(results[0], *words))
        return results

    def _chosen(self, spec: InputSpec, limit: int | None) -> list[int]:
        """Evenly spread ones, or else at least as many as the checked sizes take, of which a limit takes the first."""
        count = self.samples
        if not self._takes_all:
            count = max(self._few if count is None else count, sum(checked_sizes(spec)))
        chosen = [index for index in self.images.choice(count) if index not in self.broken]
        return [chosen[at] for at in evenly(len(chosen), limit)] if self._takes_all else chosen[:limit]

    def _readable(self, deploy: DeploySpec, chosen: Sequence[int], progress: Progress | None) -> list[int]:
        """Compute the outputs that are not there yet; gives the images that can be read."""
        spec = InputSpec.of(deploy)
        with self.network.open(deploy) as runner:
            outputs = self._outputs.setdefault(_input_of(deploy), _OutputsFile(runner.outputs))
            missing, done = [index for index in chosen if index not in outputs], 0
            batches = self.images.batches(self._preprocessing(spec), spec, PIECE, missing, leave_out_broken=True)
            for batch in batches:
                outputs.append(batch.indices, runner.run(batch.images))
                done += len(batch)
                if progress is not None:
                    progress(f"{self.network.title}: {done} of {len(missing)} images", len(batch))
        self.broken.update(batches.broken)
        readable = [index for index in chosen if index not in self.broken]
        if not readable:
            first = next(iter(self.broken.values()))
            raise InputError(f"No image of {self.images.description} ({len(chosen)}) can be read: {first.reason}")
        return readable

    def _preprocessing(self, spec: InputSpec) -> Preprocessing:
        return replace(self.record.preprocessing, image_size=spec.image_size, white_level=self._white_level)


def verify_artifact(
    artifact: Artifact,
    reference: Reference,
    progress: Progress | None = None,
    *,
    runners: Sequence[str] = (),
    saved: SavedResults | None = None,
    device: str = "cpu",
    allow_engine_code: bool = False,
) -> Verification:
    """Run an artifact here, as far as that is possible, and judge it against `reference`.

    Args:
        artifact: an ONNX file, or an engine, which runs on its GPU alone.
        reference: of the same network, see `Reference.matches`.
        progress: told of images while they are run.
        runners: names of `runners.registry` for an ONNX file, by default those that prove most.
        saved: where both sides' logits go.
        device: "cpu" or "cuda", where an ONNX file runs.
        allow_engine_code: an engine with own kernels may run them; without, it is reported as not run.

    Raises CorruptArtifactError when its bytes are not what the manifest says, GraphCheckError when its inputs or
    outputs are not. A runner that this machine lacks the hardware for is reported, not raised.
    """
    artifact = open_artifact(artifact.path)
    if not is_onnx(artifact):
        try:
            options = RunnerOptions(in_child_first=True, allow_engine_code=allow_engine_code, hashes_hold=True)
            engine = open_runner(artifact, options=options)
        except (MissingRequirementError, RefusedArtifactError) as error:
            return Verification(artifact.path.name, "engine", (), not_run=(str(error),))
        with engine:
            candidate = Candidate(artifact, engine, engine.input_spec, recorded_gate(artifact))
            judged = reference.judge(candidate, progress, saved)
            for end in candidate.at_ends():
                judged += reference.judge(end, progress)
            return Verification(artifact.path.name, "engine", judged, notes=reference.notes)
    _check_promised(artifact, check_graph(artifact.path, artifact.file_names))
    smallest, _, largest = artifact.manifest.batch
    row, gate = artifact.manifest.precision, recorded_gate(artifact)
    results: list[ParityResult] = []
    unknown: list[str] = []
    for name in runners or row.proven_by:
        try:
            opened = open_runner(artifact, name, RunnerOptions(device=device, hashes_hold=True))
        except InputError as error:
            if runners or artifact.manifest.model.graph is None:
                raise
            unknown.append(f"{name} was not run: {error}")  # an operator of somebody else's graph
            continue
        with opened as runner:
            few = find_runner(name).is_slow and not runners
            limit = max(EMULATED_IMAGES, reference.samples or 0) if few else None
            spec = replace(runner.input_spec, min_batch=smallest, max_batch=largest)
            candidate = Candidate(artifact, runner, spec, gate, limit)
            results.extend(reference.judge(candidate, progress, saved))
            for end in candidate.at_ends():
                results.extend(reference.judge(end, progress))
    widens = device == "cpu" and row.dtype == "float16"
    widens = widens and any(find_runner(name).widens_half for name in runners or row.proven_by)
    notes = (*unknown, HIDES_OVERFLOW) if widens else tuple(unknown)
    return Verification(artifact.path.name, "onnx", tuple(results), notes=(*notes, *reference.notes))


def verify_export(artifact: Artifact[OnnxManifest], model: ConvNeXtV2) -> tuple[ParityResult, ...]:
    """Compare a file with PyTorch before an export puts it into place, on batches of 1 and 2 and each end of sizes.

    The deploy form of a half-precision file is judged first with every part in FP32, since rounding would hide a small
    mistake. The file itself is run by ONNX Runtime where that can, and by the emulator, which alone sees FP16 overflow.

    Returns:
        The verdicts of the runner that proves most, one an output, for the manifest.

    Raises ParityError, which names what differs.
    """
    deploy = artifact.manifest.deploy
    results = [_verified_at(replace(deploy, image_size=size), artifact, model) for size in deploy.checked_sizes]
    return results[0]


def _verified_at(deploy: DeploySpec, artifact: Artifact[OnnxManifest], model: ConvNeXtV2) -> tuple[ParityResult, ...]:
    path, (smallest, _, largest) = artifact.path, artifact.manifest.batch
    sizes = [size for size in (1, 2) if smallest <= size <= largest] or [smallest]
    spec = InputSpec.of(deploy, smallest, largest)
    source = ImageLike(sum(sizes)).batches(
        Preprocessing(deploy.image_size, mean=deploy.mean, std=deploy.std), spec, sizes
    )
    batches = [batch.images for batch in source]
    with reference_runner(model, deploy) as runner:
        expected = outputs_of(runner, batches)
    checked, task = RunnerOptions(hashes_hold=True), model.task
    specs = network_outputs(task, model.variant, model.num_classes, deploy)
    judged: list[tuple[str, Gate, Callable[[], Runner]]] = [
        (path.name, task.gate(deploy.row.gate), partial(open_runner, artifact, name, checked))
        for name in deploy.row.proven_by
    ]
    if deploy.is_half:
        single = replace(deploy, keep_fp32=parts_of(model.variant))
        judged.insert(
            0, (f"The form of {path.name}", task.gate(GATES["fp32"]), partial(deployed_runner, model, single))
        )
    at = f" at {size_text(deploy.image_size)} px" if deploy.size_range is not None else ""
    remedy = " `cnx-deploy diagnose bisect` names what has to stay in FP32 (--keep-fp32)." if deploy.is_half else ""
    for what, gate, make in judged:
        with make() as runner:  # one after the other: each holds the weights of huge once more
            results = compare(runner, expected, batches, specs, gate, reference_name=TORCH_REFERENCE)
        for result in results:
            if result.passed:
                continue
            where = f" in {result.output}" if len(results) > 1 else ""
            raise ParityError(
                f"{what} ({result.candidate}) differs from PyTorch{where}{at}: {'; '.join(result.failures)}. "
                f"{path.name} was not written. Use --no-verify to keep the file for inspection.{remedy}"
            )
    return results


def _check_promised(artifact: Artifact[OnnxManifest], graph: GraphFacts) -> None:
    """Raise GraphCheckError where the graph's inputs or outputs are not the recorded ones.

    ONNX Runtime is given one tensor and gives one, whatever they are called; an engine built from the file would not.
    """
    facts = artifact.manifest.facts
    for kind, tensors, recorded in (
        ("inputs", graph.inputs, facts.inputs),
        ("outputs", graph.outputs, facts.outputs),
    ):
        recorded = {name: replace(tensor, unit=None) for name, tensor in recorded.items()}
        now = {name: TensorSpec(element, tuple(shape)) for name, (element, shape) in tensors.items()}
        if recorded == now:
            continue
        what = "called" if list(recorded) != list(now) else "of the type and shape"
        told = [
            ", ".join(side)
            if what == "called"
            else str({name: [spec.type, *spec.shape] for name, spec in side.items()})
            for side in (now, recorded)
        ]
        raise GraphCheckError(
            f"The {kind} of {artifact.path.name} are {what} {told[0]}, and its manifest says {told[1]}. Export it "
            "again."
        )


def _input_of(deploy: DeploySpec) -> tuple[Any, ...]:
    """What PyTorch's outputs depend on beside the weights."""
    return deploy.input_kind, deploy.image_size, deploy.mean, deploy.std, deploy.tta, deploy.temperature
