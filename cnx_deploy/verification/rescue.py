"""A foreign ONNX file becomes an FP16 file whose norms are FP32 islands, and is proven before it is written.

The proof has two halves. The twin, the new graph with every half type FP32, has to give what the original gives: so no
function was changed. The FP16 file, operator by operator in the emulator, has to give it within FP16's gate.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from cnx_deploy.core.artifacts import artifact_stem, stage_artifact
from cnx_deploy.core.class_names import check_class_count, names_of
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import (
    CheckFailedError,
    CorruptArtifactError,
    InputError,
    OutputExistsError,
)
from cnx_deploy.core.gates import ParityResult
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
from cnx_deploy.core.preprocessing import ASSUMED, Preprocessing, given_per_channel
from cnx_deploy.exporters.graph_checks import GraphFacts, admit_onnx, check_graph
from cnx_deploy.exporters.onnx import facts_record
from cnx_deploy.exporters.rescue.conversion import KeptNode, convert, prepared_model, save_model
from cnx_deploy.exporters.rescue.patterns import KINDS, Island, applied_activation
from cnx_deploy.exporters.untrusted import hash_onnx, limits_for
from cnx_deploy.model.checkpoint import FOREIGN_LICENCE
from cnx_deploy.model.tasks.base import Task, find_task
from cnx_deploy.runners.ort_session import trial_run
from cnx_deploy.verification.rescue_proof import Proof
from cnx_deploy.verification.rescue_request import (
    OPEN_RANGE,
    Arrays,
    Note,
    RescueRequest,
    check_axes,
    check_is_foreign,
    check_is_onnx,
    is_open,
    proof_inputs,
)

__all__ = ["RescueRequest", "Rescued", "rescue_file"]

UNKNOWN = {"mean": 0.0, "std": 1.0}
"""What a manifest holds where nobody said it, beside the origin `ASSUMED`: pixels as they are."""
SCORES = ("logits", "probabilities")
ROW_SUM_TOLERANCE = 1e-3
"""By how much the probabilities of an image may miss a sum of 1: half a file rounds each by at most 5e-4 of itself."""

IMAGE_FIELDS = ("mean", "std", "crop_ratio", "crop_mode", "interpolation")
"""What a file does not say of its images."""
NO_MANIFEST = (
    "No manifest was written, for {}: verify, bench, build-trt and predict take images and float outputs alone. "
    "`cnx-deploy inspect --compile` compiles the file."
)
FORM = 1
"""The version of the conversion."""


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
    check_is_onnx(path)
    admission = admit_onnx(path, allows_half_reductions=True)
    check_is_foreign(path, admission.facts)
    kinds = {kind for kind, _ in admission.facts.inputs.values()} | admission.facts.types.keys() & {"BFLOAT16"}
    if other := sorted(kinds & {"BFLOAT16", "DOUBLE"}):
        raise InputError(
            f"{path.name} computes in {' and '.join(other)}, and rescue takes FLOAT and FLOAT16. Export it in FP32."
        )
    check_axes(request, admission.facts)
    batches, notes = proof_inputs(request, admission.facts)
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
            is_open(axis) for _, axes in admission.facts.inputs.values() for axis in axes[1:]
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
        proof = Proof(path, Path(folder), staging.folder / f"{stem}.onnx", batches, note)
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
    if request.pad_value is not None:
        given["pad_value"] = given_per_channel(request.pad_value, ends.channels)
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
