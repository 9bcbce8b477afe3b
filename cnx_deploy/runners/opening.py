"""A runner for a recorded artifact, whose hashes are checked before a byte of it is parsed."""

from cnx_deploy.artifacts import Artifact, open_artifact
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.ort import OrtRunner
from cnx_deploy.runners.tensorrt_runner import TensorRTRunner

__all__ = ["open_runner"]


def open_runner(
    artifact: Artifact,
    *,
    device: str = "cpu",
    threads: int | None = None,
    spin: bool = False,
    thread_per_image: bool = False,
    cuda_graph: bool = False,
) -> Runner:
    """A runner for an ONNX artifact (`OrtRunner` explains `device` to `thread_per_image`) or an engine (`cuda_graph`).

    The defaults are for checks, which are not timed and may share the machine. Raises CorruptArtifactError where a hash
    does not hold, MissingRequirementError where this machine cannot run the artifact.
    """
    artifact = open_artifact(artifact.path)
    if artifact.manifest.kind == "engine":
        return TensorRTRunner(artifact, cuda_graph=cuda_graph)
    return OrtRunner(artifact.path, device=device, threads=threads, spin=spin, thread_per_image=thread_per_image)
