"""A dataset as a CSV file: a row an image, under the column names that people give path, label and split.

Where an image lies is told by its absolute path, or by one relative to the file's folder or another that is named,
below which it stays; an id is the one file of that stem. Labels are text, or the one column of several that holds a 1.
Other columns are ignored. For several labels an image, `data.multi_label` says how one column holds them.
"""

import csv
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

from cnx_deploy.core.class_names import MAX_NAME, is_class_name
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.strict_json import shortened
from cnx_deploy.data.image_files import SUFFIXES
from cnx_deploy.data.image_source import ImageFiles
from cnx_deploy.data.label_sets import LabelCells

__all__ = ["CsvDataset", "is_csv", "path_rows", "read_csv"]

COLUMNS = {
    "path": ("path", "filename", "file", "file_name", "image", "image_id", "image_name", "image_path", "img", "fname"),
    "label": ("label", "class", "category", "target"),
    "split": ("split",),
}
"""What a column may be called, in upper or lower case, and what it is read as."""
SEVERAL_LABELS = (*COLUMNS["label"], "labels", "classes", "categories", "targets", "tag", "tags")
"""What the column of labels may be called where an image may have several."""
SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
"""What the column `split` may say, in upper or lower case, and what it means."""
DELIMITERS = {",": ",", ";": ";", "\t": "tab"}
ONE_HOT = {"0": False, "0.0": False, "1": True, "1.0": True, "false": False, "true": True}
"""What the columns of a table with one a class hold, in upper or lower case."""
SEVERAL = "|"
"""Between the labels of an image in tables that give several."""
ENCODING = "In a spreadsheet save it as 'CSV UTF-8': plain CSV is Windows-1252 there, and 'Unicode text' is UTF-16"
MOST_NAMED = 5
"""Rows whose file is absent that a message names."""
MAX_LINE = 1 << 20
"""Characters; the path and label of an image have some hundreds."""


@dataclass(frozen=True, slots=True)
class CsvDataset:
    """The rows of a file by their split; all of them under "" where there is no such column. Class names are sorted.

    `lines`: the first line that names a class, for messages.
    """

    path: Path
    class_names: tuple[str, ...]
    splits: dict[str, ImageFiles]
    lines: dict[str, int]

    def validation(self) -> ImageFiles:
        """The rows of val, else of test, else all of a file without splits; InputError when there are none."""
        for name in ("val", "test", ""):
            if name in self.splits:
                return self.splits[name]
        raise InputError(f"{self.path} has no rows with the split val or test. Add some, or leave the column out.")

    def training(self) -> ImageFiles:
        """The rows of train. InputError when there are none, or other rows have a class that they have not."""
        if "train" not in self.splits:
            raise InputError(f"{self.path} has no rows with the split train. Add some, or leave the column out.")
        train = self.splits["train"]
        if train.label_sets is not None:  # a rare label may lie elsewhere alone, and notes say so
            return train
        unknown = {label for images in self.splits.values() for label in images.labels} - set(train.labels)
        if unknown:
            name = self.class_names[min(unknown)]
            raise InputError(
                f"{self.path}, line {self.lines[name]}: the class {name} has no row with the split train. Add one, or "
                "take the class out."
            )
        return train


def is_csv(path: Path) -> bool:
    """Whether a path is meant as a table, by its suffix: .csv or .tsv."""
    return path.suffix.lower() in (".csv", ".tsv") and not path.is_dir()


