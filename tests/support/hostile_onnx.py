"""A small foreign classifier with its weights outside the file, and what an attacker makes of it."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cnx_deploy.core.errors import CnxDeployError
from cnx_deploy.exporters.graph_checks import check_graph, load_model

SIDE, CLASSES = 32, 4
DATA = "weights.data"
METADATA = {"cnx_deploy.preprocessing": json.dumps({"image_size": SIDE})}
IR_VERSION = b"\x08\x0a"
"""The first field of every model: what tells an ONNX file from others."""

Change = Callable[[onnx.ModelProto], object]


def foreign_classifier() -> onnx.ModelProto:
    """images (batch, 3, 32, 32) -> logits (batch, 4): the mean of each channel times (3, 4) weights, plus a bias."""
    random_weights = np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)
    weights = numpy_helper.from_array(random_weights, "weights")
    bias = numpy_helper.from_array(np.ones(CLASSES, np.float32), "bias")
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["means"], name="flatten"),
        helper.make_node("MatMul", ["means", "weights"], ["products"], name="head/MatMul"),
        helper.make_node("Add", ["products", "bias"], ["logits"], name="head/Add"),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [weights, bias],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, METADATA)
    return model


def written(folder: Path, change: Change | None = None, *, outside: bool = True) -> Path:
    """The classifier with one change, in `folder`/foreign.onnx; its weights in `DATA`, as exporters write them."""
    folder.mkdir(parents=True, exist_ok=True)
    model = foreign_classifier()
    if outside:
        weights = model.graph.initializer[0]
        (folder / DATA).write_bytes(weights.raw_data)
        place_weights(model, [("location", DATA), ("offset", "0"), ("length", str(len(weights.raw_data)))])
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
    if change is not None:
        change(model)
    path = folder / "foreign.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def place_weights(model: onnx.ModelProto, entries: list[tuple[str, str]]) -> None:
    """Say that the weights lie there."""
    weights = model.graph.initializer[0]
    del weights.external_data[:]
    for key, value in entries:
        weights.external_data.add(key=key, value=value)


def changed_place(**entries: str) -> Change:
    """Overwrite or add entries of the weights' place."""

    def change(model: onnx.ModelProto) -> None:
        found = {entry.key: entry.value for entry in model.graph.initializer[0].external_data} | entries
        place_weights(model, list(found.items()))

    return change


def before_logits(model: onnx.ModelProto, *nodes: onnx.NodeProto, added: str) -> None:
    """Put nodes in front of the last, and add their scalar `added` to the logits."""
    last = model.graph.node.pop()
    last.output[0] = "sound"
    model.graph.node.extend([last, *nodes, helper.make_node("Add", ["sound", added], ["logits"], name="added")])


def field(number: int, content: bytes) -> bytes:
    """A protobuf field with a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def outcomes_of_flips(folder: str, seed: int, count: int) -> list[tuple[str, str]]:
    """For a child process: what checker and emulator say of flipped files and of some that are cut too.

    Any other exception than ours ends the child.
    """
    draw, path = random.Random(seed), Path(folder) / "flipped.onnx"
    sound = (Path(folder) / "foreign.onnx").read_bytes()
    outcomes = []
    for _ in range(count):
        content = bytearray(sound)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content[: draw.choice([len(content), len(content), draw.randrange(len(content))])])
        outcomes.append((outcome_of(check_graph, path), outcome_of(load_model, path)))
    return outcomes


def outcome_of(read: Callable[[Path], object], path: Path) -> str:
    """`sound`, or the name of our error."""
    try:
        read(path)
    except CnxDeployError as error:
        return type(error).__name__
    return "sound"
