"""Artifacts as later stages and people find them: opened, checked against their manifest, used again.

An artifact is one or more files and a manifest `<stem>.json` beside them; `staging` puts them into place together.
Nothing is given to a parser before its hash matches (docs/decisions/0008-hash-before-parse.md).
"""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeGuard, overload

from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError, RefusedArtifactError
from cnx_deploy.core.files import hidden_path, kind_of_weights, sha256_of_file
from cnx_deploy.core.image_size import ImageSize, size_text
from cnx_deploy.core.manifest import (
    MAX_MANIFEST_BYTES,
    SUFFIXES,
    Artifact,
    EngineManifest,
    EngineRequest,
    FileRecord,
    OnnxManifest,
    OnnxRequest,
    manifest_from_json,
)
from cnx_deploy.core.staging import Staging, stage_artifact
from cnx_deploy.core.system import tool_versions

__all__ = [
    "Staging",
    "artifact_stem",
    "check_file",
    "find_artifacts",
    "is_engine",
    "is_onnx",
    "open_artifact",
    "read_artifact",
    "refused_engine",
    "reusable_artifact",
    "select_artifacts",
    "sha256_of_file",
    "stage_artifact",
]

RENAMES_SECONDS = 2.0
"""Longer than a writer takes to move the two or three files of an artifact into place on a disk that is busy."""


def artifact_stem(
    name: str, image_size: ImageSize | str, precision: str, runtime: str | None = None, target: str | None = None
) -> str:
    """`<name>-<image size>-<precision>[-<runtime>-<target>]`, the file name without its suffix.

    A range of sizes is the text of `DeploySpec.size_text`.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise InputError(
            f"{name!r} cannot be an artifact's name: give a plain file name without a folder or leading dot."
        )
    size = image_size.replace(":", "-") if isinstance(image_size, str) else size_text(image_size)
    return "-".join(str(part) for part in (name, size, precision, runtime, target) if part is not None)


def open_artifact(path: Path) -> Artifact:
    """Read an artifact's manifest and check every file's size and hash against it.

    Raises InputError when there is no such file or no manifest, RefusedArtifactError for an engine without one,
    CorruptArtifactError when bytes differ.
    """
    failed, deadline = None, time.monotonic() + RENAMES_SECONDS
    while True:
        # A folder has no manifest, and "." no name to look for: `read_artifact` says so.
        is_written = not path.is_dir() and hidden_path(path.with_suffix(""), ".tmp").exists()
        artifact = read_artifact(path)
        try:
            for record in artifact.manifest.files:
                check_file(artifact.path.parent / record.name, record)
        except (CorruptArtifactError, InputError):
            # Another process may be between the renames of a new artifact. Each manifest gets a second look, and more
            # while a writer is there.
            if artifact == failed and not (is_written and time.monotonic() < deadline):
                raise
            failed = artifact
            time.sleep(0.02 if is_written else 0.0)
        else:
            return artifact


def read_artifact(path: Path) -> Artifact:
    """Read an artifact's manifest alone, no hash checked; same errors as `open_artifact`."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected the path of an ONNX file, an engine or a manifest.")
    manifest_path = path if path.suffix == ".json" else path.with_suffix(".json")
    if not manifest_path.is_file() and path.suffix == SUFFIXES["engine"] and path.exists():
        raise refused_engine(path)
    if not manifest_path.is_file():
        if _is_checkpoint(path):
            raise InputError(
                f"{path} is a checkpoint; expected an ONNX file or an engine. Make one of it: "
                f"cnx-deploy export --variant NAME --checkpoint {shlex.quote(str(path))}."
            )
        what = "has no manifest" if path.exists() else "does not exist"
        raise InputError(
            f"{path} {what}: expected {manifest_path.name} beside it. Make it again with cnx-deploy; an ONNX file from "
            "elsewhere gets a manifest from cnx-deploy rescue."
        )
    try:
        with manifest_path.open("rb") as stream:
            manifest = manifest_from_json(stream.read(MAX_MANIFEST_BYTES + 1), manifest_path.stem)
    except ValueError as error:
        raise CorruptArtifactError(
            f"{manifest_path} is not a manifest this version can read ({error}). Make the artifact again with --force."
        ) from error
    names = [file.name for file in manifest.files]
    if path.name not in (manifest_path.name, *names):
        program = " torch.export.load takes a program of torch.export." if path.suffix == ".pt2" else ""
        raise InputError(
            f"{path} is not what {manifest_path.name} beside it describes: expected {names[0]}.{program} "
            "Name that file."
        )
    return Artifact(manifest_path.parent / names[0], manifest)


