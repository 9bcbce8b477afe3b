"""Detections of pictures of any size: boxes in their own pixels, files that are drawn, and limits that are too low."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cnx_deploy as cnx
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.preprocessing import placement
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.model.tasks.detection import Detect
from cnx_deploy.verification.predict import open_predictor
from tests.conftest import TINY_TEST

NAMES = ("cup", "dog", "egg")
CANVAS = Preprocessing((64, 96), 1.0, "bilinear", crop_mode="corner")
SMALL = {
    "channels": 16, "box_channels": 32, "mask_channels": 8, "pre_nms": 60, "proposals": 40, "detections": 6,
    "anchor_sizes": [16, 24, 32, 48, 64],
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A random network of three classes on a canvas of 64x96. Shared: do not change it."""
    model = random_model(TINY_TEST, 3, seed=1, task=find_task("detect").configured(SMALL))
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    return save_checkpoint(path, model, class_names=NAMES, preprocessing=CANVAS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "wide.png", folder / "tall.png"]
    for path, size in zip(paths, ((240, 100), (50, 130)), strict=True):
        noise = np.random.default_rng(0).integers(0, 255, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return paths


def test_boxes_are_those_of_the_canvas_moved_to_each_picture(weights, pictures):
    with open_predictor(weights) as model:
        outputs = model.outputs(pictures)
        answers = model.predict(pictures)
    for at, (path, answer) in enumerate(zip(pictures, answers, strict=True)):
        with Image.open(path) as picture:
            size = picture.size
        place = placement(size, CANVAS)
        count = int((outputs["labels"][at] >= 0).sum())
        assert len(answer.detections) == count > 0
        assert answer.masks.shape == (count, 28, 28)
        for row, found in enumerate(answer.detections):
            assert found.name == NAMES[int(outputs["labels"][at][row])] == NAMES[found.index]
            assert found.probability == pytest.approx(float(outputs["scores"][at][row]))
            on_canvas = outputs["boxes"][at][row] / torch.tensor(place.scale).repeat(2)
            expected = on_canvas.clamp(min=0).minimum(torch.tensor(size * 2))
            torch.testing.assert_close(torch.tensor(found.box), expected, rtol=0, atol=1e-3)
        assert found.name in str(answer)
        document = json.loads(json.dumps(answer.to_dict()))
        assert document.keys() == {"path", "error", "detections"}
    assert len(answers[0].detections) >= len(cnx.load(weights).predict(pictures[0], top=1).detections) == 1


def test_the_command_names_boxes_and_draws_sure_objects_on_the_picture(weights, pictures, tmp_path, cnx, monkeypatch):
    """Probabilities of a random network are small: they are raised here, so that something is drawn."""
    monkeypatch.setattr("cnx_deploy.verification.pictures.DRAWN_FROM", 0.0)
    code, out, said = cnx("predict", weights, *pictures, "--draw", tmp_path / "drawn", "--json")
    assert code == 0, said
    rows = json.loads(out)["predictions"]
    assert [len(row["detections"][0]["box"]) for row in rows] == [4, 4]
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == ["0000-wide-objects.png", "0001-tall-objects.png"]
    for path, original in zip(drawn, pictures, strict=True):
        with Image.open(path) as picture, Image.open(original) as before:
            assert picture.size == before.size
            assert np.abs(np.asarray(picture).astype(int) - np.asarray(before)).max() > 50
    code, out, _ = cnx("predict", weights, pictures[0])
    assert code == 0
    assert "%" in out
    assert "(" in out


def test_detections_that_are_not_exact_are_an_error_and_never_an_answer(weights, pictures, cnx, monkeypatch):
    right = Detect.forward

    def short(self, *words, **more):
        outputs = right(self, *words, **more)
        return {**outputs, "exact": torch.zeros_like(outputs["exact"])}

    monkeypatch.setattr(Detect, "forward", short)
    code, out, said = cnx("predict", weights, pictures[0])
    assert code == 2
    assert "not exact" in out
    assert "passes=32" in out
    assert "1 of 1 files have no answer" in said


def test_pictures_of_a_classifier_are_refused(tmp_path, cnx):
    path = save_checkpoint(tmp_path / "classifier.safetensors", random_model(TINY_TEST, 3))
    image = tmp_path / "a.png"
    Image.new("RGB", (40, 40)).save(image)
    code, _, said = cnx("predict", path, image, "--draw", tmp_path / "drawn")
    assert code == 2
    assert "classes of pixels and of objects" in said
