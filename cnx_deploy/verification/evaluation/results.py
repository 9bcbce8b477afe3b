"""What an evaluation found: counts, and the rates that follow from them."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cnx_deploy.data import BrokenImage
from cnx_deploy.verification.evaluation.calibration import Calibration
from cnx_deploy.verification.evaluation.outcomes import Outcome

__all__ = ["ClassResult", "ConfusionCell", "Evaluation"]


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class: `count` images have it as their label, `predicted` were given it, `correct` are both.

    Recall is NaN for a class without images. Precision is 0 for one that was never given, and F1 with it.
    """

    name: str
    count: int
    correct: int
    predicted: int

    @property
    def precision(self) -> float:
        """Right answers among those given this class."""
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Right answers among those of this class."""
        return self.correct / self.count if self.count else math.nan

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2.0 * self.correct / (self.count + self.predicted) if self.count else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain types, rates included."""
        return {**asdict(self), "precision": self.precision, "recall": self.recall, "f1": self.f1}


@dataclass(frozen=True, slots=True)
class ConfusionCell:
    """So many images of the class `label` were given the class `predicted`."""

    label: str
    predicted: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """`count` images that could be read; `broken` could not and count nowhere else.

    `correct_top5` counts the label among the five (or all) best classes. `per_class` has the data's classes in their
    order; `confusion` every cell of the matrix that is not zero, by label and prediction in the model's order.
    `mean_nll` is -log of the label's probability, in nats. `worst` are the most confident mistakes.
    """

    count: int
    correct_top1: int
    correct_top5: int
    per_class: tuple[ClassResult, ...]
    confusion: tuple[ConfusionCell, ...]
    calibration: Calibration
    mean_nll: float
    worst: tuple[Outcome, ...] = ()
    broken: tuple[BrokenImage, ...] = ()

    @property
    def top1_percent(self) -> float:
        """Share of images whose best class is the label."""
        return 100.0 * self.correct_top1 / self.count

    @property
    def top5_percent(self) -> float:
        """Share of images whose label is among the five best classes."""
        return 100.0 * self.correct_top5 / self.count

    @property
    def macro_precision(self) -> float:
        """Mean over the classes that have images, each counting alike."""
        return self._macro(lambda each: each.precision)

    @property
    def macro_recall(self) -> float:
        """Mean over the classes that have images: balanced accuracy."""
        return self._macro(lambda each: each.recall)

    @property
    def macro_f1(self) -> float:
        """Mean of F1 over the classes that have images."""
        return self._macro(lambda each: each.f1)

    @property
    def confused_pairs(self) -> tuple[ConfusionCell, ...]:
        """The cells off the diagonal, most images first."""
        wrong = (cell for cell in self.confusion if cell.label != cell.predicted)
        return tuple(sorted(wrong, key=lambda cell: -cell.count))

    def to_dict(self) -> dict[str, Any]:
        """Plain types. `confusion` lists the cells that are not zero."""
        names = ("top1_percent", "top5_percent", "macro_precision", "macro_recall", "macro_f1")
        return {
            **asdict(self),
            **{name: getattr(self, name) for name in names},
            "per_class": [each.to_dict() for each in self.per_class],
            "worst": [each.to_dict() for each in self.worst],
        }

    def _macro(self, rate: Callable[[ClassResult], float]) -> float:
        present = [rate(each) for each in self.per_class if each.count]
        return math.fsum(present) / len(present)
