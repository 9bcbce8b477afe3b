"""Train or fine-tune a classifier on an image folder.

A run is a folder: `run.json` (what was asked for), `metrics.csv` (one line an epoch), `best.safetensors` and
`last.safetensors` (weights for every other command), `last.ckpt` (the state that `resume` goes on from). The loop
itself is `training_loop`, which takes the `train` extra.
"""

import copy
import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cnx_deploy.data import Dataset, find_dataset
from cnx_deploy.errors import (
    CheckpointError,
    CorruptArtifactError,
    InputError,
    MissingRequirementError,
    OutputExistsError,
)
from cnx_deploy.model.checkpoint import LoadedModel, resolve_model, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, create_model
from cnx_deploy.training_data import TrainingImages, ValidationImages, make_loader
from cnx_deploy.training_spec import EpochRecord, Progress, Silence, TrainingResult, TrainingSpec

__all__ = ["EpochRecord", "Progress", "Silence", "TrainingResult", "TrainingSpec", "initial_model", "train"]

OWN_LICENCE = "MIT"


def initial_model(
    spec: TrainingSpec, *, checkpoint: Path | None, pretrained: str | None, reset_head: bool
) -> LoadedModel | None:
    """Load the weights to start from; None when neither source is given and the paper's initialisation is meant.

    Raises CheckpointError when the head has other classes than the data, unless `reset_head` draws a new one.
    """
    if checkpoint is None and pretrained is None:
        if reset_head:
            raise InputError("A fresh model has no head to reset. Give --checkpoint or --pretrained, or leave it out.")
        return None
    names = find_dataset(spec.data, seed=spec.seed).class_names
    loaded = resolve_model(
        spec.network, checkpoint=checkpoint, pretrained=pretrained, num_classes=len(names), reset_head=reset_head
    )
    if loaded.class_names not in (None, names):
        raise CheckpointError(
            f"{loaded.weights.reference} knows the classes {', '.join(loaded.class_names or ())}; {spec.data} has "
            f"{', '.join(names)}. Give --reset-head for a new head, or rename the class folders."
        )
    return loaded


def train(
    spec: TrainingSpec,
    initial: ConvNeXtV2 | None = None,
    progress: Progress | None = None,
    *,
    licence: str = OWN_LICENCE,
) -> TrainingResult:
    """Train `initial` (left as it is), or a fresh model, and return the run; on Ctrl-C the run so far.

    `licence` goes into the written weights: that of the weights started from.
    Raises InputError for data, folders and resumes that do not fit, MissingRequirementError without the `train` extra,
    TrainingError when the loss stops being a number.
    """
    loop = _import_loop()
    dataset = find_dataset(spec.data, seed=spec.seed)
    model = _model_to_train(spec, initial, len(dataset.class_names))
    run_dir = _open_run(spec, dataset)
    loaders = _loaders(spec, dataset)
    state = run_dir / "last.ckpt"
    write_epoch = _epoch_writer(run_dir, model, spec, dataset, licence)
    writer = loop.EpochWriter(state, loaders[0].sampler, write_epoch, progress or Silence())
    with loop.quiet_trainer(spec, run_dir, writer) as trainer:
        classifier = loop.Classifier(model, spec, spec.preprocessing)
        interrupted = _fit(trainer, classifier, loaders, state if spec.resume else None)
    written = bool(writer.records)
    return TrainingResult(
        run_dir=run_dir,
        best=run_dir / "best.safetensors" if written else None,
        last=run_dir / "last.safetensors" if written else None,
        metrics=run_dir / "metrics.csv",
        best_top1_percent=max((record.val_top1_percent for record in writer.records), default=None),
        epochs_run=len(writer.records),
        interrupted=interrupted,
    )


def _import_loop() -> ModuleType:
    try:
        from cnx_deploy import training_loop
    except ImportError as error:
        raise MissingRequirementError(
            f"Training needs {error.name or error}, which is not installed: expected lightning and torchmetrics. "
            'Install them: pip install "cnx-deploy[train]".'
        ) from error
    return training_loop


def _model_to_train(spec: TrainingSpec, initial: ConvNeXtV2 | None, num_classes: int) -> ConvNeXtV2:
    if initial is None:
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            model = create_model(spec.network, num_classes)
    elif initial.num_classes == num_classes and initial.variant == spec.network:
        model = copy.deepcopy(initial)
    else:
        raise CheckpointError(
            f"The model to start from is {initial.variant.name} with {initial.num_classes} classes; the data and the "
            f"request take {spec.network.name} with {num_classes}. Load it with reset_head (--reset-head)."
        )
    blocks = [block for stage in model.stage_blocks() for block in stage]
    for index, block in enumerate(blocks):
        block.drop_path.p = spec.drop_path_rate * index / max(1, len(blocks) - 1)
    return model.train()


