"""JSON read with types: a value is what it should be, or a ValueError says where it is not and what is there."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy.core.strict_json import LARGEST, command_document, kind_of

__all__ = ["Fields", "Source", "read_document"]


LARGEST_COUNT = 2**63


@dataclass(frozen=True, slots=True)
class Source:
    """The file that figures come from: its name and the hash of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object and the path to it. Every method raises ValueError for an absent key or another type.

    `maybe_…` give None for null and for an absent key: JSON has no NaN, so null is what a measurement that is not
    finite became.
    """

    values: Mapping[str, Any]
    where: str = ""

    @classmethod
    def of(cls, value: Any, where: str) -> "Fields":
        """Wrap a value that has to be an object."""
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'the document'} is {kind_of(value)}, expected an object")
        return cls(value, where)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def text(self, key: str) -> str:
        """A string."""
        return str(self._typed(key, str, "text"))

    def flag(self, key: str) -> bool:
        """True or false."""
        return bool(self._typed(key, bool, "true or false"))

    def number(self, key: str) -> float:
        """A number that can be calculated with."""
        value = self._typed(key, (int, float), "a number")
        if isinstance(value, bool):
            raise ValueError(f"{self._name(key)} is true or false, expected a number")
        if not abs(value) <= LARGEST:  # NaN too
            raise ValueError(f"{self._name(key)} is {kind_of(value)}, expected a number up to {LARGEST:g}")
        return float(value)

    def positive(self, key: str) -> float:
        """A number above 0, to divide by."""
        value = self.number(key)
        if not value >= 1 / LARGEST:
            raise ValueError(f"{self._name(key)} is {self._get(key)!r}, expected more than 0")
        return value

    def maybe_number(self, key: str) -> float | None:
        """A number or None."""
        return self.number(key) if self.has(key) else None

    def integer(self, key: str) -> int:
        """A whole number."""
        value = self._typed(key, int, "a whole number")
        if isinstance(value, bool):
            raise ValueError(f"{self._name(key)} is true or false, expected a whole number")
        if not abs(value) <= LARGEST_COUNT:
            raise ValueError(f"{self._name(key)} is {kind_of(value)}, expected a whole number up to {LARGEST_COUNT}")
        return int(value)

    def maybe_integer(self, key: str) -> int | None:
        """A whole number or None."""
        return self.integer(key) if self.has(key) else None

    def child(self, key: str) -> "Fields":
        """An object."""
        return Fields.of(self._get(key), self._name(key))

    def maybe_child(self, key: str) -> "Fields | None":
        """An object or None."""
        return self.child(key) if self.has(key) else None

    def children(self, key: str) -> tuple["Fields", ...]:
        """A list of objects."""
        values = self._typed(key, (list, tuple), "a list")
        return tuple(Fields.of(value, f"{self._name(key)}[{at}]") for at, value in enumerate(values))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._typed(key, (list, tuple), "a list")
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self._name(key)} holds something else than texts")
        return tuple(values)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        values = self._typed(key, (list, tuple), "a list")
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise ValueError(f"{self._name(key)} holds something else than whole numbers")
        return tuple(values)

    def text_items(self, key: str) -> tuple[tuple[str, str], ...]:
        """The pairs of an object whose values are strings, in its order."""
        child = self.child(key)
        return tuple((name, child.text(name)) for name in child.values)

    def _name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise ValueError(f"{self._name(key)} is missing")
        return self.values[key]

    def _typed(self, key: str, kinds: type | tuple[type, ...], expected: str) -> Any:
        value = self._get(key)
        if not isinstance(value, kinds):
            raise ValueError(f"{self._name(key)} is {kind_of(value)}, expected {expected}")
        return value


def read_document(path: Path, command: str) -> tuple[Source, Fields]:
    """Read what `command --json` printed; see `documents.command_document` for what is InputError."""
    values, content = command_document(path, command)
    return Source(path.name, hashlib.sha256(content).hexdigest()), Fields(values)
