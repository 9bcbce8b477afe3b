"""A foreign ONNX file becomes an FP16 file whose norms are FP32 islands, and is proven before it is written.

The proof has two halves. The twin, the new graph with every half type FP32, has to give what the original gives: so no
function was changed. The FP16 file, operator by operator in the emulator, has to give it within FP16's gate.
"""

import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from cnx_deploy.core.artifacts import stage_artifact
from cnx_deploy.core.child_process import run_isolated
from cnx_deploy.core.errors import BuildError, CheckFailedError, InputError, OutputExistsError, ParityError
from cnx_deploy.core.gates import GATES, Differences, Gate, OutputSpec, ParityResult
from cnx_deploy.core.image_size import MAX_CHANNELS
from cnx_deploy.core.manifest import Compiled
from cnx_deploy.core.strict_json import typed
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data import image_like_batches
from cnx_deploy.exporters.graph_checks import GraphFacts, admit_onnx, check_graph, load_model
from cnx_deploy.exporters.onnx import EXTERNAL_DATA_BYTES
from cnx_deploy.exporters.rescue.conversion import Conversion, KeptNode, convert, prepared_model
from cnx_deploy.exporters.rescue.patterns import KINDS, Island
from cnx_deploy.exporters.trt.compiling import limits_for as compile_limits
from cnx_deploy.exporters.untrusted import limits_for
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.runners.ort_session import LOAD_ERRORS, STATE, open_session, trial_run
from cnx_deploy.verification.parity import RunningDifferences

__all__ = ["RescueRequest", "Rescued", "rescue_file"]

OPEN_BATCH, OPEN_SIDE, OPEN_LENGTH = 2, 224, 64
"""What stands for an open axis in the proof: the batch, a side of images, any other."""
MEAN, STD = 0.45, 0.225
"""Of the pixels of the proof's images, near those of ImageNet: what the network was trained with is not in the file."""
ARRAY_TYPES = {"FLOAT": "float32", "FLOAT16": "float16", "UINT8": "uint8"}
"""Element types of inputs that images or noise are made for."""

REFERENCE = "the original in FP32"

