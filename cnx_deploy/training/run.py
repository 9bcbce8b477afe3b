"""Train or fine-tune a classifier on labelled images.

A run is a folder: `run.json` (what was asked for), `metrics.csv` (one line an epoch), `best.safetensors` and
`last.safetensors` (weights for every other command; `best-ema` and `last-ema` of their moving average), `last.ckpt` and
`previous.ckpt` (the state that `resume` goes on from). `training.loop` has the loop, which takes the `train` extra.
"""

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from cnx_deploy.core.errors import CheckpointError, InputError, MissingRequirementError
from cnx_deploy.core.preprocessing import ASSUMED
from cnx_deploy.data import Dataset, find_dataset
from cnx_deploy.model.checkpoint import LoadedModel, load_checkpoint, resolve_model
from cnx_deploy.model.convnextv2 import ConvNeXtV2, create_model
from cnx_deploy.training.records import Progress, TrainingRecord, TrainingResult
from cnx_deploy.training.run_folder import open_run
from cnx_deploy.training.spec import RunSpec, TrainingSpec

__all__ = ["OWN_LICENCE", "check_machine", "initial_model", "train"]

OWN_LICENCE = "MIT"
"""Of weights that were not started from anybody's."""


def train(
    spec: TrainingSpec,
    initial: ConvNeXtV2 | None = None,
    progress: Progress | None = None,
    *,
    licence: str = OWN_LICENCE,
    dataset: Dataset | None = None,
) -> TrainingResult:
    """Train a classifier and return the run; on Ctrl-C the run so far.

    Args:
        spec: What to train.
        initial: Model to start from, left as it is; None draws the paper's initialisation from the seed.
        progress: Who is told how the run goes.
        licence: Goes into the written weights: that of the weights started from.
        dataset: Images to train on in place of all that `data.find_dataset` finds in `spec.data`.

    Raises:
        InputError: Data, folder or resume do not fit.
        CheckpointError: `initial` is of another variant or other classes.
        MissingRequirementError: The `train` extra is missing, or the GPU that FP16 takes.
        TrainingError: The loss stopped being a number.
    """
    check_machine(spec)
    from cnx_deploy.training.classifier import ClassificationModule
    from cnx_deploy.training.loop import run_task

    dataset = dataset or find_dataset(spec.data, seed=spec.seed, image_folder=spec.image_folder)
    names, images = dataset.class_names, len(dataset.train.paths)
    model = _model_to_train(spec, initial, len(names))
    counts = {"train_images": images, "val_images": len(dataset.val.paths)}
    run_dir = open_run(spec, spec.network.name, class_names=list(names), **counts)
    metadata = {"class_names": names, "preprocessing": spec.preprocessing, "licence": licence}
    module = ClassificationModule(model, spec, images, metadata)
    records, interrupted = run_task(module, run_dir, dataset, progress)
    known = cast(list[TrainingRecord], records)
    weights, ema = (max(ranks, default=(-1.0, 0.0)) for ranks in
                    ([record.weights_rank for record in known], [record.ema_rank for record in known]))  # fmt: skip
    return TrainingResult.of(
        run_dir,
        len(records),
        best="best-ema" if ema > weights else "best",
        interrupted=interrupted,
        best_top1_percent=max(weights, ema)[0] if records else None,
    )


def check_machine(spec: RunSpec) -> None:
    """Raise MissingRequirementError without the `train` extra, or the GPU that FP16 takes.

    On a processor Lightning would train in BF16 instead of FP16, without a word on the terminal.
    """
    try:
        for package in ("lightning.pytorch", "torchmetrics"):
            importlib.import_module(package)
    except ImportError as error:
        raise MissingRequirementError(
            f"Training needs {error.name or error}, which is not installed. Install lightning and torchmetrics: "
            'pip install "cnx-deploy[train]".'
        ) from error
    if spec.precision == "fp16" and not torch.cuda.is_available():
        raise MissingRequirementError(
            "Training in fp16 needs a GPU, and this machine has none. Choose --precision fp32 or bf16."
        )


def initial_model(
    spec: TrainingSpec,
    *,
    checkpoint: Path | None = None,
    pretrained: str | None = None,
    reset_head: bool = False,
    init: Path | None = None,
    ema: bool | None = None,
    entry: str | None = None,
) -> LoadedModel | None:
    """Load the weights to start from; None when no source is given and the paper's initialisation is meant.

    A new head is scaled by `spec.head_init_scale`.

    Args:
        spec: What is to be trained; its data has the classes.
        checkpoint: File of any known layout, whose head must be of the data's classes unless `reset_head`.
        pretrained: Tag of published weights, under the same rule.
        reset_head: Draw a new head.
        init: File whose head is kept where it is of the data's classes and drawn anew where it is not.
        ema: Take the averaged weights of a file, or its plain ones; see `model.weight_files`.
        entry: Which of several networks of a file.

    Raises:
        CheckpointError: The weights do not fit.
        InputError: Several sources are given, or a head to reset and no source.
    """
    if sum(source is not None for source in (checkpoint, pretrained, init)) > 1:
        raise InputError(
            "Several weights to start from were given, expected one of --checkpoint, --pretrained, --init. Leave "
            "the others out."
        )
    if init is None and checkpoint is None and pretrained is None:
        if reset_head or ema is not None or entry is not None:
            raise InputError(
                "A fresh model has no head to reset and no weights to choose from. Add --checkpoint or --pretrained, "
                "or leave --reset-head, --ema and --entry out."
            )
        return None
    names = find_dataset(spec.data, seed=spec.seed, image_folder=spec.image_folder).class_names
    if init is not None:
        loaded = _with_fitting_head(init, spec, names, ema=ema, entry=entry)
    else:
        loaded = resolve_model(
            spec.network,
            checkpoint=checkpoint,
            pretrained=pretrained,
            num_classes=len(names),
            reset_head=reset_head,
            ema=ema,
            entry=entry,
            task="classification",
        )
    if loaded.class_names not in (None, names):
        raise CheckpointError(
            f"{loaded.weights.reference} knows the classes {', '.join(loaded.class_names or ())}; {spec.data} has "
            f"{', '.join(names)}. Draw a new head with --reset-head, or rename the class folders."
        )
    own, here = loaded.preprocessing, spec.preprocessing
    told = [name for name in ("mean", "std", "interpolation") if loaded.origins.get(name) not in (None, ASSUMED)]
    if others := [name for name in told if getattr(own, name) != getattr(here, name)]:
        before = ", ".join(f"{name} {getattr(own, name)}" for name in others)
        after = ", ".join(f"{name} {getattr(here, name)}" for name in others)
        loaded = replace(
            loaded, notes=(*loaded.notes, f"the weights were trained with {before}; this run uses {after}")
        )
    if loaded.head_is_new:
        with torch.no_grad():
            loaded.model.head.weight.mul_(spec.head_init_scale)
    return loaded


def _with_fitting_head(path: Path, spec: TrainingSpec, names: tuple[str, ...], **choice: Any) -> LoadedModel:
    words: dict[str, Any] = {"num_classes": len(names), "task": "classification", **choice}
    try:
        loaded = load_checkpoint(path, spec.network, **words)
    except CheckpointError:  # no head, or one of other classes; anything else the second reading says again
        loaded = None
    if loaded is not None and loaded.class_names in (None, names):
        return loaded
    return load_checkpoint(path, spec.network, reset_head=True, **words)


def _model_to_train(spec: TrainingSpec, initial: ConvNeXtV2 | None, num_classes: int) -> ConvNeXtV2:
    """Copy or draw the model, with stochastic depth that rises over the blocks, and the backbone frozen if asked."""
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
