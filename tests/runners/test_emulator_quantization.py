"""The emulator's QuantizeLinear, DequantizeLinear and float8 against ONNX's reference evaluator and ONNX Runtime."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.emulator.graph import Graph
from tests.support.onnx_operators import Case, half, number, one_node_file

TYPES = {
    "int8": np.int8, "uint8": np.uint8, "e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip
FLOAT8 = ("e4m3fn", "e5m2")
FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
EDGES = [0.5, 1.5, 2.5, -0.5, -1.5, -0.0, 126.5, 127.5, 128, -128.5, 255.5, 447, 464, 465, 480, 6e4, 6.2e4, -6.5e4]
"""Ties, and the ends of each type's range, with a scale of 1."""
NORMAL = np.random.default_rng(0).standard_normal(20_000) * 8


def tensor(array: np.ndarray) -> Tensor:
    """With types that numpy has not, by their bits."""
    native = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
    if array.dtype.name not in native:
        return torch.from_numpy(array.copy())
    bits = array.view(np.int16 if array.itemsize == 2 else np.uint8).copy()
    return torch.from_numpy(bits).view(native[array.dtype.name])


def both(case: Case, folder: Path) -> tuple[Tensor, Tensor]:
    """What the emulator and the reference evaluator give for a node, without changing the types of its inputs."""
    path, images = one_node_file(case, "float16", folder / "one.onnx"), case.inputs[0]
    assert images is not None
    with np.errstate(all="ignore"):
        (expected,) = ReferenceEvaluator(str(path)).run(None, {"images": images})
    return Graph(path).evaluate(tensor(images)).tensors["out"], tensor(np.asarray(expected))


def assert_same(output: Tensor, expected: Tensor) -> None:
    """Equal in type, shape and value, with NaN at the same places and the same signs of zero."""
    assert (output.dtype, output.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(output.double(), expected.double(), rtol=0, atol=0, equal_nan=True)
    nan = output.double().isnan()
    assert output.double().signbit()[~nan].equal(expected.double().signbit()[~nan])


def quantize(name: str, dtype: type, values: object, scale: object, zero: int = 0, **attributes: object) -> Case:
    """With a zero point of the output's type, one for each scale."""
    scales = np.asarray(scale).astype(dtype)
    zeros = np.full(scales.shape, zero).astype(TYPES[name])
    opset = 23 if "precision" in attributes else 19
    return Case("QuantizeLinear", [np.asarray(values).astype(dtype), scales, zeros], attributes, opset)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", TYPES)
def test_quantizing_gives_exactly_what_the_reference_evaluator_gives(name: str, dtype: type, tmp_path: Path) -> None:
    for values, scale in ((EDGES, 1.0), (NORMAL, 0.1), (NORMAL, 0.0037)):
        assert_same(*both(quantize(name, dtype, values, scale), tmp_path))
    assert_same(*both(quantize(name, dtype, NORMAL.reshape(2, 4, -1), [0.1, 1, 3, 0.02], axis=-2), tmp_path))
    if name in FLOAT8:
        values = [*EDGES, np.inf, -np.inf, np.nan]
        for saturate in (0, 1):
            assert_same(*both(quantize(name, dtype, values, 1.0, saturate=saturate), tmp_path))
    else:
        assert_same(*both(quantize(name, dtype, NORMAL, 0.1, zero=7), tmp_path))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    st.floats(2**-10, 64, width=16), st.sampled_from(list(TYPES)), st.sampled_from(FLOATS),
)  # fmt: skip
def test_any_finite_value_is_quantized_and_dequantized_as_by_the_reference_evaluator(
    tmp_path: Path, values: list[float], scale: float, name: str, dtype: type
) -> None:
    """Quotients beyond the range of float16 are left out for integers: the reference evaluator casts infinity there."""
    with np.errstate(over="ignore"):
        quotients = np.array(values).astype(dtype) / np.array(scale, dtype)
    assume(name in FLOAT8 or np.isfinite(quotients.astype(np.float32)).all())
    quantized, expected = both(quantize(name, dtype, values, scale), tmp_path)
    assert_same(quantized, expected)
    whole = quantized.view(torch.uint8).numpy().view(TYPES[name])
    assert_same(*both(Case("DequantizeLinear", [whole, np.array(scale, dtype)], {}, 19), tmp_path))


