"""Images with objects, from COCO's JSON: boxes, classes and outlines as polygons or run lengths.

Found are `annotations/instances_train*.json` and `instances_val*.json` beside the folders of the images, as COCO has
them; `train.json` and `val.json`; `_annotations.coco.json` in `train/` and `valid/`; or one file by itself. A class is
the place of its category among all, sorted by their ids. What cannot be learned from is left out, counted and named.
Polygons become masks by pycocotools or faster-coco-eval (extra `dense`), so that they are COCO's to the pixel.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.class_names import ordered_names
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.strict_json import bounded_content, said_of, shortened
from cnx_deploy.data.bands import Picture
from cnx_deploy.data.dataset import VALIDATION_NAMES, Dataset
from cnx_deploy.data.image_source import ImageFiles
from cnx_deploy.data.preprocessing import cropped, placement

__all__ = [
    "InstanceFiles", "ObjectRecord", "find_instance_dataset", "find_instance_images", "has_instances",
    "instance_lines", "object_mask",
]  # fmt: skip

MAX_COCO_BYTES = 2 << 30
"""COCO's own training file has 448 MB."""
OTHER_FILES = ("captions", "person_keypoints", "image_info", "panoptic", "stuff")
"""First words of COCO's files that hold no instances."""
FARTHEST = 1 << 20
"""Pixels from the origin that an outline may reach."""
LISTED = 40


class RunLengths(msgspec.Struct, frozen=True, gc=False):
    """A mask column by column: lengths of runs of 0 and 1 in turn, as numbers or in COCO's text."""

    size: tuple[int, int]
    counts: list[int] | str


Outline = list[list[float]] | RunLengths | None


class ObjectRecord(msgspec.Struct, frozen=True):
    """An object of an image: its box xyxy in the image's pixels, the index of its class, its outline.

    `is_crowd`: a region of many objects, which is not learned from, and not counted against a detection in it.
    """

    box: tuple[float, float, float, float]
    label: int
    outline: Outline
    area: float
    is_crowd: bool = False


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int
    width: int


class _Annotation(msgspec.Struct):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float] | None = None
    segmentation: Outline = None
    area: float | None = None
    iscrowd: int = 0


class _Category(msgspec.Struct):
    id: int
    name: str


