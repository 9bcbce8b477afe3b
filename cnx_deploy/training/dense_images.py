"""Images to train dense tasks on: the picture and what lies on it are scaled, mirrored, cropped and padded together.

Everything is drawn from the seed that the sampler sends along, as in `training.images`. torchvision's v2 transforms do
the work on its tv_tensors. Sources: mmsegmentation's pipeline of ADE20K (RandomResize, RandomCrop with a largest share
of a class, RandomFlip, PhotoMetricDistortion); Ghiasi et al., arXiv:2012.07177, for the jitter of scales in detection.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from cnx_deploy.core.class_names import NOT_COUNTED
from cnx_deploy.core.image_size import sides
from cnx_deploy.data import InstanceFiles, SegmentationFiles, pixels_of
from cnx_deploy.data.preprocessing import placement
from cnx_deploy.training.images import CACHE_BYTES, SAMPLED_HEADERS
from cnx_deploy.training.spec import TrainingSpec

__all__ = ["DenseAugmentation", "DenseTrainingImages"]

MOST_OF_A_CLASS = 0.75
"""Of the counted pixels of a crop one class may have this share; after `CROPS` tries any crop is taken."""
CROPS = 10
SMALLEST_BOX = 1.0
"""Canvas pixels to a side, below which an object is left out of a crop."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1)
"""mmsegmentation's: 32 of 255, half, half, and 18 of the 180 steps that OpenCV has to a circle."""

Target = Tensor | dict[str, Tensor]


