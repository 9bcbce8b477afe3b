"""What can this machine do, what can it not, and what would change that? One finding a topic, nothing raised.

Each finder looks at one thing and takes what it looked at as an argument, so that every verdict can be tested.
"""

import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cnx_deploy.core.errors import MissingRequirementError
from cnx_deploy.core.system import Gpu, find_gpus, package_version
from cnx_deploy.report.needs import NEEDS, fitting
from cnx_deploy.report.requirements import Shortfall, shortfalls

__all__ = ["TESTED_VERSIONS", "Finding", "examine"]

Status = Literal["ok", "missing", "problem"]

TESTED_VERSIONS: dict[str, str] = {
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "onnx": "1.23.2",
    "onnx-ir": "1.1.0",
    "onnxscript": "0.7.2",
    "onnxruntime-gpu": "1.31.1",
    "tensorrt-rtx": "1.7.1.116",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "safetensors": "0.8.0",
    "lightning": "2.6.6",
    "torchmetrics": "1.9.0",
}
"""The versions in the repository's constraints.txt that shape a result; a test compares."""

OLDEST_PYTHON = (3, 11)
TRAIN_PACKAGES = ("lightning", "torchmetrics")

INSTALL_TORCH = "pip install torch; see pytorch.org for the build that fits the driver"
BUILD_AHEAD = "Build ahead of time with TensorRT-RTX and run engines on a machine with an NVIDIA GPU and its driver."


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. `remedy` says what would change it; empty when nothing has to."""

    topic: str
    status: Status
    what: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain types."""
        return asdict(self)


def examine(folder: Path) -> tuple[Finding, ...]:
    """Look at everything; `folder` is where artifacts would be written. Takes some seconds: it loads torch."""
    gpus = find_gpus()
    return (
        python_finding(),
        requirements_finding(shortfalls()),
        *gpu_findings(gpus),
        torch_finding(gpus),
        *onnxruntime_findings(gpus),
        *(tensorrt_finding(name, gpus) for name in ("tensorrt-rtx", "tensorrt")),
        train_finding({name: package_version(name) for name in TRAIN_PACKAGES}),
        memory_finding(_memory_gb()),
        disk_finding(folder, _disk_free_gb(folder)),
        versions_finding({name: package_version(name) for name in TESTED_VERSIONS}),
    )


def python_finding(version: Sequence[int] | None = None) -> Finding:
    """Whether Python is new enough."""
    found = tuple(version or map(int, platform.python_version_tuple()[:2]))
    shown = ".".join(map(str, found))
    if found < OLDEST_PYTHON:
        return Finding("python", "problem", f"Python {shown}; 3.11 or newer is needed", "Install Python 3.11.")
    return Finding("python", "ok", f"Python {platform.python_version() if version is None else shown}")


def requirements_finding(short: Sequence[Shortfall] | None) -> Finding:
    """The base packages that are absent or outside their range; None where no metadata says what is needed."""
    if short is None:
        what = "not checked: cnx-deploy runs from a source tree, and which packages it needs is in installed metadata"
        return Finding("requirements", "ok", what)
    if not short:
        return Finding("requirements", "ok", "every package that cnx-deploy needs is installed and in its range")
    status: Status = "problem" if any(entry.version for entry in short) else "missing"
    command = " ".join(["pip install", *(f'"{entry.name}{entry.needed}"' for entry in short)])
    return Finding("requirements", status, "; ".join(map(str, short)), command)


def gpu_findings(gpus: Sequence[Gpu]) -> tuple[Finding, ...]:
    """Each GPU with its driver, compute capability and memory."""
    if not gpus:
        return (Finding("gpu", "missing", "no NVIDIA GPU answers: engines can be built, not run", BUILD_AHEAD),)
    return tuple(
        Finding("gpu", "ok", f"{gpu.name}, {gpu.target}, driver {gpu.driver}, {gpu.memory_mib} MiB") for gpu in gpus
    )


def torch_finding(gpus: Sequence[Gpu]) -> Finding:
    """PyTorch, and whether it can use the GPU that is listed."""
    try:
        import torch
    except ImportError as error:
        return Finding("torch", "missing", f"torch cannot be imported ({error})", INSTALL_TORCH)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if not gpus:
        return Finding("torch", "ok", f"torch {torch.__version__} (built with {build}), on the CPU: there is no GPU")
    if torch.cuda.is_available():
        return Finding("torch", "ok", f"torch {torch.__version__}, {build} usable on {torch.cuda.get_device_name()}")
    return Finding(
        "torch",
        "problem",
        f"torch {torch.__version__} (built with {build}) cannot use the GPU with driver {gpus[0].driver}",
        f"Update the driver, or {INSTALL_TORCH}.",
    )


