"""The layers of the deploy form: norms, GRN's gain in each layout, the stem over patches.

Each takes constants in float64 and is cast as a whole; `widen` marks where an FP32 island begins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.image_size import ImageSize, sides
from cnx_deploy.model.folds import fold_norm_into_patches, fold_patches
from cnx_deploy.model.layers import EPS

__all__ = [
    "ChannelsFirstNorm",
    "FlattenedNorm",
    "GainedLinear",
    "InputNormalisation",
    "MirrorMean",
    "NormResponseGain",
    "NormedPatchConvolution",
    "PatchConvolution",
    "PooledResponseGain",
    "ResponseGain",
    "TokenNorm",
    "convolution",
    "depthwise",
    "doubles",
    "linear",
    "map_norm",
    "type_of",
    "widen",
]


class TokenNorm(nn.Module):
    """LayerNorm over the last axis, in FP32, with an affine if `gain` and `shift` (C,) are given. (…, C) -> (…, C).

    The result has the input's type.
    """

    def __init__(self, gain: Tensor | None = None, shift: Tensor | None = None) -> None:
        super().__init__()
        self.gain = None if gain is None else nn.Parameter(gain)
        self.shift = None if shift is None else nn.Parameter(shift)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise; see the class for shapes."""
        gain, shift = _widened(self.gain), _widened(self.shift)
        return F.layer_norm(widen(tokens), tokens.shape[-1:], gain, shift, EPS).to(tokens.dtype)


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
        wide, gain, shift = widen(images), _widened(self.gain), _widened(self.shift)
        if not self.spelled_out:
            last = wide.permute(0, 2, 3, 1)
            return F.layer_norm(last, last.shape[-1:], gain, shift, EPS).permute(0, 3, 1, 2).to(images.dtype)
        centred = wide - wide.mean(dim=1, keepdim=True)
        normed = centred / torch.sqrt((centred * centred).mean(dim=1, keepdim=True) + EPS)
        if gain is not None and shift is not None:
            normed = normed * gain[:, None, None] + shift[:, None, None]
        return normed.to(images.dtype)


class FlattenedNorm(TokenNorm):
    """The same over tokens: (N, C, H, W) to (N, HW, C) and back, which costs nothing where maps are channels last.

    OpenVINO has one operator for a norm over the last of three axes, and takes that of four apart.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Normalise; see the class for shapes."""
        channels, size = images.shape[1], images.shape[2:]
        tokens = super().forward(images.permute(0, 2, 3, 1).flatten(1, 2))
        return tokens.reshape(-1, *size, channels).permute(0, 3, 1, 2)


class ResponseGain(nn.Module):
    """GRN's gain 1 + gamma·n, one number a sample and hidden channel; statistics in FP32.

    Shape: hidden (N, HW, 4C) -> (N, 1, 4C), or with `channel_axis` 1 (N, 4C, HW) -> (N, 4C, 1); gamma (4C,). With
    `open_size` hidden has two axes of positions, (N, H, W, 4C) or (N, 4C, H, W), and so has the gain.
    n = √(q / m²) with q the sum of squares and m = mean √q + eps, which is √q / m: written so, TensorRT stores q
    alone; written as a norm divided by its mean, it stores the norm as well.
    """

    def __init__(self, gamma: Tensor, channel_axis: int = 2, *, open_size: bool = False) -> None:
        super().__init__()
        self.channel_axis = 3 if open_size and channel_axis == 2 else channel_axis
        axes = range(1, 4 if open_size else 3)
        self.position_axes = tuple(axis for axis in axes if axis != self.channel_axis)
        for axis in self.position_axes:
            gamma = gamma.unsqueeze(axis - 1)
        self.gamma = nn.Parameter(gamma)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden tensor -> gain, in gamma's type."""
        wide = widen(hidden)
        squares = (wide * wide).sum(dim=self.position_axes, keepdim=True)
        inverse_mean = 1.0 / (torch.sqrt(squares).mean(dim=self.channel_axis, keepdim=True) + EPS)  # (N, 1, 1)
        share = torch.sqrt(squares * (inverse_mean * inverse_mean))
        gain: Tensor = 1.0 + widen(self.gamma) * share
        return gain.to(self.gamma.dtype)


