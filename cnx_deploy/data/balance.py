"""How many images each class has, and whether that is too uneven to go unsaid."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cnx_deploy.data.dataset import Dataset

__all__ = ["ClassBalance", "class_balance"]

UNEVEN = 10.0
"""Ratio of the largest to the smallest class above which a warning is due."""
LISTED = 20
"""Classes that `lines` lists in full; of more, it lists the largest and the smallest."""
EXTREMES = 5


@dataclass(frozen=True, slots=True)
class ClassBalance:
    """Images of each class for training and for validation, in the order of `class_names`."""

    class_names: tuple[str, ...]
    train: tuple[int, ...]
    val: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """Training images of the largest class to those of the smallest; infinite where a class has none."""
        return max(self.train) / min(self.train) if min(self.train) else math.inf

    @property
    def warning(self) -> str | None:
        """What to say where the ratio is above 10:1; else None."""
        if self.ratio <= UNEVEN:
            return None
        (largest, most), (smallest, least) = self._extreme(max(self.train)), self._extreme(min(self.train))
        return (
            f"The classes are uneven: {largest} has {most} training images, {smallest} has {least}"
            f"{f' ({self.ratio:.0f}:1)' if least else ''}. Top-1 will mostly show the large ones: look at recall and "
            "F1 by class (cnx-deploy eval), or even the classes out."
        )

    def lines(self) -> Iterator[str]:
        """A table, largest class first: every class, or of more than 20 the five largest and five smallest."""
        yield f"{'class':24} {'training':>9} {'validation':>11}"
        order = sorted(range(len(self.train)), key=lambda at: -self.train[at])
        shown = order if len(order) <= LISTED else order[:EXTREMES]
        yield from (self._line(at) for at in shown)
        if len(order) > LISTED:
            yield f"  … {len(order) - 2 * EXTREMES} classes between"
            yield from (self._line(at) for at in order[-EXTREMES:])
        yield f"{'all':24} {sum(self.train):>9} {sum(self.val):>11}   largest to smallest {self.ratio:.1f}:1"

    def _line(self, at: int) -> str:
        return f"{self.class_names[at]:24} {self.train[at]:>9} {self.val[at]:>11}"

    def _extreme(self, count: int) -> tuple[str, int]:
        return self.class_names[self.train.index(count)], count


def class_balance(dataset: Dataset) -> ClassBalance:
    """Count the images of each class."""
    counts = [[0] * len(dataset.class_names) for _ in range(2)]
    for own, split in zip(counts, (dataset.train, dataset.val), strict=True):
        for label in split.labels:
            own[label] += 1
    return ClassBalance(dataset.class_names, tuple(counts[0]), tuple(counts[1]))
