"""Whether a benchmark is slower than an earlier one, judged only where the two can be compared.

Best is the ratio to a peer that ran in turns with the file in both runs: it holds across machines. Without a common
peer images a second are compared, and only on the same machine. What was UNSTABLE is undecided, and said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.manifest import Positive
from cnx_deploy.core.strict_json import PositiveNumber, command_document, kind_of, typed

__all__ = ["SCHEMA_VERSION", "Verdict", "check_kind", "judge_against", "read_baseline", "refuse_incomparable"]

SCHEMA_VERSION = 3
READABLE_VERSIONS = (2, SCHEMA_VERSION)
"""Rows of version 2 had energy and the source of device memory besides, which nothing here reads."""

SAME_NETWORK = ("variant", "image_size", "num_classes", "input")

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One file at one batch against the baseline: "ok", "regression" or "undecided", and why where undecided.

    `before` and `now` are of `measure`: the ratio to the peer it names, or images a second. `change` is now ÷ before.
    """

    name: str
    batch: int
    verdict: str
    measure: str = ""
    before: float | None = None
    now: float | None = None
    change: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Machine:
    cpu: str
    processors: Positive
    threads: Positive
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Environment:
    machine: _Machine


@dataclass(frozen=True, slots=True)
class _Network:
    variant: str
    image_size: Positive
    num_classes: Positive
    input: str
    files: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _Ratio:
    peer: str
    ratio: PositiveNumber


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    network: str
    version: str
    batch: Positive
    status: Literal["OK", "UNSTABLE", "INVALID"]
    images_per_second: PositiveNumber
    ratios: tuple[_Ratio, ...]


@dataclass(frozen=True, slots=True)
class _Baseline:
    """What the gate reads of a benchmark; a document has more."""

    environment: _Environment
    networks: Mapping[str, _Network]
    rows: tuple[_Row, ...]


def read_baseline(path: Path) -> Document:
    """Read a document that `cnx-deploy bench --json` wrote; InputError on anything else."""
    document, _ = command_document(path, "cnx-deploy bench")
    try:
        check_kind(document)
        _check_rows(typed(document, _Baseline))
    except ValueError as error:
        raise InputError(f"{path} is no benchmark: {error}. Give what `cnx-deploy bench --json` printed.") from error
    return document


def check_kind(document: Document) -> None:
    """ValueError for what the command prints besides benchmarks, and for a benchmark of another version."""
    if "dry_run" in document:
        raise ValueError("it is a plan (--dry-run) that measured nothing")
    version = document.get("schema_version")
    if version not in READABLE_VERSIONS:
        raise ValueError(f"it has schema version {kind_of(version)}, expected {SCHEMA_VERSION}")


def judge_against(baseline: Document, current: Document, max_regress: float) -> list[Verdict]:
    """A verdict on each file's row of the baseline; `max_regress` 0.05 allows 5 % less. Peers are not judged.

    Raises InputError when a row has no peer in both runs and the machines differ.
    """
    now = {(row["name"], row["batch"]): row for row in current["rows"]}
    verdicts = []
    for before in baseline["rows"]:
        if before["name"] in baseline["networks"][before["network"]]["files"]:
            row = now.get((before["name"], before["batch"]))
            verdicts.append(_verdict(before, row, baseline, current, max_regress))
    return verdicts


def refuse_incomparable(baseline: Document, machine: Mapping[str, Any], peers: Sequence[str]) -> None:
    """Raise InputError before minutes are spent: another machine, and none of `peers` is in the baseline."""
    known = {
        ratio["peer"] for row in baseline["rows"] for ratio in row["ratios"] if _is_peer(ratio["peer"], row, baseline)
    }
    if not known.intersection(peers):
        _require_same_machine(baseline, machine)


def _check_rows(baseline: _Baseline) -> None:
    """What one field alone cannot tell: that rows are of listed networks, and that one of them can be judged."""
    for at, row in enumerate(baseline.rows):
        if row.network not in baseline.networks:
            raise ValueError(f"rows[{at}].network: {kind_of(row.network)} is none of its networks")
    if not any(row.name in baseline.networks[row.network].files for row in baseline.rows):
        raise ValueError("rows: there is none of a file, only of peers or none at all")


def _require_same_machine(baseline: Document, machine: Mapping[str, Any]) -> None:
    earlier = baseline["environment"]["machine"]
    if earlier != machine:
        raise InputError(
            f"No peer is in both runs, and they are from different machines ({_words(earlier)}; {_words(machine)}): "
            "images a second cannot be compared. Measure both with the same --compare, for example --compare torch."
        )


def _verdict(
    before: Document, now: Document | None, baseline: Document, current: Document, max_regress: float
) -> Verdict:
    name, batch = before["name"], before["batch"]
    reason = _undecidable(before, now, baseline, current)
    if reason or now is None:
        return Verdict(name, batch, "undecided", reason=reason)
    measure, earlier, later = _figures(before, now, baseline, current)
    change = later / earlier
    verdict = "regression" if change < 1.0 - max_regress else "ok"
    return Verdict(name, batch, verdict, measure, earlier, later, change)


def _undecidable(before: Document, now: Document | None, baseline: Document, current: Document) -> str:
    """Why a pair of rows cannot be judged, empty where it can."""
    if now is None:
        return "it was not measured now"
    for row, when in ((before, "in the baseline"), (now, "now")):
        if row["status"] != "OK":
            return f"it is {row['status']} {when}"
    networks = [document["networks"][row["network"]] for document, row in ((baseline, before), (current, now))]
    differing = [key for key in SAME_NETWORK if networks[0][key] != networks[1][key]]
    return f"another network: {', '.join(differing)} differ" if differing else ""


def _figures(before: Document, now: Document, baseline: Document, current: Document) -> tuple[str, float, float]:
    """What is compared, then and now: the ratio to the first common peer, else images a second."""
    ratios = {ratio["peer"]: ratio["ratio"] for ratio in now["ratios"] if _is_peer(ratio["peer"], now, current)}
    for ratio in before["ratios"]:
        if ratio["peer"] in ratios and _is_peer(ratio["peer"], before, baseline):
            versions = [_version(ratio["peer"], document) for document in (baseline, current)]
            changed = f" ({versions[1]}, was {versions[0]})" if versions[0] != versions[1] else ""
            return f"ratio to {ratio['peer']}{changed}", ratio["ratio"], ratios[ratio["peer"]]
    _require_same_machine(baseline, current["environment"]["machine"])
    return "images/s", before["images_per_second"], now["images_per_second"]


def _is_peer(name: str, row: Document, document: Document) -> bool:
    """Whether a ratio is to one of the peers of `--compare`, and not to another file of ours."""
    return name not in document["networks"][row["network"]]["files"]


def _version(peer: str, document: Document) -> str:
    """The release of the peer's backend: one that got faster itself looks like a regression of ours."""
    return next((str(row["version"]) for row in document["rows"] if row["name"] == peer), "unknown")


def _words(machine: Mapping[str, Any]) -> str:
    gpus: Sequence[str] = machine["gpus"]
    return ", ".join((f"{machine['cpu']} with {machine['threads']} threads", *gpus))
