"""The page: what was read, put together; the template rendered; the file written whole or not at all."""

import datetime
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy import __version__
from cnx_deploy.core.errors import CorruptArtifactError, InputError, MissingRequirementError, OutputExistsError
from cnx_deploy.core.files import write_text
from cnx_deploy.core.system import cpu_count, cpu_name, find_gpus, tool_versions
from cnx_deploy.report.html import figures
from cnx_deploy.report.html.benchmark import Benchmark, read_benchmark
from cnx_deploy.report.html.headroom import Headroom, read_headroom
from cnx_deploy.report.html.layers import Layers, read_layers
from cnx_deploy.report.html.manifests import Entry, Records, read_records
from cnx_deploy.report.html.networks import Network, ToolSet, networks_of, tool_sets
from cnx_deploy.report.html.not_run import Gap, gaps
from cnx_deploy.report.html.summary import Tile, tiles
from cnx_deploy.report.html.words import filters, printable

__all__ = ["MARK", "Page", "PageRequest", "check_page", "corrupt_error", "gather", "render", "write_page"]

MARK = '<meta name="generator" content="cnx-deploy report">'
"""By which a page of this command is known, within the first `MARK_BYTES`; anything else is not replaced."""
MARK_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRequest:
    """What `cnx-deploy report --html` takes: two folders of manifests, and documents that other commands printed."""

    export_dir: Path = Path("export")
    engines_dir: Path = Path("engines")
    bench: tuple[Path, ...] = ()
    headroom: tuple[Path, ...] = ()
    layers: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything a page says. `created` is UTC in seconds, `environment` the machine that made the page."""

    records: Records
    networks: tuple[Network, ...]
    tool_sets: tuple[ToolSet, ...]
    benchmarks: tuple[Benchmark, ...]
    headrooms: tuple[Headroom, ...]
    layers: tuple[Layers, ...]
    gaps: tuple[Gap, ...]
    tiles: tuple[Tile, ...]
    environment: tuple[tuple[str, str], ...]
    created: str
    version: str = __version__

    @property
    def compared(self) -> tuple[Entry, ...]:
        """Files that were compared with PyTorch: each precision together, within it the smallest network first."""
        found = [entry for network in self.networks for entry in network.entries if entry.parity is not None]
        order = list(dict.fromkeys(entry.precision for entry in found))
        return tuple(sorted(found, key=lambda entry: order.index(entry.precision)))

    @property
    def engines(self) -> tuple[Entry, ...]:
        """Engines, that of the smallest network first."""
        return tuple(entry for network in self.networks for entry in network.of_kind("engine"))

    @property
    def compiled(self) -> tuple[Entry, ...]:
        """Engines whose kernels are recorded."""
        return tuple(entry for entry in self.engines if entry.compiled is not None)

    @property
    def timed(self) -> frozenset[str]:
        """Files that a given benchmark has a row of."""
        return frozenset(row.name for benchmark in self.benchmarks for row in benchmark.rows)

    def to_dict(self, path: Path) -> dict[str, Any]:
        """What `--json` prints of a page written to `path`."""
        return {
            "html": str(path),
            "artifacts": len(self.records.entries),
            "corrupt": [each.name for each in self.records.corrupt],
            "not_run": [gap.what for gap in self.gaps],
        }


def check_page(path: Path, *, force: bool) -> None:
    """Raise, before anything is read, what would keep the page from being written.

    MissingRequirementError without jinja2, InputError for a path that cannot hold a file, OutputExistsError where
    something else than such a page is and `force` is not set.
    """
    try:
        missing = importlib.util.find_spec("jinja2") is None
    except ValueError:  # a module that was taken out of sys.modules by hand
        missing = True
    if missing:
        raise MissingRequirementError(
            "jinja2 is not installed, which renders the page. Install it with pip install 'cnx-deploy[report]'."
        )
    if path.is_dir():
        raise InputError(
            f"{path} is a folder, where a file was expected. Give a file name, such as {path / 'report.html'}."
        )
    if path.exists() and not path.is_file():
        raise InputError(
            f"{path} is a device or a pipe, where a file was expected. Give a file name, such as report.html."
        )
    if path.exists() and not force and MARK.encode() not in _beginning(path):
        raise OutputExistsError(
            f"{path} exists and is no page of cnx-deploy report. Use --force to replace it, or another name."
        )


def gather(request: PageRequest, created: str | None = None) -> Page:
    """Read everything. Raises InputError for a document that is none; a manifest that cannot be read is a row."""
    benchmarks = tuple(map(read_benchmark, request.bench))
    headrooms = tuple(map(read_headroom, request.headroom))
    layers = tuple(found for path in request.layers for found in read_layers(path))
    records = read_records(request.export_dir, request.engines_dir)
    sets = tool_sets(records)
    networks = networks_of(records, sets)
    return Page(
        records=records,
        networks=networks,
        tool_sets=sets,
        benchmarks=benchmarks,
        headrooms=headrooms,
        layers=layers,
        gaps=gaps(records, networks, benchmarks, headrooms, layers),
        tiles=tiles(records, networks, benchmarks),
        environment=_environment(),
        created=created or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def render(page: Page) -> str:
    """The HTML: the same text for an equal page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cnx_deploy.report.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters())
    charts = {name: getattr(figures, name) for name in figures.__all__}
    return environment.get_template("page.html").render(page=page, mark=MARK, **charts)


def write_page(path: Path, html: str) -> Path:
    """Write the page whole or not at all; InputError where nothing can be written."""
    write_text(path, html)
    return path


def corrupt_error(page: Page, path: Path) -> CorruptArtifactError | None:
    """What a command ends with once the page is written: manifests that could not be read; None without one."""
    corrupt = page.records.corrupt
    if not corrupt:
        return None
    names = ", ".join(printable(each.name) for each in corrupt)
    return CorruptArtifactError(
        f"{len(corrupt)} of {len(corrupt) + len(page.records.entries)} manifests cannot be read, and {path} says so: "
        f"{names}. Make them again with --force, or remove them."
    )


def _beginning(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(MARK_BYTES)


def _environment() -> tuple[tuple[str, str], ...]:
    gpus = ", ".join(f"{gpu.name} ({gpu.target}), driver {gpu.driver}" for gpu in find_gpus())
    machine = (("Processor", f"{cpu_name()}, {cpu_count()} usable"), ("GPU", gpus or "none found"))
    return (*machine, *tool_versions().items())
