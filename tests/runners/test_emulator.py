"""The emulator as a runner, and where it rounds; test_emulator_operators.py has the operators one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.gates import GATES
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.verification.parity import differences
from tests.support.onnx_operators import Case, half, ints, one_node_file

IMAGES = runner_input(next(image_like_batches(3, 32, batch_size=3)), "float")


def one_operator(
    name: str, inputs: list[np.ndarray | None], attributes: dict[str, object], path: Path, opset: int = 20
) -> Path:
    """A file with one node; every input but the first is a constant, or absent where it is None."""
    return one_node_file(Case(name, inputs, attributes, opset), "float16", path)


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
    names = {step.name: step.outputs[0] for step in runner.graph.steps}
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


def test_a_file_that_is_no_onnx_model_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(CorruptArtifactError, match="is not an ONNX model"):
        EmulatedRunner(tmp_path / "garbage.onnx")
