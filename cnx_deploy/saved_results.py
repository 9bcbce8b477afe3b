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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cnx_deploy.artifacts import Artifact, sha256_of_file
from cnx_deploy.environment import tool_versions
from cnx_deploy.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.interchange import load_outputs, save_outputs
from cnx_deploy.parity import ParityResult
from cnx_deploy.runners.base import RunnerInfo
from cnx_deploy.whole_files import make_folder, write_text

__all__ = ["INDEX_NAME", "OutputWriter", "SavedArtifact", "SavedOutputs", "SavedRun", "read_saved"]

INDEX_NAME = "index.json"
SCHEMA_VERSION = 1
LOGITS_A_FILE = 4_000_000
"""Of one side: 16 MB of float32, and several times that while its JSON is written or read."""
SAVE_AGAIN = "Save the results again with cnx-deploy verify --save-outputs."


@dataclass(frozen=True, slots=True)
class SavedRun:
    """One candidate against the reference. `files`: paths within the folder and hashes; `labels` None without.

    `images`: a name for each, in order. `details`: what the verdict had to say besides (labelled images: the classes'
    names, the files that could not be read).
    """

    candidate: str
    reference: str
    gate: Mapping[str, Any]
    batches: tuple[int, ...]
    images: tuple[str, ...]
    labels: tuple[int, ...] | None
    files: tuple[Mapping[str, Any], ...]
    runner: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)

    def pairs(self, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of candidate and reference, (n, num_classes) float32 each, batch by batch as they were run.

        Raises CorruptArtifactError when a file is missing, was altered or holds other runners or images.
        """
        count = 0
        for record in self.files:
            path = folder / record["name"]
            _check_hash(path, record["sha256"])
            outputs = load_outputs(path)
            if set(outputs) != {self.candidate, self.reference}:
                raise CorruptArtifactError(
                    f"{path} holds {', '.join(outputs)}: expected {self.candidate}, {self.reference}. {SAVE_AGAIN}"
                )
            for candidate, reference in zip(outputs[self.candidate], outputs[self.reference], strict=True):
                count += len(candidate)
                yield candidate, reference
        if count != len(self.images):
            raise CorruptArtifactError(
                f"{folder} holds logits of {count} images: expected {len(self.images)} images. {SAVE_AGAIN}"
            )


@dataclass(frozen=True, slots=True)
class SavedArtifact:
    """What a verification of one artifact said and saved."""

    artifact: str
    kind: str
    sha256: str
    weights_sha256: str
    runs: tuple[SavedRun, ...]
    not_run: tuple[str, ...]
    notes: tuple[str, ...]


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
        self._files: list[dict[str, Any]] = []

    def add(
        self, candidate: Tensor, reference: Tensor, images: Sequence[str], labels: Sequence[int] | None = None
    ) -> None:
        """Logits (n, num_classes) of both sides and a name for each image."""
        self._pairs.append((candidate.detach().float().cpu(), reference.detach().float().cpu()))
        self._images.extend(images)
        self._labels.extend(labels or ())
        if sum(pair[0].numel() for pair in self._pairs) >= LOGITS_A_FILE:
            self._write()

    def close(self, result: ParityResult, **details: Any) -> None:
        """Write what is left and record what the result was judged by."""
        self._write()
        self._outputs.keep(
            SavedRun(
                candidate=self._candidate,
                reference=self._reference,
                gate=asdict(result.gate),
                batches=result.batches,
                images=tuple(self._images),
                labels=tuple(self._labels) if self._labels else None,
                files=tuple(self._files),
                runner=asdict(self._runner),
                details=details,
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
        self._files.append({"name": name, "size_bytes": path.stat().st_size, "sha256": sha256_of_file(path)})


def read_saved(folder: Path) -> list[SavedArtifact]:
    """What `SavedOutputs` recorded in a folder; the hash of each file is checked when its logits are asked for.

    Raises InputError when there is no index, CorruptArtifactError when it was altered or another version wrote it.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise InputError(f"{folder} holds no saved results: expected {INDEX_NAME} in it. {SAVE_AGAIN}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("sha256") != _own_hash(document):
            raise ValueError("its hash of itself does not match, so that it was altered")
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {document['schema_version']}, expected {SCHEMA_VERSION}")
        return [_artifact_from_dict(entry) for entry in document["artifacts"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptArtifactError(f"{path} cannot be trusted ({error}). {SAVE_AGAIN}") from error


def _artifact_from_dict(entry: dict[str, Any]) -> SavedArtifact:
    runs = []
    for run in entry["runs"]:
        for record in run["files"]:
            if Path(record["name"]).is_absolute() or ".." in Path(record["name"]).parts:
                raise ValueError(f"{record['name']!r} lies outside the folder")
        lists = {name: tuple(run[name]) for name in ("batches", "images", "files")}
        runs.append(SavedRun(**{**run, **lists, "labels": None if run["labels"] is None else tuple(run["labels"])}))
    words = {name: tuple(entry[name]) for name in ("not_run", "notes")}
    return SavedArtifact(**{**entry, **words, "runs": tuple(runs)})


def _own_hash(document: Mapping[str, Any]) -> str:
    """SHA-256 of the document as canonical JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _check_hash(path: Path, expected: str) -> None:
    if not path.is_file():
        raise CorruptArtifactError(f"{path} is missing; the index of saved results names it. {SAVE_AGAIN}")
    found = sha256_of_file(path)
    if found != expected:
        raise CorruptArtifactError(
            f"{path} was altered: SHA-256 {found[:12]}…, the index says {expected[:12]}…. {SAVE_AGAIN}"
        )
