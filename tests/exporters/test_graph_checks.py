"""The rules for a graph, each shown by a small graph that breaks it and one that does not."""

import onnx
import pytest
from onnx import TensorProto, helper

from cnx_deploy.core.errors import CorruptArtifactError, GraphCheckError, RefusedArtifactError
from cnx_deploy.core.gates import OutputSpec
from cnx_deploy.exporters.graph_checks import check_export, check_graph

HEAD = {"outputs": (OutputSpec("logits", (10,), "logit"),), "head_operators": {"LayerNormalization": 1}}
KINDS = {"FLOAT16": TensorProto.FLOAT16, "BFLOAT16": TensorProto.BFLOAT16, "FLOAT": TensorProto.FLOAT}


def saved(path, nodes, kind=TensorProto.FLOAT, *, initializers=(), domains=(), opset=20, batch="batch"):
    """Write a graph from `images` (batch, 4) to `logits` (batch, 4), both of element type `kind`."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("images", kind, [batch, 4])],
        [helper.make_tensor_value_info("logits", kind, [batch, 4])],
        list(initializers),
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def constant(name, kind, values, shape=()):
    return helper.make_tensor(name, kind, shape, values)


AXIS = constant("axis", TensorProto.INT64, [1], (1,))


def spelled_out_norm(kind, squared):
    """LayerNorm without affine in single operators; `squared` is the node from `centred` to `squares`."""
    nodes = [
        helper.make_node("ReduceMean", ["images", "axis"], ["mean"], name="norm/ReduceMean"),
        helper.make_node("Sub", ["images", "mean"], ["centred"]),
        squared,
        helper.make_node("ReduceMean", ["squares", "axis"], ["variance"], name="norm/ReduceMean_2"),
        helper.make_node("Add", ["variance", "eps"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["deviation"]),
        helper.make_node("Div", ["centred", "deviation"], ["logits"]),
    ]
    return nodes, [AXIS, constant("eps", kind, [1e-6]), constant("two", kind, [2.0])]


def single(operator, kind):
    """One reducing or squaring operator between two identities; its result is broadcast back to the input's shape."""
    inputs = {
        "ReduceL2": ["images", "axis"],
        "ReduceMean": ["images", "axis"],
        "LayerNormalization": ["images", "gain"],
        "Mul": ["images", "images"],
        "Pow": ["images", "two"],
        "Softmax": ["images"],
    }[operator]
    nodes = [
        helper.make_node(operator, inputs, ["found"], name=f"part/{operator}"),
        helper.make_node("Add", ["images", "found"], ["logits"]),
    ]
    wanted = {
        "axis": AXIS,
        "gain": constant("gain", kind, [1.0] * 4, (4,)),
        "two": constant("two", kind, [2.0]),
    }
    return nodes, [tensor for name, tensor in wanted.items() if name in inputs]


OPERATORS = ("ReduceL2", "ReduceMean", "LayerNormalization", "Mul", "Pow", "Softmax")


# No reduction in half


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_reduction_in_half_is_refused_by_name_and_the_same_in_float_passes(tmp_path, operator):
    for kind in ("FLOAT16", "BFLOAT16", "FLOAT"):
        nodes, initializers = single(operator, KINDS[kind])
        path = saved(tmp_path / f"{kind}.onnx", nodes, KINDS[kind], initializers=initializers)
        if kind == "FLOAT":
            assert check_graph(path).operators[operator] == 1
            continue
        with pytest.raises(GraphCheckError, match=f"part/{operator}: {operator} computed in {kind}"):
            check_graph(path)


SQUARES = {
    "Mul": helper.make_node("Mul", ["centred", "centred"], ["squares"], name="norm/Mul"),
    "Pow": helper.make_node("Pow", ["centred", "two"], ["squares"], name="norm/Pow"),
}


