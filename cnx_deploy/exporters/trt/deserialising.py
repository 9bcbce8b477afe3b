"""What an engine is, from TensorRT itself: deserialised in a process of its own, because an engine is native code.

A damaged engine can end the process that reads it, and one from elsewhere may run what it likes there: the child bounds
the damage of the first, not of the second (docs/decisions/0019-foreign-files.md). Up to the driver this runs without a
GPU; what it says of an engine on one was not run and is tested with a double. This module loads no torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.exporters.trt.backend import Backend, load_backend

__all__ = ["EngineDescription", "EngineTensor", "describe_engine", "description_task", "deserialised", "runtime_of"]

LIMITS = Limits(300.0, 16 << 30)
RUNTIMES = {b"vtrt": "tensorrt-rtx", b"ftrt": "tensorrt"}
"""First bytes of an engine: of TensorRT-RTX 1.7, and of TensorRT 10."""

NEEDS_A_GPU = "cudaError"
"""What both runtimes say where the driver or the GPU is missing, after they have looked at the header."""


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """An input or output. `profiles`: of an input, smallest, typical and largest shape in each profile."""

    name: str
    mode: str
    kind: str
    shape: tuple[int, ...]
    profiles: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What the runtime says of an engine."""

    runtime: str
    runtime_version: str
    layers: int
    tensors: tuple[EngineTensor, ...]


def describe_engine(path: Path, runtime: str | None = None, limits: Limits = LIMITS) -> EngineDescription:
    """Deserialise an engine in a child process and say what it is; `runtime` None: by its first bytes.

    Whatever is in the engine may run there: ask only for one whose origin is known, or that somebody answers for.
    Raises CorruptArtifactError where the runtime refuses it or the child ends, MissingRequirementError where this
    machine has no such runtime or no GPU.
    """
    found = run_isolated(
        "cnx_deploy.exporters.trt.deserialising:description_task",
        {"engine": str(path.resolve()), "runtime": runtime or runtime_of(path)},
        limits,
        what=f"Reading {path.name}",
        failure=CorruptArtifactError,
    )
    try:
        return msgspec.convert(found, EngineDescription)
    except msgspec.ValidationError as error:
        raise CorruptArtifactError(
            f"Reading {path.name} failed: its process gave another answer than was asked for ({error}). Build it again."
        ) from error


def runtime_of(path: Path) -> str:
    """Which TensorRT wrote an engine; InputError where its first bytes are of neither."""
    with path.open("rb") as stream:
        head = stream.read(4)
    if head not in RUNTIMES:
        raise InputError(
            f"{path} begins with {head!r}, expected one of {', '.join(map(repr, RUNTIMES))}. Give an engine."
        )
    return RUNTIMES[head]


def description_task(engine: str, runtime: str) -> dict[str, Any]:
    """`describe_engine` for the child."""
    backend, path = load_backend(runtime), Path(engine)
    read = deserialised(backend, path)
    tensors = tuple(_tensor(backend, read, read.get_tensor_name(index)) for index in range(read.num_io_tensors))
    found: dict[str, Any] = msgspec.to_builtins(
        EngineDescription(backend.name, backend.version, int(read.num_layers), tensors)
    )
    return found


def deserialised(backend: Backend, path: Path) -> Any:
    """The engine, host code off; same errors as `describe_engine`. The API answers None where it refuses one."""
    log = backend.recording_logger()
    runtime = backend.trt.Runtime(log)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is not None:
        return engine
    reason = next((text for severity, text in log.messages if severity.endswith("ERROR")), "it gave no reason")
    if NEEDS_A_GPU in reason:
        raise MissingRequirementError(
            f"{path.name} has a sound header, and to read on {backend.name} needs an NVIDIA GPU ({reason.strip()}). "
            "Run it on a machine that has one."
        )
    raise CorruptArtifactError(
        f"{backend.name} {backend.version} refuses {path.name} ({reason.strip()}). Build it again with cnx-deploy "
        "build-trt."
    )


def _tensor(backend: Backend, engine: Any, name: str) -> EngineTensor:
    is_input = engine.get_tensor_mode(name) == backend.trt.TensorIOMode.INPUT
    profiles = range(engine.num_optimization_profiles if is_input else 0)
    return EngineTensor(
        name=name,
        mode="input" if is_input else "output",
        kind=str(engine.get_tensor_dtype(name).name),
        shape=tuple(engine.get_tensor_shape(name)),
        profiles=tuple(tuple(map(tuple, engine.get_tensor_profile_shape(name, index))) for index in profiles),
    )