class PooledResponseGain(nn.Module):
    """The same from operators that ONNX Runtime runs in its blocked layout, between two convolutions that are.

    Shape: hidden (N, 4C, H, W), gamma (4C,) -> (N, 4C, 1, 1).
    The mean square is an average pool, so n = rms / (mean rms + eps / √HW); 1 + gamma·n is a depthwise convolution.
    """

    def __init__(self, gamma: Tensor) -> None:
        super().__init__()
        self.affine = depthwise(gamma[:, None, None, None], torch.ones_like(gamma))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden tensor -> gain, in gamma's type."""
        wide, (height, width) = widen(hidden), hidden.shape[2:]
        rms = torch.sqrt(F.avg_pool2d(wide * wide, (height, width)))
        share = rms / (rms.mean(dim=1, keepdim=True) + EPS / (height * width) ** 0.5)
        gain: Tensor = self.affine(share.to(type_of(self.affine)))
        return gain


class NormResponseGain(nn.Module):
    """The same as it is defined, from one reduction. Shape: hidden (N, 4C, H, W), gamma (4C,) -> (N, 4C, 1, 1)."""

    def __init__(self, gamma: Tensor) -> None:
        super().__init__()
        self.gamma = nn.Parameter(gamma[:, None, None])

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden tensor -> gain, in gamma's type."""
        norm = torch.linalg.vector_norm(widen(hidden), dim=(2, 3), keepdim=True)
        gain: Tensor = 1.0 + widen(self.gamma) * (norm / (norm.mean(dim=1, keepdim=True) + EPS))
        return gain.to(self.gamma.dtype)


