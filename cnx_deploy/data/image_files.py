"""Which files are images, told by their content, and what the images of a source have shown while they were read."""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from cnx_deploy.core.image_size import MAX_CHANNELS
from cnx_deploy.data.pixels import ANIMATED, FORMATS, OPAQUE, REACHED, UNREADABLE, quiet

__all__ = ["SUFFIXES", "Observations", "is_image_file", "is_numpy_file", "numpy_header"]

SHORT_SIGNATURES = frozenset({"BMP", "PPM"})
"""Two letters begin such a file, as they may a text."""
SUFFIXES = frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS)
"""Of the names of files that are taken for images before anything of them is read."""
NUMPY = b"\x93NUMPY"
"""Begins an .npy file."""
DARK = 1 / 4
"""A deep image that does not pass this share of the white level may have two bits less than its file, or more."""
Reached = tuple[float, float, float, str]
_OBSERVED = threading.Lock()


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
        if info.get(ANIMATED):
            self.animated.add(name)
        if info.get(OPAQUE):
            self.opaque.add(name)
        if (reached := info.get(REACHED)) is None or reached[0] == 0:
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


def is_numpy_file(file: Path | bytes) -> bool:
    """Whether a file, by its path or its bytes, begins as NumPy's own."""
    if isinstance(file, bytes):
        return file.startswith(NUMPY)
    try:
        with file.open("rb") as stream:
            return stream.read(len(NUMPY)) == NUMPY
    except OSError:
        return False


def numpy_header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array in an .npy file. Raises ValueError for a header that is none."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _holds_an_image(stream: BinaryIO) -> bool:
    """Whether the header of an .npy file is that of numbers (H, W, C) or (C, H, W); features and masks are left out."""
    shape, dtype = numpy_header(stream)
    return len(shape) == 3 and dtype.kind in "uif" and 1 <= min(shape[0], shape[2]) <= MAX_CHANNELS
