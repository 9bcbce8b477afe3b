"""How far a network is from the limits of FP16: measured on images in FP32, judged with a margin.

Two forms are judged. The exported file's own (`stored`) keeps ordinary tensors in half and every statistic in FP32: its
verdict decides. The naive form keeps GRN's sum of squares and LayerNorm's squared deviations in half too, as a plain
`.half()` export may: its verdict is information.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import STRIDE
from cnx_deploy.data import ImageLike, evenly, find_images
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.diagnosis.headroom.ranges import (
    HALF_MAX,
    NormRange,
    ParameterRange,
    ResponseRange,
    Summary,
    TensorRange,
    group_of,
    stage_of,
    worst,
)
from cnx_deploy.diagnosis.headroom.recorder import Recorder, parameter_ranges, recorded_form
from cnx_deploy.model.checkpoint import LoadedModel, resolve_model

__all__ = ["Headroom", "HeadroomRequest", "measure_headroom", "run_headroom", "safe_image_size"]

SCHEMA_VERSION = 1
ALONE = ("dwconv", "pwconv1", "grn", "pwconv2")
"""Parts of a block whose result can be kept in FP32 without the whole block."""
BATCH = 4
"""Images run at once. Every statistic is an image's own, so that this decides speed and memory alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadroomRequest:
    """What `cnx-deploy headroom` takes; weights are resolved as for an export.

    `image_size` None means the checkpoint's own, else 224. `data` None means seeded image-like batches; else a folder
    of images, of which at most `samples` are taken. `margin` is a factor of at least 1: on a stored tensor's largest
    absolute value, and on the naive form's sums of squares and squares.
    """

    checkpoint: Path | None = None
    variant: str | None = None
    pretrained: str | None = None
    seed: int = 0
    num_classes: int | None = None
    reset_head: bool = False
    data: Path | None = None
    image_size: int | None = None
    samples: int = 16
    margin: float = 4.0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(
                f"Ranges are measured on at least one image, not on {self.samples}. Give --samples 1 or more."
            )
        if not 1.0 <= self.margin < math.inf:
            raise InputError(f"A margin is a factor of at least 1, not {self.margin}. Give one, usually 4.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """What was found. `network` says which weights, `source` which images; ranges are in order of depth."""

    network: dict[str, Any]
    source: str
    images: int
    image_size: int
    margin: float
    tensors: tuple[TensorRange, ...]
    responses: tuple[ResponseRange, ...]
    norms: tuple[NormRange, ...]
    parameters: tuple[ParameterRange, ...]

    def __post_init__(self) -> None:
        if not self.tensors:
            raise InputError("There is no image to measure on. Name a folder that holds some, or leave --data out.")

    @property
    def counted_images(self) -> str:
        """For people: "16 images"."""
        return f"{self.images} image{'s' if self.images > 1 else ''}"

    @property
    def failing_tensors(self) -> tuple[TensorRange, ...]:
        """Stored tensors that lack the margin. NaN and infinity never have it."""
        return tuple(each for each in self.tensors if not each.largest * self.margin <= HALF_MAX)

    @property
    def failing_parameters(self) -> tuple[ParameterRange, ...]:
        """Parameters with elements that are infinite or NaN in FP16."""
        return tuple(each for each in self.parameters if each.nonfinite)

    @property
    def passed(self) -> bool:
        """Whether the exported file's tensors keep the margin and its weights are finite."""
        return not self.failing_tensors and not self.failing_parameters

    @property
    def keep_fp32(self) -> tuple[str, ...]:
        """The modules to name in `export --keep-fp32` so that nothing that fails is stored in half.

        What leaves a block, stem or downsampling is rounded again by whatever reads it, so its reader is named too;
        pooling reads the last block in FP32. What is NaN or infinite in FP32 already is not named: no type helps it.
        """
        tensors = [each for each in self.failing_tensors if math.isfinite(each.largest)]
        parts = [part for each in tensors for part in self._parts_of(each)]
        parts += [_part_of(each.module) for each in self.failing_parameters if math.isfinite(each.largest)]
        named = dict.fromkeys(parts)
        return tuple(part for part in named if group_of(part) == part or group_of(part) not in named)

    @property
    def naive_failures(self) -> tuple[ResponseRange | NormRange, ...]:
        """Statistics that would lack the margin in FP16, at the image size measured."""
        statistics: tuple[ResponseRange | NormRange, ...] = (*self.responses, *self.norms)
        return tuple(each for each in statistics if not each.share * self.margin <= 1.0)

    @property
    def naive_image_size(self) -> int | None:
        """The largest image size in pixels at which GRN's sums of squares keep the margin in FP16: `safe_image_size`.

        The smallest over the stages; 0 when there is none, None when nothing limits it.
        """
        sizes = [safe_image_size(each.rms, stage_of(each.module), self.margin) for each in self.responses]
        return min((size for size in sizes if size is not None), default=None)

    @property
    def stages(self) -> tuple[Summary, ...]:
        """The worst of each stage."""
        return tuple(self._summary(f"stage {stage + 1}", stage, stage_of) for stage in range(4))

    @property
    def blocks(self) -> tuple[Summary, ...]:
        """The worst of each block, downsampling and the head, in order of depth."""
        groups = dict.fromkeys(group_of(each.module) for each in self.tensors)
        return tuple(self._summary(group, group, group_of) for group in groups)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        lists = ("stages", "blocks", "tensors", "responses", "norms", "parameters")
        return {
            "schema_version": SCHEMA_VERSION,
            "network": dict(self.network),
            "images": {"source": self.source, "count": self.images, "size": self.image_size},
            "arithmetic": "FP32 on a CPU; on a GPU: not run",
            "limit": HALF_MAX,
            "margin": self.margin,
            "passed": self.passed,
            "failing": [
                *(each.name for each in self.failing_tensors),
                *(each.name for each in self.failing_parameters),
            ],
            "keep_fp32": list(self.keep_fp32),
            "naive": {
                "passed": not self.naive_failures,
                "failing": [each.module for each in self.naive_failures],
                "largest_image_size": self.naive_image_size,
            },
            **{name: [each.to_dict() for each in getattr(self, name)] for name in lists},
        }

    def _parts_of(self, tensor: TensorRange) -> tuple[str, ...]:
        """What has to be kept so that one tensor is not stored in half."""
        groups = list(dict.fromkeys(group_of(each.module) for each in self.tensors))
        group = group_of(tensor.module)
        if group == "head" or tensor is not [each for each in self.tensors if group_of(each.module) == group][-1]:
            return (_part_of(tensor.module),)
        reader = groups[groups.index(group) + 1]
        return (group,) if reader == "head" else (group, reader)

    def _summary(self, name: str, key: object, key_of: Callable[[str], object]) -> Summary:
        return Summary(
            name,
            worst(each for each in self.tensors if key_of(each.module) == key),
            worst(each for each in self.responses if key_of(each.module) == key),
            worst(each for each in self.norms if key_of(each.module) == key),
        )


def safe_image_size(rms: float, stage: int, margin: float) -> int | None:
    """The largest side in pixels, a multiple of 32, at which a sum of squares over a stage's positions keeps `margin`.

    With `rms` of a channel it is HW · rms², so HW may reach 65504 / (margin · rms²); `stage` counts from 0 and has
    4 · 2^stage pixels a side to a position. The RMS is taken to be the size's own: to first order it does not depend
    on it. 0 when no size does, or `rms` is NaN; None when any does.
    """
    mean_square = margin * rms * rms
    if mean_square == 0.0 or HALF_MAX / mean_square == math.inf:
        return None
    positions = HALF_MAX / mean_square
    if not positions >= 1.0:
        return 0
    return (4 << stage) * math.isqrt(int(positions)) // STRIDE * STRIDE


def run_headroom(
    request: HeadroomRequest, note: Callable[[str], None], progress: Callable[[int], None] | None = None
) -> Headroom:
    """Load the weights that `request` names and measure them; `progress` is told the images of each batch."""
    loaded = resolve_model(
        request.variant,
        checkpoint=request.checkpoint,
        pretrained=request.pretrained,
        seed=request.seed,
        num_classes=request.num_classes,
        reset_head=request.reset_head,
    )
    if loaded.weights.origin == "random":
        note(f"No checkpoint: weights are random (seed {request.seed}). Their ranges say nothing of trained ones.")
    if loaded.head_is_new:
        note(f"The head for {loaded.model.num_classes} classes is new and random: train it before it is used.")
    preprocessing = loaded.preprocessing or Preprocessing()
    if request.image_size is not None:
        preprocessing = replace(preprocessing, image_size=request.image_size)
    source = "seeded image-like" if request.data is None else request.data.as_posix()
    batches = _batches(request, preprocessing)
    return measure_headroom(loaded, preprocessing, batches, source=source, margin=request.margin, progress=progress)


def measure_headroom(
    loaded: LoadedModel,
    preprocessing: Preprocessing,
    batches: Iterable[Tensor],
    *,
    source: str,
    margin: float = 4.0,
    progress: Callable[[int], None] | None = None,
) -> Headroom:
    """Run the deploy form over (N, S, S, 3) uint8 batches in FP32 and record what an FP16 file would store.

    Raises InputError when there is no image.
    """
    form = recorded_form(loaded.model, preprocessing)
    recorder = Recorder(form, loaded.model, preprocessing)
    recorder.run(batches, progress)
    weights = loaded.weights
    return Headroom(
        network={
            "variant": loaded.model.variant.name,
            "num_classes": loaded.model.num_classes,
            "weights": {"origin": weights.origin, "reference": weights.reference, "sha256": weights.sha256},
        },
        source=source,
        images=recorder.images,
        image_size=preprocessing.image_size,
        margin=margin,
        tensors=recorder.tensors,
        responses=recorder.responses,
        norms=recorder.norms,
        parameters=parameter_ranges(form),
    )


def _batches(request: HeadroomRequest, preprocessing: Preprocessing) -> Iterator[Tensor]:
    images = ImageLike(request.samples) if request.data is None else find_images(request.data)
    spec = InputSpec("uint8", preprocessing.image_size)
    batches = images.batches(preprocessing, spec, BATCH, evenly(len(images), request.samples))
    return (batch.images for batch in batches)


def _part_of(module: str) -> str:
    """The part that `--keep-fp32` can name and that holds a module."""
    return module if module.rpartition(".")[2] in ALONE else group_of(module)
