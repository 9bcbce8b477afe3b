"""Pre-training as Lightning runs it, and what is written after an epoch. Importing this takes the `train` extra."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from cnx_deploy.core.errors import TrainingError
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.training.fcmae.autoencoder import MaskedAutoencoder
from cnx_deploy.training.fcmae.masking import random_masks
from cnx_deploy.training.fcmae.patches import masked_losses
from cnx_deploy.training.fcmae.records import PretrainingProgress, PretrainingRecord
from cnx_deploy.training.fcmae.spec import PretrainingSpec
from cnx_deploy.training.optimisation import cosine_with_warmup, make_optimizer
from cnx_deploy.training.sampling import EpochBatches, mixed_seed
from cnx_deploy.training.writer import RunWriter

__all__ = ["Pretrainer", "PretrainingWriter"]

MASKS = 2
"""Tells the masks' seeds from those of the order of images."""
WriteEpoch = Callable[[MaskedAutoencoder, list[PretrainingRecord], bool], None]
"""Gets the model, all records, and whether the newest is the best."""


class Pretrainer(lightning.LightningModule):
    """Trains an autoencoder on batches of (N, S, S, 3) uint8 pixels, in the order of `batches`.

    Masks are drawn for a step's images of all processes together, from the seed, the epoch and the step. Each image of
    a step of the optimiser weighs the same. `held_masks`: (images, h, w), those of this process's held images.
    """

    def __init__(
        self, model: MaskedAutoencoder, spec: PretrainingSpec, batches: EpochBatches, held_masks: Tensor
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.batches = batches
        self.held_masks = held_masks
        self.sums = {split: torch.zeros(2) for split in ("train", "held")}  # loss, images

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start an epoch's sums; Lightning leaves out `on_train_epoch_start` in the first epoch after a resume."""
        if batch_idx == 0:
            self.sums["train"] = torch.zeros(2, device=self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Mean squared error of the hidden patches."""
        pixels, _ = batch
        losses = self._losses(pixels, self.masks_of(batch_index, len(pixels)))
        own = losses[: self.batches.own_count(batch_index)]
        self._add("train", own)
        # Lightning divides by the batches of a step, and DDP takes the mean over the processes.
        spread = self.spec.accumulate * self.spec.launch.processes
        return own.sum() * (spread / self.batches.step_count(batch_index))

    def masks_of(self, batch_index: int, count: int) -> Tensor:
        """This process's `count` masks in a batch of the current epoch: (count, h, w)."""
        generator = torch.Generator().manual_seed(mixed_seed(self.spec.seed, self.current_epoch, batch_index, MASKS))
        joint = random_masks(self.batches.joint_size, self.spec.grid, self.spec.mask_ratio, generator)
        launch = self.spec.launch
        return joint[launch.rank :: launch.processes][:count]

    def on_validation_epoch_start(self) -> None:
        """Start the held images' sums."""
        self.sums["held"] = torch.zeros(2, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """The loss of held images under their own masks."""
        pixels, _ = batch
        start = batch_index * held_batch_size(self.spec)
        self._add("held", self._losses(pixels, self.held_masks[start : start + len(pixels)]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and the learning rate: a linear rise, then half a cosine down to zero."""
        optimizer = make_optimizer(self.model, self.spec.training)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(steps * self.spec.resolved_warmup_epochs / self.spec.epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(steps, warmup, 0.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def mean_loss(self) -> float:
        """Mean training loss over this process's images of this epoch so far."""
        return _mean(self.sums["train"])

    def epoch_losses(self) -> tuple[float, float]:
        """Training and held loss over all processes; each must call this."""
        reduce = self.trainer.strategy.reduce
        train, held = (_mean(reduce(self.sums[split].clone(), reduce_op="sum")) for split in ("train", "held"))
        return train, held

    def _losses(self, pixels: Tensor, masks: Tensor) -> Tensor:
        images = normalise(pixels, self.spec.preprocessing)
        masks = masks.to(images.device)
        return masked_losses(self.model(images, masks), images, masks)

    def _add(self, split: str, losses: Tensor) -> None:
        self.sums[split] += torch.stack([losses.detach().sum().float(), losses.new_tensor(len(losses)).float()])


class PretrainingWriter(RunWriter[PretrainingRecord]):
    """Of an autoencoder; see `RunWriter`. `write_epoch` gets the model, all records, and whether the newest is best."""

    record_type = PretrainingRecord

    def __init__(
        self, run_dir: Path, batches: EpochBatches, write_epoch: WriteEpoch, progress: PretrainingProgress
    ) -> None:
        super().__init__(run_dir, batches, progress)
        self.write_epoch = write_epoch
        self.learning_rate = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the rate of the step, which afterwards is the next one's: the last would be zero."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.learning_rate = super().rate(trainer)

    def rate(self, trainer: lightning.Trainer) -> float:
        """That of the last step."""
        return self.learning_rate

    def finish_epoch(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> tuple[PretrainingRecord, bool]:
        """Both losses; TrainingError when one is no number any more."""
        if not isinstance(module, Pretrainer):
            raise TypeError(f"{type(module).__name__} is not a Pretrainer")
        epoch, (loss, held_loss) = trainer.current_epoch + 1, module.epoch_losses()
        if not (math.isfinite(loss) and math.isfinite(held_loss)):
            raise TrainingError(
                f"In epoch {epoch} the loss became {loss} (held images {held_loss}). Start again with a lower "
                "learning rate; what the epochs before wrote is kept."
            )
        speed, seconds = self.clock.images_per_second, self.clock.seconds
        record = PretrainingRecord(epoch, loss, held_loss, self.learning_rate, speed, seconds)
        is_best = all(held_loss < before.held_loss for before in self.records)
        self.records.append(record)
        if trainer.is_global_zero:
            self.write_epoch(module.model, self.records, is_best)
        return record, is_best


def held_batch_size(spec: PretrainingSpec) -> int:
    """Held images of a step: no gradients are kept, so twice as many fit."""
    return 2 * spec.batch_size


def _mean(sums: Tensor) -> float:
    loss, images = sums.tolist()
    return float(loss / max(1.0, images))
