"""The deploy form computes the training form's function, and each fold that makes it so is needed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cnx_deploy.core.deploy_spec import FOLDS, DeploySpec
from cnx_deploy.core.eight_bits import GAIN_FOLDS
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.model import deploy, deploy_blocks, deploy_layers, folds
from cnx_deploy.model.checkpoint import hash_weights
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import DeployedConvNeXtV2, deploy_form
from cnx_deploy.model.deploy_blocks import TokenBlock
from cnx_deploy.model.deploy_layers import (
    ChannelsFirstNorm,
    FlattenedNorm,
    GainedLinear,
    NormResponseGain,
    PatchConvolution,
    PooledResponseGain,
    ResponseGain,
    TokenNorm,
)
from cnx_deploy.model.folds import gain_moves_fewer_bytes_in_weight
from cnx_deploy.model.tasks import pooled
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.model.tasks.upernet import TokenLateral
from cnx_deploy.verification.parity import differences

EXACT = 1e-12
"""Largest difference over largest logit in float64; seen 4e-15. A wrong fold gives 1e-3 and more."""

LAYOUTS = ("gpu", "cpu", "openvino")
KINDS = ("float", "uint8")
BOTH_GAINS_PX = 64


def images_for(spec: DeploySpec, count: int = 4) -> Tensor:
    return runner_input(torch.cat(list(image_like_batches(count, spec.image_size, batch_size=count))), spec.input_kind)


def training_form_logits(model: ConvNeXtV2, spec: DeploySpec, images: Tensor) -> Tensor:
    """float64 logits; the preprocessing is spelled out here so that a fault in the runners cannot hide one."""
    raw = images.permute(0, 3, 1, 2).double() / 255.0 if spec.input_kind == "uint8" else images.double()
    mean = torch.tensor(spec.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(spec.std, dtype=torch.float64).view(3, 1, 1)
    with torch.inference_mode():
        return copy.deepcopy(model).double()((raw - mean) / std)


def deployed_logits(deployed: DeployedConvNeXtV2, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return deployed(images)


def relative_difference(model: ConvNeXtV2, spec: DeploySpec, deployed: DeployedConvNeXtV2 | None = None) -> float:
    images = images_for(spec)
    expected = training_form_logits(model, spec, images)
    found = deployed_logits(deployed or deploy_form(model, spec), images)
    return float((found - expected).abs().max() / expected.abs().max())


# The same function


@pytest.mark.parametrize("image_size", [32, BOTH_GAINS_PX])
@pytest.mark.parametrize("input_kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_float64_the_deploy_form_is_the_training_form(tiny_model, layout, input_kind, image_size):
    assert relative_difference(tiny_model, DeploySpec("fp64", image_size, input_kind, layout)) < EXACT


def test_an_uncommon_normalisation_is_folded_exactly(tiny_model):
    spec = DeploySpec("fp64", 32, "uint8", "gpu", mean=(0.1, 0.9, 0.0), std=(0.01, 2.0, 1.0))
    assert relative_difference(tiny_model, spec) < EXACT


def test_at_64_px_one_network_has_the_gain_in_weights_and_in_hidden_tensors(tiny_model):
    deployed = deploy_form(tiny_model, DeploySpec("fp64", BOTH_GAINS_PX, layout="gpu"))
    in_weight = [block.gain_in_weight for block in deployed.modules() if isinstance(block, TokenBlock)]
    assert in_weight == [True, True, False, False, False]


@pytest.mark.parametrize("input_kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_fp32_the_deploy_form_is_within_1e_5(tiny_model, layout, input_kind):
    spec = DeploySpec("fp32", BOTH_GAINS_PX, input_kind, layout)
    assert relative_difference(tiny_model, spec) < 1e-5


@pytest.mark.parametrize("input_kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_half_the_deploy_form_passes_the_fp16_gate(tiny_model, layout, input_kind):
    spec = DeploySpec("fp16", BOTH_GAINS_PX, input_kind, layout)
    images = images_for(spec, 8)
    found = deployed_logits(deploy_form(tiny_model, spec), images)
    assert GATES["fp16"].failures(differences(found, training_form_logits(tiny_model, spec, images))) == ()


@pytest.fixture
def norm_on_patches(monkeypatch):
    """The rule that wide stems meet, met by the narrow one of the tests."""
    monkeypatch.setattr(deploy, "norm_moves_fewer_bytes_on_patches", lambda channels, patch: True)


@pytest.mark.usefixtures("norm_on_patches")
@pytest.mark.parametrize("leave_out", [(), ("input-normalisation",)])
@pytest.mark.parametrize("image_size", [32, BOTH_GAINS_PX])
@pytest.mark.parametrize("input_kind", KINDS)
def test_with_the_stems_norm_on_patches_the_function_stays(tiny_model, input_kind, image_size, leave_out):
    spec = DeploySpec("fp64", image_size, input_kind, "gpu", leave_out=leave_out)
    deployed = deploy_form(tiny_model, spec)
    assert (deployed.norm_on_patches, relative_difference(tiny_model, spec, deployed) < EXACT) == (True, True)


@pytest.mark.usefixtures("norm_on_patches")
@pytest.mark.parametrize("input_kind", KINDS)
def test_with_the_stems_norm_on_patches_half_passes_the_fp16_gate(tiny_model, input_kind):
    spec = DeploySpec("fp16", BOTH_GAINS_PX, input_kind, "gpu")
    images = images_for(spec, 8)
    found = deployed_logits(deploy_form(tiny_model, spec), images)
    assert GATES["fp16"].failures(differences(found, training_form_logits(tiny_model, spec, images))) == ()


@pytest.mark.usefixtures("norm_on_patches")
@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_images_stay_finite_and_right_with_the_norm_on_patches(tiny_model, level):
    spec = DeploySpec("fp16", BOTH_GAINS_PX, "uint8", "gpu")
    images = torch.full((2, BOTH_GAINS_PX, BOTH_GAINS_PX, 3), level, dtype=torch.uint8)
    found = deployed_logits(deploy_form(tiny_model, spec), images)
    # A grey image has no contrast: its logits are small, and rounding alone uses 0.8 of the gate.
    wide = replace(GATES["fp16"], relative_l2_max=4 * GATES["fp16"].relative_l2_max)
    assert wide.failures(differences(found, training_form_logits(tiny_model, spec, images))) == ()


@pytest.mark.usefixtures("norm_on_patches")
def test_a_patch_norm_without_its_mean_changes_the_function(tiny_model, monkeypatch):
    def uncentred(weight, bias, gain):
        root, offset, scaled, carried = folds.fold_norm_into_patches(weight, bias, gain)
        return root, offset, scaled + weight.mean(dim=0), carried

    monkeypatch.setattr(deploy_layers, "fold_norm_into_patches", uncentred)
    assert relative_difference(tiny_model, DeploySpec("fp64", BOTH_GAINS_PX, layout="gpu")) > 1e-3


@pytest.mark.parametrize(("channels", "on_patches"), [(144, False), (145, True)])
def test_the_norm_moves_to_the_patches_above_three_times_their_size(channels, on_patches):
    assert folds.norm_moves_fewer_bytes_on_patches(channels, patch=48) is on_patches


# Each fold: alone, left out, and whether its switch does anything


@pytest.mark.parametrize("image_size", [32, BOTH_GAINS_PX])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fold", FOLDS)
def test_without_one_fold_the_function_stays(tiny_model, fold, layout, image_size):
    assert relative_difference(tiny_model, DeploySpec("fp64", image_size, "float", layout, leave_out=(fold,))) < EXACT


@pytest.mark.parametrize("image_size", [32, BOTH_GAINS_PX])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fold", FOLDS)
def test_one_fold_alone_keeps_the_function(tiny_model, fold, layout, image_size):
    others = tuple(name for name in FOLDS if name != fold)
    assert relative_difference(tiny_model, DeploySpec("fp64", image_size, "float", layout, leave_out=others)) < EXACT


@pytest.mark.parametrize("input_kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_any_fold_the_function_stays(tiny_model, layout, input_kind):
    assert relative_difference(tiny_model, DeploySpec("fp64", 32, input_kind, layout, leave_out=tuple(FOLDS))) < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_any_fold_the_fp16_form_passes_its_gate(tiny_model, layout):
    spec = DeploySpec("fp16", BOTH_GAINS_PX, layout=layout, leave_out=tuple(FOLDS))
    images = images_for(spec, 8)
    found = deployed_logits(deploy_form(tiny_model, spec), images)
    assert GATES["fp16"].failures(differences(found, training_form_logits(tiny_model, spec, images))) == ()


FOLD_SHOWS = {
    "layer-scale": lambda deployed: deployed.stages[0][0].scale is None,
    "input-normalisation": lambda deployed: deployed.normalise is None,
    "norm-affine": lambda deployed: deployed.stages[0][0].norm.gain is None,
    "downsample-affine": lambda deployed: deployed.downsample_layers[1][0].gain is None,
    "head-affine": lambda deployed: deployed.norm.gain is None,
    "grn-beta": lambda deployed: deployed.stages[0][0].beta is None,
    "grn-gain": lambda deployed: isinstance(deployed.stages[0][0].pwconv2, GainedLinear),
    "residual": lambda deployed: isinstance(deployed.stages[3][0].pwconv2, torch.nn.Conv2d),
    "patches": lambda deployed: isinstance(deployed.downsample_layers[0][0], PatchConvolution),
    "stem-norm": lambda deployed: deployed.norm_on_patches,
    "blocked": lambda deployed: isinstance(deployed.stages[0][0].grn, PooledResponseGain),
    "channels-last": lambda deployed: isinstance(deployed.stages[0][0].norm, FlattenedNorm),
    "lateral-affine": lambda deployed: deployed.pyramid.norms[0].gain is None,
    "finest-level": lambda deployed: deployed.pyramid.is_split,
    "gathered-resize": lambda deployed: isinstance(deployed.decode_head.lateral_convs[0], TokenLateral),
}
NARROW = {"channels": 8, "box_channels": 8, "mask_channels": 8}
OF_TASK = {
    "lateral-affine": ("detect", NARROW),
    "finest-level": ("detect", NARROW),
    "gathered-resize": ("segment", {"channels": 8}),
}
"""The folds of a task's head, and a small one of it."""