class GainedLinear(nn.Module):
    """Linear layer whose input channels are scaled by a gain a sample, applied to the weight.

    Shape: tokens (N, HW, I), gain (N, 1, I) -> (N, HW, O); or (N, H, W, I), (N, 1, 1, I) -> (N, H, W, O).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.t().contiguous())  # (I, O)
        self.bias = nn.Parameter(bias)

    def forward(self, tokens: Tensor, gain: Tensor) -> Tensor:
        """Apply; see the class for shapes."""
        turned = gain.permute(0, 2, 1) if gain.ndim == 3 else gain.permute(0, 1, 3, 2)
        weight = (turned * self.weight).to(self.weight.dtype)
        return torch.matmul(tokens.to(self.weight.dtype), weight) + self.bias


class PatchConvolution(nn.Module):
    """A k×k convolution of stride k as a 1×1 convolution over patches; `weight` (O, I, k, k), `bias` (O,).

    Shape: (N, I, H, W), or (N, H, W, I) if `channels_last` -> (N, O, H//k, W//k).
    TensorRT pads three channels to four, from a constant of zeros as large as the batch; of 48 it pads none.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, image_size: ImageSize, channels_last: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(fold_patches(weight)), nn.Parameter(bias)
        self.in_chans, self.kernel, self.image_size = weight.shape[1], weight.shape[2], sides(image_size)
        self.channels_last = channels_last

    def forward(self, images: Tensor) -> Tensor:
        """Apply; see the class for shapes."""
        return F.conv2d(self.patches(images), self.weight, self.bias)

    def patches(self, images: Tensor) -> Tensor:
        """Images -> (N, I·k·k, H//k, W//k), ordered row, column, channel."""
        channels, k, (rows, columns) = self.in_chans, self.kernel, (side // self.kernel for side in self.image_size)
        if (rows * k, columns * k) != self.image_size:  # what fills no patch is left out, as a strided convolution does
            images = (
                images[:, : rows * k, : columns * k] if self.channels_last else images[..., : rows * k, : columns * k]
            )
        if self.channels_last:
            split = images.reshape(-1, rows, k, columns, k, channels).permute(0, 2, 4, 5, 1, 3)
        else:
            split = images.reshape(-1, channels, rows, k, columns, k).permute(0, 3, 5, 1, 2, 4)
        return split.reshape(-1, channels * k * k, rows, columns)


class NormedPatchConvolution(PatchConvolution):
    """The same with the LayerNorm that follows, applied to the patches: `gain` and `shift` (O,), statistics in FP32.

    A patch is scaled by r / `full_scale`, so that it stays in the FP16 range (r is at most 1000, a level 255), and
    carries r in eight more channels, since the compiler pads channels to a multiple of eight.
    """

    COPIES = 8

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        gain: Tensor,
        shift: Tensor,
        *,
        full_scale: float,
        image_size: ImageSize,
        channels_last: bool,
    ) -> None:
        super().__init__(weight, bias, image_size=image_size, channels_last=channels_last)
        self.full_scale = full_scale
        root, offset, scaled, carried = fold_norm_into_patches(self.weight.flatten(1), bias, gain)
        padding = (0, 0, 0, -len(root) % self.COPIES)
        self.root = convolution(F.pad(root, padding)[:, :, None, None], F.pad(offset[:, None], padding)[:, 0])
        copies = (carried / self.COPIES)[:, None].expand(-1, self.COPIES)
        self.weight = nn.Parameter(torch.cat([scaled * full_scale, copies], dim=1)[:, :, None, None])
        self.bias = nn.Parameter(shift)

    def forward(self, images: Tensor) -> Tensor:
        """Apply; see the class for shapes."""
        patches = self.patches(images)
        rooted = widen(self.root(patches))
        inverse = 1.0 / torch.sqrt((rooted * rooted).sum(dim=1, keepdim=True) + EPS)  # (N, 1, H//k, W//k)
        scaled = widen(patches) * (inverse / self.full_scale)
        carried = inverse.expand(-1, self.COPIES, -1, -1)
        return F.conv2d(torch.cat([scaled, carried], dim=1).to(patches.dtype), self.weight, self.bias)


class InputNormalisation(nn.Module):
    """(x / full_scale - mean) / std by channel, where it is not folded; computed in the type of `mean`.

    Shape: (N, C, H, W), or (N, H, W, C) if `channels_last` -> the same.
    """

    def __init__(self, mean: Tensor, std: Tensor, full_scale: float, *, channels_last: bool) -> None:
        super().__init__()
        shape = (-1,) if channels_last else (-1, 1, 1)
        self.gain = nn.Parameter((1.0 / (std * full_scale)).reshape(shape))
        self.shift = nn.Parameter((-mean / std).reshape(shape))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise; see the class for shapes."""
        return images.to(self.gain.dtype) * self.gain + self.shift


class MirrorMean(nn.Module):
    """The mean of an output over each image and its mirror, which follow all images: (2N, …) -> (N, …)."""

    def forward(self, output: Tensor) -> Tensor:
        """Average in the output's own type, which is FP32 at least."""
        return output.reshape(2, -1, *output.shape[1:]).mean(dim=0)


def map_norm(spec: DeploySpec, *affine: Tensor) -> nn.Module:
    """The LayerNorm over the channels of maps (N, C, H, W) in a deployment's layout; `affine` is gain and shift."""
    return FlattenedNorm(*affine) if spec.flattens_norms else ChannelsFirstNorm(spec.layout == "gpu", *affine)


def widen(tensor: Tensor) -> Tensor:
    """Enter an FP32 island; FP32 and float64 stay what they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def type_of(module: nn.Module) -> torch.dtype:
    """The type of a module's parameters, which it wants its input in."""
    return next(module.parameters()).dtype


def doubles(layer: nn.Conv2d | nn.Linear | nn.LayerNorm | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
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


def depthwise(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A depthwise convolution that keeps the size and holds the given tensors: weight (C, 1, k, k), bias (C,)."""
    channels, kernel = weight.shape[0], weight.shape[2]
    layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _widened(constant: Tensor | None) -> Tensor | None:
    return None if constant is None else widen(constant)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64, copy=True)
