"""Images to train on and to validate on: decoded, cached where memory allows, augmented one by one, mixed by batches.

Every augmentation is drawn from a seed that the sampler sends along with the index, so an epoch is the same for every
number of workers and after a resume. torchvision's transforms do the work.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import InterpolationMode, v2

from cnx_deploy.core.image_size import sides
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data import ImageFiles, picture_of, pixels_of
from cnx_deploy.data.preprocessing import cropped
from cnx_deploy.training.distributed import EpochBatches
from cnx_deploy.training.spec import TrainingSpec

__all__ = ["CACHE_BYTES", "BatchMix", "ImageAugmentation", "TrainingImages", "ValidationImages", "make_loader"]

CACHE_BYTES = 1 << 30
"""Decoded images are kept in memory up to this size, for training and for validation each."""
MAX_WORKERS = 8
SAMPLED_HEADERS = 64
MAGNITUDE_BINS = 11
"""torchvision's magnitude is an index: with 11, index 9 is nine tenths of the strongest, as 9 of 10 is in timm."""
MAGNITUDE_STD = 0.5
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 3.3)

Item = tuple[Tensor, Tensor]


class TrainingImages(TorchDataset[Item]):
    """Augmented images. [(index, seed)] -> (S, S, C) uint8 and the `ImageSource.target`.

    `augment`: (C, H, W) uint8 and a seed -> (C, S, S) uint8, see `ImageAugmentation`. `white_level`, `in_chans`: see
    `core.preprocessing`.
    """

    def __init__(
        self,
        split: ImageFiles,
        augment: Callable[[Tensor, int], Tensor],
        white_level: float | None = None,
        in_chans: int = 3,
    ) -> None:
        self.split = split
        self.augment = augment
        self.white_level, self.in_chans = white_level, in_chans
        self.cached = _cached(split, self._decode, self._decoded_bytes())

    def __len__(self) -> int:
        return len(self.split.paths)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        index, seed = key
        pixels = self.cached[index] if self.cached else self._decode(self.split, index)
        image = self.augment(pixels.permute(2, 0, 1), seed)
        return image.permute(1, 2, 0).contiguous(), self.split.target(index)

    def _decode(self, split: ImageFiles, index: int) -> Tensor:
        """(H, W, C) uint8 at the file's own size."""
        return torch.from_numpy(pixels_of(split.image(index, self.white_level, self.in_chans)))

    def _decoded_bytes(self) -> int:
        """Estimate from a few images spread over the split."""
        count = len(self.split)
        sizes = [
            self.split.image(index, self.white_level, self.in_chans).size
            for index in range(0, count, max(1, count // SAMPLED_HEADERS))
        ]
        return self.in_chans * sum(width * height for width, height in sizes) * count // len(sizes)


class ValidationImages(TorchDataset[Item]):
    """Images as `data.preprocessing.to_pixels` makes them. [index] -> (S, S, C) uint8 and target, `ImageSource.sample`.

    Each of several processes takes its part, by turns.
    """

    def __init__(self, split: ImageFiles, spec: TrainingSpec) -> None:
        mine = slice(spec.launch.rank, None, spec.launch.processes)
        self.split = split.subset(range(len(split))[mine])
        self.preprocessing = spec.preprocessing
        # A class for each pixel takes 8 bytes, and the masks of several objects about as many.
        values = (spec.in_chans + 8 * spec.purpose.is_dense) * math.prod(sides(spec.image_size))
        self.cached = _cached(self.split, self._sample, len(self.split) * values)

    def __len__(self) -> int:
        return len(self.split.paths)

    def __getitem__(self, index: int) -> Item:
        return self.cached[index] if self.cached else self._sample(self.split, index)

    def _sample(self, split: ImageFiles, index: int) -> Item:
        return split.sample(index, self.preprocessing)


def make_loader(
    images: Any, batches: int | EpochBatches, spec: TrainingSpec, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader[Any]:
    """Load batches of (N, S, S, C) uint8 and targets (N, ...): by a sampler, or so many images each, in order.

    `images` are `TrainingImages`, `ValidationImages` or of their kind; `collate` makes a batch, None stacks.

    `spec.workers` None: no worker where the images are in memory and the processor trains, else one a processor, at
    most 8, divided among the processes of this machine.
    """
    workers, on_gpu = spec.workers, torch.cuda.is_available()
    if workers is None:
        share = max(1, min(MAX_WORKERS, cpu_count()) // spec.launch.devices)
        workers = 0 if images.cached and not on_gpu else share
    how: dict[str, Any] = {"batch_size": batches} if isinstance(batches, int) else {"batch_sampler": batches}
    how["collate_fn"] = collate
    return DataLoader(images, **how, num_workers=workers, persistent_workers=workers > 0, pin_memory=on_gpu)


class ImageAugmentation:
    """Crop, flip, RandAugment and random erasing of one image: (C, H, W) uint8 -> (C, S, S) uint8.

    `spec.min_crop_area` in (0, 1]: least share of the image that a random crop keeps; 1 takes the evaluation crop.
    RandAugment (Cubuk et al., arXiv:1909.13719): two operations, of a magnitude drawn once an image from a normal
    distribution around the given one (std 0.5, as "rand-m9-mstd0.5" in timm draws it for each operation). Random
    erasing (Zhong et al., arXiv:1708.04896): a rectangle becomes normal noise of the data's mean and deviation.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        preprocessing = spec.preprocessing
        steps: list[Callable[[Tensor], Tensor]] = []
        if spec.min_crop_area < 1.0:
            size, area = sides(preprocessing.image_size), (spec.min_crop_area, 1.0)
            steps.append(v2.RandomResizedCrop(size, area, interpolation=InterpolationMode.BICUBIC))
        else:
            steps.append(lambda image: cropped(picture_of(image, None, len(image)), preprocessing).permute(2, 0, 1))
        if spec.flip:
            steps.append(v2.RandomHorizontalFlip())
        if spec.randaugment_magnitude > 0:
            steps.append(_RandAugment(spec.randaugment_magnitude, preprocessing))
        if spec.erasing_probability > 0:
            steps.append(_RandomErasing(spec.erasing_probability, preprocessing))
        self.steps = tuple(steps)

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Augment by the draws of `seed`; the caller's random numbers stay as they are."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed goes to every kind of device as well
            for step in self.steps:
                image = step(image)
        return image


class BatchMix:
    """Mixup or CutMix on a batch: (N, C, S, S) floats and (N,) classes -> the same and (N, classes) target shares.

    Labels (N, classes) of 0 and 1 are mixed as they are.

    `mixup_alpha`, `cutmix_alpha`: parameter of the Beta distribution that the share is drawn from, one draw a batch; 0
    leaves that one out, and with both each batch takes one of them (Zhang et al., arXiv:1710.09412; Yun et al.,
    arXiv:1905.04899). A batch of one image stays as it is.
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> None:
        kinds = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
        mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Apply; see the class for shapes. Without any mixing the labels stay classes."""
        if self.mix is None or len(images) < 2:
            return images, labels
        mixed, targets = self.mix(images, labels)
        return mixed, targets


class _RandAugment:
    """torchvision's RandAugment with a magnitude drawn around the given one."""

    def __init__(self, magnitude: float, preprocessing: Preprocessing) -> None:
        fill = [round(255 * value) for value in preprocessing.mean]
        bilinear = InterpolationMode.BILINEAR
        self.operations = v2.RandAugment(num_magnitude_bins=MAGNITUDE_BINS, interpolation=bilinear, fill=fill)
        self.magnitude = magnitude

    def __call__(self, image: Tensor) -> Tensor:
        drawn = round(float(torch.randn(())) * MAGNITUDE_STD + self.magnitude)
        self.operations.magnitude = min(max(drawn, 0), MAGNITUDE_BINS - 1)
        augmented: Tensor = self.operations(image)
        return augmented


class _RandomErasing:
    """torchvision's RandomErasing with noise a pixel; its own noise is that of a normalised float image."""

    def __init__(self, probability: float, preprocessing: Preprocessing) -> None:
        self.rectangle = v2.RandomErasing(probability, ERASED_AREA, ERASED_RATIO, value=0)
        self.mean, self.std = (
            torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std)
        )

    def __call__(self, image: Tensor) -> Tensor:
        kept = self.rectangle(torch.ones(1, *image.shape[1:]))
        if bool(kept.all()):
            return image
        noise = (255 * (self.mean + self.std * torch.randn(image.shape))).round().clamp(0, 255).to(torch.uint8)
        return torch.where(kept.bool(), image, noise)


def _cached(split: ImageFiles, read: Callable[[ImageFiles, int], Any], size_bytes: int) -> list[Any] | None:
    return [read(split, index) for index in range(len(split.paths))] if size_bytes <= CACHE_BYTES else None
