"""Layer-by-layer comparison: every module's output on each backend, against PyTorch in FP32.

An output **fails** where it is not finite, not of the reference's shape, or further from the reference than the gate
that `cnx-deploy verify` holds the logits to (relative L2, worst sample). It **jumps** where it passes but is `JUMP`
times as far as every output before it: noise grows by rounding, a fault arrives at once. A backend diverges where an
output fails, and then its first failure or jump, in order of depth, is where it begins. A jump alone is said and is no
failure.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

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
from cnx_deploy.diagnosis.layer_record import (
    BackendResult,
    LayerComparison,
    OutputDifferences,
    OutputResult,
    block_of,
)
from cnx_deploy.exporters.untrusted import check_recorded
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.recorded import recorded_model

__all__ = ["JUMP", "MAX_IMAGES", "compare_artifact", "compare_layers", "compare_output", "find_jumps",
           "recorded_files", "report_lines"]  # fmt: skip

Progress = Callable[[str, int], None]

JUMP = 4.0
"""Seen on sound files of atto, pico and tiny in FP16 and FP32, on every backend: at most 2.4 times all before."""
MAX_IMAGES = 8
"""Every module's output is held for each image: 0.7 GB an image for huge at 224 px."""

MARKS = {"ok": " ", "jumps": "^"}
LEGEND = (
    "! fails, ^ more than all before explain. Relative L2 against PyTorch in FP32, which rounds to a file's eight bits "
    "too, the largest of the block's modules"
)


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
    artifact: Artifact,
    *,
    samples: int = 2,
    data: Path | None = None,
    white_level: float | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> LayerComparison:
    """Compare a recorded ONNX file by layer on `samples` images (at most `MAX_IMAGES`) of a folder or of a seed.

    `white_level` is as in `core.preprocessing`, in place of the recorded one. `note` is told what of the folder is left
    out, and what the images have shown.

    Raises InputError for an engine, for a file whose nodes are not named after modules, and for weights that are gone;
    CorruptArtifactError for altered bytes, before any of them is parsed.
    """
    artifact = open_artifact(artifact.path)
    if not is_onnx(artifact):
        raise InputError(
            f"{artifact.path.name} is an engine, whose inner tensors cannot be read. Use the file it was built from, "
            f"{artifact.manifest.source_name}: where a GPU is, a copy of that is compiled with its layers as outputs."
        )
    check_recorded(artifact)
    if not 1 <= samples <= MAX_IMAGES:
        raise InputError(
            f"Layers are compared on 1 to {MAX_IMAGES} images, not {samples}: every output of each is held in memory."
        )
    batches = raw_batches(artifact.manifest, samples, data, whole=True, white_level=white_level, note=note)
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
    reference = [torch_outputs(form, images) for images in batches]
    names, chosen = module_names(form), model.task.behind_a_choice
    behind = [name for name in names if any(f"{name}.".startswith(f"{part}.") for part in chosen)]
    outputs = find_outputs(
        path, [name for name in names if name in reference[0] and name not in behind], names
    ).with_merged(reference[0])
    del form  # its weights: each backend holds its own
    network = ExportedNetwork(path, model, spec, outputs, len(batches[0]))
    images, results = sum(len(batch) for batch in batches), []
    for backend in backends:
        if progress is not None:
            progress(f"layers on {backend.name}", images)
        results.append(_backend_result(backend, network, batches, reference))
    return LayerComparison(path.name, images, tuple(results), outputs.missing, tuple(behind))


