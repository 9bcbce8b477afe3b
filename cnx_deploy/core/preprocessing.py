"""What an evaluation image is made into, as a record; `data.preprocessing` makes the pixels."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Self

import msgspec

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import CROP_MODES, INTERPOLATIONS, MAX_CHANNELS, ImageSize, canonical_size
from cnx_deploy.core.strict_json import shortened, typed

__all__ = [
    "ASSUMED", "IMAGENET_MEAN", "IMAGENET_STD", "BrokenImage", "PerChannel", "Positive",
    "Preprocessing", "given_per_channel", "per_channel",
]  # fmt: skip

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PADDING_MODES = ("border", "corner")
"""Crop modes that fill what a picture lacks."""
ASSUMED = "assumed"
"""Where a field of the preprocessing comes from that neither the weights' files nor an option says."""
LATER_FIELDS = {"crop_mode": "center", "white_level": None, "pad_value": None}
"""Fields that earlier files do not have, and what they stand at there: written only where they differ."""

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
PerChannel = tuple[float, ...]
"""A number for each channel of an image."""


def per_channel(values: PerChannel, count: int) -> PerChannel:
    """A number for each of `count` channels, as timm adapts a stem: one channel gets their mean, others repeat them."""
    if count == len(values):
        return values
    if count == 1:
        return (round(math.fsum(values) / len(values), 6),)
    return tuple(values[at % len(values)] for at in range(count))


def given_per_channel(value: PerChannel | float, count: int) -> PerChannel:
    """A number for each of `count` channels from one for all, or one for each. Raises InputError for others."""
    values = (float(value),) if isinstance(value, int | float) else tuple(value)
    if len(values) not in (1, count):
        raise InputError(
            f"{len(values)} numbers were given as mean, std or pad value, and the network takes images of {count} "
            "channels: expected one number, or one for each channel."
        )
    return per_channel(values, count)


@dataclass(frozen=True, slots=True)
class BrokenImage:
    """An image that could not be read, under the name that its source gives it, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize, crop and normalisation of an evaluation image.

    `image_size`: side S of a square in pixels, or (height, width). `crop_ratio` in (0, 1]: share of the resized picture
    that is kept, so that it is resized to L = floor(S / crop_ratio), as in timm. `crop_mode` says how:

    - "center": the picture is resized to cover L and keeps its shape; the centre is cropped. Half a pixel of margin is
      rounded to the even side.
    - "center-floor": the same, with half a pixel rounded down, as transformers crops.
    - "squash": both sides become L whatever the shape of the picture was; the centre is cropped.
    - "border": the picture is resized to fit into L and keeps its shape; what is missing to S is filled with the pad
      value, what is over is cropped.
    - "corner": the whole picture is resized to fit into S, keeps its shape and lies in the upper left corner of this
      canvas; the rest is filled with the pad value. `crop_ratio` is 1, for nothing is cropped. The canvas belongs to
      the weights: GRN sums over the filled part too.

    `mean` and `std` are in units of a [0, 1] image, one number for each channel: their count, 1 to 16, is that of the
    images, of which 3 are RGB; see `data.bands` for others.
    `white_level`: the stored value that is white, see `data.pixels`; None is the largest that the file's type holds.
    `pad_value`: what "border" and "corner" fill with, 0 to 255, one number for each channel; None is the mean colour.
    """

    image_size: ImageSize = 224
    crop_ratio: float = 0.875
    interpolation: str = "bicubic"
    mean: PerChannel = IMAGENET_MEAN
    std: PerChannel = IMAGENET_STD
    crop_mode: str = "center"
    white_level: float | None = None
    pad_value: PerChannel | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", canonical_size(self.image_size))
        if not 0.0 < self.crop_ratio <= 1.0:
            raise InputError(f"crop_ratio must be in (0, 1], got {self.crop_ratio}. The usual value is 0.875.")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"No interpolation {self.interpolation!r}. Choose one of: {', '.join(INTERPOLATIONS)}.")
        if self.crop_mode not in CROP_MODES:
            raise InputError(f"No crop mode {self.crop_mode!r}. Choose one of: {', '.join(CROP_MODES)}.")
        if len(self.mean) != len(self.std) or not 1 <= len(self.mean) <= MAX_CHANNELS:
            raise InputError(
                f"mean and std have a number for each channel, 1 to {MAX_CHANNELS}, such as (0.5, 0.5, 0.5); got "
                f"{self.mean}, {self.std}."
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise InputError(f"mean must be finite and std positive, got mean {self.mean} and std {self.std}.")
        if self.white_level is not None and not 0.0 < self.white_level <= 2.0**32:
            raise InputError(
                f"white_level must be above 0 and at most 2^32, got {self.white_level}. It is the value that is white, "
                "such as 4095 for 12 bits."
            )
        if self.crop_mode == "corner" and self.crop_ratio != 1.0:
            raise InputError(
                f"crop_ratio is {self.crop_ratio} with the crop mode corner, which keeps the whole picture: expected "
                "1.0. Set it with --crop-ratio 1.0 (crop_ratio)."
            )
        if self.pad_value is None:
            return
        if self.crop_mode not in PADDING_MODES:
            raise InputError(
                f"pad_value is {self.pad_value} and the crop mode {self.crop_mode} fills nothing: only "
                f"{' and '.join(PADDING_MODES)} do. Leave --pad-value (pad_value) out, or choose one of them."
            )
        if len(self.pad_value) != len(self.mean) or not all(0 <= value <= 255 for value in self.pad_value):
            raise InputError(
                f"pad_value has a number from 0 to 255 for each of {len(self.mean)} channels, such as 114; got "
                f"{self.pad_value}."
            )

    @property
    def fill(self) -> tuple[int, ...]:
        """The pixel that what is missing of a picture is filled with, 0 to 255 for each channel."""
        return tuple(map(round, self.pad_value or (255 * value for value in self.mean)))

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    def for_channels(self, count: int) -> Self:
        """The same for images of another number of channels, see `per_channel`."""
        pad = None if self.pad_value is None else per_channel(self.pad_value, count)
        return replace(self, mean=per_channel(self.mean, count), std=per_channel(self.std, count), pad_value=pad)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as the metadata of checkpoints and ONNX files keep them; `from_dict` reads them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in LATER_FIELDS or value != LATER_FIELDS[name]
        }

    def assumption(self, origins: Mapping[str, str]) -> str | None:
        """Say which fields nobody stated, and what they stand at; None where there is none. `origins` names fields."""
        assumed = [name for name, origin in origins.items() if origin == ASSUMED]
        if not assumed:
            return None
        values = ", ".join(f"{name} {getattr(self, name)}" for name in assumed)
        options = ", ".join(f"--{name.replace('_', '-')}" for name in assumed)
        return f"Assumed, for nothing beside the weights says it: {values}. To say otherwise: export with {options}."

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
                f"Preprocessing {shortened(dict(values))} cannot be read: {error}. Expected are numbers, as many for "
                "mean as for std."
            ) from error
