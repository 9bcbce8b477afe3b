"""Where a graph normalises, pools and reduces: found by what its operators compute, never by their names.

Every exporter writes GRN and LayerNorm otherwise: as one operator, or as squares, sums, roots and quotients of any
order. What is recognised is a dataflow: which tensor is squared, over which axes it is summed, what divides what.
Identity, and a Cast from float to float, are looked through.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from cnx_deploy.exporters.graph_checks import LARGEST_EPSILON, REDUCTIONS

__all__ = ["KINDS", "Island", "IslandKind", "constant", "find_islands", "is_float", "source"]

IslandKind = Literal["GRN", "LayerNorm", "normalisation", "pool", "softmax", "not recognised"]
KINDS: tuple[IslandKind, ...] = ("GRN", "LayerNorm", "normalisation", "pool", "softmax", "not recognised")

KIND_OF_OPERATOR: Mapping[str, IslandKind] = {
    "LayerNormalization": "LayerNorm",
    **dict.fromkeys(
        ("GroupNormalization", "InstanceNormalization", "LpNormalization", "MeanVarianceNormalization",
         "RMSNormalization"),
        "normalisation",
    ),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalLpPool", "LpPool", "ReduceMean"), "pool"),
    **dict.fromkeys(("LogSoftmax", "Softmax"), "softmax"),
}  # fmt: skip
"""Operators that are one of the kinds by themselves. A ReduceMean that belongs to no norm averages positions."""

CARRIES_ON = REDUCTIONS | {
    "Abs", "Add", "Clip", "Div", "Exp", "Expand", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "ReduceMax",
    "ReduceMin", "Reshape", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that may hand on what only FP32 holds: a sum of squares, a cube."""
ENDS = frozenset({"Div", "Erf", "Sigmoid", "Tanh"})
"""Where such a value is small again: a quotient, a function that saturates."""

PRODUCTS_AFTER_RATIO = 3
"""How many products may lie between GRN's ratio and the tensor that it scales: by gamma, and by the tensor."""


@dataclass(frozen=True, slots=True)
class Island:
    """Operators that stay in FP32 together. `node` is the name that reports give it."""

    kind: IslandKind
    node: str
    members: tuple[ir.Node, ...]


def find_islands(model: ir.Model) -> tuple[Island, ...]:
    """Find what reduces, normalises or squares in FP32 tensors, in the order of the graph.

    The model carries inferred types and shapes, and its constants are initializers. Each operator of
    `graph_checks.REDUCTIONS`, each Pow and each square is in one island.
    """
    nodes = list(model.graph)
    place = {node: index for index, node in enumerate(nodes)}
    islands: list[Island] = []
    taken: set[ir.Node] = set()
    for kind, find in (("GRN", _response_norm), ("LayerNorm", _layer_norm)):
        for node in nodes:
            members = find(node)
            if members and not taken & members:
                taken |= members
                in_order = sorted(members, key=place.__getitem__)
                islands.append(Island(_kind_of_norm(kind, in_order), str(in_order[0].name), tuple(in_order)))
    rest = [node for node in nodes if node not in taken and _reduces(node)]
    kinds = {node: _kind_alone(node) for node in rest}
    # What is unknown takes along what its values reach, but no norm that is known; averages of positions come last.
    order: tuple[IslandKind, ...] = ("LayerNorm", "normalisation", "softmax", "not recognised", "pool")
    for node in sorted(rest, key=lambda node: (order.index(kinds[node]), place[node])):
        if node not in taken:
            members = _carried_on(node, taken) if kinds[node] == "not recognised" else {node}
            taken |= members
            islands.append(Island(kinds[node], str(node.name), tuple(sorted(members, key=place.__getitem__))))
    return tuple(sorted(islands, key=lambda island: place[island.members[0]]))


