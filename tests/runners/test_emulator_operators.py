"""The emulator's operators against ONNX's reference evaluator, and what it says of those that it cannot run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.runners.emulator.operators import OPERATORS
from tests.support.onnx_operators import CASES, SHARP, Case, floats, half, ints, one_node_file

TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 2e-2}
"""Relative and absolute, of values around 1: a few units in the last place."""


OWN_TYPE = ("Cast", "ConstantOfShape", "DequantizeLinear", "OneHot", "Range")
"""Operators whose result need not have the type of the network's weights."""


def tensor(array: np.ndarray) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def emulated(case: Case, dtype: str, folder: Path) -> list[Tensor]:
    """Its outputs in the order of the node."""
    graph = Graph(one_node_file(case, dtype, folder / "one.onnx"))
    first = case.arrays(dtype)[0]
    assert first is not None
    tensors = graph.evaluate(tensor(first)).tensors
    return [tensors[name] for name in graph.outputs]


def judged(case: Case, dtype: str, folder: Path) -> list[np.ndarray]:
    """What ONNX's reference evaluator gives, or ONNX Runtime where the case says so."""
    path = one_node_file(case, dtype, folder / "judged.onnx")
    if case.by_onnxruntime:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return list(session.run(None, {"images": case.arrays(dtype)[0]}))
    with np.errstate(all="ignore"):
        return [
            np.asarray(array) for array in ReferenceEvaluator(str(path)).run(None, {"images": case.arrays(dtype)[0]})
        ]


def test_every_operator_has_a_case() -> None:
    assert {case.name for case in CASES} == OPERATORS.keys()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_gives_what_onnx_says(case: Case, dtype: str, tmp_path: Path) -> None:
    tolerance = TOLERANCE[dtype] if case.loose or dtype == "float32" else 0.0
    for output, expected in zip(emulated(case, dtype, tmp_path), judged(case, dtype, tmp_path), strict=True):
        array = output.numpy()
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(array.astype(np.float64), expected.astype(np.float64), tolerance, tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_in_bf16_gives_what_onnx_says_in_fp32(case: Case, tmp_path: Path) -> None:
    rounded = [array if array is None else tensor(array) for array in case.arrays("bfloat16")]
    inputs = [a if a is None else (a.float() if a.dtype == torch.bfloat16 else a).numpy() for a in rounded]
    expected = judged(replace(case, inputs=inputs), "float32", tmp_path)
    for output, wanted in zip(emulated(case, "bfloat16", tmp_path), expected, strict=True):
        assert (output.dtype == torch.bfloat16) == (wanted.dtype == np.float32) or case.name in OWN_TYPE
        finite = wanted.astype(np.float64)[np.isfinite(wanted)]
        tolerance = TOLERANCE["bfloat16"] * max(1.0, float(np.abs(finite).max(initial=0)))
        np.testing.assert_allclose(output.double().numpy(), wanted.astype(np.float64), TOLERANCE["bfloat16"], tolerance)


WRONG = [
    (Case("Conv", [half(1, 2, 5, 6), half(3, 2, 2, 2)], {"pads": [0, 0, 1, 1]}), {"pads": [1, 1, 0, 0]}),
    (Case("AveragePool", [half(1, 1, 5, 5)], {"kernel_shape": [3, 3], "pads": [1] * 4}), {"count_include_pad": 1}),
    (Case("Resize", [half(1, 1, 4, 4), None, floats(1, 1, 2, 2)], {"mode": "linear"}), {"mode": "cubic"}),
    (Case("Softmax", [half(2, 3)]), {"axis": 0}),
    (Case("Gelu", [half(50, scale=2)]), {"approximate": "tanh"}),
    (Case("ArgMax", [np.array([[1, 1, 0]], np.float16)], {"axis": 1}), {"select_last_index": 1}),
    (Case("Mod", [np.array([-7.0], np.float16), np.array([3.0], np.float16)], {"fmod": 1}), {"fmod": 0}),
    (Case("QuantizeLinear", [half(3, 3), np.float16([0.01, 0.1, 1])], {"axis": 0, "output_dtype": 3}, 21), {"axis": 1}),
]


@pytest.mark.parametrize(("case", "change"), WRONG, ids=[str(case) for case, _ in WRONG])
def test_another_attribute_gives_another_result(case: Case, change: dict[str, object], tmp_path: Path) -> None:
    (before,) = emulated(case, "float32", tmp_path)
    (after,) = emulated(replace(case, attributes=case.attributes | change), "float32", tmp_path)
    assert not torch.allclose(before.double(), after.double(), rtol=1e-4, atol=1e-4)


POOLS = [
    (size, kernel, stride, padding, dilation, include)
    for size in (8, 9, 11)
    for kernel, stride, padding, dilation in ((2, 3, 0, 1), (3, 4, 1, 1), (4, 5, 2, 1), (3, 2, 1, 2), (5, 4, 2, 1))
    for include in (0, 1)
    if dilation == 1 or include
]


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "dilation", "include"), POOLS)
def test_pools_with_ceil_mode_are_torch_s(
    size: int, kernel: int, stride: int, padding: int, dilation: int, include: int, tmp_path: Path
) -> None:
    images = half(1, 2, size, size - 1)
    common = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [padding] * 4, "ceil_mode": 1}
    given = torch.from_numpy(images).float()
    (largest,) = emulated(Case("MaxPool", [images], common | {"dilations": [dilation] * 2}), "float32", tmp_path)
    expected = F.max_pool2d(given, kernel, stride, padding, dilation, ceil_mode=True)
    torch.testing.assert_close(largest, expected, rtol=0, atol=0)
    if dilation == 1:
        (mean,) = emulated(Case("AveragePool", [images], common | {"count_include_pad": include}), "float32", tmp_path)
        expected = F.avg_pool2d(given, kernel, stride, padding, ceil_mode=True, count_include_pad=bool(include))
        torch.testing.assert_close(mean, expected)


