"""What an evaluation image is made into, as a record; `data.preprocessing` makes the pixels."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Self

import msgspec

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.strict_json import shortened, typed
from cnx_deploy.core.variants import check_image_size

__all__ = [
    "IMAGENET_MEAN", "IMAGENET_STD", "INTERPOLATIONS", "BrokenImage", "Positive", "Preprocessing", "Triple",
]  # fmt: skip

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
LATER_FIELDS = {"white_level": None}
"""Fields that earlier files do not have, and what they stand at there: written only where they differ."""

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class BrokenImage:
    """An image that could not be read, under the name that its source gives it, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize, crop and normalisation of an evaluation image.

    `image_size` S: side in pixels. `crop_ratio` in (0, 1]: share of the resized short side that is kept; the short
    side becomes floor(S / crop_ratio), as in timm. `mean` and `std` are in units of a [0, 1] image, per RGB channel.
    `white_level`: the stored value that is white, see `data.decoding`; None is the largest that the file's type holds.
    """

    image_size: Positive = 224
    crop_ratio: float = 0.875
    interpolation: str = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    white_level: float | None = None

    def __post_init__(self) -> None:
        check_image_size(self.image_size, self.image_size)
        if not 0.0 < self.crop_ratio <= 1.0:
            raise InputError(f"crop_ratio must be in (0, 1], got {self.crop_ratio}. The usual value is 0.875.")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"No interpolation {self.interpolation!r}. Choose one of: {', '.join(INTERPOLATIONS)}.")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise InputError(f"mean must be finite and std positive, got mean {self.mean} and std {self.std}.")
        if self.white_level is not None and not 0.0 < self.white_level <= 2.0**32:
            raise InputError(
                f"white_level must be above 0 and at most 2^32, got {self.white_level}. It is the value that is white, "
                "such as 4095 for 12 bits."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as the metadata of checkpoints and ONNX files keep them; `from_dict` reads them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in LATER_FIELDS or value != LATER_FIELDS[name]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; absent fields have their defaults. InputError on anything else."""
        known = {field.name for field in fields(cls)}
        if not known.issuperset(values):
            given = shortened(", ".join(map(str, values)))
            raise InputError(f"Preprocessing has the fields {', '.join(sorted(known))}; got {given}.")
        try:
            return typed(dict(values), cls)
        except ValueError as error:
            raise InputError(
                f"Preprocessing {shortened(dict(values))} cannot be read: {error}. Expected are numbers, and three of "
                "them for mean and std."
            ) from error
