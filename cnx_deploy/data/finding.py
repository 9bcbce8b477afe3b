"""Which labelled images a user means by a path: a folder in one of the usual arrangements, or a CSV file."""

from pathlib import Path

from cnx_deploy.core.errors import InputError
from cnx_deploy.data.dataset import Dataset, Split, split_by_class
from cnx_deploy.data.folders import (
    VALIDATION_NAMES,
    images_of_folder,
    only_splits,
    training_folder,
    validation_folder,
)
from cnx_deploy.data.manifest import is_manifest, read_manifest

__all__ = ["find_dataset", "find_images"]


def find_images(root: Path) -> tuple[tuple[str, ...], Split]:
    """Class names and images of one folder, see `folders.images_of_folder`, or of a CSV file.

    Of a CSV file: the validation rows (val, else test, else all of a file without splits) and the names of all its
    classes. InputError as `images_of_folder` and `manifest.read_manifest`.
    """
    if not is_manifest(root):
        return images_of_folder(root)
    manifest = read_manifest(root)
    return manifest.class_names, manifest.validation()


def find_dataset(root: Path, *, seed: int = 0, val_share: float = 0.2) -> Dataset:
    """Read `train/` and `val/` (`validation/`, `valid/`, `test/`) of a folder, or the splits of a CSV file.

    One folder of classes, and a CSV file without splits, is divided by `seed`, each class by the same share. InputError
    when there are no classes, one is empty or too small to divide, or the two sides' classes differ; see also
    `manifest.read_manifest`.
    """
    if is_manifest(root):
        return _dataset_of_manifest(root, seed, val_share)
    train_root = training_folder(root)
    if train_root is None:
        names, images = images_of_folder(root)
        if only_splits(names):
            raise InputError(f"{root} has {', '.join(names)} but no folder train. Add it, or name a folder of classes.")
        _check_classes(root, names)
        return Dataset(names, *split_by_class(names, images, seed=seed, val_share=val_share))
    val_root = validation_folder(root)
    if val_root == root:
        others = "/, ".join(VALIDATION_NAMES[:-1])
        raise InputError(
            f"{root} has {train_root.name}/ but no {others}/ or {VALIDATION_NAMES[-1]}/. Add one, or give {train_root} "
            "to have it split."
        )
    (names, train), (val_names, val) = images_of_folder(train_root), images_of_folder(val_root)
    _check_classes(train_root, names)
    _check_classes(val_root, val_names)
    if names != val_names:
        difference = ", ".join(sorted(set(names) ^ set(val_names)))
        raise InputError(
            f"{root}: {train_root.name}/ and {val_root.name}/ must hold the same classes; only one has {difference}. "
            "Add it to the other, or remove it."
        )
    return Dataset(names, train, val)


def _dataset_of_manifest(path: Path, seed: int, val_share: float) -> Dataset:
    manifest = read_manifest(path)
    names = manifest.class_names
    if "" not in manifest.splits:
        train, val = manifest.training(), manifest.validation()
    else:
        train, val = split_by_class(names, manifest.splits[""], seed=seed, val_share=val_share)
    if len(names) < 2:
        raise InputError(f"{path} has the one class {names[0]}; a classifier needs at least two. Add rows of another.")
    return Dataset(names, train, val)


def _check_classes(root: Path, names: tuple[str, ...]) -> None:
    if len(names) < 2:
        raise InputError(
            f"{root} has {len(names)} class folders; a classifier needs at least two, one folder each. Add some."
        )
