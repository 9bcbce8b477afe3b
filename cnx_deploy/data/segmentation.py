"""Images with a class for each pixel, as people keep them: a folder of pictures and one of masks beside it.

A mask is a lossless picture of one channel whose values are classes: PNG in grey of 8 or 16 bits, or with a palette,
whose indices count and whose colours do not. 255 (65535 of 16 bits) is a pixel that is not counted. Arrangements:

- `images/` and `masks/` (`labels/`, `annotations/`), each with `train/` and `val/`, as ADE20K has `training/` and
  `validation/`; or `train/` and `val/`, each with both; or without a split.
- `leftImg8bit/` and `gtFine/` of Cityscapes; masks end in `_labelTrainIds` or `_labelIds`.
- `JPEGImages/`, `SegmentationClass/` and the lists in `ImageSets/Segmentation/` of Pascal VOC.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.class_names import NOT_COUNTED, ClassNames, names_of, ordered_names
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.strict_json import bounded_content, shortened
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data.bands import Picture
from cnx_deploy.data.dataset import VALIDATION_NAMES, Dataset, LeftOut, child_folder, images_below, notes_of
from cnx_deploy.data.image_source import ImageFiles
from cnx_deploy.data.pixels import load_image
from cnx_deploy.data.preprocessing import cropped, placement

__all__ = [
    "MaskReading", "SegmentationFiles", "find_segmentation_dataset", "find_segmentation_images",
    "has_masks", "pixel_counts", "pixel_lines", "read_mask",
]  # fmt: skip

MOST_CLASSES = 255
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
MASK_FOLDERS = (
    "masks", "mask", "labels", "label", "annotations", "annotation", "segmentationclass", "gtfine", "segmentation",
)  # fmt: skip
TRAINING_NAMES = ("train", "training")
NAME_FILES = ("classes.txt", "class_names.txt", "objectInfo150.txt")
IMAGE_ENDINGS = ("_leftImg8bit", "_image", "_img")
MASK_ENDINGS = (
    "_gtFine_labelTrainIds", "_gtFine_labelIds", "_labelTrainIds", "_labelIds", "_mask", "_label", "_labels", "_seg",
    "_segmentation", "_gt",
)  # fmt: skip
"""What may follow an image's name in that of its mask; of several masks the one of the first ending is taken."""
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
LISTED = 40


@dataclass(frozen=True, slots=True)
class MaskReading:
    """How masks are read where the data do not say it.

    `class_names`: names in the order of the classes, or the file that holds them; None looks for a file of
    `NAME_FILES`, and numbers the classes without. `reduce_zero_label`: 0 is not counted and every other value is one
    class lower, as ADE20K numbers its classes.
    """

    class_names: ClassNames | None = None
    reduce_zero_label: bool = False


