"""Fill the tables of docs/kernels.md from docs/data/kernels.json and docs/data/kernel-errors.json.

usage: kernel_tables.py [--check] [--docs-dir docs]

`--check` writes nothing and exits with 3 where the page is not what the records say.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cnx_deploy.core.files import write_text
from cnx_deploy.kernels.settings import KERNELS

Row = dict[str, Any]
SHOWN = ("sm89", "sm90")
"""The targets whose tiles the page lists; the others are in the record."""
FORMS = {
    "fp16": "FP16", "bf16": "BF16", "hot 2": "FP16, sums of squares at 2 times the limit",
    "hot 50": "FP16, at 50 times the limit",
}  # fmt: skip
RESULTS = ("hidden", "sums", "gain", "stored", "recomputed")


def main(arguments: list[str] | None = None) -> int:
    """Write or check; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 3 where the page is out of date")
    parser.add_argument("--docs-dir", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    options = parser.parse_args(arguments)
    page = options.docs_dir / "kernels.md"
    old = text = page.read_text(encoding="utf-8")
    compiled, errors = (read(options.docs_dir / "data" / f"{name}.json") for name in ("kernels", "kernel-errors"))
    text = filled(text, "compiled", f"{recorded(compiled)}\n\n{table(summary(compiled['kernels']))}")
    for target in SHOWN:
        text = filled(text, target, table(tiles(compiled["kernels"], target)))
    text = filled(text, "errors", f"{recorded(errors)}\n\n{table(deviations(errors['rows']))}")
    if options.check:
        return 3 if text != old else 0
    write_text(page, text)
    return 0


def read(path: Path) -> Row:
    """A record."""
    content: Row = json.loads(path.read_text(encoding="utf-8"))
    return content


def filled(text: str, name: str, filling: str) -> str:
    """The page with another filling between two of its lines."""
    begin, end = f"<!-- {name}: begin (scripts/kernel_tables.py) -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    assert found, f"kernels.md has no line {begin!r}"
    assert closed, f"kernels.md has no line {end!r}"
    return f"{before}{begin}\n{filling}\n{end}{after}"


def recorded(record: Row) -> str:
    """When, by which command and with which Triton a record was made."""
    return f"Recorded {record['date']} with `{record['command']}`, Triton {record['triton']}."


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    line = ("| --- |", *(" --: |" for _ in head[1:]))
    return "\n".join([f"| {' | '.join(head)} |", "".join(line), *(f"| {' | '.join(row)} |" for row in body)])


def summary(rows: list[Row]) -> list[tuple[str, ...]]:
    """What the code of all widths uses, by target."""
    lines = [("target", "kernels", "with spills", "registers", "shared memory, kB", "resident warps", "products by")]
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        spans = [spread(row[name] / unit for row in own) for name, unit in SPANS]
        kinds = sorted({row["tensor_core"] for row in own if row["tensor_core"]})
        counts = (str(len(own)), str(sum(row["spills"] > 0 for row in own)))
        lines.append((target, *counts, *spans, ", ".join(f"`{kind}`" for kind in kinds)))
    return lines


SPANS = (("registers", 1), ("shared_bytes", 1024), ("resident_warps", 1))


def spread(values: Iterable[float]) -> str:
    """Smallest and largest."""
    known = sorted(values)
    return f"{known[0]:.0f} – {known[-1]:.0f}"


def tiles(rows: list[Row], target: str) -> list[tuple[str, ...]]:
    """Tile, warps, registers and shared memory of each kernel, by channels."""
    cells = {
        (row["channels"], row["kernel"]): f"{block(row)}, {row['num_warps']}; {row['registers']}, "
        f"{row['shared_bytes'] / 1024:.0f} kB"
        for row in rows
        if row["target"] == target and row["stores_hidden"]
    }
    widths = dict.fromkeys(width for width, _ in cells)
    shown = [name for name in KERNELS if name != "response_gain"]
    head = ("C", *(f"`{name}`" for name in shown))
    return [head, *((str(width), *(cells.get((width, name), "–") for name in shown)) for width in widths)]


def block(row: Row) -> str:
    """A tile as positions × columns × chunk; × chunk alone where whole rows are held."""
    return "×".join(str(row[name]) for name in ("block_m", "block_n", "block_k") if row[name])


def deviations(rows: list[Row]) -> list[tuple[str, ...]]:
    """Smallest and largest relative L2 of each result over all stages, by form."""
    lines = [("storage", "hidden tensor", "sums of squares", "gain", "result, stored", "result, recomputed")]
    for form, title in FORMS.items():
        own = [[row[name] for row in rows if row["form"] == form and name in row] for name in RESULTS]
        lines.append((title, *(f"{min(values):.1e} – {max(values):.1e}" for values in own)))
    return lines


if __name__ == "__main__":
    sys.exit(main())
