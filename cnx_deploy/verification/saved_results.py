"""Logits of verifications on disk: who computed them, on which images, at which gate, so that they can be judged again.

A folder holds Polygraphy's RunResults files, reference and candidate in each, and `index.json`: their hashes, the
images, the gate and what made them. The index is written last, and again after each artifact; it carries a hash of
itself. Nothing is parsed before its hash matches.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from torch import Tensor

from cnx_deploy.core.artifacts import sha256_of_file
from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.files import make_folder, write_text
from cnx_deploy.core.gates import Gate, ParityResult
from cnx_deploy.core.manifest import Artifact, ArtifactKind, Count, Positive, Sha256, Timestamp
from cnx_deploy.core.strict_json import bounded_content, kind_of, shortened, strict_json, typed
from cnx_deploy.core.system import tool_versions
from cnx_deploy.runners.base import RunnerInfo
from cnx_deploy.verification.agreement import BrokenImage
from cnx_deploy.verification.polygraphy_io import MAX_OUTPUTS_BYTES, outputs_from_json, save_outputs

__all__ = [
    "INDEX_NAME", "Labelling", "OutputWriter", "SavedArtifact", "SavedFile", "SavedOutputs", "SavedRun", "read_saved",
]  # fmt: skip

INDEX_NAME = "index.json"
SCHEMA_VERSION = 1
LOGITS_A_FILE = 4_000_000
"""Of one side: 16 MB of float32, and several times that while its JSON is written or read."""
MAX_INDEX_BYTES = 128 << 20
"""Of the names of 50,000 images an entry takes 5 MB, for each runner of each artifact."""
SAVE_AGAIN = "Save the results again with cnx-deploy verify --save-outputs."


@dataclass(frozen=True, slots=True)
class SavedFile:
    """One file of logits, by its place within the folder."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*/outputs-[0-9]{4,9}\.json$(?!\n)")]
    size_bytes: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Labelling:
    """Of labelled images: the classes' names, how many images the folder has, and those that could not be read."""

    class_names: tuple[str, ...] = ()
    available: Count = 0
    broken: tuple[BrokenImage, ...] = ()


