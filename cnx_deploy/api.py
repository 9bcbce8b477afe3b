"""The Python API: what each command does, as one function. `import cnx_deploy` hands these names on, lazily.

Every function takes plain values, returns a typed record that prints itself, and writes only where it is told to.
"""

import difflib
import gc
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from cnx_deploy.core.artifacts import find_artifacts, open_artifact, select_artifacts
from cnx_deploy.core.class_names import ClassNames, names_of
from cnx_deploy.core.deploy_spec import DeploySpec, InputKind, Layout, TestTimeAugmentation
from cnx_deploy.core.eight_bits import Method
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.hidden_tensor import FusedMode
from cnx_deploy.core.image_size import ImageSize
from cnx_deploy.core.manifest import Artifact, EngineManifest, OnnxManifest
from cnx_deploy.core.precision import find_precision
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import find_gpus, this_machine
from cnx_deploy.core.targets import find_target
from cnx_deploy.core.thresholds import ASSUMED_THRESHOLD, Thresholds, thresholds_of
from cnx_deploy.data import ImageSource, InputSpec, image_source, images_to_run
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import Backend, default_targets, load_backend, require_gpu
from cnx_deploy.exporters.trt.builder import BuildSpec, check_build
from cnx_deploy.exporters.trt.builder import build_engine as build_one_engine
from cnx_deploy.exporters.trt.compiling import limits_for
from cnx_deploy.model.checkpoint import LoadedModel, ModelRequest
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
    from cnx_deploy.serving.batch import BatchResult
    from cnx_deploy.serving.hub import HubFolder
    from cnx_deploy.serving.serve import Serving
    from cnx_deploy.serving.triton_check import RepositoryCheck
    from cnx_deploy.training import TrainingResult
    from cnx_deploy.verification.inspect import Inspection
    from cnx_deploy.verification.rescue import Rescued
    from cnx_deploy.verification.temperature import TemperatureFit

__all__ = [
    "BuildRequest", "ExportRequest", "Model", "PushRequest", "VerifyReport", "VerifyRequest", "batch", "benchmark",
    "build_engine", "check_package", "evaluate", "export", "fit_temperature", "fit_thresholds", "headroom", "inspect",
    "load", "package", "predict", "push", "rescue", "run_builds", "run_exports", "run_push", "run_verifications",
    "serve", "train", "verify",
]  # fmt: skip

