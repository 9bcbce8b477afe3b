"""Training a class for each pixel, as the shared loop runs it. Importing this module takes the `train` extra."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from cnx_deploy.core.class_names import NOT_COUNTED
from cnx_deploy.core.errors import InputError
from cnx_deploy.data import Dataset, SegmentationFiles
from cnx_deploy.data.label_maps import overlaid, save_picture, sheet
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.tasks.segmentation_metrics import labels_of, mean_iou
from cnx_deploy.training.classifier import LabelledModule
from cnx_deploy.training.dense_images import DenseTrainingImages
from cnx_deploy.training.images import ValidationImages, make_loader
from cnx_deploy.training.loop import Batch, EpochClock
from cnx_deploy.training.records import SegmentationRecord
from cnx_deploy.training.spec import TrainingSpec

__all__ = ["SegmentationModule"]

PICTURED = 6
"""Validation images of a picture of the run."""


class SegmentationModule(LabelledModule):
    """Cross-entropy of each counted pixel of both heads; mIoU and pixel accuracy of the validation images.

    The pictures of an epoch are validation images, their masks and what the network says, as overlays.
    """

    record_type = SegmentationRecord

    def __init__(
        self, model: ConvNeXtV2, spec: TrainingSpec, train_images: int, metadata: dict[str, Any], **data: Any
    ) -> None:
        super().__init__(model, spec, train_images, metadata, **data)
        self.matrices = torch.nn.ModuleDict(
            {split: MulticlassConfusionMatrix(model.num_classes, ignore_index=NOT_COUNTED) for split in ("val", "ema")}
        )
        self.held: SegmentationFiles | None = None
        outputs = partial(model.training_outputs)
        self._outputs = torch.compile(outputs) if spec.compile else outputs
        alone = [at for at in range(len(self.batches)) if self.batches.own_count(at) == 1]
        if alone:
            raise InputError(
                f"{train_images} images in batches of {spec.batch_size} leave a batch of one image, of which pyramid "
                "pooling makes one value a channel, and batch norm takes two. Choose another --batch-size (batch_size)."
            )

    def loaders(self, images: Dataset) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Pairs of augmented images and masks, and validation images on the canvas."""
        assert isinstance(images.train, SegmentationFiles)
        assert isinstance(images.val, SegmentationFiles)
        self.held = images.val
        trained = DenseTrainingImages(images.train, self.spec)
        return (
            make_loader(trained, self.batches, self.spec),
            make_loader(ValidationImages(images.val, self.spec), self.spec.validation_batch_size, self.spec),
        )

    def batch_losses(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of both heads: (N,)."""
        pixels, targets = batch
        outputs = self._outputs(self.network_input(pixels))
        return self.model.task.loss(outputs, targets, **self.loss_options)

    def logits(self, network: ConvNeXtV2, images: Tensor) -> Tensor:
        """Run the network on normalised images (N, C, H, W): (N, K, H/4, W/4)."""
        return network.forward_outputs(images, ("logits",))["logits"]

    def on_validation_epoch_start(self) -> None:
        """Start the validation's sums and matrices."""
        super().on_validation_epoch_start()
        for matrix in self.matrices.values():
            cast(MulticlassConfusionMatrix, matrix).reset()

    def measure(self, split: str, logits: Tensor, targets: Tensor) -> None:
        """Count pixels at the size of the canvas, image by image: full logits of 150 classes have 157 MB at 512 px."""
        matrix = cast(MulticlassConfusionMatrix, self.matrices[split])
        for own, target in zip(torch.split(logits, 1), torch.split(targets, 1), strict=True):
            matrix.update(labels_of({"logits": own}, tuple(target.shape[-2:])), target)

    def epoch_record(self, losses: dict[str, float], rate: float, clock: EpochClock) -> SegmentationRecord:
        """Losses and metrics over all processes; each must call this."""
        figures: dict[str, tuple[float | None, float | None]] = {"ema": (None, None)}
        for split in ("val", "ema") if self.averaged is not None else ("val",):
            counts = cast(MulticlassConfusionMatrix, self.matrices[split]).compute().cpu()
            right = float(counts.diagonal().sum()) / max(1, int(counts.sum()))
            figures[split] = (round(100.0 * mean_iou(counts), 4), round(100.0 * right, 4))
        return SegmentationRecord(
            epoch=self.current_epoch + 1,
            train_loss=losses["train"],
            val_loss=losses["val"],
            val_miou_percent=cast(float, figures["val"][0]),
            val_pixel_percent=cast(float, figures["val"][1]),
            ema_val_loss=losses["ema"] if self.averaged is not None else None,
            ema_val_miou_percent=figures["ema"][0],
            ema_val_pixel_percent=figures["ema"][1],
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

    def _rows(self, held: SegmentationFiles) -> Iterator[list[Any]]:
        """The canvas, its mask over it and the prediction over it, for images spread over the list."""
        count = min(PICTURED, len(held))
        training = self.model.training
        self.model.eval()
        for index in (at * len(held) // count for at in range(count)):
            pixels, target = held.sample(index, self.spec.preprocessing)
            with torch.no_grad():
                logits = self.logits(self.model, self.network_input(pixels[None].to(self.device)))
            labels = labels_of({"logits": logits}, tuple(target.shape))[0].cpu()
            labels = torch.where(target == NOT_COUNTED, NOT_COUNTED, labels)
            picture = pixels.numpy()
            plain = overlaid(picture, target.numpy(), 0.0)
            yield [plain, overlaid(picture, target.numpy()), overlaid(picture, labels.numpy())]
        self.model.train(training)
