"""What a GPU adds to a benchmark: times by CUDA events, what limits them, and the state the GPU was in.

Not run on a GPU by the machines this project was written on. The rules are trtexec's; the states are what the driver's
own tool says, and absent without it.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cnx_deploy.bench.statistics import Latency, latency_of
from cnx_deploy.runners.base import Split

__all__ = ["GpuState", "GpuTimes", "gpu_states", "gpu_times", "limits_of", "processes_on_gpus", "states_from_csv"]

ENQUEUE_SHARE = 0.8
"""trtexec warns where enqueueing takes more than this share of the compute time."""

THROTTLE_BITS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
}
"""NVML's clock event reasons that mean a slower clock than asked for (nvml.h, nvmlClocksEventReason…)."""

STATE_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "ecc.mode.current",
    "mig.mode.current", "clocks_throttle_reasons.active",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GpuTimes:
    """What CUDA events say of calls that take the images from host memory: medians in ms, and compute in full."""

    compute: Latency
    h2d_ms: float
    d2h_ms: float
    enqueue_ms: float


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU while nothing is timed, in the words of the driver's tool ("[N/A]" where it has none).

    `throttled_by` names the reasons for which its clock is lowered; clocks float unless an administrator locks them.
    """

    name: str
    driver: str
    sm_clock: str
    max_sm_clock: str
    power_draw: str
    power_limit: str
    ecc: str
    mig: str
    throttled_by: tuple[str, ...]


def gpu_times(splits: Sequence[Split], seed: int = 0) -> GpuTimes:
    """Summarise the split calls of a sample, at least one."""
    h2d, d2h, enqueue = (
        float(np.median([getattr(split, name) for split in splits])) for name in ("h2d_ms", "d2h_ms", "enqueue_ms")
    )
    return GpuTimes(latency_of([split.compute_ms for split in splits], seed), h2d, d2h, enqueue)


def limits_of(gpu: GpuTimes) -> tuple[str, ...]:
    """What else than the network limits the speed, by trtexec's rules, in words."""
    compute_ms, found = gpu.compute.median_ms, []
    if gpu.enqueue_ms > ENQUEUE_SHARE * compute_ms:
        found.append(f"enqueue-bound ({gpu.enqueue_ms:.3g} of {compute_ms:.3g} ms): try --cuda-graph")
    if max(gpu.h2d_ms, gpu.d2h_ms) >= compute_ms:
        found.append(f"transfer-bound from host memory ({gpu.h2d_ms:.3g} ms in, {gpu.d2h_ms:.3g} ms out)")
    return tuple(found)


def gpu_states() -> tuple[GpuState, ...]:
    """The state of every NVIDIA GPU now; empty where the driver's tool is missing or does not answer."""
    return states_from_csv(_ask(f"--query-gpu={','.join(STATE_FIELDS)}"))


def processes_on_gpus() -> int:
    """Other processes that compute on this machine's GPUs now, as far as the driver's tool shows them."""
    return len(_ask("--query-compute-apps=pid").splitlines())


def states_from_csv(text: str) -> tuple[GpuState, ...]:
    """Read the tool's CSV, one line a GPU in the order of `STATE_FIELDS`; other lines are left out."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return tuple(_state(*row) for row in rows if len(row) == len(STATE_FIELDS))


def _state(
    name: str, driver: str, sm: str, max_sm: str, draw: str, limit: str, ecc: str, mig: str, reasons: str
) -> GpuState:
    return GpuState(name, driver, sm, max_sm, draw, limit, ecc, mig, _reasons(reasons))


def _reasons(mask: str) -> tuple[str, ...]:
    bits = int(mask, 16) if mask.startswith("0x") else 0
    return tuple(name for bit, name in THROTTLE_BITS.items() if bits & bit)


def _ask(query: str) -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, query, "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
