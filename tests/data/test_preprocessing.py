"""Pixels beside timm's transform and transformers' processors, on pictures of many shapes."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.preprocessing import to_pixels
from tests.support.pictures import smooth_pictures

SIZES = (
    (800, 400), (400, 800), (64, 64), (333, 500), (500, 333), (96, 96), (700, 37), (50, 40), (641, 427), (256, 341),
    (131, 132), (31, 29), (97, 513),
)  # fmt: skip
"""Widths and heights: even and odd margins, both orientations, smaller and larger than the target, long and thin."""


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return smooth_pictures(SIZES)


def worst_difference(pictures: list[Image.Image], preprocessing: Preprocessing, crop_mode: str) -> int:
    """In units of 1/255, beside timm's transform of the same settings and `crop_mode`."""
    transform = create_transform(
        preprocessing.image_size, crop_pct=preprocessing.crop_ratio, crop_mode=crop_mode,
        interpolation=preprocessing.interpolation, mean=preprocessing.mean, normalize=False,
    )  # fmt: skip
    differences = [
        (to_pixels(picture, preprocessing).permute(2, 0, 1).int() - transform(picture).int()).abs().max()
        for picture in pictures
    ]
    return int(max(differences))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_pixels_are_those_of_timm_in_every_crop_mode(pictures, crop_mode):
    for ratio, side, interpolation in product((0.875, 0.95, 1.0), (64, 96), ("bicubic", "bilinear")):
        preprocessing = Preprocessing(side, ratio, interpolation, crop_mode=crop_mode)
        assert worst_difference(pictures, preprocessing, crop_mode) <= 1, preprocessing


def test_another_crop_mode_gives_other_pixels(pictures):
    for given, told in (("center", "squash"), ("squash", "border"), ("border", "center")):
        assert worst_difference(pictures[:2], Preprocessing(64, crop_mode=given), told) > 30


def test_center_floor_cuts_one_pixel_less_where_the_margin_is_odd():
    columns = Image.fromarray(np.arange(67, dtype=np.uint8)[None].repeat(64, 0))
    preprocessing = Preprocessing(64, 1.0)
    assert int(to_pixels(columns, preprocessing)[0, 0, 0]) == 2  # 1.5 goes to the even side
    floor = dataclasses.replace(preprocessing, crop_mode="center-floor")
    assert int(to_pixels(columns, floor)[0, 0, 0]) == 1


def test_a_border_has_the_mean_colour(pictures):
    preprocessing = Preprocessing(64, 1.0, mean=(0.2, 0.4, 0.6), crop_mode="border")
    assert to_pixels(pictures[0], preprocessing)[0, 0].tolist() == [51, 102, 153]


def test_an_unknown_crop_mode_is_refused():
    with pytest.raises(InputError, match="squash"):
        Preprocessing(crop_mode="stretch")


def test_what_earlier_versions_wrote_is_read_and_written_the_same():
    before = {name: value for name, value in Preprocessing().to_dict().items() if name != "crop_mode"}
    assert Preprocessing().to_dict() == before
    assert Preprocessing.from_dict(before) == Preprocessing()
    squashed = Preprocessing(crop_mode="squash")
    assert Preprocessing.from_dict(squashed.to_dict()) == squashed
    assert torch.is_tensor(to_pixels(Image.new("RGB", (40, 30)), squashed))
