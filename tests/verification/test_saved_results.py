"""Saved results are judged again as they were; lies in the index or the logits, under right hashes, are refused."""

import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.gates import GATES, OutputSpec
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import BrokenImage
from cnx_deploy.model.tasks.base import joined
from cnx_deploy.runners.base import RunnerInfo
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.verification.metrics import RunningComparison, Verification
from cnx_deploy.verification.saved_results import (
    INDEX_NAME,
    SavedResults,
    changed_gate,
    judge_saved,
    own_hash,
    read_saved,
    save_for_polygraphy,
)
from tests.support.lies import (
    LONG,
    ODD_JSON,
    QUICK,
    check_command,
    lying,
    placed,
    put,
    refused,
    result_or_error,
    run,
    spoilt,
)

NAMES = ("onnxruntime fp16", "torch float32")
INFO = RunnerInfo("onnxruntime", "1.0", "some CPU", "fp16", "float32", (("threads", "1"),))
RUN, LABELLED = ("artifacts", 0, "runs", 0), ("artifacts", 0, "runs", 1)
SPECS = (OutputSpec("logits", (2,), "logit", "softmax"),)
PLAIN_FILE = "tiny-test-32-fp32.onnx-onnxruntime.npz"


def save(folder: Path, artifact: Artifact, *, noise: float = 1e-4, first: str = "a.png") -> Verification:
    """Two runs of one file: four images in two batches, and three labelled ones of two classes, one flipped."""
    saved, results = SavedResults(folder), []
    reference = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    candidate = reference + noise
    broken, images = (BrokenImage("d.png", "no image"),), (first, "b.png", "c.png")
    for class_names, parts in (((), (slice(0, 1), slice(1, 4))), (("cat", "dog"), (slice(0, 3),))):
        comparison = RunningComparison(SPECS, class_names, "logits")
        writer = saved.new_run(artifact, INFO, NAMES, SPECS)
        for part in parts:
            names = images if class_names else [f"image {at}" for at in range(4)[part]]
            labels = [0, 1, 1] if class_names else []
            pair = {"logits": candidate[part]}, {"logits": reference[part]}
            comparison.add(*pair, names, labels)
            writer.add(*pair, names, labels)
        (result,) = comparison.results(NAMES, GATES["fp16"], available=4, broken=broken)
        saved.keep(writer.close(result, "logits", tuple(class_names), 4, broken))
        results.append(result)
    saved.finish(artifact, ("tensorrt: no GPU",), ("a note",))
    return Verification(artifact.path.name, "onnx", tuple(results), ("tensorrt: no GPU",), ("a note",))


