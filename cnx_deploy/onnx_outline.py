"""What an ONNX file asks for beside itself, read field by field: neither weights nor the onnx library are loaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = ["Outline", "outline_of"]

# Numbers of fields in onnx/onnx.proto.
MODEL_GRAPH, MODEL_OPSETS, MODEL_FUNCTIONS = 7, 8, 25
GRAPH_NODES, GRAPH_INITIALIZERS, GRAPH_SPARSE = 1, 5, 15
NODE_ATTRIBUTES, FUNCTION_NODES = 5, 7
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS = (5, 10), (6, 11)
TENSOR_EXTERNAL = 13
ENTRY_KEY, ENTRY_VALUE = 1, 2
OPSET_DOMAIN = 1
STANDARD = ("", "ai.onnx")
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
MOST_FIELDS, DEEPEST, LONGEST_NAME = 1_000_000, 20, 4096


@dataclass(frozen=True, slots=True)
class Outline:
    """`locations`: other files with weights; `domains`: of operators beyond the standard; `functions`: how many.

    `is_whole` False: the file ends early, is no row of fields, or is deeper or longer than is followed.
    """

    locations: tuple[str, ...]
    domains: tuple[str, ...]
    functions: int
    is_whole: bool


class _LostError(ValueError):
    """The fields cannot be followed."""


def outline_of(path: Path) -> Outline:
    """Follow the fields of a model. Raises OSError only."""
    reader = _Reader(path.stat().st_size)
    with path.open("rb") as stream:
        try:
            reader.model(stream)
        except _LostError:
            reader.is_whole = False
    return Outline(tuple(sorted(reader.locations)), tuple(sorted(reader.domains)), reader.functions, reader.is_whole)


class _Reader:
    """One pass over a file; what was found so far."""

    def __init__(self, size: int) -> None:
        self.size, self.fields_left = size, MOST_FIELDS
        self.locations: set[str] = set()
        self.domains: set[str] = set()
        self.functions, self.is_whole = 0, True

    def model(self, stream: BinaryIO) -> None:
        for number, end in self._fields(stream, self.size):
            if number == MODEL_GRAPH:
                self._graph(stream, end, 0)
            elif number == MODEL_OPSETS:
                domain = self._text_of(stream, end, OPSET_DOMAIN)
                self.domains.update({domain} - set(STANDARD))
            elif number == MODEL_FUNCTIONS:
                self.functions += 1
                self._nodes(stream, end, FUNCTION_NODES, 0)

    def _graph(self, stream: BinaryIO, end: int, depth: int) -> None:
        if depth > DEEPEST:
            raise _LostError
        for number, inner in self._fields(stream, end):
            if number == GRAPH_NODES:
                self._node(stream, inner, depth)
            elif number == GRAPH_INITIALIZERS:
                self._tensor(stream, inner)
            elif number == GRAPH_SPARSE:
                for _, part in self._fields(stream, inner):
                    self._tensor(stream, part)

    def _nodes(self, stream: BinaryIO, end: int, field: int, depth: int) -> None:
        for number, inner in self._fields(stream, end):
            if number == field:
                self._node(stream, inner, depth)

    def _node(self, stream: BinaryIO, end: int, depth: int) -> None:
        for number, attribute in self._fields(stream, end):
            if number != NODE_ATTRIBUTES:
                continue
            for kind, inner in self._fields(stream, attribute):
                if kind in ATTRIBUTE_TENSORS:
                    self._tensor(stream, inner)
                elif kind in ATTRIBUTE_GRAPHS:
                    self._graph(stream, inner, depth + 1)

    def _tensor(self, stream: BinaryIO, end: int) -> None:
        for number, entry in self._fields(stream, end):
            if number == TENSOR_EXTERNAL:
                start = stream.tell()
                if self._text_of(stream, entry, ENTRY_KEY) == "location":
                    stream.seek(start)
                    self.locations.add(self._text_of(stream, entry, ENTRY_VALUE))

    def _text_of(self, stream: BinaryIO, end: int, field: int) -> str:
        """The last text of that number, as protobuf takes it."""
        found = ""
        for number, inner in self._fields(stream, end):
            if number == field:
                found = stream.read(min(inner - stream.tell(), LONGEST_NAME)).decode("utf-8", "backslashreplace")
        return found

    def _fields(self, stream: BinaryIO, end: int) -> Iterator[tuple[int, int]]:
        """Number and end of every field with a length, the stream at its start; the others are passed over."""
        while stream.tell() < end:
            self.fields_left -= 1
            tag = self._varint(stream)
            if self.fields_left < 0 or tag & 7 not in (VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES):
                raise _LostError
            if tag & 7 == VARINT:
                self._varint(stream)
                continue
            length = {EIGHT_BYTES: 8, FOUR_BYTES: 4}.get(tag & 7)
            length = self._varint(stream) if length is None else length
            after = stream.tell() + length
            if after > end:
                raise _LostError
            if tag & 7 == LENGTH:
                yield tag >> 3, after
            stream.seek(after)

    def _varint(self, stream: BinaryIO) -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = stream.read(1)
            if not byte:
                raise _LostError
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value
        raise _LostError
