"""ONNX operators that compute: elementwise ones, matrix products, reductions and norms.

Their rounding follows the rules in `emulator.operators`. What all rooms of operators share is declared here too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.errors import InputError

__all__ = [
    "ARITHMETIC", "TORCH_TYPES", "Attributes", "Inputs", "Operator", "cast", "ints", "needed", "optional", "wide",
]  # fmt: skip

Inputs = Sequence[Tensor | None]
"""In the operator's order; None where an optional one is absent."""

Attributes = Mapping[str, Any]
"""The node's own and the defaults of its opset; a `TensorProto` is a torch tensor here."""

Operator = Callable[[Inputs, Attributes], Tensor | tuple[Tensor, ...]]
"""Inputs and attributes -> the result in the type in which it is stored, or several in the operator's order."""

TORCH_TYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16, 17: torch.float8_e4m3fn, 19: torch.float8_e5m2,
}  # fmt: skip
"""onnx.TensorProto.DataType -> torch."""


def wide(tensor: Tensor) -> Tensor:
    """The tensor as it is computed with: FP32 for anything narrower that is not an integer."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def cast(tensor: Tensor, dtype: torch.dtype, saturate: bool = True) -> Tensor:
    """The tensor in another type, rounded half to even.

    Beyond its range float8 has its largest value, or without `saturate` NaN (E4M3FN) and infinity (E5M2). NaN stays.
    Source: ONNX operators, Cast. torch's own cast to E4M3FN saturates or not, depending on its version.
    """
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return tensor.to(dtype)
    values, largest = tensor.float(), torch.finfo(dtype).max
    if saturate:
        values = values.clamp(-largest, largest)
    elif dtype == torch.float8_e4m3fn:
        values = values.masked_fill(values.abs() > 464, math.nan)  # 464 lies between 448 and what would be 480
    return values.to(dtype)


def needed(inputs: Inputs, index: int = 0) -> Tensor:
    """An input that the operator cannot do without. Raises InputError where it is absent."""
    tensor = optional(inputs, index)
    if tensor is None:
        raise InputError(f"It lacks its input {index}. Export the model again.")
    return tensor


def optional(inputs: Inputs, index: int) -> Tensor | None:
    """An input that may be absent."""
    return inputs[index] if index < len(inputs) else None


def ints(tensor: Tensor) -> list[int]:
    """The values of a tensor of sizes, axes or positions."""
    return [int(value) for value in tensor.flatten().tolist()]


def elementwise(function: Callable[..., Tensor], **defaults: float) -> Operator:
    """Compute in FP32 and round once; `defaults` are attributes that `function` takes by name."""

    def operator(inputs: Inputs, attributes: Attributes) -> Tensor:
        operands = [needed(inputs, index) for index in range(len(inputs))]
        given = {name: attributes.get(name, default) for name, default in defaults.items()}
        return function(*(wide(operand) for operand in operands), **given).to(operands[0].dtype)

    return operator


def _to_bool(function: Callable[..., Tensor]) -> Operator:
    return lambda inputs, _: function(*(needed(inputs, index) for index in range(len(inputs))))


def _chain(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    """An operator of any number of tensors, two at a time; what each pair gives is stored."""

    def operator(inputs: Inputs, _: Attributes) -> Tensor:
        result = needed(inputs)
        for index in range(1, len(inputs)):
            result = function(wide(result), wide(needed(inputs, index))).to(result.dtype)
        return result

    return operator


def _mean_of_tensors(inputs: Inputs, attributes: Attributes) -> Tensor:
    total = _chain(torch.add)(inputs, attributes)
    return (wide(total) / len(inputs)).to(total.dtype)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _modulo(a: Tensor, b: Tensor, fmod: int) -> Tensor:
    """The sign is the divisor's, or with `fmod` the dividend's."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _clip(inputs: Inputs, attributes: Attributes) -> Tensor:
    """Bounds are inputs since opset 11, and attributes before. The upper one wins where they cross."""
    tensor, low, high = needed(inputs), optional(inputs, 1), optional(inputs, 2)
    clipped = wide(tensor)
    for bound, name, limit in ((low, "min", torch.maximum), (high, "max", torch.minimum)):
        value = bound if bound is not None else attributes.get(name)
        if value is not None:
            clipped = limit(clipped, torch.as_tensor(value, dtype=clipped.dtype))
    return clipped.to(tensor.dtype)


