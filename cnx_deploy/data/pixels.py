"""From a file to the pixels of an evaluation image: decoded whole or refused by name, made 8-bit, resized and cropped.

Deeper images (16 bits, integers of 32 bits, floats) are brought to 8 bits by one rule: a white level, the stored value
that is white, becomes 255. It is 65535 for integers and 1 for floats unless `Preprocessing.white_level` gives another.

This file stands alone, on NumPy and Pillow: `serving.triton` puts a copy of it into a model repository, so that a
server makes the same pixels as `predict`.
"""

import contextlib
import io
import math
import re
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

try:
    from cnx_deploy.core.errors import InputError
except ImportError:  # a copy of this file, away from the package

    class InputError(ValueError):  # type: ignore[no-redef]
        """The image cannot be taken; the message says why."""


__all__ = [
    "FORMATS", "MAX_PIXELS", "MODES", "PADDING_MODES", "TURNS", "UNREADABLE", "cropped_pixels", "eight_bits",
    "load_image", "pixels_of_file", "quiet", "resized_and_offset", "upright",
]  # fmt: skip

Image.init()  # else Pillow knows its first five formats only
FORMATS = tuple(
    kind for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "HEIF") if kind in Image.OPEN
)
"""AVIF and HEIF only where the installed Pillow reads them."""
PADDING_MODES = ("border", "corner")
"""Crop modes that fill what a picture lacks."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""What a picture becomes for a network of so many channels."""
MAX_PIXELS = 89_000_000
"""Largest image that is decoded, 267 MB as RGB; just below the size at which Pillow itself begins to warn."""

TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip
"""What makes an image upright, by its EXIF orientation from 2 to 8; 1 is upright."""
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError, ZeroDivisionError,
    RuntimeError, struct.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for content that is no image of its format."""
REACHED, ANIMATED, OPAQUE = "cnx reached", "cnx animated", "cnx has no alpha"
_WHITE, _TURNED_BLACK = "cnx white", "cnx white is zero"
"""Entries of a PIL image's `info`: what is known of a decoded file beside its pixels."""
_FILTERS, _EARLIER, _INSIDE = threading.Lock(), contextlib.ExitStack(), list[int]()
"""Guards the filters of warnings; how they were; the threads for which there are none."""


def load_image(file: Path | bytes, white_level: float | None = None) -> Image.Image:
    """Decode a file of one of `FORMATS`, by its path or its bytes, told by its content; of several frames the first.

    `white_level`: of colour with 16 bits, of which Pillow keeps the upper byte. InputError names the file when it is
    another format, empty, truncated or above MAX_PIXELS; the size is read from the header, before anything is decoded.
    EXIF that cannot be read counts as none.
    """
    name = _name(file)
    try:
        with quiet():  # the limit below is stricter than the one that Pillow warns of
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, limit {MAX_PIXELS}")
            layouts = [str(tile.args) for tile in image.tile]
            is_deep_colour = image.mode in ("RGB", "RGBA") and any(";16" in layout for layout in layouts)
            # A camera's JPEG holds previews and maps of brightness beside its picture, which are no frames of it.
            is_animated = image.format not in ("JPEG", "MPO") and bool(getattr(image, "is_animated", False))
            known = {ANIMATED: is_animated, **_known_of_tiff(image)}
            with quiet():
                image.load()
                image.getexif()
        image.info.update(known)
        return _deep_colour(file, image, white_level) if is_deep_colour else image
    except UNREADABLE as error:
        reason = re.sub(r" <_io\.BytesIO[^>]*>", "", str(error))
        raise InputError(
            f"{name} cannot be read as an image ({reason}): expected a whole {', '.join(FORMATS[:-1])} or "
            f"{FORMATS[-1]} file of at most {MAX_PIXELS // 1_000_000} million pixels. Replace or remove it."
        ) from error


