"""CSV files of labelled images: read as they are meant, or refused with the line that is wrong."""

import csv
import io
import itertools
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnx_deploy.core.class_names import MAX_NAME
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import find_dataset, find_images
from cnx_deploy.data.csv_dataset import COLUMNS, MAX_LINE, CsvDataset, read_csv
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from tests.conftest import Command
from tests.support.lies import FEW, QUICK, check_command, put, refused, result_or_error, spoilt
from tests.support.training_data import write_colours


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


def test_a_csv_file_without_splits_is_divided_as_the_same_folder_is(folder):
    for index, path in enumerate(sorted((folder / "images").iterdir())):
        (folder / "by_class" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        path.rename(folder / "by_class" / "ab"[index % 2] / path.name)
    from_folder = find_dataset(folder / "by_class", seed=5, val_share=0.4)
    rows = [
        f"by_class/{path.parent.name}/{path.name},{path.parent.name}" for path in find_images(folder / "by_class").paths
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


def test_columns_may_stand_in_any_order_and_labels_are_sorted_as_text(folder):
    rows = [",".join(reversed(row.split(","))) for row in SPLIT]
    assert find_dataset(write(folder, *rows, header="split,label,path")) == find_dataset(write(folder, *SPLIT))
    rows = [f"images/{name}.png,{label}" for name, label in zip("abcdef", ["10", "9", "07"] * 2, strict=True)]
    assert find_dataset(write(folder, *rows, header="path,label")).class_names == ("07", "10", "9")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "no rows below its header"),
        (SPLIT[:2], "no rows with the split val or test"),
        (SPLIT[2:4], "no rows with the split train"),
        ((*SPLIT, "images/f.png,fox,val"), "line 7: the class fox has no row with the split train"),
        (("images/a.png,cat,train", "images/b.png,cat,val"), "images of 1 class; a classifier needs at least two"),
    ],
    ids=lambda value: str(len(value)),
)
def test_a_file_that_is_no_dataset_is_refused(folder, rows, message):
    with pytest.raises(InputError, match=message):
        find_dataset(write(folder, *rows))


def test_a_class_of_one_image_is_trained_on_and_said_to_be_without_validation(folder):
    rows = ["images/a.png,cat", "images/b.png,cat", "images/c.png,dog"]
    dataset = find_dataset(write(folder, *rows, header="path,label"))
    assert (dataset.train.labels, dataset.val.labels) == ((0, 1), (0,))
    assert any("no validation images: dog" in note for note in dataset.notes)
    with pytest.raises(InputError, match="None of the 2 classes has two images"):
        find_dataset(write(folder, *rows[1:], header="path,label"))


def test_evaluation_takes_the_validation_rows_and_all_of_a_file_without_splits(folder):
    images = find_images(write(folder, *SPLIT))
    assert (images.class_names, names_of(images), images.labels) == (("cat", "dog"), ["c", "d"], (1, 0))
    assert torch.equal(images.pixels(1, Preprocessing(32))[0, 0], torch.tensor([60, 0, 0], dtype=torch.uint8))
    without = [row.rpartition(",")[0] for row in SPLIT]
    assert len(find_images(write(folder, *without, header="path,label")).paths) == 5


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


# --- what may not stand in one ---------------------------------------------------------------------------------------