ROUNDS_ON_THE_WAY = {
    "GroupNormalization", "LayerNormalization", "Mean", "QuantizeLinear", "RMSNormalization", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare", "Sum",
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in ROUNDS_ON_THE_WAY], ids=str)
def test_an_operator_rounds_its_fp32_result_once(case: Case, tmp_path: Path) -> None:
    single = emulated(case, "float32", tmp_path)
    for output, exact in zip(emulated(case, "float16", tmp_path), single, strict=True):
        torch.testing.assert_close(output, exact.to(output.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case("Sum", [np.float16([6e4]), np.float16([6e4]), np.float16([-6e4])]), np.inf),
        (Case("Mean", [np.float16([6e4]), np.float16([6e4])]), np.inf),
        (Case("ReduceMean", [np.float16([6e4, 6e4])]), np.float16(6e4)),
        (Case("ReduceSumSquare", [np.float16([300, 1])]), np.inf),
        (Case("ReduceL2", [np.float16([1e-4, 1e-4])]), 0.0),
        (Case("ReduceL1", [np.float16([4e4, -4e4])]), np.inf),
        (Case("ReduceLogSumExp", [np.float16([12, 0])]), np.inf),
        (Case("LogSoftmax", [np.float16([12, 12])]), np.float16(-np.log(2))),
        (Case("InstanceNormalization", [np.float16([[[600, -600]]]), np.float16([1]), np.float16([0])]), 1.0),
    ],
    ids=str,
)
def test_what_is_stored_on_the_way_is_rounded_and_nothing_else(case: Case, expected: float, tmp_path: Path) -> None:
    (output,) = emulated(case, "float16", tmp_path)
    assert float(output.flatten()[0]) == expected


