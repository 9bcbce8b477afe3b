"""Files that other stages or people rely on: their manifest, their hash, and how they reach the disk.

An artifact is one or more files and a manifest `<stem>.json` beside them. Files are written in a temporary folder,
flushed and renamed, the manifest last, so a manifest whose hashes match means a complete artifact. Nothing is
given to a parser before its hash matches (docs/decisions/0008-hash-before-parse.md).
"""

import contextlib
import datetime
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock

from cnx_deploy.environment import tool_versions
from cnx_deploy.errors import CorruptArtifactError, InputError, OutputExistsError

__all__ = [
    "Artifact",
    "FileRecord",
    "Manifest",
    "ModelRecord",
    "Staging",
    "WeightsRecord",
    "artifact_stem",
    "find_artifacts",
    "open_artifact",
    "read_artifact",
    "relative_reference",
    "reusable_artifact",
    "sha256_of_file",
    "stage_artifact",
]

SCHEMA_VERSION = 1
ArtifactKind = Literal["checkpoint", "onnx", "engine"]
SUFFIXES: dict[str, str] = {"checkpoint": ".safetensors", "onnx": ".onnx", "engine": ".engine"}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of an artifact, by name within the artifact's folder."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class WeightsRecord:
    """Where weights come from and what may be done with them.

    `reference` is the seed ("0"), the checkpoint's path relative to the manifest's folder, or the timm tag.
    `sha256` is over the tensors (`model.checkpoint.hash_weights`), so it survives a change of file format.
    """

    origin: Literal["random", "checkpoint", "pretrained"]
    reference: str
    sha256: str
    licence: str


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """The network inside an artifact. `preprocessing` is `data.Preprocessing` as a dictionary.

    `head_is_new`: the head was drawn at random when the weights were loaded, because the classes differed.
    """

    variant: str
    num_classes: int
    image_size: int
    weights: WeightsRecord
    preprocessing: Mapping[str, Any]
    class_names: tuple[str, ...] | None = None
    head_is_new: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is, from what it was made and what was found when it was made.

    `files`: the main file first. `request`: what was asked for; the same request on the same source with the same
    tools makes the same artifact. `source_sha256`: the weights of an ONNX file, the ONNX file of an engine.
    `facts`: what the stage found (types, sizes, compiled kernels). `created`: UTC, seconds.
    """

    kind: ArtifactKind
    stem: str
    files: tuple[FileRecord, ...]
    model: ModelRecord
    request: Mapping[str, Any]
    source_name: str
    source_sha256: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=tool_versions)
    created: str = field(default_factory=lambda: _now())
    schema_version: int = SCHEMA_VERSION

    def model_seen_from(self, folder: Path, own_folder: Path) -> ModelRecord:
        """The model record for a manifest in `folder`: a checkpoint's path is relative to the manifest's folder."""
        weights = self.model.weights
        if weights.origin != "checkpoint":
            return self.model
        moved = relative_reference(own_folder / weights.reference, folder)
        return replace(self.model, weights=replace(weights, reference=moved))

    def to_json(self) -> str:
        """Serialise with sorted keys and a closing newline."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A main file and its manifest; `reused` when a stage found it made already."""

    path: Path
    manifest: Manifest
    reused: bool = field(default=False, compare=False)

    @property
    def sha256(self) -> str:
        """Hash of the main file."""
        return self.manifest.files[0].sha256


def artifact_stem(
    name: str, image_size: int, precision: str, runtime: str | None = None, target: str | None = None
) -> str:
    """`<name>-<image size>-<precision>[-<runtime>-<target>]`, the file name without its suffix."""
    if not name or Path(name).name != name or name.startswith("."):
        raise InputError(
            f"{name!r} cannot be an artifact's name: give a plain file name without a folder or leading dot."
        )
    return "-".join(str(part) for part in (name, image_size, precision, runtime, target) if part is not None)


