"""What `rescue` finds in graphs of other exporters, and that its conversion changes types and nothing else."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper, parser

from cnx_deploy.core.gates import GATES, OutputSpec
from cnx_deploy.exporters.graph_checks import check_graph
from cnx_deploy.exporters.rescue import conversion
from cnx_deploy.exporters.rescue.conversion import Conversion, convert, prepared_model
from cnx_deploy.exporters.rescue.patterns import find_islands
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.verification.parity import differences
from tests.support.foreign_files import SIZE, exported, heat, network

VALUES = OutputSpec("answer", (), "value")

LAYOUTS = {  # shape, positions, channel
    "channels last": ("2,6,5,8", (1, 2), 3),
    "channels first": ("2,8,6,5", (2, 3), 1),
    "1-D, channels last": ("2,30,8", (1,), 2),
    "1-D, channels first": ("2,8,30", (2,), 1),
    "3-D": ("2,3,4,5,8", (1, 2, 3), 4),
}
NORMS = {
    "ReduceL2": "norm = ReduceL2 <keepdims = 1> (x, positions)",
    "ReduceSumSquare": "s = ReduceSumSquare <keepdims = 1> (x, positions) norm = Sqrt(s)",
    "Pow": "p = Pow(x, two) s = ReduceSum <keepdims = 1> (p, positions) norm = Sqrt(s)",
    "Abs": "b = Abs(x) p = Pow(b, two) s = ReduceSum <keepdims = 1> (p, positions) norm = Pow(s, half)",
    "Mul": "i = Identity(x) p = Mul(x, i) s = ReduceSum <keepdims = 1> (p, positions) norm = Sqrt(s)",
}
RATIOS = {
    "Div": "ratio = Div(norm, d) y = Mul(x, ratio)",
    "Reciprocal": "inverse = Reciprocal(d) ratio = Mul(inverse, norm) y = Mul(ratio, x)",
    "the tensor by the mean first": "inverse = Reciprocal(d) share = Mul(x, inverse) y = Mul(share, norm)",
    "gain first": "g = Mul(x, gamma) ratio = Div(norm, d) y = Mul(g, ratio)",
    "gain on the ratio": "ratio = Div(norm, d) g = Mul(ratio, gamma) y = Mul(x, g)",
    "the residual in the gain": "ratio = Div(norm, d) g = Mul(ratio, gamma) h = Add(two, g) y = Mul(x, h)",
    "product first": "g = Mul(gamma, x) product = Mul(g, norm) y = Div(product, d)",
}
MEAN = "m = ReduceMean <keepdims = 1> (norm, channel) d = Add(m, eps)"


def graph_of(body: str, layout: str = "channels last", opset: int = 18, **constants: object) -> onnx.ModelProto:
    """A graph x -> y of these operators; `positions`, `channel` and the constants that it names are in the file."""
    shape, positions, channel = LAYOUTS[layout]
    values = {
        "positions": np.array(positions, np.int64),
        "channel": np.array([channel], np.int64),
        "gamma": np.float32(1.5), "eps": np.float32(1e-6), "two": np.float32(2), "half": np.float32(0.5),
        "three": np.float32(3), "minus_half": np.float32(-0.5),
    } | {name: np.asarray(value) for name, value in constants.items()}  # fmt: skip
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g (float[{shape}] x) => (float[{shape}] y) {{ {body} }}'
    model = parser.parse_model(text)
    for node in model.graph.node:
        node.name = node.output[0]
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(values[name], name) for name in sorted(used & values.keys()))
    onnx.checker.check_model(model, full_check=True)
    return model


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def kinds(path: Path) -> Counter[str]:
    return Counter(island.kind for island in find_islands(prepared_model(path)))


def converted(path: Path, folder: Path, name: str = "rescued", **words: object) -> tuple[Path, Conversion]:
    model = prepared_model(path)
    done = convert(model, **words)
    ir.save(model, folder / f"{name}.onnx")
    return folder / f"{name}.onnx", done


def run(path: Path, images: np.ndarray) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images})[0])


def emulated(path: Path, images: np.ndarray) -> torch.Tensor:
    graph = Graph(path)
    with torch.inference_mode():
        return graph.evaluate(torch.from_numpy(images)).tensors[graph.outputs[0]].float()


def images_of(path: Path, seed: int = 0) -> np.ndarray:
    shape = [2 if isinstance(size, str) else size for size in next(iter(check_graph(path).inputs.values()))[1]]
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_grn_is_found_in_every_spelling_of_its_norm(norm: str, layout: str, tmp_path: Path) -> None:
    path = saved(graph_of(f"{NORMS[norm]} {MEAN} {RATIOS['Div']}", layout), tmp_path / "a.onnx")
    assert kinds(path) == {"GRN": 1}


@pytest.mark.parametrize("ratio", RATIOS)
def test_grn_is_found_in_every_order_of_its_products_and_safe_in_half(ratio: str, tmp_path: Path) -> None:
    path = saved(graph_of(f"{NORMS['Pow']} {MEAN} {RATIOS[ratio]}"), tmp_path / "a.onnx")
    assert kinds(path) == {"GRN": 1}
    images = 100 * images_of(path)  # the sum of 30 squares is beyond 65504
    rescued, naive = (converted(path, tmp_path, str(keeps), keeps_islands=keeps)[0] for keeps in (True, False))
    check_graph(rescued)
    reference = run(path, images).flatten(1)
    assert not GATES["fp16"].failures(differences(emulated(rescued, images).flatten(1), reference, VALUES))
    assert GATES["fp16"].failures(differences(emulated(naive, images).flatten(1), reference, VALUES))


@pytest.mark.parametrize(
    "body",
    {
        "the norm runs over channels": f"norm = ReduceL2 <keepdims = 1> (x, channel) "
        f"m = ReduceMean <keepdims = 1> (norm, positions) d = Add(m, eps) {RATIOS['Div']}",
        "a position is left out": f"norm = ReduceL2 <keepdims = 1> (x, one) {MEAN} {RATIOS['Div']}",
        "the batch is normed too": f"norm = ReduceL2 <keepdims = 1> (x, batch_too) {MEAN} {RATIOS['Div']}",
        "cubes, not squares": "b = Abs(x) p = Pow(b, three) s = ReduceSum <keepdims = 1> (p, positions) "
        f"norm = Pow(s, half) {MEAN} {RATIOS['Div']}",
        "no mean": f"{NORMS['Pow']} d = Add(norm, eps) {RATIOS['Div']}",
        "the largest, not the mean": f"{NORMS['Pow']} m = ReduceMax <keepdims = 1> (norm, channel) d = Add(m, eps) "
        f"{RATIOS['Div']}",
        "another tensor is scaled": f"{NORMS['Pow']} {MEAN} ratio = Div(norm, d) c = Neg(x) y = Mul(c, ratio)",
        "the mean divides, and no norm is multiplied": f"{NORMS['Pow']} {MEAN} share = Div(x, d) y = Mul(share, x)",
        "a tensor is added to the ratio": f"{NORMS['Pow']} {MEAN} ratio = Div(norm, d) h = Add(ratio, x) y = Mul(h, x)",
        "the mean is divided by the norm": f"{NORMS['Pow']} {MEAN} ratio = Div(d, norm) y = Mul(x, ratio)",
    }.values(),
)  # fmt: skip
def test_what_only_looks_like_grn_is_not_called_so_and_stays_in_fp32(body: str, tmp_path: Path) -> None:
    model = graph_of(body, one=np.array([1]), batch_too=np.array([0, 1, 2]))
    path = saved(model, tmp_path / "a.onnx")
    assert kinds(path) == {"not recognised": 1}
    rescued, done = converted(path, tmp_path)
    check_graph(rescued)  # no reduction in half
    images = 60 * images_of(path)
    reference = run(path, images).flatten(1)
    assert not GATES["fp16"].failures(differences(emulated(rescued, images).flatten(1), reference, VALUES))
    assert done.islands[0].node in {node.name for node in model.graph.node}


LAYER_NORMS = {
    "operator": "y = LayerNormalization <axis = -1> (x, gain)",
    "Pow, Div": "m = ReduceMean(x, channel) c = Sub(x, m) p = Pow(c, two) v = ReduceMean(p, channel) e = Add(v, eps) "
    "s = Sqrt(e) n = Div(c, s) g = Mul(n, gain) y = Add(shift, g)",
    "Mul, Reciprocal": "m = ReduceMean(x, channel) c = Sub(x, m) p = Mul(c, c) v = ReduceMean(p, channel) "
    "e = Add(eps, v) s = Sqrt(e) r = Reciprocal(s) y = Mul(c, r)",
    "power": "m = ReduceMean(x, channel) c = Sub(x, m) p = Mul(c, c) v = ReduceMean(p, channel) e = Add(v, eps) "
    "r = Pow(e, minus_half) n = Mul(r, c) y = Mul(n, gain)",
    "twice the mean": "m = ReduceMean(x, channel) c = Sub(x, m) p = Mul(c, c) v = ReduceMean(p, channel) "
    "e = Add(v, eps) s = Sqrt(e) k = ReduceMean(x, channel) b = Sub(x, k) y = Div(b, s)",
}


@pytest.mark.parametrize("body", LAYER_NORMS.values(), ids=LAYER_NORMS)
def test_layer_norm_is_found_as_operator_and_spelled_out(body: str, tmp_path: Path) -> None:
    gain = np.linspace(0.5, 2, 8, dtype=np.float32)
    path = saved(graph_of(body, gain=gain, shift=gain), tmp_path / "a.onnx")
    assert kinds(path) == {"LayerNorm": 1}
    rescued, _ = converted(path, tmp_path)
    images = 300 * images_of(path)
    reference = run(path, images).flatten(1)
    assert not GATES["fp16"].failures(differences(emulated(rescued, images).flatten(1), reference, VALUES))


@pytest.mark.parametrize(
    "body",
    [
        LAYER_NORMS["Pow, Div"].replace("Sub(x, m)", "Sub(m, x)"),  # another sign
        LAYER_NORMS["Pow, Div"].replace("(p, channel)", "(p, positions)"),  # a variance over other axes
        LAYER_NORMS["Pow, Div"].replace("two", "three"),
        "p = Mul(x, x) v = ReduceMean(p, channel) e = Add(v, eps) s = Sqrt(e) y = Div(x, s)",  # RMSNorm
    ],
)
def test_what_only_looks_like_layer_norm_is_not_called_so(body: str, tmp_path: Path) -> None:
    gain = np.ones(8, np.float32)
    found = kinds(saved(graph_of(body, gain=gain, shift=gain), tmp_path / "a.onnx"))
    assert not found["LayerNorm"]
    assert found["not recognised"]


def test_a_norm_over_positions_is_no_layer_norm(tmp_path: Path) -> None:
    body = LAYER_NORMS["Mul, Reciprocal"].replace("channel", "positions")
    assert kinds(saved(graph_of(body), tmp_path / "a.onnx")) == {"normalisation": 1}


def test_names_say_nothing(tmp_path: Path) -> None:
    """GRN under LayerNorm's names is found, and GRN's names on other operators find nothing."""
    path = saved(
        graph_of("grn_norm_reduce_l2 = Relu(x) layernorm = Neg(grn_norm_reduce_l2) y = Abs(layernorm)"),
        tmp_path / "a.onnx",
    )
    assert not kinds(path)


@pytest.fixture(scope="module", params=["timm", "transformers", "mmpretrain", "tagger", "text", "torchvision"])
def foreign(request, tiny_variant, tiny_v1_variant, tmp_path_factory) -> tuple[str, Path]:
    """A file of each library, in FP32 by the older exporter."""
    variant = tiny_v1_variant if request.param == "torchvision" else tiny_variant
    path = tmp_path_factory.mktemp("foreign") / f"{request.param}.onnx"
    shape = (2, 20, 40) if request.param == "text" else (2, 3, SIZE, SIZE)
    return request.param, exported(network(request.param, variant), path, shape=shape)


EXPECTED = {  # blocks: 5; norms: one a block, a stem, three downsamplings, a head
    "timm": {"GRN": 5, "LayerNorm": 10, "pool": 1},
    "transformers": {"GRN": 5, "LayerNorm": 10, "pool": 1},
    "mmpretrain": {"GRN": 5, "LayerNorm": 10, "pool": 1},
    "tagger": {"GRN": 5, "LayerNorm": 10, "pool": 1},
    "text": {"GRN": 2, "LayerNorm": 2},
    "torchvision": {"LayerNorm": 10, "pool": 1},
}


def test_every_norm_of_a_library_is_found_and_the_half_file_agrees(foreign, tmp_path: Path) -> None:
    name, path = foreign
    rescued, done = converted(path, tmp_path)
    assert Counter(island.kind for island in done.islands) == EXPECTED[name]
    assert not done.kept
    facts = check_graph(rescued)
    images = images_of(path)
    reference = run(path, images).flatten(1)
    twin, _ = converted(path, tmp_path, "twin", half=ir.DataType.FLOAT)
    assert not GATES["fp32"].failures(differences(run(twin, images).flatten(1), reference, VALUES))
    assert not GATES["fp16"].failures(differences(emulated(rescued, images).flatten(1), reference, VALUES))
    assert facts.half_share > 0.4
    products = {name for name, kind in types_of(rescued).items() if kind in ("Conv", "Gemm", "MatMul")}
    assert products
    assert all(halves(rescued)[name] for name in products)


@pytest.mark.parametrize("opset", [11, 13])
def test_norms_that_an_old_opset_spells_out_are_found_in_a_whole_network(opset, tiny_variant, tmp_path: Path) -> None:
    """mmdeploy writes opset 11: there is no LayerNormalization, and sums take their axes as attribute."""
    path = exported(network("mmpretrain", tiny_variant), tmp_path / "a.onnx", opset=opset)
    assert "LayerNormalization" not in types_of(path).values()
    rescued, done = converted(path, tmp_path)
    assert Counter(island.kind for island in done.islands) == EXPECTED["mmpretrain"]
    images = images_of(path)
    reference = run(path, images)
    assert not GATES["fp16"].failures(differences(emulated(rescued, images), reference, VALUES))


def types_of(path: Path) -> dict[str, str]:
    return {node.name: node.op_type for node in onnx.load(path).graph.node}


def halves(path: Path) -> dict[str, bool]:
    """Whether the first output of each node is FP16, by ONNX's own inference."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return {node.name: kinds.get(node.output[0]) == TensorProto.FLOAT16 for node in graph.node}


