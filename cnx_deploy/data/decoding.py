"""How a file becomes an image: told by its content, decoded whole or refused by name, and made 8-bit RGB.

Deeper images (16 bits, integers of 32 bits, floats) are brought to 8 bits by one rule: a white level, the stored value
that is white, becomes 255. It is 65535 for integers and 1 for floats unless `Preprocessing.white_level` gives another.
"""

import contextlib
import math
import struct
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from cnx_deploy.core.errors import InputError

__all__ = [
    "FORMATS", "MAX_PIXELS", "SUFFIXES", "Observations", "as_image", "is_image_file", "load_image", "upright_rgb",
]  # fmt: skip

Image.init()  # else Pillow knows its first five formats only
FORMATS = tuple(
    kind for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "HEIF") if kind in Image.OPEN
)
"""AVIF and HEIF only where the installed Pillow reads them."""
SHORT_SIGNATURES = frozenset({"BMP", "PPM"})
"""Two letters begin such a file, as they may a text."""
SUFFIXES = frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS)
"""Of the names of files that are taken for images before anything of them is read."""
MAX_PIXELS = 89_000_000
"""Largest image that is decoded, 267 MB as RGB; just below the size at which Pillow itself begins to warn."""
DARK = 1 / 4
"""A deep image that does not pass this share of the white level may have two bits less than its file, or more."""

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
_REACHED, _WHITE, _TURNED_BLACK, _ANIMATED = "cnx reached", "cnx white", "cnx white is zero", "cnx animated"
"""Entries of a PIL image's `info`: what is known of a decoded file beside its pixels."""
Reached = tuple[float, float, float, str]
_FILTERS, _OBSERVED = threading.Lock(), threading.Lock()


@dataclass(slots=True)
class Observations:
    """What the images of a source have shown while they were read; filled from any thread.

    `brightest` and `brightest_of_dark`: the largest share of the white level, the value, the white level and the image
    that holds it, of all images that a white level is of, and of those below `DARK`.
    """

    animated: set[str] = field(default_factory=set)
    brightest: Reached | None = None
    brightest_of_dark: Reached | None = None

    def add(self, name: str, image: Image.Image) -> None:
        """Take note of an image that `upright_rgb` gave."""
        if image.info.get(_ANIMATED):
            self.animated.add(name)
        if (reached := image.info.get(_REACHED)) is None or reached[0] == 0:
            return
        value, white = reached
        found = (value / white, value, white, name)
        with _OBSERVED:
            self.brightest = max(self.brightest or found, found)
            if found[0] <= DARK:
                self.brightest_of_dark = max(self.brightest_of_dark or found, found)

    def notes(self) -> tuple[str, ...]:
        """A sentence for each thing that whoever reads the result should know."""
        said = []
        if self.animated:
            first = min(self.animated)
            said.append(f"{len(self.animated)} files hold several frames or pages; the first one is taken ({first}).")
        if self.brightest_of_dark is not None:
            _, value, white, name = self.brightest_of_dark
            which = "Images" if self.brightest == self.brightest_of_dark else "Some images"
            likely = 2 ** math.ceil(value).bit_length() - 1 if value > 1 else 1
            said.append(
                f"{which} with more than 8 bits reach {value:g} at most, where white is {white:g}: they are nearly "
                f"black ({name}). If another value is white, say so: --white-level {likely} (white_level)."
            )
        if self.brightest is not None and self.brightest[0] > 1:
            _, value, white, name = self.brightest
            said.append(f"Values above the white level {white:g} are clipped; the largest is {value:g} ({name}).")
        return tuple(said)


def is_image_file(path: str) -> bool:
    """Whether a file is of one of the formats, by its first bytes and, where those are two letters, its header.

    This takes 0.05 ms; with the header of every file it took 0.3 ms (20,000 small files).
    """
    try:
        with open(path, "rb") as stream:  # noqa: PTH123 - a million times
            prefix = stream.read(16)
        # A plugin that knows a file and cannot read it gives a text.
        kinds = [kind for kind in FORMATS if (accept := Image.OPEN[kind][1]) is None or accept(prefix) is True]
        if not kinds or set(kinds) - SHORT_SIGNATURES:
            return bool(kinds)
        with _quiet(), Image.open(path, formats=tuple(kinds)):
            return True
    except UNREADABLE:
        return False


def load_image(path: Path, white_level: float | None = None) -> Image.Image:
    """Decode a file of one of `FORMATS`, told by its content; of several frames or pages the first.

    `white_level`: of colour with 16 bits, of which Pillow keeps the upper byte. InputError names the file when it is
    another format, empty, truncated or above MAX_PIXELS; the size is read from the header, before anything is decoded.
    EXIF that cannot be read counts as none.
    """
    try:
        with _quiet():  # the limit below is stricter than the one that Pillow warns of
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, limit {MAX_PIXELS}")
            layouts = [str(tile.args) for tile in image.tile]
            is_deep_colour = image.mode in ("RGB", "RGBA") and any(";16" in layout for layout in layouts)
            # A camera's JPEG holds previews and maps of brightness beside its picture, which are no frames of it.
            is_animated = image.format not in ("JPEG", "MPO") and bool(getattr(image, "is_animated", False))
            known = {_ANIMATED: is_animated, **_known_of_tiff(image)}
            with _quiet():
                image.load()
                image.getexif()
        image.info.update(known)
        return _deep_colour(path, image, white_level) if is_deep_colour else image
    except UNREADABLE as error:
        raise InputError(
            f"{path} cannot be read as an image ({error}): expected a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} "
            f"file of at most {MAX_PIXELS // 1_000_000} million pixels. Replace or remove it."
        ) from error


