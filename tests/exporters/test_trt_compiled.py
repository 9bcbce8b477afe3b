"""Kernels and bytes from the compiler's log, and what is refused instead of being counted wrongly."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import BuildError, InputError
from cnx_deploy.core.manifest import Artifact, Compiled, Grouping, Kernel, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import VARIANTS, Variant
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import load_backend
from cnx_deploy.exporters.trt.compiled import measure_compiled
from cnx_deploy.exporters.trt.kernel_log import (
    CompiledKernel,
    KernelTensor,
    block_of,
    kernels_in_log,
    operation_of,
    stage_of,
)
from cnx_deploy.exporters.trt.network import NetworkBuild
from cnx_deploy.model.convnextv2 import random_model

RTX = load_backend("tensorrt-rtx")


def tensor(dimensions: str, kind: str = "Half", name: str = "x") -> str:
    return f"{{ Name: {name}, Dimensions: [{dimensions}], Strides: [1], Datatype: {kind}, Format: (Linear) Row major }}"


def line(
    inputs: str,
    outputs: str | None = None,
    *,
    constants: str = "",
    name: str = "k_myl0_0",
    kind: str = "gemm",
    sources: tuple[str, ...] = ("head/Gemm",),
) -> str:
    """A line as TensorRT-RTX 1.7.1 writes it."""
    metadata = "".join(f"[ONNX Layer: {source}]" for source in sources)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [{constants}], "
        f"Outputs: [ {outputs or inputs}], TacticName: t, StreamId: 0, Metadata: {metadata}"
    )


def kernels(*lines: str) -> tuple[CompiledKernel, ...]:
    return kernels_in_log(
        ["Parsing", "\n".join(("Layers:", *lines, "", "Bindings:", "Name: images, Location: Device"))]
    )


@pytest.fixture(scope="module")
def compiled(tiny_onnx_fp16: Artifact) -> Compiled:
    return measure_compiled(tiny_onnx_fp16.path, batch=8, target="sm89", backend=RTX)


def rows_of(compiled: Compiled, kernels: tuple[Kernel, ...]) -> Compiled:
    return Compiled.of(kernels, batch=compiled.batch, target=compiled.target, plan_bytes=compiled.plan_bytes)


# --- one line of the log ---


def test_one_log_line_is_read_to_the_byte() -> None:
    sources = ("stages.2.3.grn/ReduceL2", "stages.2.3/Add")
    (kernel,) = kernels(line(tensor("2,3,4"), constants=f" {tensor('4,5', 'Float', 'w')}", sources=sources))
    assert (kernel.input_bytes, kernel.constant_bytes, kernel.output_bytes) == (48, 80, 48)
    assert kernel.tensors[1] == KernelTensor("w", "constant", (4, 5), "Float")
    assert (kernel.kind, kernel.sources) == ("gemm", sources)
    assert (kernel.block, kernel.stage, kernel.operation) == ("stages.2.3", "stages.2", "grn statistic+residual")


def test_a_tensor_read_in_two_places_counts_once_and_two_tensors_twice() -> None:
    same, other = (kernels(line(f"{tensor('2,4')}, {tensor('2,4', name=name)}"))[0] for name in ("x", "y"))
    assert (same.input_bytes, other.input_bytes) == (16, 32)


def test_a_scalar_is_one_element() -> None:
    assert kernels(line(tensor("", "Float")))[0].input_bytes == 4


def test_a_size_the_log_leaves_open_is_none_and_not_a_number() -> None:
    (kernel,) = kernels(line(tensor("-1,40")))
    assert (kernel.input_bytes, kernel.output_bytes, kernel.total_bytes) == (None, None, 0)


def test_a_kernels_profile_is_read_from_its_name() -> None:
    names = ("__myl_FcAddCast_myl0_103", "downsample_layers.0.0/Conv [profile 1]_myl1_2")
    assert [kernel.profile for kernel in kernels(*(line(tensor("2"), name=name) for name in names))] == [0, 1]


def test_host_side_shape_computations_are_no_kernels() -> None:
    assert [kernel.kind for kernel in kernels(line(tensor("2")), line(tensor("2"), kind="shape_call"))] == ["gemm"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("LayerType", "Kind"), "a line in a format not known here: 'Name: k_myl0_0"),
        (lambda text: text.replace("Constants: [], ", ""), "a line in a format not known here"),
        (lambda text: "Layer(gemm): k_myl0_0, Tactic: 0x0", r"a line in a format not known here: 'Layer\(gemm\)"),
        (lambda text: text.replace("Datatype: Half", "Half", 1), "a tensor in a format not known here"),
        (lambda text: text.replace("Half", "FP5"), "'FP5' whose size is not known"),
    ],
)
def test_an_unknown_format_among_known_lines_is_an_error_and_not_a_smaller_count(
    change: Callable[[str], str], message: str
) -> None:
    good = line(tensor("2,2"))
    assert len(kernels(good, good)) == 2
    with pytest.raises(BuildError, match=message):
        kernels(good, change(good))


def test_a_log_without_a_known_layer_is_an_error_and_not_zero_kernels(
    tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_layers(build: NetworkBuild, *given: object) -> bytes:
        build.log.messages.append(("VERBOSE", "Kernels:\nKernel: gemm in a format of another release"))
        return b"plan"

    monkeypatch.setattr(NetworkBuild, "serialise", without_layers)
    with pytest.raises(BuildError, match="logs no layer in the format known here"):
        measure_compiled(tiny_onnx_fp16.path, batch=4, target="sm89", backend=RTX)


# --- what a kernel computes, and where ---

BLOCK = "stages.1.0"


@pytest.mark.parametrize(
    ("name", "kind", "sources", "operation", "block"),
    [
        ("c_myl0_1", "correlation", ("stages.1.0.dwconv/Conv",), "dwconv", BLOCK),
        ("c_myl0_1", "correlation", ("downsample_layers.0.0/Conv",), "stem conv", "stem"),
        ("c_myl0_1", "correlation", ("downsample_layers.2.1/Conv",), "downsample conv", "downsample_layers.2"),
        # The bias is part of its product where both are in one kernel, and named where it is not.
        (
            "__myl_Fc_myl0_1", "runtime_fusion",
            ("stages.1.0.act/Gelu", "stages.1.0.pwconv1/Add", "stages.1.0.pwconv1/MatMul"),
            "pwconv1+gelu", BLOCK,
        ),
        (
            "__myl_AddDivErfMulCastMulReshSum_myl0_1", "kgen",
            ("stages.1.0.pwconv1/Add", "stages.1.0.act/Gelu", "stages.1.0.grn/ReduceL2", "stages.1.0.grn/Cast"),
            "pwconv1 bias+gelu+grn statistic", BLOCK,
        ),
        # Rounding to eight bits moves data; the product's gain is part of its bias.
        (
            "__myl_FcMulAddDivCastErfMulCast_myl0_1", "runtime_fusion",
            (
                "stages.1.0.pwconv1/MatMul", "stages.1.0.pwconv1/Mul", "stages.1.0.pwconv1/Add", "stages.1.0.act/Gelu",
                "stages.1.0.taps.h/QuantizeLinear", "stages.1.0.taps.h/DequantizeLinear",
            ),
            "pwconv1+gelu", BLOCK,
        ),
        # A GELU is a source of the kernel that reads its result; only one whose steps have Erf computes it.
        (
            "__myl_ReshAddDivMulMulAddCastMulResh_myl0_1", "kgen",
            ("stages.1.0.grn/Div", "stages.1.0.grn/Add_2", "stages.1.0/Mul", "stages.1.0.act/Gelu"),
            "gain", BLOCK,
        ),
        (
            "c_myl0_1", "correlation", ("stages.1.0/Transpose_2", "stages.1.0.pwconv2/Conv", "stages.1.0/Add"),
            "pwconv2+residual", BLOCK,
        ),
        # Two blocks: both operations are named, the bytes belong to the block of most nodes.
        (
            "__myl_AddMoveReshTranAddCastMeanSub_myl0_1", "kgen",
            (
                "stages.1.0.pwconv2/Add", "stages.1.0/Add",
                "downsample_layers.2.0/Sub", "downsample_layers.2.0/Div", "downsample_layers.2.0/Sqrt",
            ),
            "pwconv2 bias+residual+downsample norm", "downsample_layers.2",
        ),
        # A generated kernel pads a convolution's input; it computes none.
        ("__myl_ReshConcResh_myl0_1", "kgen", ("stages.1.0.dwconv/Conv",), "cast/layout", BLOCK),
        ("__myl_CastTranConc_myl0_0", "kgen", ("model/Cast", "downsample_layers.0.0/Conv"), "cast/layout", "stem"),
        ("__myl_MulMoveCastConc_myl0_0", "kgen", ("model/Mul", "downsample_layers.0.0/Conv"), "input scale", "stem"),
        ("__myl_CastMean_myl0_1", "kgen", ("model/Cast_2", "model/ReduceMean"), "pool", "head"),
        ("__myl_FcAddCast_myl0_1", "runtime_fusion", ("head/Gemm", "model/Cast_4"), "head", "head"),
        ("__myl_Tran_myl0_1", "kgen", (), "cast/layout", "other"),
        # What no table knows is "other" and is not guessed.
        ("__myl_SqrtMean_myl0_1", "kgen", (), "other", "other"),
        ("c_myl0_1", "correlation", ("node_Conv_261",), "other", "other"),
        ("c_myl0_1", "correlation", ("stages.0.blocks.1.conv_dw/Conv",), "other", "other"),
        ("k_myl0_1", "gemm", ("stages.1.0.attention/MatMul", "stages.1.0/Add"), "residual+other", BLOCK),
    ],
)  # fmt: skip
def test_operation_and_block_come_from_the_names_of_the_nodes(
    name: str, kind: str, sources: tuple[str, ...], operation: str, block: str
) -> None:
    assert (operation_of(name, kind, sources), block_of(name, kind, sources)) == (operation, block)


def test_the_stage_is_the_block_without_its_number() -> None:
    blocks = ("stages.2.13", "downsample_layers.1", "stem", "other")
    assert [stage_of(block) for block in blocks] == ["stages.2", "downsample_layers.1", "stem", "other"]


def test_a_copy_that_names_no_block_belongs_to_its_reader_or_else_to_its_writer() -> None:
    known = line(tensor("4", name="y"), tensor("4", name="z"), sources=("stages.1.0/Add",))

    def block_of_copy(reads: str, writes: str, name: str = "__myl_Move_myl0_0") -> str:
        copy = line(tensor("4", name=reads), tensor("4", name=writes), name=name, kind="kgen", sources=())
        return next(kernel.block for kernel in kernels(copy, known) if kernel.name == name)

    assert block_of_copy("images", "y") == block_of_copy("z", "logits") == "stages.1.0"
    assert block_of_copy("images", "logits") == "other"
    assert block_of_copy("images", "y", name="__myl_Sum_myl0_0") == "other", "it computes something that is not known"


# --- a whole engine ---


@pytest.mark.parametrize("target", ["sm75", "sm89"])
def test_every_kernel_of_an_engine_has_a_block_and_an_operation(tiny_onnx_fp16: Artifact, target: str) -> None:
    found = measure_compiled(tiny_onnx_fp16.path, batch=4, target=target, backend=RTX)
    blocks = {"stem", "head", *(f"downsample_layers.{index}" for index in (1, 2, 3))}
    assert {kernel.block for kernel in found.kernel_list} <= blocks | {
        f"stages.{name}" for name in ("0.0", "1.0", "2.0", "2.1", "3.0")
    }
    named = "+".join(kernel.operation for kernel in found.kernel_list).split("+")
    assert named.count("dwconv") == named.count("pwconv1") == named.count("gelu") == named.count("pwconv2") == 5
    assert "other" not in named


def test_every_kernel_of_the_fp32_layout_has_a_block_and_an_operation(tiny_onnx_fp32: Artifact) -> None:
    found = measure_compiled(tiny_onnx_fp32.path, batch=4, target="sm89", backend=RTX)
    assert "other" not in {
        *(kernel.block for kernel in found.kernel_list),
        *(kernel.operation for kernel in found.kernel_list),
    }


@pytest.mark.parametrize("grouping", ["stage", "block", "operation", "kind"])
def test_the_shares_of_every_grouping_sum_to_one(compiled: Compiled, grouping: Grouping) -> None:
    totals = compiled.totals(grouping)
    assert sum(total.share for total in totals) == pytest.approx(1, abs=1e-12)
    assert sum(total.kernels for total in totals) == compiled.kernels
    assert sum(total.megabytes for total in totals) == pytest.approx(compiled.megabytes_per_image, abs=5e-4)
    assert len(totals) > 2
    without_one = rows_of(compiled, compiled.kernel_list[1:]).totals(grouping)
    assert without_one != totals


def test_stages_are_in_the_networks_order_and_operations_by_their_bytes(compiled: Compiled) -> None:
    stages = [total.name for total in compiled.totals("stage")]
    assert stages == [
        "stem", "stages.0", "downsample_layers.1", "stages.1", "downsample_layers.2", "stages.2", "downsample_layers.3",
        "stages.3", "head",
    ]  # fmt: skip
    shares = [total.share for total in compiled.totals("operation")]
    assert shares == sorted(shares, reverse=True)


def test_the_largest_kernels_come_first(compiled: Compiled) -> None:
    sizes = [kernel.total_bytes for kernel in compiled.largest_kernels]
    assert sizes == sorted((kernel.total_bytes for kernel in compiled.kernel_list), reverse=True)
    assert sizes != [kernel.total_bytes for kernel in compiled.kernel_list], "not the order they run in"


def test_traffic_is_the_sum_over_the_kernels_tensors(compiled: Compiled) -> None:
    assert compiled.megabytes_per_image == pytest.approx(compiled.total_bytes / 8 / 1e6, abs=5e-4)
    assert rows_of(compiled, compiled.kernel_list * 2).total_bytes == 2 * compiled.total_bytes


def test_bytes_follow_the_batch_and_weights_are_shared_by_its_images(
    tiny_onnx_fp16: Artifact, compiled: Compiled
) -> None:
    one = measure_compiled(tiny_onnx_fp16.path, batch=1, target="sm89", backend=RTX)
    assert one.megabytes_per_image > compiled.megabytes_per_image
    assert [kernels[0].input_bytes for kernels in (one.kernel_list, compiled.kernel_list)] == [
        4 * 3 * 32 * 32,
        8 * 4 * 3 * 32 * 32,
    ]


def test_a_precision_of_half_the_size_moves_about_half_the_bytes(compiled: Compiled, tiny_onnx_fp32: Artifact) -> None:
    full = measure_compiled(tiny_onnx_fp32.path, batch=8, target="sm89", backend=RTX)
    assert compiled.megabytes_per_image < 0.7 * full.megabytes_per_image


# --- what is recorded and what is refused ---


def test_the_manifest_has_totals_and_a_row_for_every_kernel(tiny_engine: Artifact, compiled: Compiled) -> None:
    recorded: dict[str, Any] = json.loads(tiny_engine.manifest.to_json())["facts"]["compiled"]
    assert tiny_engine.manifest.facts.compiled == compiled
    assert len(recorded["kernel_list"]) == recorded["kernels"] > 5
    total = sum(sum(row[4:7]) for row in recorded["kernel_list"])
    assert recorded["megabytes_per_image"] == pytest.approx(total / recorded["batch"] / 1e6, abs=5e-4)
    assert "input 8x3x32x32 Float" in recorded["kernel_list"][0][7]


def test_each_profile_of_an_engine_is_counted_for_itself(tiny_engine: Artifact) -> None:
    counts = tiny_engine.manifest.facts.kernels_by_profile
    assert list(counts) == ["1:1:1", "1:4:8"]
    assert counts["1:4:8"] == tiny_engine.manifest.facts.compiled.kernels, "dynamic and fixed batch agree here"


def test_a_batch_that_the_graph_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"takes a batch of 2 only, not 8\. Use --batch 2"):
        measure_compiled(_foreign_graph(tmp_path, (2, 3, 8, 8)), batch=8, target="sm89", backend=RTX)
    assert measure_compiled(_foreign_graph(tmp_path, (2, 3, 8, 8)), batch=2, target="sm89", backend=RTX).kernels


def test_a_graph_with_an_open_image_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leaves more of its input open than the batch"):
        measure_compiled(_foreign_graph(tmp_path, ("batch", 3, "side", 8)), batch=2, target="sm89", backend=RTX)


def test_the_kernels_of_a_foreign_graph_are_other(tmp_path: Path) -> None:
    found = measure_compiled(_foreign_graph(tmp_path, ("batch", 3, 8, 8)), batch=2, target="sm89", backend=RTX)
    assert {total.name for total in found.totals("block")} == {"other"}
    assert "other" in {total.name for total in found.totals("operation")}


def _foreign_graph(folder: Path, shape: tuple[int | str, ...]) -> Path:
    """A convolution by another exporter, its nodes named its own way."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), dtype=np.float32), "weight")
    node = helper.make_node("Conv", ["images", "weight"], ["output"], name="node_Conv_1")
    graph = helper.make_graph([node], "foreign", [images], [output], [weight])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "foreign.onnx")
    return folder / "foreign.onnx"


