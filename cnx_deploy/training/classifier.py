"""Training on labelled images, and of a classifier, as the shared loop runs it. This module takes the `train` extra."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.training.images import BatchMix
from cnx_deploy.training.loop import Batch, EpochClock, TaskModule
from cnx_deploy.training.records import EpochRecord, TrainingRecord
from cnx_deploy.training.spec import TrainingSpec

__all__ = ["ClassificationModule", "LabelledModule", "RankedRecord", "averaged_model"]


class RankedRecord(Protocol):
    """A record that says how good the weights are, and how good their moving average is; greater is better."""

    weights_rank: tuple[float, float]
    ema_rank: tuple[float, float]


class LabelledModule(TaskModule):
    """The task's loss on mixed and smoothed labels, of the weights and of their moving average; a subclass measures.

    `labels`: the class of each training image, for balanced sampling. `weights`: what an image of each class weighs in
    the loss; it is no part of the state. The loss of a step is a mean over its images, as torch's is for mixed targets;
    for plain ones torch divides by the sum of their weights, which would make a step of one class alone the same
    whatever it weighs.
    """

    model: ConvNeXtV2
    class_weights: Tensor | None

    def __init__(
        self, model: ConvNeXtV2, spec: TrainingSpec, train_images: int, metadata: dict[str, Any], *,
        labels: Sequence[int] = (), weights: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        kept = model.to(memory_format=torch.channels_last) if spec.channels_last else model
        drawn_by = labels if spec.sampling == "balanced" else None
        super().__init__(kept, spec, train_images, ("train", "val", "ema"), metadata, drawn_by)
        self.loss_options: dict[str, Any] = {"label_smoothing": spec.label_smoothing, **spec.loss_options}
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)
        model.task.check_loss_takes((*self.loss_options, *(() if weights is None else ("class_weights",))))
        self.mix = BatchMix(spec.mixup_alpha, spec.cutmix_alpha, model.num_classes)
        self.averaged = None if spec.ema_decay is None else averaged_model(kept, spec.ema_decay)
        of_weights = partial(self.logits, kept)
        self._logits = torch.compile(of_weights) if spec.compile else of_weights

    def logits(self, network: ConvNeXtV2, images: Tensor) -> Tensor:
        """Run the network on normalised images (N, C, H, W): (N, classes)."""
        return cast(Tensor, network(images))

    def measure(self, split: str, logits: Tensor, targets: Tensor) -> None:
        """Count a batch of validation images for the weights ("val") or for their average ("ema")."""
        raise NotImplementedError

    def batch_losses(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss with label smoothing, on mixed images where that is asked for: (N,)."""
        pixels, labels = batch
        images, targets = self.mix(self.network_input(pixels), labels)
        outputs = {"logits": self._logits(images)}
        weighting: dict[str, Any] = {} if self.class_weights is None else {"class_weights": self.class_weights}
        return self.model.task.loss(outputs, targets, **self.loss_options, **weighting)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Take the step, then move the average."""
        super().optimizer_step(*arguments, **options)
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """The plain loss, whatever the training loss is, and the metrics, of the weights and of their average."""
        pixels, targets = batch
        images = self.network_input(pixels)
        networks = {"val": self.model}
        if self.averaged is not None:
            networks["ema"] = cast(ConvNeXtV2, self.averaged.module)
        for split, network in networks.items():
            logits = self.logits(network, images).float()
            self.add(split, self.model.task.loss({"logits": logits}, targets))
            self.measure(split, logits, targets)

    def networks(self, records: list[EpochRecord]) -> Iterator[tuple[str, ConvNeXtV2, bool]]:
        """The weights, and their moving average as `-ema`; each has a best epoch of its own."""
        *before, newest = cast(list[RankedRecord], records)
        yield "", self.model, all(newest.weights_rank > record.weights_rank for record in before)
        if self.averaged is not None:
            average = cast(ConvNeXtV2, self.averaged.module)
            yield "-ema", average, all(newest.ema_rank > record.ema_rank for record in before)

    def network_input(self, pixels: Tensor) -> Tensor:
        """(N, S, S, 3) uint8 -> (N, 3, S, S) normalised, in the memory format of the kernels."""
        images = normalise(pixels, self.spec.preprocessing)
        return images.contiguous(
            memory_format=torch.channels_last if self.spec.channels_last else torch.contiguous_format
        )


class ClassificationModule(LabelledModule):
    """Cross-entropy or focal loss; top-1 and top-5, and mean recall where classes are evened out."""

    record_type = TrainingRecord

    def __init__(
        self, model: ConvNeXtV2, spec: TrainingSpec, train_images: int, metadata: dict[str, Any], **data: Any
    ) -> None:
        super().__init__(model, spec, train_images, metadata, **data)
        classes = model.num_classes
        self.top1 = MulticlassAccuracy(classes, average="micro")
        self.top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes))
        self.ema_top1 = MulticlassAccuracy(classes, average="micro")
        self.confusion = MulticlassConfusionMatrix(classes) if spec.is_balanced else None
        self.ema_confusion = MulticlassConfusionMatrix(classes) if spec.is_balanced else None

    def on_validation_epoch_start(self) -> None:
        """Start the validation's sums and metrics."""
        super().on_validation_epoch_start()
        for metric in (self.top1, self.top5, self.ema_top1, self.confusion, self.ema_confusion):
            if metric is not None:
                metric.reset()

    def measure(self, split: str, logits: Tensor, targets: Tensor) -> None:
        """Count top-1, of the weights top-5 too, and confusions."""
        metrics = (self.top1, self.top5, self.confusion) if split == "val" else (self.ema_top1, self.ema_confusion)
        for metric in metrics:
            if metric is not None:
                metric.update(logits, targets)

    def epoch_record(self, losses: dict[str, float], rate: float, clock: EpochClock) -> TrainingRecord:
        """Losses and accuracy over all processes; each must call this."""
        has_average = self.averaged is not None
        return TrainingRecord(
            epoch=self.current_epoch + 1,
            train_loss=losses["train"],
            val_loss=losses["val"],
            val_top1_percent=_percent(self.top1),
            val_top5_percent=_percent(self.top5),
            ema_val_loss=losses["ema"] if has_average else None,
            ema_val_top1_percent=_percent(self.ema_top1) if has_average else None,
            learning_rate=rate,
            seconds=clock.seconds,
            images_per_second=clock.images_per_second,
            data_wait_percent=clock.wait_percent,
            val_recall_percent=_mean_recall(self.confusion),
            ema_val_recall_percent=_mean_recall(self.ema_confusion) if has_average else None,
        )


def averaged_model(model: torch.nn.Module, decay: float) -> AveragedModel:
    """Copy a model into one that follows its weights, by min(decay, (1 + n) / (10 + n)) after n updates.

    It follows faster at first: without that a run much shorter than 1 / (1 - decay) steps would end near where it
    began.
    """

    def follow(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        done = int(updates)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + done) / (10 + done)))

    moving: Callable[..., None] = follow
    return AveragedModel(model, multi_avg_fn=moving).requires_grad_(False)


def _percent(metric: MulticlassAccuracy) -> float:
    return round(100.0 * float(metric.compute()), 4)


def _mean_recall(metric: MulticlassConfusionMatrix | None) -> float | None:
    """Mean over the classes that have images of the share of them that is named so, in percent."""
    if metric is None:
        return None
    matrix = metric.compute().double()  # (true class, class named)
    images = matrix.sum(dim=1)
    return round(100.0 * float((matrix.diagonal()[images > 0] / images[images > 0]).mean()), 4)
