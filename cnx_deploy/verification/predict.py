"""From an artifact and image files to the answers of its task: one loader for checkpoint, ONNX file and engine."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.artifacts import refused_engine
from cnx_deploy.core.class_names import check_class_count
from cnx_deploy.core.deploy_spec import ANSWER_DEFAULTS, DeploySpec
from cnx_deploy.core.errors import CheckFailedError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.files import check_file, whole_file
from cnx_deploy.core.image_size import ImageSize, size_text
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import ASSUMED, Preprocessing
from cnx_deploy.core.strict_json import strict_json, typed
from cnx_deploy.core.thresholds import ASSUMED_THRESHOLD, Thresholds, thresholds_of
from cnx_deploy.data import GivenImages, ImageBatch, ImageFiles, ImageSource
from cnx_deploy.data.dataset import LeftOut, images_below, notes_of
from cnx_deploy.data.pixels import FORMATS
from cnx_deploy.data.preprocessing import placement, runner_input
from cnx_deploy.exporters.graph_checks import admit_onnx
from cnx_deploy.exporters.untrusted import limits_for
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.model.recorded import recorded_outputs, recorded_task
from cnx_deploy.model.source_config import weights_in
from cnx_deploy.model.tasks.base import Outputs, Prediction, Task, all_finite, find_task, joined, network_outputs
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.ort_session import trial_run
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions, find_runner, open_network, open_runner
from cnx_deploy.verification.inspect import ONNX_CHECKS, kind_of_file, recorded_artifact

__all__ = [
    "Model", "OutputsFile", "find_image_files", "open_predictor", "outputs_of_images", "outputs_of_pixels",
    "predict_images",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Model:
    """An opened checkpoint, ONNX file or engine: its runner, its task, how its images are made and its classes.

    Use it as a context manager. `class_names` None: the artifact names none, so classes go by their index. `notes` say
    what was assumed of it, for example that its weights are random. `num_classes` None: not known before it runs.
    `temperature`: what its class scores were divided by. `output_names`: what it gives, in order.
    """

    runner: Runner
    task: Task
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()
    num_classes: int | None = None
    temperature: float = 1.0
    output_names: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        self.runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, trace)

    def __repr__(self) -> str:
        info, size = self.runner.info, size_text(self.preprocessing.image_size)
        return f"Model({info.backend} {info.version} in {info.arithmetic} on {info.device}, {size} px)"

    def predict(
        self, images: Any, *, top: int | None = None, batch_size: int = 8, tiles: float | None = None,
        note: Callable[[str], None] = warnings.warn,
    ) -> Any:  # fmt: skip
        """Answer for one image or a list of them; each is resized, cropped and normalised as the model asks for.

        Args:
            images: paths; PIL images of any mode; arrays (H, W, C) or (H, W) or tensors (C, H, W) of uint8, uint16 or
                floats in [0, 1], see `Preprocessing.white_level`; or a `data.ImageSource`. A list and a source give a
                list.
            top: classes named for each image; None is 5 of a classifier, and all labels that reach their thresholds.
            batch_size: images run at once, within the range that the model takes.
            tiles: of segmentation, pictures larger than the canvas are run in tiles of their own pixels that overlap by
                this share of a side, such as 0.25, see `verification.tiles`; None shrinks them to the canvas.
            note: told what the images have shown, such as values far below white; a warning by default.

        Returns:
            The task's `Prediction` for an image; of a classifier it has `scores`, the best class first, with
            probabilities in [0, 1]. For a file that cannot be read it has no answer and says why in `error`.
        """
        is_single = not isinstance(images, list | tuple | ImageSource)
        source = images if isinstance(images, ImageSource) else GivenImages(_listed(images))
        predictions = list(predict_images(self, source, top=top, batch_size=batch_size, tiles=tiles))
        for text in (*source.notes, *source.observed()):
            note(text)
        return predictions[0] if is_single else predictions

    def outputs(self, images: Any, *, batch_size: int = 8) -> Outputs:
        """Run images as `predict` takes them, and return what the model gives for all: tensors (N, ...) by name.

        Raises InputError, which names it, for an image that cannot be read.
        """
        source = images if isinstance(images, ImageSource) else GivenImages(_listed(images))
        batches = source.batches(self.preprocessing, self.runner.input_spec, batch_size)
        return joined([_outputs_of(self, batch) for batch in batches])

    def draw(self, images: Any, folder: Path | str, *, batch_size: int = 8, tiles: float | None = None) -> list[Path]:
        """Draw what a dense model says of images as `predict` takes them, see `verification.pictures.Pictures`.

        Returns the paths of the files.
        """
        from cnx_deploy.verification.pictures import Pictures

        source = images if isinstance(images, ImageSource) else GivenImages(_listed(images))
        drawn = Pictures(self, source, Path(folder))
        for index, row in enumerate(predict_images(self, source, batch_size=batch_size, tiles=tiles)):
            drawn.add(index, row)
        return drawn.written

    def explain(self, images: Any, folder: Path | str, *, top: int = 3, batch_size: int = 8) -> list[Path]:
        """Draw, for images as `predict` takes them, where the `top` best classes get their scores from.

        A checkpoint is opened with `load(path, outputs=("logits", "class-maps"))`, a file exported so. Returns the
        paths of the pictures, one an image.
        """
        from cnx_deploy.verification.explain import Explanations

        drawn = Explanations(self, Path(folder), top)
        source = images if isinstance(images, ImageSource) else GivenImages(_listed(images))
        for batch in source.batches(self.preprocessing, self.runner.input_spec, batch_size):
            drawn.add(batch, _outputs_of(self, batch))
        return drawn.written


def open_predictor(
    path: Path,
    *,
    many: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    class_names: Sequence[str] | None = None,
    white_level: float | None = None,
    image_size: ImageSize | None = None,
    backend: str | None = None,
    allow_engine_code: bool = False,
    explains: bool = False,
    thresholds: Thresholds | None = None,
    **checkpoint: Any,
) -> Model:
    """Open a checkpoint, an ONNX file or an engine, told by its content, on `device` (cpu or cuda) or the engine's GPU.

    Hashes are checked where a manifest names the file. An ONNX file of this project without its manifest is taken
    after `graph_checks.admit_onnx` and a trial run have let it in. An engine without its manifest is refused. Raises
    InputError for other files and for an ONNX file that does not say what images it takes, MissingRequirementError for
    a device or engine that this machine lacks.
    `many`: whole batches will come, so ONNX Runtime's threads get images of their own (`OrtRunner`). `threads` None:
    all processors this process may use. `class_names`, one for each output, `thresholds` (`core.thresholds`) and
    `white_level` (`core.preprocessing`) take the place of what the artifact records, and so does `image_size` for a
    checkpoint and for a file of open sizes. `checkpoint` is of a checkpoint alone: `ema`, `entry`, `soup` and `task` as
    in `model.checkpoint`, `tta`, `temperature` and `outputs` as in `core.deploy_spec`.
    `explains`: a checkpoint gives class maps beside its logits.
    `backend`: which runner of `runners.registry`; None is PyTorch for a checkpoint and the usual one for a file.
    `allow_engine_code`: see `runners.tensorrt.TensorRTRunner`.
    """
    given = {
        name: value
        for name, value in checkpoint.items()
        if value not in (None, ()) and value != ANSWER_DEFAULTS.get(name)
    }
    if explains and not find_task(str(given.get("task", "classification"))).has_classes:
        raise InputError(f"Pictures are drawn of classes, and the task {given['task']} has none. Leave --explain out.")
    if explains and kind_of_file(weights_in(path) if path.is_dir() else path) not in ("onnx", "engine"):
        given["outputs"] = tuple(dict.fromkeys((*given.get("outputs", ()), "logits", "class-maps")))
    options = RunnerOptions(
        device=device, threads=threads, thread_per_image=many, allow_engine_code=allow_engine_code, hashes_hold=True
    )
    model = _opened(path, options, backend, given, image_size)
    if backend is not None and find_runner(backend).is_slow:
        model = replace(model, notes=(*model.notes, f"{backend} proves arithmetic here and takes seconds an image."))
    if class_names is not None:
        check_class_count(class_names, model.num_classes or len(class_names), str(path))
        model = replace(model, class_names=tuple(class_names))
    if thresholds is not None:
        count = model.num_classes or len(model.class_names or ())
        model = replace(model, task=model.task.with_thresholds(thresholds_of(thresholds, model.class_names, count)))
    if model.task.takes_label_sets and model.task.thresholds is None:
        model = replace(model, notes=(*model.notes, ASSUMED_THRESHOLD))
    if white_level is not None:
        model = replace(model, preprocessing=replace(model.preprocessing, white_level=white_level))
    if image_size is not None:
        if not model.runner.input_spec.takes_size(image_size):
            limits = model.runner.input_spec.size_range or (model.preprocessing.image_size,)
            raise InputError(
                f"{path} takes images of {' to '.join(map(size_text, limits))} pixels, not {size_text(image_size)}. "
                "Export it with a range, such as --image-size 224:448:640, or leave --image-size (image_size) out."
            )
        model = replace(model, preprocessing=replace(model.preprocessing, image_size=image_size))
    return model


def _opened(
    path: Path, options: RunnerOptions, backend: str | None, checkpoint: dict[str, Any], image_size: ImageSize | None
) -> Model:
    path = weights_in(path) if path.is_dir() else path
    kind = kind_of_file(path)
    artifact = recorded_artifact(path)
    if kind in ("onnx", "engine") and checkpoint:
        flags = {"outputs": "output"}
        named = " and ".join(f"--{flags.get(name, name)} ({name})" for name in checkpoint)
        raise InputError(
            f"{path} is no checkpoint, so {named} has nothing to choose from: such a file computes what it was "
            "exported with. Leave it out, or export it so."
        )
    if artifact is not None:
        return _recorded_model(artifact, options, backend)
    if kind == "engine":
        raise refused_engine(path)
    if kind == "onnx":
        if backend not in (None, "onnxruntime"):
            raise InputError(
                f"{path} has no manifest beside it, and only onnxruntime runs such a file. Leave --backend (backend) "
                "out, or put the manifest beside it."
            )
        return _unrecorded_onnx(path, options)
    if kind == "unknown":
        raise InputError(
            f"{path} is neither a checkpoint, nor an ONNX file, nor an engine by its content; only these can predict."
        )
    return _checkpoint_model(path, options, backend, checkpoint, image_size)


class OutputsFile:
    """An `.npz` file of everything a model gives for images, by name, with their paths; it is held until it is written.

    Raises InputError, at once, for another suffix.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() != ".npz":
            raise InputError(f"{path} is no name for outputs: they are written as NumPy arrays. Use the suffix .npz.")
        check_file(path)
        self.path = path
        self._names: list[str] = []
        self._batches: list[Outputs] = []

    def add(self, batch: ImageBatch, outputs: Outputs) -> None:
        """Keep the outputs (n, ...) of a batch."""
        self._names.extend(batch.names)
        self._batches.append(outputs)

    def finish(self) -> str:
        """Write the file, whole or not at all, and say what is in it."""
        arrays = {name: output.numpy() for name, output in joined(self._batches).items()} if self._batches else {}
        with whole_file(self.path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, paths=np.array(self._names, dtype=str), **arrays)  # type: ignore[arg-type]
        shapes = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in arrays.items())
        return f"{self.path}: {shapes or 'no image could be read'}"