NAMES = ("val/red/0.png", "val/red/1.png", "val/blue/0.png", "val/blue/1.png")
SOUND = "path,label,split\n" + "".join(
    f"{name},{name.split('/')[1]},{'train' if '0' in name else 'val'}\n" for name in NAMES
)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of two classes, one with an odd name, and a file and a folder outside."""
    root = write_colours(tmp_path_factory.mktemp("data") / "images", 1, 2)
    (root / 'odd, "é\n.png').write_bytes((root / NAMES[0]).read_bytes())
    for name in ("../outside.png", "twin.png", "twin.jpg"):
        (root / name).write_bytes((root / NAMES[0]).read_bytes())
    return root


def read(colours: Path, content: bytes | str) -> CsvDataset:
    return read_csv(put(colours / "data.csv", content.encode() if isinstance(content, str) else content))


def test_what_the_csv_module_writes_is_read_as_it_was_written(colours: Path) -> None:
    rows = [
        (name, label) for name, label in zip((*NAMES, 'odd, "é\n.png'), ("a,b", '"', "é", "日本", "a,b"), strict=True)
    ]
    for dialect in ("excel", "unix"):
        stream = io.StringIO(newline="")
        csv.writer(stream, dialect).writerows([("path", "label"), *rows])
        found = read(colours, stream.getvalue())
        labels = [found.class_names[at] for at in found.splits[""].labels]
        assert list(zip(found.splits[""].paths, labels, strict=True)) == [
            (colours / name, label) for name, label in rows
        ]


LABELS = ("red", "red", "blue", "blue")
FORMS = {
    "as windows writes it": ("path,label", [name.replace("/", "\\") for name in NAMES], LABELS),
    "ids": ("image_id,label", [name.removesuffix(".png") for name in NAMES], LABELS),
    "semicolons": ("path;label", NAMES, LABELS),
    "tabs": ("path\tlabel", NAMES, LABELS),
    "a comma in a name": ("file;class, or kind;class", NAMES, [f"x, y;{label}" for label in LABELS]),
    "semicolons in quotes": ('"path","label","a;b;c;d"', NAMES, [f"{label},x" for label in LABELS]),
    "one-hot": ("filename,red,blue,fox", NAMES, ["1,0,0", "1.0,0.0,0", "0,True,0", "0,1,0"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_tables_as_people_have_them_are_read_as_the_plain_one_is(colours: Path, form: str) -> None:
    header, paths, labels = FORMS[form]
    delimiter = "," if '"' in header else next(sign for sign in ";\t," if sign in header)
    found = read(colours, "\n".join([header, *map(delimiter.join, zip(paths, labels, strict=True))])).splits[""]
    assert found.paths == tuple(colours / name for name in NAMES)
    assert tuple(found.class_names[label] for label in found.labels) == LABELS
    assert found.class_names == (("blue", "fox", "red") if form == "one-hot" else ("blue", "red"))


@pytest.mark.parametrize(
    ("column", "name"), [(column, name) for column in ("path", "label") for name in COLUMNS[column]]
)
def test_each_usual_column_name_is_known_and_what_was_understood_is_said(colours: Path, column: str, name: str) -> None:
    header = {"path": "path", "label": "label", column: name.title()}
    found = read(colours, f"{header['label']};more;{header['path']}\nred;1;val/red/0.png\n").splits[""]
    assert found.paths == (colours / NAMES[0],)
    (note,) = found.notes
    assert note.endswith(f"data.csv: column {header['path']} as path, column {header['label']} as label, delimiter ;.")


def test_absolute_paths_are_taken_wherever_they_lead(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = colours.parent / "outside.png"
    found = read(colours, f"path,label\n{outside},red\n{colours / NAMES[0]},red\n").splits[""]
    assert found.paths == (outside, colours / NAMES[0])
    with pytest.raises(InputError, match="is on line 2 already"):
        read(colours, f"path,label\n{colours / NAMES[0]},red\n{NAMES[0]},red\n")
    monkeypatch.chdir(colours)
    with pytest.raises(InputError, match="is on line 2 already"):
        read_csv(Path("data.csv"))


def test_a_stem_is_that_of_an_image_and_a_file_of_the_very_name_goes_before(colours: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.txt", "b", "b.png", "c.d.png"):
        (tmp_path / name).write_bytes((colours / NAMES[0]).read_bytes())
    found = read(tmp_path, "image_id,label\na,x\nb,x\nc.d,x\n").splits[""]
    assert [path.name for path in found.paths] == ["a.png", "b", "c.d.png"]


def test_ids_of_a_table_begin_at_the_image_folder_that_is_named(colours: Path, tmp_path: Path) -> None:
    rows = ("0,a,train", "1,b,train", f"{colours / NAMES[2]},a,val")
    table = write(tmp_path, *rows, header="image_id,label,split")
    folder = colours / "val" / "red"
    dataset = find_dataset(table, image_folder=folder)
    assert (dataset.train.paths, dataset.val.paths) == ((folder / "0.png", folder / "1.png"), (colours / NAMES[2],))
    assert find_images(table, folder).paths == dataset.val.paths
    assert f"images in {folder}" in dataset.notes[0]
    with pytest.raises(InputError, match=r"line 2: 0 is no file in .*--image-folder \(image_folder\) names another"):
        find_dataset(table)
    with pytest.raises(InputError, match=r"leads outside .*red"):
        find_images(put(table, b"path,label\n../blue/0.png,x\n"), folder)
    with pytest.raises(InputError, match="absent is no folder"):
        find_images(table, tmp_path / "absent")
    for read_folder in (find_images, find_dataset):
        with pytest.raises(InputError, match="is no table"):
            read_folder(colours, image_folder=folder)


def test_absent_files_are_counted_and_the_first_are_named(colours: Path) -> None:
    rows = "".join(f"val/red/{name},red\n" for name in ("0", "x1", "x2", "1", "x3", "x4", "x5", "x6"))
    with pytest.raises(InputError) as refusal:
        read(colours, f"image_id,label\n{rows}")
    said = str(refusal.value)
    assert "line 3: val/red/x1 is no file in" in said
    assert "so are 5 more of 8 rows: val/red/x2 (line 4), val/red/x3 (line 6), val/red/x4 (line 7), val/red/x5" in said
    assert "x6" not in said


def test_tables_with_tabs_have_a_suffix_of_their_own(colours: Path) -> None:
    table = put(colours / "data.tsv", "\n".join(("path\tlabel", *(f"{name}\tred" for name in NAMES))).encode())
    assert find_images(table).paths == tuple(colours / name for name in NAMES)


def test_line_ends_and_the_mark_of_a_spreadsheet_change_nothing(colours: Path) -> None:
    for start, end in itertools.product(("", "\ufeff"), ("\n", "\r\n", "\r")):
        found = read(colours, (start + SOUND).replace("\n", end))
        assert found.class_names == ("blue", "red")
        assert {name: len(split.paths) for name, split in found.splits.items()} == {"train": 2, "val": 2}


FIRST = b"path,label\nval/red/0.png,red\n"
LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "line 1: the header has no column path and label"),
    "one column": (
        b"path\nval/red/0.png\n",
        "the header has no column label, only path. Names are label: label, class",
    ),
    "a wide header": (b"path," + b"x," * 100_000, "line 1: the header has no column label, only path, x, x"),
    "a column twice": (
        b"path,label,Label\n",
        "line 1: the header has label and Label, either of which may be the label",
    ),
    "two for the path": (
        b"image,Filename,label\n",
        "line 1: the header has image and Filename, either of which may be",
    ),
    "no label and widths": (
        b"path,width,height\nval/red/0.png,8,1\n",
        "line 2: width is '8': no column is called label",
    ),
    "two of one class": (b"path,red,red\nval/red/0.png,0,1\n", "the header has no column label, only path, red, red"),
    "several columns": (
        b"path,red,blue\nval/red/0.png,1,1\n",
        "line 2: red, blue are all 1: this is a table of several",
    ),
    "no column's": (b"path,red,blue\nval/red/0.png,0,0\n", "line 2: no class's column holds a 1"),
    "several labels": (FIRST + b"val/red/1.png,red|blue\n", "line 3: 'red|blue' are several labels"),
    "several files": (FIRST + b"twin,red\n", "line 3: twin is the stem of twin.jpg, twin.png"),
    "an id of none": (FIRST + b"val/red/2,red\n", "line 3: val/red/2 is no file in"),
    "an id twice": (FIRST + b"val/red/0,red\n", "line 3: val/red/0 is on line 2 already"),
    "no rows": (b"path,label\n\n\n", "has no rows below its header"),
    "utf-16": (SOUND.encode("utf-16"), "In a spreadsheet save it as 'CSV UTF-8'"),
    "windows-1252": (FIRST + "val/red/1.png,Müll\n".encode("cp1252"), "plain CSV is Windows-1252"),
    "a row too short": (FIRST + b"val/red/1.png\n", "line 3: it has 1 values"),
    "an enormous field": (FIRST + b"x" * 200_000 + b",red\n", "field larger than field limit"),
    "an enormous line": (FIRST + b"x," * MAX_LINE, "a line has more than 1,048,576 characters"),
    "an open quote": (FIRST + b'"val/red/1.png,red\n', "unexpected end of data"),
    "a bent quote": (FIRST + b'"val"/red/1.png,red\n', "',' expected after"),
    "an escape in a label": (FIRST + b"val/red/1.png,\x1b[31mred\n", "line 3: the label '\\x1b[31mred'"),
    "a long label": (FIRST + b"val/red/1.png," + b"r" * 256, "longer than 255 characters"),
    "an empty label": (FIRST + b"val/red/1.png, \n", "line 3: the label is empty"),
    "an empty path": (FIRST + b",red\n", "line 3: the path is empty"),
    "a path twice": (FIRST + b"val/../val//red/./0.png,blue\n", "line 3: val/../val//red/./0.png is on"),
    "outside": (FIRST + b"../outside.png,red\n", "line 3: ../outside.png leads outside"),
    "outside as windows has it": (FIRST + b"..\\outside.png,red\n", "line 3: ../outside.png leads outside"),
    "an id outside": (FIRST + b"../outside,red\n", "line 3: ../outside leads outside"),
    "outside by a detour": (FIRST + b"val/../../outside.png,red\n", "leads outside"),
    "absolute": (FIRST + b"/etc/no-file.png,red\n", "line 3: /etc/no-file.png is no file"),
    "a folder": (FIRST + b"val/red,red\n", "line 3: val/red is no file in"),
    "a null in a path": (FIRST + b"val/red\0/1.png,red\n", "line 3: 'val/red\\x00/1.png' is no file in"),
    "an escape in a path": (FIRST + b"\x1b[2J,red\n", "line 3: '\\x1b[2J' is no file in"),
    "a long path": (FIRST + b"x/" * 50_000 + b",red\n", "line 3: x/x/x/"),
    "a split of no kind": (b"path,label,split\nval/red/0.png,red,tren\n", "line 2: there is no split 'tren'"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_told_with_its_line(colours: Path, name: str) -> None:
    content, reason = LIES[name]
    said = refused(lambda: read(colours, content), InputError, str(colours / "data.csv"), reason)
    assert len(said) < 900


def test_a_label_may_be_as_long_as_a_folders_name(colours: Path) -> None:
    assert read(colours, f"path,label\nval/red/0.png,{'é' * MAX_NAME}\n").class_names == ("é" * MAX_NAME,)


def test_a_pipe_is_not_waited_for_and_a_folder_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    for name in ("pipe.csv", "folder.csv"):
        refused(lambda name=name: read_csv(tmp_path / name), InputError, "is a folder, a device or a pipe")
    refused(lambda: read_csv(tmp_path / "none.csv"), InputError, "is not there: expected a CSV file")


def test_a_line_without_end_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "zeros.csv"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    refused(lambda: read_csv(path), InputError, "a line has more than 1,048,576 characters, near line")


def test_a_class_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    """Its name could be written into no weights: found after the first epoch else."""
    write_colours(tmp_path, 1, 1)
    os.rename(tmp_path / "val" / "red", os.fsencode(tmp_path / "val") + b"/r\xe9d")  # noqa: PTH104 - bytes
    refused(
        lambda: find_images(tmp_path / "val"), InputError, "has the class folder 'r\\udce9d', whose name is no text"
    )


# --- any lie at any place ---------------------------------------------------------------------------------------------

CELLS = st.one_of(
    st.sampled_from([*NAMES, "red", "blue", "train", "val", "test", "", "..", "/", "a\nb", '"', "\0", "x" * 300]),
    st.text(max_size=6),
)


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """Rows of cells that are near to sound ones, as the csv module writes them."""
    named = st.sampled_from(["path", "image_id", "File"]), st.sampled_from(["label", "class", "cat"])
    header = draw(st.permutations([*map(draw, named), "split", *draw(st.lists(CELLS, max_size=1))]))
    rows = draw(st.lists(st.lists(CELLS, max_size=4), max_size=6))
    values = {"path": None, "image_id": None, "File": None, "split": "val"}
    sound = [[values.get(each, "red") or name for each in header] for name in NAMES]
    stream = io.StringIO(newline="")
    csv.writer(stream, draw(st.sampled_from(["excel", "unix"]))).writerows(
        [header, *sound[: draw(st.integers(0, 4))], *rows]
    )
    return stream.getvalue().encode("utf-8", "surrogatepass")


@QUICK
@given(content=st.one_of(tables(), spoilt(SOUND.encode())))
def test_fuzz_a_table_is_a_dataset_or_refused(colours: Path, content: bytes) -> None:
    """What is read lies in the folder, has labels of its classes and no image twice."""
    found = result_or_error(lambda: read(colours, content), InputError)
    if found is None:
        return
    paths = [path for split in found.splits.values() for path in split.paths]
    assert len(set(paths)) == len(paths) > 0
    assert all(path.is_file() and Path(os.path.normpath(path)).is_relative_to(colours) for path in paths)
    assert {label for split in found.splits.values() for label in split.labels} <= set(range(len(found.class_names)))
    assert all(name.strip() == name != "" for name in found.class_names)
    result_or_error(lambda: find_dataset(colours / "data.csv"), InputError)
    result_or_error(lambda: find_images(colours / "data.csv"), InputError)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest of the table: a command knows no other."""
    model = random_model("atto", 2, seed=0)
    path = tmp_path_factory.mktemp("weights") / "two.safetensors"
    return save_checkpoint(path, model, class_names=("blue", "red"), preprocessing=Preprocessing(32))


