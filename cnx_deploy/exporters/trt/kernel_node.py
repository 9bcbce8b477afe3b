"""A compiled kernel as a node of a graph: how TensorRT sees its tensors, and how the driver launches it.

The same record has three forms: attributes of an ONNX node, which the parser hands to a plugin creator as fields; the
fields that an engine keeps; and a call of `cuLaunchKernel`. All but image and entry are arrays of int32, so that the
launcher in C++ (`launcher/kernel_launcher.cpp`) reads them without a parser. This module loads neither TensorRT nor
onnx.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from cnx_deploy.core.errors import CorruptArtifactError

__all__ = [
    "DOMAIN", "FIELDS", "OPERATOR", "PLUGIN_VERSION", "Argument", "ElementType", "KernelNode", "OutputTensor", "Size",
    "TensorLayout",
]  # fmt: skip

OPERATOR, DOMAIN, PLUGIN_VERSION = "CompiledKernel", "cnx_deploy", "1"
"""What the node's operator and the plugin are called; the domain is the plugin's namespace too."""

ElementType = Literal["FLOAT", "HALF", "BF16"]
TYPE_CODES: dict[ElementType, int] = {"FLOAT": 0, "HALF": 1, "BF16": 7}
"""Element types by `nvinfer1::DataType`."""
ArgumentKind = Literal["input", "output", "size", "null"]
ARGUMENT_KINDS: tuple[ArgumentKind, ...] = ("input", "output", "size", "null")

FIELDS = ("image", "entry", "launch", "inputs", "outputs", "grid", "arguments")
"""The fields in the order in which they are written: the image as int8, the entry as text, the others as int32.

launch: threads, shared bytes. inputs: type and layout of each. outputs: type, layout, rank and as many sizes of each.
grid: three sizes. arguments: kind and a size of each; of an input or output the size's first number is its index. A
size has four numbers: input, its axes as bits, factor, divisor.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """A number that follows from shapes: `factor` × the product of some axes of an input, ÷ `divisor`, rounded up."""

    input: int = 0
    axes: tuple[int, ...] = ()
    factor: int = 1
    divisor: int = 1

    def of(self, shapes: Sequence[Sequence[int]]) -> int:
        """The number for the shapes of the inputs."""
        return -(-self.factor * math.prod(shapes[self.input][axis] for axis in self.axes) // self.divisor)

    def _codes(self) -> tuple[int, int, int, int]:
        return self.input, sum(1 << axis for axis in self.axes), self.factor, self.divisor

    @classmethod
    def _read(cls, codes: Sequence[int]) -> Self:
        number, bits, factor, divisor = codes
        return cls(number, tuple(axis for axis in range(bits.bit_length()) if bits >> axis & 1), factor, divisor)


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Element type, and for (N, C, H, W) whether the channels lie next to each other; else row-major."""

    type: ElementType
    channels_last: bool = False


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """What the kernel writes: its layout and its shape in sizes of the inputs."""

    layout: TensorLayout
    shape: tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of the launch: the address of an input or output, an int32, or a null pointer."""

    kind: ArgumentKind
    index: int = 0
    size: Size = field(default_factory=Size)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelNode:
    """A kernel with all that a launch needs. `image`: what `cuModuleLoadData` takes; `threads` of a block, in x."""

    image: bytes = field(repr=False)
    entry: str
    threads: int
    shared_bytes: int
    inputs: tuple[TensorLayout, ...]
    outputs: tuple[OutputTensor, ...]
    grid: tuple[Size, Size, Size]
    arguments: tuple[Argument, ...]

    def fields(self) -> dict[str, np.ndarray[Any, Any]]:
        """The node as arrays, by the names of `FIELDS`."""
        numbers: dict[str, list[int]] = {
            "launch": [self.threads, self.shared_bytes],
            "inputs": [number for layout in self.inputs for number in _layout_codes(layout)],
            "outputs": [number for output in self.outputs for number in _output_codes(output)],
            "grid": [number for size in self.grid for number in size._codes()],
            "arguments": [number for argument in self.arguments for number in _argument_codes(argument)],
        }
        texts = {"image": self.image, "entry": self.entry.encode("ascii")}
        return {
            **{name: np.frombuffer(text, np.int8) for name, text in texts.items()},
            **{name: np.asarray(values, np.int32) for name, values in numbers.items()},
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, np.ndarray[Any, Any]]) -> Self:
        """The node of fields as an engine or the parser gives them; CorruptArtifactError for any others."""
        try:
            numbers = {name: [int(number) for number in fields[name]] for name in FIELDS[2:]}
            threads, shared_bytes = numbers["launch"]
            first, second, third = _sizes(numbers["grid"])
            return cls(
                image=np.asarray(fields["image"], np.int8).tobytes(),
                # The parser ends a text with a zero.
                entry=np.asarray(fields["entry"], np.int8).tobytes().rstrip(b"\0").decode("ascii"),
                threads=threads,
                shared_bytes=shared_bytes,
                inputs=tuple(_layout(codes) for codes in _rows(numbers["inputs"], 2)),
                outputs=_read_outputs(numbers["outputs"]),
                grid=(first, second, third),
                arguments=tuple(_argument(codes) for codes in _rows(numbers["arguments"], 5)),
            )
        except (KeyError, ValueError, IndexError) as error:
            raise CorruptArtifactError(
                f"A kernel's fields are not those of this version of cnx-deploy ({type(error).__name__}: {error}). "
                "Build the engine again with cnx-deploy build-trt --fused --force."
            ) from error

    def layout_at(self, position: int) -> TensorLayout:
        """The layout of a tensor, counted over inputs, then outputs."""
        return (*self.inputs, *(output.layout for output in self.outputs))[position]


def _layout_codes(layout: TensorLayout) -> tuple[int, int]:
    return TYPE_CODES[layout.type], int(layout.channels_last)


def _output_codes(output: OutputTensor) -> tuple[int, ...]:
    sizes = (number for size in output.shape for number in size._codes())
    return (*_layout_codes(output.layout), len(output.shape), *sizes)


def _argument_codes(argument: Argument) -> tuple[int, ...]:
    rest = argument.size._codes() if argument.kind == "size" else (argument.index, 0, 0, 0)
    return (ARGUMENT_KINDS.index(argument.kind), *rest)


def _rows(numbers: Sequence[int], width: int) -> list[Sequence[int]]:
    if len(numbers) % width:
        raise ValueError(f"{len(numbers)} numbers are no rows of {width}")
    return [numbers[start : start + width] for start in range(0, len(numbers), width)]


def _sizes(numbers: Sequence[int]) -> tuple[Size, ...]:
    return tuple(Size._read(codes) for codes in _rows(numbers, 4))


def _layout(codes: Sequence[int]) -> TensorLayout:
    names = {code: name for name, code in TYPE_CODES.items()}
    return TensorLayout(names[codes[0]], bool(codes[1]))


def _read_outputs(numbers: Sequence[int]) -> tuple[OutputTensor, ...]:
    outputs, rest = [], numbers
    while rest:
        end = 3 + 4 * rest[2]
        if len(rest) < end:
            raise ValueError("an output has fewer sizes than its rank")
        outputs.append(OutputTensor(_layout(rest[:2]), _sizes(rest[3:end])))
        rest = rest[end:]
    return tuple(outputs)


def _argument(codes: Sequence[int]) -> Argument:
    kind = ARGUMENT_KINDS[codes[0]]
    return Argument(kind, size=Size._read(codes[1:])) if kind == "size" else Argument(kind, codes[1])
