"""What the page says first: four figures at its top, and everything that it has no result of.

A reader must not take an absent figure for a good one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cnx_deploy.bench.record import BenchmarkRecord
from cnx_deploy.report.html.charts import percent
from cnx_deploy.report.html.documents import Given, HeadroomDocument, LayersDocument
from cnx_deploy.report.html.networks import Entry, Network, Records

__all__ = ["Gap", "Tile", "gaps", "tiles"]


@dataclass(frozen=True, slots=True)
class Gap:
    """Something without a result: what, why and what is therefore unknown, and which files where there are several."""

    what: str
    why: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure, what it is and what stands behind it. `tone`: "plain", "good", "warn" or "bad"."""

    label: str
    figure: str
    detail: str
    tone: str = "plain"


def tiles(records: Records, benchmarks: Sequence[Given[BenchmarkRecord]]) -> tuple[Tile, ...]:
    """Four, always the same ones."""
    return (
        _artifacts_tile(records), _parity_tile(records), _engines_tile(records, benchmarks),
        _weights_tile(records.networks),
    )  # fmt: skip


def gaps(
    records: Records,
    benchmarks: Sequence[Given[BenchmarkRecord]],
    headrooms: Sequence[HeadroomDocument],
    layers: Sequence[LayersDocument],
) -> tuple[Gap, ...]:
    """Everything that was not run, what matters most first."""
    return (
        *_engine_gaps(_unrun(records, benchmarks)),
        *_timing_gaps(benchmarks),
        *_parity_gaps(records.of_kind("onnx")),
        *_weights_gaps(records.networks),
        *_headroom_gaps(headrooms),
        *_layers_gaps(layers),
    )


def _unrun(records: Records, benchmarks: Sequence[Given[BenchmarkRecord]]) -> tuple[Entry, ...]:
    """Engines that no given benchmark has a row of. A manifest is of the build; it never holds a run."""
    timed = {row.name for benchmark in benchmarks for row in benchmark.content.rows}
    return tuple(entry for entry in records.of_kind("engine") if entry.artifact.path.name not in timed)


def _engine_gaps(unrun: Sequence[Entry]) -> Iterator[Gap]:
    for reason, files in _grouped((entry.run, entry.artifact.path.name) for entry in unrun).items():
        why = f"The manifest says “{reason}”. How exact and how fast it is on a GPU is unknown."
        if len(files) > 1:
            why = f"Their manifests say “{reason}”. How exact and how fast they are on a GPU is unknown."
        yield Gap(f"{_counted(files, 'engine was', 'engines were')} not run on a GPU", why, files)


def _timing_gaps(benchmarks: Sequence[Given[BenchmarkRecord]]) -> Iterator[Gap]:
    if not benchmarks:
        yield Gap("Nothing was timed", "This page was given no benchmark (cnx-deploy bench --json, then --bench).")
    for benchmark in benchmarks:
        for reason, names in _grouped((row.reason, row.name) for row in benchmark.content.not_run).items():
            what = _counted(names, "candidate was", "candidates were")
            yield Gap(f"{what} not timed in {benchmark.name}", f"The reason given: {reason}.", names)


def _parity_gaps(files: Sequence[Entry]) -> Iterator[Gap]:
    lacking = tuple(entry.artifact.path.name for entry in files if entry.parity is None)
    if lacking:
        what = _counted(lacking, "ONNX file was", "ONNX files were")
        yield Gap(f"{what} not compared with PyTorch", "The export was told --no-verify.", lacking)
    if any(entry.parity is not None and "emulator" in entry.parity.candidate for entry in files):
        why = "It rounds after every operator on a CPU. A compiler may fuse operators or accumulate otherwise."
        yield Gap("Half precision was judged by an emulator, not by a GPU", why)


def _weights_gaps(networks: Sequence[Network]) -> Iterator[Gap]:
    models = [network.model for network in networks if network.is_random]
    drawn = tuple(f"{model.variant}, {model.image_size} px" for model in models)
    if drawn:
        what = _counted(drawn, "network has", "networks have")
        if len(drawn) == len(networks):
            what = "The network has" if len(drawn) == 1 else "All networks have"
        why = "Predictions mean nothing, no accuracy follows, and only a trained network’s ranges count."
        yield Gap(f"{what} random weights", why, () if len(drawn) == len(networks) else drawn)
    if networks:
        why = "No manifest holds a figure on labelled images (cnx-deploy verify --data)."
        yield Gap("Accuracy was not measured", why)


