"""The document of `cnx-deploy diagnose headroom --json` as a page needs it."""

from dataclasses import dataclass
from pathlib import Path

from cnx_deploy.core.errors import InputError
from cnx_deploy.report.html.fields import Fields, Source, read_document

__all__ = ["Headroom", "Reach", "Stretch", "read_headroom"]

COMMAND = "cnx-deploy diagnose headroom"
SCHEMA_VERSION = 1
"""That of `diagnosis.headroom`; a test compares. It is not imported, for that loads torch."""


@dataclass(frozen=True, slots=True)
class Reach:
    """The worst of one kind in a stage or block: of which module, and what share of 65504. None: not finite."""

    module: str
    figure: float | None
    share: float | None


@dataclass(frozen=True, slots=True)
class Stretch:
    """One stage or block. `stored`: what the FP16 file stores. The others: what a naive export would keep in FP16.

    `sums` are GRN's sums of squares, `squares` LayerNorm's largest deviations, whose square is the share.
    """

    name: str
    stored: Reach | None
    sums: Reach | None
    squares: Reach | None


@dataclass(frozen=True, slots=True)
class Headroom:
    """What was found of one network on some images."""

    source: Source
    variant: str
    weights: str
    images: str
    arithmetic: str
    limit: float
    margin: float
    passed: bool
    failing: tuple[str, ...]
    keep_fp32: tuple[str, ...]
    naive_passed: bool
    naive_failing: tuple[str, ...]
    naive_size: int | None
    stages: tuple[Stretch, ...]
    blocks: tuple[Stretch, ...]


def read_headroom(path: Path) -> Headroom:
    """Read a document of headroom; InputError for anything else."""
    source, fields = read_document(path, COMMAND)
    try:
        return _headroom(source, fields)
    except ValueError as error:
        raise InputError(f"{path} is no headroom: {error}. Give what `{COMMAND} --json` printed.") from error


def _headroom(source: Source, fields: Fields) -> Headroom:
    if (version := fields.integer("schema_version")) != SCHEMA_VERSION:
        raise ValueError(f"it has schema version {version}, expected {SCHEMA_VERSION}")
    network, images, naive = (fields.child(key) for key in ("network", "images", "naive"))
    weights, count = network.child("weights"), images.integer("count")
    return Headroom(
        source=source,
        variant=network.text("variant"),
        weights=f"{weights.text('origin')} {weights.text('reference')}",
        images=f"{count} image{'' if count == 1 else 's'} of {images.integer('size')} px ({images.text('source')})",
        arithmetic=fields.text("arithmetic"),
        limit=fields.positive("limit"),
        margin=fields.positive("margin"),
        passed=fields.flag("passed"),
        failing=fields.texts("failing"),
        keep_fp32=fields.texts("keep_fp32"),
        naive_passed=naive.flag("passed"),
        naive_failing=naive.texts("failing"),
        naive_size=naive.maybe_integer("largest_image_size"),
        stages=tuple(map(_stretch, fields.children("stages"))),
        blocks=tuple(map(_stretch, fields.children("blocks"))),
    )


def _stretch(fields: Fields) -> Stretch:
    kinds = {"stored": "largest", "response": "square_sum", "norm": "deviation"}
    found = [(fields.maybe_child(kind), figure) for kind, figure in kinds.items()]
    reached = (
        Reach(each.text("module"), each.maybe_number(figure), each.maybe_number("share")) if each else None
        for each, figure in found
    )
    return Stretch(fields.text("name"), *reached)
