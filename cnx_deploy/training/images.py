"""Images to train on and to validate on, decoded once where memory allows.

Every augmentation is drawn from a seed that the sampler sends along with the index, so an epoch is the same for every
number of workers and after a resume.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data import ImageFiles, load_image, upright_rgb
from cnx_deploy.training.launch import Launch
from cnx_deploy.training.sampling import ONE_PROCESS, EpochBatches

__all__ = ["CACHE_BYTES", "TrainingImages", "ValidationImages", "make_loader"]

CACHE_BYTES = 1 << 30
"""Decoded images are kept in memory up to this size, for training and for validation each."""
MAX_WORKERS = 8
SAMPLED_HEADERS = 64

Item = tuple[Tensor, int]


class TrainingImages(TorchDataset[Item]):
    """Augmented images. [(index, seed)] -> (S, S, 3) uint8 and the class index.

    `augment`: (3, H, W) uint8 and a seed -> (3, S, S) uint8, see `augmentation.ImageAugmentation`.
    """

    def __init__(self, split: ImageFiles, augment: Callable[[Tensor, int], Tensor]) -> None:
        self.split = split
        self.augment = augment
        self.cached = _cached(split, _decode, _decoded_bytes(split))

    def __len__(self) -> int:
        return len(self.split.paths)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        index, seed = key
        pixels = self.cached[index] if self.cached else _decode(self.split, index)
        image = self.augment(pixels.permute(2, 0, 1), seed)
        return image.permute(1, 2, 0).contiguous(), self.split.label(index)


class ValidationImages(TorchDataset[Item]):
    """Images as `Preprocessing.pixels` makes them. [index] -> (S, S, 3) uint8 and the class index.

    Of several processes each takes its part, by turns.
    """

    def __init__(self, split: ImageFiles, preprocessing: Preprocessing, launch: Launch = ONE_PROCESS) -> None:
        mine = slice(launch.rank, None, launch.processes)
        self.split = split.subset(range(len(split))[mine])
        self.preprocessing = preprocessing
        size_bytes = len(self.split.paths) * 3 * preprocessing.image_size**2
        self.cached = _cached(self.split, self._pixels, size_bytes)

    def __len__(self) -> int:
        return len(self.split.paths)

    def __getitem__(self, index: int) -> Item:
        pixels = self.cached[index] if self.cached else self._pixels(self.split, index)
        return pixels, self.split.label(index)

    def _pixels(self, split: ImageFiles, index: int) -> Tensor:
        return split.pixels(index, self.preprocessing)


def make_loader(
    images: TrainingImages | ValidationImages,
    batches: int | EpochBatches,
    *,
    workers: int | None,
    on_gpu: bool,
    processes: int = 1,
) -> DataLoader[Item]:
    """Batches of (N, S, S, 3) uint8 and (N,) int64: by a sampler, or so many images each, in order.

    `workers` None: none where the images are in memory and the processor trains, else one a processor, at most 8;
    divided among the `processes` of this machine.
    """
    if workers is None:
        workers = 0 if images.cached and not on_gpu else max(1, min(MAX_WORKERS, cpu_count()) // processes)
    how: dict[str, Any] = {"batch_size": batches} if isinstance(batches, int) else {"batch_sampler": batches}
    return DataLoader(images, **how, num_workers=workers, persistent_workers=workers > 0, pin_memory=on_gpu)


def _cached(split: ImageFiles, read: Callable[[ImageFiles, int], Tensor], size_bytes: int) -> list[Tensor] | None:
    return [read(split, index) for index in range(len(split.paths))] if size_bytes <= CACHE_BYTES else None


def _decode(split: ImageFiles, index: int) -> Tensor:
    """(H, W, 3) uint8 RGB at the file's own size."""
    return torch.from_numpy(np.array(upright_rgb(load_image(split.paths[index]))))


def _decoded_bytes(split: ImageFiles) -> int:
    """Estimate from the headers of a few images spread over the split."""
    step = max(1, len(split.paths) // SAMPLED_HEADERS)
    areas = []
    for path in split.paths[::step]:
        image = load_image(path)
        areas.append(image.width * image.height)
    return 3 * sum(areas) * len(split.paths) // len(areas)
