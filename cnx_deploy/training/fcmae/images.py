"""Which images to pre-train on: any folder of them, labels are not looked at."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cnx_deploy.core.errors import InputError
from cnx_deploy.data import ImageCheck, ImageFiles, check_images, evenly
from cnx_deploy.data.dataset import VALIDATION_NAMES, images_below, training_folder

__all__ = ["UnlabelledImages", "divide_images", "find_images_below", "readable_images"]

HELD_SHARE = 10
"""At most one image in so many is kept out of training."""


@dataclass(frozen=True, slots=True)
class UnlabelledImages:
    """Images to train on and images that are held out, without labels."""

    train: ImageFiles
    held: ImageFiles


def find_images_below(root: Path) -> ImageFiles:
    """Every image below a folder however deep, in class folders or not.

    Beside a folder `train`, folders of validation or test images (see `data.find_images`) are left out: what a
    classifier is judged by later must not be learned from now. Raises InputError without a folder or an image.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: expected one that holds images, at any depth. Check the path.")
    left_out = VALIDATION_NAMES if training_folder(root) is not None else ()
    paths = tuple(
        path
        for path in images_below(root)
        if len(below := path.relative_to(root).parts) == 1 or below[0].lower() not in left_out
    )
    if not paths:
        raise InputError(f"{root} holds no images at any depth: expected JPEG, PNG, WebP or BMP files. Add some.")
    return ImageFiles(paths)


def readable_images(
    images: ImageFiles, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[ImageFiles, ImageCheck]:
    """The images that can be decoded, and the report of all. InputError when none can."""
    report = check_images(images, workers=workers, progress=progress)
    bad = {image.path for image in report.broken}
    kept = tuple(path for path in images.paths if str(path) not in bad)
    if not kept:
        raise InputError(f"None of {report.count} images can be read; the first: {report.broken[0].reason}")
    return ImageFiles(kept), report


def divide_images(images: ImageFiles, held_images: int) -> UnlabelledImages:
    """Hold out `held_images`, at most a tenth and at least one, evenly over the list. InputError for a single image."""
    total = len(images.paths)
    if total < 2:
        raise InputError("Pre-training takes at least two images, one of them to be held out; there is one. Add some.")
    held = evenly(total, max(1, min(held_images, total // HELD_SHARE)))
    out = set(held)
    kept = [at for at in range(total) if at not in out]
    return UnlabelledImages(images.subset(kept), images.subset(held))
