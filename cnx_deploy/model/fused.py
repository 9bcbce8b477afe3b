"""The deploy form with own kernels behind the depthwise convolutions, for PyTorch on an NVIDIA GPU.

A block then reads and writes 13 or 6 times its stream instead of 29 (`docs/kernels.md`). The algebra is the deploy
form's; what differs is where values are rounded: the normalised tokens and the scaled hidden tensor stay on the chip.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnx_deploy.core.errors import InputError
from cnx_deploy.kernels.operators import mlp
from cnx_deploy.kernels.tuning import StageChoice, StageShape
from cnx_deploy.model.deploy import DeployedConvNeXtV2
from cnx_deploy.model.deploy_blocks import TokenBlock
from cnx_deploy.model.deploy_layers import ChannelsFirstNorm, GainedLinear
from cnx_deploy.model.layers import EPS

__all__ = ["FusedBlock", "NativeNorm", "fuse", "fused_blocks"]

Choose = Callable[[StageShape], StageChoice]


class FusedBlock(nn.Module):
    """A block whose LayerNorm, pointwise layers, GRN and residual are own kernels.

    Shape: (N, C, H, W) -> (N, C, H, W), half; in memory channels come last.
    `choose` gives the kernels and tiles for a shape and is asked once a shape; or it is the choice for all shapes, with
    which the batch can stay open in an exported program.
    """

    def __init__(self, block: TokenBlock, choose: Choose | StageChoice) -> None:
        super().__init__()
        self.gamma: Tensor | None
        if (reason := _reason_against(block)) is not None:
            raise InputError(f"The block cannot run in own kernels: {reason}.")
        self.dwconv = block.dwconv.to(memory_format=torch.channels_last)
        self.weight1 = nn.Parameter(block.pwconv1.weight.t().contiguous(), requires_grad=False)
        self.bias1 = block.pwconv1.bias
        weight, self.bias2 = _second(block)
        self.weight2 = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("gamma", None if block.grn is None else block.grn.gamma.detach().flatten().float())
        self.choose = choose
        self._choices: dict[StageShape, StageChoice] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block; see the class for shapes."""
        images = images.to(self.weight1.dtype).contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = images.shape
        sizes = (batch, height * width, channels)
        tokens: Tensor = self.dwconv(images).permute(0, 2, 3, 1).reshape(sizes).contiguous()
        stream = images.permute(0, 2, 3, 1).reshape(sizes)
        choice = self.choose if isinstance(self.choose, StageChoice) else self.choice(sizes, self.choose)
        out = mlp(tokens, stream, self.weight1, self.bias1, self.gamma, self.weight2, self.bias2, choice)
        return out.reshape(batch, height, width, channels).permute(0, 3, 1, 2)

    def choice(self, sizes: tuple[int, int, int], choose: Choose) -> StageChoice:
        """What `choose` gives for a stream of these sizes, (N, HW, C)."""
        dtype = str(self.weight1.dtype).removeprefix("torch.")
        shape = StageShape(*sizes, dtype, self.gamma is not None)
        if shape not in self._choices:
            self._choices[shape] = choose(shape)
        return self._choices[shape]


class NativeNorm(nn.Module):
    """LayerNorm over the channels of (N, C, H, W) that come last in memory, as one kernel of PyTorch.

    Its statistics are FP32 whatever the type of the tensor (`aten/src/ATen/native/cuda/layer_norm_kernel.cu`).
    """

    def __init__(self, norm: ChannelsFirstNorm) -> None:
        super().__init__()
        self.gain, self.shift = norm.gain, norm.shift

    def forward(self, images: Tensor) -> Tensor:
        """Normalise; see the class for shapes."""
        last = images.permute(0, 2, 3, 1).contiguous()
        gain, shift = (None if each is None else each.to(last.dtype) for each in (self.gain, self.shift))
        return F.layer_norm(last, last.shape[-1:], gain, shift, EPS).permute(0, 3, 1, 2)


def fuse(deployed: DeployedConvNeXtV2, choose: Choose, *, for_all_shapes: bool = False) -> tuple[str, ...]:
    """Put own kernels into a deploy form, in place; returns the names of the blocks that stay as they are.

    `for_all_shapes`: `choose` is asked now, with one image of one position, and its answer holds for every shape, so
    that a program exported from the module can leave the batch open.
    Blocks that keep a part in FP32, or leave one of the folds out that the kernels stand on, stay.
    Raises InputError where no block can be fused.
    """
    kept = []
    for name, stage in deployed.stages.named_children():
        for index, block in list(stage.named_children()):
            if isinstance(block, TokenBlock) and _reason_against(block) is None:
                fused = FusedBlock(block, choose)
                if for_all_shapes:
                    fused.choose = fused.choice((1, 1, block.dwconv.in_channels), choose)
                setattr(stage, index, fused)
            else:
                kept.append(f"stages.{name}.{index} ({_reason_against(block)})")
    if not any(fused_blocks(deployed)):
        raise InputError(
            f"No block can run in own kernels: {kept[0]}. Export in FP16 or BF16 without leaving folds out."
        )
    for name, module in list(deployed.downsample_layers.named_modules()):
        for child_name, child in module.named_children():
            if isinstance(child, ChannelsFirstNorm):
                setattr(deployed.downsample_layers.get_submodule(name), child_name, NativeNorm(child))
    return tuple(kept)


def fused_blocks(deployed: DeployedConvNeXtV2) -> Iterator[FusedBlock]:
    """The blocks that run in own kernels."""
    return (module for module in deployed.modules() if isinstance(module, FusedBlock))


def _reason_against(block: nn.Module) -> str | None:
    """Why a block of the deploy form has to stay as it is; None where it can be fused."""
    if not isinstance(block, TokenBlock):
        return f"{type(block).__name__} has channels first"
    types = {parameter.dtype for parameter in block.parameters()} | {block.stream_type}
    if types not in ({torch.float16}, {torch.bfloat16}):
        return f"its parts are in {' and '.join(sorted(str(each).removeprefix('torch.') for each in types))}"
    if block.norm.gain is not None or block.beta is not None or block.scale is not None:
        return "an affine or a scale is not folded"
    return None


def _second(block: TokenBlock) -> tuple[Tensor, nn.Parameter]:
    """Weight (4C, C) and bias of the second pointwise layer, in whichever form it is."""
    layer: Any = block.pwconv2
    weight = layer.weight.detach()
    return (weight if isinstance(layer, GainedLinear) else weight.flatten(1).t()).contiguous(), layer.bias
