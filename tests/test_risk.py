"""What of a folder can run code (fault-table row 61), by files whose names lie."""

import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file

from cnx_deploy.artifacts import Artifact
from cnx_deploy.cli import main
from cnx_deploy.inspection import kind_of_file
from cnx_deploy.risk import risk_of_file, risks_in


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


def onnx_file(path: Path, *, domain: str = "", external: str = "", inside: bool = False) -> Path:
    """A graph of one operator; a weight of it in another file, where one is named, in an attribute's graph or not."""
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1], [1.0])
    if external:
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="offset", value="0")
        weight.external_data.add(key="location", value=external)
    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1])
    node = helper.make_node("Relu", ["images"], ["logits"], domain=domain)
    if inside:
        branch = helper.make_graph([], "branch", [], [], initializer=[weight])
        node.attribute.append(helper.make_attribute("body", branch))
    graph = helper.make_graph([node], "graph", [value], [logits], initializer=[] if inside else [weight])
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path, tiny_engine: Artifact) -> Path:
    """A file of each kind, most of them under another's name."""
    made = tmp_path / "scanned"
    (made / "deeper").mkdir(parents=True)
    content = {"weights": torch.ones(2), "more": Malicious(tmp_path / "marker")}
    torch.save(content, made / "zip.safetensors")
    torch.save(content, made / "old.onnx", _use_new_zipfile_serialization=False)
    (made / "pickle.csv").write_bytes(pickle.dumps(content["more"], protocol=0))
    (made / "deeper/engine.txt").write_bytes(tiny_engine.path.read_bytes())
    np.save(made / "objects.npy", np.array([content["more"]], dtype=object))
    (made / "program.png").write_bytes(b"\x7fELF" + bytes(60))
    save_file({"weight": torch.ones(2)}, made / "tensors.pt")
    onnx_file(made / "graph.pkl")
    np.save(made / "numbers.npy", np.ones(2))
    Image.new("RGB", (8, 8)).save(made / "image.pt", "PNG")
    (made / "record.engine").write_text('{"kind": "engine"}')
    (made / "table.pkl").write_text("path,label\na.png,cat\nb.png,dog\n")
    (made / "empty.pt").touch()
    with zipfile.ZipFile(made / "archive.zip", "w") as archive:
        archive.writestr("readme", "text")
    (made / "readme.md").write_text("Words, in a sentence.\nMore of them.\n")
    (made / "link").symlink_to("/etc")
    return made


EXPECTED = {
    "archive.zip": ("archive", "unknown"),
    "deeper/engine.txt": ("TensorRT engine", "code-capable"),
    "empty.pt": ("empty file", "data-only"),
    "graph.pkl": ("ONNX model", "data-only"),
    "image.pt": ("PNG image", "data-only"),
    "link": ("link", "unknown"),
    "numbers.npy": ("NumPy array", "data-only"),
    "objects.npy": ("NumPy array of objects", "code-capable"),
    "old.onnx": ("pickle", "code-capable"),
    "pickle.csv": ("pickle", "code-capable"),
    "program.png": ("native program or library", "code-capable"),
    "readme.md": ("nothing known", "unknown"),
    "record.engine": ("JSON", "data-only"),
    "table.pkl": ("table (CSV)", "data-only"),
    "tensors.pt": ("safetensors", "data-only"),
    "zip.safetensors": ("pickle in an archive", "code-capable"),
}


def test_scan_policy_goes_by_content_and_loads_nothing(folder: Path) -> None:
    found = {str(each.path.relative_to(folder)): (each.kind, each.risk) for each in risks_in(folder)}
    assert found == EXPECTED
    assert not (folder.parent / "marker").exists()


