"""The batch of images that a model takes, and the check that a tensor is one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import STRIDE, ImageSize, canonical_size, sides
from cnx_deploy.core.preprocessing import MAX_CHANNELS

__all__ = ["InputSpec", "check_input"]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The image batch a runner takes.

    "float": (N, C, H, W) float32 in [0, 1]; "uint8": (N, H, W, C) uint8, of C = `in_chans` channels. `image_size` is
    the side of a square or (height, width) in pixels. `max_batch` None means any.
    `takes_nonfinite`: NaN and infinity go into the network, and through it; else they are refused.
    """

    kind: str
    image_size: ImageSize
    min_batch: int = 1
    max_batch: int | None = None
    takes_nonfinite: bool = False
    in_chans: int = 3

    @classmethod
    def of(cls, deploy: DeploySpec, min_batch: int = 1, max_batch: int | None = None) -> Self:
        """What a deployed network takes."""
        return cls(deploy.input_kind, deploy.image_size, min_batch, max_batch, in_chans=deploy.in_chans)

    @classmethod
    def in_graph(cls, kind: str, shape: Sequence[Any], min_batch: int = 1, max_batch: int | None = None) -> Self | None:
        """What a graph takes with an input of `kind` and `shape`; None unless that is a batch of images of one size."""
        if len(shape) != 4 or not all(isinstance(size, int) for size in shape[1:]):
            return None
        channels, height, width = shape[1:] if kind == "float" else (shape[3], *shape[1:3])
        if not 1 <= channels <= MAX_CHANNELS or min(height, width) < STRIDE:
            return None
        return cls(kind, canonical_size((height, width)), min_batch, max_batch, in_chans=channels)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the batch."""
        return torch.uint8 if self.kind == "uint8" else torch.float32

    def shape(self, batch: int) -> tuple[int, ...]:
        """Shape of a batch of `batch` images."""
        height, width = sides(self.image_size)
        channels = self.in_chans
        return (batch, height, width, channels) if self.kind == "uint8" else (batch, channels, height, width)


def check_input(images: Tensor, spec: InputSpec) -> None:
    """Raise InputError unless `images` fits `spec`: dtype, layout, size, batch range, finite pixels.

    Nothing is cast silently. Pixels on a GPU are not looked at, for reading the answer back would hold the GPU up.
    """
    batch = images.shape[0] if images.ndim else 0
    found = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
    expected = f"{('N', *spec.shape(0)[1:])} {str(spec.dtype).removeprefix('torch.')}".replace("'", "")
    if images.dtype != spec.dtype or tuple(images.shape) != spec.shape(batch):
        hint = "Convert them; nothing is cast."
        if images.ndim == 4 and spec.in_chans in (images.shape[1], images.shape[-1]) and images.dtype == spec.dtype:
            hint = "The channel axis may be in the wrong place: permute the images."
        raise InputError(f"The model takes images of shape {expected}, not {found}. {hint}")
    if batch < max(1, spec.min_batch) or (spec.max_batch is not None and batch > spec.max_batch):
        limit = "any" if spec.max_batch is None else spec.max_batch
        raise InputError(f"A batch of {batch} is outside the model's range of {max(1, spec.min_batch)} to {limit}.")
    if not spec.takes_nonfinite and images.is_floating_point() and images.device.type == "cpu":
        # Both ends of the range tell: one pass of 0.02 ms for an image of 224 px, where `isfinite` takes 0.4 ms.
        if all(map(math.isfinite, images.aminmax())):
            return
        broken = (~torch.isfinite(images).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        raise InputError(
            f"Image {broken[0]} of a batch of {len(images)} holds NaN or infinity ({len(broken)} of them do); a "
            "pixel is a finite number. Leave it out, or set takes_nonfinite in the runner's input_spec to see what "
            "comes of it."
        )
