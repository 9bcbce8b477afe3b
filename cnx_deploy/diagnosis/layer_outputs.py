"""Intermediate outputs of a network, module by module: on torch, ONNX Runtime, the emulator and TensorRT.

Nodes of an exported file are named `<torch module>/<operator>`, so a module's output is the last tensor that nodes in
its scope make and that something outside the scope reads. A tensor that is read out is stored, so what a compiler would
fuse across it is not fused. ONNX Runtime's logits are therefore those of the file as it is deployed: a fault of such a
fusion still shows at the end.
"""

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.precision import Precision
from cnx_deploy.core.system import cpu_count, find_gpus
from cnx_deploy.exporters.graph_checks import load_model
from cnx_deploy.exporters.trt.backend import Backend, load_backend, require_gpu
from cnx_deploy.exporters.trt.depthwise import written_for
from cnx_deploy.exporters.trt.network import NetworkBuild
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import DeployedConvNeXtV2, deploy_form
from cnx_deploy.model.quantised import Constant
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.ort_session import open_session
from cnx_deploy.runners.tensorrt import EngineSession

__all__ = [
    "BACKENDS", "LOGITS", "ExportedNetwork", "LayerBackend", "OutputTensors", "ReadOutputs", "canonical",
    "compiled_plan", "copy_with_outputs", "engine_outputs", "find_outputs", "module_names", "reference_form",
    "torch_outputs",
]  # fmt: skip

LOGITS = "logits"
"""Stands for the whole network, in torch the module that holds all others."""
ANSWERS = "answers"
"""The module that names the outputs which were chosen, see `model.tasks.pooled.Answers`."""
WHOLE = "model"
"""Scope of the nodes that belong to no module but the whole network."""
TORCH_TYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "UINT8": torch.uint8, "INT32": torch.int32,
    "INT64": torch.int64,
}  # fmt: skip
"""Types that a network of ours takes and gives, by TensorRT's names."""

ReadOutputs = Callable[[Tensor], Mapping[str, Tensor]]
"""Raw images -> each module's output by the module's name, in the type and layout in which it is stored."""


@dataclass(frozen=True, slots=True)
class OutputTensors:
    """The tensor of a file that is each module's output, in the order in which they are made; why a module has none."""

    by_module: dict[str, str]
    missing: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors to read, each once: a module that ends with its last part shares a tensor with it."""
        return tuple(dict.fromkeys(self.by_module.values()))

    def of_modules(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors under the names of the modules whose outputs they are."""
        return {module: tensors[name] for module, name in self.by_module.items()}

    def with_merged(self, reference: Mapping[str, Tensor]) -> "OutputTensors":
        """Add modules without a node that compute what another does: the exporter keeps the nodes of the first.

        `reference`: outputs by module, as `torch_outputs` gives them.
        """
        merged = {
            module: other
            for module in self.missing
            for other in self.by_module
            if module in reference and torch.equal(reference[module], reference[other])
        }
        missing = {module: why for module, why in self.missing.items() if module not in merged}
        return OutputTensors(
            {**self.by_module, **{module: self.by_module[other] for module, other in merged.items()}}, missing
        )


@dataclass(frozen=True, slots=True)
class ExportedNetwork:
    """A file, the weights and the deployment that it was made from, and its intermediate outputs.

    `batch` is the number of images in each call, for which an engine is compiled.
    """

    path: Path
    model: ConvNeXtV2
    spec: DeploySpec
    outputs: OutputTensors
    batch: int


@dataclass(frozen=True, slots=True)
class LayerBackend:
    """One way to run a network. `open` may raise MissingRequirementError where this machine cannot.

    `shows`: whether it can show anything about a file of a precision; `elsewhere` says why it cannot for others.
    """

    name: str
    open: Callable[[ExportedNetwork], AbstractContextManager[ReadOutputs]]
    shows: Callable[[Precision], bool]
    elsewhere: str = ""
    is_engine: bool = False


def module_names(module: nn.Module) -> tuple[str, ...]:
    """Return the modules of a deploy form that compute something; `LOGITS` stands for the whole, by its last output.

    A sequence only holds others, the last of which has its output; lists and other holders are never called. A weight
    that stays in half has no node. What names the outputs (`ANSWERS`) is compared as the whole is, and output by output
    by `verify`.
    """
    return tuple(
        name or LOGITS
        for name, part in module.named_modules()
        if not isinstance(part, nn.Sequential | nn.Identity)
        and not (isinstance(part, Constant) and part.weight is not None)
        and type(part).forward is not nn.Module.forward
        and name != ANSWERS
    )


