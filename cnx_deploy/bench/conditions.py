"""Under what conditions a benchmark was made, and what about them makes its figures doubtful.

A latency without its machine, versions and threads means nothing; `Conditions` is the head of every report.
"""

import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cnx_deploy.bench.gpu import GpuState, gpu_states, processes_on_gpus
from cnx_deploy.core.system import cpu_count, cpu_name, tool_versions

__all__ = ["Conditions", "conditions_now", "doubts"]

ISA_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve",
)  # fmt: skip
"""Instruction sets that decide how fast matrix products are, in the words of /proc/cpuinfo."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """The machine and the settings of one run. `load_average` is of the last minute, None where the system has none.

    `commit` is that of the checkout this package runs from, with "+" where files were changed; None outside one.
    `gpus` is empty without an NVIDIA driver.
    """

    date: str
    commit: str | None
    tools: Mapping[str, str]
    system: str
    cpu: str
    isa: tuple[str, ...]
    processors: int
    threads: int
    load_average: float | None
    gpus: tuple[GpuState, ...]
    gpu_processes: int
    duration_seconds: float
    seed: int

    @property
    def machine(self) -> dict[str, object]:
        """What has to be equal for absolute speeds to be comparable."""
        names = [gpu.name for gpu in self.gpus]
        return {"cpu": self.cpu, "processors": self.processors, "threads": self.threads, "gpus": names}


def conditions_now(*, threads: int | None, duration_seconds: float, seed: int) -> Conditions:
    """Look at this machine; call it before anything is loaded, so that the load is the others'."""
    return Conditions(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=_commit(Path(__file__).parent.parent),
        tools=tool_versions(),
        system=platform.platform(),
        cpu=cpu_name(),
        isa=isa_flags(),
        processors=cpu_count(),
        threads=threads or cpu_count(),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        gpus=gpu_states(),
        gpu_processes=processes_on_gpus(),
        duration_seconds=duration_seconds,
        seed=seed,
    )


def doubts(conditions: Conditions, omp_threads: str | None = None) -> tuple[str, ...]:
    """Reasons to doubt what is measured under these conditions, in words; empty when there are none.

    `omp_threads` is the value of OMP_NUM_THREADS, which the caller reads.
    """
    threads, processors, found = conditions.threads, conditions.processors, []
    if threads > processors:
        found.append(f"{threads} threads on {processors} processors wait for each other: use --threads {processors}")
    if omp_threads is not None and omp_threads != str(threads):
        found.append(f"OMP_NUM_THREADS is {omp_threads}, and {threads} threads are measured: unset it or set --threads")
    if conditions.load_average is not None and conditions.load_average > processors:
        load = f"{conditions.load_average:.1f}"
        found.append(f"the load average was {load} on {processors} processors before the start: others are working")
    if conditions.gpu_processes:
        found.append(f"{conditions.gpu_processes} other processes were on the GPU before the start")
    return (*found, *throttling(conditions.gpus))


def throttling(gpus: tuple[GpuState, ...]) -> tuple[str, ...]:
    """A sentence for each GPU whose clock is lowered now."""
    return tuple(f"{gpu.name} is throttled by {', '.join(gpu.throttled_by)}" for gpu in gpus if gpu.throttled_by)


def isa_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those of `ISA_FLAGS` that the processor has; empty where the system does not say."""
    if not cpuinfo.is_file():
        return ()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    present = set(flags.partition(":")[2].split())
    return tuple(flag for flag in ISA_FLAGS if flag in present)


def _commit(checkout: Path) -> str | None:
    git = shutil.which("git")
    if git is None or not (checkout / ".git").exists():
        return None
    describe = [git, "-C", str(checkout), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() or None
