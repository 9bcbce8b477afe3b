"""The Python API: what each command does, as one function. `import cnx_deploy` hands these names on, lazily.

Every function takes plain values, returns a typed record that prints itself, and writes only where it is told to.
"""

import difflib
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from cnx_deploy.core.artifacts import find_artifacts, open_artifact, select_artifacts
from cnx_deploy.core.class_names import ClassNames, names_of
from cnx_deploy.core.deploy_spec import DeploySpec, InputKind, Layout, TestTimeAugmentation
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.image_size import ImageSize
from cnx_deploy.core.manifest import Artifact, EngineManifest, OnnxManifest
from cnx_deploy.core.precision import find_precision
from cnx_deploy.core.system import this_machine
from cnx_deploy.core.targets import find_target
from cnx_deploy.core.thresholds import ASSUMED_THRESHOLD, Thresholds, thresholds_of
from cnx_deploy.data import ImageSource, image_source, images_to_run
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import default_targets, load_backend, require_gpu
from cnx_deploy.exporters.trt.builder import BuildSpec
from cnx_deploy.exporters.trt.builder import build_engine as build_one_engine
from cnx_deploy.exporters.trt.compiling import limits_for
from cnx_deploy.model.checkpoint import ModelRequest
from cnx_deploy.model.deploy import check_parts
from cnx_deploy.model.recorded import model_record, recorded_task
from cnx_deploy.runners.registry import find_runner
from cnx_deploy.verification.metrics import Verification, table_of
from cnx_deploy.verification.predict import Model, open_predictor
from cnx_deploy.verification.saved_results import SavedResults, save_for_polygraphy
from cnx_deploy.verification.source_processor import compare_with_source
from cnx_deploy.verification.verify import Progress, Reference, verify_artifact, verify_export

if TYPE_CHECKING:
    from cnx_deploy.bench.record import BenchmarkRecord
    from cnx_deploy.diagnosis.headroom import Headroom
    from cnx_deploy.model.tasks.multi_label_metrics import ThresholdFit
    from cnx_deploy.training import TrainingResult
    from cnx_deploy.verification.inspect import Inspection
    from cnx_deploy.verification.rescue import Rescued
    from cnx_deploy.verification.temperature import TemperatureFit

__all__ = [
    "BuildRequest", "ExportRequest", "Model", "VerifyReport", "VerifyRequest", "benchmark", "build_engine", "evaluate",
    "export", "fit_temperature", "fit_thresholds", "headroom", "inspect", "load", "predict", "rescue", "run_builds",
    "run_exports", "run_verifications", "train", "verify",
]  # fmt: skip

Note = Callable[[str], None]
Source = Artifact | Path | str
"""An artifact, or the path of one."""
Request = TypeVar("Request")
START = ("checkpoint", "init", "soup", "pretrained", "reset_head", "ema", "entry")
"""What `train` takes of weights to start from."""
Images = Any
"""A path, a PIL image, an array or a tensor; or a list of them. See `Model.predict`."""


def _silent(text: str) -> None:
    """Take a line and say nothing: what a function notes is printed by who asks for it with `note=print`."""


@overload
def export(variant: str, *, precision: str = "fp16", **options: Any) -> Artifact[OnnxManifest]: ...
@overload
def export(variant: str, *, precision: tuple[str, ...], **options: Any) -> list[Artifact[OnnxManifest]]: ...
def export(
    variant: str, *, precision: str | tuple[str, ...] = "fp16", note: Note = _silent, **options: Any
) -> Artifact[OnnxManifest] | list[Artifact[OnnxManifest]]:
    """Export a variant to ONNX, compare the file with PyTorch and write its manifest, as `cnx-deploy export` does.

    Args:
        variant: one of `cnx-deploy variants`, for example "atto".
        precision: "fp32", "fp16" or "bf16", or several of them for several files from one load of the weights.
        note: is told what was chosen or assumed, a line at a time; `print` shows it.
        **options: fields of `ExportRequest`: checkpoint, soup, ema, entry, pretrained, task, outputs, image_size,
            batch, keep_fp32, tta, temperature, output_dir, force …

    Returns:
        The artifact, or a list of them where several precisions were asked for.

    Raises:
        ParityError: the file differs from PyTorch by more than its gate; nothing is written.
        OutputExistsError: other inputs made what is there; `force=True` replaces it.
    """
    precisions = (precision,) if isinstance(precision, str) else tuple(precision)
    made = run_exports(_request(ExportRequest, options, variant=variant, precisions=precisions), note)
    return made[0] if isinstance(precision, str) else made


