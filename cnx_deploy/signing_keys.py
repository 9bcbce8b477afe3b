"""Which key signs or verifies: EC keys in PEM files, told from everything else that such a file can hold.

Importing this takes the extra `signing`. No message says more of a key than its kind and, of a public one, its hash.
"""

import hashlib
import re
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from cnx_deploy.errors import InputError

__all__ = ["is_encrypted", "password_in", "private_key_fingerprint", "public_key_fingerprint"]

CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
LABEL = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----")
MAX_KEY_BYTES = 1 << 16
"""A P-521 key with its parameters and an encryption takes less than 1 kB."""

HOW_TO_MAKE = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem"
HOW_TO_PUBLISH = "openssl pkey -in key.pem -pubout -out key.pub.pem"


def private_key_fingerprint(path: Path, password: bytes | None = None) -> str:
    """SHA-256 (hex) of the public half of a private EC key, as a signature by it names its key.

    Raises InputError for every file that holds no such key, or not under this password.
    """
    content = _content(path)
    if not any(label.endswith("PRIVATE KEY") for label in _labels(content)):
        raise InputError(
            f"{path} holds {_what_is_in(content)}, and signing takes the private EC key. Make one: {HOW_TO_MAKE}"
        )
    encrypted = _is_encrypted(content)
    if encrypted and not password:
        raise InputError(f"{path} is encrypted, and no password is given: put it in a file for --key-password-file.")
    if password is not None and not encrypted:
        raise InputError(f"{path} is not encrypted, and a password is given. Leave --key-password-file out.")
    try:
        key = load_pem_private_key(content, password)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        what = "does not open with this password" if encrypted else "cannot be read as a private key"
        hint = "Check the password, or that the file is whole." if encrypted else "Check that the file is whole."
        raise InputError(f"{path} {what}: expected an EC key in PEM. {hint}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(_wrong_kind(path, key))
    return _fingerprint(path, key.public_key())


def public_key_fingerprint(path: Path) -> str:
    """SHA-256 (hex) of a public EC key. Raises InputError for every file that holds none."""
    content = _content(path)
    if "PUBLIC KEY" not in _labels(content):
        raise InputError(
            f"{path} holds {_what_is_in(content)}, and verifying takes the public EC key of who signed. Ask for it; "
            f"of a private key it is made by: {HOW_TO_PUBLISH}"
        )
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{path} cannot be read as a public key: expected an EC key in PEM. Copy it again.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError(_wrong_kind(path, key))
    return _fingerprint(path, key)


def is_encrypted(path: Path) -> bool:
    """Whether a private key takes a password, by the words around it. Raises InputError where there is no such file."""
    return _is_encrypted(_content(path))


def password_in(path: Path) -> bytes:
    """The first line of a file, without its end. Raises InputError where it is empty or cannot be read."""
    lines = _content(path, "a file with the password in its first line").splitlines()
    if not lines or not lines[0]:
        raise InputError(f"{path} is empty: expected the key's password in its first line. Write it there.")
    return lines[0]


def _content(path: Path, expected: str = "an EC key in a PEM file") -> bytes:
    """The key is read again by the library, so a pipe would be empty by then."""
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: expected {expected}. Check the path.")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): expected {expected}. Check its rights.") from error
    if len(content) > MAX_KEY_BYTES:
        raise InputError(f"{path} has more than {MAX_KEY_BYTES:,} bytes: expected {expected}. Check the path.")
    return content


def _labels(content: bytes) -> list[str]:
    return LABEL.findall(content.decode("ascii", "replace"))


def _is_encrypted(content: bytes) -> bool:
    """PKCS 8 says so in the label, the older form of openssl in a line below it."""
    return "ENCRYPTED PRIVATE KEY" in _labels(content) or b"Proc-Type: 4,ENCRYPTED" in content


def _what_is_in(content: bytes) -> str:
    labels = _labels(content)
    if any(label.endswith("PRIVATE KEY") for label in labels):
        return "a private key"
    if any(label.endswith("PUBLIC KEY") for label in labels):
        return "a public key" if "PUBLIC KEY" in labels else f"a key of another form ({labels[0][:40]})"
    return f"a PEM file of {labels[0][:40]!r}" if labels else "no PEM text"


def _wrong_kind(path: Path, key: object) -> str:
    kind = re.sub(r"(Private|Public)Key$", "", type(key).__name__.lstrip("_"))
    return f"{path} is an {kind} key: expected an EC key on P-256, P-384 or P-521. Make one: {HOW_TO_MAKE}"


def _fingerprint(path: Path, key: ec.EllipticCurvePublicKey) -> str:
    if key.curve.name not in CURVES:
        raise InputError(
            f"{path} is a key on the curve {key.curve.name}: expected P-256, P-384 or P-521. Make one: {HOW_TO_MAKE}"
        )
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
