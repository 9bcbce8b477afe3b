"""A pre-training run: its images, its losses and rates, and what goes on from its encoder."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cnx_deploy.core.errors import CheckpointError, InputError
from cnx_deploy.data import ImageFiles
from cnx_deploy.model.checkpoint import load_checkpoint, resolve_model
from cnx_deploy.training import TrainingSpec, initial_model, train
from cnx_deploy.training.fcmae import (
    PretrainingSpec,
    divide_images,
    find_images_below,
    load_autoencoder,
    pretrain,
    readable_images,
)
from cnx_deploy.training.images import ImageAugmentation
from tests.support.training_data import difference, table

ROOT = Path(__file__).parents[2]
RATE = 2e-3


def small(colours, variant, runs, **changes) -> PretrainingSpec:
    spec = PretrainingSpec(colours, variant, runs, epochs=2, image_size=64, batch_size=4, learning_rate=RATE)
    return dataclasses.replace(spec, **changes)


@pytest.fixture
def spec(colours, tiny_variant, tmp_path) -> PretrainingSpec:
    return small(colours, tiny_variant, tmp_path / "runs")


@pytest.fixture(scope="module")
def finished(colours, tiny_variant, tmp_path_factory):
    """A run of 2 epochs of 6 steps on 22 images, 2 held out. Shared: do not change it."""
    return pretrain(small(colours, tiny_variant, tmp_path_factory.mktemp("finished")))


def test_the_loss_falls_in_training_and_on_held_images(finished):
    first, last = ({name: float(value) for name, value in row.items()} for row in table(finished.run_dir))
    assert finished.last_loss < 0.9 * finished.first_loss
    assert last["held_loss"] < 0.9 * first["held_loss"]
    assert (finished.first_loss, finished.last_loss) == pytest.approx((first["loss"], last["loss"]), rel=1e-5)
    assert finished.best_held_loss == pytest.approx(last["held_loss"], rel=1e-5)
    assert list(first) == ["epoch", "loss", "held_loss", "learning_rate"]


def test_the_encoder_is_written_without_a_head_and_training_goes_on_from_it(finished, colours, tiny_variant, tmp_path):
    written = load_file(finished.best)
    assert not any(name.startswith(("head.", "norm.", "decoder.")) for name in written)
    with pytest.raises(CheckpointError, match=r"no classification head.*--reset-head"):
        resolve_model(tiny_variant, checkpoint=finished.best)
    assert load_checkpoint(finished.best, tiny_variant, num_classes=3, reset_head=True).model.head.out_features == 3
    spec = TrainingSpec(colours, tiny_variant, tmp_path / "runs", epochs=1, image_size=32, batch_size=8)
    loaded = initial_model(spec, checkpoint=finished.best, reset_head=True)
    state = loaded.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())
    assert train(spec, loaded.model).epochs_run == 1


def test_the_state_holds_the_autoencoder_that_the_weights_are_of(finished, tiny_variant):
    model, source = load_autoencoder(finished.run_dir / "last.ckpt", tiny_variant)
    assert (source.notes[0], source.notes[-1]) == ("layout fcmae", "the decoder is the file's")
    assert difference(load_file(finished.last), model.encoder.state_dict()) == 0.0


@pytest.mark.slow
def test_bf16_follows_fp32(spec, finished):
    half = pretrain(dataclasses.replace(spec, precision="bf16"))
    expected = [float(row["loss"]) for row in table(finished.run_dir)]
    assert [float(row["loss"]) for row in table(half.run_dir)] == pytest.approx(expected, rel=0.02)


def test_the_learning_rate_is_scaled_to_the_images_of_a_step_and_ends_at_zero(spec, finished):
    base = dataclasses.replace(spec, learning_rate=None, batch_size=64, accumulate=8)
    assert base.training.resolved_learning_rate == pytest.approx(1.5e-4 * 512 / 256)
    assert base.training.beta2 == 0.95
    assert (dataclasses.replace(base, epochs=800).resolved_warmup_epochs, base.resolved_warmup_epochs) == (40.0, 0.1)
    rates = [float(row["learning_rate"]) for row in table(finished.run_dir)]
    # The last of 6 steps an epoch, of 12, the first of which is half the warm-up.
    expected = [RATE / 2 * (1 + np.cos(np.pi * step / 11)) for step in (4, 10)]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_a_random_crop_is_the_only_augmentation(spec):
    (crop,) = ImageAugmentation(spec.training).steps
    assert (type(crop).__name__, crop.scale) == ("RandomResizedCrop", (0.2, 1.0))


@pytest.mark.parametrize(
    "change",
    [{"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"image_size": 32}, {"epochs": 0}, {"held_images": 0},
     {"picture_every": 0}, {"image_size": 16}, {"precision": "int8"}, {"warmup_epochs": 3.0}],
    ids=str,
)  # fmt: skip
def test_a_request_that_cannot_be_pretrained_is_refused(spec, change):
    with pytest.raises(InputError):
        dataclasses.replace(spec, **change)


# --- images -----------------------------------------------------------------------------------------------------------


def write_image(path: Path, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(path)
    return path


def test_images_are_found_at_any_depth_with_or_without_classes(tmp_path):
    expected = {write_image(tmp_path / name) for name in ("flat.png", "cat/1.png", "cat/deep/2.jpg", "val/3.png")}
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    write_image(tmp_path / ".hidden" / "4.png")
    images = find_images_below(tmp_path)
    assert set(images.paths) == expected
    assert images.labels == ()


def test_beside_a_training_folder_validation_and_test_images_are_left_out(tmp_path):
    expected = {write_image(tmp_path / name) for name in ("train/a/1.png", "unlabelled/2.png", "3.png")}
    for name in ("val/a/4.png", "Test/5.png"):
        write_image(tmp_path / name)
    assert set(find_images_below(tmp_path).paths) == expected


@pytest.mark.parametrize(
    "make", [lambda root: root / "absent", lambda root: root, lambda root: write_image(root / "a.png")]
)
def test_a_path_without_images_below_is_refused(tmp_path, make):
    with pytest.raises(InputError, match="expected"):
        find_images_below(make(tmp_path))


def test_dataset_bad_files_are_counted_in_pre_training(tmp_path):
    good = [write_image(tmp_path / f"{number}.png") for number in range(3)]
    (tmp_path / "broken.png").write_bytes(good[0].read_bytes()[:60])
    images, report = readable_images(find_images_below(tmp_path))
    assert (list(images.paths), report.count, len(report.broken)) == (good, 4, 1)
    for path in good:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="None of 4 images can be read"):
        readable_images(find_images_below(tmp_path))


@pytest.mark.parametrize(("count", "asked", "held"), [(2, 64, 1), (30, 64, 3), (30, 2, 2), (1000, 64, 64)])
def test_at_most_a_tenth_is_held_out_and_no_image_is_on_both_sides(count, asked, held):
    paths = tuple(Path(f"{number}.png") for number in range(count))
    divided = divide_images(ImageFiles(paths), asked)
    assert len(divided.val.paths) == held
    assert sorted((*divided.train.paths, *divided.val.paths)) == sorted(paths)


def test_a_single_image_is_not_enough():
    with pytest.raises(InputError, match="at least two images"):
        divide_images(ImageFiles((Path("1.png"),)), 64)


@pytest.mark.slow
def test_atto_learns_to_predict_hidden_patches_of_digits(tmp_path):
    digits = tmp_path / "digits"
    subprocess.run([sys.executable, ROOT / "scripts" / "make_digits.py", digits], check=True, capture_output=True)
    result = pretrain(PretrainingSpec(digits, "atto", tmp_path / "runs", epochs=5, image_size=64, learning_rate=1e-3))
    assert result.first_loss > 0.7
    assert result.last_loss < 0.55
