"""The training form: its sizes, its agreement with two other implementations, its initialisation and its gradients."""

import itertools
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import VARIANTS, find_variant
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, create_model, random_model
from cnx_deploy.model.layers import Block, GlobalResponseNorm, LayerNormChannelsFirst
from tests.support.foreign_models import randomise, transformers_model

LOGITS_ATOL = 1e-5
"""Largest difference between two FP32 implementations whose logits are of the order of one. Seen: 7.2e-7."""

CROSS_CHECKED = [("atto", 64), ("atto", 224), ("nano", 64), pytest.param("tiny", 96, marks=pytest.mark.slow)]


def random_images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


def blocks_of(model: ConvNeXtV2) -> list[Block]:
    return list(itertools.chain.from_iterable(model.stage_blocks()))


# Size


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_parity_all_variants_fp32_parameters_are_the_tables(variant):
    with torch.device("meta"):
        model = create_model(variant)
    assert sum(parameter.numel() for parameter in model.parameters()) == variant.parameter_count


@pytest.mark.parametrize("name", VARIANTS)
def test_parity_all_variants_fp32_timm_counts_the_same_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(f"convnextv2_{name}", pretrained=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == VARIANTS[name].parameter_count


def test_atto_with_three_classes_has_3388363_parameters():
    with torch.device("meta"):
        model = create_model("atto", 3)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_388_363


# Agreement with other implementations, through files they saved


@pytest.mark.parametrize(("name", "side"), CROSS_CHECKED)
def test_parity_all_variants_fp32_logits_equal_timms(name, side, tmp_path):
    theirs = randomise(timm.create_model(f"convnextv2_{name}", pretrained=False).eval())
    torch.save(theirs.state_dict(), tmp_path / "timm.pt")
    assert_same_logits(theirs, tmp_path / "timm.pt", name, side)


@pytest.mark.parametrize(("name", "side"), CROSS_CHECKED)
def test_parity_all_variants_fp32_logits_equal_transformers(name, side, tmp_path):
    theirs = randomise(transformers_model(find_variant(name), 1000))
    theirs.save_pretrained(tmp_path)
    assert_same_logits(theirs, tmp_path / "model.safetensors", name, side)


def assert_same_logits(theirs: nn.Module, path: Path, name: str, side: int) -> None:
    images = random_images(side, side)
    ours = load_checkpoint(path).model
    assert ours.variant.name == name
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    expected = getattr(expected, "logits", expected)
    assert expected.std() > 0.1  # logits that are all but equal would agree whatever the network
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_ATOL)


def test_parity_detects_broken_grn_one_left_out(tmp_path):
    theirs = randomise(timm.create_model("convnextv2_atto", pretrained=False).eval())
    torch.save(theirs.state_dict(), tmp_path / "timm.pt")
    ours = load_checkpoint(tmp_path / "timm.pt").model
    for block in blocks_of(ours):
        block.grn = nn.Identity()
    with torch.no_grad():
        difference = (ours(random_images(64, 64)) - theirs(random_images(64, 64))).abs().max()
    assert difference > 1000 * LOGITS_ATOL


def test_a_checkpoint_of_a_library_holds_every_parameter(tmp_path):
    theirs = transformers_model(find_variant("atto"), 1000)
    theirs.save_pretrained(tmp_path)
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert isinstance(theirs, transformers.ConvNextV2ForImageClassification)
    assert stored == VARIANTS["atto"].parameter_count


# Gradients


