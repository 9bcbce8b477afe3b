"""Our signatures and model_signing's own are the same thing; mutated ones never pass; a file is whole or not there."""

import base64
import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_signing import hashing, signing, verifying

from cnx_deploy import signing_library
from cnx_deploy.artifacts import Artifact, open_artifact
from cnx_deploy.errors import CorruptArtifactError, OutputExistsError, RefusedArtifactError
from cnx_deploy.signing import check_signature, sign_artifact, signature_path
from tests.signing_keys import write_keys
from tests.test_artifacts import make

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def signed(tmp_path, keys, tiny_onnx_fp16) -> Artifact:
    """A signed copy of the smallest network's FP16 file, in a folder that it shares with another artifact."""
    shutil.copytree(tiny_onnx_fp16.path.parent, tmp_path / "export")
    make(tmp_path / "export", "another")
    artifact = open_artifact(tmp_path / "export" / tiny_onnx_fp16.path.name)
    sign_artifact(artifact, keys / "p256.pem")
    return artifact


# The library's own command line and interface


def library_says(signed: Artifact, key: Path) -> subprocess.CompletedProcess[str]:
    """`model_signing verify key` on the folder, files of other artifacts left aside."""
    words = ["verify", "key", "--signature", signature_path(signed), "--public_key", key, "--ignore_unsigned_files"]
    command = [sys.executable, "-m", "model_signing", *words, signed.path.parent]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=60)


def test_the_librarys_command_line_verifies_our_signature(signed, keys):
    done = library_says(signed, keys / "p256.pub.pem")
    assert (done.returncode, "succeeded" in done.stdout) == (0, True), done.stdout + done.stderr


@pytest.mark.slow
def test_the_librarys_command_line_refuses_it_where_we_do(signed, keys):
    assert library_says(signed, keys / "other.pub.pem").returncode == 1
    signed.path.write_bytes(signed.path.read_bytes()[:-1])
    assert library_says(signed, keys / "p256.pub.pem").returncode == 1


def signed_by_the_library(signed: Artifact, key: Path, config: hashing.Config) -> None:
    signature_path(signed).unlink()
    signer = signing.Config().use_elliptic_key_signer(private_key=key)
    signer.set_hashing_config(config).sign(signed.path.parent, signature_path(signed))


def alone(signed: Artifact) -> Artifact:
    """Without the other artifact and our locks in the folder."""
    for path in signed.path.parent.iterdir():
        if path.stem != signed.manifest.stem:
            path.unlink()
    return signed


def test_we_verify_a_folder_that_the_library_signed(signed, keys):
    signed_by_the_library(alone(signed), keys / "p256.pem", hashing.Config())
    check_signature(signed, keys / "p256.pub.pem")


def test_a_signature_that_asks_to_leave_a_file_out_is_refused(signed, keys):
    """The library itself passes it, whatever is in the file: it was signed so."""
    config = hashing.Config().set_ignored_paths(paths=[signed.path.name])
    signed_by_the_library(alone(signed), keys / "p256.pem", config)
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=keys / "p256.pub.pem")
    with pytest.raises(RefusedArtifactError, match=rf"does not cover {signed.path.name}"):
        check_signature(signed, keys / "p256.pub.pem")
    signed.path.write_bytes(b"anything")
    verifier.set_ignore_unsigned_files(True).verify(signed.path.parent, signature_path(signed))


def test_a_signature_over_other_hashes_is_refused(signed, keys):
    config = hashing.Config().use_file_serialization(hashing_algorithm="blake2")
    signed_by_the_library(alone(signed), keys / "p256.pem", config)
    with pytest.raises(RefusedArtifactError, match="was altered or made again since"):
        check_signature(signed, keys / "p256.pub.pem")


@pytest.mark.parametrize("statement", [{}, [], "text", {"_type": "https://in-toto.io/Statement/v1"}], ids=range(4))
def test_a_signed_statement_of_something_else_is_refused(signed, keys, statement):
    write_statement(signed, keys / "p256.pem", json.dumps(statement).encode())
    with pytest.raises(RefusedArtifactError, match="what it signs is no list of a model's files"):
        check_signature(signed, keys / "p256.pub.pem")


