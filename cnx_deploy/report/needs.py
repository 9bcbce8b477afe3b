"""What each variant needs of a machine: memory and disk, measured where the records of the project were made.

Recorded in docs/data/cost.json (scripts/measure_cost.py): 224 px, both precisions exported and compared, engines for
five targets, two processors, no GPU; a test compares the two. A V1 variant needs about what the V2 of its size does.
"""

from dataclasses import dataclass

from cnx_deploy.core.variants import VARIANTS

__all__ = ["NEEDS", "Need", "fitting"]

BYTES_OF_BOTH_FILES = 6
"""A parameter in an FP32 and an FP16 file."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Need:
    """Peak resident memory of `export` and of `build-trt`, and the bytes of two ONNX files and one engine."""

    variant: str
    export_mib: int
    build_mib: int
    engine_megabytes: float

    @property
    def memory_gb(self) -> float:
        """The larger of the two, in GB (1e9 bytes)."""
        return max(self.export_mib, self.build_mib) * MIB / 1e9

    @property
    def disk_gb(self) -> float:
        """Files of both precisions and one engine, in GB."""
        return VARIANTS[self.variant].parameter_count * BYTES_OF_BOTH_FILES / 1e9 + self.engine_megabytes / 1e3


NEEDS = (
    Need("atto", 1048, 923, 11.6),
    Need("femto", 1084, 934, 14.6),
    Need("pico", 1117, 968, 22.2),
    Need("nano", 1300, 1074, 35.3),
    Need("tiny", 1687, 1265, 61.7),
    Need("base", 3187, 2155, 182.1),
    Need("large", 6100, 3494, 400.8),
    Need("huge", 12949, 7880, 1325.3),
)


def fitting(available_gb: float, what: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Variants whose need of `what` ("memory" or "disk") is available, and the others, smallest first."""
    fits = [need for need in NEEDS if getattr(need, f"{what}_gb") <= available_gb]
    return tuple(need.variant for need in fits), tuple(need.variant for need in NEEDS if need not in fits)
