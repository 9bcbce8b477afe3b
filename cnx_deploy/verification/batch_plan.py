"""In which batches images are compared: sizes that kernels are not tuned for beside those that they are."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["CHECKED_BATCHES", "batch_sizes", "cut_in_batches", "first_images", "rebatched"]

Item = TypeVar("Item")

CHECKED_BATCHES = (1, 2, 7)
"""Besides the largest: one, the smallest real batch, and an odd one that no kernel is tuned for."""


def batch_sizes(smallest: int, largest: int, samples: int) -> list[int]:
    """Sizes to check within a range: 1, 2, 7 and the largest, then the largest until `samples` images are reached."""
    sizes = sorted({size for size in (*CHECKED_BATCHES, largest) if smallest <= size <= largest})
    while sum(sizes) < samples:
        sizes.append(max(smallest, min(largest, samples - sum(sizes))))
    return sizes


def cut_in_batches(items: Sequence[Item], smallest: int, largest: int) -> Iterator[Sequence[Item]]:
    """All items, first in the sizes of `batch_sizes`, then in the largest; the last batch is what is left.

    It alone may be below `smallest`.
    """
    at = 0
    for size in itertools.chain(batch_sizes(smallest, largest, 1), itertools.repeat(largest)):
        if at >= len(items):
            return
        yield items[at : at + size]
        at += size


def first_images(batches: Sequence[Tensor], images: int, smallest: int = 1) -> list[Tensor]:
    """The first `images` images, in the batches they are in; no batch is below `smallest`, and the first is there."""
    few: list[Tensor] = []
    for batch in batches:
        room = images - sum(len(taken) for taken in few)
        if few and room < min(smallest, len(batch)):
            break
        few.append(batch[: max(room, smallest)])
        if room <= len(batch):
            break
    return few


def rebatched(source: Iterator[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """Single images from `source` in batches of the given sizes; a source that ends early ends the batches."""
    for size in sizes:
        images = list(itertools.islice(source, size))
        if images:
            yield torch.cat(images)