def as_image(image: Any, white_level: float | None = None) -> Image.Image:
    """Make a PIL image of what a caller has.

    Takes a path; a PIL image; an array (H, W, 3) or (H, W) of uint8, uint16 or floats; or a tensor (3, H, W) of them.
    uint16 and floats are brought to 8 bits by `white_level`. Raises InputError for anything else.
    """
    if isinstance(image, str | Path):
        return load_image(Path(image), white_level)
    if isinstance(image, Image.Image):
        return image
    values, given = image, f"{getattr(image, 'dtype', '')} {tuple(getattr(image, 'shape', ()))}"
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise InputError(f"A tensor must be an image of shape (3, H, W), got {tuple(image.shape)}.")
        values = (image.float() if image.dtype == torch.bfloat16 else image).detach().permute(1, 2, 0).cpu().numpy()
    is_array = isinstance(values, np.ndarray) and (values.dtype in (np.uint8, np.uint16) or values.dtype.kind == "f")
    if not is_array or not values.size or values.shape[2:] not in ((), (3,)) or values.ndim < 2:
        raise InputError(
            "An image must be a path, a PIL image, an array (H, W, 3) or (H, W) or a tensor (3, H, W) of uint8, uint16 "
            f"or floats, got {given if isinstance(image, np.ndarray | torch.Tensor) else type(image).__name__}."
        )
    if values.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(values))
    return _eight_bits(values, white_level, "The array")


def upright_rgb(image: Image.Image, white_level: float | None = None) -> Image.Image:
    """Any mode to 8-bit RGB, turned as its EXIF orientation says; alpha is dropped, as torchvision and timm do.

    `white_level`: see the module. It is of images that can hold it: of those with 8 bits where it is at most 255, else
    they keep their own. Raises InputError for values that are negative, not finite or, with no white level given,
    above the type's.
    """
    # Not ImageOps.exif_transpose, which packs the EXIF anew and stumbles over tags that it could read.
    turn = image.getexif().get(ExifTags.Base.Orientation)
    upright = image.transpose(TURNS[turn]) if isinstance(turn, int) and turn in TURNS else image
    if upright.mode[0] in "IF":
        name, info = getattr(image, "filename", "") or "The image", image.info
        grey = _eight_bits(np.asarray(upright), white_level, name, white=info.get(_WHITE))
        rgb = (grey.point(lambda value: 255 - value) if info.get(_TURNED_BLACK) else grey).convert("RGB")
        rgb.info.update({_REACHED: grey.info[_REACHED], _ANIMATED: info.get(_ANIMATED)})
        return rgb
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    rgb = upright.convert("RGB")
    has_levels = image.mode in ("L", "LA", "RGB", "RGBA") and _REACHED not in image.info
    if white_level is None or white_level >= 255 or not has_levels:
        return rgb
    bright = rgb.point([round(min(value, white_level) * 255 / white_level) for value in range(256)] * 3)
    bright.info[_REACHED] = (float(np.asarray(rgb).max()), white_level)
    return bright


def _eight_bits(values: np.ndarray, white_level: float | None, name: str, white: float | None = None) -> Image.Image:
    """Integers or floats, (H, W) or (H, W, 3), as an image of 8 bits: `white_level`, else `white`, becomes 255.

    `white` None is 1 for floats, else 65535, which keeps the upper byte, as Pillow does of colour with 16 bits.
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
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.info[_REACHED] = (high, level)
    return image


def _deep_colour(path: Path, image: Image.Image, white_level: float | None) -> Image.Image:
    """Colour with 16 bits, which Pillow has decoded to the upper bytes: as it is, or with all bits by a white level."""
    high = int(np.asarray(image.convert("RGB")).max())
    if white_level is None or white_level >= 65535:
        image.info[_REACHED] = (high * 257.0, 65535.0)
        return image
    try:
        if image.format != "PNG":
            raise ImportError
        from torchvision.io import ImageReadMode, decode_png  # deprecated, and nothing else that is required reads them

        with _quiet():
            stored = decode_png(torch.from_numpy(np.fromfile(path, np.uint8)), ImageReadMode.UNCHANGED)
    except ImportError as error:
        raise ValueError(
            f"the white level {white_level:g} takes all 16 bits of a colour, of which 8 can be read: bring it to 8 "
            "bits, or leave the white level out"
        ) from error
    # (1 to 4, H, W) uint16, alpha last
    colours = stored[:3] if len(stored) > 2 else stored[:1].expand(3, -1, -1)
    rgb = _eight_bits(colours.permute(1, 2, 0).numpy(), white_level, str(path))
    rgb.info = {**image.info, **rgb.info}  # EXIF among it
    return rgb


def _known_of_tiff(image: Image.Image) -> dict[str, Any]:
    """What Pillow leaves out of a TIFF's grey with more than 8 bits: white below 65535, and white stored as zero."""
    tags = getattr(image, "tag_v2", None)
    if tags is None or image.mode[0] not in "IF":
        return {}
    bits = int(np.ravel(tags.get(258, 16))[0])  # BitsPerSample
    known: dict[str, Any] = {_TURNED_BLACK: tags.get(262) == 0}  # PhotometricInterpretation: WhiteIsZero
    return known | ({_WHITE: 2.0**bits - 1} if 8 < bits < 16 else {})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of Pillow: what matters in them is an error here. The filters are the process's, hence the lock."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
