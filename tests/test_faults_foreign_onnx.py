"""Foreign ONNX files that lie: fault-table rows 28, 31 to 34 and 36 by their names, each through the command."""

import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from cnx_deploy.artifacts import Artifact, FileRecord, sha256_of_file
from cnx_deploy.bisection.find import run_bisection
from cnx_deploy.cli import main
from cnx_deploy.custody import check_custody
from cnx_deploy.errors import CnxDeployError, CorruptArtifactError
from cnx_deploy.isolation import Limits, run_isolated
from cnx_deploy.layers.comparison import layers_of_artifact
from cnx_deploy.runners.opening import open_runner
from tests import hostile_onnx
from tests.hostile_onnx import DATA, Change, before_logits, changed_place, every, field, place_weights, varint, written

SECONDS = 2.0
MEGABYTES = 60.0
"""Bounds on the processor time and memory of a refusal before any parser, far above what is seen: 0.05 s, 1 MB."""


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of `inspect`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path)])
    return int(stop.value.code or 0), capsys.readouterr().err


def refused(path: Path, text: str, capsys: pytest.CaptureFixture[str], *, bounded: bool = True) -> None:
    """`inspect` ends with 4, one message and no traceback; where no parser is needed, soon and with little memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    code, message = inspected(path, capsys)
    taken, grown = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert (code, "Traceback" in message) == (4, False), message
    assert text in message
    assert path.name in message
    if bounded:
        assert taken < SECONDS
        assert grown / 1024 < MEGABYTES


def test_what_the_forgeries_start_from_is_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspected(written(tmp_path), capsys) == (0, "")


# Row 28

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
    assert set(_flipped(tmp_path, seed=2, count=300, task="loads_of_flips")) == {"read", "CorruptArtifactError"}


def _flipped(folder: Path, seed: int, count: int, task: str = "outcomes_of_flips") -> list[str]:
    written(folder)
    arguments = {"folder": str(folder), "seed": seed, "count": count}
    limits = Limits(600.0, 2 << 30)
    task = f"{hostile_onnx.__name__}:{task}"
    found = run_isolated(task, arguments, limits, what="Checking flipped files", failure=CnxDeployError)
    return list(found)


# Row 31

OUTSIDE = {
    "parent": "../secret",
    "nested": "a/../../secret",
    "absolute": "/etc/passwd",
    "empty": "",
    "folder": ".",
    "dot first": f"./{DATA}",
    "double slash": "a//b",
    "backslash": "..\\secret",
    "drive": "C:secret",
    "NUL": f"{DATA}\0.txt",
}


@pytest.mark.parametrize("location", **every(OUTSIDE))
def test_onnx_extdata_traversal(location: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies outside is a pipe: whoever opened it would wait for ever."""
    os.mkfifo(tmp_path / "secret")
    path = written(tmp_path / "model", changed_place(location=location))
    refused(path, "expected a plain name within the file's own folder", capsys)


def test_onnx_extdata_traversal_by_a_tensor_deep_inside_a_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hide(model: onnx.ModelProto) -> None:
        inner = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        inner.external_data.add(key="location", value="../secret")
        constant = helper.make_node("Constant", [], ["hidden"], value=inner)
        before_logits(model, constant, added="hidden")

    refused(written(tmp_path, hide), "the outside data of tensor 'hidden' lies in '../secret'", capsys)


def test_onnx_extdata_traversal_by_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, changed_place(location="weights_data"))
    path.write_bytes(path.read_bytes().replace(b"weights_data", b"weights\xffdata"))
    refused(path, "expected a plain name within", capsys)


# Row 32


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


LINKS = {
    "symlink": (_link, "lies behind the link"),
    "symlink out": (_link_out, "lies behind the link"),
    "hardlink": (_hard_link, "has 2 names (hard links)"),
    "pipe": (_pipe, "is no regular file"),
}


