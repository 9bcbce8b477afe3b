"""The one source of images for training, verification, evaluation, prediction, range analysis and benchmarks.

A source knows its images by index: how many there are, what each is called, its label and its pixels. What every
consumer needs beyond that is written here once: batches of any runner's input, filled up to its smallest batch; files
that cannot be read, counted and named; an even choice of some images; the batch sizes at which kernels are checked.
"""

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import ImageSize, sides, size_text
from cnx_deploy.core.preprocessing import BrokenImage, Preprocessing
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data.bands import Picture, picture_of
from cnx_deploy.data.image_files import Observations
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.data.preprocessing import cropped, runner_input

__all__ = [
    "GivenImages", "ImageBatch", "ImageBatches", "ImageFiles", "ImageLike", "ImageSource", "batch_sizes",
    "checked_sizes", "evenly", "image_like_batches",
]  # fmt: skip

CHECKED_SIZES = (1, 2, 7)
"""Besides the largest: one, the smallest real batch, and an odd one that no kernel is tuned for."""
ANY_BATCH = 64
"""Largest batch of a runner that takes any."""


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Some images of a source as a runner takes them.

    `images` has the shape and dtype of the runner's `InputSpec`. Copies of the first image may follow the
    `len(indices)` real ones, up to the runner's smallest batch. `labels` (n,) int64 has -1 where there is none; of
    images with several labels it is (n, classes) float32, 1 for each that an image has. Of a class for each pixel it is
    (n, H, W) int64, of objects a list of dictionaries.
    """

    images: Tensor
    indices: tuple[int, ...]
    names: tuple[str, ...]
    labels: Any

    def __len__(self) -> int:
        return len(self.indices)


class ImageSource(ABC):
    """Images by index, labelled or not. A subclass gives their number and their pixels, and may give the rest.

    Example:
        class Arrays(ImageSource):
            def __init__(self, arrays): self.arrays = arrays  # (H, W, 3) uint8 each
            def __len__(self): return len(self.arrays)
            def pixels(self, index, preprocessing): return to_pixels(self.arrays[index], preprocessing)
    """

    class_names: tuple[str, ...] = ()
    """What the labels mean; empty where the images have none."""
    labels: Sequence[int] = ()
    """The class of each image; empty where they have none."""
    label_sets: Sequence[Sequence[int]] | None = None
    """The labels of each image in place of one class, any number of them, as indices of `class_names`."""
    description: str = "the image source"
    """What messages call the whole."""
    notes: Sequence[str] = ()
    """How the source was understood, and what it leaves out: for people, a sentence each."""
    is_thread_safe: bool = False
    """Whether `pixels` may be called from several threads at once."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, index: int, preprocessing: Preprocessing) -> Tensor:
        """(H, W, C) uint8 of one image, RGB where C is 3. Raises InputError, which names it, where that fails."""

    @property
    def workers(self) -> int:
        """Threads that decode its images."""
        return cpu_count() if self.is_thread_safe else 1

    def name(self, index: int) -> str:
        """What reports call an image."""
        return f"image {index}"

    def picture(self, index: int, preprocessing: Preprocessing) -> Picture | None:
        """An image before it is resized, upright; None where the source makes pixels at the size that is asked for."""
        return None

    def label(self, index: int) -> int:
        """The index of an image's class in `class_names`; -1 without labels."""
        return self.labels[index] if self.labels else -1

    def target(self, index: int) -> Tensor:
        """What an image is compared with: its class () int64, or with label sets (classes,) float32 of 0 and 1."""
        if self.label_sets is None:
            return torch.tensor(self.label(index))
        return torch.zeros(len(self.class_names)).index_fill_(0, torch.tensor(self.label_sets[index]).long(), 1.0)

    def sample(self, index: int, preprocessing: Preprocessing) -> tuple[Tensor, Any]:
        """The pixels of an image and its target; where that has places on the image, they are those of the pixels."""
        return self.pixels(index, preprocessing), self.target(index)

    def class_counts(self) -> Counter[int]:
        """The images of each class or label that has any."""
        return Counter(self.labels if self.label_sets is None else itertools.chain.from_iterable(self.label_sets))

    def observed(self) -> tuple[str, ...]:
        """What the images that were read so far have shown, such as values far below white: a sentence each."""
        return ()

    def choice(self, limit: int | None) -> list[int]:
        """`limit` of the indices, evenly spread so that sorted classes are all met; all with None."""
        return evenly(len(self), limit)

    def batches(
        self,
        preprocessing: Preprocessing,
        spec: InputSpec,
        sizes: int | Iterable[int] | None = None,
        indices: Sequence[int] | None = None,
        *,
        leave_out_broken: bool = False,
    ) -> "ImageBatches":
        """The images in batches that a runner of input `spec` takes.

        Args:
            preprocessing: how pixels are made; its image size must be the runner's.
            spec: the runner's input.
            sizes: images in each batch, or in the batches one after the other, of which the last size is repeated;
                cut to the runner's range. None is its largest.
            indices: which images, in order; None is all.
            leave_out_broken: go on without images that cannot be read, which `broken` then lists.

        Raises InputError when the image sizes differ; while the batches are read, for an image that cannot be.
        """
        if preprocessing.in_chans != spec.in_chans:
            raise InputError(
                f"The model takes images of {spec.in_chans} channels and the preprocessing makes "
                f"{preprocessing.in_chans}. Give mean and std a number for each channel."
            )
        if not spec.takes_size(preprocessing.image_size):
            limits = spec.size_range or (spec.image_size,)
            raise InputError(
                f"The model takes images of {' to '.join(map(size_text, limits))} pixels and the preprocessing makes "
                f"{size_text(preprocessing.image_size)}. Use the same image size."
            )
        if sizes is None or isinstance(sizes, int):
            sizes = (sizes or spec.max_batch or ANY_BATCH,)
        chosen = range(len(self)) if indices is None else indices
        return ImageBatches(self, preprocessing, spec, sizes, chosen, leave_out_broken)