def read_csv(path: Path, image_folder: Path | None = None, *, multi_label: bool = False) -> CsvDataset:
    """Read and check every row; relative paths begin at `image_folder`, by default the table's own.

    With `multi_label` an image may have any number of labels, none included: the files have `label_sets`.

    Raises InputError, with the number of the line: no header, a column missing or there twice, a row too short or a
    line too long, a label that is empty, too long, several or holds a control character, an unknown split, a path that
    leads outside the folder, is there twice, is no file or the stem of several.
    """
    lines: dict[str, int] = {}
    seen: dict[str, int] = {}
    rows: dict[str, list[tuple[Path, str]]] = {}
    cells = LabelCells()
    if image_folder is not None and not image_folder.is_dir():
        raise InputError(f"{image_folder} is no folder: expected the one that the paths of {path} begin at. Check it.")
    folder, columns, count = path.parent if image_folder is None else image_folder, _Columns({}, {}, ""), 0
    file_of, absent = _file_finder(path, str(folder)), list[tuple[int, str]]()
    for line, columns, values in _rows(path, lambda header, mark: _columns(header, mark, path, multi_label)):
        split, place = _split_and_path(path, line, columns, values)
        label = "" if multi_label else _label(path, line, columns, values)
        full, count = file_of(line, place), count + 1
        if full is None:
            absent.append((line, _printable(place)))
            continue
        key = os.path.abspath(full)  # noqa: PTH100 - of an absolute and a relative path to one file
        if key in seen:
            _refuse(path, line, f"{_printable(place)} is on line {seen[key]} already. An image has one row")
        seen[key] = line
        rows.setdefault(split, []).append((Path(full), label))
        if not multi_label:
            lines.setdefault(label, line)
        elif columns.classes:
            cells.add_names(split, line, _ones(path, line, columns, values))
        else:
            cells.add_text(split, line, values[columns.places["label"]])
    if absent:
        (line, first), more = absent[0], ", ".join(f"{name} (line {line})" for line, name in absent[1:MOST_NAMED])
        others = f", and so are {len(absent) - 1:,} more of {count:,} rows: {more}" if more else ""
        more = " …" if len(absent) > MOST_NAMED else ""
        option = "; --image-folder (image_folder) names another" if image_folder is None else ""
        reason = (
            f"{first} is no file in {folder} and no stem of one{others}{more}. Paths are absolute, or relative to it"
        )
        _refuse(path, line, f"{reason}{option}")
    if not rows:
        raise InputError(f"{path} has no rows below its header: expected one for each image. Add them.")
    sets: dict[str, tuple[tuple[int, ...], ...]] = {}
    if multi_label:
        names, sets = cells.resolved(columns.classes, lambda line, reason: _refuse(path, line, reason))
    else:
        names = tuple(sorted({*lines, *columns.classes}))
    index = {name: at for at, name in enumerate(names)}
    where = "" if image_folder is None else f", images in {image_folder}"
    notes = (f"Read the table {path}: {columns.understood}{cells.understood}{where}.",)
    splits = {
        split: ImageFiles(
            tuple(file for file, _ in images), () if sets else tuple(index[label] for _, label in images), names,
            notes=notes, label_sets=sets.get(split),
        )
        for split, images in rows.items()
    }  # fmt: skip
    return CsvDataset(path, names, splits, lines)


@dataclass(frozen=True, slots=True)
class _Columns:
    """The places of the columns that are read; of a table without labels, those of its columns for classes."""

    places: dict[str, int]
    classes: dict[str, int]
    understood: str


