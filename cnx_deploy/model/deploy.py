"""Training form to deploy form: the same function, written for the engine that will run it.

Two layouts. `gpu`: channels-last tokens (N, HW, C), so that the compiler fuses matmul, bias and GELU. `cpu`:
channels-first throughout with pointwise layers as 1×1 convolutions, which ONNX Runtime's blocked kernels want.

Precision is part of the module: in FP16 every parameter is half except that each LayerNorm and each GRN
statistic is computed in FP32 (an *island*: `_widen` in, `.to` out), and logits leave in FP32. What is exported
is what is read here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnx_deploy.errors import InputError
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.folds import (
    fold_affine_into_conv,
    fold_affine_into_linear,
    fold_grn_beta,
    gain_moves_fewer_bytes_in_weight,
)
from cnx_deploy.model.layers import EPS, Block
from cnx_deploy.variants import check_image_size

__all__ = ["DeploySpec", "DeployedConvNeXtV2", "InputKind", "Layout", "Precision", "deploy_form"]

Precision = Literal["fp32", "fp16"]
Layout = Literal["gpu", "cpu"]
InputKind = Literal["float", "uint8"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class DeploySpec:
    """How a model is deployed.

    `image_size` is the side in pixels (it decides, per stage, where GRN's gain is applied). `mean` and `std` are
    the channel statistics of the preprocessing in units of a [0, 1] image; they are folded into the stem, so the
    deployed input is raw: "float" takes (N, 3, H, W) float32 in [0, 1], "uint8" takes (N, H, W, 3) uint8.
    `layout` None means: tokens for FP16, channels-first for FP32.
    """

    precision: Precision = "fp32"
    image_size: int = 224
    input_kind: InputKind = "float"
    layout: Layout | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        check_image_size(self.image_size, self.image_size)
        _check_choice("precision", self.precision, tuple(DTYPES))
        _check_choice("input kind", self.input_kind, get_args(InputKind))
        if self.layout is None:
            object.__setattr__(self, "layout", "gpu" if self.precision == "fp16" else "cpu")
        _check_choice("layout", str(self.layout), get_args(Layout))
        if any(value <= 0 for value in self.std):
            raise InputError(f"Every std of the normalisation must be positive, not {self.std}.")


class DeployedConvNeXtV2(nn.Module):
    """The deploy form; build it with `deploy_form`.

    Shape: raw images as `spec.input_kind` says -> (N, num_classes) float32 logits (float64 in float64).
    """

    def __init__(self, model: ConvNeXtV2, spec: DeploySpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = model.num_classes
        tokens = spec.layout == "gpu"
        self.stem = _folded_stem(model, spec)
        self.stem_norm = _ChannelsFirstNorm(spelled_out=tokens)
        stem_affine = model.downsample_layers[0][1]
        self.stem_gain = nn.Parameter(stem_affine.weight.detach().double().reshape(-1, 1, 1).clone())
        self.stem_shift = nn.Parameter(stem_affine.bias.detach().double().reshape(-1, 1, 1).clone())
        self.downsamplings = nn.ModuleList(_Downsampling(layer, tokens) for layer in list(model.downsample_layers)[1:])
        self.stages = nn.ModuleList(_stages(model, spec))
        weight, bias = fold_affine_into_linear(*_doubles(model.head), *_doubles(model.norm))
        self.head = _linear(weight, bias)

    def forward(self, images: Tensor) -> Tensor:
        """Classify; see the class for shapes."""
        dtype = self.head.weight.dtype
        if self.spec.input_kind == "uint8":
            images = images.to(dtype).permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W); TensorRT moves no uint8
        hidden = self.stem(images.to(dtype))
        hidden = (self.stem_norm(hidden) * _widen(self.stem_gain) + _widen(self.stem_shift)).to(dtype)
        hidden = self.stages[0](hidden)
        for downsampling, stage in zip(self.downsamplings, list(self.stages)[1:], strict=True):
            hidden = stage(downsampling(hidden))
        pooled = _widen(hidden).mean(dim=(2, 3))  # (N, C)
        pooled = F.layer_norm(pooled, pooled.shape[-1:], eps=EPS)
        return _widen(F.linear(pooled.to(dtype), self.head.weight, self.head.bias))


def deploy_form(model: ConvNeXtV2, spec: DeploySpec) -> DeployedConvNeXtV2:
    """Return the deploy form of `model` in evaluation mode; `model` is left as it was.

    Constants are folded in float64 and rounded once to the precision asked for.
    """
    deployed = DeployedConvNeXtV2(model, spec)
    return deployed.to(DTYPES[spec.precision]).eval().requires_grad_(False)


class _ChannelsFirstNorm(nn.Module):
    """LayerNorm without affine over axis 1 of (N, C, H, W), in FP32; the result stays FP32.

    Spelled out, TensorRT makes one kernel of it; permuted to a LayerNormalization it makes two, but ONNX Runtime
    fuses only that one. Spelled out it is right in FP32 alone: in FP16 the squares overflow.
    """

    def __init__(self, *, spelled_out: bool) -> None:
        super().__init__()
        self.spelled_out = spelled_out

    def forward(self, images: Tensor) -> Tensor:
        wide = _widen(images)
        if self.spelled_out:
            centred = wide - wide.mean(dim=1, keepdim=True)
            variance = (centred * centred).mean(dim=1, keepdim=True)
            return centred / torch.sqrt(variance + EPS)
        last = wide.permute(0, 2, 3, 1)
        return F.layer_norm(last, last.shape[-1:], eps=EPS).permute(0, 3, 1, 2)


class _Downsampling(nn.Module):
    """LayerNorm and 2×2 convolution, the norm's affine in the convolution. (N, C, H, W) -> (N, D, H/2, W/2)."""

    def __init__(self, layer: nn.Module, tokens: bool) -> None:
        super().__init__()
        norm, conv = layer
        self.norm = _ChannelsFirstNorm(spelled_out=tokens)
        self.conv = _convolution(*fold_affine_into_conv(*_doubles(conv), *_doubles(norm)), stride=2)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.conv(self.norm(images).to(images.dtype))
        return output


class _ResponseGain(nn.Module):
    """GRN's gain 1 + gamma·n, one number a sample and hidden channel; statistics in FP32.

    `axes` are the spatial axes, `channel_axis` the one the mean runs over; gamma has the shape of the result.
    """

    def __init__(self, gamma: Tensor, axes: tuple[int, ...], channel_axis: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(gamma)
        self.axes = axes
        self.channel_axis = channel_axis

    def forward(self, hidden: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(_widen(hidden), dim=self.axes, keepdim=True)
        share = norm / (norm.mean(dim=self.channel_axis, keepdim=True) + EPS)
        return (1.0 + _widen(self.gamma) * share).to(hidden.dtype)


class _TokenBlock(nn.Module):
    """The block on tokens. (N, C, H, W) -> (N, C, H, W), tokens (N, HW, C) between the two.

    `gain_in_weight`: GRN's gain scales the second weight, which becomes one a sample; else it scales the hidden
    tensor and the second pointwise layer is a 1×1 convolution that takes bias and residual along.
    """

    def __init__(self, block: Block, gain_in_weight: bool) -> None:
        super().__init__()
        self.gain_in_weight = gain_in_weight
        self.dwconv = _copy_depthwise(block.dwconv)
        self.pwconv1 = _linear(*fold_affine_into_linear(*_doubles(block.pwconv1), *_doubles(block.norm)))
        self.grn = _ResponseGain(_double(block.grn.gamma).reshape(1, 1, -1), axes=(1,), channel_axis=2)
        weight, bias = _doubles(block.pwconv2)
        bias = fold_grn_beta(weight, bias, _double(block.grn.beta).flatten())
        if gain_in_weight:
            self.weight2 = nn.Parameter(weight.t().contiguous())  # (4C, C)
            self.bias2 = nn.Parameter(bias)
        else:
            self.pwconv2 = _convolution(weight[:, :, None, None], bias)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.dwconv(images).flatten(2).permute(0, 2, 1)  # (N, HW, C)
        normed = F.layer_norm(_widen(tokens), tokens.shape[-1:], eps=EPS).to(images.dtype)
        hidden = F.gelu(self.pwconv1(normed))  # (N, HW, 4C)
        gain = self.grn(hidden)  # (N, 1, 4C)
        if self.gain_in_weight:
            branch = torch.matmul(hidden, gain.permute(0, 2, 1) * self.weight2) + self.bias2  # (N, HW, C)
            return images + branch.unflatten(1, images.shape[2:]).permute(0, 3, 1, 2)
        scaled = (hidden * gain).unflatten(1, images.shape[2:]).permute(0, 3, 1, 2)  # (N, 4C, H, W)
        output: Tensor = images + self.pwconv2(scaled)
        return output


class _ChannelsFirstBlock(nn.Module):
    """The block with pointwise layers as 1×1 convolutions. (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.dwconv = _copy_depthwise(block.dwconv)
        self.norm = _ChannelsFirstNorm(spelled_out=False)
        weight, bias = fold_affine_into_linear(*_doubles(block.pwconv1), *_doubles(block.norm))
        self.pwconv1 = _convolution(weight[:, :, None, None], bias)
        self.grn = _ResponseGain(_double(block.grn.gamma).reshape(1, -1, 1, 1), axes=(2, 3), channel_axis=1)
        weight, bias = _doubles(block.pwconv2)
        self.pwconv2 = _convolution(
            weight[:, :, None, None], fold_grn_beta(weight, bias, _double(block.grn.beta).flatten())
        )

    def forward(self, images: Tensor) -> Tensor:
        normed = self.norm(self.dwconv(images)).to(images.dtype)
        hidden = F.gelu(self.pwconv1(normed))  # (N, 4C, H, W)
        output: Tensor = images + self.pwconv2(hidden * self.grn(hidden))
        return output


def _stages(model: ConvNeXtV2, spec: DeploySpec) -> list[nn.Sequential]:
    side = spec.image_size // 4
    stages = []
    for stage in model.stages:
        width = stage[0].dwconv.in_channels
        in_weight = gain_moves_fewer_bytes_in_weight(width, side * side)
        blocks: Sequence[nn.Module] = (
            [_TokenBlock(block, in_weight) for block in stage]
            if spec.layout == "gpu"
            else [_ChannelsFirstBlock(block) for block in stage]
        )
        stages.append(nn.Sequential(*blocks))
        side //= 2
    return stages


def _folded_stem(model: ConvNeXtV2, spec: DeploySpec) -> nn.Conv2d:
    mean, std = torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)
    full_scale = 255.0 if spec.input_kind == "uint8" else 1.0
    weight, bias = _doubles(model.downsample_layers[0][0])
    return _convolution(*fold_affine_into_conv(weight, bias, 1.0 / (std * full_scale), -mean / std), stride=4)


def _widen(tensor: Tensor) -> Tensor:
    """Enter an FP32 island; FP32 and float64 stay what they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _doubles(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return _double(layer.weight), _double(layer.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _convolution(weight: Tensor, bias: Tensor, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride=stride, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _copy_depthwise(source: nn.Conv2d) -> nn.Conv2d:
    channels = source.in_channels
    layer = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, device="meta")
    layer.weight, layer.bias = nn.Parameter(_double(source.weight)), nn.Parameter(_double(source.bias))
    return layer


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"No {what} is called {value!r}. Choose one of: {', '.join(allowed)}.")
