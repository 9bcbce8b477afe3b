"""The fallback for a TensorRT that has no FP16 kernel for depthwise convolutions: those layers in FP32.

See NVIDIA/TensorRT issue 4838; the compiler's own message advises it.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

__all__ = ["with_depthwise_in_fp32"]


@contextlib.contextmanager
def with_depthwise_in_fp32(onnx_path: Path) -> Iterator[Path]:
    """A temporary copy of an ONNX file whose FP16 grouped convolutions compute in FP32 between two casts."""
    model = ir.load(onnx_path)
    for node in list(model.graph):
        group = node.attributes.get("group")
        if node.op_type == "Conv" and group is not None and group.as_int() > 1:
            _compute_in_fp32(model.graph, node)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / onnx_path.name
        ir.save(model, path, external_data=f"{path.name}.data")
        yield path


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
