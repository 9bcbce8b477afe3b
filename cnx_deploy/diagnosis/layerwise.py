"""Layer-by-layer comparison: every module's output on each backend, against PyTorch in FP32.

An output **fails** where it is not finite, not of the reference's shape, or further from the reference than the gate
that `cnx-deploy verify` holds the logits to (relative L2, worst sample). It **jumps** where it passes but is `JUMP`
times as far as every output before it: noise grows by rounding, a fault arrives at once. A backend diverges where an
output fails, and then its first failure or jump, in order of depth, is where it begins. A jump alone is said and is no
failure.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cnx_deploy.core.artifacts import find_artifacts, is_onnx, open_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.gates import Gate
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.diagnosis.images import raw_batches
from cnx_deploy.diagnosis.layer_outputs import (
    BACKENDS,
    ExportedNetwork,
    LayerBackend,
    canonical,
    find_outputs,
    module_names,
    reference_form,
    torch_outputs,
)
from cnx_deploy.exporters.untrusted import check_recorded
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.recorded import recorded_model

__all__ = [
    "JUMP", "MAX_IMAGES", "BackendResult", "LayerComparison", "OutputDifferences", "OutputResult", "Verdict",
    "block_of", "compare_artifact", "compare_layers", "compare_output", "find_jumps", "recorded_files", "report_lines",
]  # fmt: skip

Verdict = Literal["ok", "jumps", "fails", "not finite", "not lined up"]
Progress = Callable[[str, int], None]

JUMP = 4.0
"""Seen on sound files of atto, pico and tiny in FP16 and FP32, on every backend: at most 2.4 times all before."""
MAX_IMAGES = 8
"""Every module's output is held for each image: 0.7 GB an image for huge at 224 px."""

MARKS = {"ok": " ", "jumps": "^", "fails": "!", "not finite": "!", "not lined up": "!"}
LEGEND = (
    "! fails, ^ more than all before explain. Relative L2 against PyTorch in FP32, the largest of the block's modules"
)


@dataclass(frozen=True, slots=True)
class OutputDifferences:
    """One module's output against the reference's. Relative L2 and cosine in float64, of the worst sample.

    `nonfinite` counts NaN and infinities of both; where there are any, relative L2 and cosine are NaN. `max_abs` is
    the backend's own largest value.
    """

    relative_l2: float
    cosine: float
    nonfinite: int
    max_abs: float


@dataclass(frozen=True, slots=True)
class OutputResult:
    """The verdict over one module; `figures` is None where its shape is another than the reference's (`reason`)."""

    module: str
    verdict: Verdict
    figures: OutputDifferences | None
    reason: str = ""

    @property
    def fails(self) -> bool:
        """Whether it is further from the reference than rounding explains."""
        return self.verdict not in ("ok", "jumps")

    @property
    def relative_l2(self) -> float:
        """NaN where there is none."""
        return math.nan if self.figures is None else self.figures.relative_l2

    def describe(self) -> str:
        """Say in words how far off the output is."""
        if self.figures is None:
            return f"{self.verdict}: {self.reason}"
        if self.figures.nonfinite:
            return f"{self.figures.nonfinite} values are NaN or infinite"
        numbers = f"relative L2 {self.figures.relative_l2:.1e}, cosine {self.figures.cosine:.6f}"
        return f"{self.reason or self.verdict}, {numbers}"


@dataclass(frozen=True, slots=True)
class BackendResult:
    """The outputs of one backend in order of depth, or in `not_run` why there are none."""

    backend: str
    gate: Gate
    outputs: tuple[OutputResult, ...] = ()
    not_run: str = ""

    @property
    def diverges(self) -> bool:
        """Whether an output fails."""
        return any(output.fails for output in self.outputs)

    @property
    def begins(self) -> OutputResult | None:
        """The first output that fails or jumps."""
        return next((output for output in self.outputs if output.verdict != "ok"), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "backend": self.backend,
            "relative_l2_max": self.gate.relative_l2_max,
            "diverges": self.diverges,
            "begins": None if self.begins is None else self.begins.module,
            "not_run": self.not_run or None,
            "outputs": [{**asdict(output), "block": block_of(output.module)} for output in self.outputs],
        }


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """All backends on one file. `missing` names modules that the file gives no tensor for, and why."""

    artifact: str
    images: int
    backends: tuple[BackendResult, ...]
    missing: Mapping[str, str]

    @property
    def ran(self) -> tuple[BackendResult, ...]:
        """The backends that ran."""
        return tuple(result for result in self.backends if result.outputs)

    @property
    def first(self) -> tuple[BackendResult, OutputResult] | None:
        """Where the network first diverges: the backend whose divergence begins at the least depth."""
        depth = {output.module: at for result in self.backends for at, output in enumerate(result.outputs)}
        begun = [(result, result.begins) for result in self.backends if result.diverges]
        pairs = [(result, output) for result, output in begun if output is not None]
        return min(pairs, key=lambda pair: depth[pair[1].module], default=None)

    @property
    def passed(self) -> bool:
        """Whether every module was compared and no backend diverges."""
        return self.first is None and not self.missing

    def to_dict(self) -> dict[str, Any]:
        """Return every output of every backend for JSON, and where the network first diverges."""
        place = None
        if self.first is not None:
            result, output = self.first
            place = {
                "backend": result.backend, "module": output.module, "block": block_of(output.module),
                "verdict": output.verdict,
            }  # fmt: skip
        return {
            "artifact": self.artifact,
            "images": self.images,
            "passed": self.passed,
            "first_divergence": place,
            "missing": dict(self.missing),
            "backends": [result.to_dict() for result in self.backends],
        }