def compare_output(module: str, pairs: Sequence[tuple[Tensor, Tensor]], gate: Gate) -> OutputResult:
    """Judge one module over all batches, (output, reference's output) each; `find_jumps` finds jumps."""
    canonicals = [(canonical(output), canonical(expected)) for output, expected in pairs]
    for output, expected in canonicals:
        if output.shape != expected.shape:
            reason = f"its shape is {tuple(output.shape)}, the reference's {tuple(expected.shape)}"
            return OutputResult(module, "not lined up", None, reason)
    parts = list(zip(*(_differences(output, expected) for output, expected in canonicals), strict=True))
    relative_l2, cosine, nonfinite, largest = max(parts[0]), min(parts[1]), sum(parts[2]), max(parts[3])
    if nonfinite:
        return OutputResult(module, "not finite", OutputDifferences(math.nan, math.nan, int(nonfinite), largest))
    figures = OutputDifferences(relative_l2, cosine, 0, largest)
    return OutputResult(module, "ok" if relative_l2 <= gate.relative_l2_max else "fails", figures)


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


def report_lines(comparison: LayerComparison) -> Iterator[str]:
    """Yield lines for a terminal: a row a block, a column a backend that ran; then each backend, and the verdict."""
    ran = comparison.ran
    blocks = comparison.blocks
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
    if comparison.not_compared:
        count = len(comparison.not_compared)
        yield f"not compared by place: {count} modules behind a choice among candidates; verify matches what they give"
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
    gate = network.model.task.gate(row.gate_of_engine(allow_tf32=False) if backend.is_engine else row.gate)
    if not backend.shows(row):
        return BackendResult(backend.name, gate.relative_l2_max, not_run=backend.elsewhere)
    try:
        with backend.open(network) as read:
            outputs = [read(images) for images in batches]
    except MissingRequirementError as error:
        return BackendResult(backend.name, gate.relative_l2_max, not_run=str(error))
    results = []
    for module in network.outputs.by_module:
        pairs = [(tensors[module], expected[module]) for tensors, expected in zip(outputs, reference, strict=True)]
        results.append(compare_output(module, pairs, gate))
    return BackendResult(backend.name, gate.relative_l2_max, find_jumps(results, row.rounding))


def _differences(candidate: Tensor, reference: Tensor) -> tuple[float, float, float, float]:
    """Compare two outputs of one canonical shape: relative L2, cosine, values that are no number, largest |x|.

    NaN on both sides is no agreement.
    """
    a, b = (output.detach().double().flatten(1) for output in (candidate, reference))
    nonfinite = int((~torch.isfinite(a)).sum() + (~torch.isfinite(b)).sum())
    largest = float(a.abs().max())
    if nonfinite:
        return math.nan, math.nan, nonfinite, largest
    tiny = torch.finfo(torch.float64).tiny
    sizes = a.norm(dim=1), b.norm(dim=1)
    cosine = (a * b).sum(dim=1) / (sizes[0] * sizes[1]).clamp_min(tiny)
    cosine = torch.where((sizes[0] == 0) & (sizes[1] == 0), 1.0, cosine)
    relative_l2 = (a - b).norm(dim=1) / sizes[1].clamp_min(tiny)
    return float(relative_l2.max()), float(cosine.min()), 0, largest


def _cell(result: BackendResult, block: str) -> str:
    """Write the largest relative L2 of a block's outputs, and the gravest mark among them."""
    verdict, error = result.of_block(block) or ("ok", None)
    shown = f"{error:.1e}" if error is not None else "not finite" if verdict == "not finite" else "-"
    return shown + MARKS.get(verdict, "!")


def _summary(result: BackendResult) -> str:
    if result.not_run:
        return f"not run: {result.not_run}"
    text = f"{result.within} of {len(result.outputs)} modules within {result.relative_l2_max:g}"
    finite = [output for output in result.outputs if math.isfinite(output.relative_l2)]
    if finite:
        worst = max(finite, key=lambda output: output.relative_l2)
        peaks = {output.module: output.figures.max_abs or 0.0 for output in finite if output.figures is not None}
        peak = max(peaks, key=lambda module: peaks[module])
        text += f", largest {worst.relative_l2:.1e} at {worst.module}; largest |x| {peaks[peak]:.3g} at {peak}"
    if (begins := result.begins) is not None:
        text += f"; {'diverges from' if result.diverges else 'jumps at'} {begins.module}: {begins.describe()}"
    return text
