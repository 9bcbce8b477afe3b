"""Signing and verifying by `model_signing`: what it is asked for, and what its refusals mean.

Importing this takes the extra `signing`. Only the library's public interface is used. It signs folders, and artifacts
share theirs, so it is given a hashing configuration that knows the files by name. What it writes is a Sigstore bundle
over an in-toto statement, which the library's own command line verifies too.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cryptography.exceptions import InvalidSignature
from model_signing import hashing, manifest, signing, verifying

from cnx_deploy.documents import strict_json
from cnx_deploy.errors import CorruptArtifactError, RefusedArtifactError

__all__ = ["Bundle", "read_bundle", "sign_files", "verify_files"]

MAX_SIGNATURE_BYTES = 1 << 20
"""A signature over four files has 3 kB."""

LIBRARY_ERRORS = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
"""What it raises for a statement that is signed and is none of a model's files; it checks no types."""

SIGN_AGAIN = "If the files are as you made them, sign them again with cnx-deploy sign; else do not use them."


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Fields that nothing signs are not let in: who reads them later could believe them."""


class _PublicKey(_Strict, frozen=True):
    hint: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$(?!\\n)")]


class _Material(_Strict, frozen=True):
    public_key: _PublicKey
    tlog_entries: Annotated[tuple[Any, ...], msgspec.Meta(max_length=0)]


class _Signature(_Strict, frozen=True):
    sig: bytes
    keyid: Annotated[str, msgspec.Meta(max_length=0)]


class _Envelope(_Strict, frozen=True):
    payload: bytes
    payload_type: str
    signatures: tuple[_Signature]


class Bundle(_Strict, frozen=True):
    """What a signature file holds; bytes are base64 there."""

    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the public key by which it says it was made."""
        return self.verification_material.public_key.hint


class _Resource(msgspec.Struct, frozen=True):
    name: str
    digest: str


class _Predicate(msgspec.Struct, frozen=True):
    resources: tuple[_Resource, ...]


class _Statement(msgspec.Struct, frozen=True):
    predicate: _Predicate


class _NamedFiles(hashing.Config):
    """Hashes these files of a folder and no others. `files`: name -> the SHA-256 (hex) that each has to have.

    Left to itself the library passes over names such as .gitattributes, and over those that a signature asks it to.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.set_ignored_paths(paths=(), ignore_git_paths=False)
        self._files = files

    def add_ignored_paths(self, *, model_path: hashing.PathLike, paths: Iterable[hashing.PathLike]) -> None:
        """Leave nothing out, whatever the signature says: one that covers fewer files is refused."""

    def hash(
        self, model_path: hashing.PathLike, *, files_to_hash: Iterable[hashing.PathLike] | None = None
    ) -> manifest.Manifest:
        """The files' hashes. Raises CorruptArtifactError where one is not what it has to be."""
        folder = Path(os.fsdecode(model_path))
        found = super().hash(folder, files_to_hash=[folder / name for name in self._files])
        hashes = {each.identifier: each.digest.digest_hex for each in found.resource_descriptors()}
        for name, expected in self._files.items():
            if hashes.get(name) != expected:
                raise CorruptArtifactError(
                    f"{folder / name} was altered: SHA-256 {hashes.get(name, 'none')[:12]}…, its manifest says "
                    f"{expected[:12]}…. Make it again with --force."
                )
        return found


def sign_files(folder: Path, files: Mapping[str, str], key: Path, password: bytes | None, target: Path) -> None:
    """Sign the files of a folder and write the signature. `files`: name -> SHA-256, checked while they are read.

    Raises CorruptArtifactError where a file differs.
    """
    # The library says str and hands the password on to cryptography, which takes bytes.
    signer = signing.Config().use_elliptic_key_signer(private_key=key, password=password)  # type: ignore[arg-type]
    signer.set_hashing_config(_NamedFiles(files)).sign(folder, target)


def verify_files(folder: Path, files: Mapping[str, str], public_key: Path, fingerprint: str, signature: Path) -> None:
    """Check that a signature is by this key and over exactly these files. `fingerprint`: the key's.

    Raises CorruptArtifactError where the signature is no signature or a file is not what `files` says,
    RefusedArtifactError where the signature is another key's, altered, or of other files.
    """
    bundle = read_bundle(signature)
    if bundle.fingerprint != fingerprint:
        raise RefusedArtifactError(
            f"{signature} was made with another key ({bundle.fingerprint[:16]}…) than {public_key} "
            f"({fingerprint[:16]}…). Give the public key of who signed it, and do not use files of unknown origin."
        )
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    try:
        verifier.set_hashing_config(_NamedFiles(files)).verify(folder, signature)
    except InvalidSignature as error:
        raise RefusedArtifactError(
            f"{signature} is not what the key {public_key} signed: signature or contents were altered. {SIGN_AGAIN}"
        ) from error
    except LIBRARY_ERRORS as error:
        raise RefusedArtifactError(
            f"{signature} is signed by {public_key}, but {_difference(bundle, files)}. {SIGN_AGAIN}"
        ) from error


def read_bundle(path: Path) -> Bundle:
    """Read a signature file and believe nothing of it yet. Raises CorruptArtifactError where it is none."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")  # a pipe would be waited for
        with path.open("rb") as stream:
            content = stream.read(MAX_SIGNATURE_BYTES + 1)
        if len(content) > MAX_SIGNATURE_BYTES:
            raise ValueError(f"more than {MAX_SIGNATURE_BYTES:,} bytes")
        return msgspec.convert(strict_json(content), Bundle)
    except (ValueError, OSError) as error:
        raise CorruptArtifactError(
            f"{path} is no signature that can be read ({_short(error)}): cut off or altered. {SIGN_AGAIN}"
        ) from error


def _short(error: Exception) -> str:
    """In words, without the pattern that a field has to fit."""
    return str(error).partition(" matching regex")[0].replace("`", "")[:200]


def _difference(bundle: Bundle, files: Mapping[str, str]) -> str:
    """How the files that a signature covers differ from these; its key has been checked by then."""
    try:
        statement = msgspec.json.decode(bundle.dsse_envelope.payload, type=_Statement)
    except msgspec.DecodeError:
        return "what it signs is no list of a model's files"
    covered = {each.name: each.digest for each in statement.predicate.resources}
    if extra := sorted(covered.keys() - files):
        return f"it covers {', '.join(extra[:4])}, which this artifact does not have: it is of another artifact"
    if left_out := sorted(files.keys() - covered):
        return f"it does not cover {', '.join(left_out[:4])}"
    altered = sorted(name for name in files if files[name] != covered[name])
    if altered:
        return f"{', '.join(altered[:4])} was altered or made again since"
    return "it is of a form that covers other things than these files"
