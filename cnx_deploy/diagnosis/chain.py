"""From PyTorch to the engine step by step: the first step that fails says which part of the chain is to blame.

1. PyTorch in FP32 -> the FP32 ONNX file, with all of ONNX Runtime's optimisations and with none: the export.
2. FP32 ONNX -> half-precision ONNX, rounded after every operator: the precision.
3. Half-precision ONNX -> each engine built from it: TensorRT. On its GPU only.

Each step's reference is the result of the step before, so an error is counted once. PyTorch in float64 against FP32
says how much FP32 itself is off: no step can be asked to be better. TF32 is off on all sides.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.api import VerifyRequest
from cnx_deploy.core.artifacts import find_artifacts, is_onnx, open_artifact, select_artifacts
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.gates import GATES, Gate, ParityResult
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.data.image_source import batch_sizes
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.exporters.graph_checks import check_graph
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions, open_runner
from cnx_deploy.verification.parity import differences, logits_of
from cnx_deploy.verification.verify import Progress, Reference

__all__ = ["Step", "StepVerdict", "run_steps", "verify_steps"]

IMAGES = 16
"""Unless another number is asked for: the emulator takes seconds an image for the large variants."""

FLOOR_IMAGES = 4
"""Float64 takes three times as long as FP32 and as much memory again."""


@dataclass(frozen=True, slots=True)
class Step:
    """One comparison of the chain. `blame`: what is at fault where it fails; `result` None where it was not run."""

    reference: str
    candidate: str
    blame: str
    result: ParityResult | None
    not_run: str | None = None

    @property
    def failed(self) -> bool:
        """Whether it ran and broke its gate."""
        return self.result is not None and not self.result.passed

    def to_dict(self) -> dict[str, Any]:
        """The step as JSON has it."""
        found = self.result.to_dict() if self.result is not None else None
        return {
            "reference": self.reference,
            "candidate": self.candidate,
            "blame": self.blame,
            "result": found,
            "not_run": self.not_run,
        }


@dataclass(frozen=True, slots=True)
class StepVerdict:
    """The chain of one half-precision file. `floor`: relative L2 (worst image) of PyTorch in FP32 against float64."""

    artifact: str
    floor: float
    floor_images: int
    steps: tuple[Step, ...]

    @property
    def failed(self) -> Step | None:
        """The step that failed, which is the last one that ran; None where none did."""
        return next((step for step in self.steps if step.failed), None)

    def sentence(self) -> str:
        """The verdict in words."""
        failed = self.failed
        if failed is not None and failed.result is not None:
            reasons = "; ".join(failed.result.failures)
            return f"{failed.candidate} differs from {failed.reference} ({reasons}). To blame: {failed.blame}"
        ran = sum(step.result is not None for step in self.steps)
        rest = len(self.steps) - ran
        return f"{ran} steps passed" + (f", {rest} not run" if rest else "")

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it."""
        return {
            "artifact": self.artifact,
            "fp32_noise_floor": {"relative_l2_max": self.floor, "images": self.floor_images},
            "steps": [step.to_dict() for step in self.steps],
            "passed": self.failed is None,
            "verdict": self.sentence(),
        }


def verify_steps(
    artifact: Artifact, engines: Sequence[Artifact], reference: Reference, progress: Progress | None = None
) -> StepVerdict:
    """Judge the chain that leads to a recorded half-precision ONNX file and on to the `engines` built from it.

    The FP32 file of step 1 is exported anew from the recorded weights, in a temporary folder: the chain is judged and
    not what happens to lie in a folder. Raises InputError for a file that is not of half precision.
    """
    artifact = open_artifact(artifact.path)
    _refuse_other(artifact)
    check_graph(artifact.path, artifact.file_names)
    pairs = list(reference.pairs(artifact, reference.samples, progress))
    batches, expected = [images for images, _ in pairs], torch.cat([logits for _, logits in pairs])
    floor, floor_images = _noise_floor(artifact, reference, batches)
    steps: list[Step] = []
    with ExitStack() as stack:
        for step in _steps(artifact, engines, reference, batches, expected, stack, progress):
            steps.append(step)
            if step.failed:
                break
    return StepVerdict(artifact.path.name, floor, floor_images, tuple(steps))


