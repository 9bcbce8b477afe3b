"""What our files are measured against: the same weights in PyTorch, compiled PyTorch, and timm's model in two runtimes.

On a CPU a peer computes in FP32, as ONNX Runtime and OpenVINO do there even with FP16 files. On a GPU PyTorch's peers
compute as our files do: FP16 files against FP16 under autocast, for FP32 would flatter them; or, as "half", with
everything in FP16, which is faster and overflows where the network is hot. Beside a file that averages an image and its
mirror, or that divides by a temperature, every peer does so too, in two passes. Each peer is prepared first (exported,
where that is needed) and then made, so that what making it takes is comparable.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import MissingRequirementError
from cnx_deploy.core.image_size import sides
from cnx_deploy.core.precision import PRECISIONS, find_precision
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import package_version
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.layers import LAYER_SCALE
from cnx_deploy.model.layouts import official_state
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.openvino import OpenVinoRunner
from cnx_deploy.runners.openvino_library import MISSING
from cnx_deploy.runners.pytorch import AnsweringModel, TorchRunner, reference_runner
from cnx_deploy.runners.registry import RunnerOptions

__all__ = ["PEERS", "CompiledRunner", "Half", "HalfAutocast", "Peer", "PeerSetup", "place_of_peers", "timm_twin"]

OPSET, OLDER_OPSET = 20, 18
"""The exporter's default in torch 2.14, and an older one: in 18 GELU is five operators, which costs 1 to 12 %."""

TIMM_MISSING = "timm is not installed: pip install timm"


@dataclass(frozen=True, slots=True)
class PeerSetup:
    """What a peer is made from: one network and its deployment; `folder` must live as long as the runner.

    `options`: how our files are run in the same benchmark. `device` and `precision` are PyTorch's, as
    `place_of_peers` gives them.
    """

    model: ConvNeXtV2
    deploy: DeploySpec
    options: RunnerOptions
    folder: Path
    device: str = "cpu"
    precision: str = "fp32"


@dataclass(frozen=True, slots=True)
class Peer:
    """One word of `--compare`. `prepare` returns what makes the runner.

    `is_timm`: timm's model exported, which takes normalised images, in FP32 unless `is_half`; ONNX Runtime runs it, or
    OpenVINO where `in_openvino`. Other peers run where PyTorch does and take what our files take. `is_half`: weights
    and tensors are FP16, statistics included.
    """

    title: str
    prepare: Callable[[PeerSetup], Callable[[], Runner]]
    is_timm: bool = False
    is_half: bool = False
    in_openvino: bool = False

    def precision_here(self, torch_precision: str) -> str:
        """The precision it computes in, where PyTorch's peers compute in `torch_precision`."""
        if self.is_half:
            return "fp16"
        return "fp32" if self.is_timm else torch_precision

    def row_name(self, torch_precision: str) -> str:
        """The name of its rows: "torch eager fp32"."""
        return f"{self.title} {self.precision_here(torch_precision)}"

    def missing(self) -> str | None:
        """What it lacks on this machine, None where it can be prepared."""
        if self.is_timm and importlib.util.find_spec("timm") is None:
            return TIMM_MISSING
        return MISSING if self.in_openvino and importlib.util.find_spec("openvino") is None else None

    def input_from_pixels(self, deploy: DeploySpec) -> Callable[[Tensor], Tensor] | None:
        """(N, S, S, C) uint8 pixels -> the peer's input; None where it takes what our files take."""
        if not self.is_timm:
            return None
        preprocessing = Preprocessing(image_size=deploy.image_size, mean=deploy.mean, std=deploy.std)
        return lambda pixels: normalise(pixels, preprocessing)


def place_of_peers(precisions: Iterable[str]) -> tuple[str, str]:
    """Device and precision of PyTorch's peers beside files of these precisions: as the files are on a GPU."""
    if not torch.cuda.is_available():
        return "cpu", "fp32"
    present = set(precisions)
    halves = (row.name for row in PRECISIONS.values() if row.has_islands and row.name in present)
    return "cuda", next(halves, "fp32")