def _headroom_gaps(headrooms: Sequence[HeadroomDocument]) -> Iterator[Gap]:
    if not headrooms:
        why = "This page was given none (cnx-deploy diagnose headroom --json, then --headroom)."
        yield Gap("Headroom to FP16’s limits was not measured", why)
    for arithmetic, names in _grouped((each.arithmetic, each.network.variant) for each in headrooms).items():
        yield Gap("Headroom was not measured on a GPU", f"Measured in {arithmetic}.", names if len(names) > 1 else ())


def _layers_gaps(comparisons: Sequence[LayersDocument]) -> Iterator[Gap]:
    for comparison in comparisons:
        for backend in comparison.backends:
            if backend.not_run:
                yield Gap(f"{comparison.artifact} was not compared by layer on {backend.backend}", backend.not_run)
        if comparison.missing:
            names = tuple(comparison.missing)
            what = f"{_counted(names, 'module', 'modules')} of {comparison.artifact} not compared"
            yield Gap(what, f"First reason: {comparison.missing[names[0]]}.", names)


def _artifacts_tile(records: Records) -> Tile:
    onnx, engines = records.of_kind("onnx"), records.of_kind("engine")
    detail = f"{_counted(onnx, 'ONNX file', 'ONNX files')}, {_counted(engines, 'engine', 'engines')}"
    if records.corrupt:
        return Tile("Artifacts", str(len(records.entries)), f"{detail}; {len(records.corrupt)} unreadable", "bad")
    return Tile("Artifacts", str(len(records.entries)), detail if records.entries else "nothing is recorded")


def _parity_tile(records: Records) -> Tile:
    label = "Parity, worst case"
    failed = [entry for entry in records.entries if entry.parity is not None and not entry.passed]
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        return Tile(label, "FAIL", f"{failed[0].manifest.stem}{more}", "bad")
    judged = [(entry, limit) for entry in records.entries if (limit := entry.nearest) is not None]
    if not judged:
        return Tile(label, "–", "nothing was compared", "warn")
    entry, limit = max(judged, key=lambda pair: pair[1].share)
    detail = f"of its gate: {entry.manifest.stem}, {limit.name} {limit.found:.2g} of {limit.limit:.2g}"
    return Tile(label, percent(limit.share), detail)


def _engines_tile(records: Records, benchmarks: Sequence[Given[BenchmarkRecord]]) -> Tile:
    label, count = "Engines run", len(records.of_kind("engine"))
    if not count:
        return Tile(label, "–", "none is recorded", "warn")
    missing = len(_unrun(records, benchmarks))
    if not missing:
        return Tile(label, f"{count} of {count}", "each has a row of a benchmark")
    rest = f"{missing} {'was' if missing == 1 else 'were'} not run on a GPU"
    return Tile(label, f"{count - missing} of {count}", "none was run on a GPU" if missing == count else rest, "warn")


def _weights_tile(networks: Sequence[Network]) -> Tile:
    drawn = sum(network.is_random for network in networks)
    if not networks:
        return Tile("Weights", "–", "no network")
    if drawn:
        detail = f"{drawn} of {len(networks)} networks: predictions mean nothing"
        return Tile("Weights", "random" if drawn == len(networks) else "some random", detail, "warn")
    detail = f"{'network' if len(networks) == 1 else 'networks'}, none random"
    return Tile("Weights", str(len(networks)), detail, "good")


def _grouped(pairs: Iterator[tuple[str, str]]) -> Mapping[str, tuple[str, ...]]:
    """Put the names of one reason together, in order of appearance."""
    groups: dict[str, tuple[str, ...]] = {}
    for reason, name in pairs:
        groups[reason] = (*groups.get(reason, ()), name)
    return groups


def _counted(things: Sequence[object], one: str, many: str) -> str:
    return f"{len(things)} {one if len(things) == 1 else many}"
