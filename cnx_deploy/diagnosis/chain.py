"""From PyTorch to the engine step by step: the first step that fails says which part of the chain is to blame.

1. PyTorch in FP32 -> the FP32 ONNX file, with none of ONNX Runtime's optimisations and with all: the export.
2. FP32 ONNX -> half-precision ONNX, rounded after every operator: the precision.
3. Half-precision ONNX -> each engine built from it: TensorRT. On its GPU only.

Each step's reference is the result of the step before, so an error is counted once. PyTorch in float64 against FP32
says how much FP32 itself is off: no step can be asked to be better. TF32 is off on all sides.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.artifacts import find_artifacts, is_onnx, open_artifact, select_artifacts
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.gates import GATES, Gate, ParityResult
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.data.image_source import batch_sizes
from cnx_deploy.exporters.graph_checks import check_graph
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.tasks.base import Outputs, joined
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions, open_runner
from cnx_deploy.verification.parity import outputs_of, verdicts, worst_verdict
from cnx_deploy.verification.verify import Progress, Reference

__all__ = ["Chain", "ChainStep", "follow_chain", "report_lines", "run_chains"]

IMAGES = 16
"""Unless another number is asked for: the emulator takes seconds an image for the large variants."""
FLOOR_IMAGES = 4
"""Float64 takes three times as long as FP32 and as much memory again."""


@dataclass(frozen=True, slots=True)
class ChainStep:
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
        """Return the step for JSON."""
        return {**asdict(self), "result": self.result and self.result.to_dict()}


@dataclass(frozen=True, slots=True)
class Chain:
    """The steps to one half-precision file and on. `floor`: relative L2 (worst image) of FP32 against float64."""

    artifact: str
    floor: float
    floor_images: int
    steps: tuple[ChainStep, ...]

    @property
    def failed(self) -> ChainStep | None:
        """The step that failed, which is the last one that ran; None where none did."""
        return next((step for step in self.steps if step.failed), None)

    def verdict(self) -> str:
        """Say in a sentence which step failed, or how many passed."""
        failed = self.failed
        if failed is not None and failed.result is not None:
            reasons = "; ".join(failed.result.failures)
            return f"{failed.candidate} differs from {failed.reference} ({reasons}). To blame: {failed.blame}"
        ran = sum(step.result is not None for step in self.steps)
        rest = len(self.steps) - ran
        return f"{ran} steps passed" + (f", {rest} not run" if rest else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the chain for JSON."""
        return {
            "artifact": self.artifact,
            "fp32_noise_floor": {"relative_l2_max": self.floor, "images": self.floor_images},
            "steps": [step.to_dict() for step in self.steps],
            "passed": self.failed is None,
            "verdict": self.verdict(),
        }


def run_chains(
    files: Sequence[Path],
    note: Callable[[str], None],
    *,
    export_dir: Path = Path("export"),
    engines_dir: Path = Path("engines"),
    data: Path | None = None,
    samples: int | None = None,
    white_level: float | None = None,
    progress: Progress | None = None,
) -> list[Chain]:
    """Follow the chain of every half-precision ONNX file named, or recorded and present, and of its engines.

    Raises InputError where there is none.
    """
    artifacts = list(select_artifacts(files, export_dir, engines_dir, note))
    halves = [artifact for artifact in artifacts if files or _is_half(artifact)]
    if not halves:
        raise InputError(
            f"No half-precision ONNX file is recorded and present in {export_dir}. Run `cnx-deploy export --variant "
            "atto` first."
        )
    engines = [engine for engine in find_artifacts(engines_dir, "engine") if engine.path.is_file()]
    for artifact in halves:
        _require_half(artifact)
    chains = []
    for artifact in halves:
        note(f"Following {artifact.path.name} from PyTorch on")
        built = [engine for engine in engines if engine.manifest.source_sha256 == artifact.sha256]
        reference = Reference(artifact, data, samples or IMAGES, white_level=white_level)
        chains.append(follow_chain(artifact, built, reference, progress))
        for text in reference.notes:
            note(text)
    return chains


def follow_chain(
    artifact: Artifact, engines: Sequence[Artifact], reference: Reference, progress: Progress | None = None
) -> Chain:
    """Judge the chain that leads to a recorded half-precision ONNX file and on to the `engines` built from it.

    The FP32 file of step 1 is exported anew from the recorded weights, in a temporary folder: the chain is judged and
    not what happens to lie in a folder. Raises InputError for a file that is not of half precision.
    """
    artifact = open_artifact(artifact.path)
    _require_half(artifact)
    check_graph(artifact.path, artifact.file_names)
    pairs = list(reference.pairs(artifact, reference.samples, progress))
    batches, expected = [images for images, _ in pairs], joined([outputs for _, outputs in pairs])
    floor, floor_images = _noise_floor(artifact, reference, batches)
    steps: list[ChainStep] = []
    for step in _steps(artifact, engines, reference, batches, expected, progress):
        steps.append(step)
        if step.failed:
            break
    return Chain(artifact.path.name, floor, floor_images, tuple(steps))