def onnxruntime_findings(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """The wheels installed, and the providers that a session really gets."""
    wheels = {name: package_version(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    yield wheel_finding(wheels)
    if not any(wheels.values()):
        return
    yield provider_finding("CPUExecutionProvider")
    if gpus:
        yield provider_finding("CUDAExecutionProvider")


def wheel_finding(wheels: Mapping[str, str | None]) -> Finding:
    """Both wheels install into one folder, so only one may be there (microsoft/onnxruntime issue 26996)."""
    present = [f"{name} {version}" for name, version in wheels.items() if version]
    if len(present) > 1:
        return Finding(
            "onnxruntime",
            "problem",
            f"{' and '.join(present)} are both installed, into the same folder: which one loads is chance",
            f"pip uninstall -y {' '.join(wheels)} && pip install onnxruntime-gpu",
        )
    if not present:
        return Finding("onnxruntime", "missing", "no ONNX Runtime is installed", "pip install onnxruntime-gpu")
    return Finding("onnxruntime", "ok", present[0])


def provider_finding(provider: str) -> Finding:
    """Whether a session of one node, asked for `provider`, runs on it; being compiled in is not enough."""
    name = provider.removesuffix("ExecutionProvider")
    try:
        found = _session_providers(provider)
    except ImportError as error:
        return Finding(f"onnxruntime {name}", "problem", f"cannot be imported ({error})", "pip install onnx")
    if found[:1] == [provider]:
        return Finding(f"onnxruntime {name}", "ok", f"a session runs on {provider}")
    return Finding(
        f"onnxruntime {name}",
        "problem",
        f"a session asked for {provider} got {', '.join(found) or 'none'}",
        "Install onnxruntime-gpu alone, with its CUDA and cuDNN: pip install onnxruntime-gpu[cuda,cudnn]",
    )


def tensorrt_finding(name: str, gpus: Sequence[Gpu]) -> Finding:
    """One TensorRT: whether it can be imported, what it can build for here, and whether engines run here."""
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


def train_finding(installed: Mapping[str, str | None]) -> Finding:
    """What `cnx-deploy train` needs beyond the base."""
    absent = [name for name, version in installed.items() if not version]
    if absent:
        return Finding(
            "training", "missing", f"{' and '.join(absent)} not installed", 'pip install "cnx-deploy[train]"'
        )
    return Finding("training", "ok", ", ".join(f"{name} {version}" for name, version in installed.items()))


def memory_finding(memory_gb: float | None) -> Finding:
    """Main memory against what exporting and building each variant took."""
    if memory_gb is None:
        return Finding("memory", "ok", "unknown on this system", f"Exporting huge takes {NEEDS[-1].memory_gb:.1f} GB.")
    remedy = "Free some memory, or export them on a larger machine."
    return _room_finding("memory", f"{memory_gb:.1f} GB available", memory_gb, remedy)


def disk_finding(folder: Path, free_gb: float) -> Finding:
    """Free disk against the files of each variant in both precisions and one engine."""
    remedy = "Free some, or use --output-dir on another disk."
    return _room_finding("disk", f"{free_gb:.1f} GB free in {folder}", free_gb, remedy)


def _room_finding(topic: str, found: str, gigabytes: float, remedy: str) -> Finding:
    fits, lacks = fitting(gigabytes, topic)
    needs = {need.variant: getattr(need, f"{topic}_gb") for need in NEEDS}
    if not lacks:
        return Finding(topic, "ok", f"{found}: every variant fits; huge takes {needs['huge']:.1f} GB")
    enough = f"enough for {fits[0]}{f' to {fits[-1]}' if len(fits) > 1 else ''}" if fits else "enough for no variant"
    short = ", ".join(f"{name} takes {needs[name]:.2g} GB" for name in lacks)
    return Finding(topic, "problem", f"{found}: {enough}; {short}", remedy)


def versions_finding(installed: Mapping[str, str | None]) -> Finding:
    """Installed releases (major.minor) against those tested together; absent packages are not its topic."""
    differing = [
        f"{name} {version} (tested: {TESTED_VERSIONS[name]})"
        for name, version in installed.items()
        if version and _release(version) != _release(TESTED_VERSIONS[name])
    ]
    if differing:
        names = " ".join(f"{entry.split()[0]}=={TESTED_VERSIONS[entry.split()[0]]}" for entry in differing)
        return Finding("versions", "problem", f"not tested together: {', '.join(differing)}", f"pip install {names}")
    return Finding("versions", "ok", f"the {sum(map(bool, installed.values()))} that matter are the tested releases")


def _release(version: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", version)[:2])


def _session_providers(provider: str) -> list[str]:
    """The providers of a session that runs one Identity node, first the one that runs it; empty where it is refused."""
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


def _memory_gb() -> float | None:
    """Memory available now, in GB (1e9 bytes); None where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / 1e9
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return None


def _disk_free_gb(folder: Path) -> float:
    existing = next(place for place in (folder, *folder.resolve().parents) if place.is_dir())
    return shutil.disk_usage(existing).free / 1e9