def reference_form(model: ConvNeXtV2, spec: DeploySpec) -> DeployedConvNeXtV2:
    """Make the deploy form of the same spec in FP32 throughout: the same modules in the same layout.

    Tensors in eight bits are rounded in it too, so that what a backend does besides is seen.
    """
    return deploy_form(model, replace(spec, precision="fp32", keep_fp32=()))


def torch_outputs(module: DeployedConvNeXtV2, images: Tensor) -> dict[str, Tensor]:
    """Run raw images and return the output of every module that has one of fractions by name, `LOGITS` for the whole.

    What a module with several outputs computes, or one that runs several times, is seen in its parts and in what
    reads it: a file does not say which of its tensors is which.
    """
    outputs: dict[str, Tensor] = {}
    several = set[str]()

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if name in outputs:
                several.add(name)
            elif name == LOGITS or (isinstance(output, Tensor) and output.is_floating_point()):
                outputs[name] = last_output(output).clone()  # a module after it may work in place

        return hook

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for name, part in module.named_modules():
            hooks.callback(part.register_forward_hook(keep(name or LOGITS)).remove)
        module(images)
    return {name: output for name, output in outputs.items() if name not in several}


def last_output(value: Tensor | Outputs) -> Tensor:
    """Return a network's output, of several the last of values: the others have modules of their own."""
    outputs = [value] if isinstance(value, Tensor) else list(value.values())
    return next(output for output in reversed(outputs) if output.is_floating_point())


def canonical(output: Tensor) -> Tensor:
    """Bring a module's output to (N, positions, channels), whichever layout it is in.

    Shape: tokens (N, HW, C) stay, images (N, C, H, W) are flattened and permuted, (N, C) gets one position. Of any
    other number of axes the first is the samples', and the values come in one position.
    """
    if output.ndim == 4:
        return output.permute(0, 2, 3, 1).flatten(1, 2)
    return output if output.ndim == 3 else output.reshape(len(output), 1, -1)


def find_outputs(path: Path, modules: Sequence[str], others: Collection[str] = ()) -> OutputTensors:
    """Find each module's output in an ONNX file.

    A module without one is in `missing`, and so is a scope of the file that is none of `modules` and `others`. Raises
    CorruptArtifactError for a file that is no ONNX model, InputError for one whose nodes are not named after them.
    """
    graph = load_model(path).graph
    whole = next(value.name for value in reversed(graph.outputs) if value.dtype and value.dtype.is_floating_point())
    given = {value.name for value in graph.outputs}
    # Of each node: its scope, its tensor, and the scopes that read the tensor (`LOGITS` for the graph's last output).
    nodes: list[tuple[str, str, set[str]]] = []
    for node in graph:
        readers = {_scope(reader) for reader in node.outputs[0].consumers()}
        if node.outputs[0].name in given:
            readers.add(LOGITS if node.outputs[0].name == whole else WHOLE)
        nodes.append((_scope(node), str(node.outputs[0].name), readers))
    scopes = {scope for scope, _, _ in nodes} - {WHOLE, ANSWERS}
    missing = dict.fromkeys(sorted(scopes - {*modules, *others}), "named in the file, but no module of the deploy form")
    last: dict[str, int] = {}
    for module in modules:
        inside = [at for at, (scope, _, _) in enumerate(nodes) if _is_inside(scope, module)]
        leaving = [at for at in inside if not all(_is_inside(reader, module) for reader in nodes[at][2])]
        if leaving:
            last[module] = leaving[-1]
        else:
            missing[module] = "nothing outside reads what its nodes make" if inside else "no node is named after it"
    if not last.keys() - {LOGITS}:
        first = next((str(node.name) for node in graph), "nothing")
        raise InputError(
            f"{path} names none of the network's {len(modules)} modules in its nodes; the first node is called "
            f"{first!r}. Layers can be compared of files that cnx-deploy export wrote."
        )
    # A part before the whole that ends with it: the fault is named where it is.
    order = sorted(last, key=lambda module: (last[module], module == LOGITS, -module.count(".")))
    return OutputTensors({module: nodes[last[module]][1] for module in order}, missing)


@contextlib.contextmanager
def copy_with_outputs(path: Path, tensors: Sequence[str]) -> Iterator[Path]:
    """Copy an ONNX file into a temporary folder with `tensors` as further outputs; the file itself is only read."""
    model = load_model(path)
    present = {value.name for value in model.graph.outputs}
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in tensors if name not in present)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        ir.save(model, copy, external_data=f"{path.name}.data")
        yield copy


