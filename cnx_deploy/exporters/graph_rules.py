"""What any ONNX file must satisfy before it is compiled or run: limits, standard operators, no reduction in FP16.

Limits and outside data are looked at in the bytes (`onnx_wire`, `onnx_external`) before a parser sees them; then ONNX's
own full check runs. This module loads neither torch nor ONNX Runtime: a child that starts with it is ready at once.

The FP16 rule is static because a CPU cannot show the fault: ONNX Runtime's CPU provider computes FP16 graphs in FP32
and hides every overflow (microsoft/onnxruntime issue 11831).
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from cnx_deploy.core.errors import CorruptArtifactError, GraphCheckError, RefusedArtifactError
from cnx_deploy.exporters.onnx_external import check_tensors
from cnx_deploy.exporters.onnx_wire import scan_onnx

__all__ = ["GraphFacts", "check_graph", "half_reductions"]

REDUCTIONS = frozenset(
    {
        "AveragePool",
        "GlobalAveragePool",
        "GlobalLpPool",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LogSoftmax",
        "LpNormalization",
        "LpPool",
        "MeanVarianceNormalization",
        "RMSNormalization",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Softmax",
    }
)
OTHER_OPERATORS = """
Abs Add And ArgMax ArgMin BatchNormalization Cast CastLike Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose
CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand Flatten Floor
Gather GatherElements GatherND Gelu Gemm GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish Identity LeakyRelu
Less LessOrEqual Log MatMul MatMulInteger Max MaxPool Mean Min Mish Mod Mul Neg Not Or PRelu Pad Pow QLinearConv
QLinearMatMul QuantizeLinear Range Reciprocal ReduceMax ReduceMin Relu Reshape Resize Round ScatterND Selu Shape Sigmoid
Sign Size Slice Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tanh Tile TopK Transpose Trilu Unsqueeze Upsample
Where Xor
"""
OPERATORS = REDUCTIONS | frozenset(OTHER_OPERATORS.split())
"""Of tensors of numbers, without graphs of their own, text, pictures or chance: what exporters write of classifiers."""

FIRST_OPSET = 7
"""The first whose operators broadcast as today; ONNX Runtime and TensorRT promise nothing for earlier ones."""

LARGEST_VALUE = 1 << 32
"""Elements of one value in the graph; huge at 512 px has 2.3e7 an image, or 1.5e9 with a fixed batch of 64."""

LARGEST_EPSILON = 1e-3
SUBGRAPHS = frozenset({onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS})
HALVES = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})
STANDARD = frozenset({"", "ai.onnx"})
LISTED_AT_MOST = 20

EXPORT_IT = "Export the network with cnx-deploy export, or write these otherwise:"


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """What a graph consists of. `types` counts node outputs by element type, `operators` nodes by operator.

    `epsilons` are those of its norms: LayerNormalization's attribute, and any constant below 1e-3 that is added.
    """

    opset: int
    operators: Mapping[str, int]
    types: Mapping[str, int]
    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    metadata: Mapping[str, str]
    epsilons: tuple[float, ...]
    gelu_forms: frozenset[str]

    @property
    def half_share(self) -> float:
        """Share of FP16 and BF16 among the floating-point node outputs."""
        floating = {name: count for name, count in self.types.items() if name in ("FLOAT", "FLOAT16", "BFLOAT16")}
        return 1.0 - floating.get("FLOAT", 0) / max(1, sum(floating.values())) if floating else 0.0


def check_graph(path: Path, listed: Collection[str] | None = None) -> GraphFacts:
    """Check any ONNX file and return what is in it. `listed`: the files that its manifest names, none else is read.

    Raises RefusedArtifactError for what is beyond the limits, lies outside its folder or is no standard operator,
    CorruptArtifactError when it is not valid ONNX, GraphCheckError when it reduces in half; all broken rules are listed
    at once.
    """
    found = scan_onnx(path)
    if not found.messages["Graph"]:
        raise CorruptArtifactError(
            f"{path} is not a valid ONNX file: it holds no graph, expected one. Export it again."
        )
    check_tensors(path, found, listed=listed)
    try:
        model = onnx.load(str(path), load_external_data=False)
        if problems := list(_foreign_parts(model)):
            raise RefusedArtifactError(_listed(f"{path.name} is refused. {EXPORT_IT}", problems))
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, DecodeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["it cannot be parsed"])[0]
        raise CorruptArtifactError(f"{path} is not a valid ONNX file ({reason}). Export it again.") from error
    if problems := list(_large_values(model)):
        raise RefusedArtifactError(_listed(f"{path.name} is refused. {EXPORT_IT}", problems))
    if problems := list(half_reductions(model)):
        raise GraphCheckError(_listed(f"{path.name} breaks the rules for an engine. {EXPORT_IT}", problems))
    return _facts(model)


def half_reductions(model: onnx.ModelProto) -> Iterator[str]:
    """Name every node that reduces, normalises or squares in FP16 or BF16; the model must carry inferred types.

    A sum of squares over 56×56 positions leaves the FP16 range once the RMS passes 4.6, and a square itself once
    the value passes 256. Matrix products and convolutions are not meant: TensorRT accumulates them in FP32.
    """
    types = _element_types(model)
    for node in model.graph.node:
        halves = [name for name in node.input if types.get(name) in HALVES]
        if not halves:
            continue
        squares = node.op_type == "Mul" and node.input[0] == node.input[1]
        if node.op_type in REDUCTIONS or squares or node.op_type == "Pow":
            kind = onnx.TensorProto.DataType.Name(types[halves[0]])
            yield (
                f"{node.name or node.output[0]}: {node.op_type} computed in {kind}; "
                "its sum of squares can overflow. Cast its input to FLOAT"
            )


def _foreign_parts(model: onnx.ModelProto) -> Iterator[str]:
    """What is no plain graph of standard operators on tensors."""
    opsets = [entry.version for entry in model.opset_import if entry.domain in STANDARD]
    newest = onnx.defs.onnx_opset_version()
    if len(opsets) != 1 or not FIRST_OPSET <= opsets[0] <= newest:
        yield f"opset {opsets or 'missing'}; expected one from {FIRST_OPSET} to {newest}"
    if domains := {entry.domain for entry in model.opset_import} - STANDARD:
        yield f"operator domains {sorted(domains)} are not standard ONNX"
    for node in model.graph.node:
        name = node.name or (node.output[0] if node.output else "a node without a name")
        if node.domain not in STANDARD:
            yield f"{name}: {node.domain}::{node.op_type} is not a standard operator"
        elif any(attribute.type in SUBGRAPHS for attribute in node.attribute):
            yield f"{name}: {node.op_type} holds a graph of its own, which these checks do not look into"
        elif node.op_type not in OPERATORS:
            yield f"{name}: {node.op_type} is no operator of image classifiers"
        if any(attribute.HasField("sparse_tensor") or attribute.sparse_tensors for attribute in node.attribute):
            yield f"{name}: {node.op_type} holds a sparse tensor"
    if model.graph.sparse_initializer:
        yield f"{len(model.graph.sparse_initializer)} sparse tensors; expected none"
    if model.functions:
        yield f"{len(model.functions)} local functions; expected none"
    if model.training_info:
        yield "graphs for training; expected none"


def _large_values(model: onnx.ModelProto) -> Iterator[str]:
    """Values whose known sizes alone make them larger than any of this network's."""
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim if axis.HasField("dim_value")]
        if math.prod(sizes) > LARGEST_VALUE:
            yield f"{value.name}: {math.prod(sizes):,} elements, where at most {LARGEST_VALUE:,} are expected"


