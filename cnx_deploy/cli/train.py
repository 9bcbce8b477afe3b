"""`cnx-deploy train`."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnx_deploy.cli import options
from cnx_deploy.cli.training_options import recipe_options

if TYPE_CHECKING:
    from cnx_deploy.data import Dataset
    from cnx_deploy.training import TrainingResult, TrainingSpec

INTERRUPTED = 130
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@options.variant
@click.option("--checkpoint", type=FILE, help="Weights to start from, any known layout.")
@click.option("--pretrained", metavar="TAG", help="Published weights, e.g. convnextv2_atto.fcmae_ft_in1k.")
@click.option("--reset-head", is_flag=True, help="Draw a new head for --checkpoint or --pretrained.")
@click.option("--init", type=FILE, help="Weights to start from; a head of other classes is drawn anew.")
@click.option(
    "--recipe", type=click.Choice(["plain", "fine-tune", "from-scratch", "article"]), default="plain",
    show_default=True, help="What sets the options that are not given: the papers' for the variant, or the article's.",
)  # fmt: skip
@recipe_options
@click.option("--freeze-backbone", is_flag=True, help="Train the head alone.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--workers", type=int, help="Loader processes [default: 0 where the images fit in memory].")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--channels-last", is_flag=True, help="Keep images and kernels channels last.")
@click.option("--compile", is_flag=True, help="Train the network as torch.compile makes it.")
@click.option("--deterministic", is_flag=True, help="Only GPU kernels that give the same bits again.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's events into the run's folder.")
@click.option("--output-dir", type=FOLDER, default=Path("runs"), show_default=True, help="A run is a folder in it.")
@click.option("--run-dir", type=FOLDER, help="The run's folder itself [default: a fresh <variant>-NNN].")
@click.option("--resume", is_flag=True, help="Go on with the newest run of the variant, or with --run-dir.")
@click.option("--no-image-check", is_flag=True, help="Start without decoding every image once to find broken ones.")
@click.option("--show-config", is_flag=True, help="Print the whole configuration as JSON and train nothing.")
@options.as_json
def train(
    checkpoint: Path | None, pretrained: str | None, reset_head: bool, init: Path | None, show_config: bool,
    no_image_check: bool, as_json: bool, data: Path, variant: str, recipe: str, **request: Any,
) -> None:  # fmt: skip
    """Train a variant on DATA: train/ and val/ folders of classes, one folder of classes to split, or a CSV file.

    The run's folder holds best.safetensors, last.safetensors, metrics.csv and curves.svg. Ctrl-C leaves a run for
    --resume. Under torchrun or srun every process takes its share of each step.
    """
    from cnx_deploy import training  # torch is loaded only when asked for

    given = {name: value for name, value in request.items() if value is not None}
    launch = training.launch_from_environment(os.environ)
    spec = training.spec_from_recipe(data, variant, recipe, launch=launch, **given)
    if show_config:
        options.echo_json(spec.resolved())
        return
    sources = {"checkpoint": checkpoint, "pretrained": pretrained, "reset_head": reset_head, "init": init}
    result = _trained(spec, sources, _dataset(spec, check=not no_image_check))
    if launch.rank == 0:
        _tell(result, as_json=as_json)
    if result.interrupted:
        options.note("Interrupted. Go on with the same command and --resume.")
        sys.exit(INTERRUPTED)


def _dataset(spec: "TrainingSpec", *, check: bool) -> "Dataset":
    """The images to train on, those that cannot be read left out; says what there is."""
    from cnx_deploy.data import class_balance, find_dataset, without_broken

    dataset = find_dataset(spec.data, seed=spec.seed)
    lines: list[str] = []
    if check:
        with options.reporter("Checking images") as progress:
            dataset, report = without_broken(
                dataset, progress=lambda done, total: progress(f"{done} of {total}", done / total)
            )
        lines += report.lines() if report.broken else []
    balance = class_balance(dataset)
    lines += balance.lines()
    lines += [f"Warning: {balance.warning}"] if balance.warning else []
    for line in lines if spec.launch.rank == 0 else ():
        options.note(line)
    return dataset


def _trained(spec: "TrainingSpec", sources: dict[str, Any], dataset: "Dataset") -> "TrainingResult":
    from cnx_deploy import training
    from cnx_deploy.cli.training_progress import TerminalProgress

    loaded = training.initial_model(spec, **sources)
    for text in loaded.notes if loaded is not None else ():
        options.note(f"Note: {text}")
    with TerminalProgress() as progress:
        if loaded is None:
            return training.train(spec, progress=progress, dataset=dataset)
        licence = loaded.weights.licence
        return training.train(spec, loaded.model, progress, licence=licence, dataset=dataset)


def _tell(result: "TrainingResult", *, as_json: bool) -> None:
    from cnx_deploy.core.errors import MissingRequirementError
    from cnx_deploy.training.curves import draw_curves

    if result.epochs_run:
        try:
            draw_curves(result.run_dir)
        except MissingRequirementError:
            options.note('No curves.svg: matplotlib is not installed (pip install "cnx-deploy[report]").')
    if as_json:
        plain = dataclasses.asdict(result).items()
        options.echo_json({name: str(value) if isinstance(value, Path) else value for name, value in plain})
    elif result.best is None:
        options.echo(f"{result.run_dir}: no epoch finished")
    else:
        options.echo(f"{result.best}: top-1 {result.best_top1_percent:.2f} % after {result.epochs_run} epochs")
