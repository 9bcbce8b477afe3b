"""Which patches are hidden, what the decoder is to predict of them, and how wrong it is.

A mask has one position a 32×32 patch and is True where it hides. Targets are patches, normalised one by one. Source:
Woo et al., arXiv:2301.00808, sections 3 and 3.1. As in the reference code (facebookresearch/ConvNeXt-V2,
models/fcmae.py), a patch's values are ordered by row, column and colour, its variance is the unbiased one (divided by
3071 for RGB), and 1e-6 is added to the variance.
"""

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import STRIDE

__all__ = ["enlarged", "images_of_patches", "masked_count", "masked_losses", "normalised_patches",
           "patches_of", "random_masks"]  # fmt: skip

VARIANCE_EPS = 1e-6


def masked_count(positions: int, ratio: float) -> int:
    """Hidden positions among so many: round(ratio · positions).

    The reference code keeps int(positions · (1 - ratio)), which hides one more where that is no whole number: 30 of 49
    at 0.6, here 29.

    Raises:
        InputError: None or all would be hidden, so nothing could be learned.
    """
    if not 0.0 < ratio < 1.0:
        raise InputError(f"The mask ratio must be between 0 and 1, got {ratio}; the paper's is 0.6.")
    hidden = round(ratio * positions)
    if not 0 < hidden < positions:
        raise InputError(
            f"Of {positions} patches a mask ratio of {ratio} hides {hidden}: some must be hidden and some visible. "
            "Take larger images (64 px have four patches), or another ratio."
        )
    return hidden


def random_masks(count: int, grid: tuple[int, int], ratio: float, generator: torch.Generator) -> Tensor:
    """(count, h, w) masks of a `grid` of (h, w) patches, each with exactly `masked_count` hidden."""
    height, width = grid
    hidden = masked_count(height * width, ratio)
    order = torch.rand(count, height * width, generator=generator).argsort(dim=1)
    masks = torch.zeros(count, height * width, dtype=torch.bool)
    return masks.scatter_(1, order[:, :hidden], True).view(count, height, width)


def enlarged(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, h, w) masks -> (N, 1, H, W) for `size` (H, W), each value repeated over its square.

    Raises:
        InputError: `size` is not the same multiple of the mask's on both sides.
    """
    scale = size[0] // masks.shape[1]
    if size != (scale * masks.shape[1], scale * masks.shape[2]) or scale == 0:
        raise InputError(
            f"Masks of {masks.shape[1]}x{masks.shape[2]} patches do not fit {size[0]}x{size[1]} positions, which must "
            "be the same multiple on both sides. Draw them for the images' own patches of 32x32 pixels."
        )
    return masks.repeat_interleave(scale, 1).repeat_interleave(scale, 2).unsqueeze(1)


def patches_of(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, L, C · 1024), patches row by row."""
    count, colours, height, width = images.shape
    tiles = images.reshape(count, colours, height // STRIDE, STRIDE, width // STRIDE, STRIDE)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, colours * STRIDE * STRIDE)


def images_of_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, L, C · 1024) of a `grid` of (h, w) patches -> (N, C, 32 · h, 32 · w); the inverse of `patches_of`."""
    height, width = grid
    tiles = patches.reshape(len(patches), height, width, STRIDE, STRIDE, -1)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height * STRIDE, width * STRIDE)


def normalised_patches(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C, H, W) -> (N, L, C · 1024) patches of mean 0 and deviation 1; the means and deviations they had, (N, L, 1).

    A deviation is at least 0.001.
    """
    patches = patches_of(images)
    mean, deviation = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + VARIANCE_EPS).sqrt()
    return (patches - mean) / deviation, mean, deviation


def masked_losses(predicted: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """Mean squared error of each image's hidden patches, in FP32 or wider: (N,).

    Args:
        predicted: (N, L, C · 1024), normalised values.
        images: (N, C, H, W), what the encoder was given.
        masks: (N, h, w), each with something hidden.
    """
    targets, _, _ = normalised_patches(images)
    errors = (predicted.to(targets.dtype) - targets).square().mean(dim=-1)  # (N, L)
    weights = masks.flatten(1).to(errors.dtype)
    return (errors * weights).sum(dim=1) / weights.sum(dim=1)
