"""The kernels as functions of tensors: compiled on CUDA tensors, interpreted on CPU tensors.

`half` below is torch.float16 or torch.bfloat16, the same of all tensors of a call. Every function allocates what it
returns. A function built of these can be a `torch.library.triton_op`.
"""

from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.kernels.loading import compiled_kernels, interpreted_kernels, interpreting
from cnx_deploy.kernels.settings import (
    EPS,
    KernelName,
    LaunchSettings,
    default_settings,
    grid,
    position_tiles,
    split_channels,
)

__all__ = ["gained_linear_residual", "gained_mlp_residual", "norm_linear_gelu", "response_gain"]


def norm_linear_gelu(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    settings: LaunchSettings,
    store_hidden: bool = True,
    with_sums: bool = True,
    channels_last: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """LayerNorm without affine, linear layer and GELU, with the sums of squares that GRN needs.

    Args:
        tokens: (N, HW, C), half; (N, C, HW) where not `channels_last`.
        weight: (C, 4C), half; the norm's affine is folded into it.
        bias: (4C,), half.
        settings: Tile and launch parameters.
        store_hidden: Whether the hidden tensor is written.
        with_sums: Whether the sums of squares are; a block without GRN needs none.
        channels_last: Layout of the tokens.

    Returns:
        The hidden tensor (N, HW, 4C), half, or None, and the sums of squares (N, tiles, 4C), FP32, or None.
    """
    batch, positions, channels = _stream_shape(tokens, channels_last)
    _check(tokens, tokens.dtype, weight=(weight, (channels, 4 * channels)), bias=(bias, (4 * channels,)))
    hidden = tokens.new_empty(batch, positions, 4 * channels) if store_hidden else None
    tiles = position_tiles(settings, positions)
    sums = tokens.new_empty(batch, tiles, 4 * channels, dtype=torch.float32) if with_sums else None
    _run(
        "norm_linear_gelu", settings, (batch, positions, channels), tokens, weight, bias, hidden, sums, positions,
        EPS=EPS, CHANNELS=channels, CHANNELS_LAST=channels_last,
        BLOCK_M=settings.block_m, BLOCK_N=settings.block_n, BLOCK_K=settings.block_k,
    )  # fmt: skip
    return hidden, sums


def response_gain(partial_sums: Tensor, gamma: Tensor, *, settings: LaunchSettings | None = None) -> Tensor:
    """GRN's gain 1 + gamma · norm / (mean of the norms + eps).

    Args:
        partial_sums: (N, tiles, 4C), FP32, of `norm_linear_gelu`.
        gamma: (4C,), FP32.
        settings: Launch parameters; the default ones where None.

    Returns:
        (N, 4C), FP32.
    """
    batch, tiles, width = partial_sums.shape
    _check(partial_sums, torch.float32, gamma=(gamma, (width,)))
    settings = settings or default_settings("response_gain", width // 4)
    gain = partial_sums.new_empty(batch, width)
    _run(
        "response_gain", settings, (batch, tiles, width // 4), partial_sums, gamma, gain, tiles,
        EPS=EPS, CHANNELS=width // 4, BLOCK_M=settings.block_m, BLOCK_N=settings.block_n,
    )  # fmt: skip
    return gain


def gained_linear_residual(
    hidden: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    *,
    settings: LaunchSettings,
    channels_last: bool = True,
) -> Tensor:
    """Residual + (hidden · gain) @ weight + bias.

    Args:
        hidden: (N, HW, 4C), half.
        gain: (N, 4C), FP32; None for a block without GRN.
        weight: (4C, C), half.
        bias: (C,), half; GRN's beta is folded into it.
        residual: (N, HW, C), half; (N, C, HW) where not `channels_last`.
        settings: Tile and launch parameters.
        channels_last: Layout of residual and result.

    Returns:
        A tensor like the residual.
    """
    batch, positions, channels = _stream_shape(residual, channels_last)
    _check(
        residual, residual.dtype, hidden=(hidden, (batch, positions, 4 * channels)),
        weight=(weight, (4 * channels, channels)), bias=(bias, (channels,)),
    )  # fmt: skip
    _check_gain(gain, batch, channels)
    out = torch.empty_like(residual)
    _run(
        "gained_linear_residual", settings, (batch, positions, channels),
        hidden, gain, weight, bias, residual, out, positions, CHANNELS=channels, CHANNELS_LAST=channels_last,
        BLOCK_M=settings.block_m, BLOCK_N=settings.block_n, BLOCK_K=settings.block_k,
    )  # fmt: skip
    return out


def gained_mlp_residual(
    tokens: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gain: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor,
    *,
    settings: LaunchSettings,
    channels_last: bool = True,
) -> Tensor:
    """Residual + (GELU(norm(tokens) @ weight1 + bias1) · gain) @ weight2 + bias2, without a hidden tensor in memory.

    Arguments and result are those of `norm_linear_gelu` and `gained_linear_residual`.
    """
    batch, positions, channels = _stream_shape(residual, channels_last)
    _check(
        residual, residual.dtype, tokens=(tokens, tuple(residual.shape)),
        weight1=(weight1, (channels, 4 * channels)), bias1=(bias1, (4 * channels,)),
        weight2=(weight2, (4 * channels, channels)), bias2=(bias2, (channels,)),
    )  # fmt: skip
    _check_gain(gain, batch, channels)
    out = torch.empty_like(residual)
    first, rest = split_channels(channels)
    _run(
        "gained_mlp_residual", settings, (batch, positions, channels),
        tokens, weight1, bias1, gain, weight2, bias2, residual, out, positions,
        EPS=EPS, CHANNELS=channels, CHANNELS_LAST=channels_last, FIRST=first, REST=rest,
        BLOCK_M=settings.block_m, BLOCK_K=settings.block_k,
    )  # fmt: skip
    return out


def _run(
    kernel: KernelName, settings: LaunchSettings, shape: tuple[int, int, int], first: Tensor, *values: Any, **words: Any
) -> None:
    """Launch a kernel on the device of its first tensor; `shape` is batch, positions and C."""
    programs = grid(kernel, settings, *shape)
    if first.is_cuda:
        run = getattr(compiled_kernels(), kernel)
        if type(first) is not Tensor:  # a trace has to see the kernel; run so, each launch would wrap it anew
            run = torch.library.wrap_triton(run)
        with torch.cuda.device(first.device):
            run[programs](first, *values, **words, num_warps=settings.num_warps, num_stages=settings.num_stages)
    elif type(first) is not Tensor:
        raise InputError("On a CPU the kernels are interpreted, which no trace can follow. Compile on a CUDA device.")
    else:
        with interpreting():
            getattr(interpreted_kernels(), kernel)[programs](first, *values, **words)


def _stream_shape(stream: Tensor, channels_last: bool) -> tuple[int, int, int]:
    """Batch, positions and C of a stream; refuses what the kernels cannot index."""
    if stream.ndim != 3 or stream.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(
            f"The kernels take a stream of three dimensions in float16 or bfloat16, got {tuple(stream.shape)} in "
            f"{stream.dtype}. Flatten height and width, and convert with .half() or .bfloat16()."
        )
    batch, second, third = stream.shape
    positions, channels = (second, third) if channels_last else (third, second)
    if positions * 4 * channels >= 2**31 or batch >= 2**16:
        raise InputError(
            f"A sample has {positions} positions of {4 * channels} hidden channels and there are {batch} samples: the "
            f"kernels count {2**31 - 1} values a sample and {2**16 - 1} samples. Use smaller images or batches."
        )
    return batch, positions, channels


def _check(like: Tensor, dtype: torch.dtype, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Refuse tensors of another shape, type or device than the kernel reads, or that are not contiguous."""
    for name, (tensor, shape) in {"stream": (like, tuple(like.shape)), **tensors}.items():
        given = (tuple(tensor.shape), tensor.dtype, tensor.device)
        if given != (shape, dtype, like.device) or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise InputError(
                f"{name} is {given[0]} in {given[1]} on {given[2]}, {layout}; expected {shape} in {dtype} on "
                f"{like.device}, contiguous."
            )


def _check_gain(gain: Tensor | None, batch: int, channels: int) -> None:
    if gain is not None:
        _check(gain, torch.float32, gain=(gain, (batch, 4 * channels)))
