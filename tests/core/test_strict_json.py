"""JSON from outside: what is read, what is refused, and in how much time and memory."""

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
REASONS = {
    "twins": "the key 'a' is there twice",
    "NaN": "NaN is no JSON number",
    "infinity": "-Infinity is no JSON number",
    "beyond a double": "1e999 is beyond what a double holds",
    "deep": "it is nested too deeply",
    "very deep": "it is nested too deeply",
    "byte-order mark": "Unexpected UTF-8 BOM",
    "lone surrogate": "surrogates not allowed",
    "digits": "Exceeds the limit",
    "utf-8 of nothing": "invalid start byte",
}


@dataclass(frozen=True, slots=True)
class Row:
    batch: int
    speed: PositiveNumber


@dataclass(frozen=True, slots=True)
class Table:
    rows: tuple[Row, ...]
    share: Finite | None = None


@pytest.mark.parametrize("name", [name for name in ODD_JSON if name not in ("list", "text", "null")])
def test_what_readers_disagree_on_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what is said is compared below
        strict_json(ODD_JSON[name])
    assert REASONS.get(name, "") in str(caught.value)


@QUICK
@given(value=JSON)
def test_fuzz_what_json_can_say_is_read_as_it_was_written(value: Any) -> None:
    assert strict_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_documents_are_read_up_to_a_depth_and_a_size(tmp_path: Path) -> None:
    nested = [b"[" * depth + b"]" * depth for depth in (MAX_DEPTH, MAX_DEPTH + 1)]
    assert strict_json(nested[0]) == json.loads(nested[0])
    with pytest.raises(ValueError, match="nested too deeply"):
        strict_json(nested[1])
    path = tmp_path / "large.json"
    with path.open("wb") as stream:
        stream.truncate(200_000_000)
    with pytest.raises(ValueError, match="it has more than 16,777,216 bytes"):
        bounded_content(path)
    refused(lambda: command_document(path, "cnx-deploy bench"), InputError, "it has more than 16,777,216 bytes")
    with pytest.raises(ValueError, match="where at most 16,777,216 are read"):
        strict_json(b" " * (MAX_DOCUMENT_BYTES + 1))


def test_keys_by_the_hundred_thousand_are_compared_in_a_second() -> None:
    pairs = ", ".join(f'"{number}": 0' for number in (*range(200_000), 199_999))
    start = time.process_time()
    with pytest.raises(ValueError, match="the key '199999' is there twice"):
        strict_json(b"{" + pairs.encode() + b"}")
    assert time.process_time() - start < 5


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
    table = typed({"rows": [{"batch": 2, "speed": 3, "more": {}}], "other": None}, Table)
    assert table == Table((Row(2, 3.0),))
    assert math.isfinite(LARGEST * LARGEST)


def test_what_is_told_of_a_document_is_short(tmp_path: Path) -> None:
    assert (shortened("a" * 200), shortened("a" * 201)) == ("a" * 200, "a" * 199 + "…")
    said = {"error": "InputError", "message": "no such file" + "!" * 9000, "exit_code": 2}
    path = put(tmp_path / "a.json", json.dumps(said).encode())
    message = refused(lambda: command_document(path, "cnx-deploy bench"), InputError, "a command that failed: 'no such")
    assert len(message) < 600


# --- in manifests -----------------------------------------------------------------------------------------------------


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
        lambda data: data.update(created=data["created"] + "\n"),
        lambda data: data["files"][0].update(sha256="0" * 64 + "\n"),
        lambda data: data["request"].update(target="sm89\n"),
        lambda data: data["facts"].update(gpu="sm89\n"),
    ],
    ids=["created", "sha256", "target", "gpu"],
)
def test_a_line_end_behind_a_field_is_no_part_of_its_form(change: Any) -> None:
    with pytest.raises(ValueError, match="of another form"):
        manifest_from_json(changed(ENGINE, change), ENGINE.stem)


# --- any bytes --------------------------------------------------------------------------------------------------------

BYTES = st.one_of(st.binary(max_size=60), st.text('{}[]":,.019eE+-\\unNaIfi \n', max_size=60).map(str.encode))


@pytest.mark.parametrize("examples", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)], ids=["quick", "long"])
def test_fuzz_bytes_are_a_document_or_refused(examples: Any, tmp_path: Path) -> None:
    @examples
    @given(content=BYTES)
    def check(content: bytes) -> None:
        path = put(tmp_path / "a.json", content)
        document = result_or_error(lambda: command_document(path, "cnx-deploy bench"), InputError)
        if document is not None:
            assert document[0] == json.loads(content)
            assert all(abs(number) <= 1.8e308 for number in floats_in(document[0]))

    check()


def floats_in(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        values = value.values() if isinstance(value, dict) else value
        return [number for inner in values for number in floats_in(inner)]
    return [value] if isinstance(value, float) else []
