"""The exported graph with own kernels: what follows each block's depthwise convolution becomes three kernel nodes.

The exported file stays standard ONNX. For a build with own kernels a temporary copy is made of it: the nodes of a
block, which are named after torch modules (`stages.2.3.pwconv1/MatMul`), are read as one pattern and replaced by
compiled kernels of `cnx_deploy.kernels` with the same weights. A graph that does not fit in every block is refused: a
kernel that leaves out a cast, an affine or a beta would be another network.
"""

import contextlib
import hashlib
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from cnx_deploy.core.devices import Device
from cnx_deploy.core.errors import BuildError
from cnx_deploy.core.hidden_tensor import FusedMode, Hidden, hidden_by_stage
from cnx_deploy.core.manifest import Launcher, OwnKernel, OwnKernels
from cnx_deploy.core.system import package_version
from cnx_deploy.exporters.trt.kernel_node import (
    DOMAIN,
    OPERATOR,
    PLUGIN_VERSION,
    Argument,
    ElementType,
    KernelNode,
    OutputTensor,
    Size,
    TensorLayout,
)
from cnx_deploy.kernels.compiling import SCRATCH, KernelImage, compile_kernel
from cnx_deploy.kernels.settings import (
    EPS,
    KernelName,
    LaunchSettings,
    candidate_settings,
    default_settings,
    position_tiles,
)

__all__ = ["FusedBlock", "fused_blocks", "settings_in_engine", "with_own_kernels"]

NEEDS: dict[Launcher, str] = {
    "python": "cnx-deploy of this version, whose TensorRT runner launches the kernels, and --allow-engine-code",
    "engine": "a runtime that allows the engine's host code, in which the launcher is: --allow-engine-code",
}
BLOCK = re.compile(r"stages\.\d+\.\d+")
STREAM_AXES = 4
"""(N, C, H, W); what else a kernel writes has fewer."""
HALVES: dict[ir.DataType, tuple[ElementType, str]] = {
    ir.DataType.FLOAT16: ("HALF", "float16"),
    ir.DataType.BFLOAT16: ("BF16", "bfloat16"),
}
NODE_NAMES: dict[KernelName, str] = {
    "norm_linear_gelu": "pwconv1/NormLinearGelu",
    "response_gain": "grn/ResponseGain",
    "gained_linear_residual": "pwconv2/GainedLinearResidual",
    "gained_mlp_residual": "pwconv2/GainedMlpResidual",
}
"""What the kernels' nodes are called within a block, after the torch module that they end with."""


@dataclass(frozen=True, slots=True)
class FusedBlock:
    """A block as the pattern reads it: stream + (GELU(norm(depthwise) @ weight1 + bias1) · gain) @ weight2 + bias2.

    `depthwise`, `stream` and `output` are (N, C, H, W); weight1 (C, 4C), weight2 (4C, C), gamma (4C,) in FP32.
    `addition` is the block's last node.
    """

    name: str
    addition: ir.Node
    depthwise: ir.Value
    weight1: np.ndarray[Any, Any]
    bias1: np.ndarray[Any, Any]
    gamma: np.ndarray[Any, Any]
    weight2: np.ndarray[Any, Any]
    bias2: np.ndarray[Any, Any]

    @property
    def stream(self) -> ir.Value:
        """What goes into the block; another tensor once the block before has been replaced."""
        return _given(self.addition.inputs[0])

    @property
    def output(self) -> ir.Value:
        """What comes out of it."""
        return self.addition.outputs[0]

    @property
    def stage(self) -> int:
        """Index of its stage, from 0."""
        return int(self.name.split(".")[1])

    @property
    def channels(self) -> int:
        """C of the stream."""
        return len(self.weight1)


