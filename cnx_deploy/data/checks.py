"""What is wrong with a dataset before hours of work rest on it: files that cannot be read, classes that are uneven."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import BrokenImage
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data.dataset import Dataset
from cnx_deploy.data.image_source import ImageFiles

__all__ = ["ClassBalance", "ImageCheck", "check_images", "class_balance", "without_broken"]

MOST_BROKEN = 0.1
"""Share of broken images above which a dataset is refused: then the fault is rarely the images'."""
PIECE = 64
"""Images that a thread takes at once, so that a million of them are not a million waiting calls."""
UNEVEN = 10.0
"""Ratio of the largest to the smallest class above which a warning is due."""
LISTED = 20
"""Classes that `lines` lists in full; of more, it lists the largest and the smallest."""
EXTREMES = 5


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """How many images were decoded, and those of them that could not be."""

    count: int
    broken: tuple[BrokenImage, ...]

    def lines(self, at_most: int = 10) -> list[str]:
        """A summary and the first `at_most` broken files with their reasons."""
        if not self.broken:
            return [f"{self.count} images, all of them readable"]
        more = len(self.broken) - at_most
        return [
            f"{len(self.broken)} of {self.count} images cannot be read and are left out:",
            *(f"  {image.reason}" for image in self.broken[:at_most]),
            *([f"  … and {more} more"] if more > 0 else []),
        ]


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
        most, least = max(self.train), min(self.train)
        largest, smallest = (self.class_names[self.train.index(count)] for count in (most, least))
        return (
            f"The classes are uneven: {largest} has {most} training images, {smallest} has {least}"
            f"{f' ({self.ratio:.0f}:1)' if least else ''}. Top-1 will mostly show the large ones: look at recall and "
            "F1 by class (cnx-deploy eval), and even the classes out with --class-weights or --sampling balanced."
        )

    def lines(self) -> Iterator[str]:
        """A table, largest class first: every class, or of more than 20 the five largest and five smallest."""
        yield f"{'class':24} {'training':>9} {'validation':>11}"
        order = sorted(range(len(self.train)), key=lambda at: -self.train[at])
        rows = [f"{self.class_names[at]:24} {self.train[at]:>9} {self.val[at]:>11}" for at in order]
        if len(rows) > LISTED:
            rows[EXTREMES:-EXTREMES] = [f"  … {len(rows) - 2 * EXTREMES} classes between"]
        yield from rows
        yield f"{'all':24} {sum(self.train):>9} {sum(self.val):>11}   largest to smallest {self.ratio:.1f}:1"


def class_balance(dataset: Dataset) -> ClassBalance:
    """Count the images of each class."""
    classes, train, val = range(len(dataset.class_names)), dataset.train.class_counts(), dataset.val.class_counts()
    return ClassBalance(dataset.class_names, tuple(train[at] for at in classes), tuple(val[at] for at in classes))


def check_images(
    images: ImageFiles,
    *,
    white_level: float | None = None,
    in_chans: int = 3,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageCheck:
    """Decode every image in `workers` threads (None: one a processor), as training would.

    `white_level`, `in_chans`: see `core.preprocessing`. `progress` is told images done and their total. Broken images
    are in the order of the files.
    """
    total = len(images)
    broken: list[BrokenImage] = []
    with ThreadPoolExecutor(workers or cpu_count()) as pool:
        pieces = (range(start, min(start + PIECE, total)) for start in range(0, total, PIECE))
        broken_of = partial(_broken_among, images, white_level, in_chans)
        for number, among in enumerate(pool.map(broken_of, pieces), start=1):
            broken.extend(among)
            if progress is not None:
                progress(min(number * PIECE, total), total)
    return ImageCheck(total, tuple(broken))


def without_broken(
    dataset: Dataset,
    *,
    white_level: float | None = None,
    in_chans: int = 3,
    workers: int | None = None,
    most: float = MOST_BROKEN,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Dataset, ImageCheck]:
    """The dataset's readable images, and the report of all; training images come first in it.

    Raises InputError when more than the share `most` of the training or of the validation images is broken, or a class
    keeps no training image.
    """
    total, reports = len(dataset.train) + len(dataset.val), list[ImageCheck]()
    for images in (dataset.train, replace(dataset.val, seen=dataset.train.seen)):  # one note of what both show
        before = sum(report.count for report in reports)

        def told(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        reports.append(check_images(images, white_level=white_level, in_chans=in_chans, workers=workers, progress=told))
    report = ImageCheck(total, tuple(broken for each in reports for broken in each.broken))
    if not report.broken:
        return dataset, report
    bad = {image.path for image in report.broken}
    train, val = _readable(dataset.train, bad, "training", most), _readable(dataset.val, bad, "validation", most)
    lost = dataset.train.class_counts().keys() - train.class_counts().keys()
    if lost:
        raise InputError(
            f"No training image of the class {dataset.class_names[min(lost)]} can be read: {report.broken[0].reason} "
            "Replace them, or remove the class."
        )
    return Dataset(dataset.class_names, train, val), report


def _readable(images: ImageFiles, bad: set[str], name: str, most: float) -> ImageFiles:
    kept = [index for index, path in enumerate(images.paths) if str(path) not in bad]
    count = len(images) - len(kept)
    if count > most * len(images):
        first = next(path for path in images.paths if str(path) in bad)
        raise InputError(
            f"{count} of {len(images)} {name} images cannot be read, more than {100 * most:g} %; the first is "
            f"{first}. Look whether the copy is whole: that many are rarely the images' own fault."
        )
    return images.subset(kept)


def _broken_among(
    images: ImageFiles, white_level: float | None, in_chans: int, indices: Sequence[int]
) -> list[BrokenImage]:
    broken = []
    for index in indices:
        try:
            images.check(index, white_level, in_chans)
        except InputError as error:
            broken.append(BrokenImage(images.name(index), str(error)))
    return broken
