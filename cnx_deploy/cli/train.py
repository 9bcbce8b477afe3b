"""`cnx-deploy train`."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnx_deploy.cli import options
from cnx_deploy.cli.training_options import SECTIONS, recipe_options, run_options

if TYPE_CHECKING:
    from cnx_deploy.data import Dataset
    from cnx_deploy.training import TrainingSpec


@click.command(cls=options.SectionedCommand, sections=SECTIONS)
@click.argument("data", type=options.PATH)
@options.image_folder
@click.option(
    "--task", type=click.Choice(["classification", "multi-label", "segment", "detect"]),
    help="One class an image, several labels, a class for each pixel, or boxes and masks of things [classification; "
    "that of the recipe].",
)  # fmt: skip
@options.task_options
@options.variant
@click.option(
    "--checkpoint", type=click.Path(exists=True, path_type=Path), help="Weights to start from, any known layout."
)
@options.pretrained
@click.option("--reset-head", is_flag=True, help="Draw a new head for --checkpoint or --pretrained.")
@options.ema
@options.entry
@options.soup
@click.option(
    "--init",
    type=click.Path(exists=True, path_type=Path),
    help="Weights to start from; a head of other classes is drawn anew.",
)
@click.option(
    "--recipe", type=click.Choice(["plain", "fine-tune", "from-scratch", "article", "ade20k", "coco"]), default="plain",
    show_default=True, help="What sets the options that are not given: the papers' for the variant, or the article's.",
)  # fmt: skip
@recipe_options
@click.option("--freeze-backbone", is_flag=True, help="Train the head alone.")
@click.option("--channels-last", is_flag=True, help="Keep images and kernels channels last.")
@click.option("--compile", is_flag=True, help="Train the network as torch.compile makes it.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's events into the run's folder.")
@run_options("<variant>")
def train(
    checkpoint: Path | None, pretrained: str | None, reset_head: bool, ema: bool | None, entry: str | None,
    soup: tuple[Path, ...], init: Path | None, show_config: bool, no_image_check: bool, as_json: bool, data: Path,
    variant: str, recipe: str, **request: Any,
) -> None:  # fmt: skip
    """Train a variant on DATA: train/ and val/ folders of classes, one folder of classes to split, or a CSV file.

    With --task segment DATA holds images/ and masks/ (labels/, annotations/), each with train/ and val/, or is arranged
    as Cityscapes or Pascal VOC; a mask's values are classes, 255 is not counted.

    With --task multi-label a CSV file has a column of labels, or one of 0 and 1 for each; images have .txt files of
    tags beside them; or an image lies in several class folders.

    Weights to start from bring the mean and deviation of their pixels along, where --mean and --std do not say others.

    The run's folder holds best.safetensors, last.safetensors, metrics.csv and curves.svg. Ctrl-C leaves a run for
    --resume. Under torchrun or srun every process takes its share of each step.
    """
    from cnx_deploy import training  # torch is loaded only when asked for
    from cnx_deploy.cli.training_progress import TerminalProgress, note_once, tell

    given = {name: value for name, value in request.items() if value is not None}
    launch = training.launch_from_environment(os.environ)
    spec = training.spec_from_recipe(data, variant, recipe, launch=launch, **given)
    if show_config:
        if (checkpoint or pretrained or init) and None in (spec.mean, spec.std):
            options.note("Note: mean and std are those of the weights, which are read when the run begins.")
        options.echo_json(spec.resolved())
        return
    training.check_new(spec)
    dataset = _dataset(spec, check=not no_image_check)
    words: dict[str, Any] = {"pretrained": pretrained, "reset_head": reset_head, "ema": ema, "entry": entry}
    loaded = training.initial_model(spec, checkpoint=checkpoint, init=init, soup=soup, **words)
    for text in loaded.notes if loaded is not None else ():
        options.note(f"Note: {text}")
    with TerminalProgress() as progress:
        result = training.train(spec, loaded, progress, dataset=dataset)
    if no_image_check:  # what has not been looked at before
        note_once((f"Note: {text}" for text in dataset.observed()), launch)
    if launch.rank == 0 and result.epochs_run:
        _draw_curves(result.run_dir)
    tell(result, launch, as_json=as_json)


def _dataset(spec: "TrainingSpec", *, check: bool) -> "Dataset":
    """The images to train on, those that cannot be read left out; says what there is."""
    from cnx_deploy.cli.training_progress import checked, note_once
    from cnx_deploy.data import class_balance, instance_lines, label_lines, pixel_lines, without_broken
    from cnx_deploy.training import balance_lines, find_training_images

    dataset = find_training_images(spec)
    lines: list[str] = []
    note_once((f"Note: {text}" for text in dataset.notes), spec.launch)
    if check:
        dataset, lines = checked(partial(without_broken, white_level=spec.white_level, in_chans=spec.in_chans), dataset)
    observed = [f"Note: {text}" for text in dataset.observed()]
    if spec.purpose.targets == "masks":
        counts = list(pixel_lines(dataset))
    elif spec.purpose.targets == "instances":
        counts = list(instance_lines(dataset))
    elif dataset.train.label_sets is None:
        balance = class_balance(dataset)
        warning = [f"Warning: {balance.warning}"] if balance.warning and not spec.is_balanced else []
        counts = [*balance.lines(), *warning]
    else:
        counts = list(label_lines(dataset))
    weights = () if spec.purpose.is_dense else balance_lines(spec, dataset)
    note_once((*lines, *observed, *counts, *weights), spec.launch)
    return dataset


def _draw_curves(run_dir: Path) -> None:
    from cnx_deploy.core.errors import MissingRequirementError
    from cnx_deploy.training.metrics import draw_curves

    try:
        draw_curves(run_dir)
    except MissingRequirementError:
        options.note('No curves.svg: matplotlib is not installed (pip install "cnx-deploy[report]").')
