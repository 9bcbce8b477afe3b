"""Outputs of verifications on disk: who computed them, on which images, at which gate; to be judged again.

A folder holds one `.npz` a run, with the arrays `reference-logits-0000` and `candidate-logits-0000` onwards, a batch
each and so for each output, and one `index.json`: the files' hashes, the images, the gate and what made them. The
index is written last, and again after each artifact; it carries a hash of itself. Nothing is parsed before its hash
matches.
"""

import datetime
import hashlib
import json
import math
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.artifacts import sha256_of_file
from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.files import make_folder, whole_file, write_text
from cnx_deploy.core.gates import GATES, Gate, OutputSpec, ParityResult
from cnx_deploy.core.manifest import Artifact, ArtifactKind, Count, Positive, Sha256, Timestamp
from cnx_deploy.core.preprocessing import BrokenImage
from cnx_deploy.core.strict_json import bounded_content, kind_of, strict_json, typed
from cnx_deploy.core.system import tool_versions
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.runners.base import RunnerInfo
from cnx_deploy.verification.metrics import RunningComparison, Verification

__all__ = [
    "INDEX_NAME", "LIMITS", "SavedArtifact", "SavedResults", "SavedRun", "changed_gate", "judge_saved", "read_saved",
    "save_for_polygraphy",
]  # fmt: skip

INDEX_NAME = "index.json"
SCHEMA_VERSION = 2
MAX_INDEX_BYTES = 128 << 20
"""Of the names of 50,000 images an entry takes 5 MB, for each runner of each artifact."""
MAX_BATCH_BYTES = 1 << 28
"""A batch of 1024 images with 21,841 classes has 90 MB."""
SAVE_AGAIN = "Save the results again with cnx-deploy verify --save-outputs."
LIMITS: dict[str, tuple[str, float, float]] = {
    "relative_l2": ("relative_l2_max", 0.0, math.inf),
    "cosine": ("centred_cosine_min", -1.0, 1.0),
    "top1": ("top1_agreement_min", 0.0, 1.0),
    "kl": ("mean_kl_max", 0.0, math.inf),
}
"""Limit by the word that `changed_gate` takes -> field of `Gate`, and the range of its values."""


