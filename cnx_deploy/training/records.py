"""What a run says of each epoch and of itself, and whom it tells."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

__all__ = [
    "CONDITIONS", "DetectionRecord", "EpochRecord", "MultiLabelRecord", "Progress", "RunResult", "SegmentationRecord",
    "StepReport", "TrainingRecord", "TrainingResult",
]  # fmt: skip

CONDITIONS = ("seconds", "images_per_second", "data_wait_percent")
"""Fields that say how the work went, not what was learned: two equal runs differ in them."""
LATER_FIELDS = frozenset({"val_recall_percent", "ema_val_recall_percent"})
"""Fields that earlier records do not have: None there, and written only where they are not."""


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch, from 1; a subclass adds what its task learns, and is what the state of a run keeps."""

    epoch: int

    def row(self) -> dict[str, Any]:
        """The fields by name, as the table of a run and its state keep them."""
        return {name: value for name, value in asdict(self).items() if value is not None or name not in LATER_FIELDS}

    @property
    def losses(self) -> tuple[float, float]:
        """Loss in training and on the images that are kept out of it."""
        raise NotImplementedError

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better."""
        raise NotImplementedError

    def summary(self, *, is_best: bool) -> str:
        """The epoch's figures in one line."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class TrainingRecord(EpochRecord):
    """One epoch of a classifier; losses are means over images.

    `train_loss` is of smoothed, mixed and augmented images, `val_loss` of none of that. `ema_…` are of the moving
    average, None without one. `learning_rate` is of the last layers and stands where the epoch leaves it, so it is
    the next step's. `data_wait_percent`: share of the epoch's training time in which no image was there.
    `val_recall_percent`: mean recall of the classes, which ranks weights where loss or sampling even the classes out.
    """

    train_loss: float
    val_loss: float
    val_top1_percent: float
    val_top5_percent: float
    ema_val_loss: float | None
    ema_val_top1_percent: float | None
    learning_rate: float
    seconds: float
    images_per_second: float
    data_wait_percent: float
    val_recall_percent: float | None = None
    ema_val_recall_percent: float | None = None

    @property
    def losses(self) -> tuple[float, float]:
        """Loss in training and in validation."""
        return self.train_loss, self.val_loss

    @property
    def weights_rank(self) -> tuple[float, float]:
        """Greater is better: mean recall where it is known, else top-1; then validation loss."""
        recall = self.val_recall_percent
        return self.val_top1_percent if recall is None else recall, -self.val_loss

    @property
    def ema_rank(self) -> tuple[float, float]:
        """The same of the moving average; the lowest without one."""
        if self.ema_val_top1_percent is None or self.ema_val_loss is None:
            return -1.0, 0.0
        recall = self.ema_val_recall_percent
        return self.ema_val_top1_percent if recall is None else recall, -self.ema_val_loss

    @property
    def rank(self) -> tuple[float, float]:
        """That of the weights or of their average, whichever is better."""
        return max(self.weights_rank, self.ema_rank)

    def best_figures(self, *, is_ema: bool) -> dict[str, float | None]:
        """What a run's result says of the weights, or of their average."""
        if is_ema:
            return {"best_top1_percent": self.ema_val_top1_percent, "best_recall_percent": self.ema_val_recall_percent}
        return {"best_top1_percent": self.val_top1_percent, "best_recall_percent": self.val_recall_percent}

    def summary(self, *, is_best: bool) -> str:
        """Losses, top-1 and pace."""
        ema = "" if self.ema_val_top1_percent is None else f" (average {self.ema_val_top1_percent:.2f} %)"
        recall = "" if self.val_recall_percent is None else f", mean recall {self.val_recall_percent:.2f} %"
        return (
            f"loss {self.train_loss:.4f}, validation loss {self.val_loss:.4f}, top-1 {self.val_top1_percent:.2f} %{ema}"
            f"{recall}{' (best)' if is_best else ''}, {self.seconds:.1f} s, {self.images_per_second:.0f} images/s"
        )


