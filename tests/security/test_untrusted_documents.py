"""Documents from outside: each is read as it was written, or one message names the place that is wrong."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnx_deploy.api import _outdated
from cnx_deploy.core.artifacts import find_artifacts, read_artifact
from cnx_deploy.core.errors import CnxDeployError, CorruptArtifactError, InputError
from cnx_deploy.core.manifest import MAX_MANIFEST_BYTES, Artifact, json_schema, manifest_from_json
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.strict_json import (
    LARGEST,
    MAX_DEPTH,
    MAX_DOCUMENT_BYTES,
    Finite,
    PositiveNumber,
    command_document,
    shortened,
    strict_json,
    typed,
)
from cnx_deploy.model.pretrained import fetch_pretrained
from cnx_deploy.report.records import BEGIN, END
from cnx_deploy.verification.provenance import check_provenance
from tests.core.test_artifacts import make
from tests.support.hostile_onnx import foreign_classifier
from tests.support.lies import (
    FEW,
    ODD_JSON,
    QUICK,
    check_command,
    documents,
    lying,
    placed,
    put,
    refused,
    result_or_error,
    run,
    spoilt,
)

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "engines" / "atto-224-fp16-rtx-sm89.json"
ONNX = ROOT / "export" / "atto-224-fp16.json"

# --- JSON itself ------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)
BYTES = st.one_of(st.binary(max_size=60), st.text('{}[]":,.019eE+-\\unNaIfi \n', max_size=60).map(str.encode))
REASONS = {
    "twins": "'a' is there twice", "NaN": "NaN", "infinity": "-Infinity", "beyond a double": "1e999",
    "deep": "nested too deeply", "very deep": "nested too deeply", "byte-order mark": "BOM",
    "lone surrogate": "surrogates", "digits": "Exceeds the limit", "utf-8 of nothing": "invalid start byte",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ODD_JSON if name not in ("list", "text", "null")])
def test_what_readers_disagree_on_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what is said is compared below
        strict_json(ODD_JSON[name])
    assert REASONS.get(name, "") in str(caught.value)


@QUICK
@given(value=JSON)
def test_fuzz_what_json_can_say_is_read_as_it_was_written(value: Any) -> None:
    assert strict_json(json.dumps(value, ensure_ascii=False).encode()) == value


@QUICK
@given(content=BYTES)
def test_fuzz_bytes_are_a_document_or_refused(tmp_path: Path, content: bytes) -> None:
    path = put(tmp_path / "a.json", content)
    document = result_or_error(lambda: command_document(path, "cnx-deploy bench"), InputError)
    assert document is None or document[0] == json.loads(content, parse_constant=pytest.fail)


def test_documents_are_read_up_to_a_depth_and_a_size_and_keys_are_compared_in_a_second(tmp_path: Path) -> None:
    nested = [b"[" * depth + b"]" * depth for depth in (MAX_DEPTH, MAX_DEPTH + 1)]
    assert strict_json(nested[0]) == json.loads(nested[0])
    with pytest.raises(ValueError, match="nested too deeply"):
        strict_json(nested[1])
    with pytest.raises(ValueError, match="where at most 16,777,216 are read"):
        strict_json(b" " * (MAX_DOCUMENT_BYTES + 1))
    path = tmp_path / "large.json"
    with path.open("wb") as stream:
        stream.truncate(200_000_000)
    refused(lambda: command_document(path, "cnx-deploy bench"), InputError, "it has more than 16,777,216 bytes")
    pairs = ", ".join(f'"{number}": 0' for number in (*range(200_000), 199_999))
    start = time.process_time()
    with pytest.raises(ValueError, match="the key '199999' is there twice"):
        strict_json(b"{" + pairs.encode() + b"}")
    assert time.process_time() - start < 5


@dataclass(frozen=True, slots=True)
class Row:
    batch: int
    speed: PositiveNumber


@dataclass(frozen=True, slots=True)
class Table:
    rows: tuple[Row, ...]
    share: Finite | None = None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"rows": [{"batch": 1}]}, "rows[0]: Object missing required field speed"),
        ({"rows": [{"batch": True, "speed": 1}]}, "rows[0].batch: Expected int, got bool"),
        ({"rows": [{"batch": 1, "speed": 0}]}, "rows[0].speed: Expected float >= 1e-150"),
        ({"rows": [{"batch": 1, "speed": 1e200}]}, "rows[0].speed: Expected float <= 1e+150"),
        ({"rows": [{"batch": 1, "speed": 10**400}]}, "rows[0].speed: Number out of range"),
        ({"rows": [{"batch": 1, "speed": math.nan}]}, "rows[0].speed: Expected float"),
        ([], "it: Expected object, got array"),
    ],
)
def test_a_field_is_named_by_its_path(value: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what is said is compared below
        typed(value, Table)
    assert reason in str(caught.value)


def test_whole_numbers_are_numbers_and_the_rest_of_a_document_may_be_more() -> None:
    table = typed({"rows": [{"batch": 2, "speed": 3, "more": {}}], "other": None}, Table)
    assert table == Table((Row(2, 3.0),))
    assert math.isfinite(LARGEST * LARGEST)


def test_what_is_told_of_a_document_is_short(tmp_path: Path) -> None:
    assert (shortened("a" * 200), shortened("a" * 201)) == ("a" * 200, "a" * 199 + "…")
    said = {"error": "InputError", "message": "no such file" + "!" * 9000, "exit_code": 2}
    path = put(tmp_path / "a.json", json.dumps(said).encode())
    message = refused(lambda: command_document(path, "cnx-deploy bench"), InputError, "a command that failed: 'no such")
    assert len(message) < 600


# --- manifests, preprocessing, timm's config --------------------------------------------------------------------------

TAG = "convnextv2_atto.fcmae"
CONFIG: dict[str, Any] = {
    "architecture": "convnextv2_atto", "num_classes": 1000,
    "pretrained_cfg": {
        "input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A sound document, what reads its bytes, and the error for other ones."""

    sound: dict[str, Any]
    read: Callable[[Path, bytes], Any]
    error: type[CnxDeployError] = CorruptArtifactError


