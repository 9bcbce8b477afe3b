"""Several labels an image are read as tables, tag files and class folders hold them, and what is unclear is refused."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import InputSpec, check_images, class_balance, find_dataset, find_images, without_broken
from cnx_deploy.training.images import BatchMix

LABELS = (("cat", "traffic light"), (), ("dog",), ("cat", "dog"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files 0.png to 3.png, each of its own grey."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * index, np.uint8)).save(folder / f"{index}.png")
    return folder


def table(images: Path, header: str, *rows: object, name: str = "labels.csv", delimiter: str = ",") -> Path:
    """A CSV file beside the images, as csv writes the cells."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(header.split(delimiter))
    writer.writerows([[f"{index}.png", *(row if isinstance(row, tuple) else (row,))] for index, row in enumerate(rows)])
    (images / name).write_text(stream.getvalue())
    return images / name


def named(found) -> list[set[str]]:
    return [{found.class_names[at] for at in labels} for labels in found.label_sets]


@pytest.mark.parametrize(
    ("header", "rows", "understood"),
    [
        ("path,labels", ("cat;traffic light", "", "dog", "dog; cat"), "labels separated by ;"),
        ("image,tags", ("cat, traffic light", "", "dog", "cat,dog"), "labels separated by ,"),
        ("filename,label", ("cat|traffic light", "", "dog", "dog|cat"), "labels separated by |"),
        ("img,classes", ("cat;traffic light", " ", "dog", "cat;dog"), "labels separated by ;"),
        (
            "image,cat,dog,traffic light",
            ((1, 0, 1), (0, 0, 0), ("0.0", "1.0", "0"), ("true", "True", "false")),
            "3 columns as one class each",
        ),
    ],
    ids=["semicolons", "commas", "pipes", "blank", "columns"],
)
def test_a_table_gives_the_labels_of_each_image_and_says_how_it_was_read(images, header, rows, understood):
    found = find_images(table(images, header, *rows), multi_label=True)
    assert named(found) == list(map(set, LABELS))
    assert found.class_names == ("cat", "dog", "traffic light")
    assert understood in found.notes[0]


def test_spaces_separate_tags_only_where_nothing_else_does(images):
    spaced = find_images(table(images, "image_name,tags", "haze primary", "haze", "", "primary haze"), multi_label=True)
    assert named(spaced) == [{"haze", "primary"}, {"haze"}, set(), {"haze", "primary"}]
    assert "labels separated by spaces" in spaced.notes[0]
    kept = find_images(table(images, "image_name,tags", "haze primary", "haze;clear", "", ""), multi_label=True)
    assert named(kept)[0] == {"haze primary"}


def test_a_tag_file_beside_each_image_gives_its_labels(images, tmp_path):
    shutil.copytree(images, tmp_path / "5_subject", ignore=lambda *_: ["labels.csv"])
    for index, labels in enumerate(LABELS):
        (tmp_path / "5_subject" / f"{index}.txt").write_text(", ".join(labels) + "\n" * index)
    (tmp_path / "classes.txt").write_text("cat\n")
    found = find_images(tmp_path, multi_label=True)
    assert named(found) == list(map(set, LABELS))
    assert "tag files (.txt) beside the images, labels separated by ," in found.notes[0]
    assert "1 .txt" in found.notes[1], "the file of no image is told"
    (tmp_path / "5_subject" / "2.txt").unlink()
    with pytest.raises(InputError, match=r"1 of 4 images have no \.txt file beside them, the first is .*2\.png"):
        find_images(tmp_path, multi_label=True)


def test_an_image_in_several_class_folders_has_all_their_labels(images, tmp_path):
    for name, members in {"cat": (0, 3), "dog": (2, 3)}.items():
        (tmp_path / name).mkdir()
        for index in members:
            shutil.copy(images / f"{index}.png", tmp_path / name)
    found = find_images(tmp_path, multi_label=True)
    assert {Path(found.name(at)).name: labels for at, labels in enumerate(named(found))} == {
        "0.png": {"cat"}, "2.png": {"dog"}, "3.png": {"cat", "dog"},
    }  # fmt: skip
    shutil.copy(images / "1.png", tmp_path / "cat" / "2.png")
    with pytest.raises(InputError, match=r"cat.2\.png and .*dog.2\.png have one name and different content"):
        find_images(tmp_path, multi_label=True)
    shutil.copy(images / "1.png", tmp_path)
    with pytest.raises(InputError, match="lies in no class folder"):
        find_images(tmp_path, multi_label=True)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path,tags", ("cat;cat", "", "", ""), r"line 2: the label 'cat' is there twice"),
        ("path,tags", ("cat;dog", "cat;;dog", "", ""), "line 3: a label is empty"),
        ("path,tags", ("cat;", "", "", ""), "line 2: a label is empty"),
        ("path,tags", ("['cat', 'dog']", "", "", ""), "opens a list"),
        ("path,tags", ("0 0.51 0.25", "", "", ""), "boxes of a detector"),
        ("path,cat,dog", ((1, -1), (0, 0), (0, 0), (0, 0)), "line 2: dog is '-1'"),
        ("path,cat,dog", ((1, ""), (0, 0), (0, 0), (0, 0)), "line 2: dog is ''"),
        ("path,tags,labels", (("a", "b"),) * 4, "the header has tags and labels"),
        ("path,tags", ("x" * 300, "", "", ""), "longer than 255"),
    ],
)
def test_a_table_that_is_not_clear_is_refused_with_its_line(images, header, rows, message):
    with pytest.raises(InputError, match=message):
        find_images(table(images, header, *rows), multi_label=True)


