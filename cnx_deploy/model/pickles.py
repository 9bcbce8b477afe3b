"""A pickle of torch as plain data and tensors, read without running anything that is in it.

`torch.load(weights_only=True)` reads it. The types that training programs put beside weights (paths, NumPy's numbers,
dates) are read by stand-ins of this module: the file names a type, and a function here makes plain data of its
arguments, so that no constructor of another library runs. A file that asks for any other type is refused. Before and
after, checks keep a file from taking memory that its size does not justify.

Source of the attacks: "A better zip bomb" (Fifield, WOOT 2019) for entries that overlap.
"""

import argparse
import datetime
import math
import pathlib
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnx_deploy.core.errors import CorruptArtifactError, RefusedArtifactError
from cnx_deploy.core.out_of_memory import out_of_memory_error

__all__ = ["SHARED", "UNREADABLE", "Ignored", "check_archive", "claims_too_much", "read_pickle"]

MAX_PROGRAM_BYTES = 64 << 20
"""Of a pickle's program, without its tensors; a training checkpoint of huge has 0.3 MB."""

MAX_LISTED = 100_000
"""Numbers of a NumPy array beside the weights that are read; a larger one is refused."""

SHARED = 2
"""Times the file's size that its tensors may take together: some state dicts name a tensor twice."""

# What torch's unpickler and zip reader raise on bytes that are no checkpoint, found by altering real ones.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_pickle(path: Path, *, stand_ins: bool = True) -> object:
    """What a pickle of torch holds, of plain data and tensors; nothing in it is run.

    Args:
        path: the file.
        stand_ins: read the types of `_stand_ins` too, as plain data.

    Raises:
        RefusedArtifactError: it holds more than data, or would unpack to more than it has.
        CorruptArtifactError: the bytes are unreadable.
        OutOfMemoryError: memory is short for a file that claims no more than it has.
    """
    check_archive(path)
    allowed: list[Any] = [argparse.Namespace, *(_stand_ins() if stand_ins else ())]  # the reference's `args`
    try:
        # The warnings are about pickle protocols; what matters ends in an error.
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")
            content: object = torch.load(path, weights_only=True, map_location="cpu")
    except UNREADABLE as error:
        short = out_of_memory_error(error)
        if short is not None and not claims_too_much(error, path):
            raise short from error
        if isinstance(error, pickle.UnpicklingError) and _is_well_formed_pickle(path):
            raise RefusedArtifactError(
                f"{path} is refused: it is a pickle that holds more than tensors and plain data, and reading it could "
                f"run foreign code ({_reason(error)}). Where you trust it, write its weights alone with the program "
                "that made it: torch.save(checkpoint['state_dict'], 'weights.pt'), or model.state_dict() of a whole "
                "model."
            ) from error
        raise CorruptArtifactError(
            f"{path} cannot be read as a PyTorch checkpoint ({_reason(error)}): it is cut off or altered. "
            "Fetch or write it again."
        ) from error
    return content


def check_archive(path: Path) -> None:
    """Refuse a PyTorch archive that would unpack to more than it holds, or that is a program.

    torch.save stores entries as they are, so a compressed one, or entries that add up to more than the file, are a
    bomb. Older pickles are no archive and pass: torch judges them. Raises RefusedArtifactError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return
    if any(entry.filename.endswith("/archive_format") for entry in entries):
        raise RefusedArtifactError(
            f"{path} is refused: it is a program of torch.export, which torch.export.load takes, and expected are "
            "weights. Name the ONNX file that it was written beside."
        )
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
    if foreign := re.match(r"Unsupported global: GLOBAL (\S+)", first):
        return f"an object of the type {foreign[1]}"[:200]
    if first.startswith("Unsupported operand"):
        return "an instruction of another pickle protocol than torch.save's own, 2"
    return first[:200]


# --- stand-ins --------------------------------------------------------------------------------------------------------
# torch's unpickler calls what a listed name stands for with arguments of the file's choice, makes objects of it and
# sets their state. So no name stands for a class of another library: each function and class below checks the types of
# what it is given, opens nothing, and takes no more memory than its arguments have.


class Ignored:
    """An object of a library that is not run here: what the file says of it is dropped."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Text(str):
    """A text's own type, such as the version that torch gives as its own."""

    __slots__ = ()

    def __new__(cls, value: object = "") -> "_Text":
        return super().__new__(cls, _checked(value, str))


