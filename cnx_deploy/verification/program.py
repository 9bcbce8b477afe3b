"""A `.pt2` file beside an exported one: the same network as a program of `torch.export`, with own kernels in it.

The program calls `torch.ops.cnx_deploy.mlp` once a block, so who loads it imports `cnx_deploy.kernels.operators` first.
PyTorch runs it, and AOTInductor compiles it, kernels included, to a package that needs no Python; that takes the GPU.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from cnx_deploy.core.devices import typical_device
from cnx_deploy.core.errors import ExportError, InputError, OutputExistsError, ParityError
from cnx_deploy.core.files import sha256_of_file, whole_file
from cnx_deploy.core.gates import OutputSpec
from cnx_deploy.core.hidden_tensor import hidden_of_stage
from cnx_deploy.core.manifest import Artifact, OnnxManifest
from cnx_deploy.core.strict_json import strict_json
from cnx_deploy.core.system import tool_versions
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.kernels.tuning import StageChoice, StageShape, choose_by_rule
from cnx_deploy.model.deploy import DeployedConvNeXtV2, deploy_form
from cnx_deploy.model.fused import fuse
from cnx_deploy.model.recorded import recorded_gate, recorded_model
from cnx_deploy.runners.base import RunnerInfo
from cnx_deploy.runners.fused import reason_against
from cnx_deploy.runners.pytorch import TorchRunner
from cnx_deploy.verification.verify import Candidate, Reference

__all__ = ["METADATA", "Program", "program_of", "write_program"]

METADATA = "cnx_deploy.json"
"""The record of the artifact that a program was made from, as `torch.export.load` calls it in `extra_files`."""
CHECKED_IMAGES = 2
"""In the interpreter an image of atto at 224 px takes half a minute."""


@dataclass(frozen=True, slots=True)
class Program:
    """A written `.pt2` file, its hash, and the largest relative L2 to PyTorch; None where it was not compared."""

    path: Path
    sha256: str
    relative_l2: float | None
    reused: bool = False

    def __str__(self) -> str:
        if self.reused:
            return f"{self.path} is there and was made from the same inputs: reused"
        told = "not verified" if self.relative_l2 is None else f"relative L2 {self.relative_l2:.1e} against PyTorch"
        return f"{self.path} ({self.path.stat().st_size / 1e6:.1f} MB), {told}"


def write_program(artifact: Artifact[OnnxManifest], *, verify: bool = True, force: bool = False) -> Program:
    """Write `<artifact>.pt2` beside a half-precision ONNX file, from the same weights and the same request.

    Tiles are those that fit every GPU from compute capability 8.0 on; the hidden tensor is stored or computed again as
    the rule for an H100 says. With `verify` the program runs CHECKED_IMAGES images and is judged by the artifact's
    gate before it is put into place.

    Raises:
        InputError: own kernels cannot run this network, or its height and width are open.
        OutputExistsError: a program is there that was made from something else.
        ParityError: the program differs from PyTorch by more than the gate allows; nothing is written.
        ExportError: torch cannot export it.
    """
    if (reason := reason_against(artifact)) is not None:
        raise reason
    deploy, path = replace(artifact.manifest.deploy, layout="gpu"), artifact.path.with_suffix(".pt2")
    if deploy.size_range is not None:
        raise InputError(
            f"{artifact.path.name} leaves height and width open, and a program is of one size. Export it with one."
        )
    manifest = json.loads(artifact.manifest.to_json())
    record = {"onnx_sha256": artifact.sha256, "model": manifest["model"], "request": manifest["request"]}
    record["tools"] = tool_versions()
    if path.exists() and not force:
        if _record_in(path) == record:
            return Program(path, sha256_of_file(path), None, reused=True)
        raise OutputExistsError(f"{path} exists and was made from other inputs. Use --force to replace it.")
    deployed = deploy_form(recorded_model(artifact).model, deploy)
    fuse(deployed, _choice_for_any_gpu, for_all_shapes=True)
    program = _exported(deployed, artifact)
    with whole_file(path) as temporary:
        torch.export.save(program, temporary, extra_files={METADATA: json.dumps(record, sort_keys=True)})
        error = _judged(temporary, artifact, deployed.output_specs) if verify else None
    return Program(path, sha256_of_file(path), error)


def program_of(artifact: Artifact[OnnxManifest]) -> Program:
    """The program that lies beside an exported file."""
    path = artifact.path.with_suffix(".pt2")
    return Program(path, sha256_of_file(path), None, reused=True)


def _choice_for_any_gpu(shape: StageShape) -> StageChoice:
    return choose_by_rule(shape, hidden_of_stage(shape.channels, typical_device("sm90")))


def _exported(deployed: DeployedConvNeXtV2, artifact: Artifact[OnnxManifest]) -> Any:
    smallest, _, largest = artifact.manifest.batch
    spec = InputSpec.of(deployed.spec)
    example = torch.zeros(spec.shape(max(smallest, 2) if smallest != largest else smallest), dtype=spec.dtype)
    axes = {0: torch.export.Dim("batch", min=smallest, max=largest)} if smallest != largest else None
    try:
        return torch.export.export(deployed, (example,), dynamic_shapes=(axes,))
    except Exception as error:
        raise ExportError(f"torch {torch.__version__} cannot export {artifact.path.name}: {error}") from error


def _judged(path: Path, artifact: Artifact[OnnxManifest], outputs: Sequence[OutputSpec]) -> float:
    """The largest relative L2 of the program's outputs, read back from its file; ParityError above the gate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    program = torch.export.load(path)
    module = (move_to_device_pass(program, device) if device == "cuda" else program).module()
    precision, (smallest, _, largest) = artifact.manifest.precision.name, artifact.manifest.batch
    info = RunnerInfo("torch.export", str(torch.__version__), device, precision, precision)
    runner = ProgramRunner(module, InputSpec.of(artifact.manifest.deploy, smallest, largest), info, outputs)
    candidate = Candidate(artifact, runner, runner.input_spec, recorded_gate(artifact), CHECKED_IMAGES)
    results = Reference(artifact, samples=CHECKED_IMAGES).judge(candidate)
    for result in results:
        if not result.passed:
            raise ParityError(
                f"The program of {artifact.path.name} differs from PyTorch in {result.output}: "
                f"{'; '.join(result.failures)}. {path.name} was not written."
            )
    return max(result.differences.relative_l2_max for result in results)


class ProgramRunner(TorchRunner):
    """An exported program's module, which is in no mode and cannot be put into one."""

    def __init__(self, module: Any, input_spec: InputSpec, info: RunnerInfo, outputs: Sequence[OutputSpec]) -> None:
        self.module, self.input_spec, self.info, self.outputs = module, input_spec, info, tuple(outputs)
        self.device = next(module.parameters()).device


def _record_in(path: Path) -> Any:
    """The record in a program's archive; None where it is none of ours."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(f"/{METADATA}"))
            return strict_json(archive.read(name))
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