Arrays = dict[str, np.ndarray[Any, Any]]
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RescueRequest:
    """What to rescue and how it is proven.

    `inputs`: an .npz file with an array for each input of the graph, in place of seeded images. `sizes`: what stands
    for open axes in the proof, by the axis' name in the graph. `target` (such as "sm89"): compile the original, the
    naive FP16 file and the rescued one for this GPU at `batch`, and count kernels and bytes.
    """

    file: Path
    output_dir: Path = Path("export")
    name: str | None = None
    inputs: Path | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    target: str | None = None
    batch: int = 1
    seed: int = 0
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescued:
    """What was found in a file, what was written, and the proof.

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

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it; of compiled graphs the totals."""
        document = asdict(self)
        document |= {"source": str(self.source), "path": str(self.path)}
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
        InputError: an input is no image and no noise stands for it, so that `inputs` has to give one.
    """
    path, stem = request.file, f"{request.name or request.file.stem}-fp16"
    if (request.output_dir / f"{stem}.onnx").exists() and not request.force:
        raise OutputExistsError(
            f"{request.output_dir / stem}.onnx exists. Use --force to replace it, or another --name."
        )
    admission = admit_onnx(path, allows_half_reductions=True)
    batches, notes = _proof_inputs(request, admission.facts)
    halves = {name for name, (kind, _) in admission.facts.inputs.items() if kind == "FLOAT16"}
    shapes = {
        name: ("float16" if name in halves else str(array.dtype), array.shape) for name, array in batches[0].items()
    }
    trial_run(path, limits_for(admission.size_bytes), shapes)
    admission.check_unchanged()
    with stage_artifact(request.output_dir, stem) as staging, tempfile.TemporaryDirectory() as folder:
        rescued = staging.folder / f"{stem}.onnx"
        conversion = _written(path, rescued)
        counts = Counter(str(island.kind) for island in conversion.islands)
        note(f"{path.name}: {_told(counts)}")
        if not counts["GRN"] + counts["LayerNorm"]:
            raise CheckFailedError(
                f"{path.name} holds nothing to rescue: no GRN and no LayerNorm was recognised ({_told(counts)}). "
                "Nothing was written."
            )
        facts = check_graph(rescued)
        proof = _Proof(path, Path(folder), rescued, batches, note)
        result = Rescued(
            source=str(path),
            path=request.output_dir / rescued.name,
            opset=facts.opset,
            source_precision="fp16" if proof.is_half else "fp32",
            source_bytes=admission.size_bytes,
            size_bytes=sum(file.stat().st_size for file in staging.folder.iterdir()),
            islands=dict(counts),
            not_recognised=tuple(_named(island) for island in conversion.islands if island.kind == "not recognised"),
            kept=conversion.kept,
            casts=conversion.casts,
            dropped_casts=conversion.dropped_casts,
            flushed_weights=conversion.flushed_weights,
            inputs={name: (str(array.dtype), array.shape) for name, array in batches[0].items()},
            fp32=proof.twin(),
            **proof.half(),
            notes=notes,
            compiled=proof.compiled(request.target, request.batch) if request.target else {},
        )
        for file in sorted(staging.folder.iterdir(), reverse=True):
            file.replace(request.output_dir / file.name)
    return result


class _Proof:
    """The rescued file against the original, on the same inputs; files that only the proof needs lie in `folder`."""

    def __init__(self, source: Path, folder: Path, rescued: Path, batches: Sequence[Arrays], note: Note) -> None:
        self._folder, self._rescued, self._batches, self._note = folder, rescued, batches, note
        self._source = source
        model = load_model(source)
        self.is_half = any(
            value.dtype == ir.DataType.FLOAT16 for value in (*model.graph.inputs, *model.graph.initializers.values())
        )
        del model
        self.original = source
        if self.is_half:
            self.original = folder / "widened.onnx"
            _save(prepared_model(source), self.original)
        self._expected = _outputs(self.original, batches)

    def twin(self) -> tuple[ParityResult, ...]:
        """The verdict over the rewritten graph in FP32. Raises ParityError where it fails."""
        if self.is_half:
            self._check_widened()
        path = self._folder / "twin.onnx"
        _written(self._source, path, half=ir.DataType.FLOAT)
        results = _verdicts(_outputs(path, self._batches), self._expected, GATES["fp32"], "FP32 twin", self._batches)
        _check_passed(results, f"The rewritten graph of {self._source.name} is another function than the original")
        return results

    def half(self) -> dict[str, Any]:
        """The fields of `Rescued` on FP16: verdicts, what the naive file gives, or why it was not run."""
        naive = self._folder / "naive.onnx"
        _written(self._source, naive, keeps_islands=False)
        try:
            outputs, _ = _emulated(self._rescued, self._batches)
        except InputError as error:
            return {"not_run": str(error)}
        results = _verdicts(outputs, self._expected, GATES["fp16"], "emulator fp16", self._batches)
        _check_passed(results, f"The FP16 file of {self._source.name} differs from the original in the emulator")
        outputs, broken = _emulated(naive, self._batches)
        measured = _verdicts(outputs, self._expected, GATES["fp16"], "naive fp16", self._batches)
        worst = max(measured, key=lambda result: (not result.passed, result.differences.relative_l2_max))
        told = f"relative L2 {worst.differences.relative_l2_max:.1e}"
        if not worst.differences.all_finite:
            told = f"{worst.differences.nonfinite_count} values are NaN or infinite"
        elif not worst.passed:
            told = "; ".join(worst.failures)
        return {"fp16": results, "naive": f"{told}, first not finite in {broken}" if broken else told}

    def compiled(self, target: str, batch: int) -> dict[str, Compiled]:
        """Kernels and bytes of the original in FP32, of the naive FP16 file and of the rescued one."""
        files = {"original": self.original, "naive": self._folder / "naive.onnx", "rescued": self._rescued}
        made = {}
        for name, path in files.items():
            self._note(f"Compiling the {name} graph for {target}")
            answer = run_isolated(
                "cnx_deploy.exporters.trt.compiling:measure_task",
                {"onnx": str(path.resolve()), "target": target, "batch": batch},
                compile_limits(path.stat().st_size),
                what=f"Compiling the {name} graph of {self._source.name}",
                failure=BuildError,
            )
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
            results = _verdicts(given, self._expected, GATES["fp16"], "the half file itself", batches)
            _check_passed(results, f"{self._source.name} in FP32 is another function than the file itself")


def _written(
    source: Path, path: Path, *, half: ir.DataType = ir.DataType.FLOAT16, keeps_islands: bool = True
) -> Conversion:
    model = prepared_model(source)
    conversion = convert(model, half, keeps_islands=keeps_islands)
    _save(model, path)
    return conversion


def _save(model: ir.Model, path: Path) -> None:
    """Weights beyond the limit of `exporters.onnx` go to a file beside it."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None)


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


def _emulated(path: Path, batches: Sequence[Arrays]) -> tuple[list[Arrays], str | None]:
    """What the emulator gives, and the first operator whose result is not finite. InputError for an unknown one."""
    graph, found, broken = Graph(path), [], None
    for batch in batches:
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        with torch.inference_mode():
            evaluation = graph.evaluate(tensors)
        found.append({name: _as_float(evaluation.tensors[name].numpy()) for name in graph.outputs})
        broken = broken or evaluation.first_nonfinite
    return found, broken


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
    name = str(axis) if axis else f"axis {place}"
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
    yield f"written      {result.path}, {size}, {result.casts} Casts at the islands' borders{flushed}"
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
