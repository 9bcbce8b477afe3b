"""Blocks of the deploy form whose tensors are stored in eight bits, as `core.eight_bits` records them.

QuantizeLinear and DequantizeLinear are two operators of torch here, static and per tensor; an export writes ONNX's in
their place. Gains are powers of two that even out a tensor's channels before it is rounded; another constant takes each
back, so that the function stays (docs/decisions/0034-eight-bits.md has the formulas).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnxscript import opset21
from torch import Tensor, nn

from cnx_deploy.core.eight_bits import LARGEST, PLACEMENTS, BlockScales, EightBitType
from cnx_deploy.model.deploy_blocks import TokenBlock, images_from_tokens
from cnx_deploy.model.deploy_layers import GainedLinear, ResponseGain, TokenNorm, type_of, widen
from cnx_deploy.model.layers import EPS, Block

__all__ = ["ONNX_TRANSLATIONS", "Product", "QuantisedBlock", "Quantiser"]

ONNX_TYPES: Mapping[str, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


@torch.library.custom_op("cnx_deploy::quantise", mutates_args=())
def quantise(tensor: Tensor, scale: float, kind: str) -> Tensor:
    """Fractions -> the same shape in eight bits, divided by the scale, rounded half to even and saturated."""
    scaled = widen(tensor) / scale
    if kind == "int8":
        return scaled.round().clamp(-128, 127).to(torch.int8)
    return scaled.clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn)


@torch.library.custom_op("cnx_deploy::dequantise", mutates_args=())
def dequantise(stored: Tensor, scale: float, like: Tensor) -> Tensor:
    """Eight bits -> the same shape in the type of `like`, times the scale."""
    return (stored.to(widen(like).dtype) * scale).to(like.dtype)


@quantise.register_fake
def _(tensor: Tensor, scale: float, kind: str) -> Tensor:
    return torch.empty_like(tensor, dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn)


@dequantise.register_fake
def _(stored: Tensor, scale: float, like: Tensor) -> Tensor:
    return torch.empty_like(stored, dtype=like.dtype)


def _quantize_linear(tensor: Any, scale: float, kind: str) -> Any:
    return opset21.QuantizeLinear(tensor, _scalar(scale, tensor.dtype), output_dtype=int(ONNX_TYPES[kind]))


def _dequantize_linear(stored: Any, scale: float, like: Any) -> Any:
    return opset21.DequantizeLinear(stored, _scalar(scale, like.dtype))


def _scalar(value: float, dtype: ir.DataType) -> Any:
    return opset21.Constant(value=ir.to_proto(ir.tensor(value, dtype=dtype)))


ONNX_TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.cnx_deploy.quantise.default: _quantize_linear,
    torch.ops.cnx_deploy.dequantise.default: _dequantize_linear,
}
"""What torch's exporter writes for each operator."""


class Quantiser(nn.Module):
    """Store a tensor in eight bits and read it back: any shape -> the same, in the same type."""

    def __init__(self, scale: float, kind: EightBitType) -> None:
        super().__init__()
        self.scale, self.kind = scale, kind

    def forward(self, tensor: Tensor) -> Tensor:
        """Round; see the class."""
        stored = torch.ops.cnx_deploy.quantise(tensor, self.scale, self.kind)
        back: Tensor = torch.ops.cnx_deploy.dequantise(stored, self.scale, tensor)
        return back


