"""`cnx-deploy pretrain`."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnx_deploy.cli import options

if TYPE_CHECKING:
    from cnx_deploy.cli.training_progress import TerminalProgress
    from cnx_deploy.training import StepReport
    from cnx_deploy.training.fcmae import PretrainingRecord, PretrainingResult, PretrainingSpec, UnlabelledImages

INTERRUPTED = 130
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@options.variant
@options.checkpoint
@click.option("--mask-ratio", type=float, default=0.6, show_default=True, help="Share of patches that are hidden.")
@click.option("--epochs", type=int, default=800, show_default=True)
@click.option("--image-size", type=int, default=224, show_default=True, help="Side in pixels, a multiple of 32.")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images a process and step.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Batches that make one optimiser step.")
@click.option("--learning-rate", type=float, help="Highest rate [default: from --base-learning-rate].")
@click.option(
    "--base-learning-rate", type=float, default=1.5e-4, show_default=True,
    help="Highest rate for 256 images a step, scaled to what a step has.",
)  # fmt: skip
@click.option("--weight-decay", type=float, default=0.05, show_default=True, help="Not on norms, biases and GRN.")
@click.option("--warmup-epochs", type=float, help="Linear warm-up [default: 40, at most a twentieth of the epochs].")
@click.option("--min-crop-area", type=float, default=0.2, show_default=True, help="Least area of a random crop.")
@click.option(
    "--held-images", type=int, default=64, show_default=True,
    help="Kept out of training, at most a tenth of all; the best weights are those with the lowest loss on them.",
)  # fmt: skip
@click.option("--picture-every", type=int, help="Epochs between pictures [default: a tenth of them].")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--workers", type=int, help="Loader processes [default: 0 where the images fit in memory].")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--deterministic", is_flag=True, help="Only GPU kernels that give the same bits again.")
@click.option("--output-dir", type=FOLDER, default=Path("runs"), show_default=True, help="A run is a folder in it.")
@click.option("--run-dir", type=FOLDER, help="The run's folder itself [default: a fresh <variant>-fcmae-NNN].")
@click.option("--resume", is_flag=True, help="Go on with the newest run of the variant, or with --run-dir.")
@click.option("--no-image-check", is_flag=True, help="Start without decoding every image once to find broken ones.")
@click.option("--show-config", is_flag=True, help="Print the whole configuration as JSON and train nothing.")
@options.as_json
def pretrain(checkpoint: Path | None, no_image_check: bool, show_config: bool, as_json: bool, **request: Any) -> None:
    """Pre-train a variant on DATA, any folder of images, by predicting hidden patches (FCMAE).

    The run's folder holds the encoder as best.safetensors and last.safetensors, metrics.csv and pictures of
    reconstructions. `cnx-deploy train --checkpoint FILE --reset-head` goes on from the encoder. Ctrl-C leaves a run for
    --resume.
    """
    from cnx_deploy.training import launch_from_environment
    from cnx_deploy.training.fcmae import PretrainingSpec  # torch is loaded only when asked for

    spec = PretrainingSpec(**request, launch=launch_from_environment(os.environ))
    if show_config:
        options.echo_json(spec.resolved())
        return
    images = _images(spec, check=not no_image_check)
    result = _pretrained(spec, checkpoint, images)
    if spec.launch.rank == 0:
        _tell(result, as_json=as_json)
    if result.interrupted:
        options.note("Interrupted. Go on with the same command and --resume.")
        sys.exit(INTERRUPTED)


class PretrainingOnTerminal:
    """A `PretrainingProgress` on stderr: a bar on a terminal, a line an epoch elsewhere."""

    def __init__(self, terminal: "TerminalProgress") -> None:
        self.terminal = terminal

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Set the bar's length."""
        self.terminal.begin(epochs, steps_per_epoch, epochs_done)

    def step(self, report: "StepReport") -> None:
        """Move the bar."""
        self.terminal.step(report)

    def end_epoch(self, record: "PretrainingRecord", is_best: bool) -> None:
        """Print the epoch's line."""
        line = (
            f"Epoch {record.epoch}/{self.terminal.epochs}: loss {record.loss:.4f}, held images {record.held_loss:.4f}"
            f"{' (best)' if is_best else ''}, {record.seconds:.1f} s, {record.images_per_second:.0f} images/s"
        )
        self.terminal.console.print(line, highlight=False, soft_wrap=True)


def _images(spec: "PretrainingSpec", *, check: bool) -> "UnlabelledImages":
    """The images to train on, those that cannot be read left out; says what there is."""
    from cnx_deploy.training.fcmae import divide_images, find_images_below, readable_images

    found = find_images_below(spec.data)
    lines: list[str] = []
    if check:
        with options.reporter("Checking images") as progress:
            found, report = readable_images(
                found, progress=lambda done, total: progress(f"{done} of {total}", done / total)
            )
        lines += report.lines() if report.broken else []
    images = divide_images(found, spec.held_images)
    lines.append(f"{len(images.train.paths)} images to train on, {len(images.held.paths)} held out")
    for line in lines if spec.launch.rank == 0 else ():
        options.note(line)
    return images


def _pretrained(spec: "PretrainingSpec", checkpoint: Path | None, images: "UnlabelledImages") -> "PretrainingResult":
    from cnx_deploy.cli.training_progress import TerminalProgress
    from cnx_deploy.training.fcmae import load_autoencoder
    from cnx_deploy.training.fcmae import pretrain as run

    how: dict[str, Any] = {"images": images}
    if checkpoint is not None:
        how["initial"], loaded = load_autoencoder(checkpoint, spec.network, seed=spec.seed)
        how["licence"] = loaded.weights.licence
        for text in loaded.notes:
            options.note(f"Note: {text}")
    with TerminalProgress() as terminal:
        return run(spec, progress=PretrainingOnTerminal(terminal), **how)


def _tell(result: "PretrainingResult", *, as_json: bool) -> None:
    if as_json:
        plain = dataclasses.asdict(result).items()
        options.echo_json({name: str(value) if isinstance(value, Path) else value for name, value in plain})
    elif result.best is None:
        options.echo(f"{result.run_dir}: no epoch finished")
    else:
        options.echo(
            f"{result.best}: loss {result.first_loss:.4f} in the first epoch, {result.last_loss:.4f} in the last of "
            f"{result.epochs_run}; held images {result.best_held_loss:.4f} at best"
        )
