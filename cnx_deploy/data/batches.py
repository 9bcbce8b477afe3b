"""Batches of pixels and labels from a folder's images, decoded by several threads in the order of the files."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data.broken import BrokenImage
from cnx_deploy.data.dataset import Split, evenly
from cnx_deploy.data.decoding import load_image
from cnx_deploy.data.finding import find_images
from cnx_deploy.data.folders import validation_folder
from cnx_deploy.data.preprocessing import to_pixels

__all__ = ["Batch", "batches_from_folder", "readable_batches"]

Batch = tuple[Tensor, Tensor, tuple[Path, ...]]
"""(N, S, S, 3) uint8 pixels, (N,) int64 labels, and the files."""


def batches_from_folder(
    root: Path, preprocessing: Preprocessing, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Yield (N, S, S, 3) uint8 pixels, (N,) int64 labels and paths of `root`'s validation images, sorted by path.

    `root` may be a CSV file, whose rows keep their order. `limit` images are taken evenly over the list, so that every
    class of a folder is met. InputError for an image that cannot be read.
    """
    _, images = find_images(validation_folder(root))
    chosen = evenly(images, limit)
    for start in range(0, len(chosen.paths), batch_size):
        paths = chosen.paths[start : start + batch_size]
        pixels = torch.stack([to_pixels(load_image(path), preprocessing) for path in paths])
        yield pixels, torch.tensor(chosen.labels[start : start + batch_size]), paths


def readable_batches(
    images: Split, preprocessing: Preprocessing, batch_size: int, broken: list[BrokenImage]
) -> Iterator[Batch]:
    """Yield batches of the images that can be read; the others are added to `broken`. Only the last is smaller."""
    waiting: list[tuple[Tensor, int, Path]] = []
    with ThreadPoolExecutor(cpu_count()) as pool:
        for start in range(0, len(images.paths), batch_size):
            paths, labels = images.paths[start : start + batch_size], images.labels[start : start + batch_size]
            read = pool.map(lambda path: _read(path, preprocessing), paths)
            for path, label, pixels in zip(paths, labels, read, strict=True):
                if isinstance(pixels, Tensor):
                    waiting.append((pixels, label, path))
                else:
                    broken.append(pixels)
            if len(waiting) >= batch_size:
                yield _batch(waiting[:batch_size])
                waiting = waiting[batch_size:]
        if waiting:
            yield _batch(waiting)


def _read(path: Path, preprocessing: Preprocessing) -> Tensor | BrokenImage:
    try:
        return to_pixels(load_image(path), preprocessing)
    except InputError as error:
        return BrokenImage(str(path), str(error))


def _batch(images: list[tuple[Tensor, int, Path]]) -> Batch:
    pixels, labels, paths = zip(*images, strict=True)
    return torch.stack(pixels), torch.tensor(labels), paths
