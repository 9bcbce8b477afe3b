"""A runner of the deploy form with own kernels: on an NVIDIA GPU, or without one in Triton's interpreter.

On a GPU each batch size is captured as a CUDA graph at its first call, after the tiles for it were measured. In the
interpreter the same kernels run tile by tile on the CPU, which proves them and takes seconds an image.
Nothing of this was run on a GPU yet.
"""

import importlib.util
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CnxDeployError, InputError, MissingRequirementError
from cnx_deploy.core.hidden_tensor import Hidden
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.system import Machine, cpu_name
from cnx_deploy.data.input_spec import InputSpec, check_input
from cnx_deploy.kernels.tuning import choose
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.fused import fuse, fused_blocks
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.model.tasks.base import Outputs, named_outputs
from cnx_deploy.runners.base import HoldsNothing, RunnerInfo
from cnx_deploy.runners.cuda import CudaStream
from cnx_deploy.runners.registry import RunnerEntry, RunnerOptions, register_runner

__all__ = ["FusedRunner", "reason_against"]

PIECE = 4096
"""The largest batch of a network without a recorded range."""


class FusedRunner(HoldsNothing):
    """Run a network in FP16 or BF16 with own kernels; see `runners.base.Runner`.

    Args:
        model: the network; it is left as it was.
        spec: its deployment, in half precision. The layout is the GPU's in any case.
        batch: smallest and largest.
        hidden: "stored" or "recomputed" for every stage that can; None measures both.
    """

    def __init__(
        self,
        model: ConvNeXtV2,
        spec: DeploySpec,
        batch: tuple[int, int] = (1, PIECE),
        *,
        hidden: Hidden | None = None,
    ) -> None:
        if not spec.is_half or spec.row.placement is not None:
            raise InputError(f"Own kernels compute in FP16 or BF16, not in {spec.precision}. Choose --precision fp16.")
        spec = replace(spec, layout="gpu")
        self.device = torch.device("cuda", torch.cuda.current_device()) if _has_gpu() else torch.device("cpu")
        self.module = deploy_form(model, spec)
        kept = fuse(self.module, partial(choose, device=self.device, hidden=hidden))
        self.module = self.module.to(self.device).to(memory_format=torch.channels_last)
        self.outputs = self.module.output_specs
        self.input_spec = InputSpec.of(spec, *batch)
        self._stream = CudaStream(self.device) if self.device.type == "cuda" else None
        self._captured: tuple[Tensor, Any, Outputs] | None = None
        self._one_call = threading.Lock()
        fused = sum(1 for _ in fused_blocks(self.module))
        details = (
            ("blocks in own kernels", f"{fused} of {fused + len(kept)}"),
            *(("left as it is", name) for name in kept),
            ("runs", "as a CUDA graph" if self._stream else "in Triton's interpreter"),
        )
        name = torch.cuda.get_device_name(self.device) if self._stream else cpu_name()
        self.info = RunnerInfo("fused", _version(), name, spec.precision, spec.precision, details)

    def run(self, images: Tensor) -> Outputs:
        """Raw images on `device` -> outputs; on a GPU the next call overwrites them."""
        check_input(images, self.input_spec, self.device)
        with self._one_call, torch.inference_mode():
            if self._stream is None:
                return named_outputs(self.module(images), self.outputs)
            return self._replayed(images, self._stream)

    def _replayed(self, images: Tensor, stream: CudaStream) -> Outputs:
        if self._captured is None or self._captured[0].shape != images.shape:
            stream.synchronize()
            self._captured = None
            own = images.clone()
            outputs: Outputs = {}
            # The first call measures tiles and cuDNN's algorithms and compiles kernels: nothing of it can be captured.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                self.module(own)
                torch.cuda.synchronize(self.device)
                graph = stream.capture(lambda: outputs.update(named_outputs(self.module(own), self.outputs)))
            self._captured = own, graph, outputs
        own, graph, outputs = self._captured
        stream.wait_for_producer()
        stream.copy(own, images)
        stream.replay(graph)
        stream.keep(images)
        stream.synchronize()
        return outputs


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _version() -> str:
    import triton

    return f"{torch.__version__}, Triton {triton.__version__}"


def _missing() -> CnxDeployError | None:
    if importlib.util.find_spec("triton") is None:
        return MissingRequirementError(
            "Own kernels need Triton, which is not installed. PyTorch for CUDA on Linux brings it: pip install torch."
        )
    if _has_gpu() and (capability := torch.cuda.get_device_capability()) < (8, 0):
        return MissingRequirementError(
            f"Own kernels need a GPU from compute capability 8.0 on, and {torch.cuda.get_device_name()} has "
            f"{'.'.join(map(str, capability))}. Choose --backend onnxruntime."
        )
    return None


def reason_against(artifact: Artifact, machine: Machine | None = None) -> CnxDeployError | None:
    """Why the network of an artifact cannot run in own kernels here; None where it can."""
    if not artifact.manifest.deploy.is_half or artifact.manifest.precision.placement is not None:
        return InputError(
            f"{artifact.path.name} is {artifact.manifest.precision.name.upper()}: own kernels compute in FP16 or BF16. "
            "Export it with --precision fp16."
        )
    if artifact.manifest.model.graph is not None:
        return InputError(
            f"{artifact.path.name} came as an ONNX file: own kernels are for networks that are here in PyTorch."
        )
    return _missing()


def _opened(artifact: Artifact, options: RunnerOptions) -> FusedRunner:
    smallest, _, largest = artifact.manifest.batch
    return FusedRunner(recorded_model(artifact).model, artifact.manifest.deploy, (smallest, largest))


def _opened_network(model: ConvNeXtV2, spec: DeploySpec, options: RunnerOptions) -> FusedRunner:
    if (reason := _missing()) is not None:
        raise reason
    return FusedRunner(model, spec if spec.is_half else replace(spec, precision="fp16"))


register_runner(
    RunnerEntry(
        name="fused", kinds=("onnx",), can_run=reason_against, open=_opened, open_network=_opened_network,
        is_slow=not _has_gpu(),
    )
)  # fmt: skip
