"""`cnx-deploy train`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cnx_deploy.variants import VARIANTS

if TYPE_CHECKING:
    from cnx_deploy.training_spec import EpochRecord, TrainingResult

INTERRUPTED = 130
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("data", type=FOLDER)
@click.option("--variant", type=click.Choice(list(VARIANTS)), required=True, help="Size of the network.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights to start from, any known layout.",
)
@click.option("--pretrained", metavar="TAG", help="Published weights, e.g. convnextv2_atto.fcmae_ft_in1k.")
@click.option("--reset-head", is_flag=True, help="Draw a new head where the classes differ.")
@click.option("--epochs", type=int, default=30, show_default=True)
@click.option("--image-size", type=int, default=224, show_default=True, help="Side in pixels, a multiple of 32.")
@click.option("--batch-size", type=int, default=32, show_default=True)
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True)
@click.option("--learning-rate", type=float, help="Highest rate [default: 1e-3 for adamw, 5e-3 for sgd].")
@click.option("--weight-decay", type=float, default=0.05, show_default=True)
@click.option("--warmup-epochs", type=float, help="Epochs of linear warm-up [default: a tenth].")
@click.option("--drop-path-rate", type=float, default=0.0, show_default=True, help="Stochastic depth, last block.")
@click.option("--label-smoothing", type=float, default=0.1, show_default=True)
@click.option("--crop-ratio", type=float, default=0.875, show_default=True, help="Centre crop of validation images.")
@click.option(
    "--min-crop-area",
    type=float,
    default=0.5,
    show_default=True,
    help="Least area of a random crop; 1: no random crop.",
)
@click.option("--no-flip", is_flag=True, help="No mirror images: for digits, letters, signs.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--workers", type=int, help="Loader processes [default: 0 where the images fit in memory].")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--output-dir", type=FOLDER, default=Path("runs"), show_default=True, help="A run is a folder in it.")
@click.option("--run-dir", type=FOLDER, help="The run's folder itself [default: a fresh <variant>-NNN].")
@click.option("--resume", is_flag=True, help="Go on with the newest run of the variant, or with --run-dir.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def train(
    checkpoint: Path | None, pretrained: str | None, reset_head: bool, no_flip: bool, as_json: bool, **request: Any
) -> None:
    """Train a variant on DATA: train/ and val/ folders of classes, or one folder of classes to split.

    The run's folder holds best.safetensors, last.safetensors and metrics.csv. Ctrl-C leaves a run for --resume.
    """
    from cnx_deploy import training  # torch is loaded only when asked for

    spec = training.TrainingSpec(flip=not no_flip, **request)
    loaded = training.initial_model(spec, checkpoint=checkpoint, pretrained=pretrained, reset_head=reset_head)
    with TerminalProgress() as progress:
        if loaded is None:
            result = training.train(spec, progress=progress)
        else:
            result = training.train(spec, loaded.model, progress, licence=loaded.weights.licence)
    click.echo(json.dumps(_plain(result), indent=2) if as_json else _summary(result))
    if result.interrupted:
        click.echo("Interrupted. Go on with the same command and --resume.", err=True)
        sys.exit(INTERRUPTED)


class TerminalProgress:
    """Training's progress on stderr: a bar on a terminal, a line an epoch elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("Reading images", total=None)
        self.epochs = self.steps_per_epoch = 0

    def __enter__(self) -> "TerminalProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Set the bar's length."""
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.bar.update(self.task, total=epochs * steps_per_epoch, completed=epochs_done * steps_per_epoch)

    def step(self, epoch: int, step: int, mean_loss: float) -> None:
        """Move the bar."""
        description = f"Epoch {epoch}/{self.epochs}, loss {mean_loss:.3f}"
        self.bar.update(self.task, completed=(epoch - 1) * self.steps_per_epoch + step, description=description)

    def end_epoch(self, record: "EpochRecord", is_best: bool) -> None:
        """Print the epoch's line."""
        line = (
            f"Epoch {record.epoch}/{self.epochs}: loss {record.train_loss:.4f}, validation loss {record.val_loss:.4f}, "
            f"top-1 {record.val_top1_percent:.2f} %{' (best)' if is_best else ''}, {record.seconds:.1f} s"
        )
        self.console.print(line, highlight=False, soft_wrap=True)


def _plain(result: "TrainingResult") -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(result).items()
    }


def _summary(result: "TrainingResult") -> str:
    if result.best is None:
        return f"{result.run_dir}: no epoch finished"
    return f"{result.best}: top-1 {result.best_top1_percent:.2f} % after {result.epochs_run} epochs"
