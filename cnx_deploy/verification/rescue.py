"""A foreign ONNX file becomes an FP16 file whose norms are FP32 islands, and is proven before it is written.

The proof has two halves. The twin, the new graph with every half type FP32, has to give what the original gives: so no
function was changed. The FP16 file, operator by operator in the emulator, has to give it within FP16's gate.
"""

import json
import math
import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir
import torch

from cnx_deploy.core.artifacts import artifact_stem, stage_artifact
from cnx_deploy.core.child_process import run_isolated
from cnx_deploy.core.class_names import ClassNames, check_class_count, names_of
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import (
    BuildError,
    CheckFailedError,
    CorruptArtifactError,
    InputError,
    OutputExistsError,
    ParityError,
)
from cnx_deploy.core.gates import GATES, Differences, Gate, OutputSpec, ParityResult
from cnx_deploy.core.image_size import MAX_CHANNELS, STRIDE, ImageSize, canonical_size, sides, size_text
from cnx_deploy.core.manifest import (
    FOREIGN,
    Artifact,
    Compiled,
    ForeignGraph,
    ModelRecord,
    OnnxManifest,
    OnnxRequest,
    TensorSpec,
    WeightsRecord,
    relative_reference,
)
from cnx_deploy.core.preprocessing import ASSUMED, PerChannel, Preprocessing, given_per_channel
from cnx_deploy.core.strict_json import typed
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data import image_like_batches
from cnx_deploy.exporters.graph_checks import GraphFacts, admit_onnx, check_graph, load_model
from cnx_deploy.exporters.onnx import facts_record
from cnx_deploy.exporters.rescue.conversion import Conversion, KeptNode, convert, prepared_model, save_model
from cnx_deploy.exporters.rescue.patterns import KINDS, Island, applied_activation
from cnx_deploy.exporters.trt.compiling import limits_for as compile_limits
from cnx_deploy.exporters.untrusted import hash_onnx, limits_for
from cnx_deploy.model.checkpoint import FOREIGN_LICENCE
from cnx_deploy.model.tasks.base import Task, find_task, task_names
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.runners.ort_session import LOAD_ERRORS, STATE, open_session, trial_run
from cnx_deploy.verification.inspect import KINDS as FILE_KINDS
from cnx_deploy.verification.inspect import kind_of_file, recorded_artifact
from cnx_deploy.verification.parity import RunningDifferences

__all__ = ["RescueRequest", "Rescued", "rescue_file"]

OPEN_BATCH, OPEN_SIDE, OPEN_LENGTH = 2, 224, 64
"""What stands for an open axis in the proof: the batch, a side of images, any other."""
MEAN, STD = 0.45, 0.225
"""Of the pixels of the proof's images, near those of ImageNet: what the network was trained with is not in the file."""
UNKNOWN = {"mean": 0.0, "std": 1.0}
"""What a manifest holds where nobody said it, beside the origin `ASSUMED`: pixels as they are."""
OPEN_RANGE = (1, 8, 64)
"""Smallest, typical and largest batch of an open one."""
SCORES = ("logits", "probabilities")
ROW_SUM_TOLERANCE = 1e-3
"""By how much the probabilities of an image may miss a sum of 1: half a file rounds each by at most 5e-4 of itself."""
ARRAY_TYPES = {"FLOAT": "float32", "FLOAT16": "float16", "UINT8": "uint8"}
"""Element types of inputs that images or noise are made for."""

REFERENCE = "the original in FP32"
IMAGE_FIELDS = ("mean", "std", "crop_ratio", "crop_mode", "interpolation")
"""What a file does not say of its images."""
NO_MANIFEST = (
    "No manifest was written, for {}: verify, bench, build-trt and predict take images and float outputs alone. "
    "`cnx-deploy inspect --compile` compiles the file."
)
FORM = 1
"""The version of the conversion."""