@dataclass(frozen=True, slots=True)
class SegmentationFiles(ImageFiles):
    """Image files with a mask each, in the same order. Without `class_names` the classes are numbers."""

    masks: tuple[Path, ...] = ()
    reduce_zero_label: bool = False

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8: the class of each pixel, or `NOT_COUNTED`. InputError names the file where it has others."""
        classes = read_mask(self.masks[index], reduce_zero_label=self.reduce_zero_label)
        if self.class_names and (highest := int(classes[classes != NOT_COUNTED].max(initial=0))) >= len(
            self.class_names
        ):
            stored = highest + self.reduce_zero_label
            raise InputError(
                f"{self.masks[index]} holds the value {stored}, and there are {len(self.class_names)} classes, stored "
                f"as {int(self.reduce_zero_label)} to {len(self.class_names) - 1 + self.reduce_zero_label}. Correct "
                "the mask, or give all names with --class-names FILE (class_names)."
            )
        return classes

    def pair(self, index: int, white_level: float | None = None, in_chans: int = 3) -> tuple[Picture, np.ndarray]:
        """A picture and the classes of its pixels, both of its own size. InputError where their sizes differ."""
        picture, mask = self.image(index, white_level, in_chans), self.mask(index)
        if picture.size != mask.shape[::-1]:
            raise InputError(
                f"{self.paths[index]} has {picture.size[0]}x{picture.size[1]} pixels and its mask {self.masks[index]} "
                f"{mask.shape[1]}x{mask.shape[0]}: expected the same size, upright. Make the mask anew."
            )
        return picture, mask

    def check(self, index: int, white_level: float | None = None, in_chans: int = 3) -> None:
        """Raise InputError where the picture or its mask cannot be read, or they do not fit."""
        self.pair(index, white_level, in_chans)

    def sample(self, index: int, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        """(H, W, C) uint8 of the canvas, and the classes (H, W) int64 of its pixels; padding is not counted."""
        picture, mask = self.pair(index, preprocessing.white_level, preprocessing.in_chans)
        place = placement(picture.size, preprocessing)
        return cropped(picture, preprocessing), torch.from_numpy(place.label_map(mask, NOT_COUNTED)).long()

    def subset(self, indices: Sequence[int]) -> Self:
        """The images at `indices` and their masks."""
        paths, masks = (tuple(files[at] for at in indices) for files in (self.paths, self.masks))
        return replace(self, paths=paths, masks=masks)


def read_mask(path: Path, *, reduce_zero_label: bool = False) -> np.ndarray:
    """(H, W) uint8: the values of a mask as classes. See `MaskReading`.

    Raises InputError where it cannot be read, was stored with loss, has colours, or values above 254 other than 255.
    """
    image = load_image(path)
    if image.format in LOSSY:
        raise InputError(
            f"{path} is a {image.format}, which stores other values than were written: expected a lossless mask, such "
            "as PNG. Export the masks again."
        )
    if image.mode not in ("P", "L", "1") and image.mode[0] != "I":
        raise InputError(
            f"{path} holds colours ({image.mode}), and nothing says which colour is which class: expected one channel "
            "of class numbers, grey or with a palette. Convert the colours into numbers."
        )
    values = np.asarray(image)
    if values.dtype.itemsize > 1:
        values = np.where(values == 65535, NOT_COUNTED, values)
        if values.min(initial=0) < 0 or values.max(initial=0) > NOT_COUNTED:
            raise InputError(
                f"{path} holds values from {values.min()} to {values.max()}: expected classes from 0 to "
                f"{MOST_CLASSES - 1}, and 255 or 65535 where none is counted. Number the classes in this range."
            )
    values = values.astype(np.uint8)
    return np.where((values == 0) | (values == NOT_COUNTED), NOT_COUNTED, values - 1) if reduce_zero_label else values


def has_masks(root: Path) -> bool:
    """Whether a folder has one of the arrangements."""
    return root.is_dir() and bool(_sides(root))


def find_segmentation_dataset(
    root: Path, *, seed: int = 0, val_share: float = 0.2, reading: MaskReading | None = None
) -> Dataset:
    """Training and validation images with masks; where there is no split, a share is drawn by `seed`.

    Without class names the masks are read once, and their classes are numbered up to the largest. Raises InputError
    for another arrangement, without pairs, for fewer than two classes, and for names that do not fit `reading`.
    """
    reading = reading or MaskReading()
    sides = _read(root, reading)
    if "val" not in sides and "train" in sides:
        raise InputError(f"{root} has training images and none of {', '.join(VALIDATION_NAMES)}. Add some.")
    if "" in sides:
        if not 0.0 < val_share < 1.0:
            raise InputError(f"The validation share is {val_share}; it has to lie between 0 and 1, for example 0.2.")
        whole = sides[""]
        if len(whole) < 2:
            raise InputError(f"{root} has one image with a mask; splitting off validation images takes two. Add some.")
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = sorted(order[: min(max(1, round(val_share * len(whole))), len(whole) - 1)])
        sides = {"train": whole.subset(sorted(set(order) - set(held_out))), "val": whole.subset(held_out)}
    train, val = sides["train"], sides["val"]
    names = train.class_names
    if not names:
        present = (pixel_counts(train) + pixel_counts(val)).nonzero()[0]
        names = tuple(map(str, range(int(present.max(initial=-1)) + 1)))
    if len(names) < 2:
        raise InputError(
            f"{root}: its masks have {len(names)} class beside {NOT_COUNTED}, which is not counted; segmentation needs "
            "at least two. Where 255 is meant as a class, write 1 in its place."
        )
    return Dataset(names, replace(train, class_names=names), replace(val, class_names=names))


def find_segmentation_images(root: Path, *, reading: MaskReading | None = None) -> SegmentationFiles:
    """Images with masks for anything but training: those of validation, else all of a folder without a split.

    Raises InputError as `find_segmentation_dataset` does, and for nothing but training images.
    """
    sides = _read(root, reading or MaskReading())
    if "val" not in sides and "train" in sides:
        raise InputError(
            f"{root} has training images and nothing to evaluate on: expected {', '.join(VALIDATION_NAMES)} as well. "
            "Add one."
        )
    return replace(sides["val" if "val" in sides else ""], description=str(root))


def pixel_counts(images: SegmentationFiles) -> np.ndarray:
    """(255,) int64: the pixels of each class in all masks that can be read."""

    def count(index: int) -> np.ndarray:
        try:
            return np.bincount(images.mask(index).ravel(), minlength=256)
        except InputError:
            return np.zeros(256, np.int64)

    with ThreadPoolExecutor(cpu_count()) as pool:
        return sum(pool.map(count, range(len(images))), np.zeros(256, np.int64))[:NOT_COUNTED]


def pixel_lines(dataset: Dataset) -> Iterator[str]:
    """Say how many images there are and what share of the pixels each class has; of many classes the most and least."""
    assert isinstance(dataset.train, SegmentationFiles)
    assert isinstance(dataset.val, SegmentationFiles)
    counts = np.stack([pixel_counts(dataset.train), pixel_counts(dataset.val)])[:, : len(dataset.class_names)]
    shares = 100.0 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    yield f"{len(dataset.train)} training images, {len(dataset.val)} validation images"
    yield f"  {f'{len(dataset.class_names)} classes':32} {'training':>10} {'validation':>11}   share of the pixels"
    order = np.argsort(-counts[0], kind="stable")
    rows = [f"  {dataset.class_names[at]:32} {shares[0, at]:>8.3f} % {shares[1, at]:>9.3f} %" for at in order]
    if len(rows) > LISTED:
        rows[LISTED // 2 : -LISTED // 2] = [f"  … {len(rows) - LISTED} classes between"]
    yield from rows
    if missing := [name for name, count in zip(dataset.class_names, counts[0], strict=True) if not count]:
        yield f"Note: {len(missing)} classes have no training pixel, so that nothing is learned of them: " + shortened(
            ", ".join(missing)
        )


@dataclass(frozen=True, slots=True)
class _Side:
    """The folders of a split's images and masks, and the names that a list gives; None takes all."""

    images: Path
    masks: Path
    names: frozenset[str] | None = None


