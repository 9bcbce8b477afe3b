"""PyTorch runners: the training form as the reference, the deploy form as it is written."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.gates import OutputSpec
from cnx_deploy.core.system import cpu_name
from cnx_deploy.data.input_spec import InputSpec, check_input
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.tasks.base import Outputs, Task, named_outputs, network_outputs, sole_or_named
from cnx_deploy.runners.base import HoldsNothing, RunnerInfo

__all__ = ["AnsweringModel", "TorchRunner", "deployed_runner", "reference_runner"]


class TorchRunner(HoldsNothing):
    """Run a module that takes raw images as `input_spec` says; see `runners.base.Runner`.

    The module gives the one tensor of `outputs`, or several in a dict by name.
    """

    def __init__(
        self, module: nn.Module, input_spec: InputSpec, info: RunnerInfo, outputs: Sequence[OutputSpec]
    ) -> None:
        self.module = module.eval()
        self.input_spec = input_spec
        self.outputs = tuple(outputs)
        self.info = info
        self.device = next(module.parameters()).device

    def run(self, images: Tensor) -> Outputs:
        """Raw images -> outputs; blocks until they are there."""
        check_input(images, self.input_spec, self.device)
        with torch.inference_mode():
            value = self.module(images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return named_outputs(value, self.outputs)


class AnsweringModel(nn.Module):
    """A network on normalised images, its answer changed as `DeploySpec` says: written plainly, as a reference.

    Shape: (N, 3, H, W) -> what the network gives. A flip takes two passes, one of them on mirrored images. A network of
    another library gives logits alone.
    """

    def __init__(self, model: nn.Module, spec: DeploySpec, task: Task) -> None:
        super().__init__()
        task.check_allowed(spec)
        self.model, self.spec = model, spec

    def forward(self, images: Tensor) -> Any:
        """Run the network; see the class for shapes."""
        given = self._given(images)
        if self.spec.tta == "flip":
            given = tree_map(lambda one, other: (one + other) / 2.0, given, self._given(images.flip(-1)))
        return given

    def _given(self, images: Tensor) -> Any:
        if isinstance(self.model, ConvNeXtV2):
            words = self.spec.outputs
            return sole_or_named(self.model.forward_outputs(images, words, temperature=self.spec.temperature))
        logits = self.model(images)
        return logits if self.spec.temperature == 1.0 else logits / self.spec.temperature


class _NormalisedModel(nn.Module):
    """The training form behind the input of the deploy form: raw images in, normalised by subtraction and division."""

    def __init__(self, model: ConvNeXtV2, spec: DeploySpec) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.model = AnsweringModel(model, spec, model.task) if spec.answer or spec.outputs else model
        self.input_kind = spec.input_kind
        own = next(model.parameters())
        self.register_buffer("mean", own.new_tensor(spec.mean).view(-1, 1, 1))
        self.register_buffer("std", own.new_tensor(spec.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Any:
        raw = images.to(self.mean.dtype)
        if self.input_kind == "uint8":
            raw = raw.permute(0, 3, 1, 2) / 255.0
        return self.model((raw - self.mean) / self.std)


def reference_runner(model: ConvNeXtV2, spec: DeploySpec) -> TorchRunner:
    """The training form, in the dtype and on the device it is in, with raw images and answer of a deployment `spec`.

    TF32 is turned off for the process: a reference in TF32 is none. Beside the outputs of `spec` it gives those that
    places in them point to (`OutputSpec.indexes`).
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    declared = network_outputs(model.task, model.variant, model.num_classes, spec)
    if pointed_to := {output.indexes for output in declared if output.indexes} - {each.name for each in declared}:
        words = sorted(name.replace("_", "-") for name in pointed_to)
        spec = replace(spec, outputs=(*spec.outputs, *words))
    module = _NormalisedModel(model, spec)
    outputs = network_outputs(model.task, model.variant, model.num_classes, spec)
    return TorchRunner(module, InputSpec.of(spec), _info(module, "torch", dtype), outputs)


def deployed_runner(model: ConvNeXtV2, spec: DeploySpec, device: str = "cpu") -> TorchRunner:
    """The deploy form run by PyTorch: in half on a CPU, every operation rounds to FP16 and accumulates in FP32.

    That makes it an emulation of an engine's rounding noise. It cannot overflow inside an operation where an engine
    might (torch's own norm accumulates in FP32), so it is no proof of FP16 safety.
    """
    module = deploy_form(model, spec).to(device)
    info = _info(module, "torch-deploy", spec.precision)
    return TorchRunner(module, InputSpec.of(spec), info, module.output_specs)


def _info(module: nn.Module, backend: str, precision: str) -> RunnerInfo:
    device = next(module.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return RunnerInfo(backend, str(torch.__version__), name, precision, precision)