def test_softmax_rounds_once_and_its_parts_each_round(tmp_path: Path) -> None:
    scores = np.full((1, 4096), 3.0, np.float16)
    (whole,) = emulated(Case("Softmax", [scores]), "float16", tmp_path)
    assert whole.unique().tolist() == [float(np.float16(1 / 4096))]
    (powers,) = emulated(Case("Exp", [scores]), "float16", tmp_path)
    (total,) = emulated(Case("ReduceSum", [powers.numpy(), ints(1)]), "float16", tmp_path)
    assert total.isinf().all()  # 4096 e³ is 82271


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case("Conv", [half(1, 2, 5, 5), half(3, 2, 1, 1)], {"auto_pad": "SOME"}), ("auto_pad", "SOME")),
        (Case("Resize", [half(1, 1, 2, 2), None, floats(1, 1, 2, 2)], {"mode": "area"}), ("mode", "area")),
        (
            Case(
                "Resize",
                [half(1, 1, 2, 2), floats(0, 0, 0, 0, 1, 1, 1, 1), floats(1, 1, 2, 2)],
                {"coordinate_transformation_mode": "tf_crop_and_resize"},
            ),
            ("coordinate_transformation_mode", "tf_crop_and_resize"),
        ),
        (Case("Resize", [half(1, 1, 2, 2), floats(1, 1, 2, 2)], {}, 10), ("opset 10",)),
        (Case("Pad", [half(1, 2), ints(1, 1, 1, 1)], {"mode": "mirror"}), ("mode", "mirror")),
        (Case("ScatterND", [half(3, 2), np.array([[0]]), half(1, 2)], {"reduction": "mean"}), ("reduction", "mean")),
        (Case("ScatterElements", [half(3, 2), np.array([[0]]), half(1, 1)], {"reduction": "mean"}), ("reduction",)),
        (Case("Gather", [half(4, 2), ints(1, 4)]), ("index 4", "-4 to 3")),
        (Case("GatherElements", [half(4, 2), np.array([[-5, 0]])]), ("index -5",)),
        (Case("GatherND", [half(4, 2), np.array([[3, 2]])]), ("index 2",)),
        (Case("ScatterND", [half(3, 2), np.array([[3]]), half(1, 2)]), ("index 3",)),
        (Case("MaxPool", [half(1, 2, 4, 4)], {"kernel_shape": [2, 2]}, outputs=2), ("2 outputs",)),
        (Case("BatchNormalization", [half(1, 2, 4), *[half(2)] * 4], {"training_mode": 1}), ("training_mode",)),
        (Case("Dropout", [half(2), np.array(0.5, np.float32), np.array(True)]), ("training_mode",)),
        (Case("Cast", [half(2)], {"to": TensorProto.STRING}), ("attribute to", "8")),
        (Case("MatMul", [half(2, 3), half(2, 3)]), ("(2, 3)", "shapes cannot be multiplied")),
        (Case("Slice", [SHARP, ints(0), ints(3), ints(0), ints(0)]), ("step 0",)),
        (Case("Relu", [SHARP], {"slope": 3.0}), ("attributes slope",)),
        (Case("Gelu", [SHARP], {}, 17), ("opset 17",)),
        (Case("NonMaxSuppression", [SHARP]), ("ai.onnx.NonMaxSuppression", "does not know")),
    ],
    ids=str,
)
def test_what_cannot_be_emulated_is_refused_with_node_and_attribute(
    case: Case, words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        emulated(case, "float32", tmp_path)
    for word in (case.name, *words):
        assert word in str(caught.value)


def saved_graph(path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, ...]], outputs: str) -> Graph:
    """A graph of FP32 inputs of those shapes."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()]
    graph = helper.make_graph(nodes, "graph", values, results)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return Graph(path)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"value": numpy_helper.from_array(np.array([1, 2], np.int8))}, torch.tensor([1, 2], dtype=torch.int8)),
        ({"value_float": 0.1}, torch.tensor(0.1)),
        ({"value_floats": [0.5, 2.0]}, torch.tensor([0.5, 2.0])),
        ({"value_int": 3}, torch.tensor(3)),
        ({"value_ints": [3, 4]}, torch.tensor([3, 4])),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_constant_is_read_in_all_its_forms(attributes: dict[str, object], expected: Tensor, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["constant"], **attributes),
        helper.make_node("Cast", ["constant"], ["out"], to=TensorProto.FLOAT),
    ]
    graph = saved_graph(tmp_path / "constant.onnx", nodes, {"images": (1,)}, "out")
    assert (graph.constants["constant"].dtype, graph.constants["constant"].shape) == (expected.dtype, expected.shape)
    assert graph.evaluate(torch.zeros(1)).tensors["out"].equal(expected.float())


def test_a_graph_of_several_inputs_takes_them_by_name_and_gives_all_outputs(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Split", ["tokens"], ["left", "right"], "split", axis=1, num_outputs=2),
        helper.make_node("Where", ["mask", "left", "right"], ["chosen"], "where"),
        helper.make_node("TopK", ["chosen", "count"], ["", "order"], "top"),
        helper.make_node("Constant", [], ["count"], value_ints=[1]),
    ]
    nodes[3], nodes[2] = nodes[2], nodes[3]
    nodes.insert(0, helper.make_node("Greater", ["gate", "zero"], ["mask"], "mask"))
    nodes.insert(0, helper.make_node("Constant", [], ["zero"], value_float=0.0))
    graph = saved_graph(tmp_path / "two.onnx", nodes, {"tokens": (2, 4), "gate": (2, 2)}, "chosen order")
    tokens, gate = torch.arange(8.0).reshape(2, 4), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    evaluation = graph.evaluate({"tokens": tokens, "gate": gate}, keep=("right",))
    assert evaluation.tensors["chosen"].tolist() == [[0.0, 3.0], [6.0, 5.0]]
    assert evaluation.tensors["order"].tolist() == [[1], [0]]
    assert evaluation.tensors["right"].tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert (graph.node_of("right"), graph.node_of("order")) == ("split", "top")
    with pytest.raises(InputError, match="inputs gate"):
        graph.evaluate(tokens)
