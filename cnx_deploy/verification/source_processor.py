"""Whether an artifact's images are made as the source of its weights makes them.

Both sides of a parity check are given the same pixels, so a wrong mean or crop shows in no logits. Where timm's or
transformers' configuration lies beside the weights, that library's own transform is run on a few pictures.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cnx_deploy.core.errors import CnxDeployError
from cnx_deploy.core.image_size import sides
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.data import image_like_batches
from cnx_deploy.data.preprocessing import normalise, to_pixels
from cnx_deploy.model.pretrained import fetch_pretrained
from cnx_deploy.model.source_config import CONFIG, PROCESSOR, PROCESSORS, TIMM_DEFAULT, json_object

__all__ = ["ProcessorCheck", "compare_with_source"]

Transform = Callable[[Image.Image], Tensor]
"""A picture -> (C, H, W) normalised floats."""
SHAPES = ((1.0, 1.0), (0.8, 1.7), (1.9, 0.7), (1.31, 1.33), (0.4, 0.6))
"""Heights and widths of the pictures, of the network's: larger and smaller, wide and tall."""
ALLOWED_LEVELS = 1.01
"""Of 255: Pillow and torchvision may round a resized pixel to either side."""


@dataclass(frozen=True, slots=True)
class ProcessorCheck:
    """What a library's transform says: the largest difference in levels of 255, or why it was not run."""

    processor: str
    levels: float | None = None
    not_run: str = ""

    @property
    def passed(self) -> bool:
        """Whether it agrees, or was not run."""
        return self.levels is None or self.levels <= ALLOWED_LEVELS

    def __str__(self) -> str:
        if self.levels is None:
            return f"Preprocessing was not compared with {self.processor}: {self.not_run}."
        return (
            f"Preprocessing {'agrees with' if self.passed else 'is not that of'} {self.processor}: pixels differ by "
            f"{self.levels:.1f} of 255 at most on {len(SHAPES)} pictures."
        )


def compare_with_source(artifact: Artifact) -> ProcessorCheck | None:
    """Make pictures as the artifact's manifest says and as the source's own library does.

    Returns None where nothing lies beside the weights. A library that is not installed, and fields that were given as
    options of the export, are reasons not to compare.
    """
    record = artifact.manifest.model
    origins = {name: origin for name, origin in record.origins.items() if name != "class_names"}
    read = {origin for origin in origins.values() if origin in (CONFIG, PROCESSOR)}
    folder = _folder_of(artifact)
    if len(read) != 1 or folder is None:
        return None
    (source,) = read
    name = f"transformers' {source}" if source == PROCESSOR else f"timm's {source}"
    if others := [name for name, origin in origins.items() if origin not in (source, TIMM_DEFAULT)]:
        return ProcessorCheck(name, not_run=f"{', '.join(others)} came from elsewhere, such as an option")
    try:
        config = json_object(folder / source)
        if config is None:
            return ProcessorCheck(name, not_run="it is not beside the weights any more")
        transform = _transformers_transform(config) if source == PROCESSOR else _timm_transform(config)
    except ImportError as error:
        return ProcessorCheck(name, not_run=f"{error.name} is not installed")
    except (CnxDeployError, AttributeError, OSError, TypeError, ValueError) as error:
        return ProcessorCheck(name, not_run=f"the library does not read it ({error})")
    preprocessing, (height, width) = record.preprocessing, sides(record.image_size)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    levels = 0.0
    for seed, (tall, wide) in enumerate(SHAPES):
        pixels = next(image_like_batches(1, (round(tall * height), round(wide * width)), batch_size=1, seed=seed))[0]
        picture = Image.fromarray(pixels.numpy())
        ours, theirs = normalise(to_pixels(picture, preprocessing)[None], preprocessing)[0], transform(picture)
        if ours.shape != theirs.shape:
            return ProcessorCheck(f"{name} (which makes {tuple(theirs.shape)})", levels=255.0)
        levels = max(levels, float(((ours - theirs) * std * 255.0).abs().max()))
    return ProcessorCheck(name, levels)


def _folder_of(artifact: Artifact) -> Path | None:
    weights = artifact.manifest.model.weights
    if weights.origin == "checkpoint":
        return (artifact.path.parent / weights.reference).parent
    if weights.origin == "pretrained":
        try:
            return fetch_pretrained(weights.reference).weights.parent
        except CnxDeployError:
            return None  # the comparison of logits says so
    return None


def _timm_transform(config: dict[str, Any]) -> Transform:
    data = importlib.import_module("timm.data")
    written = config.get("pretrained_cfg", config)
    transform: Transform = data.create_transform(**data.resolve_data_config(pretrained_cfg=written))
    return transform


def _transformers_transform(config: dict[str, Any]) -> Transform:
    """The processor that computes with Pillow where a release of transformers has several of a kind.

    The class is one of `PROCESSORS`, whatever else the file names, and takes the values of the file alone.
    """
    transformers = importlib.import_module("transformers")
    told = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "ConvNext")
    kind = next((kind for kind in PROCESSORS if told.startswith(kind)), None)
    if kind is None:
        raise ValueError(f"{told} is no processor of {', '.join(PROCESSORS)}")
    processor = getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(
        transformers, f"{kind}ImageProcessor"
    )
    made = processor.from_dict(config)

    def transform(picture: Image.Image) -> Tensor:
        values: Tensor = made(picture, return_tensors="pt")["pixel_values"][0]
        return values

    return transform
