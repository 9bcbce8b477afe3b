"""Segmentation of pictures of any size: maps in their own pixels, files that are drawn, tiles, metrics of masks."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cnx_deploy as cnx
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import GivenImages, find_segmentation_images
from cnx_deploy.data.label_maps import colour_map
from cnx_deploy.data.preprocessing import placement, to_pixels
from cnx_deploy.data.segmentation import read_mask
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.model.tasks.segmentation_metrics import labels_on
from cnx_deploy.verification.evaluation import evaluate
from cnx_deploy.verification.evaluation_plot import write_plot
from cnx_deploy.verification.predict import open_predictor
from cnx_deploy.verification.tiles import tile_starts, tiled_outputs
from tests.conftest import TINY_TEST
from tests.support.pictures import smooth_pictures
from tests.support.training_data import write_squares

NAMES = ("ground", "red", "blue")
CANVAS = Preprocessing((64, 96), 1.0, "bilinear", crop_mode="corner")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A random network of three classes on a canvas of 64x96, whose classes all occur. Shared: do not change it."""
    task = find_task("segment").configured({"channels": 16, "auxiliary_channels": 0})
    model = random_model(TINY_TEST, 3, seed=1, task=task)
    with torch.no_grad():
        model.get_submodule("decode_head.conv_seg").weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(3))
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    return save_checkpoint(path, model, class_names=NAMES, preprocessing=CANVAS)


@pytest.fixture(scope="module")
def model(weights):
    with open_predictor(weights) as opened:
        yield opened


def direct_labels(model, picture: Image.Image) -> np.ndarray:
    """The classes of a picture's pixels: the canvas' part that shows it, enlarged to it, one class at a time."""
    pixels = to_pixels(picture, CANVAS)
    outputs = model.outputs([picture])["logits"]
    canvas = F.interpolate(outputs, (64, 96), mode="bilinear", align_corners=False)[0]
    width, height = placement(picture.size, CANVAS).size
    assert pixels.shape == (64, 96, 3)
    part = canvas[:, :height, :width]
    return F.interpolate(part[None], picture.size[::-1], mode="bilinear", align_corners=False)[0].argmax(0).numpy()


@pytest.mark.parametrize("size", [(150, 80), (80, 150), (96, 64), (40, 30), (33, 500)])
def test_a_picture_has_a_class_for_each_of_its_own_pixels_without_padding(model, size):
    (picture,) = smooth_pictures([size])
    answer = model.predict(picture)
    assert (answer.labels.shape, answer.labels.dtype) == (size[::-1], np.uint8)
    np.testing.assert_array_equal(answer.labels, direct_labels(model, picture))
    shares = np.bincount(answer.labels.ravel(), minlength=3) / answer.labels.size
    assert {each.name: each.share for each in answer.shares} == {
        name: pytest.approx(share) for name, share in zip(NAMES, shares, strict=True) if share
    }
    assert "labels" not in answer.to_dict()
    assert sum(each.share for each in answer.shares) == pytest.approx(1.0)


def test_classes_some_at_a_time_are_those_at_once(model, monkeypatch):
    (picture,) = smooth_pictures([(150, 80)])
    outputs, place = model.outputs([picture]), placement(picture.size, CANVAS)
    whole = labels_on(outputs, place)
    monkeypatch.setattr("cnx_deploy.model.tasks.segmentation_metrics.MAP_VALUES", 1)
    assert torch.equal(labels_on(outputs, place), whole)
    assert len(whole.unique()) == 3


def test_the_command_draws_palette_files_and_overlays(weights, tmp_path, cnx):
    (tmp_path / "in").mkdir()
    for at, picture in enumerate(smooth_pictures([(150, 80), (60, 90)])):
        picture.save(tmp_path / "in" / f"{at} a.png")
    (tmp_path / "in" / "broken.png").write_text("no image")
    code, out, said = cnx("predict", weights, tmp_path / "in", "--draw", tmp_path / "drawn", "--json")
    assert code == 2, said  # of the broken one
    rows = json.loads(out)["predictions"]
    assert [row["error"] is None for row in rows] == [True, True, False]
    assert {share["name"] for share in rows[0]["shares"]} <= set(NAMES)
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == ["0000-0_a-overlay.png", "0000-0_a.png", "0001-1_a-overlay.png", "0001-1_a.png"]
    labels = read_mask(tmp_path / "drawn" / "0000-0_a.png")  # what was drawn can be learned from
    with open_predictor(weights) as opened:
        answer = opened.predict(tmp_path / "in" / "0 a.png")
        again = opened.draw([tmp_path / "in" / "0 a.png"], tmp_path / "again")
    assert [path.read_bytes() for path in again] == [(tmp_path / "drawn" / path.name).read_bytes() for path in again]
    np.testing.assert_array_equal(labels, answer.labels)
    with Image.open(tmp_path / "drawn" / "0000-0_a.png") as drawn, Image.open(tmp_path / "in" / "0 a.png") as picture:
        np.testing.assert_array_equal(np.asarray(drawn.convert("RGB")), colour_map()[labels])
        plain = np.asarray(picture)
    with Image.open(tmp_path / "drawn" / "0000-0_a-overlay.png") as overlay:
        mixed = 0.45 * plain + 0.55 * colour_map()[labels]
        assert np.abs(np.asarray(overlay) - mixed).max() <= 0.51
    assert colour_map()[[0, 1, 2, 15, 255]].tolist() == [  # Pascal VOC's own
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192],
    ]  # fmt: skip


