"""A picture larger than the canvas in tiles that overlap: the mean of their logits, as one map of the whole picture.

Tiles have the pixels of the picture as they are. They begin at multiples of 4 pixels, so that their logits, of a
quarter, lie on one grid; where several tiles cover a place, each weighs the same. The map is brought to the picture's
pixels bilinearly, as one pass's is. GRN sums over a tile alone, so that tiles see less of a picture than one pass does.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import sides, size_text
from cnx_deploy.data import ImageSource, pixels_of
from cnx_deploy.data.bands import Picture
from cnx_deploy.data.preprocessing import Placement, cropped, placement
from cnx_deploy.model.tasks.base import Outputs, Prediction
from cnx_deploy.verification.predict import Model, outputs_of_pixels

__all__ = ["MOST_OVERLAP", "check_tiles", "is_larger", "tile_starts", "tiled_outputs", "tiled_predictions"]

GRID = 4
"""Pixels to a side of one place of the logits."""
MOST_OVERLAP = 0.75
"""Above it a picture would be run 16 times and more."""


def check_tiles(model: Model, overlap: float) -> None:
    """Raise InputError for a model whose outputs cannot be averaged over tiles, and for another overlap."""
    if model.task.targets != "masks" or not {"logits", "full_logits"} & set(model.output_names):
        raise InputError(
            f"Tiles are averaged by their logits, and {model.task.name} gives {', '.join(model.output_names)} here. "
            "Take a segmentation model that was exported with --output logits, or leave --tiles (tiles) out."
        )
    if not 0.0 <= overlap <= MOST_OVERLAP:
        raise InputError(
            f"Tiles overlap by a share of their side from 0 to {MOST_OVERLAP}; got {overlap}. The usual one is 0.25."
        )


def is_larger(size: tuple[int, int], model: Model) -> bool:
    """Whether a picture of width and height `size` does not fit on the canvas with the pixels that it has."""
    return any(side > limit for side, limit in zip(size, sides(model.preprocessing.image_size)[::-1], strict=True))


def tile_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where tiles of `window` pixels begin along a side of `length`, evenly, at multiples of 4, by `overlap` at least.

    Both are multiples of 4. One tile is enough where it covers the side.
    """
    if length <= window:
        return [0]
    count = math.ceil((length - window) / max(GRID, window * (1.0 - overlap))) + 1
    return [(length - window) * at // (count - 1) // GRID * GRID for at in range(count)]


def tiled_outputs(
    model: Model, picture: Picture, overlap: float, *, batch_size: int = 8, name: str = "the picture"
) -> tuple[Outputs, Placement]:
    """The mean logits (1, K, h, w) of a picture's tiles, and where the picture lies on their joint canvas."""
    rows, columns = sides(model.preprocessing.image_size)
    if rows % GRID or columns % GRID:
        size = size_text(model.preprocessing.image_size)
        raise InputError(f"Tiles begin at multiples of {GRID} pixels, and the canvas is {size}. Predict without tiles.")
    whole = _filled(picture, model.preprocessing.fill, (rows, columns))
    corners = [
        (top, left)
        for top in tile_starts(whole.shape[0], rows, overlap)
        for left in tile_starts(whole.shape[1], columns, overlap)
    ]
    total: Tensor | None = None
    most = min(batch_size, model.runner.input_spec.max_batch or batch_size)
    for some in (corners[start : start + most] for start in range(0, len(corners), most)):
        tiles = torch.stack([whole[top : top + rows, left : left + columns] for top, left in some])
        outputs = outputs_of_pixels(model, tiles, name)
        kind = "full_logits" if "full_logits" in outputs else "logits"
        logits = outputs[kind].float()
        step = rows // logits.shape[2]
        if total is None:
            height, width = (side // step for side in whole.shape[:2])
            total, weights = torch.zeros(logits.shape[1], height, width), torch.zeros(height, width)
        for (top, left), scores in zip(some, logits, strict=True):
            down, across = slice(top // step, (top + rows) // step), slice(left // step, (left + columns) // step)
            total[:, down, across] += scores
            weights[down, across] += 1.0
    assert total is not None
    own = picture.size
    return {kind: (total / weights)[None]}, Placement(own, own, (0, 0), (whole.shape[1], whole.shape[0]))


def tiled_predictions(
    model: Model, images: ImageSource, overlap: float, *, top: int | None = None, batch_size: int = 8
) -> Iterator[Prediction]:
    """Yield one prediction an image, in order; a picture that fits on the canvas is run as without tiles."""
    check_tiles(model, overlap)
    count = model.task.usual_top if top is None else top
    for index in range(len(images)):
        name = images.name(index)
        try:
            picture = images.picture(index, model.preprocessing)
        except InputError as error:
            yield model.task.prediction(path=name, error=str(error))
            continue
        if picture is None:
            raise InputError(
                f"{images.description} makes pixels of one size, so that there is nothing to cut in tiles."
            )
        if is_larger(picture.size, model):
            outputs, place = tiled_outputs(model, picture, overlap, batch_size=batch_size, name=name)
        else:
            outputs = outputs_of_pixels(model, cropped(picture, model.preprocessing)[None], name)
            place = placement(picture.size, model.preprocessing)
        yield from model.task.predictions_on_pictures(outputs, [name], model.class_names, [place], top=count)


def _filled(picture: Picture, fill: tuple[int, ...], least: tuple[int, int]) -> Tensor:
    """(H, W, C) uint8, filled on the right and below to multiples of 4 and to a tile at least."""
    pixels = pixels_of(picture)
    height, width = (max(limit, -(-side // GRID) * GRID) for side, limit in zip(pixels.shape[:2], least, strict=True))
    whole = np.empty((height, width, pixels.shape[2]), np.uint8)
    whole[:] = fill
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return torch.from_numpy(whole)
