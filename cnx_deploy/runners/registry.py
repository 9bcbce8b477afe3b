"""A runner for a recorded artifact, whose hashes are checked before a byte of it is parsed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from cnx_deploy.core.artifacts import is_engine, is_onnx, open_artifact
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.exporters.onnx_external import check_recorded
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.tensorrt import TensorRTRunner

__all__ = ["ONNX_RUNNERS", "checked_by", "misfit", "open_onnx", "open_runner"]

NO_BF16 = (
    "ONNX Runtime has no BF16 convolution on a CPU: {name} is checked by `verify` in the emulator. Use emulate-bf16."
)

ONNX_RUNNERS: dict[str, Callable[[Path], Runner]] = {
    "onnxruntime": partial(OrtRunner, spin=False),
    "onnxruntime-plain": partial(OrtRunner, spin=False, optimise=False),
    "emulate-fp16": EmulatedRunner,
    "emulate-bf16": EmulatedRunner,
}
"""What can run an ONNX file without a GPU, by the word that `verify --runner` takes; "plain" is without fusions."""


def checked_by(precision: str) -> tuple[str, ...]:
    """The runners whose agreement with PyTorch says most of a file of this precision, without a GPU.

    ONNX Runtime's CPU provider computes FP16 in FP32, which proves the graph; the emulator rounds, which proves the
    precision. It has no BF16 convolution at all.
    """
    return {"fp16": ("onnxruntime", "emulate-fp16"), "bf16": ("emulate-bf16",)}.get(precision, ("onnxruntime",))


def misfit(name: str, path: Path, precision: str) -> str | None:
    """Why a runner of `ONNX_RUNNERS` cannot run a file of this precision; None where it can."""
    emulates = name.removeprefix("emulate-") if name.startswith("emulate-") else None
    if emulates is not None and emulates != precision:
        return f"{path.name} is {precision.upper()}: --runner {name} has no {emulates.upper()} to emulate."
    if emulates is None and precision == "bf16":
        return NO_BF16.format(name=path.name)
    return None


def open_onnx(name: str, path: Path, precision: str) -> Runner:
    """The runner of `ONNX_RUNNERS` for a file whose hash or graph has been checked.

    Raises InputError for an emulation of another precision than the file's, and for BF16 on ONNX Runtime's CPU.
    """
    reason = misfit(name, path, precision)
    if reason is not None:
        raise InputError(reason)
    return ONNX_RUNNERS[name](path)


def open_runner(
    artifact: Artifact,
    *,
    device: str = "cpu",
    threads: int | None = None,
    spin: bool = False,
    thread_per_image: bool = False,
    cuda_graph: bool = False,
    in_child_first: bool = False,
) -> Runner:
    """A runner for an ONNX artifact or an engine.

    `OrtRunner` explains `device` to `thread_per_image`, `TensorRTRunner` the last two. The defaults are for checks,
    which are not timed and may share the machine. Raises CorruptArtifactError where a hash does not hold,
    MissingRequirementError where this machine cannot run the artifact.
    """
    artifact = open_artifact(artifact.path)
    if not is_onnx(artifact):
        assert is_engine(artifact)
        return TensorRTRunner(artifact, cuda_graph=cuda_graph, in_child_first=in_child_first)
    check_recorded(artifact)
    if device == "cpu" and artifact.manifest.precision.name == "bf16":
        raise MissingRequirementError(NO_BF16.format(name=artifact.path.name))
    return OrtRunner(artifact.path, device=device, threads=threads, spin=spin, thread_per_image=thread_per_image)
