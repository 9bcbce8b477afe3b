"""What an artifact's outputs are compared with: PyTorch's training form, or of a rescued file the original in FP32."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import onnxruntime
import torch
from torch import Tensor

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.gates import OutputSpec
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.system import cpu_count, cpu_name
from cnx_deploy.data import InputSpec
from cnx_deploy.data.input_spec import check_input
from cnx_deploy.exporters.graph_checks import admit_onnx
from cnx_deploy.exporters.rescue.conversion import prepared_model, save_model
from cnx_deploy.exporters.untrusted import hash_onnx, limits_for
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.recorded import recorded_model, recorded_outputs
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.runners.base import HoldsNothing, Runner, RunnerInfo
from cnx_deploy.runners.ort_session import open_session, trial_run
from cnx_deploy.runners.pytorch import reference_runner

__all__ = ["ORIGINAL_REFERENCE", "TORCH_REFERENCE", "ReferenceNetwork", "ReferenceRunner", "reference_network"]

TORCH_REFERENCE = "torch float32"
ORIGINAL_REFERENCE = "the original in FP32 (ONNX Runtime)"


class ReferenceRunner(Runner, Protocol):
    """A runner that declares what it gives."""

    outputs: tuple[OutputSpec, ...]


@dataclass(frozen=True, slots=True)
class ReferenceNetwork:
    """The network that an artifact was made from: `name` in results, `title` in progress.

    `open` gives a runner for a deployment's images and answer. `loaded` is the network in PyTorch; None where it came
    as an ONNX file.
    """

    name: str
    title: str
    open: Callable[[DeploySpec], ReferenceRunner]
    loaded: LoadedModel | None = None


def reference_network(artifact: Artifact) -> ReferenceNetwork:
    """Load the weights, or the ONNX file, that an artifact was made from, and check that they are the same.

    Raises InputError where they are not where the manifest says, CorruptArtifactError where they were changed, and what
    `graph_checks.admit_onnx` raises for an ONNX file.
    """
    if artifact.manifest.model.graph is not None:
        runner = _OriginalRunner(artifact)
        return ReferenceNetwork(ORIGINAL_REFERENCE, "Original file", lambda deploy: runner)
    loaded = recorded_model(artifact)
    return ReferenceNetwork(TORCH_REFERENCE, "PyTorch reference", partial(reference_runner, loaded.model), loaded)


class _OriginalRunner(HoldsNothing):
    """The file that `rescue` was given, in FP32: a half file widened. It takes normalised images of any batch."""

    def __init__(self, artifact: Artifact) -> None:
        record, deploy = artifact.manifest.model, artifact.manifest.deploy
        assert record.graph is not None
        path = (artifact.path.parent / record.weights.reference).resolve()
        if not path.is_file():
            raise InputError(
                f"{artifact.path.name} was made from {path}, which is not there. Put it back or rescue again."
            )
        admission = admit_onnx(path, allows_half_reductions=True)
        found = hash_onnx(path, [Path(name) for name in admission.facts.outside_files])
        if found != record.weights.sha256:
            raise CorruptArtifactError(
                f"{path}, which {artifact.path.name} was made from, has changed: hash {found[:12]}…, the manifest says "
                f"{record.weights.sha256[:12]}…. Rescue it again with --force."
            )
        is_half = record.graph.precision == "fp16"
        (name, (kind, shape)), *_ = admission.facts.inputs.items()
        self._input, self._batch = name, shape[0] if isinstance(shape[0], int) and shape[0] else None
        self.outputs = recorded_outputs(artifact)
        self._names = record.graph.original_outputs
        self.input_spec, self.device = InputSpec.of(deploy), torch.device("cpu")
        element = "float16" if kind == "FLOAT16" else "float32"
        trial_run(path, limits_for(admission.size_bytes), {name: (element, self.input_spec.shape(self._batch or 1))})
        admission.check_unchanged()
        with tempfile.TemporaryDirectory() as folder:
            widened = Path(folder) / "widened.onnx"
            if is_half:
                save_model(prepared_model(path), widened)
            self._session = open_session(widened if is_half else path, threads=cpu_count())
        self.info = RunnerInfo("onnxruntime", onnxruntime.__version__, cpu_name(), "fp32", "fp32")

    def run(self, images: Tensor) -> Outputs:
        """Normalised images (N, C, H, W) -> the original's outputs under the names of the rescued file."""
        check_input(images, self.input_spec)
        pieces = []
        for piece in torch.split(images, self._batch or len(images)):
            missing = (self._batch or len(piece)) - len(piece)
            filled = torch.cat([piece, piece[:1].expand(missing, *piece.shape[1:])])
            given = self._session.run(list(self._names), {self._input: filled.numpy()})
            pieces.append([torch.from_numpy(array[: len(piece)]) for array in given])
        joined: list[Any] = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        return {spec.name: values.float() for spec, values in zip(self.outputs, joined, strict=True)}
