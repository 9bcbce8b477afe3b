"""The classifier as Lightning trains it, and Lightning's Trainer. Importing this module takes the `train` extra."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torchmetrics.classification import MulticlassAccuracy

from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.training.augmentation import BatchMix
from cnx_deploy.training.optimisation import make_optimizer, make_schedule
from cnx_deploy.training.sampling import EpochBatches, mixed_seed
from cnx_deploy.training.spec import TrainingSpec
from cnx_deploy.training.state import check_optimizers, corrupt_state

__all__ = ["Classifier", "EpochFigures", "fit", "quiet_trainer"]

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

UNRESTORABLE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What Lightning and torch raise for a state whose parts are not what they wrote; they check none."""

EpochFigures = dict[str, float | None]
"""The fields of an `EpochRecord` that are learned, by name."""


class Classifier(lightning.LightningModule):
    """Trains a model on batches of (N, S, S, 3) uint8 pixels and (N,) labels, in the order of `batches`.

    Each image of a step of the optimiser weighs the same, whichever process and batch it is in, so accumulated and
    distributed steps are those of one large batch.
    """

    def __init__(self, model: ConvNeXtV2, spec: TrainingSpec, batches: EpochBatches) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last) if spec.channels_last else model
        self.spec = spec
        self.batches = batches
        self.mix = BatchMix(spec.mixup_alpha, spec.cutmix_alpha, model.num_classes)
        self.averaged = None if spec.ema_decay is None else _averaged(self.model, spec.ema_decay)
        classes = model.num_classes
        self.top1 = MulticlassAccuracy(classes, average="micro")
        self.top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes))
        self.ema_top1 = MulticlassAccuracy(classes, average="micro")
        self.sums = {split: torch.zeros(2) for split in ("train", "val", "ema")}  # loss, images
        self._compiled = (torch.compile(self.model),) if spec.compile else ()  # a tuple: no second set of parameters

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start an epoch's sums, and its random numbers (stochastic depth, mixing) from a seed of its own.

        Not in `on_train_epoch_start`, which Lightning leaves out in the first epoch after a resume.
        """
        if batch_idx == 0:
            rank = (self.spec.launch.rank,) if self.spec.launch.rank else ()
            torch.manual_seed(mixed_seed(self.spec.seed, self.current_epoch, 1, *rank))
            self._reset("train")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy with label smoothing, on mixed images where that is asked for."""
        pixels, labels = batch
        images, targets = self.mix(self._images(pixels), labels)
        logits = (self._compiled or (self.model,))[0](images)
        losses = F.cross_entropy(logits, targets, label_smoothing=self.spec.label_smoothing, reduction="none")
        own = losses[: self.batches.own_count(batch_index)]
        self._add("train", own)
        # Lightning divides by the batches of a step, and DDP takes the mean over the processes.
        spread = self.spec.accumulate * self.spec.launch.processes
        return own.sum() * (spread / self.batches.step_count(batch_index))

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Take the step, then move the average."""
        super().optimizer_step(*arguments, **options)
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def on_validation_epoch_start(self) -> None:
        """Start the validation's sums."""
        self._reset("val", "ema")
        for metric in (self.top1, self.top5, self.ema_top1):
            metric.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Cross-entropy without smoothing, top-1 and top-5, of the weights and of their average."""
        pixels, labels = batch
        images = self._images(pixels)
        logits = self.model(images).float()
        self._add("val", F.cross_entropy(logits, labels, reduction="none"))
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)
        if self.averaged is not None:
            logits = self.averaged.module(images).float()
            self._add("ema", F.cross_entropy(logits, labels, reduction="none"))
            self.ema_top1.update(logits, labels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser, and a schedule that moves every step."""
        optimizer = make_optimizer(self.model, self.spec)
        schedule = make_schedule(optimizer, self.spec, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def mean_loss(self) -> float:
        """Mean training loss over this process's images of this epoch so far."""
        loss, images = self.sums["train"].tolist()
        return float(loss / max(1.0, images))

    def epoch_figures(self) -> EpochFigures:
        """What the epoch gave, over all processes; each must call this."""
        losses = {}
        for split, sums in self.sums.items():
            loss, images = self.trainer.strategy.reduce(sums.clone(), reduce_op="sum").tolist()
            losses[split] = loss / max(1.0, images)
        found: EpochFigures = {
            "train_loss": losses["train"],
            "val_loss": losses["val"],
            "val_top1_percent": _percent(self.top1),
            "val_top5_percent": _percent(self.top5),
            "ema_val_loss": None,
            "ema_val_top1_percent": None,
        }
        if self.averaged is not None:
            found.update(ema_val_loss=losses["ema"], ema_val_top1_percent=_percent(self.ema_top1))
        return found

    def _images(self, pixels: Tensor) -> Tensor:
        images = normalise(pixels, self.spec.preprocessing)
        return images.contiguous(
            memory_format=torch.channels_last if self.spec.channels_last else torch.contiguous_format
        )

    def _reset(self, *splits: str) -> None:
        for split in splits:
            self.sums[split] = torch.zeros(2, device=self.device)

    def _add(self, split: str, losses: Tensor) -> None:
        self.sums[split] += torch.stack([losses.detach().sum().float(), losses.new_tensor(len(losses)).float()])


@contextlib.contextmanager
def quiet_trainer(
    spec: TrainingSpec, root: Path, callbacks: Sequence[lightning.Callback]
) -> Iterator[lightning.Trainer]:
    """Lightning's Trainer on this machine's GPU or processor, or one device a process where several were started.

    Its log lines and advice are kept off the terminal; errors still come.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    several = spec.launch.processes > 1
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Its advice on worker counts and logging intervals; those are chosen on purpose here.
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield lightning.Trainer(
                accelerator="auto",
                # One device by itself: with several, Lightning starts this program again for each.
                devices=spec.launch.devices,
                num_nodes=spec.launch.nodes,
                strategy="ddp" if several else "auto",
                precision=PRECISIONS[spec.precision],
                max_epochs=spec.epochs,
                accumulate_grad_batches=spec.accumulate,
                gradient_clip_val=spec.clip_norm,
                deterministic=spec.deterministic or None,
                default_root_dir=root,
                callbacks=list(callbacks),
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
            )
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fit(
    trainer: lightning.Trainer, module: lightning.LightningModule, loaders: tuple[Any, Any], state: Path | None
) -> bool:
    """Run the loop and return whether Ctrl-C ended it, which Lightning turns into SystemExit.

    Raises CorruptArtifactError for a state that Lightning cannot restore; see `state.check_state`.
    """
    start = _Start(state)
    trainer.callbacks.insert(0, start)  # type: ignore[attr-defined]
    try:
        with torch.random.fork_rng():
            trainer.fit(module, *loaders, ckpt_path=state, weights_only=True)
    except SystemExit:
        if not trainer.interrupted:
            raise
        return True
    except UNRESTORABLE as error:
        if state is None or start.is_past or isinstance(error, torch.OutOfMemoryError):
            raise
        raise corrupt_state(state, f"{type(error).__name__}: {error}") from error
    return False


class _Start(lightning.Callback):
    """Knows whether the state is restored and training begins; its last look at the state."""

    def __init__(self, state: Path | None) -> None:
        self.state = state
        self.is_past = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look at what came back."""
        if self.state is not None:
            check_optimizers(trainer.optimizers, self.state)
        self.is_past = True


def _averaged(model: ConvNeXtV2, decay: float) -> AveragedModel:
    """A copy that follows the weights; it follows faster at first, min(decay, (1 + n) / (10 + n)) after n updates.

    Without that a run much shorter than 1 / (1 - decay) steps would end near where it began.
    """

    def follow(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        done = int(updates)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + done) / (10 + done)))

    moving: Callable[..., None] = follow
    return AveragedModel(model, multi_avg_fn=moving).requires_grad_(False)


def _percent(metric: MulticlassAccuracy) -> float:
    return round(100.0 * float(metric.compute()), 4)