def test_a_classifiers_reader_refuses_several_labels_and_names_the_task(images):
    for path in (
        table(images, "path,label", *("a|b",) * 4), table(images, "path,a,b", *((1, 1),) * 4),
    ):  # fmt: skip
        with pytest.raises(InputError, match="--task multi-label takes several"):
            find_dataset(path)


def test_splits_are_those_of_the_column_or_of_the_folders_or_drawn_without_a_labels_last_image(images, tmp_path):
    rows = (("cat;rare", "train"), ("", "val"), ("dog", "val"), ("cat", "train"))
    dataset = find_dataset(table(images, "path,tags,split", *rows), multi_label=True)
    assert (named(dataset.train), named(dataset.val)) == ([{"cat", "rare"}, {"cat"}], [set(), {"dog"}])
    assert any("1 of 3 labels have no training images, so that they are not learned: dog." in n for n in dataset.notes)
    for split, members in {"train": (0, 2), "Val": (3,)}.items():
        (tmp_path / split).mkdir()
        for index in members:
            shutil.copy(images / f"{index}.png", tmp_path / split)
            (tmp_path / split / f"{index}.txt").write_text(",".join(LABELS[index]))
    dataset = find_dataset(tmp_path, multi_label=True)
    assert (named(dataset.train), named(dataset.val)) == ([{"cat", "traffic light"}, {"dog"}], [{"cat", "dog"}])
    assert named(find_images(tmp_path, multi_label=True)) == [{"cat", "dog"}]
    path = table(images, "path,tags", "cat;rare", "cat", "cat", "cat")
    for seed in range(8):
        drawn = find_dataset(path, seed=seed, val_share=0.25, multi_label=True)
        assert (len(drawn.val), named(drawn.val)) == (1, [{"cat"}])
    assert len({drawn.val.paths for drawn in (find_dataset(path, seed=s, multi_label=True) for s in range(8))}) > 1


def test_targets_are_vectors_of_zeros_and_ones_in_batches_and_choices(images):
    found = find_images(table(images, "path,tags", "cat;traffic light", "", "dog", "cat;dog"), multi_label=True)
    expected = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]).float()
    (batch,) = found.batches(Preprocessing(32), InputSpec("uint8", 32))
    assert torch.equal(batch.labels, expected)
    assert torch.equal(found.subset([3, 1]).target(0), expected[3])
    assert found.class_counts() == {0: 2, 1: 2, 2: 1}


def test_labels_are_counted_and_kept_where_images_cannot_be_read(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "1.png").write_bytes(b"\x89PNG broken")
    rows = (("cat;dog", "train"), ("", "train"), ("dog", "val"), ("cat", "train"))
    dataset = find_dataset(table(tmp_path / "images", "path,tags,split", *rows), multi_label=True)
    kept, report = without_broken(dataset, most=0.5)
    assert (len(report.broken), named(kept.train)) == (1, [{"cat", "dog"}, {"cat"}])
    balance = class_balance(kept)
    assert (balance.train, balance.val) == ((2, 1), (0, 1))
    assert check_images(kept.train).broken == ()


def test_mixing_mixes_the_labels_of_both_images_by_the_share_of_each():
    images, labels = torch.rand(4, 3, 8, 8), torch.randint(0, 2, (4, 6)).float()
    torch.manual_seed(3)
    mixed, targets = BatchMix(0.8, 0.0, 6)(images, labels)
    share = float(((mixed - images.roll(1, 0)) / (images - images.roll(1, 0))).median())
    torch.testing.assert_close(targets, share * labels + (1 - share) * labels.roll(1, 0))
    assert 0.0 < share < 1.0
    torch.manual_seed(3)
    expected = v2.MixUp(alpha=0.8, num_classes=6)
    torch.manual_seed(3)
    torch.testing.assert_close(targets, v2.RandomChoice([expected])(images, labels)[1])
