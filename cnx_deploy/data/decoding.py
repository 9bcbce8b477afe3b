"""How a file becomes an image: four formats, told by content, decoded whole or refused by name."""

import contextlib
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from cnx_deploy.core.errors import InputError

__all__ = ["MAX_PIXELS", "SUFFIXES", "as_image", "load_image", "upright_rgb"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
MAX_PIXELS = 89_000_000
"""Largest image that is decoded, 267 MB as RGB; just below the size at which Pillow itself begins to warn."""

TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip
"""What makes an image upright, by its EXIF orientation from 2 to 8; 1 is upright."""
_FILTERS = threading.Lock()


def load_image(path: Path) -> Image.Image:
    """Decode a JPEG, PNG, WebP or BMP file, told by its content.

    InputError names the file when it is another format, animated, empty, truncated or above MAX_PIXELS; the size is
    read from the header, before anything is decoded. EXIF that cannot be read counts as none.
    """
    try:
        with _quiet():  # the limit below is stricter than the one that Pillow warns of
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, limit {MAX_PIXELS}")
            if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
                raise ValueError("it is an animation")
            image.load()
            with _quiet():
                image.getexif()
            return image
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} cannot be read as an image ({error}): expected a whole JPEG, PNG, WebP or BMP file of at most "
            f"{MAX_PIXELS // 1_000_000} million pixels. Replace or remove it."
        ) from error


def as_image(image: Any) -> Image.Image:
    """Make a PIL image of what a caller has.

    Takes a path, a PIL image, an array (H, W, 3) or (H, W) of uint8, or a tensor (3, H, W) of uint8 or of floats in
    [0, 1]. Raises InputError for anything else.
    """
    if isinstance(image, str | Path):
        return load_image(Path(image))
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise InputError(f"A tensor must be an image of shape (3, H, W), got {tuple(image.shape)}.")
        if image.is_floating_point():
            low, high = float(image.min()), float(image.max())
            if not (low >= 0.0 and high <= 1.0):  # a NaN fails both
                raise InputError(f"A float tensor must hold values in [0, 1], got {low:g} to {high:g}.")
            image = (image * 255.0).round().to(torch.uint8)
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)):
        given = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(
            "An image must be a path, a PIL image, a uint8 array (H, W, 3) or (H, W), or a tensor (3, H, W), got "
            f"{given}."
        )
    return Image.fromarray(np.ascontiguousarray(image))


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB, turned as its EXIF orientation says; alpha is dropped, as torchvision and timm do."""
    # Not ImageOps.exif_transpose, which packs the EXIF anew and stumbles over tags that it could read.
    turn = image.getexif().get(ExifTags.Base.Orientation)
    upright = image.transpose(TURNS[turn]) if isinstance(turn, int) and turn in TURNS else image
    if upright.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255; the upper byte is what it keeps of 16-bit colour.
        return Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of Pillow: what matters in them is an error here. The filters are the process's, hence the lock."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
