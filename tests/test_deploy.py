"""The deploy form computes the training form's function, and each fold that makes it so is needed."""

import copy

import pytest
import torch
from torch import Tensor

from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.errors import InputError
from cnx_deploy.model import deploy, deploy_layers
from cnx_deploy.model.checkpoint import hash_weights
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import DeployedConvNeXtV2, DeploySpec, deploy_form
from cnx_deploy.model.deploy_layers import ChannelsFirstNorm, ResponseGain, TokenBlock, TokenNorm
from cnx_deploy.model.folds import fold_affine_into_conv, gain_moves_fewer_bytes_in_weight
from cnx_deploy.parity import GATES, differences

EXACT = 1e-12
"""Largest difference over largest logit in float64; seen 4e-15. A wrong fold gives 1e-3 and more."""

LAYOUTS = ("gpu", "cpu")
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


# Negative controls: each fold left out or wrong


def without_fold(weight, bias, gain, shift):
    return weight, bias


def without_shift(weight, bias, gain, shift):
    return weight * gain, bias


def with_mean_twice(weight, bias, gain, shift):
    return fold_affine_into_conv(weight, bias, gain, shift * 2 if len(gain) == 3 else shift)


def stem_only(weight, bias, gain, shift):
    return fold_affine_into_conv(weight, bias, gain, shift) if len(gain) == 3 else (weight, bias)


def without_beta(weight, bias, beta):
    return bias


BROKEN_FOLDS = {
    "GRN beta not folded": (deploy_layers, "fold_grn_beta", without_beta),
    "block LayerNorm not folded": (deploy_layers, "fold_affine_into_linear", without_fold),
    "block LayerNorm shift not folded": (deploy_layers, "fold_affine_into_linear", without_shift),
    "last LayerNorm not folded": (deploy, "fold_affine_into_linear", without_fold),
    "downsampling LayerNorm not folded": (deploy, "fold_affine_into_conv", stem_only),
    "mean subtracted twice": (deploy, "fold_affine_into_conv", with_mean_twice),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", BROKEN_FOLDS)
def test_a_broken_fold_changes_the_function(tiny_model, monkeypatch, fault, layout):
    module, name, broken = BROKEN_FOLDS[fault]
    monkeypatch.setattr(module, name, broken)
    assert relative_difference(tiny_model, DeploySpec("fp64", BOTH_GAINS_PX, layout=layout)) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropping_grn_gamma_changes_the_function(tiny_model, layout):
    spec = DeploySpec("fp64", BOTH_GAINS_PX, layout=layout)
    deployed = deploy_form(tiny_model, spec)
    for gain in deployed.modules():
        if isinstance(gain, ResponseGain):
            gain.gamma.zero_()
    assert relative_difference(tiny_model, spec, deployed) > 1e-3


# FP16: what stays in FP32


def test_grn_keeps_a_norm_beyond_the_fp16_range():
    gain = ResponseGain(torch.ones(1, 1, 8), spatial_axes=(1,), channel_axis=2).half()
    hidden = torch.full((1, 56 * 56, 8), 2000.0, dtype=torch.float16)  # norm 2000 × 56 = 112,000 > 65,504
    assert torch.equal(gain(hidden), torch.full((1, 1, 8), 2.0, dtype=torch.float16))


@pytest.mark.parametrize("spelled_out", [True, False])
def test_channels_first_norm_takes_values_whose_squares_leave_the_fp16_range(spelled_out):
    images = torch.tensor([-1000.0, 1000.0], dtype=torch.float16).view(1, 2, 1, 1)
    assert ChannelsFirstNorm(spelled_out)(images).flatten().tolist() == [-1.0, 1.0]


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
        ({"precision": "int8"}, "int8"),
        ({"image_size": 100}, "100x100"),
        ({"input_kind": "bytes"}, "bytes"),
        ({"layout": "tpu"}, "tpu"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
    ],
)
def test_a_spec_that_cannot_be_deployed_is_refused_by_name(values, named):
    with pytest.raises(InputError, match=named):
        DeploySpec(**values)


def test_folding_needs_a_bias():
    with pytest.raises(TypeError, match="no bias"):
        deploy_layers.doubles(torch.nn.Linear(2, 2, bias=False))


@pytest.mark.parametrize(("channels", "in_weight"), [(39, True), (40, False)])
def test_the_gain_moves_to_the_weight_below_five_eighths_of_the_positions(channels, in_weight):
    assert gain_moves_fewer_bytes_in_weight(channels, positions=64) is in_weight