@dataclass(frozen=True, slots=True)
class SavedRun:
    """One candidate against the reference; its outputs are in `file`, by its name within the folder.

    `outputs` are those of the task, and `class_output` is the one that labels are compared with. `images` has a name
    for each image in order, `labels` each one's class, None without labels; without a `class_output` they serve the
    search among embeddings. `class_names`,
    `available` (images in the source) and `broken` (those that could not be read) belong to labelled images.
    """

    candidate: str
    reference: str
    gate: Gate
    batches: tuple[Positive, ...]
    images: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    labels: tuple[Count, ...] | None
    outputs: Annotated[tuple[OutputSpec, ...], msgspec.Meta(min_length=1)]
    file: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*\.npz$(?!\n)")]
    size_bytes: Count
    sha256: Sha256
    runner: RunnerInfo
    class_output: str | None = None
    class_names: tuple[str, ...] = ()
    available: Count = 0
    broken: tuple[BrokenImage, ...] = ()
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.candidate == self.reference:
            raise ValueError("candidate: it is the reference too")
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ValueError(f"labels: {len(self.labels)} labels of {len(self.images)} images")
        sizes = {spec.name: spec.shape for spec in self.outputs}
        searches = self.class_output is None and any(spec.unit == "embedding" for spec in self.outputs)
        scores = sizes.get(self.class_output or "")
        if self.labels is not None and not searches and scores != (len(self.class_names),):
            raise ValueError(
                f"class_output: no output of {len(self.class_names)} classes is called {self.class_output}"
            )
        if self.labels is not None and max(self.labels) >= len(self.class_names):
            raise ValueError(f"labels: {max(self.labels)} is none of {len(self.class_names)} classes")

    def pairs(self, folder: Path) -> Iterator[tuple[Outputs, Outputs]]:
        """Outputs of candidate and reference, (n, ...) float32 each, batch by batch as they were run.

        Raises CorruptArtifactError when the file is missing, was altered or holds other shapes or images.
        """
        path = folder / self.file
        if not path.is_file():
            raise CorruptArtifactError(f"{path} is missing; the index of saved results names it. {SAVE_AGAIN}")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CorruptArtifactError(f"{path} leads outside the folder: expected a file in it. {SAVE_AGAIN}")
        # The stream that is hashed is the one that is parsed.
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if (size := stream.tell()) != self.size_bytes or digest != self.sha256:
                raise CorruptArtifactError(
                    f"{path} was altered: it has {size:,} bytes and SHA-256 {digest[:12]}…, the index says "
                    f"{self.size_bytes:,} and {self.sha256[:12]}…. {SAVE_AGAIN}"
                )
            try:
                yield from self._pairs_in(stream)
            except (OSError, ValueError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile) as error:
                raise CorruptArtifactError(f"{path} holds no outputs of this run ({error}). {SAVE_AGAIN}") from error

    def _pairs_in(self, stream: IO[bytes]) -> Iterator[tuple[Outputs, Outputs]]:
        count = 0
        with zipfile.ZipFile(stream) as archive:
            for number in range(len(archive.namelist()) // (2 * len(self.outputs))):
                candidate, reference = (
                    {spec.name: _array(archive, f"{side}-{spec.name}-{number:04d}.npy", spec) for spec in self.outputs}
                    for side in ("candidate", "reference")
                )
                counts = {len(output) for side in (candidate, reference) for output in side.values()}
                if len(counts) != 1:
                    raise ValueError(f"the outputs of batch {number} are of different numbers of images: {counts}")
                count += counts.pop()
                yield candidate, reference
        if count != len(self.images):
            raise ValueError(f"outputs of {count} images, expected {len(self.images)}")


@dataclass(frozen=True, slots=True)
class SavedArtifact:
    """What a verification of one artifact said and saved."""

    artifact: str
    kind: ArtifactKind
    sha256: Sha256
    weights_sha256: Sha256
    runs: tuple[SavedRun, ...]
    not_run: tuple[str, ...]
    notes: tuple[str, ...]
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Index:
    """The document, but for its version and its hash of itself."""

    created: Timestamp
    tools: Mapping[str, str]
    artifacts: tuple[SavedArtifact, ...]


class SavedResults:
    """A new folder of saved results. Raises OutputExistsError when there is something in it."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputExistsError(f"{folder} is not an empty folder. Save the results to a new one, or remove it.")
        make_folder(folder)
        self.folder = folder
        self._written: list[SavedArtifact] = []
        self._runs: list[SavedRun] = []

    def new_run(
        self, artifact: Artifact, runner: RunnerInfo, names: tuple[str, str], outputs: Sequence[OutputSpec]
    ) -> "RunWriter":
        """Where the outputs of one runner of an artifact go. `names`: of candidate and reference."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{artifact.path.name}-{runner.backend}").strip("-.")
        numbered = (plain, *(f"{plain}-{number}" for number in range(2, 10_000)))
        path = next(path for name in numbered if not (path := self.folder / f"{name}.npz").exists())
        return RunWriter(path, runner, names, outputs)

    def keep(self, run: SavedRun) -> None:
        """Add a run to the artifact that `finish` names."""
        self._runs.append(run)

    def finish(
        self, artifact: Artifact, not_run: tuple[str, ...], notes: tuple[str, ...], failures: tuple[str, ...] = ()
    ) -> None:
        """Write the index with everything so far."""
        manifest, runs = artifact.manifest, tuple(self._runs)
        weights = manifest.model.weights.sha256
        words = (artifact.path.name, manifest.kind, artifact.sha256, weights, runs, not_run, notes, failures)
        self._written.append(SavedArtifact(*words))
        self._runs = []
        document = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "tools": tool_versions(),
            "artifacts": [asdict(saved) for saved in self._written],
        }
        text = json.dumps({**document, "sha256": own_hash(document)}, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(self.folder / INDEX_NAME, text + "\n")


class RunWriter:
    """Takes pairs of outputs batch by batch and writes each at once, so that no run is held in memory."""

    def __init__(self, path: Path, runner: RunnerInfo, names: tuple[str, str], outputs: Sequence[OutputSpec]) -> None:
        self._path, self._runner, self._names, self._outputs = path, runner, names, tuple(outputs)
        self._archive = zipfile.ZipFile(path, "x")
        self._images: list[str] = []
        self._labels: list[int] = []
        self._batches = 0

    def add(
        self,
        candidate: Mapping[str, Tensor],
        reference: Mapping[str, Tensor],
        images: Sequence[str],
        labels: Sequence[int] = (),
    ) -> None:
        """Outputs (n, ...) of both sides, saved in float32, and a name for each image."""
        for side, outputs in (("candidate", candidate), ("reference", reference)):
            for name, output in outputs.items():
                with self._archive.open(f"{side}-{name}-{self._batches:04d}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, output.detach().float().cpu().contiguous().numpy())
        self._batches += 1
        self._images.extend(image.encode("utf-8", "backslashreplace").decode() for image in images)
        self._labels.extend(labels)

    def close(
        self,
        result: ParityResult,
        class_output: str | None = None,
        class_names: tuple[str, ...] = (),
        available: int = 0,
        broken: tuple[BrokenImage, ...] = (),
        label_names: tuple[str, ...] = (),
    ) -> SavedRun:
        """The record of what was written and what it was judged by."""
        self._archive.close()
        labels = tuple(self._labels) if class_names else None
        return SavedRun(
            candidate=self._names[0],
            reference=self._names[1],
            gate=result.gate,
            batches=result.batches,
            images=tuple(self._images),
            labels=labels,
            outputs=self._outputs,
            file=self._path.name,
            size_bytes=self._path.stat().st_size,
            sha256=sha256_of_file(self._path),
            runner=self._runner,
            class_output=class_output if class_names else None,
            class_names=class_names,
            available=available if class_names else 0,
            broken=broken if class_names else (),
            label_names=label_names,
        )


def read_saved(folder: Path) -> tuple[SavedArtifact, ...]:
    """What `SavedResults` recorded in a folder; the hash of each file is checked when its outputs are asked for.

    Raises InputError when there is no index, CorruptArtifactError when it was altered, another version wrote it or a
    field is not what it should be.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise InputError(f"{folder} holds no saved results: expected {INDEX_NAME} in it. {SAVE_AGAIN}")
    try:
        document = strict_json(bounded_content(path, MAX_INDEX_BYTES), MAX_INDEX_BYTES)
        if not isinstance(document, dict):
            raise ValueError(f"it is {kind_of(document)}, expected an object")
        if document.pop("sha256", None) != own_hash(document):
            raise ValueError("its hash of itself does not match, so that it was altered")
        version = document.get("schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise ValueError(f"schema version {kind_of(version)}, expected {SCHEMA_VERSION}")
        return typed(document, _Index).artifacts
    except ValueError as error:
        raise CorruptArtifactError(f"{path} cannot be trusted ({error}). {SAVE_AGAIN}") from error


def changed_gate(gate: Gate, name: str | None = None, **limits: float | None) -> Gate:
    """The gate called `name`, or `gate` with other limits.

    `limits`: `relative_l2` and `kl` are the largest allowed, `cosine` (-1 to 1) and `top1` (a share, 0 to 1) the
    smallest; None leaves one as it is. Raises InputError for a name and limits at once, an unknown name and a limit
    outside its range.
    """
    given = {word: value for word, value in limits.items() if value is not None}
    if name is not None and given:
        options = ", ".join(f"--{word.replace('_', '-')}" for word in given)
        raise InputError(f"--gate {name} sets every limit: leave out {options}, or --gate.")
    if name is not None and name not in GATES:
        raise InputError(f"No gate is called {name!r}. Choose one of: {', '.join(GATES)}.")
    if name is not None or not given:
        return gate if name is None else GATES[name]
    for word, value in given.items():
        _, smallest, largest = LIMITS[word]
        if not smallest <= value <= largest:
            raise InputError(f"The limit of {word} must be in {smallest:g} to {largest:g}, got {value}.")
    changes: dict[str, Any] = {LIMITS[word][0]: value for word, value in given.items()}
    return replace(gate, name=f"{gate.name}, changed", **changes)


def judge_saved(folder: Path, gate: str | None = None, **limits: float | None) -> list[Verification]:
    """Judge everything that `verify --save-outputs` wrote in a folder, at its own gates or another: nothing is run.

    At the saved gates the numbers are the same. `gate` and `limits`: see `changed_gate`. Raises InputError when there
    are no saved results, CorruptArtifactError when a file is missing or was altered.
    """
    judged = []
    for saved in read_saved(folder):
        results = [
            result for run in saved.runs for result in _judged(run, folder, changed_gate(run.gate, gate, **limits))
        ]
        judged.append(
            Verification(saved.artifact, saved.kind, tuple(results), saved.not_run, saved.notes, saved.failures)
        )
    return judged


def save_for_polygraphy(folder: Path, pairs: Iterable[tuple[Tensor, Outputs]]) -> tuple[Path, Path]:
    """Write images as a model takes them and PyTorch's outputs in Polygraphy's own files, batch by batch.

    `polygraphy run FILE.onnx --onnxrt --load-inputs inputs.json --load-outputs reference.json` goes on from there.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    batches, results = list(pairs), RunResults()
    outputs = [{name: output.float().contiguous().numpy() for name, output in given.items()} for _, given in batches]
    results.add(outputs, runner_name="torch-fp32")
    inputs, reference = folder / "inputs.json", folder / "reference.json"
    with G_LOGGER.verbosity(G_LOGGER.WARNING):  # it tells of each file on stdout
        with whole_file(inputs) as path:
            save_json([{"images": images.cpu().numpy()} for images, _ in batches], str(path), "inputs")
        with whole_file(reference) as path:
            results.save(str(path))
    return inputs, reference


def own_hash(document: Mapping[str, Any]) -> str:
    """SHA-256 of an index, without its hash, as canonical JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _judged(run: SavedRun, folder: Path, gate: Gate) -> tuple[ParityResult, ...]:
    names_of_classes = run.class_names if run.labels is not None else ()
    comparison = RunningComparison(run.outputs, names_of_classes, run.class_output, run.label_names)
    at, labels = 0, run.labels or ()
    for candidate, reference in run.pairs(folder):
        here = slice(at, at + len(next(iter(candidate.values()))))
        comparison.add(candidate, reference, run.images[here], labels[here])
        at = here.stop
    names = (run.candidate, run.reference)
    return comparison.results(names, gate, sizes=run.batches, available=run.available, broken=run.broken)


def _array(archive: zipfile.ZipFile, name: str, spec: OutputSpec) -> Tensor:
    """A NumPy file of version 1 in C order, as `numpy.save` writes it; no more memory than its bytes justify."""
    try:
        entry = archive.getinfo(name)
    except KeyError as error:
        raise ValueError(f"{name} is missing") from error
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > MAX_BATCH_BYTES:
        raise ValueError(f"{name} is compressed, or its {entry.file_size:,} bytes are more than {MAX_BATCH_BYTES:,}")
    with archive.open(entry) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{name} is no NumPy file of version 1")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        content = stream.read(MAX_BATCH_BYTES)
    if dtype != np.dtype("<f4") or is_fortran or not all(shape) or tuple(shape[1:]) != spec.shape:
        raise ValueError(f"{name} is {dtype} of shape {shape}, expected float32 of {('N', *spec.shape)}")
    if len(content) != 4 * math.prod(shape):
        raise ValueError(f"{name} has {len(content):,} bytes for the shape {shape}")
    return torch.from_numpy(np.frombuffer(content, "<f4").reshape(shape).copy())