@pytest.mark.parametrize(("make", "text"), **every(LINKS))
def test_onnx_extdata_symlink_hardlink_and_pipe(
    make: Callable[[Path], None], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    make(tmp_path)
    refused(path, text, capsys)


def test_onnx_extdata_parent_symlink(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "model", changed_place(location=f"inside/{DATA}"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model" / DATA).rename(tmp_path / "elsewhere" / DATA)
    (tmp_path / "model" / "inside").symlink_to(tmp_path / "elsewhere")
    refused(path, "lies behind the link", capsys)


def test_onnx_extdata_in_a_folder_within_is_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, changed_place(location=f"inside/{DATA}"))
    (tmp_path / "inside").mkdir()
    (tmp_path / DATA).rename(tmp_path / "inside" / DATA)
    assert inspected(path, capsys) == (0, "")


# Row 33

RANGES = {
    "negative offset": ({"offset": "-1"}, "offset '-1' and length '48', expected whole numbers"),
    "negative length": ({"length": "-48"}, "offset '0' and length '-48', expected whole numbers"),
    "words": ({"offset": "ten"}, "offset 'ten' and length '48', expected whole numbers"),
    "hexadecimal": ({"length": "0x30"}, "expected whole numbers"),
    "a float": ({"length": "48.0"}, "expected whole numbers"),
    "digits of other scripts": ({"length": "४८"}, "expected whole numbers"),
    "offset past the end": ({"offset": "4096"}, "has bytes 4096 to 4144, expected at most the 48 of weights.data"),
    "one byte past the end": ({"offset": "1"}, "has bytes 1 to 49, expected at most the 48"),
    "a petabyte": ({"length": str(10**15)}, "expected 48 for its shape"),
    "2 to the 64": ({"offset": str(2**64)}, "expected whole numbers"),
    "too short": ({"length": "44"}, "has 44 bytes of element type 1, expected 48 for its shape"),
}


@pytest.mark.parametrize(("entries", "text"), **every(RANGES))
def test_onnx_extdata_bad_ranges(
    entries: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(written(tmp_path, changed_place(**entries)), text, capsys)


def test_onnx_extdata_bad_ranges_of_a_shape_that_claims_petabytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sparse file is as large as it claims and costs nothing: what is claimed is limited, not what is there."""

    def claim(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = [1 << 20, 1 << 20]
        changed_place(length=str(4 << 40))(model)

    path = written(tmp_path, claim)
    with (tmp_path / DATA).open("r+b") as stream:
        stream.truncate(4 << 40)
    refused(path, "its tensors up to 'weights' claim 4,398,046,511,104 bytes, where at most 17,179,869,184", capsys)


def test_onnx_extdata_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    (tmp_path / DATA).unlink()
    refused(path, "weights.data is missing: expected it beside foreign.onnx", capsys)


# Row 34

KEYS = {"evil": "evil", "dunder": "__class__", "basepath": "basepath", "upper case": "Location"}


@pytest.mark.parametrize("key", **every(KEYS))
def test_onnx_extdata_unknown_keys(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, changed_place(**{key: "/etc"}))
    refused(path, f"has the keys {key!r}; expected only checksum, length, location, offset", capsys)


def test_onnx_extdata_unknown_keys_a_key_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = [("location", DATA), ("location", "../secret"), ("length", "48")]
    refused(written(tmp_path, lambda model: place_weights(model, twice)), "has a key twice", capsys)


# Row 36


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
    document = json.loads(printed.out)
    assert (document["error"], document["exit_code"]) == ("RefusedArtifactError", 4)


# Row 35: the file's own manifest is not to be widened


def recorded(onnx_file: Artifact, path: Path, *, lists_data: bool) -> Artifact:
    """The foreign file with a manifest whose hashes match."""
    names = [path.name, *([DATA] if lists_data else [])]
    records = tuple(FileRecord(name, size_of(path.parent / name), sha256_of_file(path.parent / name)) for name in names)
    manifest = replace(onnx_file.manifest, stem="foreign", files=records)
    path.with_suffix(".json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact(path, manifest)


def size_of(path: Path) -> int:
    return path.stat().st_size


def test_onnx_extdata_swapped_what_the_manifest_lists_is_read(
    tiny_onnx_fp32: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    artifact = recorded(tiny_onnx_fp32, path, lists_data=True)
    assert inspected(path, capsys) == (0, "")
    with open_runner(artifact) as runner:
        assert runner.info.backend == "onnxruntime"


def test_onnx_extdata_swapped_in_beside_what_the_manifest_lists(
    tiny_onnx_fp16: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hashes match: the graph reads a file that has none. Whoever parses, runs or checks the chain says so."""
    path = written(tmp_path)
    artifact = recorded(tiny_onnx_fp16, path, lists_data=False)
    text = "reads 'weights.data', which its manifest does not list, expected one of foreign.onnx"
    refused(path, text, capsys)
    for use in (open_runner, layers_of_artifact, lambda found: run_bisection(found.path, print)):
        with pytest.raises(CorruptArtifactError, match=text):
            use(artifact)
    faults = [each.text for each in check_custody([path], tmp_path, tmp_path).findings if each.verdict == "fault"]
    assert any(text in fault for fault in faults)
