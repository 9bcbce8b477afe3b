"""The machine that a benchmark ran on, the state of its GPUs, and reasons to doubt what was measured.

A latency without its machine, versions and threads means nothing. A GPU's state is what the driver's own tool says, and
absent without it; that part was not run on a GPU by the machines this project was written on.
"""

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path

from cnx_deploy.bench.record import Conditions, GpuState
from cnx_deploy.core.system import cpu_count, cpu_name, package_version, tool_versions

__all__ = ["conditions_now", "doubts", "gpu_states", "isa_flags", "states_from_csv", "throttling"]

ISA_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve",
)  # fmt: skip
"""Instruction sets that decide how fast matrix products are, as /proc/cpuinfo names them."""

PEER_TOOLS = ("openvino", "timm")
"""What is timed and shapes no artifact."""

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
"""What nvidia-smi is asked, in the order of `GpuState`."""


def conditions_now(*, threads: int | None = None, duration_seconds: float, seed: int = 0) -> Conditions:
    """Look at this machine; call it before anything is loaded, so that the load is the others'."""
    return Conditions(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=_commit(Path(__file__).parents[2]),
        tools=tool_versions() | {name: version for name in PEER_TOOLS if (version := package_version(name))},
        system=platform.platform(),
        cpu=cpu_name(),
        isa=isa_flags(),
        processors=cpu_count(),
        threads=threads or cpu_count(),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        gpus=gpu_states(),
        gpu_processes=len(_nvidia_smi("--query-compute-apps=pid").splitlines()),
        duration_seconds=duration_seconds,
        seed=seed,
    )


def doubts(conditions: Conditions, omp_threads: str | None = None) -> tuple[str, ...]:
    """Reasons to doubt what is measured under these conditions, a clause each; empty when there are none.

    `omp_threads` is the value of OMP_NUM_THREADS, which the caller reads.
    """
    threads, processors, load = conditions.threads, conditions.processors, conditions.load_average
    reasons = list(throttling(conditions.gpus))
    if threads > processors:
        reasons.append(f"{threads} threads on {processors} processors wait for each other: use --threads {processors}")
    if omp_threads not in (None, str(threads)):
        reasons.append(
            f"OMP_NUM_THREADS is {omp_threads}, and {threads} threads are measured: unset it or set --threads"
        )
    if load is not None and load > processors:
        reasons.append(f"the load average was {load:.1f} on {processors} processors before the start: others work")
    if conditions.gpu_processes:
        reasons.append(f"{conditions.gpu_processes} other processes were on the GPU before the start")
    return tuple(reasons)


def throttling(gpus: tuple[GpuState, ...]) -> tuple[str, ...]:
    """Name each GPU whose clock is lowered, with the reasons."""
    return tuple(f"{gpu.name} is throttled by {', '.join(gpu.throttled_by)}" for gpu in gpus if gpu.throttled_by)


def gpu_states() -> tuple[GpuState, ...]:
    """The state of every NVIDIA GPU now; empty where the driver's tool is missing or does not answer."""
    return states_from_csv(_nvidia_smi(f"--query-gpu={','.join(STATE_FIELDS)}"))


def states_from_csv(text: str) -> tuple[GpuState, ...]:
    """Read the tool's CSV, one line a GPU in the order of `STATE_FIELDS`; other lines are left out."""
    states = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(STATE_FIELDS):
            name, driver, sm, max_sm, draw, limit, ecc, mig, mask = cells
            bits = int(mask, 16) if mask.startswith("0x") else 0
            reasons = tuple(reason for bit, reason in THROTTLE_BITS.items() if bits & bit)
            states.append(GpuState(name, driver, sm, max_sm, draw, limit, ecc, mig, reasons))
    return tuple(states)


def isa_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those of `ISA_FLAGS` that the processor has; empty where the system does not say."""
    if not cpuinfo.is_file():
        return ()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    present = set(flags.partition(":")[2].split())
    return tuple(flag for flag in ISA_FLAGS if flag in present)


def _nvidia_smi(query: str) -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, query, "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _commit(checkout: Path) -> str | None:
    git = shutil.which("git")
    if git is None or not (checkout / ".git").exists():
        return None
    describe = [git, "-C", str(checkout), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() or None
