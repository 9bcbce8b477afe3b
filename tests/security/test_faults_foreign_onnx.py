"""Foreign ONNX files that lie, each through the command."""

import json
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from cnx_deploy.cli import main
from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import CnxDeployError
from tests.support import hostile_onnx
from tests.support.hostile_onnx import Change, before_logits, changed_place, every, field, varint, written
from tests.support.refusals import SECONDS, inspected, refused


def test_what_the_forgeries_start_from_is_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspected(written(tmp_path), capsys) == (0, "")


# Garbage

GARBAGE = {"random": b"\x9c\x13random" * 90, "zeros": bytes(900), "text": b"this is no model" * 9, "empty": b""}


@pytest.mark.parametrize("content", **every(GARBAGE))
def test_onnx_garbage_is_told_by_its_content(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in it says ONNX but its name: wrong input, as a text file would be."""
    path = tmp_path / "foreign.onnx"
    path.write_bytes(content)
    code, message = inspected(path, capsys)
    assert code == 2
    assert "neither a checkpoint (safetensors, PyTorch), nor an ONNX file" in message


@pytest.mark.parametrize("eighth", range(1, 8))
def test_onnx_truncated(eighth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * eighth // 8])
    refused(path, "it is cut off or damaged at byte", capsys)


def test_onnx_garbage_of_flipped_bytes_never_ends_the_process_or_in_another_exception(tmp_path: Path) -> None:
    """In a child, so that a crash of ONNX's own checker would be seen and survived."""
    assert set(_flipped(tmp_path, seed=0, count=150)) >= {"sound", "CorruptArtifactError", "RefusedArtifactError"}


@pytest.mark.slow
def test_onnx_garbage_of_five_thousand_flipped_files(tmp_path: Path) -> None:
    assert len(_flipped(tmp_path, seed=1, count=5_000)) == 5_000


def test_onnx_garbage_of_flipped_bytes_is_a_model_or_corrupt_to_the_emulators_reader(tmp_path: Path) -> None:
    assert set(_flipped(tmp_path, seed=2, count=300, reader="cnx_deploy.exporters.onnx_models:load_model")) == {
        "sound",
        "CorruptArtifactError",
    }


def _flipped(
    folder: Path, seed: int, count: int, reader: str = "cnx_deploy.exporters.graph_rules:check_graph"
) -> list[str]:
    written(folder)
    arguments = {"folder": str(folder), "seed": seed, "count": count, "reader": reader}
    limits = Limits(600.0, 2 << 30)
    task = f"{hostile_onnx.__name__}:outcomes_of_flips"
    found = run_isolated(task, arguments, limits, what="Checking flipped files", failure=CnxDeployError)
    return list(found)


# Hostile graphs


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


def _huge_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=[1 << 40]))


def _cut_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


def _negative_size(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(TensorProto(name="less", data_type=TensorProto.FLOAT, dims=[-4, -4]))


def _many_dimensions(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(TensorProto(name="deep", data_type=TensorProto.FLOAT, dims=[1] * 100_000))


def _sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("few", TensorProto.FLOAT, [1], [1.0])
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, helper.make_tensor("at", TensorProto.INT64, [1], [0]), [1 << 40])
    )


