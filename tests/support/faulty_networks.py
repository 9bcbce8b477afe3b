"""Networks with a planted fault of half precision that FP32 has not: overflow, infinite weights, cancellation."""

from collections.abc import Callable

import torch

from cnx_deploy.core.deploy_spec import DeploySpec, Layout
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.diagnosis.mixed_precision import Case
from cnx_deploy.exporters.onnx import ExportSpec
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.runners.pytorch import reference_runner

DEEP = Variant("deep-test", (1, 1, 6, 1), (8, 16, 32, 64), 0, 0.0)
SIZE = 32
GATE = GATES["bf16"]
"""FP16's own noise of these random networks is a sixth of it at 32 px; each planted fault is four times beyond it."""
NO_WEIGHTS = WeightsRecord("random", "0", "0" * 64, "none (random weights)")


def hot_hidden(model: ConvNeXtV2, stage: int, index: int) -> None:
    """A hidden tensor beyond 65504: what is multiplied before GRN is divided behind it."""
    block, factor = model.stage_blocks()[stage][index], 5e4
    with torch.no_grad():
        for tensor in (block.pwconv1.weight, block.pwconv1.bias, block.grn.beta):
            tensor.mul_(factor)
        block.pwconv2.weight.div_(factor)


def infinite_weight(model: ConvNeXtV2, stage: int, index: int) -> None:
    """Weights of 1e5 for a hidden channel that is 5e-5 on every image: infinite in FP16, harmless in FP32."""
    block = model.stage_blocks()[stage][index]
    with torch.no_grad():
        block.pwconv1.weight[0], block.pwconv1.bias[0], block.grn.beta.flatten()[0] = 0.0, 1e-4, 0.0
        block.pwconv2.weight[:, 0] = 1e5


def cancellation(model: ConvNeXtV2, stage: int, index: int) -> None:
    """Hidden channels in pairs, whose second weights cancel by 400 but for a little: finite, far beyond the gate."""
    block = model.stage_blocks()[stage][index]
    half = block.pwconv1.weight.shape[0] // 2
    with torch.no_grad():
        for tensor in (block.pwconv1.weight, block.pwconv1.bias, block.grn.gamma[0, 0, 0], block.grn.beta[0, 0, 0]):
            tensor[half:] = tensor[:half]
        block.pwconv2.weight[:, :half] += 400.0
        block.pwconv2.weight[:, half:] -= 400.0


def hot_stream(model: ConvNeXtV2, stage: int, index: int) -> None:
    """What runs through a stage's blocks leaves FP16 at a block and comes back at the next LayerNorm."""
    bias = model.stage_blocks()[stage][index].pwconv2.bias
    with torch.no_grad():
        bias.copy_(1e5 * torch.linspace(-1.0, 1.0, len(bias)))


def hot_head(model: ConvNeXtV2) -> None:
    with torch.no_grad():
        model.head.weight.mul_(1e6)
        model.head.bias.mul_(1e6)


def planted(*faults: tuple[Callable[[ConvNeXtV2, int, int], None], int, int]) -> Callable[[ConvNeXtV2], None]:
    """Plant each fault in the block (stage, index) named with it."""

    def plant(model: ConvNeXtV2) -> None:
        for fault, stage, index in faults:
            fault(model, stage, index)

    return plant


def parts(*names: str) -> tuple[str, ...]:
    return tuple(f"stages.{name}" for name in names)


HIDDEN_2_3 = parts("2.3.pwconv1", "2.3.pwconv2")
RUN = (*parts("2.1", "2.2", "2.3", "2.4", "2.5"), "downsample_layers.3")
FAULTS: dict[str, tuple[Callable[[ConvNeXtV2], None], tuple[str, ...], int]] = {
    # What is wrong, what has to be found, and how many units that is.
    "hidden": (planted((hot_hidden, 2, 3)), HIDDEN_2_3, 1),
    "first block": (planted((hot_hidden, 0, 0)), parts("0.0.pwconv1", "0.0.pwconv2"), 1),
    "infinite weight": (planted((infinite_weight, 2, 2)), parts("2.2.pwconv2"), 1),
    "inaccurate": (planted((cancellation, 2, 4)), parts("2.4.pwconv2"), 1),
    "head": (hot_head, ("head",), 1),
    "run": (planted((hot_stream, 2, 1)), RUN, 6),
    "two": (
        planted((hot_hidden, 0, 0), (cancellation, 2, 4)),
        parts("0.0.pwconv1", "0.0.pwconv2", "2.4.pwconv2"),
        2,
    ),
    "run and block": (
        planted((hot_stream, 2, 1), (infinite_weight, 1, 0)),
        (*parts("1.0.pwconv2"), *RUN),
        7,
    ),
}


def faulty(fault: str, variant: Variant = DEEP) -> ConvNeXtV2:
    model = random_model(variant, 10, seed=0)
    FAULTS[fault][0](model)
    return model


def case_with(model: ConvNeXtV2, precision: str = "fp16", layout: Layout | None = None) -> Case:
    """The network on four images, no file."""
    spec = DeploySpec(precision, SIZE, layout=layout)
    batches = (runner_input(next(image_like_batches(4, SIZE, batch_size=4)), "float"),)
    record = ModelRecord(model.variant.name, 10, SIZE, NO_WEIGHTS, Preprocessing())
    expected = reference_runner(model, spec).run(batches[0])
    return Case(LoadedModel(model, NO_WEIGHTS), record, ExportSpec(deploy=spec), batches, expected, GATE)
