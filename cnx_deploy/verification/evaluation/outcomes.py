"""What a runner made of one image; the list of all of them as a CSV file."""

import contextlib
import csv
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.files import whole_file

__all__ = ["TOP", "Outcome", "PredictionWriter"]

TOP = 5
"""Best classes that are kept of an image."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """An image, its label and its best classes with their probabilities (0 to 1), best first, five or all."""

    path: str
    label: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def predicted(self) -> str:
        """The best class."""
        return self.classes[0]

    @property
    def confidence(self) -> float:
        """The best class's probability."""
        return self.probabilities[0]

    @property
    def right(self) -> bool:
        """Whether the best class is the label."""
        return self.classes[0] == self.label

    def to_dict(self) -> dict[str, Any]:
        """What a list of mistakes says of it."""
        return {
            "path": self.path, "label": self.label, "predicted": self.predicted, "confidence": self.confidence
        }  # fmt: skip


class PredictionWriter:
    """A CSV file with a row an image: path, label, predicted, confidence, then predicted_2, confidence_2, up to 5.

    Use it as a context manager: the file is put into place when it ends without an error, else what was there stays.
    InputError, at once, for another suffix than .csv or the data's own file.
    """

    def __init__(self, path: Path, data: Path) -> None:
        if path.suffix.lower() != ".csv":
            raise InputError(f"{path} is no name for predictions: expected the suffix .csv. Give another.")
        if path.exists() and path.resolve() == data.resolve():
            raise InputError(f"{path} is the data itself: predictions would replace it. Give another name.")
        self.path = path
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        temporary = self._open.enter_context(whole_file(self.path))
        stream = self._open.enter_context(temporary.open("w", encoding="utf-8", newline=""))
        self._rows = csv.writer(stream, lineterminator="\n")
        others = [f"{name}_{place}" for place in range(2, TOP + 1) for name in ("predicted", "confidence")]
        self._rows.writerow(["path", "label", "predicted", "confidence", *others])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def add(self, outcome: Outcome) -> None:
        """Write one row."""
        pairs = zip(outcome.classes, outcome.probabilities, strict=True)
        cells = [cell for name, probability in pairs for cell in (name, f"{probability:.6f}")]
        self._rows.writerow([outcome.path, outcome.label, *cells, *[""] * (2 * TOP - len(cells))])
