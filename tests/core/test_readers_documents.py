"""JSON from outside in general: what `documents` reads, what it refuses and in how much time and memory."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnx_deploy.core.artifacts import read_artifact
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.manifest import manifest_from_json
from cnx_deploy.core.strict_json import (
    LARGEST,
    MAX_DEPTH,
    MAX_DOCUMENT_BYTES,
    Finite,
    PositiveNumber,
    bounded_content,
    command_document,
    shortened,
    strict_json,
    typed,
)
from tests.core.test_manifest_fields import ENGINE, ONNX, changed
from tests.support.lies import LONG, ODD_JSON, QUICK, put, refused, result_or_error

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@dataclass(frozen=True, slots=True)
class Row:
    batch: int
    speed: PositiveNumber


@dataclass(frozen=True, slots=True)
class Table:
    rows: tuple[Row, ...]
    share: Finite | None = None


@pytest.mark.parametrize("name", [name for name in ODD_JSON if name not in ("list", "text", "null")])
def test_what_readers_disagree_on_is_refused(name: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - what is said is compared below
        strict_json(ODD_JSON[name])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("twins", "the key 'a' is there twice"),
        ("NaN", "NaN is no JSON number"),
        ("infinity", "-Infinity is no JSON number"),
        ("beyond a double", "1e999 is beyond what a double holds"),
        ("deep", "it is nested too deeply"),
        ("very deep", "it is nested too deeply"),
        ("byte-order mark", "Unexpected UTF-8 BOM"),
        ("lone surrogate", "surrogates not allowed"),
        ("digits", "Exceeds the limit"),
        ("utf-8 of nothing", "invalid start byte"),
    ],
)
def test_the_reason_is_told(name: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what is said is compared below
        strict_json(ODD_JSON[name])
    assert reason in str(caught.value)


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1])
def test_the_deepest_document_has_as_many_levels_as_is_said(depth: int) -> None:
    content = b"[" * depth + b"]" * depth
    if depth == MAX_DEPTH:
        assert strict_json(content) == json.loads(content)
    else:
        with pytest.raises(ValueError, match="nested too deeply"):
            strict_json(content)


def test_a_manifest_that_is_nested_as_deep_as_json_allows_is_refused_and_not_walked(tmp_path: Path) -> None:
    """Copying it to show it would end in a RecursionError."""
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    path = put(tmp_path / ONNX.name, changed(ONNX, lambda data: data["facts"].update(deep=deep)))
    refused(lambda: read_artifact(path), CorruptArtifactError, "it is nested too deeply")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(created=d["created"] + "\n"),
        lambda d: d["files"][0].update(sha256="0" * 64 + "\n"),
        lambda d: d["request"].update(target="sm89\n"),
        lambda d: d["facts"].update(gpu="sm89\n"),
    ],
    ids=["created", "sha256", "target", "gpu"],
)
def test_a_line_end_behind_a_field_is_no_part_of_its_form(change: Any) -> None:
    with pytest.raises(ValueError, match="of another form"):
        manifest_from_json(changed(ENGINE, change), ENGINE.stem)


def test_a_number_that_only_looks_finite_is_none_in_a_manifest() -> None:
    content = ONNX.read_bytes().replace(b'"crop_ratio": 0.875', b'"crop_ratio": 1e999')
    with pytest.raises(ValueError, match="1e999 is beyond what a double holds"):
        manifest_from_json(content, ONNX.stem)


def test_keys_by_the_hundred_thousand_are_compared_in_a_second() -> None:
    pairs = ", ".join(f'"{number}": 0' for number in (*range(200_000), 199_999))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="the key '199999' is there twice"):
        strict_json(b"{" + pairs.encode() + b"}")
    assert time.perf_counter() - start < 5


def test_no_more_is_read_than_a_document_may_have(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as stream:
        stream.truncate(200_000_000)
    with pytest.raises(ValueError, match="it has more than 16,777,216 bytes"):
        bounded_content(path)
    refused(lambda: command_document(path, "cnx-deploy bench"), InputError, "it has more than 16,777,216 bytes")
    with pytest.raises(ValueError, match="where at most 16,777,216 are read"):
        strict_json(b" " * (MAX_DOCUMENT_BYTES + 1))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "it: Object missing required field rows"),
        ({"rows": [{"batch": 1}]}, "rows[0]: Object missing required field speed"),
        ({"rows": [{"batch": True, "speed": 1}]}, "rows[0].batch: Expected int, got bool"),
        ({"rows": [{"batch": 1, "speed": 0}]}, "rows[0].speed: Expected float >= 1e-150"),
        ({"rows": [{"batch": 1, "speed": 1e200}]}, "rows[0].speed: Expected float <= 1e+150"),
        ({"rows": [{"batch": 1, "speed": 10**400}]}, "rows[0].speed: Number out of range"),
        ({"rows": [{"batch": 1, "speed": math.nan}]}, "rows[0].speed: Expected float"),
        ({"rows": [], "share": "1"}, "share: Expected float | null, got str"),
        ([], "it: Expected object, got array"),
    ],
)
def test_a_field_is_named_by_its_path(value: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what is said is compared below
        typed(value, Table)
    assert reason in str(caught.value)


def test_whole_numbers_are_numbers_and_the_rest_of_a_document_may_be_more() -> None:
    found = typed({"rows": [{"batch": 2, "speed": 3, "more": {}}], "other": None}, Table)
    assert found == Table((Row(2, 3.0),))


def test_the_message_of_a_failed_command_is_told_and_is_short(tmp_path: Path) -> None:
    said = {"error": "InputError", "message": "no such file" + "!" * 9000, "exit_code": 2}
    path = put(tmp_path / "a.json", json.dumps(said).encode())
    message = refused(lambda: command_document(path, "cnx-deploy bench"), InputError, "a command that failed: 'no such")
    assert len(message) < 600


def test_long_text_is_shortened_and_says_so() -> None:
    assert (shortened("a" * 200), shortened("a" * 201)) == ("a" * 200, "a" * 199 + "…")


@QUICK
@given(value=JSON)
def test_fuzz_what_json_can_say_is_read_as_it_was_written(value: Any) -> None:
    assert strict_json(json.dumps(value, ensure_ascii=False).encode()) == value


def check_bytes(folder: Path, content: bytes) -> None:
    path = put(folder / "a.json", content)
    found = result_or_error(lambda: command_document(path, "cnx-deploy bench"), InputError)
    if found is not None:
        assert found[0] == json.loads(content)
        assert all(abs(number) <= 1.8e308 for number in _numbers(found[0]))
    assert math.inf > LARGEST * LARGEST


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [each for inner in (value.values() if isinstance(value, dict) else value) for each in _numbers(inner)]
    return [float(value)] if isinstance(value, float) else []


BYTES = st.one_of(st.binary(max_size=60), st.text('{}[]":,.019eE+-\\unNaIfi \n', max_size=60).map(str.encode))


@QUICK
@given(content=BYTES)
def test_fuzz_bytes_are_a_document_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_bytes(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@LONG
@given(content=BYTES)
def test_fuzz_bytes_at_length(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_bytes(tmp_path_factory.getbasetemp(), content)
