"""What the records in docs/data have to hold for the page: the fields that are read, their types and ranges."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from cnx_deploy.core.manifest import Positive
from cnx_deploy.core.strict_json import typed
from performance_page.data import BASELINE, OURS, PEERS

__all__ = ["check_form"]

Figure = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
Day = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\d")]
Target = Annotated[str, msgspec.Meta(pattern=r"^sm[0-9]{2,3}$(?!\n)")]
Versions = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Graph:
    variant: str
    image_size: Positive
    target: Target
    batch: Positive
    graph: str
    kernels: Positive
    megabytes_per_image: Figure


@dataclass(frozen=True, slots=True)
class Traffic:
    date: Day
    command: str
    tools: Versions
    rows: Annotated[tuple[Graph, ...], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class Grown:
    variant: str
    parameters: Positive
    export_seconds: Figure | None
    export_peak_mib: Figure | None
    build_seconds: Figure | None
    build_peak_mib: Figure | None
    onnx_megabytes: Figure | None
    engine_megabytes: Figure | None


@dataclass(frozen=True, slots=True)
class Cost:
    date: Day
    command: str
    tools: Versions
    machine: str
    targets: tuple[str, ...]
    help_seconds: Figure
    rows: Annotated[tuple[Grown, ...], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class Ratio:
    peer: str
    ratio: Figure
    low: Figure
    high: Figure


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    network: str
    batch: Positive
    images_per_second: Figure
    status: str
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True, slots=True)
class Network:
    variant: str
    image_size: Positive


@dataclass(frozen=True, slots=True)
class Environment:
    date: Day
    commit: str | None
    cpu: str
    isa: tuple[str, ...]
    processors: Positive
    threads: Positive
    duration_seconds: Figure
    tools: Versions


@dataclass(frozen=True, slots=True)
class NotRun:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Speeds:
    environment: Environment
    networks: Mapping[str, Network]
    rows: Annotated[tuple[Row, ...], msgspec.Meta(min_length=1)]
    not_run: tuple[NotRun, ...]
    warnings: tuple[str, ...]


FORMS: dict[str, Any] = {"traffic": Traffic, "traffic-targets": Traffic, "cost": Cost, "cpu": Speeds}


def check_form(name: str, document: Any) -> None:
    """Raise ValueError, with the field's path, where docs/data/<name>.json is not what its section reads."""
    found = typed(document, FORMS[name])
    if isinstance(found, Speeds):
        _check_speeds(found)
    if isinstance(found, Traffic):
        graphs = {(row.variant, row.image_size, row.target, row.batch, row.graph) for row in found.rows}
        if not any((*row[:4], peer) in graphs for row in graphs if row[4] == OURS for peer in PEERS):
            raise ValueError(f"rows: nothing to compare, none of {OURS} beside one of {' or '.join(PEERS)}")


def _check_speeds(found: Speeds) -> None:
    for at, row in enumerate(found.rows):
        if row.network not in found.networks:
            raise ValueError(f"rows[{at}].network: {row.network!r:.60} is none of its networks")
    if not any(ratio.peer == BASELINE for row in found.rows for ratio in row.ratios):
        raise ValueError(f"rows: there is none with a ratio to {BASELINE}")
