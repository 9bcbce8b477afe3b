"""How JSON from outside is read: no more than so many bytes, strictly, and as the types that the code relies on.

What does not fit is a ValueError that says what was found where; the reader of a document adds the file and what to do.
"""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from cnx_deploy.core.errors import InputError

__all__ = [
    "LARGEST", "MAX_DEPTH", "MAX_DOCUMENT_BYTES", "Finite", "PositiveNumber", "bounded_content", "command_document",
    "kind_of", "said_of", "shortened", "strict_json", "typed",
]  # fmt: skip

MAX_DOCUMENT_BYTES = 16 << 20
"""The largest document that was written, a benchmark of four networks on eight candidates, has 111 kB."""
MAX_DEPTH = 64
"""Objects and lists in each other; the deepest document that is written has nine."""
SHOWN = 200
"""Characters of a found value in a message."""

LARGEST = 1e150
"""Of any figure: two of them have a finite product, and FP32's largest squares have a half of its digits."""
Finite = Annotated[float, msgspec.Meta(ge=-LARGEST, le=LARGEST)]
PositiveNumber = Annotated[float, msgspec.Meta(ge=1 / LARGEST, le=LARGEST)]

Kind = TypeVar("Kind")


def bounded_content(path: Path, most: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The bytes of a file. Raises ValueError where it has more than `most`, OSError where it cannot be read."""
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def strict_json(content: bytes, most: int = MAX_DOCUMENT_BYTES) -> Any:
    """JSON in UTF-8 without what readers disagree on; ValueError for anything else.

    Refused are more than `most` bytes or `MAX_DEPTH` levels, a key twice in an object, NaN, infinities and what a
    double takes for one (1e999), integers of thousands of digits, lone surrogates, a byte-order mark.
    """
    if len(content) > most:
        raise ValueError(f"{len(content):,} bytes, where at most {most:,} are read")
    try:
        found = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_twins,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_depth(found)
    json.dumps(found, ensure_ascii=False).encode("utf-8")  # a lone surrogate could not be written again
    return found


def command_document(path: Path, command: str) -> tuple[dict[str, Any], bytes]:
    """The object that `command --json` printed, and its bytes.

    InputError where the file cannot be read, is no such JSON, or is the message of a command that failed.
    """
    try:
        content = bounded_content(path)
        found = strict_json(content)
        if not isinstance(found, dict):
            raise ValueError(f"the document is {kind_of(found)}, expected an object")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error}). Expected what `{command} --json` prints."
        ) from error
    if {"error", "message", "exit_code"} <= found.keys():
        said = shortened(repr(found["message"]))
        raise InputError(
            f"{path} is the message of a command that failed: {said}. Expected what `{command} --json` prints."
        )
    return found, content


def typed(value: Any, kind: type[Kind], where: str = "") -> Kind:
    """The value as `kind`; a ValueError says which field is not, and why, without the pattern it has to fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(said_of(error, where)) from error


def said_of(error: msgspec.ValidationError, where: str = "") -> str:
    """The message of msgspec with the field's path first: `rows[0].batch: Expected int, got str`."""
    what, _, path = str(error).partition(" - at `$")
    place = f"{where}{path.rstrip('`')}".removeprefix(".") or "it"
    return f"{place}: {re.sub(r' matching regex .*', ' of another form', what).replace('`', '')}"


def kind_of(value: Any) -> str:
    """A JSON value's type in words, and a short value itself."""
    if value is None:
        return "null"
    if isinstance(value, dict | list | tuple):
        return "an object" if isinstance(value, dict) else "a list"
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}…"


def shortened(text: object) -> str:
    """Text for a message: its beginning where it is long."""
    shown = str(text)
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(MAX_DEPTH + 1):
        inner = [value for value in level if isinstance(value, dict | list)]
        if not inner:
            return
        level = [each for value in inner for each in (value.values() if isinstance(value, dict) else value)]
    raise ValueError("it is nested too deeply")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shortened(repr(name))} is there twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{shortened(digits)} is beyond what a double holds")
    return value
