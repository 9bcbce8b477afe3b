"""From an artifact and image files to class names and probabilities: one loader for checkpoint, ONNX and engine."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy.core.artifacts import refused_engine
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import (
    CheckFailedError,
    CorruptArtifactError,
    InputError,
    MissingRequirementError,
)
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.strict_json import strict_json, typed
from cnx_deploy.data import SUFFIXES, load_image, runner_input
from cnx_deploy.data.preprocessing import to_pixels
from cnx_deploy.exporters.graph_checks import admit_onnx
from cnx_deploy.exporters.untrusted import limits_for
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.ort_session import trial_run
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions, open_runner
from cnx_deploy.verification.inspect import ONNX_CHECKS, check_suffix, kind_of_file, recorded_artifact

__all__ = [
    "ClassScore",
    "Classifier",
    "Prediction",
    "classify_files",
    "classify_images",
    "find_image_files",
    "open_classifier",
]


@dataclass(frozen=True, slots=True)
class Classifier:
    """A runner, how its images are made and what its classes are called. Use it as a context manager.

    `class_names` None: the artifact names none, so classes go by their index. `notes` say what was assumed.
    """

    runner: Runner
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        self.runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, trace)

    def name_of(self, index: int) -> str:
        """The class's name, or its index as text."""
        return self.class_names[index] if self.class_names else str(index)


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class and its probability in [0, 1]."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best classes of one image, best first; or, with none, the reason why the file could not be read."""

    path: Path
    scores: tuple[ClassScore, ...]
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"path": str(self.path), "scores": [asdict(score) for score in self.scores], "error": self.error}


def open_classifier(path: Path, *, many: bool = False, device: str = "cpu") -> Classifier:
    """Open a checkpoint, an ONNX file or an engine, told by its content, on `device` (cpu or cuda) or the engine's GPU.

    Hashes are checked where a manifest names the file. An ONNX file of this project without its manifest is taken
    after `graph_checks.admit_onnx` and a trial run have let it in. An engine without its manifest is refused. Raises
    InputError for other files and for an ONNX file that does not say what images it takes, MissingRequirementError for
    a device or engine that this machine lacks.
    `many`: whole batches will come, so ONNX Runtime's threads get images of their own (`OrtRunner`).
    """
    kind = kind_of_file(path)
    artifact = recorded_artifact(path)
    if artifact is not None:
        return _recorded_classifier(artifact, many, device)
    if kind == "engine":
        raise refused_engine(path)
    if kind == "onnx":
        return _unrecorded_onnx(path, many, device)
    if kind == "unknown":
        raise InputError(
            f"{path} is neither a checkpoint, nor an ONNX file, nor an engine by its content. Give one of these."
        )
    check_suffix(path, kind)
    return _checkpoint_classifier(path, device)


