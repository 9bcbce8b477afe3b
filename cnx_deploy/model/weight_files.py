"""A file of weights as named FP32 tensors, read without running anything that is in it.

`.safetensors` holds tensors only. `.pt`, `.pth`, `.bin` and `.ckpt` are pickles: they are read with
`torch.load(weights_only=True)`, and one that asks for more is refused, never read another way. Before and after,
checks keep a file from taking memory that its size does not justify.

Sources of the attacks: safetensors (huggingface/safetensors, attacks/); "A better zip bomb" (Fifield, WOOT 2019) for
entries that overlap.
"""

import argparse
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, InputError, RefusedArtifactError
from cnx_deploy.core.files import open_regular
from cnx_deploy.core.out_of_memory import out_of_memory_error
from cnx_deploy.core.strict_json import kind_of, strict_json

__all__ = [
    "METADATA_KEY",
    "UNREADABLE",
    "WeightFile",
    "check_archive",
    "claims_too_much",
    "read_pickle",
    "read_weight_file",
]

METADATA_KEY = "cnx_deploy"
"""The header's one entry, a JSON object: the format writes several entries in random order."""

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
PLAIN_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")
READABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MAX_PROGRAM_BYTES = 64 << 20
"""Of a pickle's program, without its tensors; a training checkpoint of huge has 0.3 MB."""

MAX_SAFETENSORS_HEADER = 100_000_000
"""The format's own limit."""

SHARED = 2
"""Times the file's size that its tensors may take together: some state dicts name a tensor twice."""

# What torch's unpickler and zip reader raise on bytes that are no checkpoint, found by altering real ones.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightFile:
    """Tensors under the file's own names, float32 and finite.

    `metadata`: our own header, empty for foreign files. `entry`: which entry of a pickle the tensors are from, None
    when the file is the state dict itself. `beside`: what else the file says at its top level, by name: the entries of
    a pickle that hold no tensor (`args`, `meta`, `hyper_parameters`, `epoch`), the other texts of a safetensors header.
    It is foreign data of any type, which may contain itself.
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    entry: str | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)


def read_weight_file(path: Path, *, ema: bool = False) -> WeightFile:
    """Read a file of weights; half and bfloat16 become float32.

    Args:
        path: the file; its suffix says how it is read.
        ema: ask for the averaged weights of a training checkpoint. Without it they are taken only when there are no
            others.

    Raises:
        InputError: there is no such file, or its suffix is unknown.
        CorruptArtifactError: the bytes are unreadable, or a value is NaN or infinite.
        RefusedArtifactError: a pickle holds more than data.
        CheckpointError: the element types are others, or there is no state dict.
        OutOfMemoryError: memory is short for a pickle that claims no more than it has.
    """
    try:
        open_regular(path).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be opened ({reason}): expected a checkpoint there. Check the path.") from error
    if path.suffix == ".safetensors":
        if ema:
            raise CheckpointError(f"{path} has one set of weights, so there is no EMA to take. Leave ema out.")
        weights = _read_safetensors(path)
    elif path.suffix in PICKLE_SUFFIXES:
        weights = _state_dict_of(read_pickle(path), path, ema=ema)
    else:
        raise InputError(
            f"{path} is no checkpoint by its name: expected .safetensors, {', '.join(PICKLE_SUFFIXES)}. Rename it."
        )
    return replace(weights, tensors=_finite_floats(weights.tensors, path))


def read_pickle(path: Path) -> object:
    """What a pickle of torch holds, of plain data and tensors; nothing in it is run.

    Raises:
        RefusedArtifactError: it holds more than data, or would unpack to more than it has.
        CorruptArtifactError: the bytes are unreadable.
        OutOfMemoryError: memory is short for a file that claims no more than it has.
    """
    check_archive(path)
    try:
        # Namespace: the reference's `args`. The warnings are about pickle protocols; what matters ends in an error.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            content: object = torch.load(path, weights_only=True, map_location="cpu")
    except UNREADABLE as error:
        short = out_of_memory_error(error)
        if short is not None and not claims_too_much(error, path):
            raise short from error
        if isinstance(error, pickle.UnpicklingError) and _is_well_formed_pickle(path):
            raise RefusedArtifactError(
                f"{path} is refused: it is a pickle that holds more than tensors and plain data, and reading it could "
                f"run foreign code ({_reason(error)}). Convert it to safetensors where you trust it."
            ) from error
        raise CorruptArtifactError(
            f"{path} cannot be read as a PyTorch checkpoint ({_reason(error)}): it is cut off or altered. "
            "Fetch or write it again."
        ) from error
    return content


def check_archive(path: Path) -> None:
    """Refuse a PyTorch archive that would unpack to more than it holds, or that is a program (TorchScript).

    torch.save stores entries as they are, so a compressed one, or entries that add up to more than the file, are a
    bomb. Older pickles are no archive and pass: torch judges them. Raises RefusedArtifactError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return
    if any(entry.filename.endswith("constants.pkl") for entry in entries):
        raise RefusedArtifactError(
            f"{path} is refused: it is a TorchScript program, and expected are weights. Save the model's state_dict()."
        )
    size = path.stat().st_size
    total = sum(entry.file_size for entry in entries)
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or total > size:
        how = f"{packed[0]!r} is compressed" if packed else "its entries overlap"
        raise RefusedArtifactError(
            f"{path} is refused: {how}, and unpacked it would take {total:,} bytes where the file has {size:,}. "
            "Expected is what torch.save writes, which packs nothing. Save the state dict again where you trust it."
        )
    for entry in entries:
        if entry.filename.endswith("data.pkl") and entry.file_size > MAX_PROGRAM_BYTES:
            raise RefusedArtifactError(
                f"{path} is refused: the pickle in it has {entry.file_size:,} bytes beside its tensors, expected at "
                f"most {MAX_PROGRAM_BYTES:,}. Save the state dict alone."
            )


