"""Which patches a masked autoencoder hides: drawn with one position a patch, enlarged to the stages before.

A mask is boolean and True where it hides. Source: Woo et al., arXiv:2301.00808, section 3.
"""

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError

__all__ = ["enlarged", "masked_count", "random_masks"]


def masked_count(positions: int, ratio: float) -> int:
    """Hidden positions among so many: round(ratio · positions).

    Raises InputError when none or all would be hidden, so nothing could be learned. The reference code keeps
    int(positions · (1 - ratio)), which hides one more where that is no whole number: 30 of 49 at 0.6, here 29.
    """
    if not 0.0 < ratio < 1.0:
        raise InputError(f"A mask ratio lies between 0 and 1, not at {ratio}. Give one that does, the paper's is 0.6.")
    hidden = round(ratio * positions)
    if not 0 < hidden < positions:
        raise InputError(
            f"Of {positions} patches a mask ratio of {ratio} hides {hidden}: expected some hidden and some visible. "
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

    Raises InputError unless both sides are the same multiple of the mask's.
    """
    scale = size[0] // masks.shape[1]
    if size != (scale * masks.shape[1], scale * masks.shape[2]) or scale == 0:
        raise InputError(
            f"Masks of {masks.shape[1]}x{masks.shape[2]} patches do not fit {size[0]}x{size[1]} positions: expected "
            "the same multiple on both sides. Draw them for the images' own patches of 32x32 pixels."
        )
    return masks.repeat_interleave(scale, 1).repeat_interleave(scale, 2).unsqueeze(1)
