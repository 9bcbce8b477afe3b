"""The layers of the deploy form: norms without affine, GRN's gain, and the block in both layouts.

Each takes constants in float64 and is cast as a whole; `widen` marks where an FP32 island begins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnx_deploy.model.folds import fold_affine_into_linear, fold_grn_beta
from cnx_deploy.model.layers import EPS, Block

__all__ = [
    "ChannelsFirstBlock",
    "ChannelsFirstNorm",
    "TokenBlock",
    "TokenNorm",
    "convolution",
    "doubles",
    "linear",
    "widen",
]


class TokenNorm(nn.Module):
    """LayerNorm without affine over the last axis, in FP32; the result has the input's type. (…, C) -> (…, C)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise; see the class for shapes."""
        return F.layer_norm(widen(tokens), tokens.shape[-1:], eps=EPS).to(tokens.dtype)


class ChannelsFirstNorm(nn.Module):
    """LayerNorm over axis 1 of (N, C, H, W), in FP32, with an affine if `gain` and `shift` (C,) are given.

    Spelled out, TensorRT makes one kernel of it; permuted to a LayerNormalization it makes two, but ONNX Runtime
    fuses only that one. Spelled out it is right in FP32 alone: in FP16 the squares overflow.
    """

    def __init__(self, spelled_out: bool, gain: Tensor | None = None, shift: Tensor | None = None) -> None:
        super().__init__()
        self.spelled_out = spelled_out
        self.gain = None if gain is None else nn.Parameter(gain)
        self.shift = None if shift is None else nn.Parameter(shift)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise; see the class for shapes."""
        wide = widen(images)
        gain = None if self.gain is None else widen(self.gain)
        shift = None if self.shift is None else widen(self.shift)
        if not self.spelled_out:
            last = wide.permute(0, 2, 3, 1)
            return F.layer_norm(last, last.shape[-1:], gain, shift, EPS).permute(0, 3, 1, 2).to(images.dtype)
        centred = wide - wide.mean(dim=1, keepdim=True)
        normed = centred / torch.sqrt((centred * centred).mean(dim=1, keepdim=True) + EPS)
        if gain is not None and shift is not None:
            normed = normed * gain[:, None, None] + shift[:, None, None]
        return normed.to(images.dtype)


class ResponseGain(nn.Module):
    """GRN's gain 1 + gamma·n, one number a sample and hidden channel; statistics in FP32.

    `spatial_axes` are summed over, the mean runs over `channel_axis`; `gamma` has the rank of the hidden tensor.
    """

    def __init__(self, gamma: Tensor, spatial_axes: tuple[int, ...], channel_axis: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(gamma)
        self.spatial_axes = spatial_axes
        self.channel_axis = channel_axis

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden tensor -> gain, 1 along the spatial axes."""
        norm = torch.linalg.vector_norm(widen(hidden), dim=self.spatial_axes, keepdim=True)
        share = norm / (norm.mean(dim=self.channel_axis, keepdim=True) + EPS)
        gain: Tensor = 1.0 + widen(self.gamma) * share
        return gain.to(hidden.dtype)


class GainedLinear(nn.Module):
    """Linear layer whose input channels are scaled by a gain a sample, applied to the weight.

    Shape: tokens (N, HW, I), gain (N, 1, I) -> (N, HW, O).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.t().contiguous())  # (I, O)
        self.bias = nn.Parameter(bias)

    def forward(self, tokens: Tensor, gain: Tensor) -> Tensor:
        """Apply; see the class for shapes."""
        return torch.matmul(tokens, gain.permute(0, 2, 1) * self.weight) + self.bias


class TokenBlock(nn.Module):
    """The block on tokens. (N, C, H, W) -> (N, C, H, W), tokens (N, HW, C) between the two.

    `gain_in_weight`: GRN's gain scales the second weight, which becomes one a sample; else it scales the hidden
    tensor, and the second pointwise layer is a 1×1 convolution that takes bias and residual along.
    """

    def __init__(self, block: Block, *, gain_in_weight: bool) -> None:
        super().__init__()
        self.gain_in_weight = gain_in_weight
        self.dwconv = _depthwise(block.dwconv)
        self.norm = TokenNorm()
        self.pwconv1 = linear(*fold_affine_into_linear(*doubles(block.pwconv1), *doubles(block.norm)))
        self.act = nn.GELU()
        self.grn = ResponseGain(_double(block.grn.gamma).reshape(1, 1, -1), spatial_axes=(1,), channel_axis=2)
        weight, bias = _second_pointwise(block)
        self.pwconv2 = GainedLinear(weight, bias) if gain_in_weight else convolution(weight[:, :, None, None], bias)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block; see the class for shapes."""
        size = images.shape[2:]
        tokens = self.dwconv(images).flatten(2).permute(0, 2, 1)  # (N, HW, C)
        hidden = self.act(self.pwconv1(self.norm(tokens)))  # (N, HW, 4C)
        gain = self.grn(hidden)  # (N, 1, 4C)
        # Unflattened before it is permuted: the other way round TensorRT needs one kernel more a block.
        if self.gain_in_weight:
            branch = _images_from_tokens(self.pwconv2(hidden, gain), size)
        else:
            branch = self.pwconv2(_images_from_tokens(hidden * gain, size))
        return images + branch


class ChannelsFirstBlock(nn.Module):
    """The block with pointwise layers as 1×1 convolutions. (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.dwconv = _depthwise(block.dwconv)
        self.norm = ChannelsFirstNorm(spelled_out=False)
        weight, bias = fold_affine_into_linear(*doubles(block.pwconv1), *doubles(block.norm))
        self.pwconv1 = convolution(weight[:, :, None, None], bias)
        self.act = nn.GELU()
        self.grn = ResponseGain(_double(block.grn.gamma).reshape(1, -1, 1, 1), spatial_axes=(2, 3), channel_axis=1)
        weight, bias = _second_pointwise(block)
        self.pwconv2 = convolution(weight[:, :, None, None], bias)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block; see the class for shapes."""
        hidden = self.act(self.pwconv1(self.norm(self.dwconv(images))))  # (N, 4C, H, W)
        output: Tensor = images + self.pwconv2(hidden * self.grn(hidden))
        return output


def widen(tensor: Tensor) -> Tensor:
    """Enter an FP32 island; FP32 and float64 stay what they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def doubles(layer: nn.Conv2d | nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer as float64 copies."""
    if layer.bias is None:
        raise TypeError(f"{type(layer).__name__} has no bias to fold")
    return _double(layer.weight), _double(layer.bias)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer that holds the given tensors: weight (O, I), bias (O,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def convolution(weight: Tensor, bias: Tensor, stride: int = 1) -> nn.Conv2d:
    """A dense convolution without padding that holds the given tensors: weight (O, I, k, k), bias (O,)."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride=stride, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _second_pointwise(block: Block) -> tuple[Tensor, Tensor]:
    weight, bias = doubles(block.pwconv2)
    return weight, fold_grn_beta(weight, bias, _double(block.grn.beta).flatten())


def _depthwise(source: nn.Conv2d) -> nn.Conv2d:
    channels = source.in_channels
    layer = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, device="meta")
    weight, bias = doubles(source)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _images_from_tokens(tokens: Tensor, size: torch.Size) -> Tensor:
    """(N, HW, C) -> (N, C, H, W)."""
    return tokens.reshape(-1, *size, tokens.shape[-1]).permute(0, 3, 1, 2)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64, copy=True)
