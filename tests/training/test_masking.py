"""The encoder sees visible patches only, whatever the hidden ones hold."""

import itertools

import pytest
import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.training.fcmae import autoencoder as autoencoder
from cnx_deploy.training.fcmae import masked_features
from cnx_deploy.training.fcmae.masking import enlarged, masked_count, random_masks
from tests.support.sparse_encoder import sparse_features

MASKS = torch.tensor([[[True, False], [False, True], [True, True]], [[False, True], [True, True], [False, False]]])
"""Two images of 96x64 pixels; visible patches touch at a side, at a corner, and not at all."""
HIDES = 14
"""Times that the masked forward pass of the tiny network hides: 4 stages, and twice in each of 5 blocks."""
IMAGES = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.fixture
def model(tiny_variant):
    return random_model(tiny_variant, 1, seed=3).double()


@pytest.fixture
def images() -> Tensor:
    return IMAGES.clone()


def with_other_hidden_pixels(images: Tensor, masks: Tensor, value: Tensor) -> Tensor:
    return torch.where(enlarged(masks, (images.shape[2], images.shape[3])), value, images)


def sparse(model, images: Tensor, masks: Tensor) -> list[Tensor]:
    each = [
        sparse_features(model.state_dict(), model.variant.depths, *pair) for pair in zip(images, masks, strict=True)
    ]
    return [torch.stack(stage) for stage in zip(*each, strict=True)]


def without_hiding(monkeypatch, number: int) -> None:
    """Leave out the call of the given number."""
    calls, hide = itertools.count(), autoencoder._hide
    monkeypatch.setattr(
        autoencoder,
        "_hide",
        lambda features, hidden: features if next(calls) == number else hide(features, hidden),
    )


@pytest.mark.parametrize(("grid", "ratio", "hidden"), [((7, 7), 0.6, 29), ((2, 2), 0.6, 2), ((4, 3), 0.75, 9)])
def test_every_mask_hides_the_same_rounded_share(grid, ratio, hidden):
    masks = random_masks(50, grid, ratio, torch.Generator().manual_seed(0))
    assert masks.shape == (50, *grid)
    assert masks.flatten(1).sum(dim=1).tolist() == [hidden] * 50
    assert masked_count(grid[0] * grid[1], ratio) == hidden


def test_every_position_is_hidden_as_often_as_the_others_and_masks_follow_their_seed():
    masks, again, other = (random_masks(4000, (4, 4), 0.6, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(masks, again)
    assert not torch.equal(masks, other)
    shares = masks.double().mean(dim=0)
    # 10 of 16; the standard deviation of a share over 4000 masks is 0.008.
    assert float((shares - 10 / 16).abs().max()) < 0.03


@pytest.mark.parametrize(("positions", "ratio"), [(1, 0.6), (4, 0.1), (4, 0.9), (49, 0.0), (49, 1.0)])
def test_a_mask_that_hides_nothing_or_all_is_refused(positions, ratio):
    with pytest.raises(InputError, match="mask ratio"):
        masked_count(positions, ratio)


def test_a_hidden_patch_covers_its_own_32x32_pixels():
    large = enlarged(MASKS, (96, 64))
    assert large.shape == (2, 1, 96, 64)
    for image, row, column in itertools.product(range(2), range(96), range(64)):
        assert large[image, 0, row, column] == MASKS[image, row // 32, column // 32]


def test_masks_of_other_images_are_refused(model, images):
    with pytest.raises(InputError, match="do not fit"):
        masked_features(model, images, MASKS.transpose(1, 2))


@pytest.mark.parametrize("network", ["model", "tiny_v1_model"])
def test_every_stage_equals_the_sparse_computation(request, images, network):
    """Of both versions: GRN, and LayerScale in its place."""
    model = request.getfixturevalue(network).double()
    with torch.no_grad():
        found, expected = masked_features(model, images, MASKS), sparse(model, images, MASKS)
    for stage, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(stage, reference, rtol=0, atol=1e-12)
        assert float(reference.abs().max()) > 1.0


def test_without_any_one_of_the_masks_a_stage_differs_from_the_sparse_computation(model, images, monkeypatch):
    with torch.no_grad():
        expected = sparse(model, images, MASKS)
        for number in range(HIDES):
            with monkeypatch.context() as patched:
                without_hiding(patched, number)
                stages = masked_features(model, images, MASKS)
            pairs = zip(stages, expected, strict=True)
            assert max(float((stage - reference).abs().max()) for stage, reference in pairs) > 1e-3, number


@pytest.mark.parametrize("value", [0.0, 1e6, float("nan"), float("inf"), None], ids=str)
def test_no_stage_has_anything_of_hidden_pixels(model, images, value):
    filling = torch.randn_like(images) if value is None else torch.tensor(value, dtype=torch.float64)
    with torch.no_grad():
        before = masked_features(model, images, MASKS)
        after = masked_features(model, with_other_hidden_pixels(images, MASKS, filling), MASKS)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_with_nothing_hidden_it_is_the_ordinary_forward_pass(model, images, dtype, tolerance):
    model, images = model.to(dtype), images.to(dtype)
    with torch.no_grad():
        expected = images
        for number, stage in enumerate(masked_features(model, images, torch.zeros_like(MASKS))):
            expected = model.stages[number](model.downsample_layers[number](expected))
            torch.testing.assert_close(stage, expected, rtol=0, atol=tolerance)


def test_gradients_are_finite_and_reach_visible_pixels_only(model, images):
    images.requires_grad_(True)
    masked_features(model, images, MASKS)[-1].square().sum().backward()
    hidden = enlarged(MASKS, (96, 64)).expand_as(images)
    assert not images.grad[hidden].any()
    assert bool((images.grad[~hidden] != 0).all())
    masked_features(model, images, torch.ones_like(MASKS))[-1].square().sum().backward()  # all hidden
    named = [(name, each) for name, each in model.named_parameters() if not name.startswith(("norm.", "head."))]
    assert all(bool(torch.isfinite(each.grad).all()) and bool(each.grad.any()) for _, each in named)