def find_image_files(paths: Sequence[Path]) -> ImageFiles:
    """Files as they are named, and of a folder every image file below it, sorted; hidden ones are left out.

    A path that does not exist stays among them, so that it is answered for. Raises InputError for a folder without
    images.
    """
    found: list[Path] = []
    notes: list[str] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        left_out = LeftOut(str(path))
        inside = sorted(images_below(path, left_out))
        notes += notes_of([left_out], path)
        if not inside:
            raise InputError(f"{path} holds no image files: expected {', '.join(FORMATS)}. {' '.join(notes)}".rstrip())
        found.extend(inside)
    return ImageFiles(tuple(found), notes=tuple(notes))


def predict_images(
    predictor: Model,
    images: ImageSource,
    *,
    top: int | None = None,
    batch_size: int = 8,
    each: Callable[[ImageBatch, Outputs], None] | None = None,
    tiles: float | None = None,
) -> Iterator[Prediction]:
    """Yield one prediction an image, in order; an image that cannot be read gives its reason and the rest go on.

    `top` is cut to the number of classes, and None is the task's own; `batch_size` is cut to the runner's range. `each`
    is given every batch and its outputs (n, ...), of tiles nothing. `tiles`: see `Model.predict`. Raises
    CheckFailedError, which names the image, for outputs that are not finite.
    """
    spec = predictor.runner.input_spec
    if tiles is not None:
        from cnx_deploy.verification.tiles import tiled_predictions

        yield from tiled_predictions(predictor, images, tiles, top=top, batch_size=batch_size)
        return
    batches = images.batches(predictor.preprocessing, spec, batch_size, leave_out_broken=True)
    answered, task = 0, predictor.task

    def unread(index: int) -> Prediction:
        return predictor.task.prediction(path=batches.broken[index].path, error=batches.broken[index].reason)

    for batch in batches:
        outputs = _outputs_of(predictor, batch)
        if each is not None:
            each(batch, outputs)
        count = predictor.task.usual_top if top is None else top
        pictures = [images.picture(index, predictor.preprocessing) for index in batch.indices if task.is_dense]
        places = [placement(picture.size, predictor.preprocessing) for picture in pictures if picture is not None]
        words = (outputs, batch.names, predictor.class_names)
        if len(places) == len(batch):
            answers = task.predictions_on_pictures(*words, places, top=count)
        else:
            answers = task.predictions(*words, top=count)
        rows = dict(zip(batch.indices, answers, strict=True))
        # Images that could not be read lie between those of the batch.
        for index in range(answered, batch.indices[-1] + 1):
            yield rows[index] if index in rows else unread(index)
        answered = batch.indices[-1] + 1
    for index in range(answered, len(images)):
        yield unread(index)


