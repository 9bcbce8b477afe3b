"""Depthwise convolutions where the compiler has no good FP16 kernel for them: the same layers, written otherwise.

In FP32, for a TensorRT that has none at all (NVIDIA/TensorRT issue 4838; the compiler's own message advises it). As a
grouped convolution with a diagonal weight, for Turing: there TensorRT-RTX 1.7 computes a depthwise convolution as a
grouped one of eight channels, seven of them zeros that it adds to the input: eight times the traffic, and constants as
large as the batch in the plan. With the zeros in the weight the input stays as it is; the function is the same.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

__all__ = ["CHANNELS_PER_GROUP", "with_depthwise_in_fp32", "with_depthwise_in_groups", "written_for"]

CHANNELS_PER_GROUP = 8
TURING = "sm75"


@contextlib.contextmanager
def written_for(onnx_path: Path, target: str) -> Iterator[Path]:
    """The file that TensorRT-RTX compiles for `target`: itself, or for Turing a temporary copy with groups."""
    with with_depthwise_in_groups(onnx_path) if target == TURING else contextlib.nullcontext(onnx_path) as path:
        yield path


@contextlib.contextmanager
def with_depthwise_in_fp32(onnx_path: Path) -> Iterator[Path]:
    """A temporary copy of an ONNX file whose FP16 grouped convolutions compute in FP32 between two casts."""
    model = ir.load(onnx_path)
    for node in _grouped_convolutions(model.graph):
        _compute_in_fp32(model.graph, node)
    with _saved(model, onnx_path.name) as path:
        yield path


@contextlib.contextmanager
def with_depthwise_in_groups(onnx_path: Path) -> Iterator[Path]:
    """A temporary copy whose depthwise convolutions are grouped ones, `CHANNELS_PER_GROUP` wide, weights diagonal.

    A convolution whose channels do not divide by that stays as it is.
    """
    model = ir.load(onnx_path)
    for node in _grouped_convolutions(model.graph):
        _compute_in_groups(model.graph, node)
    with _saved(model, onnx_path.name) as path:
        yield path


def _grouped_convolutions(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in list(graph):
        group = node.attributes.get("group")
        if node.op_type == "Conv" and group is not None and group.as_int() > 1:
            yield node


@contextlib.contextmanager
def _saved(model: ir.Model, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        ir.save(model, path, external_data=f"{name}.data")
        yield path


def _compute_in_groups(graph: ir.Graph, node: ir.Node) -> None:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:
        raise ValueError(f"{node.name}: the weight is not a constant")
    values = weight.const_value.numpy()  # (C, 1, k, k)
    channels = len(values)
    if values.shape[1] != 1 or channels % CHANNELS_PER_GROUP:
        return
    diagonal = np.zeros((channels, CHANNELS_PER_GROUP, *values.shape[2:]), values.dtype)
    rows = np.arange(channels)
    diagonal[rows, rows % CHANNELS_PER_GROUP] = values[:, 0]
    wide = ir.Value(name=f"{weight.name}_diagonal", const_value=ir.tensor(diagonal))
    wide.dtype, wide.shape = weight.const_value.dtype, ir.Shape(diagonal.shape)
    graph.register_initializer(wide)
    node.replace_input_with(1, wide)
    node.attributes["group"] = ir.AttrInt64("group", channels // CHANNELS_PER_GROUP)


def _compute_in_fp32(graph: ir.Graph, node: ir.Node) -> None:
    data, *constants = node.inputs
    if data is None or data.dtype != ir.DataType.FLOAT16:
        return
    widened = ir.node("Cast", [data], {"to": ir.DataType.FLOAT}, name=f"{node.name}/Widen")
    widened.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(node, widened)
    node.replace_input_with(0, widened.outputs[0])
    for index, constant in enumerate(constants, start=1):
        if constant is None or constant.const_value is None:
            raise ValueError(f"{node.name}: weight {index} is not a constant")
        wide = ir.Value(
            name=f"{constant.name}_fp32", const_value=ir.tensor(constant.const_value.numpy().astype(np.float32))
        )
        wide.dtype, wide.shape = ir.DataType.FLOAT, constant.shape
        graph.register_initializer(wide)
        node.replace_input_with(index, wide)
    output = node.outputs[0]
    narrowed = ir.node("Cast", [output], {"to": ir.DataType.FLOAT16}, name=f"{node.name}/Narrow")
    narrowed.outputs[0].dtype, narrowed.outputs[0].shape = ir.DataType.FLOAT16, output.shape
    output.dtype = ir.DataType.FLOAT
    for user, index in list(output.uses()):
        if user is not narrowed:
            user.replace_input_with(index, narrowed.outputs[0])
    graph.insert_after(node, narrowed)
