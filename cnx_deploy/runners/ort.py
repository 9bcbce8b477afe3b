"""ONNX Runtime runner, with inputs and outputs bound to torch tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from cnx_deploy.environment import cpu_count, cpu_name
from cnx_deploy.errors import CorruptArtifactError, MissingRequirementError
from cnx_deploy.runners.base import HoldsNothing, InputSpec, RunnerInfo, check_input

__all__ = ["OrtRunner"]

PROVIDERS = {
    "cpu": ("CPUExecutionProvider", {}),
    # HEURISTIC: the default search can land in fallback kernels, 48 times slower (PaddlePaddle/PaddleOCR issue 17970).
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}),
}

LOAD_ERRORS = tuple(
    getattr(onnxruntime.capi.onnxruntime_pybind11_state, name)
    for name in (
        "EPFail",
        "Fail",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
)
"""ONNX Runtime's exceptions have no common base of their own."""


class OrtRunner(HoldsNothing):
    """Run an ONNX file; see `runners.base.Runner`.

    Args:
        path: a file whose hash or graph has been checked.
        device: "cpu" or "cuda". Another provider than the one asked for is an error, never a slower number.
        threads: intra-operator threads; None for all processors this process may use.
        spin: whether idle threads wait by spinning, between the operators of one call only: after it they stop, or they
            would take the processors from whoever runs next. On two free processors atto at batch 1 is 1.2 times as
            fast; where others work on the same processors it is half as fast.
        optimise: graph optimisations; off tells a fault of the graph from a fault of a fusion.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        spin: bool = True,
        optimise: bool = True,
    ) -> None:
        threads = threads or cpu_count()
        self._session = _session(path, device, threads, spin, optimise)
        source = self._session.get_inputs()[0]
        self._input_name, self._output_name = source.name, self._session.get_outputs()[0].name
        self._classes = int(self._session.get_outputs()[0].shape[-1])
        described: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.input_spec = _input_spec(source, described.get("cnx_deploy.batch"))
        self.device = torch.device(device)
        precision = described.get("cnx_deploy.precision", "unknown")
        self.info = RunnerInfo(
            backend="onnxruntime",
            version=onnxruntime.__version__,
            device=cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
            precision=precision,
            arithmetic="fp32" if device == "cpu" else precision,
            details=(
                ("provider", self._session.get_providers()[0]),
                ("threads", str(threads)),
                ("spinning", "within a call" if spin else "off"),
                ("optimisations", "all" if optimise else "none"),
            ),
        )

    def run(self, images: Tensor) -> Tensor:
        """Raw images -> (N, num_classes) float32 logits."""
        check_input(images, self.input_spec)
        images = images.contiguous()
        logits = torch.empty((images.shape[0], self._classes), dtype=torch.float32, device=self.device)
        binding = self._session.io_binding()
        kind = np.uint8 if images.dtype == torch.uint8 else np.float32
        place = (self.device.type, self.device.index or 0)
        binding.bind_input(self._input_name, *place, kind, tuple(images.shape), images.data_ptr())
        binding.bind_output(self._output_name, *place, np.float32, tuple(logits.shape), logits.data_ptr())
        self._session.run_with_iobinding(binding)
        return logits


def _session(path: Path, device: str, threads: int, spin: bool, optimise: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    provider, provider_options = PROVIDERS[device]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, provider_options)])
    except (*LOAD_ERRORS, ValueError) as error:
        raise CorruptArtifactError(f"ONNX Runtime cannot read {path} ({error}). Export it again.") from error
    if session.get_providers()[0] != provider:
        raise MissingRequirementError(
            f"ONNX Runtime gave {session.get_providers()[0]} where {provider} was asked for. "
            "Install onnxruntime-gpu alone and a matching CUDA, or use --device cpu; `cnx-deploy doctor` says more."
        )
    return session


def _input_spec(source: Any, batch_range: str | None) -> InputSpec:
    """What the graph takes; a dynamic batch only within the range it was exported for, where the file names one."""
    kind = "uint8" if source.type == "tensor(uint8)" else "float"
    batch = source.shape[0]
    if isinstance(batch, int):
        return InputSpec(kind, int(source.shape[2]), batch, batch)
    if batch_range is None:
        return InputSpec(kind, int(source.shape[2]))
    smallest, _, largest = (int(size) for size in batch_range.split(":"))
    return InputSpec(kind, int(source.shape[2]), smallest, largest)
