"""Two ways of training compared under equal settings, over several seeds: mean, spread and every single result.

`compare.py v1-v2 DATA` trains ConvNeXt V1 and V2 of one size from scratch. `compare.py pretraining DATA` trains from
scratch and from a masked pre-training on all training images, with a few labels a class. Runs that are finished are
kept, so an interrupted comparison goes on where it was.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli.training_progress import TerminalProgress
from cnx_deploy.core.errors import CnxDeployError, CorruptArtifactError
from cnx_deploy.data import few_labels, find_dataset
from cnx_deploy.training import TrainingSpec, initial_model, spec_from_recipe, train
from cnx_deploy.training.fcmae import PretrainingSpec, pretrain
from cnx_deploy.training.metrics import read_table

STUDENT_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % points of Student's t with 1 to 9 degrees of freedom."""
FOLDER = click.Path(file_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class Side:
    """One way of training and what its seeds gave, top-1 in percent of the last epoch and of the best one."""

    name: str
    last: tuple[float, ...]
    best: tuple[float, ...]


@click.group()
def main() -> None:
    """Compare two ways of training."""


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What both comparisons take."""
    for option in (
        click.argument("data", type=click.Path(path_type=Path)),
        click.option("--seeds", type=click.IntRange(2, 10), default=3, show_default=True, help="Runs of each side."),
        click.option("--image-size", type=int, default=64, show_default=True),
        click.option("--batch-size", type=int, default=32, show_default=True),
        click.option("--learning-rate", type=float, default=1e-3, show_default=True),
        click.option("--flip/--no-flip", default=True, show_default=True, help="Mirror images: not for digits."),
        click.option("--min-crop-area", type=float, default=0.8, show_default=True),
        click.option("--output-dir", type=FOLDER, default=Path("compared"), show_default=True),
    ):
        command = option(command)
    return command


@main.command("v1-v2")
@shared_options
@click.option("--size", default="atto", show_default=True, help="Size of both networks.")
@click.option("--epochs", type=int, default=12, show_default=True)
def v1_v2(data: Path, size: str, seeds: int, output_dir: Path, **settings: Any) -> None:
    """Train V1 (LayerScale, no GRN) and V2 (GRN) from scratch."""
    sides = []
    for name, variant in (("V1", f"v1-{size}"), ("V2", size)):
        specs = [
            spec_of(data, variant, seed, output_dir / f"{variant}-seed-{seed}", **settings) for seed in range(seeds)
        ]
        sides.append(side_of(name, [finished(spec) for spec in specs]))
    conclude(f"ConvNeXt {size} on {data.name}", sides, settings, output_dir / "v1-v2.json")


@main.command()
@shared_options
@click.option("--variant", default="atto", show_default=True)
@click.option("--labels", type=click.IntRange(min=1), default=10, show_default=True, help="Labelled images a class.")
@click.option("--epochs", type=int, default=60, show_default=True, help="With labels.")
@click.option("--pretraining-epochs", type=int, default=100, show_default=True, help="Without labels.")
@click.option("--pretraining-learning-rate", type=float, default=1e-3, show_default=True, help="Highest rate of it.")
def pretraining(
    data: Path,
    variant: str,
    seeds: int,
    labels: int,
    pretraining_epochs: int,
    pretraining_learning_rate: float,
    output_dir: Path,
    **settings: Any,
) -> None:
    """Train with few labels from scratch and from masked pre-training on all training images."""
    request = PretrainingSpec(
        data,
        variant,
        run_dir=output_dir / "pretraining",
        epochs=pretraining_epochs,
        image_size=settings["image_size"],
        learning_rate=pretraining_learning_rate,
        min_crop_area=settings["min_crop_area"],
    )
    encoder = pretrained_encoder(request)
    dataset = find_dataset(data)
    results: dict[str, list[Path]] = {"from scratch": [], "pre-trained": []}
    for seed in range(seeds):
        few = few_labels(dataset, labels, seed=seed)
        for name, init in (("from scratch", None), ("pre-trained", encoder)):
            run_dir = output_dir / f"{name.replace(' ', '-')}-seed-{seed}"
            results[name].append(finished(spec_of(data, variant, seed, run_dir, **settings), init=init, dataset=few))
    sides = [side_of(name, tables) for name, tables in results.items()]
    title = f"{variant} on {data.name} with {labels} labels a class"
    more = {
        "labels": labels,
        "pretraining_epochs": pretraining_epochs,
        "pretraining_learning_rate": pretraining_learning_rate,
    }
    conclude(title, sides, {**settings, **more}, output_dir / "pretraining.json")


def spec_of(data: Path, variant: str, seed: int, run_dir: Path, **settings: Any) -> TrainingSpec:
    """The same request for both sides but for the network and the seed."""
    return spec_from_recipe(data, variant, label_smoothing=0.0, crop_ratio=1.0, seed=seed, run_dir=run_dir, **settings)


def finished(spec: TrainingSpec, init: Path | None = None, dataset: Any = None) -> Path:
    """Train, go on with an interrupted run, or keep a finished one; gives its table."""
    assert spec.run_dir is not None
    table = spec.run_dir / "metrics.csv"
    if table.is_file() and len(table.read_text().splitlines()) > spec.epochs:
        click.echo(f"{spec.run_dir}: kept", err=True)
        return table
    loaded = None if init is None else initial_model(spec, init=init)
    with TerminalProgress() as progress:
        click.echo(f"{spec.run_dir}", err=True)
        if train(
            replace(spec, resume=(spec.run_dir / "last.ckpt").is_file()),
            None if loaded is None else loaded.model,
            progress,
            dataset=dataset,
        ).interrupted:
            sys.exit(130)
    return table


def pretrained_encoder(request: PretrainingSpec) -> Path:
    """Pre-train, or keep a finished pre-training."""
    assert request.run_dir is not None
    table, weights = request.run_dir / "metrics.csv", request.run_dir / "last.safetensors"
    if not (table.is_file() and len(table.read_text().splitlines()) > request.epochs):
        click.echo(f"{request.run_dir}", err=True)
        with TerminalProgress() as progress:
            resumed = replace(request, resume=(request.run_dir / "last.ckpt").is_file())
            if pretrain(resumed, progress=progress).interrupted:
                sys.exit(130)
    return weights


def side_of(name: str, tables: list[Path]) -> Side:
    """Read the results of a side's runs."""
    results = [top1_of(table) for table in tables]
    return Side(name, tuple(each[-1] for each in results), tuple(max(each) for each in results))


def top1_of(table: Path) -> list[float]:
    """Validation top-1 in percent of each epoch. Raises CorruptArtifactError where the table has none."""
    top1 = read_table(table).get("val_top1_percent", [])
    if not top1 or not all(map(math.isfinite, top1)):
        raise CorruptArtifactError(f"{table} has an epoch without val_top1_percent. Train again.")
    return top1


def conclude(title: str, sides: list[Side], settings: dict[str, Any], path: Path) -> None:
    """Print every result, means and the paired difference with its 95 % interval; write them as JSON."""
    before, after = sides
    differences = [second - first for first, second in zip(before.last, after.last, strict=True)]
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    half = STUDENT_T_95[len(differences) - 2] * spread / math.sqrt(len(differences))
    click.echo(f"{title}; top-1 % after the last epoch, {len(differences)} seeds")
    for side in sides:
        shown = ", ".join(f"{value:.2f}" for value in side.last)
        click.echo(f"  {side.name:13} {statistics.mean(side.last):6.2f} ± {statistics.stdev(side.last):.2f}  ({shown})")
    told = "no difference shown" if abs(mean) <= half else f"{after.name if mean > 0 else before.name} is better"
    click.echo(f"  difference    {mean:+6.2f} ± {half:.2f} (95 % of the mean, paired by seed): {told}")
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    document = {
        "title": title,
        "settings": plain,
        "sides": [{"name": side.name, "last": side.last, "best": side.best} for side in sides],
        "difference": {"mean": mean, "half_width_95": half, "each": differences},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except CnxDeployError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
