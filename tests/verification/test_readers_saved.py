"""Saved results that `verify --judge` reads: the index, and Polygraphy's logits; lies in both, under a right hash."""

import base64
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnx_deploy.core.errors import CorruptArtifactError
from cnx_deploy.verification.judging import judge_saved
from cnx_deploy.verification.polygraphy_io import load_outputs, outputs_from_json, save_outputs
from cnx_deploy.verification.saved_results import INDEX_NAME, read_saved
from tests.support.lies import (
    FEW,
    LONG,
    ODD_JSON,
    QUICK,
    check_command,
    lying,
    placed,
    put,
    refused,
    result_or_error,
    spoilt,
)
from tests.support.saved_results_made import CANDIDATE, REFERENCE, save_results, sealed, with_outputs

RUN = ("artifacts", 0, "runs", 0)
LABELLED = ("artifacts", 0, "runs", 1)
FILE = (*RUN, "files", 0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_results(tmp_path_factory.mktemp("sound") / "saved")


@pytest.fixture
def index(sound: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((sound / INDEX_NAME).read_text(encoding="utf-8"))
    return found


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "saved")


def outputs_of(folder: Path) -> dict[str, Any]:
    (path, *_) = sorted(folder.rglob("outputs-*.json"))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_the_index_is_read_as_it_was_written(sound: Path, index: dict[str, Any]) -> None:
    assert json.loads(json.dumps([asdict(each) for each in read_saved(sound)])) == index["artifacts"]
    assert [result.passed for entry in judge_saved(sound) for result in entry.results] == [True, True]


def test_an_index_of_before_has_no_details_of_a_run_without_labels(
    folder: Path, index: dict[str, Any], sound: Path
) -> None:
    put(folder / INDEX_NAME, sealed(placed(index, (*RUN, "details"), {})))
    assert [entry.to_dict() for entry in judge_saved(folder)] == [entry.to_dict() for entry in judge_saved(sound)]


def test_an_image_whose_name_is_no_text_is_saved_under_a_name_that_is(tmp_path: Path) -> None:
    folder = save_results(tmp_path / "saved", images=("r\udce9d.png", "b.png", "c.png"))
    assert read_saved(folder)[0].runs[1].images == ("r\\udce9d.png", "b.png", "c.png")


LIES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("schema_version",), 2, "schema version 2, expected 1"),
    (("schema_version",), True, "schema version True, expected 1"),
    (("created",), "now", "created: Expected str of another form"),
    (("tools",), {"torch": 2}, "tools[...]: Expected str, got int"),
    (("artifacts",), {}, "artifacts: Expected array, got object"),
    (("artifacts", 0), "x", "artifacts[0]: Expected object, got str"),
    (("artifacts", 0, "kind"), "pickle", "artifacts[0].kind: Invalid enum value 'pickle'"),
    (("artifacts", 0, "sha256"), "0", "artifacts[0].sha256: Expected str of another form"),
    (("artifacts", 0, "notes"), [1], "artifacts[0].notes[0]: Expected str, got int"),
    (("artifacts", 0, "runs"), None, "artifacts[0].runs: Expected array, got null"),
    ((*RUN, "candidate"), REFERENCE, "artifacts[0].runs[0].candidate: it is the reference too"),
    ((*RUN, "gate"), {"name": "fp16"}, "artifacts[0].runs[0].gate: Object missing required field"),
    ((*RUN, "gate", "relative_l2_max"), "1", "artifacts[0].runs[0].gate.relative_l2_max: Expected float, got str"),
    ((*RUN, "batches"), [0], "artifacts[0].runs[0].batches[0]: Expected int >= 1"),
    ((*RUN, "images"), [], "artifacts[0].runs[0].images: Expected array of length >= 1"),
    ((*RUN, "images"), [1, 2, 3, 4], "artifacts[0].runs[0].images[0]: Expected str, got int"),
    ((*RUN, "files"), [], "artifacts[0].runs[0].files: Expected array of length >= 1"),
    ((*FILE, "size_bytes"), -1, "artifacts[0].runs[0].files[0].size_bytes: Expected int >= 0"),
    ((*FILE, "sha256"), None, "artifacts[0].runs[0].files[0].sha256: Expected str, got null"),
    ((*FILE, "name"), "/etc/outputs-0000.json", "artifacts[0].runs[0].files[0].name: Expected str of another form"),
    ((*FILE, "name"), "../outputs-0000.json", "artifacts[0].runs[0].files[0].name: Expected str of another form"),
    ((*FILE, "name"), "a/../b/outputs-0000.json", "artifacts[0].runs[0].files[0].name: Expected str of another form"),
    ((*FILE, "name"), "a/outputs-0000.json\n", "artifacts[0].runs[0].files[0].name: Expected str of another form"),
    ((*RUN, "runner", "device"), 3, "artifacts[0].runs[0].runner.device: Expected str, got int"),
    ((*LABELLED, "labels"), [0, 1], "artifacts[0].runs[1].labels: 2 labels of 3 images"),
    ((*LABELLED, "labels"), [0, 1, 2], "artifacts[0].runs[1].labels: 2 is none of 2 classes"),
    ((*LABELLED, "labels"), [0, 1, -1], "artifacts[0].runs[1].labels[2]: Expected int >= 0"),
    ((*LABELLED, "labels"), [0, 1, 1.5], "artifacts[0].runs[1].labels[2]: Expected int, got float"),
    ((*LABELLED, "details"), {}, "artifacts[0].runs[1].labels: 1 is none of 0 classes"),
    ((*LABELLED, "details", "broken"), [{}], "artifacts[0].runs[1].details.broken[0]: Object missing required"),
    ((*LABELLED, "details", "available"), "4", "artifacts[0].runs[1].details.available: Expected int, got str"),
]


