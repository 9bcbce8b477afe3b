"""Train or fine-tune a network on labelled images.

A run is a folder: `run.json` (what was asked for), `metrics.csv` (one line an epoch), `best.safetensors` and
`last.safetensors` (weights for every other command; `best-ema` and `last-ema` of their moving average), `last.ckpt` and
`previous.ckpt` (the state that `resume` goes on from). `training.loop` has the loop, which takes the `train` extra.
"""

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from cnx_deploy.core.errors import CheckpointError, InputError, MissingRequirementError
from cnx_deploy.core.preprocessing import ASSUMED, Preprocessing
from cnx_deploy.data import (
    Dataset,
    MaskReading,
    find_dataset,
    find_instance_dataset,
    find_segmentation_dataset,
)
from cnx_deploy.model.checkpoint import LoadedModel, load_checkpoint, resolve_model
from cnx_deploy.model.convnextv2 import ConvNeXtV2, create_model
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.training.class_balance import class_weights, positive_weights
from cnx_deploy.training.records import Progress, TrainingResult
from cnx_deploy.training.run_folder import check_new, open_run
from cnx_deploy.training.spec import RunSpec, TrainingSpec

__all__ = ["OWN_LICENCE", "check_machine", "find_training_images", "initial_model", "started_from", "train"]

OWN_LICENCE = "not stated (trained with cnx-deploy)"
"""Of weights that were trained from scratch: whose they are, and on what terms, is for their maker to say."""
"""Of weights that were not started from anybody's."""
MODULES = {
    "classification": ("cnx_deploy.training.classifier", "ClassificationModule"),
    "detect": ("cnx_deploy.training.detection", "DetectionModule"),
    "multi-label": ("cnx_deploy.training.multi_label", "MultiLabelModule"),
    "segment": ("cnx_deploy.training.segmentation", "SegmentationModule"),
}
"""Task -> the module and the class that trains it; they take the `train` extra."""


def train(
    spec: TrainingSpec,
    initial: ConvNeXtV2 | LoadedModel | None = None,
    progress: Progress | None = None,
    *,
    licence: str | None = None,
    dataset: Dataset | None = None,
) -> TrainingResult:
    """Train a network and return the run; on Ctrl-C the run so far.

    Args:
        spec: What to train.
        initial: Model to start from, left as it is; None draws the paper's initialisation from the seed. What
            `initial_model` loaded brings its licence, and its mean and deviation of pixels where `spec` has none.
        progress: Who is told how the run goes.
        licence: Goes into the written weights; None takes that of the weights started from.
        dataset: Images to train on in place of all that `data.find_dataset` finds in `spec.data`.

    Raises:
        InputError: Data, folder, resume or class weights do not fit, or the task's loss does not take an option.
        CheckpointError: `initial` is of another variant or other classes.
        MissingRequirementError: The `train` extra is missing, or the GPU that FP16 takes.
        TrainingError: The loss stopped being a number.
    """
    check_machine(spec)
    check_new(spec)
    if isinstance(initial, LoadedModel):
        spec, licence, initial = started_from(spec, initial), licence or initial.weights.licence, initial.model
    from cnx_deploy.training.loop import TaskModule, run_task

    if spec.task not in MODULES:
        raise InputError(f"The task {spec.task} is not trained here. Choose one of: {', '.join(MODULES)}.")
    dataset = dataset or find_training_images(spec)
    names, images, labels = dataset.class_names, len(dataset.train.paths), dataset.train.labels
    model = _model_to_train(spec, initial, len(names))
    several = dataset.train.label_sets is not None
    weights = positive_weights(spec, dataset.train) if several else class_weights(spec, names, labels)
    known: dict[str, Any] = {"class_names": list(names), "train_images": images, "val_images": len(dataset.val.paths)}
    if weights is not None:
        known["weight_by_class"] = dict(zip(names, weights, strict=True))
    metadata = {"class_names": names, "preprocessing": spec.preprocessing, "licence": licence or OWN_LICENCE}
    if noted := {**spec.balancing, **({"masks": "reduce_zero_label"} if spec.reduce_zero_label else {})}:
        metadata["extra"] = {"training": noted}
    place, name = MODULES[spec.task]
    make: Callable[..., TaskModule] = getattr(importlib.import_module(place), name)
    module = make(model, spec, images, metadata, labels=labels, weights=weights)
    run_dir = open_run(spec, spec.network.name, **known)
    records, interrupted = run_task(module, run_dir, dataset, progress)
    return _result(run_dir, records, interrupted=interrupted)


