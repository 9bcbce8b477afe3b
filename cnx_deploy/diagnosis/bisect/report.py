"""What a bisection says: the islands, why they are needed, that none of them can be left out, and the command."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cnx_deploy.core.errors import CheckFailedError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.diagnosis.bisect.case import Exported, Probe
from cnx_deploy.diagnosis.bisect.find import Bisection
from cnx_deploy.exporters.onnx import ExportSpec

__all__ = ["command_of", "document_of", "failure", "lines_of"]

SCHEMA_VERSION = 1


def lines_of(found: Bisection) -> Iterator[str]:
    """The result, line by line; `failure` says the rest where nothing helps."""
    recorded, name = found.recorded.probe, found.artifact.path.name
    judged = f"gate {found.gate.name}, {found.images} images, by the emulator; on a GPU: not run"
    if recorded.passed:
        error = f"relative L2 {recorded.found.relative_l2_max:.1e}"
        yield f"{name} passes as it is ({error}; {judged}): nothing more has to stay in FP32."
        return
    yield f"{name} fails: {'; '.join(recorded.failures)} ({judged})"
    yield from _reasons(found)
    if found.kept is None or found.final is None:
        return
    yield f"To keep in FP32, found with {sum(not probe.exported for probe in found.probes)} probes:"
    yield from (f"  {' '.join(island)}" for island in found.islands)
    yield f"With it: pass, relative L2 {found.final.probe.found.relative_l2_max:.1e} ({_shares(found, found.final)})"
    for name, fewer in zip(found.kept, found.neighbours, strict=True):
        yield f"Without {name} among them: {_verdict(fewer)}"
    if set(found.units) <= set(found.kept):
        yield "That is all of it: an FP32 file (--precision fp32) says the same with less."
    yield "The same file from the command line, in place of the one that fails:"
    yield f"  {command_of(found.artifact, found.kept, found.final)}"


def failure(found: Bisection) -> CheckFailedError | None:
    """What is wrong where nothing helps; None otherwise."""
    if found.outcome != "nothing helps":
        return None
    name = found.artifact.path.name
    if found.reference_nonfinite:
        return CheckFailedError(
            f"PyTorch in FP32 gives {found.reference_nonfinite} logits that are NaN or infinite for {name}'s network; "
            "numbers were expected, and no precision of the file mends that. Check the weights and the images."
        )
    probe = next(each for each in found.probes if not each.passed and set(found.units) <= set(each.kept))
    return CheckFailedError(
        f"{name} fails with every module in FP32 too ({'; '.join(probe.failures)}): rounding is not its fault, or gate "
        f"{found.gate.name} asks for more than FP32 gives. cnx-deploy verify compares the FP32 file with PyTorch."
    )


def command_of(artifact: Artifact, kept: tuple[str, ...], final: Exported) -> str:
    """The `cnx-deploy export` that writes the file again with `kept` in FP32, from the weights its manifest names."""
    words = ["cnx-deploy", "export", "--variant", artifact.manifest.model.variant, *_weights(artifact)]
    words += ["--image-size", str(artifact.manifest.model.image_size)]
    words += ["--precision", artifact.manifest.precision.name, *_form(artifact)]
    for name in kept:
        words += ["--keep-fp32", name]
    words += ["--force"] if final.verifies else ["--force", "--no-verify"]
    return shlex.join(words)


def document_of(found: Bisection) -> dict[str, Any]:
    """The result as JSON has it."""
    final = found.final
    shares = None
    if final is not None:
        shares = {"parameters": round(final.parameter_share, 6), "results": round(final.result_share, 4)}
    return {
        "schema_version": SCHEMA_VERSION,
        "artifact": found.artifact.path.name,
        "precision": found.artifact.manifest.precision.name,
        "gate": asdict(found.gate),
        "images": found.images,
        "outcome": found.outcome,
        "recorded": _probe(found.recorded.probe),
        "first_nonfinite": found.recorded.first_nonfinite,
        "infinite_weights": list(found.recorded.infinite_weights),
        "reference_nonfinite": found.reference_nonfinite,
        "keep_fp32": None if found.kept is None else list(found.kept),
        "islands": [list(island) for island in found.islands],
        "final": None if final is None else _probe(final.probe),
        "without_one": [_probe(probe) for probe in found.neighbours],
        "fp32_share": shares,
        "command": None if found.kept is None or final is None else command_of(found.artifact, found.kept, final),
        "probes": [_probe(probe) for probe in found.probes],
    }


def _reasons(found: Bisection) -> Iterator[str]:
    if found.recorded.infinite_weights:
        precision = found.artifact.manifest.precision.name.upper()
        yield f"Weights that are infinite in {precision}: {' '.join(found.recorded.infinite_weights)}"
    if found.recorded.first_nonfinite is not None:
        yield f"First operator whose result is NaN or infinite: {found.recorded.first_nonfinite}"
    else:
        yield "Every operator's result is a number: what fails is accuracy."


def _verdict(probe: Probe) -> str:
    return "FAIL: " + "; ".join(probe.failures) if probe.failures else "pass"


def _shares(found: Bisection, final: Exported) -> str:
    before = 1.0 - float(found.artifact.manifest.facts.half_share)
    results = f"{final.result_share:.1%} of the operators' results, {before:.1%} before"
    return f"in FP32: {final.parameter_share:.2%} of the parameters, {results}"


def _weights(artifact: Artifact) -> list[str]:
    record = artifact.manifest.model
    weights, classes = record.weights, ["--num-classes", str(record.num_classes)]
    if weights.origin == "random":
        return ["--seed", weights.reference, *classes]
    new_head = [*classes, "--reset-head"] if record.head_is_new else []
    if weights.origin == "pretrained":
        return ["--pretrained", weights.reference, *new_head]
    return ["--checkpoint", os.path.normpath(artifact.path.parent / weights.reference), *new_head]


def _form(artifact: Artifact) -> list[str]:
    """What is asked for beyond the defaults, so that the same file is written in the same place."""
    manifest = artifact.manifest
    deploy = manifest.deploy
    name = manifest.stem.removesuffix(f"-{deploy.image_size}-{deploy.precision}")
    words = ["--batch", ":".join(str(size) for size in manifest.batch)]
    if tuple(manifest.batch) == ExportSpec().batch:
        words = []
    words += ["--input", deploy.input_kind] if deploy.input_kind != "float" else []
    words += ["--optimize-for", str(deploy.layout)] if deploy.layout != "gpu" else []
    for fold in deploy.leave_out:
        words += ["--without-fold", fold]
    words += ["--name", name] if name != manifest.model.variant else []
    return [*words, "--output-dir", os.path.normpath(artifact.path.parent)]


def _probe(probe: Probe) -> dict[str, Any]:
    return {
        "kept": list(probe.kept),
        "exported": probe.exported,
        "passed": probe.passed,
        "failures": list(probe.failures),
        "found": asdict(probe.found),
    }
