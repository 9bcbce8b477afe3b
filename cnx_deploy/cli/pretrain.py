"""`cnx-deploy pretrain`."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnx_deploy.cli import options
from cnx_deploy.cli.training_options import run_options

if TYPE_CHECKING:
    from cnx_deploy.data import Dataset
    from cnx_deploy.training.fcmae import PretrainingSpec


@click.command()
@click.argument("data", type=options.PATH)
@options.variant
@options.checkpoint
@options.ema
@options.entry
@click.option("--mask-ratio", type=float, default=0.6, show_default=True, help="Share of patches that are hidden.")
@click.option("--epochs", type=int, default=800, show_default=True)
@click.option(
    "--image-size",
    type=options.IMAGE_SIZE,
    default="224",
    show_default=True,
    help="Side, or height x width, each a multiple of 32.",
)
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
@run_options("<variant>-fcmae")
def pretrain(
    checkpoint: Path | None, ema: bool | None, entry: str | None, no_image_check: bool, show_config: bool,
    as_json: bool, **request: Any,
) -> None:  # fmt: skip
    """Pre-train a variant on DATA, any folder of images, by predicting hidden patches (FCMAE).

    The run's folder holds the encoder as best.safetensors and last.safetensors, metrics.csv and pictures of
    reconstructions. `cnx-deploy train --checkpoint FILE --reset-head` goes on from the encoder. Ctrl-C leaves a run for
    --resume.
    """
    from cnx_deploy.cli.training_progress import TerminalProgress, tell
    from cnx_deploy.training import check_new, fcmae, launch_from_environment  # torch is loaded only when asked for

    given = {name: value for name, value in request.items() if value is not None}
    spec = fcmae.PretrainingSpec(**given, launch=launch_from_environment(os.environ))
    if show_config:
        options.echo_json(spec.resolved())
        return
    check_new(spec)
    images = _images(spec, check=not no_image_check)
    start: dict[str, Any] = {}
    if checkpoint is not None:
        choice: dict[str, Any] = {"seed": spec.seed, "ema": ema, "entry": entry, "in_chans": spec.in_chans}
        start["initial"], loaded = fcmae.load_autoencoder(checkpoint, spec.network, **choice)
        start["licence"] = loaded.weights.licence
        for text in loaded.notes:
            options.note(f"Note: {text}")
    with TerminalProgress() as progress:
        result = fcmae.pretrain(spec, progress=progress, images=images, **start)
    tell(result, spec.launch, as_json=as_json)


def _images(spec: "PretrainingSpec", *, check: bool) -> "Dataset":
    """The images to train on, those that cannot be read left out; says what there is."""
    from cnx_deploy.cli.training_progress import checked, note_once
    from cnx_deploy.training.fcmae import divide_images, find_images_below, readable_images

    readable = find_images_below(spec.data)
    lines = [f"Note: {text}" for text in readable.notes]
    if check:
        readable, broken = checked(
            partial(readable_images, white_level=spec.white_level, in_chans=spec.in_chans), readable
        )
        lines += [*broken, *(f"Note: {text}" for text in readable.observed())]
    images = divide_images(readable, spec.held_images)
    known = f"{len(images.train.paths)} images to train on, {len(images.val.paths)} held out"
    note_once((*lines, known), spec.launch)
    return images
