"""`docs/faults.md` from the fault table: `python -m tests.fault_page` writes it."""

from collections.abc import Iterator
from pathlib import Path

from tests.fault_rows import PENDING, Row
from tests.fault_rows_running import ROWS

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
HEAD = """# Faults

What is done to the package, what happens, and the tests that do it. Made from `tests/fault_rows.py` and
`tests/fault_rows_running.py` by `python -m tests.fault_page`; `tests/test_fault_table.py` holds it against the tests.

The exit code is the command's: 1 it could not be done, 2 wrong usage or input, 3 a check failed, 4 an artifact is
corrupt or refused, 5 this machine lacks something, 130 interrupted; in Python it is the error's `exit_code`. Tests of a
row begin with `test_` and its name. They run with `scripts/test`, those in italics with `scripts/test --slow` alone; of
a file that is there twice some cases are slow.

NaN and infinity: a runner refuses them among the pixels it is given in host memory, and names the image. Who wants to
see what the network makes of them sets
`runner.input_spec = dataclasses.replace(runner.input_spec, takes_nonfinite=True)`. Logits that are not finite are never
an answer: `predict`, `eval` and `verify` end with exit code 3. No command prints NaN in JSON: what is none is null.

| # | name | fault | what happens | exit code | tests |
| ---: | --- | --- | --- | --- | --- |
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"| {' | '.join(cells(row))} |\n" for row in ROWS)


def cells(row: Row) -> Iterator[str]:
    """A row of the table."""
    yield str(row.number)
    yield ", ".join(f"`{name}`" for name in row.names.split())
    yield row.fault
    yield row.happens or "-"
    yield row.code
    stems = [*row.tests.split(), *(f"*{stem}*" for stem in row.slow.split())]
    tests = ", ".join(linked(stem) for stem in stems)
    pending = f"not yet: {PENDING[row.number].partition('::')[0]}" if row.number in PENDING else ""
    yield "; ".join(part for part in (tests, pending, row.untested) if part)


def linked(stem: str) -> str:
    """A link to a file of tests; slow ones in italics."""
    return f"[{stem}](../tests/test_{stem.strip('*')}.py)"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