def _gelu(inputs: Inputs, attributes: Attributes) -> Tensor:
    hidden = needed(inputs)
    return F.gelu(wide(hidden), approximate=attributes.get("approximate", "none")).to(hidden.dtype)


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    """Along one axis; before opset 13 over all axes from that one on."""

    def operator(inputs: Inputs, attributes: Attributes) -> Tensor:
        scores = needed(inputs)
        axis = int(attributes["axis"]) % scores.ndim
        if attributes["since_version"] >= 13:
            return function(wide(scores), axis).to(scores.dtype)
        return function(wide(scores).flatten(axis), axis).to(scores.dtype).reshape(scores.shape)

    return operator


def _gemm(inputs: Inputs, attributes: Attributes) -> Tensor:
    a, b, c = needed(inputs), needed(inputs, 1), optional(inputs, 2)
    left = wide(a).T if attributes.get("transA", 0) else wide(a)
    right = wide(b).T if attributes.get("transB", 0) else wide(b)
    product = left @ right * float(attributes.get("alpha", 1.0))
    if c is not None:
        product = product + wide(c) * float(attributes.get("beta", 1.0))
    return product.to(a.dtype)


def _einsum(inputs: Inputs, attributes: Attributes) -> Tensor:
    operands = [needed(inputs, index) for index in range(len(inputs))]
    return torch.einsum(attributes["equation"], *map(wide, operands)).to(operands[0].dtype)


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    """A reduction over the axes given as input, as attribute (opset 17 and before), or over all."""

    def operator(inputs: Inputs, attributes: Attributes) -> Tensor:
        tensor, given = needed(inputs), optional(inputs, 1)
        axes = ints(given) if given is not None else list(attributes.get("axes", ()))
        if not axes and attributes.get("noop_with_empty_axes", 0):
            return function(tensor[..., None], (-1,), False)  # each value for itself: |x| of ReduceL1, log(x), ...
        return function(tensor, tuple(axes) or tuple(range(tensor.ndim)), bool(attributes.get("keepdims", 1)))

    return operator