@pytest.mark.parametrize(("place", "lie", "reason"), LIES, ids=[reason[:60] for *_, reason in LIES])
def test_a_lie_under_a_right_hash_is_named_by_its_field(
    folder: Path, index: dict[str, Any], place: tuple[Any, ...], lie: Any, reason: str
) -> None:
    path = put(folder / INDEX_NAME, sealed(placed(index, place, lie)))
    refused(
        lambda: judge_saved(folder), CorruptArtifactError, f"{path} cannot be trusted ({reason}", "Save the results"
    )


@pytest.mark.parametrize("name", ODD_JSON)
def test_what_is_no_index_is_corrupt(folder: Path, name: str) -> None:
    put(folder / INDEX_NAME, ODD_JSON[name])
    refused(lambda: read_saved(folder), CorruptArtifactError, "index.json cannot be trusted (", "Save the results")


def test_a_link_that_leads_out_of_the_folder_is_not_followed(folder: Path) -> None:
    (path, *_) = sorted(folder.rglob("outputs-*.json"))
    outside = path.rename(folder.parent / "outside.json")
    path.symlink_to(outside)
    refused(lambda: judge_saved(folder), CorruptArtifactError, f"{path} leads outside the folder")


def test_a_file_of_another_size_is_not_read(folder: Path) -> None:
    (path, *_) = sorted(folder.rglob("outputs-*.json"))
    with path.open("r+b") as stream:
        stream.truncate(3_000_000_000)  # no disk is taken, and no memory may be
    refused(
        lambda: judge_saved(folder), CorruptArtifactError, "was altered: it has 3,000,000,000 bytes, the index says"
    )


# --- Polygraphy's files -----------------------------------------------------------------------------------------------


def encoded(header: bytes, values: bytes = b"") -> str:
    """A NumPy file of a header of our own, padded as NumPy pads it."""
    padded = header + b" " * (-(len(header) + 11) % 64) + b"\n"
    return base64.b64encode(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + values).decode()


