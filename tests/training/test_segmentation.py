"""Training a class for each pixel: what is learned, resumed, recorded and drawn, and what augmentation does."""

import csv
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import ALL_VARIANTS
from cnx_deploy.data import (
    MaskReading,
    find_dataset,
    find_instance_dataset,
    find_segmentation_dataset,
    find_segmentation_images,
)
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.training import recipe_options, spec_from_recipe, train
from cnx_deploy.training.dense_images import DenseAugmentation, DenseTrainingImages
from cnx_deploy.training.images import ValidationImages
from cnx_deploy.training.optimisation import layer_count, layer_index
from cnx_deploy.verification.evaluation import evaluate
from cnx_deploy.verification.predict import open_predictor
from tests.conftest import TINY_TEST
from tests.support.training_data import InterruptIn, difference, rows, table, write_squares

SMALL = {"channels": 16, "auxiliary_channels": 8}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """24 scenes of digits to learn from and 6 for validation, 64 px at most. Shared: do not change them."""
    path = Path(__file__).parents[2] / "scripts" / "make_scenes.py"
    spec = importlib.util.spec_from_file_location("make_scenes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    module.write_scenes(root, train=24, val=6, side=64)
    return root


def asked(scenes: Path, run_dir: Path | None = None, **given):
    usual = {
        "task": "segment", "task_options": SMALL, "image_size": 64, "batch_size": 8, "epochs": 2, "workers": 0,
        "learning_rate": 3e-3, "run_dir": run_dir,
    }  # fmt: skip
    return spec_from_recipe(scenes, TINY_TEST, **{**usual, **given})


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """24 pictures of squares to learn from, which takes few steps, and 6 for validation. Shared: do not change them."""
    return write_squares(tmp_path_factory.mktemp("squares") / "squares")


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory):
    """A run of 5 epochs with a moving average. Shared: do not change it."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    plain = {"photometric": False, "scale_jitter": None, "flip": False, "learning_rate": 1e-2}
    return train(asked(squares, run_dir, epochs=5, ema_decay=0.8, batch_size=4, **plain))


def test_a_run_learns_squares_and_its_best_weights_have_the_best_miou(trained, squares):
    found = rows(trained.run_dir)
    mious = [float(row["val_miou_percent"]) for row in found]
    averages = [float(row["ema_val_miou_percent"]) for row in found]
    assert float(found[-1]["train_loss"]) < 0.6 * float(found[0]["train_loss"])
    assert trained.best_miou_percent == max(*mious, *averages)
    assert trained.best_miou_percent > 35.0  # the ground alone has 25
    assert "mIoU" in trained.summary()
    loaded = load_checkpoint(trained.run_dir / "best.safetensors")
    assert (loaded.class_names, loaded.model.task.config.channels) == (("ground", "red", "blue"), 16)
    assert (loaded.preprocessing.crop_mode, loaded.preprocessing.crop_ratio) == ("corner", 1.0)
    epoch = mious.index(max(mious)) + 1
    with open_predictor(trained.run_dir / "best.safetensors") as model:
        result = evaluate(model.runner, squares, model.preprocessing, task=model.task, class_names=model.class_names)
    assert 100 * result.mean_iou == pytest.approx(float(found[epoch - 1]["val_miou_percent"]), abs=0.02)
    assert 100 * result.pixel_accuracy == pytest.approx(float(found[epoch - 1]["val_pixel_percent"]), abs=0.02)


def test_predictions_are_drawn_over_validation_images(trained):
    drawn = sorted((trained.run_dir / "predictions").glob("*.png"))
    assert [path.stem for path in drawn] == [f"epoch-{epoch:04}" for epoch in range(1, 6)]
    with Image.open(drawn[-1]) as picture:
        assert picture.size == (3 * 64 + 8, 6 * 64 + 5 * 4)


def test_an_interrupted_run_goes_on_to_the_same_weights(squares, tmp_path):
    whole = train(asked(squares, tmp_path / "whole", epochs=2, batch_size=12))
    broken = train(asked(squares, tmp_path / "broken", epochs=2, batch_size=12), progress=InterruptIn(2))
    assert (broken.interrupted, broken.epochs_run) == (True, 1)
    again = asked(squares, tmp_path / "broken", epochs=2, batch_size=12, resume=True)
    resumed = train(again)
    assert table(resumed.run_dir) == table(whole.run_dir)
    assert difference(resumed.last, whole.last) == 0.0
    with pytest.raises(InputError, match="reduce_zero_label False then, True now"):
        train(replace(again, reduce_zero_label=True, class_names=("a", "b")))


def test_the_auxiliary_head_learns_and_the_loss_counts_it(scenes, tmp_path):
    with_head = train(asked(scenes, tmp_path / "a", epochs=1))
    without = train(asked(scenes, tmp_path / "b", epochs=1, task_options={**SMALL, "auxiliary_channels": 0}))
    first, second = (float(rows(result.run_dir)[0]["train_loss"]) for result in (with_head, without))
    assert 1.2 < first / second < 1.6


def test_a_frozen_backbone_stays_and_both_heads_learn(trained, squares, tmp_path):
    start = load_checkpoint(trained.last).model
    frozen = train(asked(squares, tmp_path / "run", epochs=1, freeze_backbone=True), start)
    after = load_checkpoint(frozen.last).model
    before = dict(start.named_parameters())
    changed = {name.split(".")[0] for name, tensor in after.named_parameters() if not tensor.equal(before[name])}
    assert changed == {"decode_head", "auxiliary_head", "norm0", "norm1", "norm2", "norm3"}


def test_ade20ks_numbering_is_learned_recorded_and_evaluated(squares, tmp_path):
    asked_for = asked(squares, tmp_path / "run", epochs=1, reduce_zero_label=True, class_names=("red", "blue"))
    weights = train(asked_for).last
    loaded = load_checkpoint(weights)
    assert (loaded.class_names, loaded.training) == (("red", "blue"), {"masks": "reduce_zero_label"})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["spec"]["reduce_zero_label"] is True
    (tmp_path / "names.txt").write_text("red\nblue\n")
    plain = find_segmentation_dataset(squares).val
    counted = sum(int((plain.sample(at, loaded.preprocessing)[1] % 255 > 0).sum()) for at in range(len(plain)))
    with open_predictor(weights) as model:
        images = find_segmentation_images(squares, reading=MaskReading(tmp_path / "names.txt", reduce_zero_label=True))
        result = evaluate(model.runner, images, model.preprocessing, task=model.task, class_names=model.class_names)
        assert result.pixels == counted > 0
        with pytest.raises(InputError, match="has the classes ground"):
            evaluate(model.runner, squares, model.preprocessing, task=model.task, class_names=model.class_names)


# --- augmentation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def coloured():
    """A picture whose red is 20 times the class of each pixel, and its mask (H, W)."""
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[8:28, 10:30] = 3
    mask[15:35, 35:55] = 7
    image = torch.stack([20 * mask, torch.full_like(mask, 9), torch.full_like(mask, 9)])
    return image, mask


def test_picture_and_mask_move_together_and_padding_is_not_counted(coloured):
    image, mask = coloured
    augment = DenseAugmentation(asked(Path("scenes"), image_size=(64, 96), photometric=False, scale_jitter=(0.3, 2.0)))
    agreement, shapes, padded = [], set(), 0
    for seed in range(40):
        picture, target = augment(image, mask, seed)
        assert (picture.shape, target.shape) == ((3, 64, 96), (64, 96))
        counted = target != 255
        padded += not bool(counted.all())
        # Linear interpolation blends the edges of the picture; away from them red says the class.
        agreement.append(((picture[0].float() / 20).round() == target)[counted].float().mean())
        assert torch.equal(picture[1] == 9, counted), "the padding has the mean colour and no class"
        shapes.add(tuple(counted.any(dim=dim).sum().item() for dim in (0, 1)))
    assert min(agreement) > 0.8
    assert np.mean(agreement) > 0.93
    assert len(shapes) > 10
    assert 0 < padded < 40


def test_augmentation_is_drawn_from_its_seed_alone(coloured):
    augment = DenseAugmentation(asked(Path("scenes")))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (augment(*coloured, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_without_jitter_and_flip_training_sees_what_the_evaluation_does(scenes):
    spec = asked(scenes, image_size=32, scale_jitter=None, photometric=False, flip=False)
    dataset = find_segmentation_dataset(scenes)
    trained_on, validated = DenseTrainingImages(dataset.val, spec), ValidationImages(dataset.val, spec)
    for index in range(len(validated)):
        (image, target), (pixels, classes) = trained_on[index, 0], validated[index]
        assert torch.equal(target, classes)
        assert int((image.int() - pixels.int()).abs().max()) <= 2


def test_photometric_distortion_changes_the_picture_and_not_the_padding(coloured):
    image, mask = coloured
    spec = asked(Path("scenes"), image_size=(64, 96), scale_jitter=(0.3, 0.3), flip=False)
    changed = 0
    for seed in range(10):
        picture, target = DenseAugmentation(spec)(image + 30, mask, seed)
        assert set(picture[:, target == 255].flatten().tolist()) == set(spec.preprocessing.fill)
        changed += not torch.equal(picture[1][target != 255], torch.full_like(picture[1][target != 255], 39))
    assert changed > 6


def test_boxes_masks_and_labels_of_objects_move_together(scenes):
    dataset = find_instance_dataset(scenes)
    spec = asked(scenes, scale_jitter=(0.3, 2.5), photometric=False)
    images, kept, count = DenseTrainingImages(dataset.train, spec), 0, 0
    for index in range(len(images)):
        pixels, target = images[index, index]
        assert pixels.shape == (64, 64, 3)
        count, kept = count + len(dataset.train.target_of(index)["labels"]), kept + len(target["labels"])
        assert target["masks"].shape == (len(target["labels"]), 64, 64)
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            down, across = mask.nonzero().unbind(1)
            edges = torch.stack([across.min(), down.min(), across.max() + 1, down.max() + 1])
            if 0 < float(box.min()) <= float(box.max()) < 64:  # else a part of it may be cut off
                torch.testing.assert_close(box, edges.float(), atol=1.6, rtol=0)
            assert bool((edges[:2] >= box[:2] - 1.6).all() and (edges[2:] <= box[2:] + 1.6).all())
    assert 0.4 * count < kept < count


def test_a_crop_of_one_class_is_drawn_anew(coloured):
    mask = torch.zeros(200, 200, dtype=torch.uint8)
    mask[:, 150:] = 1
    image = torch.zeros(3, 200, 200, dtype=torch.uint8)
    augment = DenseAugmentation(asked(Path("scenes"), scale_jitter=(2.5, 2.5), photometric=False, flip=False))
    both = sum(len(augment(image, mask, seed)[1].unique()) > 1 for seed in range(30))
    assert both >= 25  # one in three of even draws


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixup_alpha": 0.2}, "mixup_alpha 0.2"), ({"randaugment_magnitude": 5.0}, "randaugment_magnitude"),
        ({"sampling": "balanced"}, "sampling balanced"), ({"class_weights": "balanced"}, "class_weights balanced"),
        ({"scale_jitter": (2.0, 0.5)}, "that rise"), ({"image_size": 60}, "32 does not divide"),
        ({"task": "classification", "photometric": True, "task_options": {}}, "photometric True"),
        ({"recipe": "ade20k", "task": "multi-label", "task_options": {}}, "is of the task segment"),
    ],
)  # fmt: skip
def test_what_the_task_does_not_take_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        asked(Path("scenes"), **given)


def test_a_batch_of_one_image_is_refused_before_the_run(scenes, tmp_path):
    with pytest.raises(InputError, match="leave a batch of one image"):
        train(asked(scenes, tmp_path / "run", batch_size=23))
    assert not (tmp_path / "run").exists()


def test_names_of_masks_are_of_segmentation_alone(colours):
    with pytest.raises(InputError, match="say how masks are read"):
        train(asked(colours, task="classification", task_options={}, class_names=("a", "b")))
    assert find_dataset(colours).class_names == ("blue", "red")


# facebookresearch/ConvNeXt, upernet_convnext_*_160k_ade20k_ss.py: size, rate, drop path, layers of the decay
ADE20K = {
    "v1-tiny": (512, 1e-4, 0.4, 7), "v1-small": (512, 1e-4, 0.3, 13), "v1-base": (512, 1e-4, 0.4, 13),
    "v1-large": (640, 1e-4, 0.4, 13), "v1-xlarge": (640, 8e-5, 0.4, 13), "tiny": (512, 1e-4, 0.4, 7),
    "large": (640, 1e-4, 0.4, 13),
}  # fmt: skip


@pytest.mark.parametrize("variant", list(ADE20K))
def test_the_recipe_of_ade20k_has_the_reference_codes_figures(variant):
    spec = spec_from_recipe(Path("ade"), variant, "ade20k")
    network = ALL_VARIANTS[variant]
    layers = layer_count(network, spec.layer_decay_groups)
    assert (spec.image_size, spec.resolved_learning_rate, spec.drop_path_rate, layers) == ADE20K[variant]
    assert (spec.task, spec.schedule, spec.resolved_final_rate, spec.weight_decay) == ("segment", "linear", 0.0, 0.05)
    steps = spec.epochs * 20_210 / spec.images_per_step
    assert steps == pytest.approx(160_000, rel=0.01)
    assert steps * spec.resolved_warmup_epochs / spec.epochs == pytest.approx(1500, rel=1e-6)
    assert (spec.reduce_zero_label, spec.scale_jitter, spec.photometric) == (True, (0.67, 2.67), True)
    assert (spec.layer_decay, spec.optimizer, spec.label_smoothing) == (0.9, "adamw", 0.0)
    assert layer_index("downsample_layers.3.1.weight", network, "stage") == 0
    assert layer_index("stages.3.0.norm.bias", network, "stage") == 4
    assert layer_index("decode_head.conv_seg.weight", network, "stage") == layers
    assert recipe_options("ade20k", "atto")["drop_path_rate"] == 0.1


def test_the_command_trains_evaluates_and_says_what_it_read(scenes, tmp_path, cnx):
    words = ["--task", "segment", "--variant", "tiny-test"]
    small = ["--task-option", "channels=16", "--task-option", "auxiliary_channels=8", "--image-size", "64"]
    run_dir = tmp_path / "run"
    code, _, said = cnx("train", scenes, *words, *small, "--epochs", 1, "--batch-size", 8, "--run-dir", run_dir)
    assert code == 0, said
    assert "named by classes.txt, 2 of them" in said
    assert "share of the pixels" in said
    assert "mIoU" in said
    weights = run_dir / "best.safetensors"
    code, out, said = cnx("eval", weights, scenes, "--save-predictions", tmp_path / "rows.csv")
    assert code == 0, said
    assert out.splitlines()[1].startswith("mIoU ")
    assert "ink" in out
    with (tmp_path / "rows.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 6
