"""An FP32 graph becomes FP16 but for its islands: weights and tensors half, Casts at the islands' borders.

Nothing else changes: operators, their names and their order, shapes and integers stay. Inputs and outputs keep FP32.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from cnx_deploy.core.errors import RefusedArtifactError
from cnx_deploy.exporters.graph_checks import load_model
from cnx_deploy.exporters.onnx import EXTERNAL_DATA_BYTES
from cnx_deploy.exporters.rescue.patterns import Island, constant, find_islands, is_float, source

__all__ = ["Conversion", "KeptNode", "convert", "prepared_model", "save_model"]

SHAPE_OPERATORS = frozenset({"Shape", "Size"})
MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile",
     "Transpose", "Unsqueeze"}
)  # fmt: skip
"""Operators that only move values: between two islands they join them, and of a constant they are one."""

TYPE_ATTRIBUTES = ("to", "dtype", "stash_type", "output_dtype")
"""Attributes that name an element type."""

ROUNDING_AT_MOST = 2e-3
"""Of a constant as a whole, in relative L2: FP16 rounds by at most 5e-4, unless values overflow or are subnormal."""


@dataclass(frozen=True, slots=True)
class KeptNode:
    """An operator outside the islands that stays in FP32, and why."""

    node: str
    operator: str
    reason: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did: islands, operators kept beside them, Casts added, weights that became zero.

    `dropped_casts`: Casts between float types that the file had, which the new ones replace.
    """

    islands: tuple[Island, ...]
    kept: tuple[KeptNode, ...]
    casts: int
    dropped_casts: int
    flushed_weights: int
    operators: Mapping[str, int] = field(default_factory=dict)


def prepared_model(path: Path) -> ir.Model:
    """Read a checked file in FP32: half tensors widened, constants as initializers, types and shapes inferred.

    Raises RefusedArtifactError where the type of a tensor cannot be inferred.
    """
    model = load_model(path)
    common.RemoveInitializersFromInputsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _widen(model)
    common.ShapeInferencePass()(model)
    unknown = [value.name for node in model.graph for value in node.outputs if value.name and value.dtype is None]
    if unknown:
        raise RefusedArtifactError(
            f"{path.name} is refused: the element type of {len(unknown)} tensors cannot be inferred, such as "
            f"{unknown[0]!r}. Export the model again."
        )
    return model


def convert(model: ir.Model, half: ir.DataType = ir.DataType.FLOAT16, *, keeps_islands: bool = True) -> Conversion:
    """Change a prepared model in place.

    Args:
        model: what `prepared_model` gave.
        half: the type of what is no island. FLOAT makes the twin, the same graph without the rounding.
        keeps_islands: False makes the naive file, whose norms are half too: the control, not to be used.
    """
    islands = find_islands(model)
    dropped = _drop_casts(model)
    wide = _Wide(model)
    if keeps_islands:
        for island in islands:
            wide.nodes.update(island.members)
        wide.keep_constants()
        wide.join_islands()
    retyping = _Retyping(model, half, wide.nodes)
    retyping.run()
    return Conversion(
        islands, tuple(wide.kept), retyping.casts, dropped, retyping.flushed,
        dict(sorted(Counter(node.op_type for node in model.graph).items())),
    )  # fmt: skip


