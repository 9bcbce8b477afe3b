"""Where two runs of one network part: every module's output on each side, against PyTorch in FP32.

A *tap* is the output of one torch module. It **fails** where it is not finite, not of the reference's shape, or further
from the reference than the gate that `cnx-deploy verify` holds the logits to (relative L2, worst sample). It **jumps**
where it passes but is `JUMP` times as far as every tap before it: noise grows by rounding, a fault arrives at once. A
side diverges where a tap fails, and then its first failure or jump, in order of depth, is where it begins. A jump alone
is said and is no failure.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, nan
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.gates import Gate
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.data import ImageLike, evenly, find_images
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.diagnosis.layerwise.sides import SIDES, Side, Subject, reference_form, torch_outputs
from cnx_deploy.diagnosis.layerwise.taps import canonical, module_names, taps_in_file
from cnx_deploy.exporters.untrusted import check_recorded
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.recorded import recorded_model

__all__ = [
    "JUMP",
    "MAX_IMAGES",
    "Figures",
    "LayerComparison",
    "SideResult",
    "TapResult",
    "Verdict",
    "block_of",
    "compare_layers",
    "compared",
    "figures",
    "layers_of_artifact",
    "with_jumps",
]

Verdict = Literal["ok", "jumps", "fails", "not finite", "other order", "not lined up"]
Progress = Callable[[str, int], None]

JUMP = 4.0
"""Seen on sound files of atto, pico and tiny in FP16 and FP32, on every side: at most 2.4 times all taps before."""

ROUNDING = {"fp32": 5e-7, "fp16": 5e-4, "bf16": 4e-3}
"""What the first tap of a sound file shows, one rounding in half: below it nothing is a jump."""

REORDERED = 0.5
"""Relative L2 from which equal sorted values mean another order: noise that large widens their spread by 12 %."""

MAX_IMAGES = 8
"""Every module's output is held for each image: 0.7 GB an image for huge at 224 px."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One module's output against the reference's. Relative L2 and cosine in float64, of the worst sample.

    `nonfinite` counts NaN and infinities of both; where there are any, relative L2 and cosine are NaN. `max_abs` is
    the side's own largest value.
    """

    relative_l2: float
    cosine: float
    nonfinite: int
    max_abs: float


@dataclass(frozen=True, slots=True)
class TapResult:
    """The verdict over one module; `figures` is None where its shape is another than the reference's (`reason`)."""

    module: str
    verdict: Verdict
    figures: Figures | None
    reason: str = ""

    @property
    def fails(self) -> bool:
        """Whether it is further from the reference than rounding explains."""
        return self.verdict not in ("ok", "jumps")


@dataclass(frozen=True, slots=True)
class SideResult:
    """The taps of one side in order of depth, or in `not_run` why there are none."""

    side: str
    gate: Gate
    taps: tuple[TapResult, ...] = ()
    not_run: str = ""

    @property
    def diverges(self) -> bool:
        """Whether a tap fails."""
        return any(tap.fails for tap in self.taps)

    @property
    def begins(self) -> TapResult | None:
        """The first tap that fails or jumps."""
        return next((tap for tap in self.taps if tap.verdict != "ok"), None)


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """All sides of one file. `missing` names modules that the file gives no tensor for, and why."""

    artifact: str
    images: int
    sides: tuple[SideResult, ...]
    missing: Mapping[str, str]

    @property
    def first(self) -> tuple[SideResult, TapResult] | None:
        """Where the network first diverges: the side whose divergence begins at the least depth."""
        found = [(side, side.begins) for side in self.sides if side.diverges]
        order = {tap.module: at for side in self.sides for at, tap in enumerate(side.taps)}
        pairs = [(side, tap) for side, tap in found if tap is not None]
        return min(pairs, key=lambda pair: order[pair[1].module], default=None)

    @property
    def passed(self) -> bool:
        """Whether every module was compared and no side diverges."""
        return self.first is None and not self.missing


def layers_of_artifact(
    artifact: Artifact, *, samples: int = 2, images: Path | None = None, progress: Progress | None = None
) -> LayerComparison:
    """Compare a recorded ONNX file by layer on `samples` images (at most `MAX_IMAGES`) of a folder or of a seed.

    Raises InputError for an engine, for a file whose nodes are not named after modules, and for weights that are gone;
    CorruptArtifactError for altered bytes, before any of them is parsed.
    """
    artifact = open_artifact(artifact.path)
    if artifact.manifest.kind != "onnx":
        raise InputError(
            f"{artifact.path.name} is an engine, whose inner tensors cannot be read. Name the file it was built from, "
            f"{artifact.manifest.source_name}: where a GPU is, a copy of that is compiled with its layers as outputs."
        )
    check_recorded(artifact)
    spec = artifact.manifest.deploy
    batches = _batches(artifact, spec, samples, images)
    return compare_layers(artifact.path, recorded_model(artifact).model, spec, batches, progress=progress)


def compare_layers(
    path: Path,
    model: ConvNeXtV2,
    spec: DeploySpec,
    batches: Sequence[Tensor],
    *,
    sides: Sequence[Side] = SIDES,
    progress: Progress | None = None,
) -> LayerComparison:
    """Run `batches` on each of `sides` and compare every module's output with that of the deploy form in FP32.

    `model` and `spec` are what the file at `path` was made from, which is only read.
    """
    form = reference_form(model, spec)
    taps = taps_in_file(path, module_names(form))
    reference = [torch_outputs(form, images) for images in batches]
    del form  # its weights: each side holds its own
    subject = Subject(path, model, spec, taps, len(batches[0]))
    results = []
    for side in sides:
        if progress is not None:
            progress(f"layers on {side.name}", sum(len(images) for images in batches))
        results.append(_side_result(side, subject, batches, reference))
    return LayerComparison(path.name, sum(len(images) for images in batches), tuple(results), taps.missing)


