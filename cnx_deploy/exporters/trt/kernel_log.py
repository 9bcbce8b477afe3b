"""The kernels of a compiled engine, read from the compiler's log: name, kind, tensors, place in the network.

The compiler logs the list when profiling verbosity is DETAILED: a message that begins with "Layers:" and has a line a
kernel up to the first empty line. A line that cannot be read is an error: left out, it would make the engine look
smaller than it is.

Operation and block come from the ONNX nodes that the compiler names as a kernel's sources. Nodes are named
`<torch module>/<operator>` (`exporters.onnx`). What the tables below do not know is "other", as every node of a foreign
graph is.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cnx_deploy.core.errors import BuildError

__all__ = ["CompiledKernel", "KernelTensor", "Role", "block_of", "kernels_in_log", "operation_of", "stage_of"]

Role = Literal["input", "constant", "output"]

ELEMENT_BYTES = {
    "Half": 2, "BFloat16": 2, "BF16": 2, "Float": 4, "Int8": 1, "FP8": 1, "Int32": 4, "Int64": 8, "Bool": 1, "UInt8": 1,
}  # fmt: skip
HEADING = "Layers:"
LINE = re.compile(
    r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?Metadata: ?(?P<metadata>.*)$"
)
TENSOR = re.compile(r"\{ Name: (?P<name>[^{}]+?), Dimensions: \[(?P<shape>[^\]]*)\],[^{}]*? Datatype: (?P<type>\w+),")
SOURCE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
PROFILE = re.compile(r"_myl(\d+)_\d+$")
SHAPE_COMPUTATION = "shape_call"
"""Kind of the lines that stand for work of the host on sizes; they launch nothing."""

UNKNOWN = "other"
LAYOUT = "cast/layout"

# Node -> operation, the first that fits. The order is the network's, and names are joined in it.
OPERATIONS = (
    (r"(model/Mul|normalise/\w+)", "input scale"),
    (r"model/Slice", "flip"),
    (r"downsample_layers\.0\.0/Conv", "stem conv"),
    (r"downsample_layers\.0\.\d+/\w+", "stem norm"),
    (r"stages\.\d+\.\d+\.dwconv/Conv", "dwconv"),
    (r"stages\.\d+\.\d+\.norm/\w+", "norm"),
    (r"stages\.\d+\.\d+\.pwconv1/NormLinearGelu", "norm+pwconv1+gelu+grn statistic"),
    (r"stages\.\d+\.\d+\.pwconv1/(MatMul|Gemm|Conv)", "pwconv1"),
    (r"stages\.\d+\.\d+\.pwconv1/(Add|Mul)", "pwconv1 bias"),
    (r"stages\.\d+\.\d+\.act/\w+", "gelu"),
    (r"stages\.\d+\.\d+\.grn/(Reduce\w+|AveragePool|Sqrt)", "grn statistic"),
    (r"stages\.\d+\.\d+\.pwconv2/GainedMlpResidual", "norm+pwconv1+gelu+gain+pwconv2+residual"),
    (r"stages\.\d+\.\d+\.pwconv2/GainedLinearResidual", "gain+pwconv2+residual"),
    (r"stages\.\d+\.\d+(\.grn/(Reciprocal|Div|Mul|Add|ResponseGain)|\.grn\.affine/Conv|\.pwconv2/Mul|/Mul)", "gain"),
    (r"stages\.\d+\.\d+\.pwconv2/(MatMul|Gemm|Conv)", "pwconv2"),
    (r"stages\.\d+\.\d+\.pwconv2/Add", "pwconv2 bias"),
    (r"stages\.\d+\.\d+/Add", "residual"),
    (r"downsample_layers\.\d+\.\d+/Conv", "downsample conv"),
    (r"downsample_layers\.\d+\.\d+/\w+", "downsample norm"),
    (r"model/ReduceMean", "pool"),
    (r"norm/\w+", "head norm"),
    (r"head(\.[\w.]+)?/\w+", "head"),
    (r"class_maps/\w+", "class maps"),
    (r"pyramid(\.[\w.]+)?/\w+", "pyramid"),
    (r"proposals(\.[\w.]+)?/\w+", "proposals"),
    (r"box_head(\.[\w.]+)?/\w+", "box head"),
    (r"mask_head(\.[\w.]+)?/\w+", "mask head"),
    (r"answers/\w+", "outputs"),
    (r"flip_mean/\w+", "flip mean"),
)
ORDER = tuple(operation for _, operation in OPERATIONS)
BIAS = " bias"

STEM = "downsample_layers.0"
BLOCK = re.compile(r"(downsample_layers\.\d+|stages\.\d+\.\d+)\b")
HEAD = re.compile(
    r"norm/.+|(head|pyramid|proposals|box_head|mask_head)(\.[\w.]+)?/.+|model/ReduceMean|(answers|class_maps|flip_mean)/.+"
)
MOVES = re.compile(r".+/(Cast|Transpose|Reshape|Squeeze|Unsqueeze|Flatten|Concat|Pad|QuantizeLinear|DequantizeLinear)")
NUMBER = re.compile(r"_\d+$")

# A generated kernel ("kgen") is named after its steps, as in __myl_CastMulReshSum_myl0_6. Where a node's step is not
# among them it only pads a convolution's input or reads a GELU's result, although the node is listed as a source.
GENERATED = "kgen"
STEPS = re.compile(r"__myl_(\w+?)_myl\d+_\d+$")
STEP_OF = {"Conv": "Conv", "MatMul": "Fc", "Gemm": "Fc", "Gelu": "Erf"}
MOVING_STEPS = re.compile(r"(Cast|Conc|Move|Pad|Resh|Slic|Tran)+")


@dataclass(frozen=True, slots=True)
class KernelTensor:
    """A tensor that a kernel reads or writes. A size the log leaves open, as with a dynamic batch, is -1."""

    name: str
    role: Role
    shape: tuple[int, ...]
    type: str

    @property
    def size_bytes(self) -> int | None:
        """Bytes of all its elements; None where a size is open."""
        return None if any(size < 0 for size in self.shape) else math.prod(self.shape) * ELEMENT_BYTES[self.type]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape)) or 'scalar'} {self.type}"


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One kernel launch. Bytes are for the whole batch, None where the log shows a dynamic size.

    `sources` are the ONNX nodes it comes from, named after their torch modules; `block` ("stages.2.3", "stem") and
    `operation` ("pwconv1+gelu") are read from them. A tensor that it reads in two places, as
    x + x·g does, is in `tensors` once: its elements come from memory once.
    """

    name: str
    kind: str
    block: str
    operation: str
    tensors: tuple[KernelTensor, ...]
    sources: tuple[str, ...]

    @property
    def input_bytes(self) -> int | None:
        """Bytes of what other kernels or the caller wrote."""
        return self._bytes("input")

    @property
    def constant_bytes(self) -> int | None:
        """Bytes of weights and other constants."""
        return self._bytes("constant")

    @property
    def output_bytes(self) -> int | None:
        """Bytes it writes."""
        return self._bytes("output")

    @property
    def total_bytes(self) -> int:
        """All it reads and writes, open sizes left out."""
        parts = (self.input_bytes, self.constant_bytes, self.output_bytes)
        return sum(part for part in parts if part is not None)

    @property
    def profile(self) -> int:
        """Index of the optimisation profile it was compiled for, which is the last number but one in its name."""
        match = PROFILE.search(self.name)
        return int(match[1]) if match else 0

    @property
    def stage(self) -> str:
        """The block without its number in the stage: "stages.2"."""
        return stage_of(self.block)

    def _bytes(self, role: Role) -> int | None:
        sizes = [tensor.size_bytes for tensor in self.tensors if tensor.role == role]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def kernels_in_log(messages: Iterable[str]) -> tuple[CompiledKernel, ...]:
    """The kernels that a build's log lists, in the order they run in; the host's computations of sizes are left out.

    Raises BuildError for a line, a tensor or a type that is not in the format known here.
    """
    matches = [_match(line) for message in messages for line in _kernel_lines(message)]
    return _placed([_kernel(match) for match in matches if match["kind"] != SHAPE_COMPUTATION])


