"""FP16 range analysis: how far a network is from the limits of FP16, measured on images in FP32, judged with a margin.

Two forms are judged. The exported file's own (`stored`) keeps ordinary tensors in half and every statistic in FP32: its
verdict decides. The naive form keeps GRN's sum of squares and LayerNorm's squared deviations in half too, as a plain
`.half()` export may: its verdict is information.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.deploy_spec import ANSWER_DEFAULTS, DeploySpec, TestTimeAugmentation
from cnx_deploy.core.errors import CheckFailedError, InputError
from cnx_deploy.core.image_size import STRIDE, ImageSize, size_text
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import ImageLike, ImageSource, evenly, images_to_run
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.diagnosis.ranges import (
    HALF_MAX,
    NormRange,
    ParameterRange,
    Recorder,
    ResponseRange,
    TensorRange,
    parameter_ranges,
    rank,
    recorded_form,
    stage_of,
    unit_of,
    worst,
)
from cnx_deploy.model.checkpoint import LoadedModel, ModelRequest
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import BLOCK_PARTS, DeployedConvNeXtV2
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.verification.inspect import kind_of_file, recorded_artifact

__all__ = [
    "Headroom", "HeadroomRequest", "ImageRange", "compare_images", "failure", "measure_headroom", "report_lines",
    "run_headroom",
]  # fmt: skip

SCHEMA_VERSION = 1
BATCH = 4
"""Images run at once. Every statistic is an image's own, so that this decides speed and memory alone."""
MOST_LISTED = 8
"""Tensors that are listed unless all are asked for."""
TINY = 1e-30
MOST_PARTS = 6
"""Parts that are named in a message. With more, a file of BF16 is the simpler way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadroomRequest(ModelRequest):
    """What `cnx-deploy diagnose headroom` takes; weights are resolved as for an export.

    `data` None means seeded image-like batches; else a folder of images, of which at most `samples` are taken.
    `white_level`: as in `core.preprocessing`, in place of the recorded one. `margin` is a factor of at least 1: on a
    stored tensor's largest absolute value, and on the naive form's sums of squares and squares. `tta` and
    `temperature`: those of the file, as in `core.deploy_spec`. `per_image`: also compare the images with each other.
    """

    data: Path | None = None
    samples: int = 16
    margin: float = 4.0
    white_level: float | None = None
    tta: TestTimeAugmentation | None = None
    temperature: float = 1.0
    per_image: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, got {self.samples}: ranges are measured on images.")
        if not 1.0 <= self.margin < math.inf:
            raise InputError(f"margin must be a finite factor of at least 1, usually 4, got {self.margin}.")


@dataclass(frozen=True, slots=True)
class Summary:
    """The worst of each kind within a unit or a stage; None where it has none of a kind."""

    name: str
    stored: TensorRange | None
    response: ResponseRange | None
    norm: NormRange | None

    def to_dict(self) -> dict[str, Any]:
        """Return the summary for JSON."""
        kinds = {"stored": self.stored, "response": self.response, "norm": self.norm}
        return {"name": self.name, **{kind: entry.to_dict() if entry else None for kind, entry in kinds.items()}}


@dataclass(frozen=True, slots=True)
class ImageRange:
    """One image beside the others: in how many tensors it has the largest value, and where it exceeds them most.

    `over_next` is its largest value of `tensor` over the largest of all other images. A calibration of eight bits gives
    that tensor so much coarser levels for this one image.
    """

    image: str
    leads: int
    tensor: str
    largest: float
    over_next: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """A network's ranges. `network` says which weights, `source` which images; ranges are in order of depth."""

    network: dict[str, Any]
    source: str
    images: int
    image_size: ImageSize
    margin: float
    tensors: tuple[TensorRange, ...]
    responses: tuple[ResponseRange, ...]
    norms: tuple[NormRange, ...]
    parameters: tuple[ParameterRange, ...]
    per_image: tuple[ImageRange, ...] = ()

    def __post_init__(self) -> None:
        if not self.tensors:
            raise InputError(
                "There is no image to measure on. --data takes a folder with images; without it images are seeded."
            )

    def __str__(self) -> str:
        return "\n".join(report_lines(self))

    @property
    def counted_images(self) -> str:
        """For people: "16 images"."""
        return f"{self.images} image{'s' if self.images > 1 else ''}"

    @property
    def failing_tensors(self) -> tuple[TensorRange, ...]:
        """Stored tensors that lack the margin. NaN and infinity never have it."""
        return tuple(tensor for tensor in self.tensors if not tensor.largest * self.margin <= HALF_MAX)

    @property
    def failing_parameters(self) -> tuple[ParameterRange, ...]:
        """Parameters with elements that are infinite or NaN in FP16."""
        return tuple(parameter for parameter in self.parameters if parameter.nonfinite)

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
        tensors = [tensor for tensor in self.failing_tensors if math.isfinite(tensor.largest)]
        parts = [part for tensor in tensors for part in self._parts_of(tensor)]
        parts += [_part_of(entry.module) for entry in self.failing_parameters if math.isfinite(entry.largest)]
        named = dict.fromkeys(parts)
        return tuple(part for part in named if unit_of(part) == part or unit_of(part) not in named)

    @property
    def naive_failures(self) -> tuple[ResponseRange | NormRange, ...]:
        """Statistics that would lack the margin in FP16, at the image size measured."""
        statistics: tuple[ResponseRange | NormRange, ...] = (*self.responses, *self.norms)
        return tuple(statistic for statistic in statistics if not statistic.share * self.margin <= 1.0)

    @property
    def naive_image_size(self) -> int | None:
        """The largest image size in pixels at which GRN's sums of squares keep the margin in FP16: `safe_image_size`.

        The smallest over the stages; 0 when there is none, None when nothing limits it.
        """
        sizes = [safe_image_size(entry.rms, stage_of(entry.module), self.margin) for entry in self.responses]
        return min((size for size in sizes if size is not None), default=None)

    @property
    def stages(self) -> tuple[Summary, ...]:
        """The worst of each stage."""
        return tuple(self._summary(f"stage {stage + 1}", stage, stage_of) for stage in range(4))

    @property
    def blocks(self) -> tuple[Summary, ...]:
        """The worst of each block, downsampling and the head, in order of depth."""
        units = dict.fromkeys(unit_of(tensor.module) for tensor in self.tensors)
        return tuple(self._summary(unit, unit, unit_of) for unit in units)

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        failing = [tensor.name for tensor in self.failing_tensors]
        failing += [parameter.name for parameter in self.failing_parameters]
        lists = ("stages", "blocks", "tensors", "responses", "norms", "parameters")
        return {
            "schema_version": SCHEMA_VERSION,
            "network": dict(self.network),
            "images": {"source": self.source, "count": self.images, "size": self.image_size},
            "arithmetic": "FP32 on a CPU; on a GPU: not run",
            "limit": HALF_MAX,
            "margin": self.margin,
            "passed": self.passed,
            "failing": failing,
            "keep_fp32": list(self.keep_fp32),
            "naive": {
                "passed": not self.naive_failures,
                "failing": [entry.module for entry in self.naive_failures],
                "largest_image_size": self.naive_image_size,
            },
            **{name: [entry.to_dict() for entry in getattr(self, name)] for name in lists},
            **({"per_image": [asdict(entry) for entry in self.per_image]} if self.per_image else {}),
        }

    def _parts_of(self, tensor: TensorRange) -> tuple[str, ...]:
        """Return what has to be kept so that one tensor is not stored in half."""
        unit, after = unit_of(tensor.module), self.tensors[self.tensors.index(tensor) + 1 :]
        reader = unit_of(after[0].module) if after else "head"
        if unit in ("head", reader):  # it does not leave its unit
            return (_part_of(tensor.module),)
        return (unit,) if reader == "head" else (unit, reader)

    def _summary(self, name: str, key: object, key_of: Callable[[str], object]) -> Summary:
        return Summary(
            name,
            worst(entry for entry in self.tensors if key_of(entry.module) == key),
            worst(entry for entry in self.responses if key_of(entry.module) == key),
            worst(entry for entry in self.norms if key_of(entry.module) == key),
        )


