"""What an ONNX file claims to hold, from its bytes alone: counts, sizes and files outside, before any parser reads it.

Protobuf's wire format is a row of numbered fields; messages lie in fields that begin with their length. This walks the
messages of onnx/onnx.proto that can hold nodes or tensors and steps over the rest, so that neither time nor memory
depends on more than the number of fields, which is limited. It takes a file for what the parser would make of it or for
more: a message that is there twice, which a parser merges, counts twice.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cnx_deploy.core.errors import CorruptArtifactError, InputError, RefusedArtifactError

__all__ = ["OnnxLimits", "TensorClaim", "WireFacts", "looks_like_onnx", "open_regular", "scan_onnx"]


@dataclass(frozen=True, slots=True)
class OnnxLimits:
    """What is taken of one file; several times what the huge variant needs in any exporter's form.

    `file_bytes` is protobuf's own limit. `tensor_bytes`: of all tensors together, in the file and outside it.
    """

    file_bytes: int = (1 << 31) - 1
    fields: int = 1_000_000
    nodes: int = 20_000
    depth: int = 24
    tensor_bytes: int = 16 << 30


@dataclass(frozen=True, slots=True)
class TensorClaim:
    """A tensor as the file describes it. `external`: keys and values of its place outside, in order; else empty."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    raw_bytes: int | None
    is_external: bool
    external: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class WireFacts:
    """What was counted. `messages`: how many of each kind; `domains`: of operators, the standard's left out."""

    messages: Counter[str]
    tensors: tuple[TensorClaim, ...]
    domains: tuple[str, ...] = ()

    @property
    def locations(self) -> tuple[str, ...]:
        """Where tensors lie outside the file, each place once."""
        found = {value for tensor in self.tensors for key, value in tensor.external if key == "location"}
        return tuple(sorted(found))


# onnx/onnx.proto: the fields of each message that hold one which is walked.
HOLDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 8: "OperatorSet", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""ModelProto's fields and their wire types: 0 is a number, 2 has a length."""

GRAPH_FIELD = 7
STANDARD = frozenset({"", "ai.onnx"})
NUMBER, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
DIMS, DATA_TYPE, NAME, RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 1, 2, 8, 9, 13, 14
LONGEST_TEXT = 4096
LOW = 0xFFFFFFFF
"""What a parser keeps of a tag and of a number of 32 bits."""

EXTERNAL = 1
MOST_DIMS = 64


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe, a device or a folder is an InputError and not waited for."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} cannot be read: it is no regular file, expected one. Give another path.")
    return os.fdopen(descriptor, "rb")


def looks_like_onnx(stream: BinaryIO, size: int) -> bool:
    """Whether the bytes are a row of ModelProto's fields with a graph among them; the end may be cut off."""
    stream.seek(0)
    has_graph = False
    walked = 0
    while stream.tell() < size and walked < OnnxLimits().fields:
        tag = _varint(stream)
        if tag is None or MODEL_FIELDS.get(tag >> 3) != tag & 7:
            return False
        value = _varint(stream)
        if value is None:
            return has_graph
        has_graph = has_graph or tag >> 3 == GRAPH_FIELD
        if tag & 7 == LENGTH:
            stream.seek(min(value, size), 1)
        walked += 1
    return has_graph


def scan_onnx(path: Path, limits: OnnxLimits | None = None) -> WireFacts:
    """Walk a file's messages within `limits`.

    Raises RefusedArtifactError for what is beyond them, CorruptArtifactError for bytes that are no protobuf,
    InputError where `path` is no file.
    """
    with open_regular(path) as stream:
        return _Walk(path, stream, limits or OnnxLimits()).facts()


