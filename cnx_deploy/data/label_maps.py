"""Maps of classes as pictures: Pascal VOC's colours, a palette PNG whose indices are the classes, an overlay."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cnx_deploy.core.files import whole_file

__all__ = ["colour_map", "overlaid", "save_label_map", "save_picture", "sheet"]

MARGIN = 4
"""Pixels between the cells of a sheet."""
OVERLAY = 0.55
"""Share of the class's colour in an overlay."""


def colour_map() -> np.ndarray:
    """(256, 3) uint8: Pascal VOC's colours, which spread the bits of a class over the three channels."""
    classes, colours = np.arange(256), np.zeros((256, 3), np.int64)
    for step in range(8):
        for channel in range(3):
            colours[:, channel] |= ((classes >> (3 * step + channel)) & 1) << (7 - step)
    return colours.astype(np.uint8)


def save_label_map(path: Path, labels: np.ndarray) -> None:
    """Write classes (H, W), 0 to 255, as a palette PNG, whole or not at all; its indices are the classes."""
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(colour_map().tobytes())
    save_picture(path, picture)


def overlaid(pixels: np.ndarray, labels: np.ndarray, opacity: float = OVERLAY) -> np.ndarray:
    """(H, W, 3) uint8: pixels (H, W, C) under the colours of their classes (H, W); 255 stays as it is.

    Of four channels the first three are colours, of another number the mean is grey.
    """
    colours = pixels[..., :3] if pixels.shape[2] in (3, 4) else pixels.mean(axis=2, keepdims=True)
    picture = np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours
    mixed = (1.0 - opacity) * picture + opacity * colour_map()[labels]
    return np.where((labels == 255)[..., None], picture, mixed).round().astype(np.uint8)


def sheet(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Pictures (H, W, 3) of one size as a table of cells."""
    height, width = rows[0][0].shape[:2]
    across, down = (count * (side + MARGIN) - MARGIN for count, side in ((len(rows[0]), width), (len(rows), height)))
    whole = Image.new("RGB", (across, down), "white")
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            whole.paste(Image.fromarray(cell), (column * (width + MARGIN), row * (height + MARGIN)))
    return whole


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")