def safe_image_size(rms: float, stage: int, margin: float) -> int | None:
    """Return the largest side in pixels at which a sum of squares over a stage's positions keeps `margin`.

    With `rms` of a channel the sum is HW · rms², so HW may reach 65504 / (margin · rms²); `stage` counts from 0 and has
    4 · 2^stage pixels a side to a position. The RMS is taken to be the size's own: to first order it does not depend
    on it.

    Returns:
        A multiple of 32; 0 when no size keeps it, or `rms` is NaN; None when any does.
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
    """Load the weights that `request` names and measure them; `progress` is told the images of each batch.

    `request.checkpoint` may be a recorded ONNX file or engine: the weights are those that its manifest names.
    """
    recorded = _recorded(request, note)
    loaded, preprocessing, deploy = recorded or (*request.load(note), request)
    if request.white_level is not None:
        preprocessing = replace(preprocessing, white_level=request.white_level)
    targets = loaded.model.task.targets
    images: ImageSource = (
        ImageLike(request.samples) if request.data is None else images_to_run(request.data, targets=targets)
    )
    for text in images.notes:
        note(text)
    spec = InputSpec("uint8", preprocessing.image_size, in_chans=preprocessing.in_chans)
    batches = images.batches(preprocessing, spec, BATCH, evenly(len(images), request.samples))
    measured = measure_headroom(
        loaded,
        preprocessing,
        (batch.images for batch in batches),
        source="seeded image-like" if request.data is None else request.data.as_posix(),
        margin=request.margin,
        progress=progress,
        tta=deploy.tta,
        temperature=deploy.temperature,
        outputs=deploy.outputs if isinstance(deploy, DeploySpec) else (),
    )
    for text in images.observed():
        note(text)
    if request.per_image:
        singly = images.batches(preprocessing, spec, 1, evenly(len(images), request.samples))
        pairs = ((images.name(index), batch.images) for batch in singly for index in batch.indices)
        form = recorded_form(loaded.model, preprocessing, tta=deploy.tta, temperature=deploy.temperature)
        measured = replace(measured, per_image=compare_images(form, loaded.model, preprocessing, pairs))
    return measured


def compare_images(
    form: DeployedConvNeXtV2, model: ConvNeXtV2, preprocessing: Preprocessing, images: Iterable[tuple[str, Tensor]]
) -> tuple[ImageRange, ...]:
    """Measure images one by one, (1, S, S, C) uint8 with a name; the one that exceeds the others most comes first."""
    names: list[str] = []
    largest: dict[str, list[float]] = {}
    for name, pixels in images:
        recorder = Recorder(form, model, preprocessing)
        recorder.run([pixels])
        names.append(name)
        for tensor in recorder.tensors:
            largest.setdefault(tensor.name, []).append(tensor.largest)
    if len(names) < 2:
        raise InputError(f"One image cannot be compared with others: {len(names)} given. Give more, or more --samples.")
    ranges = []
    for at, name in enumerate(names):
        others = {tensor: max(*values[:at], *values[at + 1 :], TINY) for tensor, values in largest.items()}
        over = {tensor: values[at] / others[tensor] for tensor, values in largest.items()}
        most, leads = max(over, key=lambda tensor: rank(over[tensor])), sum(ratio > 1.0 for ratio in over.values())
        ranges.append(ImageRange(name, leads, most, largest[most][at], over[most]))
    return tuple(sorted(ranges, key=lambda entry: -entry.over_next))


def _recorded(
    request: HeadroomRequest, note: Callable[[str], None]
) -> tuple[LoadedModel, Preprocessing, DeploySpec] | None:
    """The network that a manifest records, where `checkpoint` is an ONNX file or an engine; None for weights.

    Raises InputError for a file without a manifest, and for options that the manifest has decided already.
    """
    path = request.checkpoint
    if path is None or path.is_dir() or (path.suffix != ".json" and kind_of_file(path) not in ("onnx", "engine")):
        return None
    if path.suffix != ".json" and recorded_artifact(path) is None:
        raise InputError(
            f"{path} is no checkpoint, and no manifest beside it names the weights that it was made from: expected "
            "weights, or a recorded file. Give the checkpoint; `cnx-deploy export` records what it exports."
        )
    artifact = open_artifact(path)
    own = {"checkpoint", "data", "samples", "margin", "white_level", "per_image"}
    usual, names = HeadroomRequest(), (each.name for each in fields(request) if each.name not in own)
    given = [name for name in names if getattr(request, name) != getattr(usual, name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"The manifest of {artifact.path.name} says which weights it has. Leave out {options}.")
    record, deploy = artifact.manifest.model, artifact.manifest.deploy
    note(f"Weights behind {artifact.path.name}: {record.weights.origin} {record.weights.reference}")
    loaded = recorded_model(artifact)
    if assumption := record.preprocessing.assumption(record.origins):
        note(assumption)
    return loaded, replace(record.preprocessing, image_size=deploy.image_size), deploy


def measure_headroom(
    loaded: LoadedModel,
    preprocessing: Preprocessing,
    batches: Iterable[Tensor],
    *,
    source: str,
    margin: float = 4.0,
    progress: Callable[[int], None] | None = None,
    tta: TestTimeAugmentation | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> Headroom:
    """Run the deploy form over (N, S, S, C) uint8 batches in FP32 and record what an FP16 file would store.

    `outputs` are the words of the file's, as in `core.deploy_spec`. Raises InputError when there is no image, or where
    the task does not allow `tta` or `temperature`.
    """
    form = recorded_form(loaded.model, preprocessing, tta=tta, temperature=temperature, outputs=outputs)
    recorder = Recorder(form, loaded.model, preprocessing)
    recorder.run(batches, progress)
    weights = loaded.weights
    return Headroom(
        network={
            "variant": loaded.model.variant.name,
            "num_classes": loaded.model.num_classes,
            "weights": {"origin": weights.origin, "reference": weights.reference, "sha256": weights.sha256},
            **({"soup": [file.reference for file in weights.soup]} if weights.soup else {}),
            **form.spec.answer,
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


def report_lines(headroom: Headroom, *, lists_all: bool = False) -> Iterator[str]:
    """Yield the report for a terminal: stages, tensors (the largest, or all in order of depth), weights, verdicts."""
    weights = headroom.network["weights"]
    images = f"{headroom.counted_images} of {size_text(headroom.image_size)} px ({headroom.source})"
    soup = f" (mean of {len(headroom.network['soup'])} files)" if "soup" in headroom.network else ""
    answer = "".join(f", {name} {headroom.network[name]}" for name in ANSWER_DEFAULTS if name in headroom.network)
    yield f"{headroom.network['variant']}{answer}, weights {weights['origin']} {weights['reference']}{soup}, {images}"
    limit = f"FP16 holds at most {HALF_MAX:.0f}; margin {headroom.margin:g}"
    yield f"{limit}. Measured in FP32 on a CPU; on a GPU: not run."
    yield ""
    columns = "{:8} {:>22} {:>9}   {:>8} {:>15} {:>9}   {:>18} {:>9}".format
    heads = ("largest stored in FP16", "share", "GRN RMS", "sum of squares", "share", "LayerNorm |x-mean|", "squared")
    yield columns("", *heads)
    for stage in headroom.stages:
        cells = [f"{stage.stored.largest:.4g}", _percent(stage.stored.share)] if stage.stored else ["–", "–"]
        if (response := stage.response) is not None:
            cells += [f"{response.rms:.3g}", f"{response.square_sum:,.0f}", _percent(response.share)]
        else:
            cells += ["–", "–", "–"]
        cells += [f"{stage.norm.deviation:.4g}", _percent(stage.norm.share)] if stage.norm else ["–", "–"]
        yield columns(stage.name, *cells)
    yield ""
    yield f"{'tensor' if lists_all else 'largest tensors':40} {'max |x|':>9} {'share':>9}"
    largest = sorted(headroom.tensors, key=lambda tensor: rank(tensor.share))[: -MOST_LISTED - 1 : -1]
    for tensor in headroom.tensors if lists_all else largest:
        yield f"{tensor.name:40} {tensor.largest:>9.4g} {_percent(tensor.share):>9}"
    yield ""
    if headroom.per_image:
        yield f"{'image':40} {'leads in':>9} {'most in':40} {'max |x|':>9} {'× next':>7}"
        for entry in headroom.per_image if lists_all else headroom.per_image[:MOST_LISTED]:
            where = f"{entry.tensor:40} {entry.largest:>9.4g} {entry.over_next:>7.2f}"
            yield f"{entry.image[-40:]:40} {entry.leads:>9} {where}"
        yield ""
    yield from _verdicts(headroom)


def failure(headroom: Headroom) -> CheckFailedError | None:
    """Return what is wrong with the exported file's own form, with the way out; None when nothing is."""
    broken = next((tensor for tensor in headroom.tensors if not math.isfinite(tensor.largest)), None)
    if broken is not None:
        return CheckFailedError(
            f"{broken.name} is {broken.largest} in FP32 already, over {headroom.counted_images}: expected finite "
            "numbers. FP16 is not the cause: check the weights, or train them again."
        )
    if (bad := worst(headroom.failing_parameters)) is not None:
        return CheckFailedError(
            f"{bad.name} has {bad.nonfinite:,} of {bad.count:,} elements that are no number in FP16: the largest is "
            f"{bad.largest:,.6g}, FP16 holds at most {HALF_MAX:.0f}. {_way_out(headroom)}"
        )
    if (largest := worst(headroom.failing_tensors)) is None:
        return None
    more = len(headroom.failing_tensors) - 1
    return CheckFailedError(
        f"{largest.name} reaches {largest.largest:,.6g} over {headroom.counted_images}, {_percent(largest.share)} of "
        f"FP16's {HALF_MAX:.0f}: with a margin of {headroom.margin:g} it may reach {HALF_MAX / headroom.margin:,.6g}"
        f"{f'; {more} more lack the margin' if more else ''}. {_way_out(headroom)}"
    )


