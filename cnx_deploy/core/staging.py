"""How an artifact's files reach the disk together: written apart, then moved into place, the main file last.

A process that is killed while it moves them leaves a manifest whose files are missing or do not have its hashes: no
reader takes that for good, and the same command makes it again (docs/decisions/0016-main-file-last.md).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.files import check_file, flush, make_folder, place_errors, sha256_of_file, temporary_folder
from cnx_deploy.core.manifest import (
    MAX_MANIFEST_BYTES,
    Artifact,
    EngineManifest,
    FileRecord,
    OnnxManifest,
    manifest_from_json,
)

__all__ = ["Staging", "stage_artifact"]

M = TypeVar("M", bound=OnnxManifest | EngineManifest)

OTHER_FOLDER = "Choose another --output-dir."


@contextlib.contextmanager
def stage_artifact(directory: Path, stem: str, *, needed_bytes: int = 0) -> Iterator["Staging"]:
    """Hold the artifact's lock and give a temporary folder for its files.

    Another process that makes the same artifact is waited for. What a killed process left is removed.

    Args:
        directory: The folder of the artifact; it is made where it is missing.
        stem: The artifact's file name without its suffix.
        needed_bytes: What the files will take, as far as it is known before.

    Raises:
        InputError: `directory` cannot be written.
        DiskFullError: Room is short, before or while the files are written.
    """
    make_folder(directory, OTHER_FOLDER)
    check_file(directory / f"{stem}.onnx.data", OTHER_FOLDER)
    with temporary_folder(directory / stem, needed_bytes) as folder:
        yield Staging(directory, folder)


class Staging:
    """A temporary folder whose files become an artifact at `commit`; without one they vanish."""

    def __init__(self, directory: Path, folder: Path) -> None:
        self.directory = directory
        self.folder = folder

    def record(self, *names: str) -> tuple[FileRecord, ...]:
        """Hash the named files of the temporary folder."""
        paths = [self.folder / name for name in names]
        return tuple(FileRecord(path.name, path.stat().st_size, sha256_of_file(path)) for path in paths)

    def commit(self, manifest: M) -> Artifact[M]:
        """Move the manifest and the files into place; remove what only an older manifest of the name lists.

        Raises:
            InputError: The manifest could not be read again, or a folder is in the way. Nothing has been moved then.
        """
        names = [f"{manifest.stem}.json", *reversed([file.name for file in manifest.files])]  # the main file is first
        self._move(manifest, names, _outdated(self.directory / names[0], names))
        return Artifact(self.directory / names[-1], manifest)

    def restate(self, made: Artifact[M], manifest: M) -> Artifact[M]:
        """Give files that stay as they are another manifest, where it differs: who reads it is told what holds now."""
        if manifest == made.manifest:
            return made
        self._move(manifest, [f"{manifest.stem}.json"])
        return replace(made, manifest=manifest)

    def _move(self, manifest: OnnxManifest | EngineManifest, names: list[str], outdated: Sequence[Path] = ()) -> None:
        """Write the manifest, and move the named files into place in their order."""
        _check_readable(manifest)
        for target in names:
            check_file(self.directory / target, OTHER_FOLDER)
        (self.folder / names[0]).write_text(manifest.to_json(), encoding="utf-8")
        for path in (*self.folder.iterdir(), self.folder):
            flush(path)
        with place_errors(self.directory, OTHER_FOLDER):
            for path in outdated:
                path.unlink()
            for target in names:
                (self.folder / target).replace(self.directory / target)
        flush(self.directory)


def _check_readable(manifest: OnnxManifest | EngineManifest) -> None:
    """Names and licences come from outside: what JSON cannot hold must not end in a record that nobody can read."""
    try:
        manifest_from_json(manifest.to_json().encode("utf-8"), manifest.stem)
    except ValueError as error:
        raise InputError(
            f"{manifest.stem} cannot be recorded: {error}. Expected are values that a manifest can hold: choose "
            "another name, other class names or another licence."
        ) from error


def _outdated(manifest_path: Path, names: list[str]) -> list[Path]:
    """Files that the manifest in place lists and `names` does not.

    Only names that begin as the artifact's do: others that a manifest lists may be of files that were there before it.
    """
    try:
        if not manifest_path.is_file():  # a pipe would be read for ever
            return []
        with manifest_path.open("rb") as stream:
            older = manifest_from_json(stream.read(MAX_MANIFEST_BYTES + 1), manifest_path.stem)
    except (OSError, ValueError):
        return []
    paths = [manifest_path.parent / file.name for file in older.files if file.name not in names]
    return [path for path in paths if path.name.startswith(f"{manifest_path.stem}.") and path.is_file()]