def with_array(document: dict[str, Any], array: object) -> dict[str, Any]:
    place = ("lst", 0, 1, 0, "outputs", "logits", "values", "array")
    changed: dict[str, Any] = placed(document, place, array)
    return changed


FORM = b"{'descr': '%s', 'fortran_order': %s, 'shape': %s, }"
ARRAYS: dict[str, tuple[object, str]] = {
    "claims": (encoded(FORM % (b"<f4", b"False", b"(999999999, 999999999)")), "999999999 float32 does not have 0"),
    "claims more": (encoded(FORM % (b"<f4", b"False", b"(99999999999999, 9)")), "Expected a NumPy array of float32"),
    "empty": (encoded(FORM % (b"<f4", b"False", b"(0, 2)")), "an array of 0 x 2 float32 does not have 0 bytes"),
    "less": (encoded(FORM % (b"<f4", b"False", b"(1, 2)"), b"\0" * 4), "1 x 2 float32 does not have 4 bytes"),
    "objects": (encoded(FORM % (b"|O", b"False", b"(1, 2)"), b"\x80\x04K\x01."), "Expected a NumPy array of float32"),
    "doubles": (encoded(FORM % (b"<f8", b"False", b"(1, 2)"), b"\0" * 16), "Expected a NumPy array of float32"),
    "columns first": (encoded(FORM % (b"<f4", b"True", b"(1, 2)"), b"\0" * 8), "Expected a NumPy array of float32"),
    "one dimension": (encoded(FORM % (b"<f4", b"False", b"(2,)"), b"\0" * 8), "Expected a NumPy array of float32"),
    "program": (encoded(b"__import__('os').getpid()"), "Expected a NumPy array of float32"),
    "archive": (base64.b64encode(b"PK\x03\x04" + bytes(80)).decode(), "Expected a NumPy array of float32"),
    "nothing": ("", "Expected a NumPy array of float32"),
    "no base64": ("%%%", "lst[0][1][0].outputs.logits.values.array"),
    "number": (7, "lst[0][1][0].outputs.logits.values.array: Expected bytes, got int"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_claims_what_it_has_not_is_refused(sound: Path, name: str) -> None:
    array, reason = ARRAYS[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what is said is compared below
        outputs_from_json(json.dumps(with_array(outputs_of(sound), array)).encode())
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("place", "lie", "reason"),
    [
        (("polygraphy_class",), "Tensor", "polygraphy_class: Invalid enum value 'Tensor'"),
        (("lst",), {}, "lst: Expected array, got object"),
        (("lst", 0), ["one"], "lst[0]: Expected array of length 2"),
        (("lst", 0, 0), 5, "lst[0][0]: Expected str, got int"),
        (("lst", 0, 1, 0, "outputs"), {}, "lst[0][1][0].outputs: Object missing required field logits"),
        (("lst", 0, 1, 0, "polygraphy_class"), "FormattedArray", "lst[0][1][0].polygraphy_class: Invalid enum value"),
        (("lst", 1, 0), REFERENCE, "lst[1][0]: the runner 'torch fp32' is there twice"),
    ],
)
def test_a_lie_of_a_file_of_logits_is_named_by_its_field(
    sound: Path, tmp_path: Path, place: tuple[Any, ...], lie: Any, reason: str
) -> None:
    path = put(tmp_path / "out.json", json.dumps(placed(outputs_of(sound), place, lie)).encode())
    refused(lambda: load_outputs(path), CorruptArtifactError, f"{path} holds no outputs of this project ({reason}")


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        ({REFERENCE: [(1, 2), (3, 2)]}, f"holds {REFERENCE}: expected {CANDIDATE}, {REFERENCE}"),
        ({REFERENCE: [(1, 2), (3, 2)], CANDIDATE: [(4, 2)]}, "holds 1 batches of onnxruntime fp16 and 2 of torch fp32"),
        ({REFERENCE: [(4, 2)], CANDIDATE: [(4, 3)]}, "holds logits of (4, 3) and (4, 2): expected 3 classes"),
        ({REFERENCE: [(1, 2), (3, 3)], CANDIDATE: [(1, 2), (3, 3)]}, "logits of (3, 3) and (3, 3): expected 2 classes"),
        ({REFERENCE: [(5, 2)], CANDIDATE: [(5, 2)]}, "expected 2 classes on both sides, and 4 images in all"),
        ({REFERENCE: [(3, 2)], CANDIDATE: [(3, 2)]}, "holds logits of 3 images: expected 4 images"),
    ],
)
def test_logits_of_other_runners_shapes_or_images_are_corrupt(
    folder: Path, index: dict[str, Any], logits: dict[str, list[tuple[int, int]]], reason: str
) -> None:
    path = folder.parent / "other.json"
    save_outputs(path, {name: [torch.zeros(shape) for shape in shapes] for name, shapes in logits.items()})
    with_outputs(folder, index, path.read_bytes())
    refused(lambda: judge_saved(folder), CorruptArtifactError, reason, "Save the results again")


