"""Real keys in PEM files, and a network that is not there, for the tests of signatures."""

import socket
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

__all__ = ["PASSWORD", "cut_the_network", "write_keys"]

PASSWORD = b"correct horse"
KINDS = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "other": lambda: ec.generate_private_key(ec.SECP256R1()),
    "k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "rsa": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def write_keys(folder: Path) -> Path:
    """`<kind>.pem` and `<kind>.pub.pem` of each kind; `locked.pem` is p256.pem under PASSWORD, `old.pem` likewise."""
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked, plain = serialization.BestAvailableEncryption(PASSWORD), serialization.NoEncryption()
    for name, make in KINDS.items():
        key = make()
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub.pem").write_bytes(public)
        (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, pkcs8, plain))
        if name == "p256":
            traditional = serialization.PrivateFormat.TraditionalOpenSSL
            (folder / "locked.pem").write_bytes(key.private_bytes(pem, pkcs8, locked))
            (folder / "old.pem").write_bytes(key.private_bytes(pem, traditional, locked))
            (folder / "sec1.pem").write_bytes(key.private_bytes(pem, traditional, plain))
    return folder


def cut_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every connection and look-up of a name fail the test."""

    def refused(*words: object, **more: object) -> None:
        raise AssertionError("signing and verifying with keys ask no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refused)