def path_rows(path: Path, column: str | None = None, id_column: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Yield the path of each row as it is written, and its id where `id_column` names a column of them.

    `column` None: a name that `read_csv` takes for the path's. Labels are neither asked for nor read, no file is looked
    for, and a path may be there twice. Raises InputError as `read_csv` does.
    """
    given = {"path": column, "id": id_column}
    for line, columns, values in _rows(path, lambda header, delimiter: _path_columns(header, delimiter, path, given)):
        if not (place := values[columns.places["path"]].strip()):
            _refuse(path, line, "the path is empty")
        yield place, values[columns.places["id"]].strip() if id_column is not None else None


def _path_columns(header: list[str], delimiter: str, path: Path, given: Mapping[str, str | None]) -> _Columns:
    names = [name.strip() for name in header]
    places: dict[str, int] = {}
    for column in (name for name, value in given.items() if value is not None):
        if names.count(str(given[column])) != 1:
            _refuse(path, 1, f"the header has no one column {given[column]}, only {shortened(', '.join(names))}")
        places[column] = names.index(str(given[column]))
    if "path" in places:
        return _Columns(places, {}, delimiter)
    found = [at for at, name in enumerate(names) if name.lower() in COLUMNS["path"] and at not in places.values()]
    if len(found) != 1:
        held = shortened(", ".join(names[at] for at in found) or ", ".join(header)) or "nothing"
        _refuse(path, 1, f"the header has {held}, where one column of paths was expected. --column (column) names it")
    return _Columns({**places, "path": found[0]}, {}, delimiter)


def _rows(
    path: Path, columns_of: Callable[[list[str], str], _Columns]
) -> Iterator[tuple[int, _Columns, list[str]]]:  # fmt: skip
    """The number of each line, the columns, which are told by the header, and the line's values."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a folder, a device or a pipe: expected a CSV file. Check the path.")
    reader = None
    try:
        # Spreadsheets put a byte-order mark before the header.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = _bounded_lines(stream)
            header = next(lines, "")
            delimiter = max(DELIMITERS, key=re.sub('"[^"]*"', "", header).count)
            reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
            columns = columns_of(next(reader, []), delimiter)
            last = max(*columns.places.values(), *columns.classes.values(), 0)
            for values in reader:
                if not values:
                    continue
                if len(values) <= last:
                    _refuse(path, reader.line_num, f"it has {len(values)} values, the header asks for {last + 1}")
                yield reader.line_num, columns, values
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}). {ENCODING}.") from error
    except csv.Error as error:
        line = reader.line_num if reader is not None else 1
        raise InputError(f"{path} is no CSV file ({error}, near line {line}). Save it again.") from error
    except OSError as error:
        what = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise InputError(f"{path} {what}: expected a CSV file, with a row an image. Check the path.") from error


