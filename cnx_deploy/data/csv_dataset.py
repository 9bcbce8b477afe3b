"""A dataset as a CSV file: the columns `path` and `label`, and `split` where the division is given.

Paths are relative to the file's folder and stay below it; labels are taken as text. Other columns are ignored.
"""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.strict_json import shortened
from cnx_deploy.data.image_source import ImageFiles

__all__ = ["CsvDataset", "is_csv", "read_csv"]

SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
"""What the column `split` may say, in upper or lower case, and what it means."""
MAX_LINE = 1 << 20
"""Characters; the path and label of an image have some hundreds."""
MAX_LABEL = 255
"""Characters, as many as the name of a class's folder can have."""


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
        unknown = set(range(len(self.class_names))) - set(train.labels)
        if unknown:
            name = self.class_names[min(unknown)]
            raise InputError(
                f"{self.path}, line {self.lines[name]}: the class {name} has no row with the split train. Add one, or "
                "take the class out."
            )
        return train


def is_csv(path: Path) -> bool:
    """Whether a path is meant as a CSV file, by its suffix."""
    return path.suffix.lower() == ".csv" and not path.is_dir()


def read_csv(path: Path) -> CsvDataset:
    """Read and check every row.

    Raises InputError, with the number of the line: no header, a column missing or twice, a row too short or a line too
    long, a label that is empty, too long or holds a control character, an unknown split, a path that is absolute, leads
    outside the folder, is there twice or is no file.
    """
    lines: dict[str, int] = {}
    seen: dict[str, int] = {}
    rows: dict[str, list[tuple[Path, str]]] = {}
    folder = str(path.parent)
    for line, values in _rows(path):
        split, label = _split_and_label(path, line, values)
        shown = shortened(values["path"] if values["path"].isprintable() else repr(values["path"]))
        place = os.path.normpath(values["path"])
        if os.path.isabs(place) or place.split(os.sep, 1)[0] == os.pardir:  # noqa: PTH117 - millions of rows
            _refuse(path, line, f"{shown} leads outside {folder}. Paths are relative to the CSV file's folder")
        if place in seen:
            _refuse(path, line, f"{shown} is on line {seen[place]} already. An image has one row")
        full = os.path.join(folder, place)  # noqa: PTH118 - as above, and below
        if not os.path.isfile(full):  # noqa: PTH113
            _refuse(path, line, f"{shown} is no file below {folder}. Paths are relative to the CSV file's folder")
        seen[place] = line
        lines.setdefault(label, line)
        rows.setdefault(split, []).append((Path(full), label))
    if not lines:
        raise InputError(f"{path} has no rows below its header: expected one for each image. Add them.")
    names = tuple(sorted(lines))
    index = {name: at for at, name in enumerate(names)}
    splits = {
        split: ImageFiles(tuple(file for file, _ in images), tuple(index[label] for _, label in images), names)
        for split, images in rows.items()
    }
    return CsvDataset(path, names, splits, lines)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The number of each line and its values by column."""
    if path.exists() and not path.is_file():
        raise InputError(
            f"{path} is a folder, a device or a pipe: expected a CSV file with the columns path and label. Check the "
            "path."
        )
    reader = None
    try:
        # Spreadsheets put a byte-order mark before the header.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(_bounded_lines(stream), strict=True)
            columns = _columns(next(reader, []), path)
            last = max(columns.values())
            for values in reader:
                if not values:
                    continue
                if len(values) <= last:
                    _refuse(path, reader.line_num, f"it has {len(values)} values, the header asks for {last + 1}")
                yield reader.line_num, {name: values[at].strip() for name, at in columns.items()}
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}). Save it as CSV in UTF-8.") from error
    except csv.Error as error:
        line = reader.line_num if reader is not None else 1
        raise InputError(f"{path} is no CSV file ({error}, near line {line}). Save it again.") from error
    except OSError as error:
        what = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise InputError(
            f"{path} {what}: expected a CSV file with the columns path and label. Check the path."
        ) from error


def _bounded_lines(stream: TextIO) -> Iterator[str]:
    """The file's lines; csv.Error for one that no row of an image has, before more of it is taken into memory."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise csv.Error(f"a line has more than {MAX_LINE:,} characters")
        yield line


def _columns(header: list[str], path: Path) -> dict[str, int]:
    """Position of each column that is read."""
    names = [name.strip().lower() for name in header]
    wanted = ("path", "label", "split")
    missing = [name for name in wanted[:2] if name not in names]
    if missing:
        given = shortened(", ".join(header)) or "nothing"
        _refuse(path, 1, f"the header has no column {' and '.join(missing)}, only {given}")
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        _refuse(path, 1, f"the header has the column {twice[0]} twice")
    return {name: names.index(name) for name in wanted if name in names}


def _split_and_label(path: Path, line: int, values: dict[str, str]) -> tuple[str, str]:
    split = SPLITS.get(values["split"].lower()) if "split" in values else ""
    if split is None:
        _refuse(path, line, f"there is no split {shortened(repr(values['split']))}. Write train, val or test")
    for name in ("path", "label"):
        if not values[name]:
            _refuse(path, line, f"the {name} is empty")
    label = values["label"]
    if len(label) > MAX_LABEL or any(character < " " or character == "\x7f" for character in label):
        _refuse(
            path,
            line,
            f"the label {shortened(repr(label))} is no class's name: it is longer than {MAX_LABEL} characters or holds "
            "a line's end or another control character",
        )
    return split, label


def _refuse(path: Path, line: int, reason: str) -> NoReturn:
    raise InputError(f"{path}, line {line}: {reason}. Correct the line, or remove it.")