@dataclass(frozen=True, slots=True)
class MultiLabelRecord(EpochRecord):
    """One epoch of several labels an image; see `TrainingRecord` for what both have. Losses are sums over labels.

    `val_map_percent`: mean average precision over the labels that have validation images, None without any; it ranks
    weights. `val_f1_percent`: micro F1 at the thresholds that were fitted on the same images.
    """

    train_loss: float
    val_loss: float
    val_map_percent: float | None
    val_f1_percent: float | None
    ema_val_loss: float | None
    ema_val_map_percent: float | None
    ema_val_f1_percent: float | None
    learning_rate: float
    seconds: float
    images_per_second: float
    data_wait_percent: float

    @property
    def losses(self) -> tuple[float, float]:
        """Loss in training and in validation."""
        return self.train_loss, self.val_loss

    @property
    def weights_rank(self) -> tuple[float, float]:
        """Greater is better: mean average precision, then validation loss."""
        return self.val_map_percent or 0.0, -self.val_loss

    @property
    def ema_rank(self) -> tuple[float, float]:
        """The same of the moving average; the lowest without one."""
        return (-1.0, 0.0) if self.ema_val_loss is None else (self.ema_val_map_percent or 0.0, -self.ema_val_loss)

    @property
    def rank(self) -> tuple[float, float]:
        """That of the weights or of their average, whichever is better."""
        return max(self.weights_rank, self.ema_rank)

    def best_figures(self, *, is_ema: bool) -> dict[str, float | None]:
        """What a run's result says of the weights, or of their average."""
        return {"best_map_percent": self.ema_val_map_percent if is_ema else self.val_map_percent}

    def summary(self, *, is_best: bool) -> str:
        """Losses, mean average precision, F1 and pace."""
        precision, f1 = (
            "-" if value is None else f"{value:.2f} %" for value in (self.val_map_percent, self.val_f1_percent)
        )
        ema = "" if self.ema_val_map_percent is None else f" (average {self.ema_val_map_percent:.2f} %)"
        return (
            f"loss {self.train_loss:.4f}, validation loss {self.val_loss:.4f}, mAP {precision}{ema}, F1 {f1}"
            f"{' (best)' if is_best else ''}, {self.seconds:.1f} s, {self.images_per_second:.0f} images/s"
        )


@dataclass(frozen=True, slots=True)
class SegmentationRecord(EpochRecord):
    """One epoch of a class for each pixel; see `TrainingRecord` for what all have. Losses are means over pixels.

    `train_loss` is that of both heads, `val_loss` of the one that is deployed. `val_miou_percent`, the mean of the
    classes' intersection over union, ranks weights; `val_pixel_percent` is the share of pixels that are right.
    """

    train_loss: float
    val_loss: float
    val_miou_percent: float
    val_pixel_percent: float
    ema_val_loss: float | None
    ema_val_miou_percent: float | None
    ema_val_pixel_percent: float | None
    learning_rate: float
    seconds: float
    images_per_second: float
    data_wait_percent: float

    @property
    def losses(self) -> tuple[float, float]:
        """Loss in training and in validation."""
        return self.train_loss, self.val_loss

    @property
    def weights_rank(self) -> tuple[float, float]:
        """Greater is better: mIoU, then validation loss."""
        return self.val_miou_percent, -self.val_loss

    @property
    def ema_rank(self) -> tuple[float, float]:
        """The same of the moving average; the lowest without one."""
        if self.ema_val_miou_percent is None or self.ema_val_loss is None:
            return -1.0, 0.0
        return self.ema_val_miou_percent, -self.ema_val_loss

    @property
    def rank(self) -> tuple[float, float]:
        """That of the weights or of their average, whichever is better."""
        return max(self.weights_rank, self.ema_rank)

    def best_figures(self, *, is_ema: bool) -> dict[str, float | None]:
        """What a run's result says of the weights, or of their average."""
        return {"best_miou_percent": self.ema_val_miou_percent if is_ema else self.val_miou_percent}

    def summary(self, *, is_best: bool) -> str:
        """Losses, mIoU, pixel accuracy and pace."""
        ema = "" if self.ema_val_miou_percent is None else f" (average {self.ema_val_miou_percent:.2f} %)"
        return (
            f"loss {self.train_loss:.4f}, validation loss {self.val_loss:.4f}, mIoU {self.val_miou_percent:.2f} %{ema}"
            f", pixels {self.val_pixel_percent:.2f} %{' (best)' if is_best else ''}, {self.seconds:.1f} s, "
            f"{self.images_per_second:.0f} images/s"
        )