def find_image_files(paths: Sequence[Path]) -> list[Path]:
    """Files as they are named, and of a folder every image file below it, sorted; hidden ones are left out.

    A path that does not exist stays in the list, so that it is answered for. InputError for a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if _is_visible_image(file, path))
        if not inside:
            raise InputError(f"{path} holds no image files ({', '.join(sorted(SUFFIXES))}). Give another folder.")
        found.extend(inside)
    return found


def classify_files(
    classifier: Classifier, paths: Sequence[Path], *, top: int = 5, batch_size: int = 8
) -> Iterator[Prediction]:
    """Yield one prediction a path, in order; a file that cannot be read gives its reason and the rest go on.

    `top` is cut to the number of classes, `batch_size` to the runner's range. Raises CheckFailedError, which names the
    file, for logits that are not finite.
    """
    return classify_images(classifier, paths, top=top, batch_size=batch_size)


def classify_images(
    classifier: Classifier, images: Sequence[Any], *, top: int = 5, batch_size: int = 8
) -> Iterator[Prediction]:
    """Yield one prediction an image: a path, a PIL image, an array or a tensor; see `api.Model.predict`."""
    spec = classifier.runner.input_spec
    size = max(spec.min_batch, min(batch_size, spec.max_batch or batch_size))
    remaining = iter(enumerate(images))
    while batch := list(itertools.islice(remaining, size)):
        named = [Path(image) if isinstance(image, str | Path) else Path(f"image {at}") for at, image in batch]
        read = [_read(image, classifier.preprocessing) for _, image in batch]
        taken = [path for path, pixels in zip(named, read, strict=True) if isinstance(pixels, Tensor)]
        readable = [pixels for pixels in read if isinstance(pixels, Tensor)]
        rows = iter(_probabilities(classifier, readable, taken) if readable else ())
        for path, pixels in zip(named, read, strict=True):
            if isinstance(pixels, Tensor):
                yield Prediction(path, _best(next(rows), classifier, top))
            else:
                yield Prediction(path, (), error=pixels)


def _recorded_classifier(artifact: Artifact, many: bool, device: str) -> Classifier:
    model = artifact.manifest.model
    is_random = model.weights.origin == "random"
    notes = (
        (f"The weights are random (seed {model.weights.reference}): the answers mean nothing.",) if is_random else ()
    )
    runner = open_runner(artifact, options=RunnerOptions(device=device, thread_per_image=many, hashes_hold=True))
    return Classifier(runner, model.preprocessing, model.class_names, notes)


def _unrecorded_onnx(path: Path, many: bool, device: str) -> Classifier:
    admission = admit_onnx(path)
    metadata = admission.facts.metadata
    if "cnx_deploy.preprocessing" not in metadata:
        raise InputError(
            f"{path} does not say what images it takes: expected cnx-deploy's manifest or metadata. "
            "Export the model with cnx-deploy export."
        )
    if device == "cpu" and "BFLOAT16" in admission.facts.types:
        raise MissingRequirementError(
            f"{path.name} computes in BF16, which ONNX Runtime does not on a CPU. Export it in FP32 or FP16."
        )
    try:
        recorded = typed(strict_json(metadata["cnx_deploy.preprocessing"].encode()), dict[str, Any])
        written = strict_json(metadata.get("cnx_deploy.class_names", "null").encode())
        names = None if written is None else typed(written, tuple[str, ...])
    except ValueError as error:
        raise CorruptArtifactError(f"{path} has metadata that is not JSON ({error}). Export it again.") from error
    preprocessing = Preprocessing.from_dict(recorded)
    checks = list(ONNX_CHECKS)
    if "BFLOAT16" not in admission.facts.types:
        trial_run(path, limits_for(admission.size_bytes))
        admission.check_unchanged()
        checks.append("one image through ONNX Runtime, in a process of its own")
    notes = [f"No manifest beside it names it: checked were {'; '.join(checks)}; its origin cannot be."]
    if metadata.get("cnx_deploy.weights_origin") == "random":
        notes.append("The weights are random: the answers mean nothing.")
    runner = OrtRunner(path, device=device, thread_per_image=many)
    return Classifier(runner, preprocessing, names or None, tuple(notes))


def _checkpoint_classifier(path: Path, device: str) -> Classifier:
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingRequirementError("PyTorch finds no GPU here: expected one for the device cuda. Leave it out.")
    loaded = load_checkpoint(path)
    preprocessing = loaded.preprocessing or Preprocessing()
    spec = DeploySpec(image_size=preprocessing.image_size, mean=preprocessing.mean, std=preprocessing.std)
    assumed = f"The checkpoint says nothing of its images: {preprocessing.image_size} px and ImageNet's mean and std."
    return Classifier(
        reference_runner(loaded.model.to(device), spec),
        preprocessing,
        loaded.class_names,
        () if loaded.preprocessing else (assumed,),
    )


def _is_visible_image(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file.suffix.lower() in SUFFIXES and file.is_file()


def _read(image: Any, preprocessing: Preprocessing) -> Tensor | str:
    """(S, S, 3) uint8 pixels, or why there are none."""
    try:
        decoded = load_image(Path(image)) if isinstance(image, str | Path) else _decoded(image)
        return to_pixels(decoded, preprocessing)
    except InputError as error:
        return str(error)


def _decoded(image: Any) -> Image.Image:
    """A PIL image of an array (H, W, 3) or (H, W) of uint8, or of a tensor (3, H, W) of uint8 or floats in [0, 1]."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise InputError(f"A tensor must be an image of shape (3, H, W), got {tuple(image.shape)}.")
        if image.is_floating_point():
            low, high = float(image.min()), float(image.max())
            if not (low >= 0.0 and high <= 1.0):  # a NaN fails both
                raise InputError(f"A float tensor must hold values in [0, 1], got {low:g} to {high:g}.")
            image = (image * 255.0).round().to(torch.uint8)
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)):
        given = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(
            "An image must be a path, a PIL image, a uint8 array (H, W, 3) or (H, W), or a tensor (3, H, W), got "
            f"{given}."
        )
    return Image.fromarray(np.ascontiguousarray(image))


def _probabilities(classifier: Classifier, images: Sequence[Tensor], paths: Sequence[Path]) -> Tensor:
    """(S, S, 3) uint8 pixels each -> (N, classes) float64; a batch below the runner's smallest is filled up."""
    runner = classifier.runner
    missing = max(0, runner.input_spec.min_batch - len(images))
    pixels = torch.stack([*images, *[images[-1]] * missing])
    logits = runner.run(runner_input(pixels, runner.input_spec.kind).to(runner.device))[: len(images)].cpu()
    finite = torch.isfinite(logits).all(dim=1).tolist()
    if not all(finite):
        raise CheckFailedError(
            f"The model gave logits that are not finite for {paths[finite.index(False)]}, and numbers were expected. "
            "Check it with cnx-deploy verify."
        )
    if classifier.class_names and len(classifier.class_names) != logits.shape[1]:
        raise CorruptArtifactError(
            f"The model has {logits.shape[1]} classes and its record {len(classifier.class_names)} names. Export again."
        )
    return torch.softmax(logits.double(), dim=1)


def _best(probabilities: Tensor, classifier: Classifier, top: int) -> tuple[ClassScore, ...]:
    values, indices = probabilities.topk(min(top, len(probabilities)))
    return tuple(
        ClassScore(index, classifier.name_of(index), value)
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    )