@pytest.mark.parametrize("square", SQUARES)
def test_a_layer_norm_spelled_out_in_half_is_refused_at_all_three_places_and_in_float_passes(tmp_path, square):
    nodes, initializers = spelled_out_norm(TensorProto.FLOAT16, SQUARES[square])
    path = saved(tmp_path / "half.onnx", nodes, TensorProto.FLOAT16, initializers=initializers)
    with pytest.raises(GraphCheckError) as caught:
        check_graph(path)
    named = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert named == ["norm/ReduceMean", f"norm/{square}", "norm/ReduceMean_2"]
    nodes, initializers = spelled_out_norm(TensorProto.FLOAT, SQUARES[square])
    assert check_graph(saved(tmp_path / "float.onnx", nodes, initializers=initializers)).operators["ReduceMean"] == 2


def test_a_product_of_two_different_half_tensors_passes(tmp_path):
    nodes = [
        helper.make_node("Neg", ["images"], ["negative"]),
        helper.make_node("Mul", ["images", "negative"], ["logits"]),
    ]
    assert check_graph(saved(tmp_path / "half.onnx", nodes, TensorProto.FLOAT16)).half_share == 1.0


def test_a_reduction_between_casts_to_float_passes(tmp_path):
    nodes = [
        helper.make_node("Cast", ["images"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["wide"], ["share"]),
        helper.make_node("Cast", ["share"], ["logits"], to=TensorProto.FLOAT16),
    ]
    facts = check_graph(saved(tmp_path / "island.onnx", nodes, TensorProto.FLOAT16))
    assert facts.types == {"FLOAT": 2, "FLOAT16": 1}


# Rules for every file


def test_all_broken_rules_are_listed_at_once(tmp_path):
    nodes = [
        helper.make_node("RandomNormalLike", ["images"], ["noise"], name="a"),
        helper.make_node("Gelu", ["noise"], ["logits"], domain="com.microsoft", name="b"),
    ]
    path = saved(tmp_path / "both.onnx", nodes, domains=["com.microsoft"])
    with pytest.raises(RefusedArtifactError) as caught:
        check_graph(path)
    lines = [line.strip().split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert lines == ["operator domains ['com.microsoft'] are not standard ONNX", "a", "b"]


def test_types_that_do_not_fit_are_corrupt(tmp_path):
    nodes = [helper.make_node("Add", ["images", "half"], ["logits"])]
    half = constant("half", TensorProto.FLOAT16, [1.0])
    path = saved(tmp_path / "mixed.onnx", nodes, initializers=[half])
    with pytest.raises(CorruptArtifactError, match=r"mixed\.onnx"):
        check_graph(path)


# What an export of this network promises


def test_an_export_passes_with_what_is_in_it(tiny_onnx_fp32, tiny_variant):
    facts = check_export(tiny_onnx_fp32.path, variant=tiny_variant, layout="cpu", batch=(1, 4, 8), opset=20, **HEAD)
    assert facts.inputs == {"images": ("FLOAT", ("batch", 3, 32, 32))}


def test_wrong_counts_are_each_named(tmp_path, tiny_variant):
    path = saved(tmp_path / "one.onnx", [helper.make_node("Gelu", ["images"], ["logits"])])
    head = {**HEAD, "outputs": (OutputSpec("logits", (4,), "logit"),)}
    with pytest.raises(GraphCheckError) as caught:
        check_export(path, variant=tiny_variant, layout="gpu", batch=(1, 4, 8), opset=20, **head)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "5 Gelu expected, 1 found",
        "5 ReduceSum expected, 0 found",
        "6 LayerNormalization expected, 0 found",
        "15 epsilons expected, one a norm and a GRN, 0 found",
    ]


@pytest.mark.parametrize(
    ("layout", "batch", "opset", "problem"),
    [
        ("gpu", (1, 4, 8), 20, "6 LayerNormalization expected, 10 found"),
        ("cpu", (4, 4, 4), 20, "first axis of images is 'batch', not 4"),
        ("cpu", (1, 4, 8), 21, "opset 21 expected, 20 written"),
    ],
)
def test_an_export_of_another_request_is_refused(tiny_onnx_fp32, tiny_variant, layout, batch, opset, problem):
    with pytest.raises(GraphCheckError, match=problem):
        check_export(tiny_onnx_fp32.path, variant=tiny_variant, layout=layout, batch=batch, opset=opset, **HEAD)


def planted(model, operator, attribute):
    """Give the attribute of the first node of an operator another value."""
    node = next(node for node in model.graph.node if node.op_type == operator)
    kept = [each for each in node.attribute if each.name != attribute.name]
    del node.attribute[:]
    node.attribute.extend([*kept, attribute])


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        (
            lambda model: planted(model, "LayerNormalization", helper.make_attribute("epsilon", 1e-5)),
            "every epsilon is 1e-06, found 1e-05",
        ),
        (lambda model: planted(model, "Gelu", helper.make_attribute("approximate", "tanh")), "Gelu by erf expected"),
    ],
    ids=["epsilon", "GELU"],
)
def test_what_no_logits_show_is_read_from_the_graph(tmp_path, tiny_onnx_fp32, tiny_variant, plant, problem):
    model = onnx.load(tiny_onnx_fp32.path)
    plant(model)
    onnx.save(model, tmp_path / "planted.onnx")
    with pytest.raises(GraphCheckError, match=problem):
        check_export(tmp_path / "planted.onnx", variant=tiny_variant, layout="cpu", batch=(1, 4, 8), opset=20, **HEAD)


