"""An ONNX file as a list of operators to evaluate in order, every tensor under its own name."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.exporters.graph_checks import load_model
from cnx_deploy.runners.emulator.arithmetic import Inputs, Operator, wide
from cnx_deploy.runners.emulator.operators import OPERATORS

__all__ = ["Evaluation", "Graph"]

CONSTANT_TYPES = {
    "value": None, "value_float": torch.float32, "value_floats": torch.float32,
    "value_int": torch.int64, "value_ints": torch.int64,
}  # fmt: skip
"""Attributes of Constant that hold numbers -> their element type; a tensor has its own."""

WITHOUT_NUMPY_TYPE = {
    ir.DataType.BFLOAT16: (np.int16, torch.bfloat16),
    ir.DataType.FLOAT8E4M3FN: (np.uint8, torch.float8_e4m3fn),
    ir.DataType.FLOAT8E5M2: (np.uint8, torch.float8_e5m2),
}
"""Element types that torch has and numpy has not -> the integer of the same bits, and torch's type."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One operator: `inputs` and `outputs` are names, "" for an optional one that is absent."""

    name: str
    op_type: str
    operator: Operator
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def results(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the operator gives for `outputs`. Raises InputError that names the node where it cannot."""
        try:
            given = self.operator(inputs, self.attributes)
        except (InputError, RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(str(None if tensor is None else tuple(tensor.shape)) for tensor in inputs)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"Node {self.name}, a {self.op_type} of tensors of shape {shapes}, cannot be emulated: {reason}"
            ) from error
        results = (given,) if isinstance(given, Tensor) else given
        if len(results) < len(self.outputs):
            raise InputError(
                f"Node {self.name}, a {self.op_type}, has {len(self.outputs)} outputs, of which the emulator knows "
                f"{len(results)}. Run it in ONNX Runtime."
            )
        return results[: len(self.outputs)]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one pass gave: outputs and asked-for tensors by name, and the first node whose result is not finite."""

    tensors: dict[str, Tensor]
    first_nonfinite: str | None


class Graph:
    """An ONNX graph in memory, ready to be evaluated.

    Raises CorruptArtifactError for a file that is no ONNX model, InputError for one with operators beyond
    `operators.OPERATORS`.
    """

    def __init__(self, path: Path) -> None:
        model = load_model(path)
        self.metadata = dict(model.metadata_props)
        self.constants = {
            str(name): _tensor(value.const_value)
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        }
        # Before IR version 4, initializers are listed among the inputs.
        self.inputs = tuple(value for value in model.graph.inputs if value.name not in self.constants)
        self.input = (self.inputs or tuple(model.graph.inputs))[0]
        self.outputs = tuple(str(value.name) for value in model.graph.outputs)
        self.steps = tuple(_steps(model, self.constants, path))
        self._readers = Counter(name for step in self.steps for name in step.inputs if name)

    def evaluate(self, images: Tensor | Mapping[str, Tensor], keep: Collection[str] = ()) -> Evaluation:
        """Run every operator; `keep` names tensors to return beside the outputs.

        Args:
            images: the tensor of the first input, or tensors by the names of all inputs.
            keep: names of tensors between the operators.
        """
        given = dict(images) if isinstance(images, Mapping) else {str(self.input.name): images}
        if missing := {str(value.name) for value in self.inputs} - given.keys():
            raise InputError(
                f"The graph has inputs {', '.join(sorted(missing))}, and no tensor was given for them; expected one "
                "for each of its inputs, by name."
            )
        wanted, waiting = {*self.outputs, *keep}, Counter(self._readers)
        tensors: dict[str, Tensor] = {**self.constants, **given}
        first_nonfinite = None
        for step in self.steps:
            results = step.results([tensors[name] if name else None for name in step.inputs])
            for name, result in zip(step.outputs, results, strict=True):
                if name in wanted or waiting[name]:
                    tensors[name] = result
                if first_nonfinite is None and result.is_floating_point() and not wide(result).isfinite().all():
                    first_nonfinite = step.name
            for name in step.inputs:
                waiting[name] -= 1
                if not waiting[name] and name not in wanted and name not in self.constants:
                    del tensors[name]
        return Evaluation({name: tensors[name] for name in wanted}, first_nonfinite)

    def node_of(self, tensor: str) -> str:
        """The name of the node that makes a tensor. Raises InputError for one that no node makes."""
        found = next((step.name for step in self.steps if tensor in step.outputs), None)
        if found is None:
            raise InputError(
                f"No operator of the graph makes a tensor called {tensor!r}; expected the name of an operator's output."
            )
        return found


def _steps(model: ir.Model, constants: dict[str, Tensor], path: Path) -> Iterator[_Step]:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
    for node in model.graph:
        attributes = {name: _value(attribute) for name, attribute in node.attributes.items()}
        name, outputs = str(node.name), tuple(str(value.name or "") for value in node.outputs)
        if node.op_type == "Constant" and attributes.keys() & CONSTANT_TYPES.keys():
            ((form, value),) = attributes.items()
            constants[outputs[0]] = torch.as_tensor(value, dtype=CONSTANT_TYPES[form])
            continue
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            raise InputError(
                f"{path}: node {name} is a {node.domain or 'ai.onnx'}.{node.op_type} with {len(node.outputs)} outputs, "
                f"which the emulator does not know. Run it in ONNX Runtime; known are {', '.join(sorted(OPERATORS))}."
            )
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError as error:
            raise InputError(
                f"{path}: node {name} is a {node.op_type}, which opset {opset} has not. Export it again."
            ) from error
        defaults = {
            key: onnx.helper.get_attribute_value(attribute.default_value)
            for key, attribute in schema.attributes.items()
            if attribute.default_value.type
        }
        defaults = {key: value.decode() if isinstance(value, bytes) else value for key, value in defaults.items()}
        if unknown := attributes.keys() - schema.attributes.keys():
            raise InputError(
                f"{path}: node {name}, a {node.op_type}, has attributes {', '.join(sorted(unknown))}, which opset "
                f"{opset} does not know. Export it again."
            )
        given = {**defaults, **attributes, "since_version": schema.since_version, "outputs": len(outputs)}
        inputs = tuple("" if value is None else str(value.name) for value in node.inputs)
        yield _Step(name or outputs[0], node.op_type, OPERATORS[node.op_type], inputs, outputs, given)


def _value(attribute: ir.Attr) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        return _tensor(attribute.value)
    return list(attribute.value) if attribute.type.name.endswith("S") else attribute.value


def _tensor(value: ir.TensorProtocol) -> Tensor:
    """A constant as a torch tensor of the same type."""
    array = np.array(value.numpy())  # a copy: the file may be mapped
    if value.dtype in WITHOUT_NUMPY_TYPE:
        bits, dtype = WITHOUT_NUMPY_TYPE[value.dtype]
        return torch.from_numpy(array.view(bits)).view(dtype)
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise InputError(
            f"The constant {value.name} has the element type {value.dtype.name}, which cannot be emulated. Run it in "
            "ONNX Runtime."
        ) from error
