"""Blocks replaced by kernel nodes: the same answers, every mistake in the graph refused, records that come back whole.

The nodes are launched in Triton's interpreter by what they record themselves: grid, sizes, layouts, arguments.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import cnx_deploy as cnx
from cnx_deploy.core.errors import BuildError, CorruptArtifactError
from cnx_deploy.core.hidden_tensor import FusedMode
from cnx_deploy.exporters.trt import fused_graph
from cnx_deploy.exporters.trt.fused_graph import fused_blocks, settings_in_engine, with_own_kernels
from cnx_deploy.exporters.trt.kernel_node import Argument, KernelNode, OutputTensor, Size, TensorLayout
from cnx_deploy.kernels.compiling import SCRATCH, KernelImage, compile_kernel
from cnx_deploy.kernels.settings import SHARED_BYTES, default_settings, grid
from cnx_deploy.runners.onnxruntime import OrtRunner
from tests.support import kernel_nodes

WIDTH = {8: 32, 16: 64}


@pytest.fixture
def without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have their arguments and no image: the interpreter needs none."""
    monkeypatch.setattr(fused_graph, "compile_kernel", kernel_nodes.uncompiled)


def relative_l2(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - wide) / np.linalg.norm(wide))


@functools.cache
def images() -> np.ndarray[Any, Any]:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)).numpy()


def expected_of(onnx: cnx.Artifact) -> np.ndarray[Any, Any]:
    with OrtRunner(onnx.path) as runner:
        return runner.run(torch.from_numpy(images()))["logits"].numpy()


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("mode", ["stored", "recomputed"])
def test_the_network_with_kernels_gives_the_answers_of_the_exported_file(
    tiny_onnx_fp16: cnx.Artifact, tiny_onnx_fp32: cnx.Artifact, mode: FusedMode
) -> None:
    with with_own_kernels(tiny_onnx_fp16.path, mode, "sm89") as (path, own):
        found = kernel_nodes.run_with_kernels(path, images())
    assert own.hidden == (mode,) * 4
    # FP16 rounds the tensors between the operators: 1.2e-3 was seen. A gamma of another block gives 0.2.
    assert relative_l2(found, expected_of(tiny_onnx_fp16)) < 3e-3
    assert relative_l2(found, expected_of(tiny_onnx_fp32)) < 3e-3


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("part", ["weight1", "bias1", "gamma", "weight2", "bias2"])
def test_a_constant_that_is_wired_wrongly_gives_other_answers(
    tiny_onnx_fp16: cnx.Artifact, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    original = fused_blocks

    def mixed(graph: ir.Graph, name: str) -> list[Any]:
        """The values of stage 3's first block stand in its second."""
        blocks = original(graph, name)
        first, second = (block for block in blocks if block.stage == 2)
        wrong = replace(second, **{part: getattr(first, part)})
        return [wrong if block is second else block for block in blocks]

    monkeypatch.setattr(fused_graph, "fused_blocks", mixed)
    with with_own_kernels(tiny_onnx_fp16.path, "stored", "sm89") as (path, _):
        found = kernel_nodes.run_with_kernels(path, images())
    assert relative_l2(found, expected_of(tiny_onnx_fp16)) > 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"image_size": (32, 64, 96)}, {"input_kind": "uint8"}], ids=str
)
def test_other_files_give_their_answers_too(
    tiny_onnx_fp32: cnx.Artifact, tmp_path: Path, options: dict[str, Any]
) -> None:
    words = {"precision": "fp16", "image_size": 32, "num_classes": 10, "batch": (1, 4, 8), **options}
    onnx = cnx.export("tiny-test", output_dir=tmp_path, **words)
    given = images() if "input_kind" not in options else np.round(images() * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    with with_own_kernels(onnx.path, "recomputed", "sm89") as (path, _):
        found = kernel_nodes.run_with_kernels(path, given)
    limit = 2e-2 if options.get("precision") == "bf16" else 5e-3
    assert relative_l2(found, expected_of(tiny_onnx_fp32)) < limit


@pytest.mark.slow
@pytest.mark.usefixtures("without_compiling")
def test_tiles_that_hold_half_a_stage_give_the_answers_too(tmp_path: Path) -> None:
    words = {"precision": "fp16", "image_size": (72, 88), "num_classes": 10, "batch": (1, 4, 8), "output_dir": tmp_path}
    onnx = cnx.export("tiny-test", **words)
    given = torch.rand(2, 3, 72, 88)
    with OrtRunner(onnx.path) as runner:
        expected = runner.run(given)["logits"].numpy()
    with with_own_kernels(onnx.path, "stored", "sm89") as (path, own):
        found = kernel_nodes.run_with_kernels(path, given.numpy())
    assert [kernel.tile[0] for kernel in own.kernels if kernel.kernel == "norm_linear_gelu"] == [128, 128, 64, 64]
    assert relative_l2(found, expected) < 3e-3  # 18 × 22 positions are four tiles of 128, the last not full


@pytest.mark.usefixtures("without_compiling")
def test_nothing_of_the_replaced_blocks_is_left(tiny_onnx_fp16: cnx.Artifact) -> None:
    with with_own_kernels(tiny_onnx_fp16.path, "stored", "sm89") as (path, own):
        model = ir.load(path)
    names = [str(node.name) for node in model.graph if str(node.name).startswith("stages.")]
    assert len(names) == 5 * 4
    assert {name.rpartition(".")[2] for name in names} == {
        "dwconv/Conv", "pwconv1/NormLinearGelu", "grn/ResponseGain", "pwconv2/GainedLinearResidual"
    }  # fmt: skip
    assert [(kernel.kernel, kernel.channels) for kernel in own.kernels] == [
        (kernel, channels)
        for channels in (8, 16, 32, 64)
        for kernel in ("norm_linear_gelu", "response_gain", "gained_linear_residual")
    ]


# --- graphs that do not fit -------------------------------------------------------------------------------------------


def node(graph: ir.Graph, name: str) -> ir.Node:
    return next(node for node in graph if node.name == f"stages.2.1{name}")


def constant(graph: ir.Graph, values: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(values))
    value = ir.Value(name="other", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))
    graph.register_initializer(value)
    return value


