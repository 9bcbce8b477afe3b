"""What a compiled engine does: the kernels one inference launches and the bytes they move.

From the compiler's own list of kernels (`kernel_log`). The batch is fixed for this build, so every size is concrete;
with a dynamic batch the list shows -1 for products of batch and positions. Bytes count each kernel's inputs, constants
and outputs once: an upper bound on traffic where tensors stay in the L2 cache, and the figure to compare two graphs of
one network by. It is no latency.
"""

from pathlib import Path

from cnx_deploy.core.errors import BuildError, InputError
from cnx_deploy.core.manifest import Compiled, Kernel
from cnx_deploy.exporters.trt.backend import Backend
from cnx_deploy.exporters.trt.kernel_log import CompiledKernel, kernels_in_log
from cnx_deploy.exporters.trt.network import NetworkBuild, Progress

__all__ = ["measure_compiled"]


def measure_compiled(
    onnx_path: Path, *, batch: int, target: str, backend: Backend, progress: Progress | None = None
) -> Compiled:
    """Compile `onnx_path` for a fixed batch and read the compiler's list of kernels.

    Open sides of images get their typical size. Raises InputError for a graph whose input has another batch or
    leaves sizes open without a range; BuildError when it cannot be compiled or when the log is not in the format known
    here.
    """
    build = NetworkBuild(backend, onnx_path)
    _check_batch(build, batch)
    build.fix_batch(batch)
    plan = build.serialise(build.config(target, allow_tf32=False), progress)
    kernels = kernels_in_log(text for _, text in build.log.messages)
    if not kernels:
        raise BuildError(
            f"{backend.name} {backend.version} logs no layer in the format known here, so kernels cannot be counted. "
            "Use a tested version (constraints.txt)."
        )
    rows = tuple(_row(kernel, onnx_path.name) for kernel in kernels)
    return Compiled.of(rows, batch=batch, target=target, plan_bytes=len(plan))


def _check_batch(build: NetworkBuild, batch: int) -> None:
    name = build.onnx_path.name
    for index in range(build.network.num_inputs):
        tensor = build.network.get_input(index)
        first, *_ = tuple(tensor.shape)
        if first not in (-1, batch):
            raise InputError(f"{name} takes a batch of {first} only, not {batch}. Use --batch {first}.")


def _row(kernel: CompiledKernel, file_name: str) -> Kernel:
    """A kernel as a manifest keeps it; BuildError where one of its sizes is open."""
    read, held, written = kernel.input_bytes, kernel.constant_bytes, kernel.output_bytes
    if read is None or held is None or written is None:
        raise BuildError(
            f"{file_name}: a size is still dynamic after the batch was fixed; only the batch may be. Export it with "
            "cnx-deploy export."
        )
    tensors = ", ".join(f"{tensor.role} {tensor}" for tensor in kernel.tensors)
    return Kernel(kernel.name, kernel.kind, kernel.block, kernel.operation, read, held, written, tensors)
