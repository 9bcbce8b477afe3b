"""Labelled images on disk: a folder in one of the usual arrangements or a CSV file, and what a seed draws from them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cnx_deploy.core.errors import InputError
from cnx_deploy.data.csv_dataset import is_csv, read_csv
from cnx_deploy.data.image_files import SUFFIXES, is_image_file
from cnx_deploy.data.image_source import ImageFiles, ImageSource

__all__ = [
    "VALIDATION_NAMES", "Dataset", "LeftOut", "child_folder", "few_labels", "find_dataset", "find_images",
    "image_source", "images_below", "images_to_run", "notes_of", "training_folder",
]  # fmt: skip

VALIDATION_NAMES = ("val", "validation", "valid", "test")
"""Folders of validation images, the first that exists is taken; upper and lower case are alike."""
SPLIT_NAMES = frozenset({"train", "training", *VALIDATION_NAMES})


MOST_NOTES = 10
"""Folders that are told by themselves of what is left out of them; more are summed up in a line."""
MOST_NAMES = 20
LITTER = frozenset({".ds_store", "thumbs.db", "desktop.ini"})
"""What a file manager leaves in a folder; a Mac's `._name` is one too."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Training and validation images over the same classes, whose names are sorted.

    A class may have no validation images, or none at all; `notes` say so, and how the data were understood.
    """

    class_names: tuple[str, ...]
    train: ImageFiles
    val: ImageFiles

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of both sides, each once."""
        return tuple(dict.fromkeys((*self.train.notes, *self.val.notes)))

    def observed(self) -> tuple[str, ...]:
        """What the images that were read so far have shown, see `ImageSource.observed`."""
        return tuple(dict.fromkeys((*self.train.observed(), *self.val.observed())))


