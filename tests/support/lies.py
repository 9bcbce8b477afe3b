"""Documents that lie, for tests of readers: any field at any depth replaced, removed, doubled, added or put elsewhere.

A reader gives a sound result or one error of its class; a command that reads ends in a code of the table, with a
message and no traceback.
"""

import contextlib
import copy
import io
import json
import resource
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cnx_deploy.cli import main
from cnx_deploy.core.errors import CnxDeployError

SECONDS, MEGABYTES = 2.0, 60.0
"""Bounds on the processor time and memory of a refusal, far above what is seen: 0.05 s, 1 MB."""

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=y>"
AT_LENGTH = settings.get_current_profile_name() == "long"
"""The slow run has twenty times as many examples, and other ones each time."""

QUICK = settings(
    max_examples=600 if AT_LENGTH else 30, deadline=None, derandomize=not AT_LENGTH,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
FEW = settings(QUICK, max_examples=300 if AT_LENGTH else 15)
"""Of what takes tenths of a second."""

LONG = settings(QUICK, max_examples=600, derandomize=False)

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, 1e308, -1e308, 5e-324, 0.0, -0.0, "", "0", "1e5", "NaN"]),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "\x1b[2J", "\x00", "a\nb", "\udcff", "x" * 5000, EVIL]),
    st.sampled_from([[], {}, [[]], {"a": {}}, [None], [1, 2, 3], {"": 0}]).map(copy.deepcopy),
)  # fmt: skip
"""Every type of JSON, its extremes, and texts that are used against those who trust them."""

ODD_JSON: dict[str, bytes] = {
    "nothing": b"",
    "binary": bytes(range(256)),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "utf-8 of nothing": b'{"a": "\xff"}',
    "byte-order mark": b"\xef\xbb\xbf{}",
    "lone surrogate": b'{"a": "\\ud800"}',
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "beyond a double": b'{"a": 1e999}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "twins": b'{"a": 1, "a": 2}',
    "deep": b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
    "very deep": b"[" * 200_000,
    "two documents": b"{} {}",
    "cut off": b'{"a": [1, 2',
    "list": b"[]",
    "text": b'"text"',
    "null": b"null",
}
"""What no reader of documents takes."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value; of a long list the first entries."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from places(entry, (*path, key))
    elif isinstance(value, list):
        for at, entry in enumerate(value[:3]):
            yield from places(entry, (*path, at))


def placed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the document with another value at a place; the place may be new in an object."""
    changed = holder = copy.deepcopy(document)
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


@st.composite
def lying(draw: st.DrawFn, document: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """A sound document with one to three changes."""
    data = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        if not (paths := list(places(data))):
            break
        *above, last = draw(st.sampled_from(paths))
        holder = data
        for key in above:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "double", "add", "reorder"]))
        if action == "replace":
            holder[last] = draw(values)
        elif action == "remove":
            del holder[last]
        elif action == "reorder":
            holder.reverse() if isinstance(holder, list) else holder.update({last: holder.pop(last)})
        else:
            value = copy.deepcopy(holder[last]) if action == "double" else draw(values)
            if isinstance(holder, list):
                holder.append(value)
            else:
                holder[f"{last}2" if action == "double" else draw(st.text(max_size=5))] = value
    return data


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that are no file of the kind: random ones, or a sound file with bytes flipped, cut off or put in."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        action = draw(st.sampled_from(["flip", "flip", "cut", "insert"]))
        if action == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif action == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=4))
    return bytes(data)


def documents(document: Any) -> st.SearchStrategy[bytes]:
    """A file's bytes: lies in the fields, NaN and infinities as Python writes them, and bytes that are no document."""
    lies = lying(document).map(lambda data: json.dumps(data).encode())
    return st.one_of(lies, lies, spoilt(json.dumps(document).encode()))


def result_or_error(read: Callable[[], Any], *kinds: type[CnxDeployError]) -> Any:
    """What a reader gives, None where it refuses with one of `kinds`; any other exception is the test's failure."""
    try:
        return read()
    except kinds:
        return None


def refused(read: Callable[[], Any], kind: type[CnxDeployError], *parts: str) -> str:
    """Read; the message of exactly this error, which has every part and came soon and with little memory."""
    before, started = peak_megabytes(), time.process_time()
    with pytest.raises(CnxDeployError) as caught:
        read()
    taken, grown = time.process_time() - started, peak_megabytes() - before
    assert type(caught.value) is kind, caught.value
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert (taken < SECONDS, grown < MEGABYTES) == (True, True), (taken, grown)
    return str(caught.value)


def peak_megabytes(of: int = resource.RUSAGE_SELF) -> float:
    """Peak resident memory so far, of this process or (RUSAGE_CHILDREN) of the largest child."""
    return resource.getrusage(of).ru_maxrss / 1024


def run(*words: object) -> tuple[int, str]:
    """A command's exit code and what it said on both streams."""
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told), pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0), printed.getvalue() + told.getvalue()


def check_command(*words: object, allowed: Collection[int] = (0, 2, 4)) -> int:
    """Run a command over what lies: a code that is allowed, no traceback, one message where it failed."""
    code, said = run(*words)
    assert code in allowed, (code, said)
    assert "Traceback" not in said
    assert code == 0 or said.count("Error: ") == 1, said
    return code


def put(path: Path, content: bytes) -> Path:
    """A file with this content; its path."""
    path.write_bytes(content)
    return path
