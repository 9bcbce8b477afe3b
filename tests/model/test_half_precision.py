"""Half precision as it is asked for: BF16 beside FP16, and parts that stay in FP32."""

from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner

from cnx_deploy.cli import cli
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.exporters.graph_checks import half_reductions
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import deploy_form, parts_of
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.runners.registry import open_runner
from cnx_deploy.verification.parity import differences
from tests.support.hot_networks import images_for, with_hot_responses

SIZE = 32


def exported(model: ConvNeXtV2, spec: DeploySpec, folder: Path) -> Artifact:
    weights = WeightsRecord("random", "0", "0" * 64, "none (random weights)")
    record = ModelRecord("tiny-test", model.num_classes, spec.image_size, weights, Preprocessing())
    return export_onnx(model, record, ExportSpec(deploy=spec, batch=(2, 2, 2)), folder)


@pytest.fixture(scope="module")
def bf16(tiny_onnx_bf16) -> Artifact:
    return tiny_onnx_bf16


@pytest.fixture(scope="module")
def kept(tiny_variant, tmp_path_factory) -> Artifact:
    """A run of two blocks and one part kept in FP32."""
    spec = DeploySpec("fp16", SIZE, keep_fp32=("stages.2.0", "stages.2.1", "stages.0.0.pwconv1"))
    return exported(random_model(tiny_variant, 10), spec, tmp_path_factory.mktemp("kept"))