class _Walk:
    """One walk through one file."""

    def __init__(self, path: Path, stream: BinaryIO, limits: OnnxLimits) -> None:
        self.path = path
        self.stream = stream
        self.limits = limits
        self.fields = 0
        self.messages: Counter[str] = Counter()
        self.tensors: list[TensorClaim] = []
        self.domains: set[str] = set()

    def facts(self) -> WireFacts:
        size = os.fstat(self.stream.fileno()).st_size
        if size > self.limits.file_bytes:
            raise self.refused("bytes", size, self.limits.file_bytes)
        self.message("Model", size, 0)
        return WireFacts(self.messages, tuple(self.tensors), tuple(sorted(self.domains - STANDARD)))

    def message(self, kind: str, end: int, depth: int) -> None:
        """Walk one message from here to `end`."""
        if depth > self.limits.depth:
            raise self.refused("levels of messages", depth, self.limits.depth)
        self.messages[kind] += 1
        if self.messages["Node"] > self.limits.nodes:
            raise self.refused("nodes", self.messages["Node"], self.limits.nodes, "or more")
        if kind == "Tensor":
            self.tensors.append(self.tensor(end))
            return
        if kind == "OperatorSet":
            self.domains.add(self.entry(end)[0])
            return
        holds = HOLDS[kind]
        for number, wire_type, value in self.row(end):
            if wire_type == LENGTH and number in holds:
                self.message(holds[number], self.stream.tell() + value, depth + 1)
            elif wire_type == LENGTH:
                self.stream.seek(value, 1)

    def tensor(self, end: int) -> TensorClaim:
        """What a TensorProto says of itself; its values are stepped over."""
        name, data_type, raw_bytes, is_external = "", 0, None, False
        dims: list[int] = []
        external: list[tuple[str, str]] = []
        for number, wire_type, value in self.row(end):
            here = self.stream.tell()
            if number == DIMS and wire_type in (NUMBER, LENGTH) and len(dims) <= MOST_DIMS:
                dims.extend(self.numbers(here + value) if wire_type == LENGTH else [_signed(value)])
            elif wire_type == NUMBER:
                data_type = value & LOW if number == DATA_TYPE else data_type
                is_external = value & LOW == EXTERNAL if number == DATA_LOCATION else is_external
            elif wire_type == LENGTH:
                name = self.text(value) if number == NAME else name
                raw_bytes = value if number == RAW_DATA else raw_bytes
                if number == EXTERNAL_DATA:
                    external.append(self.entry(here + value))
                self.stream.seek(here + value)
        if len(dims) > MOST_DIMS:
            raise self.refused(f"dimensions of a tensor ({name!r})", len(dims), MOST_DIMS, "or more")
        return TensorClaim(name, data_type, tuple(dims), raw_bytes, is_external, tuple(external))

    def row(self, end: int) -> Iterator[tuple[int, int, int]]:
        """(number, wire type, value) of each field up to `end`; for a length the stream is at its first byte."""
        while (here := self.stream.tell()) < end:
            self.fields += 1
            if self.fields > self.limits.fields:
                raise self.refused("fields", self.fields, self.limits.fields, "or more")
            tag, value = _varint(self.stream), 0
            wire_type = -1 if tag is None or tag > LOW else tag & 7
            if wire_type in (NUMBER, LENGTH):
                found = _varint(self.stream)
                value, wire_type = (found, wire_type) if found is not None else (0, -1)
            elif wire_type in (EIGHT_BYTES, FOUR_BYTES):
                self.stream.seek(8 if wire_type == EIGHT_BYTES else 4, 1)
            past = self.stream.tell() + (value if wire_type == LENGTH else 0)
            if tag is None or wire_type not in (NUMBER, EIGHT_BYTES, LENGTH, FOUR_BYTES) or past > end:
                raise CorruptArtifactError(
                    f"{self.path} is not a valid ONNX file: it is cut off or damaged at byte {here:,}, expected a "
                    f"field that ends by byte {end:,}. Export it again."
                )
            yield tag >> 3, wire_type, value

    def numbers(self, end: int) -> list[int]:
        """Packed numbers up to `end`, one more than dimensions are taken at most."""
        found: list[int] = []
        while self.stream.tell() < end and len(found) <= MOST_DIMS:
            value = _varint(self.stream)
            found.append(_signed(value or 0))
        self.stream.seek(end)
        return found

    def entry(self, end: int) -> tuple[str, str]:
        """A StringStringEntryProto, or of an OperatorSetIdProto its domain."""
        key = value = ""
        for number, wire_type, length in self.row(end):
            here = self.stream.tell()
            if wire_type == LENGTH:
                key = self.text(length) if number == 1 else key
                value = self.text(length) if number == 2 else value
                self.stream.seek(here + length)
        return key, value

    def text(self, length: int) -> str:
        """Text from here; of very long text the beginning, which is no path that any system takes."""
        return self.stream.read(min(length, LONGEST_TEXT + 1)).decode("utf-8", errors="replace")

    def refused(self, what: str, found: int, most: int, more: str = "") -> RefusedArtifactError:
        return RefusedArtifactError(
            f"{self.path} is refused: {found:,} {f'{more} ' if more else ''}{what}, where at most {most:,} are "
            f"expected. Export the model again, from a source you trust."
        )


def _varint(stream: BinaryIO) -> int | None:
    """A protobuf varint; None at the end of the file or beyond 64 bits."""
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF
    return None


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
