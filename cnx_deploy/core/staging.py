"""How an artifact's files reach the disk together: written apart, committed by one rename, finished by the next.

Files and manifest are written into `.<stem>.tmp-<process>` and flushed. Renaming that folder to `.<stem>.commit` is the
moment at which the new artifact exists: before it the old one holds, and after it a process that dies leaves work that
the next reader or writer finishes. So there is no instant at which neither the old nor the new artifact can be had.
"""

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from cnx_deploy.core.errors import CorruptArtifactError, InputError, RefusedArtifactError
from cnx_deploy.core.files import (
    check_file,
    check_name,
    flush,
    hidden_name,
    make_folder,
    place_errors,
    remove_folder,
    require_room,
    room_errors,
    sha256_of_file,
)
from cnx_deploy.core.manifest import (
    MAX_MANIFEST_BYTES,
    Artifact,
    EngineManifest,
    FileRecord,
    OnnxManifest,
    manifest_from_json,
)

__all__ = ["Staging", "finish_commits", "stage_artifact"]

M = TypeVar("M", bound=OnnxManifest | EngineManifest)

OTHER_FOLDER = "Choose another --output-dir."
COMMIT = ".commit"


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

    def commit(self, manifest: M) -> Artifact[M]:
        """Put the files and their manifest into place, all or none; what only an older manifest lists is removed.

        InputError, before anything is moved, where the manifest could not be read again.
        """
        _check_readable(manifest)
        for name in (*(file.name for file in manifest.files), f"{self.stem}.json"):
            check_file(self.directory / name, OTHER_FOLDER)
        staged = self.folder / f"{self.stem}.json"
        staged.write_text(manifest.to_json(), encoding="utf-8")
        for name in (*(file.name for file in manifest.files), staged.name):
            flush(self.folder / name)
        flush(self.folder)
        pending = self.directory / f".{hidden_name(self.stem)}{COMMIT}"
        self.folder.rename(pending)
        flush(self.directory)
        _finish(pending)
        return Artifact(self.directory / manifest.files[0].name, manifest)


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
    with _locked(directory, stem):
        try:
            for stale in directory.glob(f".{glob.escape(hidden_name(stem))}.tmp-*"):
                remove_folder(stale)
            _finish(directory / f".{hidden_name(stem)}{COMMIT}")
            require_room(directory, needed_bytes, stem)
            with place_errors(directory, OTHER_FOLDER):
                staging.folder.mkdir()
            with room_errors(directory / stem):
                yield staging
        finally:
            remove_folder(staging.folder)


def finish_commits(directory: Path) -> None:
    """Put into place what processes that died had committed. Raises InputError where the folder cannot be written."""
    for pending in directory.glob(f".*{COMMIT}"):
        if pending.is_symlink():
            raise RefusedArtifactError(
                f"{pending} is a symbolic link, where a folder of a killed process was expected: what it leads to is "
                "not moved. Remove it."
            )
        with _locked(directory, pending.name[1 : -len(COMMIT)]):  # who holds it finishes; then there is nothing left
            _finish(pending)


@contextlib.contextmanager
def _locked(directory: Path, stem: str) -> Iterator[None]:
    with place_errors(directory, OTHER_FOLDER):
        lock = FileLock(directory / f".{hidden_name(stem)}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _finish(pending: Path) -> None:
    """Move what is left to move. Every step can be done twice, so it does not matter where an earlier one stopped.

    A commit may be anybody's: it moves regular files of the artifact whose name it bears, and removes no others.
    """
    directory = pending.parent
    for staged in pending.glob("*.json"):
        names = _names_in(staged)
        for name in [name for name in names if (pending / name).exists()]:
            (pending / name).replace(directory / name)
        for name in _own_names(directory / staged.name) - set(names):
            (directory / name).unlink(missing_ok=True)
        flush(directory)
        staged.replace(directory / staged.name)
    if pending.exists():
        flush(directory)
        remove_folder(pending)


def _names_in(staged: Path) -> list[str]:
    try:
        if f".{hidden_name(staged.stem)}{COMMIT}" != staged.parent.name:
            raise ValueError(f"it is of another artifact, {staged.stem}")
        return [file.name for file in _manifest_in(staged).files]
    except ValueError as error:
        raise CorruptArtifactError(
            f"{staged} was to be put into place and is no manifest ({error}): expected what a killed process had "
            f"finished. Remove {staged.parent} and make the artifact again."
        ) from error


def _own_names(manifest_path: Path) -> set[str]:
    """Files of the artifact in place that bear its name; none where its manifest cannot be read.

    Other names that a manifest lists may be of files that were there before it came.
    """
    try:
        listed = {file.name for file in _manifest_in(manifest_path).files}
    except (FileNotFoundError, ValueError):
        return set()
    own = {name for name in listed if name.startswith(f"{manifest_path.stem}.")}
    return {name for name in own if not (manifest_path.parent / name).is_dir()}


def _manifest_in(path: Path) -> OnnxManifest | EngineManifest:
    """ValueError for what is none; a pipe or a device would be read for ever."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as stream:
        return manifest_from_json(stream.read(MAX_MANIFEST_BYTES + 1), path.stem)


def _check_readable(manifest: OnnxManifest | EngineManifest) -> None:
    """Names and licences come from outside: what JSON cannot hold must not end in a record that nobody can read."""
    try:
        manifest_from_json(manifest.to_json().encode("utf-8"), manifest.stem)
    except ValueError as error:
        raise InputError(
            f"{manifest.stem} cannot be recorded: {error}. Expected are values that a manifest can hold: choose "
            "another name, other class names or another licence."
        ) from error
