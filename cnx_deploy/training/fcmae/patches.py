"""What the decoder is to predict and how wrong it is: 32×32 patches, normalised one by one, hidden ones only.

Source: Woo et al., arXiv:2301.00808, section 3.1. As in the reference code (facebookresearch/ConvNeXt-V2,
models/fcmae.py), a patch's values are ordered by row, column and colour, its variance is the unbiased one
(divided by 3071), and 1e-6 is added to the variance.
"""

from dataclasses import dataclass

from torch import Tensor

from cnx_deploy.core.variants import STRIDE

__all__ = ["PATCH_VALUES", "PatchStatistics", "images_of_patches", "masked_losses", "patch_statistics", "patches_of"]

PATCH_VALUES = 3 * STRIDE * STRIDE
VARIANCE_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class PatchStatistics:
    """Mean and standard deviation of each patch, (N, L, 1); the deviation is at least 0.001."""

    mean: Tensor
    deviation: Tensor

    def normalise(self, patches: Tensor) -> Tensor:
        """(N, L, 3072) -> the same, mean 0 and deviation 1."""
        return (patches - self.mean) / self.deviation

    def restore(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return normalised * self.deviation + self.mean


def patches_of(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, L, 3072), patches row by row."""
    count, colours, height, width = images.shape
    tiles = images.reshape(count, colours, height // STRIDE, STRIDE, width // STRIDE, STRIDE)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, PATCH_VALUES)


def images_of_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, L, 3072) of a `grid` of (h, w) patches -> (N, 3, 32 · h, 32 · w); the inverse of `patches_of`."""
    height, width = grid
    tiles = patches.reshape(len(patches), height, width, STRIDE, STRIDE, 3)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, height * STRIDE, width * STRIDE)


def patch_statistics(patches: Tensor) -> PatchStatistics:
    """The statistics that a patch is normalised by."""
    variance = patches.var(dim=-1, keepdim=True)
    return PatchStatistics(patches.mean(dim=-1, keepdim=True), (variance + VARIANCE_EPS).sqrt())


def masked_losses(predicted: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """Mean squared error of each image's hidden patches, in FP32 or wider: (N,).

    `predicted`: (N, L, 3072), normalised values. `images`: (N, 3, H, W), what the encoder was given. `masks`:
    (N, h, w), each with something hidden.
    """
    patches = patches_of(images)
    targets = patch_statistics(patches).normalise(patches)
    errors = (predicted.to(targets.dtype) - targets).square().mean(dim=-1)  # (N, L)
    weights = masks.flatten(1).to(errors.dtype)
    return (errors * weights).sum(dim=1) / weights.sum(dim=1)