# --- tiles -----------------------------------------------------------------------------------------------------------


def test_tiles_begin_evenly_and_cover_the_side():
    for length in range(64, 1000, 28):
        for overlap in (0.0, 0.25, 0.5):
            starts = tile_starts(length, 64, overlap)
            assert starts[0] == 0
            assert starts[-1] == max(0, length - 64)
            steps = np.diff(starts)
            assert all(step % 4 == 0 for step in steps)
            assert (steps <= 64 * (1 - overlap) + 3).all()
    assert tile_starts(64, 64, 0.5) == tile_starts(32, 64, 0.5) == [0]


def test_a_picture_that_fits_is_the_same_in_tiles_as_in_one_pass(model):
    for size in ((96, 64), (60, 40), (96, 20)):
        (picture,) = smooth_pictures([size])
        np.testing.assert_array_equal(model.predict(picture, tiles=0.25).labels, model.predict(picture).labels)
    (picture,) = smooth_pictures([(96, 64)])
    outputs, place = tiled_outputs(model, picture, 0.5)
    torch.testing.assert_close(outputs["logits"], model.outputs([picture])["logits"])
    assert place.size == (96, 64)


def test_logits_of_tiles_are_averaged_where_they_overlap(model):
    (picture,) = smooth_pictures([(150, 101)])
    outputs, place = tiled_outputs(model, picture, 0.4, batch_size=2)
    filled = np.full((104, 152, 3), CANVAS.fill, np.uint8)
    filled[:101, :150] = np.asarray(picture)
    total, count = torch.zeros(3, 26, 38), torch.zeros(26, 38)
    for top in tile_starts(104, 64, 0.4):
        for left in tile_starts(152, 96, 0.4):
            tile = Image.fromarray(filled[top : top + 64, left : left + 96])
            total[:, top // 4 : top // 4 + 16, left // 4 : left // 4 + 24] += model.outputs([tile])["logits"][0]
            count[top // 4 : top // 4 + 16, left // 4 : left // 4 + 24] += 1
    assert {1.0, 2.0, 4.0} <= set(count.unique().tolist())
    torch.testing.assert_close(outputs["logits"][0], total / count, atol=1e-5, rtol=1e-5)
    answer = model.predict(picture, tiles=0.4)
    full = F.interpolate(total[None] / count, (104, 152), mode="bilinear", align_corners=False)[0, :, :101, :150]
    assert (answer.labels == full.argmax(0).numpy()).mean() > 0.999
    assert place.canvas == (152, 104)
    assert (answer.labels != model.predict(picture).labels).any()


def test_tiles_of_other_tasks_and_outputs_are_refused(model, weights, tiny_onnx_fp32):
    (picture,) = smooth_pictures([(150, 101)])
    with cnx.load(tiny_onnx_fp32) as classifier, pytest.raises(InputError, match="classification gives logits"):
        classifier.predict(picture, tiles=0.25)
    with cnx.load(weights, outputs=("labels",)) as labels, pytest.raises(InputError, match="--output logits"):
        labels.predict(picture, tiles=0.25)
    with pytest.raises(InputError, match=r"from 0 to 0\.75"):
        model.predict(picture, tiles=0.9)


def test_labels_in_the_graph_are_the_canvas_classes_by_the_nearest_pixel(model, weights):
    (picture,) = smooth_pictures([(192, 128)])
    with cnx.load(weights, outputs=("labels",)) as opened:
        labels = opened.predict(picture).labels
    canvas = F.interpolate(model.outputs([picture])["logits"], (64, 96), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(labels, canvas[0].argmax(0).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())


# --- metrics of masks -------------------------------------------------------------------------------------------------


def test_classes_of_masks_are_found_by_name_and_numbers_are_the_models(model, tmp_path):
    data = write_squares(tmp_path / "data", train=1, val=4, side=48)
    words = {"task": model.task, "class_names": model.class_names}
    plain = evaluate(model.runner, data, model.preprocessing, **words)
    (data / "classes.txt").write_text("red\nground\nblue\n")
    turned = evaluate(model.runner, data, model.preprocessing, **words)
    counts = [{row.name: row.count for row in result.per_class} for result in (plain, turned)]
    assert counts[0]["red"] == counts[1]["ground"]
    assert counts[0]["ground"] == counts[1]["red"]
    assert plain.mean_iou != turned.mean_iou
    (data / "classes.txt").unlink()
    notes: list[str] = []
    numbered = evaluate(model.runner, data, model.preprocessing, note=notes.append, **words)
    assert numbered.per_class == plain.per_class
    assert any("taken as the model's class indices" in note for note in notes)
    (data / "classes.txt").write_text("ground\nred\nsky\n")
    with pytest.raises(InputError, match="has the classes sky"):
        evaluate(model.runner, data, model.preprocessing, **words)


def test_masks_are_read_with_the_shift_where_it_is_asked_for(weights, tmp_path):
    data = write_squares(tmp_path / "data", train=1, val=2, side=48)
    (data / "classes.txt").write_text("red\nblue\n")
    shifted = cnx.evaluate(weights, data, reduce_zero_label=True)
    assert {row.name: row.count > 0 for row in shifted.per_class} == {"ground": False, "red": True, "blue": True}
    with pytest.raises(InputError, match="there are none here"):
        cnx.evaluate(weights, find_segmentation_images(data), reduce_zero_label=True)


def test_evaluation_counts_the_pixels_of_the_canvas_without_its_padding(model, tmp_path):
    images = find_segmentation_images(write_squares(tmp_path / "data", train=1, val=4, side=48))
    result = evaluate(model.runner, images, model.preprocessing, task=model.task, class_names=model.class_names)
    shown = [placement(images.image(index).size, CANVAS).size for index in range(4)]
    assert result.pixels == sum(width * height for width, height in shown) < 4 * 64 * 96
    given = GivenImages(smooth_pictures([(60, 60)]), labels=(0,), class_names=NAMES)
    with pytest.raises(InputError, match="expected a class for each pixel"):
        evaluate(model.runner, given, model.preprocessing, task=model.task, class_names=model.class_names)


@pytest.mark.parametrize("classes", [3, 60])
def test_the_plot_shows_confusions_and_the_iou_of_each_class(classes, tmp_path):
    generator = torch.Generator().manual_seed(0)
    running = find_task("segment").metrics([f"class {at}" for at in range(classes)])
    targets = torch.randint(0, classes, (2, 32, 32), generator=generator)
    said = torch.where(torch.rand(2, 32, 32, generator=generator) < 0.7, targets, 0)
    running.add({"labels": said}, targets, ["a", "b"])
    found = running.result(())
    first, again = (write_plot(found, tmp_path / name, "a title").read_bytes() for name in ("a.svg", "b.svg"))
    assert first == again
    text = " ".join(ElementTree.fromstring(first).itertext())
    assert f"mIoU {100 * found.mean_iou:.2f} %" in text
    assert ("share of the label's pixels" in text) == (classes == 3)
    assert ("the 40 lowest of 60 classes" in text) == (classes == 60)
    with pytest.raises(InputError, match="no confusion to draw"):
        write_plot(None, tmp_path / "c.svg", "a title")


def test_another_canvas_than_the_weights_is_refused_with_the_reason(weights, tmp_path, cnx):
    smooth_pictures([(60, 60)])[0].save(tmp_path / "a.png")
    code, _, said = cnx("predict", weights, tmp_path / "a.png", "--image-size", 128)
    assert code == 2
    assert "The canvas of" in said
    assert "64x96 (header)" in said
    assert "GRN sums over all of it" in said
    code, _, said = cnx("export", "--variant", "tiny-test", "--checkpoint", weights, "--image-size", "64x64",
                        "--output-dir", tmp_path / "export")  # fmt: skip
    assert (code, "The canvas of" in said) == (2, True)
    code, _, said = cnx("predict", weights, tmp_path / "a.png", "--image-size", "64x96")
    assert code == 0, said