def find_training_images(spec: TrainingSpec) -> Dataset:
    """Find the images that a run trains on and those it is validated on, with labels as its task takes them."""
    targets = find_task(spec.task).targets
    if targets == "masks":
        if spec.image_folder is not None:
            raise InputError("image_folder is where names in a table begin, and masks lie in folders. Leave it out.")
        reading = MaskReading(spec.class_names, spec.reduce_zero_label)
        return find_segmentation_dataset(spec.data, seed=spec.seed, reading=reading)
    if spec.class_names is not None or spec.reduce_zero_label:
        raise InputError(
            f"class_names and reduce_zero_label say how masks are read, and the task {spec.task} has none. Leave "
            "--class-names and --reduce-zero-label out."
        )
    if targets == "instances":
        return find_instance_dataset(spec.data, seed=spec.seed, image_folder=spec.image_folder)
    several = targets == "label-sets"
    return find_dataset(spec.data, seed=spec.seed, image_folder=spec.image_folder, multi_label=several)


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
    soup: Sequence[Path] = (),
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
        soup: Checkpoints whose mean with the file the weights are.

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
        if reset_head or ema is not None or entry is not None or soup:
            raise InputError(
                "A fresh model has no head to reset and no weights to choose from or to average. Add --checkpoint or "
                "--pretrained, or leave --reset-head, --ema, --entry and --soup out."
            )
        return None
    names = find_training_images(spec).class_names
    if init is not None:
        loaded = _with_fitting_head(init, spec, names, ema=ema, entry=entry, soup=soup)
    else:
        loaded = resolve_model(
            spec.network,
            checkpoint=checkpoint,
            pretrained=pretrained,
            num_classes=len(names),
            reset_head=reset_head,
            ema=ema,
            entry=entry,
            soup=soup,
            task=spec.task,
            in_chans=spec.in_chans,
            task_options=spec.task_options,
        )
    if loaded.class_names not in (None, names):
        raise CheckpointError(
            f"{loaded.weights.reference} knows the classes {', '.join(loaded.class_names or ())}; {spec.data} has "
            f"{', '.join(names)}. Draw a new head with --reset-head, or rename the class folders."
        )
    loaded = replace(loaded, notes=(*loaded.notes, *_notes_of_images(spec, loaded)))
    if loaded.head_is_new:
        with torch.no_grad():
            for layer in map(loaded.model.get_submodule, loaded.model.task.class_layers):
                for parameter in layer.parameters():
                    parameter.mul_(spec.head_init_scale)
    return loaded


def started_from(spec: TrainingSpec, loaded: LoadedModel) -> TrainingSpec:
    """Take mean and deviation of the pixels from weights to start from, where the request leaves them open."""
    own, usual = loaded.preprocessing, Preprocessing().for_channels(spec.in_chans)
    open_fields = [name for name in ("mean", "std") if getattr(spec, name) is None]
    # The usual values are what None means; written down, they would make another record.
    return replace(
        spec, **{name: getattr(own, name) for name in open_fields if getattr(own, name) != getattr(usual, name)}
    )


def _notes_of_images(spec: TrainingSpec, loaded: LoadedModel) -> Iterator[str]:
    """What the run takes of the weights' preprocessing, and what it has otherwise."""
    own, here, before = loaded.preprocessing, started_from(spec, loaded).preprocessing, spec.preprocessing
    if taken := [name for name in ("mean", "std") if getattr(here, name) != getattr(before, name)]:
        values = " and ".join(f"{name} {getattr(here, name)}" for name in taken)
        options = " and ".join(f"--{name}" for name in taken)
        origin = loaded.origins[taken[0]]
        yield f"pixels have {values} as the weights do ({origin}); {options} would say otherwise"
    if loaded.problem is not None:
        yield f"{loaded.problem} This run goes by its own options and ImageNet's mean and std."
    told = [name for name in ("mean", "std", "interpolation") if loaded.origins.get(name) not in (None, ASSUMED)]
    if others := [name for name in told if getattr(own, name) != getattr(here, name)]:
        theirs, ours = (", ".join(f"{name} {getattr(kind, name)}" for name in others) for kind in (own, here))
        yield f"the weights were trained with {theirs}; this run uses {ours}"


def _result(run_dir: Path, records: Sequence[Any], *, interrupted: bool) -> TrainingResult:
    """The result with the figures of the better of the best weights and the best moving average."""
    if not records:
        return TrainingResult.of(run_dir, 0, interrupted=interrupted)
    plain, ema = (max(records, key=attrgetter(rank)) for rank in ("weights_rank", "ema_rank"))
    is_ema = ema.ema_rank > plain.weights_rank
    return TrainingResult.of(
        run_dir, len(records), best="best-ema" if is_ema else "best", interrupted=interrupted,
        **(ema if is_ema else plain).best_figures(is_ema=is_ema),
    )  # fmt: skip


def _with_fitting_head(path: Path, spec: TrainingSpec, names: tuple[str, ...], **choice: Any) -> LoadedModel:
    words: dict[str, Any] = {
        "num_classes": len(names), "task": spec.task, "in_chans": spec.in_chans, "task_options": spec.task_options,
        **choice,
    }  # fmt: skip
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
            model = create_model(
                spec.network,
                num_classes,
                head_init_scale=spec.head_init_scale,
                task=spec.purpose,
                in_chans=spec.in_chans,
            )
    elif initial.task.name != spec.task:
        raise CheckpointError(
            f"The model to start from is of the task {initial.task.name}, and {spec.task} is to be trained. Load it "
            f"with task={spec.task!r}."
        )
    elif (initial.num_classes, initial.variant, initial.in_chans) == (num_classes, spec.network, spec.in_chans):
        model = copy.deepcopy(initial)
    else:
        raise CheckpointError(
            f"The model to start from is {initial.variant.name} with {initial.num_classes} classes and "
            f"{initial.in_chans} channels; the data and the request take {spec.network.name} with {num_classes} and "
            f"{spec.in_chans}. Load it with reset_head (--reset-head) and in_chans (--in-chans)."
        )
    blocks = [block for stage in model.stage_blocks() for block in stage]
    rate = 0.0 if spec.freeze_backbone else spec.drop_path_rate
    for index, block in enumerate(blocks):
        block.drop_path.p = rate * index / max(1, len(blocks) - 1)
    if spec.freeze_backbone:
        model.requires_grad_(False)
        for module in model.task.trained_alone(model):
            module.requires_grad_(True)
    return model.train()
