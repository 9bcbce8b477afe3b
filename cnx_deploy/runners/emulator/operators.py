"""ONNX operators as half-precision hardware computes them: FP32 inside, rounded to the type in which they are stored.

The rules, for a tensor of type T narrower than FP32 (FP16 or BF16):

- products (Conv, MatMul, Gemm, AveragePool) accumulate in FP32 and round once, as tensor cores do;
- an elementwise operator computes in FP32 and rounds once;
- a reduction whose definition stores something on the way rounds that too: the squares of ReduceL2 and
  ReduceSumSquare, and every sum. 256² is infinite in FP16, and so is a sum beyond 65504: this is how onnx-tensorrt
  imports them (`onnxOpImporters.cpp`, 10.1) and what ONNX's reference evaluator gives. Means accumulate in FP32;
- LayerNormalization's statistics have the type that `stash_type` names, its affine the type T (ONNX operators,
  LayerNormalization, "stage one" and "stage two"). Spelled out it is as many operators as were written.

Operators of ai.onnx up to opset 23, as far as exports of ConvNeXt networks hold them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.errors import InputError

__all__ = ["OPERATORS", "TORCH_TYPES", "Attributes", "Operator"]

Attributes = Mapping[str, Any]
Operator = Callable[[Sequence[Tensor | None], Attributes], Tensor]
"""Inputs (None where an optional one is absent) and attributes -> the result in the type in which it is stored."""

TORCH_TYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16,
    11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""onnx.TensorProto.DataType -> torch."""


