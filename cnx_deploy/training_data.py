"""What training reads: augmented and validation images, decoded once where memory allows, in an order made from a seed.

Every augmentation is drawn from a seed that the sampler sends along with the index, so an epoch is the same for every
number of workers and after a resume.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from cnx_deploy.data import Preprocessing, Split, load_image, upright_rgb
from cnx_deploy.environment import cpu_count

__all__ = ["CACHE_BYTES", "EpochSampler", "TrainingImages", "ValidationImages", "make_loader"]

CACHE_BYTES = 1 << 30
"""Decoded images are kept in memory up to this size, for training and for validation each."""
MAX_WORKERS = 8
SAMPLED_HEADERS = 64

Item = tuple[Tensor, int]


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (index, augmentation seed) of every item in an order that `seed` and the epoch decide."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; Lightning calls this at the start of each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        seeds = torch.randint(2**62, (self.count,), generator=generator).tolist()
        yield from zip(order, seeds, strict=True)


class TrainingImages(TorchDataset[Item]):
    """Augmented images. [(index, seed)] -> (S, S, 3) uint8 and the class index.

    `min_crop_area` in (0, 1]: least share of the image that a random crop keeps; 1 takes the evaluation crop.
    """

    def __init__(self, split: Split, preprocessing: Preprocessing, *, min_crop_area: float, flip: bool) -> None:
        self.split = split
        self.cached = _cached(split, _decode, _decoded_bytes(split))
        steps: list[Callable[[Tensor], Tensor]] = []
        if min_crop_area < 1.0:
            steps.append(v2.RandomResizedCrop(preprocessing.image_size, (min_crop_area, 1.0), interpolation=3))
        else:
            steps.append(lambda image: preprocessing.pixels(_pillow(image)).permute(2, 0, 1))
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        self.steps = steps

    def __len__(self) -> int:
        return len(self.split.paths)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        index, seed = key
        pixels = self.cached[index] if self.cached else _decode(self.split, index)
        image = pixels.permute(2, 0, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step in self.steps:
                image = step(image)
        return image.permute(1, 2, 0).contiguous(), self.split.labels[index]


class ValidationImages(TorchDataset[Item]):
    """Images as `Preprocessing.pixels` makes them. [index] -> (S, S, 3) uint8 and the class index."""

    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.split = split
        self.preprocessing = preprocessing
        size_bytes = len(split.paths) * 3 * preprocessing.image_size**2
        self.cached = _cached(split, self._pixels, size_bytes)

    def __len__(self) -> int:
        return len(self.split.paths)

    def __getitem__(self, index: int) -> Item:
        pixels = self.cached[index] if self.cached else self._pixels(self.split, index)
        return pixels, self.split.labels[index]

    def _pixels(self, split: Split, index: int) -> Tensor:
        return self.preprocessing.pixels(load_image(split.paths[index]))


def make_loader(
    images: TrainingImages | ValidationImages, batch_size: int, *, seed: int, workers: int | None, on_gpu: bool
) -> DataLoader[Item]:
    """Batches of (N, S, S, 3) uint8 and (N,) int64; training images shuffled, validation images in order.

    `workers` None: none where the images are in memory and the processor trains, else one a processor, at most 8.
    """
    if workers is None:
        workers = 0 if images.cached and not on_gpu else min(MAX_WORKERS, cpu_count())
    sampler = EpochSampler(len(images), seed) if isinstance(images, TrainingImages) else None
    return DataLoader(
        images, batch_size, sampler=sampler, num_workers=workers, persistent_workers=workers > 0, pin_memory=on_gpu
    )


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, unlike for (0, 1) and (1, 0)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _cached(split: Split, read: Callable[[Split, int], Tensor], size_bytes: int) -> list[Tensor] | None:
    return [read(split, index) for index in range(len(split.paths))] if size_bytes <= CACHE_BYTES else None


def _decode(split: Split, index: int) -> Tensor:
    """(H, W, 3) uint8 RGB at the file's own size."""
    return torch.from_numpy(np.array(upright_rgb(load_image(split.paths[index]))))


def _decoded_bytes(split: Split) -> int:
    """Estimate from the headers of a few images spread over the split."""
    step = max(1, len(split.paths) // SAMPLED_HEADERS)
    areas = []
    for path in split.paths[::step]:
        image = load_image(path)
        areas.append(image.width * image.height)
    return 3 * sum(areas) * len(split.paths) // len(areas)


def _pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())
