"""Foreign ONNX files that lie: where their data lies, what their graphs hold, and what a run of them does."""

import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from cnx_deploy.core.artifacts import sha256_of_file
from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import (
    CnxDeployError,
    CorruptArtifactError,
    InputError,
    MissingRequirementError,
    RefusedArtifactError,
)
from cnx_deploy.core.manifest import Artifact, FileRecord
from cnx_deploy.data import image_like_batches
from cnx_deploy.diagnosis.bisect import run_bisection
from cnx_deploy.diagnosis.layerwise import compare_artifact
from cnx_deploy.exporters import untrusted
from cnx_deploy.exporters.graph_checks import admit_onnx, check_graph
from cnx_deploy.exporters.untrusted import limits_for, read_onnx
from cnx_deploy.runners.ort_session import trial_run
from cnx_deploy.runners.registry import open_runner
from cnx_deploy.verification.predict import open_predictor
from cnx_deploy.verification.provenance import check_provenance
from tests.support import hostile_onnx
from tests.support.hostile_onnx import (
    DATA,
    IR_VERSION,
    METADATA,
    SIDE,
    Change,
    before_logits,
    changed_place,
    field,
    foreign_classifier,
    place_weights,
    varint,
    written,
)
from tests.support.lies import MEGABYTES, check_command, peak_megabytes, put, refused, run

# --- outside data -----------------------------------------------------------------------------------------------------

AT = ("location", DATA)
PLACES: list[tuple[list[tuple[str, str]], type[CnxDeployError], str]] = [
    *(
        ([("location", name)], RefusedArtifactError, "'weights' lies in")
        for name in ("../secret", "a/../../secret", "/etc/passwd", "", ".", f"{DATA}\0.txt")
    ),
    *(([("location", name)], CorruptArtifactError, "is missing") for name in ("..\\secret", "C:secret", "absent")),
    *(
        ([AT, entry], CorruptArtifactError, f"has 48 bytes and lies at offset {place!r}, length {length!r} of")
        for entry, place, length in (
            (("offset", "-1"), "-1", "48"), (("offset", "1"), "1", "48"), (("offset", f"{2**64}"), f"{2**64}", "48"),
            (("length", "४८"), "0", "४८"), (("length", "44"), "0", "44"), (("length", f"{10**15}"), "0", f"{10**15}"),
        )
    ),
    ([AT, ("basepath", "/etc")], RefusedArtifactError, "at most once"),
    ([("Location", DATA)], RefusedArtifactError, "has the keys"),
    ([AT, ("location", "../secret"), ("length", "48")], RefusedArtifactError, "at most once"),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "error", "text"), PLACES)
def test_outside_data_beyond_the_files_own_folder_or_its_range_is_refused(
    entries: list[tuple[str, str]], error: type[CnxDeployError], text: str, tmp_path: Path
) -> None:
    """What lies outside is a file that would fit; a name with a backslash or a drive is one that is missing here."""
    path = written(tmp_path / "model", lambda model: place_weights(model, entries))
    (tmp_path / "secret").write_bytes((path.parent / DATA).read_bytes())
    refused(lambda: read_onnx(path), error, "'weights'", text)


def test_outside_data_under_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, changed_place(location="weights_data"))
    put(path, path.read_bytes().replace(b"weights_data", b"weights\xffdata"))
    refused(lambda: read_onnx(path), RefusedArtifactError, "'weights'", "UTF-8")


def test_outside_data_of_a_tensor_deep_inside_a_node_is_found(tmp_path: Path) -> None:
    def hide(model: onnx.ModelProto) -> None:
        inner = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        inner.external_data.add(key="location", value="../secret")
        before_logits(model, helper.make_node("Constant", [], ["hidden"], value=inner), added="hidden")

    path = written(tmp_path, hide)
    refused(lambda: read_onnx(path), RefusedArtifactError, "'hidden' lies in '../secret'")


def _link(folder: Path) -> None:
    (folder / DATA).rename(folder / "real")
    (folder / DATA).symlink_to("real")


def _link_out(folder: Path) -> None:
    (folder / DATA).unlink()
    (folder / DATA).symlink_to("/etc/passwd")


def _hard_link(folder: Path) -> None:
    (folder / "other").hardlink_to(folder / DATA)


