"""What a model is given: how an image becomes pixels, and pixels become a runner's input.

`to_pixels` is the one definition that training's validation, parity, evaluation and prediction share. It equals
timm's evaluation transform (`timm.data.create_transform`, crop mode "center") to within 1/255.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.decoding import MAX_PIXELS, upright_rgb

__all__ = ["cropped", "normalise", "runner_input", "to_pixels"]


def to_pixels(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Decoded image of any mode -> (S, S, 3) uint8 RGB, upright, resized and centre-cropped.

    Raises InputError for values that are no pixels, see `decoding.upright_rgb`, and as `cropped` does.
    """
    return cropped(upright_rgb(image, preprocessing.white_level), preprocessing)


def cropped(rgb: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Upright 8-bit RGB -> (S, S, 3) uint8, resized and centre-cropped.

    Raises InputError when the image is so long and thin that it cannot be resized within the memory limit.
    """
    side, short = preprocessing.image_size, math.floor(preprocessing.image_size / preprocessing.crop_ratio)
    width, height = (short * length // min(rgb.size) for length in rgb.size)
    if width * height > MAX_PIXELS:
        raise InputError(
            f"An image of {rgb.width}x{rgb.height} is too long and thin: before its centre is cropped it would be "
            f"resized to {width}x{height}, over {MAX_PIXELS // 1_000_000} million pixels. Crop it first."
        )
    resized = rgb.resize((width, height), Image.Resampling[preprocessing.interpolation.upper()])
    left, top = round((width - side) / 2), round((height - side) / 2)
    return torch.from_numpy(np.array(resized.crop((left, top, left + side, top + side))))


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(N, S, S, 3) uint8, or (N, 3, S, S) float in [0, 1] -> (N, 3, S, S) floats the training form takes."""
    unit = images.permute(0, 3, 1, 2).float() / 255.0 if images.dtype == torch.uint8 else images
    mean, std = (unit.new_tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (unit - mean) / std


def runner_input(pixels: Tensor, kind: str) -> Tensor:
    """(N, S, S, 3) uint8 pixels -> what a runner of input `kind` takes: see `data.input_spec.InputSpec`."""
    if kind not in ("uint8", "float"):
        raise InputError(f"No runner input is called {kind!r}. Choose one of: float, uint8.")
    return pixels if kind == "uint8" else (pixels.permute(0, 3, 1, 2).float() / 255.0).contiguous()
