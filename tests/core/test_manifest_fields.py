"""Manifests that lie: every field has the type and range that the code relies on, or one message names it."""

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import read_artifact
from cnx_deploy.core.errors import CorruptArtifactError
from cnx_deploy.core.manifest import MAX_MANIFEST_BYTES, Artifact, json_schema, manifest_from_json

ROOT = Path(__file__).parents[2]
RECORDS = sorted([*(ROOT / "export").glob("*.json"), *(ROOT / "engines").glob("*.json")])
ENGINE = ROOT / "engines" / "atto-224-fp16-rtx-sm89.json"
ONNX = ROOT / "export" / "atto-224-fp16.json"

Change = Callable[[dict[str, Any]], Any]


def onnx_request(manifest: dict[str, Any]) -> dict[str, Any]:
    """The request of the ONNX file, which an engine's manifest holds too."""
    return manifest["request"].get("onnx", manifest["request"])


def changed(path: Path, change: Change) -> bytes:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    return json.dumps(data).encode()


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_committed_record_is_read_and_written_back_as_it_is(path: Path) -> None:
    assert manifest_from_json(path.read_bytes(), path.stem).to_json() == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["files"][0].update(size_bytes=-1), "files[0].size_bytes: Expected int >= 0"),
        (lambda d: d["files"][0].update(size_bytes=True), "files[0].size_bytes: Expected int, got bool"),
        (lambda d: d["files"][0].update(sha256="0" * 63), "files[0].sha256: Expected str of another form"),
        (lambda d: d["files"][0].update(sha256="A" * 64), "files[0].sha256: Expected str of another form"),
        (lambda d: d["files"].append({**d["files"][0], "name": "a\x1b[31m"}), "files[1].name: Expected str of"),
        (lambda d: d["files"].append(d["files"][0]), "a file is listed twice"),
        (lambda d: d["files"].append({**d["files"][0], "name": d["stem"] + ".json"}), "or the manifest itself is"),
        (lambda d: d["files"][0].update(name="other.onnx"), "its first file is 'other.onnx', expected"),
        (lambda d: d.update(stem="other"), "it is of 'other', renamed to"),
        (lambda d: d.update(files=[]), "its first file is 'missing'"),
        (lambda d: d.update(created="yesterday"), "created: Expected str of another form"),
        (lambda d: d.update(facts=None), "facts: Expected object, got null"),
        (lambda d: d.update(tools={"torch": 2}), "tools[...]: Expected str, got int"),
        (lambda d: d.update(evil=1), "unknown fields 'evil'"),
        (lambda d: d.update(schema_version="1"), "schema version '1', expected 2"),
        (lambda d: d.update(schema_version=1), "schema version 1, expected 2"),
        (lambda d: d["model"].update(num_classes=0), "model.num_classes: Expected int >= 1"),
        (lambda d: d["model"].update(class_names=["cat"]), "1 class names for 1000 classes"),
        (lambda d: d["model"].update(preprocessing=[]), "model.preprocessing: Expected object, got array"),
        (lambda d: d["model"]["preprocessing"].update(mean=[1, 2]), "preprocessing.mean: Expected array of length 3"),
        (lambda d: d["model"]["weights"].update(origin="stolen"), "model.weights.origin: Invalid enum value 'stolen'"),
        (lambda d: d["model"]["weights"].pop("licence"), "model.weights: Object missing required field licence"),
        (lambda d: onnx_request(d).update(batch=[8, 1, 64]), "the batch range 8:1:64 does not rise"),
        (lambda d: onnx_request(d).update(batch=[1, 8]), "batch: Expected array of length 3, got 2"),
        (lambda d: onnx_request(d).update(batch=[1, 8, 2**40]), "batch[2]: Expected int <= 65536"),
        (lambda d: onnx_request(d)["deploy"].update(precision="fp7"), "No precision is called 'fp7'"),
        (lambda d: onnx_request(d).pop("opset"), "Object missing required field opset"),
        (lambda d: onnx_request(d)["deploy"].update(std=["a", 1, 1]), "deploy.std[0]: Expected float, got str"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [ONNX, ENGINE], ids=["onnx", "engine"])
