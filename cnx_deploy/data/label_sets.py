"""Several labels an image as text: what separates them is decided by all that a file or folder says, and told."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from cnx_deploy.core.class_names import MAX_NAME, is_class_name
from cnx_deploy.core.strict_json import shortened

__all__ = ["LabelCells"]

DELIMITERS = {"|": "|", ";": ";", ",": ",", "\n": "line ends", " ": "spaces"}
"""What may separate labels, and its word. The first that stands in any text is taken; the rest are parts of names."""
FRACTION = re.compile(r"0?\.\d+")


@dataclass(slots=True)
class LabelCells:
    """The labels of images as they are read, as text or as names, by split; `resolved` turns them into indices.

    One text with a `|` means that this separates all of them; else a `;` does, a comma, a line's end, a space. With
    spaces alone there is no name of two words, as in the tags of a booru.
    """

    delimiter: str | None = None
    _rows: dict[str, list[tuple[int, str | Sequence[str]]]] = field(default_factory=dict)

    def add_text(self, split: str, line: int, text: str) -> None:
        """The labels of one image in one text; an empty one has none."""
        self._rows.setdefault(split, []).append((line, text.strip()))

    def add_names(self, split: str, line: int, names: Sequence[str]) -> None:
        """The labels of one image by name."""
        self._rows.setdefault(split, []).append((line, names))

    @property
    def understood(self) -> str:
        """What separated the labels, as a part of a sentence; empty for labels that came by name."""
        return "" if self.delimiter is None else f", labels separated by {DELIMITERS[self.delimiter]}"

    def resolved(
        self, known: Iterable[str], refuse: Callable[[int, str], NoReturn]
    ) -> tuple[tuple[str, ...], dict[str, tuple[tuple[int, ...], ...]]]:
        """Give the sorted names, `known` ones among them, and by split the indices of each image's labels.

        `refuse` is called with a row's number and the reason for a name that is empty, twice there or no name.
        """
        texts = [text for rows in self._rows.values() for _, text in rows if isinstance(text, str)]
        if texts:
            self.delimiter = next((mark for mark in DELIMITERS if any(mark in text for text in texts)), " ")
        index = dict.fromkeys(known, 0)
        sets: dict[str, list[tuple[str, ...]]] = {}
        for split, rows in self._rows.items():
            for line, given in rows:
                names = tuple(self._parts(given)) if isinstance(given, str) else tuple(given)
                _check(names, lambda reason, at=line: refuse(at, reason))  # type: ignore[misc]
                index.update(dict.fromkeys(names, 0))
                sets.setdefault(split, []).append(names)
        ordered = tuple(sorted(index))
        index.update((name, at) for at, name in enumerate(ordered))
        return ordered, {
            split: tuple(tuple(sorted(index[name] for name in names)) for names in each) for split, each in sets.items()
        }

    def _parts(self, text: str) -> Iterable[str]:
        if not text:
            return ()
        if self.delimiter == " ":
            return text.split()
        # A tag file may go over several lines with commas at their ends.
        return (part.strip() for part in re.sub(r",?\s*\n", ",", text).split(",")) if self.delimiter == "," else (
            part.strip() for part in text.split(self.delimiter)
        )  # fmt: skip


def _check(names: Sequence[str], refuse: Callable[[str], NoReturn]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        refuse(f"the label {shortened(repr(twice))} is there twice" if twice else "a label is empty")
    for name in names:
        if not name:
            refuse("a label is empty")
        if FRACTION.fullmatch(name):
            refuse(f"the label {name} is a number below one, as in the boxes of a detector. Labels are names")
        if name[0] in "[{" and name[-1] not in "]}":
            refuse(f"the label {shortened(repr(name))} opens a list. Write the names alone, with ; between them")
        if not is_class_name(name):
            refuse(
                f"the label {shortened(repr(name))} is no class's name: it is longer than {MAX_NAME} characters or "
                "holds a line's end or another control character"
            )
