"""Named sets of training options: the paper's fine-tuning, training from scratch, and the article's script.

Sources: Woo et al., arXiv:2301.00808, tables 9 (atto to nano), 10 (tiny) and 11 (base to huge) for `fine-tune`;
Liu et al., arXiv:2201.03545, table 5 for `from-scratch`, which the V2 paper trains its supervised models by. Where the
tables say nothing (random erasing, the layers' grouping, where the cosine ends) the reference code's commands do:
facebookresearch/ConvNeXt-V2, TRAINING.md, main_finetune.py.
`ade20k` is UPerNet's: facebookresearch/ConvNeXt, semantic_segmentation/configs/convnext (V1; the V2 paper compares with
it and publishes no configurations of it), with mmsegmentation's augmentation. `coco` is Mask R-CNN's: of V2 that of
open-mmlab/mmdetection, projects/ConvNeXt-V2 (base, large-scale jitter, 36 epochs), with which its README has the
paper's results; of V1 facebookresearch/ConvNeXt, object_detection/configs/convnext, which has Mask R-CNN for tiny and
Cascade R-CNN for the larger ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import VARIANTS, Variant, find_variant
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.training.spec import TrainingSpec

__all__ = ["RECIPES", "recipe_options", "spec_from_recipe"]

IMAGES_PER_STEP = 1024
"""Of every fine-tuning table."""
PAPERS_AUGMENTATION: dict[str, Any] = {
    "min_crop_area": 0.08,
    "randaugment_magnitude": 9.0,
    "erasing_probability": 0.25,
    "ema_decay": 0.9999,
    "final_learning_rate": 1e-6,
}
STRONG_MIX: dict[str, Any] = {"label_smoothing": 0.1, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
SMALL: dict[str, Any] = {
    "epochs": 600,
    "base_learning_rate": 2e-4,
    "warmup_epochs": 0.0,
    "layer_decay": 0.9,
    "label_smoothing": 0.2,
}
LARGE: dict[str, Any] = {"layer_decay_groups": "group", "weight_decay": 0.05, **STRONG_MIX}
FINE_TUNE: dict[str, dict[str, Any]] = {
    "atto": {**SMALL, "weight_decay": 0.3, "drop_path_rate": 0.1},
    "femto": {**SMALL, "weight_decay": 0.05, "mixup_alpha": 0.3, "cutmix_alpha": 0.3},
    "pico": {**SMALL, "weight_decay": 0.3, "mixup_alpha": 0.3, "cutmix_alpha": 0.3},
    "nano": {**SMALL, "weight_decay": 0.3, "drop_path_rate": 0.1, "mixup_alpha": 0.5, "cutmix_alpha": 0.5},
    "tiny": {
        "epochs": 300, "base_learning_rate": 8e-4, "warmup_epochs": 40.0, "layer_decay": 0.9, "weight_decay": 0.05,
        "drop_path_rate": 0.2, **STRONG_MIX,
    },
    # Table 11 has 6.25e-3 for base and large, TRAINING.md's command for base 6.25e-4: the command's is taken.
    "base": {"epochs": 100, "base_learning_rate": 6.25e-4, "warmup_epochs": 20.0, "layer_decay": 0.6,
             "drop_path_rate": 0.1, **LARGE},
    "large": {"epochs": 100, "base_learning_rate": 6.25e-4, "warmup_epochs": 20.0, "layer_decay": 0.6,
              "drop_path_rate": 0.2, **LARGE},
    "huge": {"epochs": 50, "base_learning_rate": 1.25e-3, "warmup_epochs": 10.0, "layer_decay": 0.75,
             "drop_path_rate": 0.3, **LARGE},
}  # fmt: skip
SCRATCH_DROP_PATH = {"tiny": 0.1, "small": 0.4, "base": 0.5, "large": 0.5}
"""Table 5 of the V1 paper. The smaller sizes, which it has not, take tiny's; the larger ones large's."""
ARTICLE: dict[str, Any] = {
    "epochs": 30, "batch_size": 4, "optimizer": "sgd", "learning_rate": 5e-3, "schedule": "constant",
    "weight_decay": 0.0, "label_smoothing": 0.0, "crop_ratio": 1.0, "min_crop_area": 1.0, "flip": True,
}  # fmt: skip
ADE20K_IMAGES = 20_210
ADE20K_STEP = 16
ADE20K: dict[str, Any] = {
    "task": "segment", "batch_size": ADE20K_STEP, "epochs": round(160_000 * ADE20K_STEP / ADE20K_IMAGES),
    "learning_rate": 1e-4, "schedule": "linear", "final_learning_rate": 0.0, "weight_decay": 0.05,
    "warmup_epochs": 1500 * ADE20K_STEP / ADE20K_IMAGES, "layer_decay": 0.9, "layer_decay_groups": "stage",
    "reduce_zero_label": True, "scale_jitter": (0.67, 2.67),
}  # fmt: skip
"""160,000 steps of 16 images are 127 epochs of ADE20K's 20,210 training images; 1,500 of them are the warm-up.