Arrays = dict[str, np.ndarray[Any, Any]]
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RescueRequest:
    """What to rescue, how it is proven, and what the file itself does not say.

    `inputs`: an .npz file with an array for each input of the graph, in place of seeded images. `sizes`: what stands
    for open axes, by the axis' name in the graph; open sides of images are fixed at it. `target` (such as "sm89"):
    compile the original, the naive FP16 file and the rescued one for this GPU, and count kernels and bytes.
    `batch`: smallest, typical and largest batch, where the batch is open; None is 1, 8 and 64. `task` names the meaning
    of the one output, which is then called as the task calls it; `output` is the task's word for it, "logits" or
    "probabilities", None what the graph shows; `class_names` are of classification unless a task is named. `mean` to
    `interpolation` say how images are made, see `core.preprocessing`: nothing is guessed, and `predict` needs them all.
    """

    file: Path
    output_dir: Path = Path("export")
    name: str | None = None
    inputs: Path | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    target: str | None = None
    batch: tuple[int, int, int] | None = None
    seed: int = 0
    task: str | None = None
    output: str | None = None
    class_names: ClassNames | None = None
    mean: PerChannel | float | None = None
    std: PerChannel | float | None = None
    crop_ratio: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.batch is not None and not _rises(self.batch):
            raise InputError(
                f"batch is {self.batch!r}; expected three whole numbers that rise from 1, smallest, typical and "
                "largest, such as (1, 8, 64)."
            )
        if not isinstance(self.sizes, Mapping):
            raise InputError(f"sizes is {self.sizes!r}; expected sizes by the axes' names, such as {{'height': 512}}.")
        if wrong := {name: size for name, size in self.sizes.items() if not _is_count(size)}:
            raise InputError(f"The sizes of axes are whole numbers from 1; got {wrong}.")
        if self.sizes and self.inputs is not None:
            raise InputError(
                f"--size {' '.join(self.sizes)} (sizes) has nothing to size: the arrays of {self.inputs} have their "
                "own sizes. Leave out --size or --inputs (inputs)."
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = () if value is None else (value,) if isinstance(value, int | float) else tuple(value)
            if not all(math.isfinite(number) and (number > 0 or name == "mean") for number in numbers):
                raise InputError(f"{name} must be finite{' and positive' * (name == 'std')}; got {value}.")
        if self.task is not None and not find_task(self.task).has_classes:
            taken = ", ".join(name for name in task_names() if find_task(name).has_classes)
            raise InputError(
                f"The task {self.task} says nothing of a file from elsewhere; expected one of {taken}. Leave --task "
                "(task) out for values without a meaning."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescued:
    """What was found in a file, what was written, and the proof.

    `artifact`: the file with its manifest; None where the graph does not take images, so that there is none.
    `islands`: how many of each kind. `not_recognised`: operators that reduce or square and belong to no known norm.
    `fp32` and `fp16`: a verdict for each output. `naive`: what the same graph gives with everything in half.
    `not_run`: why FP16 was not proven; empty where it was. `compiled`: by "original", "naive" and "rescued".
    """

    source: str
    path: Path
    opset: int
    source_precision: str
    source_bytes: int
    size_bytes: int
    islands: Mapping[str, int]
    not_recognised: tuple[str, ...]
    kept: tuple[KeptNode, ...]
    casts: int
    dropped_casts: int
    flushed_weights: int
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    fp32: tuple[ParityResult, ...]
    fp16: tuple[ParityResult, ...] = ()
    naive: str = ""
    not_run: str = ""
    notes: tuple[str, ...] = ()
    compiled: Mapping[str, Compiled] = field(default_factory=dict)
    artifact: Artifact[OnnxManifest] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it; of compiled graphs the totals."""
        document = asdict(replace(self, artifact=None))
        document |= {"source": str(self.source), "path": str(self.path)}
        document["manifest"] = None if self.artifact is None else f"{self.artifact.manifest.stem}.json"
        del document["artifact"]
        for half in ("fp32", "fp16"):
            document[half] = [result.to_dict() for result in getattr(self, half)]
        document["compiled"] = {
            name: {
                "target": made.target, "batch": made.batch, "kernels": made.kernels,
                "megabytes_per_image": made.megabytes_per_image, "plan_bytes": made.plan_bytes,
            }
            for name, made in self.compiled.items()
        }  # fmt: skip
        return document

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def rescue_file(request: RescueRequest, note: Note = lambda text: None) -> Rescued:
    """Find the norms of a foreign file, write it in FP16 with them as FP32 islands, and prove the result.

    Raises:
        CheckFailedError: the file holds no GRN and no LayerNorm.
        ParityError: the FP32 twin or the FP16 file differs from the original; nothing is written.
        RefusedArtifactError, CorruptArtifactError: see `graph_checks.check_graph`, run in a child process.
        InputError: an input is no image and no noise stands for it, so that `inputs` has to give one; the file is none
            from elsewhere, or the result would replace it; a size, a shape or the task does not fit the graph.
    """
    path = request.file
    _check_is_onnx(path)
    admission = admit_onnx(path, allows_half_reductions=True)
    _check_is_foreign(path, admission.facts)
    kinds = {kind for kind, _ in admission.facts.inputs.values()} | admission.facts.types.keys() & {"BFLOAT16"}
    if other := sorted(kinds & {"BFLOAT16", "DOUBLE"}):
        raise InputError(
            f"{path.name} computes in {' and '.join(other)}, and rescue takes FLOAT and FLOAT16. Export it in FP32."
        )
    _check_axes(request, admission.facts)
    batches, notes = _proof_inputs(request, admission.facts)
    halves = {name for name, (kind, _) in admission.facts.inputs.items() if kind == "FLOAT16"}
    shapes = {
        name: ("float16" if name in halves else str(array.dtype), array.shape) for name, array in batches[0].items()
    }
    ends = _Ends.of(request, admission.facts, batches)
    name = request.name or path.stem
    stem = f"{name}-fp16" if ends.image_size is None else artifact_stem(name, ends.image_size, "fp16")
    originals = [path, path.with_suffix(".json"), *map(Path, admission.facts.outside_files)]
    results = [request.output_dir / f"{stem}{suffix}" for suffix in (".onnx", ".onnx.data", ".json")]
    there = [[file for file in files if file.exists()] for files in (originals, results)]
    if any(original.samefile(result) for original in there[0] for result in there[1]):
        raise InputError("The result would replace its own original; use another --name or --output-dir.")
    if (request.output_dir / f"{stem}.onnx").exists() and not request.force:
        raise OutputExistsError(
            f"{request.output_dir / stem}.onnx exists. Use --force to replace it, or another --name or --output-dir."
        )
    try:
        trial_run(path, limits_for(admission.size_bytes), shapes)
    except CorruptArtifactError as error:
        if request.inputs is None and not any(
            _is_open(axis) for _, axes in admission.facts.inputs.values() for axis in axes[1:]
        ):
            raise
        told = ", ".join(f"{name} {shape}" for name, (_, shape) in shapes.items())
        raise InputError(
            f"ONNX Runtime cannot run {path.name} on {told}. Give other sizes of open axes with --size (sizes), or "
            f"arrays with --inputs (inputs). {error}"
        ) from error
    admission.check_unchanged()
    digest = hash_onnx(path, [Path(file) for file in admission.facts.outside_files])
    with stage_artifact(request.output_dir, stem) as staging, tempfile.TemporaryDirectory() as folder:
        proof = _Proof(path, Path(folder), staging.folder / f"{stem}.onnx", batches, note)
        model = prepared_model(path)
        ends = ends.with_outputs(request, proof.expected, applied_activation(model.graph.outputs[0]))
        conversion = convert(model)
        counts = Counter(str(island.kind) for island in conversion.islands)
        note(f"{path.name}: {_told(counts)}")
        if not counts["GRN"] + counts["LayerNorm"]:
            raise CheckFailedError(
                f"{path.name} holds nothing to rescue: no GRN and no LayerNorm was recognised ({_told(counts)}). "
                "Nothing was written."
            )
        record = None if ends.image_size is None else _record(request, ends, digest, proof.is_half)
        _describe(model, ends, record)
        save_model(model, proof.rescued)
        facts = check_graph(proof.rescued)
        words: dict[str, Any] = {"fp32": proof.twin(), **proof.half()}
        if request.target:
            words["compiled"] = proof.compiled(request.target, ends.batch[0])
        files = sorted((file.name for file in staging.folder.iterdir()), key=lambda file: file != proof.rescued.name)
        admission.check_unchanged()
        result = Rescued(
            source=str(path),
            path=request.output_dir / proof.rescued.name,
            opset=facts.opset,
            source_precision="fp16" if proof.is_half else "fp32",
            source_bytes=admission.size_bytes,
            size_bytes=sum((staging.folder / file).stat().st_size for file in files),
            islands=dict(counts),
            not_recognised=tuple(_named(island) for island in conversion.islands if island.kind == "not recognised"),
            kept=conversion.kept,
            casts=conversion.casts,
            dropped_casts=conversion.dropped_casts,
            flushed_weights=conversion.flushed_weights,
            inputs={name: (str(array.dtype), array.shape) for name, array in batches[0].items()},
            notes=(*notes, *ends.notes),
            **words,
        )
        if record is None:
            for file in reversed(files):
                (staging.folder / file).replace(request.output_dir / file)
            return result
        kept = tuple(kept.node for kept in conversion.kept)
        manifest = OnnxManifest(
            stem=stem,
            files=staging.record(*files),
            model=record,
            request=OnnxRequest(
                deploy=_deployment(record, kept, ends.words), batch=ends.batch, opset=facts.opset, form=FORM
            ),
            source_name=path.name,
            source_sha256=digest,
            facts=replace(facts_record(facts), parity=result.fp16),
        )
        return replace(result, artifact=staging.commit(manifest))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ends:
    """What the rescued file takes and gives. `image_size` None: no images, or outputs that no manifest can record.

    `words`: what the task calls its output, as `DeploySpec.outputs` has it; none where the task gives it by itself.
    """

    input: str
    batch: tuple[int, int, int]
    image_size: ImageSize | None
    samples: int
    channels: int = 0
    outputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    original_outputs: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, request: RescueRequest, facts: GraphFacts, batches: Sequence[Arrays]) -> Self:
        """What the inputs are. Open sides count as images of a fixed size where the request gives it."""
        name, (kind, shape) = next(iter(facts.inputs.items()))
        fixed = shape[0] if shape and isinstance(shape[0], int) and shape[0] > 0 else None
        batch = request.batch or OPEN_RANGE if fixed is None else (fixed,) * 3
        taken = batches[0][name].shape
        why = "" if len(facts.inputs) == 1 else f"it has {len(facts.inputs)} inputs"
        if kind not in ("FLOAT", "FLOAT16") or len(taken) != 4 or taken[1] > MAX_CHANNELS or min(taken[2:]) < STRIDE:
            why = f"its input {name} is {kind} {list(shape)}, no float images (N, C, H, W)"
        elif any(not isinstance(side, int) or side < 1 for side in shape[1:]) and not _given(request, shape):
            sides = " ".join(f"--size {side or 'height'}=512" for side in shape[2:] if not isinstance(side, int))
            without = "" if request.inputs is None else ", without --inputs"
            why = f"its input {name} leaves sides open: fix them with {sides or '--size'} (sizes){without}"
        if why:
            return cls(input=name, batch=batch, image_size=None, samples=0, notes=(NO_MANIFEST.format(why),))
        size = canonical_size((taken[2], taken[3]))
        return cls(input=name, batch=batch, image_size=size, samples=taken[0], channels=taken[1])

    def with_outputs(self, request: RescueRequest, expected: Sequence[Arrays], operator: str) -> Self:
        """The same with the outputs as they were seen; a task that was named calls its one output as it likes.

        `operator` made the first output: Softmax, Sigmoid or none of them.
        """
        if self.image_size is None:
            return self
        first = expected[0]
        for name, array in first.items():
            if array.dtype != np.float32 or not array.ndim or len(array) != self.samples:
                why = NO_MANIFEST.format(
                    f"its output {name} is {array.dtype} {list(array.shape)}, not float32 (N, ...)"
                )
                return replace(self, image_size=None, notes=(why,))
        task = find_task(request.task or ("classification" if request.class_names else FOREIGN))
        called, notes = {name: name for name in first}, self.notes
        words: tuple[str, ...] = ()
        if task.name != FOREIGN:
            scores = next(iter(first.values()))
            words = _words(request, task, operator, expected)
            declared = task.outputs(scores.shape[-1], words)
            if len(first) != 1 or len(declared) != 1 or scores.shape[1:] != declared[0].shape:
                example = f"{declared[0].name} {declared[0].shape}" if declared else "the scores of an image"
                shapes = {name: array.shape[1:] for name, array in first.items()}
                raise InputError(
                    f"{request.file.name} gives {shapes}, which is not what the task {task.name} gives: expected one "
                    f"output such as {example}. Leave --task (task) out."
                )
            called = dict.fromkeys(first, declared[0].name)
            notes += (f"The output {next(iter(first))} is taken for {declared[0].name}, as {task.name} has them.",)
        axis: int | str = "batch" if self.batch[0] != self.batch[2] else self.batch[0]
        outputs = {called[name]: TensorSpec("FLOAT", (axis, *array.shape[1:])) for name, array in first.items()}
        return replace(self, outputs=outputs, original_outputs=tuple(first), words=words, notes=notes)


def _words(request: RescueRequest, task: Task, operator: str, expected: Sequence[Arrays]) -> tuple[str, ...]:
    """The word of `DeploySpec.outputs` for the one output; none is what the task gives by itself.

    Without a word of the request, the output holds probabilities where `operator` or rows that sum to 1 say so, and
    logits where a value is beyond 0 to 1. InputError for a word that no such file can give, and for the activation of
    another task.
    """
    if task.class_output_of(SCORES) is None:
        return () if request.output is None else (request.output,)
    if request.output not in (None, *SCORES):
        raise InputError(
            f"A file from elsewhere gives no {request.output} of the task {task.name}; expected one output of "
            f"{' or '.join(SCORES)}."
        )
    arrays = [next(iter(outputs.values())) for outputs in expected]
    is_share = all(array.size and array.min() >= 0 and array.max() <= 1 for array in arrays)
    if (
        not operator
        and is_share
        and all(array.ndim == 2 and np.abs(array.sum(axis=1) - 1).max() < ROW_SUM_TOLERANCE for array in arrays)
    ):
        operator = "Softmax"
    (probabilities,) = task.outputs(1, ("probabilities",))
    if operator and (operator.lower() != probabilities.activation or request.output == "logits"):
        raise InputError(
            f"{request.file.name} gives the {operator} of its classes, and the task {task.name} was to have "
            f"{request.output or f'the {probabilities.activation}'}. Use --task "
            f"{'multi-label' if operator == 'Sigmoid' else 'classification'} (task) without --output (output)."
        )
    default = task.outputs(1)[0].name
    word = request.output or ("probabilities" if operator else default if is_share else "logits")
    return () if word == default else (word,)


def _given(request: RescueRequest, shape: Sequence[int | str]) -> bool:
    """Whether the request gives every open side of images, and the channels are fixed."""
    return isinstance(shape[1], int) and all(isinstance(side, int) or side in request.sizes for side in shape[2:])


def _record(request: RescueRequest, ends: _Ends, digest: str, is_half: bool) -> ModelRecord:
    """What the manifest says of the network: where it is from, and of its images what the request says."""
    assert ends.image_size is not None
    names = names_of(request.class_names)
    task = request.task or ("classification" if names else FOREIGN)
    given = {name: getattr(request, name) for name in IMAGE_FIELDS}
    stated = {name: value for name, value in given.items() if value is not None}
    for name, unknown in UNKNOWN.items():
        given[name] = given_per_channel(unknown if given[name] is None else given[name], ends.channels)
    known = {name: value for name, value in given.items() if value is not None}
    classes = int(next(iter(ends.outputs.values())).shape[-1]) if task != FOREIGN else 0
    if names:
        check_class_count(names, classes, str(request.file))
    return ModelRecord(
        variant=FOREIGN,
        num_classes=classes,
        image_size=ends.image_size,
        weights=WeightsRecord("onnx", relative_reference(request.file, request.output_dir), digest, FOREIGN_LICENCE),
        preprocessing=Preprocessing(ends.image_size, **known),
        class_names=names,
        task=task,
        origins={name: "option" if name in stated else ASSUMED for name in IMAGE_FIELDS},
        graph=ForeignGraph(ends.input, ends.outputs, ends.original_outputs, "fp16" if is_half else "fp32"),
    )


def _deployment(record: ModelRecord, kept: tuple[str, ...], words: tuple[str, ...]) -> DeploySpec:
    """The precision and the input of a rescued file, as runners and builders read them."""
    made = record.preprocessing
    return DeploySpec(
        precision="fp16", image_size=made.image_size, input_kind="normalised", mean=made.mean, std=made.std,
        keep_fp32=kept, outputs=words,
    )  # fmt: skip


def _describe(model: ir.Model, ends: _Ends, record: ModelRecord | None) -> None:
    """Write the sizes of images and outputs into the graph, and metadata for who has the file without its manifest."""
    if record is None or ends.image_size is None:
        model.metadata_props.update({"cnx_deploy.precision": "fp16", "cnx_deploy.weights_origin": "onnx"})
        return
    (images,), outputs = model.graph.inputs, model.graph.outputs
    assert images.shape is not None
    batch = images.shape[0] if ends.batch[0] != ends.batch[2] else ends.batch[0]
    images.shape = ir.Shape([batch, ends.channels, *sides(ends.image_size)])
    for value, (name, tensor) in zip(outputs, ends.outputs.items(), strict=True):
        value.name = name
        value.shape = ir.Shape([batch, *(int(size) for size in tensor.shape[1:])])
    entries = {
        "precision": "fp16",
        "input": "normalised",
        "image_size": size_text(ends.image_size),
        "batch": ":".join(map(str, ends.batch)),
        "task": record.task,
        "weights_origin": "onnx",
        "weights_sha256": record.weights.sha256,
        "licence": record.weights.licence,
    }
    if ASSUMED not in record.origins.values():
        entries["preprocessing"] = json.dumps(record.preprocessing.to_dict(), sort_keys=True)
    if ends.words:
        entries["outputs"] = ",".join(ends.words)
    if record.class_names:
        entries["class_names"] = json.dumps(record.class_names, ensure_ascii=False)
    model.metadata_props.update({f"cnx_deploy.{name}": value for name, value in sorted(entries.items())})


class _Proof:
    """The rescued file against the original, on the same inputs; files that only the proof needs lie in `folder`."""

    def __init__(self, source: Path, folder: Path, rescued: Path, batches: Sequence[Arrays], note: Note) -> None:
        self._folder, self.rescued, self._batches, self._note = folder, rescued, batches, note
        self._source = source
        model = load_model(source)
        self.is_half = any(
            value.dtype == ir.DataType.FLOAT16 for value in (*model.graph.inputs, *model.graph.initializers.values())
        )
        del model
        self.original = source
        if self.is_half:
            self.original = folder / "widened.onnx"
            save_model(prepared_model(source), self.original)
        self.expected = _outputs(self.original, batches)
        broken = {
            name for outputs in self.expected for name, array in outputs.items()
            if array.dtype.kind == "f" and not np.isfinite(array).all()
        }  # fmt: skip
        if broken:
            raise CheckFailedError(
                f"{source.name} itself gives NaN or infinity in {', '.join(sorted(broken))}, in FP32 on finite inputs: "
                "there is nothing to compare with. Look at its weights, or give other inputs with --inputs or --size. "
                "Nothing was written."
            )

    def twin(self) -> tuple[ParityResult, ...]:
        """The verdict over the rewritten graph in FP32. Raises ParityError where it fails."""
        if self.is_half:
            self._check_widened()
        path = self._folder / "twin.onnx"
        _written(self._source, path, half=ir.DataType.FLOAT)
        results = _verdicts(_outputs(path, self._batches), self.expected, GATES["fp32"], "FP32 twin", self._batches)
        _check_passed(results, f"The rewritten graph of {self._source.name} is another function than the original")
        return results

    def half(self) -> dict[str, Any]:
        """The fields of `Rescued` on FP16: verdicts, what the naive file gives, or why it was not run."""
        naive = self._folder / "naive.onnx"
        _written(self._source, naive, keeps_islands=False)
        try:
            outputs, _ = _emulated(self.rescued, self._batches, tuple(self.expected[0]))
        except InputError as error:
            return {"not_run": str(error).replace(f"{self.rescued.parent}/", "")}
        results = _verdicts(outputs, self.expected, GATES["fp16"], "emulator fp16", self._batches)
        _check_passed(results, f"The FP16 file of {self._source.name} differs from the original in the emulator")
        outputs, broken = _emulated(naive, self._batches, tuple(self.expected[0]))
        measured = _verdicts(outputs, self.expected, GATES["fp16"], "naive fp16", self._batches)
        worst = max(measured, key=lambda result: (not result.passed, result.differences.relative_l2_max))
        told = f"relative L2 {worst.differences.relative_l2_max:.1e}"
        if not worst.differences.all_finite:
            told = f"{worst.differences.nonfinite_count} values are NaN or infinite"
        elif not worst.passed:
            told = "; ".join(worst.failures)
        return {"fp16": results, "naive": f"{told}, first not finite in {broken}" if broken else told}

    def compiled(self, target: str, batch: int) -> dict[str, Compiled]:
        """Kernels and bytes of the original in FP32, of the naive FP16 file and of the rescued one.

        TensorRT-RTX may refuse the naive one, for a LayerNorm in FP16: then it is left out and `note` is told.
        """
        files = {"original": self.original, "naive": self._folder / "naive.onnx", "rescued": self.rescued}
        made = {}
        for name, path in files.items():
            self._note(f"Compiling the {name} graph for {target}")
            try:
                answer = run_isolated(
                    "cnx_deploy.exporters.trt.compiling:measure_task",
                    {"onnx": str(path.resolve()), "target": target, "batch": batch},
                    compile_limits(path.stat().st_size),
                    what=f"Compiling the {name} graph of {self._source.name}",
                    failure=BuildError,
                )
            except BuildError as error:
                if name != "naive":
                    raise
                self._note(f"The naive graph was not compiled: {str(error).splitlines()[0]}")
            else:
                made[name] = typed(answer, Compiled)
        return made

    def _check_widened(self) -> None:
        """Compare the FP32 form of a half file with the file itself: ONNX Runtime computes both in FP32 on a CPU."""
        types = {each.name: each.type for each in _session(self._source).get_inputs()}
        batches = [
            {
                name: array.astype(np.float16) if types[name] == "tensor(float16)" else array
                for name, array in batch.items()
            }
            for batch in self._batches
        ]
        given = [
            {name: _as_float(array) for name, array in outputs.items()} for outputs in _outputs(self._source, batches)
        ]
        if all(np.isfinite(array).all() for outputs in given for array in outputs.values()):
            results = _verdicts(given, self.expected, GATES["fp16"], "the half file itself", batches)
            _check_passed(results, f"{self._source.name} in FP32 is another function than the file itself")


def _written(
    source: Path, path: Path, *, half: ir.DataType = ir.DataType.FLOAT16, keeps_islands: bool = True
) -> Conversion:
    model = prepared_model(source)
    conversion = convert(model, half, keeps_islands=keeps_islands)
    save_model(model, path)
    return conversion


def _session(path: Path) -> Any:
    return open_session(path, threads=cpu_count())


def _outputs(path: Path, batches: Sequence[Arrays]) -> list[Arrays]:
    """What ONNX Runtime gives for each batch, by output."""
    session = _session(path)
    names = [each.name for each in session.get_outputs()]
    try:
        return [dict(zip(names, session.run(names, batch), strict=True)) for batch in batches]
    except (*LOAD_ERRORS, STATE.InvalidArgument) as error:
        raise InputError(
            f"ONNX Runtime cannot run {path.name} on the inputs of the proof ({str(error).splitlines()[0]}). Give "
            "others with --inputs (inputs), or the sizes of open axes with --size (sizes)."
        ) from error


def _emulated(path: Path, batches: Sequence[Arrays], names: Sequence[str]) -> tuple[list[Arrays], str | None]:
    """What the emulator gives under these names, and the first operator whose result is not finite.

    Raises InputError for an operator that it does not know.
    """
    graph, found, broken = Graph(path), [], None
    for batch in batches:
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        with torch.inference_mode():
            evaluation = graph.evaluate(tensors)
        found.append([_as_float(evaluation.tensors[name].numpy()) for name in graph.outputs])
        broken = broken or evaluation.first_nonfinite
    return [dict(zip(names, arrays, strict=True)) for arrays in found], broken


def _verdicts(
    candidate: Sequence[Arrays], reference: Sequence[Arrays], gate: Gate, name: str, batches: Sequence[Arrays]
) -> tuple[ParityResult, ...]:
    """Judge every output over all batches: tensors of floats by their values, labels by the share that is equal."""
    sizes = tuple(dict.fromkeys(len(next(iter(batch.values()))) for batch in batches))
    results = []
    for output in reference[0]:
        pairs = [(one[output], other[output]) for one, other in zip(candidate, reference, strict=True)]
        if pairs[0][1].dtype.kind == "f":
            running = RunningDifferences(OutputSpec(output, (), "value"))
            for pair in pairs:
                running.add(
                    *(torch.from_numpy(array.reshape(max(1, len(array)) if array.ndim else 1, -1)) for array in pair)
                )
            measured = running.result()
        else:
            equal = np.concatenate([(np.asarray(one) == other).flatten() for one, other in pairs])
            share = float(equal.mean())
            measured = Differences(len(equal), 0, 0.0, 0.0, 1.0, share, int((~equal).sum()), 0, None, 0.0)
        results.append(ParityResult(name, REFERENCE, gate, sizes, output, measured, gate.failures(measured)))
    return tuple(results)


def _check_passed(results: Sequence[ParityResult], what: str) -> None:
    failed = [f"{result.output}: {'; '.join(result.failures)}" for result in results if not result.passed]
    if failed:
        raise ParityError(f"{what}: {', '.join(failed)}. Nothing was written.")


def _as_float(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _is_count(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def _rises(batch: Any) -> bool:
    return (
        isinstance(batch, tuple | list) and len(batch) == 3 and all(map(_is_count, batch)) and sorted(batch) == [*batch]
    )


def _check_is_onnx(path: Path) -> None:
    """Raise InputError for what is no file, and for weights and engines; what is unknown ONNX itself has to read."""
    if not os.path.exists(path):  # noqa: PTH110 - Path's own raises for a name that no system takes
        raise InputError(f"{path} does not exist. rescue takes an ONNX file.")
    if path.is_dir():
        raise InputError(f"{path} is a folder. rescue takes an ONNX file.")
    kind = kind_of_file(path)
    if kind in ("pickle", "safetensors"):
        raise InputError(f"{path} is a checkpoint: cnx-deploy export --checkpoint {path} makes an ONNX file of it.")
    if kind == "engine":
        raise InputError(f"{path} is {FILE_KINDS[kind][0]}. rescue takes an ONNX file.")


def _check_is_foreign(path: Path, facts: GraphFacts) -> None:
    """Raise InputError for a file of our own, by its metadata or by the manifest beside it."""
    origin = facts.metadata.get("cnx_deploy.weights_origin")
    is_ours = any(key.startswith("cnx_deploy.") for key in facts.metadata)
    if not is_ours and (artifact := recorded_artifact(path)) is not None:
        is_ours, origin = True, artifact.manifest.model.weights.origin
    if is_ours and origin == "onnx":
        raise InputError(f"{path} was written by cnx-deploy rescue: it is rescued already. Rescue its original.")
    if is_ours:
        raise InputError(
            f"{path} was written by cnx-deploy export: it has its islands already; for FP16 export with "
            "--precision fp16."
        )


def _is_open(axis: int | str) -> bool:
    return not isinstance(axis, int) or axis < 1


def _axis_name(axis: int | str, place: int) -> str:
    return str(axis) if axis else f"axis {place}"


def _check_axes(request: RescueRequest, facts: GraphFacts) -> None:
    """Raise InputError for a size of an axis that is not open, and for a batch beside the graph's fixed one."""
    axes = [(axis, place) for _, shape in facts.inputs.values() for place, axis in enumerate(shape)]
    names = dict.fromkeys(_axis_name(axis, place) for axis, place in axes if _is_open(axis))
    if unknown := [name for name in request.sizes if name not in names]:
        raise InputError(
            f"{request.file.name} has no open axis {', '.join(unknown)}; open are {', '.join(names) or 'none'}."
        )
    fixed = {axis for axis, place in axes if place == 0 and isinstance(axis, int) and axis > 0}
    if request.batch is not None and fixed and {*request.batch} != fixed:
        raise InputError(
            f"{request.file.name} has a fixed batch of {', '.join(map(str, sorted(fixed)))}; got "
            f"{':'.join(map(str, request.batch))}. Leave --batch (batch) out."
        )


def _proof_inputs(request: RescueRequest, facts: GraphFacts) -> tuple[list[Arrays], tuple[str, ...]]:
    """The inputs of the proof, at least two samples of each, and what was assumed of them."""
    if request.inputs is not None:
        return [_given_inputs(request.inputs, facts)], (f"The proof ran on {request.inputs}.",)
    assumed: dict[str, int] = {}
    kinds, shapes = {}, {}
    for name, (kind, shape) in facts.inputs.items():
        if kind not in ARRAY_TYPES:
            raise InputError(
                f"The input {name} of {request.file.name} is {kind} {list(shape)}; images and noise stand for "
                f"{', '.join(ARRAY_TYPES)} alone. Give arrays for all inputs with --inputs FILE.npz (inputs)."
            )
        kinds[name] = kind
        shapes[name] = tuple(_size(request, axis, place, len(shape), assumed) for place, axis in enumerate(shape))
    count = 1 if all(shape and shape[0] > 1 for shape in shapes.values()) else 2
    random = np.random.default_rng(request.seed)
    batches = [{name: _array(kinds[name], shapes[name], random) for name in shapes} for _ in range(count)]
    images = [name for name in shapes if _channel_axis(shapes[name]) is not None]
    notes = [f"The proof ran on {'images' if images else 'noise'} from seed {request.seed}."]
    if assumed:
        notes.append("Open axes were taken as " + ", ".join(f"{name} {size}" for name, size in assumed.items()) + ".")
    return batches, tuple(notes)


def _size(request: RescueRequest, axis: int | str, place: int, rank: int, assumed: dict[str, int]) -> int:
    """The size of an axis in the proof: its own, the one that was asked for, or one that is assumed and told."""
    if isinstance(axis, int) and axis > 0:
        return axis
    name = _axis_name(axis, place)
    if name in request.sizes:
        return request.sizes[name]
    assumed[name] = OPEN_BATCH if place == 0 else OPEN_SIDE if rank == 4 else OPEN_LENGTH
    return assumed[name]


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """1 or 3 where a shape is that of images, else None."""
    if len(shape) != 4:
        return None
    return next((axis for axis in (1, 3) if shape[axis] <= MAX_CHANNELS), None)


def _array(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Seeded images, normalised where they are floats; noise of mean 0 and variance 1 for other shapes."""
    axis = _channel_axis(shape)
    if axis is None:
        return random.standard_normal(shape).astype(np.float32)
    height, width = (side for place, side in enumerate(shape) if place not in (0, axis))
    made = image_like_batches(
        shape[0], (height, width), batch_size=shape[0], seed=int(random.integers(1 << 31)), in_chans=shape[axis]
    )
    images = next(iter(made)).numpy()
    images = images if axis == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images if kind == "UINT8" else ((images / 255.0 - MEAN) / STD).astype(np.float32)


def _given_inputs(path: Path, facts: GraphFacts) -> Arrays:
    """The arrays of a file, as many as the graph has inputs. Raises InputError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no .npz file of arrays ({error}). numpy.savez writes one.") from error
    if arrays.keys() != facts.inputs.keys():
        raise InputError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; expected an array for each input: "
            f"{', '.join(facts.inputs)}."
        )
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        kind, shape = facts.inputs[name]
        # An open axis is bound by the first array that has it.
        fits = array.size > 0 and array.ndim == len(shape)
        for axis, size in zip(shape, array.shape, strict=False):
            fits &= size == (sizes.setdefault(axis, size) if isinstance(axis, str) and axis else axis or size)
        element = np.dtype(ir.DataType[kind].numpy())
        if not fits or (array.dtype != element and not array.dtype.kind == element.kind == "f"):
            raise InputError(
                f"{path} holds {name} {array.dtype} {list(array.shape)}; the graph takes {element} {list(shape)}."
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{path} holds NaN or infinity in {name}; the proof needs finite numbers.")
    return {name: _as_float(array) for name, array in arrays.items()}


def _named(island: Island) -> str:
    return f"{island.node} ({', '.join(node.op_type for node in island.members)})"


def _told(counts: Mapping[str, int]) -> str:
    """`12 GRN, 22 LayerNorm, 1 pool, 0 not recognised`: every kind that is there, and always the last."""
    return ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in KINDS if counts.get(kind) or kind == KINDS[-1])


def _lines(result: Rescued) -> Iterator[str]:
    yield (
        f"{result.source}: opset {result.opset}, {result.source_precision.upper()}, {result.source_bytes / 1e6:.1f} MB"
    )
    yield f"found        {_told(result.islands)}"
    for text in result.not_recognised:
        yield f"  not recognised, kept in FP32: {text}"
    for kept in result.kept:
        yield f"  kept in FP32: {kept.node} ({kept.operator}): {kept.reason}"
    flushed = f", {result.flushed_weights} weights became zero" if result.flushed_weights else ""
    size = f"{result.size_bytes / 1e6:.1f} MB"
    manifest = "with its manifest" if result.artifact is not None else "without a manifest"
    yield f"written      {result.path} {manifest}, {size}, {result.casts} Casts at the islands' borders{flushed}"
    for title, results in (("FP32 twin", result.fp32), ("FP16", result.fp16)):
        for verdict in results:
            numbers = verdict.differences
            run_by = "ONNX Runtime" if title == "FP32 twin" else "emulator"
            told = f"relative L2 {numbers.relative_l2_max:.1e} (gate {verdict.gate.relative_l2_max:g}), "
            told += f"cosine {numbers.centred_cosine_min:.7f}"
            if numbers.top1_agreement is not None:
                told = f"{numbers.top1_agreement:.2%} equal"
            yield f"{title:12} {verdict.output}: {told}, in {run_by} against the original in FP32"
    if result.naive:
        yield f"naive FP16   {result.naive}"
    if result.not_run:
        yield f"FP16         not run: {result.not_run}"
    if result.compiled:
        yield f"{'compiled':12} {'kernels':>8} {'MB a sample':>12}"
    for name, made in result.compiled.items():
        yield f"  {name:10} {made.kernels:>8} {made.megabytes_per_image:>12.1f}  {made.target}, batch {made.batch}"
    for text in result.notes:
        yield f"Note: {text}"