class _Document(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclass(frozen=True, slots=True)
class InstanceFiles(ImageFiles):
    """Image files with their objects, in the same order; `sizes` are (width, height) as annotated.

    `has_outlines`: every object that is not a crowd has one, so that masks can be learned.
    """

    objects: tuple[tuple[ObjectRecord, ...], ...] = field(default=(), repr=False)
    sizes: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    has_outlines: bool = True

    def pair(
        self, index: int, white_level: float | None = None, in_chans: int = 3
    ) -> tuple[Picture, tuple[ObjectRecord, ...]]:
        """A picture and its objects, crowds among them. InputError where its size is not the annotated one."""
        picture = self.image(index, white_level, in_chans)
        if picture.size != self.sizes[index]:
            raise InputError(
                f"{self.paths[index]} has {picture.size[0]}x{picture.size[1]} pixels and its objects are of an image "
                f"of {self.sizes[index][0]}x{self.sizes[index][1]}. Export the images and their annotations together."
            )
        return picture, self.objects[index]

    def check(self, index: int, white_level: float | None = None, in_chans: int = 3) -> None:
        """Raise InputError where a picture cannot be read or has another size, or a mask cannot be made."""
        picture, objects = self.pair(index, white_level, in_chans)
        for each in objects:
            object_mask(each.outline, picture.size, self.name(index))

    def target_of(self, index: int, *, crowds: bool = False) -> dict[str, Tensor]:
        """The objects in the image's own pixels: `boxes` (M, 4) xyxy, `labels` (M,), `masks` (M, H, W) uint8.

        With `crowds` those are among them, and `iscrowd` (M,) and `area` (M,) are given too. A file without outlines
        gives no masks.
        """
        objects = [each for each in self.objects[index] if crowds or not each.is_crowd]
        width, height = self.sizes[index]
        target = {
            "boxes": torch.tensor([each.box for each in objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([each.label for each in objects], dtype=torch.int64),
        }
        if self.has_outlines:
            masks = [object_mask(each.outline, (width, height), self.name(index)) for each in objects]
            stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
            target["masks"] = torch.from_numpy(stacked)
        if crowds:
            target["iscrowd"] = torch.tensor([each.is_crowd for each in objects], dtype=torch.int64)
            target["area"] = torch.tensor([each.area for each in objects], dtype=torch.float32)
        return target

    def sample(self, index: int, preprocessing: Preprocessing) -> tuple[Tensor, dict[str, Tensor]]:
        """(H, W, C) uint8 of the canvas, and the objects, crowds among them, in the picture's own pixels.

        Detections are compared there. `place` (4,) says where the picture lies on the canvas, its scale across and down
        and its left upper corner, and `size` (2,) its width and height.
        """
        picture, _ = self.pair(index, preprocessing.white_level, preprocessing.in_chans)
        place, target = placement(picture.size, preprocessing), self.target_of(index, crowds=True)
        target["place"] = torch.tensor([*place.scale, *place.offset], dtype=torch.float32)
        target["size"] = torch.tensor(picture.size)
        return cropped(picture, preprocessing), target

    def class_counts(self) -> Counter[int]:
        """The objects of each class, without crowds."""
        return Counter(each.label for objects in self.objects for each in objects if not each.is_crowd)

    def subset(self, indices: Sequence[int]) -> Self:
        """The images at `indices` and their objects."""
        return replace(
            self, paths=tuple(self.paths[at] for at in indices), objects=tuple(self.objects[at] for at in indices),
            sizes=tuple(self.sizes[at] for at in indices),
        )  # fmt: skip


def object_mask(outline: Outline, size: tuple[int, int], where: str) -> np.ndarray:
    """(H, W) uint8 of 0 and 1 of an outline on an image of width and height `size`; `where` names it in errors.

    Raises InputError for run lengths of another size, and MissingRequirementError for polygons without the extra.
    """
    width, height = size
    if outline is None:
        return np.zeros((height, width), np.uint8)
    if isinstance(outline, RunLengths):
        lengths = _counts(outline.counts) if isinstance(outline.counts, str) else outline.counts
        counts = np.array(lengths, np.int64)
        total = int(counts.sum())
        if tuple(outline.size) != (height, width) or counts.min(initial=0) < 0 or total != width * height:
            raise InputError(
                f"{where} has a mask whose run lengths are of {total} pixels in {outline.size[0]}x{outline.size[1]}, "
                f"where the image has {height}x{width}. Export the annotations again."
            )
        return np.ascontiguousarray(np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T, np.uint8)
    polygons = [polygon for polygon in outline if len(polygon) >= 6]
    if not all(len(polygon) % 2 == 0 and all(map(_is_near, polygon)) for polygon in polygons):
        raise InputError(f"{where} has an outline that is no list of x, y in turn. Export the annotations again.")
    mask = np.zeros((height, width), np.uint8)
    for encoded in _mask_library().frPyObjects(polygons, height, width) if polygons else ():
        mask |= object_mask(RunLengths((height, width), encoded["counts"].decode()), size, where)
    return mask


def find_instance_dataset(
    root: Path, *, seed: int = 0, val_share: float = 0.2, image_folder: Path | None = None
) -> Dataset:
    """Training and validation images with objects; one file alone is divided by `seed`, images by a share.

    `image_folder` is where file names begin, None: the folder in which the first of them lies. Raises InputError where
    nothing of the kind is found, categories differ, or no object is left.
    """
    sides = _read(root, image_folder)
    if "" in sides:
        if not 0.0 < val_share < 1.0:
            raise InputError(f"The validation share is {val_share}; it has to lie between 0 and 1, for example 0.2.")
        whole = sides[""]
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = sorted(order[: min(max(1, round(val_share * len(whole))), len(whole) - 1)])
        sides = {"train": whole.subset(sorted(set(order) - set(held_out))), "val": whole.subset(held_out)}
    if missing := [split for split in ("train", "val") if split not in sides]:
        raise InputError(f"{root} has no annotations of {missing[0]}, beside those of {', '.join(sides)}. Add them.")
    train, val = sides["train"], sides["val"]
    if not train.class_counts():
        raise InputError(f"{root} has no training object that can be learned from. {' '.join(train.notes)}".rstrip())
    return Dataset(train.class_names, train, val)


def find_instance_images(root: Path, *, image_folder: Path | None = None) -> InstanceFiles:
    """Images with objects for anything but training: those of validation, else all of one file."""
    sides = _read(root, image_folder)
    if "val" not in sides and "" not in sides:
        raise InputError(f"{root} has annotations of training images alone. Add some of val, or name a file.")
    return replace(sides["val" if "val" in sides else ""], description=str(root))


def has_instances(root: Path) -> bool:
    """Whether a path is a file of annotations, or a folder that has them where COCO and its tools put them."""
    if root.is_file():
        return root.suffix == ".json"
    patterns = ("annotations/*.json", "*/_annotations.coco.json", "train.json", "val.json")
    return any(path.is_file() for pattern in patterns for path in root.glob(pattern))


def instance_lines(dataset: Dataset) -> Iterator[str]:
    """Say how many images and objects there are, and how many of each class."""
    train, val = dataset.train.class_counts(), dataset.val.class_counts()
    yield (
        f"{len(dataset.train)} training images with {sum(train.values())} objects, {len(dataset.val)} validation "
        f"images with {sum(val.values())}"
    )
    yield f"  {f'{len(dataset.class_names)} classes':32} {'training':>9} {'validation':>11}   objects"
    order = sorted(range(len(dataset.class_names)), key=lambda at: -train[at])
    rows = [f"  {dataset.class_names[at]:32} {train[at]:>9} {val[at]:>11}" for at in order]
    if len(rows) > LISTED:
        rows[LISTED // 2 : -LISTED // 2] = [f"  … {len(rows) - LISTED} classes between"]
    yield from rows


def _read(root: Path, image_folder: Path | None) -> dict[str, InstanceFiles]:
    """The images of each split, "" for one file by itself."""
    files = _documents(root)
    documents = {split: _document(path) for split, path in files.items()}
    first, *others = ({each.id: each.name for each in document.categories} for document in documents.values())
    if any(first != other for other in others):
        raise InputError(
            f"{', '.join(map(str, files.values()))} have other categories, by ids and names. Export them together."
        )
    places = {key: at for at, key in enumerate(sorted(first))}
    try:
        names = ordered_names([first[key] for key in places])
    except ValueError as error:
        raise InputError(f"{next(iter(files.values()))} names its categories wrongly: {error}.") from error
    return {
        split: _side(document, files[split], split, root, image_folder, places, names)
        for split, document in documents.items()
    }


def _documents(root: Path) -> dict[str, Path]:
    if root.is_file():
        return {"": root}
    if not root.is_dir():
        raise InputError(f"{root} does not exist: expected a folder of COCO's annotations, or one such JSON file.")
    found = [
        path
        for pattern in ("annotations/*.json", "*/_annotations.coco.json", "*.json")
        for path in sorted(root.glob(pattern))
        if not path.name.startswith(OTHER_FILES)
    ]
    chosen: dict[str, Path] = {}
    for split, words in (("train", ("train",)), ("val", VALIDATION_NAMES)):
        for word in words:
            mine = [path for path in found if word in f"{path.parent.relative_to(root)}/{path.stem}".lower()]
            mine = [path for path in mine if path.name.startswith("instances")] or mine
            if len(mine) > 1:
                raise InputError(
                    f"{root} has several annotations of {split}: {', '.join(path.name for path in mine)}. Name one "
                    "file, or leave one in the folder."
                )
            if mine:
                chosen[split] = mine[0]
                break
    if not chosen and len(found) == 1:
        return {"": found[0]}
    if not chosen:
        raise InputError(
            f"{root} holds no annotations of objects: expected annotations/instances_train*.json and "
            "instances_val*.json, or _annotations.coco.json in train/ and valid/. Check the path."
        )
    return chosen


def _document(path: Path) -> _Document:
    try:
        return msgspec.json.decode(bounded_content(path, MAX_COCO_BYTES), type=_Document)
    except msgspec.ValidationError as error:
        raise InputError(f"{path} is no COCO file of objects ({said_of(error)}). Export it again.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as COCO's JSON ({error}). Export it again.") from error


def _side(
    document: _Document, path: Path, split: str, root: Path, image_folder: Path | None, places: dict[int, int],
    names: tuple[str, ...],
) -> InstanceFiles:  # fmt: skip
    folder = image_folder or _image_folder(document, path, split, root)
    images = {image.id: image for image in document.images}
    if len(images) < len(document.images):
        raise InputError(f"{path} has two images of one id, so that objects may be of either. Export it again.")
    left_out, cut = Counter[str](), 0
    objects: dict[int, list[ObjectRecord]] = {key: [] for key in images}
    is_outlined = any(_has_outline(each) for each in document.annotations if not each.iscrowd)
    for each in document.annotations:
        image = images.get(each.image_id)
        reason = (
            "of an image that the file does not have" if image is None
            else "of a category that the file does not have" if each.category_id not in places
            else "without an outline, which others have" if is_outlined and not _has_outline(each)
            else None
        )  # fmt: skip
        if image is None or reason is not None:
            left_out[str(reason)] += 1
            continue
        x, y, wide, high = each.bbox or (0.0, 0.0, 0.0, 0.0)
        box = (max(0.0, x), max(0.0, y), min(x + wide, float(image.width)), min(y + high, float(image.height)))
        if not all(map(math.isfinite, (x, y, wide, high))) or box[0] >= box[2] or box[1] >= box[3]:
            left_out["without a box in its image"] += 1
            continue
        cut += max(abs(a - b) for a, b in zip(box, (x, y, x + wide, y + high), strict=True)) > 1.0
        area = wide * high if each.area is None else each.area
        objects[image.id].append(
            ObjectRecord(box, places[each.category_id], each.segmentation, area, bool(each.iscrowd))
        )
    present = {key: folder / image.file_name for key, image in images.items()}
    absent = [key for key, file in present.items() if not file.is_file()]
    if len(absent) == len(present):
        raise InputError(
            f"None of the {len(present)} images of {path} is in {folder}. Say where their names begin with "
            "--image-folder (image_folder)."
        )
    kept = [key for key in present if key not in set(absent)]
    crowds = sum(each.is_crowd for key in kept for each in objects[key])
    notes = [f"Read {path}: {len(names)} classes, images in {folder}."]
    if absent:
        first = present[absent[0]].name
        notes.append(f"{len(absent)} of {len(present)} images are not there and are left out, the first is {first}.")
    notes += [f"{count} objects {reason} are left out." for reason, count in sorted(left_out.items())]
    if crowds:
        notes.append(f"{crowds} regions are crowds: nothing is learned from them, and a detection there is not wrong.")
    if cut:
        notes.append(f"{cut} boxes reach more than a pixel beyond their image and are cut at its edge.")
    if empty := sum(not objects[key] for key in kept):
        notes.append(f"{empty} of {len(kept)} images have no object; they are kept.")
    if not is_outlined:
        notes.append("No object has an outline, so that boxes alone can be learned.")
    return InstanceFiles(
        tuple(present[key] for key in kept), (), names, notes=tuple(notes), has_outlines=is_outlined,
        objects=tuple(tuple(objects[key]) for key in kept),
        sizes=tuple((images[key].width, images[key].height) for key in kept),
    )  # fmt: skip


def _image_folder(document: _Document, path: Path, split: str, root: Path) -> Path:
    """The folder that the first image lies in, of those in which exporters put them."""
    base = root if root.is_dir() else path.parent
    words = [path.stem.removeprefix("instances_")]
    words += ["train"] if split == "train" else list(VALIDATION_NAMES) if split == "val" else []
    around = [base, base.parent] if base.name == "annotations" else [base]
    places = [place / inside for place in around for inside in ("", "images")]
    folders = [place / word for word in words for place in places] + [path.parent, *places]
    name = document.images[0].file_name if document.images else ""
    found = next((folder for folder in folders if name and (folder / name).is_file()), None)
    if found is None:
        raise InputError(
            f"{path} names the image {shortened(name) or '(none)'}, which is in none of "
            f"{shortened(', '.join(map(str, folders)))}. Say where the names begin with --image-folder (image_folder)."
        )
    return found


def _has_outline(annotation: _Annotation) -> bool:
    outline = annotation.segmentation
    return isinstance(outline, RunLengths) or bool(outline and any(len(polygon) >= 6 for polygon in outline))


def _is_near(value: float) -> bool:
    return abs(value) <= FARTHEST  # False for NaN


def _counts(text: str) -> list[int]:
    """COCO's text of run lengths: 5 bits a character, lowest first, and from the third number on differences."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _mask_library() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        try:
            from faster_coco_eval.core import mask
        except ImportError as error:
            raise MissingRequirementError(
                "Outlines as polygons need pycocotools or faster-coco-eval, and neither is installed: pip install "
                '"cnx-deploy[dense]".'
            ) from error
    return mask