# Those of eight bits come from a calibration: tests/diagnosis/test_calibration.py leaves each out.
@pytest.mark.parametrize("fold", sorted(FOLDS.keys() - set(GAIN_FOLDS.values())))
def test_the_switch_of_a_fold_takes_it_out(request, tiny_model, tiny_v1_model, fold):
    layout = {"blocked": "cpu", "channels-last": "openvino"}.get(fold, "gpu")
    model = tiny_v1_model if fold == "layer-scale" else tiny_model
    if fold in OF_TASK:
        task, options = OF_TASK[fold]
        model = random_model("tiny-test", 3, task=find_task(task).configured(options))
    if fold == "stem-norm":
        request.getfixturevalue("norm_on_patches")
    made = deploy_form(model, DeploySpec("fp64", BOTH_GAINS_PX, layout=layout))
    left_out = deploy_form(model, DeploySpec("fp64", BOTH_GAINS_PX, layout=layout, leave_out=(fold,)))
    assert (FOLD_SHOWS[fold](made), FOLD_SHOWS[fold](left_out)) == (True, False)


# Negative controls: each fold wrong


def without_fold(weight, bias, gain, shift):
    return weight, bias


def without_shift(weight, bias, gain, shift):
    return weight * gain, bias


def with_mean_twice(weight, bias, mean, std, full_scale):
    return folds.fold_input_normalisation(weight, bias, mean * 2, std, full_scale)


