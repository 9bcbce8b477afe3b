"""What TensorRT itself is asked to do for an engine, apart so that it can run in a process of its own.

This module loads neither torch nor onnx: a child that starts with it is ready in a third of a second.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.devices import find_device
from cnx_deploy.core.errors import BuildError, InputError
from cnx_deploy.core.hidden_tensor import FUSED_MODES, FusedMode
from cnx_deploy.core.manifest import Compiled, EngineFacts, Launcher, OwnKernels
from cnx_deploy.core.strict_json import typed
from cnx_deploy.core.system import find_gpus
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.exporters.trt.compiled import measure_compiled
from cnx_deploy.exporters.trt.kernel_log import kernels_in_log
from cnx_deploy.exporters.trt.network import NetworkBuild, Progress, half_share, type_census

__all__ = [
    "BuildSpec", "FilePrecision", "compile_task", "compiled_engine", "limits_for", "measure_isolated", "measure_task",
    "task_of",
]  # fmt: skip

MIN_HALF_SHARE = 0.95
"""Least share of HALF among matrix products and convolutions of an FP16 file: ours have 1.0, an FP32 graph 0."""

LISTS_KERNELS = "tensorrt-rtx"
"""The runtime whose log `trt.kernel_log` reads; TensorRT proper has another format and builds for minutes."""

LONGEST_SECONDS = 4 * 3600.0
MEMORY_BYTES, MEMORY_PER_BYTE = 8 << 30, 16

NO_HALF_DEPTHWISE = ("No low-precision conv kernel", "Could not find any implementation")


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """What to build. One optimisation profile a batch range (smallest, typical, largest).

    TF32 lets FP32 matrix products and convolutions keep ten bits of mantissa; it is off unless asked for.
    `measure` compiles the graph a second time for a fixed batch to record kernels and traffic.
    `fused`: blocks are computed by own kernels, and where they keep the hidden tensor (`core.hidden_tensor`).
    `launcher`: path of a library made of `launcher/kernel_launcher.cpp`, which then travels in the engine.
    """

    runtime: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    target: str = "sm89"
    batches: tuple[tuple[int, int, int], ...] = ((1, 8, 64),)
    allow_tf32: bool = False
    measure: bool = True
    fused: FusedMode | None = None
    launcher: str | None = None

    def __post_init__(self) -> None:
        if not self.batches or any(not 1 <= low <= typical <= high for low, typical, high in self.batches):
            raise InputError(
                f"The batch ranges are {self.batches}; each has to be smallest:typical:largest, such as 1:8:64."
            )
        if self.fused not in (None, *FUSED_MODES):
            raise InputError(f"fused is {self.fused!r}; expected {', '.join(FUSED_MODES)} or None.")
        if self.launcher is not None and self.fused is None:
            raise InputError(f"{self.launcher} launches own kernels, and the engine has none. Add --fused (fused).")

    @property
    def gpu(self) -> str:
        """The compute capability that it is built for, such as "sm89": for "current" that of this machine's GPU."""
        return find_gpus()[0].target if self.target == "current" else self.target


@dataclass(frozen=True, slots=True)
class FilePrecision:
    """What an ONNX file says of its own precision, for a process that knows no precision by name."""

    name: str
    dtype: str
    is_half: bool
    keep_fp32: tuple[str, ...] = ()

    @classmethod
    def of(cls, deploy: DeploySpec) -> Self:
        """The precision of a file with this deploy form."""
        return cls(deploy.precision, deploy.row.dtype, deploy.is_half, deploy.keep_fp32)


def compile_task(onnx: str, precision: dict[str, Any], spec: dict[str, Any], plan: str) -> Any:
    """`compiled_engine` for a child process: the engine goes to the file `plan`, the facts are the answer."""
    asked = typed(spec, BuildSpec)
    backend = load_backend(asked.runtime)
    content, facts = compiled_engine(backend, Path(onnx), typed(precision, FilePrecision), asked, None)
    Path(plan).write_bytes(content)
    return msgspec.to_builtins(facts)


def measure_task(onnx: str, target: str, batch: int, fused: FusedMode | None = None) -> Any:
    """What TensorRT-RTX makes of any ONNX file for a fixed batch, for a child process: a `Compiled` record.

    `fused`: see `BuildSpec`; the child then needs the environment of `plugins.parser_environment`.
    """
    backend = load_backend(LISTS_KERNELS)
    with _written_for(backend, Path(onnx), BuildSpec(target=target, fused=fused)) as (path, _):
        return msgspec.to_builtins(measure_compiled(path, batch=batch, target=target, backend=backend))


def measure_isolated(
    path: Path,
    target: str,
    batch: int,
    *,
    what: str | None = None,
    fused: FusedMode | None = None,
    tick: Callable[[float], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Compiled:
    """What TensorRT-RTX makes of an ONNX file for a fixed batch, measured in a child process.

    `what` names the work in messages, `fused` is as in `measure_task`; `tick` and `environment` are as in
    `core.child_process.run_isolated`. Raises BuildError where it cannot be compiled.
    """
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))  # weights may lie beside the file
    answer = run_isolated(
        "cnx_deploy.exporters.trt.compiling:measure_task",
        {"onnx": str(path.resolve()), "target": target, "batch": batch, "fused": fused},
        limits_for(size),
        what=what or f"Compiling {path.name} for {target}, batch {batch}",
        failure=BuildError,
        tick=tick,
        environment=environment,
    )
    return typed(answer, Compiled)


