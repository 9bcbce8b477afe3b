"""CSV files in place of folders."""

import time

import pytest
import torch
from PIL import Image

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import batches_from_folder, find_dataset, find_images


@pytest.fixture
def folder(tmp_path):
    """Twelve images in images/, a to l."""
    (tmp_path / "images").mkdir()
    for index, name in enumerate("abcdefghijkl"):
        Image.new("RGB", (32, 32), (20 * index, 0, 0)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write(folder, *lines, header="path,label,split", name="data.csv", encoding="utf-8"):
    path = folder / name
    path.write_text("\n".join((header, *lines)) + "\n", encoding=encoding)
    return path


SPLIT = (
    "images/a.png,dog,train",
    "images/b.png,cat,train",
    "images/c.png,dog,val",
    "images/d.png,cat,val",
    "images/e.png,cat,train",
)


def names_of(split):
    return [path.stem for path in split.paths]


def test_a_csv_file_gives_its_splits_with_classes_in_sorted_order(folder):
    dataset = find_dataset(write(folder, *SPLIT))
    assert dataset.class_names == ("cat", "dog")
    assert (names_of(dataset.train), dataset.train.labels) == (["a", "b", "e"], (1, 0, 0))
    assert (names_of(dataset.val), dataset.val.labels) == (["c", "d"], (1, 0))
    assert all(path.is_file() for path in dataset.train.paths)


def test_labels_are_text_and_sorted_as_text(folder):
    rows = [f"images/{name}.png,{label}" for name, label in zip("abcdef", ["10", "9", "07"] * 2, strict=True)]
    assert find_dataset(write(folder, *rows, header="path,label")).class_names == ("07", "10", "9")


def test_a_csv_file_without_splits_is_divided_as_the_same_folder_is(folder):
    for index, path in enumerate(sorted((folder / "images").iterdir())):
        (folder / "by_class" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        path.rename(folder / "by_class" / "ab"[index % 2] / path.name)
    from_folder = find_dataset(folder / "by_class", seed=5, val_share=0.4)
    rows = [
        f"by_class/{path.parent.name}/{path.name},{path.parent.name}"
        for path in find_images(folder / "by_class")[1].paths
    ]
    assert find_dataset(write(folder, *rows, header="path,label"), seed=5, val_share=0.4) == from_folder


def test_test_rows_validate_where_there_is_no_val(folder):
    rows = [row.replace(",val", ",test") for row in SPLIT]
    assert names_of(find_dataset(write(folder, *rows)).val) == ["c", "d"]
    assert names_of(find_dataset(write(folder, *SPLIT, "images/f.png,cat,test")).val) == ["c", "d"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_a_spreadsheet_writes_is_read(folder, encoding):
    rows = ['"images/a.png","Füchse, rot",TRAIN,7', "images/b.png, Hund ,Train,8", "", "images/c.png,Hund,Validation,9"]
    path = write(folder, *rows, header="Path,Label,Split,width", encoding=encoding)
    dataset = find_dataset(path)
    assert (dataset.class_names, len(dataset.train.paths)) == (("Füchse, rot", "Hund"), 2)


def test_columns_may_stand_in_any_order(folder):
    rows = [",".join(reversed(row.split(","))) for row in SPLIT]
    assert find_dataset(write(folder, *rows, header="split,label,path")) == find_dataset(write(folder, *SPLIT))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("images/z.png,cat,train", r"line 3: images/z\.png is no file below"),
        ("images,cat,train", "line 3: images is no file below"),
        ("images/b.png,cat,training", "line 3: there is no split 'training'"),
        ("images/b.png,cat,", "line 3: there is no split ''"),
        ("images/b.png,,train", "line 3: the label is empty"),
        (",cat,train", "line 3: the path is empty"),
        ("images/b.png,cat", "line 3: it has 2 values, the header asks for 3"),
        ("../a.png,cat,train", r"line 3: \.\./a\.png leads outside"),
        ("images/../../a.png,cat,train", "line 3: .* leads outside"),
        ("/etc/hostname,cat,train", "line 3: /etc/hostname leads outside"),
        ("images/./a.png,cat,val", "line 3: .* is on line 2 already"),
        ('"images/b.png"x,cat,train', "no CSV file .* near line 3"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_used_is_refused_with_its_line(folder, row, message):
    with pytest.raises(InputError, match=message):
        find_dataset(write(folder, SPLIT[0], row, *SPLIT[2:]))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("file,label", "line 1: the header has no column path, only file, label"),
        ("images/a.png,cat", "no column path and label"),
        ("path;label", "no column path and label, only path;label"),
        ("", "only nothing"),
        ("path,label,label", "column label twice"),
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_is_refused(folder, header, message):
    with pytest.raises(InputError, match=message):
        find_dataset(write(folder, "images/a.png,cat", header=header))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "no rows below its header"),
        (SPLIT[:2], "no rows with the split val or test"),
        (SPLIT[2:4], "no rows with the split train"),
        ((*SPLIT, "images/f.png,fox,val"), "line 7: the class fox has no row with the split train"),
        (("images/a.png,cat,train", "images/b.png,cat,val"), "the one class cat"),
    ],
    ids=lambda value: str(len(value)),
)
def test_a_file_that_is_no_dataset_is_refused(folder, rows, message):
    with pytest.raises(InputError, match=message):
        find_dataset(write(folder, *rows))


def test_a_class_of_one_image_cannot_be_divided(folder):
    rows = ["images/a.png,cat", "images/b.png,cat", "images/c.png,dog"]
    with pytest.raises(InputError, match="class dog has one image"):
        find_dataset(write(folder, *rows, header="path,label"))


def test_a_missing_file_and_one_in_another_encoding_are_refused(folder):
    with pytest.raises(InputError, match="is not there"):
        find_dataset(folder / "absent.csv")
    with pytest.raises(InputError, match="no text in UTF-8"):
        find_dataset(write(folder, "images/a.png,Füchse,train", encoding="latin-1"))


def test_evaluation_takes_the_validation_rows_and_all_of_a_file_without_splits(folder):
    names, images = find_images(write(folder, *SPLIT))
    assert (names, names_of(images)) == (("cat", "dog"), ["c", "d"])
    without = [row.rpartition(",")[0] for row in SPLIT]
    assert len(find_images(write(folder, *without, header="path,label"))[1].paths) == 5


def test_batches_of_a_csv_file_are_its_validation_rows(folder):
    ((pixels, labels, paths),) = batches_from_folder(write(folder, *SPLIT), Preprocessing(32), 4)
    assert (labels.tolist(), [path.stem for path in paths]) == ([1, 0], ["c", "d"])
    assert torch.equal(pixels[:, 0, 0, 0], torch.tensor([40, 60], dtype=torch.uint8))


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_seconds(tmp_path):
    rows = [f"{index % 100}/{index}.png,{index % 100}" for index in range(100_000)]
    for name in range(100):
        (tmp_path / str(name)).mkdir()
    for row in rows:
        (tmp_path / row.partition(",")[0]).touch()
    path = write(tmp_path, *rows, header="path,label")
    start = time.process_time()
    assert len(find_dataset(path).train.paths) == 80_000
    assert time.process_time() - start < 10.0
