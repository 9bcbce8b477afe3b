"""What the page has no result of, in words: a reader must not take an absent figure for a good one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cnx_deploy.report.html.benchmark import Benchmark
from cnx_deploy.report.html.headroom import Headroom
from cnx_deploy.report.html.layers import Layers
from cnx_deploy.report.html.manifests import Entry, Records
from cnx_deploy.report.html.networks import Network

__all__ = ["Gap", "gaps", "unrun_engines"]


@dataclass(frozen=True, slots=True)
class Gap:
    """Something without a result: what, why and what is therefore unknown, and which files where there are several."""

    what: str
    why: str
    names: tuple[str, ...] = ()


def gaps(
    records: Records,
    networks: Sequence[Network],
    benchmarks: Sequence[Benchmark],
    headrooms: Sequence[Headroom],
    layers: Sequence[Layers],
) -> tuple[Gap, ...]:
    """Everything that was not run, what matters most first."""
    return (
        *_engines(unrun_engines(records, benchmarks)),
        *_timing(benchmarks),
        *_parity(records.of_kind("onnx")),
        *_weights(networks),
        *_headroom(headrooms),
        *_layers(layers),
    )


def unrun_engines(records: Records, benchmarks: Sequence[Benchmark]) -> tuple[Entry, ...]:
    """Engines that no given benchmark has a row of. A manifest is of the build; it never holds a run."""
    timed = {row.name for benchmark in benchmarks for row in benchmark.rows}
    return tuple(entry for entry in records.of_kind("engine") if entry.file not in timed)


def _engines(unrun: Sequence[Entry]) -> Iterator[Gap]:
    reasons: dict[str, list[str]] = {}
    for entry in unrun:
        reasons.setdefault(entry.run or "no run is recorded", []).append(entry.file)
    for reason, files in reasons.items():
        why = f"The manifest says “{reason}”. How exact and how fast it is on a GPU is unknown."
        if len(files) > 1:
            why = f"Their manifests say “{reason}”. How exact and how fast they are on a GPU is unknown."
        yield Gap(f"{_counted(len(files), 'engine was', 'engines were')} not run on a GPU", why, tuple(files))


def _timing(benchmarks: Sequence[Benchmark]) -> Iterator[Gap]:
    if not benchmarks:
        yield Gap("Nothing was timed", "This page was given no benchmark (cnx-deploy bench --json, then --bench).")
    for benchmark in benchmarks:
        reasons: dict[str, list[str]] = {}
        for missing in benchmark.not_run:
            reasons.setdefault(missing.reason, []).append(missing.name)
        for reason, names in reasons.items():
            what = _counted(len(names), "candidate was", "candidates were")
            yield Gap(f"{what} not timed in {benchmark.source.name}", f"The reason given: {reason}.", tuple(names))


def _parity(files: Sequence[Entry]) -> Iterator[Gap]:
    lacking = tuple(entry.file for entry in files if entry.parity is None)
    if lacking:
        what = _counted(len(lacking), "ONNX file was", "ONNX files were")
        yield Gap(f"{what} not compared with PyTorch", "The export was told --no-verify.", lacking)
    if any(entry.parity is not None and "emulator" in entry.parity.candidate for entry in files):
        why = "It rounds after every operator on a CPU. A compiler may fuse operators or accumulate otherwise."
        yield Gap("Half precision was judged by an emulator, not by a GPU", why)


def _weights(networks: Sequence[Network]) -> Iterator[Gap]:
    drawn = tuple(f"{network.variant}, {network.image_size} px" for network in networks if network.is_random)
    if drawn:
        what = (
            "All networks have" if len(drawn) == len(networks) else _counted(len(drawn), "network has", "networks have")
        )
        what = "The network has" if len(networks) == 1 else what
        why = "Predictions mean nothing, no accuracy follows, and only a trained network’s ranges count."
        yield Gap(f"{what} random weights", why, () if len(drawn) == len(networks) else drawn)
    if networks:
        yield Gap(
            "Accuracy was not measured", "No manifest holds a figure on labelled images (cnx-deploy verify --data)."
        )


def _headroom(headrooms: Sequence[Headroom]) -> Iterator[Gap]:
    if not headrooms:
        why = "This page was given none (cnx-deploy diagnose headroom --json, then --headroom)."
        yield Gap("Headroom to FP16’s limits was not measured", why)
    for arithmetic in dict.fromkeys(headroom.arithmetic for headroom in headrooms):
        names = tuple(headroom.variant for headroom in headrooms if headroom.arithmetic == arithmetic)
        yield Gap("Headroom was not measured on a GPU", f"Measured in {arithmetic}.", names if len(names) > 1 else ())


def _layers(comparisons: Sequence[Layers]) -> Iterator[Gap]:
    for comparison in comparisons:
        for side in comparison.sides:
            if side.not_run:
                yield Gap(f"{comparison.artifact} was not compared by layer on {side.name}", side.not_run)
        if comparison.missing:
            what = _counted(len(comparison.missing), "module", "modules")
            why = f"First reason: {comparison.missing[0][1]}."
            yield Gap(
                f"{what} of {comparison.artifact} not compared", why, tuple(name for name, _ in comparison.missing)
            )


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
