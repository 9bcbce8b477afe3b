"""Which files cannot be read as images: found by decoding every one, before hours of work rest on them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data.dataset import Dataset, Split, subset
from cnx_deploy.data.decoding import load_image, upright_rgb

__all__ = ["BrokenImage", "ImageCheck", "check_images", "without_broken"]

MOST_BROKEN = 0.1
"""Share of broken images above which a dataset is refused: then the fault is rarely the images'."""
PIECE = 64
"""Images that a thread takes at once, so that a million of them are not a million waiting calls."""


@dataclass(frozen=True, slots=True)
class BrokenImage:
    """A file that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """How many images were decoded, and those of them that could not be."""

    count: int
    broken: tuple[BrokenImage, ...]

    @property
    def share(self) -> float:
        """Broken images among all, 0 to 1."""
        return len(self.broken) / self.count if self.count else 0.0

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


def check_images(
    split: Split, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> ImageCheck:
    """Decode every image in `workers` threads (None: one a processor), as training would.

    `progress` is told images done and their total. Broken images are in the order of the split.
    """
    total, done = len(split.paths), 0
    broken: list[BrokenImage] = []
    with ThreadPoolExecutor(workers or cpu_count()) as pool:
        pieces = [split.paths[start : start + PIECE] for start in range(0, total, PIECE)]
        for piece, found in zip(pieces, pool.map(_broken_among, pieces), strict=True):
            broken.extend(found)
            done += len(piece)
            if progress is not None:
                progress(done, total)
    return ImageCheck(total, tuple(broken))


def without_broken(
    dataset: Dataset,
    *,
    workers: int | None = None,
    most: float = MOST_BROKEN,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Dataset, ImageCheck]:
    """The dataset's readable images, and the report of all; training images come first in it.

    InputError when more than the share `most` of the training or of the validation images is broken, or a class keeps
    no training image.
    """
    both = Split((*dataset.train.paths, *dataset.val.paths), (*dataset.train.labels, *dataset.val.labels))
    report = check_images(both, workers=workers, progress=progress)
    if not report.broken:
        return dataset, report
    bad = {image.path for image in report.broken}
    train, val = (
        _readable(split, bad, name, most) for name, split in (("training", dataset.train), ("validation", dataset.val))
    )
    lost = set(dataset.train.labels) - set(train.labels)
    if lost:
        raise InputError(
            f"No training image of the class {dataset.class_names[min(lost)]} can be read: {report.broken[0].reason} "
            "Replace them, or remove the class."
        )
    return Dataset(dataset.class_names, train, val), report


def _readable(split: Split, bad: set[str], name: str, most: float) -> Split:
    kept = [index for index, path in enumerate(split.paths) if str(path) not in bad]
    count = len(split.paths) - len(kept)
    if count > most * len(split.paths):
        first = next(path for path in split.paths if str(path) in bad)
        raise InputError(
            f"{count} of {len(split.paths)} {name} images cannot be read, more than {100 * most:g} %; the first is "
            f"{first}. Look whether the copy is whole: that many are rarely the images' own fault."
        )
    return subset(split, kept)


def _broken_among(paths: Sequence[Path]) -> list[BrokenImage]:
    found = []
    for path in paths:
        try:
            upright_rgb(load_image(path))
        except InputError as error:
            found.append(BrokenImage(str(path), str(error)))
    return found
