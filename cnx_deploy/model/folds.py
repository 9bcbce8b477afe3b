"""The exact algebra of the deploy form: constants that meet in the training form and can be one constant.

Every function works in the dtype it is given (the deploy form gives float64) and holds for all inputs, because
none of the convolutions that take a fold of their input pads. Formulas: docs/decisions/0003-deploy-form-is-exact.md.
"""

import torch
from torch import Tensor

__all__ = [
    "fold_affine_into_conv",
    "fold_affine_into_linear",
    "fold_batch_norm",
    "fold_finest_level",
    "fold_grn_beta",
    "fold_input_normalisation",
    "fold_layer_scale",
    "fold_norm_into_patches",
    "fold_patches",
    "fold_rows_of_patches",
    "gain_moves_fewer_bytes_in_weight",
    "norm_moves_fewer_bytes_on_patches",
]


def fold_affine_into_linear(weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """W (g·x + s) + b  =  (W diag g) x + (b + W s), for a LayerNorm's affine before a linear layer.

    Shapes: weight (O, I), bias (O,), gain and shift (I,).
    """
    return weight * gain, bias + weight @ shift


def fold_affine_into_conv(weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a dense convolution without padding: LayerNorm before a downsampling.

    Shapes: weight (O, I, kh, kw), bias (O,), gain and shift (I,).
    """
    scaled = weight * gain[None, :, None, None]
    return scaled, bias + torch.einsum("oihw,i->o", weight, shift)


def fold_input_normalisation(
    weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor, full_scale: float
) -> tuple[Tensor, Tensor]:
    """W ((x / f - mean) / std) + b  =  W' x + b': an affine with gain 1 / (f·std) and shift -mean / std.

    `full_scale` f is what the network's input calls white: 1, or 255. Shapes: as above, mean and std (3,).
    """
    return fold_affine_into_conv(weight, bias, 1.0 / (std * full_scale), -mean / std)


def fold_patches(weight: Tensor) -> Tensor:
    """A convolution whose stride is its kernel is a matrix product over patches: (O, I, k, k) -> (O, k·k·I, 1, 1).

    The patch's elements are ordered row, column, channel.
    """
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1, 1).contiguous()


def fold_rows_of_patches(weight: Tensor, channels: int) -> Tensor:
    """The weight of a linear layer over flattened maps (C, n, n), for maps that come position by position (n, n, C).

    Shape: (O, C·n·n) -> (O, n·n·C).
    """
    return weight.reshape(len(weight), channels, -1).transpose(1, 2).flatten(1).contiguous()


def fold_finest_level(lateral: Tensor, bias: Tensor, layer: Tensor) -> tuple[Tensor, Tensor]:
    """The 3×3 of a pyramid's level over (lateral 1×1 + nearest upsampling), applied to both terms by itself.

    The first is a 3×3 over the lateral's input. The second is a transposed convolution of stride 2 and padding 1:
    nearest upsampling is one of kernel [1, 1], and kernels of the same axis convolve. The lateral's bias is zero beyond
    the edge as the upsampled map is, so it belongs to a channel of ones that is upsampled with it.
    Shapes: lateral (M, I, 1, 1), bias (M,), layer (O, M, 3, 3) -> (O, I, 3, 3) and (M + 1, O, 4, 4).
    """
    near = torch.einsum("omhw,mi->oihw", layer, lateral[:, :, 0, 0])
    of_ones = torch.einsum("omhw,m->ohw", layer, bias)[:, None]
    far = torch.cat([layer, of_ones], dim=1).flip(2, 3).transpose(0, 1)
    for axis in (2, 3):
        nothing = torch.zeros_like(far.narrow(axis, 0, 1))
        far = torch.cat([far, nothing], dim=axis) + torch.cat([nothing, far], dim=axis)
    return near, far.contiguous()


def fold_norm_into_patches(weight: Tensor, bias: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm (W x + b) = W' (r·x) + b'·r + shift with r = 1 / √(‖R x + t‖² + eps): R, t, W' and b'.

    The mean over the O output channels is linear, so centring W and b takes it out. The variance is then
    ‖[W b] [x; 1]‖² / O, and the triangular factor of [W b] / √O has the same norm at the width of a patch.
    Shapes: weight (O, I), the rest (O,) -> R (min(O, I + 1), I), t (min(O, I + 1),), W' (O, I), b' (O,).
    """
    weight, bias = weight - weight.mean(dim=0), bias - bias.mean()
    root = torch.linalg.qr(torch.cat([weight, bias[:, None]], dim=1) / len(weight) ** 0.5, mode="r").R
    return root[:, :-1], root[:, -1], weight * gain[:, None], bias * gain


def fold_batch_norm(
    weight: Tensor, mean: Tensor, variance: Tensor, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """G (W x - m) / √(v + eps) + s: batch norm of fixed statistics behind a convolution without bias, of any padding.

    Shapes: weight (O, I, kh, kw), the rest (O,).
    """
    scale = gain / torch.sqrt(variance + eps)
    return weight * scale[:, None, None, None], shift - mean * scale


def fold_grn_beta(weight: Tensor, bias: Tensor, beta: Tensor) -> Tensor:
    """W (gamma·h·n + h + beta) + b  =  W ((1 + gamma·n)·h) + (b + W beta): the new bias.

    Shapes: weight (C, 4C), bias (C,), beta (4C,).
    """
    return bias + weight @ beta


def fold_layer_scale(weight: Tensor, bias: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma (W x + b)  =  (diag(gamma) W) x + gamma b, for ConvNeXt V1's LayerScale behind a linear layer.

    Shapes: weight (O, I), bias and gamma (O,).
    """
    return weight * gamma[:, None], bias * gamma


def gain_moves_fewer_bytes_in_weight(channels: int, positions: int, *, before_downsampling: bool) -> bool:
    """Whether GRN's gain should scale the second pointwise weight rather than the hidden tensor.

    In elements a sample, with C channels and P positions, by the kernels that TensorRT-RTX 1.7 makes. Gain in the
    hidden tensor: scale it (8C·P), then a convolution that adds bias and residual (4C·P + 2C·P). Gain in the weight:
    scale that (4C·C written and read), a product (4C·P + C·P), then bias and residual in a kernel of their own
    (3C·P). So the weight while C < 3/4 P; and while C < P in the last block before a downsampling, whose LayerNorm
    joins the kernel of the residual and saves a pass (2C·P).
    """
    return channels < positions if before_downsampling else 4 * channels < 3 * positions


def norm_moves_fewer_bytes_on_patches(channels: int, patch: int) -> bool:
    """Whether the stem's norm should be applied to the patches rather than to the convolution's result.

    In elements a position, with patches of E elements: after the convolution it reads and writes 2C; before, the
    product R x, its square sum and the scaling read and write the patch six times at most. So where 2C > 6E.
    """
    return channels > 3 * patch
