"""ONNX Runtime runner, with inputs and outputs bound to torch tensors."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from cnx_deploy.core.errors import CnxDeployError, InputError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.system import Machine, cpu_count, cpu_name
from cnx_deploy.data.input_spec import check_input
from cnx_deploy.exporters.untrusted import check_recorded
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.runners.base import RunnerInfo
from cnx_deploy.runners.ort_session import LOAD_ERRORS, OUTPUT_TYPES, ends_of, open_session
from cnx_deploy.runners.registry import RunnerEntry, RunnerOptions, register_runner

__all__ = ["OrtRunner"]

TORCH_TYPES = {np.float32: torch.float32, np.int64: torch.int64}


class OrtRunner:
    """Run an ONNX file; see `runners.base.Runner`.

    Args:
        path: a file whose hash or graph has been checked.
        device: "cpu" or "cuda". Another provider than the one asked for is an error, never a slower number.
        threads: intra-operator threads; None for all processors this process may use.
        spin: whether idle threads wait by spinning, between the operators of one call only: after it they stop, or they
            would take the processors from whoever runs next. On two free processors atto at batch 1 is 1.2 times as
            fast; where others work on the same processors it is half as fast.
        thread_per_image: on a CPU, run each image alone and give each thread images of its own instead of a share of
            each operator: nobody waits at the end of an operator, and what an image needs stays near its processor. On
            two threads a batch of 8 is 1.1 times as fast. It takes a second session, with its own copy of the weights;
            images left over when the batch is no multiple of the threads run one after the other on all threads. So
            outputs do not depend on the batch, to the bit: of atto a batch of 2 differs from single images by up to
            5e-6, and the number of threads changes nothing. Files that do not take one image run as without it.
        optimise: graph optimisations; off tells a fault of the graph from a fault of a fusion.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        spin: bool = True,
        thread_per_image: bool = False,
        optimise: bool = True,
    ) -> None:
        self._threads = threads = threads or cpu_count()
        self._session = open_session(path, device=device, threads=threads, spin=spin, optimise=optimise)
        source, spec, targets = ends_of(self._session, path)
        self._input_name = source.name
        self._output_sizes: dict[str, tuple[int, ...]] = {target.name: tuple(target.shape[1:]) for target in targets}
        self._output_types = {target.name: OUTPUT_TYPES[target.type] for target in targets}
        self._path = path
        described: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.input_spec = spec.limited_to(source.shape[0], described.get("cnx_deploy.batch"), path)
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)  # the provider's default
        self._held = ExitStack()
        self._image_session = self._pool = None
        self._runs_each_alone = thread_per_image and device == "cpu" and self.input_spec.min_batch <= 1
        if self._runs_each_alone and threads > 1:
            self._image_session = open_session(path, device=device, optimise=optimise)
            self._pool = self._held.enter_context(ThreadPoolExecutor(threads))
        precision = described.get("cnx_deploy.precision", "unknown")
        self.info = RunnerInfo(
            backend="onnxruntime",
            version=onnxruntime.__version__,
            device=cpu_name() if device == "cpu" else torch.cuda.get_device_name(self.device),
            precision=precision,
            arithmetic="fp32" if device == "cpu" else precision,
            details=(
                ("provider", self._session.get_providers()[0]),
                ("threads", str(threads)),
                ("spinning", "within a call" if spin else "off"),
                ("a thread has", "images of its own" if self._runs_each_alone else "a share of each operator"),
                ("optimisations", "all" if optimise else "none"),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def run(self, images: Tensor) -> Outputs:
        """Raw images -> the graph's outputs, (N, ...) float32 each, indices int64."""
        check_input(images, self.input_spec, self.device)
        images = images.contiguous()
        outputs = {
            name: torch.empty((len(images), *sizes), dtype=TORCH_TYPES[self._output_types[name]], device=self.device)
            for name, sizes in self._output_sizes.items()
        }
        if self.device.type == "cuda":  # ONNX Runtime's stream does not wait for torch's, which makes the images
            torch.cuda.current_stream(self.device).synchronize()
        alone = len(images) // self._threads * self._threads if self._pool is not None else 0
        if self._pool is not None and alone:
            shares = [range(first, alone, self._threads) for first in range(self._threads)]
            list(self._pool.map(lambda share: self._run_each(share, images, outputs), shares))
        step = 1 if self._runs_each_alone else max(1, len(images))
        for start in range(alone, len(images), step):
            self._bound_run(self._session, images, outputs, slice(start, start + step))
        return outputs

    def _run_each(self, share: Iterable[int], images: Tensor, outputs: Outputs) -> None:
        for index in share:
            self._bound_run(self._image_session, images, outputs, slice(index, index + 1))

    def _bound_run(self, session: Any, images: Tensor, outputs: Outputs, rows: slice) -> None:
        """Run the contiguous images of some rows; the same rows of the outputs are written in place."""
        images = images[rows]
        binding = session.io_binding()
        kind = np.uint8 if images.dtype == torch.uint8 else np.float32
        place = (self.device.type, self.device.index or 0)
        binding.bind_input(self._input_name, *place, kind, tuple(images.shape), images.data_ptr())
        for name, output in outputs.items():
            written = output[rows]
            binding.bind_output(name, *place, self._output_types[name], tuple(written.shape), written.data_ptr())
        try:
            session.run_with_iobinding(binding)
        except (*LOAD_ERRORS, RuntimeError) as error:
            raise CnxDeployError(
                f"ONNX Runtime cannot run {self._path} on a batch of {len(images)} ({str(error).splitlines()[0]}). "
                "A smaller batch may fit into memory."
            ) from error


def _reason(artifact: Artifact, machine: Machine) -> CnxDeployError | None:
    if machine.device == "cpu" and artifact.manifest.precision.dtype == "bfloat16":
        return InputError(
            f"ONNX Runtime has no BF16 convolution on a CPU: {artifact.path.name} is checked by `verify` in the "
            "emulator. Use emulate-bf16."
        )
    return None


def _opened(artifact: Artifact, options: RunnerOptions, *, optimise: bool) -> OrtRunner:
    check_recorded(artifact)
    return OrtRunner(
        artifact.path,
        device=options.device,
        threads=options.threads,
        spin=options.spin,
        thread_per_image=options.thread_per_image,
        optimise=optimise,
    )


# The plain one has no graph optimisations, which tells a fault of the graph from a fault of a fusion.
for _name, _optimise in (("onnxruntime", True), ("onnxruntime-plain", False)):
    register_runner(
        RunnerEntry(
            name=_name,
            kinds=("onnx",),
            can_run=_reason,
            open=partial(_opened, optimise=_optimise),
            is_default=_optimise,
            widens_half=True,
        )
    )