def _open_run(spec: TrainingSpec, dataset: Dataset) -> Path:
    """Make a fresh run folder, or find the one to resume and check that it is the same request."""
    request = {
        "spec": spec.to_dict(),
        "class_names": list(dataset.class_names),
        "train_images": len(dataset.train.paths),
        "val_images": len(dataset.val.paths),
        "preprocessing": spec.preprocessing.to_dict(),
    }
    if spec.resume:
        run_dir = spec.run_dir or _newest_run(spec)
        _check_same_request(run_dir, request)
        return run_dir
    run_dir = spec.run_dir or _fresh_run(spec)
    if (run_dir / "run.json").exists():
        raise OutputExistsError(f"{run_dir} holds a run already. Resume it with --resume, or name another folder.")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_whole(run_dir / "run.json", json.dumps(request, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise InputError(f"Cannot write in {run_dir}: {error.strerror}. Choose another --output-dir.") from error
    return run_dir


def _run_numbers(spec: TrainingSpec) -> list[int]:
    names = [path.name.rpartition("-") for path in spec.output_dir.glob(f"{spec.network.name}-*")]
    return sorted(int(number) for variant, _, number in names if variant == spec.network.name and number.isdigit())


def _fresh_run(spec: TrainingSpec) -> Path:
    number = max(_run_numbers(spec), default=0) + 1
    return spec.output_dir / f"{spec.network.name}-{number:03}"


def _newest_run(spec: TrainingSpec) -> Path:
    numbers = _run_numbers(spec)
    if not numbers:
        raise InputError(f"{spec.output_dir} has no run of {spec.network.name} to resume. Start one without --resume.")
    return spec.output_dir / f"{spec.network.name}-{numbers[-1]:03}"


def _check_same_request(run_dir: Path, request: dict[str, Any]) -> None:
    record = run_dir / "run.json"
    if not record.is_file() or not (run_dir / "last.ckpt").is_file():
        raise InputError(f"{run_dir} has no run.json and last.ckpt to resume from. Start a run without --resume.")
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        flat_before, flat_now = ({**found, **found["spec"]} for found in (before, request))
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptArtifactError(f"{record} cannot be read ({error}). Start a run without --resume.") from error
    differing = [f"{name} {flat_before.get(name)} then, {value} now" for name, value in flat_now.items()
                 if name != "spec" and flat_before.get(name) != value]  # fmt: skip
    if differing:
        raise InputError(
            f"{run_dir} was started otherwise: {'; '.join(differing)}. Resume with the same request, or start anew."
        )


def _loaders(spec: TrainingSpec, dataset: Dataset) -> tuple[Any, Any]:
    on_gpu = torch.cuda.is_available()
    images = TrainingImages(dataset.train, spec.preprocessing, min_crop_area=spec.min_crop_area, flip=spec.flip)
    val_images = ValidationImages(dataset.val, spec.preprocessing)
    return (
        make_loader(images, spec.batch_size, seed=spec.seed, workers=spec.workers, on_gpu=on_gpu),
        make_loader(val_images, 2 * spec.batch_size, seed=spec.seed, workers=spec.workers, on_gpu=on_gpu),
    )


def _fit(trainer: Any, classifier: Any, loaders: tuple[Any, Any], state: Path | None) -> bool:
    """Run the loop and return whether Ctrl-C ended it, which Lightning turns into SystemExit."""
    try:
        with torch.random.fork_rng():
            trainer.fit(classifier, *loaders, ckpt_path=state, weights_only=True)
    except SystemExit:
        if not trainer.interrupted:
            raise
        return True
    return False


def _epoch_writer(
    run_dir: Path, model: ConvNeXtV2, spec: TrainingSpec, dataset: Dataset, licence: str
) -> Callable[[list[EpochRecord], bool], None]:
    def write(records: list[EpochRecord], is_best: bool) -> None:
        for name in ("last", "best") if is_best else ("last",):
            save_checkpoint(
                run_dir / f"{name}.safetensors",
                model,
                class_names=dataset.class_names,
                preprocessing=spec.preprocessing.to_dict(),
                licence=licence,
                extra={"epoch": str(records[-1].epoch)},
            )
        table = io.StringIO()
        rows = csv.DictWriter(table, records[-1].to_dict().keys(), lineterminator="\n")
        rows.writeheader()
        rows.writerows({name: f"{value:.6g}" for name, value in record.to_dict().items()} for record in records)
        _write_whole(run_dir / "metrics.csv", table.getvalue())

    return write


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
