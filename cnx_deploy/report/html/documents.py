"""What `bench`, `diagnose headroom` and `diagnose layers` print with --json, read as the types that the page relies on.

A figure is None where the document has null: JSON has no NaN, so null is what a measurement that is not finite became.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec

from cnx_deploy.bench.record import BenchmarkRecord
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import ImageSize
from cnx_deploy.core.manifest import Count
from cnx_deploy.core.strict_json import Finite, PositiveNumber, command_document, typed
from cnx_deploy.diagnosis.layer_record import LayerComparison, comparisons_in

__all__ = ["Given", "HeadroomDocument", "Range", "RangeSummary", "read_benchmark", "read_headroom", "read_layers"]

Document = TypeVar("Document")


@dataclass(frozen=True, slots=True)
class Given(Generic[Document]):
    """A document with the name of its file and the hash of the file's bytes."""

    name: str
    sha256: str
    content: Document


class Range(msgspec.Struct, frozen=True):
    """The worst of one kind in a stage or block; `share` is of 65504. The figure's name depends on the kind."""

    module: str
    share: Finite | None
    largest: Finite | None = None
    square_sum: Finite | None = None
    deviation: Finite | None = None

    @property
    def figure(self) -> float | None:
        """The figure behind the share."""
        return next((value for value in (self.largest, self.square_sum, self.deviation) if value is not None), None)


class RangeSummary(msgspec.Struct, frozen=True):
    """One stage or block: what the FP16 file stores, and what a naive export would keep in FP16.

    `response` is GRN's sum of squares, `norm` LayerNorm's largest deviation, whose square is the share.
    """

    name: str
    stored: Range | None
    response: Range | None
    norm: Range | None


class _WeightsName(msgspec.Struct, frozen=True):
    origin: str
    reference: str


class _MeasuredNetwork(msgspec.Struct, frozen=True):
    variant: str
    weights: _WeightsName


class _MeasuredImages(msgspec.Struct, frozen=True):
    source: str
    count: Count
    size: ImageSize


class NaiveForm(msgspec.Struct, frozen=True):
    """What a plain half-precision export would lack; `largest_image_size` in pixels, None where nothing limits it."""

    passed: bool
    failing: tuple[str, ...]
    largest_image_size: Count | None


class HeadroomDocument(msgspec.Struct, frozen=True):
    """How far a network is from the limits of FP16."""

    schema_version: Literal[1]
    network: _MeasuredNetwork
    images: _MeasuredImages
    arithmetic: str
    limit: PositiveNumber
    margin: PositiveNumber
    passed: bool
    failing: tuple[str, ...]
    keep_fp32: tuple[str, ...]
    naive: NaiveForm
    stages: tuple[RangeSummary, ...]
    blocks: tuple[RangeSummary, ...]


def read_benchmark(path: Path) -> Given[BenchmarkRecord]:
    """Read a benchmark; InputError for anything else, a plan included."""
    return _read(path, "cnx-deploy bench", BenchmarkRecord.from_document)


def read_headroom(path: Path) -> Given[HeadroomDocument]:
    """Read what headroom printed; InputError for anything else."""
    return _read(path, "cnx-deploy diagnose headroom", lambda values: typed(values, HeadroomDocument))


def read_layers(path: Path) -> Given[tuple[LayerComparison, ...]]:
    """Read a comparison of one or more files layer by layer; InputError for anything else."""
    return _read(path, "cnx-deploy diagnose layers", comparisons_in)


def _read(path: Path, command: str, read: Callable[[dict[str, Any]], Document]) -> Given[Document]:
    values, content = command_document(path, command)
    try:
        return Given(path.name, hashlib.sha256(content).hexdigest(), read(values))
    except ValueError as error:
        raise InputError(f"{path} is not what `{command} --json` prints: {error}.") from error