@pytest.fixture(scope="module")
def sound(tiny_onnx_fp32: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("sound") / "saved"
    save(folder, tiny_onnx_fp32)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, free to be changed."""
    return shutil.copytree(sound, tmp_path / "saved")


@pytest.fixture
def index(sound: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((sound / INDEX_NAME).read_text(encoding="utf-8"))
    return document


def sealed(document: Any) -> bytes:
    """An index as a file's bytes, with the hash of itself that it has to have."""
    rest = {name: value for name, value in document.items() if name != "sha256"}
    return json.dumps({**rest, "sha256": own_hash(rest)}).encode()


def with_logits(folder: Path, index: dict[str, Any], content: bytes) -> None:
    """Put other bytes into the first file of logits, and their size and hash into the index."""
    record = index["artifacts"][0]["runs"][0]
    put(folder / record["file"], content)
    record.update(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    put(folder / INDEX_NAME, sealed(index))


def archived(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def array(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


# --- what was saved ---------------------------------------------------------------------------------------------------


def test_judged_at_the_same_gate_the_numbers_are_identical(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    said = save(tmp_path / "saved", tiny_onnx_fp32)
    assert said.passed
    assert [entry.to_dict() for entry in judge_saved(tmp_path / "saved")] == [said.to_dict()]


def test_the_index_says_what_was_compared_and_by_whom(sound: Path, index: dict[str, Any]) -> None:
    (entry,) = read_saved(sound)
    plain, labelled = entry.runs
    assert (plain.images, plain.labels) == (("image 0", "image 1", "image 2", "image 3"), None)
    assert (labelled.images, labelled.labels, labelled.class_names) == (
        ("a.png", "b.png", "c.png"),
        (0, 1, 1),
        ("cat", "dog"),
    )
    assert (labelled.available, labelled.broken, labelled.gate.name) == (4, (BrokenImage("d.png", "no image"),), "fp16")
    assert (labelled.runner, plain.file != labelled.file) == (INFO, True)
    assert json.loads(json.dumps([asdict(entry)])) == index["artifacts"]


def test_logits_come_back_to_the_bit_and_numpy_reads_them_without_us(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    numbers = torch.randn(3, 5)
    numbers[0, :4] = torch.tensor([math.nan, math.inf, -0.0, 1e-45])
    specs = (OutputSpec("logits", (5,), "logit", "softmax"),)
    saved, comparison = SavedResults(tmp_path / "saved"), RunningComparison(specs)
    writer = saved.new_run(tiny_onnx_fp32, INFO, NAMES, specs)
    for part in (slice(0, 1), slice(1, 3)):
        pair = {"logits": numbers[part]}, {"logits": -numbers[part]}
        comparison.add(*pair, ["x"] * len(numbers[part]))
        writer.add(*pair, ["x"] * len(numbers[part]))
    record = writer.close(*comparison.results(NAMES, GATES["fp16"]))
    candidates, references = (joined(side)["logits"] for side in zip(*record.pairs(tmp_path / "saved"), strict=True))
    for back, written in ((candidates, numbers), (references, -numbers)):
        assert (back.dtype, torch.equal(back.view(torch.int32), written.view(torch.int32))) == (torch.float32, True)
    with np.load(tmp_path / "saved" / record.file) as plain:
        assert np.array_equal(plain["candidate-logits-0001"], numbers[1:].numpy())


def test_an_image_whose_name_is_no_text_is_saved_under_a_name_that_is(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    save(tmp_path / "saved", tiny_onnx_fp32, first="r\udce9d.png")
    assert read_saved(tmp_path / "saved")[0].runs[1].images == ("r\\udce9d.png", "b.png", "c.png")


def test_results_are_not_saved_over_others(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="not an empty folder"):
        SavedResults(folder)
    with pytest.raises(InputError, match="holds no saved results"):
        read_saved(tmp_path)


# --- other gates ------------------------------------------------------------------------------------------------------


def test_judged_at_a_tighter_gate_they_fail_and_at_a_wider_one_they_pass(sound: Path) -> None:
    assert run("verify", "saved", sound)[0] == 0
    code, said = run("verify", "saved", sound, "--relative-l2", "1e-9", "--json")
    results = json.loads(said[: said.rindex("}") + 1])["verifications"][0]["results"]
    assert (code, [result["passed"] for result in results]) == (3, [False, False])
    assert results[0]["gate"]["name"] == "fp16, changed"
    assert "relative L2" in results[0]["failures"][0]
    code, said = run("verify", "saved", sound, "--gate", "bf16")
    assert (code, said.count("  pass"), "labels, 3 of 4 images" in said) == (0, 2, True)


def test_another_gate_does_not_excuse_a_flip(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    saved, comparison = SavedResults(tmp_path / "saved"), RunningComparison(SPECS, ("cat", "dog"), "logits")
    writer = saved.new_run(tiny_onnx_fp32, INFO, NAMES, SPECS)
    reference = torch.tensor([[9.0, 1.0]] * 100)
    candidate = reference.clone()
    candidate[0] = candidate[0].flip(0)
    names, labels = [f"{at}.png" for at in range(100)], [0] * 100
    pair = {"logits": candidate}, {"logits": reference}
    comparison.add(*pair, names, labels)
    writer.add(*pair, names, labels)
    (result,) = comparison.results(NAMES, GATES["fp16"])
    saved.keep(writer.close(result, "logits", ("cat", "dog"), 100))
    saved.finish(tiny_onnx_fp32, (), ())
    (judged,) = judge_saved(tmp_path / "saved", relative_l2=1e9, cosine=-1.0, top1=0.0, kl=1e9)
    assert judged.results[0].failures == ("1 flips of top-1 by more than noise explains",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "fp16", "kl": 1.0, "relative_l2": 1.0}, "leave out --kl, --relative-l2"),
        ({"name": "loose"}, "No gate is called 'loose'"),
        ({"cosine": math.nan}, "in -1 to 1, got nan"),
        ({"top1": 1.1}, "in 0 to 1, got 1.1"),
        ({"kl": -1.0}, "in 0 to inf, got -1.0"),
    ],
    ids=str,
)
def test_a_gate_that_cannot_be_is_an_input_error(change: dict[str, Any], message: str) -> None:
    refused(lambda: changed_gate(GATES["fp32"], **change), InputError, message)


def test_limits_change_the_gate_and_none_leaves_it_as_it_is() -> None:
    gate = GATES["fp32"]
    assert changed_gate(gate, None, kl=None, top1=None) is gate
    assert changed_gate(gate, "fp16") is GATES["fp16"]
    changed = changed_gate(gate, cosine=0.5, top1=0.25)
    assert (changed.centred_cosine_min, changed.top1_agreement_min, changed.mean_kl_max) == (
        0.5,
        0.25,
        gate.mean_kl_max,
    )


# --- files that changed, and lies under right hashes ------------------------------------------------------------------


@pytest.mark.parametrize("place", ["logits", "index", "missing"])
def test_a_changed_or_missing_file_is_exit_code_4(folder: Path, place: str) -> None:
    path = folder / INDEX_NAME if place == "index" else folder / PLAIN_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if place == "missing":
        path.unlink()
    code, said = run("verify", "saved", folder)
    told = {"missing": "is missing", "logits": "was altered", "index": "cannot be trusted"}[place]
    assert (code, told in said, "pass" in said) == (4, True, False)


def test_a_gate_that_was_edited_in_the_index_is_found(folder: Path) -> None:
    text = (folder / INDEX_NAME).read_text(encoding="utf-8")
    put(folder / INDEX_NAME, text.replace('"relative_l2_max": 0.015', '"relative_l2_max": 1e+05').encode())
    refused(lambda: judge_saved(folder), CorruptArtifactError, "does not match")


def test_a_link_that_leads_out_of_the_folder_is_not_followed(folder: Path) -> None:
    outside = (folder / PLAIN_FILE).rename(folder.parent / "outside.npz")
    (folder / PLAIN_FILE).symlink_to(outside)
    refused(lambda: judge_saved(folder), CorruptArtifactError, f"{folder / PLAIN_FILE} leads outside the folder")


LIES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("schema_version",), 1, "schema version 1, expected 2"),
    (("schema_version",), True, "schema version True, expected 2"),
    (("created",), "now", "created: Expected str of another form"),
    (("artifacts", 0, "kind"), "pickle", "artifacts[0].kind: Invalid enum value 'pickle'"),
    ((*RUN, "candidate"), NAMES[1], "it is the reference too"),
    ((*RUN, "gate"), {"name": "fp16"}, "runs[0].gate: Object missing required field"),
    ((*RUN, "gate", "relative_l2_max"), "1", "runs[0].gate.relative_l2_max: Expected float, got str"),
    ((*RUN, "images"), [], "runs[0].images: Expected array of length >= 1"),
    ((*RUN, "file"), "/etc/logits.npz", "runs[0].file: Expected str of another form"),
    ((*RUN, "file"), "../logits.npz", "runs[0].file: Expected str of another form"),
    ((*RUN, "file"), "logits.npz\n", "runs[0].file: Expected str of another form"),
    ((*LABELLED, "labels"), [0, 1], "2 labels of 3 images"),
    ((*LABELLED, "labels"), [0, 1, 2], "2 is none of 2 classes"),
    ((*LABELLED, "labels"), [0, 1, -1], "runs[1].labels[2]: Expected int >= 0"),
    ((*LABELLED, "class_names"), [], "no output of 0 classes is called logits"),
    ((*LABELLED, "broken"), [{}], "runs[1].broken[0]: Object missing required"),
]


@pytest.mark.parametrize(("place", "lie", "reason"), LIES, ids=[reason[:60] for *_, reason in LIES])
def test_a_lie_in_the_index_is_named_by_its_field(
    folder: Path, index: dict[str, Any], place: tuple[Any, ...], lie: Any, reason: str
) -> None:
    path = put(folder / INDEX_NAME, sealed(placed(index, place, lie)))
    refused(lambda: judge_saved(folder), CorruptArtifactError, f"{path} cannot be trusted (", reason)


@pytest.mark.parametrize("name", ODD_JSON)
def test_what_is_no_index_is_corrupt(folder: Path, name: str) -> None:
    put(folder / INDEX_NAME, ODD_JSON[name])
    refused(lambda: read_saved(folder), CorruptArtifactError, "index.json cannot be trusted (", "Save the results")


def header(shape: str, dtype: bytes = b"<f4", order: bytes = b"False") -> bytes:
    """A NumPy file of a header of our own, padded as NumPy pads it, without values."""
    text = b"{'descr': '%s', 'fortran_order': %s, 'shape': %s, }" % (dtype, order, shape.encode())
    padded = text + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


GOOD = array(np.zeros((4, 2), np.float32))
PAIR: Callable[..., bytes] = lambda candidate, reference=GOOD: archived(  # noqa: E731
    {"candidate-logits-0000.npy": candidate, "reference-logits-0000.npy": reference}
)
LOGITS: dict[str, tuple[bytes, str]] = {
    "no archive": (b"x" * 100, "not a zip file"),
    "another array": (archived({"logits.npy": GOOD, "more.npy": GOOD}), "candidate-logits-0000.npy is missing"),
    "claims": (PAIR(header("(999999999, 2)")), "has 0 bytes for the shape (999999999, 2)"),
    "less": (PAIR(GOOD[:-4]), "has 28 bytes for the shape (4, 2)"),
    "empty": (PAIR(header("(0, 2)")), "expected float32 of ('N', 2)"),
    "objects": (PAIR(header("(4, 2)", b"|O") + b"\x80\x04K\x01."), "expected float32 of ('N', 2)"),
    "columns first": (PAIR(header("(4, 2)", order=b"True") + bytes(32)), "expected float32 of ('N', 2)"),
    "one dimension": (PAIR(array(np.zeros(8, np.float32))), "expected float32 of ('N', 2)"),
    "program": (PAIR(b"\x93NUMPY\x01\x00\x20\x00__import__('os').getpid()      \n"), "holds no outputs of this run"),
    "no array": (PAIR(b"PK\x03\x04" + bytes(80)), "holds no outputs of this run"),
    "compressed": (
        archived({"candidate-logits-0000.npy": GOOD, "reference-logits-0000.npy": GOOD}, 8),
        "is compressed",
    ),
    "other classes": (PAIR(array(np.zeros((4, 3), np.float32))), "shape (4, 3), expected float32 of ('N', 2)"),
    "fewer images": (PAIR(*[array(np.zeros((3, 2), np.float32))] * 2), "outputs of 3 images, expected 4"),
    "first byte lost": (PAIR(GOOD)[1:], "holds no outputs of this run"),
    "none": (archived({}), "outputs of 0 images, expected 4"),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_that_are_not_what_the_index_says_are_corrupt(folder: Path, index: dict[str, Any], name: str) -> None:
    content, reason = LOGITS[name]
    with_logits(folder, index, content)
    refused(lambda: judge_saved(folder), CorruptArtifactError, f"{folder / PLAIN_FILE} holds no outputs", reason)


def spoil(data: st.DataObject, folder: Path, sound: Path) -> None:
    """Lies in the index or the logits under right hashes, or bytes that are neither."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    kind = data.draw(st.sampled_from(["index", "index", "index bytes", "logits"]))
    if kind == "index":
        lie = data.draw(lying(index).filter(lambda document: isinstance(document, dict)))
        try:
            put(folder / INDEX_NAME, sealed(lie))
        except ValueError:  # NaN, which no hash is of
            put(folder / INDEX_NAME, json.dumps(lie).encode())
    elif kind == "index bytes":
        put(folder / INDEX_NAME, data.draw(spoilt((folder / INDEX_NAME).read_bytes())))
    else:
        with_logits(folder, index, data.draw(spoilt((folder / PLAIN_FILE).read_bytes())))


@QUICK
@given(data=st.data())
def test_fuzz_saved_results_are_judged_or_corrupt(tmp_path: Path, sound: Path, data: st.DataObject) -> None:
    spoil(data, tmp_path / "fuzzed", sound)
    result_or_error(lambda: [entry.to_dict() for entry in judge_saved(tmp_path / "fuzzed")], CorruptArtifactError)


@pytest.mark.slow
@LONG
@given(data=st.data())
def test_fuzz_the_command_at_length(tmp_path: Path, sound: Path, data: st.DataObject) -> None:
    spoil(data, tmp_path / "fuzzed", sound)
    check_command("verify", "saved", tmp_path / "fuzzed", allowed=frozenset({0, 3, 4}))


# --- Polygraphy -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_polygraphy_agrees_on_the_saved_images_and_not_on_other_logits(
    tiny_onnx_fp32: Artifact, tmp_path: Path
) -> None:
    runner = OrtRunner(tiny_onnx_fp32.path)
    batches = [torch.rand(size, 3, 32, 32) for size in (1, 2, 7)]
    outputs = [runner.run(batch) for batch in batches]
    codes = []
    for name, shift in (("right", 0.0), ("wrong", 0.1)):
        outputs[2]["logits"][5, 3] += shift
        inputs, reference = save_for_polygraphy(tmp_path / name, zip(batches, outputs, strict=True))
        words = ("run", tiny_onnx_fp32.path, "--onnxrt", "--load-inputs", inputs, "--load-outputs", reference)
        command = [Path(sys.executable).parent / "polygraphy", *words, "--rtol", "1e-3", "--atol", "1e-4"]
        codes.append(subprocess.run(command, capture_output=True, check=False).returncode)
    assert (codes[0], codes[1] != 0) == (0, True)


def test_saving_for_polygraphy_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_for_polygraphy(tmp_path, [(torch.zeros(2, 3, 32, 32), {"logits": torch.zeros(2, 10)})])
    assert capfd.readouterr().out == ""