def _wide(tensor: Tensor) -> Tensor:
    """The tensor as it is computed with: FP32 for anything narrower that is not an integer."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _needed(inputs: Sequence[Tensor | None], index: int = 0) -> Tensor:
    tensor = inputs[index] if index < len(inputs) else None
    if tensor is None:
        raise InputError(f"An operator of the graph lacks its input {index}. Export the model again.")
    return tensor


def _optional(inputs: Sequence[Tensor | None], index: int) -> Tensor | None:
    return inputs[index] if index < len(inputs) else None


def _ints(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.flatten().tolist()]


def _elementwise(function: Callable[..., Tensor]) -> Operator:
    def operator(inputs: Sequence[Tensor | None], _: Attributes) -> Tensor:
        operands = [_needed(inputs, index) for index in range(len(inputs))]
        return function(*(_wide(operand) for operand in operands)).to(operands[0].dtype)

    return operator


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _gelu(inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    hidden = _needed(inputs)
    return F.gelu(_wide(hidden), approximate=attributes.get("approximate", "none")).to(hidden.dtype)


def _padding(attributes: Attributes) -> tuple[int, int]:
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        raise InputError(f"A convolution with auto_pad {attributes['auto_pad']} cannot be emulated; give its pads.")
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        raise InputError(
            f"A convolution with uneven pads {top, left, bottom, right} cannot be emulated: only what cnx-deploy "
            "export "
            "writes can. Run it in ONNX Runtime."
        )
    return top, left


def _conv(inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    images, weight, bias = _needed(inputs), _needed(inputs, 1), _optional(inputs, 2)
    return F.conv2d(
        _wide(images), _wide(weight), None if bias is None else _wide(bias), stride=attributes.get("strides", [1, 1]),
        padding=_padding(attributes), dilation=attributes.get("dilations", [1, 1]), groups=attributes.get("group", 1),
    ).to(images.dtype)  # fmt: skip


def _average_pool(inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    images = _needed(inputs)
    kernel, padding = attributes["kernel_shape"], _padding(attributes)
    if any(padding) or attributes.get("ceil_mode", 0) or set(attributes.get("dilations", [1])) != {1}:
        raise InputError(
            "An AveragePool with pads, dilations or ceil_mode cannot be emulated: only what cnx-deploy export "
            "writes can. Run it in ONNX Runtime."
        )
    pooled = F.avg_pool2d(_wide(images), kernel, attributes.get("strides", [1, 1]))
    return pooled.to(images.dtype)


def _gemm(inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    a, b, c = _needed(inputs), _needed(inputs, 1), _optional(inputs, 2)
    left = _wide(a).T if attributes.get("transA", 0) else _wide(a)
    right = _wide(b).T if attributes.get("transB", 0) else _wide(b)
    product = left @ right * float(attributes.get("alpha", 1.0))
    if c is not None:
        product = product + _wide(c) * float(attributes.get("beta", 1.0))
    return product.to(a.dtype)


def _layer_normalization(inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    tokens, gain, shift = _needed(inputs), _optional(inputs, 1), _optional(inputs, 2)
    axes = tuple(range(int(attributes.get("axis", -1)) % tokens.ndim, tokens.ndim))
    stash = TORCH_TYPES[attributes.get("stash_type", 1)]
    stored = tokens.to(stash)
    centred = (_wide(stored) - _wide(stored).mean(axes, keepdim=True)).to(stash)
    squares = (_wide(centred) * _wide(centred)).to(stash)
    variance = _wide(squares).mean(axes, keepdim=True).to(stash)
    inverse = torch.rsqrt(_wide(variance) + attributes.get("epsilon", 1e-5)).to(stash)
    normed = (_wide(centred) * _wide(inverse)).to(tokens.dtype)
    if gain is not None:
        normed = (_wide(normed) * _wide(gain)).to(tokens.dtype)
    return normed if shift is None else (_wide(normed) + _wide(shift)).to(tokens.dtype)


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    """A reduction over the axes given as input (opset 18 and later), as attribute, or over all."""

    def operator(inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
        tensor, given = _needed(inputs), _optional(inputs, 1)
        axes = _ints(given) if given is not None else list(attributes.get("axes", ()))
        if not axes and attributes.get("noop_with_empty_axes", 0):
            return tensor
        return function(tensor, tuple(axes) or tuple(range(tensor.ndim)), bool(attributes.get("keepdims", 1)))

    return operator


def _mean(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _wide(tensor).mean(axes, keepdim=keep).to(tensor.dtype)


def _sum(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _wide(tensor).sum(axes, keepdim=keep).to(tensor.dtype)


def _sum_of_squares(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    squares = (_wide(tensor) * _wide(tensor)).to(tensor.dtype)
    return _sum(squares, axes, keep)


def _l2(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _wide(_sum_of_squares(tensor, axes, keep)).sqrt().to(tensor.dtype)


def _reshape(inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    tensor, shape = _needed(inputs), _ints(_needed(inputs, 1))
    if not attributes.get("allowzero", 0):
        shape = [tensor.shape[index] if size == 0 else size for index, size in enumerate(shape)]
    return tensor.reshape(shape)


def _flatten(inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    tensor, axis = _needed(inputs), int(attributes.get("axis", 1))
    rows = math.prod(tensor.shape[:axis])
    return tensor.reshape(rows, tensor.numel() // max(1, rows))


def _unsqueeze(inputs: Sequence[Tensor | None], _: Attributes) -> Tensor:
    tensor, axes = _needed(inputs), _ints(_needed(inputs, 1))
    rank = tensor.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        tensor = tensor.unsqueeze(axis)
    return tensor


def _squeeze(inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    if "axes" in attributes:
        raise InputError(
            "A Squeeze of an opset before 13 cannot be emulated: only what cnx-deploy export writes can. Run it in "
            "ONNX Runtime."
        )
    axes = _optional(inputs, 1)
    return _needed(inputs).squeeze() if axes is None else _needed(inputs).squeeze(tuple(_ints(axes)))


def _gather(inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    tensor, indices, axis = _needed(inputs), _needed(inputs, 1), attributes.get("axis", 0)
    axis %= tensor.ndim
    flat = tensor.index_select(axis, indices.flatten() % tensor.shape[axis])
    return flat.reshape(*tensor.shape[:axis], *indices.shape, *tensor.shape[axis + 1 :])


def _slice(inputs: Sequence[Tensor | None], _: Attributes) -> Tensor:
    tensor, starts, ends = _needed(inputs), _ints(_needed(inputs, 1)), _ints(_needed(inputs, 2))
    given, steps = _optional(inputs, 3), _optional(inputs, 4)
    axes = _ints(given) if given is not None else list(range(len(starts)))
    strides = _ints(steps) if steps is not None else [1] * len(axes)
    for axis, start, end, step in zip(axes, starts, ends, strides, strict=True):
        if not step:
            raise InputError("A Slice with step 0 cannot be emulated; its step says how far to go. Export again.")
        # Python's ranges clamp start and end as ONNX does, and torch's own slices take no negative step.
        positions = torch.tensor(range(tensor.shape[axis])[start:end:step], dtype=torch.int64)
        tensor = tensor.index_select(axis, positions)
    return tensor


def _expand(inputs: Sequence[Tensor | None], _: Attributes) -> Tensor:
    """Broadcast both ways: a size of 1 in the shape keeps the tensor's."""
    tensor, shape = _needed(inputs), _ints(_needed(inputs, 1))
    rank = max(tensor.ndim, len(shape))
    own, asked = [1] * (rank - tensor.ndim) + list(tensor.shape), [1] * (rank - len(shape)) + shape
    return tensor.expand([max(pair) for pair in zip(own, asked, strict=True)])


OPERATORS: dict[str, Operator] = {
    "Add": _elementwise(torch.add),
    "AveragePool": _average_pool,
    "Cast": lambda inputs, attributes: _needed(inputs).to(TORCH_TYPES[attributes["to"]]),
    "Concat": lambda inputs, attributes: torch.cat([_needed([each]) for each in inputs], attributes["axis"]),
    "Conv": _conv,
    "Div": _elementwise(_divide),
    "Erf": _elementwise(torch.erf),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda inputs, _: _mean(_needed(inputs), (2, 3), True),
    "Identity": lambda inputs, _: _needed(inputs),
    "LayerNormalization": _layer_normalization,
    "MatMul": _elementwise(torch.matmul),
    "Mul": _elementwise(torch.mul),
    "Pow": _elementwise(torch.pow),
    "Reciprocal": _elementwise(torch.reciprocal),
    "ReduceL2": _reduction(_l2),
    "ReduceMean": _reduction(_mean),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum_of_squares),
    "Reshape": _reshape,
    "Shape": lambda inputs, _: torch.tensor(_needed(inputs).shape, dtype=torch.int64),
    "Slice": _slice,
    "Sqrt": _elementwise(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(torch.sub),
    "Transpose": lambda inputs, attributes: _needed(inputs).permute(
        attributes.get("perm") or tuple(reversed(range(_needed(inputs).ndim)))
    ),
    "Unsqueeze": _unsqueeze,
}
"""By `op_type` of the default domain."""
