"""The batch of images that a model takes, and the check that a tensor is one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.image_size import (
    MAX_CHANNELS,
    STRIDE,
    ImageSize,
    SizeRange,
    canonical_size,
    in_range,
    parse_image_sizes,
    sides,
    size_text,
)

__all__ = ["InputSpec", "check_input"]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The image batch a runner takes.

    "float": (N, C, H, W) float32 in [0, 1]; "uint8": (N, H, W, C) uint8, of C = `in_chans` channels; "normalised": as
    "float", less the mean and divided by std. `image_size` is the side of a square or (height, width) in pixels.
    `max_batch` None means any.
    `size_range` (smallest, largest): images of any size between them, each side for itself; all of a batch have one.
    `takes_nonfinite`: NaN and infinity go into the network, and through it; else they are refused.
    """

    kind: str
    image_size: ImageSize
    min_batch: int = 1
    max_batch: int | None = None
    takes_nonfinite: bool = False
    in_chans: int = 3
    size_range: SizeRange | None = None

    @classmethod
    def of(cls, deploy: DeploySpec, min_batch: int = 1, max_batch: int | None = None) -> Self:
        """What a deployed network takes."""
        return cls(
            deploy.input_kind, deploy.image_size, min_batch, max_batch,
            in_chans=deploy.in_chans, size_range=deploy.size_range,
        )  # fmt: skip

    @classmethod
    def in_graph(
        cls, kind: str, shape: Sequence[Any], min_batch: int = 1, max_batch: int | None = None, sizes: str | None = None
    ) -> Self | None:
        """What a graph takes with an input of `kind` and `shape`; None unless that is a batch of images.

        `sizes` "224:448:640", smallest, typical and largest, is for open sides, which are refused without it.
        """
        if len(shape) != 4:
            return None
        channels, height, width = (shape[3], *shape[1:3]) if kind == "uint8" else shape[1:]
        if (
            isinstance(channels, int)
            and sizes
            and ":" in sizes
            and not all(isinstance(s, int) for s in (height, width))
        ):
            found = parse_image_sizes(sizes)
            assert isinstance(found, tuple) and len(found) == 3  # noqa: PT018 - it has a colon
            smallest, typical, largest = found
            limits = (smallest, largest)
            return cls(kind, typical, min_batch, max_batch, in_chans=channels, size_range=limits)
        if not all(isinstance(size, int) for size in shape[1:]):
            return None
        if not 1 <= channels <= MAX_CHANNELS or min(height, width) < STRIDE:
            return None
        return cls(kind, canonical_size((height, width)), min_batch, max_batch, in_chans=channels)

    def limited_to(self, batch: object, batch_range: str | None, path: Path) -> Self:
        """With the batch that a graph fixes, or, where it is open, within the range that its file was exported for.

        Raises CorruptArtifactError where the range is none; `path` is the file.
        """
        if isinstance(batch, int):
            return replace(self, min_batch=batch, max_batch=batch)
        if batch_range is None:
            return self
        sizes = batch_range.split(":")
        if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
            raise CorruptArtifactError(
                f"{path} says {batch_range!r} of its batch, expected 1:8:64 or such. Export it again."
            )
        return replace(self, min_batch=int(sizes[0]), max_batch=int(sizes[2]))

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the batch."""
        return torch.uint8 if self.kind == "uint8" else torch.float32

    def takes_size(self, size: ImageSize) -> bool:
        """Whether images may have this size."""
        return size == self.image_size or (self.size_range is not None and in_range(size, self.size_range))

    def shape(self, batch: int, size: ImageSize | None = None) -> tuple[int, ...]:
        """Shape of a batch of `batch` images, of `image_size` unless it is another."""
        height, width = sides(self.image_size if size is None else size)
        channels = self.in_chans
        return (batch, height, width, channels) if self.kind == "uint8" else (batch, channels, height, width)


def check_input(images: Tensor, spec: InputSpec, device: torch.device | None = None) -> None:
    """Raise InputError unless `images` fits `spec`: dtype, layout, size, batch range, finite pixels.

    `device`: where they have to be; None leaves that open.
    Nothing is cast silently. Pixels on a GPU are not looked at, for reading the answer back would hold the GPU up.
    """
    batch = images.shape[0] if images.ndim else 0
    found = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
    expected = f"{('N', *spec.shape(0)[1:])} {str(spec.dtype).removeprefix('torch.')}".replace("'", "")
    size = spec.image_size
    if spec.size_range is not None and images.ndim == 4:
        height, width = images.shape[1:3] if spec.kind == "uint8" else images.shape[2:]
        if min(height, width) >= STRIDE and spec.takes_size(found_size := canonical_size((height, width))):
            size = found_size
        expected = f"{expected}, or height and width from {' to '.join(map(size_text, spec.size_range))}"
    if images.dtype != spec.dtype or tuple(images.shape) != spec.shape(batch, size):
        hint = "Convert them; nothing is cast."
        if images.ndim == 4 and spec.in_chans in (images.shape[1], images.shape[-1]) and images.dtype == spec.dtype:
            hint = "The channel axis may be in the wrong place: permute the images."
        raise InputError(f"The model takes images of shape {expected}, not {found}. {hint}")
    if batch < max(1, spec.min_batch) or (spec.max_batch is not None and batch > spec.max_batch):
        limit = "any" if spec.max_batch is None else spec.max_batch
        raise InputError(f"A batch of {batch} is outside the model's range of {max(1, spec.min_batch)} to {limit}.")
    if device is not None and images.device != device:
        raise InputError(f"The images are on {images.device}, the model on {device}. Move them: images.to('{device}').")
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
