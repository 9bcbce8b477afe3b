"""What a benchmark would measure, and what hardware allows: plans and bounds, none of them measured.

`bench --dry-run` prints a plan; measured rows on a known GPU are given as a share of its bound.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from cnx_deploy.bench.comparison import BenchRequest
from cnx_deploy.bench.devices import DEVICES, find_device
from cnx_deploy.bench.gpu import gpu_states
from cnx_deploy.bench.networks import network_facts, network_name, networks_of, precisions_of
from cnx_deploy.bench.peers import PEERS, place_of_peers
from cnx_deploy.bench.roofline import bound_of, table, work_of
from cnx_deploy.bench.timing import Timing
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.system import find_gpus

__all__ = ["Plan", "PlannedRow", "plan_of", "share_of_bound"]

NOT_MEASURED = "not measured"
PRECISIONS = {"float32": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
"""What runners call their arithmetic, in the roofline's words."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row of a benchmark that was not made; `missing` says what this machine lacks for it."""

    network: str
    name: str
    batch: int
    missing: str | None
    status: str = NOT_MEASURED


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows that would be measured, what the networks are, and FP16 bounds of data-centre and desktop GPUs."""

    rows: tuple[PlannedRow, ...]
    networks: dict[str, dict[str, Any]]
    roofline: tuple[dict[str, Any], ...]


def plan_of(artifacts: Sequence[Artifact], request: BenchRequest) -> Plan:
    """Say what `bench.comparison.bench_artifacts` would measure, without loading a weight.

    The bounds are at the largest batch: of this machine's GPU where it is known, else of all GPUs in the table.
    """
    groups = list(networks_of(artifacts))
    # The driver's tool gives a part of a divided GPU the name of the whole one.
    whole = [gpu.name for gpu in gpu_states() if gpu.mig != "Enabled"]
    own = [device for name in whole if (device := find_device(name)) is not None]
    bounds = [
        row
        for variant, size in dict.fromkeys(_shape(group[0]) for group in groups)
        for row in table([variant], own or DEVICES, precision="fp16", image_size=size, batch=max(request.batch_sizes))
    ]
    return Plan(
        tuple(row for group in groups for row in _planned(group, request)),
        {network_name(group[0]): network_facts(group) for group in groups},
        tuple(bounds),
    )


def share_of_bound(row: Timing, network: Mapping[str, Any]) -> dict[str, Any] | None:
    """Measured ÷ bound of a row on a GPU of the table, with the bound; None on other devices.

    The bytes are those of the compiled engine where it was inspected at this batch, else the fewest that are possible.
    """
    device, precision = find_device(row.device), PRECISIONS.get(row.arithmetic)
    if device is None or precision is None or (precision == "bf16" and not device.has_bf16):
        return None
    work = work_of(
        network["variant"], network["image_size"], cast(Literal["fp32", "fp16", "bf16"], precision),
        network["num_classes"],
    )  # fmt: skip
    compiled = network["files"].get(row.name, {}).get("compiled") or {}
    known = compiled.get("batch") == row.batch and compiled.get("megabytes_per_image")
    bound = bound_of(work, device, batch=row.batch, compiled_bytes=round(known * 1e6) if known else None)
    return {"measured_over_bound": bound.share_of(row.images_per_second), **bound.to_dict()}


def _planned(group: Sequence[Artifact], request: BenchRequest) -> Iterator[PlannedRow]:
    network = network_name(group[0])
    _, precision = place_of_peers(precisions_of(group))
    for batch in request.batch_sizes:
        for word in request.compare:
            installed = not word.startswith("timm") or importlib.util.find_spec("timm") is not None
            yield PlannedRow(
                network, PEERS[word].row_name(precision), batch, None if installed else "timm is not installed"
            )
        for artifact in group:
            smallest, _, largest = artifact.manifest.batch
            if smallest <= batch <= largest:
                missing = "no GPU" if artifact.manifest.kind == "engine" and not find_gpus() else None
                yield PlannedRow(network, artifact.path.name, batch, missing)


def _shape(artifact: Artifact) -> tuple[str, int]:
    return artifact.manifest.model.variant, artifact.manifest.model.image_size