def relative_reference(path: Path, folder: Path) -> str:
    """`path` as a manifest in `folder` names it: relative, so that a moved project keeps its links."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Staging:
    """A temporary folder whose files become an artifact at `commit`; without one they vanish."""

    def __init__(self, directory: Path, stem: str) -> None:
        self.directory = directory
        self.stem = stem
        self.folder = directory / f".{stem}.tmp-{os.getpid()}"

    def record(self, *names: str) -> tuple[FileRecord, ...]:
        """Hash the named files of the staging folder."""
        return tuple(
            FileRecord(name, (self.folder / name).stat().st_size, sha256_of_file(self.folder / name)) for name in names
        )

    def commit(self, manifest: Manifest) -> Artifact:
        """Move the files into place, the manifest last. Files of an older artifact are replaced by rename.

        What the older manifest lists and the new one does not (weights in a file of their own) is removed at the end.
        """
        outdated = self._recorded_names() - {file.name for file in manifest.files}
        for file in manifest.files:
            _flush(self.folder / file.name)
            (self.folder / file.name).replace(self.directory / file.name)
        staged = self.folder / f"{self.stem}.json"
        staged.write_text(manifest.to_json(), encoding="utf-8")
        _flush(staged)
        staged.replace(self.directory / staged.name)
        for name in outdated:
            (self.directory / name).unlink(missing_ok=True)
        _flush(self.directory)
        return Artifact(self.directory / manifest.files[0].name, manifest)

    def _recorded_names(self) -> set[str]:
        """Files that the artifact in place consists of; none where its manifest cannot be read."""
        path = self.directory / f"{self.stem}.json"
        try:
            return {file.name for file in _read_artifact(path).manifest.files} if path.is_file() else set()
        except CorruptArtifactError:
            return set()


@contextlib.contextmanager
def stage_artifact(directory: Path, stem: str) -> Iterator[Staging]:
    """Hold the artifact's lock and give a folder to write its files in.

    Another process that makes the same artifact is waited for. Folders that killed processes left are removed.
    Raises InputError when `directory` cannot be written.
    """
    staging = Staging(directory, stem)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / f".{stem}.lock")
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"Cannot write in {directory}: {error.strerror or error}. Choose another --output-dir."
        ) from error
    try:
        for stale in directory.glob(f".{glob.escape(stem)}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        staging.folder.mkdir()
        yield staging
    finally:
        shutil.rmtree(staging.folder, ignore_errors=True)
        lock.release()


def open_artifact(path: Path) -> Artifact:
    """Read an artifact's manifest and check every file's size and hash against it.

    Raises InputError when there is no such file or no manifest, CorruptArtifactError when bytes differ.
    """
    artifact = _read_artifact(path)
    for record in artifact.manifest.files:
        _check_file(artifact.path.parent / record.name, record)
    return artifact


def read_artifact(path: Path) -> Artifact:
    """Read an artifact's manifest alone, no hash checked; same errors as `open_artifact`."""
    return _read_artifact(path)


def find_artifacts(directory: Path, kind: ArtifactKind | None = None) -> list[Artifact]:
    """Return the artifacts recorded in a folder, by name, without checking hashes; empty if there is no folder."""
    artifacts = [_read_artifact(path) for path in sorted(directory.glob("*.json"))]
    return [artifact for artifact in artifacts if kind in (None, artifact.manifest.kind)]


def reusable_artifact(
    directory: Path,
    stem: str,
    kind: ArtifactKind,
    request: Mapping[str, Any],
    source_sha256: str,
    *,
    force: bool,
) -> Artifact | None:
    """Return the artifact that the same inputs made, None when the place is free or `force` is set.

    Raises OutputExistsError when something else is there, CorruptArtifactError when it was altered since.
    """
    main = directory / f"{stem}{SUFFIXES[kind]}"
    manifest_path = directory / f"{stem}.json"
    if force or not (main.exists() or manifest_path.exists()):
        return None
    if manifest_path.exists():
        found = _read_artifact(manifest_path)
        same = _canonical(found.manifest.request) == _canonical(request) and found.manifest.kind == kind
        if same and found.manifest.source_sha256 == source_sha256:
            if not main.exists():  # a record without its binary, as committed records are: make it again
                return None
            if found.manifest.tools == tool_versions():
                return replace(open_artifact(main), reused=True)
    raise OutputExistsError(
        f"{main} exists and was made from other inputs or by other versions. "
        "Use --force to replace it, or another --name or --output-dir."
    )


def _read_artifact(path: Path) -> Artifact:
    if path.is_dir():
        raise InputError(f"{path} is a folder: expected an artifact's file. Name one that is in it.")
    manifest_path = path if path.suffix == ".json" else path.with_suffix(".json")
    if not manifest_path.is_file():
        what = "has no manifest" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: expected {manifest_path.name} beside it. Make it again with cnx-deploy.")
    try:
        manifest = _manifest_from_dict(json.loads(manifest_path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptArtifactError(
            f"{manifest_path} is not a manifest this version can read ({error}). Make the artifact again with --force."
        ) from error
    return Artifact(manifest_path.parent / manifest.files[0].name, manifest)


def _manifest_from_dict(data: dict[str, Any]) -> Manifest:
    if data["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema version {data['schema_version']}, expected {SCHEMA_VERSION}")
    if data["kind"] not in get_args(ArtifactKind):
        raise ValueError(f"unknown kind {data['kind']!r}")
    files = tuple(FileRecord(**record) for record in data["files"])
    if not files or any(Path(record.name).name != record.name or record.name in ("", "..") for record in files):
        raise ValueError("file names must be plain names, at least one")
    model = dict(data["model"])
    model["weights"] = WeightsRecord(**model["weights"])
    model["class_names"] = tuple(model["class_names"]) if model.get("class_names") else None
    return Manifest(**{**data, "files": files, "model": ModelRecord(**model)})


def _check_file(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing; its manifest is here. Make it again with cnx-deploy.")
    size = path.stat().st_size
    if size != record.size_bytes:
        raise CorruptArtifactError(
            f"{path} has {size} bytes, its manifest says {record.size_bytes}. Make it again with --force."
        )
    found = sha256_of_file(path)
    if found != record.sha256:
        raise CorruptArtifactError(
            f"{path} was altered: SHA-256 {found[:12]}…, its manifest says {record.sha256[:12]}…. "
            "Make it again with --force."
        )


def _canonical(value: Any) -> Any:
    """The value as JSON would give it back (tuples become lists)."""
    return json.loads(json.dumps(value, sort_keys=True))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
