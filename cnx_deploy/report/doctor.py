"""What this machine can do, what it cannot do, and what would change that: one finding a topic, nothing raised.

Each function looks at one thing and takes what it looked at as an argument, so that every verdict can be tested.
"""

import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from cnx_deploy.core.errors import MissingRequirementError
from cnx_deploy.core.system import Gpu, find_gpus, package_version
from cnx_deploy.core.variants import VARIANTS

__all__ = ["FLOOR_REASONS", "NEEDS", "Finding", "Shortfall", "examine", "shortfalls"]

Status = Literal["ok", "missing", "problem"]

FLOOR_REASONS: dict[str, str] = {
    "torch": "before 2.10 a checkpoint can run code although only weights are loaded, CVE-2026-24747",
    "onnx": "before 1.21 a model's external data can be any file, through a symbolic link, CVE-2026-27489",
    "onnxruntime": "before 1.24 a model's external data can be any file of this machine",
    "onnxruntime-gpu": "before 1.24 a model's external data can be any file of this machine",
    "pillow": "before 12.2 an image of some kB can fill the memory, CVE-2026-40192",
}
"""Why a floor in pyproject.toml is what it is, where an older release lets a file do harm."""

STAND_INS = {"onnxruntime-gpu": "onnxruntime", "onnxruntime": "onnxruntime-gpu"}
"""Another distribution of the same import: the wheel for the CPU does beside a GPU."""

OLDEST_PYTHON = (3, 11)
INSTALL_TORCH = "pip install torch; see pytorch.org for the build that fits the driver"
BUILD_AHEAD = "Build ahead of time with TensorRT-RTX and run engines on a machine with an NVIDIA GPU and its driver."
BYTES_A_PARAMETER = 6
"""A parameter in an FP32 and an FP16 file."""

NEEDS = {
    "atto": (1048, 923, 11.6),
    "femto": (1084, 934, 14.6),
    "pico": (1117, 968, 22.2),
    "nano": (1300, 1074, 35.3),
    "tiny": (1687, 1265, 61.7),
    "base": (3187, 2155, 182.1),
    "large": (6100, 3494, 400.8),
    "huge": (12949, 7880, 1325.3),
}
"""Peak resident memory of `export` and of `build-trt` in MiB, and the size of one engine in MB (1e6 bytes).

From docs/data/cost.json (scripts/measure_cost.py, 224 px, five targets, no GPU); a test compares the two. A V1 variant
needs about what the V2 of its size does.
"""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A requirement that is not met. `version` is the installed one or None, `needed` a range as pip takes it."""

    name: str
    version: str | None
    needed: str

    def __str__(self) -> str:
        if self.version is None:
            return f"{self.name} is not installed, expected {self.needed or 'any release'}"
        reason = f" ({FLOOR_REASONS[self.name]})" if self.name in FLOOR_REASONS else ""
        return f"{self.name} {self.version} is installed, expected {self.needed}{reason}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found. `remedy` says what would change it; it is empty when nothing has to change."""

    topic: str
    status: Status
    what: str
    remedy: str = ""


def examine(folder: Path) -> tuple[Finding, ...]:
    """Look at everything; `folder` is where artifacts would be written. Takes some seconds, since it loads torch."""
    gpus = find_gpus()
    existing = next(place for place in (folder, *folder.resolve().parents) if place.is_dir())
    return (
        python_finding(platform.python_version()),
        requirements_finding(shortfalls()),
        *gpu_findings(gpus),
        torch_finding(gpus),
        *onnxruntime_findings(gpus),
        openvino_finding(),
        *(tensorrt_finding(name, gpus) for name in ("tensorrt-rtx", "tensorrt")),
        packages_finding("training", "train", _versions("lightning", "torchmetrics")),
        packages_finding("batch", "parquet", _versions("pyarrow")),
        packages_finding("serve", "ray", _versions("ray", "starlette", "python-multipart")),
        memory_finding(_memory_gb()),
        disk_finding(folder, shutil.disk_usage(existing).free / 1e9),
    )


def shortfalls() -> tuple[Shortfall, ...] | None:
    """Return the base requirements that this installation does not meet.

    The ranges come from this package's own installed metadata, and nothing is imported. None where there is no
    metadata: a source tree that was never installed.
    """
    try:
        lines = metadata.requires("cnx-deploy") or []
    except metadata.PackageNotFoundError:
        return None
    try:
        from packaging.requirements import Requirement
    except ImportError:  # no range can be compared without it
        return (Shortfall("packaging", None, ""),)
    short = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # of an extra, another system or another Python
        names = filter(None, (requirement.name, STAND_INS.get(requirement.name)))
        installed = {name: version for name in names if (version := package_version(name))}
        for name, version in installed.items() or [(requirement.name, None)]:
            # A pre-release of the floor itself came before it: 2.10.0rc1 is not in >=2.10.
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                short.append(Shortfall(name, version, str(requirement.specifier)))
    return tuple(short)