def _bounded_lines(stream: TextIO) -> Iterator[str]:
    """The file's lines; csv.Error for one that no row of an image has, before more of it is taken into memory."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise csv.Error(f"a line has more than {MAX_LINE:,} characters")
        yield line


def _columns(header: list[str], delimiter: str, path: Path, multi_label: bool) -> _Columns:
    names = [name.strip() for name in header]
    places: dict[str, int] = {}
    columns = {**COLUMNS, "label": SEVERAL_LABELS} if multi_label else COLUMNS
    for column, known in columns.items():
        found = [at for at, name in enumerate(names) if name.lower() in known]
        if len(found) > 1:
            given = " and ".join(names[at] for at in found[:3])
            _refuse(path, 1, f"the header has {given}, either of which may be the {column}. Rename all but one")
        if found:
            places[column] = found[0]
    others = {name: at for at, name in enumerate(names) if at not in places.values()}
    # Without labels every other column is a class's, if there are several and no two of a name.
    is_one_hot = "label" not in places and len(others) == len(names) - len(places) > 1
    missing = [column for column in ("path", "label") if column not in places]
    if "path" in missing or (missing and not is_one_hot):
        allowed = "; ".join(f"{column}: {', '.join(columns[column])}" for column in missing)
        given = shortened(", ".join(header)) or "nothing"
        _refuse(path, 1, f"the header has no column {' and '.join(missing)}, only {given}. Names are {allowed}")
    classes = others if is_one_hot else {}
    for name in classes:
        if not is_class_name(name):
            _refuse(path, 1, f"the column {shortened(repr(name))} is no class's name, and there is no column label")
    said = [f"column {names[at]} as {column}" for column, at in places.items()]
    said += [f"{len(classes)} columns as one class each ({shortened(', '.join(classes))})"] if classes else []
    return _Columns(places, classes, f"{', '.join(said)}, delimiter {DELIMITERS[delimiter]}")


def _split_and_path(path: Path, line: int, columns: _Columns, values: list[str]) -> tuple[str, str]:
    cells = {column: values[at].strip() for column, at in columns.places.items()}
    split = SPLITS.get(cells["split"].lower()) if "split" in cells else ""
    if split is None:
        _refuse(path, line, f"there is no split {shortened(repr(cells['split']))}. Write train, val or test")
    if not cells["path"]:
        _refuse(path, line, "the path is empty")
    return split, cells["path"]


def _label(path: Path, line: int, columns: _Columns, values: list[str]) -> str:
    """The one class of an image."""
    label = _one_hot_label(path, line, columns, values) if columns.classes else values[columns.places["label"]].strip()
    if not label:
        _refuse(path, line, "the label is empty")
    if SEVERAL in label:
        _refuse(
            path, line,
            f"{shortened(repr(label))} are several labels, and a classifier has one class an image; --task multi-label "
            "takes several",
        )  # fmt: skip
    if not is_class_name(label):
        _refuse(
            path,
            line,
            f"the label {shortened(repr(label))} is no class's name: it is longer than {MAX_NAME} characters or holds "
            "a line's end or another control character",
        )
    return label


def _one_hot_label(path: Path, line: int, columns: _Columns, values: list[str]) -> str:
    """The name of the one column that holds a 1."""
    held = _ones(path, line, columns, values)
    if len(held) > 1:
        _refuse(
            path,
            line,
            f"{shortened(', '.join(held))} are all 1: this is a table of several labels, and a classifier has one "
            "class an image; --task multi-label takes several",
        )
    if not held:
        _refuse(path, line, "no class's column holds a 1")
    return held[0]


def _ones(path: Path, line: int, columns: _Columns, values: list[str]) -> list[str]:
    """The names of the columns that hold a 1."""
    held: list[str] = []
    for name, at in columns.classes.items():
        is_held = ONE_HOT.get(values[at].strip().lower())
        if is_held is None:
            _refuse(
                path,
                line,
                f"{shortened(name)} is {shortened(repr(values[at]))}: no column is called "
                f"{' or '.join(COLUMNS['label'])}, so that each other column is a class and holds 0 or 1",
            )
        held += [name] if is_held else []
    return held


def _file_finder(table: Path, folder: str) -> Callable[[int, str], str | None]:
    """What gives the file that a table means by a path, with the line for messages; None where there is none.

    An absolute path is taken: a table on a disk names files of that disk, and a file is only decoded. A relative one
    that leads outside the folder is a table out of its place. As few calls as can be: there are millions.
    """
    stems = dict[str, dict[str, list[str]]]()

    def stems_in(parent: str) -> dict[str, list[str]]:
        if parent not in stems:
            found: dict[str, list[str]] = {}
            try:
                for name in sorted(os.listdir(parent)):  # noqa: PTH208
                    stem, suffix = os.path.splitext(name)  # noqa: PTH122
                    if suffix.lower() in SUFFIXES:
                        found.setdefault(stem, []).append(name)
            except (OSError, ValueError):
                pass
            stems[parent] = found
        return stems[parent]

    def file_of(line: int, given: str) -> str | None:
        full = os.path.join(folder, os.path.normpath(given))  # noqa: PTH118
        is_file = os.path.isfile(full)  # noqa: PTH113
        if not is_file and "\\" in given:  # as Windows writes it; a name may hold one elsewhere
            given = given.replace("\\", "/")
            full = os.path.join(folder, os.path.normpath(given))  # noqa: PTH118
            is_file = os.path.isfile(full)  # noqa: PTH113
        if not os.path.isabs(given) and os.path.normpath(given).split(os.sep, 1)[0] == os.pardir:  # noqa: PTH117
            _refuse(
                table,
                line,
                f"{_printable(given)} leads outside {folder}. Paths are absolute, or relative to that folder",
            )
        if is_file:
            return full
        parent, name = os.path.split(full)
        if os.path.splitext(name)[1].lower() not in SUFFIXES:  # noqa: PTH122
            names = stems_in(parent).get(name, [])
            if len(names) == 1:
                return os.path.join(parent, names[0])  # noqa: PTH118
            if names:
                _refuse(table, line, f"{_printable(given)} is the stem of {', '.join(names[:5])}. Name one file a row")
        return None

    return file_of


def _printable(text: str) -> str:
    return shortened(text if text.isprintable() else repr(text))


def _refuse(path: Path, line: int, reason: str) -> NoReturn:
    raise InputError(f"{path}, line {line}: {reason}. Correct the line, or remove it.")
