"""Who can run a network and show what each of its modules gave: torch, ONNX Runtime, the emulator, TensorRT.

A tap makes the tensor be stored, so what a compiler would fuse across it is not fused. ONNX Runtime's logits are those
of the file as it is deployed, without taps, so that a fault of such a fusion still shows at the end.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CorruptArtifactError
from cnx_deploy.core.gates import GATES, Gate
from cnx_deploy.core.system import cpu_count
from cnx_deploy.diagnosis.layerwise.engine import compiled_engine
from cnx_deploy.diagnosis.layerwise.taps import LOGITS, Taps, tapped_copy
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import DeployedConvNeXtV2, deploy_form
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.ort_session import LOAD_ERRORS

__all__ = ["SIDES", "Read", "Side", "Subject", "reference_form", "torch_outputs"]

Read = Callable[[Tensor], Mapping[str, Tensor]]
"""Raw images -> each module's output by the module's name, in the type and layout in which it is stored."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A file to read the layers of, the weights and the deployment that it was made from, and its taps.

    `batch` is the number of images in each call, for which an engine is compiled.
    """

    path: Path
    model: ConvNeXtV2
    spec: DeploySpec
    taps: Taps
    batch: int

    def by_module(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names of the modules whose outputs they are."""
        return {tap.module: tensors[tap.tensor] for tap in self.taps.found}


@dataclass(frozen=True, slots=True)
class Side:
    """One way to run a subject. `open` may raise MissingRequirementError where this machine cannot.

    `precisions`: those of the files that it can show anything about; `elsewhere` says why it cannot for others.
    """

    name: str
    open: Callable[[Subject], AbstractContextManager[Read]]
    precisions: tuple[str, ...]
    elsewhere: str = ""

    def gate(self, precision: str) -> Gate:
        """What its logits are held to in `cnx-deploy verify`, and each tap here."""
        return GATES["fp32-engine" if self.name == "tensorrt" and precision == "fp32" else precision]


def reference_form(model: ConvNeXtV2, spec: DeploySpec) -> DeployedConvNeXtV2:
    """The deploy form of the same spec in FP32 throughout: the same modules in the same layout."""
    return deploy_form(model, replace(spec, precision="fp32", keep_fp32=()))


def torch_outputs(module: DeployedConvNeXtV2, images: Tensor) -> dict[str, Tensor]:
    """Raw images -> the output of every module by name, `LOGITS` for the whole."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for name, part in module.named_modules():
            hooks.callback(part.register_forward_hook(keep(name or LOGITS)).remove)
        module(images)
    return found


@contextlib.contextmanager
def _torch(subject: Subject) -> Iterator[Read]:
    module = deploy_form(subject.model, subject.spec)
    yield lambda images: torch_outputs(module, images)


@contextlib.contextmanager
def _onnxruntime(subject: Subject) -> Iterator[Read]:
    with (
        tapped_copy(subject.path, subject.taps.tensors) as copy,
        OrtRunner(subject.path, spin=False) as deployed,
    ):
        session = _session(copy)
        names = [output.name for output in session.get_outputs()]

        def read(images: Tensor) -> dict[str, Tensor]:
            logits = deployed.run(images)
            arrays = session.run(names, {session.get_inputs()[0].name: images.contiguous().numpy()})
            tensors = dict(zip(names, map(torch.from_numpy, arrays), strict=True))
            return {**subject.by_module(tensors), LOGITS: logits}

        yield read


@contextlib.contextmanager
def _emulator(subject: Subject) -> Iterator[Read]:
    runner = EmulatedRunner(subject.path)
    yield lambda images: subject.by_module(runner.evaluate(images, subject.taps.tensors).tensors)


@contextlib.contextmanager
def _tensorrt(subject: Subject) -> Iterator[Read]:
    with (
        tapped_copy(subject.path, subject.taps.tensors) as copy,
        compiled_engine(copy, subject.batch) as engine,
    ):
        yield lambda images: subject.by_module(engine.run(images))


SIDES = (
    Side("torch", _torch, ("fp16", "bf16"), "in FP32 it is the reference itself"),
    Side("onnxruntime", _onnxruntime, ("fp32", "fp16"), "it has no BF16 convolution on a CPU"),
    Side("emulator", _emulator, ("fp16", "bf16"), "an FP32 file holds no narrower type, so nothing is rounded"),
    Side("tensorrt", _tensorrt, ("fp32", "fp16", "bf16")),
)
"""In the order in which a network goes through them: a fault of the export shows on all but the first."""


def _session(path: Path) -> Any:
    """All optimisations, like the deployed file's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_count()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (*LOAD_ERRORS, ValueError) as error:
        raise CorruptArtifactError(
            f"ONNX Runtime cannot read a copy of {path.name} ({error}). Export it again."
        ) from error