def test_scan_policy_as_the_command_shows_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(folder)])
    *lines, last = capsys.readouterr().out.splitlines()
    assert (stop.value.code, len(lines), last) == (0, 16, "7 data-only, 6 code-capable, 3 unknown")
    (line,) = [line for line in lines if "zip.safetensors" in line]
    assert line.startswith("code-capable  pickle in an archive    ")
    assert line.endswith("zip.safetensors: torch.load unpickles zip/data.pkl, which runs what it says")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(folder), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (stop.value.code, document["code-capable"], len(document["files"])) == (0, 6, 16)
    unknown = [each for each in document["files"] if each["risk"] == "unknown"]
    assert all(each["reason"].endswith("treat it as able to run code") for each in unknown)


@pytest.mark.parametrize(
    "option", [["--compile"], ["--kernels"], ["--trust"], ["--batch", "8"]], ids=lambda each: each[0]
)
def test_scan_policy_options_of_one_file_are_wrong_usage(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path), *option])
    assert (stop.value.code, "is a folder: give a file" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize("inside", [False, True])
def test_scan_policy_says_what_a_graph_asks_for_beside_itself(tmp_path: Path, inside: bool) -> None:
    plain = risk_of_file(onnx_file(tmp_path / "plain.onnx"))
    assert (plain.risk, plain.reason) == ("data-only", "a graph of operators and their weights")
    path = onnx_file(tmp_path / "asks.onnx", domain="com.evil", external="../../etc/passwd", inside=inside)
    reason = risk_of_file(path).reason
    assert "weights in other files (../../etc/passwd), which are read with it" in reason
    assert "operators of com.evil, which take somebody's library to run" in reason


def test_scan_policy_a_graph_that_cannot_be_followed_is_unknown(tmp_path: Path, tiny_onnx_fp16: Artifact) -> None:
    assert risk_of_file(tiny_onnx_fp16.path).risk == "data-only"
    path = tmp_path / "cut.onnx"
    path.write_bytes(tiny_onnx_fp16.path.read_bytes()[:-100])
    found = risk_of_file(path)
    assert (found.kind, found.risk) == ("ONNX model", "unknown")
    assert "it is cut off or damaged at byte" in found.reason
    assert found.reason.endswith("Until then treat it as able to run code")


def test_scan_policy_counts_functions(tmp_path: Path) -> None:
    model = onnx.load(onnx_file(tmp_path / "functions.onnx"))
    node, opsets = helper.make_node("Relu", ["a"], ["b"]), [helper.make_opsetid("", 20)]
    model.functions.extend(helper.make_function("local", name, ["a"], ["b"], [node], opsets) for name in "fgh")
    (tmp_path / "functions.onnx").write_bytes(model.SerializeToString())
    assert risk_of_file(tmp_path / "functions.onnx").reason.endswith("; 3 functions of its own")


@pytest.mark.parametrize(("depth", "risk"), [(5, "data-only"), (30, "unknown")])
def test_scan_policy_follows_graphs_in_graphs_to_a_depth(tmp_path: Path, depth: int, risk: str) -> None:
    model = onnx.load(onnx_file(tmp_path / "deep.onnx"))
    graph = helper.make_graph([], "innermost", [], [])
    for _ in range(depth):
        graph = helper.make_graph([helper.make_node("Loop", ["c"], ["d"], body=graph)], "around", [], [])
    model.graph.node.extend(graph.node)
    (tmp_path / "deep.onnx").write_bytes(model.SerializeToString())
    assert risk_of_file(tmp_path / "deep.onnx").risk == risk


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_scan_policy_a_safetensors_header_whose_length_looks_like_a_pickle(tmp_path: Path, length: int) -> None:
    """640 is written as 80 02, with which protocol 2 of pickle begins."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + header + bytes(4))
    assert kind_of_file(tmp_path / "a.safetensors") == "safetensors"
    assert risk_of_file(tmp_path / "a.safetensors").risk == "data-only"


def test_scan_policy_a_folder_that_cannot_be_listed_is_wrong_input(tmp_path: Path) -> None:
    from cnx_deploy.errors import InputError

    with pytest.raises(InputError, match=r"gone cannot be listed \(No such file") as caught:
        risks_in(tmp_path / "gone")
    assert caught.value.exit_code == 2