def operation_of(name: str, kind: str, sources: Sequence[str]) -> str:
    """What a kernel computes: its operations joined by "+" in the network's order, "cast/layout", or "other".

    The bias of a product in the same kernel is not named.
    """
    computed = _computed(name, kind, sources)
    if not computed:
        return LAYOUT if sources or MOVING_STEPS.fullmatch(_steps(name)) else UNKNOWN
    found = {_operation(node) for node in computed}
    wanted = [each for each in (*ORDER, UNKNOWN) if each in found]
    return "+".join(each for each in wanted if not (each.endswith(BIAS) and each.removesuffix(BIAS) in found))


def block_of(name: str, kind: str, sources: Sequence[str]) -> str:
    """The block most of a kernel's nodes belong to: "stages.2.3", "downsample_layers.1", "stem", "head" or "other".

    Nodes that it computes count; those that only move data count where there are no others.
    """
    for nodes in (_computed(name, kind, sources), sources):
        found = [block for block in map(_block, nodes) if block != UNKNOWN]
        if found:
            return max(found, key=found.count)
    return UNKNOWN


def stage_of(block: str) -> str:
    """The stage of a block: "stages.2" of "stages.2.3"; other parts of the network are a stage of their own."""
    return ".".join(block.split(".")[:2])


def _kernel_lines(message: str) -> Iterator[str]:
    """The lines below the heading, up to the first empty one."""
    lines = iter(message.splitlines())
    if next(lines, "").strip() != HEADING:
        return
    for line in lines:
        if not line.strip():
            return
        yield line.strip()