def limits_for(onnx_bytes: int) -> Limits:
    """What TensorRT may use for one file: hours, and far more memory than any build here took."""
    return Limits(LONGEST_SECONDS, MEMORY_BYTES + MEMORY_PER_BYTE * onnx_bytes)


def task_of(onnx: Path, precision: FilePrecision, spec: BuildSpec, plan: Path) -> dict[str, Any]:
    """The arguments of `compile_task`, as JSON can hold them."""
    records = {"precision": msgspec.to_builtins(precision), "spec": msgspec.to_builtins(spec)}
    return {"onnx": str(onnx.resolve()), "plan": str(plan.resolve()), **records}


def compiled_engine(
    backend: Backend, source: Path, precision: FilePrecision, spec: BuildSpec, progress: Progress | None
) -> tuple[bytes, EngineFacts]:
    """The engine's bytes, and what was found on the way. `precision`: that of the ONNX file."""
    with _written_for(backend, source, spec) as (path, own_kernels):
        start = time.monotonic()
        build, plan, fallback = _serialised(backend, path, precision, spec, progress)
        seconds = round(time.monotonic() - start, 2)
        compiled = None
        if spec.measure and backend.name == LISTS_KERNELS and not fallback:
            batch = spec.batches[-1][2]
            compiled = measure_compiled(path, batch=batch, target=spec.target, backend=backend, progress=progress)
        facts = EngineFacts(
            runtime_version=backend.version,
            build_seconds=seconds,
            census=type_census(build.network),
            half_share_of_products=round(half_share(build.network), 4),
            depthwise_fp32_fallback=fallback,
            depthwise_in_groups_of=1 if path == source or own_kernels is not None else _channels_per_group(),
            range_warnings=tuple(build.range_warnings()),
            kernels_by_profile=_kernels_by_profile(build, spec),
            run="not run: built ahead of time" if spec.target != "current" else "not run yet: see verify",
            gpu=spec.gpu if spec.target == "current" else None,
            compiled=compiled,
            own_kernels=own_kernels,
        )
    return plan, facts


def _kernels_by_profile(build: NetworkBuild, spec: BuildSpec) -> dict[str, int]:
    """Kernels the engine itself launches, by batch range: each profile is compiled for itself."""
    if build.backend.name != LISTS_KERNELS:
        return {}
    counts = Counter(kernel.profile for kernel in kernels_in_log(text for _, text in build.log.messages))
    return {":".join(map(str, sizes)): counts[index] for index, sizes in enumerate(spec.batches) if counts[index]}


def _serialised(
    backend: Backend, path: Path, precision: FilePrecision, spec: BuildSpec, progress: Progress | None
) -> tuple[NetworkBuild, bytes, bool]:
    """Build as the file says; where TensorRT has no FP16 depthwise kernel, once more with those layers in FP32.

    TensorRT 11.2 has none on some GPUs (NVIDIA/TensorRT issue 4838).
    """
    try:
        build = NetworkBuild(backend, path, _libraries(spec))
        _check_half_share(build, precision)
        return build, build.serialise(_config(build, spec), progress), False
    except BuildError as error:
        if precision.dtype != "float16" or not any(text in str(error) for text in NO_HALF_DEPTHWISE):
            raise
    from cnx_deploy.exporters.trt.depthwise import with_depthwise_in_fp32

    with with_depthwise_in_fp32(path) as widened:
        build = NetworkBuild(backend, widened, _libraries(spec))
        return build, build.serialise(_config(build, spec), progress), True


def _config(build: NetworkBuild, spec: BuildSpec) -> Any:
    return build.config(spec.target, allow_tf32=spec.allow_tf32, batches=spec.batches)


def _check_half_share(build: NetworkBuild, precision: FilePrecision) -> None:
    """Raise BuildError for a file that computes in FP32 what it says it computes in half, parts it keeps left out."""
    share = half_share(build.network, precision.keep_fp32)
    if precision.is_half and share < MIN_HALF_SHARE:
        raise BuildError(
            f"{build.onnx_path.name} calls itself {precision.name.upper()}, but only {share:.0%} of its matrix "
            f"products and convolutions are (at least {MIN_HALF_SHARE:.0%} expected). Export it again with --precision "
            f"{precision.name} --force."
        )


@contextlib.contextmanager
def _written_for(backend: Backend, source: Path, spec: BuildSpec) -> Iterator[tuple[Path, OwnKernels | None]]:
    """The file to compile, and its own kernels; onnx is loaded only where it has to be written otherwise."""
    if spec.fused is not None:
        from cnx_deploy.exporters.trt.fused_graph import with_own_kernels
        from cnx_deploy.exporters.trt.plugins import make_creator_known

        make_creator_known(backend, *_libraries(spec))
        device = find_device(find_gpus()[0].name) if spec.target == "current" else None
        launcher: Launcher = "python" if spec.launcher is None else "engine"
        with with_own_kernels(source, spec.fused, spec.gpu, device, launcher) as (path, own_kernels):
            yield path, own_kernels
    elif (
        spec.gpu == "sm75" and backend.name == LISTS_KERNELS
    ):  # how the other one compiles depthwise ones is not known here
        from cnx_deploy.exporters.trt.depthwise import written_for

        with written_for(source, spec.gpu) as path:
            yield path, None
    else:
        yield source, None


def _libraries(spec: BuildSpec) -> tuple[Path, ...]:
    # Absolute, or the loader looks for a bare name elsewhere.
    return () if spec.launcher is None else (Path(spec.launcher).resolve(),)


def _channels_per_group() -> int:
    from cnx_deploy.exporters.trt.depthwise import CHANNELS_PER_GROUP

    return CHANNELS_PER_GROUP