@contextlib.contextmanager
def with_own_kernels(
    onnx_path: Path, mode: FusedMode, target: str, device: Device | None = None, launcher: Launcher = "python"
) -> Iterator[tuple[Path, OwnKernels]]:
    """A temporary copy of an exported file with compiled kernels for `target`, and what they are.

    `device`: the GPU itself where it is known; `launcher`: what the record says of who launches them.

    Raises BuildError where a block does not fit the pattern, InputError for a target without kernels.
    """
    model = ir.load(onnx_path)
    blocks = fused_blocks(model.graph, onnx_path.name)
    dims = [next(block.channels for block in blocks if block.stage == stage) for stage in range(blocks[-1].stage + 1)]
    hidden = hidden_by_stage(mode, dims, target, device)
    kernels: dict[OwnKernel, None] = {}  # each once, in the order of the stages
    for block in blocks:
        kernels |= dict.fromkeys(_replace(model.graph, block, hidden[block.stage], target))
    model.graph.opset_imports[DOMAIN] = int(PLUGIN_VERSION)
    RemoveUnusedNodesPass()(model)
    record = OwnKernels(
        hidden=tuple(hidden),
        kernels=tuple(kernels),
        compiler=f"triton {package_version('triton')}",
        launcher=launcher,
        needs=NEEDS[launcher],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / onnx_path.name
        ir.save(model, path, external_data=f"{onnx_path.name}.data")
        yield path, record


def fused_blocks(graph: ir.Graph, file_name: str) -> list[FusedBlock]:
    """Every block of a graph in its order; BuildError names the first that does not fit, and what was expected."""
    nodes = {str(node.name): node for node in graph}
    names = dict.fromkeys(match[0] for name in nodes if (match := BLOCK.match(name)))
    if not names:
        raise BuildError(
            f"{file_name} has no nodes named after blocks (stages.0.0): own kernels replace those of a file that "
            "cnx-deploy export wrote. Build it without --fused."
        )
    return [_Pattern(file_name, name).read(nodes.get(f"{name}/Add")) for name in names]


class _Pattern:
    """Reads one block backwards, from its residual addition to its depthwise convolution."""

    def __init__(self, file_name: str, block: str) -> None:
        self.file_name, self.block = file_name, block

    def read(self, addition: ir.Node | None) -> FusedBlock:
        """The block whose last node is `addition`."""
        if addition is None or addition.op_type != "Add":
            raise self.misfit("an addition of the stream at its end", addition)
        hidden, gain, weight2, bias2 = self.second_product(addition.inputs[1])
        gamma = self.gamma(gain, hidden)
        depthwise, weight1, bias1 = self.first_product(hidden)
        block = FusedBlock(self.block, addition, _given(depthwise), weight1, bias1, gamma, weight2, bias2)
        self.check(block)
        return block

    def second_product(
        self, branch: ir.Value | None
    ) -> tuple[ir.Value | None, ir.Value | None, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Hidden tensor, gain, weight (4C, C) and bias, of either place that the gain can be multiplied in."""
        last = self.made_by(branch, "Conv", "Transpose")
        if last.op_type == "Conv":  # the hidden tensor is scaled
            scaled = self.made_by(self.through(last.inputs[0], "Transpose"), "Mul")
            weight = self.constant(last.inputs[1], last)
            if weight.shape[2:] != (1, 1):
                raise self.misfit("a 1×1 convolution", last)
            hidden, gain = self.past(scaled.inputs[0], "Reshape"), self.past(scaled.inputs[1], "Unsqueeze")
            return hidden, gain, weight[:, :, 0, 0].T, self.constant(last.inputs[2], last)
        shifted = self.made_by(self.past(last.inputs[0], "Reshape"), "Add")  # the weight is scaled
        product = self.made_by(shifted.inputs[0], "MatMul")
        weighted = self.made_by(product.inputs[1], "Mul")
        weight, bias = self.constant(weighted.inputs[1], weighted), self.constant(shifted.inputs[1], shifted)
        return product.inputs[0], self.through(weighted.inputs[0], "Transpose"), weight, bias

    def gamma(self, gain: ir.Value | None, hidden: ir.Value | None) -> np.ndarray[Any, Any]:
        """GRN's gamma in FP32, from gain = 1 + gamma · √(q / (mean √q + eps)²), q the sum of squares of `hidden`."""
        shifted = self.made_by(self.through(gain, "Cast"), "Add")
        self.number(shifted.inputs[1], 1.0, shifted)
        scaled = self.made_by(shifted.inputs[0], "Mul")
        product = self.made_by(self.through(scaled.inputs[1], "Sqrt"), "Mul")
        square = self.made_by(product.inputs[1], "Mul")
        if square.inputs[0] is not square.inputs[1]:
            raise self.misfit("a square of the reciprocal mean", square)
        mean = self.made_by(self.through(square.inputs[0], "Reciprocal"), "Add")
        self.number(mean.inputs[1], EPS, mean)
        average = self.made_by(mean.inputs[0], "ReduceMean")
        total = self.made_by(product.inputs[0], "ReduceSum")
        if self.through(average.inputs[0], "Sqrt") is not total.outputs[0]:
            raise self.misfit("a mean of the norms that are scaled", average)
        squares = self.made_by(total.inputs[0], "Mul")
        if squares.inputs[0] is not squares.inputs[1] or self.through(squares.inputs[0], "Cast") is not hidden:
            raise self.misfit("squares of the hidden tensor in FP32", squares)
        rank = len(_given(hidden).shape or ())
        self.axes(total, tuple(range(1, rank - 1)))
        self.axes(average, (rank - 1,))
        return self.constant(scaled.inputs[0], scaled).reshape(-1).astype(np.float32)

    def first_product(
        self, hidden: ir.Value | None
    ) -> tuple[ir.Value | None, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The depthwise convolution's output, weight (C, 4C) and bias of GELU(norm · weight + bias)."""
        activation = self.made_by(hidden, "Gelu")
        if (kind := activation.attributes.get("approximate")) is not None and kind.as_string() != "none":
            raise self.misfit("an exact GELU", activation)
        shifted = self.made_by(activation.inputs[0], "Add")
        product = self.made_by(shifted.inputs[0], "MatMul")
        norm = self.made_by(self.through(product.inputs[0], "Cast"), "LayerNormalization")
        epsilon, axis = norm.attributes.get("epsilon"), norm.attributes.get("axis")
        wide = norm.inputs[0]
        last = (-1, len(_given(wide).shape or ()) - 1)
        if epsilon is None or not math.isclose(epsilon.as_float(), EPS, rel_tol=1e-3):
            raise self.misfit(f"a LayerNorm with epsilon {EPS:g}", norm)
        if axis is not None and axis.as_int() not in last:
            raise self.misfit("a LayerNorm over the channels", norm)
        if np.any(self.constant(norm.inputs[1], norm) != 1) or (len(norm.inputs) > 2 and norm.inputs[2] is not None):
            raise self.misfit("a LayerNorm whose affine is folded away", norm)
        tokens = self.made_by(self.past(self.through(wide, "Cast"), "Reshape"), "Transpose")
        if tuple(tokens.attributes["perm"].as_ints()) != (0, 2, 3, 1):
            raise self.misfit("channels brought to the end", tokens)
        weight, bias = self.constant(product.inputs[1], product), self.constant(shifted.inputs[1], shifted)
        return tokens.inputs[0], weight, bias

    def check(self, block: FusedBlock) -> None:
        """Raise BuildError unless shapes and types are those that the kernels take."""
        channels = block.channels
        shapes = {
            "weight1": (block.weight1.shape, (channels, 4 * channels)), "bias1": (block.bias1.shape, (4 * channels,)),
            "gamma": (block.gamma.shape, (4 * channels,)), "weight2": (block.weight2.shape, (4 * channels, channels)),
            "bias2": (block.bias2.shape, (channels,)),
        }  # fmt: skip
        half = block.stream.dtype
        types = {block.stream.dtype, block.depthwise.dtype, block.output.dtype}
        parts = {
            ir.DataType.from_numpy(part.dtype) for part in (block.weight1, block.bias1, block.weight2, block.bias2)
        }
        if half not in HALVES or types | parts != {half}:
            raise self.misfit("one half precision throughout", block.addition)
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise self.misfit(f"{name} of shape {expected}, not {found},", block.addition)

    def made_by(self, value: ir.Value | None, *operators: str) -> ir.Node:
        """The node that makes a tensor, which has to be one of those."""
        node = None if value is None else value.producer()
        if node is None or node.op_type not in operators:
            raise self.misfit(" or ".join(operators), node)
        return node

    def through(self, value: ir.Value | None, operator: str) -> ir.Value | None:
        """What goes into the node that makes a tensor, which has to be that one."""
        return self.made_by(value, operator).inputs[0]

    def past(self, value: ir.Value | None, operator: str) -> ir.Value | None:
        """The same where such a node is there: with open sizes a tensor keeps its axes, and nothing is reshaped."""
        node = None if value is None else value.producer()
        return node.inputs[0] if node is not None and node.op_type == operator else value

    def constant(self, value: ir.Value | None, node: ir.Node) -> np.ndarray[Any, Any]:
        """The values of a tensor that stands in the file, where it is large behind a cast that the exporter left."""
        cast = None if value is None else value.producer()
        if cast is not None and cast.op_type == "Cast" and (held := _given(cast.inputs[0]).const_value) is not None:
            return held.numpy()  # the kernel's own type is wider, or the check of types refuses it
        if value is None or value.const_value is None:
            raise self.misfit("a constant", node)
        return value.const_value.numpy()

    def number(self, value: ir.Value | None, expected: float, node: ir.Node) -> None:
        """Raise BuildError unless a tensor is that one number."""
        found = self.constant(value, node)
        if found.size != 1 or not math.isclose(found.item(), expected, rel_tol=1e-3):
            raise self.misfit(f"{expected:g}", node)

    def axes(self, node: ir.Node, expected: tuple[int, ...]) -> None:
        """Raise BuildError unless a reduction is over those axes."""
        rank = len(_given(node.inputs[0]).shape or ())
        found = sorted(int(axis) % rank for axis in self.constant(node.inputs[1], node).reshape(-1))
        if tuple(found) != expected:
            raise self.misfit(f"a reduction over axes {expected}", node)

    def misfit(self, expected: str, node: ir.Node | None) -> BuildError:
        """The error for a graph that is not of the form."""
        found = "nothing" if node is None else f"{node.op_type} ({node.name})"
        return BuildError(
            f"{self.file_name}: {self.block} is no block that own kernels can replace: expected {expected}, found "
            f"{found}. They compute blocks in one half precision with every fold; export it without --keep-fp32 and "
            "--without-fold there, or build it without --fused."
        )


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None  # an input that the operator requires
    return value


def _replace(graph: ir.Graph, block: FusedBlock, hidden: Hidden, target: str) -> Iterator[OwnKernel]:
    """Put kernel nodes in the place of a block, and yield the record of each."""
    made = _Nodes(graph, block, target)
    tokens = block.depthwise
    weight1, bias1 = made.constant("weight1", block.weight1), made.constant("bias1", block.bias1)
    weight2, bias2 = made.constant("weight2", block.weight2), made.constant("bias2", block.bias2)
    first = made.settings("norm_linear_gelu")
    width, positions = Size(factor=4 * block.channels), Size(0, (2, 3))
    tiles = Size(0, (2, 3), divisor=first.block_m)
    stored = {"hidden_ptr": ((Size(0, (0,)), positions, width), made.half)} if hidden == "stored" else {}
    *kept, sums = made.node(
        "norm_linear_gelu",
        {"tokens_ptr": tokens, "weight_ptr": weight1, "bias_ptr": bias1},
        {**stored, "sums_ptr": ((Size(0, (0,)), tiles, width), "FLOAT")},
        {"positions": positions},
        (Size(factor=4 * block.channels, divisor=first.block_n), tiles, Size(0, (0,))),
    )
    (gain,) = made.node(
        "response_gain",
        {"sums_ptr": sums, "gamma_ptr": made.constant("gamma", block.gamma)},
        {"gain_ptr": ((Size(0, (0,)), Size(0, (2,))), "FLOAT")},
        {"tiles": Size(0, (1,))},
        (Size(0, (0,)), Size(), Size()),
    )
    if kept:
        second = made.settings("gained_linear_residual")
        positions = Size(0, (1,))
        given = {"hidden_ptr": kept[0], "gain_ptr": gain, "weight_ptr": weight2, "bias_ptr": bias2}
        grid = (
            Size(factor=block.channels, divisor=second.block_n),
            Size(0, (1,), divisor=second.block_m),
            Size(0, (0,)),
        )
        kernel: KernelName = "gained_linear_residual"
    else:
        second = made.settings("gained_mlp_residual")
        given = {
            "tokens_ptr": tokens, "weight1_ptr": weight1, "bias1_ptr": bias1, "gain_ptr": gain, "weight2_ptr": weight2,
            "bias2_ptr": bias2,
        }  # fmt: skip
        grid = (Size(0, (2, 3), divisor=second.block_m), Size(0, (0,)), Size())
        kernel = "gained_mlp_residual"
    at = len(given)
    shape = tuple(Size(at, (axis,)) for axis in range(4))
    (result,) = made.node(
        kernel, {**given, "residual_ptr": block.stream}, {"out_ptr": (shape, made.half)}, {"positions": positions}, grid
    )
    made.finish(result)
    yield from made.records


def settings_in_engine(kernel: KernelName, channels: int, positions: int | None, target: str) -> LaunchSettings:
    """The settings of a kernel for `positions` of a sample, None where a size is open.

    Sums of squares are stored for each tile of positions, so of the tiles that fit that with the fewest is taken: the
    bytes are known without a GPU, the times are not. For atto it saves 0.15 MB an image.
    """
    candidates = candidate_settings(kernel, channels, target)
    if kernel == "norm_linear_gelu" and positions is not None:
        return min(candidates, key=lambda settings: position_tiles(settings, positions))
    return default_settings(kernel, channels, target)


class _Nodes:
    """Makes the kernel nodes of one block."""

    def __init__(self, graph: ir.Graph, block: FusedBlock, target: str) -> None:
        self.graph, self.block, self.target = graph, block, target
        self.half, self.half_name = HALVES[_dtype(block.stream)]
        # TensorRT-RTX 1.7.1 offers a plugin no BF16 with the channels last, but in eights (HWC8): two copies a block in
        # row-major order, and eight with those.
        self.channels_last = self.half == "HALF"
        self.nodes: list[ir.Node] = []
        self.records: list[OwnKernel] = []

    def settings(self, kernel: KernelName) -> LaunchSettings:
        """The settings of a kernel for this block's channels."""
        sides = [side for side in (self.block.depthwise.shape or ())[2:] if isinstance(side, int)]
        positions = math.prod(sides) if len(sides) == 2 else None
        return settings_in_engine(kernel, self.block.channels, positions, self.target)

    def constant(self, name: str, values: np.ndarray[Any, Any]) -> ir.Value:
        """A tensor that stands in the file."""
        tensor = ir.tensor(np.ascontiguousarray(values), name=f"{self.block.name}/{name}")
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(values.shape)
        value = ir.Value(name=tensor.name, const_value=tensor, type=kind, shape=shape)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        kernel: KernelName,
        inputs: Mapping[str, ir.Value],
        outputs: Mapping[str, tuple[tuple[Size, ...], ElementType]],
        integers: Mapping[str, Size],
        grid: tuple[Size, Size, Size],
    ) -> Sequence[ir.Value]:
        """Compile a kernel and make its node; tensors and integers go by the names of the kernel's arguments."""
        settings, stores_hidden = self.settings(kernel), "hidden_ptr" in outputs or kernel != "norm_linear_gelu"
        image = compile_kernel(
            kernel, self.block.channels, settings, target=self.target, dtype=self.half_name,
            channels_last=self.channels_last, store_hidden=stores_hidden,
        )  # fmt: skip
        launch = KernelNode(
            image=image.cubin,
            entry=image.entry,
            threads=32 * image.num_warps,
            shared_bytes=image.shared_bytes,
            inputs=tuple(self.layout(value) for value in inputs.values()),
            outputs=tuple(
                OutputTensor(TensorLayout(kind, self.channels_last and len(shape) == STREAM_AXES), shape)
                for shape, kind in outputs.values()
            ),
            grid=grid,
            arguments=tuple(_argument(name, list(inputs), list(outputs), integers) for name in image.arguments),
        )
        attributes = {name: _attribute(name, values) for name, values in launch.fields().items()}
        node = ir.Node(
            DOMAIN, OPERATOR, list(inputs.values()),
            [
                *attributes.values(),
                ir.AttrString("plugin_version", PLUGIN_VERSION), ir.AttrString("plugin_namespace", DOMAIN),
            ],
            num_outputs=len(outputs), name=f"{self.block.name}.{NODE_NAMES[kernel]}",
        )  # fmt: skip
        for value, name, (_, kind) in zip(node.outputs, outputs, outputs.values(), strict=True):
            value.name = f"{node.name}/{name.removesuffix('_ptr')}"
            value.type = ir.TensorType(ir.DataType.FLOAT if kind == "FLOAT" else _dtype(self.block.stream))
        self.nodes.append(node)
        self.records.append(_record(image, self.block.channels, settings, self.target, stores_hidden))
        return node.outputs

    def layout(self, value: ir.Value) -> TensorLayout:
        """How the kernel reads a tensor."""
        is_stream = value in (self.block.stream, self.block.depthwise)
        half = "FLOAT" if _dtype(value) == ir.DataType.FLOAT else self.half
        return TensorLayout(half, is_stream and self.channels_last)

    def finish(self, result: ir.Value) -> None:
        """Put the nodes before the block's last one and have everything read `result` instead of its output."""
        result.shape = self.block.output.shape
        self.graph.insert_before(self.block.addition, self.nodes)
        ir.convenience.replace_all_uses_with(self.block.output, result)


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None  # the exporter writes every type
    return value.dtype


def _attribute(name: str, values: np.ndarray[Any, Any]) -> ir.Attr:
    """A field as an attribute: bytes as a tensor of int8, which the parser hands on as it is."""
    if name == "image":
        return ir.AttrTensor(name, ir.tensor(values))
    return (
        ir.AttrString(name, values.tobytes().decode("ascii"))
        if values.dtype == np.int8
        else ir.AttrInt64s(name, values.tolist())
    )


def _argument(name: str, inputs: list[str], outputs: list[str], integers: Mapping[str, Size]) -> Argument:
    if name in SCRATCH:
        return Argument("null")
    if name in integers:
        return Argument("size", size=integers[name])
    return Argument("input", inputs.index(name)) if name in inputs else Argument("output", outputs.index(name))


def _record(image: KernelImage, channels: int, settings: LaunchSettings, target: str, stores_hidden: bool) -> OwnKernel:
    return OwnKernel(
        kernel=image.kernel if stores_hidden else f"{image.kernel} (sums alone)",
        channels=channels,
        target=target,
        tile=(settings.block_m, settings.block_n, settings.block_k),
        warps=settings.num_warps,
        stages=settings.num_stages,
        sha256=hashlib.sha256(image.cubin).hexdigest(),
    )
