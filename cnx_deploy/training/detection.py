"""Training boxes and masks of objects, as the shared loop runs it. Importing this module takes the `train` extra."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cnx_deploy.core.errors import InputError
from cnx_deploy.data import Dataset, InstanceFiles
from cnx_deploy.data.bands import picture_of
from cnx_deploy.data.label_maps import save_picture, sheet
from cnx_deploy.data.object_pictures import DRAWN_FROM, drawn_objects
from cnx_deploy.data.preprocessing import cropped
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.tasks.detection import training_losses
from cnx_deploy.model.tasks.detection_metrics import DetectionEvaluation, RunningDetections, coco_metric, on_picture
from cnx_deploy.training.classifier import LabelledModule
from cnx_deploy.training.dense_images import DenseTrainingImages
from cnx_deploy.training.images import ValidationImages, make_loader
from cnx_deploy.training.loop import EpochClock
from cnx_deploy.training.records import DetectionRecord
from cnx_deploy.training.spec import TrainingSpec

__all__ = ["DetectionModule"]

PICTURED = 6
"""Validation images of a picture of the run."""


class DetectionModule(LabelledModule):
    """torchvision's losses of proposals, classes, boxes and masks; COCO's average precision of validation images.

    The pictures of an epoch are validation images with their objects, and with what the network finds.
    """

    record_type = DetectionRecord

    def __init__(
        self, model: ConvNeXtV2, spec: TrainingSpec, train_images: int, metadata: dict[str, Any], **data: Any
    ) -> None:
        super().__init__(model, spec, train_images, metadata, **data)
        coco_metric(masks=False)  # an extra that is missing is said before the first epoch
        self.names: tuple[str, ...] = tuple(metadata["class_names"])
        self.running: dict[str, RunningDetections] = {}
        self.held: InstanceFiles | None = None
        outputs = partial(model.training_outputs)
        self._outputs = torch.compile(outputs) if spec.compile else outputs

    def loaders(self, images: Dataset) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Augmented images with their objects, and validation images on the canvas.

        Raises InputError where masks are to be learned and objects have no outlines.
        """
        train, val = images.train, images.val
        assert isinstance(train, InstanceFiles)
        assert isinstance(val, InstanceFiles)
        if cast(Any, self.model.task.config).masks and not (train.has_outlines and val.has_outlines):
            raise InputError(
                "The objects have boxes but no outlines, so that masks cannot be learned. Train without masks "
                "(--task-option masks=false, task_options)."
            )
        self.held = val
        trained, count = DenseTrainingImages(train, self.spec), self.spec.validation_batch_size
        return (
            make_loader(trained, self.batches, self.spec, _batch_of),
            make_loader(ValidationImages(val, self.spec), count, self.spec, _batch_of),
        )

    def batch_losses(self, batch: Any, batch_index: int) -> Tensor:
        """The sum of all losses, each a mean over what is sampled of the batch, for every image: (N,)."""
        pixels, targets = batch
        images = self.network_input(pixels)
        outputs = self._outputs(images)
        maps = {level: outputs[f"stage{level}"] for level in range(4)}
        losses = training_losses(self.model, maps, (images.shape[-2], images.shape[-1]), targets)
        return torch.stack(list(losses.values())).sum().expand(len(pixels))

    def on_validation_epoch_start(self) -> None:
        """Start the validation's counts."""
        super().on_validation_epoch_start()
        self.running = {split: RunningDetections(self.names) for split in self._networks()}

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Count what the weights find, and what their average does."""
        pixels, targets = batch
        images = self.network_input(pixels)
        for split, network in self._networks().items():
            with torch.autocast(images.device.type, enabled=False):  # what decides is in FP32, as where it is deployed
                outputs = network.forward_outputs(images)
            self.running[split].add(outputs, targets, [""] * len(pixels))

    def epoch_record(self, losses: dict[str, float], rate: float, clock: EpochClock) -> DetectionRecord:
        """Loss and average precision over all processes; each must call this."""
        found = {split: running.result() for split, running in self.running.items()}
        average = found.get("ema")
        return DetectionRecord(
            epoch=self.current_epoch + 1,
            train_loss=losses["train"],
            val_box_ap_percent=_percent(found["val"], "boxes", "AP") or 0.0,
            val_box_ap50_percent=_percent(found["val"], "boxes", "AP50") or 0.0,
            val_mask_ap_percent=_percent(found["val"], "masks", "AP"),
            ema_val_box_ap_percent=None if average is None else _percent(average, "boxes", "AP"),
            ema_val_mask_ap_percent=None if average is None else _percent(average, "masks", "AP"),
            learning_rate=rate,
            seconds=clock.seconds,
            images_per_second=clock.images_per_second,
            data_wait_percent=clock.wait_percent,
        )

    def draw(self, run_dir: Path, epoch: int) -> None:
        """Draw predictions after the first epoch, the last, and about ten between."""
        if self.held is None or not (epoch % max(1, self.spec.epochs // 10) == 0 or epoch in (1, self.spec.epochs)):
            return
        if self.spec.in_chans in (1, 3):
            save_picture(run_dir / "predictions" / f"epoch-{epoch:04}.png", sheet(list(self._rows(self.held))))

    def _networks(self) -> dict[str, ConvNeXtV2]:
        """The weights, and their moving average where there is one."""
        networks = {"val": self.model}
        if self.averaged is not None:
            networks["ema"] = cast(ConvNeXtV2, self.averaged.module)
        return networks

    def _rows(self, held: InstanceFiles) -> Iterator[list[Any]]:
        """A picture with its objects and with what is found, both as the canvas shows them."""
        count, training, preprocessing = min(PICTURED, len(held)), self.model.training, self.spec.preprocessing
        self.model.eval()
        for index in (at * len(held) // count for at in range(count)):
            pixels, target = held.sample(index, preprocessing)
            with torch.no_grad():
                outputs = self.model.forward_outputs(self.network_input(pixels[None].to(self.device)))
            found = on_picture({name: output[0].cpu() for name, output in outputs.items()}, target)
            sure = found["scores"] >= DRAWN_FROM
            picture = held.image(index, self.spec.white_level, self.spec.in_chans)
            cells = []
            for objects in (target, {name: each[sure] for name, each in found.items()}):
                drawn = drawn_objects(picture, objects, self.names)
                cells.append(cropped(picture_of(drawn, None, 3), preprocessing.for_channels(3)).numpy())
            yield cells
        self.model.train(training)


def _batch_of(samples: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Pixels (N, H, W, C) and a target an image: objects are of any number."""
    pixels, targets = zip(*samples, strict=True)
    return torch.stack(pixels), list(targets)


def _percent(evaluation: DetectionEvaluation, kind: str, name: str) -> float | None:
    """None where there are no masks, or no objects."""
    rate = evaluation.figures.get(kind, {}).get(name, math.nan)
    return None if math.isnan(rate) else round(100.0 * rate, 4)
