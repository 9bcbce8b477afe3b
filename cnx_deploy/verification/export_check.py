"""What an export compares before it puts a file into place."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from cnx_deploy.core.errors import ParityError
from cnx_deploy.core.gates import GATES, Gate, ParityResult
from cnx_deploy.core.manifest import Artifact, OnnxManifest
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.exporters.onnx import ExportSpec
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.deploy import parts_of
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.runners.registry import RunnerOptions, open_runner
from cnx_deploy.verification.parity import compare, logits_of
from cnx_deploy.verification.verify import rebatched

__all__ = ["check_exported"]

REFERENCE = "torch float32"
KEEP = "--keep-fp32"


def check_exported(loaded: LoadedModel, export: ExportSpec) -> Callable[[Artifact[OnnxManifest]], ParityResult]:
    """The check an export runs on the file before it is put into place: batches of 1 and 2, here and now.

    A half-precision file's deploy form is judged with every part in FP32 first, on images that rounding leaves as they
    are: it would hide a small mistake. The file
    itself is run by ONNX Runtime where that can, and by the emulator, which alone sees FP16 overflow.

    The returned function raises ParityError; otherwise it gives the verdict for the manifest.
    """

    def check(artifact: Artifact[OnnxManifest]) -> ParityResult:
        path = artifact.path
        spec = export.deploy
        smallest, _, largest = export.batch
        sizes = [size for size in (1, 2) if smallest <= size <= largest] or [smallest]
        source = image_like_batches(sum(sizes), spec.image_size, batch_size=1)
        batches = [runner_input(batch, spec.input_kind) for batch in rebatched(source, sizes)]
        with reference_runner(loaded.model, spec) as runner:
            expected = logits_of(runner, batches)
        if spec.is_half:
            form = partial(deployed_runner, loaded.model, replace(spec, keep_fp32=parts_of(loaded.model.variant)))
            _compared(form, expected, batches, GATES["fp32"], f"The form of {path.name}")
        remedy = f" `cnx-deploy bisect` names what has to stay in FP32 ({KEEP})." if spec.is_half else ""
        results = [
            _compared(
                partial(open_runner, artifact, name, RunnerOptions(hashes_hold=True)),
                expected,
                batches,
                spec.row.gate,
                path.name,
                remedy,
            )
            for name in spec.row.proven_by
        ]
        return results[-1]

    return check


def _compared(
    make: Callable[[], Runner], expected: Tensor, batches: Sequence[Tensor], gate: Gate, what: str, remedy: str = ""
) -> ParityResult:
    """Make a runner, judge it and let it go before the next one is made: each holds the weights of huge once more."""
    with make() as runner:
        result = compare(runner, expected, batches, gate, reference_name=REFERENCE)
    if not result.passed:
        raise ParityError(
            f"{what} ({result.candidate}) differs from PyTorch: {'; '.join(result.failures)}. Nothing was written. "
            f"Use --no-verify to keep the file for inspection.{remedy}"
        )
    return result
