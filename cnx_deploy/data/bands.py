"""Pictures for networks of any number of channels: grey, RGB, with alpha, or bands such as a satellite's.

A network of 1, 2, 3 or 4 channels takes a picture as Pillow's modes L, LA, RGB and RGBA. An array, a tensor, an `.npy`
file or a TIFF of several bands or pages gives the channels themselves, up to 16, along the axis that is as long as the
network has channels, the last where two are. Bands are resized one by one; Pillow weighs colours by their alpha when it
resizes, as it does under timm.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.data.image_files import is_numpy_file, numpy_header
from cnx_deploy.data.pixels import MAX_PIXELS, MODES, TURNS, UNREADABLE, eight_bits, load_image, quiet, upright

__all__ = ["Bands", "Picture", "picture_of", "pixels_of"]

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
COLOURS = ("RGB", "RGBA", "RGBa", "LA", "La", "PA", "P", "CMYK", "YCbCr", "LAB")
"""Modes of a TIFF whose channels are those of a picture."""
ORIENTATION = 274


@dataclass(frozen=True, slots=True)
class Bands:
    """Channels of 8 bits, each a grey image, all of one size; `info` is what is known of the file beside its pixels."""

    planes: tuple[Image.Image, ...]
    info: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.planes[0].size


Picture = Image.Image | Bands


def pixels_of(picture: Picture) -> np.ndarray:
    """(H, W, C) uint8 of its own size."""
    planes = picture.planes if isinstance(picture, Bands) else (picture,)
    return np.dstack([np.array(plane) for plane in planes])


def picture_of(given: Any, white_level: float | None = None, in_chans: int = 3) -> Picture:
    """What a caller or a file has -> an upright picture of 8 bits with `in_chans` channels.

    Takes a path, or the bytes of a file; a PIL image; an array (H, W), (H, W, C) or (C, H, W), or a tensor (C, H, W),
    of integers or floats. uint8 stays; other types are brought to 8 bits by `white_level`, see `pixels`, without which
    integers other than uint16 are refused. Raises InputError for anything else, and for another number of channels than
    the network's.
    """
    if isinstance(given, str | Path | bytes):
        file = given if isinstance(given, bytes) else Path(given)
        name = "The file" if isinstance(file, bytes) else str(file)
        if is_numpy_file(file):
            return _of_array(_numpy_file(file, name), white_level, in_chans, name)
        if (stored := _tiff_bands(file, name, in_chans)) is not None:
            values, turn = stored
            return _of_array(values, white_level, in_chans, name, turn)
        return upright(load_image(file, white_level), white_level, in_chans)
    if isinstance(given, Image.Image):
        return upright(given, white_level, in_chans)
    if isinstance(given, torch.Tensor):
        if given.ndim != 3 or given.shape[0] != in_chans:
            raise InputError(f"A tensor must be an image of shape ({in_chans}, H, W), got {tuple(given.shape)}.")
        numbers = given.float() if given.dtype == torch.bfloat16 else given
        return _of_array(numbers.detach().permute(1, 2, 0).cpu().numpy(), white_level, in_chans, "The tensor")
    if isinstance(given, np.ndarray):
        return _of_array(given, white_level, in_chans, "The array")
    raise InputError(
        f"An image must be a path, the bytes of a file, a PIL image, an array (H, W, {in_chans}) or (H, W) or a tensor "
        f"({in_chans}, H, W) of integers or floats, got {type(given).__name__}."
    )


def _of_array(
    values: np.ndarray, white_level: float | None, in_chans: int, name: str, turn: int | None = None
) -> Picture:
    """Numbers -> the network's channels; grey and RGB also for a network that takes another kind of picture."""
    shape = values.shape
    if values.ndim == 2:
        values = values[..., None]
    counts = (in_chans,) if in_chans not in MODES else (in_chans, 1, 3) if in_chans != 3 else (3, 1)
    axes = [axis for count in counts for axis in (2, 0) if values.ndim == 3 and values.shape[axis] == count]
    if not axes or not values.size or values.dtype.kind not in "uif":
        raise InputError(
            f"{name} is {values.dtype} {shape}, and the network takes {in_chans} channels: expected integers or floats "
            f"of shape (H, W, {in_chans}) or ({in_chans}, H, W)."
        )
    values = np.moveaxis(values, axes[0], 2)
    info: dict[Any, Any] = {}
    if values.dtype.kind in "iu" and values.dtype not in (np.uint8, np.uint16) and white_level is None:
        raise InputError(
            f"{name} is {values.dtype} {shape}, a type of which no value is white by itself: expected uint8, uint16 or "
            "floats, or the value that is white, --white-level N (white_level)."
        )
    if values.dtype != np.uint8:
        values, info = eight_bits(values, white_level, name)
    planes = [Image.fromarray(np.ascontiguousarray(values[..., at])) for at in range(values.shape[2])]
    if turn in TURNS:
        planes = [plane.transpose(TURNS[turn]) for plane in planes]
    if len(planes) in (1, 3):
        picture = planes[0] if len(planes) == 1 else Image.merge("RGB", planes)
        picture.info |= info
        return upright(picture, white_level, in_chans)
    if not info and white_level is not None and white_level < 255:
        planes = [upright(plane, white_level, 1) for plane in planes]
    return Bands(tuple(planes), info)