def fp16_at_224(variant: Variant, folder: Path) -> Path:
    """The tiny network is too small for the compiler's choices to be those of a real one."""
    weights = WeightsRecord("random", "0", "0" * 64, "none (random weights)")
    record = ModelRecord(variant.name, 1000, 224, weights, Preprocessing())
    return export_onnx(random_model(variant), record, ExportSpec(deploy=DeploySpec(precision="fp16")), folder).path


def test_a_block_a_stage_of_attos_widths_compiles_to_40_kernels_and_moves_no_more_than_it_did(tmp_path: Path) -> None:
    """Flattened and then permuted, its tokens take 46 kernels and 15.5 MB at batch 8."""
    path = fp16_at_224(replace(VARIANTS["atto"], name="short", depths=(1, 1, 1, 1)), tmp_path)
    for batch, megabytes in ((1, 16.8), (8, 13.8)):
        found = measure_compiled(path, batch=batch, target="sm89", backend=RTX)
        assert (found.kernels, found.megabytes_per_image <= megabytes) == (40, True)


@pytest.fixture(scope="module")
def atto_fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fp16_at_224(VARIANTS["atto"], tmp_path_factory.mktemp("atto"))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "megabytes"), [(1, 38.2), (8, 31.7), (64, 30.9)])
def test_atto_compiles_to_98_kernels_at_every_batch_and_moves_no_more_than_it_did(
    atto_fp16: Path, batch: int, megabytes: float
) -> None:
    """Figures of docs/engine-traffic.md; another order of reshape and scale gives 118 kernels at 8 and 103 at 1."""
    found = measure_compiled(atto_fp16, batch=batch, target="sm89", backend=RTX)
    assert found.kernels == 98
    assert found.megabytes_per_image <= megabytes
