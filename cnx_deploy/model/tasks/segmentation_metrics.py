"""Metrics of a class for each pixel, on the canvas: intersection over union, accuracy, what is taken for what.

Logits of a quarter are brought to the canvas bilinearly, as in the loss. Pixels that are not counted, padding among
them, have no share in anything.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.class_names import NOT_COUNTED
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import BrokenImage
from cnx_deploy.model.tasks.base import Place

__all__ = [
    "ClassIoU", "MapOutcome", "RunningMaps", "SegmentationEvaluation", "confusion_of", "labels_of", "labels_on",
    "mean_iou",
]  # fmt: skip

MAP_VALUES = 1 << 25
"""Scores that are in memory at once while they are brought to a picture: 128 MB, twice."""
LISTED_CLASSES, WORST_CLASSES = 40, 20
"""Classes that a report lists in full; of more, it lists so many of the lowest IoU."""
LISTED_BROKEN, LISTED_PAIRS = 10, 10


@dataclass(frozen=True, slots=True)
class ClassIoU:
    """One class: `count` pixels have it, `predicted` are said to, `correct` are both. Rates are NaN without pixels."""

    name: str
    count: int
    predicted: int
    correct: int

    @property
    def iou(self) -> float:
        """Intersection over union."""
        union = self.count + self.predicted - self.correct
        return self.correct / union if union else math.nan

    @property
    def accuracy(self) -> float:
        """Share of the class's pixels that are found."""
        return self.correct / self.count if self.count else math.nan

    @property
    def precision(self) -> float:
        """Share of what is called so that is."""
        return self.correct / self.predicted if self.predicted else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain types; a rate without pixels is None."""
        rates = {name: getattr(self, name) for name in ("iou", "accuracy", "precision")}
        return {**asdict(self), **{name: None if math.isnan(rate) else rate for name, rate in rates.items()}}


@dataclass(frozen=True, slots=True)
class MapOutcome:
    """One image: its counted pixels, the share of them that is right, and its own mean IoU."""

    columns: ClassVar[tuple[str, ...]] = ("path", "pixels", "pixel_accuracy", "mean_iou")

    path: str
    pixels: int
    pixel_accuracy: float
    mean_iou: float

    def cells(self) -> list[str]:
        """The row of a table."""
        return [self.path, str(self.pixels), f"{self.pixel_accuracy:.6f}", f"{self.mean_iou:.6f}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationEvaluation:
    """`count` images that could be read; `broken` could not and count nowhere else.

    `per_class` has the model's classes in their order. `confusion` are pixels of each class (row) by what they are
    called (column). Means are over the classes that a pixel has or is said to have.
    """

    count: int
    per_class: tuple[ClassIoU, ...]
    confusion: tuple[tuple[int, ...], ...]
    broken: tuple[BrokenImage, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def pixels(self) -> int:
        """Counted pixels of all images."""
        return sum(row.count for row in self.per_class)

    @property
    def mean_iou(self) -> float:
        """Mean intersection over union, 0 to 1."""
        return _mean(row.iou for row in self.per_class)

    @property
    def mean_accuracy(self) -> float:
        """Mean over classes of the share of pixels that are found."""
        return _mean(row.accuracy for row in self.per_class)

    @property
    def pixel_accuracy(self) -> float:
        """Share of all counted pixels that are right."""
        return sum(row.correct for row in self.per_class) / max(1, self.pixels)

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        rates = {name: getattr(self, name) for name in ("pixels", "mean_iou", "mean_accuracy", "pixel_accuracy")}
        return {
            "count": self.count, **rates, "per_class": [row.to_dict() for row in self.per_class],
            "confusion": [list(row) for row in self.confusion], "broken": [asdict(image) for image in self.broken],
            "notes": list(self.notes),
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """The report for people, line by line; `to_dict` has everything that is cut here."""
        known = [row for row in self.per_class if not math.isnan(row.iou)]
        yield (
            f"mIoU {100 * self.mean_iou:.2f} % over {len(known)} of {len(self.per_class)} classes, pixel accuracy "
            f"{100 * self.pixel_accuracy:.2f} %, mean accuracy of classes {100 * self.mean_accuracy:.2f} %"
        )
        yield f"{self.pixels:,} counted pixels of the canvas, padding and pixels without a class left out"
        shown: Sequence[ClassIoU] = self.per_class
        if len(shown) > LISTED_CLASSES:
            shown = sorted(known, key=lambda row: row.iou)[:WORST_CLASSES]
            yield f"the {len(shown)} classes of the lowest IoU of {len(self.per_class)} (all of them: --json):"
        yield f"  {'class':24} " + " ".join(f"{name:>10}" for name in ("pixels", "IoU", "accuracy", "precision"))
        for row in shown:
            share = f"{100 * row.count / max(1, self.pixels):.2f} %"
            rates = (
                "-" if math.isnan(rate) else f"{100 * rate:.2f} %" for rate in (row.iou, row.accuracy, row.precision)
            )
            yield f"  {row.name:24} " + " ".join(f"{cell:>10}" for cell in (share, *rates))
        if self.broken:
            yield f"{len(self.broken)} of {self.count + len(self.broken)} images cannot be read and are not counted:"
            yield from (f"  {image.reason}" for image in self.broken[:LISTED_BROKEN])
            if len(self.broken) > LISTED_BROKEN:
                yield f"  … and {len(self.broken) - LISTED_BROKEN} more"

    def __str__(self) -> str:
        return "\n".join(self.lines())


class RunningMaps:
    """Confusions of pixels over batches of images.

    Args:
        names: the model's classes in their order.
        each: told every image's outcome, in order.
    """

    def __init__(self, names: Sequence[str], each: Callable[[MapOutcome], None] | None = None) -> None:
        self._names, self._each, self.count = tuple(names), each, 0
        self.matrix = torch.zeros(len(names), len(names), dtype=torch.int64)

    def add(self, outputs: Mapping[str, Tensor], targets: Tensor, paths: Sequence[str]) -> None:
        """Count finite outputs "logits", "full_logits" or "labels" against the classes (N, H, W) of the canvas."""
        for at, (path, target) in enumerate(zip(paths, targets, strict=True)):
            labels = labels_of({name: output[at : at + 1] for name, output in outputs.items()}, tuple(target.shape))[0]
            own = confusion_of(labels, target, len(self._names))
            self.matrix += own
            self.count += 1
            if self._each is not None:
                pixels = int(own.sum())
                right = float(own.diagonal().sum()) / pixels if pixels else math.nan
                self._each(MapOutcome(str(path), pixels, right, mean_iou(own)))

    def result(
        self, classes: Sequence[str], broken: Sequence[BrokenImage] = (), notes: Sequence[str] = ()
    ) -> SegmentationEvaluation:
        """The metrics over the model's classes; `classes` of the data are among them."""
        columns = (self.matrix.sum(dim=1), self.matrix.sum(dim=0), self.matrix.diagonal())
        rows = zip(self._names, *(column.tolist() for column in columns), strict=True)
        return SegmentationEvaluation(
            count=self.count, per_class=tuple(ClassIoU(*row) for row in rows),
            confusion=tuple(map(tuple, self.matrix.tolist())), broken=tuple(broken), notes=tuple(notes),
        )  # fmt: skip