@dataclass(frozen=True, slots=True)
class ImageBatches(Iterable[ImageBatch]):
    """Batches of a source, read while they are iterated; reading them again decodes the images again."""

    source: ImageSource
    preprocessing: Preprocessing
    spec: InputSpec
    sizes: Iterable[int]
    indices: Sequence[int]
    leaves_out_broken: bool
    broken: dict[int, BrokenImage] = field(default_factory=dict, init=False)

    def __iter__(self) -> Iterator[ImageBatch]:
        sizes, waiting = iter(self.sizes), list[tuple[int, Tensor, Any]]()
        size = self._fitting(next(sizes))
        for sample in self._readable():
            waiting.append(sample)
            if len(waiting) == size:
                yield self._batch(waiting)
                waiting, size = [], self._fitting(next(sizes, size))
        if waiting:
            yield self._batch(waiting)

    def _fitting(self, size: int) -> int:
        return max(self.spec.min_batch, min(size, self.spec.max_batch or size))

    def _readable(self) -> Iterator[tuple[int, Tensor, Any]]:
        """Index, pixels and target of every image that can be read, in order; a few are decoded ahead."""
        workers = self.source.workers
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(self.indices), 2 * workers):
                some = self.indices[start : start + 2 * workers]
                for index, sample in zip(some, pool.map(self._read, some), strict=True):
                    if isinstance(sample, BrokenImage):
                        self.broken[index] = sample
                    else:
                        yield index, *sample

    def _read(self, index: int) -> tuple[Tensor, Any] | BrokenImage:
        try:
            return self.source.sample(index, self.preprocessing)
        except InputError as error:
            if not self.leaves_out_broken:
                raise
            return BrokenImage(self.source.name(index), str(error))

    def _batch(self, images: Sequence[tuple[int, Tensor, Any]]) -> ImageBatch:
        indices, pixels, targets = zip(*images, strict=True)
        missing = max(0, self.spec.min_batch - len(pixels))
        stacked = torch.stack([*pixels, *[pixels[0]] * missing])
        labels = torch.stack(targets) if isinstance(targets[0], Tensor) else list(targets)
        names = tuple(self.source.name(index) for index in indices)
        return ImageBatch(runner_input(stacked, self.spec.kind, self.preprocessing), indices, names, labels)


@dataclass(frozen=True, slots=True)
class ImageFiles(ImageSource):
    """Image files and the class index of each; no labels and no names where the files have no classes."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    description: str = field(default="the image files", compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    seen: Observations = field(default_factory=Observations, compare=False, repr=False)
    label_sets: tuple[tuple[int, ...], ...] | None = None
    is_thread_safe = True

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int, white_level: float | None = None, in_chans: int = 3) -> Picture:
        """One file as an upright picture of its own size; `white_level` and `in_chans` are those of `Preprocessing`."""
        picture = picture_of(self.paths[index], white_level, in_chans)
        self.seen.add(str(self.paths[index]), picture.info)
        return picture

    def picture(self, index: int, preprocessing: Preprocessing) -> Picture:
        """Decode one file."""
        return self.image(index, preprocessing.white_level, preprocessing.in_chans)

    def check(self, index: int, white_level: float | None = None, in_chans: int = 3) -> None:
        """Raise InputError where an image cannot be read."""
        self.image(index, white_level, in_chans)

    def pixels(self, index: int, preprocessing: Preprocessing) -> Tensor:
        """Decode one file, and resize and crop it."""
        return cropped(self.picture(index, preprocessing), preprocessing)

    def observed(self) -> tuple[str, ...]:
        """Files of several frames, and deep images that are nearly black or clipped."""
        return self.seen.notes()

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])

    def subset(self, indices: Sequence[int]) -> Self:
        """The images at `indices`, in their order."""
        labels = tuple(self.labels[at] for at in indices) if self.labels else ()
        sets = None if self.label_sets is None else tuple(self.label_sets[at] for at in indices)
        return replace(self, paths=tuple(self.paths[at] for at in indices), labels=labels, label_sets=sets)


@dataclass(frozen=True, slots=True)
class GivenImages(ImageSource):
    """Images as a caller has them, labelled or not: paths, PIL images, arrays or tensors, see `bands.picture_of`."""

    images: Sequence[Any]
    labels: Sequence[int] = ()
    class_names: tuple[str, ...] = ()
    seen: Observations = field(default_factory=Observations, compare=False, repr=False)
    label_sets: Sequence[Sequence[int]] | None = None
    description = "the images"
    is_thread_safe = True

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int, preprocessing: Preprocessing) -> Picture:
        """Decode one image."""
        picture = picture_of(self.images[index], preprocessing.white_level, preprocessing.in_chans)
        self.seen.add(self.name(index), picture.info)
        return picture

    def pixels(self, index: int, preprocessing: Preprocessing) -> Tensor:
        """Decode one image, and resize and crop it."""
        return cropped(self.picture(index, preprocessing), preprocessing)

    def observed(self) -> tuple[str, ...]:
        """The same as of `ImageFiles`."""
        return self.seen.notes()

    def name(self, index: int) -> str:
        """The path, or the image's place."""
        image = self.images[index]
        return str(image) if isinstance(image, str | Path) else f"image {index}"


