"""Files from elsewhere: which files an ONNX graph may read, and what a child process does with graphs and engines.

An ONNX file is parsed by protobuf, which makes objects of everything that the file claims. A file that a manifest names
is parsed here. Any other one is parsed in a child process, so that a crash, a hang or a bomb is one message
(docs/decisions/0019-foreign-files.md). This module loads neither torch nor ONNX Runtime.
"""

import hashlib
import math
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import onnx
from google.protobuf.message import DecodeError, Message

from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import CorruptArtifactError, InputError, MissingRequirementError, RefusedArtifactError
from cnx_deploy.core.files import open_regular, sha256_of_file
from cnx_deploy.core.manifest import Artifact, Launcher
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.exporters.trt.plugins import prepare_runtime

__all__ = [
    "EngineDescription",
    "EngineTensor",
    "OnnxFile",
    "check_recorded",
    "describe_engine",
    "description_task",
    "hash_onnx",
    "limits_for",
    "read_onnx",
    "runtime_of",
]

MAX_FILE_BYTES = (1 << 31) - 1
"""Protobuf's own limit for one message."""

MAX_TENSOR_BYTES = 16 << 30
"""Of all tensors of a graph together, in the file and outside it; huge has 2.6 GB in FP32."""

MAX_NODES = 20_000
"""Of a graph; the huge variant has about 1,500 in any exporter's form."""

MAX_DIMENSIONS = 64

KEYS = frozenset({"location", "offset", "length", "checksum"})
"""ONNX knows a fifth, basepath, which would move the folder; no exporter writes it."""

BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""Of an element, by onnx.TensorProto.DataType; 8 is text, which has no fixed size."""

SECONDS, BYTES_A_SECOND = 120.0, 20e6
MEMORY_BYTES, MEMORY_PER_BYTE = 2 << 30, 4

ENGINE_LIMITS = Limits(300.0, 16 << 30)
RUNTIMES = {b"vtrt": "tensorrt-rtx", b"ftrt": "tensorrt"}
"""First bytes of an engine: of TensorRT-RTX 1.7, and of TensorRT 10."""

NEEDS_A_GPU = "cudaError"
"""What both runtimes say where the driver or the GPU is missing, after they have looked at the header."""


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A parsed file. `model` has no outside data; `outside` are the files that hold it, each once, by name."""

    model: onnx.ModelProto
    outside: tuple[Path, ...]


