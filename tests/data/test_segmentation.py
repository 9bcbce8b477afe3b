"""Pictures with masks as people keep them: arrangements, values, sizes, names of classes, and what is left out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import find_dataset, images_to_run, without_broken
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.data.segmentation import (
    MaskReading,
    find_segmentation_dataset,
    find_segmentation_images,
    has_masks,
    pixel_counts,
    pixel_lines,
    read_mask,
)

CANVAS = Preprocessing((32, 64), 1.0, "nearest", crop_mode="corner")


def write_pair(image: Path, mask: Path, values: np.ndarray, mode: str = "L") -> None:
    """A picture whose red is 20 times the class of each pixel, and its mask in a mode."""
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    red = (values.astype(np.uint8) * 20)[..., None] * np.array([1, 0, 0], np.uint8)
    Image.fromarray(red.astype(np.uint8)).save(image)
    stored = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        stored.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    stored.save(mask)


def classes(seed: int = 0, size: tuple[int, int] = (20, 40), most: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most, size)


ARRANGEMENTS = {
    "ade": ("images/{long}/{name}.jpg", "annotations/{long}/{name}.png"),
    "masks": ("images/{split}/{name}.png", "masks/{split}/{name}.png"),
    "inside": ("{split}/images/{name}.png", "{split}/masks/{name}_mask.png"),
    "cityscapes": ("leftImg8bit/{split}/a/{name}_leftImg8bit.png", "gtFine/{split}/a/{name}_gtFine_labelIds.png"),
    "deep": ("Images/{split}/x/y/{name}.bmp", "Labels/{split}/x/y/{name}.tif"),
    "voc": ("JPEGImages/{name}.jpg", "SegmentationClass/{name}.png"),
}


def arranged(root: Path, kind: str, train: int = 3, val: int = 2) -> Path:
    long = {"train": "training", "val": "validation"}
    for split, count in (("train", train), ("val", val)):
        for at in range(count):
            words = {"split": split, "long": long[split], "name": f"{split}{at}"}
            image, mask = (root / template.format(**words) for template in ARRANGEMENTS[kind])
            write_pair(image, mask, classes(at))
        if kind == "voc":
            lists = root / "ImageSets" / "Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("\n".join(f"{split}{at}" for at in range(count)) + "\n")
    return root


@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_every_arrangement_gives_the_same_pairs(tmp_path, kind):
    dataset = find_segmentation_dataset(arranged(tmp_path, kind))
    assert has_masks(tmp_path)
    assert (dataset.class_names, len(dataset.train), len(dataset.val)) == (("0", "1", "2", "3"), 3, 2)
    for split, images in (("train", dataset.train), ("val", dataset.val)):
        for at in range(len(images)):
            assert f"{split}{at}" in images.paths[at].name
            assert f"{split}{at}" in images.masks[at].name
            np.testing.assert_array_equal(images.mask(at), classes(at))
    assert find_segmentation_images(tmp_path).masks == dataset.val.masks
    assert all("left out" not in note for note in dataset.notes), dataset.notes


def test_a_folder_without_a_split_is_divided_by_the_seed(tmp_path):
    for at in range(10):
        write_pair(tmp_path / "images" / f"{at}.png", tmp_path / "masks" / f"{at}.png", classes(at))
    first, again, other = (find_segmentation_dataset(tmp_path, seed=seed) for seed in (0, 0, 1))
    assert (first.train.paths, len(first.train), len(first.val)) == (again.train.paths, 8, 2)
    assert first.val.paths != other.val.paths
    assert not set(first.train.paths) & set(first.val.paths)
    assert len(find_segmentation_images(tmp_path)) == 10


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_values_are_classes_in_every_mode_and_a_palette_does_not_count(tmp_path, mode):
    values = classes(most=7)
    values[0, 0] = 255
    write_pair(tmp_path / "image.png", tmp_path / "mask.png", values, mode)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), values)
    reduced = np.where(np.isin(values, (0, 255)), 255, values - 1)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", reduce_zero_label=True), reduced)


def test_masks_that_are_no_class_numbers_are_refused_with_the_reason(tmp_path):
    Image.new("RGB", (8, 8), (128, 0, 0)).save(tmp_path / "colours.png")
    Image.new("L", (8, 8), 3).save(tmp_path / "lossy.jpg")
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "many.png")
    Image.fromarray(np.array([[1, 65535]], np.uint16)).save(tmp_path / "deep.png")
    for name, message in (("colours.png", "which colour"), ("lossy.jpg", "lossless"), ("many.png", "from 0 to 254")):
        with pytest.raises(InputError, match=message):
            read_mask(tmp_path / name)
    assert read_mask(tmp_path / "deep.png").tolist() == [[1, 255]]


def test_what_has_no_partner_is_counted_and_named(tmp_path):
    root = arranged(tmp_path, "cityscapes")
    write_pair(root / "leftImg8bit/train/a/alone_leftImg8bit.png", root / "gtFine/train/a/lost_labelIds.png", classes())
    for ending in ("labelTrainIds", "color", "instanceIds"):
        Image.new("L", (40, 20), 1).save(root / f"gtFine/train/a/train0_gtFine_{ending}.png")
    dataset = find_segmentation_dataset(root)
    notes = " ".join(dataset.train.notes)
    assert "1 of 4 files left out: 1 without a mask (alone_leftImg8bit.png)" in notes
    assert "3 without an image" in notes
    assert "1 second mask of an image (train0_gtFine_labelIds.png)" in notes
    assert dataset.train.masks[0].name == "train0_gtFine_labelTrainIds.png"


def test_masks_of_one_image_by_one_ending_are_refused(tmp_path):
    write_pair(tmp_path / "images/a.png", tmp_path / "masks/a.png", classes())
    Image.new("L", (40, 20), 1).save(tmp_path / "masks/a.tif")
    with pytest.raises(InputError, match="have one name"):
        find_segmentation_images(tmp_path)
    (tmp_path / "masks/a.tif").unlink()
    for name in ("a_mask", "b_mask"):
        Image.new("L", (40, 20), 1).save(tmp_path / f"masks/{name}.png")
    assert "second mask of an image (a_mask.png)" in " ".join(find_segmentation_images(tmp_path).notes)
    write_pair(tmp_path / "images/b_img.png", tmp_path / "masks/b_img_mask.png", classes())
    with pytest.raises(InputError, match="both masks of b_img"):
        find_segmentation_images(tmp_path)


def test_names_come_from_a_file_and_ade20ks_table_asks_for_the_shift(tmp_path):
    root = arranged(tmp_path, "ade")
    (root / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t9\t9\t1\twall\n2\t0.1\t9\t9\t1\tbuilding, edifice\n"
        "3\t0.1\t9\t9\t1\tsky\n"
    )
    with pytest.raises(InputError, match="--reduce-zero-label"):
        find_segmentation_dataset(root)
    dataset = find_segmentation_dataset(root, reading=MaskReading(reduce_zero_label=True))
    assert dataset.class_names == ("wall", "building", "sky")
    values = classes(0)
    np.testing.assert_array_equal(dataset.train.mask(0), np.where(values == 0, 255, values - 1))
    given = find_segmentation_dataset(root, reading=MaskReading(("no", "wall", "building", "sky")))
    assert given.class_names == ("no", "wall", "building", "sky")
    (root / "classes.txt").write_text("a\nb\nc\n")  # taken before the table
    with pytest.raises(InputError, match=r"holds the value 3, and there are 3 classes, stored as 0 to 2"):
        find_segmentation_dataset(root).train.mask(0)


def test_pictures_and_classes_land_on_the_canvas_together_and_padding_is_not_counted(tmp_path):
    images = find_segmentation_images(arranged(tmp_path, "masks"))
    batch = next(iter(images.batches(CANVAS, InputSpec("uint8", (32, 64)), 2)))
    assert (batch.labels.shape, batch.labels.dtype) == ((2, 32, 64), torch.int64)
    counted = batch.labels != 255
    assert torch.equal(batch.images[..., 0][counted].long(), 20 * batch.labels[counted])
    assert bool(counted[:, :32, :64].all())
    tall = Preprocessing((64, 64), 1.0, crop_mode="corner")
    _, target = images.sample(0, tall)
    assert bool((target[32:] == 255).all())
    assert not bool((target[:32] == 255).any())


def test_a_mask_of_another_size_is_a_broken_image(tmp_path):
    root = arranged(tmp_path, "masks", train=12)
    Image.new("L", (41, 20), 1).save(root / "masks/train/train3.png")
    dataset = find_segmentation_dataset(root)
    with pytest.raises(InputError, match="40x20 pixels and its mask"):
        dataset.train.pair([path.stem for path in dataset.train.masks].index("train3"))
    kept, report = without_broken(dataset)
    assert (len(kept.train), len(kept.train.masks), len(kept.val), len(report.broken)) == (11, 11, 2, 1)
    assert "train3" not in {path.stem for path in kept.train.masks}
    assert find_dataset  # the classifier's own data are read as before


def test_the_shares_of_the_pixels_are_told_by_class(tmp_path):
    dataset = find_segmentation_dataset(arranged(tmp_path, "masks"), reading=MaskReading(("a", "b", "c", "d", "none")))
    expected = sum(np.bincount(classes(at).ravel(), minlength=255) for at in range(3))
    np.testing.assert_array_equal(pixel_counts(dataset.train), expected)
    lines = list(pixel_lines(dataset))
    assert any("b " in line and f"{100 * expected[1] / expected.sum():.3f} %" in line for line in lines)
    assert "1 classes have no training pixel" in lines[-1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no folder of pictures with one of masks"),
        ({"images/train/a.png": 1, "masks/train/a.png": 1}, "none of val"),
        ({"images/train/a.png": 1, "images/val/a.png": 1, "masks/train/a.png": 1}, "is not a folder"),
        ({"images/a.png": 1, "masks/b.png": 1}, "No image of"),
        ({"images/a.png": 1, "masks/a.png": 1}, "takes two"),
        ({"images/a.png": 0, "masks/a.png": 255, "images/b.png": 0, "masks/b.png": 0}, "write 1 in its place"),
    ],
    ids=str,
)
def test_a_folder_that_is_no_segmentation_dataset_is_refused(tmp_path, files, message):
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), value).save(tmp_path / name)
    with pytest.raises(InputError, match=message):
        find_segmentation_dataset(tmp_path)


def test_work_without_labels_takes_the_pictures_and_not_their_masks(tmp_path):
    root = arranged(tmp_path / "data", "masks")
    taken = images_to_run(root, targets="masks")
    assert {path.parent.parent.name for path in taken.paths} == {"images"}
    loose = tmp_path / "loose"
    loose.mkdir()
    Image.new("RGB", (8, 8)).save(loose / "a.png")
    plain = images_to_run(loose, targets="masks")
    assert (len(plain), plain.class_names) == (1, ())