def recorded_files(files: Sequence[Path], export_dir: Path) -> Sequence[Artifact]:
    """Return the artifacts named, or every ONNX file recorded and present in a folder.

    Raises InputError where there is none.
    """
    if files:
        return [open_artifact(path) for path in files]
    present = [artifact for artifact in find_artifacts(export_dir, "onnx") if artifact.path.is_file()]
    if not present:
        raise InputError(
            f"No ONNX file is recorded and present in {export_dir}. Run `cnx-deploy export --variant atto` first, or "
            "name the files."
        )
    return present


def compare_artifact(
    artifact: Artifact, *, samples: int = 2, data: Path | None = None, progress: Progress | None = None
) -> LayerComparison:
    """Compare a recorded ONNX file by layer on `samples` images (at most `MAX_IMAGES`) of a folder or of a seed.

    Raises InputError for an engine, for a file whose nodes are not named after modules, and for weights that are gone;
    CorruptArtifactError for altered bytes, before any of them is parsed.
    """
    artifact = open_artifact(artifact.path)
    if not is_onnx(artifact):
        raise InputError(
            f"{artifact.path.name} is an engine, whose inner tensors cannot be read. Name the file it was built from, "
            f"{artifact.manifest.source_name}: where a GPU is, a copy of that is compiled with its layers as outputs."
        )
    check_recorded(artifact)
    if not 1 <= samples <= MAX_IMAGES:
        raise InputError(
            f"Layers are compared on 1 to {MAX_IMAGES} images, not {samples}: every output of each is held in memory."
        )
    batches = raw_batches(artifact.manifest, samples, data, whole=True)
    model = recorded_model(artifact).model
    return compare_layers(artifact.path, model, artifact.manifest.deploy, batches, progress=progress)


def compare_layers(
    path: Path,
    model: ConvNeXtV2,
    spec: DeploySpec,
    batches: Sequence[Tensor],
    *,
    backends: Sequence[LayerBackend] = BACKENDS,
    progress: Progress | None = None,
) -> LayerComparison:
    """Run raw images on each of `backends` and compare every module's output with that of the deploy form in FP32.

    `model` and `spec` are what the file at `path` was made from, which is only read.
    """
    form = reference_form(model, spec)
    outputs = find_outputs(path, module_names(form))
    reference = [torch_outputs(form, images) for images in batches]
    del form  # its weights: each backend holds its own
    network = ExportedNetwork(path, model, spec, outputs, len(batches[0]))
    images, results = sum(len(batch) for batch in batches), []
    for backend in backends:
        if progress is not None:
            progress(f"layers on {backend.name}", images)
        results.append(_backend_result(backend, network, batches, reference))
    return LayerComparison(path.name, images, tuple(results), outputs.missing)


def compare_output(module: str, pairs: Sequence[tuple[Tensor, Tensor]], gate: Gate) -> OutputResult:
    """Judge one module over all batches, (output, reference's output) each; `find_jumps` finds jumps."""
    canonicals = [(canonical(output), canonical(expected)) for output, expected in pairs]
    for output, expected in canonicals:
        if output.shape != expected.shape:
            reason = f"its shape is {tuple(output.shape)}, the reference's {tuple(expected.shape)}"
            return OutputResult(module, "not lined up", None, reason)
    parts = [_differences(output, expected) for output, expected in canonicals]
    worst = OutputDifferences(
        max(part.relative_l2 for part in parts),
        min(part.cosine for part in parts),
        sum(part.nonfinite for part in parts),
        max(part.max_abs for part in parts),
    )
    if worst.nonfinite:
        return OutputResult(module, "not finite", replace(worst, relative_l2=math.nan, cosine=math.nan))
    if worst.relative_l2 <= gate.relative_l2_max:
        return OutputResult(module, "ok", worst)
    return OutputResult(module, "fails", worst)


def find_jumps(outputs: Iterable[OutputResult], rounding: float) -> tuple[OutputResult, ...]:
    """Mark, in order of depth, the outputs that pass but stand out from all before them.

    `rounding` is the relative L2 of one rounding, which the first output of a sound file shows: below it nothing jumps.
    """
    marked, largest = [], rounding
    for output in outputs:
        error = output.relative_l2 if math.isfinite(output.relative_l2) else 0.0
        jumps = output.verdict == "ok" and error > JUMP * largest
        marked.append(replace(output, verdict="jumps") if jumps else output)
        largest = max(largest, error)
    return tuple(marked)


