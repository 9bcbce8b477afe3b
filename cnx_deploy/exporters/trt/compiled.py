"""What a compiled engine does: the kernels one inference launches and the bytes they move.

From the compiler's own list of kernels (`kernel_log`). The batch is fixed for this build, so every size is concrete;
with a dynamic batch the list shows -1 for products of batch and positions. Bytes count each kernel's inputs, constants
and outputs once: an upper bound on traffic where tensors stay in the L2 cache, and the figure to compare two graphs of
one network by. It is no latency.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cnx_deploy.core.errors import BuildError, InputError
from cnx_deploy.core.manifest_reading import KERNEL_COLUMNS
from cnx_deploy.exporters.trt.backend import Backend
from cnx_deploy.exporters.trt.kernel_log import CompiledKernel, kernels_in_log
from cnx_deploy.exporters.trt.network import NetworkBuild, Progress

__all__ = ["CompiledEngine", "Grouping", "KernelTotal", "measure_compiled"]

Grouping = Literal["stage", "block", "operation", "kind"]


@dataclass(frozen=True, slots=True)
class KernelTotal:
    """The kernels of one group: how many, their megabytes (1e6) an image, and the share of all bytes (0 to 1)."""

    name: str
    kernels: int
    megabytes: float
    share: float


@dataclass(frozen=True, slots=True)
class CompiledEngine:
    """The kernels of one build with a fixed batch, in the order they run in. `plan_bytes`: size of the engine file."""

    kernels: tuple[CompiledKernel, ...]
    batch: int
    target: str
    plan_bytes: int

    @property
    def megabytes_per_image(self) -> float:
        """Megabytes (1e6) that one image moves."""
        return _total_bytes(self.kernels) / self.batch / 1e6

    @property
    def largest_kernels(self) -> tuple[CompiledKernel, ...]:
        """The kernels by the bytes they move, the most first."""
        return tuple(sorted(self.kernels, key=lambda kernel: kernel.total_bytes, reverse=True))

    def totals(self, grouping: Grouping) -> tuple[KernelTotal, ...]:
        """Kernels and bytes of each stage, block, operation or kind; the shares sum to 1.

        Stages and blocks are in the order they run in, operations and kinds by their bytes, the most first.
        """
        groups: dict[str, list[CompiledKernel]] = {}
        for kernel in self.kernels:
            groups.setdefault(getattr(kernel, grouping), []).append(kernel)
        totals = [self._total(name, kernels) for name, kernels in groups.items()]
        if grouping in ("operation", "kind"):
            totals.sort(key=lambda total: total.share, reverse=True)
        return tuple(totals)

    def to_dict(self) -> dict[str, Any]:
        """The figures as a manifest keeps them, rounded; in `kernel_list` bytes and tensors are for the whole batch."""
        return {
            "batch": self.batch,
            "target": self.target,
            "kernels": len(self.kernels),
            "megabytes_per_image": round(self.megabytes_per_image, 3),
            "by_stage": self._rows("stage"),
            "by_operation": self._rows("operation"),
            "by_kind": self._rows("kind"),
            "kernel_list": {"columns": list(KERNEL_COLUMNS), "rows": [_row(kernel) for kernel in self.kernels]},
            "how": "the same graph compiled for a fixed batch; each kernel's inputs, constants and outputs once",
        }

    def _total(self, name: str, kernels: list[CompiledKernel]) -> KernelTotal:
        moved = _total_bytes(kernels)
        return KernelTotal(name, len(kernels), moved / self.batch / 1e6, moved / _total_bytes(self.kernels))

    def _rows(self, grouping: Grouping) -> list[dict[str, Any]]:
        return [
            {
                "name": total.name,
                "kernels": total.kernels,
                "megabytes": round(total.megabytes, 3),
                "share": round(total.share, 4),
            }
            for total in self.totals(grouping)
        ]


def measure_compiled(
    onnx_path: Path, *, batch: int, target: str, backend: Backend, progress: Progress | None = None
) -> CompiledEngine:
    """Compile `onnx_path` for a fixed batch and read the compiler's list of kernels.

    Raises InputError for a graph whose input has another batch or another open size; BuildError when it cannot be
    compiled or when the log is not in the format known here.
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
    if any(None in (kernel.input_bytes, kernel.constant_bytes, kernel.output_bytes) for kernel in kernels):
        raise BuildError(
            f"{onnx_path.name}: a size is still dynamic after the batch was fixed; only the batch may be. Export it "
            "with cnx-deploy export."
        )
    return CompiledEngine(kernels, batch, target, len(plan))


def _check_batch(build: NetworkBuild, batch: int) -> None:
    name = build.onnx_path.name
    for index in range(build.network.num_inputs):
        tensor = build.network.get_input(index)
        first, *others = tuple(tensor.shape)
        if first not in (-1, batch):
            raise InputError(f"{name} takes a batch of {first} only, not {batch}. Use --batch {first}.")
        if -1 in others:
            raise InputError(
                f"{name} leaves more of its input {tensor.name!r} open than the batch, so what it moves is open too. "
                "Export it with a fixed image size."
            )


def _total_bytes(kernels: Iterable[CompiledKernel]) -> int:
    return sum(kernel.total_bytes for kernel in kernels)


def _row(kernel: CompiledKernel) -> list[str | int | None]:
    """A kernel by `KERNEL_COLUMNS`; tensors as in "input 64x40 Half, constant 40 Float, output 64x40 Half"."""
    tensors = ", ".join(f"{tensor.role} {tensor}" for tensor in kernel.tensors)
    sizes = (kernel.input_bytes, kernel.constant_bytes, kernel.output_bytes)
    return [kernel.name, kernel.kind, kernel.block, kernel.operation, *sizes, tensors]
