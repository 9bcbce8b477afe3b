"""What a written ONNX file must satisfy before anything is built from it.

`check_graph` holds for every file: ONNX's own full check, standard operators only, named inputs and outputs, and no
reduction in FP16. `check_export` adds what an export of this network promises: opset, operator counts, symbolic batch.

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

from cnx_deploy.errors import CorruptArtifactError, GraphCheckError
from cnx_deploy.model.layers import EPS
from cnx_deploy.variants import Variant

__all__ = ["GraphFacts", "check_export", "check_graph", "half_reductions", "opset_for"]

OPSET = 20
"""Lowest opset with one Gelu operator, which ONNX Runtime and TensorRT fuse; exported files use it."""

BF16_OPSET = 22
"""Lowest opset whose Conv takes BF16."""

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
LARGEST_EPSILON = 1e-3
SUBGRAPHS = frozenset({onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS})
HALVES = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})

EXPORT_IT = "Export the network with cnx-deploy export, or write these otherwise:"
CHECK_VERSIONS = "Use the versions that constraints.txt names; found were:"


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


def opset_for(precision: str) -> int:
    """The opset that a file of this precision is exported with."""
    return BF16_OPSET if precision == "bf16" else OPSET


def check_graph(path: Path) -> GraphFacts:
    """Check any ONNX file and return what is in it.

    Raises CorruptArtifactError when it is not valid ONNX, GraphCheckError when it breaks a rule; all broken rules are
    listed at once.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = _load_with_types(path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, DecodeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CorruptArtifactError(f"{path} is not a valid ONNX file ({reason}). Export it again.") from error
    problems = [*_foreign_operators(model), *half_reductions(model)]
    if problems:
        raise GraphCheckError("\n  ".join([f"{path.name} breaks the rules for an engine. {EXPORT_IT}", *problems]))
    return _facts(model)


def check_export(
    path: Path,
    *,
    variant: Variant,
    layout: str,
    batch: tuple[int, int, int],
    opset: int = OPSET,
    leave_out: Collection[str] = (),
    norm_on_patches: bool = False,
) -> GraphFacts:
    """Check a file that `onnx_export` wrote, on top of `check_graph`.

    One Gelu a block and, but in V1, one GRN statistic (a pool in the "cpu" layout, else a sum); each of the network's
    norms one LayerNormalization, or, in the "gpu" layout, spelled out over the channel axis for the four channels-first
    ones; opset as written; batch axis named. `leave_out`: folds that the export was to leave out; `norm_on_patches`:
    the stem's norm is a sum over the patches' channels.
    """
    facts = check_graph(path)
    blocks = variant.block_count
    token_norms = blocks + 1
    statistic = "AveragePool" if layout == "cpu" and "blocked" not in leave_out else "ReduceSum"
    responses = blocks if variant.version == 2 else 0
    sums = responses + norm_on_patches
    expected = {"Gelu": blocks, statistic: sums, "LayerNormalization": token_norms + (0 if layout == "gpu" else 4)}
    problems = [
        f"{count} {operator} expected, {facts.operators.get(operator, 0)} found"
        for operator, count in expected.items()
        if facts.operators.get(operator, 0) != count
    ]
    problems.extend(_wrong_constants(facts, norms=responses + token_norms + 4))
    if facts.opset != opset:
        problems.append(f"opset {opset} expected, {facts.opset} written")
    dynamic = batch[0] != batch[2]
    for kind, tensors, name in (("input", facts.inputs, "images"), ("output", facts.outputs, "logits")):
        if list(tensors) != [name]:
            problems.append(f"one {kind} {name!r} expected, found {list(tensors)}")
        elif tensors[name][1][0] != ("batch" if dynamic else batch[0]):
            problems.append(
                f"first axis of {name} is {tensors[name][1][0]!r}, not {'batch' if dynamic else batch[0]!r}"
            )
    if problems:
        raise GraphCheckError(
            "\n  ".join([f"{path.name} is not the graph that was asked for. {CHECK_VERSIONS}", *problems])
        )
    return facts


def _wrong_constants(facts: GraphFacts, norms: int) -> Iterator[str]:
    """What no comparison of logits shows: GELU's form, and an epsilon where the statistics are of the order of one.

    An average pool takes the mean square where GRN takes the sum, so there eps is divided by the side of the map.
    """
    if facts.gelu_forms - {"none"}:
        yield f"Gelu by erf expected, {sorted(facts.gelu_forms)} found"
    side = max((size for _, shape in facts.inputs.values() for size in shape[1:] if isinstance(size, int)), default=0)
    right = [EPS, *(EPS / max(1, side // (4 << stage)) for stage in range(4))]
    wrong = [found for found in facts.epsilons if not any(math.isclose(found, each, rel_tol=1e-4) for each in right)]
    if wrong:
        yield f"every epsilon is {EPS:g}, found {', '.join(f'{value:g}' for value in sorted(set(wrong)))}"
    if len(facts.epsilons) != norms:
        yield f"{norms} epsilons expected, one a norm and a GRN, {len(facts.epsilons)} found"


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


def _load_with_types(path: Path) -> onnx.ModelProto:
    """The graph with inferred types and without the weights that lie in external files."""
    model = onnx.load(str(path), load_external_data=False)
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def _foreign_operators(model: onnx.ModelProto) -> Iterator[str]:
    domains = {entry.domain for entry in model.opset_import} - {"", "ai.onnx"}
    if domains:
        yield f"operator domains {sorted(domains)} are not standard ONNX"
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            yield f"{node.name}: {node.domain}::{node.op_type} is not a standard operator"
        if any(attribute.type in SUBGRAPHS for attribute in node.attribute):
            yield f"{node.name}: {node.op_type} holds a graph of its own, which these checks do not look into"
    if model.functions:
        yield f"{len(model.functions)} local functions; expected none"


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
        opset=next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        types=dict(sorted(outputs.items())),
        inputs={value.name: _tensor_spec(value) for value in model.graph.input},
        outputs={value.name: _tensor_spec(value) for value in model.graph.output},
        metadata={entry.key: entry.value for entry in model.metadata_props},
        epsilons=tuple(_epsilons(model)),
        gelu_forms=frozenset(
            next((entry.s.decode() for entry in node.attribute if entry.name == "approximate"), "none")
            for node in model.graph.node
            if node.op_type == "Gelu"
        ),
    )


def _epsilons(model: onnx.ModelProto) -> Iterator[float]:
    scalars = {
        tensor.name: float(onnx.numpy_helper.to_array(tensor).reshape(()))
        for tensor in model.graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) == 1
    }
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            yield next((entry.f for entry in node.attribute if entry.name == "epsilon"), 1e-5)
        elif node.op_type == "Add":
            yield from (scalars[name] for name in node.input if 0.0 < scalars.get(name, 0.0) < LARGEST_EPSILON)


def _tensor_spec(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return onnx.TensorProto.DataType.Name(tensor.elem_type), shape