def claims_too_much(error: BaseException, path: Path) -> bool:
    """Whether reading `path` asked for more than the file has, so that it lies.

    False where it was no more than an honest file takes, and memory is short.
    """
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))
    size = path.stat().st_size
    if asked is not None:
        return int(asked[1]) > size
    try:
        bytearray(SHARED * size)
    except MemoryError:
        return False
    return True


def _read_safetensors(path: Path) -> WeightFile:
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is not a mapping
            texts = dict(opened.metadata() or {})
            header = texts.pop(METADATA_KEY, "{}")
    except (SafetensorError, OSError) as error:
        raise CorruptArtifactError(
            f"{path} is not a whole safetensors file ({error}). Fetch or write it again."
        ) from error
    try:
        metadata = strict_json(header.encode("utf-8"))
        if not isinstance(metadata, dict):
            raise ValueError(f"it is {kind_of(metadata)}, expected an object")
    except ValueError as error:
        raise CorruptArtifactError(f"{path} has metadata that is not JSON ({error}). Write it again.") from error
    return WeightFile(tensors, metadata, beside=texts)


def _check_header(path: Path) -> None:
    """Raise CorruptArtifactError for a header that names a tensor twice or is too deep, which the library lets pass.

    Everything else that can be wrong with the format the library finds itself.
    """
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length > min(MAX_SAFETENSORS_HEADER, path.stat().st_size):
            return
        header = stream.read(length)

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twin = next(name for name in names if names.count(name) > 1)
            raise CorruptArtifactError(
                f"{path} names {twin} twice in its header: expected each tensor once. Fetch or write it again."
            )
        return dict(pairs)

    try:
        json.loads(header, object_pairs_hook=without_twins)
    except RecursionError as error:
        raise CorruptArtifactError(f"{path} has a header that is nested too deep. Fetch or write it again.") from error
    except ValueError:
        return  # no JSON: the library says where


def _is_well_formed_pickle(path: Path) -> bool:
    """Whether the pickle parses to its end, which garbage does not. Parsing runs nothing."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            program = path.read_bytes()
        return sum(1 for _ in pickletools.genops(program)) > 1
    except (*UNREADABLE, StopIteration):
        return False


def _reason(error: BaseException) -> str:
    """The part of torch's message that says what was wrong, without its advice to read the file unsafely."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first.partition(" was not an allowed global")[0][:200]


def _state_dict_of(content: object, path: Path, *, ema: bool) -> WeightFile:
    """Find the state dict: the content itself, or under the entry that training code puts it."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict. Save model.state_dict().")
    wanted = EMA_KEYS if ema else PLAIN_KEYS + EMA_KEYS
    entry = next((key for key in wanted if isinstance(content.get(key), dict)), None)
    if ema and entry is None:
        raise CheckpointError(
            f"{path} has no EMA weights: expected {' or '.join(EMA_KEYS)} beside {', '.join(map(str, content))[:200]}. "
            "Leave ema out."
        )
    state = content if entry is None else content[entry]
    strangers = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(
            f"{path} holds {strangers[0]!r}, which is no tensor, where a state dict was expected. "
            f"Save model.state_dict(), bare or as {' or '.join(map(repr, PLAIN_KEYS))}."
        )
    beside = {} if entry is None else {str(key): value for key, value in content.items() if not _holds_tensors(value)}
    return WeightFile(state, entry=entry, beside=beside)


def _holds_tensors(value: object) -> bool:
    """Whether a tensor is in nested containers. Each is looked into once: a pickle's may hold themselves."""
    seen: set[int] = set()
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, Tensor):
            return True
        if isinstance(part, dict | list | tuple | set) and id(part) not in seen:
            seen.add(id(part))
            rest.extend(part.values() if isinstance(part, dict) else part)
    return False


def _finite_floats(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Float32 tensors, once no tensor and no sum of them claims more than the file holds."""
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, path)
    total, size = sum(each.numel() * each.element_size() for each in tensors.values()), path.stat().st_size
    if total > SHARED * size:
        raise CorruptArtifactError(
            f"{path}: its {len(tensors)} tensors claim {total:,} bytes and share storage; the file has {size:,}. "
            "Save the state dict again where it was made."
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in READABLE_DTYPES:
            raise CheckpointError(
                f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')}, expected float32, float16 or "
                "bfloat16. Convert it where it was made."
            )
        if not torch.isfinite(tensor).all():
            raise CorruptArtifactError(
                f"{path}: {name} holds NaN or infinity, so every output would. Take an earlier checkpoint."
            )
    return {name: tensor.float() for name, tensor in tensors.items()}


def _check_tensor(name: str, tensor: Tensor, path: Path) -> None:
    """Raise for a tensor that is sparse or without values, or that claims more than its storage holds."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested or tensor.is_quantized:
        raise CheckpointError(
            f"{path}: {name} is no ordinary tensor ({str(tensor.layout).removeprefix('torch.')}, {tensor.device}): "
            "expected dense values. Save it with .to_dense() where it was made."
        )
    # A view that repeats its storage claims any size for a few bytes.
    claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > held:
        raise CorruptArtifactError(
            f"{path}: {name} claims {claimed:,} bytes, the file holds {held:,} for it. Fetch or write it again."
        )