@dataclass(frozen=True, slots=True)
class DetectionRecord(EpochRecord):
    """One epoch of detection; see `TrainingRecord` for what all have.

    `train_loss` is the sum of the losses of proposals, classes, boxes and masks; of validation images there is none,
    since proposals are sampled by what is to be found. `val_mask_ap_percent`, COCO's average precision of masks, ranks
    weights, or that of boxes where there are no masks (None).
    """

    train_loss: float
    val_box_ap_percent: float
    val_box_ap50_percent: float
    val_mask_ap_percent: float | None
    ema_val_box_ap_percent: float | None
    ema_val_mask_ap_percent: float | None
    learning_rate: float
    seconds: float
    images_per_second: float
    data_wait_percent: float

    @property
    def losses(self) -> tuple[float, float]:
        """The loss in training, twice: there is no other."""
        return self.train_loss, self.train_loss

    @property
    def weights_rank(self) -> tuple[float, float]:
        """Greater is better: of masks where they are known, then of boxes."""
        masks = self.val_mask_ap_percent
        return self.val_box_ap_percent if masks is None else masks, self.val_box_ap_percent

    @property
    def ema_rank(self) -> tuple[float, float]:
        """The same of the moving average; the lowest without one."""
        boxes, masks = self.ema_val_box_ap_percent, self.ema_val_mask_ap_percent
        return (-1.0, 0.0) if boxes is None else (boxes if masks is None else masks, boxes)

    @property
    def rank(self) -> tuple[float, float]:
        """That of the weights or of their average, whichever is better."""
        return max(self.weights_rank, self.ema_rank)

    def best_figures(self, *, is_ema: bool) -> dict[str, float | None]:
        """What a run's result says of the weights, or of their average."""
        if is_ema:
            return {
                "best_box_ap_percent": self.ema_val_box_ap_percent, "best_mask_ap_percent": self.ema_val_mask_ap_percent
            }  # fmt: skip
        return {"best_box_ap_percent": self.val_box_ap_percent, "best_mask_ap_percent": self.val_mask_ap_percent}

    def summary(self, *, is_best: bool) -> str:
        """Loss, average precision and pace."""
        masks = "" if self.val_mask_ap_percent is None else f", masks {self.val_mask_ap_percent:.2f} %"
        ema = "" if self.ema_val_box_ap_percent is None else f" (average {self.ema_rank[0]:.2f} %)"
        return (
            f"loss {self.train_loss:.4f}, AP of boxes {self.val_box_ap_percent:.2f} %{masks}{ema}"
            f"{' (best)' if is_best else ''}, {self.seconds:.1f} s, {self.images_per_second:.1f} images/s"
        )


@dataclass(frozen=True, slots=True)
class RunResult:
    """A run and how far it came. `best` and `last` are None when no epoch was finished."""

    run_dir: Path
    best: Path | None
    last: Path | None
    metrics: Path
    epochs_run: int
    interrupted: bool

    @classmethod
    def of(cls, run_dir: Path, epochs_run: int, *, best: str = "best", **figures: Any) -> Self:
        """Make the result of a run by the names that its files have."""
        weights = [run_dir / f"{name}.safetensors" if epochs_run else None for name in (best, "last")]
        return cls(run_dir, weights[0], weights[1], run_dir / "metrics.csv", epochs_run, **figures)

    def summary(self) -> str:
        """One line for people."""
        return f"{self.run_dir}: no epoch finished"

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class TrainingResult(RunResult):
    """A training run. `best` is the better of the best weights and the best moving average, where there is one.

    The figures are of those weights, and None where they do not rank them: top-1 and mean recall of a classifier, mean
    average precision of several labels an image, mIoU of a class for each pixel, COCO's average precision of objects.
    """

    best_top1_percent: float | None = None
    best_recall_percent: float | None = None
    best_map_percent: float | None = None
    best_miou_percent: float | None = None
    best_box_ap_percent: float | None = None
    best_mask_ap_percent: float | None = None

    def summary(self) -> str:
        """The best weights and their figures."""
        if self.best is None:
            return RunResult.summary(self)
        if self.best_miou_percent is not None:
            return f"{self.best}: mIoU {self.best_miou_percent:.2f} % after {self.epochs_run} epochs"
        if self.best_box_ap_percent is not None:
            masks = "" if self.best_mask_ap_percent is None else f", of masks {self.best_mask_ap_percent:.2f} %"
            return f"{self.best}: AP of boxes {self.best_box_ap_percent:.2f} %{masks} after {self.epochs_run} epochs"
        if self.best_top1_percent is None:
            precision = "not measured" if self.best_map_percent is None else f"{self.best_map_percent:.2f} %"
            return f"{self.best}: mAP {precision} after {self.epochs_run} epochs"
        recall = "" if self.best_recall_percent is None else f"mean recall {self.best_recall_percent:.2f} %, "
        return f"{self.best}: {recall}top-1 {self.best_top1_percent:.2f} % after {self.epochs_run} epochs"


@dataclass(frozen=True, slots=True)
class StepReport:
    """How far an epoch is. Epochs and steps count from 1; `images_per_second` is the epoch's so far."""

    epoch: int
    step: int
    mean_loss: float
    learning_rate: float
    images_per_second: float


class Progress:
    """Who is told how a run goes. This one says nothing; a subclass overrides what it wants to hear."""

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Training starts or goes on."""

    def step(self, report: StepReport) -> None:
        """A step is done; not every step is reported."""

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """An epoch is done and written."""
