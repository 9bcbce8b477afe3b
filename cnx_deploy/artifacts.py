"""Files that other stages or people rely on: how they reach the disk with their manifest, and how they are opened.

An artifact is one or more files and a manifest `<stem>.json` beside them. Files are written in a temporary folder,
flushed and renamed, the manifest last, so a manifest whose hashes match means a complete artifact. Nothing is
given to a parser before its hash matches (docs/decisions/0008-hash-before-parse.md).
"""

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from cnx_deploy.environment import tool_versions
from cnx_deploy.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.manifest import (
    SUFFIXES,
    ArtifactKind,
    FileRecord,
    Manifest,
    ModelRecord,
    WeightsRecord,
    relative_reference,
)
from cnx_deploy.manifest_reading import MAX_MANIFEST_BYTES, manifest_from_json
from cnx_deploy.whole_files import (
    check_name,
    flush,
    hidden_name,
    make_folder,
    place_errors,
    remove_folder,
    require_room,
    room_errors,
)

__all__ = [
    "Artifact",
    "FileRecord",
    "Manifest",
    "ModelRecord",
    "Staging",
    "WeightsRecord",
    "artifact_stem",
    "check_file",
    "find_artifacts",
    "open_artifact",
    "read_artifact",
    "relative_reference",
    "reusable_artifact",
    "sha256_of_file",
    "stage_artifact",
]

OTHER_FOLDER = "Choose another --output-dir."


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


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Staging:
    """A temporary folder whose files become an artifact at `commit`; without one they vanish."""

    def __init__(self, directory: Path, stem: str) -> None:
        self.directory = directory
        self.stem = stem
        self.folder = directory / f".{hidden_name(stem)}.tmp-{os.getpid()}"

    def record(self, *names: str) -> tuple[FileRecord, ...]:
        """Hash the named files of the staging folder."""
        return tuple(
            FileRecord(name, (self.folder / name).stat().st_size, sha256_of_file(self.folder / name)) for name in names
        )

    def commit(self, manifest: Manifest) -> Artifact:
        """Move the files into place, the manifest last. Files of an older artifact are replaced by rename.

        What the older manifest lists and the new one does not (weights in a file of their own) is removed at the end.
        InputError, before anything is moved, where the manifest could not be read again.
        """
        _check_readable(manifest)
        outdated = self._recorded_names() - {file.name for file in manifest.files}
        staged = self.folder / f"{self.stem}.json"
        staged.write_text(manifest.to_json(), encoding="utf-8")
        names = [*(file.name for file in manifest.files), staged.name]
        for name in names:  # all on the disk before the first is moved: no room is found out here
            flush(self.folder / name)
        for name in names:
            (self.folder / name).replace(self.directory / name)
        for name in outdated:
            (self.directory / name).unlink(missing_ok=True)
        flush(self.directory)
        return Artifact(self.directory / manifest.files[0].name, manifest)

    def _recorded_names(self) -> set[str]:
        """Files that the artifact in place consists of; none where its manifest cannot be read."""
        path = self.directory / f"{self.stem}.json"
        try:
            return {file.name for file in read_artifact(path).manifest.files} if path.is_file() else set()
        except CorruptArtifactError:
            return set()


@contextlib.contextmanager
def stage_artifact(directory: Path, stem: str, *, needed_bytes: int = 0) -> Iterator[Staging]:
    """Hold the artifact's lock and give a folder to write its files in.

    Another process that makes the same artifact is waited for; the system frees a dead process's lock. Folders that
    killed processes left are removed. `needed_bytes`: what the files will take, as far as it is known before.

    Raises InputError when `directory` cannot be written, DiskFullError when room is short before or meanwhile.
    """
    staging = Staging(directory, stem)
    make_folder(directory, OTHER_FOLDER)
    check_name(directory, f"{stem}.onnx.data", "Choose a shorter --name.")
    with place_errors(directory, OTHER_FOLDER):
        lock = FileLock(directory / f".{hidden_name(stem)}.lock")
        lock.acquire()
    try:
        for stale in directory.glob(f".{glob.escape(hidden_name(stem))}.tmp-*"):
            remove_folder(stale)
        require_room(directory, needed_bytes, stem)
        with place_errors(directory, OTHER_FOLDER):
            staging.folder.mkdir()
        with room_errors(directory / stem):
            yield staging
    finally:
        remove_folder(staging.folder)
        lock.release()


def open_artifact(path: Path) -> Artifact:
    """Read an artifact's manifest and check every file's size and hash against it.

    Raises InputError when there is no such file or no manifest, CorruptArtifactError when bytes differ.
    """
    artifact = read_artifact(path)
    for record in artifact.manifest.files:
        check_file(artifact.path.parent / record.name, record)
    return artifact


def read_artifact(path: Path) -> Artifact:
    """Read an artifact's manifest alone, no hash checked; same errors as `open_artifact`."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: expected an artifact's file. Name one that is in it.")
    manifest_path = path if path.suffix == ".json" else path.with_suffix(".json")
    if not manifest_path.is_file():
        what = "has no manifest" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: expected {manifest_path.name} beside it. Make it again with cnx-deploy.")
    try:
        with manifest_path.open("rb") as stream:
            manifest = manifest_from_json(stream.read(MAX_MANIFEST_BYTES + 1), manifest_path.stem)
    except ValueError as error:
        raise CorruptArtifactError(
            f"{manifest_path} is not a manifest this version can read ({error}). Make the artifact again with --force."
        ) from error
    return Artifact(manifest_path.parent / manifest.files[0].name, manifest)


def find_artifacts(directory: Path, kind: ArtifactKind | None = None) -> list[Artifact]:
    """Return the artifacts recorded in a folder, by name, without checking hashes; empty if there is no folder."""
    artifacts = [read_artifact(path) for path in sorted(directory.glob("*.json"))]
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
        found = read_artifact(manifest_path)
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


def check_file(path: Path, record: FileRecord) -> None:
    """Raise InputError where a recorded file is missing, CorruptArtifactError where its size or hash differs."""
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


def _check_readable(manifest: Manifest) -> None:
    """Names and licences come from outside: what JSON cannot hold must not end in a record that nobody can read."""
    try:
        manifest_from_json(manifest.to_json().encode("utf-8"), manifest.stem)
    except ValueError as error:
        raise InputError(
            f"{manifest.stem} cannot be recorded: {error}. Expected are values that a manifest can hold: change the "
            "name, the class names or the licence that is not one."
        ) from error


def _canonical(value: Any) -> Any:
    """The value as JSON would give it back (tuples become lists)."""
    return json.loads(json.dumps(value, sort_keys=True))