def build_engine(
    onnx: Source, *, target: str = "current", note: Note = _silent, **options: Any
) -> Artifact[EngineManifest]:
    """Build a TensorRT engine from an exported file, as `cnx-deploy build-trt` does.

    Args:
        onnx: an exported artifact, or its path.
        target: the GPU by its compute capability, such as "sm89", or by its name, such as "RTX 4090"; "current" is this
            machine's GPU.
            TensorRT-RTX builds for another GPU on a machine without one.
        note: is told what is built, a line at a time.
        **options: fields of `BuildRequest`: batches, runtime, allow_tf32, output_dir, force.

    Raises:
        BuildError: TensorRT makes no engine, or one that computes in another precision than the file says.
    """
    request = _request(BuildRequest, options, files=(_path_of(onnx),), targets=(target,))
    return run_builds(request, note)[0]


def verify(
    artifacts: Source | Sequence[Source] = (), *, note: Note = _silent, progress: Progress | None = None, **options: Any
) -> "VerifyReport":
    """Compare ONNX files and engines with PyTorch, as `cnx-deploy verify` does; by default everything recorded.

    Args:
        artifacts: artifacts or paths; none means everything in `export/` and `engines/`.
        note: is told what is verified, a line at a time.
        progress: is told a text and the images done.
        **options: fields of `VerifyRequest`: data, samples, runners, export_dir, engines_dir, save_outputs …

    Returns:
        The report; `report.passed` says whether every gate held, `print(report)` shows the table.

    Raises:
        MissingRequirementError: an engine was named and cannot run here.
    """
    request = _request(VerifyRequest, options, files=_paths_of(artifacts))
    return VerifyReport(tuple(run_verifications(request, note, progress)))


