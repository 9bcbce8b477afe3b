"""Labelled images on disk: a folder in one of the usual arrangements or a CSV file, and what a seed draws from them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cnx_deploy.core.errors import InputError
from cnx_deploy.data.csv_dataset import is_csv, read_csv
from cnx_deploy.data.decoding import SUFFIXES
from cnx_deploy.data.image_source import ImageFiles, ImageSource

__all__ = [
    "VALIDATION_NAMES",
    "Dataset",
    "few_labels",
    "find_dataset",
    "find_images",
    "image_source",
    "images_below",
    "training_folder",
]

VALIDATION_NAMES = ("val", "validation", "valid", "test")
"""Folders of validation images, the first that exists is taken; upper and lower case are alike."""
SPLIT_NAMES = frozenset({"train", "training", *VALIDATION_NAMES})


@dataclass(frozen=True, slots=True)
class Dataset:
    """Training and validation images over the same classes, whose names are sorted."""

    class_names: tuple[str, ...]
    train: ImageFiles
    val: ImageFiles


def image_source(data: Path | str | ImageSource) -> ImageSource:
    """The images of a path, see `find_images`; a source is returned as it is."""
    return data if isinstance(data, ImageSource) else find_images(Path(data))


def find_images(root: Path) -> ImageFiles:
    """The images that a path means for anything but training.

    Of a folder: those of `val/`, else `validation/`, `valid/` or `test/`, else its own. A class has every image below
    its folder, however deep; images without class folders have no labels. Hidden files and folders are left out. Of a
    CSV file: the rows of val, else of test, else all of a file without splits.

    Raises InputError when there is no such folder, nothing in it, a class without images, or one whose name is not
    UTF-8; see also `csv_dataset.read_csv`.
    """
    images = read_csv(root).validation() if is_csv(root) else _images_of_folder(_child(root, VALIDATION_NAMES) or root)
    return replace(images, description=str(root))


def find_dataset(root: Path, *, seed: int = 0, val_share: float = 0.2) -> Dataset:
    """Read `train/` and `val/` (`validation/`, `valid/`, `test/`) of a folder, or the splits of a CSV file.

    One folder of classes, and a CSV file without splits, is divided by `seed`, each class by the same share.

    Raises InputError when there are no classes, one is empty or too small to divide, or the two sides' classes differ;
    see also `csv_dataset.read_csv`.
    """
    if is_csv(root):
        rows = read_csv(root)
        whole = rows.splits.get("")
        sides = (rows.training(), rows.validation()) if whole is None else split_by_class(whole, seed, val_share)
        if len(rows.class_names) < 2:
            raise InputError(
                f"{root} has the one class {rows.class_names[0]}; a classifier needs at least two. Add rows of another."
            )
        return Dataset(rows.class_names, *sides)
    train_root = training_folder(root)
    if train_root is None:
        images = _images_of_folder(root)
        names = images.class_names
        if names and all(name.lower() in SPLIT_NAMES for name in names):
            raise InputError(f"{root} has {', '.join(names)} but no folder train. Add it, or name a folder of classes.")
        _check_classes(root, images)
        return Dataset(names, *split_by_class(images, seed, val_share))
    val_root = _child(root, VALIDATION_NAMES)
    if val_root is None:
        others = "/, ".join(VALIDATION_NAMES[:-1])
        raise InputError(
            f"{root} has {train_root.name}/ but no {others}/ or {VALIDATION_NAMES[-1]}/. Add one, or give {train_root} "
            "to have it split."
        )
    train, val = _images_of_folder(train_root), _images_of_folder(val_root)
    _check_classes(train_root, train)
    _check_classes(val_root, val)
    if train.class_names != val.class_names:
        difference = ", ".join(sorted(set(train.class_names) ^ set(val.class_names)))
        raise InputError(
            f"{root}: {train_root.name}/ and {val_root.name}/ must hold the same classes; only one has {difference}. "
            "Add it to the other, or remove it."
        )
    return Dataset(train.class_names, train, val)


def few_labels(dataset: Dataset, per_class: int, *, seed: int = 0) -> Dataset:
    """Draw `per_class` training images of each class by `seed`; the validation images stay as they are.

    With one seed, what is drawn for a smaller number is among what is drawn for a larger one. Raises InputError where
    a class has fewer.
    """
    if per_class < 1:
        raise InputError(f"A class keeps at least one training image, not {per_class}. Ask for more.")
    generator = torch.Generator().manual_seed(seed)
    kept: list[int] = []
    for name, members in zip(dataset.class_names, _members(dataset.train), strict=True):
        if len(members) < per_class:
            raise InputError(
                f"The class {name} has {len(members)} training images, {per_class} of each class were asked for. "
                "Ask for fewer."
            )
        kept.extend(members[at] for at in torch.randperm(len(members), generator=generator)[:per_class].tolist())
    return Dataset(dataset.class_names, dataset.train.subset(sorted(kept)), dataset.val)


def split_by_class(images: ImageFiles, seed: int, val_share: float) -> tuple[ImageFiles, ImageFiles]:
    """Training and validation images, each class divided by the same share, at least one image on each side.

    Raises InputError for a share outside (0, 1) and a class of one image.
    """
    if not 0.0 < val_share < 1.0:
        raise InputError(f"The validation share is {val_share}; it has to lie between 0 and 1, for example 0.2.")
    generator = torch.Generator().manual_seed(seed)
    val: set[int] = set()
    for name, members in zip(images.class_names, _members(images), strict=True):
        if len(members) < 2:
            raise InputError(
                f"The class {name} has one image; splitting off validation images takes at least two. Add one."
            )
        order = torch.randperm(len(members), generator=generator).tolist()
        wanted = min(max(1, round(val_share * len(members))), len(members) - 1)
        val.update(members[at] for at in order[:wanted])
    return images.subset([at for at in range(len(images)) if at not in val]), images.subset(sorted(val))


def training_folder(root: Path) -> Path | None:
    """`root/train`, in upper or lower case; None where there is none."""
    return _child(root, ("train",))


def images_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Image files by name, subfolders in their place; links to folders are followed, but not back to one above."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as listing:
        entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            yield from images_below(Path(entry.path), above | {real})
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():  # noqa: PTH122 - a million times
            yield Path(entry.path)


def _images_of_folder(root: Path) -> ImageFiles:
    if not root.is_dir():
        raise InputError(
            f"{root} is not a folder: expected one that holds a folder of images for each class, or a .csv file. "
            "Check the path."
        )
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        loose = tuple(images_below(root))
        if not loose:
            raise InputError(f"{root} holds no images: expected a folder of them for each class. Add some.")
        return ImageFiles(loose)
    # A name whose bytes are not UTF-8 holds lone surrogates; no file of weights could record it.
    if unnamed := [name for name in names if any("\ud800" <= character <= "\udfff" for character in name)]:
        raise InputError(
            f"{root} has the class folder {unnamed[0]!r}, whose name is no text in UTF-8, as names in weights are. "
            "Rename it."
        )
    files = {name: tuple(images_below(root / name)) for name in names}
    empty = [name for name in names if not files[name]]
    if empty:
        raise InputError(f"{root} has no images for the class {', '.join(empty)}. Add some, or remove the folder.")
    paths = tuple(path for name in names for path in files[name])
    return ImageFiles(paths, tuple(label for label, name in enumerate(names) for _ in files[name]), names)


def _child(root: Path, names: Sequence[str]) -> Path | None:
    """The first folder of these names in `root`, in upper or lower case; lower case wins where a folder has both."""
    if not root.is_dir():
        return None
    entries = sorted(entry for entry in root.iterdir() if entry.name.lower() in names and entry.is_dir())
    folders = {entry.name.lower(): entry for entry in entries}
    return next((folders[name] for name in names if name in folders), None)


def _check_classes(root: Path, images: ImageFiles) -> None:
    if len(images.class_names) < 2:
        raise InputError(
            f"{root} has {len(images.class_names)} class folders; a classifier needs at least two, one folder each. "
            "Add some."
        )


def _members(images: ImageFiles) -> list[list[int]]:
    """Indices of each class's images."""
    members: list[list[int]] = [[] for _ in images.class_names]
    for index, label in enumerate(images.labels):
        members[label].append(index)
    return members