def test_the_command_evaluates_on_a_sound_table(colours: Path, weights: Path) -> None:
    assert check_command("eval", weights, put(colours / "data.csv", SOUND.encode())) == 0


def test_commands_find_ids_in_the_image_folder(
    cnx: Command, colours: Path, weights: Path, tiny_onnx_fp16: Artifact, tmp_path: Path
) -> None:
    """Where a command has read the table it says what else is wrong: it has three classes."""
    rows = ("0.png,blue,train", "1,red,train", f"{colours / NAMES[2]},fox,train", f"{colours / NAMES[3]},fox,val")
    three = write(tmp_path, *rows, header="image_id,label,split")
    for words, message in (
        (("eval", weights, three), "fox"),
        (("train", three, "--variant", "atto", "--no-image-check", "--checkpoint", weights), "2 classes, and 3 were"),
        (("verify", tiny_onnx_fp16.path, "--data", three), "10"),
    ):
        code, _, err = cnx(*words)
        assert (code, "is no file in" in err) == (2, True)
        code, _, err = cnx(*words, "--image-folder", colours / "val" / "red")
        assert (code, message in err, "is no file in" in err) == (2, True, False), err
    code, _, err = cnx("verify", tiny_onnx_fp16.path, "--image-folder", colours)
    assert (code, "Add --data" in err) == (2, True)


@settings(FEW, max_examples=5)
@given(content=st.one_of(tables(), spoilt(SOUND.encode())))
def test_fuzz_the_command(colours: Path, weights: Path, content: bytes) -> None:
    check_command("eval", weights, put(colours / "data.csv", content), allowed=frozenset({0, 2}))
