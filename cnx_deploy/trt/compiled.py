"""What a compiled engine does: the kernels one inference launches and the bytes they move.

From the compiler's own list of layers, which it logs when profiling verbosity is DETAILED. The batch is fixed for this
build, so every size is concrete; with a dynamic batch the list shows -1 for products of batch and positions. Bytes
count each kernel's inputs, constants and outputs once: an upper bound on traffic where tensors stay in the L2 cache,
and the figure to compare two graphs of one network by. It is no latency.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy.errors import BuildError
from cnx_deploy.trt.backend import Backend
from cnx_deploy.trt.network import NetworkBuild, Progress

__all__ = ["CompiledEngine", "CompiledKernel", "kernels_in_log", "measure_compiled"]

ELEMENT_BYTES = {
    "Half": 2, "BFloat16": 2, "BF16": 2, "Float": 4, "Int8": 1, "FP8": 1, "Int32": 4, "Int64": 8, "Bool": 1, "UInt8": 1,
}  # fmt: skip
LINE = re.compile(
    r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
    r"Outputs: (?P<outputs>.*?), TacticName: .*?Metadata: ?(?P<metadata>.*)$"
)
TENSOR = re.compile(r"Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
SOURCE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
PROFILE = re.compile(r"_myl(\d+)_\d+$")
PARTS = re.compile(r"^(stages\.\d+|downsample_layers\.\d+|head|norm)")


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One kernel launch; bytes for the whole batch, None where the log shows a dynamic size.

    `sources` are the ONNX nodes it computes, named after their torch modules.
    """

    name: str
    kind: str
    input_bytes: int | None
    constant_bytes: int | None
    output_bytes: int | None
    sources: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """All it reads and writes."""
        parts = (self.input_bytes, self.constant_bytes, self.output_bytes)
        return sum(part for part in parts if part is not None)

    @property
    def profile(self) -> int:
        """Index of the optimisation profile it was compiled for, which is the last number but one in its name."""
        match = PROFILE.search(self.name)
        return int(match[1]) if match else 0

    @property
    def part(self) -> str:
        """The part of the network most of its sources belong to: "stages.2", "downsample_layers.1", "head"."""
        found = [match[1] for source in self.sources if (match := PARTS.match(source))]
        return max(found, key=found.count) if found else "input and output"


@dataclass(frozen=True, slots=True)
class CompiledEngine:
    """The kernels of one build with a fixed batch."""

    kernels: tuple[CompiledKernel, ...]
    batch: int
    target: str
    plan_bytes: int

    @property
    def megabytes_per_image(self) -> float:
        """Megabytes (1e6) that one image moves."""
        return sum(kernel.total_bytes for kernel in self.kernels) / self.batch / 1e6

    def megabytes_by(self, attribute: str) -> dict[str, float]:
        """MB an image by a kernel's "kind" or "part"."""
        totals: defaultdict[str, int] = defaultdict(int)
        for kernel in self.kernels:
            totals[getattr(kernel, attribute)] += kernel.total_bytes
        return {key: round(value / self.batch / 1e6, 3) for key, value in sorted(totals.items())}

    def to_dict(self) -> dict[str, Any]:
        """The figures as a manifest keeps them."""
        return {
            "batch": self.batch,
            "kernels": len(self.kernels),
            "megabytes_per_image": round(self.megabytes_per_image, 3),
            "megabytes_by_part": self.megabytes_by("part"),
            "megabytes_by_kind": self.megabytes_by("kind"),
            "how": "the same graph compiled for a fixed batch; each kernel's inputs, constants and outputs once",
        }


def measure_compiled(
    onnx_path: Path, *, batch: int, target: str, backend: Backend, progress: Progress | None = None
) -> CompiledEngine:
    """Compile `onnx_path` for a fixed batch and read the compiler's list of kernels.

    Raises BuildError when it cannot be compiled or when the log is not in the format known here.
    """
    build = NetworkBuild(backend, onnx_path)
    build.fix_batch(batch)
    plan = build.serialise(build.config(target, allow_tf32=False), progress)
    kernels = tuple(kernels_in_log(text for _, text in build.log.messages))
    if not kernels:
        raise BuildError(
            f"{backend.name} {backend.version} logs no layer in the format known here, so kernels cannot be counted. "
            "Use a tested version (constraints.txt)."
        )
    if any(None in (kernel.input_bytes, kernel.constant_bytes, kernel.output_bytes) for kernel in kernels):
        raise BuildError(f"{onnx_path.name}: a size is still dynamic after the batch was fixed; only the batch may be.")
    return CompiledEngine(kernels, batch, target, len(plan))


def kernels_in_log(messages: Iterable[str]) -> Iterator[CompiledKernel]:
    """The kernels that a build's log lists; host-side shape computations are left out."""
    for message in messages:
        for line in message.splitlines():
            match = LINE.match(line.strip())
            if match and match["kind"] != "shape_call":
                yield CompiledKernel(
                    name=match["name"],
                    kind=match["kind"],
                    input_bytes=_tensor_bytes(match["inputs"]),
                    constant_bytes=_tensor_bytes(match["constants"]),
                    output_bytes=_tensor_bytes(match["outputs"]),
                    sources=tuple(dict.fromkeys(SOURCE.findall(match["metadata"]))),
                )


def _tensor_bytes(text: str) -> int | None:
    total = 0
    for dimensions, kind in TENSOR.findall(text):
        sizes = [int(size) for size in dimensions.split(",") if size]
        if any(size < 0 for size in sizes):
            return None
        if kind not in ELEMENT_BYTES:
            raise BuildError(f"The compiler's log names a type {kind!r} whose size is not known here.")
        total += math.prod(sizes) * ELEMENT_BYTES[kind]
    return total