class HalfAutocast(nn.Module):
    """A module under autocast, as timm's own benchmark runs it: FP32 weights, half products, FP32 outputs."""

    def __init__(self, module: nn.Module, device: str, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.module = module
        self.device_type, self.dtype = device, dtype

    def forward(self, images: Tensor) -> Any:
        """Raw images -> float32 outputs."""
        with torch.autocast(self.device_type, dtype=self.dtype):
            return tree_map(lambda output: output.float(), self.module(images))


class Half(nn.Module):
    """A module in FP16 as `.half()` makes it, channels last, from float32 images to float32 outputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.half().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Any:
        """Images -> float32 outputs; indices stay what they are."""
        images = images.half() if images.is_floating_point() else images
        given = self.module(images)
        return tree_map(lambda output: output.float() if output.is_floating_point() else output, given)


class CompiledRunner(TorchRunner):
    """A torch runner whose module is compiled anew for each batch size, at its first call.

    Raises MissingRequirementError where torch.compile lacks a compiler; it never runs the eager module instead.
    """

    def __init__(self, eager: TorchRunner) -> None:
        details = (*eager.info.details, ("shapes", "static"), ("graph", "whole"))
        info = replace(eager.info, backend="torch.compile", details=details)
        super().__init__(eager.module, eager.input_spec, info, eager.outputs)
        self._eager: nn.Module = eager.module
        self._batch = 0

    def run(self, images: Tensor) -> Outputs:
        """Raw images -> outputs; blocks until they are there."""
        if len(images) != self._batch:
            torch.compiler.reset()  # a process keeps eight shapes, then torch refuses
            compiled: Any = torch.compile(self._eager, fullgraph=True, dynamic=False)
            self.module = compiled
            self._batch = len(images)
        try:
            return super().run(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).partition("\n")[0]
            raise MissingRequirementError(
                f"torch.compile does not work here: {reason}. Install a C++ compiler, or leave compile out."
            ) from error


def timm_twin(model: ConvNeXtV2) -> nn.Module:
    """The model of timm, of the same size and with the weights of `model`; it takes normalised (N, C, S, S) images.

    Raises MissingRequirementError where timm is not installed.
    """
    try:
        convnext = importlib.import_module("timm.models.convnext")
    except ImportError as error:
        raise MissingRequirementError(TIMM_MISSING) from error
    size = model.variant
    twin: nn.Module = convnext.ConvNeXt(
        depths=size.depths,
        dims=size.dims,
        in_chans=model.in_chans,
        num_classes=model.num_classes,
        use_grn=size.version == 2,
        ls_init_value=LAYER_SCALE if size.version == 1 else None,
    )
    state, own = twin.state_dict(), model.state_dict()
    _, official = official_state(state, "timm")
    pairs = zip(state.items(), official, strict=True)  # the mapping keeps the order of the tensors
    twin.load_state_dict({name: own[ours].reshape(tensor.shape) for (name, tensor), ours in pairs})
    return twin.eval()


def _torch(setup: PeerSetup, *, compiles: bool = False, is_half: bool = False) -> Callable[[], TorchRunner]:
    model = setup.model.to(setup.device)

    def make() -> TorchRunner:
        runner, half = reference_runner(model, setup.deploy), find_precision(setup.precision)
        if is_half:
            info = replace(runner.info, precision="fp16", arithmetic="fp16", details=(("weights", "fp16"),))
            runner = TorchRunner(Half(runner.module).to(setup.device), runner.input_spec, info, runner.outputs)
        elif half.has_islands:
            info = replace(runner.info, precision=half.name, arithmetic=half.name, details=(("autocast", half.name),))
            module = HalfAutocast(runner.module, setup.device, getattr(torch, half.dtype)).to(setup.device)
            runner = TorchRunner(module, runner.input_spec, info, runner.outputs)
        return CompiledRunner(runner) if compiles else runner

    return make


def _timm(
    setup: PeerSetup,
    opset: int = OPSET,
    *,
    in_whole_batches: bool = False,
    is_half: bool = False,
    in_openvino: bool = False,
) -> Callable[[], Runner]:
    """Export timm's model; run it as our files are, so that a ratio is the graph's alone, or by the runtime alone."""
    if setup.model.task.name != "classification":
        raise MissingRequirementError(f"timm's model classifies: it has no counterpart of {setup.model.task.name}.")
    if setup.deploy.outputs not in ((), ("logits",)):
        raise MissingRequirementError(f"timm's model gives logits: it has no {', '.join(setup.deploy.outputs)}.")
    path = setup.folder / "timm.onnx"
    # It answers as our files do: a mean over two passes against one pass would compare different work.
    twin: nn.Module = AnsweringModel(timm_twin(setup.model.cpu()), setup.deploy, setup.model.task).eval()
    twin = Half(twin) if is_half else twin
    example = torch.zeros(2, setup.deploy.in_chans, *sides(setup.deploy.image_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes to its own developers
        torch.onnx.export(
            twin, (example,), path, dynamo=True, opset_version=opset, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},), verbose=False,
        )  # fmt: skip
    words: dict[str, Any] = {
        "threads": setup.options.threads,
        "thread_per_image": setup.options.thread_per_image and not in_whole_batches,
    }

    def make() -> Runner:
        runner: Runner
        if in_openvino:
            runner = OpenVinoRunner(path, fixed_shapes=not in_whole_batches, **words)
        else:
            runner = OrtRunner(path, device=setup.options.device, spin=setup.options.spin, **words)
        details = (("timm", str(package_version("timm"))), *runner.info.details)
        precision = "fp16" if is_half else "fp32"
        arithmetic = precision if setup.options.device == "cuda" and not in_openvino else "fp32"
        runner.info = replace(runner.info, precision=precision, arithmetic=arithmetic, details=details)
        return runner

    return make


PEERS = {
    "torch": Peer("torch eager", _torch),
    "compile": Peer("torch.compile", partial(_torch, compiles=True)),
    "torch-half": Peer("torch eager .half()", partial(_torch, is_half=True), is_half=True),
    "compile-half": Peer("torch.compile .half()", partial(_torch, compiles=True, is_half=True), is_half=True),
    "timm": Peer("timm.onnx", _timm, is_timm=True),
    "timm-half": Peer("timm.onnx .half()", partial(_timm, is_half=True), is_timm=True, is_half=True),
    "timm-whole": Peer("timm.onnx whole batch", partial(_timm, in_whole_batches=True), is_timm=True),
    "timm-openvino": Peer(
        "timm.onnx in OpenVINO", partial(_timm, in_openvino=True), is_timm=True, in_openvino=True
    ),
    "timm-openvino-whole": Peer(
        "timm.onnx in OpenVINO whole batch", partial(_timm, in_whole_batches=True, in_openvino=True), is_timm=True,
        in_openvino=True,
    ),
    "timm-18": Peer("timm.onnx opset 18", partial(_timm, opset=OLDER_OPSET, in_whole_batches=True), is_timm=True),
}  # fmt: skip
"""The peers by the word that `--compare` takes."""