class Constant(nn.Module):
    """A weight, which `store` rounds to eight bits; called with a tensor of the type that is wanted."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(weight)
        self.scale = 0.0

    def store(self, scale: float, kind: EightBitType) -> None:
        """Keep the weight in eight bits alone."""
        assert self.weight is not None
        self.register_buffer("stored", torch.ops.cnx_deploy.quantise(self.weight.detach(), scale, kind))
        self.weight, self.scale = None, scale

    def forward(self, like: Tensor) -> Tensor:
        """Return the weight in the type of `like`."""
        if self.weight is not None:
            return self.weight.to(like.dtype)
        weight: Tensor = torch.ops.cnx_deploy.dequantise(self.stored, self.scale, like)
        return weight


class Product(nn.Module):
    """A linear layer whose product passes a tap before the bias: tokens (…, I) -> (…, O).

    `gain` (O,) is what the weight's outputs were multiplied with; it is taken back behind the tap.
    """

    def __init__(self, weight: Tensor, bias: Tensor, gain: Tensor | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.inverse = None if gain is None else nn.Parameter(1.0 / gain)
        self.constant = Constant((weight if gain is None else weight * gain[:, None]).t().contiguous())  # (I, O)

    def forward(self, tokens: Tensor, tap: Callable[[Tensor], Tensor], weight: Tensor | None = None) -> Tensor:
        """Apply, with the weight (I, O) or (N, I, O) of the call where one is given; see the class for shapes."""
        product = tap(torch.matmul(tokens, self.constant(self.bias) if weight is None else weight))
        return (product if self.inverse is None else product * self.inverse) + self.bias


class PointwiseConvolution(nn.Module):
    """A 1x1 convolution, (N, I, H, W) -> (N, O, H, W), whose weight can be stored in eight bits."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.bias, self.constant = nn.Parameter(bias), Constant(weight[:, :, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Apply; see the class for shapes."""
        return F.conv2d(images, self.constant(self.bias), self.bias)