@dataclass(slots=True)
class LeftOut:
    """What a listing has passed over: files of each kind, with the first name, beside those that it took."""

    where: str
    taken: int = 0
    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Count a file; the kind is its suffix where it has one."""
        before, first = self.kinds.get(kind, (0, name))
        self.kinds[kind] = (before + count, first)

    @property
    def count(self) -> int:
        """Files of all kinds."""
        return sum(count for count, _ in self.kinds.values())

    def __str__(self) -> str:
        most_first = sorted(self.kinds.items(), key=lambda entry: -entry[1][0])
        kinds = ", ".join(f"{count} {kind} ({name})" for kind, (count, name) in most_first)
        return f"{self.where}: {self.count} of {self.count + self.taken} files left out: {kinds}."


def image_source(
    data: Path | str | ImageSource, image_folder: Path | None = None, *, targets: str = "class",
    reduce_zero_label: bool = False,
) -> ImageSource:  # fmt: skip
    """The images of a path with the targets of a task (`model.tasks.base`); a source is returned as it is.

    See `find_images`, `segmentation.find_segmentation_images` and `coco.find_instance_images`. `reduce_zero_label`: see
    `segmentation.MaskReading`.
    """
    if reduce_zero_label and (targets != "masks" or isinstance(data, ImageSource)):
        raise InputError(
            "reduce_zero_label says how files of masks are read, and there are none here. Leave --reduce-zero-label "
            "(reduce_zero_label) out."
        )
    if image_folder is not None and (isinstance(data, ImageSource) or targets == "masks"):
        what = data.description if isinstance(data, ImageSource) else data
        raise InputError(f"{what} is no table, and image_folder is of a table. Leave it out.")
    if isinstance(data, ImageSource):
        return data
    if targets == "masks":
        from cnx_deploy.data.segmentation import (  # which takes functions from here
            MaskReading,
            find_segmentation_images,
        )

        return find_segmentation_images(Path(data), reading=MaskReading(reduce_zero_label=reduce_zero_label))
    if targets == "instances":
        from cnx_deploy.data.coco import find_instance_images

        return find_instance_images(Path(data), image_folder=image_folder)
    return find_images(Path(data), image_folder, multi_label=targets == "label-sets")


def images_to_run(data: Path | str | ImageSource, image_folder: Path | None = None, *, targets: str) -> ImageSource:
    """The images of a path for work that takes them without labels too, with those of a task where they are there.

    A table of several labels, a folder of pictures and masks and COCO's annotations have them; of any other folder all
    images are taken.
    """
    from cnx_deploy.data.coco import has_instances  # which read folders by the functions here
    from cnx_deploy.data.segmentation import has_masks

    has = {"label-sets": is_csv, "masks": has_masks, "instances": has_instances}.get(targets)
    has_targets = has is not None and not isinstance(data, ImageSource) and has(Path(data))
    return image_source(data, image_folder, targets=targets if has_targets else "class")


def find_images(root: Path, image_folder: Path | None = None, *, multi_label: bool = False) -> ImageFiles:
    """The images that a path means for anything but training.

    Of a folder: those of `val/`, else `validation/`, `valid/` or `test/`, else its own. A class has every image below
    its folder, however deep; images without class folders have no labels. Beside `train/` the classes are those of
    both, so that a class keeps its place where it has no images here. Of a CSV file: the rows of val, else of test,
    else all of a file without splits, with paths that begin at `image_folder`. What is left out is in `notes`.
    `multi_label`: an image has any number of labels, see `data.multi_label`.

    Raises InputError when there is no such folder, nothing in it, nothing but `train/`, or a class whose name is not
    UTF-8; see also `csv_dataset.read_csv`.
    """
    is_table = _is_table(root, image_folder)
    if multi_label:
        from cnx_deploy.data.multi_label import find_multi_label_images  # which reads folders by the functions here

        return find_multi_label_images(root, image_folder)
    if is_table:
        rows = read_csv(root, image_folder).validation()
        return replace(_with_missing_classes(rows, str(root)), description=str(root))
    train_root, val_root = training_folder(root), child_folder(root, VALIDATION_NAMES)
    files, notes = _files_by_class(val_root or root)
    if train_root is not None and val_root is None and set(files) == {train_root.name}:
        raise InputError(
            f"{root} has {train_root.name}/ and nothing to evaluate on: expected {'/, '.join(VALIDATION_NAMES)}/ as "
            f"well. Add one, or give {train_root} itself."
        )
    if files.keys() != {""} and train_root is not None and val_root is not None:
        files = {**dict.fromkeys(_class_folders(train_root), ()), **files}
    images = _with_missing_classes(_labelled(files, notes), str(val_root or root))
    return replace(images, description=str(root))


def find_dataset(
    root: Path, *, seed: int = 0, val_share: float = 0.2, image_folder: Path | None = None, multi_label: bool = False
) -> Dataset:
    """Read `train/` and `val/` (`validation/`, `valid/`, `test/`) of a folder, or the splits of a CSV file.

    One folder of classes, and a CSV file without splits, is divided by `seed`, each class by the same share. The class
    names are those of both sides. A class may lack validation images, which is in `notes`; a class of one image is
    not divided. Paths in a CSV file begin at `image_folder`, by default at the file's own. `multi_label`: an image has
    any number of labels, see `data.multi_label`.

    Raises InputError when fewer than two classes have training images, or one has none and is to be validated; see
    also `csv_dataset.read_csv`.
    """
    is_table = _is_table(root, image_folder)
    if multi_label:
        from cnx_deploy.data.multi_label import find_multi_label_dataset  # which reads folders by the functions here

        return find_multi_label_dataset(root, seed=seed, val_share=val_share, image_folder=image_folder)
    if is_table:
        rows = read_csv(root, image_folder)
        whole = rows.splits.get("")
        return _checked(root, *((rows.training(), rows.validation()) if whole is None
                                else split_by_class(whole, seed, val_share)))  # fmt: skip
    train_root = training_folder(root)
    if train_root is None:
        files, notes = _files_by_class(root)
        if files.keys() != {""} and all(name.lower() in SPLIT_NAMES for name in files):
            raise InputError(f"{root} has {', '.join(files)} but no folder train. Add it, or name a folder of classes.")
        return _checked(root, *split_by_class(_labelled(files, notes), seed, val_share))
    val_root = child_folder(root, VALIDATION_NAMES)
    if val_root is None:
        others = "/, ".join(VALIDATION_NAMES[:-1])
        raise InputError(
            f"{root} has {train_root.name}/ but no {others}/ or {VALIDATION_NAMES[-1]}/. Add one, or give {train_root} "
            "to have it split."
        )
    (train, train_notes), (val, val_notes) = _files_by_class(train_root), _files_by_class(val_root)
    for folder, files in ((train_root, train), (val_root, val)):
        if files.keys() == {""}:
            raise InputError(f"{folder} has 0 class folders, and images without: expected a folder for each. Add them.")
    if unlearned := sorted(name for name in val if not train.get(name) and (val[name] or name not in train)):
        raise InputError(
            f"{root}: {val_root.name}/ has the classes {_some(unlearned)}, of which {train_root.name}/ has no images. "
            "Add some, or remove the folders."
        )
    empty: dict[str, tuple[Path, ...]] = dict.fromkeys((*train, *val), ())  # both sides have all, so labels agree
    return _checked(root, _labelled({**empty, **train}, train_notes), _labelled({**empty, **val}, val_notes))


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

    A class of one image has it for training. Raises InputError for a share outside (0, 1), and when no class has two.
    """
    if not 0.0 < val_share < 1.0:
        raise InputError(f"The validation share is {val_share}; it has to lie between 0 and 1, for example 0.2.")
    generator = torch.Generator().manual_seed(seed)
    val: set[int] = set()
    for members in _members(images):
        order = torch.randperm(len(members), generator=generator).tolist()
        wanted = min(max(1, round(val_share * len(members))), len(members) - 1)
        val.update(members[at] for at in order[: max(0, wanted)])
    if images.class_names and not val:
        raise InputError(
            f"None of the {len(images.class_names)} classes has two images; splitting off validation images takes as "
            "many. Add some."
        )
    return images.subset([at for at in range(len(images)) if at not in val]), images.subset(sorted(val))


