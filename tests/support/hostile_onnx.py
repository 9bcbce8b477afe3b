"""A small foreign classifier with its weights outside the file, and what an attacker makes of it."""

import importlib
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cnx_deploy.core.errors import CnxDeployError

SIDE, CLASSES = 32, 4
DATA = "weights.data"
METADATA = {"cnx_deploy.preprocessing": json.dumps({"image_size": SIDE})}
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


def with_outside_weights(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The weights in `DATA`, from byte 0, as exporters write them."""
    weights = model.graph.initializer[0]
    (folder / DATA).write_bytes(weights.raw_data)
    length = str(len(weights.raw_data))
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    place_weights(model, {"location": DATA, "offset": "0", "length": length})
    return model


def place_weights(model: onnx.ModelProto, entries: dict[str, str] | list[tuple[str, str]]) -> None:
    """Say that the weights lie there."""
    weights = model.graph.initializer[0]
    del weights.external_data[:]
    for key, value in entries.items() if isinstance(entries, dict) else entries:
        weights.external_data.add(key=key, value=value)


def changed_place(**entries: str | None) -> Change:
    """Overwrite, add or (None) leave out entries of the weights' place."""

    def change(model: onnx.ModelProto) -> None:
        found = {entry.key: entry.value for entry in model.graph.initializer[0].external_data} | entries
        place_weights(model, {key: value for key, value in found.items() if value is not None})

    return change


def written(folder: Path, change: Change | None = None, *, outside: bool = True) -> Path:
    """The classifier with one change, in `folder`/foreign.onnx."""
    folder.mkdir(parents=True, exist_ok=True)
    model = foreign_classifier()
    if outside:
        with_outside_weights(model, folder)
    if change is not None:
        change(model)
    path = folder / "foreign.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def before_logits(model: onnx.ModelProto, *nodes: onnx.NodeProto, added: str) -> None:
    """Put nodes in front of the last, and add their scalar `added` to the logits."""
    last = model.graph.node.pop()
    last.output[0] = "sound"
    model.graph.node.extend([last, *nodes, helper.make_node("Add", ["sound", added], ["logits"], name="added")])


def field(number: int, content: bytes) -> bytes:
    """A protobuf field with a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def outcomes_of_flips(folder: str, seed: int, count: int, reader: str) -> list[str]:
    """For a child process: what a reader, "module:function", says of flipped files and of some that are cut too.

    Any other exception than ours ends the child.
    """
    module, _, function = reader.partition(":")
    read = getattr(importlib.import_module(module), function)
    draw = random.Random(seed)
    sound = (Path(folder) / "foreign.onnx").read_bytes()
    return [_outcome(read, Path(folder) / "flipped.onnx", _damaged(sound, draw)) for _ in range(count)]


def _damaged(sound: bytes, draw: random.Random) -> bytes:
    content = bytearray(sound)
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content[: draw.choice([len(content), len(content), draw.randrange(len(content))])])


def _outcome(read: Callable[[Path], object], path: Path, content: bytes) -> str:
    path.write_bytes(content)
    try:
        read(path)
    except CnxDeployError as error:
        return type(error).__name__
    return "sound"


def peak_of_children_megabytes() -> float:
    """Peak resident memory of the largest child so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def every(names: dict[str, Any]) -> dict[str, Any]:
    """Arguments of pytest.mark.parametrize: the values, and their names as ids."""
    return {"argvalues": list(names.values()), "ids": list(names)}