Note = Callable[[str], None]
Source = Artifact | Path | str
"""An artifact, or the path of one."""
Request = TypeVar("Request")
FORMATS = ("onnx", "pt2")
"""What `export` writes: ONNX files in any case, and programs of torch.export."""
PACKAGES = {kind: f"cnx_deploy.serving.{kind}" for kind in ("triton", "deepstream", "browser")}
"""Kind of package -> the module whose `write_package` writes it, as its `PackageRequest` says."""
MODEL_OPTIONS = (
    "device", "backend", "allow_engine_code", "white_level", "image_size", "ema", "entry", "soup", "tta", "temperature",
    "task", "outputs", "thresholds",
)  # fmt: skip
"""What `load` takes beside class names."""
START = ("checkpoint", "init", "soup", "pretrained", "reset_head", "ema", "entry")
"""What `train` takes of weights to start from."""
MADE_UP_IMAGES = (
    "{} is {}, whose scales were measured on images: how it differs from PyTorch on made-up ones says nothing. Give "
    "images that the network will see with --data (data)."
)
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
        precision: "fp32", "fp16", "bf16", "fp8" or "int8", or several of them for several files from one load of the
            weights.
        note: is told what was chosen or assumed, a line at a time; `print` shows it.
        **options: fields of `ExportRequest`: checkpoint, soup, ema, entry, pretrained, task, outputs, image_size,
            batch, keep_fp32, tta, temperature, output_dir, force …; for "fp8" and "int8" calibration, samples,
            calibration_method, keep_fp16, gate_targets and no_engine_gates.

    Returns:
        The artifact, or a list of them where several precisions were asked for.

    Raises:
        ParityError: the file differs from PyTorch by more than its gate; nothing is written.
        OutputExistsError: other inputs made what is there; `force=True` replaces it.
    """
    made = run_exports(_request(ExportRequest, options, variant=variant, precisions=_words(precision)), note)
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
        **options: fields of `BuildRequest`: batches, runtime, allow_tf32, fused, launcher, output_dir, force.

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
        **options: fields of `VerifyRequest`: data, samples, backends, export_dir, engines_dir, save_outputs …

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
    compare: str | Sequence[str] = (),
    backends: str | Sequence[str] = (),
    note: Note = _silent,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> "BenchmarkRecord":
    """Time ONNX files and engines in turns with PyTorch and others, as `cnx-deploy bench` does.

    Args:
        artifacts: artifacts or paths; none means everything recorded.
        batch: images a call; several are measured one after the other.
        compare: peers in the same turns: "torch", "compile", "timm", "timm-whole", "timm-18"; first the baseline.
        backends: what runs ONNX files, each in the same turns, such as ("onnxruntime", "fused"); none means the usual.
        note: is told of recorded artifacts that are not here, and of reasons to doubt the figures.
        progress: is told a text and the share that is done.
        **options: fields of `bench.comparison.BenchSpec`: duration_seconds, threads, spin, seed, sweep_to …

    Returns:
        The record with latencies in milliseconds and images a second; `print(record)` shows the table.
    """
    from cnx_deploy.bench.comparison import BenchSpec, run_benchmark

    batches = (batch,) if isinstance(batch, int) else tuple(batch)
    options.setdefault("omp_threads", os.environ.get("OMP_NUM_THREADS"))
    words = {"compare": _words(compare), "backends": _words(backends)}
    spec = _request(BenchSpec, options, files=_paths_of(artifacts), batches=batches, **words)
    return run_benchmark(spec, note, progress)


def load(
    model: Source,
    *,
    device: str = "cpu",
    backend: str | None = None,
    allow_engine_code: bool = False,
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
        backend: what runs it, such as "onnxruntime" or "fused"; None is PyTorch for a checkpoint, ONNX Runtime for an
            ONNX file and TensorRT for an engine.
        allow_engine_code: an engine with own kernels may run them, and the launcher that travels in it.
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
    words |= {"backend": backend, "allow_engine_code": allow_engine_code}
    words |= {
        "task": task,
        "outputs": _words(outputs),
        "thresholds": thresholds,
    }
    return open_predictor(_path_of(model), many=True, device=device, **words)


def predict(model: Source, images: Images, *, top: int | None = None, **options: Any) -> Any:
    """Answer for images with a checkpoint, an ONNX file or an engine; see `Model.predict`, and `load` for options."""
    with load(model, **options) as opened:
        return opened.predict(images, top=top)


def batch(
    model: Source,
    images: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    engine: Literal["local", "ray"] = "local",
    class_names: ClassNames | None = None,
    note: Note = _silent,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> "BatchResult":
    """Answer for many images and write Parquet files, as `cnx-deploy batch` does; the same call goes on.

    Args:
        model: an artifact or a path of a checkpoint, an ONNX file or an engine.
        images: folders, patterns such as "shards/*.tar", image files, CSV tables of paths, Parquet files of image bytes
            or WebDataset tars.
        out: the folder to write; its `rows` are read with `pyarrow.parquet.read_table(out + "/rows")`.
        engine: "local" works in this process, "ray" in processes of Ray Data (extra `ray`).
        class_names: the names of the outputs in their order, or a file of them; None takes what the model records.
        note: is told what was listed and what is there already, a sentence each.
        progress: is told a text and the share that is done.
        **options: fields of `serving.batch.BatchRequest`: top, probabilities, keep, batch_size, part_size, actors,
            address …; and those of `load`.

    Returns:
        The counts: `rows`, and `errors`, which are rows of images that have no answer.

    Raises:
        OutputExistsError: `out` holds something else, or rows of another model, other images or other options.
        MissingRequirementError: an extra is missing, or a cluster has too few processors.
    """
    from cnx_deploy.serving.batch import BatchRequest, run_batch

    words = (images,) if isinstance(images, Path | str) else tuple(images)
    known = {"model": _path_of(model), "images": tuple(map(str, words)), "out": Path(out), "engine": engine}
    request = _request(BatchRequest, options, **known, model_options=_model_options(options, class_names))
    return run_batch(request, note, progress or (lambda text, share: None))


def serve(model: Source, *, class_names: ClassNames | None = None, note: Note = _silent, **options: Any) -> "Serving":
    """Serve a model over HTTP, as `cnx-deploy serve` does; needs the extra `ray`.

    Args:
        model: an artifact or a path of a checkpoint, an ONNX file or an engine.
        class_names: the names of the outputs in their order, or a file of them; None takes what the model records.
        note: is told what was assumed and what is started, a sentence each.
        **options: fields of `serving.serve.ServeRequest`: host, port, token, replicas, max_batch, max_wait_ms,
            max_queue …; and those of `load`.

    Returns:
        The running endpoint, a context manager that stops it: `url`, `reload()`, `stop()`.

    Raises:
        InputError: the port is taken, or an address that others reach has no token.
        MissingRequirementError: the extra `ray` is not installed.
    """
    from cnx_deploy.serving.serve import ServeRequest, start

    opened = _model_options(options, class_names)
    return start(_request(ServeRequest, options, artifact=_path_of(model), model_options=opened), note)


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
        **options: device, backend, class_names, white_level, image_size, ema, entry, soup, tta and temperature, see
            `load`.

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
    training.check_new(spec)
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


def push(source: Source, to: Path | str, *, note: Note = _silent, **options: Any) -> "HubFolder":
    """Write a network as a folder that timm and transformers load, as `cnx-deploy push` does; nothing is sent unasked.

    Args:
        source: a checkpoint, or an artifact whose weights are meant.
        to: the folder to write.
        note: is told what was read and assumed, and what the libraries' files cannot say, a line at a time.
        **options: fields of `PushRequest`: artifacts, library, repo_id, public, force; of a checkpoint also
            class_names, image_size, mean, std, crop_ratio, crop_mode, interpolation, ema, entry, soup and task.

    Returns:
        What was written; `print` shows it.

    Raises:
        InputError: the libraries do not have such a network.
        OutputExistsError: something is in the folder; `force=True` replaces a hub folder.
    """
    return run_push(_request(PushRequest, options, source=_path_of(source), to=Path(to)), note)


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


def package(
    artifacts: Source | Sequence[Source], kind: str = "triton", *, to: Path | str, note: Note = _silent, **options: Any
) -> Any:
    """Write what a server or another tool takes of artifacts, as `cnx-deploy package` does.

    Args:
        artifacts: ONNX files or engines, or their paths.
        kind: "triton" for a model repository, "deepstream" for a configuration of nvinfer, "browser" for a page.
        to: the folder to write; it is written whole or not at all.
        note: is told what has to be known of the result, a sentence each.
        **options: fields of the kind's `PackageRequest`, of "triton" that of `serving.triton`.

    Returns:
        What was written: its folder, and the notes.

    Raises:
        InputError: the artifact cannot be used so; the message says why.
        OutputExistsError: something is at the place.
    """
    if kind not in PACKAGES:
        raise InputError(f"No package is called {kind!r}. Choose one of: {', '.join(PACKAGES)}.")
    module = importlib.import_module(PACKAGES[kind])
    request = _request(module.PackageRequest, options, files=_paths_of(artifacts), to=Path(to))
    return module.write_package(request, note)


def check_package(folder: Path | str) -> "RepositoryCheck":
    """Say what is wrong with a model repository of Triton, as `cnx-deploy package check` does; no server is needed.

    Returns:
        The findings; `passed` says whether there are none, `print` shows them.
    """
    from cnx_deploy.serving.triton_check import check_repository

    return check_repository(Path(folder))


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
    """The same options with the path of a file or folder as one, where it is given as text, and lists as tuples."""
    names = (
        "checkpoint", "init", "output_dir", "export_dir", "engines_dir", "save_inputs", "save_outputs", "data",
        "image_folder", "inputs", "thresholds", "calibration",
    )  # fmt: skip
    more: dict[str, Any] = {"soup": tuple(map(Path, options["soup"]))} if "soup" in options else {}
    more |= {name: Path(value) for name, value in options.items() if name in names and isinstance(value, str)}
    more |= {name: _words(options[name]) for name in ("outputs", "keep", "backends") if name in options}
    return {**options, **more}


def _words(given: str | Sequence[str]) -> tuple[str, ...]:
    """One word, or several."""
    return (given,) if isinstance(given, str) else tuple(given)


def _model_options(options: dict[str, Any], class_names: ClassNames | None) -> dict[str, Any]:
    """Those of `load`, which are taken out of `options`."""
    opened = {name: options.pop(name) for name in MODEL_OPTIONS if name in options}
    return {**_with_paths(opened), "class_names": names_of(class_names)}


def _request(kind: type[Request], options: dict[str, Any], **known: Any) -> Request:
    """The request of a kind; InputError for an option that it does not have."""
    also = MODEL_OPTIONS if "model_options" in known else ()
    names = sorted({*(each.name for each in fields(kind)), *also} - known.keys())  # type: ignore[arg-type]
    if unknown := sorted(options.keys() - set(names)):
        close = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.4)
        raise InputError(
            f"There is no option {unknown[0]!r}{f'; did you mean {close[0]}?' if close else '.'} The options are "
            f"{', '.join(names)}."
        )
    several = {each.name for each in fields(kind) if each.type == tuple[str, ...]}  # type: ignore[arg-type]
    given = {name: _words(value) if name in several else value for name, value in options.items()}
    return kind(**known, **_with_paths(given))


def _paths_of(sources: Source | Sequence[Source]) -> tuple[Path, ...]:
    several = (sources,) if isinstance(sources, Artifact | Path | str) else sources
    return tuple(_path_of(source) for source in several)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest(ModelRequest):
    """What `cnx-deploy export` takes; see `exporters.onnx.ExportSpec` and `core.deploy_spec.DeploySpec`.

    `batch` None is the task's usual range. `keep_fp32` is of the half-precision files alone. `task` "features" takes a
    classifier's weights without the head. `outputs` are the task's words for what the file gives, such as ("logits",
    "embedding"). `image_size` of three, (smallest, typical, largest), leaves height and width open between the first
    and the last. `formats`: "pt2" writes, beside each half-precision ONNX file, the program of `verification.program`.
    `calibration`: images for precisions in eight bits, as a folder, a CSV file or a `data.ImageSource`; `samples` of
    them are calibrated on, the others judge. `keep_fp16`: parts that stay in FP16. `gate_targets`: GPUs, as
    `build_engine` takes them, whose engines judge the file; none is sm89. `no_engine_gates`: compile nothing.
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
    formats: tuple[str, ...] = ("onnx",)
    no_verify: bool = False
    force: bool = False
    calibration: Path | str | ImageSource | None = None
    samples: int = 200
    calibration_method: Method = "max"
    keep_fp16: tuple[str, ...] = ()
    gate_targets: tuple[str, ...] = ()
    no_engine_gates: bool = False

    def __post_init__(self) -> None:
        eight = [name for name in self.precisions if find_precision(name).placement is not None]
        if eight and self.calibration is None:
            raise InputError(
                f"{eight[0]} stores tensors in eight bits, on scales that are measured. Give images that the network "
                "will see, some of which are held out to judge by: --calibration DATA."
            )
        given = {
            "--calibration": self.calibration is not None,
            "--calibration-method": self.calibration_method != "max",
            "--keep-fp16": bool(self.keep_fp16),
            "--gate-target": bool(self.gate_targets),
            "--no-engine-gates": self.no_engine_gates,
        }
        if not eight and (unused := [name for name, is_given in given.items() if is_given]):
            raise InputError(
                f"{unused[0]} is of files in eight bits, and none is asked for. Add --precision fp8 or int8."
            )
        if not isinstance(self.calibration, Path | str | ImageSource | None):
            raise InputError(
                f"calibration is a {type(self.calibration).__name__}; expected the path of a folder or CSV file, or a "
                "data.ImageSource. data.GivenImages is one of pictures in memory."
            )
        if unknown := set(self.formats) - set(FORMATS):
            raise InputError(f"No format is called {sorted(unknown)[0]!r}. Choose one of: {', '.join(FORMATS)}.")
        if self.gate_targets and self.no_engine_gates:
            raise InputError("--gate-target names GPUs to compile for, and --no-engine-gates compiles nothing.")
        for target in map(find_target, self.gate_targets):
            if target == "current":
                raise InputError("--gate-target names a GPU, such as sm89 or 'RTX 4090', and current is none by name.")
            for name in eight:
                find_precision(name).check_runs_on(target, "The file")
        if eight and "pt2" in self.formats:
            raise InputError(
                f"A program (pt2) computes in fp16 or bf16, and {eight[0]} is asked for. Export {eight[0]} by itself, "
                "without --format pt2."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What `cnx-deploy build-trt` takes. Without `files`, every file in half precision or eight bits in `export_dir`.

    `batches` empty means the range that each file was exported for; `targets` empty means this machine's GPU, or
    without one `trt.backend.DEFAULT_TARGETS`. `fused` and `launcher`: see `trt.compiling.BuildSpec`.
    """

    files: tuple[Path, ...] = ()
    export_dir: Path = Path("export")
    output_dir: Path = Path("engines")
    runtime: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    targets: tuple[str, ...] = ()
    batches: tuple[tuple[int, int, int], ...] = ()
    allow_tf32: bool = False
    fused: FusedMode | None = None
    launcher: Path | None = None
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """What `cnx-deploy verify` takes. Without `files`, everything recorded in both folders.

    `data`: a folder of images or of one for each class, a CSV file or a `data.ImageSource`; `image_folder`: where a CSV
    file's paths begin. Images with labels, and those of a network that gives an embedding, are all used unless
    `samples` limits them; otherwise, and without `data`, None is 64. `backends` and `device`: see
    `verification.verify_artifact`.
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
    backends: tuple[str, ...] = ()
    device: str = "cpu"
    allow_engine_code: bool = False
    class_names: ClassNames | None = None
    white_level: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRequest(ModelRequest):
    """What `cnx-deploy push` takes: weights from `source`, a checkpoint or an artifact, to the folder `to`.

    `artifacts`: recorded files of the same weights, for the figures of the model card. `library`, `force`: see
    `serving.hub.write_hub_folder`. `repo_id`: upload the folder there, see `serving.hub.upload_folder`; None sends
    nothing. The fields of a `ModelRequest` are of a checkpoint alone.
    """

    source: Path
    to: Path
    artifacts: tuple[Any, ...] = ()
    library: Literal["timm", "transformers"] | None = None
    repo_id: str | None = None
    public: bool = False
    force: bool = False


def run_push(request: PushRequest, note: Note) -> "HubFolder":
    """Load the weights, write the folder and, where a repository is named, upload it."""
    from cnx_deploy.model.recorded import recorded_model
    from cnx_deploy.serving.hub import check_repo_id, upload_folder, write_hub_folder
    from cnx_deploy.verification.inspect import kind_of_file

    if request.public and request.repo_id is None:
        raise InputError("Nothing is uploaded, so nothing can be public. Name a repository with --repo-id (repo_id).")
    if request.repo_id is not None:
        check_repo_id(request.repo_id)
    artifacts = [open_artifact(_path_of(source)) for source in request.artifacts]
    if request.source.is_file() and kind_of_file(request.source) in ("onnx", "engine"):
        usual, names = ModelRequest(), [each.name for each in fields(ModelRequest)]
        if given := [f"--{name.replace('_', '-')} ({name})" for name in names
                     if getattr(request, name) != getattr(usual, name)]:  # fmt: skip
            raise InputError(
                f"{request.source} is an artifact whose manifest says how it was made, so {' and '.join(given)} has "
                "nothing to change. Leave it out, or push from the checkpoint."
            )
        artifacts.insert(0, open_artifact(request.source))
        record = artifacts[0].manifest.model
        loaded = replace(
            recorded_model(artifacts[0]), class_names=record.class_names, preprocessing=record.preprocessing,
            origins=record.origins, head_is_new=record.head_is_new, weights=record.weights,
        )  # fmt: skip
        preprocessing = record.preprocessing
    else:
        loaded, preprocessing = replace(request, checkpoint=request.source).load(note)
    made = write_hub_folder(
        loaded, preprocessing, request.to, artifacts=artifacts, library=request.library, force=request.force
    )
    for text in made.notes:
        note(f"Note: {text}")
    if request.repo_id is not None:
        note(f"Uploading {made.path} to {request.repo_id}")
        made = replace(made, url=upload_folder(made, request.repo_id, public=request.public))
    return made


def run_exports(
    request: ExportRequest, note: Note, progress: Callable[[str, float], None] | None = None
) -> list[Artifact[OnnxManifest]]:
    """Export one model in each precision asked for; each file is compared with PyTorch before it is put into place.

    `progress` is told a text and the share of the images that a calibration, or the judge of eight bits, has run.
    """
    halves = [name for name in request.precisions if find_precision(name).has_islands]
    if "pt2" in request.formats and not halves:
        raise InputError("A program (pt2) is of half precision, and none is asked for. Add --precision fp16 or bf16.")
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
        words: dict[str, Any] = {} if request.no_verify else {"verify": partial(verify_export, model=loaded.model)}
        if deploy.row.placement is not None:
            spec, prove = _calibrated(request, spec, loaded, preprocessing, note, progress)
            words = {} if request.no_verify else {"prove": prove}
        artifact = export_onnx(loaded.model, record, spec, request.output_dir, force=request.force, **words)
        gc.collect()  # the exporter's graphs are cycles that hold the weights: huge in two precisions needs them gone
        if artifact.reused:
            note(f"{artifact.path} is there and was made from the same inputs: reused")
        else:
            note(f"{artifact.path} ({artifact.size_bytes / 1e6:.1f} MB), {_told_of_parity(artifact)}")
        made.append(artifact)
        if "pt2" in request.formats and precision in halves:
            from cnx_deploy.verification.program import write_program

            note(str(write_program(artifact, verify=not request.no_verify, force=request.force)))
    return made


def _told_of_parity(artifact: Artifact[OnnxManifest]) -> str:
    parity = artifact.manifest.facts.worst_parity
    if parity is None:
        return "not verified"
    found = parity.differences.detections
    if found is not None and not found.matched + found.unmatched:
        return "no detection on the made-up images to compare with PyTorch's: run cnx-deploy verify with --data DATA"
    return f"relative L2 {parity.differences.relative_l2_max:.1e} against PyTorch"


def _calibrated(
    request: ExportRequest,
    spec: ExportSpec,
    loaded: LoadedModel,
    preprocessing: Preprocessing,
    note: Note,
    progress: Callable[[str, float], None] | None,
) -> tuple[ExportSpec, Callable[[Artifact[OnnxManifest]], Any]]:
    """The same with scales measured on images, and what judges the file by the images that were held out."""
    from cnx_deploy.diagnosis.calibration import calibrate
    from cnx_deploy.verification.eight_bits import (
        GATE_TARGETS,
        Calibration,
        check_targets,
        label_positions,
        prove,
    )

    if loaded.weights.origin == "random":
        raise InputError(
            "The weights are random: scales of such a network say nothing, and a gate that it passes proves nothing. "
            "Give trained ones with --checkpoint or --pretrained."
        )
    assert request.calibration is not None
    images = images_to_run(request.calibration, targets=loaded.model.task.targets)
    calibration = Calibration.split(images, request.samples, preprocessing)
    targets = tuple(map(find_target, request.gate_targets)) or GATE_TARGETS
    # What judges the file is looked at first: a calibration takes minutes.
    label_positions(images, loaded.model.task.name, loaded.class_names, loaded.model.num_classes)
    if not request.no_engine_gates and not request.no_verify:
        check_targets(targets)
    inputs, done = InputSpec.of(spec.deploy, 1, None), 0
    calibration.check_images(inputs)

    def seen(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            share = done % len(calibration.chosen) / len(calibration.chosen)
            progress(f"pass {1 + (done - 1) // len(calibration.chosen)} of the calibration", share or 1.0)

    record = calibrate(
        loaded.model,
        spec.deploy,
        lambda: (batch.images for batch in calibration.batches(inputs, calibration.chosen)),
        method=request.calibration_method,
        kept=request.keep_fp16,
        targets=targets,
        progress=seen,
    )
    kept = f"; in FP16 stay {', '.join(record.kept)}" if record.kept else ""
    note(f"Calibrated on {record.images} of {len(images)} images ({record.method}){kept}")
    for text in (*images.notes, *images.observed()):
        note(text)
    words: dict[str, Any] = {"model": loaded.model, "calibration": calibration, "note": note, "progress": progress}
    words["engines"] = not request.no_engine_gates
    words["targets"] = targets
    return replace(spec, deploy=replace(spec.deploy, eight_bits=record)), partial(prove, **words)


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
            f"No ONNX file in half precision or eight bits is recorded and present in {request.export_dir}. "
            "Run `cnx-deploy export --variant atto` first, or name the files to build from."
        )
    backend = load_backend(request.runtime)
    engines = []
    for artifact, spec in _builds(request, backend, present, note):
        note(f"Building {artifact.path.name} for {spec.target} with {backend.name} {backend.version}")
        if (unknown := _not_judged(artifact, spec.target)) is not None:
            note(f"  {unknown}")
        limits = limits_for(artifact.size_bytes)
        words = (artifact, spec, request.output_dir)
        engine = build_one_engine(*words, force=request.force, progress=progress, limits=limits)
        engines.append(engine)
        size = f"{engine.manifest.files[0].size_bytes / 1e6:.1f} MB"
        note(f"  {engine.path} ({'made from the same inputs: reused' if engine.reused else size})")
    return engines


def _builds(
    request: BuildRequest, backend: Backend, sources: list[Artifact], note: Note
) -> list[tuple[Artifact, BuildSpec]]:
    """Each file and target, all checked before the first build, which may take minutes.

    A file that does not fit a target is left out with a note where not both were named. It is an error where they were,
    for a named file that fits no target, and where nothing is left.
    """
    targets = tuple(map(find_target, request.targets)) or default_targets(backend)
    launcher = None if request.launcher is None else str(request.launcher)
    options: dict[str, Any] = {"allow_tf32": request.allow_tf32, "fused": request.fused, "launcher": launcher}
    for target in targets:
        backend.check_target(target)
    builds: list[tuple[Artifact, BuildSpec]] = []
    unfit: list[InputError] = []
    for artifact in sources:
        before = len(builds)
        for target in targets:
            batches = request.batches or (artifact.manifest.batch,)
            spec = BuildSpec(runtime=backend.name, target=target, batches=batches, **options)
            try:
                check_build(backend, artifact, spec)
                builds.append((artifact, spec))
            except InputError as error:
                unfit.append(error)
                if request.files and request.targets:
                    raise
        if request.files and len(builds) == before:
            raise unfit[-1]
    if not builds:
        raise unfit[0]
    for reason in unfit:
        note(f"Left out: {reason}")
    return builds


def _not_judged(artifact: Artifact, target: str) -> str | None:
    """What to know where no engine for `target` has judged a file in eight bits; None of other files."""
    if artifact.manifest.precision.placement is None or not isinstance(artifact.manifest, OnnxManifest):
        return None
    facts = artifact.manifest.facts.eight_bits
    gpu = find_gpus()[0].target if target == "current" else target
    judged = facts.targets if facts is not None else ()
    if gpu in judged:
        return None
    known = f"Its engines were compared with FP16's on {' and '.join(judged)}" if judged else "No engine judged it"
    return f"{known}: what it saves on {gpu} is not known. Export it again with --gate-target {gpu}."


def run_verifications(request: VerifyRequest, note: Note, progress: Progress | None = None) -> list[Verification]:
    """Verify each artifact; the PyTorch reference of a network is computed once.

    Raises MissingRequirementError when an engine that was named cannot run here.
    """
    if request.image_folder is not None and request.data is None:
        raise InputError(f"No table is given whose paths begin at {request.image_folder}. Add --data (data).")
    found: list[Verification] = []
    told: set[int] = set()
    saved = SavedResults(request.save_outputs) if request.save_outputs is not None else None
    given: dict[str, Any] = {"saved": saved, "device": request.device, "allow_engine_code": request.allow_engine_code}
    reference: Reference | None = None
    words: dict[str, Any] = {"class_names": names_of(request.class_names), "white_level": request.white_level}
    for artifact in select_artifacts(request.files, request.export_dir, request.engines_dir, note):
        note(f"Verifying {artifact.path.name}")
        if request.files and artifact.manifest.kind == "engine":
            require_gpu()  # an engine that was named is asked for; before any weight is loaded
        if artifact.manifest.deploy.eight_bits is not None and request.data is None:
            reason = MADE_UP_IMAGES.format(artifact.path.name, artifact.manifest.precision.name.upper())
            if request.files:
                raise InputError(reason)
            found.append(Verification(artifact.path.name, artifact.manifest.kind, (), not_run=(reason,)))
            continue
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
        verification = verify_artifact(artifact, reference, progress, runners=runners, **given)
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
        return request.backends, ()
    machine = this_machine(request.device)
    reasons = {name: find_runner(name).reason_against(artifact, machine) for name in request.backends}
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
