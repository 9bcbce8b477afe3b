"""ConvNeXt V1 goes the whole way beside V2: the same function as other libraries', trained, exported, built."""

import copy
from functools import partial

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from cnx_deploy.bench.bounds import work_of
from cnx_deploy.bench.peers import timm_twin
from cnx_deploy.core.deploy_spec import FOLDS, DeploySpec
from cnx_deploy.core.errors import CheckpointError, GraphCheckError, InputError, ParityError
from cnx_deploy.core.gates import GATES, OutputSpec
from cnx_deploy.core.manifest import ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import ALL_VARIANTS, V1_VARIANTS, VARIANTS, Variant, find_variant
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.diagnosis.search import parts_of_unit, smallest_subset
from cnx_deploy.exporters.graph_checks import check_export
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.model import deploy_blocks
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, create_model, random_model
from cnx_deploy.model.deploy import block_parts, deploy_form, parts_of
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.training import TrainingSpec, initial_model, train
from cnx_deploy.training.fcmae import PretrainingSpec, pretrain
from cnx_deploy.training.optimisation import parameter_groups
from cnx_deploy.verification.parity import differences
from cnx_deploy.verification.verify import verify_export
from tests.support.foreign_models import assert_same_weights, randomise, saved
from tests.support.training_data import write_colours

EXACT = 1e-12
"""Largest difference over largest logit in float64."""
HEAD = {"outputs": (OutputSpec("logits", (10,), "logit"),), "head_operators": {"LayerNormalization": 1}}
LOGITS_ATOL = 1e-5
SIZE = 64


def images(count: int = 2, side: int = SIZE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def transformers_v1(variant: Variant, num_classes: int) -> nn.Module:
    config = transformers.ConvNextConfig(
        depths=list(variant.depths), hidden_sizes=list(variant.dims), num_labels=num_classes
    )
    return transformers.ConvNextForImageClassification(config).eval()


def relative_difference(model: ConvNeXtV2, spec: DeploySpec) -> float:
    """Deploy form against training form in float64; the preprocessing is spelled out here."""
    raw = runner_input(next(image_like_batches(4, spec.image_size, batch_size=4)), "float")
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (spec.mean, spec.std))
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()((raw.double() - mean) / std)
        found = deploy_form(model, spec)(raw)
    return float((found - expected).abs().max() / expected.abs().max())


def exported(model: ConvNeXtV2, spec: DeploySpec, folder):
    """What the command does: export, graph check, comparison with PyTorch."""
    weights = WeightsRecord("random", "0", "0" * 64, "none (random weights)")
    preprocessing = Preprocessing(image_size=spec.image_size)
    record = ModelRecord(model.variant.name, model.num_classes, spec.image_size, weights, preprocessing)
    export_spec = ExportSpec(deploy=spec, batch=(3, 3, 3))
    return export_onnx(model, record, export_spec, folder, verify=partial(verify_export, model=model))


# Sizes


@pytest.mark.parametrize("name", V1_VARIANTS)
def test_parameters_are_the_tables_and_timms(name):
    variant = V1_VARIANTS[name]
    with torch.device("meta"):
        ours, theirs = create_model(variant), timm.create_model(f"convnext_{name.removeprefix('v1-')}")
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    assert counts == [variant.parameter_count] * 2


def test_the_two_versions_have_different_names_and_every_name_is_found():
    assert not VARIANTS.keys() & V1_VARIANTS.keys()
    assert [find_variant(name).name for name in ALL_VARIANTS] == list(ALL_VARIANTS)


def test_v1_moves_less_than_v2_at_best():
    v1, v2 = (work_of(name, 224, "fp16") for name in ("v1-atto", "atto"))
    assert (v1.macs == v2.macs, v1.fused_bytes < v2.fused_bytes) == (True, True)


# The same function as other libraries'


