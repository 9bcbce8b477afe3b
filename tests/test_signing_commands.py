"""`cnx-deploy sign`, `verify --signed` and `inspect`: keys of every kind, passwords, exit codes, what is printed."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest

from cnx_deploy.artifacts import Artifact, open_artifact
from cnx_deploy.cli import main
from cnx_deploy.pipeline import ExportRequest, run_exports
from cnx_deploy.signing import check_signature, sign_artifact, signature_path
from tests.signing_keys import PASSWORD
from tests.test_artifacts import make
from tests.test_readme import block_after, run_in

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="session")
def keys(keys) -> Path:
    """Those of all tests, and files that are no keys."""
    folder = keys
    (folder / "password").write_bytes(PASSWORD + b"\nsecond line\n")
    (folder / "wrong").write_bytes(b"wrong horse")
    (folder / "empty").write_bytes(b"")
    (folder / "cut.pem").write_text("-----BEGIN PRIVATE KEY-----\nMIGH\n-----END PRIVATE KEY-----\n")
    (folder / "cut.pub.pem").write_text("-----BEGIN PUBLIC KEY-----\nMIGH\n-----END PUBLIC KEY-----\n")
    (folder / "certificate.pem").write_text("-----BEGIN CERTIFICATE-----\nMIGH\n-----END CERTIFICATE-----\n")
    (folder / "large.pem").write_bytes(b"-" * 70_000)
    return folder


@pytest.fixture
def artifact(tmp_path, monkeypatch) -> Artifact:
    """A small artifact in export/ of the working folder."""
    monkeypatch.chdir(tmp_path)
    return make(Path("export"))


@pytest.fixture
def cnx(capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[object, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, words)))
        return stop.value.code, *capsys.readouterr()

    return run


def test_sign_says_what_it_signed(cnx, artifact, keys):
    code, out, err = cnx("sign", artifact.path, "--key", keys / "p256.pem")
    assert (code, out, err) == (0, "export/small.sig signs small.onnx: its manifest and 1 files\n", "")
    check_signature(artifact, keys / "p256.pub.pem")


def test_sign_takes_several_and_the_name_of_a_manifest(cnx, artifact, keys):
    make(Path("engines"), "fast")
    code, out, _ = cnx("sign", "export/small.json", "engines/fast.onnx", "--key", keys / "p384.pem", "--json")
    assert (code, json.loads(out)["signed"]) == (0, [
        {"artifact": "export/small.onnx", "signature": "export/small.sig", "files": 2},
        {"artifact": "engines/fast.onnx", "signature": "engines/fast.sig", "files": 2},
    ])  # fmt: skip


def test_where_one_was_altered_none_is_signed(cnx, artifact, keys):
    broken = make(Path("export"), "zebra")
    broken.path.write_bytes(b"wEights")
    code, _, err = cnx("sign", artifact.path, broken.path, "--key", keys / "p256.pem")
    assert (code, "zebra.onnx was altered" in err, list(Path("export").glob("*.sig"))) == (4, True, [])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("missing.pem", r"missing\.pem does not exist: expected an EC key in a PEM file\. Check the path"),
        (".", "is no regular file: expected an EC key"),
        ("p256.pub.pem", r"holds a public key, and signing takes the private EC key\. Make one: openssl genpkey"),
        ("rsa.pem", "is an RSA key: expected an EC key on P-256, P-384 or P-521"),
        ("ed25519.pem", "is an Ed25519 key: expected an EC key"),
        ("k1.pem", "is a key on the curve secp256k1: expected P-256"),
        ("cut.pem", "cannot be read as a private key: expected an EC key in PEM"),
        ("certificate.pem", "holds a PEM file of 'CERTIFICATE', and signing takes"),
        ("empty", "holds no PEM text, and signing takes"),
        ("large.pem", "has more than 65,536 bytes"),
        ("locked.pem", "is encrypted, and no terminal is here to ask at: give --key-password-file"),
    ],
)
def test_a_key_that_cannot_sign_is_wrong_input(cnx, artifact, keys, key, message):
    code, out, err = cnx("sign", artifact.path, "--key", keys / key)
    assert (code, out, signature_path(artifact).exists()) == (2, "", False)
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("missing.pem", r"missing\.pem does not exist: expected an EC key in a PEM file\. Check the path"),
        ("p256.pem", r"holds a private key, and verifying takes the public EC key.*openssl pkey -in key\.pem -pubout"),
        ("locked.pem", "holds a private key, and verifying takes the public EC key"),
        ("rsa.pub.pem", "is an RSA key: expected an EC key on P-256, P-384 or P-521"),
        ("k1.pub.pem", "is a key on the curve secp256k1"),
        ("cut.pub.pem", "cannot be read as a public key"),
        ("certificate.pem", "holds a PEM file of 'CERTIFICATE', and verifying takes"),
    ],
)
def test_a_key_that_cannot_verify_is_wrong_input(cnx, artifact, keys, key, message):
    code, out, err = cnx("verify", artifact.path, "--signed", keys / key)
    assert (code, out) == (2, "")
    assert re.search(message, err)


# Passwords


@pytest.mark.parametrize("key", ["locked.pem", "old.pem"])
def test_an_encrypted_key_signs_with_its_password(cnx, artifact, keys, key):
    words = ("sign", artifact.path, "--key", keys / key, "--key-password-file", keys / "password")
    assert cnx(*words)[0] == 0
    check_signature(artifact, keys / "p256.pub.pem")


@pytest.mark.parametrize(
    ("key", "file", "message"),
    [
        ("locked.pem", "wrong", r"locked\.pem does not open with this password.*Check the password"),
        ("locked.pem", "empty", r"empty is empty: expected the key's password in its first line"),
        ("locked.pem", "missing", "missing does not exist: expected a file with the password"),
        ("p256.pem", "password", r"is not encrypted, and a password is given\. Leave --key-password-file out"),
    ],
)
def test_a_password_that_does_not_fit_is_wrong_input(cnx, artifact, keys, key, file, message):
    code, _, err = cnx("sign", artifact.path, "--key", keys / key, "--key-password-file", keys / file)
    assert (code, signature_path(artifact).exists()) == (2, False)
    assert re.search(message, err)


def test_the_password_is_asked_for_at_a_terminal_and_not_shown(cnx, artifact, keys, monkeypatch):
    asked = []

    def prompt(text, *, hide_input, err):
        asked.append((text, hide_input, err))
        return PASSWORD.decode()

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "prompt", prompt)
    assert cnx("sign", artifact.path, "--key", keys / "locked.pem")[0] == 0
    assert asked == [(f"Password of {keys / 'locked.pem'}", True, True)]


@pytest.mark.slow
def test_no_secret_is_printed(cnx, artifact, keys, capsys):
    """Not by success, refusal or --debug's traceback; nor is the password taken from the environment."""
    secrets = [PASSWORD.decode(), "wrong horse"]
    for name in ("p256", "locked", "old", "rsa", "k1"):
        lines = (keys / f"{name}.pem").read_text().splitlines()
        secrets += [line for line in lines if not line.startswith("-") and len(line) > 8 and ":" not in line]
    printed = ""
    for key in ("p256", "locked", "old", "rsa", "k1"):
        for file in ("password", "wrong", None):
            words = ["sign", str(artifact.path), "--key", str(keys / f"{key}.pem"), "--force"]
            words += ["--key-password-file", str(keys / file)] if file else []
            for more in ([], ["--json"]):
                _, out, err = cnx(*words, *more)
                printed += out + err
            done = subprocess.run(
                [sys.executable, "-m", "cnx_deploy", "--debug", *words], capture_output=True, text=True, check=False,
                stdin=subprocess.DEVNULL,
            ) if file == "wrong" else None  # fmt: skip
            printed += done.stdout + done.stderr if done else ""
    printed += signature_path(artifact).read_text()
    assert "Traceback" in printed
    assert [secret for secret in secrets if secret in printed] == []


