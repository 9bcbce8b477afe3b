"""Objects drawn on a picture: boxes, masks, names and probabilities in the colours of their classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.data.bands import pixels_of
from cnx_deploy.data.label_maps import OVERLAY, colour_map

__all__ = ["DRAWN_FROM", "drawn_objects"]

DRAWN_FROM = 0.5
"""Probability from which a detection is drawn."""


def drawn_objects(picture: Any, objects: Mapping[str, Tensor], names: Sequence[str] | Mapping[int, str]) -> Any:
    """(H, W, 3) uint8 array of an upright picture with its objects.

    Args:
        picture: as `bands.picture_of` gives it, of 1 or 3 channels.
        objects: `boxes` (n, 4) xyxy in its pixels, `labels` (n,), and where they are known `masks` (n, H, W) of 0 and 1
            and `scores` (n,).
        names: of the classes, by their index.
    """
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks  # takes seconds to load

    image = torch.from_numpy(pixels_of(picture)).permute(2, 0, 1)
    image = image.expand(3, -1, -1).contiguous() if len(image) == 1 else image[:3]
    labels = objects["labels"].tolist()
    colours = [tuple(colour_map()[label % 254 + 1].tolist()) for label in labels]  # 0 is black
    if labels and "masks" in objects:
        image = draw_segmentation_masks(image, objects["masks"].bool().cpu(), alpha=OVERLAY, colors=colours)
    if labels:
        width = max(1, min(image.shape[1:]) // 200)
        scores = objects["scores"].tolist() if "scores" in objects else [None] * len(labels)
        texts = [
            names[label] if score is None else f"{names[label]} {score:.0%}"
            for label, score in zip(labels, scores, strict=True)
        ]
        image = draw_bounding_boxes(image, objects["boxes"].cpu(), texts, colours, width=width)
    return image.permute(1, 2, 0).numpy()