def test_operators_keep_their_names_order_and_types(foreign, tmp_path: Path) -> None:
    rescued, _ = converted(foreign[1], tmp_path)
    left_out = {"Cast", "Constant", "Identity"}
    before, after = (
        [(node.name, node.op_type) for node in onnx.load(path).graph.node] for path in (foreign[1], rescued)
    )
    assert [node for node in after if node[1] not in left_out] == [node for node in before if node[1] not in left_out]
    assert check_graph(rescued).inputs == check_graph(foreign[1]).inputs
    assert check_graph(rescued).outputs == check_graph(foreign[1]).outputs


def test_hot_weights_are_nan_in_the_half_file_and_right_in_the_rescued_one(tiny_variant, tmp_path: Path) -> None:
    model = heat(network("transformers", tiny_variant), 100.0)
    path = exported(model, tmp_path / "half.onnx", half=True)
    images = images_of_half()
    assert not torch.isfinite(emulated(path, images.astype(np.float16))).all()
    rescued, _ = converted(path, tmp_path)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images))
    assert not GATES["fp16"].failures(differences(emulated(rescued, images), expected, VALUES))


def images_of_half() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)


def test_a_fault_of_the_conversion_shows_in_the_twin(foreign, tmp_path: Path, monkeypatch) -> None:
    retyped = conversion._retyped

    def off_by_a_percent(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
        made = retyped(tensor, dtype)
        return ir.Tensor(made.numpy() * made.numpy().dtype.type(1.01), dtype=dtype)

    monkeypatch.setattr(conversion, "_retyped", off_by_a_percent)
    twin, _ = converted(foreign[1], tmp_path, "twin", half=ir.DataType.FLOAT)
    images = images_of(foreign[1])
    measured = differences(run(twin, images).flatten(1), run(foreign[1], images).flatten(1), VALUES)
    assert GATES["fp32"].failures(measured)


@pytest.mark.parametrize(
    ("constant", "reason"), [(1e5, "beyond FP16's 65504"), (1e-9, "too small for FP16"), (3e38, "beyond")]
)
def test_a_constant_that_fp16_does_not_hold_keeps_its_operator_and_is_named(constant, reason, tmp_path) -> None:
    model = graph_of("a = Mul(x, big) t = Tanh(a) u = LayerNormalization(t, gain) y = Mul(u, small)",
                     big=np.float32(constant), gain=np.ones(8, np.float32), small=np.float32(2))  # fmt: skip
    rescued, done = converted(saved(model, tmp_path / "a.onnx"), tmp_path)
    (kept,) = done.kept
    assert (kept.node, kept.operator) == ("a", "Mul")
    assert reason in kept.reason
    assert {name: half for name, half in halves(rescued).items() if name in "atu"} == {
        "a": False,
        "t": True,
        "u": False,
    }


def test_shapes_and_scales_stay_as_they_are(tmp_path: Path) -> None:
    """A Resize to a computed size, with scales that are FP32 by ONNX's rule, and a Range in floats."""
    body = (
        "n = LayerNormalization <axis = -1> (x, gain) t = Transpose <perm = [0, 3, 1, 2]> (n) s = Shape(t) "
        "f = Cast <to = 1> (s) g = Mul(f, one) z = Cast <to = 7> (g) r = Resize <mode = \"nearest\"> (t, roi, scales) "
        "q = Reshape(r, z) y = Transpose <perm = [0, 2, 3, 1]> (q)"
    )  # fmt: skip
    words = {"gain": np.ones(8, np.float32), "one": np.float32(1), "roi": np.zeros(0, np.float32),
             "scales": np.ones(4, np.float32)}  # fmt: skip
    path = saved(graph_of(body, **words), tmp_path / "a.onnx")
    rescued, _ = converted(path, tmp_path)
    check_graph(rescued)
    images = images_of(path)
    torch.testing.assert_close(run(rescued, images), run(path, images), rtol=2e-3, atol=2e-3)
    constants = {each.name: each.data_type for each in onnx.load(rescued).graph.initializer}
    assert constants["scales"] == TensorProto.FLOAT
    assert (halves(rescued)["g"], halves(rescued)["r"]) == (False, True)


def test_casts_that_a_half_file_had_are_replaced_by_those_at_the_islands_borders(tmp_path: Path) -> None:
    """A file with an island of somebody's own round its LayerNorm: the same file comes out, and no Cast is doubled."""
    body = (
        "h = Cast <to = 10> (x) t = Tanh(h) f = Cast <to = 1> (t) n = LayerNormalization <axis = -1> (f, gain) "
        "b = Cast <to = 10> (n) s = Sigmoid(b) y = Cast <to = 1> (s)"
    )
    path = saved(graph_of(body, gain=np.ones(8, np.float32)), tmp_path / "a.onnx")
    rescued, done = converted(path, tmp_path)
    assert (done.dropped_casts, done.casts) == (4, 4)
    assert sorted(types_of(rescued).values()) == ["Cast"] * 4 + ["LayerNormalization", "Sigmoid", "Tanh"]
    assert halves(rescued)["t"]
    torch.testing.assert_close(run(rescued, images_of(path)), run(path, images_of(path)), rtol=2e-3, atol=2e-3)


def test_what_only_moves_values_between_two_islands_joins_them(tmp_path: Path) -> None:
    body = (
        "p = ReduceMean(x, positions) q = Transpose <perm = [0, 2, 1, 3]> (p) "
        "n = LayerNormalization <axis = -1> (q, gain) z = Transpose <perm = [0, 2, 1, 3]> (n) r = Tanh(z) y = Add(r, x)"
    )
    path = saved(graph_of(body, gain=np.ones(8, np.float32)), tmp_path / "a.onnx")
    found = halves(converted(path, tmp_path)[0])
    assert {name: found[name] for name in "pqnzr"} == {"p": False, "q": False, "n": False, "z": True, "r": True}


def test_new_nodes_have_names_of_their_own(tmp_path: Path) -> None:
    """Also beside an operator that is called as a new Cast would be."""
    model = graph_of(
        "t = Tanh(x) u = LayerNormalization <axis = -1> (t, gain) y = Tanh(u)", gain=np.ones(8, np.float32)
    )
    plain, _ = converted(saved(model, tmp_path / "a.onnx"), tmp_path)
    casts = [name for name, kind in types_of(plain).items() if kind == "Cast"]
    model.graph.node[0].name, model.graph.node[1].name = casts[:2]
    rescued, _ = converted(saved(model, tmp_path / "a.onnx"), tmp_path)
    names = [node.name for node in onnx.load(rescued).graph.node]
    assert len(set(names)) == len(names)


def test_weights_of_a_rescued_file_take_half_the_bytes(foreign, tmp_path: Path) -> None:
    rescued, _ = converted(foreign[1], tmp_path)
    before, after = (
        sum(numpy_helper.to_array(each).nbytes for each in onnx.load(path).graph.initializer)
        for path in (foreign[1], rescued)
    )
    assert after < 0.6 * before
    names = [{each.name for each in onnx.load(path).graph.initializer} for path in (foreign[1], rescued)]
    assert not [name for name in names[1] if name.endswith("/half") and name.removesuffix("/half") not in names[1]]
