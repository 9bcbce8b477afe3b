"""The scenes of the demos: repeatable, readable both ways, and with masks that are the digits' pixels exactly."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from cnx_deploy.data import find_instance_dataset, find_segmentation_dataset

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_scenes.py"


@pytest.fixture(scope="module")
def scenes():
    spec = importlib.util.spec_from_file_location("make_scenes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.*"))
        if path.is_file()
    }


def test_one_seed_gives_the_same_bytes_and_another_gives_others(scenes, tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        scenes.write_scenes(tmp_path / name, train=3, val=2, side=64, seed=seed)
    first, again, other = (hashes(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert len(first) == 2 * 5 + 3
    assert sum(first[name] != other[name] for name in first) >= 11


@pytest.mark.parametrize(("classes", "count"), [("ink", 2), ("digits", 11)])
def test_objects_and_masks_say_the_same_of_every_pixel(scenes, tmp_path, classes, count):
    scenes.write_scenes(tmp_path / "scenes", train=6, val=4, side=64, classes=classes)
    segmentation, instances = (read(tmp_path / "scenes") for read in (find_segmentation_dataset, find_instance_dataset))
    assert len(segmentation.class_names) == count
    assert instances.class_names == segmentation.class_names[1:]
    for split in ("train", "val"):
        masks, objects = getattr(segmentation, split), getattr(instances, split)
        assert [path.name for path in masks.paths] == [path.name for path in objects.paths]
        for index in range(len(masks)):
            target, drawn = objects.target_of(index), np.zeros_like(masks.mask(index))
            for label, mask, box in zip(target["labels"], target["masks"].numpy(), target["boxes"], strict=True):
                assert not drawn[mask == 1].any()  # digits share no pixel
                drawn[mask == 1] = 1 + int(label)
                rows, columns = np.nonzero(mask)
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box.tolist() == [float(edge) for edge in edges]
            np.testing.assert_array_equal(drawn, masks.mask(index))
    pictures = {segmentation.train.image(index).size for index in range(6)}
    assert pictures <= {(64, 64), (48, 64), (64, 48)}


def test_validation_has_digits_and_parts_of_the_photographs_of_its_own(scenes):
    for name in scenes.PHOTOGRAPHS:
        parts = [scenes.photograph(name, split) for split in ("train", "val")]
        both = np.concatenate(parts, axis=1)
        assert both.shape[1] == sum(part.shape[1] for part in parts)
        assert min(parts[1].shape[:2]) >= 96
        assert parts[0].shape[1] > 2 * parts[1].shape[1]
    train, val = (list(scenes.digits_of(split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (1438, 359)
    seen = {values.tobytes() for values, _ in train}
    assert not any(values.tobytes() in seen for values, _ in val)
