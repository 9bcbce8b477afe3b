"""An ONNX file as a list of operators to evaluate in order, every tensor under its own name."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.exporters.graph_checks import load_model
from cnx_deploy.runners.emulator.operators import OPERATORS, Operator

__all__ = ["Evaluation", "Graph"]


@dataclass(frozen=True, slots=True)
class _Step:
    """One operator: `inputs` are names, "" for an optional one that is absent."""

    name: str
    operator: Operator
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]


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
        self.input = model.graph.inputs[0]
        self.outputs = tuple(str(value.name) for value in model.graph.outputs)
        self.constants = {
            str(name): _tensor(value.const_value)
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        }
        self.steps = tuple(_steps(model, self.constants, path))
        self._readers = Counter(name for step in self.steps for name in step.inputs)

    def evaluate(self, images: Tensor, keep: Collection[str] = ()) -> Evaluation:
        """Run every operator on `images`; `keep` names tensors to return beside the outputs."""
        wanted, waiting = {*self.outputs, *keep}, Counter(self._readers)
        tensors: dict[str, Tensor] = {**self.constants, str(self.input.name): images}
        first_nonfinite = None
        for step in self.steps:
            result = step.operator([tensors[name] if name else None for name in step.inputs], step.attributes)
            tensors[step.output] = result
            if first_nonfinite is None and result.is_floating_point() and not bool(torch.isfinite(result).all()):
                first_nonfinite = step.name
            for name in step.inputs:
                waiting[name] -= 1
                if not waiting[name] and name not in wanted and name not in self.constants:
                    del tensors[name]
        return Evaluation({name: tensors[name] for name in wanted}, first_nonfinite)

    def node_of(self, tensor: str) -> str:
        """The name of the node that makes a tensor. Raises InputError for one that no node makes."""
        found = next((step.name for step in self.steps if step.output == tensor), None)
        if found is None:
            raise InputError(
                f"No operator of the graph makes a tensor called {tensor!r}; expected the name of an operator's output."
            )
        return found


def _steps(model: ir.Model, constants: dict[str, Tensor], path: Path) -> Iterator[_Step]:
    for node in model.graph:
        attributes = {name: _value(attribute) for name, attribute in node.attributes.items()}
        name, output = str(node.name), str(node.outputs[0].name)
        if node.op_type == "Constant" and "value" in attributes:
            constants[output] = _tensor(attributes["value"])
            continue
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS or len(node.outputs) != 1:
            raise InputError(
                f"{path}: node {name} is a {node.domain or 'ai.onnx'}.{node.op_type} with {len(node.outputs)} outputs, "
                f"which the emulator does not know. Run it in ONNX Runtime; known are {', '.join(sorted(OPERATORS))}."
            )
        inputs = tuple("" if value is None else str(value.name) for value in node.inputs)
        yield _Step(name, OPERATORS[node.op_type], inputs, output, attributes)


def _value(attribute: ir.Attr) -> Any:
    return list(attribute.value) if attribute.type.name.endswith("S") else attribute.value


def _tensor(value: ir.TensorProtocol) -> Tensor:
    """A constant as a torch tensor of the same type, BF16 included, which numpy has no type for."""
    array = np.array(value.numpy())  # a copy: the file may be mapped
    if value.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