def with_the_wrong_full_scale(weight, bias, mean, std, full_scale):
    return folds.fold_input_normalisation(weight, bias, mean, std, 255.0 / full_scale)


def without_beta(weight, bias, beta):
    return bias


def with_channels_before_positions(weight):
    return weight.reshape(len(weight), -1, 1, 1)


BROKEN_FOLDS = {
    "GRN beta not folded": (deploy_blocks, "fold_grn_beta", without_beta),
    "block LayerNorm not folded": (deploy_blocks, "fold_affine_into_linear", without_fold),
    "block LayerNorm shift not folded": (deploy_blocks, "fold_affine_into_linear", without_shift),
    "last LayerNorm not folded": (pooled, "fold_affine_into_linear", without_fold),
    "downsampling LayerNorm not folded": (deploy, "fold_affine_into_conv", without_fold),
    "mean subtracted twice": (deploy, "fold_input_normalisation", with_mean_twice),
    "levels taken for shares": (deploy, "fold_input_normalisation", with_the_wrong_full_scale),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", BROKEN_FOLDS)
def test_a_broken_fold_changes_the_function(tiny_model, monkeypatch, fault, layout):
    module, name, broken = BROKEN_FOLDS[fault]
    monkeypatch.setattr(module, name, broken)
    assert relative_difference(tiny_model, DeploySpec("fp64", BOTH_GAINS_PX, layout=layout)) > 1e-3


def test_patches_in_another_order_change_the_function(tiny_model, monkeypatch):
    monkeypatch.setattr(deploy_layers, "fold_patches", with_channels_before_positions)
    assert relative_difference(tiny_model, DeploySpec("fp64", BOTH_GAINS_PX, layout="gpu")) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropping_grn_gamma_changes_the_function(tiny_model, layout):
    spec = DeploySpec("fp64", BOTH_GAINS_PX, layout=layout)
    deployed = deploy_form(tiny_model, spec)
    for gain in deployed.modules():
        if isinstance(gain, (ResponseGain, NormResponseGain)):
            gain.gamma.zero_()
        elif isinstance(gain, PooledResponseGain):
            gain.affine.weight.zero_()
    assert relative_difference(tiny_model, spec, deployed) > 1e-3


# FP16: what stays in FP32


def test_grn_keeps_a_norm_beyond_the_fp16_range():
    gain = ResponseGain(torch.ones(8)).half()
    hidden = torch.full((1, 56 * 56, 8), 2000.0, dtype=torch.float16)  # norm 2000 × 56 = 112,000 > 65,504
    assert torch.equal(gain(hidden), torch.full((1, 1, 8), 2.0, dtype=torch.float16))


@pytest.mark.parametrize("form", [PooledResponseGain, NormResponseGain])
def test_grn_of_maps_keeps_squares_beyond_the_fp16_range(form):
    gain = form(torch.ones(8)).half()
    hidden = torch.full((1, 8, 7, 7), 2000.0, dtype=torch.float16)  # square 4,000,000 > 65,504
    assert torch.equal(gain(hidden), torch.full((1, 8, 1, 1), 2.0, dtype=torch.float16))


@pytest.mark.parametrize("value", [0.0, 1e-7, 1.0, 6e4])
@pytest.mark.parametrize("form", [ResponseGain, PooledResponseGain, NormResponseGain])
def test_grn_of_equal_channels_is_its_formula_over_the_whole_fp16_range(form, value):
    """n = norm / (norm + eps) for channels alike; at zero the gain is 1, not NaN."""
    value = float(torch.tensor(value, dtype=torch.float16))
    shape = (1, 9, 8) if form is ResponseGain else (1, 8, 3, 3)
    gain = form(torch.ones(8)).half()(torch.full(shape, value, dtype=torch.float16))
    expected = 1.0 + 3.0 * value / (3.0 * value + 1e-6)
    assert torch.allclose(gain.float(), torch.full_like(gain.float(), expected), atol=1e-3)


@pytest.mark.parametrize("norm", [ChannelsFirstNorm(True), ChannelsFirstNorm(False), FlattenedNorm()])
def test_norms_of_maps_take_values_whose_squares_leave_the_fp16_range(norm):
    images = torch.tensor([-1000.0, 1000.0], dtype=torch.float16).view(1, 2, 1, 1)
    assert norm(images).flatten().tolist() == [-1.0, 1.0]


def test_token_norm_takes_values_whose_squares_leave_the_fp16_range():
    tokens = torch.tensor([[-1000.0, 1000.0]], dtype=torch.float16)
    assert TokenNorm()(tokens).tolist() == [[-1.0, 1.0]]


def test_every_parameter_of_the_fp16_form_is_half(tiny_model):
    deployed = deploy_form(tiny_model, DeploySpec("fp16", 32))
    assert {parameter.dtype for parameter in deployed.parameters()} == {torch.float16}


def test_logits_of_the_fp16_form_are_float32(tiny_model):
    spec = DeploySpec("fp16", 32)
    assert deployed_logits(deploy_form(tiny_model, spec), images_for(spec, 1)).dtype == torch.float32


@pytest.mark.parametrize(("precision", "layout"), [("fp16", "gpu"), ("fp32", "cpu"), ("fp64", "cpu")])
def test_fp16_is_tokens_by_default_and_the_rest_channels_first(precision, layout):
    assert DeploySpec(precision).layout == layout


# The caller's model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_changing_the_deploy_form_leaves_the_callers_weights_alone(tiny_model, precision, layout):
    model = tiny_model.double() if precision == "fp64" else tiny_model
    before = hash_weights(model)
    for parameter in deploy_form(model, DeploySpec(precision, 32, layout=layout)).parameters():
        parameter.zero_()
    assert hash_weights(model) == before


def test_the_callers_model_stays_in_training_mode_with_gradients(tiny_model):
    deploy_form(tiny_model.train(), DeploySpec("fp16", 32))
    modes = {module.training for module in tiny_model.modules()}
    assert (modes, all(parameter.requires_grad for parameter in tiny_model.parameters())) == ({True}, True)


def test_the_deploy_form_of_a_training_model_is_in_evaluation_mode(tiny_model):
    assert not deploy_form(tiny_model.train(), DeploySpec("fp32", 32)).training


# Refusals


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"precision": "int4"}, "int4"),
        ({"image_size": 16}, "16x16"),
        ({"input_kind": "bytes"}, "bytes"),
        ({"layout": "tpu"}, "tpu"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
        ({"leave_out": ("grn-delta",)}, "grn-delta"),
    ],
)
def test_a_spec_that_cannot_be_deployed_is_refused_by_name(values, named):
    with pytest.raises(InputError, match=named):
        DeploySpec(**values)


def test_folding_needs_a_bias():
    with pytest.raises(TypeError, match="no bias"):
        deploy_layers.doubles(torch.nn.Linear(2, 2, bias=False))


@pytest.mark.parametrize(
    ("channels", "before_downsampling", "in_weight"),
    [(47, False, True), (48, False, False), (63, True, True), (64, True, False)],
)
def test_the_gain_moves_to_the_weight_below_three_quarters_of_the_positions(channels, before_downsampling, in_weight):
    """Of 64 positions; below all of them in the last block before a downsampling."""
    found = gain_moves_fewer_bytes_in_weight(channels, positions=64, before_downsampling=before_downsampling)
    assert found is in_weight