def training_folder(root: Path) -> Path | None:
    """`root/train`, in upper or lower case; None where there is none."""
    return child_folder(root, ("train",))


def images_below(folder: Path, left_out: LeftOut, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Image files by name, subfolders in their place; links to folders are followed, but not back to one above.

    A file whose suffix is one of `decoding.SUFFIXES` is taken for an image and not looked at; one of another suffix, or
    of none, is opened and taken when its first bytes are an image's. What is not taken is counted in `left_out`.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        name = entry.name
        if name.startswith("."):
            if name.lower() not in LITTER and not name.startswith("._"):
                left_out.add("hidden", name)
        elif entry.is_dir():
            yield from images_below(Path(entry.path), left_out, above | {real})
        elif not entry.is_file():
            left_out.add("no plain file", name)
        else:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a million times
            if suffix in SUFFIXES or is_image_file(entry.path):
                left_out.taken += 1
                yield Path(entry.path)
            elif name.lower() not in LITTER:
                left_out.add(suffix or "without suffix", name)


def notes_of(listings: Sequence[LeftOut], root: Path) -> tuple[str, ...]:
    """A sentence for each folder that something is left out of; of more than ten, one for all."""
    listings = [listing for listing in listings if listing.kinds]
    if len(listings) <= MOST_NOTES:
        return tuple(map(str, listings))
    whole = LeftOut(f"{len(listings)} folders of {root}", sum(listing.taken for listing in listings))
    for listing in listings:
        for kind, (count, name) in listing.kinds.items():
            whole.add(kind, f"{Path(listing.where).name}/{name}", count)
    return (str(whole),)


def _is_table(root: Path, image_folder: Path | None) -> bool:
    if image_folder is not None and not is_csv(root):
        raise InputError(
            f"{root} is no table (.csv, .tsv), and --image-folder (image_folder) is where a table's paths begin. Leave "
            "it out."
        )
    return is_csv(root)


def _class_folders(root: Path) -> tuple[str, ...]:
    """Sorted. Raises InputError for one whose name is no text."""
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    # A name whose bytes are not UTF-8 holds lone surrogates; no file of weights could record it.
    if unnamed := [name for name in names if any("\ud800" <= character <= "\udfff" for character in name)]:
        raise InputError(
            f"{root} has the class folder {unnamed[0]!r}, whose name is no text in UTF-8, as names in weights are. "
            "Rename it."
        )
    return names


def _files_by_class(root: Path) -> tuple[dict[str, tuple[Path, ...]], tuple[str, ...]]:
    """The image files of each class folder, and what is left out; without class folders all images under ""."""
    if not root.is_dir():
        raise InputError(
            f"{root} is not a folder: expected one that holds a folder of images for each class, or a .csv file. "
            "Check the path."
        )
    names = _class_folders(root)
    beside = LeftOut(f"{root}, beside its class folders")
    if names:
        for entry in sorted(root.iterdir()):
            if entry.is_file() and not entry.name.startswith(".") and entry.name.lower() not in LITTER:
                beside.add(entry.suffix.lower() or "without suffix", entry.name)
    listings = [LeftOut(str(root / name)) for name in names or ("",)]
    files = {
        name: tuple(images_below(root / name, listing)) for name, listing in zip(names or ("",), listings, strict=True)
    }
    notes = notes_of([*listings, beside], root)
    if not any(files.values()):
        raise InputError(
            f"{root} holds no images: expected a folder of them for each class. Add some. {' '.join(notes)}".rstrip()
        )
    return files, notes


def _labelled(files: dict[str, tuple[Path, ...]], notes: tuple[str, ...]) -> ImageFiles:
    """Images over the sorted classes; without labels where they are all under ""."""
    if files.keys() == {""}:
        return ImageFiles(files[""], notes=notes)
    names = tuple(sorted(files))
    paths = tuple(path for name in names for path in files[name])
    labels = tuple(label for label, name in enumerate(names) for _ in files[name])
    return ImageFiles(paths, labels, names, notes=notes)


def _checked(root: Path, train: ImageFiles, val: ImageFiles) -> Dataset:
    """Both sides over the same classes; notes say which have no validation images, and which no images at all."""
    names, learned = train.class_names, set(train.labels)
    if len(learned) < 2:
        have = f"{root} has {len(names)} class folders" if not names else f"{root} has images of {len(learned)} class"
        raise InputError(f"{have}; a classifier needs at least two, one folder or label each. Add some.")
    notes = []
    if missing := [name for at, name in enumerate(names) if at not in learned]:
        notes.append(f"{_classes(missing)} no images, so that nothing is learned of them: {_some(missing)}.")
    if missing := [names[at] for at in sorted(learned - set(val.labels))]:
        notes.append(
            f"{_classes(missing)} no validation images: {_some(missing)}. Their accuracy is not measured, and "
            "that of all is without them."
        )
    return Dataset(names, replace(train, notes=(*train.notes, *notes)), val)


def _with_missing_classes(images: ImageFiles, where: str) -> ImageFiles:
    """The same images with a note of the classes that have none."""
    seen = set(images.labels)
    missing = [name for at, name in enumerate(images.class_names) if at not in seen]
    if not missing:
        return images
    note = f"{_classes(missing)} no images in {where}: {_some(missing)}. They have no share in the metrics."
    return replace(images, notes=(*images.notes, note))


def _classes(names: Sequence[str]) -> str:
    return f"{len(names)} class{'es have' if len(names) > 1 else ' has'}"


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:MOST_NAMES])}{' …' if len(names) > MOST_NAMES else ''}"


def child_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The first folder of these names in `root`, in upper or lower case; lower case wins where a folder has both."""
    if not root.is_dir():
        return None
    entries = sorted(entry for entry in root.iterdir() if entry.name.lower() in names and entry.is_dir())
    folders = {entry.name.lower(): entry for entry in entries}
    return next((folders[name] for name in names if name in folders), None)


def _members(images: ImageFiles) -> list[list[int]]:
    """Indices of each class's images."""
    members: list[list[int]] = [[] for _ in images.class_names]
    for index, label in enumerate(images.labels):
        members[label].append(index)
    return members
