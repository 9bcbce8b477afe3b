"""What a model is given: how an image becomes pixels, and pixels become a runner's input.

`Preprocessing` is the one definition that training's validation, parity, evaluation and prediction share. It equals
timm's evaluation transform (`timm.data.create_transform`, crop mode "center") to within 1/255.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.manifest import Positive, Triple
from cnx_deploy.core.strict_json import shortened, typed
from cnx_deploy.core.variants import check_image_size
from cnx_deploy.data.decoding import MAX_PIXELS, upright_rgb

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "runner_input"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize, crop and normalisation of an evaluation image.

    `image_size` S: side in pixels. `crop_ratio` in (0, 1]: share of the resized short side that is kept; the short
    side becomes floor(S / crop_ratio), as in timm. `mean` and `std` are in units of a [0, 1] image, per RGB channel.
    """

    image_size: Positive = 224
    crop_ratio: float = 0.875
    interpolation: str = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        check_image_size(self.image_size, self.image_size)
        if not 0.0 < self.crop_ratio <= 1.0:
            raise InputError(
                f"A crop ratio lies in (0, 1], not at {self.crop_ratio}. Give one that does, usually 0.875."
            )
        if self.interpolation not in RESAMPLING:
            raise InputError(f"No interpolation {self.interpolation!r}. Choose one of: {', '.join(RESAMPLING)}.")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise InputError(
                f"mean must be finite and std positive, not {self.mean} and {self.std}. Give those of your images' "
                "channels."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a manifest; `from_dict` reads it back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; absent fields have their defaults. InputError on anything else."""
        known = {field.name for field in fields(cls)}
        if not known.issuperset(values):
            found = shortened(", ".join(map(str, values)))
            raise InputError(f"Preprocessing has the fields {', '.join(sorted(known))}, not {found}. Leave others out.")
        try:
            return typed(dict(values), cls)
        except ValueError as error:
            raise InputError(
                f"Preprocessing {shortened(dict(values))} cannot be read ({error}): expected numbers, three for mean "
                "and std. Give them so."
            ) from error

    def pixels(self, image: Image.Image) -> Tensor:
        """Decoded image of any mode -> (S, S, 3) uint8 RGB, upright, resized and centre-cropped.

        InputError when the image is so long and thin that it cannot be resized within the memory limit.
        """
        rgb = upright_rgb(image)
        short = math.floor(self.image_size / self.crop_ratio)
        width, height = (short * side // min(rgb.size) for side in rgb.size)
        if width * height > MAX_PIXELS:
            raise InputError(
                f"An image of {rgb.width}x{rgb.height} is too long and thin: before its centre is cropped it would be "
                f"resized to {width}x{height}, over {MAX_PIXELS // 1_000_000} million pixels. Crop it first."
            )
        resized = rgb.resize((width, height), RESAMPLING[self.interpolation])
        left, top = round((width - self.image_size) / 2), round((height - self.image_size) / 2)
        cropped = resized.crop((left, top, left + self.image_size, top + self.image_size))
        return torch.from_numpy(np.array(cropped))

    def normalise(self, images: Tensor) -> Tensor:
        """(N, S, S, 3) uint8, or (N, 3, S, S) float in [0, 1] -> (N, 3, S, S) floats the training form takes."""
        unit = images.permute(0, 3, 1, 2).float() / 255.0 if images.dtype == torch.uint8 else images
        mean, std = (unit.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (unit - mean) / std


def runner_input(pixels: Tensor, kind: str) -> Tensor:
    """(N, S, S, 3) uint8 pixels -> what a runner of input `kind` takes: see `runners.base.InputSpec`."""
    if kind not in ("uint8", "float"):
        raise InputError(f"No runner input is called {kind!r}. Choose one of: float, uint8.")
    return pixels if kind == "uint8" else (pixels.permute(0, 3, 1, 2).float() / 255.0).contiguous()
