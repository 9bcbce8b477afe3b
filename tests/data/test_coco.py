"""Images with objects from COCO's JSON: masks beside pycocotools', boxes on the canvas, what is left out."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import without_broken
from cnx_deploy.data.coco import (
    RunLengths,
    find_instance_dataset,
    find_instance_images,
    instance_lines,
    object_mask,
)
from cnx_deploy.data.input_spec import InputSpec

WIDTH, HEIGHT = 60, 40
POLYGON = [10.0, 5.0, 30.5, 6.0, 28.0, 25.0, 12.0, 22.0]
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]


def annotation(image: int, category: int = 2, box=(10, 5, 20.5, 20), **more) -> dict:
    return {
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "segmentation": [POLYGON],
        "area": 300,
    } | more


def write_coco(path: Path, images: Path, count: int = 3, annotations: list | None = None, **more) -> Path:
    """A COCO file and its pictures, whose red is the number of the image."""
    images.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [{"id": 10 + at, "file_name": f"{at}.png", "width": WIDTH, "height": HEIGHT} for at in range(count)]
    for at in range(count):
        Image.new("RGB", (WIDTH, HEIGHT), (at, 0, 0)).save(images / f"{at}.png")
    given = [annotation(10), annotation(10, 7), annotation(11)] if annotations is None else annotations
    path.write_text(json.dumps({"images": names, "annotations": given, "categories": CATEGORIES} | more))
    return path


def write_both(root: Path, **more) -> Path:
    for split in ("train", "val"):
        write_coco(root / f"annotations/instances_{split}2017.json", root / f"{split}2017", **more)
    return root


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("annotations/instances_{}2017.json", "{}2017"), ("annotations/{}.json", "images/{}"),
        ("{}/_annotations.coco.json", "{}"), ("{}.json", "images"),
    ],
)  # fmt: skip
def test_every_arrangement_gives_images_and_objects(tmp_path, file, folder):
    for split in ("train", "valid" if file.startswith("{}/") else "val"):
        write_coco(tmp_path / file.format(split), tmp_path / folder.format(split))
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    dataset = find_instance_dataset(tmp_path)
    assert dataset.class_names == ("cat", "dog")  # by their ids
    assert (len(dataset.train), len(dataset.val)) == (3, 3)
    assert [[each.label for each in objects] for objects in dataset.train.objects] == [[0, 1], [0], []]
    assert dataset.train.class_counts() == {0: 2, 1: 1}
    assert "1 of 3 images have no object; they are kept." in dataset.notes
    assert find_instance_images(tmp_path).paths == dataset.val.paths


def test_masks_of_polygons_and_run_lengths_are_pycocotools():
    random = np.random.default_rng(0)
    for _ in range(20):
        polygons = [random.uniform(-5, 65, 2 * corners).tolist() for corners in (3, 8)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy's, within the library
            expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH)))
        np.testing.assert_array_equal(object_mask(polygons, (WIDTH, HEIGHT), ""), expected)
        drawn = np.asfortranarray((random.random((HEIGHT, WIDTH)) < random.random()).astype(np.uint8))
        text = coco_mask.encode(drawn)["counts"].decode()
        runs = np.flatnonzero(np.diff(np.concatenate([[2], drawn.ravel(order="F"), [2]])))
        counts = np.diff(runs).tolist()
        counts = counts if drawn[0, 0] == 0 else [0, *counts]
        for stored in (text, counts):
            made = object_mask(RunLengths((HEIGHT, WIDTH), stored), (WIDTH, HEIGHT), "")
            np.testing.assert_array_equal(made, drawn)


@pytest.mark.parametrize(
    "outline",
    [
        RunLengths((HEIGHT, WIDTH), [WIDTH * HEIGHT + 1]), RunLengths((HEIGHT, WIDTH), [-1, WIDTH * HEIGHT + 1]),
        RunLengths((WIDTH, HEIGHT), [WIDTH * HEIGHT]), RunLengths((HEIGHT, WIDTH), "zzzz"),
        [[0.0, 1.0, float("nan"), 3.0, 4.0, 5.0]], [[0.0, 1.0, 1e30, 3.0, 4.0, 5.0]], [[0.0] * 7],
    ],
    ids=str,
)  # fmt: skip
def test_outlines_that_are_none_are_refused_before_any_library_sees_them(outline):
    with pytest.raises(InputError, match="Export the annotations again"):
        object_mask(outline, (WIDTH, HEIGHT), "image")


def test_a_sample_has_the_canvas_and_its_objects_in_the_pixels_of_the_picture(tmp_path):
    images = find_instance_images(write_both(tmp_path))
    preprocessing = Preprocessing((80, 160), 1.0, "nearest", crop_mode="corner")
    batch = next(iter(images.batches(preprocessing, InputSpec("uint8", (80, 160)), 2)))
    assert isinstance(batch.labels, list)
    first = batch.labels[0]
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        "boxes": (2, 4), "labels": (2,), "masks": (2, HEIGHT, WIDTH), "iscrowd": (2,), "area": (2,), "place": (4,),
        "size": (2,),
    }  # fmt: skip
    own = images.target_of(0, crowds=True)
    assert all(torch.equal(first[name], own[name]) for name in own)
    assert (first["place"].tolist(), first["size"].tolist()) == ([2.0, 2.0, 0.0, 0.0], [WIDTH, HEIGHT])
    assert batch.labels[1]["boxes"].shape == (1, 4)
    assert images.sample(2, preprocessing)[1]["masks"].shape == (0, HEIGHT, WIDTH)


def test_what_cannot_be_learned_from_is_counted_and_named(tmp_path):
    given = [
        annotation(10), annotation(10, iscrowd=1, segmentation={"size": [HEIGHT, WIDTH], "counts": [0, 2400]}),
        annotation(99), annotation(10, 5), annotation(11, box=(3, 3, 0, 5)), annotation(11, segmentation=[]),
        annotation(11, box=(50, 30, 40, 40)), annotation(11, box=(100, 3, 4, 5)),
    ]  # fmt: skip
    dataset = find_instance_dataset(write_both(tmp_path, annotations=given))
    notes = " ".join(dataset.train.notes)
    for words in (
        "1 objects of an image that the file does not have", "1 objects of a category that", "1 regions are crowds",
        "2 objects without a box in its image", "1 objects without an outline",
        "1 boxes reach more than a pixel beyond",
    ):  # fmt: skip
        assert words in notes
    assert dataset.train.class_counts() == {0: 2}
    assert len(dataset.train.target_of(0)["labels"]) == 1  # nothing is learned from the crowd
    counted = dataset.train.target_of(0, crowds=True)
    assert (counted["iscrowd"].tolist(), int(counted["masks"][1].sum())) == ([0, 1], WIDTH * HEIGHT)
    assert dataset.train.target_of(1)["boxes"].tolist() == [[50.0, 30.0, 60.0, 40.0]]
    assert "2 objects" in next(iter(instance_lines(dataset)))


def test_a_file_without_outlines_gives_boxes_alone(tmp_path):
    dataset = find_instance_dataset(write_both(tmp_path, annotations=[annotation(10, segmentation=[])]))
    assert not dataset.train.has_outlines
    assert dataset.train.target_of(0).keys() == {"boxes", "labels"}
    assert "boxes alone" in " ".join(dataset.notes)


def test_pictures_that_are_missing_or_of_another_size_are_left_out(tmp_path):
    root = write_both(tmp_path, count=12)
    (root / "train2017" / "5.png").unlink()
    Image.new("RGB", (8, 8)).save(root / "train2017" / "7.png")
    dataset = find_instance_dataset(root)
    assert "1 of 12 images are not there and are left out, the first is 5.png." in dataset.notes
    kept, report = without_broken(dataset)
    assert (len(kept.train), len(kept.val), len(report.broken)) == (10, 12, 1)
    assert "8x8 pixels and its objects are of an image of 60x40" in report.broken[0].reason
    assert len(kept.train.objects) == len(kept.train.sizes) == 10


def test_one_file_is_divided_by_the_seed(tmp_path):
    path = write_coco(tmp_path / "all.json", tmp_path / "pictures", count=10)
    first, other = (find_instance_dataset(path, seed=seed, image_folder=tmp_path / "pictures") for seed in (0, 1))
    assert (len(first.train), len(first.val)) == (8, 2)
    assert first.val.paths != other.val.paths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no COCO file of objects"), ("{", "cannot be read as COCO's JSON"),
        (json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": ""}]}), "names its categories"),
        (json.dumps({"images": [], "annotations": [], "categories": CATEGORIES}), "--image-folder"),
        (json.dumps({"images": [], "annotations": [annotation(1, box=("a", 1, 2, 3))], "categories": []}), "bbox"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_coco_is_refused(tmp_path, text, message):
    (tmp_path / "val.json").write_text(text)
    with pytest.raises(InputError, match=message):
        find_instance_images(tmp_path)


def test_splits_with_other_categories_and_several_files_of_one_split_are_refused(tmp_path):
    root = write_both(tmp_path)
    write_coco(root / "annotations/instances_val2017.json", root / "val2017", categories=CATEGORIES[:1], annotations=[])
    with pytest.raises(InputError, match="other categories"):
        find_instance_dataset(root)
    write_coco(root / "annotations/instances_val2014.json", root / "val2017")
    with pytest.raises(InputError, match="several annotations of val"):
        find_instance_dataset(root)