def config_from_the_hubs_cache(folder: Path, content: bytes) -> Any:
    """The config of a tag whose weights, in the cache too, have the hash that names them."""
    repository = folder / f"models--timm--{TAG}"
    snapshot, blobs, refs = (repository / name for name in ("snapshots/" + "0" * 40, "blobs", "refs"))
    for each in (snapshot, blobs, refs):
        each.mkdir(parents=True, exist_ok=True)
    put(refs / "main", snapshot.name.encode())
    put(snapshot / "config.json", content)
    blob = put(blobs / hashlib.sha256(b"weights").hexdigest(), b"weights")
    if not (snapshot / "model.safetensors").exists():
        (snapshot / "model.safetensors").symlink_to(blob)
    return fetch_pretrained(TAG, folder)


READERS = {
    "onnx": Reader(
        json.loads(ONNX.read_bytes()), lambda folder, content: read_artifact(put(folder / ONNX.name, content))
    ),
    "engine": Reader(
        json.loads(ENGINE.read_bytes()), lambda folder, content: read_artifact(put(folder / ENGINE.name, content))
    ),
    "preprocessing": Reader(
        Preprocessing().to_dict(), lambda folder, content: Preprocessing.from_dict(json.loads(content)), InputError
    ),
    "config": Reader(CONFIG, config_from_the_hubs_cache),
}
MISSING = object()


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else 1