def test_a_lie_is_named_by_its_field(path: Path, change: Change, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what is said is compared below
        manifest_from_json(changed(path, change), path.stem)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["request"].update(runtime="onnxruntime"), "request.runtime: Invalid enum value"),
        (lambda d: d["request"].update(target="sm89; rm -rf"), "request.target: Expected str of another form"),
        (lambda d: d["request"].update(batches=[]), "request.batches: Expected array of length >= 1"),
        (lambda d: d["request"].update(batches=[[1, 0, 2]]), "request.batches[0][1]: Expected int >= 1"),
        (lambda d: d["request"].update(allow_tf32=1), "request.allow_tf32: Expected bool, got int"),
        (lambda d: d["facts"].pop("runtime_version"), "facts: Object missing required field runtime_version"),
        (lambda d: d["facts"].update(gpu=89), "facts.gpu: Expected str | null, got int"),
        (lambda d: d["facts"]["compiled"].update(batch=0), "facts.compiled.batch: Expected int >= 1"),
        (lambda d: d["facts"]["compiled"]["kernel_list"].append([{}]), "kernel_list["),
        (lambda d: d["facts"]["compiled"].update(kernels=1), "kernels is 1 beside a list of 98"),
        (lambda d: d["facts"]["compiled"].update(megabytes_per_image=1.0), "which is not what the kernels move"),
        (lambda d: d["facts"]["compiled"].update(kernel_list=[]), "kernel_list: Expected array of length"),
        (lambda d: d["facts"]["compiled"].update(kernels=1, kernel_list=[["", "", "", "", 0, 0, 0, ""]]), "no byte"),
        (lambda d: d["facts"]["census"].update(types=[]), "facts.census.types: Expected object, got array"),
        (lambda d: d.update(kind="onnx"), "Object missing required field"),
    ],
)
def test_a_lie_of_an_engines_manifest_is_named_by_its_field(change: Change, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what is said is compared below
        manifest_from_json(changed(ENGINE, change), ENGINE.stem)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"schema_version": 1, "schema_version": 1}', "the key 'schema_version' is there twice"),
        (b'{"schema_version": NaN}', "NaN is no JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "invalid start byte"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "where at most 16,777,216 are read"),
        (b"9" * 5000, "Exceeds the limit"),
        (b'"text"', "it is no JSON object"),
    ],
    ids=["twins", "nan", "deep", "bytes", "surrogate", "bom", "large", "digits", "text"],
)  # fmt: skip
def test_json_that_readers_would_disagree_on_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CorruptArtifactError) as caught:
        read_artifact(tmp_path / "a.json")
    assert reason in str(caught.value)


def test_a_manifest_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "renamed.json").write_bytes(ONNX.read_bytes())
    with pytest.raises(CorruptArtifactError, match="it is of 'atto-224-fp16', renamed to 'renamed'"):
        read_artifact(tmp_path / "renamed.json")


def test_the_schema_in_the_documents_is_the_one_that_is_read() -> None:
    written = json.loads((ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(), "write it again with scripts/manifest-schema"


# --- any lie at any place ---------------------------------------------------------------------------------------------

LIES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.just([]), st.just({}), st.just([[]]), st.just({"a": {}}), st.just("../../etc/passwd"), st.just("\x1b[2J"),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value; of a long list the first entries."""
    yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from places(entry, (*path, key))
    elif isinstance(value, list):
        for at, entry in enumerate(value[:3]):
            yield from places(entry, (*path, at))


@st.composite
def lying_manifests(draw: st.DrawFn, path: Path) -> bytes:
    """A real manifest with one to three values replaced, removed or doubled."""
    data = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from([place for place in places(data) if place]))
        holder = data
        for key in above:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "remove", "double"]))
        if action == "replace":
            holder[last] = copy.deepcopy(draw(LIES))
        elif action == "remove":
            del holder[last]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        else:
            holder[f"{last}2"] = copy.deepcopy(holder[last])
    return json.dumps(data).encode()


TABLE = {0, 2, 3, 4, 5}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(lying_manifests(ONNX), lying_manifests(ENGINE), st.binary(max_size=200)))
def test_fuzz_whatever_a_manifest_says_the_reader_reads_it_or_says_what_is_wrong(content: bytes) -> None:
    with contextlib.suppress(ValueError):  # what is said of a lie is compared above
        manifest = manifest_from_json(content)
        assert manifest_from_json(manifest.to_json().encode()) == manifest


COMMANDS = (
    "report", pytest.param("report --html page.html", marks=pytest.mark.slow), "inspect", "verify", "bench plan",
    "build-trt",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("path", [ONNX, ENGINE], ids=["onnx", "engine"])
def test_fuzz_commands_over_lying_manifests_end_in_a_code_of_the_table(
    path: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the artifact itself: what a manifest says is all there is to go by, as in a fresh clone."""
    (tmp_path / path.parent.name).mkdir()
    monkeypatch.chdir(tmp_path)
    written = Path(path.parent.name, path.name)
    named = [str(written)] if command in ("inspect", "build-trt") else []
    run_over_lies([*command.split(), *named], written, path, capsys)


@pytest.mark.parametrize("kind", ["onnx", "engine"])
def test_fuzz_inspect_beside_the_file_that_a_lying_manifest_is_of(
    kind: str, tiny_onnx_fp16: Artifact, tiny_engine: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = tiny_onnx_fp16 if kind == "onnx" else tiny_engine
    shutil.copy(artifact.path, tmp_path)
    path = tmp_path / artifact.path.name
    run_over_lies(["inspect", str(path)], path.with_suffix(".json"), artifact.path.with_suffix(".json"), capsys)


def run_over_lies(words: list[str], written: Path, honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(lying_manifests(honest))
    def run(content: bytes) -> None:
        written.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code in TABLE
        assert "Traceback" not in capsys.readouterr().err

    run()
