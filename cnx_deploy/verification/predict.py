"""From an artifact and image files to class names and probabilities: one loader for checkpoint, ONNX and engine."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

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
from cnx_deploy.data import SUFFIXES, BrokenImage, ImageBatch, ImageFiles, ImageSource
from cnx_deploy.data.dataset import images_below
from cnx_deploy.exporters.graph_checks import admit_onnx
from cnx_deploy.exporters.untrusted import limits_for
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.ort_session import trial_run
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions, open_runner
from cnx_deploy.verification.inspect import ONNX_CHECKS, check_suffix, kind_of_file, recorded_artifact

__all__ = ["ClassScore", "Classifier", "Prediction", "classify", "find_image_files", "open_classifier"]


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
    """The best classes of one image, best first; or, with none, the reason why it could not be read."""

    path: str
    scores: tuple[ClassScore, ...]
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"path": self.path, "scores": [asdict(score) for score in self.scores], "error": self.error}


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


def find_image_files(paths: Sequence[Path]) -> ImageFiles:
    """Files as they are named, and of a folder every image file below it, sorted; hidden ones are left out.

    A path that does not exist stays among them, so that it is answered for. Raises InputError for a folder without
    images.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(images_below(path))
        if not inside:
            raise InputError(f"{path} holds no image files ({', '.join(sorted(SUFFIXES))}). Give another folder.")
        found.extend(inside)
    return ImageFiles(tuple(found))


def classify(classifier: Classifier, images: ImageSource, *, top: int = 5, batch_size: int = 8) -> Iterator[Prediction]:
    """Yield one prediction an image, in order; an image that cannot be read gives its reason and the rest go on.

    `top` is cut to the number of classes, `batch_size` to the runner's range. Raises CheckFailedError, which names the
    image, for logits that are not finite.
    """
    spec = classifier.runner.input_spec
    batches = images.batches(classifier.preprocessing, spec, batch_size, leave_out_broken=True)
    answered = 0
    for batch in batches:
        rows = dict(zip(batch.indices, _best(classifier, batch, top), strict=True))
        # Images that could not be read lie between those of the batch.
        for index in range(answered, batch.indices[-1] + 1):
            yield Prediction(images.name(index), rows[index]) if index in rows else _unread(batches.broken[index])
        answered = batch.indices[-1] + 1
    for index in range(answered, len(images)):
        yield _unread(batches.broken[index])


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


def _best(classifier: Classifier, batch: ImageBatch, top: int) -> list[tuple[ClassScore, ...]]:
    """The best classes of each image of a batch."""
    runner = classifier.runner
    logits = runner.run(batch.images.to(runner.device))[: len(batch)].cpu()
    finite = torch.isfinite(logits).all(dim=1).tolist()
    if not all(finite):
        raise CheckFailedError(
            f"The model gave logits that are not finite for {batch.names[finite.index(False)]}, and numbers were "
            "expected. Check it with cnx-deploy verify."
        )
    if classifier.class_names and len(classifier.class_names) != logits.shape[1]:
        raise CorruptArtifactError(
            f"The model has {logits.shape[1]} classes and its record {len(classifier.class_names)} names. Export again."
        )
    best = torch.softmax(logits.double(), dim=1).topk(min(top, logits.shape[1]), dim=1)
    return [
        tuple(ClassScore(index, classifier.name_of(index), value) for value, index in zip(*row, strict=True))
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _unread(image: BrokenImage) -> Prediction:
    return Prediction(image.path, (), error=image.reason)
