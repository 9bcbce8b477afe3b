"""The table of precisions: what each one means to the deploy form, the exporter, the compiler and the checks.

A precision is one row. Whoever needs to know something of a precision asks its row, never its name.
"""

from dataclasses import dataclass

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES, Gate

__all__ = ["PRECISIONS", "Precision", "exportable_precisions", "find_precision", "register_precision"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """One row. `dtype` is torch's name of the type in which tensors are stored ("float16").

    `has_islands`: LayerNorms, pooling and GRN's statistics stay in FP32, and modules can be kept there by name.
    `smallest_capability`: first GPU whose tensor cores compute it, 80 for 8.0; None where every GPU does.
    `proven_by`: names of the runners, in order, whose agreement with PyTorch proves most without a GPU.
    `engine_gate` and `tf32_engine_gate` judge TensorRT engines, with TF32 off and on.
    `opset` None: the precision exists to prove the algebra and is not exported.
    """

    name: str
    dtype: str
    storage_bytes: int
    has_islands: bool
    gate: Gate
    opset: int | None
    proven_by: tuple[str, ...] = ("onnxruntime",)
    engine_gate: Gate | None = None
    tf32_engine_gate: Gate | None = None
    smallest_capability: int | None = None
    placement: str | None = None
    """Which tensors are stored in eight bits (`core.eight_bits.PLACEMENTS`): their scales are measured on images."""
    rounding: float = 5e-7
    """Relative error of one operator in this type: half the distance of neighbouring numbers, with room for sums."""

    def gate_of_engine(self, *, allow_tf32: bool) -> Gate:
        """The gate that a TensorRT engine of this precision is judged by."""
        return (self.tf32_engine_gate if allow_tf32 else self.engine_gate) or self.gate

    def runs_on(self, target: str) -> bool:
        """Whether a GPU computes it, by its compute capability, for example "sm89"."""
        return self.smallest_capability is None or int(target.removeprefix("sm")) >= self.smallest_capability

    def check_runs_on(self, target: str, file: str) -> None:
        """Raise InputError, which names what does, for a GPU that does not compute it. `file` is of this precision."""
        if self.runs_on(target):
            return
        name, others = self.name.upper(), ["fp16"]
        if self.placement is not None:
            others = [row.name for row in PRECISIONS.values() if row.placement and row.runs_on(target)] + others
        raise InputError(
            f"{file} is {name}, and {target} has no {name} arithmetic; sm{self.smallest_capability} is the first that "
            f"has. Build it for such a target, or export with --precision {' or '.join(others)} for this GPU."
        )


# Opset 20 is the lowest with one Gelu operator, which ONNX Runtime and TensorRT fuse; 22 the lowest whose Conv takes
# BF16. ONNX Runtime's CPU provider computes FP16 in FP32, which proves the graph; the emulator rounds after every
# operator, which proves the precision. ONNX Runtime has no BF16 convolution on a CPU.
# BF16 is in the tensor cores since compute capability 8.0 (NVIDIA, CUDA programming guide).
PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision(
            name="fp32",
            dtype="float32",
            storage_bytes=4,
            has_islands=False,
            gate=GATES["fp32"],
            opset=20,
            engine_gate=GATES["fp32-engine"],
            tf32_engine_gate=GATES["tf32-engine"],
        ),
        Precision(
            name="fp16",
            dtype="float16",
            storage_bytes=2,
            has_islands=True,
            gate=GATES["fp16"],
            opset=20,
            proven_by=("onnxruntime", "emulate-fp16"),
            rounding=5e-4,
        ),
        Precision(
            name="bf16",
            dtype="bfloat16",
            storage_bytes=2,
            has_islands=True,
            gate=GATES["bf16"],
            opset=22,
            proven_by=("emulate-bf16",),
            smallest_capability=80,
            rounding=4e-3,
        ),
        Precision(
            name="fp8",
            dtype="float16",
            storage_bytes=1,
            has_islands=True,
            gate=GATES["fp8"],
            opset=21,
            proven_by=("onnxruntime", "emulate-fp16"),
            smallest_capability=89,
            rounding=3e-2,
            placement="fp8",
        ),
        Precision(
            name="int8",
            dtype="float16",
            storage_bytes=1,
            has_islands=True,
            gate=GATES["int8"],
            opset=21,
            proven_by=("onnxruntime", "emulate-fp16"),
            smallest_capability=75,
            rounding=4e-3,
            placement="int8",
        ),
        Precision(name="fp64", dtype="float64", storage_bytes=8, has_islands=False, gate=GATES["fp32"], opset=None),
    )
}


def find_precision(name: str) -> Precision:
    """Return the row called `name`; InputError lists the names otherwise."""
    row = PRECISIONS.get(name)
    if row is None:
        raise InputError(f"No precision is called {name!r}. Choose one of: {', '.join(PRECISIONS)}.")
    return row


def exportable_precisions() -> tuple[str, ...]:
    """Names of the precisions that `export` writes."""
    return tuple(name for name, row in PRECISIONS.items() if row.opset is not None)


def register_precision(row: Precision) -> None:
    """Add a row, or replace the one of its name: from then on every stage takes it."""
    PRECISIONS[row.name] = row