class _Kind:
    """NumPy's dtype of numbers and texts, which says of itself what `numpy.dtype(...)` takes."""

    code = "<V0"  # of one that the file makes without a code

    def __init__(self, code: object, *flags: object) -> None:
        if not re.fullmatch(r"[biufcSU]\d{1,4}", _checked(code, str)):
            raise pickle.UnpicklingError(f"{code!r:.40} is no NumPy type of numbers or texts")
        self.code = f"<{code}"

    def __setstate__(self, state: object) -> None:
        _version, order, *parts = _checked(state, tuple)
        if order not in ("<", ">", "|", "=") or any(part is not None for part in parts[:3]):
            raise pickle.UnpicklingError("it holds a NumPy type of several fields")
        self.code = f"{'>' if order == '>' else '<'}{self.code[1:]}"

    def __repr__(self) -> str:
        return f"dtype('{self.code}')"

    def values(self, content: object, count: int) -> np.ndarray[Any, Any]:
        """`count` values from their bytes."""
        raw, kind = _checked(content, bytes), np.dtype(self.code)
        if len(raw) != count * kind.itemsize:
            raise pickle.UnpicklingError(f"it holds {len(raw):,} bytes for {count:,} NumPy values of {kind}")
        return np.frombuffer(raw, kind) if raw else np.zeros(count, kind)


class _Array(list[Any]):
    """A NumPy array as nested lists of Python's numbers."""

    def __init__(self, *arguments: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        _version, shape, kind, is_fortran, content = _checked(state, tuple)
        lengths = [_checked(length, int) for length in _checked(shape, tuple)]
        if math.prod(max(1, length) for length in lengths) > MAX_LISTED:
            raise pickle.UnpicklingError(f"it holds a NumPy array of more than {MAX_LISTED:,} numbers")
        values = _checked(kind, _Kind).values(content, math.prod(lengths))
        nested = values.reshape(lengths, order="F" if is_fortran is True else "C").tolist()
        self[:] = nested if isinstance(nested, list) else [nested]


def _checked(value: object, kind: type) -> Any:
    if not isinstance(value, kind):
        raise pickle.UnpicklingError(f"it holds {type(value).__name__} where a pickle has {kind.__name__}")
    return value


def _scalar(kind: object, content: object) -> object:
    return _checked(kind, _Kind).values(content, 1)[0].item()


def _posix_path(*parts: object) -> pathlib.PurePath:
    return pathlib.PurePosixPath(*(_checked(part, str) for part in parts))


def _windows_path(*parts: object) -> pathlib.PurePath:
    return pathlib.PureWindowsPath(*(_checked(part, str) for part in parts))


def _empty_dict(*arguments: object) -> dict[Any, Any]:
    return {}


def _no_bytes() -> bytes:
    """How a pickle of protocol 2 writes `b""`."""
    return b""


def _plain_list(items: object = (), *arguments: object) -> list[Any]:
    return list(_checked(items, list | tuple))  # type: ignore[arg-type]


def _namespace() -> argparse.Namespace:
    return argparse.Namespace()


def _attribute(owner: object, name: object) -> Ignored:
    """`getattr`, which a pickle uses for methods: of an object that is ignored, and ignored itself."""
    if not isinstance(owner, type) or not issubclass(owner, Ignored):
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL builtins.getattr of {owner!r:.80}")
    return Ignored()


def _stand_ins() -> list[tuple[Any, str]]:
    """(what is called, the name in the file): names of old and new Pythons and NumPys, and of all systems."""
    named: dict[str, Any] = {}
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath", "Path", "PurePath"):
            named[f"{module}.{name}"] = _posix_path
        for name in ("WindowsPath", "PureWindowsPath"):
            named[f"{module}.{name}"] = _windows_path
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        named |= {f"{module}.scalar": _scalar, f"{module}._reconstruct": _Array}
    named |= {
        "numpy.dtype": _Kind, "numpy.ndarray": _Array, "collections.defaultdict": _empty_dict,
        "collections.deque": _plain_list, "types.SimpleNamespace": _namespace, "builtins.frozenset": frozenset,
        "torch.torch_version.TorchVersion": _Text, "builtins.getattr": _attribute,
        "builtins.bytes": _no_bytes,
        "mmengine.logging.history_buffer.HistoryBuffer": Ignored,
    }  # fmt: skip
    # Immutable, of bounded size, made in C from bytes or numbers; the time zone is one of theirs.
    named |= {f"datetime.{kind.__name__}": kind for kind in (
        datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone,
    )}  # fmt: skip
    # A type itself, as in dtype=numpy.float32 or defaultdict(list), is its name.
    types = ("bool", "dict", "float", "int", "list", "object", "str", "tuple")
    numbers = [f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)] + ["bool_", "bool"]
    for name in [*(f"builtins.{each}" for each in types), *(f"numpy.{each}" for each in numbers)]:
        named[name] = name
    return [(stand_in, name) for name, stand_in in named.items()]
