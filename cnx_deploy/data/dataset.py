"""Labelled images as paths and class indices, and what is drawn from them by a seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cnx_deploy.core.errors import InputError

__all__ = ["Dataset", "Split", "evenly", "few_labels", "split_by_class", "subset"]


@dataclass(frozen=True, slots=True)
class Split:
    """Image files and the class index of each; -1 where a folder has no classes."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Training and validation images over the same classes, whose names are sorted."""

    class_names: tuple[str, ...]
    train: Split
    val: Split


def few_labels(dataset: Dataset, per_class: int, *, seed: int = 0) -> Dataset:
    """`per_class` training images of each class, drawn from `seed`; the validation images stay as they are.

    With one seed, what is drawn for a smaller number is among what is drawn for a larger one. InputError where a class
    has fewer.
    """
    if per_class < 1:
        raise InputError(f"A class keeps at least one training image, not {per_class}. Ask for more.")
    generator = torch.Generator().manual_seed(seed)
    kept: list[int] = []
    members = _members(dataset.train, len(dataset.class_names))
    for name, own in zip(dataset.class_names, members, strict=True):
        if len(own) < per_class:
            raise InputError(
                f"The class {name} has {len(own)} training images, {per_class} of each class were asked for. "
                "Ask for fewer."
            )
        kept.extend(own[at] for at in torch.randperm(len(own), generator=generator)[:per_class].tolist())
    return Dataset(dataset.class_names, subset(dataset.train, sorted(kept)), dataset.val)


def split_by_class(names: Sequence[str], images: Split, *, seed: int, val_share: float) -> tuple[Split, Split]:
    """Training and validation images, each class divided by the same share, at least one image on each side.

    InputError for a share outside (0, 1) and a class of one image.
    """
    if not 0.0 < val_share < 1.0:
        raise InputError(f"The validation share lies between 0 and 1, not at {val_share}. Give for example 0.2.")
    generator = torch.Generator().manual_seed(seed)
    val: set[int] = set()
    for name, members in zip(names, _members(images, len(names)), strict=True):
        if len(members) < 2:
            raise InputError(
                f"The class {name} has one image; splitting off validation images takes at least two. Add one."
            )
        order = torch.randperm(len(members), generator=generator).tolist()
        wanted = min(max(1, round(val_share * len(members))), len(members) - 1)
        val.update(members[at] for at in order[:wanted])
    train = [index for index in range(len(images.paths)) if index not in val]
    return subset(images, train), subset(images, sorted(val))


def subset(images: Split, indices: Sequence[int]) -> Split:
    """The images at `indices`, in their order."""
    return Split(tuple(images.paths[at] for at in indices), tuple(images.labels[at] for at in indices))


def evenly(images: Split, limit: int | None) -> Split:
    """`limit` images taken evenly over the list, so that sorted classes are all met; all of them with None."""
    total = len(images.paths)
    if limit is None or limit >= total:
        return images
    return subset(images, [at * total // limit for at in range(limit)])


def _members(images: Split, classes: int) -> list[list[int]]:
    """Indices of each class's images."""
    members: list[list[int]] = [[] for _ in range(classes)]
    for index, label in enumerate(images.labels):
        members[label].append(index)
    return members