mmsegmentation's scales of 0.5 to 2 bring the shorter side to the canvas. ADE20K's pictures are 4:3 for the most part,
so that of the scale at which a picture fits they are 0.67 to 2.67."""
ADE20K_DROP_PATH = {"atto": 0.1, "femto": 0.1, "pico": 0.1, "nano": 0.1, "tiny": 0.4, "small": 0.3}
"""Of the larger ones 0.4. The four smallest, which no configuration has, take the largest of their fine-tuning."""
LARGE_VARIANTS = ("large", "xlarge", "huge")
"""Trained on 640 pixels, where the others have 512."""
COCO_IMAGES, COCO_STEP = 117_266, 16
COCO: dict[str, Any] = {
    "task": "detect", "batch_size": COCO_STEP, "epochs": 36, "learning_rate": 1e-4, "schedule": "step",
    "weight_decay": 0.05, "warmup_epochs": 500 * COCO_STEP / COCO_IMAGES, "layer_decay_groups": "group",
    "image_size": (800, 1344), "scale_jitter": (0.6, 1.0),
}  # fmt: skip
"""Of V1. Pictures are resized to 480 to 800 pixels where evaluation has 800; the crops of half of them are not made."""
COCO_V2: dict[str, Any] = {
    **COCO, "batch_size": 32, "warmup_epochs": 1000 * 32 / COCO_IMAGES, "image_size": 1024, "scale_jitter": (0.1, 2.0),
    "drop_path_rate": 0.4, "layer_decay": 0.95,
}  # fmt: skip
"""Of base, and taken for all sizes of V2."""
COCO_DECAY = {"small": (0.6, 0.7), "base": (0.6, 0.8), "large": (0.7, 0.7), "xlarge": (0.8, 0.7), "huge": (0.8, 0.7)}
"""Stochastic depth and layer decay of V1; tiny and the smaller ones, which no configuration has, take 0.4 and 0.95."""
RECIPES = ("plain", "fine-tune", "from-scratch", "article", "ade20k", "coco")


def recipe_options(recipe: str, variant: Variant | str) -> dict[str, Any]:
    """Give the fields of `TrainingSpec` that a recipe sets for a variant; the rest have their defaults.

    A V1 variant takes the recipe of the V2 variant of its size. Raises InputError for an unknown recipe.
    """
    if recipe not in RECIPES:
        raise InputError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}.")
    network = find_variant(variant) if isinstance(variant, str) else variant
    size = network.name.removeprefix("v1-")
    if recipe == "plain":
        return {}
    if recipe == "article":
        return dict(ARTICLE)
    if recipe == "ade20k":
        own = {"image_size": 640 if size in LARGE_VARIANTS else 512, "drop_path_rate": ADE20K_DROP_PATH.get(size, 0.4)}
        rate = {"learning_rate": 8e-5} if size in ("xlarge", "huge") else {}
        return {**ADE20K, **own, **rate}
    if recipe == "coco":
        if network.version == 2:
            return dict(COCO_V2)
        depth, decay = COCO_DECAY.get(size, (0.4, 0.95))
        return {**COCO, "drop_path_rate": depth, "layer_decay": decay}
    common = {"batch_size": 64, "accumulate": IMAGES_PER_STEP // 64, **PAPERS_AUGMENTATION}
    if recipe == "fine-tune":
        own = FINE_TUNE.get(size) or FINE_TUNE[_nearest_size(network)]
        return {**common, **own, "head_init_scale": 0.001}
    return {
        **common,
        "accumulate": 4096 // 64,
        "epochs": 300,
        "base_learning_rate": 2.5e-4,  # 4e-3 for 4096 images
        "warmup_epochs": 20.0,
        "weight_decay": 0.05,
        "drop_path_rate": SCRATCH_DROP_PATH.get(size, SCRATCH_DROP_PATH[_nearest_size(network, SCRATCH_DROP_PATH)]),
        **STRONG_MIX,
    }


def spec_from_recipe(data: Path, variant: Variant | str, recipe: str = "plain", **given: Any) -> TrainingSpec:
    """Make a recipe's spec with some fields given otherwise; a task has values of its own in place of the recipe's.

    With other `epochs` a warm-up that is not given keeps its share of them; a given `learning_rate` takes the place of
    the recipe's `base_learning_rate`, and the other way round.
    """
    options = recipe_options(recipe, variant)
    task = given.get("task", options.get("task", "classification"))
    if options.get("task", task) != task:
        raise InputError(f"The recipe {recipe} is of the task {options['task']}, not of {task}. Choose another recipe.")
    defaults = find_task(task).training_defaults
    options = {**defaults, **options} if "task" in options else {**options, **defaults}
    if "epochs" in given and options.get("warmup_epochs"):
        options["warmup_epochs"] *= given["epochs"] / options["epochs"]
    rates = ("learning_rate", "base_learning_rate")
    if any(given.get(name) is not None for name in rates):
        options = {name: value for name, value in options.items() if name not in rates}
    return TrainingSpec(data, variant, recipe=recipe, **{**options, **given})


def _nearest_size(network: Variant, among: Mapping[str, Any] = FINE_TUNE) -> str:
    """The size whose first width is nearest, for one that the table has not (V1 small, a variant of one's own)."""
    known = [name for name in among if name in VARIANTS]
    return min(known, key=lambda name: abs(VARIANTS[name].dims[0] - network.dims[0]))