def is_float(value: ir.Value | None) -> bool:
    """Whether a tensor is FP32; the graph has no other float type once it is widened, but for FP64."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def source(value: ir.Value | None) -> ir.Value | None:
    """The tensor itself, behind Identity and Casts from float to float."""
    while value is not None and (node := value.producer()) is not None:
        is_cast = node.op_type == "Cast" and is_float(value) and is_float(node.inputs[0])
        if node.op_type != "Identity" and not is_cast:
            break
        value = node.inputs[0]
    return value


def applied_activation(output: ir.Value) -> str:
    """Softmax or Sigmoid where a prepared graph's output is one, whatever moves or casts it behind; else nothing."""
    value = source(output)
    while (node := _made_by(value, "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")) is not None:
        value = source(node.inputs[0])
    node = _made_by(value, "Softmax", "Sigmoid")
    return "" if node is None else node.op_type


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The values of a tensor that stands in the file; None for one that is computed or given."""
    found = source(value)
    return None if found is None or found.const_value is None else found.const_value.numpy()


def _scalar(value: ir.Value | None) -> float | None:
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The operator that computes a tensor, where it is one of those."""
    found = source(value)
    node = None if found is None else found.producer()
    return node if node is not None and node.op_type in operators else None


def _rank(value: ir.Value | None) -> int | None:
    found = source(value)
    return None if found is None or found.shape is None else len(found.shape)


def _axes(node: ir.Node) -> tuple[int, ...] | None:
    """The axes of a reduction that keeps them as size 1, from 0 up; None where they are not known."""
    attributes, rank = node.attributes, _rank(node.inputs[0])
    given = constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if given is None and "axes" in attributes:
        given = np.array(attributes["axes"].as_ints())
    if given is None or rank is None or not given.size:
        return None
    if "keepdims" in attributes and not attributes["keepdims"].as_int():
        return None
    return tuple(sorted(int(axis) % rank for axis in given.flatten()))


def _square(value: ir.Value | None) -> tuple[ir.Value, set[ir.Node]] | None:
    """What a tensor is the square of, and the operators in between: x·x, x**2 or |x|**2."""
    if (node := _made_by(value, "Mul")) is not None and source(node.inputs[0]) is source(node.inputs[1]):
        inner = source(node.inputs[0])
        return None if inner is None else (inner, {node})
    if (node := _made_by(value, "Pow")) is not None and _scalar(node.inputs[1]) == 2.0:
        absolute = _made_by(node.inputs[0], "Abs")
        inner = source(node.inputs[0] if absolute is None else absolute.inputs[0])
        return None if inner is None else (inner, {node} if absolute is None else {node, absolute})
    return None


def _without_epsilon(value: ir.Value | None) -> tuple[ir.Value | None, set[ir.Node]]:
    """The tensor to which a small constant is added, and the Add; or the tensor as it is."""
    if (node := _made_by(value, "Add")) is not None:
        for first, second in (node.inputs[:2], node.inputs[1::-1]):
            epsilon = _scalar(second)
            if epsilon is not None and 0.0 <= epsilon <= LARGEST_EPSILON:
                return source(first), {node}
    return source(value), set()


def _root(value: ir.Value | None) -> tuple[ir.Value | None, set[ir.Node]] | None:
    """What a tensor is the square root of: Sqrt, or Pow by a half."""
    if (node := _made_by(value, "Sqrt")) is not None:
        return node.inputs[0], {node}
    if (node := _made_by(value, "Pow")) is not None and _scalar(node.inputs[1]) == 0.5:
        return node.inputs[0], {node}
    return None


def _quotient(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None, set[ir.Node]] | None:
    """Numerator and denominator of a / b, a · (1 / b) or a · b**-1."""
    if node.op_type == "Div":
        return node.inputs[0], node.inputs[1], {node}
    if node.op_type == "Mul":
        for first, second in (node.inputs[:2], node.inputs[1::-1]):
            if (inverse := _made_by(second, "Reciprocal")) is not None:
                return first, inverse.inputs[0], {node, inverse}
            inverse = _made_by(second, "Pow")
            if inverse is not None and _scalar(inverse.inputs[1]) == -1.0:
                return first, inverse.inputs[0], {node, inverse}
    return None


