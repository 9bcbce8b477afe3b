"""Ways of training compared under equal settings, over several seeds: mean, spread and every single result.

`compare.py v1-v2 DATA` trains ConvNeXt V1 and V2 of one size from scratch. `compare.py pretraining DATA` trains from
scratch and from a masked pre-training on all training images, with a few labels a class. `compare.py uneven DATA` thins
out every other class and trains with what `train` has for it. Runs that are finished are kept, so an interrupted
comparison goes on where it was. Needs the extra `demo`, whose scikit-learn brings SciPy.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from scipy import stats

from cnx_deploy.cli.training_progress import TerminalProgress
from cnx_deploy.core.errors import CnxDeployError, CorruptArtifactError
from cnx_deploy.data import few_labels, find_dataset
from cnx_deploy.training import TrainingSpec, initial_model, spec_from_recipe, train
from cnx_deploy.training.fcmae import PretrainingSpec, pretrain
from cnx_deploy.training.metrics import read_table

FOLDER = click.Path(file_okay=False, path_type=Path)
Sides = dict[str, list[list[float]]]
"""The ways of training, first what the others are compared with: for each seed, a figure in percent of every epoch."""
UNEVEN: dict[str, dict[str, Any]] = {
    "as they are": {},
    "class weights": {"class_weights": "balanced"},
    "balanced sampling": {"sampling": "balanced"},
    "focal loss": {"loss": "focal"},
}
"""What `uneven` compares, as options of a request."""


@click.group()
def main() -> None:
    """Compare ways of training."""


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
    sides: Sides = {"V1": [], "V2": []}
    for name, variant in (("V1", f"v1-{size}"), ("V2", size)):
        for seed in range(seeds):
            spec = spec_of(data, variant, seed, output_dir / f"{variant}-seed-{seed}", **settings)
            sides[name].append(trained(spec))
    conclude(f"ConvNeXt {size} on {data.name}", sides, settings, output_dir / "v1-v2.json")


@main.command()
@shared_options
@click.option("--variant", default="atto", show_default=True)
@click.option("--labels", type=click.IntRange(min=1), default=10, show_default=True, help="Labelled images a class.")
@click.option("--epochs", type=int, default=60, show_default=True, help="With labels.")
@click.option("--pretraining-epochs", type=int, default=100, show_default=True, help="Without labels.")
@click.option("--pretraining-learning-rate", type=float, default=1e-3, show_default=True, help="Highest rate of it.")
def pretraining(
    data: Path, variant: str, seeds: int, labels: int, pretraining_epochs: int, pretraining_learning_rate: float,
    output_dir: Path, **settings: Any,
) -> None:  # fmt: skip
    """Train with few labels from scratch and from masked pre-training on all training images."""
    request = PretrainingSpec(
        data, variant, run_dir=output_dir / "pretraining", epochs=pretraining_epochs,
        image_size=settings["image_size"], learning_rate=pretraining_learning_rate,
        min_crop_area=settings["min_crop_area"],
    )  # fmt: skip
    finished(request, pretrain)
    encoder, dataset = output_dir / "pretraining" / "last.safetensors", find_dataset(data)
    sides: Sides = {"from scratch": [], "pre-trained": []}
    for seed in range(seeds):
        few = few_labels(dataset, labels, seed=seed)
        for name, init in (("from scratch", None), ("pre-trained", encoder)):
            run_dir = output_dir / f"{name.replace(' ', '-')}-seed-{seed}"
            sides[name].append(trained(spec_of(data, variant, seed, run_dir, **settings), init, few))
    settings |= {"labels": labels, "pretraining_epochs": pretraining_epochs}
    settings["pretraining_learning_rate"] = pretraining_learning_rate
    title = f"{variant} on {data.name} with {labels} labels a class"
    conclude(title, sides, settings, output_dir / "pretraining.json")


@main.command()
@shared_options
@click.option("--variant", default="atto", show_default=True)
@click.option("--rare", type=click.IntRange(min=1), default=5, show_default=True, help="Images of every other class.")
@click.option("--common", type=click.IntRange(min=1), help="Images of the classes between [default: all].")
@click.option("--epochs", type=int, default=30, show_default=True)
def uneven(
    data: Path, variant: str, seeds: int, rare: int, common: int | None, output_dir: Path, **settings: Any
) -> None:
    """Train with few images of every other class: as they are, weighed, drawn equally often, with the focal loss."""
    dataset = find_dataset(data)
    sides: Sides = {name: [] for name in UNEVEN}
    for seed in range(seeds):
        kept, few = dataset.train, few_labels(dataset, rare, seed=seed).train
        many = kept if common is None else few_labels(dataset, common, seed=seed).train
        chosen = {*few.paths, *(path for path, label in zip(many.paths, many.labels, strict=True) if label % 2 == 0)}
        thinned = replace(dataset, train=kept.subset([at for at, path in enumerate(kept.paths) if path in chosen]))
        for name, change in UNEVEN.items():
            run_dir = output_dir / f"{name.replace(' ', '-')}-seed-{seed}"
            sides[name].append(trained(spec_of(data, variant, seed, run_dir, **settings, **change), None, thinned))
    title = f"{variant} on {data.name} with {rare} images of every other class"
    conclude(title, sides, {**settings, "rare": rare, "common": common}, output_dir / "uneven.json")


def spec_of(data: Path, variant: str, seed: int, run_dir: Path, **settings: Any) -> TrainingSpec:
    """The same request for both sides but for the network and the seed."""
    return spec_from_recipe(data, variant, label_smoothing=0.0, crop_ratio=1.0, seed=seed, run_dir=run_dir, **settings)


def trained(spec: TrainingSpec, init: Path | None = None, dataset: Any = None) -> list[float]:
    """Train, from weights or from scratch; gives the validation top-1 in percent of each epoch."""

    def run(spec: TrainingSpec, progress: TerminalProgress) -> Any:
        return train(spec, None if init is None else initial_model(spec, init=init), progress, dataset=dataset)

    table = finished(spec, run)
    top1 = read_table(table).get("val_top1_percent", [math.nan])
    if not all(map(math.isfinite, top1)):
        raise CorruptArtifactError(f"{table} has an epoch without val_top1_percent. Train again.")
    return top1


def finished(spec: Any, run: Callable[..., Any]) -> Path:
    """Run a request, go on with an interrupted run, or keep a finished one; gives its table."""
    table = spec.run_dir / "metrics.csv"
    is_kept = table.is_file() and len(table.read_text().splitlines()) > spec.epochs
    click.echo(f"{spec.run_dir}{': kept' if is_kept else ''}", err=True)
    if not is_kept:
        with TerminalProgress() as progress:
            result = run(replace(spec, resume=(spec.run_dir / "last.ckpt").is_file()), progress=progress)
        if result.interrupted:
            sys.exit(130)
    return table


def conclude(title: str, sides: Sides, settings: dict[str, Any], path: Path) -> None:
    """Print every result, means and the paired differences from the first with their 95 % intervals; write JSON."""
    last = {name: [run[-1] for run in runs] for name, runs in sides.items()}
    (before, first), *others = last.items()
    click.echo(f"{title}; top-1 % after the last epoch, {len(first)} seeds")
    width = max(13, *map(len, last))
    for name, values in last.items():
        shown = ", ".join(f"{value:.2f}" for value in values)
        click.echo(f"  {name:{width}} {statistics.mean(values):6.2f} ± {statistics.stdev(values):.2f}  ({shown})")
    differences = []
    for after, values in others:
        each = [later - earlier for earlier, later in zip(first, values, strict=True)]
        mean, student = statistics.mean(each), float(stats.t.ppf(0.975, len(each) - 1))
        half = student * statistics.stdev(each) / math.sqrt(len(each))
        differences.append({"mean": mean, "half_width_95": half, "each": each})
        told = f"{after if mean > 0 else before} is better" if abs(mean) > half else "no difference shown"
        of = "difference" if len(others) == 1 else after
        click.echo(f"  {of:{width}} {mean:+6.2f} ± {half:.2f} (95 % of the mean, paired by seed): {told}")
    document = {
        "title": title,
        "settings": settings,
        "sides": [
            {"name": name, "last": last[name], "best": [max(run) for run in runs]} for name, runs in sides.items()
        ],
        **({"difference": differences[0]} if len(others) == 1 else {"differences": differences}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except CnxDeployError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
