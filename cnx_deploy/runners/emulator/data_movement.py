"""ONNX operators that move values, choose among them or say how many there are; none of them rounds."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.runners.emulator.arithmetic import Attributes, Inputs, Operator, ints, needed, optional, wide

__all__ = ["DATA_MOVEMENT"]


def _reshape(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor, shape = needed(inputs), ints(needed(inputs, 1))
    if not attributes.get("allowzero", 0):
        shape = [tensor.shape[index] if size == 0 else size for index, size in enumerate(shape)]
    return tensor.reshape(shape)


def _flatten(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor, axis = needed(inputs), int(attributes.get("axis", 1))
    rows = math.prod(tensor.shape[:axis])
    return tensor.reshape(rows, tensor.numel() // max(1, rows))


def _axes(inputs: Inputs, attributes: Attributes, index: int = 1) -> list[int] | None:
    """Given as input (opset 13 and later), as attribute, or not at all."""
    given, attribute = optional(inputs, index), attributes.get("axes")
    return ints(given) if given is not None else None if attribute is None else list(attribute)


def _unsqueeze(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor, axes = needed(inputs), _axes(inputs, attributes)
    if axes is None:
        raise InputError("It lacks its input or attribute axes. Export the model again.")
    rank = tensor.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        tensor = tensor.unsqueeze(axis)
    return tensor


def _squeeze(inputs: Inputs, attributes: Attributes) -> Tensor:
    axes = _axes(inputs, attributes)
    return needed(inputs).squeeze() if axes is None else needed(inputs).squeeze(tuple(axes))


def _shape(inputs: Inputs, attributes: Attributes) -> Tensor:
    return torch.tensor(needed(inputs).shape[attributes.get("start", 0) : attributes.get("end")], dtype=torch.int64)


def _transpose(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor = needed(inputs)
    return tensor.permute(attributes.get("perm") or tuple(reversed(range(tensor.ndim))))


def _expand(inputs: Inputs, _: Attributes) -> Tensor:
    """Broadcast both ways: a size of 1 in the shape keeps the tensor's."""
    tensor, shape = needed(inputs), ints(needed(inputs, 1))
    rank = max(tensor.ndim, len(shape))
    own, asked = [1] * (rank - tensor.ndim) + list(tensor.shape), [1] * (rank - len(shape)) + shape
    return tensor.expand([size if other == 1 else other for size, other in zip(own, asked, strict=True)])


def _concat(inputs: Inputs, attributes: Attributes) -> Tensor:
    return torch.cat([needed(inputs, index) for index in range(len(inputs))], attributes["axis"])


def _split(inputs: Inputs, attributes: Attributes) -> tuple[Tensor, ...]:
    """Into the sizes given as input or attribute, or into equal parts of which the last may be smaller."""
    tensor, given, axis = needed(inputs), optional(inputs, 1), int(attributes.get("axis", 0))
    if given is not None or "split" in attributes:
        sizes = ints(given) if given is not None else list(attributes["split"])
        return torch.split(tensor, sizes, axis)
    parts, length = int(attributes.get("num_outputs", attributes["outputs"])), tensor.shape[axis]
    size = math.ceil(length / parts)
    return torch.split(tensor, [max(0, min(size, length - size * part)) for part in range(parts)], axis)