def block_of(module: str) -> str:
    """Return the stem, downsampling or block that a module is part of: `stages.2.3` of `stages.2.3.grn.affine`."""
    parts = module.split(".")
    depth = {"stages": 3, "downsample_layers": 2}.get(parts[0], 1)
    return ".".join(parts[:depth])


def report_lines(comparison: LayerComparison) -> Iterator[str]:
    """Yield lines for a terminal: a row a block, a column a backend that ran; then each backend, and the verdict."""
    ran = comparison.ran
    blocks = list(dict.fromkeys(block_of(output.module) for result in ran for output in result.outputs))
    width = max(len(block) for block in ("block", *blocks))
    yield f"{comparison.artifact}, images: {comparison.images}"
    yield f"{'block':{width}}" + "".join(f" {result.backend:>14}" for result in ran)
    for block in blocks:
        yield f"{block:{width}}" + "".join(f" {_cell(result, block):>14}" for result in ran).rstrip()
    yield LEGEND
    for result in comparison.backends:
        yield f"{result.backend}: {_summary(result)}"
    for module, reason in comparison.missing.items():
        yield f"not lined up: {module}: {reason}"
    if comparison.first is not None:
        result, output = comparison.first
        place = f"{output.module} (block {block_of(output.module)}) on {result.backend}"
        yield f"FIRST DIVERGENCE: {place}: {output.describe()}"
    else:
        yield "no backend diverges" + (", but not every module was compared" if comparison.missing else "")


def _backend_result(
    backend: LayerBackend,
    network: ExportedNetwork,
    batches: Sequence[Tensor],
    reference: Sequence[Mapping[str, Tensor]],
) -> BackendResult:
    """Run one backend; what it lacks here is its `not_run`."""
    row = network.spec.row
    # What its logits are held to in `cnx-deploy verify`, and each output here.
    gate = row.gate_of_engine(allow_tf32=False) if backend.is_engine else row.gate
    if not backend.shows(row):
        return BackendResult(backend.name, gate, not_run=backend.elsewhere)
    try:
        with backend.open(network) as read:
            outputs = [read(images) for images in batches]
    except MissingRequirementError as error:
        return BackendResult(backend.name, gate, not_run=str(error))
    results = []
    for module in network.outputs.by_module:
        pairs = [(tensors[module], expected[module]) for tensors, expected in zip(outputs, reference, strict=True)]
        results.append(compare_output(module, pairs, gate))
    return BackendResult(backend.name, gate, find_jumps(results, row.rounding))


def _differences(candidate: Tensor, reference: Tensor) -> OutputDifferences:
    """Compare two outputs of one canonical shape; NaN on both sides is no agreement."""
    a, b = (output.detach().double().flatten(1) for output in (candidate, reference))
    nonfinite = int((~torch.isfinite(a)).sum() + (~torch.isfinite(b)).sum())
    largest = float(a.abs().max())
    if nonfinite:
        return OutputDifferences(math.nan, math.nan, nonfinite, largest)
    tiny = torch.finfo(torch.float64).tiny
    sizes = a.norm(dim=1), b.norm(dim=1)
    cosine = (a * b).sum(dim=1) / (sizes[0] * sizes[1]).clamp_min(tiny)
    cosine = torch.where((sizes[0] == 0) & (sizes[1] == 0), 1.0, cosine)
    relative_l2 = (a - b).norm(dim=1) / sizes[1].clamp_min(tiny)
    return OutputDifferences(float(relative_l2.max()), float(cosine.min()), 0, largest)


def _cell(result: BackendResult, block: str) -> str:
    """Write the largest relative L2 of a block's outputs, and the gravest mark among them."""
    outputs = [output for output in result.outputs if block_of(output.module) == block]
    mark = max((MARKS[output.verdict] for output in outputs), key=(" ", "^", "!").index, default=" ")
    known = [output.figures.relative_l2 for output in outputs if output.figures is not None]
    largest = "not finite" if any(map(math.isnan, known)) else f"{max(known):.1e}" if known else "-"
    return largest + mark


def _summary(result: BackendResult) -> str:
    if result.not_run:
        return f"not run: {result.not_run}"
    within, limit = sum(not output.fails for output in result.outputs), result.gate.relative_l2_max
    text = f"{within} of {len(result.outputs)} modules within {limit:g}"
    finite = [(output.module, output.figures) for output in result.outputs
              if output.figures is not None and math.isfinite(output.relative_l2)]  # fmt: skip
    if finite:
        at, worst = max(finite, key=lambda pair: pair[1].relative_l2)
        text += f", largest {worst.relative_l2:.1e} at {at}"
        at, worst = max(finite, key=lambda pair: pair[1].max_abs)
        text += f"; largest |x| {worst.max_abs:.3g} at {at}"
    if (begins := result.begins) is not None:
        text += f"; {'diverges from' if result.diverges else 'jumps at'} {begins.module}: {begins.describe()}"
    return text
