"""The exact algebra of the deploy form: constants that meet in the training form and can be one constant.

Every function works in the dtype it is given (the deploy form gives float64) and holds for all inputs, because
none of the convolutions that take a fold pads. Formulas: docs/decisions/0003-deploy-form-is-exact.md.
"""

import torch
from torch import Tensor

__all__ = [
    "fold_affine_into_conv",
    "fold_affine_into_linear",
    "fold_grn_beta",
    "gain_moves_fewer_bytes_in_weight",
]


def fold_affine_into_linear(weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """W (g·x + s) + b  =  (W diag g) x + (b + W s), for a LayerNorm's affine before a linear layer.

    Shapes: weight (O, I), bias (O,), gain and shift (I,).
    """
    return weight * gain, bias + weight @ shift


def fold_affine_into_conv(weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a dense convolution without padding: stem normalisation, LayerNorm before a downsampling.

    Shapes: weight (O, I, kh, kw), bias (O,), gain and shift (I,).
    """
    scaled = weight * gain[None, :, None, None]
    return scaled, bias + torch.einsum("oihw,i->o", weight, shift)


def fold_grn_beta(weight: Tensor, bias: Tensor, beta: Tensor) -> Tensor:
    """W (gamma·h·n + h + beta) + b  =  W ((1 + gamma·n)·h) + (b + W beta): the new bias.

    Shapes: weight (C, 4C), bias (C,), beta (4C,).
    """
    return bias + weight @ beta


def gain_moves_fewer_bytes_in_weight(channels: int, positions: int) -> bool:
    """Whether GRN's gain should scale the second pointwise weight rather than the hidden tensor.

    Scaling the hidden tensor (4C × HW a sample) costs a pass of its own; scaling the weight (4C × C a sample)
    costs a smaller one while C < HW, but then the matmul, having a weight a sample, leaves bias and residual to
    a kernel of their own (read 2C·HW, write C·HW). Counted in elements: 8C·C + 3C·HW < 8C·HW, so C < 5/8 HW.
    """
    return 8 * channels < 5 * positions