def test_integers_round_half_to_even_and_saturate(tmp_path: Path) -> None:
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 127.5, -129, np.inf, -np.inf, np.nan]
    for dtype in FLOATS:
        path = one_node_file(quantize("int8", dtype, values, 1.0), "float16", tmp_path / "one.onnx")
        found = Graph(path).evaluate(tensor(np.array(values).astype(dtype))).tensors["out"]
        assert found.tolist() == [0, 2, 2, 0, -2, 127, -128, 127, -128, -128]
    path = one_node_file(quantize("int8", np.float16, [32768, -32768], 0.5), "float16", tmp_path / "one.onnx")
    quotients_are_infinite = torch.tensor([32768, -32768], dtype=torch.float16)
    assert Graph(path).evaluate(quotients_are_infinite).tensors["out"].tolist() == [127, -128]


def test_output_type_is_that_of_zero_point_or_attribute_and_uint8_by_default(tmp_path: Path) -> None:
    for attributes, dtype in (({}, torch.uint8), ({"output_dtype": TensorProto.INT8}, torch.int8),
                              ({"output_dtype": TensorProto.FLOAT8E4M3FN}, torch.float8_e4m3fn)):  # fmt: skip
        output, expected = both(Case("QuantizeLinear", [half(9), number(0.01)], attributes, 21), tmp_path)
        assert_same(output, expected)
        assert output.dtype == dtype


def test_scales_of_another_type_and_int32_are_as_in_the_reference_evaluator(tmp_path: Path) -> None:
    for scale in (np.array(0.1, np.float32), np.array(0.1, ml_dtypes.bfloat16)):
        for precision in ({}, {"precision": TensorProto.FLOAT}, {"precision": TensorProto.FLOAT16}):
            case = Case("QuantizeLinear", [NORMAL.astype(np.float16), scale, np.int8(3)], precision, 23)
            assert_same(*both(case, tmp_path))
    bias = np.array([[-70000, 2**24 + 1, 5]], np.int32)
    assert_same(*both(Case("DequantizeLinear", [bias, np.float32([1e-3, 2, 3])], {}, 19), tmp_path))