class EvenedResponseGain(ResponseGain):
    """GRN's gain of a hidden tensor that was multiplied with `hidden_gain`, times `own_gain`; (4C,) each.

    Shapes are those of `ResponseGain`.
    """

    def __init__(self, plain: ResponseGain, hidden_gain: Tensor, own_gain: Tensor) -> None:
        super().__init__(plain.gamma.detach().flatten(), plain.channel_axis)
        self.channel_axis, self.position_axes = plain.channel_axis, plain.position_axes
        factor = (own_gain / hidden_gain).reshape(plain.gamma.shape)
        self.gamma, self.factor = nn.Parameter(plain.gamma.detach() * factor), nn.Parameter(factor)
        self.square_factor = nn.Parameter(hidden_gain.reshape(plain.gamma.shape) ** -2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden tensor -> gain, in gamma's type."""
        wide = widen(hidden)
        squares = (wide * wide).sum(dim=self.position_axes, keepdim=True) * widen(self.square_factor)
        inverse_mean = 1.0 / (torch.sqrt(squares).mean(dim=self.channel_axis, keepdim=True) + EPS)  # (N, 1, 1)
        share = torch.sqrt(squares * (inverse_mean * inverse_mean))
        gain: Tensor = widen(self.factor) + widen(self.gamma) * share
        return gain.to(self.gamma.dtype)


class QuantisedBlock(TokenBlock):
    """The block on tokens with tensors in eight bits; see `TokenBlock` for shapes and arguments.

    `taps`: by letter (`core.eight_bits.LETTERS`) what a tensor passes through, a `Quantiser`, or an observer while the
    scales are measured. Letters of constants have none: `constants` are stored in eight bits.
    """

    def __init__(self, block: Block, scales: BlockScales, placement: str, **words: Any) -> None:
        super().__init__(block, **words)
        first, second = _weight_and_bias(self.pwconv1), _weight_and_bias(self.pwconv2)  # (4C, C), (C, 4C)
        ones, gains = torch.ones_like(first[1]), _gains(scales)
        behind = gains.get("h", ones)  # what takes the hidden tensor's gain back
        if isinstance(self.grn, ResponseGain):
            if {"h", "s"} & gains.keys():
                self.grn = EvenedResponseGain(self.grn, behind, gains.get("s", ones))
            behind = gains.get("s", ones)
        second = second[0] / behind, second[1]
        if "x" in gains:
            first = first[0] / gains["x"], first[1]
            own = [None if affine is None else affine.detach() for affine in (self.norm.gain, self.norm.shift)]
            gain = gains["x"] if own[0] is None else own[0] * gains["x"]
            self.norm = TokenNorm(gain, None if own[1] is None else own[1] * gains["x"])
        self.hidden_gain = nn.Parameter(gains["h"]) if "h" in gains else None
        self.scales_hidden = self.grn is not None and not self.gain_in_weight
        self.add_module("pwconv1", Product(*first, gains.get("p")))
        self.pwconv2 = PointwiseConvolution(*second) if self.scales_hidden else Product(*second, gains.get("o"))
        self.taps = nn.ModuleDict()
        for letter, scale in scales.scales.items():
            kind, constant = PLACEMENTS[placement].types[letter], self.constants.get(letter)
            if constant is not None:
                constant.store(scale, kind)
            else:
                self.taps[letter] = Quantiser(scale, kind)

    @property
    def _first(self) -> Product:
        return cast("Product", self._modules["pwconv1"])

    @property
    def _second(self) -> Product | PointwiseConvolution:
        return cast("Product | PointwiseConvolution", self.pwconv2)

    @property
    def constants(self) -> dict[str, Constant]:
        """The weights that can be stored in eight bits, by letter."""
        known = {"w1": self._first.constant}
        if not self.gain_in_weight:
            known["w2" if self.scales_hidden else "g"] = self._second.constant
        return known

    @property
    def letters(self) -> tuple[str, ...]:
        """The tensors that this block has."""
        second = ("s", "w2") if self.scales_hidden else ("g", "o")
        return ("x", "w1", "p", "h", *second)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block; see `TokenBlock` for shapes."""
        images, size = images.to(self.stream_type), images.shape[2:]
        tokens = self.dwconv(images.to(type_of(self.dwconv))).permute(0, 2, 3, 1)
        if not self.open_size:
            tokens = tokens.flatten(1, 2)  # (N, HW, C)
        normed = self._tap("x", self.norm(tokens).to(type_of(self.pwconv1)))
        hidden = self.act(self._first(normed, partial(self._tap, "p")))  # (N, HW, 4C)
        hidden = self._tap("h", hidden if self.hidden_gain is None else hidden * self.hidden_gain)
        # From the rounded tensor: read before, it would be stored in half besides.
        gain = None if self.grn is None else self.grn(hidden)  # (N, 1, 4C)
        return (images + self._branch(hidden, gain, size)).to(self.stream_type)

    def _branch(self, hidden: Tensor, gain: Tensor | None, size: torch.Size) -> Tensor:
        second = self._second
        dtype = type_of(second)
        if isinstance(second, PointwiseConvolution):
            assert gain is not None
            if not self.open_size:
                hidden, gain = hidden.reshape(-1, *size, hidden.shape[-1]), gain[:, None]
            scaled = self._tap("s", (hidden * gain).to(dtype))
            branch: Tensor = second(scaled.permute(0, 3, 1, 2))
            return branch
        weight = None
        if gain is not None:
            weight = self._tap("g", (gain.transpose(-1, -2) * second.constant(second.bias)).to(dtype))
        return images_from_tokens(second(hidden.to(dtype), partial(self._tap, "o"), weight), size)

    def _tap(self, letter: str, tensor: Tensor) -> Tensor:
        if letter not in self.taps:
            return tensor
        tapped: Tensor = self.taps[letter](tensor)
        return tapped


def _weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (O, I) and bias (O,) of a pointwise layer of the plain form."""
    assert isinstance(layer, nn.Linear | nn.Conv2d | GainedLinear)
    assert layer.bias is not None
    weight = layer.weight.detach().flatten(1)
    return weight.t() if isinstance(layer, GainedLinear) else weight, layer.bias.detach()


def _gains(scales: BlockScales) -> dict[str, Tensor]:
    """The gains by letter, in float64."""
    powers = {letter: torch.tensor(scales.exponents(letter), dtype=torch.float64) for letter in scales.gains}
    return {letter: torch.exp2(exponents) for letter, exponents in powers.items()}