def python_finding(version: str) -> Finding:
    """Say whether Python is new enough."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST_PYTHON:
        return Finding("python", "problem", f"Python {version}; 3.11 or newer is needed", "Install Python 3.11.")
    return Finding("python", "ok", f"Python {version}")


def requirements_finding(short: Sequence[Shortfall] | None) -> Finding:
    """Name the base packages that are absent or outside their range; None where no metadata says what is needed."""
    if short is None:
        what = "not checked: cnx-deploy runs from a source tree, and which packages it needs is in installed metadata"
        return Finding("requirements", "ok", what)
    if not short:
        return Finding("requirements", "ok", "every package that cnx-deploy needs is installed and in its range")
    status: Status = "problem" if any(entry.version for entry in short) else "missing"
    command = " ".join(["pip install", *(f'"{entry.name}{entry.needed}"' for entry in short)])
    return Finding("requirements", status, "; ".join(map(str, short)), command)


def gpu_findings(gpus: Sequence[Gpu]) -> tuple[Finding, ...]:
    """Name each GPU with its driver, compute capability and memory."""
    if not gpus:
        return (Finding("gpu", "missing", "no NVIDIA GPU answers: engines can be built, not run", BUILD_AHEAD),)
    return tuple(
        Finding("gpu", "ok", f"{gpu.name}, {gpu.target}, driver {gpu.driver}, {gpu.memory_mib} MiB") for gpu in gpus
    )


def torch_finding(gpus: Sequence[Gpu]) -> Finding:
    """Say which PyTorch is here, and whether it can use the GPU that is listed."""
    try:
        import torch
    except ImportError as error:
        return Finding("torch", "missing", f"torch cannot be imported ({error})", INSTALL_TORCH)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if not gpus:
        return Finding("torch", "ok", f"torch {torch.__version__} (built with {build}), on the CPU: there is no GPU")
    if torch.cuda.is_available():
        return Finding("torch", "ok", f"torch {torch.__version__}, {build} usable on {torch.cuda.get_device_name()}")
    what = f"torch {torch.__version__} (built with {build}) cannot use the GPU with driver {gpus[0].driver}"
    return Finding("torch", "problem", what, f"Update the driver, or {INSTALL_TORCH}.")


def onnxruntime_findings(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Name the wheels that are installed, and the providers that a session really gets."""
    wheels = {name: package_version(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    yield wheel_finding(wheels)
    if any(wheels.values()):
        yield provider_finding("CPUExecutionProvider")
        if gpus:
            yield provider_finding("CUDAExecutionProvider")


def openvino_finding() -> Finding:
    """Say whether OpenVINO is installed, and what it computes in on this processor."""
    from cnx_deploy.runners.openvino_library import capabilities

    try:
        types = capabilities()
    except MissingRequirementError as error:
        what, _, remedy = str(error).partition(": ")
        return Finding("openvino", "missing", what, remedy.rstrip("."))
    no_bf16 = "" if "BF16" in types else "; BF16 takes a processor with AMX or AVX512-BF16"
    computed = " and ".join(name for name in ("FP32", "BF16") if name in types)
    return Finding("openvino", "ok", f"openvino {package_version('openvino')} computes {computed} here{no_bf16}")


def wheel_finding(wheels: Mapping[str, str | None]) -> Finding:
    """Both wheels install into one folder, so only one may be there (microsoft/onnxruntime issue 26996)."""
    present = [f"{name} {version}" for name, version in wheels.items() if version]
    if len(present) > 1:
        what = f"{' and '.join(present)} are both installed, into the same folder: which one loads is chance"
        remedy = f"pip uninstall -y {' '.join(wheels)} && pip install onnxruntime-gpu"
        return Finding("onnxruntime", "problem", what, remedy)
    if not present:
        return Finding("onnxruntime", "missing", "no ONNX Runtime is installed", "pip install onnxruntime-gpu")
    return Finding("onnxruntime", "ok", present[0])


def provider_finding(provider: str) -> Finding:
    """Say whether a session of one node, asked for `provider`, runs on it; being compiled in is not enough."""
    topic = f"onnxruntime {provider.removesuffix('ExecutionProvider')}"
    try:
        providers = _session_providers(provider)
    except ImportError as error:
        return Finding(topic, "problem", f"cannot be imported ({error})", "pip install onnx")
    if providers[:1] == [provider]:
        return Finding(topic, "ok", f"a session runs on {provider}")
    what = f"a session asked for {provider} got {', '.join(providers) or 'none'}"
    remedy = "Install onnxruntime-gpu alone, with its CUDA and cuDNN: pip install onnxruntime-gpu[cuda,cudnn]"
    return Finding(topic, "problem", what, remedy)


def tensorrt_finding(name: str, gpus: Sequence[Gpu]) -> Finding:
    """Say of one TensorRT whether it can be imported, what it can build for here, and whether engines run here."""
    from cnx_deploy.exporters.trt.backend import load_backend

    try:
        backend = load_backend(name)
    except MissingRequirementError as error:
        what, _, remedy = str(error).partition(" Install it: ")
        return Finding(name, "missing", what.rstrip("."), remedy.rstrip("."))
    own = [gpu.target for gpu in gpus if not backend.targets or gpu.target in backend.targets]
    targets = [*(f"this machine's {target}" for target in own), *backend.targets]
    builds = f"builds for {', '.join(targets)}" if targets else "builds nothing here, it needs a GPU for that"
    runs = "runs engines here" if own else "runs no engine here"
    if gpus and not own:
        runs += f" ({gpus[0].target} is not among its targets)"
    other = "" if own or not gpus else 'pip install "cnx-deploy[tensorrt]" and use --runtime tensorrt'
    status: Status = "ok" if targets else "missing"
    return Finding(name, status, f"{name} {backend.version}: {builds}; {runs}", other if targets else BUILD_AHEAD)


def packages_finding(topic: str, extra: str, installed: Mapping[str, str | None]) -> Finding:
    """Say whether what a topic needs beyond the base, an extra of the package, is installed."""
    absent = " and ".join(name for name, version in installed.items() if not version)
    if absent:
        place = ", in an environment without tools of development" if extra == "ray" else ""
        return Finding(topic, "missing", f"{absent} not installed", f'pip install "cnx-deploy[{extra}]"{place}')
    return Finding(topic, "ok", ", ".join(f"{name} {version}" for name, version in installed.items()))


def memory_finding(memory_gb: float | None) -> Finding:
    """Hold main memory in GB (1e9 bytes) against what exporting and building each variant took."""
    if memory_gb is None:
        return Finding("memory", "ok", "unknown on this system")
    needs = {variant: max(export_mib, build_mib) * 1.048576e-3 for variant, (export_mib, build_mib, _) in NEEDS.items()}
    remedy = "Free some memory, or export them on a larger machine."
    return _room_finding("memory", f"{memory_gb:.1f} GB available", memory_gb, needs, remedy)


def disk_finding(folder: Path, free_gb: float) -> Finding:
    """Hold free disk space against the files of each variant in both precisions and one engine."""
    needs = {
        variant: VARIANTS[variant].parameter_count * BYTES_A_PARAMETER / 1e9 + engine_megabytes / 1e3
        for variant, (_, _, engine_megabytes) in NEEDS.items()
    }
    remedy = "Free some, or use --output-dir on another disk."
    return _room_finding("disk", f"{free_gb:.1f} GB free in {folder}", free_gb, needs, remedy)


def _room_finding(topic: str, what: str, available_gb: float, needs: Mapping[str, float], remedy: str) -> Finding:
    lacking = [f"{variant} takes {need_gb:.2g} GB" for variant, need_gb in needs.items() if need_gb > available_gb]
    if not lacking:
        return Finding(topic, "ok", f"{what}: every variant fits; huge takes {needs['huge']:.1f} GB")
    return Finding(topic, "problem", f"{what}: not enough for all, {', '.join(lacking)}", remedy)


def _session_providers(provider: str) -> list[str]:
    """Return the providers of a session that runs one Identity node, in use first; empty where it is refused."""
    import onnxruntime
    import onnxruntime.capi.onnxruntime_pybind11_state as raised
    from onnx import TensorProto, helper

    if provider not in onnxruntime.get_available_providers():  # the wheel for the CPU, beside a GPU
        return []
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], "probe", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
        session.run(None, {"input": [1.0]})
    except (ValueError, RuntimeError, raised.Fail, raised.EPFail, raised.RuntimeException):
        return []
    return list(session.get_providers())


def _versions(*names: str) -> dict[str, str | None]:
    return {name: package_version(name) for name in names}


def _memory_gb() -> float | None:
    """Return the memory that is available now in GB (1e9 bytes), None where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / 1e9
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return None
