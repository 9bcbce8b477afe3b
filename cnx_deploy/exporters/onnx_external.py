"""Where an ONNX file's tensors lie outside it: within its own folder, in plain files, within their bytes; or refused.

The layers are those of onnx/docs/ExternalDataSecurity.md (containment, no symbolic and no hard links, known keys only,
ranges within the file), looked at before ONNX, ONNX Runtime or TensorRT is given the path.
"""

import math
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from cnx_deploy.core.errors import CorruptArtifactError, RefusedArtifactError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.exporters.onnx_wire import OnnxLimits, TensorClaim, WireFacts, scan_onnx

__all__ = ["check_recorded", "check_tensors"]

KEYS = frozenset({"location", "offset", "length", "checksum"})
"""ONNX knows a fifth, basepath, which would move the folder: no exporter writes it."""

BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""Of an element, by onnx.TensorProto.DataType; 8 is text, which has no fixed size and is no weight."""

WHOLE_NUMBER = re.compile(r"[0-9]{1,19}")


def check_recorded(artifact: Artifact) -> None:
    """The limits and `check_tensors` for a recorded file, before anything parses it; other kinds are passed over."""
    if artifact.manifest.kind == "onnx":
        check_tensors(artifact.path, scan_onnx(artifact.path), listed=artifact.file_names)


def check_tensors(
    path: Path, facts: WireFacts, *, listed: Collection[str] | None = None, limits: OnnxLimits | None = None
) -> tuple[Path, ...]:
    """Check every tensor's size and place; return the files outside that hold values, each once, by name.

    `listed`: the names that a manifest has, none beyond which is read. Raises RefusedArtifactError for a place that
    is not plainly within the folder and for sizes beyond the limits, CorruptArtifactError for ranges and sizes that
    do not fit and for a file that is not there.
    """
    most = (limits or OnnxLimits()).tensor_bytes
    total = 0
    files: dict[str, Path] = {}
    for tensor in facts.tensors:
        expected = _bytes_of(path, tensor)
        total += expected
        if total > most:
            raise RefusedArtifactError(
                f"{path} is refused: its tensors up to {tensor.name!r} claim {total:,} bytes, where at most {most:,} "
                f"are expected. Export the model again, from a source you trust."
            )
        if tensor.external or tensor.is_external:
            file = _place(path, tensor, listed)
            _check_range(path, tensor, file, expected)
            files[file.name] = file
        elif tensor.raw_bytes is not None and tensor.raw_bytes != expected:
            raise CorruptArtifactError(
                f"{path} is damaged: tensor {tensor.name!r} has {tensor.raw_bytes:,} bytes, expected {expected:,} for "
                f"its shape {list(tensor.dims)}. Export it again."
            )
    return tuple(files[name] for name in sorted(files))


def _bytes_of(path: Path, tensor: TensorClaim) -> int:
    """The bytes that shape and element type stand for; of text at least one an element."""
    if any(size < 0 for size in tensor.dims):
        raise CorruptArtifactError(
            f"{path} is damaged: tensor {tensor.name!r} has the shape {list(tensor.dims)}, expected no negative size. "
            "Export it again."
        )
    bits = BITS.get(tensor.data_type, 8)
    return -(-math.prod(tensor.dims) * bits // 8)


def _place(path: Path, tensor: TensorClaim, listed: Collection[str] | None) -> Path:
    """The file that holds a tensor's values."""
    entries = _entries(path, tensor)
    location = entries.get("location", "")
    parts = location.split("/")
    plain = PurePosixPath(location).parts == tuple(parts) and not set(location) & set("\\:\0\ufffd")
    if not location or location.startswith("/") or ".." in parts or not plain:
        raise _refused(path, tensor, f"lies in {location!r}", "a plain name within the file's own folder")
    file = path.parent
    for part in parts:
        file /= part
        if file.is_symlink():
            raise _refused(path, tensor, f"lies behind the link {file}", "a file of its own")
    if listed is not None and location not in listed:
        names = ", ".join(sorted(listed))
        raise CorruptArtifactError(
            f"{path} reads {location!r}, which its manifest does not list, expected one of {names}. Export it again."
        )
    return file


def _entries(path: Path, tensor: TensorClaim) -> Mapping[str, str]:
    entries = dict(tensor.external)
    if unknown := sorted(entries.keys() - KEYS):
        known = ", ".join(sorted(KEYS))
        raise _refused(path, tensor, f"has the keys {', '.join(map(repr, unknown))}", f"only {known}")
    if len(entries) != len(tensor.external):
        raise _refused(path, tensor, "has a key twice", "each once")
    return entries


def _check_range(path: Path, tensor: TensorClaim, file: Path, expected: int) -> None:
    """The range is within a regular file with one name, and as long as the shape asks for."""
    try:
        found = file.lstat()
    except FileNotFoundError as error:
        raise CorruptArtifactError(
            f"{file} is missing: expected it beside {path.name}, whose tensor {tensor.name!r} lies in it. Put it back."
        ) from error
    except (OSError, ValueError) as error:
        raise _refused(path, tensor, f"lies in a file that cannot be looked at ({error})", "a plain file") from error
    if not stat.S_ISREG(found.st_mode):
        raise _refused(path, tensor, f"lies in {file}, which is no regular file", "one")
    if found.st_nlink > 1:
        raise _refused(
            path, tensor, f"lies in {file}, which has {found.st_nlink} names (hard links)", "a file of its own"
        )
    entries = dict(tensor.external)
    offset, length = (entries.get("offset", "0"), entries.get("length", str(expected)))
    if not WHOLE_NUMBER.fullmatch(offset) or not WHOLE_NUMBER.fullmatch(length):
        raise _corrupt(path, tensor, f"offset {offset!r} and length {length!r}", "whole numbers of bytes")
    if tensor.data_type not in BITS or int(length) != expected:
        raise _corrupt(
            path, tensor, f"{length} bytes of element type {tensor.data_type}", f"{expected:,} for its shape"
        )
    if int(offset) + expected > found.st_size:
        end = int(offset) + expected
        raise _corrupt(path, tensor, f"bytes {offset} to {end}", f"at most the {found.st_size:,} of {file.name}")


def _refused(path: Path, tensor: TensorClaim, found: str, expected: str) -> RefusedArtifactError:
    return RefusedArtifactError(
        f"{path} is refused: the outside data of tensor {tensor.name!r} {found}; expected {expected}. "
        "Export the model again, from a source you trust."
    )


def _corrupt(path: Path, tensor: TensorClaim, found: str, expected: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{path} is damaged: the outside data of tensor {tensor.name!r} has {found}, expected {expected}. "
        "Export it again."
    )
