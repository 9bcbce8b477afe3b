"""COCO's average precision of boxes and masks, in the pixels of each picture, by torchmetrics and faster-coco-eval.

Detections are moved from the canvas to the picture, and masks of 28×28 are pasted into their boxes there, as
torchvision and mmdet do. So sizes of objects are those of the pictures, and figures compare with other programs'.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.errors import CheckFailedError, MissingRequirementError
from cnx_deploy.core.preprocessing import BrokenImage

__all__ = [
    "COLUMNS", "NOT_EXACT", "ClassPrecision", "DetectionEvaluation", "DetectionOutcome", "RunningDetections",
    "coco_figures", "coco_metric", "on_picture", "pasted",
]  # fmt: skip

COLUMNS = {
    "map": "AP", "map_50": "AP50", "map_75": "AP75", "map_small": "APs", "map_medium": "APm", "map_large": "APl",
    "mar_1": "AR1", "mar_10": "AR10", "mar_100": "AR100",
}  # fmt: skip
"""torchmetrics' names -> those of a report. Small is below 32², large above 96² pixels of the picture."""
GRIDS = ((0.5, 0.95, 10), (0.0, 1.0, 101))
"""First, last and number of COCO's overlaps and recalls."""
NOT_EXACT = (
    "a limit of the deploy form was too low for this image, and the output exact is 0. Export again with --task-option "
    "passes=32, or with more candidates or a larger sampling_limit."
)
KINDS = {"bbox": "boxes", "segm": "masks"}
LISTED_CLASSES, LISTED_BROKEN = 40, 10
IOU, MASK_THRESHOLD = 0.5, 0.5
"""From which overlap an outcome counts an object as found; from which probability a pixel is the object's."""