def read_onnx(path: Path, listed: Collection[str] | None = None) -> OnnxFile:
    """Parse an ONNX file and check what it claims: nodes, sizes of tensors, and the files outside that it reads.

    Outside data lies within the file's own folder, in a regular file without links, in a range that fits the tensor's
    shape. The layers are those of onnx/docs/ExternalDataSecurity.md.

    Args:
        path: the ONNX file.
        listed: names of the files that a manifest lists. The graph may read no other.

    Raises:
        InputError: `path` is no regular file.
        RefusedArtifactError: the file is beyond a limit, or a tensor lies in a place that is not allowed.
        CorruptArtifactError: the bytes are no ONNX model, or sizes do not fit each other.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        _check_limit(path, size, MAX_FILE_BYTES, "bytes")
        content = stream.read()
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise CorruptArtifactError(
            f"{path} is not a valid ONNX file: it is cut off or damaged ({error}). Export it again."
        ) from error
    if not model.HasField("graph"):
        raise CorruptArtifactError(f"{path} is not a valid ONNX file: it holds no graph. Export it again.")
    _check_limit(path, len(model.graph.node), MAX_NODES, "nodes")
    total, outside = 0, {}
    for tensor in _tensors_in(model):
        size_bytes = _claimed_bytes(path, tensor)
        total += size_bytes
        _check_limit(path, total, MAX_TENSOR_BYTES, f"bytes of tensors up to {tensor.name!r}")
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            file = _outside_file(path, tensor, size_bytes, listed)
            outside[str(file)] = file
    return OnnxFile(model, tuple(outside[name] for name in sorted(outside)))


def hash_onnx(path: Path, outside: Sequence[Path]) -> str:
    """SHA-256 of an ONNX file; where it has outside data, over the hashes of all its files in their order."""
    if not outside:
        return sha256_of_file(path)
    return hashlib.sha256("".join(map(sha256_of_file, (path, *outside))).encode()).hexdigest()


def check_recorded(artifact: Artifact) -> None:
    """Raise what `read_onnx` raises for an ONNX artifact; its graph may read the files of its manifest alone."""
    if artifact.manifest.kind == "onnx":
        read_onnx(artifact.path, artifact.file_names)


def limits_for(size_bytes: int) -> Limits:
    """The limits of a child that reads a foreign file: several times what any export took, at most half the memory."""
    size_bytes = min(size_bytes, MAX_TENSOR_BYTES)  # a sparse file claims any size
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 16 << 30
    return Limits(SECONDS + size_bytes / BYTES_A_SECOND, min(MEMORY_BYTES + MEMORY_PER_BYTE * size_bytes, machine // 2))


def _check_limit(path: Path, value: int, limit: int, what: str) -> None:
    if value > limit:
        raise RefusedArtifactError(
            f"{path} is refused: it has {value:,} {what}, at most {limit:,} are allowed. Export the model again, from "
            "a source you trust."
        )


def _tensors_in(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor at any depth: of initializers, attributes, sub-graphs, functions. Protobuf bounds the depth."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if isinstance(value, Message) else value:
                if isinstance(inner, onnx.TensorProto):
                    yield inner
                else:
                    yield from _tensors_in(inner)


def _claimed_bytes(path: Path, tensor: onnx.TensorProto) -> int:
    """The bytes that shape and element type stand for; text and unknown types count one byte an element."""
    _check_limit(path, len(tensor.dims), MAX_DIMENSIONS, f"dimensions of tensor {tensor.name!r}")
    if any(size < 0 for size in tensor.dims):
        raise CorruptArtifactError(
            f"{path} is damaged: tensor {tensor.name!r} has the negative size of {list(tensor.dims)}. Export it again."
        )
    size_bytes: int = -(-math.prod(tensor.dims) * BITS.get(tensor.data_type, 8) // 8)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != size_bytes:
        raise CorruptArtifactError(
            f"{path} is damaged: tensor {tensor.name!r} has {len(tensor.raw_data):,} bytes, its shape "
            f"{list(tensor.dims)} needs {size_bytes:,}. Export it again."
        )
    return size_bytes


def _outside_file(path: Path, tensor: onnx.TensorProto, size_bytes: int, listed: Collection[str] | None) -> Path:
    """The file that holds a tensor's values, once its place and range have been checked."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    # Protobuf gives bytes for a text that is no UTF-8.
    is_text = all(isinstance(value, str) for value in entries.values())
    if len(entries) != len(tensor.external_data) or entries.keys() - KEYS or not is_text:
        keys = ", ".join(repr(entry.key) for entry in tensor.external_data)
        raise _refused(
            path, tensor, f"has the keys {keys}", f"each of {', '.join(sorted(KEYS))} at most once, in UTF-8"
        )
    location, folder = entries.get("location", ""), path.parent.resolve()
    file: Path = folder / location
    try:
        # Equal only where no part is a link or "..": what resolves elsewhere is elsewhere.
        if not location or not file.is_relative_to(folder) or file.resolve() != file:
            raise _refused(path, tensor, f"lies in {location!r}", f"a file below {folder} that is reached by no link")
        status = file.lstat()
    except FileNotFoundError as error:
        raise CorruptArtifactError(
            f"{file} is missing: tensor {tensor.name!r} of {path.name} lies in it. Put it back."
        ) from error
    except (OSError, ValueError) as error:
        raise _refused(path, tensor, f"lies in {location!r} ({error})", "a name that this system takes") from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise _refused(path, tensor, f"lies in {file}", "a regular file with one name (no hard links)")
    if listed is not None and file.relative_to(folder).as_posix() not in listed:
        raise CorruptArtifactError(
            f"{path} reads {location!r}, which its manifest does not list; it lists {', '.join(sorted(listed))}. "
            "Export it again."
        )
    offset, length = entries.get("offset", "0"), entries.get("length", str(size_bytes))
    is_number = all(text.isascii() and text.isdigit() and len(text) < 20 for text in (offset, length))
    if not is_number or int(length) != size_bytes or int(offset) + size_bytes > status.st_size:
        raise CorruptArtifactError(
            f"{path} is damaged: tensor {tensor.name!r} has {size_bytes:,} bytes and lies at offset {offset!r}, length "
            f"{length!r} of {file.name}, which has {status.st_size:,} bytes. Export it again."
        )
    return file