LIES: list[tuple[str, str, Any, str]] = [
    ("onnx", "files.0.size_bytes", -1, "files[0].size_bytes: Expected int >= 0"),
    ("onnx", "files.0.size_bytes", True, "files[0].size_bytes: Expected int, got bool"),
    ("onnx", "files.0.sha256", "0" * 63, "files[0].sha256: "),
    ("onnx", "files.0.sha256", "A" * 64, "files[0].sha256: "),
    ("onnx", "files.0.sha256", "0" * 64 + "\n", "files[0].sha256: "),
    *(("onnx", "files.0.name", name, "files[0].name: ") for name in ("../a.onnx", "/etc/passwd", "a/b.onnx", "..", "")),
    ("onnx", "files.0.name", "a\x1b[31m.onnx", "files[0].name: "),
    ("onnx", "files.0.name", "other.onnx", "its first file is 'other.onnx', expected"),
    ("onnx", "files", [], "its first file is 'missing'"),
    ("onnx", "files", lambda files: files * 2, "listed twice"),
    ("onnx", "files", lambda files: [*files, {**files[0], "name": ONNX.name}], "or the manifest itself is"),
    ("onnx", "stem", "other", "it is of 'other', renamed to"),
    ("onnx", "created", "yesterday", "created: "),
    ("onnx", "created", lambda created: created + "\n", "created: "),
    ("onnx", "facts", None, "facts: Expected object, got null"),
    ("onnx", "facts.deep", deep(500), "nested too deeply"),  # copying it to show it would end in a RecursionError
    ("onnx", "tools", {"torch": 2}, "tools[...]: Expected str, got int"),
    ("onnx", "evil", 1, "unknown fields 'evil'"),
    ("onnx", "schema_version", "2", "schema version '2', expected 2"),
    ("onnx", "schema_version", 1, "schema version 1, expected 2"),
    ("onnx", "model.num_classes", -1, "model.num_classes: Expected int >= 0"),
    ("onnx", "model.class_names", ["cat"], "1 class names for 1000 classes"),
    ("onnx", "model.preprocessing", [], "model.preprocessing: Expected object, got array"),
    ("onnx", "model.preprocessing.mean", [1, 2], "mean and std have a number for each channel"),
    ("onnx", "model.weights.origin", "stolen", "model.weights.origin: Invalid enum value 'stolen'"),
    ("onnx", "model.weights.licence", MISSING, "model.weights: Object missing required field licence"),
    *(("onnx", "model.weights.reference", text, "reference is no seed") for text in ("1e3", "", "0x1", "9" * 5000)),
    ("onnx", "request.batch", [8, 1, 64], "the batch range 8:1:64 does not rise"),
    ("onnx", "request.batch", [1, 8], "batch: Expected array of length 3, got 2"),
    ("onnx", "request.batch", [1 << 31] * 3, "batch[0]: Expected int <= 65536"),  # verify drew so many images
    ("onnx", "request.deploy.precision", "fp7", "No precision is called 'fp7'"),
    ("onnx", "request.opset", MISSING, "Object missing required field opset"),
    ("onnx", "request.deploy.std", ["a", 1, 1], "deploy.std[0]: Expected float, got str"),
    ("engine", "request.onnx.batch", [1, 8, 2**40], "batch[2]: Expected int <= 65536"),
    ("engine", "request.runtime", "onnxruntime", "request.runtime: Invalid enum value"),
    ("engine", "request.target", "sm89; rm -rf", "request.target: "),
    ("engine", "request.target", "sm89\n", "request.target: "),
    ("engine", "request.batches", [], "request.batches: Expected array of length >= 1"),
    ("engine", "request.batches", [[1, 0, 2]], "request.batches[0][1]: Expected int >= 1"),
    ("engine", "request.allow_tf32", 1, "request.allow_tf32: Expected bool, got int"),
    ("engine", "facts.runtime_version", MISSING, "facts: Object missing required field runtime_version"),
    ("engine", "facts.gpu", 89, "facts.gpu: Expected str | null, got int"),
    ("engine", "facts.gpu", "sm89\n", "facts.gpu: "),
    ("engine", "facts.census.types", [], "facts.census.types: Expected object, got array"),
    ("engine", "facts.compiled.batch", 0, "facts.compiled.batch: Expected int >= 1"),
    ("engine", "facts.compiled.kernel_list", lambda kernels: [*kernels, [{}]], "kernel_list["),
    ("engine", "facts.compiled.kernel_list", [], "kernel_list: Expected array of length"),
    ("engine", "facts.compiled.kernels", 1, "kernels is 1 beside a list of 98"),
    ("engine", "facts.compiled.megabytes_per_image", 1.0, "which is not what the kernels move"),
    (
        "engine", "facts.compiled",
        lambda compiled: {**compiled, "kernels": 1, "kernel_list": [["", "", "", "", 0, 0, 0, ""]]}, "no byte",
    ),
    ("engine", "kind", "onnx", "Object missing required field"),
    ("preprocessing", "image_size", True, "image_size"),
    ("preprocessing", "crop_ratio", 10**400, "crop_ratio"),
    ("preprocessing", "interpolation", "\x1b[2J", "'\\x1b[2J'"),
    ("preprocessing", "mean", [0, 0, None], "mean[2]"),
    ("preprocessing", "std", [1, 1, math.nan], "std"),
    ("preprocessing", "x" * 9000, 1, "xxxxx"),
    ("config", "num_classes", "1000", "num_classes"),
    ("config", "pretrained_cfg", [], "pretrained_cfg"),
    ("config", "pretrained_cfg.input_size", [3, 224, 8], "224x8"),
    ("config", "pretrained_cfg.crop_pct", True, "crop_pct"),
    ("config", "pretrained_cfg.std", [0, 1, 1], "std"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "place", "lie", "reason"),
    LIES,
    ids=[f"{name} {place[:40]} {at}" for at, (name, place, *_) in enumerate(LIES)],
)
def test_a_lie_is_named_by_its_place(name: str, place: str, lie: Any, reason: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = tuple(int(part) if part.isdigit() else part for part in place.split("."))
    holder = document = json.loads(json.dumps(reader.sound))
    for part in path[:-1]:
        holder = holder[part]
    if lie is MISSING:
        del holder[path[-1]]
    else:
        holder[path[-1]] = lie(holder[path[-1]]) if callable(lie) else lie
    said = refused(lambda: reader.read(tmp_path, json.dumps(document).encode()), reader.error, reason)
    assert len(said) < 900


@pytest.mark.parametrize("name", ["onnx", "config"])
@pytest.mark.parametrize("content", [ODD_JSON["twins"], ODD_JSON["list"], b" " * (MAX_MANIFEST_BYTES + 1)])
def test_every_reader_reads_strictly_and_no_more_than_a_size(name: str, content: bytes, tmp_path: Path) -> None:
    refused(lambda: READERS[name].read(tmp_path, content), CorruptArtifactError, ".json is not a ")


@pytest.mark.parametrize("name", READERS)
def test_a_sound_document_is_read(name: str, tmp_path: Path) -> None:
    found = READERS[name].read(tmp_path, json.dumps(READERS[name].sound).encode())
    assert name != "config" or found.num_classes == 1000


def test_every_committed_record_is_read_and_written_back_as_it_is() -> None:
    paths = [path for folder in ("export", "engines") for path in (ROOT / folder).glob("*.json")]
    assert len(paths) > 10
    for path in paths:
        assert manifest_from_json(path.read_bytes(), path.stem).to_json() == path.read_text(encoding="utf-8"), path


def test_the_schema_in_the_documents_is_the_one_that_is_read() -> None:
    written = json.loads((ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(), "write it again with scripts/manifest-schema"


def test_a_manifest_under_another_name_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "renamed.json", ONNX.read_bytes())
    refused(lambda: read_artifact(path), CorruptArtifactError, "it is of 'atto-224-fp16', renamed to 'renamed'")


@pytest.mark.parametrize("name", ["onnx", "engine", "config"])
@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_fuzz_a_document_is_read_or_refused_and_what_is_read_is_written_back(
    name: str, tmp_path: Path, data: st.DataObject
) -> None:
    content = data.draw(documents(READERS[name].sound))
    found = result_or_error(lambda: READERS[name].read(tmp_path, content), CorruptArtifactError)
    if isinstance(found, Artifact):
        assert manifest_from_json(found.manifest.to_json().encode()) == found.manifest


@QUICK
@given(values=lying(Preprocessing().to_dict()))
def test_fuzz_preprocessing_is_read_or_wrong_input(values: Any) -> None:
    found = result_or_error(lambda: Preprocessing.from_dict(values), InputError)
    assert found is None or Preprocessing.from_dict(found.to_dict()) == found


# --- commands over what lies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["report", "inspect", "verify", "bench plan", "build-trt"])
@settings(QUICK, max_examples=25)
@given(data=st.data())
def test_fuzz_commands_over_lying_manifests_end_in_a_code_of_the_table(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Without the artifacts themselves: what a manifest says is all there is to go by, as in a fresh clone."""
    monkeypatch.chdir(tmp_path)
    path = data.draw(st.sampled_from([ONNX, ENGINE]))
    written = Path(path.parent.name, path.name)
    for folder in ("export", "engines"):
        shutil.rmtree(folder, ignore_errors=True)
    written.parent.mkdir()
    put(written, data.draw(documents(json.loads(path.read_bytes()))))
    named = [written] if command in ("inspect", "build-trt") else []
    check_command(*command.split(), *named, allowed=(0, 2, 3, 4, 5))


@pytest.mark.parametrize("kind", ["onnx", "engine"])
@settings(QUICK, max_examples=25)
@given(data=st.data())
def test_fuzz_inspect_beside_the_file_that_a_lying_manifest_is_of(
    kind: str, tiny_onnx_fp16: Artifact, tiny_engine: Artifact, tmp_path: Path, data: st.DataObject
) -> None:
    artifact = tiny_onnx_fp16 if kind == "onnx" else tiny_engine
    path = Path(shutil.copy(artifact.path, tmp_path))
    sound = json.loads(artifact.path.with_suffix(".json").read_bytes())
    put(path.with_suffix(".json"), data.draw(documents(sound)))
    check_command("inspect", path, allowed=(0, 2, 3, 4, 5))


def changed(artifact: Artifact, place: tuple[str, ...], value: Any) -> None:
    path = artifact.path.with_suffix(".json")
    put(path, json.dumps(placed(json.loads(path.read_bytes()), place, value)).encode())


@pytest.mark.parametrize("words", [["verify", "records"], ["verify", "records", "--json"]])
def test_what_a_manifest_says_forges_no_line_and_steers_no_terminal(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = "MIT\nok     everything is well \x9b31m \u202e \x1b[2J"
    changed(make(tmp_path / "export"), ("model", "weights", "licence"), forged)
    monkeypatch.chdir(tmp_path)
    shown = run(*words)[1]
    assert "everything is well" in shown
    assert [line for line in shown.splitlines() if line.startswith("ok     everything")] == []
    assert [character for character in shown if not character.isprintable() and character != "\n"] == []
    if "--json" in words:
        document, _ = json.JSONDecoder().raw_decode(shown)  # the error of stderr follows
        assert document["findings"][-1]["text"].endswith(forged)


@pytest.mark.parametrize("name", ["small.onnx", "../export/other.onnx", "a\0b.onnx", "", "a" * 300 + ".onnx"])
def test_an_engine_that_names_a_source_of_another_kind_or_place_is_verified_without_it(
    name: str, tmp_path: Path
) -> None:
    make(tmp_path / "export", kind="engine")
    make(tmp_path / "export", "other")
    make(tmp_path / "engines", "e", kind="engine", source_name=name)
    (tmp_path / "export" / "other.onnx").unlink()
    (engine,) = find_artifacts(tmp_path / "engines")
    assert _outdated(engine, tmp_path / "export") is None
    findings = check_provenance((), export_dir=tmp_path / "export", engines_dir=tmp_path / "engines").findings
    assert any("is not recorded here" in each.text for each in findings if each.artifact == "e.engine")


def test_a_reference_that_is_too_long_for_a_path_is_a_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make(tmp_path / "export", content=foreign_classifier().SerializeToString())
    changed(artifact, ("model", "weights", "origin"), "checkpoint")
    changed(artifact, ("model", "weights", "reference"), "a" * 300 + ".safetensors")
    monkeypatch.chdir(tmp_path)
    code, said = run("verify", "records")
    assert (code, "is not here" in said) == (0, True)


# --- README and index.csv ---------------------------------------------------------------------------------------------

README = f"# Title\n\n{BEGIN}\nold\n{END}\nmore\n".encode()


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one recorded file; the current one."""
    (tmp_path / "export").mkdir()
    shutil.copy(ONNX, tmp_path / "export")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_texts_that_are_none_are_told_where_named_and_else_left_alone_or_written_again(recorded: Path) -> None:
    readme = put(recorded / "README.md", README)
    assert run("report")[0] == 0
    assert "| atto | 3,708,400 |" in readme.read_text(encoding="utf-8")
    assert run("report", "--check")[0] == 0
    put(recorded / "export" / "index.csv", b"\xff\xfe\x00")
    code, said = run("report", "--check")
    assert (code, "Out of date" in said) == (3, True)
    put(readme, README.decode().encode("utf-16"))
    assert check_command("report") == 0  # the index is written again, and what was not named is left
    code, said = run("report", "--readme", "README.md")
    assert (code, "README.md is no text in UTF-8" in said) == (2, True)
    with readme.open("wb") as stream:
        stream.truncate(100_000_000)
    code, said = run("report", "--readme", "README.md")
    assert (code, "README.md has 100,000,000 bytes: expected a text of at most" in said) == (2, True)


@settings(FEW, max_examples=8)
@given(readme=spoilt(README), index=spoilt(b"stem,kind\na,onnx\n"))
def test_fuzz_report_over_texts(recorded: Path, readme: bytes, index: bytes) -> None:
    put(recorded / "README.md", readme)
    put(recorded / "export" / "index.csv", index)
    check_command("report", "--check", allowed=(0, 2, 3))
    check_command("report", "--readme", "README.md", allowed=(0, 2))
