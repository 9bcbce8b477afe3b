"""Networks whose activations pass the limits of FP16 without another function, and the same written the naive way."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.layers import EPS, Block, GlobalResponseNorm, LayerNormChannelsFirst
from cnx_deploy.runners.pytorch import reference_runner

HALF_MAX = 65504.0


def images_for(size: int, count: int = 2, kind: str = "float") -> Tensor:
    """Raw images in the layout of an exported file."""
    return runner_input(next(image_like_batches(count, size, batch_size=count)), kind)


def naive_limit(size: int, stage: int = 0) -> float:
    """RMS of a channel over a stage's positions at which a sum of squares leaves FP16: 4.57 in stage 1 at 224 px."""
    side = size // (4 << stage)
    return (HALF_MAX / side**2) ** 0.5


def with_hot_responses(variant: Variant, size: int, times_limit: float, classes: int = 10) -> ConvNeXtV2:
    """Random weights with stage 1's hidden channels at `times_limit` times the naive limit, in RMS of the largest.

    What is multiplied in front of GRN is divided behind it, so the logits stay of the order of one.
    """
    model = random_model(variant, classes, seed=0)
    for block in model.stage_blocks()[0]:
        for _ in range(3):  # GELU is no homogeneous function: the first factor does not hit
            factor = times_limit * naive_limit(size) / largest_response(model, block, size)
            with torch.no_grad():
                for tensor in (block.pwconv1.weight, block.pwconv1.bias, block.grn.beta):
                    tensor.mul_(factor)
                block.pwconv2.weight.div_(factor)
    return model


def largest_response(model: ConvNeXtV2, block: Block, size: int) -> float:
    """The largest RMS over positions among GRN's input channels of a block."""
    return float(recorded(model, block.act, size).square().mean(dim=(1, 2)).sqrt().max())


def with_hot_stream(variant: Variant, size: int, sigma: float, stage: int = 3, classes: int = 10) -> ConvNeXtV2:
    """Random weights with the tensor that runs through a stage's blocks scaled until LayerNorm's inputs have `sigma`.

    What follows a stage's stream is a LayerNorm everywhere, so the function is the same but for eps.
    """
    model = random_model(variant, classes, seed=0)
    blocks = model.stage_blocks()[stage]
    factor = sigma / float(recorded(model, blocks[0].dwconv, size).std())
    _, conv = model.downsampling_layers()[stage - 1]
    with torch.no_grad():
        for tensor in (conv.weight, conv.bias):
            tensor.mul_(factor)
        for block in blocks:
            for tensor in (block.dwconv.bias, block.pwconv2.weight, block.pwconv2.bias):
                tensor.mul_(factor)
    return model


def recorded(model: ConvNeXtV2, module: nn.Module, size: int) -> Tensor:
    """A module's output on the test images."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    reference_runner(model, DeploySpec(image_size=size)).run(images_for(size))["logits"]
    handle.remove()
    return found[0]


class NaiveResponseNorm(nn.Module):
    """GRN with its norm in the tensor's own type, as timm, transformers and the reference code have it."""

    def __init__(self, norm: GlobalResponseNorm) -> None:
        super().__init__()
        self.gamma, self.beta = norm.gamma, norm.beta

    def forward(self, hidden: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=(1, 2), keepdim=True)
        return self.gamma * (hidden * (norm / (norm.mean(dim=-1, keepdim=True) + EPS))) + self.beta + hidden


class NaiveNorm(nn.Module):
    """LayerNorm spelled out in the tensor's own type: over axis 1 as the reference code has it, or over the last."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.channels_first = isinstance(norm, LayerNormChannelsFirst)

    def forward(self, tensor: Tensor) -> Tensor:
        axis, shape = (1, (-1, 1, 1)) if self.channels_first else (-1, (-1,))
        centred = tensor - tensor.mean(axis, keepdim=True)
        normed = centred / torch.sqrt(centred.pow(2).mean(axis, keepdim=True) + EPS)
        return self.weight.reshape(shape) * normed + self.bias.reshape(shape)


class _Half(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.half()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images.half())
        return logits.float()


def naive_half_file(model: ConvNeXtV2, size: int, path: Path) -> Path:
    """Export `model` as the peers do: everything in half, GRN's norm and every LayerNorm as written."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GlobalResponseNorm):
                setattr(parent, name, NaiveResponseNorm(child))
            elif isinstance(child, nn.LayerNorm):
                setattr(parent, name, NaiveNorm(child))
    normalised = reference_runner(model, DeploySpec(image_size=size)).module
    torch.onnx.export(
        _Half(normalised).eval(), (torch.zeros(2, 3, size, size),), path, dynamo=True, opset_version=20, verbose=False,
        input_names=["images"], output_names=["logits"],
    )  # fmt: skip
    return path