def _match(line: str) -> re.Match[str]:
    match = LINE.match(line)
    if match is None:
        raise BuildError(_unknown_format("line", line))
    return match


def _kernel(match: re.Match[str]) -> CompiledKernel:
    name, kind = match["name"], match["kind"]
    sources = tuple(dict.fromkeys(SOURCE.findall(match["metadata"])))
    tensors = (
        *_tensors(match["inputs"], "input"),
        *_tensors(match["constants"], "constant"),
        *_tensors(match["outputs"], "output"),
    )
    block, operation = block_of(name, kind, sources), operation_of(name, kind, sources)
    return CompiledKernel(name, kind, block, operation, tuple(dict.fromkeys(tensors)), sources)


def _tensors(text: str, role: Role) -> Iterator[KernelTensor]:
    found = list(TENSOR.finditer(text))
    if len(found) != text.count("{"):
        raise BuildError(_unknown_format("tensor", text))
    for match in found:
        if match["type"] not in ELEMENT_BYTES:
            raise BuildError(
                f"The compiler's log names a type {match['type']!r} whose size is not known here: expected one of "
                f"{', '.join(ELEMENT_BYTES)}. Install the TensorRT-RTX that constraints.txt names."
            )
        shape = tuple(int(size) for size in match["shape"].split(",") if size)
        yield KernelTensor(match["name"], role, shape, match["type"])


def _unknown_format(what: str, text: str) -> str:
    return (
        f"The compiler's list of kernels has a {what} in a format not known here: {text.strip()[:120]!r}. "
        "Use a tested version (constraints.txt)."
    )


def _placed(kernels: Sequence[CompiledKernel]) -> tuple[CompiledKernel, ...]:
    """The kernels; one that only moves data and names no block gets the one it moves data to, or else from."""
    block_at = {(tensor.role, tensor.name): kernel.block for kernel in reversed(kernels) for tensor in kernel.tensors}
    return tuple(
        replace(kernel, block=_neighbour(kernel, block_at))
        if kernel.block == UNKNOWN and kernel.operation == LAYOUT
        else kernel
        for kernel in kernels
    )


def _neighbour(kernel: CompiledKernel, block_at: Mapping[tuple[Role, str], str]) -> str:
    """The block that first reads what the kernel writes, or else the one that writes what it reads."""
    readers = [block_at.get(("input", tensor.name), UNKNOWN) for tensor in kernel.tensors if tensor.role == "output"]
    writers = [block_at.get(("output", tensor.name), UNKNOWN) for tensor in kernel.tensors if tensor.role == "input"]
    return next((block for block in (*readers, *writers) if block != UNKNOWN), UNKNOWN)


def _computed(name: str, kind: str, sources: Sequence[str]) -> list[str]:
    """The nodes a kernel computes, numbers removed, without those that only move data."""
    nodes = [NUMBER.sub("", source) for source in sources]
    steps = _steps(name)
    return [
        node
        for node in nodes
        if not MOVES.fullmatch(node) and (kind != GENERATED or STEP_OF.get(node.rpartition("/")[2], "") in steps)
    ]


def _steps(name: str) -> str:
    match = STEPS.match(name)
    return match[1] if match else ""


def _operation(node: str) -> str:
    return next((operation for pattern, operation in OPERATIONS if re.fullmatch(pattern, node)), UNKNOWN)


def _block(node: str) -> str:
    match = BLOCK.match(node)
    if match or node == "model/Slice":
        return match[0] if match and match[0] != STEM else "stem"
    return "head" if HEAD.fullmatch(node) else UNKNOWN