def _recorded_model(artifact: Artifact, options: RunnerOptions, backend: str | None) -> Model:
    model = artifact.manifest.model
    seed = f"The weights are random (seed {model.weights.reference}): the answers mean nothing."
    notes: tuple[str, ...] = (seed,) if model.weights.origin == "random" else ()
    notes += tuple(filter(None, (model.preprocessing.assumption(model.origins),)))
    assumed = [name for name, origin in model.origins.items() if origin == ASSUMED]
    if model.graph is not None and assumed:
        flags = ", ".join("--" + name.replace("_", "-") for name in assumed)
        raise InputError(
            f"{artifact.path.name} was made from {model.weights.reference}, which does not say how its images are "
            f"made: {', '.join(assumed)} are not known. Rescue it again with {flags} and --force."
        )
    runner = open_runner(artifact, backend, options)
    temperature, given = artifact.manifest.deploy.temperature, tuple(spec.name for spec in recorded_outputs(artifact))
    task, classes = recorded_task(model), model.num_classes
    return Model(runner, task, model.preprocessing, model.class_names, notes, classes, temperature, given)


def _unrecorded_onnx(path: Path, options: RunnerOptions) -> Model:
    admission = admit_onnx(path)
    metadata = admission.facts.metadata
    if "cnx_deploy.preprocessing" not in metadata:
        raise InputError(
            f"{path} does not say what images it takes: expected cnx-deploy's manifest or metadata. "
            "Export the model with cnx-deploy export."
        )
    if options.device == "cpu" and "BFLOAT16" in admission.facts.types:
        raise MissingRequirementError(
            f"{path.name} computes in BF16, which ONNX Runtime does not on a CPU. Export it in FP32 or FP16."
        )
    try:
        recorded = typed(strict_json(metadata["cnx_deploy.preprocessing"].encode()), dict[str, Any])
        written = strict_json(metadata.get("cnx_deploy.class_names", "null").encode())
        names = None if written is None else typed(written, tuple[str, ...])
        temperature = typed(strict_json(metadata.get("cnx_deploy.temperature", "1").encode()), float)
        listed = strict_json(metadata.get("cnx_deploy.thresholds", "null").encode())
        cuts = None if listed is None else typed(listed, tuple[float, ...])
        config = typed(strict_json(metadata.get("cnx_deploy.task_config", "{}").encode()), dict[str, Any])
    except ValueError as error:
        raise CorruptArtifactError(f"{path} has metadata that is not JSON ({error}). Export it again.") from error
    preprocessing = Preprocessing.from_dict(recorded)
    task = find_task(metadata.get("cnx_deploy.task", "classification")).configured(config).with_thresholds(cuts)
    checks = list(ONNX_CHECKS)
    if "BFLOAT16" not in admission.facts.types:
        trial_run(path, limits_for(admission.size_bytes))
        admission.check_unchanged()
        checks.append("one image through ONNX Runtime, in a process of its own")
    notes = [f"No manifest beside it names it: checked were {'; '.join(checks)}; its origin cannot be."]
    if metadata.get("cnx_deploy.weights_origin") == "random":
        notes.append("The weights are random: the answers mean nothing.")
    assumed = dict.fromkeys(filter(None, metadata.get("cnx_deploy.assumed", "").split(",")), ASSUMED)
    if assumed.keys() <= {each.name for each in fields(Preprocessing)}:
        notes += filter(None, (preprocessing.assumption(assumed),))
    runner = OrtRunner(path, device=options.device, threads=options.threads, thread_per_image=options.thread_per_image)
    _, scores = admission.facts.outputs.get(task.class_output_of(admission.facts.outputs) or "", ("", ()))
    num_classes = scores[-1] if scores and isinstance(scores[-1], int) else None
    words = tuple(filter(None, metadata.get("cnx_deploy.outputs", "").split(",")))
    given = tuple(spec.name for spec in task.outputs(1, words, [(1, 1, 1)] * 4))
    return Model(runner, task, preprocessing, names or None, tuple(notes), num_classes, temperature, given)


