"""Files with kernel nodes run on a CPU: every node is launched as the driver would, but in Triton's interpreter.

The node's own record says grid, sizes of outputs and the order of arguments, so a graph that is wired wrongly, or a
record that says another grid, gives other outputs.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from cnx_deploy.exporters.trt.fused_graph import settings_in_engine
from cnx_deploy.exporters.trt.kernel_node import DOMAIN, FIELDS, OPERATOR, KernelNode
from cnx_deploy.kernels.compiling import EPS, SCRATCH, KernelImage
from cnx_deploy.kernels.loading import interpreted_kernels, interpreting
from cnx_deploy.kernels.settings import KernelName, LaunchSettings, split_channels

TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}


def uncompiled(
    kernel: KernelName, channels: int, settings: LaunchSettings, *, store_hidden: bool = True, **_: Any
) -> KernelImage:
    """What `compile_kernel` gives, without an image: all that the interpreter needs."""
    left_out = set() if store_hidden else {"hidden_ptr"}
    names = getattr(interpreted_kernels(), kernel).arg_names
    arguments = (name for name in names if not name.isupper() and name not in left_out)
    return KernelImage(kernel, b"", kernel, (*arguments, *SCRATCH), 0, 0, 0, settings.num_warps, "", 0)


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def launched(node: KernelNode, target: str, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of a kernel node; each tensor lies in memory as the node's record says, the outputs full of NaN."""
    memory = [
        tensor.permute(0, 2, 3, 1).contiguous() if layout.channels_last else tensor.contiguous()
        for tensor, layout in zip(inputs, node.inputs, strict=True)
    ]
    shapes = [tuple(tensor.shape) for tensor in inputs]
    written = []
    for output in node.outputs:
        shape = [size.of(shapes) for size in output.shape]
        shape = [shape[axis] for axis in (0, 2, 3, 1)] if output.layout.channels_last else shape
        written.append(torch.full(shape, float("nan"), dtype=TYPES[output.layout.type]))
    kernel: KernelName = node.entry  # type: ignore[assignment]
    stores_hidden = kernel != "norm_linear_gelu" or len(written) == 2
    channels = inputs[1].shape[0] // 4 if kernel in ("response_gain", "gained_linear_residual") else inputs[1].shape[0]
    if kernel == "gained_linear_residual":
        channels = inputs[2].shape[1]
    positions = shapes[0][2] * shapes[0][3] if kernel == "norm_linear_gelu" else None
    settings = settings_in_engine(kernel, channels, positions, target)
    image = uncompiled(kernel, channels, settings, store_hidden=stores_hidden)
    values: dict[str, Any] = {}
    for name, argument in zip(image.arguments, node.arguments, strict=True):
        given = {"input": memory, "output": written, "null": [None], "size": []}[argument.kind]
        values[name] = argument.size.of(shapes) if argument.kind == "size" else given[argument.index]
    assert all(values.pop(name) is None for name in SCRATCH)
    first, rest = split_channels(channels)
    channels_last = any(layout.channels_last for layout in (*node.inputs, *(output.layout for output in node.outputs)))
    constants = {
        "EPS": EPS, "CHANNELS": channels, "CHANNELS_LAST": channels_last, "FIRST": first, "REST": rest,
        "BLOCK_M": settings.block_m, "BLOCK_N": settings.block_n, "BLOCK_K": settings.block_k, "hidden_ptr": None,
    }  # fmt: skip
    function = getattr(interpreted_kernels(), kernel)
    names = function.arg_names
    words = {name: values.get(name, constants.get(name)) for name in names}
    with interpreting():
        function[tuple(size.of(shapes) for size in node.grid)](**words)
    return [
        tensor.permute(0, 3, 1, 2) if output.layout.channels_last else tensor
        for tensor, output in zip(written, node.outputs, strict=True)
    ]


def nodes_in(path: Path) -> dict[str, KernelNode]:
    """The kernel nodes of a file by their names."""
    readers = {
        onnx.AttributeProto.STRING: lambda attribute: np.frombuffer(attribute.s, np.int8),
        onnx.AttributeProto.TENSOR: lambda attribute: onnx.numpy_helper.to_array(attribute.t),
        onnx.AttributeProto.INTS: lambda attribute: np.asarray(attribute.ints, np.int32),
    }
    return {
        node.name: KernelNode.from_fields(
            {each.name: readers[each.type](each) for each in node.attribute if each.name in FIELDS}
        )
        for node in onnx.load(path, load_external_data=False).graph.node
        if node.op_type == OPERATOR
    }


def run_with_kernels(path: Path, images: np.ndarray[Any, Any], target: str = "sm89") -> np.ndarray[Any, Any]:
    """The first output of an ONNX file for images, by onnx's own evaluator with kernel nodes launched."""
    model, nodes = onnx.load(path), nodes_in(path)
    assert nodes

    class CompiledKernel(OpRun):
        op_domain = DOMAIN

        def run(self, *inputs: Any, **_: Any) -> Any:  # past the attributes, which `nodes` has
            outputs = launched(nodes[self.onnx_node.name], target, [as_tensor(array) for array in inputs])
            return tuple(as_array(tensor) for tensor in outputs)

        def _run(self, *inputs: Any, **_: Any) -> Any:
            raise NotImplementedError

    answer = ReferenceEvaluator(model, new_ops=[CompiledKernel]).run(None, {model.graph.input[0].name: images})
    return np.asarray(answer[0])


def parse_with_creator(path: str) -> None:
    """Have TensorRT-RTX parse a file once the creator is known, in the environment as it is."""
    from cnx_deploy.exporters.trt.backend import load_backend
    from cnx_deploy.exporters.trt.network import NetworkBuild
    from cnx_deploy.exporters.trt.plugins import register_creator

    backend = load_backend("tensorrt-rtx")
    register_creator(backend)
    NetworkBuild(backend, Path(path))
