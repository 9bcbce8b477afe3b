"""ONNX operators between floating tensors and those of 8 bits: QuantizeLinear and DequantizeLinear.

Scales and zero points have one value, or one for each index of an axis. Their rounding follows the rules in
`emulator.operators`.
"""

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.runners.emulator.arithmetic import (
    TORCH_TYPES,
    Attributes,
    Inputs,
    Operator,
    cast,
    needed,
    optional,
    wide,
)

__all__ = ["QUANTIZATION"]

QUANTIZED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
FLOATING = (torch.float16, torch.bfloat16, torch.float32)


def _quantize(inputs: Inputs, attributes: Attributes) -> Tensor:
    """Integers saturate, infinities too; NaN becomes the smallest one, as in ONNX Runtime. In float8 NaN stays."""
    tensor, scale, zero = needed(inputs), needed(inputs, 1), optional(inputs, 2)
    _check_type("input x", tensor.dtype, FLOATING)
    _check_type("scale", scale.dtype, FLOATING)
    dtype = _named_type(attributes, "output_dtype", QUANTIZED, torch.uint8 if zero is None else zero.dtype)
    _check_type("output", dtype, QUANTIZED)
    if zero is not None:
        _check_type("zero point", zero.dtype, (dtype,))
    division = _named_type(attributes, "precision", FLOATING, torch.promote_types(tensor.dtype, scale.dtype))
    divisor = _broadcast(scale, tensor, attributes).to(division)
    quotient = wide((wide(tensor.to(division)) / wide(divisor)).to(division))
    shift = _zero_point(zero, tensor, attributes)
    if dtype.is_floating_point:
        return cast(quotient, dtype, bool(attributes.get("saturate", 1)))
    limits = torch.iinfo(dtype)
    return (quotient.round() + shift).nan_to_num(limits.min).clamp(limits.min, limits.max).to(dtype)


def _dequantize(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor, scale, zero = needed(inputs), needed(inputs, 1), optional(inputs, 2)
    _check_type("input x", tensor.dtype, (*QUANTIZED, torch.int32))
    _check_type("scale", scale.dtype, FLOATING)
    if zero is not None:
        _check_type("zero point", zero.dtype, (tensor.dtype,))
    dtype = _named_type(attributes, "output_dtype", FLOATING, scale.dtype)
    shifted = tensor.float() - _zero_point(zero, tensor, attributes)
    return (shifted * wide(_broadcast(scale, tensor, attributes))).to(dtype)


def _zero_point(zero: Tensor | None, tensor: Tensor, attributes: Attributes) -> Tensor:
    """In FP32, 0 where it is absent. Raises InputError for one of float8 that is not 0."""
    if zero is None:
        return torch.zeros(())
    if zero.is_floating_point() and bool(zero.float().any()):
        raise InputError("Its zero point of float8 is not 0; known is 0. Export the model again without one.")
    return _broadcast(zero, tensor, attributes).float()


def _broadcast(parameter: Tensor, tensor: Tensor, attributes: Attributes) -> Tensor:
    """A scale or zero point of one value, or of one for each index of `axis`, in a shape that fits the tensor's."""
    if attributes.get("block_size", 0) or (parameter.ndim > 1 and parameter.numel() > 1):
        raise InputError(
            f"Its attribute block_size is {attributes.get('block_size', 0)}, and a scale or zero point has the shape "
            f"{tuple(parameter.shape)}; known are one value, or one for each index of an axis. Run it in ONNX Runtime."
        )
    if parameter.numel() == 1:
        return parameter.reshape(())
    axis = int(attributes.get("axis", 1))
    if not -tensor.ndim <= axis < tensor.ndim or len(parameter) != tensor.shape[axis]:
        raise InputError(
            f"Its attribute axis is {axis}, and a scale or zero point has {len(parameter)} values; a tensor of shape "
            f"{tuple(tensor.shape)} needs one value, or one for each index of that axis. Export the model again."
        )
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def _named_type(attributes: Attributes, name: str, known: tuple[torch.dtype, ...], default: torch.dtype) -> torch.dtype:
    """The type that an attribute names, `default` where it is absent or 0. Raises InputError for one not `known`."""
    number = attributes.get(name, 0)
    if number and TORCH_TYPES.get(number) not in known:
        raise InputError(f"Its attribute {name} is the element type {number}; known are {_names(known)}.")
    return TORCH_TYPES[number] if number else default


def _check_type(role: str, dtype: torch.dtype, known: tuple[torch.dtype, ...]) -> None:
    if dtype not in known:
        raise InputError(
            f"Its {role} is of type {_names((dtype,))}; known here: {_names(known)}. Run it in ONNX Runtime."
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


QUANTIZATION: dict[str, Operator] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
"""By `op_type` of the default domain."""
