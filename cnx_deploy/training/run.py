"""Train or fine-tune a classifier on an image folder.

A run is a folder: `run.json` (what was asked for), `metrics.csv` (one line an epoch), `best.safetensors` and
`last.safetensors` (weights for every other command; `best-ema` and `last-ema` of their moving average), `last.ckpt` and
`previous.ckpt` (the state that `resume` goes on from). The loop is `training.loop`, which takes the `train` extra.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cnx_deploy.core.errors import CheckpointError, InputError, MissingRequirementError
from cnx_deploy.core.files import write_text
from cnx_deploy.data import Dataset, find_dataset
from cnx_deploy.model.checkpoint import LoadedModel, load_checkpoint, resolve_model, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, create_model
from cnx_deploy.training.augmentation import ImageAugmentation
from cnx_deploy.training.images import TrainingImages, ValidationImages, make_loader
from cnx_deploy.training.records import EpochRecord, Progress, Silence, TrainingResult
from cnx_deploy.training.run_folder import open_run, table_of, usable_state
from cnx_deploy.training.sampling import EpochBatches
from cnx_deploy.training.spec import TrainingSpec
from cnx_deploy.training.state import Expected, check_state

if TYPE_CHECKING:
    from cnx_deploy.training.loop import Classifier

__all__ = ["initial_model", "train"]

OWN_LICENCE = "MIT"


def initial_model(
    spec: TrainingSpec,
    *,
    checkpoint: Path | None = None,
    pretrained: str | None = None,
    reset_head: bool = False,
    init: Path | None = None,
) -> LoadedModel | None:
    """Load the weights to start from; None when no source is given and the paper's initialisation is meant.

    `init` is a checkpoint whose head is kept where it is of the data's classes and drawn anew where it is of others or
    missing; with `checkpoint` and `pretrained` a new head must be asked for by `reset_head`. A new head is scaled by
    `spec.head_init_scale`. Raises CheckpointError for weights that do not fit, InputError for two sources.
    """
    if sum(source is not None for source in (checkpoint, pretrained, init)) > 1:
        raise InputError(
            "Several weights to start from were given, expected one of --checkpoint, --pretrained, --init. Leave "
            "the others out."
        )
    if init is None and checkpoint is None and pretrained is None:
        if reset_head:
            raise InputError("A fresh model has no head to reset. Give --checkpoint or --pretrained, or leave it out.")
        return None
    names = find_dataset(spec.data, seed=spec.seed).class_names
    if init is not None:
        loaded = _with_fitting_head(init, spec, names)
    else:
        loaded = resolve_model(
            spec.network, checkpoint=checkpoint, pretrained=pretrained, num_classes=len(names), reset_head=reset_head
        )
    if loaded.class_names not in (None, names):
        raise CheckpointError(
            f"{loaded.weights.reference} knows the classes {', '.join(loaded.class_names or ())}; {spec.data} has "
            f"{', '.join(names)}. Give --reset-head for a new head, or rename the class folders."
        )
    if loaded.head_is_new:
        with torch.no_grad():
            loaded.model.head.weight.mul_(spec.head_init_scale)
    return loaded


def train(
    spec: TrainingSpec,
    initial: ConvNeXtV2 | None = None,
    progress: Progress | None = None,
    *,
    licence: str = OWN_LICENCE,
    dataset: Dataset | None = None,
) -> TrainingResult:
    """Train `initial` (left as it is), or a fresh model, and return the run; on Ctrl-C the run so far.

    `licence` goes into the written weights: that of the weights started from. `dataset`: what to train on in place of
    all that `data.find_dataset` finds in `spec.data`. Raises InputError for data, folders and resumes that do not fit,
    MissingRequirementError without the `train` extra or the GPU that FP16 takes, TrainingError when the loss stops
    being a number.
    """
    loop, writing = _import_loop()
    _check_precision(spec)
    dataset = dataset or find_dataset(spec.data, seed=spec.seed)
    model = _model_to_train(spec, initial, len(dataset.class_names))
    run_dir = _open_run(spec, dataset)
    state = usable_state(run_dir) if spec.resume else None
    batches = EpochBatches(
        len(dataset.train.paths), spec.batch_size, seed=spec.seed, accumulate=spec.accumulate, launch=spec.launch
    )
    classifier = loop.Classifier(model, spec, batches)
    if state is not None:
        check_state(state, Expected(classifier.state_dict(), writing.EpochWriter.__name__, EpochRecord))
    with _told(spec, run_dir, progress or Silence()) as listener:
        writer = writing.EpochWriter(run_dir, batches, _epoch_writer(run_dir, spec, dataset, licence), listener)
        with loop.quiet_trainer(spec, run_dir, [writer]) as trainer:
            interrupted = loop.fit(trainer, classifier, _loaders(spec, dataset, batches), state)
    return _result(run_dir, writer.records, interrupted=interrupted)


def _import_loop() -> tuple[ModuleType, ModuleType]:
    try:
        from cnx_deploy.training import loop, writer
    except ImportError as error:
        raise MissingRequirementError(
            f"Training needs {error.name or error}, which is not installed: expected lightning and torchmetrics. "
            'Install them: pip install "cnx-deploy[train]".'
        ) from error
    return loop, writer


def _check_precision(spec: TrainingSpec) -> None:
    """On a processor Lightning would train in BF16 instead, without a word on the terminal."""
    if spec.precision == "fp16" and not torch.cuda.is_available():
        raise MissingRequirementError(
            "Training in fp16 needs a GPU, and this machine has none: expected --precision fp32 or bf16. Choose one."
        )


@contextlib.contextmanager
def _told(spec: TrainingSpec, run_dir: Path, progress: Progress) -> Iterator[Progress]:
    """Who is told how training goes: `progress`, and TensorBoard's events where they are asked for."""
    if not spec.tensorboard or spec.launch.rank:
        yield progress
        return
    from cnx_deploy.training.tensorboard_log import TensorBoardLog

    with contextlib.closing(TensorBoardLog(run_dir / "tensorboard", progress)) as log:
        yield log