@dataclass(frozen=True, slots=True)
class ClassPrecision:
    """One class: its objects without crowds, and the average precision of boxes and masks, NaN without objects."""

    name: str
    objects: int
    boxes: float
    masks: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain types; NaN is None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class DetectionOutcome:
    """One image: objects, detections, and objects that a detection of their class overlaps by half or more."""

    columns: ClassVar[tuple[str, ...]] = ("path", "objects", "detections", "found")

    path: str
    objects: int
    detections: int
    found: int

    def cells(self) -> list[str]:
        """The row of a table."""
        return [self.path, str(self.objects), str(self.detections), str(self.found)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionEvaluation:
    """`count` images that could be read; `broken` could not and count nowhere else.

    `figures`: for "boxes" and, of a network with masks, "masks", COCO's figures by the names of `COLUMNS`, 0 to 1, NaN
    where there is no object of the kind.
    """

    count: int
    objects: int
    detections: int
    figures: Mapping[str, Mapping[str, float]]
    per_class: tuple[ClassPrecision, ...]
    broken: tuple[BrokenImage, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types; NaN is None."""
        figures = {
            kind: {name: None if math.isnan(value) else value for name, value in rates.items()}
            for kind, rates in self.figures.items()
        }
        return {
            "count": self.count, "objects": self.objects, "detections": self.detections, **figures,
            "per_class": [row.to_dict() for row in self.per_class],
            "broken": [asdict(image) for image in self.broken], "notes": list(self.notes),
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """The report for people, line by line."""
        yield f"{self.objects} objects, {self.detections} detections; COCO's average precision in percent"
        yield f"  {'':8}" + "".join(f"{name:>8}" for name in COLUMNS.values())
        for kind, rates in self.figures.items():
            yield f"  {kind:8}" + "".join(f"{_percent(rates[name]):>8}" for name in COLUMNS.values())
        shown = sorted(self.per_class, key=lambda row: -row.objects)
        if len(shown) > LISTED_CLASSES:
            shown = shown[:LISTED_CLASSES]
            yield f"the {len(shown)} classes of the most objects of {len(self.per_class)} (all of them: --json):"
        yield f"  {'class':24} {'objects':>8} {'boxes':>8}" + (f" {'masks':>8}" if "masks" in self.figures else "")
        for row in shown:
            masks = "" if row.masks is None else f" {_percent(row.masks):>8}"
            yield f"  {row.name:24} {row.objects:>8} {_percent(row.boxes):>8}{masks}"
        if self.broken:
            yield f"{len(self.broken)} of {self.count + len(self.broken)} images cannot be read and are not counted:"
            yield from (f"  {image.reason}" for image in self.broken[:LISTED_BROKEN])

    def __str__(self) -> str:
        return "\n".join(self.lines())


class RunningDetections:
    """Detections of images against their objects, batch by batch.

    Args:
        names: the model's classes in their order.
        each: told every image's outcome, in order.
    """

    def __init__(self, names: Sequence[str], each: Callable[[DetectionOutcome], None] | None = None) -> None:
        self._names, self._each, self.count = tuple(names), each, 0
        self._metric: Any = None
        self._objects = torch.zeros(len(names), dtype=torch.int64)
        self._detections = 0

    def add(self, outputs: Mapping[str, Tensor], targets: Any, paths: Sequence[str]) -> None:
        """Count detections (N, D, …) against targets as `data.coco.InstanceFiles.sample` gives them, one an image.

        Raises CheckFailedError for an image on which a limit of the deploy form was too low, and
        MissingRequirementError without the extra that has the metric.
        """
        for at, (path, target) in enumerate(zip(paths, targets, strict=True)):
            if float(outputs["exact"][at]) != 1.0:
                raise CheckFailedError(f"The detections of {path} are not exact: {NOT_EXACT}")
            found = on_picture({name: output[at] for name, output in outputs.items()}, target)
            has_masks = "masks" in found and "masks" in target
            if self._metric is None:
                self._metric = coco_metric(masks=has_masks).to(outputs["boxes"].device)
            names = ("boxes", "labels", *(("masks",) if has_masks else ()))
            truth = {name: target[name] for name in (*names, "iscrowd", "area")}
            detected = {name: found[name] for name in (*names, "scores")}
            self._metric.update(*([_as_metric(each, self._metric.device)] for each in (detected, truth)))
            objects = target["iscrowd"] == 0
            self._objects += torch.bincount(target["labels"][objects].cpu(), minlength=len(self._names))
            self._detections += len(found["labels"])
            self.count += 1
            if self._each is not None:
                counts = int(objects.sum()), len(found["labels"]), _found(found, target, objects)
                self._each(DetectionOutcome(str(path), *counts))

    def result(
        self, classes: Sequence[str] = (), broken: Sequence[BrokenImage] = (), notes: Sequence[str] = ()
    ) -> DetectionEvaluation:
        """The metrics over the model's classes; `classes` of the data are among them."""
        values = coco_figures(self._metric or coco_metric(masks=False))
        figures = {
            KINDS[kind]: {column: _rate(values[f"{kind}_{name}"]) for name, column in COLUMNS.items()}
            for kind in KINDS
            if f"{kind}_map" in values
        }
        places = {int(label): at for at, label in enumerate(values["classes"].reshape(-1))}

        def of_class(kind: str, label: int) -> float:
            rates = values[f"{kind}_map_per_class"].reshape(-1)
            return _rate(rates[places[label]]) if label in places else math.nan

        per_class = tuple(
            ClassPrecision(
                name, int(self._objects[label]), of_class("bbox", label),
                of_class("segm", label) if "masks" in figures else None,
            )
            for label, name in enumerate(self._names)
        )  # fmt: skip
        return DetectionEvaluation(
            count=self.count, objects=int(self._objects.sum()), detections=self._detections, figures=figures,
            per_class=per_class, broken=tuple(broken), notes=tuple(notes),
        )  # fmt: skip


def coco_metric(*, masks: bool) -> Any:
    """Torchmetrics' COCO metric of boxes, and of masks too."""
    try:
        from torchmetrics.detection import MeanAveragePrecision

        kinds: Any = ("bbox", "segm") if masks else ("bbox",)
        # In float64, as pycocotools has them: overlaps of masks are ratios of counts, and may be just 0.65.
        overlaps, recalls = (np.linspace(*grid).tolist() for grid in GRIDS)
        words: dict[str, Any] = {"iou_thresholds": overlaps, "rec_thresholds": recalls, "class_metrics": True}
        return MeanAveragePrecision(iou_type=kinds, backend="faster_coco_eval", **words)
    except ImportError as error:  # also torchmetrics' own, without faster-coco-eval
        raise MissingRequirementError(
            "COCO's average precision needs torchmetrics and faster-coco-eval, of which one is not installed. Install "
            'them: pip install "cnx-deploy[dense]".'
        ) from error


def coco_figures(metric: Any) -> dict[str, Tensor]:
    """What `coco_metric` counted, by kind and figure: `bbox_map`, …; -1 where there is no object."""
    values: dict[str, Tensor] = metric.compute()
    return {
        name if name.startswith(("bbox_", "segm_", "classes")) else f"bbox_{name}": value
        for name, value in values.items()
    }


def on_picture(outputs: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The detections of one image in the pixels of its picture, masks (n, H, W) bool among them where there are any.

    `target` says where the picture lies: `place`, its scale across and down and its left upper corner on the canvas,
    and `size`, its width and height.
    """
    present = outputs["labels"] >= 0
    scale, corner = target["place"].to(outputs["boxes"]).reshape(2, 2).repeat(1, 2)
    size = target["size"].to(outputs["boxes"]).repeat(2)
    boxes = ((outputs["boxes"][present] - corner) / scale).clamp(min=0).minimum(size)
    found = {"boxes": boxes, "scores": outputs["scores"][present], "labels": outputs["labels"][present]}
    if "masks" in outputs:
        width, height = (int(side) for side in target["size"])
        found["masks"] = pasted(outputs["masks"][present], boxes, (height, width))
    return found


def pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 28, 28) probabilities inside boxes (n, 4) -> (n, H, W) bool on a picture of height and width `size`."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    if not len(masks):
        return torch.zeros(0, *size, dtype=torch.bool)
    whole: Tensor = paste_masks_in_image(masks[:, None].float(), boxes.float(), size)
    return whole[:, 0] >= MASK_THRESHOLD


def _as_metric(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What torchmetrics takes: masks of 0 and 1."""
    return {name: (value.bool() if name == "masks" else value).to(device) for name, value in values.items()}


def _found(found: Mapping[str, Tensor], target: Mapping[str, Tensor], objects: Tensor) -> int:
    """Objects that a detection of their class overlaps."""
    if not len(found["boxes"]) or not bool(objects.any()):
        return 0
    from torchvision.ops import box_iou  # takes seconds to load, and most networks detect nothing

    overlaps = box_iou(target["boxes"][objects].float(), found["boxes"].float())
    same = target["labels"][objects][:, None] == found["labels"][None]
    return int(((overlaps >= IOU) & same).any(dim=1).sum())


def _rate(value: Tensor) -> float:
    """COCO has -1 for what has no objects."""
    return math.nan if float(value) < 0 else float(value)


def _percent(rate: float) -> str:
    return "-" if math.isnan(rate) else f"{100 * rate:.2f}"
