"""Pre-train an encoder on a folder of images without labels.

A run is a folder: `run.json` (what was asked for), `metrics.csv` (one line an epoch), `best.safetensors` and
`last.safetensors` (the encoder, without a head), `reconstructions/` (pictures of held images), `last.ckpt` and
`previous.ckpt` (the state that `resume` goes on from). The loop is `pretraining.loop`, which takes the `train` extra.
"""

import copy
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from cnx_deploy.core.errors import CheckpointError, MissingRequirementError
from cnx_deploy.core.files import write_text
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.training.augmentation import ImageAugmentation
from cnx_deploy.training.fcmae.autoencoder import MaskedAutoencoder, create_autoencoder
from cnx_deploy.training.fcmae.images import UnlabelledImages, divide_images, find_images_below, readable_images
from cnx_deploy.training.fcmae.masking import random_masks
from cnx_deploy.training.fcmae.pictures import PICTURED, save_reconstructions
from cnx_deploy.training.fcmae.records import (
    PretrainingProgress,
    PretrainingRecord,
    PretrainingResult,
    SilentPretraining,
)
from cnx_deploy.training.fcmae.spec import PretrainingSpec
from cnx_deploy.training.images import TrainingImages, ValidationImages, make_loader
from cnx_deploy.training.run_folder import open_run, table_of, usable_state
from cnx_deploy.training.sampling import EpochBatches, mixed_seed
from cnx_deploy.training.state import Expected, check_state

if TYPE_CHECKING:
    from cnx_deploy.training.fcmae.loop import WriteEpoch

__all__ = ["pretrain"]

OWN_LICENCE = "MIT"
HELD = 3
"""Tells the seed of the held images' masks from the others."""


def pretrain(
    spec: PretrainingSpec,
    initial: MaskedAutoencoder | None = None,
    progress: PretrainingProgress | None = None,
    *,
    images: UnlabelledImages | None = None,
    licence: str = OWN_LICENCE,
) -> PretrainingResult:
    """Pre-train `initial` (left as it is), or a fresh autoencoder, and return the run; on Ctrl-C the run so far.

    `images`: what to train on in place of the readable ones of all that `find_images_below` finds in `spec.data`.
    `licence` goes into the written weights: that of the weights started from. Raises InputError for data, folders and
    resumes that do not fit, CheckpointError for an `initial` of another variant, MissingRequirementError without the
    `train` extra or the GPU that FP16 takes, TrainingError when the loss stops being a number.
    """
    loop, lightning_loop = _import_loops()
    if spec.precision == "fp16" and not torch.cuda.is_available():
        raise MissingRequirementError(
            "Training in fp16 needs a GPU, and this machine has none: expected --precision fp32 or bf16. Choose one."
        )
    if images is None:
        images = divide_images(readable_images(find_images_below(spec.data))[0], spec.held_images)
    model = _model_to_train(spec, initial)
    run_dir = _open_run(spec, images)
    state = usable_state(run_dir) if spec.resume else None
    batches = EpochBatches(
        len(images.train.paths), spec.batch_size, seed=spec.seed, accumulate=spec.accumulate, launch=spec.launch
    )
    held = ValidationImages(images.held, spec.preprocessing, spec.launch)
    held_masks = _held_masks(spec, len(images.held.paths))
    pretrainer = loop.Pretrainer(model, spec, batches, held_masks)
    if state is not None:
        check_state(state, Expected(pretrainer.state_dict(), loop.PretrainingWriter.__name__, PretrainingRecord))
    write = _epoch_writer(run_dir, spec, licence, held, held_masks)
    writer = loop.PretrainingWriter(run_dir, batches, write, progress or SilentPretraining())
    how: dict[str, Any] = {
        "workers": spec.workers, "on_gpu": torch.cuda.is_available(), "processes": spec.launch.devices,
    }  # fmt: skip
    loaders = (
        make_loader(TrainingImages(images.train, ImageAugmentation(spec.training)), batches, **how),
        make_loader(held, loop.held_batch_size(spec), **how),
    )
    with lightning_loop.quiet_trainer(spec.training, run_dir, [writer]) as trainer:
        interrupted = lightning_loop.fit(trainer, pretrainer, loaders, state)
    return _result(run_dir, writer.records, interrupted=interrupted)