def _checkpoint_model(
    path: Path, options: RunnerOptions, backend: str | None, checkpoint: dict[str, Any], image_size: ImageSize | None
) -> Model:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise MissingRequirementError("PyTorch finds no GPU here, so the device cuda cannot be used. Use --device cpu.")
    answer = {name: checkpoint.pop(name) for name in (*ANSWER_DEFAULTS, "outputs") if name in checkpoint}
    loaded = load_checkpoint(path, **checkpoint)
    if image_size is not None:
        loaded.check_canvas(image_size)
        stated = {**loaded.origins, "image_size": "option"}  # so that no note says that a size was assumed
        loaded = replace(loaded, preprocessing=replace(loaded.preprocessing, image_size=image_size), origins=stated)
    preprocessing = loaded.preprocessing
    spec = DeploySpec(image_size=preprocessing.image_size, mean=preprocessing.mean, std=preprocessing.std, **answer)
    model = loaded.model
    if backend is None:
        runner: Runner = reference_runner(model.to(options.device), spec)
    else:
        runner = open_network(model, spec, backend, options)
    return Model(
        runner,
        model.task,
        preprocessing,
        loaded.class_names,
        (*loaded.told_of_images(), *loaded.notes),
        model.num_classes,
        spec.temperature,
        tuple(output.name for output in network_outputs(model.task, model.variant, model.num_classes, spec)),
    )