def _mean(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if not tensor.is_floating_point():
        total, count = tensor.sum(axes, keepdim=keep), math.prod(tensor.shape[axis] for axis in axes)
        return torch.div(total, count, rounding_mode="trunc").to(tensor.dtype)
    return wide(tensor).mean(axes, keepdim=keep).to(tensor.dtype)


def _sum(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return wide(tensor).sum(axes, keepdim=keep).to(tensor.dtype)


def _extreme(function: Callable[..., Tensor], sign: int) -> Callable[[Tensor, tuple[int, ...], bool], Tensor]:
    """The largest or smallest of each set; of an empty one the value, infinity if there is one, with that sign."""

    def operator(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if all(tensor.shape[axis] for axis in axes):
            return function(tensor, axes, keepdim=keep)
        value: float = sign * math.inf
        if tensor.dtype == torch.bool:
            value = sign > 0
        elif not tensor.is_floating_point():
            value = torch.iinfo(tensor.dtype).max if sign > 0 else torch.iinfo(tensor.dtype).min
        return torch.full_like(tensor.sum(axes, keepdim=keep), value, dtype=tensor.dtype)

    return operator


def _product(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    product = wide(tensor)
    for axis in sorted((axis % tensor.ndim for axis in axes), reverse=True):
        product = product.prod(axis, keepdim=keep)
    return product.to(tensor.dtype)


def _sum_of_squares(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    squares = (wide(tensor) * wide(tensor)).to(tensor.dtype)
    return _sum(squares, axes, keep)


def _l2(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return wide(_sum_of_squares(tensor, axes, keep)).sqrt().to(tensor.dtype)


def _log_sum(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return wide(_sum(tensor, axes, keep)).log().to(tensor.dtype)


def _log_sum_exp(tensor: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _log_sum(wide(tensor).exp().to(tensor.dtype), axes, keep)


def _arg(function: Callable[..., Tensor]) -> Operator:
    """The position of the first extreme, or with `select_last_index` of the last."""

    def operator(inputs: Inputs, attributes: Attributes) -> Tensor:
        tensor, axis, keep = needed(inputs), attributes.get("axis", 0), bool(attributes.get("keepdims", 1))
        if not attributes.get("select_last_index", 0):
            return function(tensor, axis, keepdim=keep)
        return tensor.shape[axis] - 1 - function(tensor.flip(axis), axis, keepdim=keep)

    return operator


def _cumulative_sum(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor, axis = needed(inputs), ints(needed(inputs, 1))[0]
    turned = wide(tensor).flip(axis) if attributes.get("reverse", 0) else wide(tensor)
    sums = turned.cumsum(axis)
    if attributes.get("exclusive", 0) and sums.shape[axis]:
        sums = sums.roll(1, axis).index_fill(axis, torch.tensor([0]), 0)
    return (sums.flip(axis) if attributes.get("reverse", 0) else sums).to(tensor.dtype)


def _standardised(tensor: Tensor, axes: tuple[int, ...], attributes: Attributes, *, centre: bool = True) -> Tensor:
    """Stage one of a norm: statistics in the type that `stash_type` names, the result in the tensor's own."""
    stash = TORCH_TYPES[attributes.get("stash_type", 1)]
    stored = tensor.to(stash)
    if centre:
        stored = (wide(stored) - wide(stored).mean(axes, keepdim=True)).to(stash)
    squares = (wide(stored) * wide(stored)).to(stash)
    variance = wide(squares).mean(axes, keepdim=True).to(stash)
    inverse = torch.rsqrt(wide(variance) + attributes.get("epsilon", 1e-5)).to(stash)
    return (wide(stored) * wide(inverse)).to(tensor.dtype)


def _affine(normed: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """Stage two of a norm, in the type of its result."""
    if gain is not None:
        normed = (wide(normed) * wide(gain)).to(normed.dtype)
    return normed if shift is None else (wide(normed) + wide(shift)).to(normed.dtype)


def _layer_normalization(inputs: Inputs, attributes: Attributes) -> Tensor:
    tokens = needed(inputs)
    axes = tuple(range(int(attributes.get("axis", -1)) % tokens.ndim, tokens.ndim))
    return _affine(_standardised(tokens, axes, attributes), optional(inputs, 1), optional(inputs, 2))


def _rms_normalization(inputs: Inputs, attributes: Attributes) -> Tensor:
    tokens = needed(inputs)
    axes = tuple(range(int(attributes["axis"]) % tokens.ndim, tokens.ndim))
    return _affine(_standardised(tokens, axes, attributes, centre=False), needed(inputs, 1), None)


def _per_channel(vector: Tensor, rank: int) -> Tensor:
    return vector.reshape(-1, *[1] * (rank - 2))


def _group_normalization(inputs: Inputs, attributes: Attributes) -> Tensor:
    """(N, C, ...); gain and shift have one value a group before opset 21, and one a channel since."""
    images, groups = needed(inputs), int(attributes["num_groups"])
    channels = images.shape[1]
    grouped = images.reshape(images.shape[0], groups, -1)
    normed = _standardised(grouped, (2,), attributes).reshape(images.shape)
    per_group = attributes["since_version"] < 21
    gain, shift = (
        _per_channel(vector.repeat_interleave(channels // groups) if per_group else vector, images.ndim)
        for vector in (needed(inputs, 1), needed(inputs, 2))
    )
    return _affine(normed, gain, shift)


def _instance_normalization(inputs: Inputs, attributes: Attributes) -> Tensor:
    images = needed(inputs)
    normed = _standardised(wide(images), tuple(range(2, images.ndim)), attributes)
    gain, shift = (wide(_per_channel(needed(inputs, index), images.ndim)) for index in (1, 2))
    return (normed * gain + shift).to(images.dtype)


def _batch_normalization(inputs: Inputs, attributes: Attributes) -> Tensor:
    if attributes.get("training_mode", 0) or not attributes.get("spatial", 1):
        raise InputError(
            "Its attribute training_mode is 1, or spatial 0; known is inference, per channel. Export in eval()."
        )
    images = needed(inputs)
    gain, shift, mean, variance = (wide(_per_channel(needed(inputs, each), images.ndim)) for each in range(1, 5))
    inverse = torch.rsqrt(variance + attributes["epsilon"])
    return ((wide(images) - mean) * (gain * inverse) + shift).to(images.dtype)


def _is_inf(inputs: Inputs, attributes: Attributes) -> Tensor:
    negative, positive = (bool(attributes.get(f"detect_{sign}", 1)) for sign in ("negative", "positive"))
    tensor = needed(inputs)
    return (torch.isneginf(tensor) & negative) | (torch.isposinf(tensor) & positive)


def _cast(inputs: Inputs, attributes: Attributes) -> Tensor:
    if attributes["to"] not in TORCH_TYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TORCH_TYPES.values())
        raise InputError(f"Its attribute to is the element type {attributes['to']}; known are {known}.")
    return cast(needed(inputs), TORCH_TYPES[attributes["to"]], bool(attributes.get("saturate", 1)))


ARITHMETIC: dict[str, Operator] = {
    "Abs": elementwise(torch.abs),
    "Add": elementwise(torch.add),
    "And": _to_bool(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "CastLike": lambda inputs, given: cast(needed(inputs), needed(inputs, 1).dtype, bool(given.get("saturate", 1))),
    "Ceil": elementwise(torch.ceil),
    "Clip": _clip,
    "CumSum": _cumulative_sum,
    "Div": elementwise(_divide),
    "Einsum": _einsum,
    "Elu": elementwise(lambda x, alpha: torch.where(x < 0, alpha * torch.expm1(x), x), alpha=1.0),
    "Equal": _to_bool(torch.eq),
    "Erf": elementwise(torch.erf),
    "Exp": elementwise(torch.exp),
    "Floor": elementwise(torch.floor),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _to_bool(torch.gt),
    "GreaterOrEqual": _to_bool(torch.ge),
    "GroupNormalization": _group_normalization,
    "HardSigmoid": elementwise(lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), alpha=0.2, beta=0.5),
    "HardSwish": elementwise(lambda x: x * (x / 6 + 0.5).clamp(0, 1)),
    "InstanceNormalization": _instance_normalization,
    "IsInf": _is_inf,
    "IsNaN": _to_bool(torch.isnan),
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": elementwise(lambda x, alpha: torch.where(x < 0, alpha * x, x), alpha=0.01),
    "Less": _to_bool(torch.lt),
    "LessOrEqual": _to_bool(torch.le),
    "Log": elementwise(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": elementwise(torch.matmul),
    "Max": _chain(torch.maximum),
    "Mean": _mean_of_tensors,
    "Min": _chain(torch.minimum),
    "Mish": elementwise(F.mish),
    "Mod": elementwise(_modulo, fmod=0),
    "Mul": elementwise(torch.mul),
    "Neg": elementwise(torch.neg),
    "Not": _to_bool(torch.logical_not),
    "Or": _to_bool(torch.logical_or),
    "PRelu": elementwise(lambda x, slope: torch.where(x < 0, slope * x, x)),
    "Pow": elementwise(torch.pow),
    "RMSNormalization": _rms_normalization,
    "Reciprocal": elementwise(torch.reciprocal),
    "ReduceL1": _reduction(lambda tensor, axes, keep: _sum(tensor.abs(), axes, keep)),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(_log_sum),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(_extreme(torch.amax, -1)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_extreme(torch.amin, 1)),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum_of_squares),
    "Relu": elementwise(torch.relu),
    "Round": elementwise(torch.round),  # half to even, as ONNX says
    "Selu": elementwise(
        lambda x, alpha, gamma: gamma * torch.where(x < 0, alpha * torch.expm1(x), x), alpha=1.67326, gamma=1.0507
    ),
    "Sigmoid": elementwise(torch.sigmoid),
    "Sign": elementwise(lambda x: torch.where(x != x, x, torch.sign(x))),  # NaN stays, where torch gives 0
    "Softmax": _softmax(torch.softmax),
    "Softplus": elementwise(F.softplus),
    "Sqrt": elementwise(torch.sqrt),
    "Sub": elementwise(torch.sub),
    "Sum": _chain(torch.add),
    "Swish": elementwise(lambda x, alpha: x * torch.sigmoid(alpha * x), alpha=1.0),
    "Tanh": elementwise(torch.tanh),
    "Xor": _to_bool(torch.logical_xor),
}
"""By `op_type` of the default domain."""
