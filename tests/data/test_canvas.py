"""The whole picture on a canvas: pixels, boxes and label maps beside a direct computation, and what padding does."""

import numpy as np
import pytest
import torch
from PIL import Image

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import ImageLike
from cnx_deploy.data.preprocessing import normalise, placement, to_pixels
from cnx_deploy.model.convnextv2 import random_model
from tests.support.pictures import smooth_pictures

CANVAS = {"crop_ratio": 1.0, "interpolation": "bilinear", "crop_mode": "corner"}
SIZES = ((800, 400), (400, 800), (64, 64), (333, 500), (50, 40), (700, 37))


@pytest.mark.parametrize("image_size", [64, (64, 96), (96, 64)])
def test_corner_keeps_the_whole_picture_in_the_upper_left_and_fills_the_rest(image_size):
    rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    for picture in smooth_pictures(SIZES):
        pixels = to_pixels(picture, Preprocessing(image_size, **CANVAS, pad_value=(1.0, 2.0, 3.0))).numpy()
        scale = min(rows / picture.height, columns / picture.width)
        size = round(picture.width * scale), round(picture.height * scale)
        expected = np.broadcast_to(np.array([1, 2, 3], np.uint8), (rows, columns, 3)).copy()
        expected[: size[1], : size[0]] = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(pixels, expected)
        place = placement(picture.size, Preprocessing(image_size, **CANVAS))
        assert (place.size, place.offset, place.canvas) == (size, (0, 0), (columns, rows))
        assert size[0] == columns or size[1] == rows


def test_without_a_pad_value_the_mean_colour_fills():
    wide = Image.new("RGB", (200, 20), "white")
    preprocessing = Preprocessing(64, **CANVAS, mean=(0.2, 0.4, 0.6))
    assert to_pixels(wide, preprocessing)[-1, -1].tolist() == [51, 102, 153]
    grey = Preprocessing(64, **CANVAS, pad_value=(114.0,) * 3).for_channels(1)
    assert (grey.pad_value, to_pixels(wide, grey)[-1, -1].tolist()) == ((114.0,), [114])
    border = Preprocessing(64, 1.0, crop_mode="border", pad_value=(7.0, 8.0, 9.0))
    assert to_pixels(wide, border)[0, 0].tolist() == [7, 8, 9]


@pytest.mark.parametrize("crop_mode", ["corner", "border", "center", "squash"])
def test_boxes_and_label_maps_land_where_the_pixels_do(crop_mode):
    labels = np.zeros((90, 160), np.uint8)
    labels[20:70, 60:120] = 200
    preprocessing = Preprocessing((64, 96), 1.0, "nearest", crop_mode=crop_mode, mean=(0.0,) * 3)
    pixels = to_pixels(Image.fromarray(labels).convert("RGB"), preprocessing)[..., 0].numpy()
    place = placement((160, 90), preprocessing)
    np.testing.assert_array_equal(place.label_map(labels, 0), pixels)
    rows, columns = np.nonzero(pixels)
    box = torch.tensor([[60, 20, 120, 70]])
    moved = place.boxes(box)
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(moved[0].numpy(), edges, atol=1.0)
    torch.testing.assert_close(place.boxes_of_picture(moved), box.float(), atol=1e-4, rtol=0)
    outside = place.label_map(np.zeros_like(labels), 255)
    assert (outside == 255).any() == (crop_mode in ("corner", "border"))


def test_scores_of_the_canvas_go_back_to_the_picture_without_its_padding():
    preprocessing = Preprocessing(96, **CANVAS)
    labels = np.zeros((45, 90), np.uint8)
    labels[:, 30:] = 1
    labels[30:, :] = 2
    place = placement((90, 45), preprocessing)
    canvas = torch.from_numpy(place.label_map(labels, 9)).long()
    scores = torch.nn.functional.one_hot(canvas, 10).permute(2, 0, 1)[None].float()
    back = place.on_picture(scores)
    assert back.shape == (1, 10, 45, 90)
    np.testing.assert_array_equal(back[0].argmax(dim=0).numpy(), labels)
    cut = placement((90, 45), Preprocessing(96, 1.0))  # its centre alone is seen, and the edge is repeated
    assert cut.on_picture(torch.ones(1, 1, 96, 96)).shape == (1, 1, 45, 90)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_mode": "corner"}, "--crop-ratio 1.0"),
        ({"pad_value": [0.0] * 3}, "fills nothing"),
        ({**CANVAS, "pad_value": [0.0] * 2}, "each of 3 channels"),
        ({**CANVAS, "pad_value": [0.0, 0.0, 256.0]}, "from 0 to 255"),
        ({**CANVAS, "pad_value": [0.0, 0.0, float("nan")]}, "from 0 to 255"),
    ],
)
def test_a_canvas_that_cannot_be_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Preprocessing.from_dict(values)


def test_the_canvas_is_recorded_and_nothing_is_written_without_one():
    canvas = Preprocessing((800, 1344), **CANVAS, pad_value=(0.0, 1.0, 2.0))
    assert Preprocessing.from_dict(canvas.to_dict()) == canvas
    assert not {"pad_value", "crop_mode"} & Preprocessing().to_dict().keys()


def stage_outputs(network, pixels, preprocessing):
    """The outputs of the four stages for one image (H, W, C)."""
    outputs: list[torch.Tensor] = []
    hooks = [stage.register_forward_hook(lambda *given: outputs.append(given[2])) for stage in network.stages]
    with torch.no_grad():
        network(normalise(pixels[None], preprocessing))
    for hook in hooks:
        hook.remove()
    return outputs


def test_padding_moves_all_features_of_v2_and_those_of_v1_at_its_edge_alone(tiny_variant, tiny_v1_variant):
    """Relative change in the quarter of the picture that is farthest from the padding, after stages 1 and 2."""
    tight, canvas = Preprocessing((192, 256), **CANVAS), Preprocessing((256, 384), **CANVAS)
    pixels = ImageLike().pixels(0, tight)
    padded = torch.tensor(canvas.fill, dtype=torch.uint8).expand(256, 384, 3).clone()
    padded[:192, :256] = pixels
    moved = {}
    for variant in (tiny_variant, tiny_v1_variant):
        network = random_model(variant, 10, seed=0)
        pairs = zip(stage_outputs(network, pixels, tight), stage_outputs(network, padded, canvas), strict=True)
        quarters = [(own, on_canvas[..., : own.shape[2], : own.shape[3]]) for own, on_canvas in pairs]
        inner = [[part[..., : part.shape[2] // 2, : part.shape[3] // 2] for part in pair] for pair in quarters[:2]]
        moved[variant.version] = [float((b - a).norm() / a.norm()) for a, b in inner]
    assert min(moved[2]) > 0.15
    assert max(moved[1]) < 1e-5
