"""The recorded data behind docs/performance.md: read and put side by side, never filled in."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnx_deploy.bench.roofline import work_of
from cnx_deploy.bench.statistics import Ratio
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.strict_json import bounded_content, strict_json

__all__ = [
    "BASELINE", "GROWTHS", "OURS", "PEERS", "WHOLE_BATCHES", "Comparison", "Document", "Speed", "comparisons", "growth",
    "read_document", "shared_condition", "source_of", "speeds",
]  # fmt: skip

Document = dict[str, Any]
"""One file of docs/data."""

OURS = "cnx-deploy"
PEERS = ("timm", "transformers")
BASELINE = "timm.onnx fp32"
"""The row of a CPU benchmark that the others are compared with: timm's graph, run as our files are."""

WHOLE_BATCHES = "timm.onnx whole batch fp32"
"""The same graph as ONNX Runtime runs it by itself."""

GROWTHS = {
    "export_seconds": "export time",
    "build_seconds": "build time",
    "export_peak_mib": "export memory",
    "build_peak_mib": "build memory",
}
"""Columns of cost.json that grow with the parameters, in words."""

FEWEST_TO_FIT = 3


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows of one variant, image size (pixels), target and batch, by graph: ours and the peers'."""

    variant: str
    image_size: int
    target: str
    batch: int
    graphs: dict[str, Document]

    def megabytes(self, graph: str) -> float | None:
        """Megabytes (1e6) that one image moves in a graph; None where it was not compiled."""
        return self.graphs[graph]["megabytes_per_image"] if graph in self.graphs else None

    @property
    def best_peer(self) -> float | None:
        """Megabytes an image of the peer that moves least; None without a peer."""
        return min((self.graphs[peer]["megabytes_per_image"] for peer in PEERS if peer in self.graphs), default=None)

    def share(self, megabytes: float | None) -> float | None:
        """Megabytes an image over the best peer's; None where either is missing."""
        return megabytes / self.best_peer if megabytes is not None and self.best_peer is not None else None

    @property
    def ratio(self) -> float | None:
        """Ours over the best peer's, below 1 where ours moves less."""
        return self.share(self.megabytes(OURS))

    @property
    def floor(self) -> float:
        """The fewest megabytes an image: blocks fused as far as GRN allows, weights read once a batch (`roofline`)."""
        work = work_of(self.variant, self.image_size, "fp16")
        return (work.fused_bytes + work.weight_bytes / self.batch) / 1e6


@dataclass(frozen=True, slots=True)
class Speed:
    """One row of a CPU benchmark. `kind`: what was timed, such as "ours fp16" or "torch eager fp32".

    `ratio`: how many times as fast as `BASELINE` in the same run, with its interval; None for that row itself.
    `whole_ratio`: the same over `WHOLE_BATCHES`.
    """

    variant: str
    image_size: int
    batch: int
    name: str
    kind: str
    images_per_second: float
    ratio: Ratio | None
    whole_ratio: Ratio | None
    status: str

    @property
    def is_ours(self) -> bool:
        """A file of ours, not a peer."""
        return self.name.endswith(".onnx")


def read_document(path: Path) -> Any:
    """A data file's content, None where there is no such file. Raises InputError for one that is not JSON."""
    if not path.is_file():
        return None
    try:
        return strict_json(bounded_content(path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}). Record it again with the command on the page.") from error


def comparisons(document: Document) -> list[Comparison]:
    """The rows of a traffic file, those of one condition together, in the order they come in."""
    found: dict[tuple[str, int, str, int], dict[str, Document]] = {}
    for row in document["rows"]:
        condition = (row["variant"], row["image_size"], row["target"], row["batch"])
        found.setdefault(condition, {})[row["graph"]] = row
    return [Comparison(*condition, graphs) for condition, graphs in found.items()]


def shared_condition(found: Sequence[Comparison]) -> str:
    """The target, batch and image size of all rows, in words. Raises InputError where they are not the same."""
    conditions = {f"{each.target}, batch {each.batch}, {each.image_size} px" for each in found}
    if len(conditions) != 1:
        raise InputError(f"traffic.json compares variants under one condition, not under {sorted(conditions)}.")
    return conditions.pop()


def speeds(document: Document) -> list[Speed]:
    """The rows of a benchmark (`cnx-deploy bench --json`, schema 2), in the order they come in."""
    return list(_speeds(document))


def growth(rows: Sequence[Document], column: str) -> float | None:
    """The exponent b of `column` = a · parameters^b, least squares on logarithms; None for fewer than three rows."""
    points = [(row["parameters"], row[column]) for row in rows if row[column] is not None]
    if len(points) < FEWEST_TO_FIT:
        return None
    parameters, values = zip(*points, strict=True)
    return float(np.polyfit([math.log(count) for count in parameters], [math.log(value) for value in values], 1)[0])


def source_of(document: Document, command: str) -> tuple[str, str]:
    """The command and the day of a data file; `command` is for a file that does not keep its own, a benchmark's."""
    date = document["date"] if "date" in document else document["environment"]["date"]
    return document.get("command", command), date[:10]


def _speeds(document: Document) -> Iterator[Speed]:
    for row in document["rows"]:
        network = document["networks"][row["network"]]
        yield Speed(
            variant=network["variant"],
            image_size=network["image_size"],
            batch=row["batch"],
            name=row["name"],
            kind=_kind(row["name"], network),
            images_per_second=row["images_per_second"],
            ratio=_ratio_over(BASELINE, row),
            whole_ratio=_ratio_over(WHOLE_BATCHES, row),
            status=row["status"],
        )


def _ratio_over(peer: str, row: Document) -> Ratio | None:
    return next((Ratio(**ratio) for ratio in row["ratios"] if ratio["peer"] == peer), None)


def _kind(name: str, network: Document) -> str:
    """`atto-224-fp16.onnx` -> ours fp16, `atto-cpu-224-fp16.onnx` -> ours cpu fp16; a peer's name is its kind."""
    if not name.endswith(".onnx"):
        return name
    known = (network["variant"], str(network["image_size"]))
    return " ".join(["ours", *(word for word in name.removesuffix(".onnx").split("-") if word not in known)])
