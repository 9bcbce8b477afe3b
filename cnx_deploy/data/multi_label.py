"""Images with several labels each: from a table, from tag files beside them, or from the class folders they lie in.

A table has a column of labels, or a column of 0 and 1 for each label (`data.csv_dataset`). A tag file is the text
`a.txt` beside `a.png`. In class folders an image that lies in several has the label of each.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.strict_json import bounded_content, shortened
from cnx_deploy.data.csv_dataset import is_csv, read_csv
from cnx_deploy.data.dataset import (
    VALIDATION_NAMES,
    Dataset,
    LeftOut,
    child_folder,
    images_below,
    notes_of,
    training_folder,
)
from cnx_deploy.data.image_source import ImageFiles
from cnx_deploy.data.label_sets import LabelCells

__all__ = ["find_multi_label_dataset", "find_multi_label_images", "label_lines"]

MOST_NAMED = 10


def find_multi_label_dataset(
    root: Path, *, seed: int = 0, val_share: float = 0.2, image_folder: Path | None = None
) -> Dataset:
    """Training and validation images with label sets; see `data.find_dataset` for splits.

    Where there is no split, a share is drawn by `seed`, and no label loses its last training image. Raises InputError
    where fewer than one label is learned, and what the readers raise.
    """
    if is_csv(root):
        rows = read_csv(root, image_folder, multi_label=True)
        whole = rows.splits.get("")
        train, val = (rows.training(), rows.validation()) if whole is None else _divided(whole, seed, val_share)
        return _checked(root, train, val)
    train_root, val_root = training_folder(root), child_folder(root, VALIDATION_NAMES)
    if train_root is None:
        return _checked(root, *_divided(_read_folders(root, {"": root})[""], seed, val_share))
    if val_root is None:
        raise InputError(
            f"{root} has {train_root.name}/ but no {'/, '.join(VALIDATION_NAMES)}/. Add one, or give {train_root} to "
            "have it split."
        )
    both = _read_folders(root, {"train": train_root, "val": val_root})
    return _checked(root, both["train"], both["val"])


def find_multi_label_images(root: Path, image_folder: Path | None = None) -> ImageFiles:
    """Images with label sets for anything but training: those of `val/` and its like, else all; see `find_images`."""
    if is_csv(root):
        return replace(read_csv(root, image_folder, multi_label=True).validation(), description=str(root))
    train_root, val_root = training_folder(root), child_folder(root, VALIDATION_NAMES)
    if train_root is not None and val_root is not None:
        return replace(_read_folders(root, {"train": train_root, "val": val_root})["val"], description=str(root))
    return replace(_read_folders(root, {"": val_root or root})[""], description=str(root))


def label_lines(dataset: Dataset, *, most: int = MOST_NAMED) -> Iterator[str]:
    """Say how many labels there are, how many an image has, and which are the most and the least frequent."""
    names, counts = dataset.class_names, dataset.train.class_counts()
    for title, images in (("training", dataset.train), ("validation", dataset.val)):
        sets = images.label_sets or ()
        mean, empty = sum(map(len, sets)) / max(1, len(sets)), sum(not each for each in sets)
        yield f"{len(sets)} {title} images, {mean:.2f} labels an image, {empty} images without any"
    order = sorted(range(len(names)), key=lambda at: -counts[at])
    yield f"  {f'{len(names)} labels':32} {'training':>9} {'validation':>11}"
    validation = dataset.val.class_counts()
    rows = [f"  {names[at]:32} {counts[at]:>9} {validation[at]:>11}" for at in order]
    if len(rows) > 2 * most:
        rows[most:-most] = [f"  … {len(rows) - 2 * most} labels between"]
    yield from rows


def _read_folders(root: Path, folders: dict[str, Path]) -> dict[str, ImageFiles]:
    """The images below each folder, over the labels of all."""
    for folder in folders.values():
        if not folder.is_dir():
            raise InputError(
                f"{folder} is not a folder: expected one of images with .txt files beside them, or of class folders, "
                "or a .csv file. Check the path."
            )
    listings = {split: LeftOut(str(folder)) for split, folder in folders.items()}
    found = {split: list(images_below(folder, listings[split])) for split, folder in folders.items()}
    texts = [path for paths in found.values() for path in paths if path.with_suffix(".txt").is_file()]
    if not any(found.values()):
        raise InputError(f"{root} holds no images: expected some, with .txt files beside them or in class folders.")
    for split, listing in listings.items() if texts else ():
        used = len({path.with_suffix(".txt") for path in found[split]})
        count, _ = listing.kinds.pop(".txt", (used, ""))
        if count > used:
            listing.add(".txt", "beside no image", count - used)
    cells, files = LabelCells(), dict[str, tuple[Path, ...]]()
    where: list[str] = []
    for split, folder in folders.items():
        files[split] = tuple(_tagged(found[split], where, split, cells) if texts else _sorted(
            folder, found[split], where, split, cells
        ))  # fmt: skip

    def refuse(at: int, reason: str) -> None:
        raise InputError(f"{where[at]}: {reason}. Correct it.")

    names, sets = cells.resolved((), refuse)  # type: ignore[arg-type]
    kind = "tag files (.txt) beside the images" if texts else "class folders; an image in several has all their labels"
    notes = (f"Read {root}: {kind}{cells.understood}.", *notes_of(tuple(listings.values()), root))
    return {
        split: ImageFiles(files[split], (), names, notes=notes, label_sets=sets.get(split, ())) for split in folders
    }


def _tagged(paths: Sequence[Path], where: list[str], split: str, cells: LabelCells) -> Iterator[Path]:
    """Each image with the text beside it. Raises InputError where one has none."""
    if missing := [path for path in paths if not path.with_suffix(".txt").is_file()]:
        raise InputError(
            f"{len(missing)} of {len(paths)} images have no .txt file beside them, the first is {missing[0]}. Add it; "
            "an image without labels has an empty one."
        )
    for path in paths:
        beside = path.with_suffix(".txt")
        try:
            text = bounded_content(beside).removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{beside} cannot be read as tags ({error}): expected text in UTF-8.") from error
        cells.add_text(split, len(where), text.replace("\r\n", "\n"))
        where.append(str(beside))
        yield path


def _sorted(folder: Path, paths: Sequence[Path], where: list[str], split: str, cells: LabelCells) -> Iterator[Path]:
    """Each image once, with the names of the class folders it lies in.

    Files of one name below several class folders are one image where their bytes are the same. Raises InputError where
    they are not: whether they are copies of one image in two encodings or two images, nothing says.
    """
    same: dict[Path, list[Path]] = {}
    for path in paths:
        relative = path.relative_to(folder)
        if len(relative.parts) < 2:
            raise InputError(
                f"{path} lies in no class folder and has no .txt file beside it, so nothing says its labels. Add a "
                "file of its tags, empty for none, or sort it into the folders of its labels."
            )
        same.setdefault(Path(*relative.parts[1:]), []).append(path)
    for copies in same.values():
        first, *others = copies
        if others and len({_digest(path) for path in copies}) > 1:
            other = next(path for path in others if _digest(path) != _digest(first))
            raise InputError(
                f"{first} and {other} have one name and different content: one image with two labels has the same "
                "bytes in both folders, and two images have names of their own. Rename one, or copy it again."
            )
        cells.add_names(split, len(where), [path.relative_to(folder).parts[0] for path in copies])
        where.append(str(first))
        yield first


def _digest(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _divided(images: ImageFiles, seed: int, val_share: float) -> tuple[ImageFiles, ImageFiles]:
    """Draw the share for validation; an image with a label of which it is the last stays in training."""
    if not 0.0 < val_share < 1.0:
        raise InputError(f"The validation share is {val_share}; it has to lie between 0 and 1, for example 0.2.")
    sets, left, val = images.label_sets or (), images.class_counts(), set[int]()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    for index in order:
        if len(val) < round(val_share * len(images)) and all(left[label] > 1 for label in sets[index]):
            val.add(index)
            left.subtract(sets[index])
    if not val:
        raise InputError(
            f"None of {len(images)} images can be kept out of training without a label losing its last. Add some, or "
            "say with a split which are for validation."
        )
    return images.subset([at for at in range(len(images)) if at not in val]), images.subset(sorted(val))


def _checked(root: Path, train: ImageFiles, val: ImageFiles) -> Dataset:
    names, learned, measured = train.class_names, train.class_counts(), val.class_counts()
    if not learned:
        raise InputError(f"{root} has no training image with a label; at least one is needed. Add some.")
    notes = []
    for counts, what in (
        (learned, "training images, so that they are not learned"),
        (measured, "validation images, so that they are not measured and get the common threshold"),
    ):
        if missing := [name for at, name in enumerate(names) if not counts[at]]:
            notes.append(f"{len(missing)} of {len(names)} labels have no {what}: {shortened(', '.join(missing))}.")
    return Dataset(names, replace(train, notes=(*train.notes, *notes)), val)
