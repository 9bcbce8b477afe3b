"""Which images a folder holds: class folders of any depth, and the names that training and validation folders have."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cnx_deploy.core.errors import InputError
from cnx_deploy.data.dataset import Split
from cnx_deploy.data.decoding import SUFFIXES

__all__ = [
    "VALIDATION_NAMES",
    "images_below",
    "images_of_folder",
    "only_splits",
    "training_folder",
    "validation_folder",
]

VALIDATION_NAMES = ("val", "validation", "valid", "test")
"""Folders of validation images, the first that exists is taken; upper and lower case are alike."""
SPLIT_NAMES = frozenset({"train", "training", *VALIDATION_NAMES})


def images_of_folder(root: Path) -> tuple[tuple[str, ...], Split]:
    """Class names and images of one folder: class folders, or images without labels (no names, labels -1).

    A class has every image below its folder, however deep; hidden files and folders are left out. InputError when
    there is no such folder, nothing in it, a class without images, or one whose name is not UTF-8.
    """
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
        return (), Split(loose, (-1,) * len(loose))
    if unnamed := [name for name in names if not _is_utf8(name)]:
        raise InputError(
            f"{root} has the class folder {unnamed[0]!r}, whose name is no text in UTF-8, as names in weights are. "
            "Rename it."
        )
    files = {name: tuple(images_below(root / name)) for name in names}
    empty = [name for name in names if not files[name]]
    if empty:
        raise InputError(f"{root} has no images for the class {', '.join(empty)}. Add some, or remove the folder.")
    paths = tuple(path for name in names for path in files[name])
    labels = tuple(label for label, name in enumerate(names) for _ in files[name])
    return names, Split(paths, labels)


def training_folder(root: Path) -> Path | None:
    """`root/train`, in upper or lower case; None where there is none."""
    return _child(root, ("train",))


def validation_folder(root: Path) -> Path:
    """`root/val`, else `validation`, `valid` or `test`, else `root` itself; a file is returned as it is."""
    return _child(root, VALIDATION_NAMES) or root


def only_splits(names: Sequence[str]) -> bool:
    """Whether folders are parts of a dataset by their names, so that they cannot be meant as its classes."""
    return bool(names) and all(name.lower() in SPLIT_NAMES for name in names)


def _is_utf8(name: str) -> bool:
    """Whether a file's name came from UTF-8; other bytes are lone surrogates in it."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _child(root: Path, names: Sequence[str]) -> Path | None:
    if not root.is_dir():
        return None
    # Sorted, lower case comes last and wins where a folder has both.
    entries = sorted(entry for entry in root.iterdir() if entry.name.lower() in names and entry.is_dir())
    found = {entry.name.lower(): entry for entry in entries}
    return next((found[name] for name in names if name in found), None)


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
