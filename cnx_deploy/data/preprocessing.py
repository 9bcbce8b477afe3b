"""What a model is given: how an image becomes pixels, and pixels become a runner's input.

`to_pixels` is the one definition that training's validation, parity, evaluation and prediction share. Of RGB it equals
timm's evaluation transform (`timm.data.create_transform`) and transformers' processors to within 1/255.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import sides
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.bands import Bands, Picture, picture_of
from cnx_deploy.data.pixels import cropped_pixels, resized_and_offset

__all__ = ["Placement", "cropped", "normalise", "placement", "runner_input", "to_pixels"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a picture lies on the canvas that a network takes. All are (x, y): widths and heights in pixels.

    The `picture` is resized to `size`, and its upper left corner lies at `offset` of the `canvas`; an offset below 0
    cuts something off.
    """

    picture: tuple[int, int]
    size: tuple[int, int]
    offset: tuple[int, int]
    canvas: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Canvas pixels for one of the picture."""
        return self.size[0] / self.picture[0], self.size[1] / self.picture[1]

    @property
    def shown(self) -> tuple[slice, slice]:
        """Rows and columns of the canvas that the picture covers."""
        across, down = (
            slice(max(0, start), min(start + length, limit))
            for start, length, limit in zip(self.offset, self.size, self.canvas, strict=True)
        )
        return down, across

    def boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4) xyxy of the picture, in its pixels -> float32 of the canvas. What lies outside is not cut."""
        return boxes.float() * torch.tensor(self.scale * 2) + torch.tensor(self.offset * 2)

    def boxes_of_picture(self, boxes: Tensor) -> Tensor:
        """The way back: boxes (M, 4) xyxy of the canvas -> of the picture, cut at its edges."""
        moved = (boxes.float() - torch.tensor(self.offset * 2)) / torch.tensor(self.scale * 2)
        return torch.minimum(moved.clamp_min(0.0), torch.tensor(self.picture * 2).float())

    def label_map(self, labels: np.ndarray, outside: int) -> np.ndarray:
        """Classes (H, W) uint8 or int32 of the picture's pixels -> (rows, columns) of the canvas, by the nearest pixel.

        `outside` is what the canvas holds where the picture does not reach.
        """
        resized = Image.fromarray(labels).resize(self.size, Image.Resampling.NEAREST)
        left, top = self.offset
        canvas = np.full(self.canvas[::-1], outside, labels.dtype)
        down, across = self.shown
        canvas[down, across] = np.asarray(resized)[
            down.start - top : down.stop - top, across.start - left : across.stop - left
        ]
        return canvas

    def on_picture(self, maps: Tensor, mode: str = "bilinear") -> Tensor:
        """The way back: scores (N, K, rows, columns) of the canvas -> (N, K, H, W) of the picture, bilinearly.

        `mode` "nearest-exact" is for classes. Where the canvas shows only a part of the picture, the edge of that part
        is repeated.
        """
        down, across = self.shown
        left, top = self.offset
        part = maps[..., down, across]
        beyond = (
            max(0, -left), max(0, left + self.size[0] - self.canvas[0]),
            max(0, -top), max(0, top + self.size[1] - self.canvas[1]),
        )  # fmt: skip
        whole = F.pad(part, beyond, mode="replicate") if any(beyond) else part
        corners = {"align_corners": False} if mode == "bilinear" else {}
        return F.interpolate(whole, self.picture[::-1], mode=mode, **corners)


def to_pixels(image: Any, preprocessing: Preprocessing) -> Tensor:
    """An image of any kind -> (H, W, C) uint8, upright, resized and cropped as `preprocessing` says.

    Raises InputError for what is no image, see `bands.picture_of`, and as `cropped` does.
    """
    return cropped(picture_of(image, preprocessing.white_level, preprocessing.in_chans), preprocessing)


def cropped(picture: Picture, preprocessing: Preprocessing) -> Tensor:
    """An upright 8-bit picture of the right channels -> (H, W, C) uint8, resized and cropped.

    Raises InputError when the image is so long and thin that it cannot be resized within the memory limit.
    """
    planes = picture.planes if isinstance(picture, Bands) else (picture,)
    return torch.from_numpy(cropped_pixels(planes, preprocessing))


def placement(size: tuple[int, int], preprocessing: Preprocessing) -> Placement:
    """Where `cropped` puts a picture of width and height `size` on the canvas, which is `preprocessing.image_size`."""
    height, width = sides(preprocessing.image_size)
    return Placement(size, *resized_and_offset(size, preprocessing), (width, height))


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(N, H, W, C) uint8, or (N, C, H, W) float in [0, 1] -> (N, C, H, W) floats the training form takes."""
    unit = images.permute(0, 3, 1, 2).float() / 255.0 if images.dtype == torch.uint8 else images
    mean, std = (unit.new_tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (unit - mean) / std


def runner_input(pixels: Tensor, kind: str, preprocessing: Preprocessing | None = None) -> Tensor:
    """(N, H, W, C) uint8 pixels -> what a runner of input `kind` takes: see `data.input_spec.InputSpec`.

    "normalised" takes the mean and std of `preprocessing`.
    """
    if kind == "normalised" and preprocessing is not None:
        return normalise(pixels, preprocessing).contiguous()
    if kind not in ("uint8", "float"):
        raise InputError(f"No runner input is called {kind!r}. Choose one of: float, uint8, normalised with a mean.")
    return pixels if kind == "uint8" else (pixels.permute(0, 3, 1, 2).float() / 255.0).contiguous()