def _sides(root: Path) -> dict[str, _Side]:
    """The folders of each split, "" for all; nothing for another arrangement."""
    both = _image_and_mask_folders(root)
    if both is not None:
        images, masks = both
        lists = {
            split: path
            for split, names in (("train", TRAINING_NAMES), ("val", VALIDATION_NAMES))
            for name in reversed(names)
            if (path := root / "ImageSets" / "Segmentation" / f"{name}.txt").is_file()
        }
        if lists:
            return {split: _Side(images, masks, _listed(path)) for split, path in lists.items()}
        found = {
            split: _Side(folder, child_folder(masks, names) or masks / folder.name)
            for split, names in (("train", TRAINING_NAMES), ("val", VALIDATION_NAMES))
            if (folder := child_folder(images, names)) is not None
        }
        return found or {"": _Side(images, masks)}
    return {
        split: _Side(*inside)
        for split, names in (("train", TRAINING_NAMES), ("val", VALIDATION_NAMES))
        if (folder := child_folder(root, names)) is not None and (inside := _image_and_mask_folders(folder)) is not None
    }


def _listed(path: Path) -> frozenset[str]:
    try:
        return frozenset(bounded_content(path).decode("utf-8").split())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a list of names ({error}): expected one a line, in UTF-8."
        ) from error


def _image_and_mask_folders(root: Path) -> tuple[Path, Path] | None:
    images, masks = child_folder(root, IMAGE_FOLDERS), child_folder(root, MASK_FOLDERS)
    return None if images is None or masks is None else (images, masks)


def _read(root: Path, reading: MaskReading) -> dict[str, SegmentationFiles]:
    sides = _sides(root)
    if not sides:
        raise InputError(
            f"{root} has no folder of pictures with one of masks beside it: expected images/ and masks/ (labels/, "
            "annotations/), each with train/ and val/ where they are split. Check the path."
        )
    names, told = _class_names(root, reading)
    if names is not None and len(names) > MOST_CLASSES:
        raise InputError(
            f"{len(names)} classes were named for {root}: expected at most {MOST_CLASSES}, for 255 stands for pixels "
            "that are not counted."
        )
    shift = ", 0 is not counted and each value is one class lower" if reading.reduce_zero_label else ""
    understood = f"Read {root}: masks hold classes, {told}; 255 is not counted{shift}."
    files = {}
    for split, side in sides.items():
        images, masks, notes = _pairs(side)
        files[split] = SegmentationFiles(
            images, (), names or (), notes=(understood, *notes), masks=masks,
            reduce_zero_label=reading.reduce_zero_label,
        )  # fmt: skip
    return files