def save_model(model: ir.Model, path: Path) -> None:
    """Write a model; weights beyond the limit of `exporters.onnx` go to a file beside it."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > EXTERNAL_DATA_BYTES:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:  # what lay outside the original would otherwise be looked for beside the new file
        ir.save(ir.external_data.load_to_model(model), path)


def _widen(model: ir.Model) -> None:
    """Make every FP16 tensor of a model FP32, wherever its type is written."""
    for value in _values(model):
        if value.dtype == ir.DataType.FLOAT16:
            value.dtype = ir.DataType.FLOAT
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT16:
            value.const_value = _retyped(value.const_value, ir.DataType.FLOAT)
    for node in model.graph:
        for name, attribute in node.attributes.items():
            if name in TYPE_ATTRIBUTES and attribute.value == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _retyped(attribute.as_tensor(), ir.DataType.FLOAT))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    graph = model.graph
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _retyped(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    with np.errstate(over="ignore"):  # what overflows has been looked for
        return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=tensor.name)


def _drop_casts(model: ir.Model) -> int:
    """Take out Casts from float to float, of which only the type differed before the file was widened."""
    count = 0
    for node in list(model.graph):
        if node.op_type == "Cast" and is_float(node.inputs[0]) and is_float(node.outputs[0]):
            output, given = node.outputs[0], node.inputs[0]
            assert given is not None
            is_output, name = output.is_graph_output(), output.name
            if is_output and (given.producer() is None or given.is_graph_output()):
                continue
            output.replace_all_uses_with(given, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            if is_output:
                given.name = name
            count += 1
    return count


class _Wide:
    """Which operators stay in FP32."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.nodes: set[ir.Node] = set()
        self.kept: list[KeptNode] = []
        self._data: set[ir.Value] = set(model.graph.inputs)
        constants = set(model.graph.initializers.values())
        for node in model.graph:
            given = {value for value in node.inputs if value is not None}
            if given & self._data and node.op_type not in SHAPE_OPERATORS:
                self._data.update(node.outputs)
            elif given <= constants and node.op_type in MOVES:
                constants.update(node.outputs)
            elif any(map(is_float, (*node.inputs, *node.outputs))):
                self.nodes.add(
                    node
                )  # shapes, positions, what is computed of weights alone: not a tensor of the network
            if any(is_float(value) for value in node.outputs) and not _takes_half(node, _opset(model)):
                self.nodes.add(node)
            if node.op_type == "Cast" and not is_float(node.inputs[0]) and is_float(node.outputs[0]):
                self.nodes.add(node)  # an integer above 65504 has no FP16

    def keep_constants(self) -> None:
        """Keep operators whose constants do not fit FP16, and name them."""
        unfit: dict[ir.Value, str] = {}
        for node in self.graph:
            if node in self.nodes:
                continue
            for value in node.inputs:
                if value is None or not is_float(value):
                    continue
                root = source(value)
                if root is None or (reason := unfit.get(root) or _misfit(root)) is None:
                    continue
                unfit[root] = reason
                if node.op_type in MOVES and node.outputs[0] not in self._data:
                    unfit[node.outputs[0]] = reason  # a constant that is moved: its reader is kept
                else:
                    self.kept.append(KeptNode(str(node.name), node.op_type, reason))
                self.nodes.add(node)
                break

    def join_islands(self) -> None:
        """Keep what only moves values between FP32 operators: half in between would round for nothing."""
        for node in self.graph:
            producers = [value.producer() for value in node.inputs if value is not None and is_float(value)]
            readers = [use.node for value in node.outputs for use in value.uses()]
            if node.op_type in MOVES and producers and readers and self.nodes.issuperset([*producers, *readers]):
                self.nodes.add(node)


