"""Broken images, uneven classes and few labels."""

import pytest
from PIL import Image

from cnx_deploy.core.errors import InputError
from cnx_deploy.data import Dataset, ImageFiles, check_images, class_balance, few_labels, find_dataset, without_broken


def write_images(root, counts, split="train"):
    for name, count in counts.items():
        (root / split / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(root / split / name / f"{index:03}.png")


@pytest.fixture
def root(tmp_path):
    """Twenty training images a class, ten for validation."""
    write_images(tmp_path, {"a": 20, "b": 20})
    write_images(tmp_path, {"a": 10, "b": 10}, "val")
    return tmp_path


def truncate(path):
    path.write_bytes(path.read_bytes()[:40])


def labels_only(train, val=None):
    """A dataset of so many images a class, without files."""
    parts = [
        tuple(label for label, count in enumerate(counts) for _ in range(count)) for counts in (train, val or train)
    ]
    splits = [ImageFiles(tuple(range(len(labels))), labels) for labels in parts]
    return Dataset(tuple("abcdefghijklmnopqrstuvwxyz"[: len(train)]), *splits)


def test_images_that_can_be_read_pass_the_check(root):
    whole = find_dataset(root)
    report = check_images(whole.train)
    assert (report.count, report.broken, report.lines()) == (40, (), ["40 images, all of them readable"])
    assert without_broken(whole)[0] is whole


@pytest.mark.parametrize("workers", [1, 3])
def test_dataset_bad_files_are_found_with_their_reasons(root, workers):
    for name in ("b/003", "a/001"):
        truncate(root / "train" / f"{name}.png")
    (root / "train" / "a" / "002.png").write_text("no image")
    write_images(root, {"c": 60})
    write_images(root, {"c": 1}, "val")
    told = []
    report = check_images(find_dataset(root).train, workers=workers, progress=lambda *done: told.append(done))
    assert told == [(64, 100), (100, 100)]
    assert [image.path for image in report.broken] == [
        str(root / "train" / name) for name in ("a/001.png", "a/002.png", "b/003.png")
    ]
    assert all(image.path in image.reason for image in report.broken)
    assert report.lines(1)[0].startswith("3 of 100 images cannot be read")
    assert report.lines(1)[-1] == "  … and 2 more"


def test_dataset_bad_files_leave_the_others_and_their_labels(root):
    truncate(root / "train" / "a" / "001.png")
    truncate(root / "val" / "b" / "004.png")
    whole = find_dataset(root)
    dataset, report = without_broken(whole)
    assert (report.count, len(report.broken)) == (60, 2)
    assert dataset.train.labels == (0,) * 19 + (1,) * 20
    assert dataset.val.labels == (0,) * 10 + (1,) * 9
    assert set(whole.train.paths) - set(dataset.train.paths) == {root / "train" / "a" / "001.png"}


@pytest.mark.parametrize(("split", "name", "count"), [("train", "training", 5), ("val", "validation", 3)])
def test_dataset_bad_files_above_a_tenth_are_an_error(root, split, name, count):
    for index in range(count - 1):
        truncate(root / split / "a" / f"{index:03}.png")
    assert len(without_broken(find_dataset(root))[1].broken) == count - 1
    truncate(root / split / "b" / "000.png")
    with pytest.raises(InputError, match=f"^{count} of .* {name} images cannot be read, more than 10 %; the first is "):
        without_broken(find_dataset(root))


def test_a_class_that_loses_every_training_image_is_an_error(root):
    write_images(root, {"c": 1})
    write_images(root, {"c": 1}, "val")
    truncate(root / "train" / "c" / "000.png")
    with pytest.raises(InputError, match="No training image of the class c"):
        without_broken(find_dataset(root))


def test_class_balance_counts_both_sides():
    balance = class_balance(labels_only((3, 6), (1, 2)))
    assert (balance.train, balance.val, balance.ratio, balance.warning) == ((3, 6), (1, 2), 2.0, None)
    assert [line.split()[:3] for line in balance.lines()] == [
        ["class", "training", "validation"], ["b", "6", "2"], ["a", "3", "1"], ["all", "9", "3"],
    ]  # fmt: skip


@pytest.mark.parametrize(("counts", "warns"), [((10, 1), False), ((11, 1), True), ((4, 0), True)])
def test_the_warning_comes_above_ten_to_one(counts, warns):
    warning = class_balance(labels_only(counts)).warning
    assert (warning is not None) is warns
    assert not warns or f"a has {counts[0]} training images, b has {counts[1]}" in warning


def test_many_classes_are_told_by_their_extremes():
    lines = list(class_balance(labels_only(tuple(range(1, 27)))).lines())
    assert len(lines) == 13
    assert [line.split()[0] for line in lines[1:6]] == list("zyxwv")
    assert "16 classes between" in lines[6]


def test_few_labels_keeps_so_many_training_images_of_each_class(root):
    whole = find_dataset(root)
    few = few_labels(whole, 3, seed=1)
    assert (few.train.labels, few.val) == ((0, 0, 0, 1, 1, 1), whole.val)
    assert all(
        path.parent.name == few.class_names[label]
        for path, label in zip(few.train.paths, few.train.labels, strict=True)
    )


def test_few_labels_follow_the_seed_and_are_among_those_of_a_larger_number(root):
    whole = find_dataset(root)
    assert few_labels(whole, 3, seed=1) == few_labels(whole, 3, seed=1)
    assert few_labels(whole, 3, seed=1) != few_labels(whole, 3, seed=2)
    assert set(few_labels(whole, 3, seed=1).train.paths) < set(few_labels(whole, 7, seed=1).train.paths)


@pytest.mark.parametrize(("per_class", "message"), [(0, "at least one"), (21, "class a has 20 training images, 21")])
def test_a_number_of_labels_that_cannot_be_had_is_refused(root, per_class, message):
    with pytest.raises(InputError, match=message):
        few_labels(find_dataset(root), per_class)