def _listed(title: str, problems: list[str]) -> str:
    more = [f"and {len(problems) - LISTED_AT_MOST} more"] if len(problems) > LISTED_AT_MOST else []
    return "\n  ".join([title, *problems[:LISTED_AT_MOST], *more])


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    return types


def _facts(model: onnx.ModelProto) -> GraphFacts:
    types = _element_types(model)
    name_of = onnx.TensorProto.DataType.Name
    outputs = Counter(name_of(types[name]) for node in model.graph.node for name in node.output if name in types)
    return GraphFacts(
        opset=next(entry.version for entry in model.opset_import if entry.domain in STANDARD),
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        types=dict(sorted(outputs.items())),
        inputs={value.name: _tensor_spec(value) for value in model.graph.input},
        outputs={value.name: _tensor_spec(value) for value in model.graph.output},
        metadata={entry.key: entry.value for entry in model.metadata_props},
        epsilons=tuple(_epsilons(model)),
        gelu_forms=frozenset(
            next((entry.s.decode(errors="replace") for entry in node.attribute if entry.name == "approximate"), "none")
            for node in model.graph.node
            if node.op_type == "Gelu"
        ),
    )


def _epsilons(model: onnx.ModelProto) -> Iterator[float]:
    scalars = {
        tensor.name: float(onnx.numpy_helper.to_array(tensor).reshape(()))
        for tensor in model.graph.initializer
        if _is_float(tensor) and tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) == 1
    }
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            yield next((entry.f for entry in node.attribute if entry.name == "epsilon"), 1e-5)
        elif node.op_type == "Add":
            yield from (scalars[name] for name in node.input if 0.0 < scalars.get(name, 0.0) < LARGEST_EPSILON)


def _is_float(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, *HALVES)


def _tensor_spec(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return onnx.TensorProto.DataType.Name(tensor.elem_type), shape
