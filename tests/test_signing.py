"""A signature is by one key over exactly one artifact's manifest and files, made and checked without a network."""

import base64
import json
import shutil
import socket
from pathlib import Path

import pytest

from cnx_deploy.artifacts import Artifact, open_artifact, read_artifact, sha256_of_file
from cnx_deploy.errors import (
    CnxDeployError,
    CorruptArtifactError,
    InputError,
    RefusedArtifactError,
)
from cnx_deploy.signing import check_signature, sign_artifact, signature_path
from cnx_deploy.signing_keys import public_key_fingerprint
from tests.test_artifacts import make

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def artifact(tmp_path, tiny_onnx_fp16) -> Artifact:
    """A copy of the smallest network's FP16 file and its manifest, alone in a folder."""
    shutil.copytree(tiny_onnx_fp16.path.parent, tmp_path / "export")
    return open_artifact(tmp_path / "export" / tiny_onnx_fp16.path.name)


@pytest.fixture
def signed(artifact, keys) -> Artifact:
    """The same, signed by p256.pem."""
    sign_artifact(artifact, keys / "p256.pem")
    return artifact


def checked(artifact: Artifact, keys: Path, key: str = "p256") -> None:
    """As the command line checks: the manifest is read anew."""
    check_signature(read_artifact(manifest_of(artifact)), keys / f"{key}.pub.pem")


def refused(artifact: Artifact, keys: Path, message: str, kind: type[CnxDeployError] = RefusedArtifactError) -> None:
    with pytest.raises(kind, match=message) as caught:
        checked(artifact, keys)
    assert (type(caught.value), caught.value.exit_code) == (kind, 4)


def manifest_of(artifact: Artifact) -> Path:
    return artifact.path.parent / f"{artifact.manifest.stem}.json"


