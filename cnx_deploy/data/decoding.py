"""How a file becomes an image: told by its content, decoded whole or refused by name, and made 8-bit.

Deeper images (16 bits, integers of 32 bits, floats) are brought to 8 bits by one rule: a white level, the stored value
that is white, becomes 255. It is 65535 for integers and 1 for floats unless `Preprocessing.white_level` gives another.
"""

import contextlib
import math
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import MAX_CHANNELS

__all__ = [
    "FORMATS", "MAX_PIXELS", "MODES", "SUFFIXES", "TURNS", "UNREADABLE", "Observations", "eight_bits", "is_image_file",
    "is_numpy_file", "load_image", "quiet", "upright",
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
NUMPY = b"\x93NUMPY"
"""Begins an .npy file."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""What a picture becomes for a network of so many channels."""
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
_OPAQUE = "cnx has no alpha"
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
    opaque: set[str] = field(default_factory=set)
    brightest: Reached | None = None
    brightest_of_dark: Reached | None = None

    def add(self, name: str, info: Mapping[Any, Any]) -> None:
        """Take note of the `info` of an image that `upright` or `bands.picture_of` gave."""
        if info.get(_ANIMATED):
            self.animated.add(name)
        if info.get(_OPAQUE):
            self.opaque.add(name)
        if (reached := info.get(_REACHED)) is None or reached[0] == 0:
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
        if self.opaque:
            said.append(
                f"Pictures without alpha are taken as opaque, 255: {len(self.opaque)}, the first {min(self.opaque)}."
            )
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
            if prefix.startswith(NUMPY):
                stream.seek(0)
                return _holds_an_image(stream)
        # A plugin that knows a file and cannot read it gives a text.
        kinds = [kind for kind in FORMATS if (accept := Image.OPEN[kind][1]) is None or accept(prefix) is True]
        if not kinds or set(kinds) - SHORT_SIGNATURES:
            return bool(kinds)
        with quiet(), Image.open(path, formats=tuple(kinds)):
            return True
    except UNREADABLE:
        return False


def is_numpy_file(path: Path) -> bool:
    """Whether a file begins as NumPy's own."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(NUMPY)) == NUMPY
    except OSError:
        return False


def _holds_an_image(stream: BinaryIO) -> bool:
    """Whether the header of an .npy file is that of numbers (H, W, C) or (C, H, W); features and masks are left out."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return len(shape) == 3 and dtype.kind in "uif" and 1 <= min(shape[0], shape[2]) <= MAX_CHANNELS


def load_image(path: Path, white_level: float | None = None) -> Image.Image:
    """Decode a file of one of `FORMATS`, told by its content; of several frames or pages the first.

    `white_level`: of colour with 16 bits, of which Pillow keeps the upper byte. InputError names the file when it is
    another format, empty, truncated or above MAX_PIXELS; the size is read from the header, before anything is decoded.
    EXIF that cannot be read counts as none.
    """
    try:
        with quiet():  # the limit below is stricter than the one that Pillow warns of
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, limit {MAX_PIXELS}")
            layouts = [str(tile.args) for tile in image.tile]
            is_deep_colour = image.mode in ("RGB", "RGBA") and any(";16" in layout for layout in layouts)
            # A camera's JPEG holds previews and maps of brightness beside its picture, which are no frames of it.
            is_animated = image.format not in ("JPEG", "MPO") and bool(getattr(image, "is_animated", False))
            known = {_ANIMATED: is_animated, **_known_of_tiff(image)}
            with quiet():
                image.load()
                image.getexif()
        image.info.update(known)
        return _deep_colour(path, image, white_level) if is_deep_colour else image
    except UNREADABLE as error:
        raise InputError(
            f"{path} cannot be read as an image ({error}): expected a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} "
            f"file of at most {MAX_PIXELS // 1_000_000} million pixels. Replace or remove it."
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
    opaque: dict[Any, Any] = {_OPAQUE: True} if in_chans in (2, 4) and not image.has_transparency_data else {}
    if turned.mode[0] in "IF":
        info = image.info
        values, reached = eight_bits(np.asarray(turned), white_level, name, white=info.get(_WHITE))
        grey = Image.fromarray(255 - values if info.get(_TURNED_BLACK) else values)
        deep = grey.convert(mode)
        deep.info.update({**reached, _ANIMATED: info.get(_ANIMATED), **opaque})
        return deep
    if turned.mode == "P" and "transparency" in turned.info:
        turned = turned.convert("RGBA")
    plain = turned.convert(mode)
    plain.info.update(opaque)
    has_levels = image.mode in ("L", "LA", "RGB", "RGBA") and _REACHED not in image.info
    if white_level is None or white_level >= 255 or not has_levels:
        return plain
    table = [round(min(value, white_level) * 255 / white_level) for value in range(256)]
    bright = plain.point([level for band in mode for level in (range(256) if band == "A" else table)])
    bright.info |= {**opaque, _REACHED: (float(np.asarray(plain.convert("RGB")).max()), white_level)}
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
    return pixels, {_REACHED: (high, level)}


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

        with quiet():
            stored = decode_png(torch.from_numpy(np.fromfile(path, np.uint8)), ImageReadMode.UNCHANGED)
    except ImportError as error:
        raise ValueError(
            f"the white level {white_level:g} takes all 16 bits of a colour, of which 8 can be read: bring it to 8 "
            "bits, or leave the white level out"
        ) from error
    # (1 to 4, H, W) uint16, alpha last
    colours = stored[:3] if len(stored) > 2 else stored[:1].expand(3, -1, -1)
    pixels, reached = eight_bits(colours.permute(1, 2, 0).numpy(), white_level, str(path))
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
    """No warnings of Pillow: what matters in them is an error here. The filters are the process's, hence the lock."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
