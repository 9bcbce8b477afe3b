"""The block's MLP as one operator of PyTorch, `torch.ops.cnx_deploy.mlp`, for eager mode and exporting.

torch.compile and AOTInductor see its kernels on a GPU; on a CPU, where they are interpreted, it cannot be compiled.
"""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.kernels.launch import gained_linear_residual, gained_mlp_residual, norm_linear_gelu, response_gain
from cnx_deploy.kernels.settings import LaunchSettings
from cnx_deploy.kernels.tuning import StageChoice

__all__ = ["mlp"]


def mlp(
    tokens: Tensor,
    residual: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gamma: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    choice: StageChoice,
) -> Tensor:
    """Return residual + MLP(LayerNorm(tokens)) with GRN between the two products.

    Args:
        tokens: (N, HW, C), float16 or bfloat16, contiguous; what the depthwise convolution gave.
        residual: (N, HW, C), the same type.
        weight1: (C, 4C), the same type; the norm's affine is folded into it.
        bias1: (4C,), the same type.
        gamma: GRN's, (4C,), float32; None for a block without GRN.
        weight2: (4C, C), the same type as the tokens.
        bias2: (C,), the same type; GRN's beta is folded into it.
        choice: whether the hidden tensor is stored, and the tiles.

    Returns:
        A tensor like the residual.
    """
    recomputed, first, second = choice.hidden == "recomputed", list(astuple(choice.first)), list(astuple(choice.second))
    output: Tensor = _mlp(tokens, residual, weight1, bias1, gamma, weight2, bias2, recomputed, first, second)
    return output


def _launch(
    tokens: Tensor,
    residual: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gamma: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    recomputed: bool,
    first: Sequence[int],
    second: Sequence[int],
) -> Tensor:
    opening, closing, gain = LaunchSettings(*first), LaunchSettings(*second), None
    hidden = None
    if gamma is not None or not recomputed:
        hidden, sums = norm_linear_gelu(
            tokens, weight1, bias1, settings=opening, store_hidden=not recomputed, with_sums=gamma is not None
        )
        gain = None if gamma is None or sums is None else response_gain(sums, gamma)
    if hidden is None:
        return gained_mlp_residual(tokens, weight1, bias1, gain, weight2, bias2, residual, settings=closing)
    return gained_linear_residual(hidden, gain, weight2, bias2, residual, settings=closing)


_mlp: Any = torch.library.triton_op("cnx_deploy::mlp", _launch, mutates_args=())
_mlp.register_fake(lambda tokens, residual, *rest: torch.empty_like(residual))  # no kernel runs on a shape