def benchmark(
    artifacts: Source | Sequence[Source] = (),
    *,
    batch: int | Sequence[int] = (1, 8),
    compare: Sequence[str] = (),
    note: Note = _silent,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> "BenchmarkRecord":
    """Time ONNX files and engines in turns with PyTorch and others, as `cnx-deploy bench` does.

    Args:
        artifacts: artifacts or paths; none means everything recorded.
        batch: images a call; several are measured one after the other.
        compare: peers in the same turns: "torch", "compile", "timm", "timm-whole", "timm-18"; first the baseline.
        note: is told of recorded artifacts that are not here, and of reasons to doubt the figures.
        progress: is told a text and the share that is done.
        **options: fields of `bench.comparison.BenchSpec`: duration_seconds, threads, spin, seed, sweep_to …

    Returns:
        The record with latencies in milliseconds and images a second; `print(record)` shows the table.
    """
    from cnx_deploy.bench.comparison import BenchSpec, run_benchmark

    batches = (batch,) if isinstance(batch, int) else tuple(batch)
    options.setdefault("omp_threads", os.environ.get("OMP_NUM_THREADS"))
    spec = _request(BenchSpec, options, files=_paths_of(artifacts), batches=batches, compare=tuple(compare))
    return run_benchmark(spec, note, progress)


def load(
    model: Source,
    *,
    device: str = "cpu",
    class_names: ClassNames | None = None,
    white_level: float | None = None,
    image_size: ImageSize | None = None,
    ema: bool | None = None,
    entry: str | None = None,
    soup: Sequence[Path | str] = (),
    tta: TestTimeAugmentation | None = None,
    temperature: float = 1.0,
    task: str | None = None,
    outputs: Sequence[str] = (),
    thresholds: Thresholds | None = None,
) -> Model:
    """Open a checkpoint, an ONNX file or an engine to predict with; use the model as a context manager.

    Args:
        model: an artifact or a path; what the file is, is told by its content.
        device: "cpu" or "cuda" for checkpoints and ONNX files; an engine runs on its GPU.
        class_names: the names of its outputs in their order, or a file of them; None takes what it records.
        white_level: the stored value that is white, such as 4095 for 12 bits; None takes what it records.
        image_size: side of a square in pixels, or (height, width), for a checkpoint or a file of open sizes.
        ema: True takes the averaged weights of a checkpoint, False its plain ones.
        entry: which of several networks of a checkpoint, such as "teacher".
        soup: checkpoints whose mean with this one the weights are.
        tta: "flip" answers the mean over an image and its left-right mirror; a file keeps what it was exported with.
        temperature: what the logits of a checkpoint are divided by, see `fit_temperature`.
        task: what a checkpoint is taken for: "features" leaves its head out. None takes what it records.
        outputs: what a checkpoint gives, such as ("embedding", "maps"); a file keeps what it was exported with.
        thresholds: the probability from which each label is given: one number, one a label, or a file of them; None
            takes what it records.

    Raises:
        CorruptArtifactError: the file is not what its manifest says.
        RefusedArtifactError: an engine without a manifest, which could run anything.
    """
    words: dict[str, Any] = {"class_names": names_of(class_names), "white_level": white_level, "image_size": image_size}
    words |= {"ema": ema, "entry": entry, "soup": tuple(soup), "tta": tta, "temperature": temperature}
    words |= {
        "task": task,
        "outputs": (outputs,) if isinstance(outputs, str) else tuple(outputs),
        "thresholds": thresholds,
    }
    return open_predictor(_path_of(model), many=True, device=device, **words)


def predict(model: Source, images: Images, *, top: int | None = None, **options: Any) -> Any:
    """Answer for images with a checkpoint, an ONNX file or an engine; see `Model.predict`, and `load` for options."""
    with load(model, **options) as opened:
        return opened.predict(images, top=top)


def evaluate(
    model: Source,
    data: Path | str | ImageSource,
    *,
    image_folder: Path | str | None = None,
    reduce_zero_label: bool = False,
    batch_size: int = 32,
    note: Note = _silent,
    **options: Any,
) -> Any:
    """Count what is right on labelled images, as `cnx-deploy eval` does.

    Args:
        model: an artifact or a path of a checkpoint, an ONNX file or an engine.
        data: a folder with a folder of images for each class, a CSV file, or a `data.ImageSource` with labels; of
            segmentation a folder of pictures and masks, of detection COCO's JSON.
        image_folder: where a CSV file's relative paths and ids begin; None: at the file's own folder.
        reduce_zero_label: of masks, 0 is not counted and each value is one class lower, as in ADE20K.
        batch_size: images run at once.
        note: is told how the data were understood and what was assumed, a sentence each; the result's `notes`.
        **options: device, class_names, white_level, image_size, ema, entry, soup, tta and temperature, see `load`.

    Returns:
        What the model's task counts: `model.tasks.classification_metrics.Evaluation` of a classifier,
        `multi_label_metrics.MultiLabelEvaluation` of several labels an image,
        `segmentation_metrics.SegmentationEvaluation` and `detection_metrics.DetectionEvaluation`.
    """
    words: dict[str, Any] = {"image_folder": image_folder, "batch_size": batch_size, "note": note, **options}
    return _evaluated(model, data, reduce_zero_label=reduce_zero_label, **words)[0]


def fit_temperature(model: Source, data: Path | str | ImageSource, **options: Any) -> "TemperatureFit":
    """Find the number to divide a classifier's logits by, as `cnx-deploy eval --fit-temperature` does.

    Args:
        model: an artifact or a path of a checkpoint, an ONNX file or an engine.
        data: labelled images that the network was not trained on.
        **options: as for `evaluate`.

    Returns:
        The fit: its `temperature` is for `export(..., temperature=...)`.

    Raises:
        InputError: no temperature from 0.01 to 100 fits best, or the task has no logits of classes.
    """
    fit: TemperatureFit = _evaluated(model, data, fits="temperature", **options)[1]
    return fit


def fit_thresholds(model: Source, data: Path | str | ImageSource, **options: Any) -> "ThresholdFit":
    """Find the probability from which each label is given, as `cnx-deploy eval --fit-thresholds` does.

    Args:
        model: an artifact or a path of a network with several labels an image.
        data: labelled images that the network was not trained on.
        **options: as for `evaluate`.

    Returns:
        The fit: its `thresholds` are for `export(..., thresholds=...)`, and `save` writes them.
    """
    fit: ThresholdFit = _evaluated(model, data, fits="thresholds", **options)[1]
    return fit


def train(
    data: Path | str, variant: str = "atto", *, recipe: str = "plain", note: Note = _silent, **options: Any
) -> "TrainingResult":
    """Train a variant on an image folder, as `cnx-deploy train` does; needs the extra `train`.

    Args:
        data: a folder with a folder of images for each class, or a CSV file.
        variant: one of `cnx-deploy variants`.
        recipe: a preset of the papers, or "plain".
        note: is told how the data were understood, what is left out and what weights bring, a sentence each.
        **options: fields of `training.spec.TrainingSpec`, which replace the recipe's: epochs, image_size, batch_size …;
            and the weights to start from as `training.initial_model` takes them: init, checkpoint, pretrained, ema …

    Returns:
        The run: its folder, its best checkpoint and accuracy in percent.
    """
    from cnx_deploy import training

    sources = {name: options.pop(name) for name in START if name in options}
    spec = training.spec_from_recipe(Path(data), variant, recipe, **_with_paths(options))
    dataset = training.find_training_images(spec)
    loaded = training.initial_model(spec, **_with_paths(sources))
    for text in (*dataset.notes, *training.balance_lines(spec, dataset), *(loaded.notes if loaded is not None else ())):
        note(text)
    result = training.train(spec, loaded, dataset=dataset)
    for text in dataset.observed():
        note(text)
    return result


def headroom(checkpoint: Path | str | None = None, *, note: Note = _silent, **options: Any) -> "Headroom":
    """Measure how far a network's tensors are from what FP16 can hold, as `cnx-deploy diagnose headroom` does.

    Args:
        checkpoint: weights; without it `variant` or `pretrained` in `options` name some.
        note: is told what was assumed.
        **options: fields of `HeadroomRequest`: variant, pretrained, data, samples, image_size, margin …
    """
    from cnx_deploy.diagnosis.headroom import HeadroomRequest, run_headroom

    path = Path(checkpoint) if checkpoint is not None else None
    return run_headroom(_request(HeadroomRequest, options, checkpoint=path), note)


def rescue(file: Path | str, *, note: Note = _silent, **options: Any) -> "Rescued":
    """Write any ONNX file in FP16 with its GRN and LayerNorm in FP32, and prove it, as `cnx-deploy rescue` does.

    Args:
        file: an ONNX file of any exporter, in FP32 or in half, whose origin nobody has to know.
        note: is told what is done, a line at a time.
        **options: fields of `verification.rescue.RescueRequest`: output_dir, name, inputs, sizes, target, force …

    Returns:
        What was found, what was written and the proof; `print` shows it.

    Raises:
        CheckFailedError: the file holds no GRN and no LayerNorm.
        ParityError: the result differs from the original; nothing is written.
    """
    from cnx_deploy.verification.rescue import RescueRequest, rescue_file

    if not isinstance(file, str | os.PathLike):
        raise InputError(f"rescue takes the path of an ONNX file; got {file!r}.")
    return rescue_file(_request(RescueRequest, options, file=Path(file)), note)


def inspect(file: Source) -> "Inspection":
    """Say what a file is, from its content and its manifest, as `cnx-deploy inspect` does; nothing in it is run."""
    from cnx_deploy.verification.inspect import inspect_file

    return inspect_file(_path_of(file))


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found of each artifact; `print` shows it as a table."""

    results: tuple[Verification, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing that ran has failed. What could not be run here is in `not_run` of its result."""
        return all(result.passed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return {"verifications": [result.to_dict() for result in self.results]}

    def __str__(self) -> str:
        return "\n".join(table_of(self.results))


def _evaluated(
    model: Source,
    data: Path | str | ImageSource,
    *,
    image_folder: Path | str | None = None,
    reduce_zero_label: bool = False,
    batch_size: int = 32,
    note: Note = _silent,
    fits: Literal["temperature", "thresholds"] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    from cnx_deploy.verification.temperature import evaluate_model

    folder = None if image_folder is None else Path(image_folder)
    with load(model, **options) as opened:
        images = image_source(data, folder, targets=opened.task.targets, reduce_zero_label=reduce_zero_label)
        words: dict[str, Any] = {} if fits is None else {f"fits_{fits}": True}
        return evaluate_model(opened, images, batch_size=batch_size, note=note, **words)


def _path_of(source: Source) -> Path:
    return source.path if isinstance(source, Artifact) else Path(source)


def _with_paths(options: dict[str, Any]) -> dict[str, Any]:
    """The same options with the path of a file or folder as one, where it is given as text."""
    names = (
        "checkpoint", "init", "output_dir", "export_dir", "engines_dir", "save_inputs", "save_outputs", "data",
        "image_folder", "inputs", "thresholds",
    )  # fmt: skip
    more: dict[str, Any] = {"soup": tuple(map(Path, options["soup"]))} if "soup" in options else {}
    more |= {name: Path(value) for name, value in options.items() if name in names and isinstance(value, str)}
    return {**options, **more}


def _request(kind: type[Request], options: dict[str, Any], **known: Any) -> Request:
    """The request of a kind; InputError for an option that it does not have."""
    names = sorted({each.name for each in fields(kind)} - known.keys())  # type: ignore[arg-type]
    if unknown := sorted(options.keys() - set(names)):
        close = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.4)
        raise InputError(
            f"There is no option {unknown[0]!r}{f'; did you mean {close[0]}?' if close else '.'} The options are "
            f"{', '.join(names)}."
        )
    return kind(**known, **_with_paths(options))


def _paths_of(sources: Source | Sequence[Source]) -> tuple[Path, ...]:
    several = (sources,) if isinstance(sources, Artifact | Path | str) else sources
    return tuple(_path_of(source) for source in several)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest(ModelRequest):
    """What `cnx-deploy export` takes; see `exporters.onnx.ExportSpec` and `core.deploy_spec.DeploySpec`.

    `batch` None is the task's usual range. `keep_fp32` is of the half-precision files alone. `task` "features" takes a
    classifier's weights without the head. `outputs` are the task's words for what the file gives, such as ("logits",
    "embedding"). `image_size` of three, (smallest, typical, largest), leaves height and width open between the first
    and the last.
    """

    precisions: tuple[str, ...] = ("fp32", "fp16")
    image_size: Any = None
    batch: tuple[int, int, int] | None = None
    input_kind: InputKind = "float"
    optimize_for: Layout | None = None
    leave_out: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    tta: TestTimeAugmentation | None = None
    temperature: float = 1.0
    outputs: tuple[str, ...] = ()
    thresholds: Thresholds | None = None
    output_dir: Path = Path("export")
    name: str | None = None
    no_verify: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What `cnx-deploy build-trt` takes. Without `files`, every FP16 file recorded in `export_dir`.

    `batches` empty means the range that each file was exported for; `targets` empty means this machine's GPU, or
    without one `trt.backend.DEFAULT_TARGETS`.
    """

    files: tuple[Path, ...] = ()
    export_dir: Path = Path("export")
    output_dir: Path = Path("engines")
    runtime: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    targets: tuple[str, ...] = ()
    batches: tuple[tuple[int, int, int], ...] = ()
    allow_tf32: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """What `cnx-deploy verify` takes. Without `files`, everything recorded in both folders.

    `data`: a folder of images or of one for each class, a CSV file or a `data.ImageSource`; `image_folder`: where a CSV
    file's paths begin. Images with labels, and those of a network that gives an embedding, are all used unless
    `samples` limits them; otherwise, and without `data`, None is 64. `runners`: see `verification.verify_artifact`.
    `save_inputs`: folder for images and PyTorch's outputs in Polygraphy's formats, one folder a network; of labelled
    images 64, or `samples`. `save_outputs`: new folder for the outputs of both sides, to be judged again. `class_names`
    and `white_level` take the place of what the artifacts record, see `load`.
    """

    files: tuple[Path, ...] = ()
    export_dir: Path = Path("export")
    engines_dir: Path = Path("engines")
    data: Path | str | ImageSource | None = None
    image_folder: Path | None = None
    samples: int | None = None
    save_inputs: Path | None = None
    save_outputs: Path | None = None
    runners: tuple[str, ...] = ()
    class_names: ClassNames | None = None
    white_level: float | None = None


def run_exports(request: ExportRequest, note: Note) -> list[Artifact[OnnxManifest]]:
    """Export one model in each precision asked for; each file is compared with PyTorch before it is put into place."""
    halves = [name for name in request.precisions if find_precision(name).has_islands]
    if request.keep_fp32 and not halves:
        raise InputError("--keep-fp32 is of half-precision files, and none is asked for. Add --precision fp16 or bf16.")
    size_range = None
    if isinstance(request.image_size, tuple | list) and len(request.image_size) == 3:
        smallest, typical, largest = request.image_size
        size_range, request = (smallest, largest), replace(request, image_size=typical)
    loaded, preprocessing = request.load(note)
    if request.thresholds is not None:
        given = thresholds_of(request.thresholds, loaded.class_names, loaded.model.num_classes)
        loaded.model.task = loaded.model.task.with_thresholds(given)
    if loaded.model.task.takes_label_sets:
        cuts = loaded.model.task.thresholds
        told = f"Thresholds of {len(cuts)} labels: {min(cuts):.4g} to {max(cuts):.4g}." if cuts else ASSUMED_THRESHOLD
        note(told)
    check_parts(request.keep_fp32, loaded.model.variant)
    task = loaded.model.task.name
    name = request.name or (None if task == "classification" else f"{loaded.model.variant.name}-{task}")
    made = []
    for precision in request.precisions:
        deploy = DeploySpec(
            precision=precision,
            image_size=preprocessing.image_size,
            input_kind=request.input_kind,
            layout=request.optimize_for,
            leave_out=request.leave_out,
            keep_fp32=request.keep_fp32 if precision in halves else (),
            mean=preprocessing.mean,
            std=preprocessing.std,
            size_range=size_range,
            tta=request.tta,
            temperature=request.temperature,
            outputs=request.outputs,
        )
        loaded.model.task.check_allowed(deploy)  # before what is there already is looked at
        spec = ExportSpec(deploy=deploy, batch=request.batch or loaded.model.task.usual_batch, name=name)
        record = model_record(loaded, preprocessing, request.output_dir)
        check = None if request.no_verify else partial(verify_export, model=loaded.model)
        artifact = export_onnx(loaded.model, record, spec, request.output_dir, force=request.force, verify=check)
        gc.collect()  # the exporter's graphs are cycles that hold the weights: huge in two precisions needs them gone
        if artifact.reused:
            note(f"{artifact.path} is there and was made from the same inputs: reused")
        else:
            parity = artifact.manifest.facts.worst_parity
            error = (
                f"relative L2 {parity.differences.relative_l2_max:.1e} against PyTorch" if parity else "not verified"
            )
            note(f"{artifact.path} ({artifact.size_bytes / 1e6:.1f} MB), {error}")
        made.append(artifact)
    return made


def run_builds(
    request: BuildRequest, note: Note, progress: Callable[[str, float], None] | None = None
) -> list[Artifact[EngineManifest]]:
    """Build an engine for each file and target.

    Raises InputError when there is nothing to build from, and whatever `trt.builder.build_engine` raises.
    """
    sources = [open_artifact(path) for path in request.files] or [
        artifact for artifact in find_artifacts(request.export_dir, "onnx") if artifact.manifest.precision.has_islands
    ]
    present = [artifact for artifact in sources if artifact.path.is_file()]
    if not present:
        raise InputError(
            f"No FP16 ONNX file is recorded and present in {request.export_dir}. "
            "Run `cnx-deploy export --variant atto` first, or name the files to build from."
        )
    backend = load_backend(request.runtime)
    targets = tuple(map(find_target, request.targets)) or default_targets(backend)
    engines = []
    for artifact in present:
        batches = request.batches or (artifact.manifest.batch,)
        for target in targets:
            spec = BuildSpec(runtime=backend.name, target=target, batches=batches, allow_tf32=request.allow_tf32)
            note(f"Building {artifact.path.name} for {target} with {backend.name} {backend.version}")
            limits = limits_for(artifact.size_bytes)
            words = (artifact, spec, request.output_dir)
            engine = build_one_engine(*words, force=request.force, progress=progress, limits=limits)
            engines.append(engine)
            size = f"{engine.manifest.files[0].size_bytes / 1e6:.1f} MB"
            note(f"  {engine.path} ({'made from the same inputs: reused' if engine.reused else size})")
    return engines


def run_verifications(request: VerifyRequest, note: Note, progress: Progress | None = None) -> list[Verification]:
    """Verify each artifact; the PyTorch reference of a network is computed once.

    Raises MissingRequirementError when an engine that was named cannot run here.
    """
    if request.image_folder is not None and request.data is None:
        raise InputError(f"No table is given whose paths begin at {request.image_folder}. Add --data (data).")
    found: list[Verification] = []
    told: set[int] = set()
    saved = SavedResults(request.save_outputs) if request.save_outputs is not None else None
    reference: Reference | None = None
    words: dict[str, Any] = {"class_names": names_of(request.class_names), "white_level": request.white_level}
    for artifact in select_artifacts(request.files, request.export_dir, request.engines_dir, note):
        note(f"Verifying {artifact.path.name}")
        if request.files and artifact.manifest.kind == "engine":
            require_gpu()  # an engine that was named is asked for; before any weight is loaded
        if reference is None or not reference.matches(artifact):
            task = recorded_task(artifact.manifest.model)
            images = (
                None
                if request.data is None
                else images_to_run(request.data, request.image_folder, targets=task.targets)
            )
            reference, told = Reference(artifact, images, request.samples, **words), set()
            for text in (*reference.images.notes, *reference.assumed):
                note(text)
        runners, unfit = _fitting(request, artifact)
        if unfit and not runners:
            found.append(Verification(artifact.path.name, artifact.manifest.kind, (), not_run=unfit))
            continue
        verification = verify_artifact(artifact, reference, progress, runners=runners, saved=saved)
        check, record = compare_with_source(artifact), artifact.manifest.model
        assumption = record.preprocessing.assumption(record.origins) if request.data is not None else None
        has_failed = check is not None and not check.passed
        more = (
            _outdated(artifact, request.export_dir),
            assumption,
            None if has_failed or check is None else str(check),
        )
        verification = replace(
            verification,
            notes=(*verification.notes, *filter(None, more)),
            failures=(str(check),) if has_failed else (),
        )
        if request.files and verification.not_run:
            raise MissingRequirementError(f"{artifact.path.name}: {verification.not_run[0]}")
        found.append(verification)
        if saved is not None:
            saved.finish(artifact, verification.not_run, verification.notes, verification.failures)
        if request.save_inputs is not None and artifact.manifest.kind == "onnx":
            folder = request.save_inputs / artifact.manifest.stem
            save_for_polygraphy(folder, reference.pairs(artifact, progress=progress))
            note(f"  images and PyTorch's outputs for `polygraphy run`: {folder}")
        for index in sorted(set(reference.broken) - told):
            told.add(index)
            note(f"  left out: {reference.broken[index].reason}")
    return found


def _fitting(request: VerifyRequest, artifact: Artifact) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The runners asked for that fit a recorded file, and why others do not; a file that was named takes them all."""
    if request.files or artifact.manifest.kind != "onnx":
        return request.runners, ()
    machine = this_machine()
    reasons = {name: find_runner(name).reason_against(artifact, machine) for name in request.runners}
    fitting = tuple(name for name, reason in reasons.items() if reason is None)
    return fitting, tuple(str(reason) for reason in reasons.values() if reason is not None)


def _outdated(engine: Artifact, export_dir: Path) -> str | None:
    """What to say of an engine whose ONNX file was exported again since."""
    name = engine.manifest.source_name
    if engine.manifest.kind != "engine" or Path(name).name != name or not Path(name).suffix:
        return None  # a manifest that lies: `verify records` says what of
    if not os.path.isfile(export_dir / Path(name).with_suffix(".json")):  # noqa: PTH113 - Path's own raises for some names
        return None
    recorded = next((made for made in find_artifacts(export_dir, "onnx") if made.path.name == name), None)
    if recorded is None or recorded.sha256 == engine.manifest.source_sha256:
        return None
    return f"{engine.path.name} was built from an earlier {engine.manifest.source_name}: build it again with --force."