# Verify and inspect


@pytest.fixture(scope="module")
def atto(tmp_path_factory) -> Artifact:
    """Atto's FP32 file at 32 px with ten classes. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("atto")
    request = ExportRequest(
        variant="atto", num_classes=10, image_size=32, batch=(1, 2, 4), precisions=("fp32",), no_verify=True
    )
    return run_exports(replace(request, output_dir=folder), lambda line: None)[0]


@pytest.fixture
def exported(atto, tmp_path, monkeypatch) -> Artifact:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(atto.path.parent, tmp_path / "export")
    return open_artifact(Path("export") / atto.path.name)


@pytest.mark.parametrize("named", [True, False])
def test_verify_goes_on_where_all_is_signed(cnx, exported, keys, named):
    sign_artifact(exported, keys / "p256.pem")
    files = [exported.path] if named else []
    code, out, err = cnx("verify", *files, "--signed", keys / "p256.pub.pem", "--samples", "1", "--json")
    assert (code, [entry["artifact"] for entry in json.loads(out)["verifications"]]) == (0, [exported.path.name])
    assert f"Signed by {keys / 'p256.pub.pem'}: {exported.path.name}\n" in err


def test_verify_without_the_option_asks_for_no_signature(cnx, exported):
    assert cnx("verify", exported.path, "--samples", "1")[0] == 0


@pytest.mark.parametrize("named", [True, False])
def test_engine_unsigned_or_unlisted_is_refused_where_signatures_are_asked_for(cnx, artifact, keys, named):
    make(Path("engines"), "fast", kind="engine", suffix=".engine", request=ENGINE, facts={"runtime_version": "1"})
    sign_artifact(artifact, keys / "p256.pem")
    files = ["export/small.onnx", "engines/fast.json"] if named else []
    code, out, err = cnx("verify", *files, "--signed", keys / "p256.pub.pem")
    assert (code, out) == (4, "")
    assert "fast.engine has no signature: expected engines/fast.sig" in err


ENGINE = {
    "precision": "fp16", "batch": [1, 4, 8], "image_size": 32, "input_kind": "float", "mean": [0.0] * 3,
    "std": [1.0] * 3, "runtime": "tensorrt-rtx", "target": "sm89", "batches": [[1, 4, 8]], "allow_tf32": False,
}  # fmt: skip


@pytest.mark.parametrize("way", [["--layers"], ["--data", "."], ["--records"], []], ids=str)
def test_every_way_to_verify_refuses_first(cnx, artifact, keys, way):
    code, _, err = cnx("verify", artifact.path, *way, "--signed", keys / "p256.pub.pem")
    assert (code, "has no signature" in err) == (4, True)


@pytest.mark.parametrize("way", [["--steps"], ["--judge", "."]], ids=str)
def test_ways_that_read_other_files_take_no_signature(cnx, artifact, keys, way):
    code, _, err = cnx("verify", *way, "--signed", keys / "p256.pub.pem")
    assert (code, "leave --signed out" in err) == (2, True)


def test_engine_unsigned_or_unlisted_is_refused_before_any_reader_is_loaded(artifact, keys):
    code = (
        "import sys\nfrom cnx_deploy.cli import main\ntry:\n    main()\nexcept SystemExit as stop:\n"
        "    print(stop.code, *sorted({'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx'} & set(sys.modules)))"
    )
    words = ["verify", artifact.path, "--signed", keys / "p256.pub.pem"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "4\n"


def test_verify_signed_with_nothing_recorded_is_wrong_input(cnx, tmp_path, monkeypatch, keys):
    monkeypatch.chdir(tmp_path)
    code, _, err = cnx("verify", "--signed", keys / "p256.pub.pem")
    assert (code, "Nothing is recorded in export or engines" in err) == (2, True)


def test_inspect_says_whether_a_signature_is_there(cnx, exported, keys):
    assert re.search(r"(?m)^signature +none$", cnx("inspect", exported.path)[1])
    sign_artifact(exported, keys / "p256.pem")
    assert re.search(
        r"(?m)^signature +\S+\.sig, not checked: cnx-deploy verify --signed", cnx("inspect", exported.path)[1]
    )
    assert ".sig, not checked" in json.loads(cnx("inspect", exported.path, "--json")[1])["facts"]["signature"]


@pytest.mark.parametrize("missing", ["model_signing", "OpenSSL", "cryptography"])
@pytest.mark.parametrize("command", ["sign", "verify"])
def test_without_the_extra_the_machine_lacks_something(artifact, keys, missing, command):
    option = ["--key", keys / "p256.pem"] if command == "sign" else ["--signed", keys / "p256.pub.pem"]
    code = f"import sys\nsys.modules[{missing!r}] = None\nfrom cnx_deploy.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, command, str(artifact.path), *map(str, option)], capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (5, "")
    assert re.fullmatch(r"Error: Signatures take .*pip install 'cnx-deploy\[signing\]'\.\n", done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the README's keys and is not here")
def test_the_readmes_commands_sign_and_verify(exported, tmp_path):
    printed = run_in(tmp_path, block_after("## Signatures"), **{"atto-224-fp16": exported.manifest.stem})
    assert f"{exported.manifest.stem}.sig signs" in printed
    assert "pass" in printed