def _listed(images: Any) -> Any:
    return images if isinstance(images, list | tuple) else [images]


def outputs_of_pixels(predictor: Model, pixels: Tensor, name: str) -> Outputs:
    """What the model gives for pixels (n, H, W, C) uint8 of its own size, at most its largest batch."""
    spec = predictor.runner.input_spec
    missing = max(0, spec.min_batch - len(pixels))
    filled = torch.cat([pixels, pixels[:1].expand(missing, *pixels.shape[1:])])
    images = runner_input(filled, spec.kind, predictor.preprocessing)
    return _outputs_of(predictor, ImageBatch(images, tuple(range(len(pixels))), (name,) * len(pixels), None))


def outputs_of_images(predictor: Model, images: Tensor, name: str) -> Outputs:
    """What the model gives for images (n, ...) as its runner takes them; fewer than its smallest batch are filled up.

    Raises InputError for another shape or type, see `InputSpec`.
    """
    missing = max(0, predictor.runner.input_spec.min_batch - len(images))
    filled = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
    return _outputs_of(predictor, ImageBatch(filled, tuple(range(len(images))), (name,) * len(images), None))


def _outputs_of(predictor: Model, batch: ImageBatch) -> Outputs:
    """What the model gives for the images of a batch: finite tensors (n, ...) in host memory."""
    runner, expected = predictor.runner, predictor.output_names
    given = runner.run(batch.images.to(runner.device))
    outputs = {name: output[: len(batch)].cpu().clone() for name, output in given.items()}
    # A reference gives more where the file gives classes by their index; it declares what.
    known = {*expected, *(spec.name for spec in getattr(runner, "outputs", ()))}
    if expected and not set(expected) <= outputs.keys() <= known:
        raise InputError(
            f"The model gives {', '.join(outputs)}; {predictor.task.name} needs {', '.join(expected)}. Export it with "
            "cnx-deploy export."
        )
    if expected:
        outputs = {name: outputs[name] for name in expected}
    finite = all_finite(outputs).tolist()
    if not all(finite):
        raise CheckFailedError(
            f"The model gave {' and '.join(outputs)} that are not finite for {batch.names[finite.index(False)]}, and "
            "numbers were expected. Check it with cnx-deploy verify."
        )
    return outputs
