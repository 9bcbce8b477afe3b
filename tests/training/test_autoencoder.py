"""What the autoencoder predicts, what it is judged by, what is drawn, and which files it starts from."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy.core.errors import CheckpointError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.training.fcmae import MaskedAutoencoder, create_autoencoder, load_autoencoder
from cnx_deploy.training.fcmae.autoencoder import reconstruction_cells, save_reconstructions
from cnx_deploy.training.fcmae.masking import (
    enlarged,
    images_of_patches,
    masked_losses,
    normalised_patches,
    patches_of,
    random_masks,
)
from tests.support.foreign_models import fcmae_state, randomise, saved

MASKS = torch.tensor([[[True, False, False], [True, False, True]], [[False, False, True], [False, True, True]]])


@pytest.fixture
def model(tiny_variant) -> MaskedAutoencoder:
    """Every parameter random, the decoder's too."""
    return randomise(create_autoencoder(tiny_variant)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))


def reference_state(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """The whole autoencoder as the reference code writes it."""
    encoder = {name: each for name, each in fcmae_state(model.encoder).items() if name.startswith("encoder.")}
    decoder = {name: each for name, each in model.state_dict().items() if not name.startswith("encoder.")}
    return encoder | decoder


def looped_loss(predicted: Tensor, image: Tensor, mask: Tensor, *, correction: int = 1) -> float:
    """One image's loss, value by value in Python's floats."""
    losses = []
    for row, column in itertools.product(range(mask.shape[0]), range(mask.shape[1])):
        if not mask[row, column]:
            continue
        patch = image[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32].permute(1, 2, 0).flatten().tolist()
        mean = math.fsum(patch) / 3072
        variance = math.fsum((value - mean) ** 2 for value in patch) / (3072 - correction)
        values = predicted[row * mask.shape[1] + column].tolist()
        targets = [(value - mean) / math.sqrt(variance + 1e-6) for value in patch]
        losses.append(math.fsum((value - target) ** 2 for value, target in zip(values, targets, strict=True)) / 3072)
    return math.fsum(losses) / len(losses)


def test_patches_are_cut_row_by_row_and_put_together_again(images):
    patches = patches_of(images)
    assert patches.shape == (2, 6, 3072)
    assert torch.equal(patches[1, 4], images[1, :, 32:64, 32:64].permute(1, 2, 0).flatten())
    assert torch.equal(images_of_patches(patches, (2, 3)), images)


def test_the_loss_is_that_of_a_direct_computation_with_the_unbiased_variance(images):
    # The smaller the patch's deviation, the more the 1e-6 counts.
    images = images.double() * torch.tensor([1e-3, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    predicted = torch.randn(2, 6, 3072, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found = masked_losses(predicted, images, MASKS).tolist()
    triples = list(zip(predicted, images, MASKS, strict=True))
    assert found == pytest.approx([looped_loss(*each) for each in triples], rel=1e-12)
    biased = [looped_loss(*each, correction=0) for each in triples]
    assert min(abs(a / b - 1) for a, b in zip(found, biased, strict=True)) > 1e-6
    targets, _, _ = normalised_patches(images)
    assert masked_losses(targets, images, MASKS).tolist() == [0.0, 0.0]


def test_visible_patches_do_not_count_in_the_loss(images):
    predicted = torch.randn(2, 6, 3072)
    other = torch.where(MASKS.flatten(1).unsqueeze(2), predicted, torch.randn(2, 6, 3072))
    assert torch.equal(masked_losses(predicted, images, MASKS), masked_losses(other, images, MASKS))
    assert not torch.equal(masked_losses(predicted, images, MASKS), masked_losses(other, images, ~MASKS))


def test_the_decoder_is_one_block_of_width_512_and_predicts_32x32x3_values(model, images):
    assert model(images, MASKS).shape == (2, 6, 3072)
    assert [block.dwconv.out_channels for block in model.decoder] == [512]
    assert model.proj.weight.shape == (512, 64, 1, 1)
    assert model.mask_token.shape == (1, 512, 1, 1)
    assert model.pred.weight.shape == (3072, 512, 1, 1)


def test_no_prediction_depends_on_hidden_pixels(model, images):
    other = torch.where(enlarged(MASKS, (64, 96)), torch.randn_like(images), images)
    with torch.no_grad():
        assert torch.equal(model(images, MASKS), model(other, MASKS))
        assert not torch.equal(model(images, ~MASKS), model(other, ~MASKS))


def test_hidden_positions_have_the_mask_token_in_place_of_the_projection(model, images):
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images, MASKS)
    hidden = MASKS.unsqueeze(1).expand_as(seen[0])
    token = model.mask_token.expand_as(seen[0])
    assert torch.equal(seen[0][hidden], token[hidden])
    assert not torch.isclose(seen[0][~hidden], token[~hidden]).any(dim=0).all()


def test_all_parameters_of_the_autoencoder_learn(model, images):
    masked_losses(model(images, MASKS), images, MASKS).sum().backward()
    assert [name for name, each in model.named_parameters() if not bool(each.grad.any())] == []
    assert all(bool(torch.isfinite(each.grad).all()) for each in model.parameters())
    assert not any(name.startswith(("encoder.head", "encoder.norm.")) for name, _ in model.named_parameters())


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_constant_image_gives_a_finite_loss_and_finite_gradients(model, value):
    images = torch.full((2, 3, 64, 96), value)
    losses = masked_losses(model(images, MASKS), images, MASKS)
    losses.sum().backward()
    assert bool(torch.isfinite(losses).all())
    assert all(bool(torch.isfinite(each.grad).all()) for each in model.parameters())


def test_half_precision_predictions_are_judged_in_single_precision(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(images, MASKS)
    losses = masked_losses(predicted, images, MASKS)
    assert losses.dtype == torch.float32
    with torch.no_grad():
        expected = masked_losses(model(images, MASKS), images, MASKS)
    torch.testing.assert_close(losses, expected, rtol=0.05, atol=0)


def test_a_fresh_autoencoder_follows_its_seed_and_leaves_random_numbers_alone(tiny_variant):
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    first, again, other = (create_autoencoder(tiny_variant, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pred.weight"], other["pred.weight"])
    assert float(first["pred.weight"].std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_references_autoencoder_loads_with_its_decoder(model, tiny_variant, images, tmp_path, prefix):
    state = {prefix + name: each for name, each in reference_state(model).items()}
    path = saved({"model": state}, tmp_path / "checkpoint-799.pth")
    loaded, source = load_autoencoder(path, tiny_variant, seed=9)
    state = model.state_dict()
    assert all(torch.equal(each, state[name]) for name, each in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images, MASKS), model(images, MASKS))
    entry = f"model.{prefix}".strip(".")
    assert source.notes == ("layout fcmae", f"weights from the entry {entry!r}", "the decoder is the file's")
    assert source.weights.licence.startswith("unknown")


def test_an_encoder_alone_gets_a_new_decoder(model, tiny_variant, tmp_path):
    state = {name: each for name, each in reference_state(model).items() if name.startswith("encoder.")}
    loaded, source = load_autoencoder(saved(state, tmp_path / "encoder.pt"), tiny_variant)
    assert torch.equal(loaded.encoder.stages[2][1].grn.gamma, model.encoder.stages[2][1].grn.gamma)
    assert not torch.equal(loaded.pred.weight, model.pred.weight)
    assert source.notes[-1] == "new decoder, drawn at random"


def test_a_classifier_gives_its_encoder(tiny_model, tiny_variant, tmp_path):
    loaded, source = load_autoencoder(saved(tiny_model.state_dict(), tmp_path / "classifier.pt"), tiny_variant)
    assert torch.equal(loaded.encoder.stages[3][0].pwconv2.weight, tiny_model.stages[3][0].pwconv2.weight)
    assert source.notes == ("layout official", "new decoder, drawn at random")


def test_the_chosen_encoder_of_a_file_is_started_from(model, tiny_model, tiny_variant, tmp_path):
    path = saved({"model": reference_state(model), "model_ema": tiny_model.state_dict()}, tmp_path / "both.pth")
    for ema, expected in ((None, model.encoder), (True, tiny_model)):
        loaded, _ = load_autoencoder(path, tiny_variant, ema=ema)
        assert torch.equal(loaded.encoder.stages[2][1].grn.gamma, expected.stages[2][1].grn.gamma)


@pytest.mark.parametrize("damage", ["missing", "narrow", "deeper"])
def test_a_decoder_that_does_not_fit_is_refused(model, tiny_variant, tmp_path, damage):
    state = reference_state(model)
    if damage == "missing":
        del state["mask_token"]
    elif damage == "narrow":
        state["pred.bias"] = state["pred.bias"][:12]
    else:
        state["decoder.1.norm.bias"] = state["decoder.0.norm.bias"]
    with pytest.raises(CheckpointError, match="decoder that does not fit"):
        load_autoencoder(saved(state, tmp_path / "fcmae.pt"), tiny_variant)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (3, 64, 64, 3), generator=torch.Generator().manual_seed(8)).to(torch.uint8)


def test_a_row_of_a_picture_is_the_image_what_is_visible_and_what_is_predicted(model, pixels, tmp_path):
    masks = random_masks(3, (2, 2), 0.5, torch.Generator().manual_seed(0))
    cells = reconstruction_cells(model.train(), Preprocessing(64), pixels, masks)
    assert model.training
    hidden = enlarged(masks, (64, 64)).permute(0, 2, 3, 1).expand_as(pixels)
    image, masked, pasted, alone = cells.unbind(1)
    assert torch.equal(image, pixels)
    assert torch.equal(masked[~hidden], pixels[~hidden])
    assert bool((masked[hidden] == 128).all())
    assert torch.equal(pasted[~hidden], pixels[~hidden])
    assert torch.equal(pasted[hidden], alone[hidden])
    assert not torch.equal(alone, pixels)
    path = save_reconstructions(tmp_path / "new" / "epoch.png", model, Preprocessing(64), pixels, masks)
    sheet = np.array(Image.open(path))
    assert sheet.shape == (3 * 64 + 2 * 4, 4 * 64 + 3 * 4, 3)
    for row, column in itertools.product(range(3), range(4)):
        top, left = 68 * row, 68 * column
        assert np.array_equal(sheet[top : top + 64, left : left + 64], cells[row, column].numpy())


class PredictsTheTruth(MaskedAutoencoder):
    """Knows the normalised patches of what it is shown."""

    def forward(self, images, masks):
        return normalised_patches(images)[0]


def test_a_true_prediction_is_drawn_as_the_image_itself(tiny_variant, pixels):
    pixels[1] = 77  # constant: its patches have no deviation
    model = PredictsTheTruth(random_model(tiny_variant, 1))
    masks = random_masks(3, (2, 2), 0.5, torch.Generator().manual_seed(0))
    cells = reconstruction_cells(model, Preprocessing(64), pixels, masks)
    assert int((cells[:, 3].int() - pixels.int()).abs().max()) <= 1