def compiled_plan(backend: Backend, path: Path, target: str, batch: int) -> bytes:
    """Compile an ONNX file for `target` ("current" or "sm89") and one batch size; TF32 is off."""
    gpu = find_gpus()[0].target if target == "current" else target
    rewritten = written_for(path, gpu) if backend.name == "tensorrt-rtx" else contextlib.nullcontext(path)
    with rewritten as written:
        build = NetworkBuild(backend, written)
        return build.serialise(build.config(target, allow_tf32=False, batches=((batch, batch, batch),)))


def engine_outputs(session: EngineSession) -> Callable[[Tensor], dict[str, Tensor]]:
    """Make a function that runs raw images in host memory and returns every output there, in its own type.

    Raises InputError where an output has a type that no layer has.
    """
    types = session.tensor_types()
    if unknown := {name: kind for name, kind in types.items() if kind not in TORCH_TYPES}:
        name, kind = next(iter(unknown.items()))
        raise InputError(f"The engine's tensor {name} is {kind}; a layer's output is one of {', '.join(TORCH_TYPES)}.")

    def read(images: Tensor) -> dict[str, Tensor]:
        images = images.contiguous().to(session.device)
        session.set_input_shape(images)
        outputs = {name: session.empty(name, TORCH_TYPES[kind]) for name, kind in types.items() if name != "images"}
        session.bind(images=images, **outputs)
        session.stream.wait_for_producer()
        session.execute()
        session.stream.keep(images, *outputs.values())
        session.stream.synchronize()
        return {name: tensor.cpu() for name, tensor in outputs.items()}

    return read


@contextlib.contextmanager
def _torch(network: ExportedNetwork) -> Iterator[ReadOutputs]:
    module = deploy_form(network.model, network.spec)
    yield lambda images: torch_outputs(module, images)


@contextlib.contextmanager
def _onnxruntime(network: ExportedNetwork) -> Iterator[ReadOutputs]:
    with (
        copy_with_outputs(network.path, network.outputs.names) as copy,
        OrtRunner(network.path, spin=False) as deployed,
    ):
        session = open_session(copy, threads=cpu_count())
        names = [output.name for output in session.get_outputs()]

        def read(images: Tensor) -> dict[str, Tensor]:
            logits = last_output(deployed.run(images))
            arrays = session.run(names, {session.get_inputs()[0].name: images.contiguous().numpy()})
            tensors = dict(zip(names, map(torch.from_numpy, arrays), strict=True))
            return {**network.outputs.of_modules(tensors), LOGITS: logits}

        yield read


@contextlib.contextmanager
def _emulator(network: ExportedNetwork) -> Iterator[ReadOutputs]:
    runner, outputs = EmulatedRunner(network.path), network.outputs
    yield lambda images: outputs.of_modules(runner.evaluate(images, outputs.names).tensors)


@contextlib.contextmanager
def _tensorrt(network: ExportedNetwork) -> Iterator[ReadOutputs]:
    """Compile a throw-away engine for this machine's GPU. Tested with a double of the runtime, not run on a GPU."""
    require_gpu()
    if not torch.cuda.is_available():
        raise MissingRequirementError(
            f"A GPU is here, but torch {torch.__version__} cannot use it. `cnx-deploy doctor` says more."
        )
    backend, device = load_backend(), torch.device("cuda", torch.cuda.current_device())
    with copy_with_outputs(network.path, network.outputs.names) as copy:
        plan = compiled_plan(backend, copy, "current", network.batch)
        with EngineSession(backend, plan, f"the layers of {network.path.name}", device) as session:
            read = engine_outputs(session)
            yield lambda images: network.outputs.of_modules(read(images))


BACKENDS = (
    LayerBackend("torch", _torch, lambda row: row.has_islands, "in FP32 it is the reference itself"),
    LayerBackend(
        "onnxruntime", _onnxruntime, lambda row: "onnxruntime" in row.proven_by, "it has no BF16 convolution on a CPU"
    ),
    LayerBackend(
        "emulator",
        _emulator,
        lambda row: any(name.startswith("emulate-") for name in row.proven_by),
        "an FP32 file holds no narrower type, so nothing is rounded",
    ),
    LayerBackend("tensorrt", _tensorrt, lambda _: True, is_engine=True),
)
"""In the order in which a network goes through them: a fault of the export shows on all but the first."""


def _scope(node: ir.Node) -> str:
    return str(node.name).rpartition("/")[0]


def _is_inside(scope: str, module: str) -> bool:
    """Whether a scope belongs to a module or a part of it; `LOGITS` is the whole, and outside of every module."""
    return scope != LOGITS if module == LOGITS else f"{scope}.".startswith(f"{module}.")
