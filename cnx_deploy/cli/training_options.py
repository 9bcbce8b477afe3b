"""The options of `cnx-deploy train` that a recipe sets and that can be given otherwise, by what they are about."""

from collections.abc import Callable
from typing import Any

import click

__all__ = ["recipe_options"]

NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("--epochs", int, "Times that every image is seen [plain: 30]."),
    ("--image-size", int, "Side in pixels, a multiple of 32 [224]."),
    ("--batch-size", int, "Images a process and step [plain: 32]."),
    ("--accumulate", int, "Batches that make one step of the optimiser [plain: 1]."),
    ("--learning-rate", float, "Highest rate [plain: 1e-3 for adamw, 5e-3 for sgd]."),
    ("--base-learning-rate", float, "The same for 256 images a step, scaled to what a step has."),
    ("--final-learning-rate", float, "Where the cosine ends [plain: a hundredth]."),
    ("--beta2", float, "AdamW's second momentum [0.999]."),
    ("--weight-decay", float, "Not on norms, biases and GRN [plain: 0.05]."),
    ("--warmup-epochs", float, "Epochs of linear warm-up [plain: a tenth]."),
    ("--layer-decay", float, "Rate of a layer as a share of the next one's [plain: 1]."),
    ("--clip-norm", float, "Largest norm of all gradients [none]."),
    ("--drop-path-rate", float, "Stochastic depth of the last block [plain: 0]."),
    ("--head-init-scale", float, "Factor on a new head's weights [plain: 1]."),
    ("--ema-decay", float, "Moving average of the weights, e.g. 0.9999 [plain: none]."),
    ("--label-smoothing", float, "Share of the target given to all classes [plain: 0.1]."),
    ("--crop-ratio", float, "Centre crop of validation images [0.875]."),
    ("--min-crop-area", float, "Least area of a random crop; 1: no random crop [plain: 0.5]."),
    ("--randaugment-magnitude", float, "RandAugment's strength, to 10; 0: none [plain: 0]."),
    ("--erasing-probability", float, "Share of images with a rectangle erased [plain: 0]."),
    ("--mixup-alpha", float, "Mixup's Beta parameter; 0: none [plain: 0]."),
    ("--cutmix-alpha", float, "CutMix's Beta parameter; 0: none [plain: 0]."),
)
CHOSEN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("--optimizer", ("adamw", "sgd"), "[plain: adamw]"),
    ("--schedule", ("cosine", "constant"), "Of the learning rate [plain: cosine]."),
    ("--layer-decay-groups", ("single", "group"), "Each block a layer, or three of stage 3 [plain: single]."),
)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them all; one that is not given is None, which leaves it to the recipe."""
    command = click.option("--flip/--no-flip", default=None, help="Mirror images or not: not for digits [flip].")(
        command
    )
    for name, values, text in reversed(CHOSEN):
        command = click.option(name, type=click.Choice(values), help=text)(command)
    for name, kind, text in reversed(NUMBERS):
        command = click.option(name, type=kind, help=text)(command)
    return command
