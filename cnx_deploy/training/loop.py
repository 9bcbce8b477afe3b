"""The loop that training and pre-training share, on Lightning. Importing this module takes the `train` extra.

`TaskModule` has the sums of losses, the weighting of images and the optimiser; `RunWriter` writes the files of a run
after each epoch; `run_task` brings both together with a state to resume from.
"""

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from cnx_deploy.core.errors import MissingRequirementError, TrainingError
from cnx_deploy.core.files import write_text
from cnx_deploy.core.strict_json import typed
from cnx_deploy.data import Dataset
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.training.distributed import EpochBatches, mixed_seed
from cnx_deploy.training.images import ImageAugmentation, TrainingImages, ValidationImages, make_loader
from cnx_deploy.training.metrics import TABLE, table_of
from cnx_deploy.training.optimisation import make_optimizer, make_schedule
from cnx_deploy.training.records import EpochRecord, Progress, StepReport
from cnx_deploy.training.run_folder import check_state, corrupt_state, keep_state, usable_state
from cnx_deploy.training.spec import TrainingSpec

__all__ = ["Batch", "EpochClock", "RunWriter", "TaskModule", "run_task"]

Batch = tuple[Tensor, Tensor]
"""(N, H, W, C) uint8 pixels and (N,) int64 labels, (N, labels) float32 of 0 and 1, or (N, H, W) int64 classes."""
PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
REPORT_EVERY_STEPS = 10
"""Reading the loss waits for the GPU, so it is not read every step."""
UNRESTORABLE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What Lightning and torch raise for a state whose parts are not what they wrote; they check none."""


class TaskModule(lightning.LightningModule):
    """What every task does alike; a subclass has the losses of a batch, the record of an epoch and what is written.

    Each image of a step of the optimiser weighs the same, whichever process and batch it is in, so accumulated and
    distributed steps are those of one large batch.

    Args:
        model: What learns.
        spec: How it learns; batches are made from it.
        train_images: Images of an epoch.
        splits: Names of the sums of losses: training's first, then those of images that are kept out of it.
        metadata: Arguments of `model.checkpoint.save_checkpoint` for every file of weights.
        labels: See `distributed.EpochBatches`.
    """

    record_type: type[EpochRecord]
    reports_next_rate = True
    """Whether the learning rate of a report is that of the next step, else the step's own."""

    def __init__(
        self, model: torch.nn.Module, spec: TrainingSpec, train_images: int, splits: tuple[str, ...],
        metadata: dict[str, Any], labels: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.spec = spec
        self.batches = EpochBatches(
            train_images, spec.batch_size, seed=spec.seed, accumulate=spec.accumulate, launch=spec.launch,
            labels=labels,
        )  # fmt: skip
        self.metadata = metadata
        self.sums = {split: torch.zeros(2) for split in splits}  # loss, images

    def batch_losses(self, batch: Batch, batch_index: int) -> Tensor:
        """Training loss of each image: (N,)."""
        raise NotImplementedError

    def epoch_record(self, losses: dict[str, float], rate: float, clock: "EpochClock") -> EpochRecord:
        """The record of the epoch from its mean losses by split; each process must call this."""
        raise NotImplementedError

    def networks(self, records: list[EpochRecord]) -> Iterator[tuple[str, ConvNeXtV2, bool]]:
        """Networks to write after the newest of `records`: suffix of the files, network, whether it is its best."""
        raise NotImplementedError

    def metadata_of(self, suffix: str) -> dict[str, Any]:
        """Arguments of `model.checkpoint.save_checkpoint` for the network of a suffix: what the epoch found of it."""
        return self.metadata

    def loaders(self, images: Dataset) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Load what the module learns from, and what it is validated on."""
        trained = TrainingImages(images.train, ImageAugmentation(self.spec), self.spec.white_level, self.spec.in_chans)
        return (
            make_loader(trained, self.batches, self.spec),
            make_loader(ValidationImages(images.val, self.spec), self.spec.validation_batch_size, self.spec),
        )

    def draw(self, run_dir: Path, epoch: int) -> None:
        """Write pictures of an epoch, where the task has any."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start an epoch's sums, and its random numbers (stochastic depth, mixing) from a seed of its own.

        Not in `on_train_epoch_start`, which Lightning leaves out in the first epoch after a resume.
        """
        if batch_idx == 0:
            rank = (self.spec.launch.rank,) if self.spec.launch.rank else ()
            torch.manual_seed(mixed_seed(self.spec.seed, self.current_epoch, 1, *rank))
            self.reset("train")

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Mean loss of the step, this process's and batch's share of it."""
        own = self.batch_losses(batch, batch_index)[: self.batches.own_count(batch_index)]
        self.add("train", own)
        # Lightning divides by the batches of a step, and DDP takes the mean over the processes.
        spread = self.spec.accumulate * self.spec.launch.processes
        return own.sum() * (spread / self.batches.step_count(batch_index))

    def on_validation_epoch_start(self) -> None:
        """Start the validation's sums."""
        self.reset(*list(self.sums)[1:])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimiser, and a schedule that moves every step."""
        optimizer = make_optimizer(self.model, self.spec)
        schedule = make_schedule(optimizer, self.spec, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def epoch_losses(self) -> dict[str, float]:
        """Mean losses of the epoch by split, over all processes; each must call this."""
        reduce = self.trainer.strategy.reduce
        return {split: _mean(reduce(sums.clone(), reduce_op="sum")) for split, sums in self.sums.items()}

    def reset(self, *splits: str) -> None:
        """Begin the sums of splits anew."""
        for split in splits:
            self.sums[split] = torch.zeros(2, device=self.device)

    def add(self, split: str, losses: Tensor) -> None:
        """Add the losses of images, (N,), to the sum of a split."""
        self.sums[split] += torch.stack([losses.detach().sum().float(), losses.new_tensor(len(losses)).float()])


class RunWriter(lightning.Callback):
    """After each epoch: its record, weights and table, and last of all the state to resume from.

    The sampler is told the epoch on resume, before Lightning fetches the first batch, which it does before it tells
    it. The state is also written before the first step, so a run can be resumed from its beginning. Of several
    processes the first one writes and reports.
    """

    def __init__(self, run_dir: Path, module: TaskModule, progress: Progress, events: Any = None) -> None:
        self.run_dir = run_dir
        self.module = module
        self.progress = progress
        self.events = events  # TensorBoard's writer, where one is asked for
        self.has_started = False
        self.records: list[EpochRecord] = []
        self.clock = EpochClock()
        self.rate_before = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps with the state: the records."""
        return {"records": [record.row() for record in self.records]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the records back."""
        self.records = typed(state_dict["records"], list[self.module.record_type])  # type: ignore[name-defined]
        self.module.batches.set_epoch(len(self.records))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the initial state of a fresh run."""
        self.has_started = True
        if trainer.is_global_zero:
            self.progress.begin(trainer.max_epochs or 0, int(trainer.num_training_batches), len(self.records))
        if not self.records:
            keep_state(self.run_dir, trainer.save_checkpoint, writes=trainer.is_global_zero)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the epoch's clock, or stop waiting."""
        self.clock.batch_is_there(first=batch_idx == 0)
        self.rate_before = _highest_rate(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report how far the epoch is."""
        self.clock.batch_is_done(self.module.batches.joint_count(batch_idx))
        if batch_idx % REPORT_EVERY_STEPS == 0 and trainer.is_global_zero:
            loss, rate = _mean(self.module.sums["train"]), self._rate(trainer)
            at = (trainer.current_epoch + 1, batch_idx + 1)
            self.progress.step(StepReport(*at, loss, rate, self.clock.images_per_second))
            if self.events is not None:
                step = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx + 1
                self.events.add_scalar("step/mean_loss", loss, step)
                self.events.add_scalar("step/learning_rate", rate, step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the epoch and write its files. Raises TrainingError where its loss is no number."""
        record = self.module.epoch_record(self.module.epoch_losses(), self._rate(trainer), self.clock)
        if not all(map(math.isfinite, record.losses)):
            loss, validation_loss = record.losses
            raise TrainingError(
                f"In epoch {record.epoch} the loss became {loss} (validation {validation_loss}). Train again with a "
                "lower --learning-rate; what the epochs before wrote is kept."
            )
        is_best = all(record.rank > before.rank for before in self.records)
        self.records.append(record)
        if trainer.is_global_zero:
            self._write(record)
        keep_state(self.run_dir, trainer.save_checkpoint, writes=trainer.is_global_zero)
        if trainer.is_global_zero:
            self.progress.end_epoch(record, is_best)

    def _rate(self, trainer: lightning.Trainer) -> float:
        return _highest_rate(trainer) if self.module.reports_next_rate else self.rate_before

    def _write(self, record: EpochRecord) -> None:
        known = {"epoch": str(record.epoch), **self.module.metadata.get("extra", {})}
        for suffix, network, is_best in self.module.networks(self.records):
            for name in ("last", "best") if is_best else ("last",):
                path = self.run_dir / f"{name}{suffix}.safetensors"
                save_checkpoint(path, network, **{**self.module.metadata_of(suffix), "extra": known})
        self.module.draw(self.run_dir, record.epoch)
        write_text(self.run_dir / TABLE, table_of([each.row() for each in self.records]))
        if self.events is not None:
            for name, value in record.row().items():
                if name != "epoch" and value is not None:
                    self.events.add_scalar(f"epoch/{name}", value, record.epoch)
            self.events.flush()


class EpochClock:
    """How long an epoch takes, and how much of its training time passes before images are there."""

    def __init__(self) -> None:
        self.started = self.last_done = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def batch_is_there(self, *, first: bool) -> None:
        """A batch begins; `first` starts the epoch."""
        now = time.perf_counter()
        if first:
            self.started, self.waited, self.images = now, 0.0, 0
        else:
            self.waited += now - self.last_done

    def batch_is_done(self, images: int) -> None:
        """A batch of so many images is done."""
        self.images += images
        self.last_done = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.perf_counter() - self.started

    @property
    def images_per_second(self) -> float:
        """Of training alone."""
        return self.images / max(self.last_done - self.started, 1e-9)

    @property
    def wait_percent(self) -> float:
        """Share of the training time."""
        return 100.0 * self.waited / max(self.last_done - self.started, 1e-9)


def run_task(
    module: TaskModule, run_dir: Path, images: Dataset, progress: Progress | None
) -> tuple[list[EpochRecord], bool]:
    """Run a task in its folder, from the start or from its state; gives all records and whether Ctrl-C ended it.

    Raises:
        InputError: There is no state to resume from.
        CorruptArtifactError: The state is not one that this run can go on from.
        MissingRequirementError: TensorBoard is asked for and not installed.
        TrainingError: A loss is no number any more.
    """
    spec = module.spec
    state = usable_state(run_dir) if spec.resume else None
    if state is not None:
        check_state(state, RunWriter.__name__, module.record_type)
    with contextlib.ExitStack() as stack:
        writer = RunWriter(run_dir, module, progress or Progress())
        if spec.tensorboard and not spec.launch.rank:
            writer.events = stack.enter_context(_tensorboard(run_dir / "tensorboard"))
        stack.enter_context(_quiet())
        trainer = _trainer(spec, writer)
        loaders = module.loaders(images)
        try:
            with torch.random.fork_rng():
                trainer.fit(module, *loaders, ckpt_path=state, weights_only=True)
        except SystemExit:  # what Lightning makes of Ctrl-C
            if not trainer.interrupted:
                raise
            return writer.records, True
        except UNRESTORABLE as error:
            if state is None or writer.has_started or isinstance(error, torch.OutOfMemoryError):
                raise
            raise corrupt_state(state, f"{type(error).__name__}: {error}") from error
    return writer.records, False


@contextlib.contextmanager
def _tensorboard(folder: Path) -> Iterator[Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingRequirementError(
            "TensorBoard's events need the package tensorboard, which is not installed. Install it: "
            'pip install "cnx-deploy[tensorboard]", or leave --tensorboard out.'
        ) from error
    with SummaryWriter(str(folder)) as events:
        yield events


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's log lines and advice off the terminal; errors still come. torch's settings are put back."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Its advice on worker counts and logging intervals; those are chosen on purpose here.
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trainer(spec: TrainingSpec, writer: RunWriter) -> lightning.Trainer:
    """Lightning's Trainer on this machine's GPU or processor, or one device a process where several were started."""
    return lightning.Trainer(
        accelerator="auto",
        # One device by itself: with several, Lightning starts this program again for each.
        devices=spec.launch.devices,
        num_nodes=spec.launch.nodes,
        strategy="ddp" if spec.launch.processes > 1 else "auto",
        sync_batchnorm=spec.launch.processes > 1 and torch.cuda.is_available(),  # torch has none for processors
        precision=PRECISIONS[spec.precision],
        max_epochs=spec.epochs,
        accumulate_grad_batches=spec.accumulate,
        gradient_clip_val=spec.clip_norm,
        deterministic=spec.deterministic or None,
        default_root_dir=writer.run_dir,
        callbacks=[writer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _highest_rate(trainer: lightning.Trainer) -> float:
    """The learning rate of the last layers, which have the highest."""
    return max(float(group["lr"]) for group in trainer.optimizers[0].param_groups)


def _mean(sums: Tensor) -> float:
    loss, images = sums.tolist()
    return float(loss / max(1.0, images))