def report_lines(chain: Chain) -> Iterator[str]:
    """Yield the chain for a terminal, a line a step."""
    yield f"{chain.artifact}: {chain.verdict()}"
    yield f"  FP32's own error against float64: relative L2 {chain.floor:.1e} ({chain.floor_images} images)"
    for step in chain.steps:
        pair = f"  {step.reference} -> {step.candidate}"
        if step.result is None:
            yield f"{pair:70} not run: {step.not_run}"
            continue
        verdict = "pass" if step.result.passed else "FAIL: " + "; ".join(step.result.failures)
        error = f"relative L2 {step.result.differences.relative_l2_max:.1e}"
        yield f"{pair:70} {error}, gate {step.result.gate.name}: {verdict}"


def _is_half(artifact: Artifact) -> bool:
    return is_onnx(artifact) and artifact.manifest.precision.has_islands


def _require_half(artifact: Artifact) -> None:
    if not _is_half(artifact):
        raise InputError(f"{artifact.path.name} is no half-precision ONNX file: a chain leads to one of FP16 or BF16.")


def _noise_floor(artifact: Artifact, reference: Reference, batches: Sequence[Tensor]) -> tuple[float, int]:
    spec = artifact.manifest.deploy
    images = torch.cat([image[None] for batch in batches for image in batch][:FLOOR_IMAGES])
    with reference_runner(copy.deepcopy(reference.loaded.model).double(), spec) as runner:
        exact = runner.run(images)
    with reference_runner(reference.loaded.model, spec) as runner:
        results = verdicts(runner.run(images), exact, reference.specs, GATES["fp32"], ("", ""), ())
    return worst_verdict(results).differences.relative_l2_max, len(images)


def _steps(
    artifact: Artifact,
    engines: Sequence[Artifact],
    reference: Reference,
    batches: Sequence[Tensor],
    expected: Outputs,
    progress: Progress | None,
) -> Iterator[ChainStep]:
    row, checked = artifact.manifest.precision, RunnerOptions(hashes_hold=True)
    judged = partial(_judged, reference)
    with tempfile.TemporaryDirectory() as folder:
        single = _export_fp32(artifact, reference, Path(folder))
        for runner, optimisations in (("onnxruntime-plain", "no"), ("onnxruntime", "all")):
            candidate = f"FP32 ONNX ({optimisations} optimisations)"
            outputs = _outputs(open_runner(single, runner, checked), batches, candidate, progress)
            blame = "the export." if optimisations == "no" else "ONNX Runtime's optimisations, not the file."
            yield judged(("PyTorch FP32", candidate), blame, outputs, expected, GATES["fp32"], batches)
    rounded = _outputs(open_runner(artifact, f"emulate-{row.name}", checked), batches, "emulator", progress)
    blame = f"{row.name.upper()}: see `cnx-deploy diagnose headroom` and `cnx-deploy diagnose bisect`."
    candidate = f"{artifact.path.name} (emulated)"
    yield judged(("FP32 ONNX", candidate), blame, rounded, outputs, row.gate, batches)
    for engine in engines:
        pair, blame = (artifact.path.name, engine.path.name), "TensorRT."
        try:
            opened = open_runner(engine)
        except MissingRequirementError as error:
            yield ChainStep(*pair, blame, None, str(error))
            continue
        # An engine's profile may be narrower than its file's range.
        images, spec = torch.cat(list(batches)), opened.input_spec
        pieces = torch.split(images, batch_sizes(len(images), spec))
        cut = [piece for piece in pieces if len(piece) >= spec.min_batch]
        outputs, count = _outputs(opened, cut, engine.path.name, progress), sum(map(len, cut))
        wanted = {name: output[:count] for name, output in rounded.items()}
        yield judged(pair, blame, outputs, wanted, row.gate, cut)


def _judged(
    reference: Reference, pair: tuple[str, str], blame: str, outputs: Outputs, expected: Outputs, gate: Gate,
    batches: Sequence[Tensor],
) -> ChainStep:  # fmt: skip
    """Compare one step's candidate with its reference, whose names are `pair` in the order reference, candidate."""
    gate, names = reference.task.gate(gate), (pair[1], pair[0])
    results = verdicts(outputs, expected, reference.specs, gate, names, map(len, batches))
    return ChainStep(*pair, blame, worst_verdict(results))


def _export_fp32(artifact: Artifact, reference: Reference, folder: Path) -> Artifact:
    """Export the same weights, input and layout in FP32: a fault of the form is no fault of the precision."""
    deploy = replace(artifact.manifest.deploy, precision="fp32", keep_fp32=())
    spec = ExportSpec(deploy=deploy, batch=artifact.manifest.batch)
    return export_onnx(reference.loaded.model, artifact.manifest.model, spec, folder)


def _outputs(runner: Runner, batches: Sequence[Tensor], what: str, progress: Progress | None) -> Outputs:
    told: Callable[[int], None] | None = None if progress is None else lambda images: progress(what, images)
    with runner:
        return outputs_of(runner, batches, told)
