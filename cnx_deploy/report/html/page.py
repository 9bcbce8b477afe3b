"""The page: what was read, put together; the template rendered; the file written whole or not at all."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy import __version__
from cnx_deploy.bench.record import BenchmarkRecord, Conditions, Timing
from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.files import write_text
from cnx_deploy.core.plotting import require_packages
from cnx_deploy.core.system import cpu_count, cpu_name, find_gpus, tool_versions
from cnx_deploy.diagnosis.layer_record import LayerComparison
from cnx_deploy.report.html import charts
from cnx_deploy.report.html.documents import (
    Given,
    HeadroomDocument,
    read_benchmark,
    read_headroom,
    read_layers,
)
from cnx_deploy.report.html.networks import Entry, Records, read_records
from cnx_deploy.report.html.summary import Gap, Tile, gaps, tiles

__all__ = ["MARK", "Page", "check_page", "corrupt_error", "gather", "render", "write_page"]

MARK = '<meta name="generator" content="cnx-deploy report">'
"""By which a page of this command is known, within the first `MARK_BYTES`; anything else is not replaced."""
MARK_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything a page says. `created` is UTC in seconds, `environment` the machine that made the page."""

    records: Records
    benchmarks: tuple[Given[BenchmarkRecord], ...]
    headrooms: tuple[Given[HeadroomDocument], ...]
    layers: tuple[Given[tuple[LayerComparison, ...]], ...]
    gaps: tuple[Gap, ...]
    tiles: tuple[Tile, ...]
    environment: Mapping[str, str]
    created: str
    version: str = __version__

    @property
    def compared(self) -> tuple[Entry, ...]:
        """Files that were compared with PyTorch: each precision together, within it the smallest network first."""
        entries = [entry for network in self.records.networks for entry in network.entries if entry.parity is not None]
        order = list(dict.fromkeys(entry.manifest.precision.name for entry in entries))
        return tuple(sorted(entries, key=lambda entry: order.index(entry.manifest.precision.name)))

    @property
    def engines(self) -> tuple[Entry, ...]:
        """Engines, that of the smallest network first."""
        return tuple(entry for network in self.records.networks for entry in network.of_kind("engine"))

    @property
    def timed(self) -> frozenset[str]:
        """Files that a given benchmark has a row of."""
        return frozenset(row.name for given in self.benchmarks for row in given.content.rows)

    def to_dict(self, path: Path) -> dict[str, Any]:
        """Return what `--json` prints of a page written to `path`."""
        return {
            "html": str(path),
            "artifacts": len(self.records.entries),
            "corrupt": list(self.records.corrupt),
            "not_run": [gap.what for gap in self.gaps],
        }


def check_page(path: Path, *, force: bool) -> None:
    """Raise, before anything is read, what would keep the page from being written.

    Raises:
        MissingRequirementError: jinja2 or matplotlib is not installed.
        InputError: the path cannot hold a file.
        OutputExistsError: something else than such a page is there and `force` is not set.
    """
    require_packages("jinja2", "matplotlib")
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise InputError(f"{path} is {what}, where a file was expected, such as report.html.")
    if path.exists() and not force:
        with path.open("rb") as stream:
            if MARK.encode() not in stream.read(MARK_BYTES):
                raise OutputExistsError(
                    f"{path} exists and is no page of cnx-deploy report. Use --force to replace it, or another name."
                )