def run_steps(
    request: VerifyRequest, note: Callable[[str], None], progress: Progress | None = None
) -> list[StepVerdict]:
    """The chain of every half-precision ONNX file named, or recorded and present, with the engines built from it.

    Raises InputError where there is none.
    """
    artifacts = list(select_artifacts(request.files, request.export_dir, request.engines_dir, note))
    halves = [each for each in artifacts if each.manifest.kind == "onnx" and each.manifest.precision.name != "fp32"]
    if request.files and len(halves) < len(artifacts):
        halves = artifacts  # `verify_steps` says what is wrong with the others
    if not halves:
        raise InputError("--steps leads to a half-precision ONNX file, and none is recorded and present. Export one.")
    engines = [each for each in find_artifacts(request.engines_dir, "engine") if each.path.is_file()]
    for artifact in halves:
        _refuse_other(artifact)
    verdicts = []
    for artifact in halves:
        note(f"Following {artifact.path.name} from PyTorch on")
        built = [engine for engine in engines if engine.manifest.source_sha256 == artifact.sha256]
        reference = Reference(artifact, request.data, request.samples or IMAGES)
        verdicts.append(verify_steps(artifact, built, reference, progress))
    return verdicts


def _refuse_other(artifact: Artifact) -> None:
    if not is_onnx(artifact) or not artifact.manifest.precision.has_islands:
        raise InputError(f"{artifact.path.name} is no half-precision ONNX file, which --steps leads to. Name one.")


def _noise_floor(artifact: Artifact, reference: Reference, batches: Sequence[Tensor]) -> tuple[float, int]:
    spec = artifact.manifest.deploy
    images = torch.cat([image[None] for batch in batches for image in batch][:FLOOR_IMAGES])
    with reference_runner(copy.deepcopy(reference.loaded.model).double(), spec) as runner:
        exact = runner.run(images)
    with reference_runner(reference.loaded.model, spec) as runner:
        return differences(runner.run(images), exact).relative_l2_max, len(images)


def _steps(
    artifact: Artifact,
    engines: Sequence[Artifact],
    reference: Reference,
    batches: Sequence[Tensor],
    expected: Tensor,
    stack: ExitStack,
    progress: Progress | None,
) -> Iterator[Step]:
    precision, checked = artifact.manifest.precision.name, RunnerOptions(hashes_hold=True)
    single = _single_precision(artifact, reference, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    for name, how in (("onnxruntime-plain", "no optimisations"), ("onnxruntime", "all optimisations")):
        logits = _logits(open_runner(single, name, checked), batches, f"FP32 ONNX, {how}", progress)
        what = f"FP32 ONNX ({how})"
        blame = "the export." if name == "onnxruntime-plain" else "ONNX Runtime's optimisations, not the file."
        yield _step("PyTorch FP32", what, blame, logits, expected, GATES["fp32"], batches)
    rounded = _logits(open_runner(artifact, f"emulate-{precision}", checked), batches, "emulator", progress)
    blame = f"{precision.upper()}: see `cnx-deploy headroom` and `cnx-deploy bisect`."
    emulated = f"{artifact.path.name} (emulated)"
    yield _step("FP32 ONNX", emulated, blame, rounded, logits, GATES[precision], batches)
    for engine in engines:
        yield _engine_step(engine, artifact, rounded, batches, progress)


def _engine_step(
    engine: Artifact, source: Artifact, rounded: Tensor, batches: Sequence[Tensor], progress: Progress | None
) -> Step:
    precision = source.manifest.precision.name
    try:
        runner = open_runner(engine)
    except MissingRequirementError as error:
        return Step(source.path.name, engine.path.name, "TensorRT.", None, str(error))
    batches = _recut(batches, runner.input_spec)
    logits = _logits(runner, batches, engine.path.name, progress)
    rounded = rounded[: len(logits)]
    return _step(source.path.name, engine.path.name, "TensorRT.", logits, rounded, GATES[precision], batches)


def _recut(batches: Sequence[Tensor], spec: InputSpec) -> list[Tensor]:
    """The same images in batches that an engine takes, whose profile may be narrower than its file's range."""
    images = torch.cat(list(batches))
    return [piece for piece in torch.split(images, batch_sizes(len(images), spec)) if len(piece) >= spec.min_batch]


def _single_precision(artifact: Artifact, reference: Reference, folder: Path) -> Artifact:
    """An FP32 file of the same weights, input and layout: what is wrong with the form is no fault of the precision."""
    deploy = artifact.manifest.deploy
    spec = ExportSpec(
        deploy=replace(deploy, precision="fp32", keep_fp32=()),
        batch=artifact.manifest.batch,
    )
    return export_onnx(reference.loaded.model, artifact.manifest.model, spec, folder)


def _logits(runner: Runner, batches: Sequence[Tensor], what: str, progress: Progress | None) -> Tensor:
    told: Callable[[int], None] | None = None if progress is None else lambda images: progress(what, images)
    with runner:
        return logits_of(runner, batches, told)


def _step(
    reference: str,
    candidate: str,
    blame: str,
    logits: Tensor,
    expected: Tensor,
    gate: Gate,
    batches: Sequence[Tensor],
) -> Step:
    found = differences(logits, expected)
    sizes = tuple(dict.fromkeys(len(batch) for batch in batches))
    return Step(
        reference, candidate, blame, ParityResult(candidate, reference, gate, sizes, found, gate.failures(found))
    )