def test_fuzz_what_polygraphy_reads_and_we_read_is_the_same(sound: Path) -> None:
    from polygraphy.comparator import RunResults

    (path, *_) = sorted(sound.rglob("outputs-*.json"))
    theirs, ours = RunResults.load(str(path)), load_outputs(path)
    assert {name: [each["logits"].tolist() for each in found] for name, found in theirs.items()} == {
        name: [each.tolist() for each in found] for name, found in ours.items()
    }


# --- any lie at any place ---------------------------------------------------------------------------------------------


def spoil(data: st.DataObject, folder: Path, sound: Path) -> None:
    """Lies in the index or in the logits under right hashes, or bytes that are neither."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    kind = data.draw(st.sampled_from(["index", "index", "logits", "index bytes", "logits bytes"]))
    outputs = outputs_of(folder)
    if kind == "index":
        put(folder / INDEX_NAME, sealed(data.draw(lying(index))))
    elif kind == "index bytes":
        put(folder / INDEX_NAME, data.draw(spoilt((folder / INDEX_NAME).read_bytes())))
    elif kind == "logits":
        with_outputs(folder, index, json.dumps(data.draw(lying(outputs))).encode())
    else:
        arrays = base64.b64decode(outputs["lst"][0][1][0]["outputs"]["logits"]["values"]["array"])
        changed = with_array(outputs, base64.b64encode(data.draw(spoilt(arrays))).decode())
        with_outputs(folder, index, json.dumps(changed).encode())


def judge(data: st.DataObject, folder: Path, sound: Path) -> None:
    spoil(data, folder, sound)
    result_or_error(lambda: [entry.to_dict() for entry in judge_saved(folder)], CorruptArtifactError)


@QUICK
@given(data=st.data())
def test_fuzz_saved_results_are_judged_or_corrupt(tmp_path: Path, sound: Path, data: st.DataObject) -> None:
    judge(data, tmp_path / "fuzzed", sound)


@pytest.mark.slow
@LONG
@given(data=st.data())
def test_fuzz_saved_results_at_length(tmp_path: Path, sound: Path, data: st.DataObject) -> None:
    judge(data, tmp_path / "fuzzed", sound)


def command(data: st.DataObject, folder: Path, sound: Path) -> None:
    spoil(data, folder, sound)
    check_command("verify", "--judge", folder, allowed=frozenset({0, 3, 4}))


@FEW
@given(data=st.data())
def test_fuzz_the_command(tmp_path: Path, sound: Path, data: st.DataObject) -> None:
    command(data, tmp_path / "fuzzed", sound)


@pytest.mark.slow
@LONG
@given(data=st.data())
def test_fuzz_the_command_at_length(tmp_path: Path, sound: Path, data: st.DataObject) -> None:
    command(data, tmp_path / "fuzzed", sound)
