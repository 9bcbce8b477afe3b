"""The emulator against ONNX's reference evaluator, operator by operator and as a whole network."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.gates import GATES
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.runners.emulator.operators import OPERATORS
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.verification.parity import differences

IMAGES = runner_input(next(image_like_batches(3, 32, batch_size=3)), "float")
RANDOM = np.random.default_rng(0)


def half(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float16)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CASES = {
    "Add": ([half(2, 3, 4), half(3, 1)], {}),
    "Sub": ([half(2, 3, 4), half(4)], {}),
    "Mul": ([half(2, 3, scale=300), half(2, 3, scale=300)], {}),
    "Div": ([half(2, 3), half(2, 3) + np.float16(3)], {}),
    "Pow": ([np.abs(half(2, 3, scale=200)), np.array(2, np.float16)], {}),
    "Sqrt": ([np.abs(half(2, 3))], {}),
    "Reciprocal": ([half(2, 3) + np.float16(4)], {}),
    "Erf": ([half(2, 3)], {}),
    "Gelu": ([half(2, 30, scale=3)], {}),
    "Cast": ([half(2, 3)], {"to": TensorProto.FLOAT}),
    "Concat": ([half(2, 3), half(2, 5)], {"axis": 1}),
    "Conv": (
        [half(2, 4, 8, 8), half(6, 2, 3, 3), half(6)],
        {"group": 2, "strides": [2, 1], "pads": [1, 1, 1, 1], "kernel_shape": [3, 3], "dilations": [1, 1]},
    ),
    "AveragePool": ([half(2, 4, 8, 8)], {"kernel_shape": [8, 8]}),
    "GlobalAveragePool": ([half(2, 4, 8, 8)], {}),
    "Gemm": ([half(2, 5), half(3, 5), half(3)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "MatMul": ([half(2, 3, 5), half(2, 5, 4)], {}),
    "LayerNormalization": ([half(2, 3, 64), half(64), half(64)], {"axis": -1, "epsilon": 1e-6}),
    "ReduceL2": ([half(2, 9, 4), ints(1)], {"keepdims": 1}),
    "ReduceMean": ([half(2, 9, 4), ints(1, 2)], {"keepdims": 0}),
    "ReduceSum": ([half(2, 9, 4), ints(-1)], {"keepdims": 1}),
    "ReduceSumSquare": ([half(2, 9, 4), ints(1)], {"keepdims": 1}),
    "Reshape": ([half(2, 3, 4), ints(0, -1)], {}),
    "Flatten": ([half(2, 3, 4)], {}),
    "Transpose": ([half(2, 3, 4)], {"perm": [2, 0, 1]}),
    "Unsqueeze": ([half(2, 3), ints(0, -1)], {}),
    "Squeeze": ([half(2, 1, 3, 1), ints(1, -1)], {}),
    "Expand": ([half(2, 1, 3), ints(4, 1, 5, 1)], {}),
    "Gather": ([half(4, 5), ints(-1, 2)], {"axis": 1}),
    "Slice": ([half(4, 7, 5), ints(1, -6, -1), ints(3, 100, -100), ints(0, 1, 2), ints(1, 2, -1)], {}),
    "Shape": ([half(4, 5)], {}),
    "Identity": ([half(4, 5)], {}),
}
LOOSE = {"Gelu", "LayerNormalization", "Conv", "MatMul", "Gemm", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Erf"}
"""The reference evaluator rounds within these as well, or sums in another order: a few units in the last place."""


def one_operator(name: str, inputs: list[np.ndarray], attributes: dict[str, object], path: Path) -> Path:
    """A file with one node; every input but the first is a constant."""
    values = [
        helper.make_tensor_value_info("images", helper.np_dtype_to_tensor_dtype(inputs[0].dtype), inputs[0].shape)
    ]
    constants = [numpy_helper.from_array(array, f"c{index}") for index, array in enumerate(inputs[1:])]
    node = helper.make_node(name, ["images", *(each.name for each in constants)], ["out"], name=name, **attributes)
    kind = {"Cast": TensorProto.FLOAT, "Shape": TensorProto.INT64}.get(name, TensorProto.FLOAT16)
    output = helper.make_tensor_value_info("out", kind, None)
    graph = helper.make_graph([node], "one", values, [output], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_every_operator_has_a_case() -> None:
    assert CASES.keys() == OPERATORS.keys()


@pytest.mark.parametrize("name", CASES)
def test_an_operator_gives_what_onnx_says(name: str, tmp_path: Path) -> None:
    inputs, attributes = CASES[name]
    path = one_operator(name, inputs, attributes, tmp_path / "one.onnx")
    with np.errstate(over="ignore"):
        (expected,) = ReferenceEvaluator(str(path)).run(None, {"images": inputs[0]})
    found = Graph(path).evaluate(torch.from_numpy(inputs[0])).tensors["out"].numpy()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    tolerance = 4e-3 if name in LOOSE else 0.0
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "value"), [("ReduceL2", 5.0), ("ReduceSumSquare", 5.0), ("ReduceSum", 30.0)])
def test_a_sum_in_fp16_overflows_here_and_not_on_onnx_runtime(name: str, value: float, tmp_path: Path) -> None:
    images = np.full((1, 56 * 56, 2), value, np.float16)
    path = one_operator(name, [images, ints(1)], {"keepdims": 0}, tmp_path / "one.onnx")
    assert Graph(path).evaluate(torch.from_numpy(images)).tensors["out"].tolist() == [[float("inf")] * 2]
    if name == "ReduceL2":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert session.run(None, {"images": images})[0].tolist() == [[280.0, 280.0]]


def test_small_values_vanish_when_squared_in_fp16(tmp_path: Path) -> None:
    images = np.full((1, 3136, 1), 1e-4, np.float16)
    path = one_operator("ReduceL2", [images, ints(1)], {"keepdims": 0}, tmp_path / "one.onnx")
    assert Graph(path).evaluate(torch.from_numpy(images)).tensors["out"].item() == 0.0


def test_a_layer_norm_that_stashes_in_fp16_overflows(tmp_path: Path) -> None:
    inputs = [half(1, 1024, scale=300), np.ones(1024, np.float16)]
    for stash, finite in ((TensorProto.FLOAT, True), (TensorProto.FLOAT16, False)):
        path = one_operator("LayerNormalization", inputs, {"axis": -1, "stash_type": stash}, tmp_path / "one.onnx")
        found = Graph(path).evaluate(torch.from_numpy(inputs[0])).tensors["out"]
        assert bool((found.float().std() > 0.9) and torch.isfinite(found).all()) is finite


def test_a_whole_file_is_within_rounding_of_the_reference_evaluator(tiny_onnx_fp16) -> None:
    (expected,) = ReferenceEvaluator(str(tiny_onnx_fp16.path)).run(None, {"images": IMAGES.numpy()})
    found = EmulatedRunner(tiny_onnx_fp16.path).run(IMAGES)["logits"]
    assert GATES["fp16"].failures(differences(found, torch.from_numpy(expected).float())) == ()


def test_it_rounds_where_onnx_runtime_does_not(tiny_onnx_fp16) -> None:
    found = differences(
        EmulatedRunner(tiny_onnx_fp16.path).run(IMAGES)["logits"], OrtRunner(tiny_onnx_fp16.path).run(IMAGES)["logits"]
    )
    assert 1e-5 < found.relative_l2_max < GATES["fp16"].relative_l2_max


def test_tensors_can_be_kept_in_the_type_they_are_stored_in(tiny_onnx_fp16) -> None:
    runner = EmulatedRunner(tiny_onnx_fp16.path)
    names = {step.name: step.output for step in runner.graph.steps}
    square, product = names["stages.0.0.grn/ReduceSum"], names["stages.0.0.pwconv1/MatMul"]
    kept = runner.evaluate(IMAGES, (square, product)).tensors
    assert (kept[square].dtype, kept[product].dtype) == (torch.float32, torch.float16)
    assert kept.keys() == {square, product, "logits"}
    assert runner.graph.node_of(square) == "stages.0.0.grn/ReduceSum"


def test_the_first_operator_whose_result_is_not_finite_is_named(tiny_onnx_fp16) -> None:
    runner = EmulatedRunner(tiny_onnx_fp16.path)
    assert runner.evaluate(IMAGES).first_nonfinite is None
    runner.graph.constants["stages.2.1.pwconv2.weight"][:] = 60000.0
    assert str(runner.evaluate(IMAGES).first_nonfinite).startswith("stages.2.1.pwconv2/")


def test_batch_invariance_of_the_emulator(tiny_onnx_fp16) -> None:
    runner = EmulatedRunner(tiny_onnx_fp16.path)
    assert (runner.input_spec.min_batch, runner.input_spec.max_batch) == (1, 8)
    alone = torch.cat([runner.run(image[None])["logits"] for image in IMAGES])
    torch.testing.assert_close(runner.run(IMAGES)["logits"], alone, rtol=2e-2, atol=2e-2)
    assert (runner.info.precision, runner.info.arithmetic) == ("fp16", "fp16")


def test_a_file_without_half_weights_is_refused(tiny_onnx_fp32) -> None:
    with pytest.raises(InputError, match="no FP16 or BF16 weights"):
        EmulatedRunner(tiny_onnx_fp32.path)


def test_an_operator_it_does_not_know_is_named(tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    with pytest.raises(InputError, match=r"node Softmax is a ai\.onnx\.Softmax"):
        Graph(one_operator("Softmax", [half(2, 3)], {}, path))


def test_a_file_that_is_no_onnx_model_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(CorruptArtifactError, match="is not an ONNX model"):
        EmulatedRunner(tmp_path / "garbage.onnx")