class DenseTrainingImages(TorchDataset[tuple[Tensor, Any]]):
    """Augmented images of a dense task. [(index, seed)] -> (H, W, C) uint8 of the canvas and its target.

    Of masks the target is (H, W) int64; of objects a dictionary of `boxes`, `labels` and, where outlines are known,
    `masks`, without crowds. Pictures are kept in memory where they fit, masks of objects are made each time.
    """

    def __init__(self, split: SegmentationFiles | InstanceFiles, spec: TrainingSpec) -> None:
        self.split, self.augment = split, DenseAugmentation(spec)
        self.white_level, self.in_chans = spec.white_level, spec.in_chans
        fits = self._decoded_bytes() <= CACHE_BYTES
        self.cached = [self._read(index) for index in range(len(split))] if fits else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any]:
        index, seed = key
        picture, mask = self.cached[index] if self.cached else self._read(index)
        known: Any = self.split.target_of(index) if isinstance(self.split, InstanceFiles) else mask
        image, target = self.augment(picture.permute(2, 0, 1), known, seed)
        return image.permute(1, 2, 0).contiguous(), target.long() if isinstance(target, Tensor) else target

    def _read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """(H, W, C) uint8 of the file's own size, and the classes (H, W) uint8 of its pixels."""
        picture, known = self.split.pair(index, self.white_level, self.in_chans)
        mask = torch.from_numpy(known) if isinstance(known, np.ndarray) else None
        return torch.from_numpy(pixels_of(picture)), mask

    def _decoded_bytes(self) -> int:
        """Estimate from a few images spread over the split."""
        some = range(0, len(self.split), max(1, len(self.split) // SAMPLED_HEADERS))
        sizes = [self.split.image(index, self.white_level, self.in_chans).size for index in some]
        return (self.in_chans + 1) * sum(map(math.prod, sizes)) * len(self.split) // len(sizes)


class DenseAugmentation:
    """Scale, mirror, crop, distort and pad one image and its target; see the module.

    `spec.scale_jitter` (low, high): the factor on the scale at which the picture fits on the canvas, which is that of
    the evaluation, is drawn evenly between them. None: no scaling and no crop, the picture lies as in the evaluation.
    `spec.photometric`: brightness, contrast, saturation and hue, each in half of the images.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        self.preprocessing, self.jitter, self.flips = spec.preprocessing, spec.scale_jitter, spec.flip
        self.distort: tuple[Callable[[Tensor], Tensor], ...] = ()
        if spec.photometric:
            ranges: list[dict[str, Any]] = [{"brightness": BRIGHTNESS}, {"contrast": CONTRAST}]
            ranges += [{"saturation": SATURATION}, {"hue": HUE}] if spec.in_chans == 3 else []
            self.distort = tuple(v2.RandomApply([v2.ColorJitter(**each)], p=0.5) for each in ranges)

    def __call__(self, image: Tensor, target: Any, seed: int) -> tuple[Tensor, Any]:
        """Augment (C, H, W) uint8 and its target by the draws of `seed`; the caller's random numbers stay."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed goes to every kind of device as well
            return self._augmented(image, target)

    def _augmented(self, image: Tensor, target: Any) -> tuple[Tensor, Any]:
        parts = _as_parts(image, target)
        if self.flips and torch.rand(()) < 0.5:
            parts = {name: F.horizontal_flip(part) for name, part in parts.items()}
        rows, columns = sides(self.preprocessing.image_size)
        height, width = self._size((image.shape[-2], image.shape[-1]))
        parts = {name: _resized(part, (height, width)) for name, part in parts.items()}
        tall, wide = min(height, rows), min(width, columns)
        top, left = self._corner(parts, (height - tall, width - wide), (tall, wide))
        parts = {name: F.crop(part, top, left, tall, wide) for name, part in parts.items()}
        for step in self.distort:
            parts["image"] = step(parts["image"])
        beside = [0, 0, columns - wide, rows - tall]  # to the right and below, as the corner is the upper left one
        fills: dict[str, Any] = {"image": list(self.preprocessing.fill), "mask": NOT_COUNTED}
        parts = {name: F.pad(part, beside, fill=fills.get(name, 0)) for name, part in parts.items()}
        picture = parts.pop("image").as_subclass(Tensor)
        if isinstance(target, Tensor):
            return picture, parts["mask"].as_subclass(Tensor)
        return picture, _kept(parts, target["labels"])

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a picture of height and width `size` is brought to."""
        if self.jitter is None:
            width, height = placement((size[1], size[0]), self.preprocessing).size
            return height, width
        ratios = [limit / side for limit, side in zip(sides(self.preprocessing.image_size), size, strict=True)]
        low, high = self.jitter
        scale = min(ratios) * (low + (high - low) * float(torch.rand(())))
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def _corner(self, parts: dict[str, Any], spare: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Where the crop begins; of masks it is drawn anew while one class has too much of it."""
        corner = 0, 0
        for _ in range(CROPS if any(spare) else 1):
            corner = tuple(int(torch.randint(most + 1, ())) for most in spare)  # type: ignore[assignment]
            if "mask" not in parts:
                break
            counts = torch.bincount(F.crop(parts["mask"], *corner, *size).flatten(), minlength=256)[:NOT_COUNTED]
            if counts.count_nonzero() > 1 and counts.max() < MOST_OF_A_CLASS * counts.sum():
                break
        return corner


def _as_parts(image: Tensor, target: Any) -> dict[str, Any]:
    """The image and what moves with it, as torchvision's transforms tell them apart."""
    if isinstance(target, Tensor):
        return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(target)}
    known: dict[str, Any] = {"masks": tv_tensors.Mask(target["masks"])} if "masks" in target else {}
    size = (image.shape[-2], image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    return {"image": tv_tensors.Image(image), "boxes": boxes, **known}


def _resized(part: Any, size: tuple[int, int]) -> Any:
    if isinstance(part, tv_tensors.Mask):
        # torchvision takes the left pixel of two, and this the nearest, as the pixels themselves are placed.
        stacked = part.as_subclass(Tensor).reshape(-1, 1, *part.shape[-2:])
        nearest = F.resize(stacked, list(size), InterpolationMode.NEAREST_EXACT)
        return tv_tensors.Mask(nearest.reshape(*part.shape[:-2], *size))
    return F.resize(part, list(size), InterpolationMode.BILINEAR, antialias=True)


def _kept(parts: dict[str, Any], labels: Tensor) -> dict[str, Tensor]:
    """The objects that are still in the crop: boxes of a pixel at least, and masks with one."""
    boxes = F.clamp_bounding_boxes(parts["boxes"]).as_subclass(Tensor)
    keep = (boxes[:, 2:] - boxes[:, :2] >= SMALLEST_BOX).all(dim=1)
    if "masks" in parts:
        keep &= (parts["masks"].as_subclass(Tensor) != 0).flatten(1).any(dim=1)
        return {"boxes": boxes[keep], "labels": labels[keep], "masks": parts["masks"].as_subclass(Tensor)[keep]}
    return {"boxes": boxes[keep], "labels": labels[keep]}