def upright(image: Image.Image, white_level: float | None = None, in_chans: int = 3) -> Image.Image:
    """Any mode to 8 bits, turned as its EXIF orientation says: grey, grey and alpha, RGB or RGBA, by `in_chans`.

    Alpha is dropped where it is not asked for, as torchvision and timm do, and 255 where there is none.
    `white_level`: see the module. It is of images that can hold it: of those with 8 bits where it is at most 255, else
    they keep their own. Raises InputError for values that are negative, not finite or, with no white level given,
    above the type's, and for a number of channels that no picture has.
    """
    name, mode = getattr(image, "filename", "") or "The image", MODES.get(in_chans)
    if mode is None:
        raise InputError(
            f"{name} is a picture of {len(image.getbands())} channels, and the network takes {in_chans}: expected an "
            ".npy file, a TIFF or an array with that many. Replace it, or leave it out."
        )
    # Not ImageOps.exif_transpose, which packs the EXIF anew and stumbles over tags that it could read.
    turn = image.getexif().get(ExifTags.Base.Orientation)
    turned = image.transpose(TURNS[turn]) if isinstance(turn, int) and turn in TURNS else image
    opaque: dict[Any, Any] = {OPAQUE: True} if in_chans in (2, 4) and not image.has_transparency_data else {}
    if turned.mode[0] in "IF":
        info = image.info
        values, reached = eight_bits(np.asarray(turned), white_level, name, white=info.get(_WHITE))
        grey = Image.fromarray(255 - values if info.get(_TURNED_BLACK) else values)
        deep = grey.convert(mode)
        deep.info.update({**reached, ANIMATED: info.get(ANIMATED), **opaque})
        return deep
    if turned.mode == "P" and "transparency" in turned.info:
        turned = turned.convert("RGBA")
    plain = turned.convert(mode)
    plain.info.update(opaque)
    has_levels = image.mode in ("L", "LA", "RGB", "RGBA") and REACHED not in image.info
    if white_level is None or white_level >= 255 or not has_levels:
        return plain
    table = [round(min(value, white_level) * 255 / white_level) for value in range(256)]
    bright = plain.point([level for band in mode for level in (range(256) if band == "A" else table)])
    bright.info |= {**opaque, REACHED: (float(np.asarray(plain.convert("RGB")).max()), white_level)}
    return bright


def eight_bits(
    values: np.ndarray, white_level: float | None, name: str, white: float | None = None
) -> tuple[np.ndarray, dict[Any, Any]]:
    """Integers or floats of any shape in 8 bits, and what an image's `info` says of them: `white_level` becomes 255.

    Without it `white` does: None is 1 for floats, else 65535, which keeps the upper byte, as Pillow does of colour with
    16 bits.
    """
    is_float = values.dtype.kind == "f"
    usual = white if white is not None else 1.0 if is_float else 65535.0
    is_given = white_level is not None and (is_float or values.dtype.itemsize > 2 or white_level <= 65535)
    level = white_level if is_given and white_level is not None else usual
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)) or low < 0:
        raise InputError(
            f"{name} holds values from {low:g} to {high:g}: expected finite values from 0. Scale them, or leave it out."
        )
    if not is_given and high > usual:
        raise InputError(
            f"{name} holds values from {low:g} to {high:g}: expected at most {usual:g}. Say which value is white with "
            "--white-level N (white_level)."
        )
    if level == 65535 and values.dtype.itemsize == 2 and not is_float:
        pixels = (values >> 8).astype(np.uint8)
    elif values.dtype.itemsize == 2 and not is_float:
        table = np.rint(np.arange(65536.0).clip(max=level) * 255.0 / level).astype(np.uint8)
        pixels = table[values]
    elif level == 65535:
        pixels = (values.clip(max=level).astype(np.uint32) >> 8).astype(np.uint8)
    else:
        single = values.clip(max=level).astype(np.result_type(values, np.float32), copy=False)
        pixels = np.rint(single * 255.0 / level).astype(np.uint8)
    return pixels, {REACHED: (high, level)}


def pixels_of_file(file: Path | bytes, preprocessing: Any) -> np.ndarray:
    """A picture's file -> (H, W, C) uint8, upright, resized and cropped. Raises InputError for what is none.

    `preprocessing` has the fields of `core.preprocessing.Preprocessing`.
    """
    image = upright(load_image(file, preprocessing.white_level), preprocessing.white_level, preprocessing.in_chans)
    return cropped_pixels((image,), preprocessing)


def cropped_pixels(planes: Sequence[Image.Image], preprocessing: Any) -> np.ndarray:
    """Upright 8-bit images of one size that hold the channels between them -> (H, W, C) uint8, resized and cropped.

    Raises InputError when they are so long and thin that they cannot be resized within the memory limit.
    """
    rows, columns = _sides(preprocessing.image_size)
    (width, height), (left, top) = resized_and_offset(planes[0].size, preprocessing)
    if width * height > MAX_PIXELS:
        raise InputError(
            f"An image of {planes[0].width}x{planes[0].height} is too long and thin: before its centre is cropped it "
            f"would be resized to {width}x{height}, over {MAX_PIXELS // 1_000_000} million pixels. Crop it first."
        )
    fill, done = preprocessing.fill, list[np.ndarray]()
    for part in planes:
        cut = part.resize((width, height), Image.Resampling[preprocessing.interpolation.upper()])
        if width >= columns and height >= rows:
            cut = cut.crop((-left, -top, columns - left, rows - top))
        else:
            colour = tuple(fill[len(done) : len(done) + len(part.getbands())])
            canvas = Image.new(part.mode, (columns, rows), colour)
            canvas.paste(cut, (left, top))
            cut = canvas
        done.append(np.atleast_3d(np.array(cut)))
    return done[0] if len(done) == 1 else np.concatenate(done, axis=2)