def _norm(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...], set[ir.Node]] | None:
    """The tensor whose L2 norm this is, the axes it runs over, and the operators."""
    if (node := _made_by(value, "ReduceL2")) is not None:
        inner, axes = source(node.inputs[0]), _axes(node)
        return None if inner is None or axes is None else (inner, axes, {node})
    if (root := _root(value)) is None:
        return None
    inside, added = _without_epsilon(root[0])
    if (node := _made_by(inside, "ReduceSum", "ReduceSumSquare")) is None or (axes := _axes(node)) is None:
        return None
    if node.op_type == "ReduceSumSquare":
        inner = source(node.inputs[0])
        return None if inner is None else (inner, axes, {node, *root[1], *added})
    square = _square(node.inputs[0])
    return None if square is None else (square[0], axes, {node, *root[1], *added, *square[1]})


def _response_norm(node: ir.Node) -> set[ir.Node]:
    """The operators of GRN's ratio, of which `node` is the last: the norm over all positions, divided by its mean.

    Every axis but the batch is either a position or the one channel axis over which the mean runs, and the tensor
    whose norm it is has to be a factor of the result, before or after the division.
    """
    quotient = _quotient(node)
    if quotient is None:
        return set()
    numerator, denominator, members = quotient
    inside, added = _without_epsilon(denominator)
    mean = _made_by(inside, "ReduceMean")
    if mean is None or (channel := _axes(mean)) is None or (norm := _norm(mean.inputs[0])) is None:
        return set()
    normed, positions, operators = norm
    rank, response = _rank(normed), source(mean.inputs[0])
    if rank is None or len(channel) != 1 or sorted((*positions, *channel)) != list(range(1, rank)):
        return set()
    factors, products = _factors(numerator)
    later = set() if response in factors else _products_with(node.outputs[0], response)
    if not (response in factors or later) or not (
        normed in factors or _products_with(node.outputs[0], normed, shifted=True)
    ):
        return set()
    carrying = later | {product for product in products if response in _factors(product.outputs[0])[0]}
    return {*members, *added, mean, *operators, *carrying}


def _factors(value: ir.Value | None, depth: int = PRODUCTS_AFTER_RATIO) -> tuple[set[ir.Value], set[ir.Node]]:
    """Every tensor that a tensor is a product of, itself included, and the products."""
    found = source(value)
    if found is None:
        return set(), set()
    values, products = {found}, set()
    if depth and (node := _made_by(found, "Mul")) is not None:
        products.add(node)
        for operand in node.inputs:
            more = _factors(operand, depth - 1)
            values, products = values | more[0], products | more[1]
    return values, products


def _products_with(ratio: ir.Value, tensor: ir.Value | None, *, shifted: bool = False) -> set[ir.Node]:
    """The products behind a ratio up to the first that has the tensor as a factor; none where no product has it.

    `shifted`: a constant may be added on the way, as in x · (1 + gamma · ratio), which has GRN's residual in the gain.
    """
    products: set[ir.Node] = set()
    reached = {ratio}
    for _ in range(PRODUCTS_AFTER_RATIO):
        readers = {
            reader for value in reached for reader in _readers(value)
            if reader.op_type == "Mul"
            or (shifted and reader.op_type == "Add" and any(constant(given) is not None for given in reader.inputs))
        }  # fmt: skip
        products |= readers
        reached = {reader.outputs[0] for reader in readers}
        if any(tensor in _factors(value)[0] for value in reached):
            return products
    return set()


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """The operators that read a tensor, Identity and Casts from float to float looked through."""
    for use in value.uses():
        node = use.node
        if node.outputs and source(node.outputs[0]) is source(value):
            yield from _readers(node.outputs[0])
        else:
            yield node