def types_by_node(path: Path) -> dict[str, str]:
    """The type of every node's output, by the node's name."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    return {node.name: onnx.TensorProto.DataType.Name(types[node.output[0]]) for node in model.graph.node}


# Parts kept in FP32


def test_with_every_part_kept_nothing_is_rounded(tiny_model, tiny_variant) -> None:
    for layout in ("gpu", "cpu", "openvino"):
        spec = DeploySpec("fp16", SIZE, layout=layout, keep_fp32=parts_of(tiny_variant))
        images = (images_for(SIZE) * 255).round() / 255  # what enters is rounded in any case, and these are exact
        found = deployed_runner(tiny_model, spec).run(images)["logits"]
        assert (
            GATES["fp32"].failures(differences(found, reference_runner(tiny_model, spec).run(images)["logits"])) == ()
        )


@pytest.mark.parametrize("layout", ["gpu", "cpu", "openvino"])
@pytest.mark.parametrize("part", ["stages.1.0", "stages.1.0.dwconv", "stages.1.0.pwconv1", "stages.1.0.grn", "head"])
def test_the_parameters_of_a_kept_part_are_float_and_all_others_half(tiny_model, layout, part) -> None:
    deployed = deploy_form(tiny_model, DeploySpec("fp16", SIZE, layout=layout, keep_fp32=(part,)))
    types = {name: parameter.dtype for name, parameter in deployed.named_parameters()}
    inside = {name for name in types if name.startswith(f"{part}.")}
    assert inside
    assert {types[name] for name in inside} == {torch.float32}
    assert {types[name] for name in types.keys() - inside} == {torch.float16}
    assert torch.isfinite(deployed(images_for(SIZE))).all()


def test_a_kept_parts_constants_are_not_rounded_on_the_way(tiny_model) -> None:
    spec = DeploySpec("fp16", SIZE, keep_fp32=("stages.1.0",))
    found = deploy_form(tiny_model, spec).stages[1][0].pwconv1.weight
    assert torch.equal(
        found, deploy_form(tiny_model, DeploySpec("fp32", SIZE, layout="gpu")).stages[1][0].pwconv1.weight
    )


def test_a_kept_block_computes_in_float_and_neighbours_make_one_island(kept) -> None:
    types = types_by_node(kept.path)
    inside = {name: kind for name, kind in types.items() if name.startswith(("stages.2.0", "stages.2.1"))}
    assert {kind for name, kind in inside.items() if "Shape" not in name} == {"FLOAT"}
    assert types["stages.0.0.pwconv1/MatMul"] == "FLOAT"
    assert types["stages.0.0.dwconv/Conv"] == "FLOAT16"
    assert types["stages.3.0.pwconv1/MatMul"] == "FLOAT16"
    assert not list(half_reductions(onnx.shape_inference.infer_shapes(onnx.load(kept.path))))


def test_what_is_kept_is_in_the_manifest_and_nothing_else_changes_it(kept, tiny_onnx_fp16) -> None:
    assert list(kept.manifest.deploy.keep_fp32) == ["stages.0.0.pwconv1", "stages.2.0", "stages.2.1"]
    assert kept.manifest.deploy.keeps("stages.2.1.grn")
    assert not kept.manifest.deploy.keeps("stages.0.0")
    assert tiny_onnx_fp16.manifest.deploy.keep_fp32 == ()


@pytest.mark.slow
def test_keeping_the_part_that_overflows_makes_the_file_right(tiny_variant, tmp_path) -> None:
    model, images = with_hot_responses(tiny_variant, SIZE, 2000.0), images_for(SIZE)
    expected = reference_runner(model, DeploySpec(image_size=SIZE)).run(images)["logits"]
    failures = []
    for keep in (("stages.0.0",), ("stages.1.0",)):
        spec = DeploySpec("fp16", SIZE, keep_fp32=keep)
        runner = EmulatedRunner(exported(model, spec, tmp_path / str(len(failures))).path)
        failures.append(GATES["fp16"].failures(differences(runner.run(images)["logits"], expected)))
    assert [bool(each) for each in failures] == [False, True]


def test_a_part_that_is_not_there_is_named_with_those_that_are(tiny_model) -> None:
    with pytest.raises(InputError, match=r"No part of tiny-test is called 'stages\.2\.2'.*stages\.3\.0\.grn"):
        deploy_form(tiny_model, DeploySpec("fp16", SIZE, keep_fp32=("stages.2.2",)))


def test_there_is_nothing_to_keep_in_an_fp32_file() -> None:
    with pytest.raises(InputError, match="kept in FP32 in a file of half precision, not in fp32"):
        DeploySpec("fp32", SIZE, keep_fp32=("head",))


# BF16


def test_a_bf16_file_is_of_the_opset_whose_convolution_takes_it(bf16) -> None:
    model = onnx.load(bf16.path)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [22]
    assert bf16.manifest.request.opset == 22
    assert bf16.manifest.facts.types.keys() == {"BFLOAT16", "FLOAT"}


def test_a_bf16_file_rounds_to_eight_bits_and_not_to_eleven(bf16, tiny_model) -> None:
    """Its noise is 8 times that of FP16; a network of random weights magnifies both to about its gate."""
    images, plain = images_for(SIZE), DeploySpec(image_size=SIZE)
    expected = reference_runner(tiny_model, plain).run(images)["logits"]
    found = differences(EmulatedRunner(bf16.path).run(images)["logits"], expected).relative_l2_max
    fp16 = deployed_runner(tiny_model, DeploySpec("fp16", SIZE)).run(images)["logits"]
    assert 2.0 < found / differences(fp16, expected).relative_l2_max < 32.0
    assert found < 4 * GATES["bf16"].relative_l2_max


@pytest.mark.slow
def test_bf16_stays_finite_where_fp16_overflows(tiny_variant, tmp_path) -> None:
    model, images = with_hot_responses(tiny_variant, SIZE, 2000.0), images_for(SIZE)
    runner = EmulatedRunner(exported(model, DeploySpec("bf16", SIZE), tmp_path).path)
    assert runner.evaluate(images).first_nonfinite is None  # FP16: the test above


def test_onnx_runtime_is_not_asked_for_bf16_on_a_cpu_nor_the_emulator_for_another_precision(
    bf16, tiny_onnx_fp16
) -> None:
    with pytest.raises(InputError, match="no BF16 convolution on a CPU"):
        open_runner(bf16, "onnxruntime")
    with pytest.raises(InputError, match="is FP16: --backend emulate-bf16 has no BF16"):
        open_runner(tiny_onnx_fp16, "emulate-bf16")


def test_a_bf16_engine_is_built_for_ampere_and_refused_for_turing(bf16, tmp_path) -> None:
    batches = ((1, 2, 4),)
    engine = build_engine(bf16, BuildSpec("tensorrt-rtx", "sm80", batches, measure=False), tmp_path)
    assert engine.manifest.facts.half_share_of_products == 1.0
    assert set(engine.manifest.facts.census.types) >= {"BF16", "FLOAT"}
    with pytest.raises(InputError, match="sm75 has no BF16 arithmetic; sm80 is the first"):
        build_engine(bf16, BuildSpec("tensorrt-rtx", "sm75", batches, measure=False), tmp_path)


def test_an_engine_of_a_file_with_kept_parts_is_built_and_one_that_hides_them_is_not(kept, tmp_path) -> None:
    spec = BuildSpec("tensorrt-rtx", "sm89", ((2, 2, 2),), measure=False)
    engine = build_engine(kept, spec, tmp_path)
    assert 0.3 < engine.manifest.facts.half_share_of_products < 0.95


@pytest.mark.slow
def test_bf16_goes_through_the_commands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    made = run.invoke(cli, ["export", "--variant", "tiny-test", "--image-size", "32", "--precision", "bf16"])
    assert made.exit_code == 0, made.output
    checked = run.invoke(cli, ["verify", "--samples", "4"])
    assert checked.exit_code == 0, checked.output
    assert "emulator bf16" in checked.output
