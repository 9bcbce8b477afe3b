"""Masked pre-training, as the shared loop runs it. Importing this module takes the `train` extra."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.data import Dataset
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.training.distributed import mixed_seed
from cnx_deploy.training.fcmae.autoencoder import MaskedAutoencoder, save_reconstructions
from cnx_deploy.training.fcmae.masking import masked_losses, random_masks
from cnx_deploy.training.fcmae.spec import PretrainingRecord, PretrainingSpec
from cnx_deploy.training.loop import Batch, EpochClock, TaskModule
from cnx_deploy.training.records import EpochRecord

__all__ = ["PretrainingModule"]

MASKS, HELD = 2, 3
"""Tell the seeds of a step's masks and of the held images' masks from those of the order of images."""
PICTURED = 8
"""Rows of a picture."""


class PretrainingModule(TaskModule):
    """Mean squared error of hidden patches, in training and on held images under masks that stay the same.

    Masks are drawn for a step's images of all processes together, from the seed, the epoch and the step.
    """

    record_type = PretrainingRecord
    reports_next_rate = False  # after the last step it is zero
    model: MaskedAutoencoder

    def __init__(
        self, model: MaskedAutoencoder, spec: PretrainingSpec, images: Dataset, metadata: dict[str, Any]
    ) -> None:
        super().__init__(model, spec.training, len(images.train.paths), ("train", "held"), metadata)
        self.masked = spec
        self.mine = slice(spec.launch.rank, None, spec.launch.processes)  # this process's images of all
        generator = torch.Generator().manual_seed(mixed_seed(spec.seed, HELD))
        self.held = images.val.subset(range(len(images.val))[self.mine])
        joint = random_masks(len(images.val.paths), spec.grid, spec.mask_ratio, generator)
        self.held_masks = joint[self.mine]  # (held, h, w)

    def batch_losses(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of each image under its mask of this step: (N,)."""
        return self._losses(batch[0], self.masks_of(batch_index, len(batch[0])))

    def masks_of(self, batch_index: int, count: int) -> Tensor:
        """This process's `count` masks in a batch of the current epoch: (count, h, w)."""
        generator = torch.Generator().manual_seed(mixed_seed(self.spec.seed, self.current_epoch, batch_index, MASKS))
        joint = random_masks(self.batches.joint_size, self.masked.grid, self.masked.mask_ratio, generator)
        return joint[self.mine][:count]

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """The loss of held images under their own masks."""
        start = batch_index * self.spec.validation_batch_size
        self.add("held", self._losses(batch[0], self.held_masks[start : start + len(batch[0])]))

    def epoch_record(self, losses: dict[str, float], rate: float, clock: EpochClock) -> PretrainingRecord:
        """Both losses over all processes."""
        return PretrainingRecord(
            epoch=self.current_epoch + 1,
            loss=losses["train"],
            held_loss=losses["held"],
            learning_rate=rate,
            images_per_second=clock.images_per_second,
            seconds=clock.seconds,
        )

    def networks(self, records: list[EpochRecord]) -> Iterator[tuple[str, ConvNeXtV2, bool]]:
        """The encoder."""
        *before, newest = records
        yield "", self.model.encoder, all(newest.rank > record.rank for record in before)

    def draw(self, run_dir: Path, epoch: int) -> None:
        """Draw reconstructions of held images after the first epoch, the last, and every so many between."""
        is_due = epoch % self.masked.resolved_picture_every == 0 or epoch in (1, self.spec.epochs)
        count = min(PICTURED, len(self.held))
        if is_due and count:
            # Spread over the list: the files of a class stand together.
            chosen = [at * len(self.held) // count for at in range(count)]
            preprocessing = self.spec.preprocessing
            pixels = torch.stack([self.held.pixels(at, preprocessing) for at in chosen])
            path = run_dir / "reconstructions" / f"epoch-{epoch:04}.png"
            save_reconstructions(path, self.model, preprocessing, pixels, self.held_masks[chosen])

    def _losses(self, pixels: Tensor, masks: Tensor) -> Tensor:
        images = normalise(pixels, self.spec.preprocessing)
        masks = masks.to(images.device)
        return masked_losses(self.model(images, masks), images, masks)
