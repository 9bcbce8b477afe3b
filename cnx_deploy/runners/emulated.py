"""A runner that evaluates an ONNX file operator by operator in the types that its tensors have.

ONNX Runtime's CPU provider computes FP16 files in FP32, so that it cannot show an overflow; this one can.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.errors import CnxDeployError, InputError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.system import Machine, cpu_name
from cnx_deploy.data.input_spec import InputSpec, check_input
from cnx_deploy.exporters.untrusted import check_recorded
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.runners.base import HoldsNothing, RunnerInfo
from cnx_deploy.runners.emulator.graph import Evaluation, Graph
from cnx_deploy.runners.registry import RunnerEntry, RunnerOptions, register_runner

__all__ = ["EmulatedRunner"]

NARROW = {torch.float16: "fp16", torch.bfloat16: "bf16"}


class EmulatedRunner(HoldsNothing):
    """Run an FP16 or BF16 ONNX file by the rules of `emulator.operators`; see `runners.base.Runner`.

    Raises InputError for a file without tensors narrower than FP32, and for one with operators it does not know.
    """

    def __init__(self, path: Path) -> None:
        self.graph = Graph(path)
        arithmetic = {NARROW[tensor.dtype] for tensor in self.graph.constants.values() if tensor.dtype in NARROW}
        if len(arithmetic) != 1:
            raise InputError(
                f"{path} holds no FP16 or BF16 weights, so there is no rounding to emulate. Run it in ONNX Runtime, "
                "or export --precision fp16."
            )
        self.device = torch.device("cpu")
        self.input_spec = _input_spec(self.graph)
        self.info = RunnerInfo(
            backend="emulator",
            version=str(torch.__version__),
            device=cpu_name(),
            precision=self.graph.metadata.get("cnx_deploy.precision", *arithmetic),
            arithmetic=arithmetic.pop(),
            details=(("rounding", "after every operator"),),
        )

    def run(self, images: Tensor) -> Outputs:
        """Raw images -> the graph's outputs in float32, indices as they are."""
        tensors = self.evaluate(images).tensors
        outputs = {name: tensors[name] for name in self.graph.outputs}
        return {name: found.float() if found.is_floating_point() else found for name, found in outputs.items()}

    def evaluate(self, images: Tensor, keep: tuple[str, ...] = ()) -> Evaluation:
        """Raw images -> outputs and the tensors named in `keep`, in the types in which the graph stores them."""
        check_input(images, self.input_spec)
        with torch.inference_mode():
            return self.graph.evaluate(images, keep)


def _input_spec(graph: Graph) -> InputSpec:
    shape: Any = graph.input.shape
    batch = shape[0]
    kind = "uint8" if graph.input.dtype is not None and graph.input.dtype.name == "UINT8" else "float"
    if kind == "float" and graph.metadata.get("cnx_deploy.input") == "normalised":
        kind = "normalised"
    if isinstance(batch, int):
        smallest = largest = batch
    else:
        smallest, _, largest = (int(part) for part in graph.metadata.get("cnx_deploy.batch", "1:1:4096").split(":"))
    sizes = graph.metadata.get("cnx_deploy.image_size")
    return InputSpec.in_graph(kind, list(shape), smallest, largest, sizes) or InputSpec(kind, 0, smallest, largest)


def _reason(emulated: torch.dtype, artifact: Artifact, machine: Machine) -> CnxDeployError | None:
    row = artifact.manifest.precision
    if getattr(torch, row.dtype) is emulated:
        return None
    name = NARROW[emulated]
    return InputError(
        f"{artifact.path.name} is {row.name.upper()}: --backend emulate-{name} has no {name.upper()} to emulate."
    )


def _opened(artifact: Artifact, options: RunnerOptions) -> EmulatedRunner:
    check_recorded(artifact)
    return EmulatedRunner(artifact.path)


for _dtype, _name in NARROW.items():
    register_runner(
        RunnerEntry(
            name=f"emulate-{_name}", kinds=("onnx",), can_run=partial(_reason, _dtype), open=_opened, is_slow=True
        )
    )