def test_an_islands_statistic_in_half_is_refused_by_the_name_of_its_module(tmp_path, tiny_onnx_fp16, tiny_variant):
    """The cast that widens the hidden tensor of GRN is taken out."""
    model = onnx.load(tiny_onnx_fp16.path)
    grn = [node for node in model.graph.node if node.name.startswith("stages.0.0.grn/")]
    for node in grn:
        if node.op_type == "Cast":
            node.attribute[0].i = TensorProto.FLOAT16
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises((GraphCheckError, CorruptArtifactError), match=r"stages\.0\.0\.grn/"):
        check_export(tmp_path / "half.onnx", variant=tiny_variant, layout="gpu", batch=(1, 4, 8), opset=20, **HEAD)


def test_a_fixed_batch_where_a_range_was_asked_for_is_named(tmp_path, tiny_variant):
    path = saved(tmp_path / "fixed.onnx", [helper.make_node("Relu", ["images"], ["logits"])], batch=4)
    with pytest.raises(GraphCheckError, match="first axis of images is 4, not 'batch'"):
        check_export(path, variant=tiny_variant, layout="gpu", batch=(1, 4, 8), opset=20, **HEAD)


def test_an_input_of_another_name_is_refused(tmp_path, tiny_onnx_fp32, tiny_variant):
    model = onnx.load(tiny_onnx_fp32.path)
    model.graph.input[0].name = "pixels"
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "images" else name for name in node.input]
    onnx.save(model, tmp_path / "renamed.onnx")
    with pytest.raises(GraphCheckError, match=r"one input 'images' expected, found \['pixels'\]"):
        check_export(tmp_path / "renamed.onnx", variant=tiny_variant, layout="cpu", batch=(1, 4, 8), opset=20, **HEAD)


@pytest.mark.parametrize("declared", [("scores", (10,)), ("logits", (9,))])
def test_outputs_other_than_the_task_declares_are_refused(tiny_onnx_fp32, tiny_variant, declared):
    head = {**HEAD, "outputs": (OutputSpec(*declared, "logit"),)}
    with pytest.raises(GraphCheckError, match=r"outputs .* expected, found .*logits"):
        check_export(tiny_onnx_fp32.path, variant=tiny_variant, layout="cpu", batch=(1, 4, 8), opset=20, **head)
