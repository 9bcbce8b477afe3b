"""Who made this artifact? A signature `<stem>.sig` beside the manifest, over it and every file that it lists.

Keys are EC keys in files, no network is asked, and nothing but the manifest is parsed before its signature is checked
(docs/decisions/0017-signatures-per-artifact.md). `signing_library` signs and verifies, `signing_keys` reads keys.
"""

import hashlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from cnx_deploy.artifacts import Artifact, find_artifacts, read_artifact
from cnx_deploy.errors import (
    CorruptArtifactError,
    InputError,
    MissingRequirementError,
    OutputExistsError,
    RefusedArtifactError,
)
from cnx_deploy.manifest_reading import MAX_MANIFEST_BYTES, manifest_from_json
from cnx_deploy.whole_files import whole_file

__all__ = [
    "check_signature",
    "check_signatures",
    "key_is_encrypted",
    "password_from_file",
    "sign_artifact",
    "signature_beside",
    "signature_path",
]

SUFFIX = ".sig"


def signature_path(artifact: Artifact) -> Path:
    """Where an artifact's signature is, or would be."""
    return artifact.path.parent / f"{artifact.manifest.stem}{SUFFIX}"


def signature_beside(artifact: Artifact) -> str:
    """Whether one is there, in words; it takes the public key to check it."""
    path = signature_path(artifact)
    return f"{path.name}, not checked: cnx-deploy verify --signed PUBLIC_KEY" if path.is_file() else "none"


def sign_artifact(artifact: Artifact, key: Path, *, password: bytes | None = None, force: bool = False) -> Path:
    """Sign an artifact's manifest and files with a private EC key; what was altered is not signed.

    An older signature by the same key is replaced, another file in its place with `force`. Raises
    MissingRequirementError without the extra `signing`, InputError for a key that is none, OutputExistsError, and
    CorruptArtifactError or RefusedArtifactError for files that are not the manifest's.
    """
    _require_library()
    from cnx_deploy.signing_keys import private_key_fingerprint
    from cnx_deploy.signing_library import sign_files

    fingerprint = private_key_fingerprint(key, password)
    path = signature_path(artifact)
    files = _files_of(artifact)
    if os.path.lexists(path) and not force:
        _check_replaceable(path, fingerprint)
    with whole_file(path) as temporary:
        sign_files(path.parent, files, key, password, temporary)
    return path


def check_signature(artifact: Artifact, public_key: Path) -> None:
    """Check that an artifact has a signature by this key over exactly its manifest and files, which are hashed.

    Raises MissingRequirementError without the extra `signing`, InputError for a key that is none, RefusedArtifactError
    where there is no such signature, CorruptArtifactError where a file is not what it was or is gone.
    """
    _require_library()
    from cnx_deploy.signing_keys import public_key_fingerprint
    from cnx_deploy.signing_library import verify_files

    fingerprint = public_key_fingerprint(public_key)
    path = signature_path(artifact)
    if not path.is_file():
        raise RefusedArtifactError(
            f"{artifact.path.name} has no signature: expected {path}. Ask who made it for theirs, or sign it: "
            f"cnx-deploy sign {artifact.path} --key KEY.pem"
        )
    verify_files(path.parent, _files_of(artifact), public_key, fingerprint, path)


def check_signatures(files: Sequence[Path], export_dir: Path, engines_dir: Path, public_key: Path) -> list[Artifact]:
    """Check the artifacts named, or everything recorded in both folders, and return them; see `check_signature`.

    A record whose files are not here counts as one whose files are gone. Raises InputError where nothing is recorded.
    """
    _require_library()
    from cnx_deploy.signing_keys import public_key_fingerprint

    public_key_fingerprint(public_key)
    artifacts = [read_artifact(path) for path in files] or [
        *find_artifacts(export_dir, "onnx"),
        *find_artifacts(engines_dir, "engine"),
    ]
    if not artifacts:
        raise InputError(f"Nothing is recorded in {export_dir} or {engines_dir} that could be signed: name the files.")
    for artifact in artifacts:
        check_signature(artifact, public_key)
    return artifacts


def key_is_encrypted(key: Path) -> bool:
    """Whether a private key takes a password. Raises InputError where there is no such file."""
    _require_library()
    from cnx_deploy.signing_keys import is_encrypted

    return is_encrypted(key)


def password_from_file(path: Path) -> bytes:
    """The first line of a file. Raises InputError where there is none."""
    _require_library()
    from cnx_deploy.signing_keys import password_in

    return password_in(path)


def _require_library() -> None:
    """Raise MissingRequirementError unless `signing_keys` and `signing_library` can be imported."""
    try:
        importlib.import_module("cnx_deploy.signing_library")
    except ImportError as error:
        raise MissingRequirementError(
            f"Signatures take the package model-signing, which cannot be imported ({error}). Install it with "
            "pip install 'cnx-deploy[signing]'."
        ) from error


def _files_of(artifact: Artifact) -> dict[str, str]:
    """Name -> SHA-256 of what a signature covers: the manifest as it is on the disk, the files as it says."""
    folder, manifest = artifact.path.parent, artifact.manifest
    own = f"{manifest.stem}.json"
    files = {record.name: record.sha256 for record in manifest.files}
    if f"{manifest.stem}{SUFFIX}" in files:
        raise RefusedArtifactError(f"{folder / own} lists its own signature as a file: expected a model's. Remove it.")
    for name in (own, *files):
        path = folder / name
        if path.is_symlink():
            raise RefusedArtifactError(
                f"{path} is a symbolic link: what it leads to can change after it is signed. Copy the file there."
            )
        if not path.is_file():
            raise CorruptArtifactError(
                f"{path} is missing or no file, and the manifest lists it. Copy it from where it was signed, or make "
                "the artifact again with --force."
            )
    return {own: _manifest_sha256(folder / own, artifact), **files}


def _manifest_sha256(path: Path, artifact: Artifact) -> str:
    """Of the bytes that say what `artifact` says: another process may have replaced them since it was read."""
    with path.open("rb") as stream:
        content = stream.read(MAX_MANIFEST_BYTES + 1)
    try:
        same = manifest_from_json(content, path.stem) == artifact.manifest
    except ValueError:
        same = False
    if not same:
        raise CorruptArtifactError(f"{path} was replaced while it was looked at: expected no change. Run it again.")
    return hashlib.sha256(content).hexdigest()


def _check_replaceable(path: Path, fingerprint: str) -> None:
    from cnx_deploy.signing_library import read_bundle

    try:
        same_key = read_bundle(path).fingerprint == fingerprint
    except CorruptArtifactError:
        same_key = False
    if not same_key:
        raise OutputExistsError(
            f"{path} exists and is no signature by this key. Use --force to replace it, or move it away."
        )