def onnx_runtime(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """On the CPU, node by node as the graph is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def saved(
    path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, list[int | None]], outputs: str, **constants: np.ndarray
) -> Path:
    """A graph of FP16 inputs and outputs, opset 23."""

    def value(name: str, shape: list[int | None] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)

    graph = helper.make_graph(
        nodes, "graph", [value(*item) for item in inputs.items()], [value(name, None) for name in outputs.split()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def pair(source: str, scale: str, zero: str, **attributes: object) -> list[onnx.NodeProto]:
    """QuantizeLinear and DequantizeLinear behind a tensor; what comes out is called `source`.dq."""
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero], [f"{source}.q"], f"{source}.q", **attributes),
        helper.make_node("DequantizeLinear", [f"{source}.q", scale, zero], [f"{source}.dq"], f"{source}.dq"),
    ]


@pytest.mark.parametrize("name", TYPES)
def test_onnx_runtime_rounds_once_in_fp16_as_precision_float_does(name: str, tmp_path: Path) -> None:
    values, constants = NORMAL.astype(np.float16), {"scale": np.float16(0.1), "zero": np.zeros((), TYPES[name])}
    results = []
    for precision in (TensorProto.FLOAT, TensorProto.FLOAT16):
        nodes = pair("x", "scale", "zero", precision=precision)
        path = saved(tmp_path / "pair.onnx", nodes, {"x": [None]}, "x.dq", **constants)
        results.append(Graph(path).evaluate(torch.from_numpy(values)).tensors["x.dq"])
    (expected,) = onnx_runtime(path, {"x": values})
    assert_same(results[0], torch.from_numpy(expected))
    assert 0.002 < float((results[1] != results[0]).double().mean()) < 0.02


@pytest.mark.parametrize("name", ["int8", "e4m3fn"])
def test_a_product_between_quantized_tensors_is_onnx_runtime_s(name: str, tmp_path: Path) -> None:
    """Images, a reshaped product with constant weights in 8 bits, and its result, all quantized."""
    one = TensorProto.FLOAT
    weight = np.random.default_rng(1).integers(-100, 100, (48, 16)).astype(TYPES[name])
    nodes = [
        helper.make_node("Reshape", ["images", "shape"], ["x"], "x"),
        *pair("x", "scale", "zero", precision=one),
        helper.make_node("Transpose", ["weight"], ["turned"], "turned"),
        helper.make_node("Transpose", ["turned"], ["straight"], "straight"),
        helper.make_node("DequantizeLinear", ["straight", "scales", "zeros"], ["w"], "w", axis=1),
        helper.make_node("MatMul", ["x.dq", "w"], ["product"], "product"),
        *pair("product", "wider", "zero", precision=one),
    ]
    constants = {
        "shape": np.array([-1, 48]), "weight": weight, "zero": np.zeros((), TYPES[name]),
        "zeros": np.zeros(16, TYPES[name]), "scale": np.float16(0.01), "wider": np.float16(0.07),
        "scales": np.random.default_rng(2).uniform(0.001, 0.02, 16).astype(np.float16),
    }  # fmt: skip
    path = saved(tmp_path / "graph.onnx", nodes, {"images": [4, 3, 4, 4]}, "x.dq w product product.dq", **constants)
    runner = EmulatedRunner(path)
    assert (runner.info.precision, runner.graph.constants["weight"].itemsize) == ("fp16", 1)
    images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    output = runner.graph.evaluate(images, ("x.q",)).tensors
    x, w, product, quantized = map(torch.from_numpy, onnx_runtime(path, {"images": images.numpy()}))
    assert_same(output["x.dq"], x)
    assert_same(output["w"], w)
    assert_same(output["product"], (x.double() @ w.double()).half())
    # ONNX Runtime multiplies what it dequantized in FP32, before FP16 rounds it; so it does with optimisations off.
    exact_x = output["x.q"].double() * float(constants["scale"])
    exact_w = torch.from_numpy(weight.astype(np.float64) * constants["scales"].astype(np.float64))
    assert_same(product, (exact_x @ exact_w).half())
    torch.testing.assert_close(output["product"], product, rtol=0, atol=2**-10 * float(product.abs().max()))
    # A value between two steps may then fall to either, and few do.
    torch.testing.assert_close(output["product.dq"], quantized, rtol=2**-3 if name in FLOAT8 else 0, atol=0.075)
    assert float((output["product.dq"] == quantized).double().mean()) > 0.9
    assert float((output["product"] == quantized).double().mean()) < 0.5


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("saturate", [0, 1])
def test_cast_to_float8_and_back_is_the_reference_evaluator_s(name: str, saturate: int, tmp_path: Path) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    code = helper.np_dtype_to_tensor_dtype(np.dtype(TYPES[name]))
    for values in (every.view(np.float16), every.view(ml_dtypes.bfloat16), np.float32([*EDGES, 1e-4, np.inf, np.nan])):
        assert_same(*both(Case("Cast", [values], {"to": code, "saturate": saturate}, 21), tmp_path))
    like = [every.view(np.float16), np.zeros(1, TYPES[name])]
    assert_same(*both(Case("CastLike", like, {"saturate": saturate}, 21), tmp_path))
    bits = np.arange(256, dtype=np.uint8).view(TYPES[name])
    for to in (TensorProto.FLOAT16, TensorProto.FLOAT):
        assert_same(*both(Case("Cast", [bits], {"to": to}, 21), tmp_path))


@pytest.mark.parametrize(
    ("name", "others", "attributes"),
    [
        ("Reshape", [np.array([4, -1])], {}), ("Transpose", [], {"perm": [1, 0]}), ("Flatten", [], {"axis": 0}),
        ("Unsqueeze", [np.array([1])], {}), ("Slice", [np.array([1]), np.array([3])], {}), ("Identity", [], {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_tensors_of_8_bits_are_moved(
    name: str, others: list[np.ndarray | None], attributes: dict[str, object], dtype: type, tmp_path: Path
) -> None:
    tokens = np.arange(24, dtype=np.uint8).reshape(6, 4).view(dtype)
    assert_same(*both(Case(name, [tokens, *others], attributes, 21), tmp_path))


def test_nan_in_float8_is_reported_as_not_finite(tmp_path: Path) -> None:
    case = quantize("e4m3fn", np.float16, [1.0], 1.0)
    graph = Graph(one_node_file(case, "float16", tmp_path / "one.onnx"))
    assert graph.evaluate(torch.tensor([1.0]).half()).first_nonfinite is None
    assert graph.evaluate(torch.tensor([torch.nan]).half()).first_nonfinite == "QuantizeLinear"


Q, DQ = "QuantizeLinear", "DequantizeLinear"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(Q, [half(2, 4), half(2, 2)], {"axis": 1, "block_size": 2}, 21), ("block_size is 2", "(2, 2)")),
        (Case(DQ, [np.zeros((2, 4), np.int8), half(2, 2)], {"axis": 1, "block_size": 2}, 21), ("block_size is 2",)),
        (Case(Q, [half(2, 4), half(2, 2)], {}, 19), ("(2, 2)",)),
        (Case(Q, [half(2, 4), half(3)], {}, 19), ("axis is 1", "3 values", "(2, 4)")),
        (Case(Q, [half(4), half(4)], {}, 19), ("axis is 1", "(4,)")),
        (Case(Q, [half(4), number(1), np.int16(0)], {}, 21), ("output", "int16", "float8_e4m3fn")),
        (Case(Q, [half(4), number(1), np.int8(0)], {"output_dtype": 2}, 21), ("zero point", "int8", "uint8")),
        (Case(Q, [half(4), number(1)], {"output_dtype": 21}, 21), ("output_dtype", "21")),
        (Case(Q, [half(4), number(1)], {"precision": 7}, 23), ("precision", "7")),
        (Case(Q, [np.arange(4, dtype=np.int32), np.float32(1)], {}, 19), ("input x", "int32")),
        (Case(Q, [half(4), number(1), np.ones((), TYPES["e4m3fn"])], {}, 19), ("zero point of float8",)),
        (Case(DQ, [np.zeros(4, np.int8), number(1), np.uint8(1)], {}, 19), ("zero point", "uint8", "int8")),
        (Case(DQ, [np.zeros(4, np.int8), np.int32(1)], {}, 19), ("scale", "int32")),
        (Case(DQ, [half(4), number(1)], {}, 19), ("input x", "float16")),
        (Case(DQ, [np.zeros(4, np.int8), number(1)], {"output_dtype": 7}, 23), ("output_dtype", "7")),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_quantized_is_refused_and_why(case: Case, words: tuple[str, ...], tmp_path: Path) -> None:
    images = case.inputs[0]
    assert images is not None
    graph = Graph(one_node_file(case, "float16", tmp_path / "one.onnx"))
    with pytest.raises(InputError) as caught:
        graph.evaluate(torch.from_numpy(images))
    for word in (case.name, *words):
        assert word in str(caught.value)
