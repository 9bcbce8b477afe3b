"""What the page says first: four figures at its top, and everything that it has no result of.

A reader must not take an absent figure for a good one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cnx_deploy.bench.record import BenchmarkRecord
from cnx_deploy.core.image_size import size_text
from cnx_deploy.diagnosis.layer_record import LayerComparison
from cnx_deploy.report.html.charts import percent
from cnx_deploy.report.html.documents import Given, HeadroomDocument
from cnx_deploy.report.html.networks import Entry, Records

__all__ = ["Gap", "Tile", "gaps", "tiles"]


@dataclass(frozen=True, slots=True)
class Gap:
    """Something without a result: what, why and what is therefore unknown, and of which files, networks or modules."""

    what: str
    why: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure, what it is and what stands behind it. `tone`: "plain", "warn" or "bad"."""

    label: str
    figure: str
    detail: str
    tone: str = "plain"


def tiles(records: Records, benchmarks: Sequence[Given[BenchmarkRecord]]) -> tuple[Tile, ...]:
    """Four, always the same ones."""
    files, engines, networks = records.of_kind("onnx"), records.of_kind("engine"), records.networks
    unreadable = f", unreadable: {len(records.corrupt)}" if records.corrupt else ""
    unrun = len(_unrun(records, benchmarks))
    run = f"{len(engines) - unrun} of {len(engines)}"
    drawn = sum(network.is_random for network in networks)
    random = f"{drawn} of {len(networks)} networks: their predictions mean nothing" if drawn else "of no network"
    recorded = f"ONNX files: {len(files)}, engines: {len(engines)}{unreadable}"
    return (
        Tile("Artifacts", str(len(records.entries)), recorded, "bad" if unreadable else "plain"),
        _parity_tile(files),
        Tile("Engines run on a GPU", run, "by a benchmark", "plain" if unrun == 0 else "warn"),
        Tile("Random weights", str(drawn), random, "warn" if drawn else "plain"),
    )


def _parity_tile(files: Sequence[Entry]) -> Tile:
    label = "Parity, worst case"
    failed = [entry.manifest.stem for entry in files if entry.parity is not None and not entry.passed]
    if failed:
        return Tile(label, "FAIL", ", ".join(failed), "bad")
    judged = [(entry, limit) for entry in files if (limit := entry.nearest) is not None]
    if not judged:
        return Tile(label, "–", "nothing was compared", "warn")
    entry, limit = max(judged, key=lambda pair: pair[1].share)
    detail = f"of its gate: {entry.manifest.stem}, {limit.name} {limit.found:.2g} of {limit.limit:.2g}"
    return Tile(label, percent(limit.share), detail)


def gaps(
    records: Records,
    benchmarks: Sequence[Given[BenchmarkRecord]],
    headrooms: Sequence[HeadroomDocument],
    layers: Sequence[LayerComparison],
) -> Iterator[Gap]:
    """Yield everything that was not run, what matters most first."""
    unrun = _unrun(records, benchmarks)
    for reason, names in _by_reason((entry.run, entry.artifact.path.name) for entry in unrun):
        why = f"The manifest says “{reason}”. How exact and how fast an engine is on a GPU is unknown."
        yield Gap("Engines not run on a GPU", why, names)
    if not benchmarks:
        yield Gap("Nothing was timed", "This page was given no benchmark (cnx-deploy bench --json, then --bench).")
    for benchmark in benchmarks:
        for reason, names in _by_reason((row.reason, row.name) for row in benchmark.content.not_run):
            yield Gap(f"Candidates not timed in {benchmark.name}", f"The reason given: {reason}.", names)
    yield from _artifact_gaps(records)
    if not headrooms:
        why = "This page was given none (cnx-deploy diagnose headroom --json, then --headroom)."
        yield Gap("Headroom to FP16’s limits was not measured", why)
    for arithmetic, names in _by_reason((headroom.arithmetic, headroom.network.variant) for headroom in headrooms):
        yield Gap("Headroom was not measured on a GPU", f"Measured in {arithmetic}.", names)
    for comparison in layers:
        for backend in comparison.backends:
            if backend.not_run:
                yield Gap(f"{comparison.artifact} was not compared by layer on {backend.backend}", backend.not_run)
        if comparison.missing:
            why = f"First reason: {next(iter(comparison.missing.values()))}."
            yield Gap(f"Modules of {comparison.artifact} not compared", why, tuple(comparison.missing))


def _artifact_gaps(records: Records) -> Iterator[Gap]:
    files, networks = records.of_kind("onnx"), records.networks
    lacking = tuple(entry.artifact.path.name for entry in files if entry.parity is None)
    if lacking:
        yield Gap("ONNX files not compared with PyTorch", "The export was told --no-verify.", lacking)
    if any(entry.parity is not None and "emulator" in entry.parity.candidate for entry in files):
        why = "It rounds after every operator on a CPU. A compiler may fuse operators or accumulate otherwise."
        yield Gap("Half precision was judged by an emulator, not by a GPU", why)
    drawn = [network.model for network in networks if network.is_random]
    if drawn:
        why = "Predictions mean nothing, no accuracy follows, and only a trained network’s ranges count."
        names = tuple(f"{model.variant}, {size_text(model.image_size)} px" for model in drawn)
        yield Gap("Networks with random weights", why, names)
    if networks:
        yield Gap(
            "Accuracy was not measured", "No manifest holds a figure on labelled images (cnx-deploy verify --data)."
        )


def _unrun(records: Records, benchmarks: Sequence[Given[BenchmarkRecord]]) -> list[Entry]:
    """Engines that no given benchmark has a row of. A manifest is of the build; it never holds a run."""
    timed = {row.name for benchmark in benchmarks for row in benchmark.content.rows}
    return [entry for entry in records.of_kind("engine") if entry.artifact.path.name not in timed]


def _by_reason(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Put the names of one reason together, in order of appearance."""
    groups: dict[str, tuple[str, ...]] = {}
    for reason, name in pairs:
        groups[reason] = (*groups.get(reason, ()), name)
    return groups.items()
