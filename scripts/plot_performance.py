"""Draw docs/plots and fill the tables of docs/performance.md from the records in docs/data.

usage: plot_performance.py [--check] [--docs-dir docs]

Needs matplotlib (the extra `report`). The same data and the same matplotlib give the same bytes. `--check` writes
nothing and exits 3 when the page or a plot is not what the data say. A section whose data file is missing says so and
has no plot. Exit codes are those of cnx_deploy.core.errors.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from performance_page import tables
from performance_page.data import Document, read_document, source_of
from performance_page.forms import check_form

from cnx_deploy.core.errors import CnxDeployError, InputError, MissingRequirementError, RecordsError

FILES = "export/{atto,nano,tiny,base}-224-fp32.onnx"
DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the page: docs/data/<name>.json, drawn by `plots.PLOTS[name]` and told by `text`.

    `command` is shown where the file does not keep its own; `alt` describes the plot to who cannot see it;
    `condition` says what was not run.
    """

    name: str
    command: str
    alt: str
    text: Callable[[Document], str]
    condition: str

    @property
    def markers(self) -> tuple[str, str]:
        """The lines of the page that the section's text stands between."""
        return f"<!-- {self.name}: begin (scripts/plot_performance.py) -->", f"<!-- {self.name}: end -->"


SECTIONS = (
    Section(
        "traffic", "scripts/compare_traffic.py",
        "Bytes an image of our FP16 graph, of the peers' graphs and of the fused floor, over the better peer's.",
        tables.traffic_text, tables.NO_GPU,
    ),
    Section(
        "traffic-targets", "scripts/compare_traffic.py",
        "Bytes an image of our FP16 graph over the better peer's, by variant, image size, target and batch.",
        tables.targets_text, tables.NO_GPU,
    ),
    Section(
        "cpu",
        f"cnx-deploy bench {FILES} --batch 1 --batch 8 "
        "--compare timm,timm-whole,timm-18,torch,compile --no-spin --json",
        "Speed of our ONNX files and of PyTorch over timm's model in ONNX Runtime, with 95 % intervals.",
        tables.cpu_text, "A CPU's speeds; no GPU was there.",
    ),
    Section(
        "cost", "scripts/measure_cost.py",
        "Seconds and peak memory of export and build over the number of parameters, on logarithmic axes.",
        tables.cost_text, "Made without a GPU.",
    ),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 3 when something is out of date")
    parser.add_argument("--docs-dir", type=Path, default=DOCS, help="folder with data/ and performance.md")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            check(options.docs_dir)
            print("Page and plots are up to date.")
        else:
            for path in write(options.docs_dir):
                print(path)
    except CnxDeployError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write(docs: Path) -> list[Path]:
    """Write what is out of date and remove plots without data; returns the files that changed."""
    changed = list(stale(docs))
    for path, content in changed:
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(exist_ok=True)
            staged = path.with_name(f".{path.name}.tmp-plot")
            staged.write_bytes(content)
            staged.replace(path)
    return [path for path, _ in changed]


def check(docs: Path) -> None:
    """Raise RecordsError when the page or a plot is not what the data say."""
    files = [str(path) for path, _ in stale(docs)]
    if files:
        raise RecordsError(
            f"Not what {docs / 'data'} says: {', '.join(files)}. Run scripts/plot_performance.py. If only plots are "
            f"named, another matplotlib than this {plots_module().MATPLOTLIB} may have drawn them."
        )


def stale(docs: Path) -> Iterator[tuple[Path, bytes | None]]:
    """Files that are not what the data say, with what they should hold; None for one that should not exist."""
    for path, content in wanted(docs):
        found = path.read_bytes() if path.is_file() else None
        if found != content:
            yield path, content


def wanted(docs: Path) -> Iterator[tuple[Path, bytes | None]]:
    """Each plot and, last, the page, with what they should hold."""
    plots, page = plots_module(), docs / "performance.md"
    if not page.is_file():
        raise InputError(f"There is no {page}, whose tables this fills. Name its folder with --docs-dir.")
    try:
        text = page.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{page} is no text in UTF-8 ({error}). Save it as such.") from error
    for section in SECTIONS:
        document = read_document(docs / "data" / f"{section.name}.json")
        content, filling = None, tables.NOT_RECORDED
        if document is not None:
            content, filling = drawn_and_told(section, document, plots)
        text = with_filling(text, section, filling)
        yield docs / "plots" / f"{section.name}.svg", content
    yield page, text.encode()


def drawn_and_told(section: Section, document: Any, plots: ModuleType) -> tuple[bytes, str]:
    """A section's plot and its text. Raises InputError where the data are of another form."""
    try:
        check_form(section.name, document)
    except ValueError as error:
        raise InputError(f"docs/data/{section.name}.json has no such data ({error}). Record it again.") from error
    command, day = source_of(document, section.command)
    drawn = plots.PLOTS[section.name](document, f"{command}; {day}. {section.condition}")
    image = f"![{section.alt}](plots/{section.name}.svg)"
    return drawn, f"{image}\n\nRecorded {day} with `{command}`.\n\n{section.text(document)}"


def with_filling(text: str, section: Section, filling: str) -> str:
    """The page with `filling` at the section's place."""
    begin, end = section.markers
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InputError(f"performance.md has no place for {section.name}: put a line {begin!r} and {end!r} into it.")
    return f"{before}{begin}\n{filling}\n{end}{after}"


def plots_module() -> ModuleType:
    """The drawing part, which needs matplotlib."""
    try:
        from performance_page import plots
    except ImportError as error:
        raise MissingRequirementError(
            f'Plots need {error.name or error}, which is not installed. Install it: pip install "cnx-deploy[report]".'
        ) from error
    return plots


if __name__ == "__main__":
    sys.exit(main())
