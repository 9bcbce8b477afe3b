"""The options of `cnx-deploy train` and `cnx-deploy pretrain`: what both take, and what a recipe sets."""

from typing import Any

import click

from cnx_deploy.cli import options

__all__ = ["SECTIONS", "recipe_options", "run_options"]

SECTIONS = {
    "Network": (
        "task", "task_options", "variant", "checkpoint", "pretrained", "init", "reset_head", "ema", "entry",
        "soup", "freeze_backbone",
    ),
    "Length and optimiser": (
        "recipe", "epochs", "batch_size", "accumulate", "optimizer", "schedule", "learning_rate", "base_learning_rate",
        "final_learning_rate", "warmup_epochs", "beta2", "weight_decay", "layer_decay", "layer_decay_groups",
        "clip_norm",
    ),
    "Images": (
        "image_size", "in_chans", "mean", "std", "crop_ratio", "crop_mode", "pad_value", "interpolation", "white_level",
        "image_folder", "class_names", "reduce_zero_label", "no_image_check",
    ),
    "Augmentation and regularisation": (
        "min_crop_area", "scale_jitter", "photometric", "flip", "randaugment_magnitude", "erasing_probability",
        "mixup_alpha", "cutmix_alpha",
        "label_smoothing", "drop_path_rate", "head_init_scale", "ema_decay",
    ),
    "Loss and uneven classes": (
        "loss", "focal_gamma", "gamma_neg", "gamma_pos", "negative_clip", "class_weights", "sampling",
    ),
    "Computation": ("seed", "workers", "precision", "deterministic", "channels_last", "compile"),
    "Run": ("output_dir", "run_dir", "resume", "tensorboard", "show_config"),
}  # fmt: skip
"""Headings of `train --help` and the options below each."""

RECIPE: tuple[tuple[str, Any, str], ...] = (
    ("--epochs", int, "Times that every image is seen [plain: 30]."),
    ("--image-size", options.IMAGE_SIZE, "Side in pixels, or height x width such as 256x512 [224]."),
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
    ("--optimizer", click.Choice(["adamw", "sgd"]), "[plain: adamw]"),
    ("--schedule", click.Choice(["cosine", "linear", "step", "constant"]), "Of the learning rate [plain: cosine]."),
    (
        "--layer-decay-groups",
        click.Choice(["single", "group", "stage"]),
        "A block, three of stage 3, or a stage [plain: single].",
    ),
)


def recipe_options(command: options.Command) -> options.Command:
    """Add all that a recipe sets; an option that is not given is None, which leaves it to the recipe."""
    add = options.several(
        *(click.option(name, type=kind, help=text) for name, kind, text in RECIPE),
        click.option("--flip/--no-flip", default=None, help="Mirror images or not: not for digits [flip]."),
        *options.pixels[:2],  # without --crop-ratio, which a recipe sets
        *options.pixels[3:],
        click.option(
            "--scale-jitter", type=options.CHANNELS, metavar="LOW,HIGH",
            help="Of dense tasks: the picture's scale is drawn between two factors [segment: 0.5,2].",
        ),
        click.option(
            "--photometric/--no-photometric", default=None,
            help="Of dense tasks: vary brightness, contrast, saturation and hue [segment: yes].",
        ),
        click.option(
            "--class-names", type=options.EXISTING, help="Of masks: names of the classes in order, one a line or JSON."
        ),
        options.reduce_zero_label,
        click.option(
            "--class-weights", metavar="balanced|none|FILE",
            help="What an image of each class weighs in the loss; balanced: all classes weigh the same, of several "
            "labels positives and negatives of each. A file has lines NAME=WEIGHT, .csv rows, or a JSON object [none].",
        ),
        click.option(
            "--sampling", type=click.Choice(["shuffle", "balanced"]),
            help="balanced: each class is drawn equally often, in an epoch of as many images [shuffle].",
        ),
        click.option(
            "--loss", type=click.Choice(["cross-entropy", "focal", "bce", "asymmetric"]),
            help="bce and asymmetric are of several labels [cross-entropy; multi-label: bce].",
        ),
        click.option("--focal-gamma", type=float, help="Exponent of the focal loss [2]."),
        click.option("--gamma-neg", type=float, help="Exponent of the asymmetric loss for negatives [4]."),
        click.option("--gamma-pos", type=float, help="The same for positives [1]."),
        click.option("--negative-clip", type=float, help="Probability below which a negative has no loss [0.05]."),
    )  # fmt: skip
    return add(command)


def run_options(name: str) -> options.Decorator:
    """Add what every run takes; `name` is what a fresh folder is called before its number."""
    return options.several(
        click.option("--seed", type=int, default=0, show_default=True),
        options.in_chans,
        options.white_level,
        click.option("--workers", type=int, help="Loader processes [default: 0 where the images fit in memory]."),
        click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True),
        click.option("--deterministic", is_flag=True, help="Only GPU kernels that give the same bits again."),
        options.output_dir("runs", "A run is a folder in it."),
        click.option("--run-dir", type=options.FOLDER, help=f"The run's folder [default: a fresh {name}-NNN]."),
        click.option("--resume", is_flag=True, help="Go on with the newest run of the variant, or with --run-dir."),
        click.option("--no-image-check", is_flag=True, help="Start without decoding all to find broken images."),
        click.option("--show-config", is_flag=True, help="Print the whole configuration as JSON, train nothing."),
        options.as_json,
    )
