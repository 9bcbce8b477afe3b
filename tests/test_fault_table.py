"""The fault table and the tests that there are name each other, and `docs/faults.md` is what the table says."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fault_page import PAGE, page
from tests.fault_rows import PENDING, Row
from tests.fault_rows_running import ROWS

TESTS = Path(__file__).parent
Found = set[tuple[str, str, bool]]


def functions_in(source: str, file: str) -> Iterator[tuple[str, str, bool]]:
    """File, name and whether slow, of every test; one of whose cases some are slow counts as both."""
    tree = ast.parse(source)
    marked = {  # names of lists of cases some of which are slow; pytestmark is every test's
        ast.unparse(node.targets[0])
        for node in tree.body
        if isinstance(node, ast.Assign) and "mark.slow" in ast.unparse(node.value)
    }
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        written = [ast.unparse(each) for each in node.decorator_list]
        used = {each.id for part in node.decorator_list for each in ast.walk(part) if isinstance(each, ast.Name)}
        all_slow = "pytestmark" in marked or "pytest.mark.slow" in written
        if not all_slow:
            yield file, node.name, False
        if all_slow or used & marked or any("mark.slow" in each for each in written):
            yield file, node.name, True


@pytest.fixture(scope="module")
def found() -> Found:
    """Every test function of this folder."""
    return {
        each for path in TESTS.glob("test_*.py") for each in functions_in(path.read_text(encoding="utf-8"), path.name)
    }


def row_of(name: str, rows: tuple[Row, ...]) -> Row | None:
    """The row whose name a test's name begins with; the longest where several do."""
    fitting = [
        (len(prefix), row) for row in rows for prefix in row.prefixes if name == prefix or name.startswith(f"{prefix}_")
    ]
    return max(fitting, key=lambda each: each[0])[1] if fitting else None


def problems(rows: tuple[Row, ...], found: Found, pending: dict[int, str] = PENDING) -> Iterator[str]:
    """What the table says and is not so, and what is so and the table does not say."""
    if [row.number for row in rows] != list(range(1, 79)):
        yield "the rows are not 1 to 78"
    having: dict[int, set[tuple[str, bool]]] = {row.number: set() for row in rows}
    for file, name, slow in found:
        row = row_of(name, rows)
        if row is not None and pending.get(row.number, "").partition("::")[0] != file[len("test_") : -len(".py")]:
            having[row.number].add((file, slow))
    for row in rows:
        for file, slow in sorted(row.files ^ having[row.number]):
            what = f"{'slow ' if slow else ''}test {row.prefixes[0]}… in {file}"
            yield f"row {row.number}: {'there is no ' if (file, slow) in row.files else 'the table lacks a '}{what}"
        if not row.files and not row.untested and row.number not in pending:
            yield f"row {row.number} has no test and no reason"
        if row.files and not row.happens:
            yield f"row {row.number} does not say what happens"


def test_every_row_has_tests_under_its_name_and_every_such_test_a_row(found: Found) -> None:
    assert list(problems(ROWS, found)) == []


def without(number: int, **changes: str) -> tuple[Row, ...]:
    return tuple(replace(row, **changes) if row.number == number else row for row in ROWS)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROWS[:-1], "the rows are not 1 to 78"),
        (
            without(5, names="parity_inf_is_equal"),
            "row 5: there is no test test_parity_inf_is_equal… in test_parity.py",
        ),
        (
            without(5, tests="no_such_file"),
            "row 5: there is no test test_parity_inf_not_equal… in test_no_such_file.py",
        ),
        (without(5, tests=""), "row 5 has no test and no reason"),
        (without(4, tests="agreement layers parity"), "row 4: the table lacks a test test_parity_nan_never_passes"),
        (without(76, tests="training_scale", slow="pretraining_run"), "row 76: the table lacks a slow test"),
        (without(50, tests="faults_writing", slow=""), "row 50: there is no test test_build_concurrent_different"),
        (without(5, happens=""), "row 5 does not say what happens"),
    ],
    ids=[
        "missing row",
        "renamed test",
        "missing file",
        "no test",
        "not listed",
        "not said slow",
        "said fast",
        "silent",
    ],
)
def test_a_table_that_is_not_so_is_found(rows: tuple[Row, ...], said: str, found: Found) -> None:
    assert any(problem.startswith(said) for problem in problems(rows, found)), list(problems(rows, found))


def test_slow_marks_are_seen_wherever_they_are_written() -> None:
    source = """
@pytest.mark.slow
def test_a(): ...
@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_b(): ...
def test_c(): ...
CASES = [1, pytest.param(2, marks=pytest.mark.slow)]
@pytest.mark.parametrize("x", CASES)
def test_d(): ...
def helper(): ...
"""
    seen = [(name, slow) for _, name, slow in functions_in(source, "f")]
    both = [("test_b", False), ("test_b", True), ("test_c", False), ("test_d", False), ("test_d", True)]
    assert seen == [("test_a", True), *both]
    assert list(functions_in("pytestmark = pytest.mark.slow\ndef test_e(): ...", "f")) == [("f", "test_e", True)]


def test_no_two_rows_have_a_name_in_common() -> None:
    names = [name for row in ROWS for name in row.prefixes]
    assert len(names) == len(set(names))


def test_a_row_without_a_test_says_why_and_what_is_on_its_way_is_a_row() -> None:
    assert [row.number for row in ROWS if not row.files and not row.untested] == sorted(PENDING)
    for number, name in PENDING.items():
        assert row_of(name.partition("::")[2], ROWS) == ROWS[number - 1]


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `.venv/bin/python -m tests.fault_page`"