def resized_and_offset(size: tuple[int, int], preprocessing: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a picture of width and height `size` is resized to, and where its corner lies on the canvas, as (x, y)."""
    height, width = _sides(preprocessing.image_size)
    resized = _resized_size(size, preprocessing)
    if preprocessing.crop_mode == "corner":
        return resized, (0, 0)
    left, top = (-_margin(spare, preprocessing.crop_mode) for spare in (resized[0] - width, resized[1] - height))
    return resized, (left, top)


def _resized_size(size: tuple[int, int], preprocessing: Any) -> tuple[int, int]:
    """Width and height before the crop of a picture of width and height `size`."""
    height, width = (math.floor(side / preprocessing.crop_ratio) for side in _sides(preprocessing.image_size))
    if preprocessing.crop_mode == "squash":
        return width, height
    pads = preprocessing.crop_mode in PADDING_MODES
    if height == width and not pads:  # torchvision's arithmetic, which timm uses for squares
        width, height = (height * length // min(size) for length in size)
        return width, height
    ratios = size[0] / width, size[1] / height
    ratio = max(ratios) if pads else min(ratios)
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _margin(spare: int, crop_mode: str) -> int:
    """Pixels that are cut off on the left or at the top when `spare` are too many; negative where some are missing."""
    if spare < 0:
        return -(-spare // 2)
    return spare // 2 if crop_mode == "center-floor" else round(spare / 2)


def _name(file: Path | bytes) -> str:
    return "The file" if isinstance(file, bytes) else str(file)


def _sides(size: Any) -> tuple[int, int]:
    """Height and width of an image size, one number for a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _deep_colour(file: Path | bytes, image: Image.Image, white_level: float | None) -> Image.Image:
    """Colour with 16 bits, which Pillow has decoded to the upper bytes: as it is, or with all bits by a white level."""
    high = int(np.asarray(image.convert("RGB")).max())
    if white_level is None or white_level >= 65535:
        image.info[REACHED] = (high * 257.0, 65535.0)
        return image
    try:
        if image.format != "PNG":
            raise ImportError
        import torch
        from torchvision.io import ImageReadMode, decode_png  # deprecated, and nothing else that is required reads them

        content = file if isinstance(file, bytes) else file.read_bytes()
        with quiet():
            stored = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    except ImportError as error:
        raise ValueError(
            f"the white level {white_level:g} takes all 16 bits of a colour, of which 8 can be read: bring it to 8 "
            "bits, or leave the white level out"
        ) from error
    # (1 to 4, H, W) uint16, alpha last
    colours = stored[:3] if len(stored) > 2 else stored[:1].expand(3, -1, -1)
    pixels, reached = eight_bits(colours.permute(1, 2, 0).numpy(), white_level, _name(file))
    deep = Image.fromarray(np.ascontiguousarray(pixels))
    if len(stored) in (2, 4):
        deep.putalpha(Image.fromarray((stored[-1].numpy() >> 8).astype(np.uint8)))
    deep.info = {**image.info, **reached}  # EXIF among it
    return deep


def _known_of_tiff(image: Image.Image) -> dict[str, Any]:
    """What Pillow leaves out of a TIFF's grey with more than 8 bits: white below 65535, and white stored as zero."""
    tags = getattr(image, "tag_v2", None)
    if tags is None or image.mode[0] not in "IF":
        return {}
    bits = int(np.ravel(tags.get(258, 16))[0])  # BitsPerSample
    known: dict[str, Any] = {_TURNED_BLACK: tags.get(262) == 0}  # PhotometricInterpretation: WhiteIsZero
    return known | ({_WHITE: 2.0**bits - 1} if 8 < bits < 16 else {})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of Pillow: what matters in them is an error here.

    The filters are the process's. The first thread inside sets them and the last one puts them back, so that several
    decode at once.
    """
    with _FILTERS:
        if not _INSIDE:
            _EARLIER.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _INSIDE.append(threading.get_ident())
    try:
        yield
    finally:
        with _FILTERS:
            _INSIDE.remove(threading.get_ident())
            if not _INSIDE:
                _EARLIER.close()