class _Retyping:
    """The change itself: a type for each float tensor, and a Cast where a reader needs another one."""

    def __init__(self, model: ir.Model, half: ir.DataType, wide: set[ir.Node]) -> None:
        self.graph, self.half, self.wide, self.opset = model.graph, half, wide, _opset(model)
        self.casts = self.flushed = 0
        self._is_narrow: set[ir.Value] = set()
        self._versions: dict[tuple[ir.Value, bool], ir.Value] = {}
        self._names = {str(value.name) for value in _values(model)} | {str(node.name) for node in model.graph}

    def run(self) -> None:
        """Retype every operator, then the outputs of the graph, and drop what nobody reads any more."""
        for node in list(self.graph):
            keeps = node in self.wide
            if node.op_type == "Identity" and constant(node.inputs[0]) is not None:
                continue  # exporters share weights by it: its readers take the weight itself
            for index, value in enumerate(node.inputs):
                if value is not None and is_float(value):
                    narrow = not keeps and _input_takes_half(node, index, self.opset)
                    node.replace_input_with(index, self._as(value, narrow, node))
            for value in node.outputs:
                if is_float(value) and not keeps:
                    self._is_narrow.add(value)
            if node.op_type == "Cast" and not keeps and is_float(node.outputs[0]):
                node.attributes["to"] = ir.AttrInt64("to", int(self.half))
        for index, value in enumerate(self.graph.outputs):
            if value in self._is_narrow:
                self.graph.outputs[index] = self._output(value)
        for value in self._is_narrow:
            value.dtype = self.half
        self._sweep()

    def _as(self, value: ir.Value, narrow: bool, reader: ir.Node) -> ir.Value:
        """The tensor in the type that a reader takes: itself, a converted constant, or a Cast of it."""
        root = source(value)
        if root is not None and root.const_value is not None and not root.is_graph_input():
            return self._constant(root, narrow)
        if (value in self._is_narrow) == narrow:
            return value
        if (value, narrow) not in self._versions:
            name = self._fresh(f"{value.name}/{'half' if narrow else 'float'}")
            cast = self._cast(value, name, self.half if narrow else ir.DataType.FLOAT)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], cast)
            else:
                self.graph.insert_after(producer, cast)
            self._versions[value, narrow] = cast.outputs[0]
            if narrow:
                self._is_narrow.add(cast.outputs[0])
        return self._versions[value, narrow]

    def _constant(self, root: ir.Value, narrow: bool) -> ir.Value:
        assert root.const_value is not None
        if not narrow:
            return root
        if (root, True) not in self._versions:
            tensor = _retyped(root.const_value, self.half)
            before = root.const_value.numpy()
            self.flushed += int(np.count_nonzero((tensor.numpy() == 0) & (before != 0)))
            made = ir.Value(
                name=self._fresh(f"{root.name}/half"), shape=root.shape, type=ir.TensorType(self.half),
                const_value=tensor,
            )  # fmt: skip
            self.graph.register_initializer(made)
            self._versions[root, True] = made
        return self._versions[root, True]

    def _output(self, value: ir.Value) -> ir.Value:
        """The output of the graph in FP32 under its own name; what the network goes on with is called otherwise."""
        name = str(value.name)
        value.name = self._fresh(f"{name}/half")
        cast = self._cast(value, name, ir.DataType.FLOAT)
        self.graph.append(cast)
        return cast.outputs[0]

    def _cast(self, value: ir.Value, name: str, dtype: ir.DataType) -> ir.Node:
        self.casts += 1
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        attributes = [ir.AttrInt64("to", int(dtype))]
        return ir.Node("", "Cast", [value], attributes, outputs=[output], name=self._fresh(f"{name}/Cast"))

    def _fresh(self, name: str) -> str:
        """A name that no tensor and no operator has."""
        fresh = next(f"{name}{suffix}" for suffix in _suffixes() if f"{name}{suffix}" not in self._names)
        self._names.add(fresh)
        return fresh

    def _sweep(self) -> None:
        """Drop constants that only their half copy is read of, and what moved them; the copy takes the name."""
        for node in reversed(list(self.graph)):
            if node.op_type in ("Identity", "Cast") and not any(
                value.uses() or value.is_graph_output() for value in node.outputs
            ):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
                if (copy := self._versions.get((value, True))) is not None:
                    copy.name = name


def _suffixes() -> Iterator[str]:
    yield ""
    number = 2
    while True:
        yield f"_{number}"
        number += 1


def _opset(model: ir.Model) -> int:
    return int(model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1)))


def _misfit(value: ir.Value) -> str | None:
    """Why a constant has to stay in FP32; None where it is none, or FP16 holds it."""
    if value.const_value is None or value.is_graph_input():
        return None
    wide = value.const_value.numpy()
    with np.errstate(over="ignore"):
        error = np.abs(wide - wide.astype(np.float16).astype(np.float64))
    size = float(np.linalg.norm(wide.astype(np.float64)))
    if not np.isfinite(wide).all() or not size:
        return None
    if not np.isfinite(error).all():
        return f"{value.name} holds {float(np.abs(wide).max()):.3g}, beyond FP16's 65504"
    if (share := float(np.linalg.norm(error)) / size) > ROUNDING_AT_MOST:
        return f"{value.name} is too small for FP16: rounded it would be off by {share:.0%}"
    return None


@cache
def _half_inputs(operator: str, opset: int) -> tuple[tuple[bool, ...], bool, bool]:
    """Of an operator: which inputs take FP16, whether the last one stands for all that follow, and the outputs."""
    schema = onnx.defs.get_schema(operator, opset, "")
    allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}

    def takes(formal: Any) -> bool:
        return "tensor(float16)" in allowed.get(formal.type_str, [formal.type_str])

    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    repeats = bool(schema.inputs) and schema.inputs[-1].option == variadic
    return tuple(map(takes, schema.inputs)), repeats, all(map(takes, schema.outputs))


def _input_takes_half(node: ir.Node, index: int, opset: int) -> bool:
    inputs, repeats, _ = _half_inputs(node.op_type, opset)
    return inputs[min(index, len(inputs) - 1)] if repeats or index < len(inputs) else False


def _takes_half(node: ir.Node, opset: int) -> bool:
    """Whether an operator of this opset can give FP16."""
    return _half_inputs(node.op_type, opset)[2] or not any(map(is_float, node.outputs[:1]))