@dataclass(frozen=True, slots=True)
class SavedRun:
    """One candidate against the reference. `labels` None without; `images`: a name for each, in order."""

    candidate: str
    reference: str
    gate: Gate
    batches: tuple[Positive, ...]
    images: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    labels: tuple[Count, ...] | None
    files: Annotated[tuple[SavedFile, ...], msgspec.Meta(min_length=1)]
    runner: RunnerInfo
    details: Labelling = Labelling()

    def pairs(self, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of candidate and reference, (n, num_classes) float32 each, batch by batch as they were run.

        Raises CorruptArtifactError when a file is missing, was altered or holds other runners, shapes or images.
        """
        count, columns = 0, len(self.details.class_names) if self.labels is not None else None
        for record in self.files:
            path = folder / record.name
            for candidate, reference in self._pairs_of(path, _outputs(folder, record)):
                columns = columns or candidate.shape[1]
                count += len(candidate)
                if candidate.shape != reference.shape or candidate.shape[1] != columns or count > len(self.images):
                    shapes = f"{tuple(candidate.shape)} and {tuple(reference.shape)}"
                    raise CorruptArtifactError(
                        f"{path} holds logits of {shapes}: expected {columns} classes on both sides, and "
                        f"{len(self.images)} images in all. {SAVE_AGAIN}"
                    )
                yield candidate, reference
        if count != len(self.images):
            raise CorruptArtifactError(
                f"{folder} holds logits of {count} images: expected {len(self.images)} images. {SAVE_AGAIN}"
            )

    def _pairs_of(self, path: Path, outputs: Mapping[str, list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        if set(outputs) != {self.candidate, self.reference}:
            raise CorruptArtifactError(
                f"{path} holds {shortened(', '.join(outputs))}: expected {self.candidate}, {self.reference}. "
                f"{SAVE_AGAIN}"
            )
        candidates, references = outputs[self.candidate], outputs[self.reference]
        if len(candidates) != len(references):
            raise CorruptArtifactError(
                f"{path} holds {len(candidates)} batches of {self.candidate} and {len(references)} of "
                f"{self.reference}: expected as many. {SAVE_AGAIN}"
            )
        yield from zip(candidates, references, strict=True)


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


@dataclass(frozen=True, slots=True)
class _Index:
    """The document, but for its version and its hash of itself."""

    created: Timestamp
    tools: Mapping[str, str]
    artifacts: tuple[SavedArtifact, ...]


class SavedOutputs:
    """A new folder of saved results. Raises OutputExistsError when there is something in it."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputExistsError(f"{folder} is not an empty folder. Save the results to a new one, or remove it.")
        make_folder(folder)
        self.folder = folder
        self._written: list[SavedArtifact] = []
        self._runs: list[SavedRun] = []
        self._names: set[str] = set()

    def writer(self, artifact: Artifact, runner: RunnerInfo, names: tuple[str, str]) -> "OutputWriter":
        """Where the logits of one runner of an artifact go. `names`: of candidate and reference."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{artifact.path.name}-{runner.backend}").strip("-.")
        name = next(name for name in (plain, *(f"{plain}-{n}" for n in range(2, 10_000))) if name not in self._names)
        self._names.add(name)
        return OutputWriter(self, name, runner, names)

    def keep(self, run: SavedRun) -> None:
        """Add a run to the artifact that `finish` names."""
        self._runs.append(run)

    def finish(self, artifact: Artifact, not_run: tuple[str, ...], notes: tuple[str, ...]) -> None:
        """Write the index with everything so far."""
        weights = artifact.manifest.model.weights.sha256
        runs, self._runs = tuple(self._runs), []
        kind = artifact.manifest.kind
        found = SavedArtifact(artifact.path.name, kind, artifact.sha256, weights, runs, not_run, notes)
        self._written.append(found)
        document = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "tools": tool_versions(),
            "artifacts": [asdict(each) for each in self._written],
        }
        text = json.dumps({**document, "sha256": _own_hash(document)}, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(self.folder / INDEX_NAME, text + "\n")


class OutputWriter:
    """Takes pairs of logits batch by batch and writes them in files of bounded size."""

    def __init__(self, outputs: SavedOutputs, name: str, runner: RunnerInfo, names: tuple[str, str]) -> None:
        self._outputs = outputs
        self._name = name
        self._candidate, self._reference = names
        self._runner = runner
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._images: list[str] = []
        self._labels: list[int] = []
        self._files: list[SavedFile] = []

    def add(
        self, candidate: Tensor, reference: Tensor, images: Sequence[str], labels: Sequence[int] | None = None
    ) -> None:
        """Logits (n, num_classes) of both sides and a name for each image."""
        self._pairs.append((candidate.detach().float().cpu(), reference.detach().float().cpu()))
        self._images.extend(image.encode("utf-8", "backslashreplace").decode() for image in images)
        self._labels.extend(labels or ())
        if sum(pair[0].numel() for pair in self._pairs) >= LOGITS_A_FILE:
            self._write()

    def close(self, result: ParityResult, details: Labelling | None = None) -> None:
        """Write what is left and record what the result was judged by."""
        self._write()
        self._outputs.keep(
            SavedRun(
                candidate=self._candidate,
                reference=self._reference,
                gate=result.gate,
                batches=result.batches,
                images=tuple(self._images),
                labels=tuple(self._labels) if self._labels else None,
                files=tuple(self._files),
                runner=self._runner,
                details=details or Labelling(),
            )
        )

    def _write(self) -> None:
        if not self._pairs:
            return
        candidates, references = zip(*self._pairs, strict=True)
        self._pairs = []
        name = f"{self._name}/outputs-{len(self._files):04d}.json"
        path = self._outputs.folder / name
        save_outputs(path, {self._reference: references, self._candidate: candidates})
        self._files.append(SavedFile(name, path.stat().st_size, sha256_of_file(path)))


def read_saved(folder: Path) -> list[SavedArtifact]:
    """What `SavedOutputs` recorded in a folder; the hash of each file is checked when its logits are asked for.

    Raises InputError when there is no index, CorruptArtifactError when it was altered, another version wrote it or a
    field is not what it should be.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise InputError(f"{folder} holds no saved results: expected {INDEX_NAME} in it. {SAVE_AGAIN}")
    try:
        return list(_artifacts(strict_json(bounded_content(path, MAX_INDEX_BYTES), MAX_INDEX_BYTES)))
    except ValueError as error:
        raise CorruptArtifactError(f"{path} cannot be trusted ({error}). {SAVE_AGAIN}") from error


def _artifacts(document: Any) -> tuple[SavedArtifact, ...]:
    if not isinstance(document, dict):
        raise ValueError(f"it is {kind_of(document)}, expected an object")
    if document.pop("sha256", None) != _own_hash(document):
        raise ValueError("its hash of itself does not match, so that it was altered")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ValueError(f"schema version {kind_of(version)}, expected {SCHEMA_VERSION}")
    artifacts = typed(document, _Index).artifacts
    for number, artifact in enumerate(artifacts):
        for at, run in enumerate(artifact.runs):
            _check_together(run, f"artifacts[{number}].runs[{at}]")
    return artifacts


def _check_together(run: SavedRun, where: str) -> None:
    """What one field alone cannot tell."""
    if run.candidate == run.reference:
        raise ValueError(f"{where}.candidate: it is the reference too")
    if run.labels is None:
        return
    if len(run.labels) != len(run.images):
        raise ValueError(f"{where}.labels: {len(run.labels)} labels of {len(run.images)} images")
    if max(run.labels) >= len(run.details.class_names):
        raise ValueError(f"{where}.labels: {max(run.labels)} is none of {len(run.details.class_names)} classes")


def _own_hash(document: Mapping[str, Any]) -> str:
    """SHA-256 of the document as canonical JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _outputs(folder: Path, record: SavedFile) -> dict[str, list[Tensor]]:
    """Both sides' logits in a file of the folder, read once: what is hashed is what is parsed."""
    path = folder / record.name
    if not path.is_file():
        raise CorruptArtifactError(f"{path} is missing; the index of saved results names it. {SAVE_AGAIN}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CorruptArtifactError(f"{path} leads outside the folder: expected a file in it. {SAVE_AGAIN}")
    found = path.stat().st_size
    if found != record.size_bytes:
        raise CorruptArtifactError(
            f"{path} was altered: it has {found:,} bytes, the index says {record.size_bytes:,}. {SAVE_AGAIN}"
        )
    try:
        content = bounded_content(path, MAX_OUTPUTS_BYTES)
        digest = hashlib.sha256(content).hexdigest()
        if digest != record.sha256:
            raise CorruptArtifactError(
                f"{path} was altered: SHA-256 {digest[:12]}…, the index says {record.sha256[:12]}…. {SAVE_AGAIN}"
            )
        return outputs_from_json(content)
    except ValueError as error:
        raise CorruptArtifactError(f"{path} holds no outputs of this project ({error}). {SAVE_AGAIN}") from error