def _numpy_file(file: Path | bytes, name: str) -> np.ndarray:
    """The array of an .npy file of numbers. Its size is checked before it is read; nothing is unpickled."""
    try:
        if isinstance(file, bytes):
            shape, dtype = numpy_header(io.BytesIO(file))
            _check_size(shape, name)
            if math.prod(shape) * dtype.itemsize > len(file):  # NumPy allocates what the header says
                raise ValueError(f"it says {shape} {dtype} and has {len(file):,} bytes")
            return np.lib.format.read_array(io.BytesIO(file), allow_pickle=False)
        values = np.load(file, mmap_mode="r", allow_pickle=False)
        _check_size(values.shape, name)
        return np.array(values)
    except UNREADABLE as error:
        raise InputError(
            f"{name} cannot be read as an array ({error}): expected a whole .npy file of numbers, (H, W, C) or "
            "(C, H, W). Replace or remove it."
        ) from error


def _tiff_bands(file: Path | bytes, name: str, in_chans: int) -> tuple[np.ndarray, int | None] | None:
    """The bands or pages of a TIFF and its orientation; None for another file, or a TIFF that Pillow reads whole."""
    if in_chans == 3:
        return None
    if not _begins_as_tiff(file):
        return None
    opened = io.BytesIO(file) if isinstance(file, bytes) else file
    if in_chans in MODES:
        try:
            with quiet(), Image.open(opened) as image:
                if image.mode in COLOURS or (image.mode != "RGBX" and getattr(image, "n_frames", 1) == 1):
                    return None
        except UNREADABLE:
            pass  # a layout that Pillow does not know
    try:
        import tifffile
    except ImportError as error:
        raise MissingRequirementError(
            f'{name} is a TIFF of bands, which tifffile reads and is not installed: pip install "cnx-deploy[bands]".'
        ) from error
    try:
        with tifffile.TiffFile(opened) as tiff:
            series = tiff.series[0]
            _check_size(series.shape, name)
            tag = series.keyframe.tags.get(ORIENTATION)
            return series.asarray(), None if tag is None else int(tag.value)
    except (*UNREADABLE, tifffile.TiffFileError) as error:
        raise InputError(
            f"{name} cannot be read as a TIFF of bands ({error}): expected a whole file of one size, of "
            f"{in_chans} bands or pages. Replace or remove it."
        ) from error


def _begins_as_tiff(file: Path | bytes) -> bool:
    if isinstance(file, bytes):
        return file[:4] in TIFF_MAGIC
    try:
        with file.open("rb") as stream:
            return stream.read(4) in TIFF_MAGIC
    except OSError:
        return False


def _check_size(shape: tuple[int, ...], name: str) -> None:
    """Raise InputError before anything is decoded that takes too much memory."""
    count = math.prod(shape)
    if count > 4 * MAX_PIXELS:
        raise InputError(
            f"{name} holds {count:,} numbers, over {4 * MAX_PIXELS // 1_000_000} million. Cut it into smaller images."
        )
