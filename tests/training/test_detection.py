"""Training boxes and masks of objects: what is learned, resumed, recorded, drawn and evaluated."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import ALL_VARIANTS
from cnx_deploy.data import find_instance_images
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.training import spec_from_recipe, train
from cnx_deploy.training.optimisation import layer_count, steps_with_warmup
from cnx_deploy.verification.evaluation import evaluate
from cnx_deploy.verification.predict import open_predictor
from tests.conftest import TINY_TEST
from tests.support.training_data import InterruptIn, difference, rows, table

SMALL = {
    "channels": 16, "box_channels": 32, "mask_channels": 8, "anchor_sizes": [16, 24, 32, 48, 64], "pre_nms": 60,
    "proposals": 40, "training_proposals": 60, "detections": 10, "candidates": 60,
}  # fmt: skip


def write_discs(root: Path, train: int = 16, val: int = 5, *, outlines: bool = True) -> Path:
    """Pictures 64 wide and 48 high with red squares and blue discs on grey, as COCO's JSON."""
    draws = torch.Generator().manual_seed(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            picture = Image.new("RGB", (64, 48), (120, 120, 120))
            for kind in (1, 2):
                side = int(torch.randint(16, 24, (), generator=draws))
                left = int(torch.randint(0, 32 - side + 1, (), generator=draws)) + 32 * (kind - 1)
                top = int(torch.randint(0, 48 - side, (), generator=draws))
                box = (left, top, left + side - 1, top + side - 1)
                shape, one = Image.new("1", picture.size), {"bbox": [left, top, side, side]}
                draw = ImageDraw.Draw(shape)
                (draw.rectangle if kind == 1 else draw.ellipse)(box, fill=1)
                picture.paste((220, 30, 30) if kind == 1 else (30, 30, 220), mask=shape)
                if outlines:
                    flat = np.asarray(shape).T.ravel()
                    ends = [*(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
                    counts = np.diff(ends, prepend=0).tolist()
                    one["segmentation"] = {"size": [48, 64], "counts": counts}
                known = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": kind, "iscrowd": 0}
                annotations.append({**known, **one, "area": side * side})
            name = f"{number}.png"
            picture.save(root / split / name)
            images.append({"id": number + 1, "file_name": name, "width": 64, "height": 48})
        names = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]
        document = {"images": images, "annotations": annotations, "categories": names}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return root


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """16 pictures to learn from and 5 for validation. Shared: do not change them."""
    return write_discs(tmp_path_factory.mktemp("discs") / "discs")


def asked(data: Path, run_dir: Path | None = None, **given):
    usual = {
        "task": "detect", "task_options": SMALL, "image_size": 64, "batch_size": 4, "epochs": 2, "workers": 0,
        "learning_rate": 3e-3, "run_dir": run_dir,
    }  # fmt: skip
    return spec_from_recipe(data, TINY_TEST, **{**usual, **given})


@pytest.fixture(scope="module")
def trained(discs, tmp_path_factory):
    """A run with a moving average. Shared: do not change it."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    plain = {"scale_jitter": None, "flip": False, "warmup_epochs": 0.5, "learning_rate": 5e-3}
    return train(asked(discs, run_dir, epochs=6, ema_decay=0.8, **plain))


def test_a_run_learns_discs_and_its_best_weights_have_the_best_precision_of_masks(trained, discs):
    found = rows(trained.run_dir)
    masks = [float(row["val_mask_ap_percent"]) for row in found]
    averages = [float(row["ema_val_mask_ap_percent"]) for row in found]
    assert float(found[-1]["train_loss"]) < 0.75 * float(found[0]["train_loss"])
    assert trained.best_mask_ap_percent == max(*masks, *averages)
    assert trained.best_box_ap_percent > 2.0
    assert "AP of boxes" in trained.summary()
    loaded = load_checkpoint(trained.run_dir / "best.safetensors")
    assert (loaded.class_names, loaded.model.task.config.detections) == (("square", "disc"), 10)
    assert loaded.preprocessing.crop_mode == "corner"
    epoch = masks.index(max(masks))
    with open_predictor(trained.run_dir / "best.safetensors") as model:
        result = evaluate(model.runner, discs, model.preprocessing, task=model.task, class_names=model.class_names)
    assert 100 * result.figures["masks"]["AP"] == pytest.approx(masks[epoch], abs=0.01)
    assert 100 * result.figures["boxes"]["AP"] == pytest.approx(float(found[epoch]["val_box_ap_percent"]), abs=0.01)
    assert [row.objects for row in result.per_class] == [5, 5]


def test_predictions_are_drawn_beside_what_is_there(trained):
    drawn = sorted((trained.run_dir / "predictions").glob("*.png"))
    assert [path.stem for path in drawn] == [f"epoch-{epoch:04}" for epoch in range(1, 7)]
    with Image.open(drawn[-1]) as picture:
        assert picture.size == (2 * 64 + 4, 5 * 64 + 4 * 4)


def test_an_interrupted_run_goes_on_to_the_same_weights(discs, tmp_path):
    whole = train(asked(discs, tmp_path / "whole"))
    broken = train(asked(discs, tmp_path / "broken"), progress=InterruptIn(2))
    assert (broken.interrupted, broken.epochs_run) == (True, 1)
    resumed = train(asked(discs, tmp_path / "broken", resume=True))
    assert table(resumed.run_dir) == table(whole.run_dir)
    assert difference(resumed.last, whole.last) == 0.0


def test_boxes_without_outlines_train_a_network_without_masks(tmp_path):
    data = write_discs(tmp_path / "data", train=4, val=2, outlines=False)
    with pytest.raises(InputError, match="masks=false"):
        train(asked(data, tmp_path / "a"))
    result = train(asked(data, tmp_path / "b", epochs=1, task_options={**SMALL, "masks": False}))
    assert result.best_mask_ap_percent is None
    assert rows(result.run_dir)[0]["val_mask_ap_percent"] == ""
    with open_predictor(result.last) as model:
        found = evaluate(model.runner, data, model.preprocessing, task=model.task, class_names=model.class_names)
    assert list(found.figures) == ["boxes"]


def test_a_frozen_backbone_stays(trained, discs, tmp_path):
    start = load_checkpoint(trained.last).model
    frozen = train(asked(discs, tmp_path / "run", epochs=1, freeze_backbone=True), start)
    before = dict(start.named_parameters())
    after = load_checkpoint(frozen.last).model.named_parameters()
    changed = {name.split(".")[0] for name, tensor in after if not tensor.equal(before[name])}
    assert changed == {"fpn", "rpn", "roi_heads", "norm0", "norm1", "norm2", "norm3"}


# facebookresearch/ConvNeXt, object_detection/configs/convnext: drop path, decay, layers
COCO = {"v1-tiny": (0.4, 0.95, 7), "v1-small": (0.6, 0.7, 13), "v1-base": (0.6, 0.8, 13), "v1-xlarge": (0.8, 0.7, 13)}


@pytest.mark.parametrize("variant", list(COCO))
def test_the_recipe_of_coco_has_the_reference_codes_figures(variant):
    spec = spec_from_recipe(Path("coco"), variant, "coco")
    layers = layer_count(ALL_VARIANTS[variant], spec.layer_decay_groups)
    assert (spec.drop_path_rate, spec.layer_decay, layers) == COCO[variant]
    assert (spec.task, spec.epochs, spec.images_per_step, spec.image_size) == ("detect", 36, 16, (800, 1344))
    assert (spec.resolved_learning_rate, spec.weight_decay, spec.optimizer) == (1e-4, 0.05, "adamw")
    assert spec.epochs * 117_266 / 16 * spec.resolved_warmup_epochs / spec.epochs == pytest.approx(500, rel=1e-3)
    factor = steps_with_warmup(3600, 50)
    assert [round(factor(step), 6) for step in (0, 50, 2699, 2700, 3299, 3300)] == [0.019608, 1, 1, 0.1, 0.1, 0.01]


def test_the_recipe_of_coco_for_version_2_is_that_of_mmdetections_project():
    spec = spec_from_recipe(Path("coco"), "base", "coco")
    assert (spec.epochs, spec.images_per_step, spec.image_size, spec.scale_jitter) == (36, 32, 1024, (0.1, 2.0))
    assert (spec.drop_path_rate, spec.layer_decay, spec.weight_decay) == (0.4, 0.95, 0.05)
    assert layer_count(ALL_VARIANTS["base"], spec.layer_decay_groups) == 13  # twelve, and the head
    assert spec.resolved_warmup_epochs * 117_266 / 32 == pytest.approx(1000)


def test_the_commands_train_evaluate_and_write_what_each_image_has(discs, tmp_path, cnx):
    small = [word for name, value in SMALL.items() for word in ("--task-option", f"{name}={json.dumps(value)}")]
    run_dir = tmp_path / "run"
    words = ["--task", "detect", "--variant", "tiny-test", *small, "--image-size", "64", "--batch-size", 4]
    code, _, said = cnx("train", discs, *words, "--epochs", 1, "--run-dir", run_dir)
    assert code == 0, said
    assert "16 training images with 32 objects" in said
    assert "AP of boxes" in said
    code, out, said = cnx("eval", run_dir / "best.safetensors", discs, "--save-predictions", tmp_path / "rows.csv")
    assert code == 0, said
    assert "AP50" in out
    assert "square" in out
    with (tmp_path / "rows.csv").open() as stream:
        listed = list(csv.DictReader(stream))
    assert [row["objects"] for row in listed] == ["2"] * 5
    assert len(find_instance_images(discs)) == 5