@dataclass(frozen=True, slots=True)
class ImageLike(ImageSource):
    """Images made from a seed, of any size, for measurements that need no photographs.

    Each is coloured noise with the 1/f spectrum of photographs, of its own brightness and contrast, under shapes with
    sharp edges; each reaches both 0 and 255. Image i is the same whatever `count` is.
    """

    count: int = 1 << 20
    seed: int = 0
    description = "seeded image-like"
    is_thread_safe = True

    def __len__(self) -> int:
        return self.count

    def pixels(self, index: int, preprocessing: Preprocessing) -> Tensor:
        """Make one image at the size of `preprocessing`; nothing is resized or cropped."""
        random = np.random.default_rng((self.seed, index))
        return _image_like(preprocessing.image_size, preprocessing.in_chans, random)

    def choice(self, limit: int | None) -> list[int]:
        """The first `limit` indices: one image is as good as another."""
        return list(range(len(self) if limit is None else min(limit, len(self))))

    def name(self, index: int) -> str:
        """Index and seed."""
        return f"image-like {index} of seed {self.seed}"


def evenly(count: int, limit: int | None) -> list[int]:
    """`limit` of the indices 0 to `count` - 1, evenly spread, so that sorted classes are all met; all with None."""
    taken = count if limit is None else min(limit, count)
    return [at * count // taken for at in range(taken)]


def checked_sizes(spec: InputSpec) -> list[int]:
    """Batch sizes of a runner to check: 1, 2, 7 and its largest, as far as its range goes."""
    largest = spec.max_batch or ANY_BATCH
    return sorted({size for size in (*CHECKED_SIZES, largest) if spec.min_batch <= size <= largest})


def batch_sizes(count: int, spec: InputSpec) -> list[int]:
    """Sizes that cut `count` images in the sizes of `checked_sizes`, then in the largest; the last is what is left."""
    checked, sizes = checked_sizes(spec), list[int]()
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(left, checked[min(len(sizes), len(checked) - 1)]))
    return sizes


def image_like_batches(
    count: int, image_size: ImageSize, *, batch_size: int, seed: int = 0, in_chans: int = 3
) -> Iterator[Tensor]:
    """Yield (N, H, W, C) uint8 batches of what `ImageLike` makes, of any size, `count` images in all."""
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        yield torch.stack(
            [_image_like(image_size, in_chans, np.random.default_rng((seed, index))) for index in indices]
        )


def _image_like(size: ImageSize, channels: int, random: np.random.Generator) -> Tensor:
    tall, wide = sides(size)
    frequency = np.hypot(np.fft.fftfreq(tall)[:, None], np.fft.rfftfreq(wide)[None, :])
    frequency[0, 0] = np.inf  # no constant part: the brightness below is the mean
    spectrum = np.fft.rfft2(random.standard_normal((channels, tall, wide))) / frequency
    field = np.einsum(
        "oc,chw->hwo", random.standard_normal((channels, channels)) + 1.0, np.fft.irfft2(spectrum, s=(tall, wide))
    )
    canvas = random.uniform(0.3, 0.7) + random.uniform(0.05, 0.3) * field / field.std()
    rows, columns = np.arange(tall)[:, None] / tall, np.arange(wide)[None] / wide
    colours: Sequence[Any] = [
        *random.uniform(0.0, 1.0, (4, channels)),
        0.0,
        1.0,
    ]  # black and white last, so both are seen
    for colour in colours:
        (top, left), (height, width) = random.uniform(0.0, 0.9, 2), random.uniform(0.04, 0.3, 2)
        down, along = np.abs(rows - top) / height, np.abs(columns - left) / width
        inside = down**2 + along**2 < 1 if random.random() < 0.5 else np.maximum(down, along) < 1
        canvas[inside] = colour
    return torch.from_numpy((canvas.clip(0.0, 1.0) * 255.0).round().astype(np.uint8))