def _is_checkpoint(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return kind_of_weights(stream.read(16), path.stat().st_size) is not None


def refused_engine(path: Path) -> RefusedArtifactError:
    """What is said of an engine that no manifest names: to load it would be to run whatever is in it."""
    return RefusedArtifactError(
        f"{path} is refused: an engine is native code, and no manifest beside it names it and its hash. "
        "Build it with cnx-deploy build-trt, or put its manifest back."
    )


def is_onnx(artifact: Artifact) -> TypeGuard[Artifact[OnnxManifest]]:
    """Whether it is an ONNX file."""
    return artifact.manifest.kind == "onnx"


def is_engine(artifact: Artifact) -> TypeGuard[Artifact[EngineManifest]]:
    """Whether it is a TensorRT engine."""
    return artifact.manifest.kind == "engine"


@overload
def find_artifacts(directory: Path, kind: Literal["onnx"]) -> list[Artifact[OnnxManifest]]: ...
@overload
def find_artifacts(directory: Path, kind: Literal["engine"]) -> list[Artifact[EngineManifest]]: ...
@overload
def find_artifacts(directory: Path) -> list[Artifact]: ...
def find_artifacts(directory: Path, kind: Literal["onnx", "engine"] | None = None) -> list[Any]:
    """Return the artifacts recorded in a folder, by name, without checking hashes; empty if there is no folder."""
    artifacts = [read_artifact(path) for path in sorted(directory.glob("*.json"))]
    return [artifact for artifact in artifacts if kind in (None, artifact.manifest.kind)]


def select_artifacts(
    files: Sequence[Path], export_dir: Path, engines_dir: Path, note: Callable[[str], None]
) -> Iterator[Artifact]:
    """Yield the artifacts named, or everything recorded in both folders whose file is present, network by network.

    Only named files are hashed here. `note` is told how many recorded artifacts have no file.
    """
    if files:
        yield from (open_artifact(path) for path in files)
        return
    recorded: list[Artifact] = [*find_artifacts(export_dir, "onnx"), *find_artifacts(engines_dir, "engine")]
    present = [artifact for artifact in recorded if artifact.path.is_file()]
    if len(present) < len(recorded):
        note(f"{len(recorded) - len(present)} recorded artifacts have no file here; export and build make them again.")
    if not present:
        raise InputError(
            f"Nothing is recorded and present in {export_dir} or {engines_dir}. "
            "Run `cnx-deploy export --variant atto` first, or name the files."
        )
    yield from sorted(
        present, key=lambda artifact: (artifact.manifest.model.weights.sha256, artifact.manifest.kind != "onnx")
    )


def reusable_artifact(
    directory: Path,
    stem: str,
    request: OnnxRequest | EngineRequest,
    source_sha256: str,
    *,
    force: bool,
) -> Artifact | None:
    """Return the artifact that the same inputs made, None when the place is free or `force` is set.

    Raises OutputExistsError when something else is there, CorruptArtifactError when it was altered since.
    """
    main = directory / f"{stem}{SUFFIXES['onnx' if isinstance(request, OnnxRequest) else 'engine']}"
    manifest_path = directory / f"{stem}.json"
    if force or not (main.exists() or manifest_path.exists()):
        return None
    if manifest_path.exists():
        found = read_artifact(manifest_path)
        if found.manifest.request == request and found.manifest.source_sha256 == source_sha256:
            if not main.exists():  # a record without its binary, as committed records are: make it again
                return None
            if found.manifest.tools == tool_versions():
                return replace(open_artifact(main), reused=True)
    elsewhere = "--name or --output-dir" if isinstance(request, OnnxRequest) else "--output-dir"
    raise OutputExistsError(
        f"{main} exists and was made from other inputs or by other versions. "
        f"Use --force to replace it, or another {elsewhere}."
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