def write_statement(signed: Artifact, key: Path, payload: bytes) -> None:
    """Sign a payload as the library would, which signs nothing but models."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    kind = "application/vnd.in-toto+json"
    message = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    private = load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    bundle = json.loads(signature_path(signed).read_text())
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    signature = private.sign(message, ec.ECDSA(hashes.SHA256()))
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    signature_path(signed).write_text(json.dumps(bundle))


# Whole or not at all


def test_a_signature_is_whole_or_not_there(signed, keys, monkeypatch):
    path = signature_path(signed)
    before = path.read_bytes()

    def killed(folder, files, key, password, target):
        target.write_bytes(b'{"mediaType"')
        raise KeyboardInterrupt

    monkeypatch.setattr(signing_library, "sign_files", killed)
    for expected in (before, None):
        with pytest.raises(KeyboardInterrupt):
            sign_artifact(signed, keys / "p256.pem")
        assert (path.read_bytes() if path.exists() else None) == expected
        assert not list(path.parent.glob(".*.tmp-*"))
        path.unlink(missing_ok=True)


def test_a_signature_by_the_same_key_is_replaced(signed, keys):
    before = signature_path(signed).read_bytes()
    sign_artifact(signed, keys / "p256.pem")
    assert signature_path(signed).read_bytes() != before  # ECDSA draws a number
    check_signature(signed, keys / "p256.pub.pem")


@pytest.mark.parametrize("content", [None, b"somebody's notes"], ids=["another key's", "no signature"])
def test_something_else_is_replaced_with_force_alone(signed, keys, content):
    if content is not None:
        signature_path(signed).write_bytes(content)
    before = signature_path(signed).read_bytes()
    with pytest.raises(OutputExistsError, match=r"is no signature by this key\. Use --force") as caught:
        sign_artifact(signed, keys / "other.pem")
    assert (caught.value.exit_code, signature_path(signed).read_bytes()) == (2, before)
    sign_artifact(signed, keys / "other.pem", force=True)
    check_signature(signed, keys / "other.pub.pem")


# Mutations


@pytest.fixture(scope="module")
def target(tmp_path_factory, tiny_onnx_fp16) -> tuple[Artifact, Path, bytes]:
    """A signed artifact, its public key and its signature as it was."""
    folder = tmp_path_factory.mktemp("fuzz")
    keys = write_keys(tmp_path_factory.mktemp("keys"))
    shutil.copytree(tiny_onnx_fp16.path.parent, folder / "export")
    artifact = open_artifact(folder / "export" / tiny_onnx_fp16.path.name)
    content = sign_artifact(artifact, keys / "p256.pem").read_bytes()
    return artifact, keys / "p256.pub.pem", content


def meaning(content: bytes) -> object:
    """What a signature file says, base64 undone; two that say the same are equal."""
    bundle = json.loads(content)
    envelope = bundle["dsseEnvelope"]
    envelope["payload"] = base64.b64decode(envelope["payload"])
    envelope["signatures"][0]["sig"] = base64.b64decode(envelope["signatures"][0]["sig"])
    return bundle


def passes(target: tuple[Artifact, Path, bytes], content: bytes) -> bool:
    """Whether it verifies; any exception but these two, of exit code 4, fails the test."""
    try:
        passes_or_raises(target, content)
    except (CorruptArtifactError, RefusedArtifactError):
        return False
    return True


def passes_or_raises(target: tuple[Artifact, Path, bytes], content: bytes) -> None:
    artifact, key, _ = target
    signature_path(artifact).write_bytes(content)
    check_signature(artifact, key)


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Every place in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, entry in items for place in places(entry, (*path, key)))]


def put(document: object, place: tuple[object, ...], value: object) -> object:
    if not place:
        return value
    changed = copy.deepcopy(document)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return changed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEY = ("verificationMaterial", "publicKey")
FIELDS = {
    "an entry of a log": (("verificationMaterial", "tlogEntries"), [{}]),
    "a name of the key": (("dsseEnvelope", "signatures", 0, "keyid"), "mine"),
    "no hash of the key": (KEY, {}),
    "a key beside its hash": (KEY, {"hint": "a" * 64, "rawBytes": "AA=="}),
    "two signatures": (("dsseEnvelope", "signatures"), [{"sig": "AA==", "keyid": ""}] * 2),
    "no signature": (("dsseEnvelope", "signatures"), []),
    "a field of its own": (("note",), "checked by the maintainers"),
}


@pytest.mark.parametrize("change", FIELDS.values(), ids=FIELDS)
def test_a_bundle_with_fields_that_nothing_signs_is_refused(target, change):
    content = json.dumps(put(json.loads(target[2]), *change)).encode()
    with pytest.raises(CorruptArtifactError, match="is no signature that can be read"):
        passes_or_raises(target, content)


def test_a_bundle_that_says_a_thing_twice_is_refused(target):
    content = target[2].replace(b'"keyid":""', b'"keyid":"","keyid":""')
    with pytest.raises(CorruptArtifactError, match="'keyid' is there twice"):
        passes_or_raises(target, content)


def test_a_bundle_of_more_than_a_mebibyte_is_not_read(target):
    with pytest.raises(CorruptArtifactError, match="more than 1,048,576 bytes"):
        passes_or_raises(target, target[2] + b" " * (1 << 20))


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def test_the_unchanged_signature_passes(target):
    assert passes(target, target[2])
    assert passes(target, json.dumps(json.loads(target[2]), indent=1).encode())  # other bytes, the same said


@FUZZ
@given(data=st.data())
def test_fuzz_bytes_of_a_signature(target, data):
    content = bytearray(target[2])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    if passes(target, bytes(content)):
        assert meaning(bytes(content)) == meaning(target[2])


@FUZZ
@given(data=st.data())
def test_fuzz_fields_of_a_signature(target, data):
    document = json.loads(target[2])
    changed = put(document, data.draw(st.sampled_from(places(document))), data.draw(JSON))
    if data.draw(st.booleans()) and isinstance(changed, dict):
        changed[data.draw(st.text(max_size=8))] = data.draw(JSON)
    if passes(target, json.dumps(changed).encode()):
        assert meaning(json.dumps(changed).encode()) == meaning(target[2])


@FUZZ
@given(data=st.data())
def test_fuzz_the_signed_statement(target, data):
    document = json.loads(target[2])
    statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    changed = json.dumps(put(statement, data.draw(st.sampled_from(places(statement))), data.draw(JSON)))
    document["dsseEnvelope"]["payload"] = base64.b64encode(changed.encode()).decode()
    assert not passes(target, json.dumps(document).encode())
