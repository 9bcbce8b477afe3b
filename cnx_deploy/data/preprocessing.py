"""What a model is given: how an image becomes pixels, and pixels become a runner's input.

`to_pixels` is the one definition that training's validation, parity, evaluation and prediction share. Of RGB it equals
timm's evaluation transform (`timm.data.create_transform`) and transformers' processors to within 1/255.
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import sides
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.bands import Bands, Picture, picture_of
from cnx_deploy.data.decoding import MAX_PIXELS

__all__ = ["cropped", "normalise", "runner_input", "to_pixels"]


def to_pixels(image: Any, preprocessing: Preprocessing) -> Tensor:
    """An image of any kind -> (H, W, C) uint8, upright, resized and cropped as `preprocessing` says.

    Raises InputError for what is no image, see `bands.picture_of`, and as `cropped` does.
    """
    return cropped(picture_of(image, preprocessing.white_level, preprocessing.in_chans), preprocessing)


def cropped(picture: Picture, preprocessing: Preprocessing) -> Tensor:
    """An upright 8-bit picture of the right channels -> (H, W, C) uint8, resized and cropped.

    Raises InputError when the image is so long and thin that it cannot be resized within the memory limit.
    """
    rows, columns = sides(preprocessing.image_size)
    width, height = _resized_size(picture.size, preprocessing)
    if width * height > MAX_PIXELS:
        raise InputError(
            f"An image of {picture.size[0]}x{picture.size[1]} is too long and thin: before its centre is cropped it "
            f"would be resized to {width}x{height}, over {MAX_PIXELS // 1_000_000} million pixels. Crop it first."
        )
    left, top = (_margin(spare, preprocessing.crop_mode) for spare in (width - columns, height - rows))
    fill, done = [round(255 * value) for value in preprocessing.mean], list[np.ndarray]()
    for part in picture.planes if isinstance(picture, Bands) else (picture,):
        cut = part.resize((width, height), Image.Resampling[preprocessing.interpolation.upper()])
        if width >= columns and height >= rows:
            cut = cut.crop((left, top, left + columns, top + rows))
        else:
            colour = tuple(fill[len(done) : len(done) + len(part.getbands())])
            canvas = Image.new(part.mode, (columns, rows), colour)
            canvas.paste(cut, (-left, -top))
            cut = canvas
        done.append(np.atleast_3d(np.array(cut)))
    return torch.from_numpy(done[0] if len(done) == 1 else np.concatenate(done, axis=2))


def _resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height before the crop of a picture of width and height `size`."""
    height, width = (math.floor(side / preprocessing.crop_ratio) for side in sides(preprocessing.image_size))
    if preprocessing.crop_mode == "squash":
        return width, height
    if height == width and preprocessing.crop_mode != "border":  # torchvision's arithmetic, which timm uses for squares
        width, height = (height * length // min(size) for length in size)
        return width, height
    ratios = size[0] / width, size[1] / height
    ratio = max(ratios) if preprocessing.crop_mode == "border" else min(ratios)
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _margin(spare: int, crop_mode: str) -> int:
    """Pixels that are cut off on the left or at the top when `spare` are too many; negative where some are missing."""
    if spare < 0:
        return -(-spare // 2)
    return spare // 2 if crop_mode == "center-floor" else round(spare / 2)


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(N, H, W, C) uint8, or (N, C, H, W) float in [0, 1] -> (N, C, H, W) floats the training form takes."""
    unit = images.permute(0, 3, 1, 2).float() / 255.0 if images.dtype == torch.uint8 else images
    mean, std = (unit.new_tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (unit - mean) / std


def runner_input(pixels: Tensor, kind: str, preprocessing: Preprocessing | None = None) -> Tensor:
    """(N, H, W, C) uint8 pixels -> what a runner of input `kind` takes: see `data.input_spec.InputSpec`.

    "normalised" takes the mean and std of `preprocessing`.
    """
    if kind == "normalised" and preprocessing is not None:
        return normalise(pixels, preprocessing).contiguous()
    if kind not in ("uint8", "float"):
        raise InputError(f"No runner input is called {kind!r}. Choose one of: float, uint8, normalised with a mean.")
    return pixels if kind == "uint8" else (pixels.permute(0, 3, 1, 2).float() / 255.0).contiguous()