def _with_fitting_head(path: Path, spec: TrainingSpec, names: tuple[str, ...]) -> LoadedModel:
    try:
        loaded = load_checkpoint(path, spec.network, num_classes=len(names))
    except CheckpointError:  # no head, or one of other classes; anything else the second reading says again
        loaded = None
    if loaded is not None and loaded.class_names in (None, names):
        return loaded
    return load_checkpoint(path, spec.network, num_classes=len(names), reset_head=True)


def _model_to_train(spec: TrainingSpec, initial: ConvNeXtV2 | None, num_classes: int) -> ConvNeXtV2:
    if initial is None:
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            model = create_model(spec.network, num_classes, head_init_scale=spec.head_init_scale)
    elif initial.num_classes == num_classes and initial.variant == spec.network:
        model = copy.deepcopy(initial)
    else:
        raise CheckpointError(
            f"The model to start from is {initial.variant.name} with {initial.num_classes} classes; the data and the "
            f"request take {spec.network.name} with {num_classes}. Load it with reset_head (--reset-head)."
        )
    blocks = [block for stage in model.stage_blocks() for block in stage]
    rate = 0.0 if spec.freeze_backbone else spec.drop_path_rate
    for index, block in enumerate(blocks):
        block.drop_path.p = rate * index / max(1, len(blocks) - 1)
    if spec.freeze_backbone:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    return model.train()


def _open_run(spec: TrainingSpec, dataset: Dataset) -> Path:
    """The run's folder; of several processes the first one makes it, and no other writes there."""
    request = {
        "spec": spec.to_dict(),
        "resolved": spec.resolved(),
        "class_names": list(dataset.class_names),
        "train_images": len(dataset.train.paths),
        "val_images": len(dataset.val.paths),
        "preprocessing": spec.preprocessing.to_dict(),
    }
    if spec.launch.rank and not spec.resume:
        return spec.run_dir or spec.output_dir
    return open_run(
        request, name=spec.network.name, output_dir=spec.output_dir, run_dir=spec.run_dir, resume=spec.resume
    )


def _loaders(spec: TrainingSpec, dataset: Dataset, batches: EpochBatches) -> tuple[Any, Any]:
    on_gpu = torch.cuda.is_available()
    how: dict[str, Any] = {"workers": spec.workers, "on_gpu": on_gpu, "processes": spec.launch.devices}
    images = TrainingImages(dataset.train, ImageAugmentation(spec))
    val_images = ValidationImages(dataset.val, spec.preprocessing, spec.launch)
    return make_loader(images, batches, **how), make_loader(val_images, 2 * spec.batch_size, **how)


def _epoch_writer(
    run_dir: Path, spec: TrainingSpec, dataset: Dataset, licence: str
) -> Callable[["Classifier", list[EpochRecord]], None]:
    def write_weights(name: str, model: nn.Module, epoch: int) -> None:
        save_checkpoint(
            run_dir / f"{name}.safetensors",
            model,  # type: ignore[arg-type]
            class_names=dataset.class_names,
            preprocessing=spec.preprocessing,
            licence=licence,
            extra={"epoch": str(epoch)},
        )

    def write(classifier: "Classifier", records: list[EpochRecord]) -> None:
        *before, record = records
        kinds: list[tuple[str, nn.Module, bool]] = [
            ("", classifier.model, all(record.rank > each.rank for each in before))
        ]
        if classifier.averaged is not None:
            is_best = all(record.ema_rank > each.ema_rank for each in before)
            kinds.append(("-ema", classifier.averaged.module, is_best))
        for suffix, model, is_best in kinds:
            for name in ("last", "best") if is_best else ("last",):
                write_weights(f"{name}{suffix}", model, record.epoch)
        write_text(run_dir / "metrics.csv", table_of([record.to_dict() for record in records]))

    return write


def _result(run_dir: Path, records: list[EpochRecord], *, interrupted: bool) -> TrainingResult:
    best_rank = max((record.rank for record in records), default=(-1.0, 0.0))
    ema_rank = max((record.ema_rank for record in records), default=(-1.0, 0.0))
    best = run_dir / ("best-ema.safetensors" if ema_rank > best_rank else "best.safetensors")
    return TrainingResult(
        run_dir=run_dir,
        best=best if records else None,
        last=run_dir / "last.safetensors" if records else None,
        metrics=run_dir / "metrics.csv",
        best_top1_percent=max(best_rank, ema_rank)[0] if records else None,
        epochs_run=len(records),
        interrupted=interrupted,
    )