def _import_loops() -> tuple[ModuleType, ModuleType]:
    try:
        from cnx_deploy.training import loop as training_loop
        from cnx_deploy.training.fcmae import loop
    except ImportError as error:
        raise MissingRequirementError(
            f"Pre-training needs {error.name or error}, which is not installed: expected lightning and torchmetrics. "
            'Install them: pip install "cnx-deploy[train]".'
        ) from error
    return loop, training_loop


def _model_to_train(spec: PretrainingSpec, initial: MaskedAutoencoder | None) -> MaskedAutoencoder:
    if initial is None:
        return create_autoencoder(spec.network, seed=spec.seed).train()
    if initial.encoder.variant != spec.network:
        raise CheckpointError(
            f"The encoder to start from is {initial.encoder.variant.name}, {spec.network.name} was asked for. Give "
            "weights of that variant."
        )
    return copy.deepcopy(initial).train()


def _open_run(spec: PretrainingSpec, images: UnlabelledImages) -> Path:
    """The run's folder; of several processes the first one makes it, and no other writes there."""
    request = {
        "spec": spec.to_dict(),
        "resolved": spec.resolved(),
        "train_images": len(images.train.paths),
        "held_images_taken": len(images.held.paths),
        "preprocessing": spec.preprocessing.to_dict(),
    }
    if spec.launch.rank and not spec.resume:
        return spec.run_dir or spec.output_dir
    name = f"{spec.network.name}-fcmae"
    return open_run(request, name=name, output_dir=spec.output_dir, run_dir=spec.run_dir, resume=spec.resume)


def _held_masks(spec: PretrainingSpec, count: int) -> torch.Tensor:
    """The masks of this process's held images, the same in every epoch."""
    generator = torch.Generator().manual_seed(mixed_seed(spec.seed, HELD))
    return random_masks(count, spec.grid, spec.mask_ratio, generator)[spec.launch.rank :: spec.launch.processes]


def _epoch_writer(
    run_dir: Path, spec: PretrainingSpec, licence: str, held: ValidationImages, held_masks: torch.Tensor
) -> "WriteEpoch":
    count = min(PICTURED, len(held))
    pictured = [at * len(held) // count for at in range(count)]  # spread: the files of a class stand together
    pixels = torch.stack([held[index][0] for index in pictured]) if pictured else None

    def write(model: MaskedAutoencoder, records: list[PretrainingRecord], is_best: bool) -> None:
        record = records[-1]
        for name in ("last", "best") if is_best else ("last",):
            save_checkpoint(
                run_dir / f"{name}.safetensors",
                model.encoder,
                preprocessing=spec.preprocessing,
                licence=licence,
                extra={"epoch": str(record.epoch), "pretraining": "fcmae"},
            )
        is_due = record.epoch % spec.resolved_picture_every == 0 or record.epoch in (1, spec.epochs)
        if is_due and pixels is not None:
            path = run_dir / "reconstructions" / f"epoch-{record.epoch:04}.png"
            save_reconstructions(path, model, spec.preprocessing, pixels, held_masks[pictured])
        write_text(run_dir / "metrics.csv", table_of([record.to_dict() for record in records]))

    return write


def _result(run_dir: Path, records: list[PretrainingRecord], *, interrupted: bool) -> PretrainingResult:
    return PretrainingResult(
        run_dir=run_dir,
        best=run_dir / "best.safetensors" if records else None,
        last=run_dir / "last.safetensors" if records else None,
        metrics=run_dir / "metrics.csv",
        first_loss=records[0].loss if records else None,
        last_loss=records[-1].loss if records else None,
        best_held_loss=min((record.held_loss for record in records), default=None),
        epochs_run=len(records),
        interrupted=interrupted,
    )