def _slice(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor = needed(inputs)
    if "starts" in attributes:  # before opset 10
        starts, ends = list(attributes["starts"]), list(attributes["ends"])
    else:
        starts, ends = ints(needed(inputs, 1)), ints(needed(inputs, 2))
    axes, steps = _axes(inputs, attributes, 3) or list(range(len(starts))), optional(inputs, 4)
    strides = ints(steps) if steps is not None else [1] * len(axes)
    for axis, start, end, step in zip(axes, starts, ends, strides, strict=True):
        if not step:
            raise InputError("It has step 0, and a step says how far to go. Export the model again.")
        # Python's ranges clamp start and end as ONNX does, and torch's own slices take no negative step.
        positions = torch.tensor(range(tensor.shape[axis])[start:end:step], dtype=torch.int64)
        tensor = tensor.index_select(axis, positions)
    return tensor


def _pad(inputs: Inputs, attributes: Attributes) -> Tensor:
    """Each axis for itself: where a value comes from, and where the constant goes. A negative pad crops."""
    tensor, given, value = needed(inputs), optional(inputs, 1), optional(inputs, 2)
    pads = ints(given) if given is not None else list(attributes["pads"])
    axes = _axes(inputs, attributes, 3) or list(range(tensor.ndim))
    mode = attributes["mode"]
    if mode == "constant":
        constant = value.item() if value is not None else attributes.get("value", 0)
        pairs = [[0, 0] for _ in range(tensor.ndim)]
        for axis, *pair in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
            pairs[axis] = pair
        return F.pad(tensor, [pad for pair in reversed(pairs) for pad in pair], value=constant)
    if mode not in ("edge", "reflect", "wrap"):
        raise InputError(f"Its attribute mode is {mode!r}; known are constant, edge, reflect and wrap.")
    for axis, begin, end in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        length = tensor.shape[axis]
        positions = torch.arange(-begin, length + end)
        if mode == "edge":
            positions = positions.clamp(0, length - 1)
        elif mode == "wrap":
            positions = positions % length
        else:
            period = max(1, 2 * (length - 1))
            positions = length - 1 - (positions % period - (length - 1)).abs()
        tensor = tensor.index_select(axis, positions)
    return tensor


def _counted(indices: Tensor, size: int) -> Tensor:
    """Indices of an axis as INT64 from 0: negative ones count from its end. InputError for one that is not on it."""
    outside = (indices < -size) | (indices >= size)
    if bool(outside.any()):
        raise InputError(f"It has the index {int(indices[outside][0])}; known are -{size} to {size - 1} on that axis.")
    return torch.where(indices < 0, indices + size, indices).long()


def _gather(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor, indices, axis = needed(inputs), needed(inputs, 1), attributes.get("axis", 0)
    axis %= tensor.ndim
    flat = tensor.index_select(axis, _counted(indices.flatten(), tensor.shape[axis]))
    return flat.reshape((*tensor.shape[:axis], *indices.shape, *tensor.shape[axis + 1 :]))


def _gather_elements(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor, indices, axis = needed(inputs), needed(inputs, 1), attributes.get("axis", 0)
    return tensor.gather(axis, _counted(indices, tensor.shape[axis]))


def _rows(indices: Tensor, sizes: Sequence[int]) -> Tensor:
    """Index tuples (..., d) into axes of those sizes as rows of the tensor with these axes flattened."""
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for number, size in enumerate(sizes):
        rows = rows * size + _counted(indices[..., number], size)
    return rows


def _gather_nd(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor, indices, batch = needed(inputs), needed(inputs, 1), int(attributes.get("batch_dims", 0))
    depth, count = indices.shape[-1], math.prod(tensor.shape[:batch])
    sizes, rest = tensor.shape[batch : batch + depth], tensor.shape[batch + depth :]
    rows = _rows(indices.reshape(count, -1, depth), sizes)
    first = torch.arange(count)[:, None] * math.prod(sizes)
    taken = tensor.reshape(count * math.prod(sizes), *rest)[(rows + first).flatten()]
    return taken.reshape((*tensor.shape[:batch], *indices.shape[batch:-1], *rest))


def _scattered(tensor: Tensor, axis: int, places: Tensor, values: Tensor, kind: str) -> Tensor:
    """Put values along an axis; with a reduction, what meets at a place is computed in FP32 and rounded once."""
    reductions = {"none": "", "add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    if kind not in reductions:
        raise InputError(f"Its attribute reduction is {kind!r}; known are {', '.join(reductions)}.")
    if kind == "none":
        return tensor.scatter(axis, places, values)
    return wide(tensor).scatter_reduce(axis, places, wide(values), reductions[kind]).to(tensor.dtype)


def _scatter_nd(inputs: Inputs, attributes: Attributes) -> Tensor:
    """Put slices where `indices` says."""
    tensor, indices, updates = needed(inputs), needed(inputs, 1), needed(inputs, 2)
    depth = indices.shape[-1]
    sizes, width = tensor.shape[:depth], math.prod(tensor.shape[depth:])
    rows = _rows(indices.reshape(math.prod(indices.shape[:-1]), depth), sizes)
    places, values = rows[:, None].expand(len(rows), width), updates.reshape(len(rows), width)
    flat = tensor.reshape(math.prod(sizes), width)
    return _scattered(flat, 0, places, values, attributes.get("reduction", "none")).reshape(tensor.shape)


def _scatter_elements(inputs: Inputs, attributes: Attributes) -> Tensor:
    tensor, indices, axis = needed(inputs), needed(inputs, 1), int(attributes.get("axis", 0))
    places = _counted(indices, tensor.shape[axis])
    return _scattered(tensor, axis, places, needed(inputs, 2), attributes.get("reduction", "none"))


def _top_k(inputs: Inputs, attributes: Attributes) -> tuple[Tensor, Tensor]:
    """Values and positions; of equal values the one with the lower position comes first, as ONNX says."""
    tensor, axis = needed(inputs), int(attributes.get("axis", -1))
    count = ints(needed(inputs, 1))[0] if len(inputs) > 1 else int(attributes["k"])
    values, indices = tensor.sort(dim=axis, descending=bool(attributes.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def _one_hot(inputs: Inputs, attributes: Attributes) -> Tensor:
    indices, depth, values = needed(inputs), ints(needed(inputs, 1))[0], needed(inputs, 2)
    inside = (indices >= -depth) & (indices < depth)
    hot = F.one_hot(torch.where(inside, indices, 0).long() % depth, depth).bool() & inside[..., None]
    return torch.where(hot, values[1], values[0]).movedim(-1, int(attributes.get("axis", -1)))


def _range(inputs: Inputs, _: Attributes) -> Tensor:
    start, limit, delta = (needed(inputs, index) for index in range(3))
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    return (wide(start) + torch.arange(count) * wide(delta)).to(start.dtype)


def _constant_of_shape(inputs: Inputs, attributes: Attributes) -> Tensor:
    value: Tensor = attributes.get("value", torch.zeros(1))
    return value.reshape(()).expand(ints(needed(inputs))).clone()


def _dropout(inputs: Inputs, _: Attributes) -> tuple[Tensor, Tensor]:
    tensor, training = needed(inputs), optional(inputs, 2)
    if training is not None and bool(training):
        raise InputError("Its input training_mode is true; known is inference. Export the model in eval().")
    return tensor, torch.ones_like(tensor, dtype=torch.bool)


def _triangle(inputs: Inputs, attributes: Attributes) -> Tensor:
    offset = optional(inputs, 1)
    diagonal = 0 if offset is None else ints(offset)[0]
    return (torch.triu if attributes.get("upper", 1) else torch.tril)(needed(inputs), diagonal)


DATA_MOVEMENT: dict[str, Operator] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": lambda inputs, _: needed(inputs),
    "NonZero": lambda inputs, _: needed(inputs).nonzero().T,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": lambda inputs, _: torch.tensor(needed(inputs).numel()),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda inputs, _: needed(inputs).repeat(ints(needed(inputs, 1))),
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _triangle,
    "Unsqueeze": _unsqueeze,
    "Where": lambda inputs, _: torch.where(needed(inputs), needed(inputs, 1), needed(inputs, 2)),
}
"""By `op_type` of the default domain."""
