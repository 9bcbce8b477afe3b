"""Crops of photographs: as many as are promised, and no pixel on both sides."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/make_crops.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("make_crops")


def test_no_tile_has_crops_for_training_and_for_validation(script, tmp_path, monkeypatch):
    """Each tile has a grey of its own, which a crop without its noise keeps."""
    tiles = np.kron(10 * np.arange(1, 13, dtype=np.uint8).reshape(3, 4), np.ones((96, 96), np.uint8))
    Image.fromarray(tiles).save(tmp_path / "photograph.png")
    monkeypatch.setattr(script, "crop", lambda tile, chance: np.asarray(tile)[:64, :64])
    script.write_crops(tmp_path / "photograph.png", tmp_path / "crops", np.random.default_rng(0))
    greys = {}
    for split, count in (("train", script.TRAIN), ("val", script.VAL)):
        files = list((tmp_path / "crops" / split / "photograph").iterdir())
        assert len(files) == count
        greys[split] = {int(value) for file in files for value in np.unique(np.asarray(Image.open(file)))}
    assert greys["train"] | greys["val"] == set(range(10, 121, 10))
    assert not greys["train"] & greys["val"]


def test_a_crop_is_square_grey_and_the_same_each_time(script):
    tile = Image.effect_noise((96, 96), 60)
    first, again = (script.crop(tile, np.random.default_rng(3)) for _ in range(2))
    assert (first.shape, first.dtype) == ((64, 64), np.uint8)
    assert (first == again).all()
    assert (first != script.crop(tile, np.random.default_rng(4))).any()