def labels_of(outputs: Mapping[str, Tensor], size: tuple[int, ...]) -> Tensor:
    """(N, H, W) best classes at the height and width `size`, from whichever output has them.

    Raises InputError where none has, or "labels" are of another size.
    """
    if "labels" in outputs:
        labels = outputs["labels"]
    elif name := next((name for name in ("full_logits", "logits") if name in outputs), None):
        logits = outputs[name].float()
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        labels = logits.argmax(dim=1)
    else:
        raise InputError(
            f"A file of {', '.join(outputs)} gives no class of each pixel. Export it with --output logits or labels."
        )
    if labels.shape[-2:] != size:
        height, width = labels.shape[-2:]
        raise InputError(
            f"The model gives classes of {height}x{width} pixels, and those to compare with have {size[0]}x{size[1]}. "
            "Use the same canvas."
        )
    return labels


def labels_on(outputs: Mapping[str, Tensor], place: Place) -> Tensor:
    """(H, W) best classes of one image, outputs (1, ...), in the pixels of its picture, padding left out.

    Logits are brought to the canvas and from there to the picture, both bilinearly, some classes at a time: 150 classes
    of a photograph of 12 million pixels would have 7 GB.
    """
    if "labels" in outputs:
        return place.on_picture(outputs["labels"][:, None].float(), "nearest-exact")[0, 0].long()
    name = "full_logits" if "full_logits" in outputs else "logits"
    logits, size = outputs[name].float(), place.canvas[::-1]
    some = max(1, MAP_VALUES // max(math.prod(place.picture), math.prod(size)))
    best, labels = torch.full(place.picture[::-1], -math.inf), torch.zeros(place.picture[::-1], dtype=torch.int64)
    for start in range(0, logits.shape[1], some):
        part = logits[:, start : start + some]
        if part.shape[-2:] != size:
            part = F.interpolate(part, size, mode="bilinear", align_corners=False)
        scores, classes = place.on_picture(part)[0].max(dim=0)
        is_better = scores > best
        best = torch.where(is_better, scores, best)
        labels = torch.where(is_better, classes + start, labels)
    return labels


def confusion_of(labels: Tensor, targets: Tensor, classes: int) -> Tensor:
    """(K, K) int64: counted pixels by their class (row) and what they are called (column)."""
    counted = targets != NOT_COUNTED
    pairs = targets[counted].long() * classes + labels[counted].long()
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def mean_iou(matrix: Tensor) -> float:
    """Mean intersection over union of the classes in a confusion matrix (K, K); NaN without a pixel."""
    right = matrix.diagonal().double()
    union = matrix.sum(dim=0) + matrix.sum(dim=1) - right
    return float((right / union)[union > 0].mean())


def _mean(rates: Iterator[float] | Any) -> float:
    known = [rate for rate in rates if not math.isnan(rate)]
    return math.fsum(known) / len(known) if known else math.nan
