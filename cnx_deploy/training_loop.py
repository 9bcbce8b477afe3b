"""The recipe on Lightning: loss, optimiser, schedule, and what is written after each epoch.

Importing this module takes the `train` extra. Source of the recipe: Woo et al., arXiv:2301.00808, appendix A.1
(AdamW, cosine schedule with linear warm-up, no weight decay on norms, biases and GRN).
"""

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from cnx_deploy.data import Preprocessing
from cnx_deploy.errors import TrainingError
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.training_data import EpochSampler, mixed_seed
from cnx_deploy.training_spec import EpochRecord, Progress, TrainingSpec

__all__ = ["Classifier", "EpochWriter", "quiet_trainer"]

MOMENTUM = 0.9
FINAL_LEARNING_RATE = 0.01
"""Where the cosine ends, as a share of the learning rate."""
REPORT_EVERY_STEPS = 10
"""Reading the loss waits for the GPU, so it is not read every step."""
PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Classifier(lightning.LightningModule):
    """Trains a model on batches of (N, S, S, 3) uint8 pixels and (N,) labels."""

    def __init__(self, model: ConvNeXtV2, spec: TrainingSpec, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.preprocessing = preprocessing
        self.top1 = MulticlassAccuracy(model.num_classes, average="micro")
        self.loss_sums = {"train": torch.zeros(()), "val": torch.zeros(())}
        self.image_counts = {"train": 0, "val": 0}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start an epoch's sums, and its random numbers (stochastic depth) from a seed of its own.

        Not in `on_train_epoch_start`, which Lightning leaves out in the first epoch after a resume.
        """
        if batch_idx == 0:
            torch.manual_seed(mixed_seed(self.spec.seed, self.current_epoch, 1))
            self._reset("train")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy with label smoothing."""
        pixels, labels = batch
        logits = self.model(self.preprocessing.normalise(pixels))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.spec.label_smoothing)
        self._add("train", loss, len(labels))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the validation's sums."""
        self._reset("val")
        self.top1.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Cross-entropy without smoothing, and top-1."""
        pixels, labels = batch
        logits = self.model(self.preprocessing.normalise(pixels)).float()
        self._add("val", F.cross_entropy(logits, labels), len(labels))
        self.top1.update(logits, labels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser, and a schedule that moves every step."""
        spec = self.spec
        groups = parameter_groups(self.model, spec.weight_decay)
        rate = spec.resolved_learning_rate
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, rate, fused=True)  # 2.8 instead of 8.6 ms a step for atto on two cores
            if spec.optimizer == "adamw"
            else torch.optim.SGD(groups, rate, momentum=MOMENTUM, fused=True)
        )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(total * spec.resolved_warmup_epochs / spec.epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(total, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def mean_loss(self, split: str) -> float:
        """Mean over the images of this epoch so far."""
        return float(self.loss_sums[split]) / max(1, self.image_counts[split])

    def _reset(self, split: str) -> None:
        self.loss_sums[split] = torch.zeros((), device=self.device)
        self.image_counts[split] = 0

    def _add(self, split: str, loss: Tensor, count: int) -> None:
        self.loss_sums[split] += loss.detach() * count
        self.image_counts[split] += count


class EpochWriter(lightning.Callback):
    """After each epoch: its record, the weights, and last of all the state to resume from.

    `sampler` is told the epoch on resume, before Lightning fetches the first batch, which it does before it tells it.
    `write_epoch` gets all records and whether the last is the best so far; `resume_path` is where the state goes. The
    state is also written before the first step, so a run can be resumed from its beginning.
    """

    def __init__(
        self,
        resume_path: Path,
        sampler: EpochSampler,
        write_epoch: Callable[[list[EpochRecord], bool], None],
        progress: Progress,
    ) -> None:
        self.sampler = sampler
        self.resume_path = resume_path
        self.write_epoch = write_epoch
        self.progress = progress
        self.records: list[EpochRecord] = []
        self.started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps with the state: the records."""
        return {"records": [record.to_dict() for record in self.records]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the records back."""
        self.records = [EpochRecord(**values) for values in state_dict["records"]]
        self.sampler.set_epoch(len(self.records))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the initial state of a fresh run."""
        self.progress.begin(trainer.max_epochs or 0, int(trainer.num_training_batches), len(self.records))
        if not self.resume_path.exists():
            trainer.save_checkpoint(self.resume_path)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the epoch's clock."""
        if batch_idx == 0:
            self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report how far the epoch is."""
        if batch_idx % REPORT_EVERY_STEPS == 0 and isinstance(pl_module, Classifier):
            self.progress.step(trainer.current_epoch + 1, batch_idx + 1, pl_module.mean_loss("train"))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the epoch and write; TrainingError when the loss is no number any more."""
        if not isinstance(pl_module, Classifier):
            raise TypeError(f"{type(pl_module).__name__} is not a Classifier")
        record = EpochRecord(
            epoch=trainer.current_epoch + 1,
            train_loss=pl_module.mean_loss("train"),
            val_loss=pl_module.mean_loss("val"),
            val_top1_percent=round(100.0 * float(pl_module.top1.compute()), 4),
            learning_rate=float(trainer.optimizers[0].param_groups[0]["lr"]),
            seconds=time.perf_counter() - self.started,
        )
        if not (math.isfinite(record.train_loss) and math.isfinite(record.val_loss)):
            raise TrainingError(
                f"In epoch {record.epoch} the loss became {record.train_loss} (validation {record.val_loss}). "
                "Train again with a lower --learning-rate; what the epochs before wrote is kept."
            )
        is_best = all(record.rank > before.rank for before in self.records)
        self.records.append(record)
        self.write_epoch(self.records, is_best)
        trainer.save_checkpoint(self.resume_path)
        self.progress.end_epoch(record, is_best)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels with weight decay; norms, biases and GRN without."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (kept if parameter.ndim <= 1 or ".grn." in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def cosine_with_warmup(total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate at a step: linear up to 1, then half a cosine down to FINAL_LEARNING_RATE."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return FINAL_LEARNING_RATE + (1.0 - FINAL_LEARNING_RATE) * 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


@contextlib.contextmanager
def quiet_trainer(spec: TrainingSpec, root: Path, writer: EpochWriter) -> Iterator[lightning.Trainer]:
    """Lightning's Trainer on one device, with its log lines and advice kept off the terminal; errors still come.

    One device: with several, Lightning starts this program again for each.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Its advice on worker counts and logging intervals; those are chosen on purpose here.
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield lightning.Trainer(
                accelerator="auto",
                devices=1,
                precision=PRECISIONS[spec.precision],
                max_epochs=spec.epochs,
                default_root_dir=root,
                callbacks=[writer],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