def with_input(name: str, index: int, values: Any) -> Callable[[ir.Graph], None]:
    return lambda graph: node(graph, name).replace_input_with(index, constant(graph, values))


def with_attribute(name: str, attribute: ir.Attr) -> Callable[[ir.Graph], None]:
    return lambda graph: node(graph, name).attributes.add(attribute)


def as_operator(name: str, operator: str) -> Callable[[ir.Graph], None]:
    def change(graph: ir.Graph) -> None:
        node(graph, name).op_type = operator

    return change


def of_another_tensor(name: str, index: int, other: str) -> Callable[[ir.Graph], None]:
    return lambda graph: node(graph, name).replace_input_with(index, node(graph, other).outputs[0])


def wide(graph: ir.Graph) -> None:
    node(graph, "/Add").outputs[0].dtype = ir.DataType.FLOAT


MISFITS: dict[str, tuple[Callable[[ir.Graph], None], str]] = {
    "epsilon of the norm": (
        with_attribute(".norm/LayerNormalization", ir.AttrFloat32("epsilon", 1e-5)), "LayerNorm with epsilon 1e-06"
    ),
    "axis of the norm": (
        with_attribute(".norm/LayerNormalization", ir.AttrInt64("axis", 1)), "LayerNorm over the channels"
    ),
    "affine of the norm": (
        with_input(".norm/LayerNormalization", 1, np.full(32, 2, np.float32)), "affine is folded away"
    ),
    "approximate gelu": (with_attribute(".act/Gelu", ir.AttrString("approximate", "tanh")), "an exact GELU"),
    "another activation": (as_operator(".act/Gelu", "Relu"), r"expected Gelu, found Relu \(stages.2.1.act/Gelu\)"),
    "order of the axes": (with_attribute("/Transpose", ir.AttrInt64s("perm", [0, 3, 2, 1])), "channels brought to"),
    "GRN's one": (with_input(".grn/Add_2", 1, np.float32(2)), "expected 1, found Add"),
    "GRN's epsilon": (with_input(".grn/Add", 1, np.float32(1e-3)), "expected 1e-06, found Add"),
    "positions of the sum": (with_input(".grn/ReduceSum", 1, np.array([2])), r"reduction over axes \(1,\)"),
    "channels of the mean": (with_input(".grn/ReduceMean", 1, np.array([1])), r"reduction over axes \(2,\)"),
    "another tensor's squares": (of_another_tensor(".grn/Mul", 1, ".norm/LayerNormalization"), "squares of the hidden"),
    "another tensor's mean": (of_another_tensor(".grn/Sqrt", 0, ".grn/Mul"), "a mean of the norms"),
    "no square of the mean": (of_another_tensor(".grn/Mul_2", 1, ".grn/Add"), "a square of the reciprocal"),
    "no addition": (as_operator("/Add", "Sub"), "an addition of the stream at its end, found Sub"),
    "a part in FP32": (wide, "one half precision throughout"),
    "shape of the bias": (with_input(".pwconv1/Add", 1, np.zeros(1, np.float16)), r"bias1 of shape \(128,\)"),
    "type of the weight": (with_input(".pwconv1/MatMul", 1, np.zeros((32, 128), np.float32)), "one half precision"),
    "a weight that is computed": (of_another_tensor(".pwconv1/MatMul", 1, ".norm/Cast"), "expected a constant"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MISFITS)
def test_a_block_that_does_not_fit_is_refused_by_name(tiny_onnx_fp16: cnx.Artifact, fault: str) -> None:
    change, message = MISFITS[fault]
    graph = ir.load(tiny_onnx_fp16.path).graph
    assert len(fused_blocks(graph, "tiny.onnx")) == 5
    change(graph)
    with pytest.raises(BuildError, match=f"^tiny.onnx: stages.2.1 is no block .*{message}"):
        fused_blocks(graph, "tiny.onnx")


def test_a_gamma_behind_a_cast_is_read_as_huge_has_it(tiny_onnx_fp16: cnx.Artifact) -> None:
    """Beyond some size the exporter leaves the cast of a constant in the graph: GRN's of the last stage of huge."""
    graph = ir.load(tiny_onnx_fp16.path).graph
    before = fused_blocks(graph, "tiny.onnx")[0].gamma
    scaled = next(node for node in graph if node.name == "stages.0.0.grn/Mul_4")
    constant = scaled.inputs[0]
    half = ir.Value(name="gamma", const_value=ir.tensor(constant.const_value.numpy().astype(np.float16)))
    graph.register_initializer(half)
    cast = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT})
    graph.insert_before(scaled, cast)
    scaled.replace_input_with(0, cast.outputs[0])
    np.testing.assert_array_equal(fused_blocks(graph, "tiny.onnx")[0].gamma, before)


