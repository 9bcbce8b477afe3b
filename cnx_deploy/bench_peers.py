"""What our files are measured against: the same weights in PyTorch, compiled PyTorch, and timm's model on ONNX Runtime.

A peer computes in FP32 and is judged by the same gate as ours. Each is prepared first (exported, where that is needed)
and then made, so that what making it takes is comparable.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnx_deploy.data import Preprocessing
from cnx_deploy.environment import package_version
from cnx_deploy.errors import MissingRequirementError
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import DeploySpec
from cnx_deploy.model.layouts import official_state
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.ort import OrtRunner
from cnx_deploy.runners.pytorch import TorchRunner, reference_runner

__all__ = ["PEERS", "CompiledRunner", "Peer", "PeerSetup", "timm_twin"]

OPSET = 20


@dataclass(frozen=True, slots=True)
class PeerSetup:
    """What a peer is made from: one network and its deployment; `folder` must live as long as the runner."""

    model: ConvNeXtV2
    deploy: DeploySpec
    threads: int | None
    folder: Path

    @property
    def device(self) -> str:
        """Where PyTorch's peers run: the GPU if there is one."""
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer's row name and how it is prepared; `takes_normalised` images instead of what our files take.

    `prepare` returns what makes the runner. It raises MissingRequirementError where this machine lacks something.
    """

    name: str
    prepare: Callable[[PeerSetup], Callable[[], Runner]]
    takes_normalised: bool = False

    def input_from_pixels(self, deploy: DeploySpec) -> Callable[[Tensor], Tensor] | None:
        """(N, S, S, 3) uint8 pixels -> the peer's input; None where it takes what our files take."""
        if not self.takes_normalised:
            return None
        return Preprocessing(image_size=deploy.image_size, mean=deploy.mean, std=deploy.std).normalise


class CompiledRunner(TorchRunner):
    """A torch runner whose module is compiled anew for each batch size, at its first call.

    Raises MissingRequirementError where torch.compile lacks a compiler; it never runs the eager module instead.
    """

    def __init__(self, eager: TorchRunner) -> None:
        info = replace(eager.info, backend="torch.compile", details=(("shapes", "static"), ("graph", "whole")))
        super().__init__(eager.module, eager.input_spec, info)
        self._eager: nn.Module = eager.module
        self._batch = 0

    def run(self, images: Tensor) -> Tensor:
        """Raw images -> logits; blocks until they are there."""
        if len(images) != self._batch:
            torch.compiler.reset()  # a process keeps eight shapes, then torch refuses
            compiled: Any = torch.compile(self._eager, fullgraph=True, dynamic=False)
            self.module = compiled
            self._batch = len(images)
        try:
            return super().run(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).partition("\n")[0]
            raise MissingRequirementError(f"torch.compile does not work here: {reason}") from error


def timm_twin(model: ConvNeXtV2) -> nn.Module:
    """The model of timm, of the same size and with the weights of `model`; it takes normalised (N, 3, S, S) images.

    Raises MissingRequirementError where timm is not installed.
    """
    try:
        convnext = importlib.import_module("timm.models.convnext")
    except ImportError as error:
        raise MissingRequirementError("timm is not installed") from error
    size = model.variant
    twin: nn.Module = convnext.ConvNeXt(
        depths=size.depths, dims=size.dims, num_classes=model.num_classes, use_grn=True, ls_init_value=None
    )
    state, own = twin.state_dict(), model.state_dict()
    _, official = official_state(state, "timm")
    pairs = zip(state.items(), official, strict=True)  # the mapping keeps the order of the tensors
    twin.load_state_dict({name: own[ours].reshape(tensor.shape) for (name, tensor), ours in pairs})
    return twin.eval()


def _eager(setup: PeerSetup) -> Callable[[], Runner]:
    model = setup.model.to(setup.device)
    return lambda: reference_runner(model, setup.deploy)


def _compiled(setup: PeerSetup) -> Callable[[], Runner]:
    model = setup.model.to(setup.device)
    return lambda: CompiledRunner(reference_runner(model, setup.deploy))


def _timm(setup: PeerSetup) -> Callable[[], Runner]:
    path = setup.folder / "timm.onnx"
    twin = timm_twin(setup.model.cpu())
    example = torch.zeros(2, 3, setup.deploy.image_size, setup.deploy.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes to its own developers
        torch.onnx.export(
            twin, (example,), path, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},), verbose=False,
        )  # fmt: skip
    return lambda: _timm_runner(path, setup.threads)


def _timm_runner(path: Path, threads: int | None) -> OrtRunner:
    runner = OrtRunner(path, threads=threads)
    details = (("timm", str(package_version("timm"))), *runner.info.details)
    runner.info = replace(runner.info, precision="fp32", details=details)
    return runner


PEERS = {
    "torch": Peer("torch eager fp32", _eager),
    "compile": Peer("torch.compile fp32", _compiled),
    "timm": Peer("timm.onnx fp32", _timm, takes_normalised=True),
}
"""The peers by the word that `--compare` takes."""