def figures(candidate: Tensor, reference: Tensor) -> Figures:
    """Compare two outputs whose canonical shapes are equal; NaN on both sides is no agreement."""
    a, b = (canonical(output).detach().double().flatten(1) for output in (candidate, reference))
    nonfinite = int((~torch.isfinite(a)).sum() + (~torch.isfinite(b)).sum())
    largest = float(a.abs().max())
    if nonfinite:
        return Figures(nan, nan, nonfinite, largest)
    tiny = torch.finfo(torch.float64).tiny
    sizes = a.norm(dim=1), b.norm(dim=1)
    cosine = (a * b).sum(dim=1) / (sizes[0] * sizes[1]).clamp_min(tiny)
    cosine = torch.where((sizes[0] == 0) & (sizes[1] == 0), 1.0, cosine)
    return Figures(float(((a - b).norm(dim=1) / sizes[1].clamp_min(tiny)).max()), float(cosine.min()), 0, largest)


def compared(module: str, pairs: Sequence[tuple[Tensor, Tensor]], gate: Gate) -> TapResult:
    """One module over all batches, (output, reference's output) each; jumps are found by `with_jumps`."""
    shapes = [(tuple(canonical(output).shape), tuple(canonical(expected).shape)) for output, expected in pairs]
    for found, expected in shapes:
        if found != expected:
            return TapResult(module, "not lined up", None, f"its shape is {found}, the reference's {expected}")
    parts = [figures(*pair) for pair in pairs]
    worst = Figures(
        max(part.relative_l2 for part in parts),
        min(part.cosine for part in parts),
        sum(part.nonfinite for part in parts),
        max(part.max_abs for part in parts),
    )
    if worst.nonfinite:
        return TapResult(module, "not finite", replace(worst, relative_l2=nan, cosine=nan))
    if worst.relative_l2 <= gate.relative_l2_max:
        return TapResult(module, "ok", worst)
    if worst.relative_l2 > REORDERED and all(_holds_the_same(*pair, gate) for pair in pairs):
        return TapResult(module, "other order", worst, "the reference's values in another order")
    return TapResult(module, "fails", worst)


def with_jumps(taps: Iterable[TapResult], rounding: float) -> tuple[TapResult, ...]:
    """The same taps, in order of depth, with those that pass but stand out from all before them marked.

    `rounding` is the relative L2 of one rounding, `ROUNDING`.
    """
    marked, largest = [], rounding
    for tap in taps:
        error = tap.figures.relative_l2 if tap.figures is not None and not tap.figures.nonfinite else 0.0
        marked.append(replace(tap, verdict="jumps") if tap.verdict == "ok" and error > JUMP * largest else tap)
        largest = max(largest, error)
    return tuple(marked)


def block_of(module: str) -> str:
    """The stem, downsampling or block that a module is part of: `stages.2.3` of `stages.2.3.grn.affine`."""
    parts = module.split(".")
    depth = {"stages": 3, "downsample_layers": 2}.get(parts[0], 1)
    return ".".join(parts[:depth])


def _side_result(
    side: Side, subject: Subject, batches: Sequence[Tensor], reference: Sequence[Mapping[str, Tensor]]
) -> SideResult:
    """Run one side; what it lacks here is its `not_run`."""
    precision = subject.spec.precision
    gate = side.gate(precision)
    if precision not in side.precisions:
        return SideResult(side.name, gate, not_run=side.elsewhere)
    try:
        with side.open(subject) as read:
            outputs = [read(images) for images in batches]
    except MissingRequirementError as error:
        return SideResult(side.name, gate, not_run=str(error))
    modules = [tap.module for tap in subject.taps.found]
    taps = (
        compared(
            module,
            [(found[module], expected[module]) for found, expected in zip(outputs, reference, strict=True)],
            gate,
        )
        for module in modules
    )
    return SideResult(side.name, gate, with_jumps(taps, ROUNDING[precision]))


def _holds_the_same(output: Tensor, reference: Tensor, gate: Gate) -> bool:
    """Whether the values of each sample are the reference's, in whichever order."""
    a, b = (canonical(each).double().flatten(1).sort(dim=1).values for each in (output, reference))
    return bool(((a - b).norm(dim=1) <= gate.relative_l2_max * b.norm(dim=1)).all())


def _batches(artifact: Artifact, spec: DeploySpec, samples: int, images: Path | None) -> list[Tensor]:
    """At least `samples` raw images in whole batches within the range that the file was exported for."""
    if not 1 <= samples <= MAX_IMAGES:
        raise InputError(
            f"Layers are compared on 1 to {MAX_IMAGES} images, not {samples}: each keeps all its outputs. Give so many."
        )
    smallest, _, largest = artifact.manifest.batch
    size = max(smallest, min(samples, largest))
    count = ceil(samples / size) * size
    source = ImageLike(count) if images is None else find_images(images)
    batches = [
        batch.images
        for batch in source.batches(
            replace(artifact.manifest.model.preprocessing, image_size=spec.image_size),
            InputSpec(spec.input_kind, spec.image_size),
            size,
            evenly(len(source), count),
        )
        if len(batch) >= smallest
    ]
    if not batches:
        raise InputError(f"{images} has fewer images than the {smallest} of one batch. Give more.")
    return batches