def _pipe(folder: Path) -> None:
    (folder / DATA).unlink()
    os.mkfifo(folder / DATA)


@pytest.mark.parametrize("make", [_link, _link_out, _hard_link, _pipe])
def test_outside_data_in_a_link_or_a_pipe_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = written(tmp_path)
    make(tmp_path)
    refused(lambda: read_onnx(path), RefusedArtifactError, "weights.data", "allowed is")


def test_outside_data_behind_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "model", changed_place(location=f"inside/{DATA}"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model" / DATA).rename(tmp_path / "elsewhere" / DATA)
    (tmp_path / "model" / "inside").symlink_to(tmp_path / "elsewhere")
    refused(lambda: read_onnx(path), RefusedArtifactError, f"inside/{DATA}")


def test_outside_data_in_a_folder_within_is_let_in_and_so_is_a_folder_reached_by_a_link(tmp_path: Path) -> None:
    path = written(tmp_path / "model", changed_place(location=f"inside/{DATA}"))
    (path.parent / "inside").mkdir()
    (path.parent / DATA).rename(path.parent / "inside" / DATA)
    (tmp_path / "link").symlink_to(path.parent)
    for each in (path, tmp_path / "link" / path.name):
        assert check_graph(each).outside_files == (str(path.parent / "inside" / DATA),)


def test_outside_data_that_claims_petabytes_is_refused_although_a_sparse_file_has_them(tmp_path: Path) -> None:
    def claim(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = [1 << 20, 1 << 20]
        changed_place(length=str(4 << 40))(model)

    path = written(tmp_path, claim)
    with (tmp_path / DATA).open("r+b") as stream:
        stream.truncate(4 << 40)
    refused(lambda: read_onnx(path), RefusedArtifactError, "4,398,046,511,104 bytes of tensors up to 'weights'")


def recorded(template: Artifact, path: Path, *names: str) -> Artifact:
    """The foreign file with a manifest that lists these files, with the right hashes."""
    records = tuple(
        FileRecord(name, (path.parent / name).stat().st_size, sha256_of_file(path.parent / name)) for name in names
    )
    manifest = replace(template.manifest, stem="foreign", files=records)
    path.with_suffix(".json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact(path, manifest)


def test_outside_data_that_the_manifest_lists_is_read(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    path = written(tmp_path)
    artifact = recorded(tiny_onnx_fp32, path, path.name, DATA)
    assert run("inspect", path)[0] == 0
    with open_runner(artifact) as runner:
        assert runner.info.backend == "onnxruntime"


def test_outside_data_swapped_in_beside_what_the_manifest_lists_is_read_by_nobody(
    tiny_onnx_fp16: Artifact, tmp_path: Path
) -> None:
    """The hashes match: the graph reads a file that has none. Whoever parses, runs or checks the chain says so."""
    path = written(tmp_path)
    artifact = recorded(tiny_onnx_fp16, path, path.name)
    text = "reads 'weights.data', which its manifest does not list"
    code, said = run("inspect", path)
    assert (code, text in said) == (4, True)
    for use in (
        lambda: open_runner(artifact),
        lambda: open_runner(artifact, "emulate-fp16"),
        lambda: compare_artifact(artifact),
        lambda: run_bisection(path, print),
    ):
        with pytest.raises(CorruptArtifactError, match=text):
            use()
    findings = check_provenance([path], tmp_path, tmp_path).findings
    assert any(finding.verdict == "fault" and text in finding.text for finding in findings)


# --- bytes that are no graph ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"\x9c\x13random" * 90, b""])
def test_garbage_is_told_by_its_content(content: bytes, tmp_path: Path) -> None:
    """Nothing in it says ONNX but its name: wrong input, as a text file would be."""
    code, said = run("inspect", put(tmp_path / "foreign.onnx", content))
    assert (code, "nor an ONNX file" in said) == (2, True)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_corrupt(share: float, tmp_path: Path) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    put(path, content[: int(len(content) * share)])
    refused(lambda: check_graph(path), CorruptArtifactError, "foreign.onnx is not a valid ONNX file")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "."])
def test_what_is_no_regular_file_is_not_read(path: str) -> None:
    refused(lambda: read_onnx(Path(path)), InputError, "is no regular file")


def test_a_file_beyond_the_size_that_protobuf_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    monkeypatch.setattr(untrusted, "MAX_FILE_BYTES", path.stat().st_size)
    read_onnx(path)
    monkeypatch.setattr(untrusted, "MAX_FILE_BYTES", path.stat().st_size - 1)
    refused(lambda: read_onnx(path), RefusedArtifactError, "bytes, at most")


@pytest.mark.parametrize("count", [100, pytest.param(3_000, marks=pytest.mark.slow)])
def test_flipped_bytes_end_in_one_of_our_errors_and_never_the_process(count: int, tmp_path: Path) -> None:
    """In a child, so that a crash of ONNX's own checker would be seen and survived."""
    written(tmp_path)
    found = run_isolated(
        f"{hostile_onnx.__name__}:outcomes_of_flips",
        {"folder": str(tmp_path), "seed": count, "count": count},
        Limits(600.0, 2 << 30),
        what="Checking flipped files",
        failure=CnxDeployError,
    )
    checked, loaded = ({outcome[at] for outcome in found} for at in range(2))
    assert len(found) == count
    assert checked >= {"sound", "CorruptArtifactError", "RefusedArtifactError"}
    assert loaded >= {"sound", "CorruptArtifactError"}


# --- hostile graphs ---------------------------------------------------------------------------------------------------


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[2].input[0] = "looped"
    model.graph.node.insert(2, helper.make_node("Add", ["products", "means"], ["looped"], name="loop"))


def _loop(model: onnx.ModelProto) -> None:
    kept = helper.make_tensor_value_info("kept", TensorProto.BOOL, [])
    step = helper.make_tensor_value_info("step", TensorProto.INT64, [])
    body = helper.make_graph([helper.make_node("Identity", ["keep"], ["kept"])], "body", [step, kept], [kept])
    before_logits(model, helper.make_node("Loop", ["", "forever"], [], body=body, name="endless"), added="bias")


def _custom(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("evil.corp", 1))
    before_logits(model, helper.make_node("Run", ["sound"], ["x"], domain="evil.corp", name="payload"), added="x")


def _function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(
        helper.make_function("evil.corp", "Run", ["x"], ["y"], [node], [helper.make_opsetid("", 20)])
    )


def _huge_constant(model: onnx.ModelProto) -> None:
    huge = helper.make_tensor("size", TensorProto.INT64, [2], [1 << 20, 1 << 20])
    nodes = [
        helper.make_node("Constant", [], ["size"], value=huge),
        helper.make_node("ConstantOfShape", ["size"], ["filled"], name="filled"),
        helper.make_node("ReduceMax", ["filled"], ["most"], keepdims=0),
    ]
    before_logits(model, *nodes, added="most")


def _tensor(**values: object) -> Change:
    return lambda model: model.graph.initializer.append(TensorProto(data_type=TensorProto.FLOAT, **values))


def _cut_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


def _sparse(model: onnx.ModelProto, *, in_node: bool = False) -> None:
    values = helper.make_tensor("few", TensorProto.FLOAT, [1], [1.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("at", TensorProto.INT64, [1], [0]), [1 << 40])
    if in_node:
        before_logits(model, helper.make_node("Constant", [], ["x"], sparse_value=sparse, name="dense"), added="x")
    else:
        model.graph.sparse_initializer.append(sparse)


def _opset_of_tomorrow(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 999


def _picture(model: onnx.ModelProto) -> None:
    before_logits(model, helper.make_node("ImageDecoder", ["bytes"], ["x"], name="decoder"), added="bias")


HOSTILE: dict[str, tuple[Change, str]] = {
    "cycle": (_cycle, "topologically sorted"),
    "loop body": (_loop, "endless: Loop holds a graph"),
    "custom op": (_custom, "payload: evil.corp::Run"),
    "function": (_function, "1 local functions"),
    "huge constant": (_huge_constant, "filled: 1,099,511,627,776 elements"),
    "huge initializer": (_tensor(name="huge", dims=[1 << 40]), "bytes of tensors up to 'huge'"),
    "cut tensor": (_cut_tensor, "tensor 'weights' has 44 bytes"),
    "negative size": (_tensor(name="less", dims=[-4, -4]), "tensor 'less' has the negative size"),
    "many dimensions": (_tensor(name="deep", dims=[3] * 100_000), "dimensions of tensor 'deep'"),
    "sparse": (_sparse, "1 sparse tensors"),
    "sparse in a node": (lambda model: _sparse(model, in_node=True), "dense: Constant holds a sparse tensor"),
    "training": (lambda model: model.training_info.add(), "graphs for training"),
    "no opset": (lambda model: model.ClearField("opset_import"), "opset missing"),
    "opset of tomorrow": (_opset_of_tomorrow, "opset [999]"),
    "picture": (_picture, "decoder: ImageDecoder is no operator of image classifiers"),
}
CORRUPT = {"cycle", "cut tensor", "negative size"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused_for_what_it_holds(name: str, tmp_path: Path) -> None:
    change, text = HOSTILE[name]
    path = written(tmp_path, change, outside=False)
    error = CorruptArtifactError if name in CORRUPT else RefusedArtifactError
    refused(lambda: check_graph(path), error, text, path.name)


def _levels(count: int) -> bytes:
    content = field(4, b"Abs")
    for _ in range(count):
        content = field(5, field(6, field(1, content)))
    return content


BOMBS = {
    "a million nodes": lambda: field(1, field(4, b"Abs")) * 1_000_000,
    "two million numbers of an attribute": lambda: field(1, field(5, (varint(8 << 3) + b"\x01") * 2_000_000)),
    "a thousand levels of graphs in nodes": lambda: field(1, _levels(1_000)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_for_the_parser_goes_off_in_a_child_with_limits(name: str, tmp_path: Path) -> None:
    path = put(tmp_path / "foreign.onnx", IR_VERSION + field(7, BOMBS[name]()))
    before = peak_megabytes()
    check_command("inspect", path, allowed=[4])
    assert peak_megabytes() - before < MEGABYTES


# --- in a child, and run once -----------------------------------------------------------------------------------------


def test_a_sound_file_is_let_in_with_the_facts_that_a_check_here_finds(
    tiny_onnx_fp16: Artifact, tmp_path: Path
) -> None:
    """Names of axes, epsilons and sets come back from the child as they were."""
    (tmp_path / "link.onnx").symlink_to(put(tmp_path / "alone.onnx", tiny_onnx_fp16.path.read_bytes()))
    for path in (written(tmp_path), tmp_path / "link.onnx"):
        assert admit_onnx(path).facts == check_graph(path)


def test_a_file_that_changes_after_it_was_checked_is_seen(tmp_path: Path) -> None:
    admission = admit_onnx(written(tmp_path))
    admission.check_unchanged()
    (tmp_path / DATA).write_bytes(np.zeros(12, np.float32).tobytes())
    refused(admission.check_unchanged, CorruptArtifactError, "weights.data was changed")


def _bomb(model: onnx.ModelProto) -> None:
    """8 GB, of a size that is known only when it runs: no shape in the file says so."""
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("ReduceProd", ["shape"], ["pixels"], keepdims=1),
        helper.make_node("Mul", ["pixels", "times"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["filled"]),
        helper.make_node("ReduceSum", ["filled"], ["sum"], keepdims=0),
    ]
    model.graph.initializer.append(helper.make_tensor("times", TensorProto.INT64, [1], [2_000_000_000 // 3072]))
    before_logits(model, *nodes, added="sum")


def _folded_bomb(model: onnx.ModelProto) -> None:
    """A constant of 12 GB: as large as a value may be, folded while the session is made."""
    model.graph.initializer.append(helper.make_tensor("size", TensorProto.INT64, [1], [3_000_000_000]))
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["filled"]),
        helper.make_node("ReduceSum", ["filled"], ["sum"], keepdims=0),
    ]
    before_logits(model, *nodes, added="sum")


def _hang(model: onnx.ModelProto) -> None:
    """Products of matrices for a minute, in a few megabytes."""
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Slice", ["shape", "one", "two"], ["channels"]),
        helper.make_node("Mul", ["channels", "sides"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["work0"]),
        *(helper.make_node("MatMul", [f"work{i}", f"work{i}"], [f"work{i + 1}"]) for i in range(400)),
        helper.make_node("ReduceSum", ["work400"], ["sum"], keepdims=0),
    ]
    for name, values in (("one", [1]), ("two", [2]), ("sides", [700, 700])):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    before_logits(model, *nodes, added="sum")


@pytest.mark.parametrize("change", [_bomb, pytest.param(_folded_bomb, marks=pytest.mark.slow)])
def test_a_bomb_that_only_a_run_sets_off_takes_bounded_memory(change: Change, tmp_path: Path) -> None:
    path = written(tmp_path, change)
    check_graph(path)
    with pytest.raises(RefusedArtifactError, match="took more than 600 MB of memory and was ended"):
        trial_run(path, Limits(60.0, 600_000_000))
    assert peak_megabytes(resource.RUSAGE_CHILDREN) < 6_000


def test_a_run_that_does_not_end_is_ended(tmp_path: Path) -> None:
    path, started = written(tmp_path, _hang), time.perf_counter()
    with pytest.raises(RefusedArtifactError, match=r"took more than 1 s and was ended"):
        trial_run(path, Limits(1.0, 2 << 30))
    assert time.perf_counter() - started < 30.0


@pytest.mark.slow
def test_predict_refuses_a_bomb_before_this_process_has_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MEMORY_BYTES", 600_000_000)
    path = written(tmp_path, _bomb)
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "image.png")
    code, said = run("predict", path, tmp_path, "--json")
    assert (code, '"RefusedArtifactError"' in said, "of memory and was ended" in said) == (4, True, True)


def _mismatch(model: onnx.ModelProto) -> None:
    """A shape that does not fit, which no static check sees."""
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"]),
        helper.make_node("Reshape", ["ones", "five"], ["fives"]),
        helper.make_node("ReduceSum", ["fives"], ["sum"], keepdims=0),
    ]
    model.graph.initializer.append(helper.make_tensor("five", TensorProto.INT64, [2], [-1, 5]))
    before_logits(model, *nodes, added="sum")


def _two_outputs(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("means", TensorProto.FLOAT, ["batch", 3]))


def test_outputs_that_are_not_the_tasks_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, _two_outputs, outside=False)
    with (
        open_predictor(path) as predictor,
        pytest.raises(InputError, match="gives logits, means; classification needs"),
    ):
        predictor.predict(torch.rand(3, 16, 16))


def test_a_trial_run_says_what_cannot_run(tmp_path: Path) -> None:
    path = written(tmp_path, _mismatch, outside=False)
    check_graph(path)
    with pytest.raises(CorruptArtifactError, match="ONNX Runtime cannot run"):
        trial_run(path, limits_for(1000))


def test_a_bf16_file_is_let_in_without_a_run_and_predict_says_what_it_takes(tmp_path: Path) -> None:
    """ONNX Runtime's CPU has no BF16: to run it here would call a sound file corrupt."""

    def halved(model: onnx.ModelProto) -> None:
        nodes = [
            helper.make_node("Cast", ["bias"], ["half"], to=TensorProto.BFLOAT16),
            helper.make_node("Cast", ["half"], ["wide"], to=TensorProto.FLOAT),
        ]
        before_logits(model, *nodes, added="wide")

    with pytest.raises(MissingRequirementError, match=r"foreign\.onnx computes in BF16"):
        open_predictor(written(tmp_path, halved))


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ({"cnx_deploy.preprocessing": "[" * 100_000}, CorruptArtifactError),
        ({**METADATA, "cnx_deploy.class_names": '[1, "a"]'}, CorruptArtifactError),
        ({}, InputError),
    ],
)
def test_metadata_that_lies_is_one_message(
    entries: dict[str, str], error: type[CnxDeployError], tmp_path: Path
) -> None:
    path = written(tmp_path, lambda model: helper.set_model_props(model, entries))
    with pytest.raises(error):
        open_predictor(path)


def test_a_foreign_classifier_predicts_what_its_formula_says(tmp_path: Path) -> None:
    path = written(tmp_path)
    with open_predictor(path) as predictor:
        assert any("one image through ONNX Runtime" in note for note in predictor.notes)
        pixels = next(iter(image_like_batches(2, SIDE, batch_size=2))).permute(0, 3, 1, 2).float() / 255
        logits = predictor.runner.run(pixels)["logits"]
    weights = torch.from_numpy(np.array(onnx.numpy_helper.to_array(foreign_classifier().graph.initializer[0])))
    expected = pixels.double().mean(dim=(2, 3)) @ weights.double() + 1.0
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