def test_a_graph_without_named_blocks_is_refused(tiny_onnx_fp16: cnx.Artifact) -> None:
    graph = ir.load(tiny_onnx_fp16.path).graph
    for each in graph:
        each.name = each.outputs[0].name
    with pytest.raises(BuildError, match="no nodes named after blocks"):
        fused_blocks(graph, "foreign.onnx")


# --- records ----------------------------------------------------------------------------------------------------------


def nodes_in(path: Path) -> Iterator[tuple[str, KernelNode]]:
    yield from kernel_nodes.nodes_in(path).items()


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("mode", ["stored", "recomputed"])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 7, 9), (64, 56, 56)])
def test_grids_are_those_of_the_kernels_own_rule(
    tiny_onnx_fp16: cnx.Artifact, mode: FusedMode, batch: int, height: int, width: int
) -> None:
    with with_own_kernels(tiny_onnx_fp16.path, mode, "sm89") as (path, _):
        for name, kernel in nodes_in(path):
            channels = {0: 8, 1: 16, 2: 32, 3: 64}[int(name.split(".")[1])]
            shapes: list[tuple[int, ...]] = [()] * len(kernel.inputs)
            for place, layout in enumerate(kernel.inputs):
                if layout.channels_last:
                    shapes[place] = (batch, channels, height, width)
            positions = height * width
            first = {
                "response_gain": (batch, 5, 4 * channels),
                "gained_linear_residual": (batch, positions, 4 * channels),
            }
            shapes[0] = first.get(kernel.entry, shapes[0])
            settings = default_settings(kernel.entry, channels, "sm89")  # type: ignore[arg-type]
            expected = grid(kernel.entry, settings, batch, positions, channels)  # type: ignore[arg-type]
            assert tuple(size.of(shapes) for size in kernel.grid) == expected, name