def _refused(path: Path, tensor: onnx.TensorProto, given: str, allowed: str) -> RefusedArtifactError:
    return RefusedArtifactError(
        f"{path} is refused: the outside data of tensor {tensor.name!r} {given}; allowed is {allowed}. "
        "Export the model again, from a source you trust."
    )


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


def describe_engine(
    path: Path, runtime: str | None = None, limits: Limits = ENGINE_LIMITS, *, launcher: Launcher | None = None
) -> EngineDescription:
    """Deserialise an engine in a child process and describe it; without `runtime`, by its first bytes.

    `launcher`: of the own kernels that it was allowed to bring; None reads it with host code off and without creators.

    An engine is native code and may run in the child what it likes: the child bounds a crash, not an attack. Read only
    engines whose origin is known. Up to the driver this needs no GPU.

    Raises:
        CorruptArtifactError: the runtime refuses the engine, or the child ends.
        MissingRequirementError: this machine has no such runtime or no GPU.
    """
    answer = run_isolated(
        "cnx_deploy.exporters.untrusted:description_task",
        {"engine": str(path.resolve()), "runtime": runtime or runtime_of(path), "launcher": launcher},
        limits,
        what=f"Reading {path.name}",
        failure=CorruptArtifactError,
    )
    try:
        return msgspec.convert(answer, EngineDescription)
    except msgspec.ValidationError as error:  # the child has run what was in the engine: its word is data from outside
        raise CorruptArtifactError(
            f"Reading {path.name} failed: its process gave another answer than was asked for ({error}). Build it again."
        ) from error


def runtime_of(path: Path) -> str:
    """Which TensorRT wrote an engine; InputError where its first bytes are of neither."""
    with open_regular(path) as stream:
        head = stream.read(4)
    if head not in RUNTIMES:
        raise InputError(
            f"{path} is no engine: it begins with {head!r}, engines with {', '.join(map(repr, RUNTIMES))}."
        )
    return RUNTIMES[head]


def description_task(engine: str, runtime: str, launcher: Launcher | None = None) -> dict[str, Any]:
    """`describe_engine` for the child."""
    backend = load_backend(runtime)
    read = _deserialised(backend, Path(engine), launcher)
    tensors = tuple(_engine_tensor(backend, read, read.get_tensor_name(index)) for index in range(read.num_io_tensors))
    described: dict[str, Any] = msgspec.to_builtins(
        EngineDescription(backend.name, backend.version, int(read.num_layers), tensors)
    )
    return described


def _deserialised(backend: Backend, path: Path, launcher: Launcher | None) -> Any:
    """The engine, host code off unless its launcher is in it. The API answers None where it refuses one."""
    log = backend.recording_logger()
    runtime = backend.trt.Runtime(log)
    prepare_runtime(backend, runtime, launcher)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is not None:
        return engine
    reason = next((text for severity, text in log.messages if severity.endswith("ERROR")), "it gave no reason").strip()
    if NEEDS_A_GPU in reason:
        raise MissingRequirementError(
            f"{path.name} has a sound header, and {backend.name} needs an NVIDIA GPU to read it ({reason}). "
            "Run this on a machine with a GPU."
        )
    raise CorruptArtifactError(
        f"{backend.name} {backend.version} refuses {path.name} ({reason}). Build it again with cnx-deploy build-trt."
    )


def _engine_tensor(backend: Backend, engine: Any, name: str) -> EngineTensor:
    is_input = engine.get_tensor_mode(name) == backend.trt.TensorIOMode.INPUT
    profiles = range(engine.num_optimization_profiles if is_input else 0)
    return EngineTensor(
        name=name,
        mode="input" if is_input else "output",
        kind=str(engine.get_tensor_dtype(name).name),
        shape=tuple(engine.get_tensor_shape(name)),
        profiles=tuple(tuple(map(tuple, engine.get_tensor_profile_shape(name, index))) for index in profiles),
    )
