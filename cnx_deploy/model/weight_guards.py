"""What a file of weights must satisfy before it is read, and its tensors before they are used.

Reading runs nothing (`weight_files`); these checks keep it from taking memory that the file's size does not justify.
Sources: the attacks that safetensors keeps (huggingface/safetensors, attacks/); "A better zip bomb" (Fifield, WOOT
2019) for entries that overlap.
"""

import json
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, RefusedArtifactError

__all__ = ["check_archive", "check_safetensors_header", "check_tensor", "check_total", "claims_too_much"]

MAX_PROGRAM_BYTES = 64 << 20
"""Of a pickle's program, without its tensors; a training checkpoint of huge has 0.3 MB."""
MAX_SAFETENSORS_HEADER = 100_000_000
"""The format's own limit."""
SHARED = 2
"""Times the file's size that its tensors may take together: some state dicts name a tensor twice."""


def check_archive(path: Path) -> None:
    """Refuse a PyTorch archive that would unpack to more than it holds. Older pickles are no archive and pass.

    torch.save stores entries as they are, so a compressed one, or entries that add up to more than the file, are a
    bomb. RefusedArtifactError names what was found.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return  # no archive, or a broken one: torch judges it
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


def check_safetensors_header(path: Path) -> None:
    """Raise CorruptArtifactError for a header that names a tensor twice, which the library lets pass, or is too deep.

    Everything else that can be wrong with the format the library finds itself.
    """
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length > min(MAX_SAFETENSORS_HEADER, path.stat().st_size):
            return  # the library says so
        header = stream.read(length)
    try:
        json.loads(header, object_pairs_hook=_without_twins)
    except _TwinError as twin:
        raise CorruptArtifactError(
            f"{path} names {twin} twice in its header: expected each tensor once. Fetch or write it again."
        ) from twin
    except RecursionError as error:
        raise CorruptArtifactError(f"{path} has a header that is nested too deep. Fetch or write it again.") from error
    except ValueError:
        return  # no JSON: the library says where


def check_tensor(name: str, tensor: Tensor, path: Path) -> None:
    """Raise for what is no ordinary tensor: sparse or without values (CheckpointError), larger than its storage.

    A view that repeats its storage claims any size for a few bytes (CorruptArtifactError).
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested or tensor.is_quantized:
        raise CheckpointError(
            f"{path}: {name} is no ordinary tensor ({str(tensor.layout).removeprefix('torch.')}, {tensor.device}): "
            "expected dense values. Save it with .to_dense() where it was made."
        )
    claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > held:
        raise CorruptArtifactError(
            f"{path}: {name} claims {claimed:,} bytes, the file holds {held:,} for it. Fetch or write it again."
        )


def check_total(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CorruptArtifactError where tensors together claim more than twice the file's size."""
    total, size = sum(each.numel() * each.element_size() for each in tensors.values()), path.stat().st_size
    if total > SHARED * size:
        raise CorruptArtifactError(
            f"{path}: its {len(tensors)} tensors claim {total:,} bytes and share storage; the file has {size:,}. "
            "Save the state dict again where it was made."
        )


def claims_too_much(error: BaseException, path: Path) -> bool:
    """Whether what reading `path` failed for was too much for any machine: more than the file has, so it lies.

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


class _TwinError(Exception):
    """A name that stands twice in one JSON object."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwinError(name)
        found[name] = value
    return found