def _class_names(root: Path, reading: MaskReading) -> tuple[tuple[str, ...] | None, str]:
    """The names, and where they are from."""
    if reading.class_names is not None:
        names = names_of(reading.class_names)
        return names, f"named by --class-names (class_names), {len(names or ())} of them"
    for path in (root / name for name in NAME_FILES):
        if not path.is_file():
            continue
        if path.name != "objectInfo150.txt":
            names = names_of(path)
            return names, f"named by {path.name}, {len(names or ())} of them"
        if not reading.reduce_zero_label:
            raise InputError(
                f"{path} numbers its classes from 1, so that 0 is none of them: read them so with --reduce-zero-label "
                "(reduce_zero_label), or give names that begin with that of 0 with --class-names FILE (class_names)."
            )
        return _object_info(path), "named by the first word of each line of objectInfo150.txt"
    return None, "numbered, for nothing names them"


def _object_info(path: Path) -> tuple[str, ...]:
    """The first of the names of each class in ADE20K's table of tabs."""
    try:
        header, *rows = [line.split("\t") for line in bounded_content(path).decode("utf-8").splitlines() if line]
        at = [title.strip() for title in header].index("Name")
        return ordered_names([row[at].split(",")[0].strip() for row in rows])
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"{path} cannot be read as ADE20K's table of classes ({error}): expected lines of cells between tabs, and "
            "a column Name. Give the names with --class-names FILE (class_names)."
        ) from error


def _pairs(side: _Side) -> tuple[tuple[Path, ...], tuple[Path, ...], tuple[str, ...]]:
    """Images and masks of the same names, in order, and what is left out."""
    if not side.masks.is_dir():
        raise InputError(f"{side.masks} is not a folder, and {side.images} holds the images of its masks. Add it.")
    listings = LeftOut(str(side.images)), LeftOut(str(side.masks))
    images, masks = (
        _by_name(folder, listing) for folder, listing in zip((side.images, side.masks), listings, strict=True)
    )
    if side.names is not None:
        images = {name: images[name] for name in sorted(side.names & images.keys())}
        masks = {name: masks[name] for name in sorted(side.names & masks.keys())}
        for listing, kept in zip(listings, (images, masks), strict=True):
            listing.taken = len(kept)  # those of the other lists are not left out
    by_name = {_without(name, IMAGE_ENDINGS): name for name in images} | {name: name for name in images}
    chosen = _chosen_masks(by_name, masks, listings[1])
    for name in images.keys() - chosen.keys():
        listings[0].add("without a mask", Path(images[name]).name)
        listings[0].taken -= 1
    if not chosen:
        first = next(iter(images.values()), None)
        raise InputError(
            f"No image of {side.images} ({len(images)}{f', such as {first.name}' if first else ''}) has a mask of its "
            f"name in {side.masks} ({len(masks)}{f', such as {next(iter(masks.values())).name}' if masks else ''}). "
            f"A mask has the name of its image, or one that goes on with {', '.join(MASK_ENDINGS)}."
        )
    missing = sorted((side.names or frozenset()) - images.keys())
    notes = [f"{len(missing)} names of the list have no image: {shortened(', '.join(missing))}."] if missing else []
    order = [name for name in images if name in chosen]
    return (
        tuple(images[name] for name in order),
        tuple(chosen[name] for name in order),
        (*notes, *notes_of(listings, side.images)),
    )


def _by_name(folder: Path, listing: LeftOut) -> dict[str, Path]:
    """Files by their path below a folder without the suffix. InputError where two are alike."""
    files: dict[str, Path] = {}
    for path in images_below(folder, listing):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise InputError(f"{files[name]} and {path} have one name, which pairs images and masks. Remove one.")
        files[name] = path
    return files


def _chosen_masks(images: Mapping[str, str], masks: Mapping[str, Path], left_out: LeftOut) -> dict[str, Path]:
    """The mask of each image that has one, by the image's name."""
    chosen: dict[str, tuple[int, Path]] = {}
    for name, path in masks.items():
        ranked = [(0, name)] + [
            (rank, name.removesuffix(ending)) for rank, ending in enumerate(MASK_ENDINGS, 1) if name.endswith(ending)
        ]
        found = [(rank, images[key]) for rank, key in ranked if key in images]
        if not found:
            left_out.add("without an image", path.name)
            left_out.taken -= 1
            continue
        rank, image = found[0]
        if image in chosen:
            left_out.add("second mask of an image", max((rank, path), chosen[image])[1].name)
            left_out.taken -= 1
            if chosen[image][0] == rank:
                raise InputError(
                    f"{path} and {chosen[image][1]} are both masks of {image} by their names. Remove one of them."
                )
        chosen[image] = min((rank, path), chosen.get(image, (rank, path)))
    return {image: path for image, (_, path) in chosen.items()}


def _without(name: str, endings: Sequence[str]) -> str:
    return next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)
