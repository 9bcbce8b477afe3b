"""The names of a network's outputs, as people keep them: a line each, a table, a JSON list, or a hub's dictionary."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.strict_json import bounded_content, kind_of, shortened, strict_json

__all__ = [
    "MAX_NAME", "NOT_COUNTED", "ClassNames", "check_class_count", "is_class_name", "names_of", "ordered_names",
    "read_class_names",
]  # fmt: skip

ClassNames = Sequence[str] | Path | str
"""Names in the order of a network's outputs, or the file that holds them."""
MAX_NAME = 255
"""Characters, as many as the name of a class's folder can have."""
NOT_COUNTED = 255
"""The label of a pixel that is not counted, as Pascal VOC, ADE20K in mmsegmentation and Cityscapes have it."""
EXPECTED = (
    'one name a line, or JSON: a list of names, {"0": name, …} as id2label, or {name: 0, …}; or a .csv table with a '
    "column called name"
)
_BRACKETED_NAME = re.compile(rb"""\s*(\[[^]["',{}\s][^]["',{}\n]*\]|\{[^{}"':,\s][^{}"':,\n]*\})""")
"""A line such as "[unknown]" or "{misc} goods": JSON and Python's literals have quotes, commas or colons there."""


def is_class_name(text: str) -> bool:
    """Whether a text can name a class: not empty, at most `MAX_NAME` characters, no line end or control character."""
    return 0 < len(text) <= MAX_NAME and not any(character < " " or character == "\x7f" for character in text)


def ordered_names(value: Any) -> tuple[str, ...]:
    """Names in the order of a network's outputs.

    Args:
        value: a list of names; `{index: name}` as transformers' id2label; `{name: index}` as torchvision's
            class_to_idx; or an object, such as a config.json, that has one of them as `id2label` or `label_names`.

    Raises ValueError where the indices are not 0 to n - 1, each once, or a name is none.
    """
    if isinstance(value, Mapping):
        for key in ("id2label", "label_names"):
            if isinstance(value.get(key), dict | list):
                return ordered_names(value[key])
        # A name may be a number in text, an index of a name is a number: {"0": "10"} is id2label, {"10": 0} is not.
        is_turned = all(isinstance(index, int) and not isinstance(index, bool) for index in value.values())
        named = {str(index): name for name, index in value.items()} if is_turned else dict(value)
        expected = [str(index) for index in range(len(value))]
        if named.keys() != set(expected):
            raise ValueError(f"its indices are not 0 to {len(value) - 1}, each once")
        value = [named[index] for index in expected]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"it is {kind_of(value)} without names")
    if wrong := [name for name in value if not isinstance(name, str) or not is_class_name(name)]:
        raise ValueError(f"{shortened(kind_of(wrong[0]))} is no class's name of 1 to {MAX_NAME} printable characters")
    return tuple(value)


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names in a file, in the order of the network's outputs: text with a name a line, or JSON (`ordered_names`).

    Of a .csv file whose first line has a comma, the column `name` is taken: taggers' tables have it beside others.
    A first line such as "[unknown]" is a name, since JSON has quotes within its brackets. Raises InputError where the
    file cannot be read, is not UTF-8, or has an empty line between names.
    """
    try:
        content = bounded_content(path).removeprefix(b"\xef\xbb\xbf")
        if content.lstrip()[:1] in (b"[", b"{") and not _BRACKETED_NAME.match(content):
            return ordered_names(strict_json(content))
        text = content.decode("utf-8")
        if path.suffix.lower() == ".csv" and "," in text.split("\n", 1)[0]:
            return ordered_names(_column_of_names(text))
        return ordered_names([line.strip() for line in text.rstrip().splitlines()])
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as class names ({error}). Expected is {EXPECTED}.") from error


def _column_of_names(text: str) -> list[str]:
    """The cells of the one column called name. Raises ValueError where there is none, csv.Error for no table."""
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    at = [place for place, title in enumerate(header) if title.strip().lower() == "name"]
    if len(at) != 1 or any(len(row) <= at[0] for row in rows):
        raise ValueError(
            f"it is a table with the columns {shortened(', '.join(header))}, not one called name in each row"
        )
    return [row[at[0]].strip() for row in rows]


def names_of(names: ClassNames | None) -> tuple[str, ...] | None:
    """The names themselves, or those in the file that is named; None for None."""
    return read_class_names(Path(names)) if isinstance(names, Path | str) else None if names is None else tuple(names)


def check_class_count(names: Sequence[str], num_classes: int, where: str) -> None:
    """Raise InputError unless there is a name for each output of the network in `where`."""
    if len(names) != num_classes:
        raise InputError(
            f"{len(names)} class names were given and {where} has {num_classes} classes. Give one name for each, in "
            "the order of its outputs."
        )
