"""What a kernel computes and where in the network, from the ONNX nodes that the compiler says it came from.

Nodes are named `<torch module>/<operator>` (`onnx_export`). What the tables below do not know is "other", as every node
of a foreign graph is.
"""

import re
from collections.abc import Sequence

__all__ = ["LAYOUT", "UNKNOWN", "block_of", "operation_of", "stage_of"]

UNKNOWN = "other"
LAYOUT = "cast/layout"

# Node -> operation, the first that fits; in the order of the network, which is the order names are joined in.
OPERATIONS = (
    (r"(model/Mul|normalise/\w+)", "input scale"),
    (r"downsample_layers\.0\.0/Conv", "stem conv"),
    (r"downsample_layers\.0\.\d+/\w+", "stem norm"),
    (r"stages\.\d+\.\d+\.dwconv/Conv", "dwconv"),
    (r"stages\.\d+\.\d+\.norm/\w+", "norm"),
    (r"stages\.\d+\.\d+\.pwconv1/(MatMul|Gemm|Conv)", "pwconv1"),
    (r"stages\.\d+\.\d+\.pwconv1/Add", "pwconv1 bias"),
    (r"stages\.\d+\.\d+\.act/\w+", "gelu"),
    (r"stages\.\d+\.\d+\.grn/(Reduce\w+|AveragePool|Sqrt)", "grn statistic"),
    (r"stages\.\d+\.\d+(\.grn/(Reciprocal|Div|Mul|Add)|\.grn\.affine/Conv|\.pwconv2/Mul|/Mul)", "gain"),
    (r"stages\.\d+\.\d+\.pwconv2/(MatMul|Gemm|Conv)", "pwconv2"),
    (r"stages\.\d+\.\d+\.pwconv2/Add", "pwconv2 bias"),
    (r"stages\.\d+\.\d+/Add", "residual"),
    (r"downsample_layers\.\d+\.\d+/Conv", "downsample conv"),
    (r"downsample_layers\.\d+\.\d+/\w+", "downsample norm"),
    (r"model/ReduceMean", "pool"),
    (r"norm/\w+", "head norm"),
    (r"head/\w+", "head"),
)
ORDER = tuple(operation for _, operation in OPERATIONS)
BIAS = " bias"

STEM = "downsample_layers.0"
BLOCK = re.compile(r"(downsample_layers\.\d+|stages\.\d+\.\d+)\b")
HEAD = re.compile(r"(norm|head)/.+|model/ReduceMean")
MOVES = re.compile(r".+/(Cast|Transpose|Reshape|Squeeze|Unsqueeze|Flatten|Concat|Pad)")
NUMBER = re.compile(r"_\d+$")

# A generated kernel ("kgen") is named after its steps, as in __myl_CastMulReshSum_myl0_6. Where a node's step is not
# among them it only pads a convolution's input or reads a GELU's result, although the node is listed as a source.
GENERATED = "kgen"
STEPS = re.compile(r"__myl_(\w+?)_myl\d+_\d+$")
STEP_OF = {"Conv": "Conv", "MatMul": "Fc", "Gemm": "Fc", "Gelu": "Erf"}
MOVING_STEPS = re.compile(r"(Cast|Conc|Move|Pad|Resh|Slic|Tran)+")


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
    if match:
        return "stem" if match[0] == STEM else match[0]
    return "head" if HEAD.fullmatch(node) else UNKNOWN