@pytest.mark.parametrize(("name", "side"), [("v1-atto", 64), ("v1-tiny", 96)])
def test_logits_equal_timms(name, side, tmp_path):
    """timm's atto keeps its pointwise layers as 1x1 convolutions, its tiny as linear layers."""
    theirs = randomise(timm.create_model(f"convnext_{name.removeprefix('v1-')}").eval())
    loaded = load_checkpoint(saved(theirs.state_dict(), tmp_path / "timm.safetensors"))
    with torch.no_grad():
        expected, found = theirs(images(side=side)), loaded.model(images(side=side))
    assert (loaded.model.variant.name, bool(expected.std() > 0.1)) == (name, True)
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_ATOL)


def test_logits_equal_transformers(tiny_v1_variant, tmp_path):
    theirs = randomise(transformers_v1(tiny_v1_variant, 10))
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path / "model.safetensors", tiny_v1_variant).model
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), theirs(images()).logits, rtol=0, atol=LOGITS_ATOL)


def test_timms_twin_in_the_benchmark_has_its_logits(tiny_v1_model):
    with torch.no_grad():
        expected, found = tiny_v1_model(images()), timm_twin(tiny_v1_model)(images())
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("entry", ["model", "model_ema"])
def test_the_official_codes_checkpoint_loads(tiny_v1_model, tiny_v1_variant, tmp_path, entry):
    """facebookresearch/ConvNeXt: the names of `models/convnext.py` are those of the training form."""
    path = saved({entry: tiny_v1_model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    assert_same_weights(load_checkpoint(path, tiny_v1_variant).model, tiny_v1_model)


@pytest.mark.parametrize(("mine", "other"), [("v1-atto", "atto"), ("atto", "v1-atto")])
def test_the_other_versions_weights_are_refused_by_name(tmp_path, mine, other):
    path = save_checkpoint(tmp_path / "mine.safetensors", random_model(mine, 2))
    with pytest.raises(CheckpointError, match=rf"(?s)does not fit '{other}'.*those of '{mine}'"):
        load_checkpoint(path, other)


def test_layer_scale_starts_at_1e_6_and_without_it_the_logits_are_others(tiny_v1_variant, tiny_v1_model):
    fresh = create_model(tiny_v1_variant, 10)
    scales = torch.cat([block.gamma for stage in fresh.stage_blocks() for block in stage])
    assert torch.equal(scales, torch.full_like(scales, 1e-6))
    with torch.no_grad():
        expected = tiny_v1_model(images())
        for stage in tiny_v1_model.stage_blocks():
            for block in stage:
                block.gamma.fill_(1.0)
        assert (tiny_v1_model(images()) - expected).abs().max() > 1000 * LOGITS_ATOL


def test_every_parameter_has_a_gradient(tiny_v1_model):
    tiny_v1_model(images()).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in tiny_v1_model.parameters())


# The deploy form


@pytest.mark.parametrize("leave_out", [(), *((fold,) for fold in FOLDS), tuple(FOLDS)])
@pytest.mark.parametrize("layout", ["gpu", "cpu", "openvino"])
def test_in_float64_the_deploy_form_is_the_training_form(tiny_v1_model, layout, leave_out):
    assert relative_difference(tiny_v1_model, DeploySpec("fp64", SIZE, layout=layout, leave_out=leave_out)) < EXACT


@pytest.mark.parametrize(
    "broken",
    [lambda weight, bias, gamma: (weight, bias), lambda weight, bias, gamma: (weight * gamma[:, None], bias)],
    ids=["not folded", "bias not scaled"],
)
@pytest.mark.parametrize("layout", ["gpu", "cpu", "openvino"])
def test_a_layer_scale_folded_wrongly_changes_the_function(tiny_v1_model, monkeypatch, layout, broken):
    monkeypatch.setattr(deploy_blocks, "fold_layer_scale", broken)
    assert relative_difference(tiny_v1_model, DeploySpec("fp64", SIZE, layout=layout)) > 1e-3


def test_no_part_of_a_v1_block_is_called_grn(tiny_v1_variant, tiny_variant):
    assert "grn" not in block_parts(tiny_v1_variant)
    assert "grn" in block_parts(tiny_variant)
    assert not [part for part in parts_of(tiny_v1_variant) if part.endswith("grn")]
    with pytest.raises(InputError, match=r"stages\.0\.0\.grn"):
        deploy_form(random_model(tiny_v1_variant, 10), DeploySpec("fp16", 32, keep_fp32=("stages.0.0.grn",)))


def test_bisecting_a_v1_block_tries_the_parts_it_has(tiny_v1_variant):
    parts = parts_of_unit("stages.0.0", block_parts(tiny_v1_variant))
    tried: list[tuple[str, ...]] = []

    def passes(kept: tuple[str, ...]) -> bool:
        tried.append(tuple(kept))
        return "stages.0.0.pwconv2" in kept

    assert smallest_subset(parts, (), passes) == ("stages.0.0.pwconv2",)
    assert not [kept for kept in tried if "stages.0.0.grn" in kept]


# Training


@pytest.mark.slow  # a minute; test_pretraining takes V2 the same way
def test_it_trains_from_its_own_masked_pre_training(tiny_v1_variant, tmp_path):
    colours = write_colours(tmp_path / "colours")
    request = PretrainingSpec(colours, tiny_v1_variant, tmp_path / "runs", epochs=1, image_size=64, batch_size=8)
    encoder = pretrain(request).last
    spec = TrainingSpec(colours, tiny_v1_variant, tmp_path / "runs", epochs=6, image_size=64, batch_size=8)
    loaded = initial_model(spec, init=encoder)
    result = train(spec, loaded.model)
    assert (loaded.model.variant.version, result.best_top1_percent) == (1, 100.0)


def test_layer_scale_has_no_weight_decay_and_its_layers_rate(tiny_v1_model):
    groups = parameter_groups(tiny_v1_model, 0.3, variant=tiny_v1_model.variant, layer_decay=0.5)
    gamma = tiny_v1_model.stages[0][0].gamma
    mine = [group for group in groups if any(parameter is gamma for parameter in group["params"])]
    assert [(group["weight_decay"], group["rate_share"]) for group in mine] == [(0.0, 0.5**5)]


# Files and engines


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_an_export_passes_its_gates_and_runs(tiny_v1_model, tmp_path, precision):
    spec = DeploySpec(precision, 32)
    path = exported(tiny_v1_model, spec, tmp_path).path
    pixels = runner_input(next(image_like_batches(3, 32, batch_size=3)), "float")
    runner = OrtRunner(path) if precision == "fp32" else EmulatedRunner(path)
    expected = reference_runner(tiny_v1_model, spec).run(pixels)["logits"]
    assert not GATES[precision].failures(differences(runner.run(pixels)["logits"], expected))


@pytest.mark.slow
def test_an_export_whose_layer_scale_is_lost_is_refused(tiny_v1_model, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy_blocks, "fold_layer_scale", lambda weight, bias, gamma: (weight, bias))
    with pytest.raises(ParityError, match="differs from PyTorch"):
        exported(tiny_v1_model, DeploySpec("fp16", 32), tmp_path)


@pytest.mark.slow
def test_a_v1_file_is_not_taken_for_v2(tiny_v1_model, tiny_variant, tmp_path):
    path = exported(tiny_v1_model, DeploySpec("fp16", 32), tmp_path).path
    with pytest.raises(GraphCheckError, match=r"5 ReduceSum expected, 0 found"):
        check_export(path, variant=tiny_variant, layout="gpu", batch=(3, 3, 3), opset=20, **HEAD)


@pytest.mark.slow
def test_an_engine_is_built_from_it(tiny_v1_model, tmp_path):
    onnx = exported(tiny_v1_model, DeploySpec("fp16", 32), tmp_path)
    engine = build_engine(onnx, BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=((3, 3, 3),)), tmp_path)
    assert engine.manifest.model.variant == "tiny-v1-test"
    assert engine.manifest.facts.compiled.kernels > 0
