"""A file of weights as named FP32 tensors, read without running anything that is in it.

`.safetensors` holds tensors only. `.pt`, `.pth`, `.bin` and `.ckpt` are pickles: they are read with
`torch.load(weights_only=True)`, and one that asks for more is refused, never read another way.
"""

import argparse
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, InputError, RefusedArtifactError
from cnx_deploy.core.out_of_memory import memory_shortage
from cnx_deploy.core.strict_json import kind_of, strict_json
from cnx_deploy.model.weight_guards import (
    check_archive,
    check_safetensors_header,
    check_tensor,
    check_total,
    claims_too_much,
)

__all__ = ["METADATA_KEY", "UNREADABLE", "WeightFile", "read_pickle", "read_weight_file"]

METADATA_KEY = "cnx_deploy"
"""The header's one entry, a JSON object: the format writes several entries in random order."""

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
PLAIN_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")
READABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What torch's unpickler and zip reader raise on bytes that are no checkpoint, found by altering real ones.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """Tensors under the file's own names, float32 and finite.

    `metadata`: our own header, empty for foreign files. `entry`: which entry of a pickle the tensors are from, None
    when the file is the state dict itself.
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    entry: str | None = None


def read_weight_file(path: Path, *, ema: bool = False) -> WeightFile:
    """Read a file of weights; half and bfloat16 become float32.

    `ema` asks for the averaged weights of a training checkpoint; without it they are taken only when there are no
    others. Raises InputError for no such file or suffix, CorruptArtifactError for unreadable bytes and for NaN or
    infinity, RefusedArtifactError for a pickle that holds more than data, CheckpointError for other element types,
    OutOfMemoryError where memory is short for a pickle that claims no more than it has.
    """
    _check_readable(path)
    if path.suffix == ".safetensors":
        if ema:
            raise CheckpointError(f"{path} has one set of weights, so there is no EMA to take. Leave ema out.")
        read = _read_safetensors(path)
    elif path.suffix in PICKLE_SUFFIXES:
        read = _read_pickle(path, ema=ema)
    else:
        raise InputError(
            f"{path} is no checkpoint by its name: expected .safetensors, {', '.join(PICKLE_SUFFIXES)}. Rename it."
        )
    return WeightFile(_finite_floats(read.tensors, path), read.metadata, read.entry)


def _check_readable(path: Path) -> None:
    """Raise InputError for what is not there, may not be read, or has no end: a pipe, a device."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is no regular file: expected a checkpoint there. Check the path.")
        path.open("rb").close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be opened ({reason}): expected a checkpoint there. Check the path.") from error


def _read_safetensors(path: Path) -> WeightFile:
    check_safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is not a mapping
            header = (opened.metadata() or {}).get(METADATA_KEY, "{}")
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
    return WeightFile(tensors, metadata)


def _read_pickle(path: Path, *, ema: bool) -> WeightFile:
    return _state_dict_of(read_pickle(path), path, ema=ema)


def read_pickle(path: Path) -> object:
    """What a pickle of torch holds, of plain data and tensors; nothing in it is run.

    Raises RefusedArtifactError for one that holds more or would unpack to more than it has, CorruptArtifactError for
    unreadable bytes.
    """
    _refuse_torchscript(path)
    check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickle protocols; what matters ends in an error
            content: object = torch.load(
                path, weights_only=True, map_location="cpu"
            )  # Namespace: the reference's `args`
    except UNREADABLE as error:
        short = memory_shortage(error)
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


def _refuse_torchscript(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            is_program = any(name.endswith("constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # the older format is no archive; torch judges it
    if is_program:
        raise RefusedArtifactError(
            f"{path} is refused: it is a TorchScript program, and expected are weights. Save the model's state_dict()."
        )


def _is_well_formed_pickle(path: Path) -> bool:
    """Whether the pickle parses to its end, which garbage does not. Parsing runs nothing."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                code = archive.read(name)
        else:
            code = path.read_bytes()
        return sum(1 for _ in pickletools.genops(code)) > 1
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
    return WeightFile(state, entry=entry)


def _finite_floats(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        check_tensor(name, tensor, path)
    check_total(tensors, path)
    checked = {}
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
        checked[name] = tensor.float()
    return checked
