"""Two runners on images with a class for each pixel, or with objects: how far apart the metrics of both are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.gates import ParityResult
from cnx_deploy.core.manifest import ModelRecord
from cnx_deploy.data import ImageSource
from cnx_deploy.data.coco import InstanceFiles
from cnx_deploy.data.segmentation import SegmentationFiles
from cnx_deploy.model.tasks.detection_metrics import RunningDetections
from cnx_deploy.model.tasks.segmentation_metrics import confusion_of, labels_of, mean_iou
from cnx_deploy.verification.evaluation import class_positions

__all__ = [
    "MAX_IOU_CHANGE", "MAX_PRECISION_CHANGE", "MapResult", "PrecisionResult", "RunningMapComparison",
    "RunningPrecisionComparison", "comparison_by_labels",
]  # fmt: skip

MAX_IOU_CHANGE: Mapping[str, float] = MappingProxyType({"fp8": 5e-3, "int8": 5e-3})
"""Largest change of mean IoU, 0 to 1, by gate; of the others 0.001. FP16 was seen to change it by 1e-5."""
MAX_PRECISION_CHANGE: Mapping[str, float] = MappingProxyType({"fp32": 1e-4})
"""Largest change of COCO's average precision, 0 to 1, by gate; of the others 0.005."""


@dataclass(frozen=True, slots=True)
class MapResult(ParityResult):
    """A verdict over labelled maps: the gate's, and a failure where mean IoU changes by more than `MAX_IOU_CHANGE`.

    `pixels` are those of the canvas that have a class. `changed` of all pixels, counted or not, have another class on
    the other side; the gate counts those of the output's own places, less those that noise explains.
    """

    images: int
    pixels: int
    changed: int
    reference_mean_iou: float
    candidate_mean_iou: float

    @property
    def iou_change(self) -> float:
        """What the candidate's mean IoU has more than the reference's."""
        return self.candidate_mean_iou - self.reference_mean_iou

    @property
    def metrics(self) -> dict[str, tuple[float, float]]:
        """The candidate's and the reference's, 0 to 1, by name."""
        return {"mIoU": (self.candidate_mean_iou, self.reference_mean_iou)}

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it."""
        return {**ParityResult.to_dict(self), "mean_iou_change": self.iou_change}

    def lines(self) -> list[str]:
        """Mean IoU of both sides."""
        return [
            f"masks, {self.images} images, {self.pixels:,} counted pixels: mIoU {self.reference} "
            f"{self.reference_mean_iou:.5f}, {self.candidate} {self.candidate_mean_iou:.5f} "
            f"(change {self.iou_change:+.1e}); {self.changed:,} pixels of another class"
        ]


def comparison_by_labels(
    images: ImageSource, record: ModelRecord, class_names: Sequence[str] | None = None
) -> "RunningMapComparison | RunningPrecisionComparison | None":
    """Begin to count both sides on images with a class for each pixel or with objects; None where they have neither.

    `class_names`: the network's, in place of the recorded ones. Raises InputError where the images have other classes.
    """
    if not isinstance(images, SegmentationFiles | InstanceFiles):
        return None
    positions: Sequence[int] = range(record.num_classes)
    if images.class_names:
        positions = class_positions(images, class_names or record.class_names, record.num_classes)
    if isinstance(images, SegmentationFiles):
        return RunningMapComparison(record.num_classes, positions)
    return RunningPrecisionComparison(record.class_names or tuple(map(str, range(record.num_classes))), positions)


class RunningMapComparison:
    """Confusions of both sides with the classes of the pixels, batch by batch.

    `classes`: how many the network has. `positions`: its class of each class of the data.
    """

    def __init__(self, classes: int, positions: Sequence[int]) -> None:
        self._classes, self._images, self._changed = classes, 0, 0
        self._positions = torch.full((256,), 255)
        self._positions[: len(positions)] = torch.tensor(positions)
        self._matrices = [torch.zeros(classes, classes, dtype=torch.int64) for _ in range(2)]

    def add(self, candidate: Mapping[str, Tensor], reference: Mapping[str, Tensor], targets: Tensor) -> None:
        """Outputs of both sides for the same images, and the data's class of each pixel (N, H, W), 255 without one."""
        targets = self._positions[targets]
        sides = [labels_of(side, tuple(targets.shape[1:])) for side in (candidate, reference)]
        for matrix, labels in zip(self._matrices, sides, strict=True):
            matrix += confusion_of(labels, targets, self._classes)
        self._images += len(targets)
        self._changed += int((sides[0] != sides[1]).sum())

    def result(self, verdict: ParityResult) -> MapResult:
        """The verdict of an output with what was counted."""
        candidate, reference = map(mean_iou, self._matrices)
        failures = verdict.failures
        limit = MAX_IOU_CHANGE.get(verdict.gate.name, 1e-3)
        if not abs(candidate - reference) <= limit:  # NaN fails too
            failures += (f"mean IoU changes by {candidate - reference:+.2e}, gate {limit:g}",)
        return MapResult(
            verdict.candidate, verdict.reference, verdict.gate, verdict.batches, verdict.output, verdict.differences,
            failures, self._images, int(self._matrices[1].sum()), self._changed, reference, candidate,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PrecisionResult(ParityResult):
    """A verdict over images with objects: the gate's, and a failure where average precision changes by too much.

    `reference_precision` and `candidate_precision` are COCO's AP, 0 to 1, by what is compared: "boxes" and "masks".
    `images` counts those whose detections are exact.
    """

    images: int
    objects: int
    reference_precision: Mapping[str, float]
    candidate_precision: Mapping[str, float]

    @property
    def metrics(self) -> dict[str, tuple[float, float]]:
        """The candidate's and the reference's, 0 to 1, by name."""
        pairs = {kind: (self.candidate_precision[kind], value) for kind, value in self.reference_precision.items()}
        return {f"AP of {kind}": pair for kind, pair in pairs.items()}

    def lines(self) -> list[str]:
        """How detections match, and average precision of both sides."""
        told = "; ".join(
            f"{kind} AP {self.reference} {value:.5f}, {self.candidate} {self.candidate_precision[kind]:.5f} "
            f"(change {self.candidate_precision[kind] - value:+.1e})"
            for kind, value in self.reference_precision.items()
        )
        return [*ParityResult.lines(self), f"objects, {self.images} images, {self.objects:,} objects: {told}"]


class RunningPrecisionComparison:
    """Average precision of both sides, batch by batch.

    `names`: the network's classes. `positions`: its class of each class of the data.
    """

    def __init__(self, names: Sequence[str], positions: Sequence[int]) -> None:
        self._positions = torch.tensor(positions)
        self._sides = [RunningDetections(names) for _ in range(2)]

    def add(
        self, candidate: Mapping[str, Tensor], reference: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Outputs of both sides for the same images, and objects as `data.coco.InstanceFiles.sample` gives them.

        An image on which `exact` is not 1 is left out of both; the gate fails because of it.
        """
        moved = [{**target, "labels": self._positions[target["labels"]]} for target in targets]
        exact = (candidate["exact"].flatten() == 1.0).nonzero().flatten().tolist()
        for metrics, outputs in zip(self._sides, (candidate, reference), strict=True):
            own = {name: tensor[exact] for name, tensor in outputs.items()}
            own["labels"] = own["labels"].long()  # places in a file of FP32 are exact
            metrics.add(own, [moved[at] for at in exact], [""] * len(exact))

    def result(self, verdict: ParityResult) -> PrecisionResult:
        """The verdict with what was counted."""
        candidate, reference = (side.result() for side in self._sides)
        figures = [{kind: own["AP"] for kind, own in side.figures.items()} for side in (candidate, reference)]
        limit = MAX_PRECISION_CHANGE.get(verdict.gate.name, 5e-3)
        failures = verdict.failures + tuple(
            f"AP of {kind} changes by {figures[0][kind] - value:+.2e}, gate {limit:g}"
            for kind, value in figures[1].items()
            if not abs(figures[0][kind] - value) <= limit  # NaN fails too
        )
        return PrecisionResult(
            verdict.candidate, verdict.reference, verdict.gate, verdict.batches, verdict.output, verdict.differences,
            failures, candidate.count, candidate.objects, figures[1], figures[0],
        )  # fmt: skip