def test_the_tile_that_stores_the_fewest_sums_is_taken_and_the_usual_one_where_all_store_alike() -> None:
    chosen = {
        positions: settings_in_engine("norm_linear_gelu", 80, positions, "sm89") for positions in (None, 49, 64, 196)
    }
    usual = default_settings("norm_linear_gelu", 80, "sm89")
    assert [chosen[positions] for positions in (None, 49, 64)] == [usual] * 3
    assert (usual.block_m, chosen[196].block_m) == (64, 128)
    assert settings_in_engine("gained_linear_residual", 80, 196, "sm89") == default_settings(
        "gained_linear_residual", 80, "sm89"
    )


@pytest.mark.usefixtures("without_compiling")
def test_the_positions_are_those_of_the_file(tiny_onnx_fp16: cnx.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int | None]] = []

    def settings(kernel: str, channels: int, positions: int | None, target: str) -> Any:
        seen.append((kernel, channels, positions))
        return settings_in_engine(kernel, channels, positions, target)  # type: ignore[arg-type]

    monkeypatch.setattr(fused_graph, "settings_in_engine", settings)
    with with_own_kernels(tiny_onnx_fp16.path, "stored", "sm89"):
        pass
    assert {row for row in seen if row[0] == "norm_linear_gelu"} == {
        ("norm_linear_gelu", channels, positions) for channels, positions in ((8, 64), (16, 16), (32, 4), (64, 1))
    }


def test_arguments_without_compiling_are_those_of_a_compiled_kernel() -> None:
    settings = default_settings("norm_linear_gelu", 8)
    compiled = compile_kernel("norm_linear_gelu", 8, settings, store_hidden=False)
    assert kernel_nodes.uncompiled("norm_linear_gelu", 8, settings, store_hidden=False).arguments == compiled.arguments


NODE = KernelNode(
    image=bytes(range(256)), entry="kernel", threads=128, shared_bytes=20480,
    inputs=(TensorLayout("HALF", True), TensorLayout("FLOAT")),
    outputs=(OutputTensor(TensorLayout("BF16"), (Size(0, (0,)), Size(0, (2, 3), 1, 64), Size(factor=160))),
             OutputTensor(TensorLayout("HALF", True), tuple(Size(1, (axis,)) for axis in range(4)))),
    grid=(Size(0, (2, 3), 1, 64), Size(0, (0,)), Size()),
    arguments=(Argument("input", 1), Argument("output", 1), Argument("size", size=Size(0, (2, 3))), Argument("null")),
)  # fmt: skip


def test_a_node_comes_back_from_its_fields() -> None:
    fields = NODE.fields()
    assert KernelNode.from_fields(fields) == NODE
    ended = {**fields, "entry": np.append(fields["entry"], np.int8(0))}  # as the parser gives a text
    assert KernelNode.from_fields(ended) == NODE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("image", lambda fields: {name: fields[name] for name in fields if name != "image"}),
        ("launch", lambda fields: {**fields, "launch": fields["launch"][:1]}),
        ("grid", lambda fields: {**fields, "grid": fields["grid"][:-1]}),
        ("outputs", lambda fields: {**fields, "outputs": fields["outputs"][:-1]}),
        ("arguments", lambda fields: {**fields, "arguments": np.full(5, 9, np.int32)}),
        ("inputs", lambda fields: {**fields, "inputs": np.full(4, 99, np.int32)}),
    ],
)
def test_fields_of_another_version_are_refused(name: str, change: Callable[[Any], Any]) -> None:
    with pytest.raises(CorruptArtifactError, match="fields are not those of this version"):
        KernelNode.from_fields(change(NODE.fields()))


def test_sizes_round_up() -> None:
    assert [Size(0, (1,), 1, 64).of([(2, positions)]) for positions in (1, 64, 65, 3136)] == [1, 1, 2, 49]
    assert Size(1, (0, 2), 4, 3).of([(), (5, 7, 2)]) == 14


def test_every_target_of_the_kernels_compiles(tmp_path: Path) -> None:
    images = [
        compile_kernel("response_gain", 8, default_settings("response_gain", 8, t), target=t) for t in SHARED_BYTES
    ]
    assert len({image.cubin for image in images}) == len(SHARED_BYTES)
    assert all(isinstance(image, KernelImage) and image.arguments[-2:] == SCRATCH for image in images)
