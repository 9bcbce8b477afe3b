"""ONNX operators on images and sequences (N, C, ...): convolutions, pools, resizing.

Their rounding follows the rules in `emulator.operators`; they take one, two or three spatial axes.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.runners.emulator.arithmetic import Attributes, Inputs, Operator, ints, needed, optional, wide

__all__ = ["SPATIAL"]

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _spatial(images: Tensor, attributes: Attributes) -> tuple[int, list[int], list[int]]:
    """Number of spatial axes, strides, dilations. Raises InputError for other than one to three axes."""
    axes = images.ndim - 2
    if axes not in CONVOLUTIONS:
        raise InputError(f"It has a tensor of {images.ndim} axes; known are 3 to 5: batch, channels and up to 3 more.")
    return axes, list(attributes.get("strides", [1] * axes)), list(attributes.get("dilations", [1] * axes))


def _pads(attributes: Attributes, sizes: Sequence[int], extents: Sequence[int], strides: Sequence[int]) -> list[int]:
    """All begins, then all ends. `extents`: how far a window reaches, dilation included."""
    kind = attributes.get("auto_pad", "NOTSET")
    if kind == "NOTSET":
        return list(attributes.get("pads", [0] * 2 * len(sizes)))
    if kind == "VALID":
        return [0] * 2 * len(sizes)
    if kind not in ("SAME_UPPER", "SAME_LOWER"):
        raise InputError(f"Its attribute auto_pad is {kind!r}; known are NOTSET, VALID, SAME_UPPER and SAME_LOWER.")
    total = [
        max(0, (math.ceil(size / stride) - 1) * stride + extent - size)
        for size, extent, stride in zip(sizes, extents, strides, strict=True)
    ]
    less, more = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
    return less + more if kind == "SAME_UPPER" else more + less


def _extents(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]


def _padded(images: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """Pads as ONNX lists them; torch wants the last axis first. A negative one crops."""
    axes = len(pads) // 2
    pairs = [(pads[axis], pads[axis + axes]) for axis in reversed(range(axes))]
    return F.pad(images, [pad for pair in pairs for pad in pair], value=value) if any(pads) else images


def _conv(inputs: Inputs, attributes: Attributes) -> Tensor:
    images, weight, bias = needed(inputs), needed(inputs, 1), optional(inputs, 2)
    axes, strides, dilations = _spatial(images, attributes)
    pads = _pads(attributes, images.shape[2:], _extents(weight.shape[2:], dilations), strides)
    padded, padding = wide(images), pads[:axes]
    if pads[:axes] != pads[axes:]:
        padded, padding = _padded(padded, pads), [0] * axes
    return CONVOLUTIONS[axes](
        padded, wide(weight), None if bias is None else wide(bias), stride=strides, padding=padding,
        dilation=dilations, groups=attributes.get("group", 1),
    ).to(images.dtype)  # fmt: skip


def _conv_transpose(inputs: Inputs, attributes: Attributes) -> Tensor:
    images, weight, bias = needed(inputs), needed(inputs, 1), optional(inputs, 2)
    axes, strides, dilations = _spatial(images, attributes)
    extra = list(attributes.get("output_padding", [0] * axes))
    kind, asked = attributes.get("auto_pad", "NOTSET"), attributes.get("output_shape")
    # The whole result without pads; then what `pads` says is cut off, and `output_padding` is added at the end.
    full = TRANSPOSED[axes](
        wide(images), wide(weight), stride=strides, dilation=dilations, groups=attributes.get("group", 1)
    )
    if asked is None and kind in ("SAME_UPPER", "SAME_LOWER"):
        asked = [size * stride for size, stride in zip(images.shape[2:], strides, strict=True)]
    if asked is None:
        pads = _pads(attributes, images.shape[2:], [1] * axes, strides)
    else:
        total = [size + more - out for size, more, out in zip(full.shape[2:], extra, asked[-axes:], strict=True)]
        less, more = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
        pads = less + more if kind == "SAME_UPPER" else more + less
    cut = [-pad for pad in pads[:axes]] + [more - pad for more, pad in zip(extra, pads[axes:], strict=True)]
    out = _padded(full, cut)
    return (out if bias is None else out + wide(bias).reshape(-1, *[1] * axes)).to(images.dtype)


def _windows(images: Tensor, attributes: Attributes, value: float, pad_value: float | None = None) -> Tensor:
    """The windows of a pool: (N, C, ...) -> (N, C, ..., *kernel), a view of the padded images.

    `pad_value` fills `pads`, and `value` what `ceil_mode` adds behind them and, without `pad_value`, the pads too.
    """
    axes, strides, dilations = _spatial(images, attributes)
    kernel, sizes = list(attributes["kernel_shape"]), images.shape[2:]
    extents = _extents(kernel, dilations)
    pads = _pads(attributes, sizes, extents, strides)
    behind = [0] * axes
    if attributes.get("ceil_mode", 0):
        for axis, (size, extent, stride) in enumerate(zip(sizes, extents, strides, strict=True)):
            begin, end = pads[axis], pads[axis + axes]
            count = math.ceil((size + begin + end - extent) / stride) + 1
            count -= (count - 1) * stride >= size + begin  # a window that starts behind the images is left out
            behind[axis] = max(0, (count - 1) * stride + extent - size - begin - end)
    windows = _padded(_padded(images, pads, value if pad_value is None else pad_value), [0] * axes + behind, value)
    for axis, (extent, stride, dilation) in enumerate(zip(extents, strides, dilations, strict=True)):
        windows = windows.unfold(axis + 2, extent, stride)[..., ::dilation]
    return windows


def _average_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    images = needed(inputs)
    axes = tuple(range(2 - images.ndim, 0))
    counted = 1.0 if attributes.get("count_include_pad", 0) else 0.0
    counts = _windows(torch.ones(1, 1, *images.shape[2:]), attributes, 0.0, counted).sum(axes)
    return (_windows(wide(images), attributes, 0.0).sum(axes) / counts).to(images.dtype)


def _max_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    images = needed(inputs)
    least = -math.inf if images.is_floating_point() else torch.iinfo(images.dtype).min
    return _windows(images, attributes, least).amax(tuple(range(2 - images.ndim, 0)))


def _global_pool(function: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Operator:
    def operator(inputs: Inputs, _: Attributes) -> Tensor:
        images = needed(inputs)
        return function(wide(images), tuple(range(2, images.ndim))).to(images.dtype)

    return operator


def _resize(inputs: Inputs, attributes: Attributes) -> Tensor:
    """Interpolate along one axis after another in FP32, and round once."""
    if attributes["since_version"] < 11:
        raise InputError("It is of opset 10, which left its coordinates open; known are those since opset 11.")
    images = needed(inputs)
    axes = [int(axis) % images.ndim for axis in attributes.get("axes") or range(images.ndim)]
    resized = wide(images)
    for axis, scale, size in zip(axes, *_scales_and_sizes(inputs, attributes, images, axes), strict=True):
        if size != images.shape[axis] or scale != 1.0:
            resized = _resized_axis(resized, axis, scale, size, attributes)
    return resized.to(images.dtype)


def _scales_and_sizes(
    inputs: Inputs, attributes: Attributes, images: Tensor, axes: Sequence[int]
) -> tuple[list[float], list[int]]:
    scales, sizes = optional(inputs, 2), optional(inputs, 3)
    lengths = [images.shape[axis] for axis in axes]
    if sizes is None or not sizes.numel():
        # In FP32, as runtimes multiply: 3 * 1.6666666 is 5 there, and 4.9999998 in float64.
        out = (needed(inputs, 2).float() * torch.tensor(lengths, dtype=torch.float32)).floor()
        return [float(scale) for scale in needed(inputs, 2).tolist()], ints(out)
    if scales is not None and scales.numel():
        raise InputError("It has both scales and sizes; known is one of the two. Export the model again.")
    out_sizes = ints(sizes)
    factors = [size / length for size, length in zip(out_sizes, lengths, strict=True)]
    policy = attributes.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return factors, out_sizes
    if policy not in ("not_larger", "not_smaller"):
        raise InputError(
            f"Its attribute keep_aspect_ratio_policy is {policy!r}; known are stretch, not_larger and not_smaller."
        )
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [factor] * len(axes), [math.floor(factor * length + 0.5) for length in lengths]


def _resized_axis(images: Tensor, axis: int, scale: float, size: int, attributes: Attributes) -> Tensor:
    mode, length = attributes["mode"], images.shape[axis]
    positions = _positions(attributes["coordinate_transformation_mode"], length, size, scale)
    if mode == "nearest":
        indices = _nearest(positions, attributes["nearest_mode"]).clamp(0, length - 1)
        return images.index_select(axis, indices)
    indices, weights = _neighbours(positions, scale, attributes)
    if attributes.get("exclude_outside", 0):
        weights = weights * ((indices >= 0) & (indices < length))
        weights = weights / weights.sum(1, keepdim=True)
    indices, weights = indices.clamp(0, length - 1), weights.to(images.dtype)
    shape = [-1] + [1] * (images.ndim - 1 - axis % images.ndim)
    taken = (images.index_select(axis, indices[:, n]) * weights[:, n].reshape(shape) for n in range(indices.shape[1]))
    return torch.stack(list(taken)).sum(0)


def _positions(mode: str, length: int, size: int, scale: float) -> Tensor:
    """Where each value of the resized axis lies in the original, float64 (ONNX, Resize)."""
    at, width = torch.arange(size, dtype=torch.float64), scale * length
    if mode == "align_corners":
        return at * 0 if width == 1 else at * (length - 1) / (width - 1)
    if mode == "asymmetric":
        return at / scale
    if mode == "pytorch_half_pixel" and size == 1:
        return at * 0
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return (at + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        return length / 2 * (1 - size / width) + (at + 0.5) / scale - 0.5
    raise InputError(
        f"Its attribute coordinate_transformation_mode is {mode!r}; known are align_corners, asymmetric, half_pixel, "
        "half_pixel_symmetric and pytorch_half_pixel."
    )


def _nearest(positions: Tensor, mode: str) -> Tensor:
    rounded = {
        "round_prefer_floor": (positions - 0.5).ceil(),
        "round_prefer_ceil": (positions + 0.5).floor(),
        "floor": positions.floor(),
        "ceil": positions.ceil(),
    }
    if mode not in rounded:
        raise InputError(f"Its attribute nearest_mode is {mode!r}; known are {', '.join(rounded)}.")
    return rounded[mode].long()


def _neighbours(positions: Tensor, scale: float, attributes: Attributes) -> tuple[Tensor, Tensor]:
    """Indices and weights (size, n) of the values around each position; indices may lie outside the axis."""
    reach, kernel = {"linear": (1, _triangle), "cubic": (2, _keys)}.get(attributes["mode"], (0, _triangle))
    if not reach:
        raise InputError(f"Its attribute mode is {attributes['mode']!r}; known are nearest, linear and cubic.")
    # With antialias, the kernel of a smaller result is as wide as the step between its values.
    shrink = min(scale, 1.0) if attributes.get("antialias", 0) else 1.0
    start = math.floor(-reach / shrink) + 1
    offsets = torch.arange(start, 2 - start)
    indices = positions.floor().long()[:, None] + offsets
    weights = kernel(((indices - positions[:, None]) * shrink).abs(), attributes["cubic_coeff_a"])
    return indices, weights / weights.sum(1, keepdim=True)


def _triangle(distance: Tensor, _: float) -> Tensor:
    return (1 - distance).clamp(min=0)


def _keys(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic kernel (doi:10.1109/TASSP.1981.1163711); a is -0.75 in torch and -0.5 in the paper."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


def _depth_to_space(inputs: Inputs, attributes: Attributes) -> Tensor:
    """(N, C b b, H, W) -> (N, C, H b, W b); which of the factors of the channels comes first is the mode."""
    images, block = needed(inputs), int(attributes["blocksize"])
    count, channels, height, width = images.shape
    if attributes.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(images, block)
    blocks = images.reshape(count, block, block, channels // block**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(count, channels // block**2, height * block, width * block)


def _space_to_depth(inputs: Inputs, attributes: Attributes) -> Tensor:
    images, block = needed(inputs), int(attributes["blocksize"])
    if attributes.get("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(images, block)
    count, channels, height, width = images.shape
    blocks = images.reshape(count, channels, height // block, block, width // block, block)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(count, channels * block**2, height // block, width // block)


SPATIAL: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "GlobalAveragePool": _global_pool(lambda images, axes: images.mean(axes, keepdim=True)),
    "GlobalMaxPool": _global_pool(lambda images, axes: images.amax(axes, keepdim=True)),
    "MaxPool": _max_pool,
    "Resize": _resize,
    "SpaceToDepth": _space_to_depth,
}
"""By `op_type` of the default domain."""
