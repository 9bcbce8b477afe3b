"""How a file becomes an image: four formats, told by content, decoded whole or refused by name."""

import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cnx_deploy.errors import InputError

__all__ = ["MAX_PIXELS", "SUFFIXES", "load_image", "upright_rgb"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
MAX_PIXELS = 89_000_000
"""Largest image that is decoded, 267 MB as RGB; just below the size at which Pillow itself begins to warn."""


def load_image(path: Path) -> Image.Image:
    """Decode a JPEG, PNG, WebP or BMP file, told by its content.

    InputError names the file when it is another format, animated, empty, truncated or above MAX_PIXELS; the size is
    read from the header, before anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the stricter one
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, limit {MAX_PIXELS}")
            if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
                raise ValueError("it is an animation")
            image.load()
            image.getexif()
            return image
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} cannot be read as an image ({error}): expected a whole JPEG, PNG, WebP or BMP file of at most "
            f"{MAX_PIXELS // 1_000_000} million pixels. Replace or remove it."
        ) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB, turned as its EXIF orientation says; alpha is dropped, as torchvision and timm do."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255; the upper byte is what it keeps of 16-bit colour.
        return Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert("RGB")