def gather(
    export_dir: Path,
    engines_dir: Path,
    *,
    bench: Sequence[Path] = (),
    headroom: Sequence[Path] = (),
    layers: Sequence[Path] = (),
    created: str | None = None,
) -> Page:
    """Read two folders of manifests, and what `bench`, `diagnose headroom` and `diagnose layers` printed with --json.

    Raises InputError for a document that is none; a manifest that cannot be read is a row of the page.
    """
    benchmarks, headrooms = tuple(map(read_benchmark, bench)), tuple(map(read_headroom, headroom))
    comparisons = tuple(map(read_layers, layers))
    records = read_records(export_dir, engines_dir)
    gpus = ", ".join(f"{gpu.name} ({gpu.target}), driver {gpu.driver}" for gpu in find_gpus())
    machine = {"Processor": f"{cpu_name()}, {cpu_count()} usable", "GPU": gpus or "none found"}
    compared = [comparison for given in comparisons for comparison in given.content]
    return Page(
        records=records,
        benchmarks=benchmarks,
        headrooms=headrooms,
        layers=comparisons,
        gaps=tuple(gaps(records, benchmarks, [given.content for given in headrooms], compared)),
        tiles=tiles(records, benchmarks),
        environment={**machine, **tool_versions()},
        created=created or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def render(page: Page) -> str:
    """Return the HTML: the same text for an equal page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cnx_deploy.report.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    drawings = {name: getattr(charts, name) for name in charts.__all__ if name.endswith("_chart")}
    return environment.get_template("page.html").render(page=page, mark=MARK, **drawings)


def write_page(path: Path, page: Page) -> None:
    """Write the page whole or not at all; InputError where nothing can be written."""
    write_text(path, render(page))


def corrupt_error(page: Page, path: Path) -> CorruptArtifactError | None:
    """Return what a command ends with once the page is written: manifests that could not be read; None without one."""
    corrupt = page.records.corrupt
    if not corrupt:
        return None
    return CorruptArtifactError(
        f"{len(corrupt)} of {len(corrupt) + len(page.records.entries)} manifests cannot be read, and {path} says so: "
        f"{', '.join(map(charts.printable, corrupt))}. Make them again with --force, or remove them."
    )


def _shown(value: Any) -> Any:
    """None is a dash, and text has what cannot be seen written out; anything else, markup included, is as it is."""
    if value is None:
        return "–"
    return charts.printable(value) if type(value) is str else value


def _notes(row: Timing) -> tuple[str, ...]:
    """A row's remarks, and what it was computed in where that differs: ONNX Runtime widens FP16 on a CPU."""
    widened = (f"its {row.precision} was computed in {row.arithmetic}",) if row.is_widened else ()
    return (*row.remarks, *widened)


def _conditions(environment: Conditions) -> dict[str, str]:
    """The machine and settings without which a latency means nothing."""
    isa = f" ({' '.join(environment.isa)})" if environment.isa else ""
    load = environment.load_average
    return {
        "Processor": f"{environment.cpu}{isa}, threads: {environment.threads}, processors: {environment.processors}",
        "GPU": ", ".join(gpu.name for gpu in environment.gpus) or "none",
        "System": environment.system,
        "Measured": f"{environment.duration_seconds:g} s a row, images of seed {environment.seed}",
        "Load before": "unknown" if load is None else f"{load:.2f}",
        "Versions": ", ".join(f"{name} {version}" for name, version in environment.tools.items()),
    }


def _known(form: Callable[..., str]) -> Callable[..., str | None]:
    return lambda value, *arguments: None if value is None else form(value, *arguments)


FILTERS: dict[str, Callable[..., Any]] = {
    "scientific": _known(lambda value: f"{value:.2e}"),
    "fixed": _known(lambda value, digits=2: f"{value:,.{digits}f}"),
    "percent": _known(charts.percent),
    "megabytes": _known(lambda value: f"{value / 1e6:,.1f} MB"),
    "count": _known(lambda value: f"{value:,}"),
    "notes": _notes,
    "conditions": _conditions,
    "short": lambda value: str(value)[:12],
    # 2026-11-25T02:22:01+00:00 is 2026-11-25 02:22 UTC; other text stays.
    "day": lambda text: f"{text[:10]} {text[11:16]} UTC" if len(text) == 25 and text.endswith("+00:00") else text,
}
"""How values become text. Each takes None for what is not known."""
