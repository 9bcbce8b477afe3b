"""The strip at the top of the page: how much is recorded, how near parity came to its gate, what was not run."""

from collections.abc import Sequence
from dataclasses import dataclass

from cnx_deploy.report.html.benchmark import Benchmark
from cnx_deploy.report.html.figures import percent
from cnx_deploy.report.html.manifests import Entry, Limit, Records
from cnx_deploy.report.html.networks import Network
from cnx_deploy.report.html.not_run import unrun_engines

__all__ = ["Tile", "tiles"]


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure, what it is and what stands behind it. `tone`: "plain", "warn" or "bad"."""

    label: str
    figure: str
    detail: str
    tone: str = "plain"


def tiles(records: Records, networks: Sequence[Network], benchmarks: Sequence[Benchmark]) -> tuple[Tile, ...]:
    """Four, always the same ones."""
    return (_artifacts(records), _parity(records), _unrun(records, benchmarks), _weights(networks))


def worst_parity(records: Records) -> tuple[Entry, Limit] | None:
    """The file that used most of a limit; None where none was judged."""
    judged = [(entry, entry.parity.nearest) for entry in records.entries if entry.parity is not None]
    known = [(entry, limit) for entry, limit in judged if limit is not None]
    return max(known, key=lambda pair: pair[1].share, default=None)


def _artifacts(records: Records) -> Tile:
    onnx, engines = len(records.of_kind("onnx")), len(records.of_kind("engine"))
    detail = f"{onnx} ONNX {'file' if onnx == 1 else 'files'}, {engines} {'engine' if engines == 1 else 'engines'}"
    if records.corrupt:
        return Tile("Artifacts", str(len(records.entries)), f"{detail}; {len(records.corrupt)} unreadable", "bad")
    return Tile("Artifacts", str(len(records.entries)), detail if records.entries else "nothing is recorded")


def _parity(records: Records) -> Tile:
    label = "Parity, worst case"
    failed = [entry for entry in records.entries if entry.parity is not None and not entry.parity.passed]
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        return Tile(label, "FAIL", f"{failed[0].stem}{more}", "bad")
    worst = worst_parity(records)
    if worst is None:
        return Tile(label, "–", "nothing was compared", "warn")
    entry, limit = worst
    detail = f"of its gate: {entry.stem}, {limit.name} {limit.found:.2g} of {limit.limit:.2g}"
    return Tile(label, percent(limit.share), detail)


def _unrun(records: Records, benchmarks: Sequence[Benchmark]) -> Tile:
    label, count = "Engines run", len(records.of_kind("engine"))
    if not count:
        return Tile(label, "–", "none is recorded", "warn")
    missing = len(unrun_engines(records, benchmarks))
    if not missing:
        return Tile(label, f"{count} of {count}", "each has a row of a benchmark")
    rest = f"{missing} {'was' if missing == 1 else 'were'} not run on a GPU"
    return Tile(label, f"{count - missing} of {count}", "none was run on a GPU" if missing == count else rest, "warn")


def _weights(networks: Sequence[Network]) -> Tile:
    drawn = sum(network.is_random for network in networks)
    if not networks:
        return Tile("Weights", "–", "no network")
    if drawn:
        detail = f"{drawn} of {len(networks)} networks: predictions mean nothing"
        return Tile("Weights", "random" if drawn == len(networks) else "some random", detail, "warn")
    return Tile(
        "Weights", str(len(networks)), f"{'network' if len(networks) == 1 else 'networks'}, none random", "good"
    )