def _part_of(module: str) -> str:
    """Return the part that `--keep-fp32` can name and that holds a module."""
    return module if module.rpartition(".")[2] in BLOCK_PARTS else unit_of(module)


def _verdicts(headroom: Headroom) -> Iterator[str]:
    """Yield a line on the weights, on the file's own form and on the naive one, which is information."""
    count, subnormal, flushed, nonfinite = (
        sum(getattr(parameter, kind) for parameter in headroom.parameters)
        for kind in ("count", "subnormal", "flushed", "nonfinite")
    )
    yield (
        f"Weights in FP16: {_percent(subnormal / max(1, count))} of {count:,} subnormal, {flushed:,} flushed to zero, "
        f"{nonfinite or 'none'} infinite or NaN"
    )
    largest, failing = worst(headroom.tensors), len(headroom.failing_tensors) + len(headroom.failing_parameters)
    if largest is None or failing:
        own = f"FAIL at any image size: {failing} tensors or parameters lack the margin"
    else:
        reached = _percent(largest.share * headroom.margin)
        own = f"pass at any image size: {reached} of the limit with the margin; sums over positions are in FP32"
    yield f"This project's FP16 file: {own}"
    naive = f"pass at {size_text(headroom.image_size)} px (information)"
    if (most := worst(headroom.naive_failures)) is not None:
        statistics = f"{len(headroom.naive_failures)} of {len(headroom.responses) + len(headroom.norms)} statistics"
        naive = f"FAIL at {size_text(headroom.image_size)} px (information): {statistics} without the margin, "
        naive += f"{most.module} most ({_percent(most.share)})"
    yield f"Written the naive way:    {naive}"
    if headroom.responses:
        size = headroom.naive_image_size
        limit = "at any image size" if size is None else f"up to {size:,} px" if size else "at no image size"
        yield f"{'':26}GRN's sums keep the margin {limit}, by an RMS that no size changes to first order"


def _way_out(headroom: Headroom) -> str:
    parts = headroom.keep_fp32
    if len(parts) > MOST_PARTS:
        return (
            f"Export with --precision bf16, or keep {len(parts)} parts in FP32, from {parts[0]} to {parts[-1]}: "
            "cnx-deploy export … --keep-fp32 MODULE, once for each of keep_fp32 in cnx-deploy diagnose headroom --json."
        )
    words = " ".join(f"--keep-fp32 {part}" for part in parts)
    return f"Keep it in FP32 with cnx-deploy export … {words}; or export with --precision bf16."


def _percent(share: float) -> str:
    """Write a share with two digits below 10 %, in whole numbers above."""
    percent = 100.0 * share
    return f"{percent:,.0f} %" if 10.0 <= percent < 1e7 else f"{percent:.2g} %"
