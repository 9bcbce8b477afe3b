"""What this machine is: versions, processor, GPU, as one record. Nothing here imports torch or TensorRT."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from cnx_deploy import __version__

__all__ = ["Gpu", "Machine", "cpu_count", "cpu_name", "find_gpus", "this_machine", "tool_versions"]

TOOLS = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
    "polygraphy",
    "numpy",
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU as the driver reports it. `target` is its compute capability, for example "sm89"."""

    name: str
    target: str
    driver: str
    memory_mib: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Where artifacts are to run: on which device, "cpu" or "cuda", and which GPUs there are."""

    device: str
    gpus: tuple[Gpu, ...]


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = {name: package_version(name) for name in TOOLS}
    python = platform.python_version()
    return (("cnx-deploy", __version__), ("python", python), *((k, v) for k, v in found.items() if v))


def tool_versions() -> dict[str, str]:
    """Versions of this package, Python and the installed tools that shape an artifact."""
    return dict(_versions())


def package_version(name: str) -> str | None:
    """Version of an installed distribution, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def find_gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs that the driver's own tool lists; empty without a driver. Takes well under a second."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = ["--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([tool, *query], capture_output=True, text=True, timeout=10, check=True)  # fixed command
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return tuple(Gpu(row[0], "sm" + row[1].replace(".", ""), row[2], int(row[3])) for row in rows if len(row) == 4)


def this_machine(device: str = "cpu") -> Machine:
    """This machine, with the device on which files that run on either are to run."""
    return Machine(device, find_gpus())
