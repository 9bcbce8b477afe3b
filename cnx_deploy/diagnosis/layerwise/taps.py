"""Which tensor of an ONNX file is the output of which torch module, and a copy of the file that gives them all.

Nodes are named `<torch module>/<operator>` (`onnx_export`), so a module's output is the last tensor that nodes in its
scope make and that something outside the scope reads.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import Tensor, nn

from cnx_deploy.core.errors import InputError
from cnx_deploy.exporters.graph_checks import load_model

__all__ = ["LOGITS", "Tap", "Taps", "canonical", "module_names", "tapped_copy", "taps_in_file"]

LOGITS = "logits"
"""Name of the tap at the network's end, in torch the output of the module that holds all others."""

WHOLE = "model"
"""Scope of the nodes that belong to no module but the whole network."""


@dataclass(frozen=True, slots=True)
class Tap:
    """A torch module of the deploy form and the tensor of the file that is its output."""

    module: str
    tensor: str
    node: str


@dataclass(frozen=True, slots=True)
class Taps:
    """The taps of a file in the order in which their tensors are made, and why a module has none, by its name."""

    found: tuple[Tap, ...]
    missing: dict[str, str]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors to read, each once: a module that ends with its last part shares a tensor with it."""
        return tuple(dict.fromkeys(tap.tensor for tap in self.found))


def module_names(module: nn.Module) -> tuple[str, ...]:
    """The modules of a deploy form that compute something, by name; `LOGITS` stands for the whole.

    Lists and sequences only hold others, the last of which has their output.
    """
    holders = (nn.ModuleList, nn.Sequential)
    return tuple(name or LOGITS for name, part in module.named_modules() if not isinstance(part, holders))


def taps_in_file(path: Path, modules: Sequence[str]) -> Taps:
    """Find each module's output in an ONNX file.

    A module without one is in `missing`, and so is a scope of the file that is none of `modules`. Raises
    CorruptArtifactError for a file that is no ONNX model, InputError for one whose nodes are not named after them.
    """
    graph = load_model(path).graph
    outputs = {str(value.name) for value in graph.outputs}
    nodes = [_Node.of(node, outputs) for node in graph]
    scopes = {node.scope for node in nodes} - {WHOLE}
    found: dict[str, tuple[int, Tap]] = {}
    missing = dict.fromkeys(sorted(scopes - {*modules}), "named in the file, but no module of the deploy form")
    for module in modules:
        inside = [(at, node) for at, node in enumerate(nodes) if module == LOGITS or node.is_in(module)]
        read = [
            (at, node) for at, node in inside if (LOGITS in node.readers if module == LOGITS else node.leaves(module))
        ]
        if read:
            at, node = read[-1]
            found[module] = at, Tap(module, node.tensor, node.name)
        else:
            missing[module] = "nothing outside reads what its nodes make" if inside else "no node is named after it"
    if not found.keys() - {LOGITS}:
        raise InputError(
            f"{path} names none of the network's {len(modules)} modules in its nodes; the first node is called "
            f"{nodes[0].name if nodes else 'nothing'!r}. Layers can be compared of files that cnx-deploy export wrote."
        )
    # A part before the whole that ends with it: the fault is named where it is.
    order = sorted(found.values(), key=lambda entry: (entry[0], entry[1].module == LOGITS, -entry[1].module.count(".")))
    return Taps(tuple(tap for _, tap in order), missing)


@contextlib.contextmanager
def tapped_copy(path: Path, tensors: Sequence[str]) -> Iterator[Path]:
    """A copy of an ONNX file in a temporary folder with `tensors` as further outputs; the file itself is only read."""
    model = load_model(path)
    present = {value.name for value in model.graph.outputs}
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in tensors if name not in present)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        ir.save(model, copy, external_data=f"{path.name}.data")
        yield copy


def canonical(output: Tensor) -> Tensor:
    """A module's output as (N, positions, channels), whichever layout it is in.

    Shape: tokens (N, HW, C) stay, images (N, C, H, W) are flattened and permuted, (N, C) gets one position.
    """
    if output.ndim == 4:
        return output.permute(0, 2, 3, 1).flatten(1, 2)
    return output.unsqueeze(1) if output.ndim == 2 else output


@dataclass(frozen=True, slots=True)
class _Node:
    """A node of the graph: its scope, the tensor it makes, and the scopes that read it (`LOGITS` for an output)."""

    name: str
    scope: str
    tensor: str
    readers: frozenset[str]

    @classmethod
    def of(cls, node: ir.Node, outputs: set[str]) -> "_Node":
        name, tensor = str(node.name), str(node.outputs[0].name)
        readers = {str(user.name).rpartition("/")[0] for user in node.outputs[0].consumers()}
        return cls(
            name, name.rpartition("/")[0], tensor, frozenset(readers | ({LOGITS} if tensor in outputs else set()))
        )

    def is_in(self, module: str) -> bool:
        """Whether the node belongs to the module or a part of it."""
        return _is_below(self.scope, module)

    def leaves(self, module: str) -> bool:
        """Whether something outside the module reads its tensor."""
        return any(not _is_below(reader, module) for reader in self.readers)


def _is_below(scope: str, module: str) -> bool:
    return f"{scope}.".startswith(f"{module}.")
