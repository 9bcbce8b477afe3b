"""Could opening a file run somebody's code? Told by its content, with no reader of its kind.

A name is no evidence: torch unpickles what is inside, whatever it is called.
"""

import csv
import json
import os
import pickletools
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cnx_deploy.errors import CnxDeployError, InputError
from cnx_deploy.inspection import kind_of_file
from cnx_deploy.onnx_wire import scan_onnx

__all__ = ["FileRisk", "risk_of_file", "risks_in"]

Risk = Literal["data-only", "code-capable", "unknown"]

DATA: Risk = "data-only"
CODE: Risk = "code-capable"
UNKNOWN: Risk = "unknown"
IMAGES = {b"\xff\xd8\xff": "JPEG image", b"\x89PNG\r\n\x1a\n": "PNG image", b"BM": "BMP image"}
PROGRAMS = {b"\x7fELF": "native program or library", b"MZ": "Windows program", b"#!": "script"}
TEXT_BYTES = 64 << 20
"""A larger text is not read to be told."""

TREAT = "treat it as able to run code"


@dataclass(frozen=True, slots=True)
class FileRisk:
    """What a file is by its content, and whether reading it as that can run code that is in it."""

    path: Path
    kind: str
    risk: Risk
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "path": str(self.path)}


def risks_in(folder: Path) -> tuple[FileRisk, ...]:
    """Every file below a folder, by its path. Links are named and not followed.

    Raises InputError for a folder that cannot be listed.
    """
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise InputError(f"{folder} cannot be listed ({error.strerror}). Give a folder that can be read.") from error
    found = (Path(root) / name for root, folders, names in os.walk(folder) for name in (*names, *_links(root, folders)))
    return tuple(risk_of_file(path) for path in sorted(found))


def risk_of_file(path: Path) -> FileRisk:
    """What one file is. A link, and what cannot be read, is unknown."""
    if path.is_symlink():
        return FileRisk(path, "link", UNKNOWN, f"it leads to {path.readlink()} and was not followed: {TREAT}")
    if not path.is_file():
        return FileRisk(path, "no ordinary file", UNKNOWN, f"it is a device, pipe or socket: {TREAT}")
    try:
        return FileRisk(path, *_judged(path))
    except (OSError, CnxDeployError) as error:
        return FileRisk(path, "unreadable", UNKNOWN, f"{error}: {TREAT}")


def _links(root: str, folders: list[str]) -> list[str]:
    """Links to folders, which the walk does not enter."""
    return [name for name in folders if Path(root, name).is_symlink()]


def _judged(path: Path) -> tuple[str, Risk, str]:
    with path.open("rb") as stream:
        head = stream.read(16)
        if not head:
            return "empty file", DATA, "there is nothing in it"
        for magic, kind in PROGRAMS.items():
            if head.startswith(magic):
                return kind, CODE, "it is a program"
        for magic, kind in IMAGES.items():
            if head.startswith(magic):
                return kind, DATA, "pixels and what a camera says of them"
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return "WebP image", DATA, "pixels and what a camera says of them"
        if head.startswith(b"PK"):
            return _archive(path)
        if head.startswith(b"\x93NUMPY"):
            return _array(stream)
        if _is_pickle(stream, path.stat().st_size):
            return "pickle", CODE, "unpickling runs what it says"
    return _by_kind(path)


def _by_kind(path: Path) -> tuple[str, Risk, str]:
    kind = kind_of_file(path)
    if kind == "pickle":
        return "pickle", CODE, "it begins like a pickle, and unpickling runs what it says"
    if kind == "engine":
        return "TensorRT engine", CODE, "an engine is native code for a GPU, and may carry libraries for the host"
    if kind == "safetensors":
        return "safetensors", DATA, "tensors and a header in JSON"
    if kind == "onnx":
        return _graph(path)
    return _text(path)


def _graph(path: Path) -> tuple[str, Risk, str]:
    """What else a graph asks for, beside the operators of the standard."""
    try:
        found = scan_onnx(path)
    except CnxDeployError as error:
        return "ONNX model", UNKNOWN, f"{error} Until then {TREAT}"
    said = ["a graph of operators and their weights"]
    if found.locations:
        said.append(f"with weights in other files ({', '.join(found.locations)}), which are read with it")
    if found.domains:
        said.append(f"operators of {', '.join(found.domains)}, which take somebody's library to run")
    if found.messages["Function"]:
        said.append(f"{found.messages['Function']} functions of its own")
    return "ONNX model", DATA, "; ".join(said)


def _archive(path: Path) -> tuple[str, Risk, str]:
    """An archive by the names in it; nothing is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return "broken archive", UNKNOWN, f"its list of files cannot be read: {TREAT}"
    inside = [name for name in names if name.endswith((".pkl", ".pickle"))]
    if inside:
        return "pickle in an archive", CODE, f"torch.load unpickles {inside[0]}, which runs what it says"
    return "archive", UNKNOWN, f"{len(names)} files that were not looked into: {TREAT}"


def _array(stream: BinaryIO) -> tuple[str, Risk, str]:
    """A NumPy array; one of objects is a pickle behind a header."""
    stream.seek(0)
    if b"'descr': '|O'" in stream.read(1 << 12):
        return "NumPy array of objects", CODE, "its values are pickled, and unpickling runs what they say"
    return "NumPy array", DATA, "numbers behind a header"


def _is_pickle(stream: BinaryIO, size: int) -> bool:
    """Whether pickle's instructions lead from the first byte to their end. Following them runs none.

    The older protocols have no mark of their own and no tensors either, so a large file is none of theirs.
    """
    stream.seek(0)
    if size > TEXT_BYTES:
        return False
    try:
        return sum(1 for _ in pickletools.genops(stream)) > 1
    except (ValueError, EOFError, IndexError, OverflowError, MemoryError):
        return False


def _text(path: Path) -> tuple[str, Risk, str]:
    unknown: tuple[str, Risk, str] = ("nothing known", UNKNOWN, f"nothing here knows its content: {TREAT}")
    if path.stat().st_size > TEXT_BYTES:
        return unknown
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return unknown
    if _is_json(text):
        return "JSON", DATA, "text that a parser reads"
    if not _is_table(text):
        return unknown
    return "table (CSV)", DATA, "lines of values between commas"


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _is_table(text: str) -> bool:
    """Rows of one width, two columns or more, and no control characters."""
    if not all(character.isprintable() or character in "\n\r\t" for character in text):
        return False
    try:
        widths = {len(row) for row in csv.reader(text.splitlines(), strict=True) if row}
    except csv.Error:
        return False
    return len(widths) == 1 and max(widths) > 1
