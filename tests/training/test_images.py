"""What is done to training images and batches, and how they are loaded."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnx_deploy.data import ImageFiles, image_like_batches
from cnx_deploy.training import TrainingSpec
from cnx_deploy.training.images import BatchMix, ImageAugmentation, TrainingImages, ValidationImages, make_loader

SPEC = TrainingSpec(Path("images"), "atto", image_size=64, flip=False, min_crop_area=1.0, crop_ratio=1.0)
IMAGE = next(image_like_batches(1, 64, batch_size=1))[0].permute(2, 0, 1)  # (3, 64, 64) uint8


def augmented(seeds: int = 40, **changes) -> list[torch.Tensor]:
    augment = ImageAugmentation(dataclasses.replace(SPEC, **changes))
    return [augment(IMAGE, seed) for seed in range(seeds)]


def test_the_same_seed_gives_the_same_image_and_leaves_the_callers_draws_alone():
    assert torch.equal(augmented(1)[0], IMAGE)  # without any augmentation
    everything = dataclasses.replace(
        SPEC, flip=True, min_crop_area=0.3, randaugment_magnitude=9.0, erasing_probability=0.5
    )
    augment = ImageAugmentation(everything)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = augment(IMAGE, 3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(augment(IMAGE, 3), first)
    assert not torch.equal(augment(IMAGE, 4), first)


def test_flipping_happens_to_half_of_the_images():
    flipped = [torch.equal(image, IMAGE.flip(-1)) for image in augmented(flip=True)]
    assert 8 < sum(flipped) < 32


def test_random_crops_keep_the_size_and_change_the_image():
    crops = augmented(10, min_crop_area=0.3)
    assert all(crop.shape == IMAGE.shape and not torch.equal(crop, IMAGE) for crop in crops)


def test_randaugment_changes_images_more_the_greater_its_magnitude():
    def change(magnitude: float) -> float:
        images = augmented(60, randaugment_magnitude=magnitude)
        return sum(float((image.float() - IMAGE.float()).abs().mean()) for image in images) / len(images)

    assert 0 < change(1.0) < change(5.0) < change(10.0)


def test_randaugment_draws_its_magnitude_around_the_given_one():
    augment, drawn = ImageAugmentation(dataclasses.replace(SPEC, randaugment_magnitude=9.0)), []
    for seed in range(200):
        augment(IMAGE, seed)
        drawn.append(augment.steps[-1].operations.magnitude)
    assert {8, 9, 10} <= set(drawn) <= {7, 8, 9, 10}
    assert drawn.count(9) > 100


def test_erasing_puts_noise_into_one_rectangle_of_so_many_images():
    images = augmented(200, erasing_probability=0.25)
    changed = [(image != IMAGE).any(dim=0) for image in images if not torch.equal(image, IMAGE)]
    assert 30 < len(changed) < 70
    for mask in changed:
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 * 64 * 64 < area <= 0.36 * 64 * 64
        assert int(mask.sum()) > 0.95 * int(area)  # noise rarely equals all three channels


def test_erased_pixels_have_the_datas_mean():
    augment = ImageAugmentation(dataclasses.replace(SPEC, erasing_probability=1.0))
    black = torch.zeros(3, 64, 64, dtype=torch.uint8)
    images = [augment(black, seed) for seed in range(40)]
    noise = torch.cat([image[:, (image > 0).any(dim=0)] for image in images], dim=1)
    assert noise.float().mean(dim=1).tolist() == pytest.approx([255 * 0.485, 255 * 0.456, 255 * 0.406], rel=0.05)


def batch(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 3


def test_mixup_is_a_weighted_sum_of_two_images_and_of_their_targets():
    images, labels = batch()
    torch.manual_seed(0)
    mixed, targets = BatchMix(0.8, 0.0, 3)(images, labels)
    other, classes = images.roll(1, 0), torch.nn.functional.one_hot(labels, 3).float()
    share = float(((mixed - other) * (images - other)).sum() / ((images - other) ** 2).sum())
    assert 0 < share < 1
    assert torch.allclose(mixed, share * images + (1 - share) * other, atol=1e-5)
    assert torch.allclose(targets, share * classes + (1 - share) * classes.roll(1, 0), atol=1e-5)


def test_cutmix_pastes_a_rectangle_and_weighs_targets_by_area():
    images, labels = batch()
    torch.manual_seed(1)
    mixed, targets = BatchMix(0.0, 1.0, 3)(images, labels)
    pasted = (mixed != images).any(dim=1)[0]  # (16, 16)
    assert 0 < int(pasted.sum()) < 256
    assert torch.equal(mixed[0][:, pasted], images[-1][:, pasted])
    kept = 1 - float(pasted.float().mean())
    classes = torch.nn.functional.one_hot(labels, 3).float()
    assert torch.allclose(targets, kept * classes + (1 - kept) * classes.roll(1, 0), atol=1e-5)


def test_with_both_each_batch_takes_one_of_them():
    images, labels = batch()
    mix = BatchMix(0.8, 1.0, 3)
    torch.manual_seed(0)
    untouched = [float((mix(images, labels)[0] == images).float().mean()) for _ in range(40)]
    assert 8 < sum(share < 0.01 for share in untouched) < 32  # mixup leaves no pixel as it was


def test_a_batch_of_one_image_or_without_mixing_stays_as_it_is():
    for count, alphas in ((1, (0.8, 1.0)), (8, (0.0, 0.0))):
        images, labels = batch(count)
        same, targets = BatchMix(*alphas, 3)(images, labels)
        assert same is images
        assert targets is labels


@pytest.fixture
def one_image(tmp_path) -> ImageFiles:
    Image.fromarray(next(image_like_batches(1, 40, batch_size=1))[0].numpy()).save(tmp_path / "image.png")
    return ImageFiles((tmp_path / "image.png",), (1,))


def test_without_random_crops_training_images_are_the_evaluation_crop(one_image):
    spec = dataclasses.replace(SPEC, image_size=32, crop_ratio=0.875)
    trained, _ = TrainingImages(one_image, ImageAugmentation(spec))[0, 0]
    validated, _ = ValidationImages(one_image, spec)[0]
    assert torch.equal(trained, validated)


def test_a_white_level_is_applied_once_in_training_and_in_validation(tmp_path):
    """Also one below 255, which images with 8 bits have as well: a second time it would saturate what is grey."""
    values = np.random.default_rng(0).integers(0, 201, (40, 40)).astype(np.uint16)
    expected = np.rint(values * 255.0 / 200)
    for name, stored in (("deep.png", values), ("plain.png", values.astype(np.uint8))):
        Image.fromarray(stored).save(tmp_path / name)
        spec = dataclasses.replace(SPEC, image_size=32, crop_ratio=0.8, min_crop_area=1.0, white_level=200)
        files = ImageFiles((tmp_path / name,), (1,))
        trained, _ = TrainingImages(files, ImageAugmentation(spec), spec.white_level)[0, 0]
        validated, _ = ValidationImages(files, spec)[0]
        assert torch.equal(trained, validated)
        assert np.array_equal(validated[..., 0].numpy(), expected[4:36, 4:36])


def test_images_too_large_for_memory_are_read_when_they_are_needed(one_image, monkeypatch):
    spec = dataclasses.replace(SPEC, image_size=32, min_crop_area=0.5)
    augment = ImageAugmentation(spec)
    in_memory = TrainingImages(one_image, augment)
    monkeypatch.setattr("cnx_deploy.training.images.CACHE_BYTES", 40 * 40 * 3 - 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_demand = TrainingImages(one_image, augment)
    assert (in_memory.cached is None, on_demand.cached) == (False, None)
    assert torch.equal(in_memory[0, 7][0], on_demand[0, 7][0])
    loaders = [make_loader(images, 1, spec) for images in (in_memory, on_demand)]
    assert loaders[0].num_workers == 0 < loaders[1].num_workers
    assert make_loader(on_demand, 1, dataclasses.replace(spec, workers=2)).num_workers == 2