def _layer_norm(node: ir.Node) -> set[ir.Node]:
    """The operators of a norm that is spelled out, of which `node` is the quotient; gain and shift are included.

    d = x - mean(x); d / sqrt(mean(d**2) + eps), all means over the same axes, which the batch is none of.
    """
    found = _deviation_by_spread(node)
    if found is None:
        return set()
    deviation, variance, members = found
    square = _square(variance.inputs[0])
    axes = _axes(variance)
    centred = [_centred(value, axes) for value in (deviation, square[0] if square is not None else None)]
    if square is None or axes is None or 0 in axes or centred[0] is None or centred[1] is None:
        return set()
    if centred[0][0] is not centred[1][0]:
        return set()
    affine: set[ir.Node] = set()
    last = node.outputs[0]
    for operator in ("Mul", "Add"):  # gain, then shift, by constants
        readers = list(_readers(last))
        takes_constant = any(constant(value) is not None for reader in readers for value in reader.inputs)
        if len(readers) == 1 and readers[0].op_type == operator and takes_constant:
            affine.add(readers[0])
            last = readers[0].outputs[0]
    return {*members, variance, *square[1], *centred[0][1], *centred[1][1], *affine}


def _deviation_by_spread(node: ir.Node) -> tuple[ir.Value | None, ir.Node, set[ir.Node]] | None:
    """The numerator, the variance's ReduceMean and the operators of d / sqrt(v + eps) or d · (v + eps)**-0.5."""
    candidates = []
    if (quotient := _quotient(node)) is not None and (root := _root(quotient[1])) is not None:
        candidates.append((quotient[0], root[0], quotient[2] | root[1]))
    if node.op_type == "Mul":
        for first, second in (node.inputs[:2], node.inputs[1::-1]):
            power = _made_by(second, "Pow")
            if power is not None and _scalar(power.inputs[1]) == -0.5:
                candidates.append((first, power.inputs[0], {node, power}))
    for deviation, spread, members in candidates:
        inside, added = _without_epsilon(spread)
        if (variance := _made_by(inside, "ReduceMean")) is not None:
            return deviation, variance, members | added
    return None


def _centred(value: ir.Value | None, axes: tuple[int, ...] | None) -> tuple[ir.Value, set[ir.Node]] | None:
    """The tensor from which its own mean over these axes is taken, and both operators."""
    if (node := _made_by(value, "Sub")) is None or (mean := _made_by(node.inputs[1], "ReduceMean")) is None:
        return None
    inner = source(node.inputs[0])
    if inner is None or source(mean.inputs[0]) is not inner or _axes(mean) != axes:
        return None
    return inner, {node, mean}


def _kind_of_norm(kind: str, members: Iterable[ir.Node]) -> IslandKind:
    """LayerNorm takes one axis, its channels; a norm over several is another (GroupNorm, InstanceNorm)."""
    if kind == "GRN":
        return "GRN"
    means = [_axes(node) for node in members if node.op_type == "ReduceMean"]
    return "LayerNorm" if all(axes is not None and len(axes) == 1 for axes in means) else "normalisation"


def _reduces(node: ir.Node) -> bool:
    """Whether `graph_checks.half_reductions` would name the operator if its tensors were half."""
    if not any(map(is_float, node.inputs)):
        return False
    squares = node.op_type == "Mul" and source(node.inputs[0]) is source(node.inputs[1])
    return node.op_type in REDUCTIONS or node.op_type in ("CumSum", "Pow") or squares


def _kind_alone(node: ir.Node) -> IslandKind:
    """The kind of an operator that belongs to no norm that is spelled out."""
    if node.op_type == "ReduceMean" and _square(node.inputs[0]) is not None:
        return "not recognised"  # the mean of squares of an RMSNorm, or of a variance that is written otherwise
    return KIND_OF_OPERATOR.get(node.op_type, "not recognised")


def _carried_on(node: ir.Node, taken: set[ir.Node]) -> set[ir.Node]:
    """An unknown reduction or power and what its values reach, up to the first operator that makes them small."""
    found, waiting = {node}, [] if node.op_type in ENDS else [node]
    while waiting:
        for reader in _readers(waiting.pop().outputs[0]):
            if reader in found | taken or reader.op_type not in CARRIES_ON | ENDS:
                continue
            found.add(reader)
            if reader.op_type not in ENDS:
                waiting.append(reader)
    return found