def test_every_parameter_has_a_gradient(tiny_model):
    tiny_model(random_images(64, 64)).square().sum().backward()
    unused = [name for name, parameter in tiny_model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert unused == []


def test_grn_has_a_finite_gradient_for_an_all_zero_input():
    layer = GlobalResponseNorm(4)
    nn.init.ones_(layer.gamma)
    hidden = torch.zeros(2, 3, 3, 4, requires_grad=True)
    layer(hidden).sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(layer.gamma.grad).all()


# Layers


def test_a_fresh_grn_is_the_identity():
    hidden = torch.randn(2, 5, 4, 8)
    torch.testing.assert_close(GlobalResponseNorm(8)(hidden), hidden, rtol=0, atol=0)


def test_grn_is_the_papers_formula():
    layer = GlobalResponseNorm(6)
    nn.init.normal_(layer.gamma)
    nn.init.normal_(layer.beta)
    hidden = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    expected = torch.empty_like(hidden)
    for sample, image in enumerate(hidden):
        norms = [image[:, :, channel].square().sum().sqrt() for channel in range(6)]
        for channel, norm in enumerate(norms):
            share = norm / (sum(norms) / 6 + 1e-6)
            values = image[:, :, channel]
            gamma, beta = layer.gamma[0, 0, 0, channel].double(), layer.beta[0, 0, 0, channel].double()
            expected[sample, :, :, channel] = gamma * values * share + beta + values
    torch.testing.assert_close(layer.double()(hidden), expected, rtol=1e-12, atol=1e-12)


def test_grn_in_half_survives_a_norm_beyond_the_fp16_range():
    layer = GlobalResponseNorm(4).half()
    nn.init.ones_(layer.gamma)
    hidden = torch.full((1, 56, 56, 4), 2000.0, dtype=torch.float16)  # the norm is 56 · 2000 = 112,000 > 65,504
    torch.testing.assert_close(layer(hidden), torch.full_like(hidden, 4000.0), rtol=1e-3, atol=0)


def test_channels_first_layer_norm_normalises_over_channels():
    layer = LayerNormChannelsFirst(8)
    normed = layer(5.0 + 3.0 * torch.randn(2, 8, 4, 6))
    torch.testing.assert_close(normed.mean(dim=1), torch.zeros(2, 4, 6), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.var(dim=1, correction=0), torch.ones(2, 4, 6), rtol=1e-4, atol=0)


# Stochastic depth


def test_stochastic_depth_rates_rise_linearly_from_zero_to_the_rate_asked_for():
    rates = [block.drop_path.p for block in blocks_of(create_model("atto", 2, drop_path_rate=0.3))]
    assert rates == pytest.approx([0.3 * index / 11 for index in range(12)])


def test_stochastic_depth_drops_whole_branches_in_training_only(tiny_variant):
    images = torch.randn(64, 8, 4, 4)
    torch.manual_seed(0)
    block = randomise(Block(8, drop_path_rate=0.5))
    kept = (block.train()(images) != images).flatten(1).any(dim=1)
    assert 16 < kept.sum() < 48
    evaluated = block.eval()(images)
    assert (evaluated != images).flatten(1).any(dim=1).all()
    branch, scaled = evaluated - images, block.train()(images) - images
    is_kept = scaled.flatten(1).abs().sum(dim=1) > 0
    torch.testing.assert_close(scaled[is_kept], 2 * branch[is_kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_stochastic_depth_rate_outside_its_range_is_wrong_input(tiny_variant, rate):
    with pytest.raises(InputError, match="stochastic-depth"):
        create_model(tiny_variant, drop_path_rate=rate)


# Initialisation


def test_fresh_weights_are_truncated_normal_with_zero_biases():
    torch.manual_seed(0)
    model = create_model("atto")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif parameter.ndim in (2, 4) and "grn" not in name and parameter.numel() > 10_000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert parameter.abs().max() < 2.0, name  # the reference truncates at ±2, not at two deviations
    assert model.stages[0][0].dwconv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_head_init_scale_scales_the_fresh_head_alone(tiny_variant):
    torch.manual_seed(0)
    plain = create_model(tiny_variant).state_dict()
    torch.manual_seed(0)
    scaled = create_model(tiny_variant, head_init_scale=0.001).state_dict()
    expected = {name: tensor * 0.001 if name.startswith("head.") else tensor for name, tensor in plain.items()}
    torch.testing.assert_close(scaled, expected, rtol=0, atol=0)


def test_random_weights_repeat_with_their_seed_and_are_nowhere_zero(tiny_variant):
    first, again, other = (dict(random_model(tiny_variant, 10, seed=seed).named_parameters()) for seed in (4, 4, 5))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        assert not torch.equal(parameter, other[name]), name
        assert parameter.count_nonzero() == parameter.numel(), name


@pytest.mark.parametrize("name", ["atto", "tiny"])
def test_random_weights_give_logits_of_the_order_of_one(name):
    with torch.no_grad():
        logits = random_model(name)(random_images(64, 64))
    assert 0.3 < logits.std() < 3.0


# Image sizes


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (0, 32)])
def test_dynamic_resolution_sizes_below_32_are_refused(tiny_model, size):
    with pytest.raises(InputError, match="32 to 65536 pixels"):
        tiny_model(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("size", [(32, 32), (32, 96), (160, 64)])
def test_dynamic_resolution_of_the_training_form(tiny_model, size):
    assert tiny_model(random_images(*size, batch=3)).shape == (3, 10)


def test_a_classifier_without_classes_is_wrong_input(tiny_variant):
    with pytest.raises(InputError, match="at least 1"):
        create_model(tiny_variant, 0)