def rewrite(path: Path, **changes: object) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def record_of(path: Path) -> dict[str, object]:
    return {"name": path.name, "size_bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def signed_names(artifact: Artifact) -> list[str]:
    bundle = json.loads(signature_path(artifact).read_text(encoding="utf-8"))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return [entry["name"] for entry in statement["predicate"]["resources"]]


def test_the_network_is_cut_in_these_tests():
    with pytest.raises(AssertionError, match="ask no network"):
        socket.create_connection(("127.0.0.1", 9))
    with socket.socket() as one, pytest.raises(AssertionError, match="ask no network"):
        one.connect(("127.0.0.1", 9))


# Signed and as it was


@pytest.mark.parametrize("curve", ["p256", "p384", "p521"])
def test_sign_verify_key_offline_ok(artifact, keys, curve):
    path = sign_artifact(artifact, keys / f"{curve}.pem")
    checked(artifact, keys, curve)
    stem = artifact.manifest.stem
    assert path.name == f"{stem}.sig"
    assert signed_names(artifact) == [f"{stem}.json", f"{stem}.onnx"]
    assert sorted(each.name for each in path.parent.iterdir() if not each.name.startswith(".")) == [
        f"{stem}{suffix}" for suffix in (".json", ".onnx", ".sig")
    ]


def test_sign_verify_key_offline_ok_for_an_engine(tmp_path, keys, tiny_engine):
    shutil.copytree(tiny_engine.path.parent, tmp_path / "engines")
    engine = open_artifact(tmp_path / "engines" / tiny_engine.path.name)
    sign_artifact(engine, keys / "p256.pem")
    checked(engine, keys)


def test_sign_verify_key_offline_ok_whatever_else_is_in_the_folder(signed, keys):
    make(signed.path.parent, "another")
    (signed.path.parent / "notes.txt").write_text("unsigned")
    checked(signed, keys)


def test_sign_verify_key_offline_ok_in_another_folder(signed, keys, tmp_path):
    checked(open_artifact(shutil.copytree(signed.path.parent, tmp_path / "other") / signed.path.name), keys)


# Altered, gone, more, renamed


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_sign_verify_key_offline_flipped_byte_of_the_file(signed, keys, place):
    flip(signed.path, place)
    refused(signed, keys, r"\.onnx was altered: SHA-256", CorruptArtifactError)


def test_sign_verify_key_offline_flipped_byte_of_the_manifest(signed, keys):
    path = manifest_of(signed)
    flip(path, path.read_bytes().index(b'"created": "20') + 15)  # another year: it can still be read
    refused(signed, keys, r"signed by .*, but .*\.json was altered or made again since\. .*cnx-deploy sign")


def test_sign_verify_key_offline_flipped_byte_that_the_manifest_agrees_with(signed, keys):
    flip(signed.path, 1000)
    rewrite(manifest_of(signed), files=[record_of(signed.path)])
    open_artifact(signed.path)  # without the signature nothing is wrong with it
    refused(signed, keys, r"\.json, .*\.onnx was altered or made again since")


def test_sign_verify_key_offline_deleted_file(signed, keys):
    signed.path.unlink()
    refused(signed, keys, r"\.onnx is missing or no file.*Copy it", CorruptArtifactError)


def test_sign_verify_key_offline_deleted_signature(signed, keys):
    signature_path(signed).unlink()
    refused(signed, keys, r"has no signature: expected .*\.sig\..*cnx-deploy sign .* --key")


def test_sign_verify_key_offline_deleted_from_the_list(tmp_path, keys):
    two = two_files(tmp_path)
    sign_artifact(two, keys / "p256.pem")
    checked(two, keys)
    rewrite(manifest_of(two), files=[record_of(two.path)])
    refused(two, keys, "covers small.onnx.data, which this artifact does not have")


def test_sign_verify_key_offline_added_file(signed, keys):
    extra = signed.path.with_name("extra.bin")
    extra.write_bytes(b"loaded too")
    rewrite(manifest_of(signed), files=[record_of(signed.path), record_of(extra)])
    refused(signed, keys, r"does not cover extra\.bin")


def test_sign_verify_key_offline_renamed_file(signed, keys):
    for suffix in (".json", ".onnx", ".sig"):
        signed.path.with_suffix(suffix).rename(signed.path.with_name(f"large{suffix}"))
    path = signed.path.with_name("large.json")
    with pytest.raises(CorruptArtifactError, match="renamed to 'large'"):
        read_artifact(path)
    rewrite(path, stem="large", files=[record_of(path.with_suffix(".onnx"))])
    refused(open_artifact(path), keys, "is of another artifact")


def test_sign_verify_key_offline_signature_of_another_artifact(signed, keys):
    other = make(signed.path.parent, "another")
    shutil.copy(signature_path(signed), signature_path(other))
    refused(other, keys, "is of another artifact")


def test_sign_verify_key_offline_signature_of_an_older_one(tmp_path, keys):
    old = make(tmp_path, content=b"old")
    sign_artifact(old, keys / "p256.pem")
    refused(make(tmp_path, content=b"new"), keys, r"small\.json, small\.onnx was altered or made again since")


@pytest.mark.parametrize("suffix", [".json", ".onnx"])
def test_sign_verify_key_offline_symbolic_link(signed, keys, tmp_path, suffix):
    path = signed.path.with_suffix(suffix)
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    refused(signed, keys, f"{suffix} is a symbolic link.*Copy the file there")
    with pytest.raises(RefusedArtifactError, match="is a symbolic link"):
        sign_artifact(open_artifact(signed.path), keys / "p256.pem")


# Another key, another form


@pytest.mark.parametrize(
    "before", ["", "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"]
)
def test_sign_verify_key_offline_ok_with_a_key_as_openssl_ecparam_writes_it(artifact, keys, tmp_path, before):
    key = tmp_path / "key.pem"
    key.write_text(before + (keys / "sec1.pem").read_text())
    sign_artifact(artifact, key)
    checked(artifact, keys)


@pytest.mark.parametrize("key", ["locked.pem", "old.pem"])
@pytest.mark.parametrize("password", [None, b""])
def test_an_encrypted_key_without_its_password_is_wrong_input(artifact, keys, key, password):
    with pytest.raises(InputError, match=r"is encrypted, and no password is given: put it in a file"):
        sign_artifact(artifact, keys / key, password=password)


def test_sign_verify_key_offline_wrong_key(signed, keys):
    with pytest.raises(RefusedArtifactError, match=r"made with another key \([0-9a-f]{16}…\) than .*other\.pub\.pem"):
        checked(signed, keys, "other")


def test_sign_verify_key_offline_wrong_key_that_says_it_is_the_right_one(artifact, keys):
    sign_artifact(artifact, keys / "other.pem")
    other, right = (public_key_fingerprint(keys / f"{name}.pub.pem") for name in ("other", "p256"))
    path = signature_path(artifact)
    path.write_text(path.read_text().replace(other, right))
    refused(artifact, keys, "is not what the key .* signed: signature or contents were altered")


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_sign_verify_key_offline_rsa_key_and_other_kinds(signed, keys, kind):
    for ask in (lambda: checked(signed, keys, kind), lambda: sign_artifact(signed, keys / f"{kind}.pem")):
        with pytest.raises(InputError, match=f"(?i)is an {kind} key: expected an EC key on P-256") as caught:
            ask()
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_sign_verify_key_offline_truncated_signature(signed, keys, share):
    path = signature_path(signed)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(signed, keys, r"\.sig is no signature that can be read \(.*\): cut off or altered", CorruptArtifactError)


@pytest.mark.parametrize("content", [b"\xff\x00", b"{}", b"[" * 100_000, b"null", b'{"a": 1}' * 200_000], ids=range(5))
def test_sign_verify_key_offline_garbage_in_place_of_a_signature(signed, keys, content):
    signature_path(signed).write_bytes(content)
    refused(signed, keys, "is no signature that can be read", CorruptArtifactError)


# What is signed


def two_files(folder: Path, other: str = "small.onnx.data") -> Artifact:
    """An artifact of two files."""
    artifact = make(folder)
    (folder / other).write_bytes(b"more")
    rewrite(manifest_of(artifact), files=[record_of(artifact.path), record_of(folder / other)])
    return open_artifact(artifact.path)


@pytest.mark.parametrize("other", ["small.onnx.data", ".gitattributes", ".git", "Bär und Katze"])
def test_every_file_of_the_manifest_is_signed_whatever_its_name(tmp_path, keys, other):
    artifact = two_files(tmp_path, other)
    sign_artifact(artifact, keys / "p256.pem")
    assert signed_names(artifact) == sorted([other, "small.json", "small.onnx"])
    flip(tmp_path / other, 0)
    refused(artifact, keys, "was altered", CorruptArtifactError)


def test_nothing_that_was_altered_is_signed(artifact, keys):
    flip(artifact.path, 1000)  # after it was opened
    with pytest.raises(CorruptArtifactError, match="was altered"):
        sign_artifact(artifact, keys / "p256.pem")
    assert not signature_path(artifact).exists()


def test_a_manifest_that_was_replaced_meanwhile_is_not_signed(artifact, keys):
    rewrite(manifest_of(artifact), created="2020-01-01T00:00:00+00:00")
    with pytest.raises(CorruptArtifactError, match=r"was replaced while it was looked at.*Run it again"):
        sign_artifact(artifact, keys / "p256.pem")


def test_a_manifest_that_lists_its_own_signature_is_refused(tmp_path, keys):
    with pytest.raises(RefusedArtifactError, match="lists its own signature"):
        sign_artifact(two_files(tmp_path, "small.sig"), keys / "p256.pem")