def _sparse_in_a_node(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("few", TensorProto.FLOAT, [1], [1.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("at", TensorProto.INT64, [1], [0]), [1 << 40])
    before_logits(model, helper.make_node("Constant", [], ["x"], sparse_value=sparse, name="dense"), added="x")


def _training(model: onnx.ModelProto) -> None:
    model.training_info.add(algorithm=helper.make_graph([], "step", [], []))


def _no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


def _opset_of_tomorrow(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 999


def _picture(model: onnx.ModelProto) -> None:
    before_logits(model, helper.make_node("ImageDecoder", ["bytes"], ["x"], name="decoder"), added="bias")


HOSTILE: dict[str, tuple[Change, str]] = {
    "cycle": (_cycle, "is not a valid ONNX file (Nodes in a graph must be topologically sorted"),
    "loop body": (_loop, "endless: Loop holds a graph of its own"),
    "custom op": (_custom, "payload: evil.corp::Run is not a standard operator"),
    "function": (_function, "1 local functions; expected none"),
    "huge constant": (_huge_constant, "filled: 1,099,511,627,776 elements, where at most 4,294,967,296 are expected"),
    "huge initializer": (_huge_initializer, "its tensors up to 'huge' claim 4,398,046,511,"),
    "cut tensor": (_cut_tensor, "tensor 'weights' has 44 bytes, expected 48 for its shape [3, 4]"),
    "negative size": (_negative_size, "tensor 'less' has the shape [-4, -4], expected no negative size"),
    "many dimensions": (_many_dimensions, "or more dimensions of a tensor ('deep'), where at most 64 are expected"),
    "sparse": (_sparse, "1 sparse tensors; expected none"),
    "sparse in a node": (_sparse_in_a_node, "dense: Constant holds a sparse tensor"),
    "training": (_training, "graphs for training; expected none"),
    "no opset": (_no_opset, "opset missing; expected one from 7 to"),
    "opset of tomorrow": (_opset_of_tomorrow, "opset [999]; expected one from 7 to"),
    "picture": (_picture, "decoder: ImageDecoder is no operator of image classifiers"),
}
IN_A_CHILD = {"cycle", "loop body", "custom op", "function", "huge constant", "no opset", "picture"} | {
    "sparse",
    "sparse in a node",
    "training",
}
"""What is parsed to be found; the child is bounded by its own limits."""


@pytest.mark.parametrize("name", HOSTILE)
def test_onnx_hostile_graph(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, text = HOSTILE[name]
    refused(written(tmp_path, change, outside=False), text, capsys, bounded=name not in IN_A_CHILD)


def test_onnx_hostile_graph_of_a_million_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10 MB of empty nodes: protobuf would make a gigabyte of objects of them."""
    path = tmp_path / "foreign.onnx"
    node = field(1, field(4, b"Abs"))
    path.write_bytes(field(7, node * 1_000_000))
    refused(path, "20,001 or more nodes, where at most 20,000 are expected", capsys)


def test_onnx_hostile_graph_of_two_million_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that are not packed: two bytes each in the file, eight and more in memory."""
    path = tmp_path / "foreign.onnx"
    numbers = (varint(8 << 3) + b"\x01") * 2_000_000  # AttributeProto.ints
    path.write_bytes(field(7, field(1, field(5, numbers))))
    started = time.process_time()
    refused(path, "1,000,001 or more fields, where at most 1,000,000 are expected", capsys, bounded=False)
    assert time.process_time() - started < 10 * SECONDS


def test_onnx_hostile_graph_of_a_thousand_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Graphs within attributes within nodes: a parser that calls itself would run out of stack."""
    content = field(4, b"Abs")
    for _ in range(1_000):
        content = field(5, field(6, field(1, content)))
    path = tmp_path / "foreign.onnx"
    path.write_bytes(field(7, field(1, content)))
    refused(path, "25 levels of messages, where at most 24 are expected", capsys)


def test_onnx_hostile_graph_twice_in_one_file_counts_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A parser merges a message that is there twice: 15,000 nodes and 15,000 nodes are 30,000."""
    path = tmp_path / "foreign.onnx"
    path.write_bytes(field(7, field(1, field(4, b"Abs")) * 15_000) * 2)
    assert len(onnx.load(str(path)).graph.node) == 30_000
    refused(path, "20,001 or more nodes", capsys)


def test_onnx_hostile_graph_with_json_ends_with_a_json_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, changed_place(location="../secret"))
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path), "--json"])
    printed = capsys.readouterr()
    assert stop.value.code == 4
    (document,) = json.loads(printed.out)
    assert (document["error"], document["exit_code"]) == ("RefusedArtifactError", 4)
