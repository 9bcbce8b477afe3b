"""Which TensorRT: the only module that imports `tensorrt` or `tensorrt_rtx`, and where their differences are.

Both have nearly the same Python API. Differences are probed by feature, never by version, except that an engine only
runs on the exact release that built it.
"""

import ctypes.util
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.system import Gpu, find_gpus

__all__ = ["DEFAULT_TARGETS", "Backend", "RuntimeName", "default_targets", "load_backend", "require_gpu"]

RuntimeName = Literal["tensorrt", "tensorrt-rtx"]

DEFAULT_TARGETS = ("sm86", "sm89", "sm120")
"""Built ahead of time where no target is named: GeForce RTX 30, 40 and 50 and their professional siblings."""

PACKAGES: dict[RuntimeName, tuple[str, str]] = {
    "tensorrt": ("tensorrt", 'pip install "cnx-deploy[tensorrt]"'),
    "tensorrt-rtx": ("tensorrt_rtx", "pip install tensorrt-rtx"),
}


@dataclass(frozen=True, slots=True)
class Backend:
    """One of the two TensorRTs and what it can do. `short_name` is the part it has in file names."""

    name: RuntimeName
    trt: ModuleType = field(repr=False)

    @property
    def version(self) -> str:
        """Release of the library; engines run on exactly this one."""
        return str(self.trt.__version__)

    @property
    def short_name(self) -> str:
        """Part of an engine's file name."""
        return "rtx" if self.name == "tensorrt-rtx" else "trt"

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities it builds for without such a GPU at hand; empty when it needs the GPU itself."""
        capabilities = getattr(self.trt, "ComputeCapability", None)
        if capabilities is None or not hasattr(self.trt.IBuilderConfig, "set_compute_capability"):
            return ()
        names = (name for name in capabilities.__members__ if name.startswith("SM"))
        return tuple(sorted((name.lower() for name in names), key=lambda name: int(name[2:])))

    @property
    def network_flags(self) -> int:
        """Creation flags: strongly typed wherever the flag exists (needed before TensorRT 11, accepted after)."""
        flags = getattr(self.trt, "NetworkDefinitionCreationFlag", None)
        typed = getattr(flags, "STRONGLY_TYPED", None)
        if typed is None:
            raise MissingRequirementError(
                f"{self.name} {self.version} has no strongly typed networks, so the ONNX file's precision would be "
                f"ignored. Install 10.12 or newer: {PACKAGES[self.name][1]}."
            )
        return 1 << int(typed)

    def check_target(self, target: str) -> None:
        """Raise unless `target` ("current" or "sm89") can be built for on this machine."""
        if target == "current":
            require_gpu()
            self._check_own_gpu(find_gpus()[0])
        elif not self.targets:
            raise InputError(f"{self.name} builds for the GPU it runs on only; use --target current, not {target}.")
        elif target not in self.targets:
            hint = (
                " SM90 and SM100 are data-centre GPUs: use --runtime tensorrt there." if target in _DATA_CENTRE else ""
            )
            raise InputError(f"{self.name} {self.version} builds for {', '.join(self.targets)}, not {target}.{hint}")

    def _check_own_gpu(self, gpu: Gpu) -> None:
        if self.targets and gpu.target not in self.targets:
            raise MissingRequirementError(
                f"This machine's {gpu.name} is {gpu.target}, and {self.name} {self.version} builds for "
                f"{', '.join(self.targets)} only. Use --runtime tensorrt here, or name another --target."
            )

    def select_target(self, config: Any, target: str) -> None:
        """Set the compute capability a builder configuration builds for."""
        self.check_target(target)
        if not self.targets:
            return
        config.num_compute_capabilities = 1
        name = "CURRENT" if target == "current" else target.upper()
        if not config.set_compute_capability(getattr(self.trt.ComputeCapability, name), 0):
            raise InputError(
                f"{self.name} {self.version} refused the target {target}: expected one that it builds for. Choose "
                "another --target."
            )

    def recording_logger(self) -> Any:
        """A logger that keeps every message as (severity name, text) in `.messages`, and prints nothing."""

        class RecordingLogger(self.trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.messages: list[tuple[str, str]] = []

            def log(self, severity: Any, message: str) -> None:
                self.messages.append((severity.name, message))

        return RecordingLogger()

    def execution_context(self, engine: Any) -> tuple[Any, str]:
        """An execution context, and how kernels are specialised for shapes.

        TensorRT-RTX by default runs fallback kernels at first and swaps in specialised ones later, which changes both
        times and last bits between calls; EAGER compiles them before the first call.
        """
        strategies = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return engine.create_execution_context(), "ahead of time"
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return engine.create_execution_context(config), "EAGER"


_DATA_CENTRE = ("sm90", "sm100")


def load_backend(name: str = "auto") -> Backend:
    """Import a TensorRT. "auto": `tensorrt` where it and a GPU are present, else `tensorrt-rtx`.

    Raises MissingRequirementError with the command to install it.
    """
    if name == "auto":
        if find_gpus() and importlib.util.find_spec("tensorrt") is not None:
            return load_backend("tensorrt")
        return load_backend("tensorrt-rtx")
    if name not in PACKAGES:
        raise InputError(f"No runtime is called {name!r}. Choose one of: auto, {', '.join(PACKAGES)}.")
    runtime: RuntimeName = "tensorrt" if name == "tensorrt" else "tensorrt-rtx"
    package, command = PACKAGES[runtime]
    try:
        return Backend(runtime, importlib.import_module(package))
    except (ImportError, OSError) as error:  # OSError: the package is there, a library it loads is not
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C while a library is initialised
            raise KeyboardInterrupt from error
        there = not isinstance(error, ModuleNotFoundError) and importlib.util.find_spec(package) is not None
        # What its loader says of a library for which there is no memory is that there is no such file.
        hint = "It is there; free memory for its libraries, or install it again" if there else "Install it"
        raise MissingRequirementError(f"{package} cannot be imported ({error}). {hint}: {command}.") from error


def default_targets(backend: Backend) -> tuple[str, ...]:
    """What to build for when nothing is named: this machine's GPU, else the default list."""
    gpus = find_gpus()
    if gpus and (not backend.targets or gpus[0].target in backend.targets):
        return ("current",)
    return DEFAULT_TARGETS if backend.targets else ("current",)


def require_gpu(find_library: Callable[[str], str | None] = ctypes.util.find_library) -> None:
    """Raise MissingRequirementError unless an NVIDIA driver and GPU are here; takes well under a second."""
    if find_gpus():
        return
    driver = "a driver is installed but no GPU answers" if find_library("cuda") else "no NVIDIA driver is installed"
    raise MissingRequirementError(
        f"Running an engine needs an NVIDIA GPU, and {driver}. `cnx-deploy inspect` and `verify records` work here."
    )
