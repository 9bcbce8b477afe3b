"""ONNX files with one node, and cases for every operator that the emulator knows."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RANDOM = np.random.default_rng(0)
NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Case:
    """One node: inputs (floating ones take the type that is tested), attributes, opset, number of outputs.

    `loose`: the judge rounds within, or sums in another order. `by_onnxruntime`: ONNX Runtime is the judge, in FP32;
    onnx 1.23's reference evaluator does not follow the definition there.
    """

    name: str
    inputs: list[np.ndarray | None]
    attributes: dict[str, object] = field(default_factory=dict)
    opset: int = 20
    outputs: int = 1
    loose: bool = False
    by_onnxruntime: bool = False

    def arrays(self, dtype: str) -> list[np.ndarray | None]:
        """The inputs with floating ones in the type; what is not a half here keeps its own."""
        wanted = NUMPY_TYPES[dtype]
        return [a.astype(wanted) if a is not None and a.dtype == np.float16 else a for a in self.inputs]

    def __str__(self) -> str:
        told = ",".join(f"{key}={value}".replace(" ", "") for key, value in self.attributes.items())
        shapes = "-".join("none" if a is None else "x".join(map(str, a.shape)) for a in self.inputs)
        return f"{self.name}[{shapes},{told},{self.opset}]"


def one_node_file(case: Case, dtype: str, path: Path) -> Path:
    """Write the file: input "images", constants for the other inputs, outputs "out", "out1", ..."""
    arrays = case.arrays(dtype)
    first = arrays[0]
    assert first is not None
    names = ["images", *("" if a is None else f"c{index}" for index, a in enumerate(arrays[1:]))]
    outputs = ["out", *(f"out{index}" for index in range(1, case.outputs))]
    constants = [numpy_helper.from_array(a, f"c{n}") for n, a in enumerate(arrays[1:]) if a is not None]
    node = helper.make_node(case.name, names, outputs, name=case.name, **case.attributes)
    images = helper.make_tensor_value_info("images", helper.np_dtype_to_tensor_dtype(first.dtype), first.shape)
    # The outputs' types may be others; of the judges only ONNX Runtime minds.
    values = [helper.make_tensor_value_info(name, images.type.tensor_type.elem_type, None) for name in outputs]
    graph = helper.make_graph([node], "one", [images], values, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10), path)
    return path


def half(*shape: int, scale: float = 1.0) -> np.ndarray:
    """Seeded normal values."""
    return (RANDOM.standard_normal(shape) * scale).astype(np.float16)


def positive(*shape: int) -> np.ndarray:
    """Seeded values in [0.5, 2]."""
    return RANDOM.uniform(0.5, 2, shape).astype(np.float16)


def ints(*values: int) -> np.ndarray:
    """A vector of INT64."""
    return np.array(values, np.int64)


def floats(*values: float) -> np.ndarray:
    """A vector of FP32, whichever type is tested."""
    return np.array(values, np.float32)


def number(value: float) -> np.ndarray:
    """A scalar of the type that is tested."""
    return np.array(value, np.float16)


SHARP = np.array([-7.5, -3.0, -0.5, -0.0, 0.2, 0.5, 1.5, 2.5, 7.0], np.float16)
"""Where a piecewise operator has its corners."""
TIES = np.array([[2, 5, 5, -1, 5, 2], [0, 0, 0, 0, 0, 0]], np.float16)
FLAGS = np.array([[True, False, True], [False, False, True]])
OTHER_FLAGS = np.array([True, True, False])
WHOLE = np.array([[-7, 7, 5], [9, -4, 3]], np.int64)


def _elementwise() -> Iterator[Case]:
    yield Case("Add", [half(2, 3, 4), half(3, 1)])
    yield Case("Sub", [half(2, 3, 4), half(4)])
    yield Case("Mul", [half(2, 3, scale=300), half(2, 3, scale=300)])
    yield Case("Div", [half(2, 3), half(2, 3) + np.float16(3)])
    yield Case("Div", [WHOLE, ints(2, -3, 4)])
    yield Case("Mod", [WHOLE, ints(2, -3, 4)])
    yield Case("Mod", [half(2, 3, scale=5), positive(3)], {"fmod": 1})
    yield Case("Mod", [WHOLE, ints(2, -3, 4)], {"fmod": 1})
    yield Case("Pow", [np.abs(half(2, 3, scale=200)), number(2)])
    yield Case("Pow", [positive(2, 3), floats(0.5)])
    yield Case("PRelu", [SHARP, positive(9)])
    yield Case("Cast", [half(2, 3)], {"to": TensorProto.FLOAT})
    yield Case("Cast", [SHARP], {"to": TensorProto.INT32})
    yield Case("Cast", [SHARP], {"to": TensorProto.BOOL}, 13)
    yield Case("CastLike", [SHARP, ints(1)])
    for name in ("Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Relu", "LeakyRelu", "HardSigmoid", "HardSwish"):
        yield Case(name, [SHARP], loose=name.startswith("Hard"))
    for name in ("Sigmoid", "Tanh", "Elu", "Selu", "Softplus", "Erf", "Gelu", "Mish", "Exp"):
        yield Case(name, [np.concatenate([SHARP, half(30, scale=2)])], loose=True)
    yield Case("Swish", [half(30, scale=3)], {"alpha": 1.7}, 24, loose=True)
    yield Case("Gelu", [half(2, 30, scale=3)], {"approximate": "tanh"}, loose=True)
    yield Case("LeakyRelu", [SHARP], {"alpha": 0.25})
    yield Case("HardSigmoid", [SHARP], {"alpha": 0.125, "beta": 0.25}, loose=True)
    yield Case("Elu", [SHARP], {"alpha": 0.5}, loose=True)
    for name in ("Sqrt", "Log", "Reciprocal"):
        yield Case(name, [positive(2, 3)], loose=name == "Log")
    for bounds in ([number(-1), number(2)], [None, number(2)], [number(-1)], [number(3), number(1)], []):
        yield Case("Clip", [SHARP, *bounds])
    yield Case("Clip", [WHOLE, np.array(-5), np.array(5)])
    yield Case("Clip", [SHARP], {"min": -1.0, "max": 2.5}, 10)
    for name in ("Sum", "Mean", "Max", "Min"):
        yield Case(name, [half(2, 3), half(3), half(2, 1)], loose=name == "Mean")
        yield Case(name, [half(2, 3)])
    for name in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
        yield Case(name, [TIES, np.array(2, np.float16)])
    for name in ("And", "Or", "Xor"):
        yield Case(name, [FLAGS, OTHER_FLAGS])
    yield Case("Not", [FLAGS])
    yield Case("Where", [FLAGS, half(2, 3), half(3)])
    for axis in (-1, 0, 1):
        for opset in (11, 13):
            for name in ("Softmax", "LogSoftmax"):
                yield Case(name, [half(2, 3, 5)], {"axis": axis}, opset, loose=True, by_onnxruntime=opset < 13)
    yield Case("Softmax", [half(2, 3, 5)], {}, 11, loose=True, by_onnxruntime=True)
    yield Case("Softmax", [half(2, 3, 5)], {}, 13, loose=True)


def _products() -> Iterator[Case]:
    yield Case("Gemm", [half(2, 5), half(3, 5), half(3)], {"transB": 1, "alpha": 0.5, "beta": 2.0}, loose=True)
    yield Case("Gemm", [half(5, 2), half(5, 3)], {"transA": 1}, loose=True)
    yield Case("MatMul", [half(2, 3, 5), half(2, 5, 4)], loose=True)
    yield Case("Einsum", [half(2, 3, 5), half(2, 5, 4)], {"equation": "bij, bjk -> bik"}, loose=True)
    yield Case("Einsum", [half(2, 3, 5), half(5, 4)], {"equation": "...d,dk->...k"}, loose=True)


def _reductions() -> Iterator[Case]:
    names = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
    for name in (f"Reduce{each}" for each in names.split()):
        loose = name not in ("ReduceMax", "ReduceMin")
        data = positive(2, 5, 3) if name in ("ReduceLogSum", "ReduceProd") else half(2, 5, 3)
        yield Case(name, [data, ints(1)], {"keepdims": 1}, loose=loose)
        yield Case(name, [data, ints(0, -1)], {"keepdims": 0}, loose=loose)
        yield Case(name, [data], {}, loose=loose)
        axes = {"axes": [-1]} if name != "ReduceSum" else {}
        yield Case(name, [data, ints(-1)] if name == "ReduceSum" else [data], axes, 13, loose=loose)
    yield Case("ReduceSum", [WHOLE, ints(1)])
    yield Case("ReduceMax", [WHOLE, ints(1)])
    yield Case("ReduceProd", [WHOLE, ints(1)])
    yield Case("ReduceSum", [half(2, 3)], {"noop_with_empty_axes": 1})
    for name in ("ArgMax", "ArgMin"):
        for last in (0, 1):
            yield Case(name, [TIES], {"axis": -1, "select_last_index": last, "keepdims": last})
        yield Case(name, [half(3, 4)])
    for attributes in ({}, {"reverse": 1}, {"exclusive": 1}, {"reverse": 1, "exclusive": 1}):
        yield Case("CumSum", [half(2, 7), np.array(1)], attributes, loose=True)
    for axis, stash in ((-1, 1), (1, 1)):
        shape = (2, 3, 64)[axis:]
        yield Case(
            "LayerNormalization", [half(2, 3, 64), half(*shape), half(*shape)],
            {"axis": axis, "epsilon": 1e-6, "stash_type": stash}, loose=True,
        )  # fmt: skip
    yield Case("RMSNormalization", [half(2, 3, 64), half(64)], {"epsilon": 1e-6}, 23, loose=True)
    yield Case("GroupNormalization", [half(2, 6, 4, 5), half(3), half(3)], {"num_groups": 3}, 18, loose=True)
    yield Case("GroupNormalization", [half(2, 6, 4, 5), half(6), half(6)], {"num_groups": 3}, 21, loose=True)
    yield Case("GroupNormalization", [half(2, 6, 9), half(6), half(6)], {"num_groups": 2}, 21, loose=True)
    for spatial in ((7,), (4, 5)):
        images, vectors = half(2, 6, *spatial), [half(6), half(6)]
        yield Case("InstanceNormalization", [images, *vectors], {"epsilon": 1e-3}, loose=True)
        for opset in (9, 15):
            statistics = [half(6), positive(6)]
            yield Case(
                "BatchNormalization", [images, *vectors, *statistics], {}, opset, loose=True, by_onnxruntime=opset == 9
            )


def _spatial() -> Iterator[Case]:
    def conv(shape: tuple[int, ...], kernel: tuple[int, ...], group: int = 1, **attributes: object) -> Case:
        weight = half(6, shape[1] // group, *kernel)
        return Case("Conv", [half(*shape), weight, half(6)], {"group": group, **attributes}, loose=True)

    yield conv((2, 4, 8, 8), (3, 3), 2, strides=[2, 1], pads=[1, 1, 1, 1], kernel_shape=[3, 3], dilations=[1, 1])
    yield conv((2, 4, 8, 7), (3, 2), strides=[2, 1], pads=[0, 1, 2, 0])
    yield conv((1, 6, 9, 9), (7, 7), 6, pads=[3, 3, 3, 3])
    yield conv((2, 6, 11), (7,), 6, pads=[3, 3])
    yield conv((2, 4, 11), (3,), pads=[2, 0], dilations=[2])
    yield conv((1, 2, 4, 5, 6), (2, 3, 2), pads=[0, 1, 1, 1, 0, 0], strides=[1, 2, 1])
    for kind in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        yield conv((1, 2, 8, 9), (3, 4), auto_pad=kind, strides=[2, 3])
    yield Case("Conv", [half(1, 2, 5, 5), half(3, 2, 1, 1)], loose=True)

    def transposed(shape: tuple[int, ...], weight: tuple[int, ...], **attributes: object) -> Case:
        return Case("ConvTranspose", [half(*shape), half(*weight), half(weight[1])], attributes, loose=True)

    yield transposed((2, 4, 5, 6), (4, 3, 2, 2), strides=[2, 2])
    yield transposed((2, 4, 5, 6), (4, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])
    yield transposed((1, 4, 5), (4, 3, 4), strides=[2], pads=[2, 1])
    yield transposed((1, 4, 5, 4), (4, 3, 3, 2), dilations=[2, 1], pads=[0, 1, 1, 0])
    for kind in ("SAME_UPPER", "SAME_LOWER"):
        yield transposed((1, 2, 4, 5), (2, 3, 3, 3), strides=[2, 2], auto_pad=kind)

    for name in ("AveragePool", "MaxPool"):
        wholly = [{"count_include_pad": 0}, {"count_include_pad": 1}] if name == "AveragePool" else [{}]
        for extra in wholly:
            for images, attributes in (
                (half(2, 4, 8, 8), {"kernel_shape": [8, 8]}),
                (half(2, 3, 9), {"kernel_shape": [3], "strides": [2]}),
                (half(1, 2, 7, 6), {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 1]}),
                (half(1, 2, 8, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
                (half(1, 2, 8, 7), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
                (half(1, 2, 7, 8), {"kernel_shape": [3, 3], "strides": [2, 3], "auto_pad": "SAME_UPPER"}),
                (half(1, 2, 7, 8), {"kernel_shape": [3, 4], "strides": [2, 3], "auto_pad": "SAME_LOWER"}),
                (half(1, 2, 4, 5, 6), {"kernel_shape": [2, 2, 3], "strides": [2, 1, 3]}),
                (half(1, 2, 9, 9), {"kernel_shape": [2, 3], "dilations": [2, 3]}),
            ):
                lower = attributes.get("auto_pad") == "SAME_LOWER"
                yield Case(name, [images], attributes | extra, loose=name == "AveragePool", by_onnxruntime=lower)
    for shape in ((2, 4, 8, 8), (2, 3, 9), (1, 2, 3, 4, 5)):
        yield Case("GlobalAveragePool", [half(*shape)], loose=True)
        yield Case("GlobalMaxPool", [half(*shape)], by_onnxruntime=len(shape) != 4)
    yield Case("DepthToSpace", [half(1, 8, 2, 3)], {"blocksize": 2})
    yield Case("DepthToSpace", [half(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"})
    yield Case("SpaceToDepth", [half(1, 2, 4, 6)], {"blocksize": 2})
    yield from _resized()


def _resized() -> Iterator[Case]:
    def resize(shape: tuple[int, ...], to: list[float], opset: int = 19, **attributes: object) -> Case:
        """`to`: sizes if whole numbers, else scales."""
        whole = all(isinstance(each, int) for each in to)
        given = [None, None, ints(*map(int, to))] if whole else [None, floats(*to)]
        return Case("Resize", [half(*shape), *given], attributes, opset, loose=attributes.get("mode") != "nearest")

    every = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")
    for coordinates in every:
        for mode in ("nearest", "linear", "cubic"):
            for to in ([1, 2, 7, 9], [1, 2, 3, 2], [1.0, 1.0, 2.0, 0.6]):
                yield resize((1, 2, 4, 5), to, mode=mode, coordinate_transformation_mode=coordinates)
    for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
        for coordinates in ("half_pixel", "asymmetric"):
            yield resize(
                (1, 1, 4, 5), [1, 1, 7, 3], mode="nearest", nearest_mode=rounding,
                coordinate_transformation_mode=coordinates,
            )  # fmt: skip
    for mode in ("linear", "cubic"):
        yield resize((1, 1, 9, 8), [1, 1, 4, 3], mode=mode, antialias=1)
        yield resize((1, 1, 9, 8), [1, 1, 12, 3], mode=mode, antialias=1)
        yield resize((1, 1, 5, 6), [1, 1, 8, 3], mode=mode, exclude_outside=1)
        yield resize((1, 2, 6), [1, 2, 9], mode=mode)
    yield resize((1, 1, 5, 6), [1, 1, 8, 3], mode="cubic", cubic_coeff_a=-0.5)
    for policy in ("not_larger", "not_smaller"):
        yield resize((1, 1, 5, 6), [8, 7], mode="linear", axes=[2, 3], keep_aspect_ratio_policy=policy)
    yield resize((1, 1, 5, 6), [2.0, 1.5], mode="linear", axes=[2, 3])
    yield Case("Resize", [half(1, 1, 3, 6), None, floats(1, 1, 5 / 3, 2)], {"mode": "linear"}, 19, 1, True, True)
    yield Case("Resize", [half(1, 1, 4, 4), floats(), floats(1, 1, 2, 2)], {"mode": "linear"}, 11, loose=True)


HOSTILE = np.array([[np.nan, 1, -np.inf, np.inf, -0.0, 2], [3, np.nan, np.inf, -2, 0, np.nan]], np.float16)
NONE = np.zeros((2, 0, 3), np.float16)


def _hostile() -> Iterator[Case]:
    """NaN, infinities, negative indices and empty tensors, for what decides among values and moves them."""
    for name in (
        "Relu",
        "Sigmoid",
        "Exp",
        "Log",
        "Floor",
        "Round",
        "Sqrt",
        "Abs",
        "Sign",
        "Tanh",
        "Reciprocal",
        "IsNaN",
    ):
        yield Case(name, [HOSTILE], loose=True)
        yield Case(name, [NONE])
    for signs in ({}, {"detect_negative": 0}, {"detect_positive": 0}):
        yield Case("IsInf", [HOSTILE], signs)
    yield Case("Clip", [HOSTILE, number(-1), number(1)])
    yield Case("Div", [HOSTILE, HOSTILE[::-1]])
    yield Case("Where", [np.isnan(HOSTILE), number(0), HOSTILE])
    for name in ("Max", "Min"):
        yield Case(name, [HOSTILE, HOSTILE[::-1]])
        yield Case(name, [WHOLE, ints(1, 2, 3)])
    for name in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
        yield Case(name, [HOSTILE, HOSTILE[::-1]])
        yield Case(name, [WHOLE, ints(5)])
    for name in ("Softmax", "LogSoftmax"):
        yield Case(name, [HOSTILE], {"axis": 1}, loose=True)
        yield Case(name, [np.full((2, 3), -np.inf, np.float16)], {"axis": 1})
    for name in ("ArgMax", "ArgMin"):
        yield Case(name, [HOSTILE], {"axis": 1})
    for name in ("ReduceMax", "ReduceMin", "ReduceSum"):
        yield Case(name, [HOSTILE, ints(1)])
        for axis in (1, 2):
            yield Case(name, [NONE, ints(axis)], {"keepdims": axis - 1})
        yield Case(name, [NONE.astype(np.int64), ints(1)])
    for largest in (0, 1):
        yield Case("TopK", [HOSTILE, ints(4)], {"axis": 1, "largest": largest}, 20, 2)
    yield Case("TopK", [NONE, ints(0)], {"axis": 1}, 20, 2)
    yield Case("TopK", [WHOLE, ints(2)], {"axis": 0}, 20, 2)
    yield Case("CumSum", [HOSTILE, np.array(-1)])
    yield Case("CumSum", [NONE, np.array(1)], {"exclusive": 1})
    yield Case("CumSum", [WHOLE, np.array(1)], {"exclusive": 1})
    yield Case("Concat", [NONE, half(2, 1, 3)], {"axis": -2})
    yield Case("Gather", [half(4, 5), np.array([-4, -1, 3, 0], np.int32)])
    yield Case("Gather", [half(4, 5), np.zeros((2, 0), np.int64)], {"axis": -1})
    yield Case("GatherElements", [half(3, 4), np.array([[-3, 2, 0, -1]], np.int32)])
    yield Case("GatherElements", [half(3, 4), np.zeros((0, 4), np.int64)])
    yield Case("GatherND", [half(2, 3), np.array([[[1], [-1]], [[0], [2]]])], {"batch_dims": 1})
    yield Case("GatherND", [half(3, 4), np.zeros((0, 2), np.int64)])
    yield Case("ScatterND", [half(3, 4), np.zeros((0, 2), np.int64), half(0)])
    yield Case("ScatterND", [half(3, 4), np.array([[-1, -1]]), half(1)])
    yield Case("ScatterElements", [half(3, 4), np.zeros((0, 2), np.int64), half(0, 2)])
    yield Case("MatMul", [half(0, 3), half(3, 2)])
    yield Case("Cast", [np.array([1e6, -1e6, 7e4], np.float32)], {"to": TensorProto.FLOAT16})
    yield Case("MaxPool", [half(1, 2, 5, 4)], {"kernel_shape": [1, 1], "strides": [2, 2]})
    for mode in ("linear", "nearest"):
        for coordinates in ("half_pixel", "align_corners"):
            for shape, size in (((1, 2, 4, 5), (16, 20)), ((1, 1, 1, 1), (3, 4)), ((1, 2, 6, 7), (1, 1))):
                attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
                yield Case("Resize", [half(*shape), None, None, ints(*shape[:2], *size)], attributes, loose=True)


def _moved() -> Iterator[Case]:
    yield Case("Identity", [half(4, 5)])
    yield Case("Concat", [half(2, 3), half(2, 5)], {"axis": 1})
    yield Case("Reshape", [half(2, 3, 4), ints(0, -1)])
    for axis in (0, 1, -1):
        yield Case("Flatten", [half(2, 3, 4)], {"axis": axis})
    yield Case("Transpose", [half(2, 3, 4)], {"perm": [2, 0, 1]})
    yield Case("Transpose", [half(2, 3, 4)])
    yield Case("Unsqueeze", [half(2, 3), ints(0, -1)])
    yield Case("Unsqueeze", [half(2, 3)], {"axes": [0, 3]}, 11)
    yield Case("Squeeze", [half(2, 1, 3, 1), ints(1, -1)])
    yield Case("Squeeze", [half(2, 1, 3, 1)], {"axes": [1]}, 11)
    yield Case("Squeeze", [half(2, 1, 3, 1)])
    yield Case("Expand", [half(2, 1, 3), ints(4, 1, 5, 1)])
    yield Case("Tile", [half(2, 3), ints(2, 3)])
    yield Case("Slice", [half(4, 7, 5), ints(1, -6, -1), ints(3, 100, -100), ints(0, 1, 2), ints(1, 2, -1)])
    yield Case("Slice", [half(4, 7), ints(1), ints(3)])
    yield Case("Slice", [half(4, 7)], {"starts": [1, -3], "ends": [3, 1000], "axes": [0, 1]}, 9)
    yield Case("Split", [half(2, 7), ints(3, 4)], {"axis": 1}, 13, 2)
    yield Case("Split", [half(2, 6)], {"axis": -1}, 13, 3)
    yield Case("Split", [half(2, 7)], {"axis": 1, "num_outputs": 3}, 18, 3)
    yield Case("Split", [half(2, 7)], {"axis": 1, "split": [2, 5]}, 11, 2)
    for kind in ("constant", "edge", "reflect", "wrap"):
        yield Case("Pad", [half(2, 5), ints(0, 3, 1, 2) if kind != "reflect" else ints(1, 3, 1, 4)], {"mode": kind})
    yield Case("Pad", [half(2, 5), ints(1, 2), number(7), ints(-1)])
    yield Case("Pad", [half(2, 5)], {"pads": [0, 3, 1, 2], "value": 1.5}, 10)
    yield Case("Gather", [half(4, 5), ints(-1, 2)], {"axis": 1})
    yield Case("Gather", [half(4, 5), np.array(2)])
    yield Case("Gather", [half(4), np.array(-1)])
    yield Case("GatherND", [half(3, 4), ints(1, -1)])
    yield Case("GatherElements", [half(3, 4), np.array([[0, -1], [2, 1], [0, 0]])], {"axis": 1})
    yield Case("GatherND", [half(3, 4, 2), np.array([[0, 1], [-1, 2]])])
    yield Case("GatherND", [half(2, 3, 4), np.array([[[1], [0]], [[2], [2]]])], {"batch_dims": 1})
    indices, updates = np.array([[0, 1], [2, 3], [0, 1]]), half(3, 2)
    for kind in ("add", "mul", "max", "min"):
        yield Case("ScatterND", [half(3, 4, 2), indices, updates], {"reduction": kind}, 18, loose=True)
    yield Case("ScatterND", [half(3, 4, 2), indices[:2], updates[:2]])
    for kind in ("none", "add", "mul", "max", "min"):
        for axis in (0, 1, -1):
            places = np.array([[0, -1], [2, 1], [0, 0]])[: 2 + (kind != "none")]  # what meets needs a reduction
            attributes = {"axis": axis, "reduction": kind}
            yield Case("ScatterElements", [half(3, 4), places, half(3, 2)], attributes, 18, loose=True)
    yield Case("NonZero", [TIES])
    for axis in (0, 1, -1):
        yield Case("OneHot", [ints(0, 2, -1, 9), np.array(4), floats(-1, 2)], {"axis": axis})
    yield Case("TopK", [TIES, ints(3)], {"axis": 1}, 20, 2)
    yield Case("TopK", [TIES, ints(3)], {"axis": 1, "largest": 0}, 20, 2)
    yield Case("TopK", [np.round(half(1, 500)), ints(400)], {}, 20, 2)
    yield Case("TopK", [half(5, 3), ints(2)], {"axis": 0}, 20, 2)
    yield Case("Shape", [half(4, 5)])
    yield Case("Shape", [half(4, 5, 6, 7)], {"start": 1, "end": -1})
    yield Case("Size", [half(4, 5)])
    yield Case("Range", [np.array(2), np.array(11), np.array(3)])
    yield Case("Range", [np.array(2), np.array(1), np.array(3)])
    yield Case("Range", [np.array(1.0, np.float32), np.array(-1.0, np.float32), np.array(-0.25, np.float32)])
    yield Case("ConstantOfShape", [ints(2, 3)])
    yield Case("ConstantOfShape", [ints(2, 3)], {"value": helper.make_tensor("v", TensorProto.INT64, [1], [7])})
    yield Case("Dropout", [half(2, 3), number(0.5)], {}, 13, 2)
    yield Case("Dropout", [half(2, 3)], {"ratio": 0.5}, 10)
    for upper in (0, 1):
        yield Case("Trilu", [half(4, 5), np.array(1)], {"upper": upper})


def _quantized() -> Iterator[Case]:
    """In INT8 and UINT8; float8 has its own tests, because numpy does not hold it."""
    for dtype, zero in ((np.int8, -5), (np.uint8, 130)):
        zeros = np.array([zero, 0, 3], dtype)
        yield Case("QuantizeLinear", [half(40, scale=9), number(0.1), np.array(zero, dtype)], {}, 19)
        yield Case("QuantizeLinear", [half(2, 3, 4), np.float16([0.01, 0.02, 0.1]), zeros], {"axis": -2}, 13)
        integers = np.arange(24).reshape(2, 3, 4).astype(dtype)
        yield Case("DequantizeLinear", [integers, np.float16([0.01, 0.02, 0.1]), zeros], {"axis": -2}, 21)
        yield Case("DequantizeLinear", [integers, number(0.1)], {"output_dtype": TensorProto.FLOAT}, 23)


CASES = [*_elementwise(), *_products(), *_reductions(), *_spatial(), *_moved(), *_hostile(), *_quantized()]
