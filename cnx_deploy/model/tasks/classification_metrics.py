"""Metrics of a classifier on labelled images: top-1 and top-5, rates by class, confusion and calibration.

The images come batch by batch and only sums stay, so that a folder of any size is judged in the memory of a batch.
"""

import contextlib
import csv
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.files import whole_file
from cnx_deploy.core.preprocessing import BrokenImage

__all__ = [
    "Calibration", "CalibrationBin", "ClassResult", "ConfusionCell", "Evaluation", "Outcome", "PredictionWriter",
    "RunningMetrics", "bins_of", "class_scores",
]  # fmt: skip

BINS = 15
"""Bins of the calibration error, as in the tables of its paper."""
# On the CPU by name: a task may be imported while a model is made on the meta device, which would take this with it.
EDGES = torch.linspace(0.0, 1.0, BINS + 1, dtype=torch.float64, device="cpu")
TOP = 5
"""Best classes that are kept of an image."""
WORST = 10
"""Mistakes that are kept."""
LISTED_CLASSES, WORST_CLASSES = 40, 20
"""Classes that a report lists in full; of more, it lists so many of the lowest F1."""
LISTED_PAIRS = LISTED_BROKEN = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """An image, its label and its best classes with their probabilities (0 to 1), best first, five or all."""

    columns: ClassVar[tuple[str, ...]] = (
        "path", "label", "predicted", "confidence",
        *(f"{name}_{place}" for place in range(2, TOP + 1) for name in ("predicted", "confidence")),
    )  # fmt: skip

    path: str
    label: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def cells(self) -> list[str]:
        """The row of a table, empty beyond the last class."""
        pairs = zip(self.classes, self.probabilities, strict=True)
        cells = [cell for name, probability in pairs for cell in (name, f"{probability:.6f}")]
        return [self.path, self.label, *cells, *[""] * (2 * TOP - len(cells))]

    def to_dict(self) -> dict[str, Any]:
        """The best class only, as a list of mistakes has it."""
        best = {"predicted": self.classes[0], "confidence": self.probabilities[0]}
        return {"path": self.path, "label": self.label, **best}


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class: `count` images have it as their label, `predicted` were given it, `correct` are both.

    Recall and F1 are NaN for a class without images; precision is 0 for one that was never given.
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


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Images whose confidence lies in (`lower`, `upper`], their mean confidence and accuracy; 0 without any."""

    lower: float
    upper: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """`expected_error` in [0, 1]; `mean_confidence` in [0, 1] is above the accuracy where a model is overconfident.

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, equations 2, 3 and 5: bins of
    equal width, open on the left; the error is the mean over images of |accuracy - confidence| of their bin.
    """

    expected_error: float
    mean_confidence: float
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """`count` images that could be read; `broken` could not and count nowhere else.

    `correct_top5` counts the label among the five (or all) best classes. `per_class` has the data's classes in their
    order; `confusion` every cell of the matrix that is not zero, by label and prediction in the model's order.
    `mean_nll` is -log of the label's probability, in nats. `worst` are the most confident mistakes. Macro rates are
    means over the classes that have images. `notes` say how the data were understood and what was assumed.
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
    notes: tuple[str, ...] = ()

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
        """Mean precision."""
        return self._macro("precision")

    @property
    def macro_recall(self) -> float:
        """Mean recall: balanced accuracy."""
        return self._macro("recall")

    @property
    def macro_f1(self) -> float:
        """Mean F1."""
        return self._macro("f1")

    @property
    def confused_pairs(self) -> tuple[ConfusionCell, ...]:
        """The cells off the diagonal, most images first."""
        wrong = (cell for cell in self.confusion if cell.label != cell.predicted)
        return tuple(sorted(wrong, key=lambda cell: -cell.count))

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        rates = ("top1_percent", "top5_percent", "macro_precision", "macro_recall", "macro_f1")
        return {
            **asdict(self),
            **{name: getattr(self, name) for name in rates},
            "per_class": [row.to_dict() for row in self.per_class],
            "worst": [outcome.to_dict() for outcome in self.worst],
        }

    def lines(self) -> Iterator[str]:
        """The report for people, line by line; `to_dict` has everything that is cut here."""
        return _report_lines(self)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _macro(self, rate: str) -> float:
        present = [getattr(row, rate) for row in self.per_class if row.count]
        return math.fsum(present) / len(present)


class RunningMetrics:
    """Sums over batches of logits and labels.

    Not torchmetrics: its calibration error gives no bins to draw and puts a confidence of 1 into a bin of its own, its
    top-k breaks ties at random, and its confusion matrix of 21,841 classes takes 3.8 GB where this counts cells.

    Args:
        names: the model's classes in the order of the logits.
        each: told every image's outcome, in order.
    """

    def __init__(self, names: Sequence[str], each: Callable[[Outcome], None] | None = None) -> None:
        self.count = 0
        self._names, self._each = names, each
        self._top1 = self._top5 = 0
        self._nll = 0.0
        self._cells = Counter[tuple[int, int]]()
        self._bins = torch.zeros(3, BINS, dtype=torch.float64)  # images, confidence, right answers
        self._worst: list[Outcome] = []

    def add(self, outputs: Mapping[str, Tensor], targets: Tensor, paths: Sequence[str]) -> None:
        """Count finite logits (N, classes), the index (N,) of each label among them, and the images' names."""
        logits, labels = class_scores(outputs), targets
        if logits is None:
            raise InputError(
                f"The file gives {', '.join(outputs)}, and metrics need logits or probabilities of every class. Export "
                "it with --output logits."
            )
        own = logits.gather(1, labels[:, None])  # (N, 1)
        # Of equal logits the first class is the better one, here and in the stable sort below.
        earlier = torch.arange(logits.shape[1])[None, :] < labels[:, None]
        ranks = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)  # (N,), 0 where the label is the best
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]  # (N, 5)
        logarithms = torch.log_softmax(logits.double(), dim=1)
        probabilities = logarithms.gather(1, order).exp()  # (N, 5)
        self.count += len(labels)
        self._top1 += int((ranks == 0).sum())
        self._top5 += int((ranks < TOP).sum())
        self._nll -= float(logarithms.gather(1, labels[:, None]).sum())
        self._cells.update(zip(labels.tolist(), order[:, 0].tolist(), strict=True))
        confidences, bins = probabilities[:, 0], bins_of(probabilities[:, 0])
        for row, weights in enumerate((torch.ones_like(confidences), confidences, (ranks == 0).double())):
            self._bins[row] += torch.bincount(bins, weights, minlength=BINS)
        outcomes = [
            Outcome(str(path), self._names[label], tuple(self._names[at] for at in best), tuple(shares))
            for path, label, best, shares in zip(
                paths, labels.tolist(), order.tolist(), probabilities.tolist(), strict=True
            )
        ]
        mistakes = [outcome for outcome, rank in zip(outcomes, ranks.tolist(), strict=True) if rank]
        self._worst = sorted([*self._worst, *mistakes], key=lambda one: (-one.probabilities[0], one.path))[:WORST]
        if self._each is not None:
            for outcome in outcomes:
                self._each(outcome)

    def result(
        self, classes: Sequence[str], broken: Sequence[BrokenImage] = (), notes: Sequence[str] = ()
    ) -> Evaluation:
        """The metrics over the data's `classes`."""
        count, predicted = Counter[str](), Counter[str]()
        cells = [ConfusionCell(self._names[a], self._names[b], n) for (a, b), n in sorted(self._cells.items())]
        for cell in cells:
            count[cell.label] += cell.count
            predicted[cell.predicted] += cell.count
        right = {cell.label: cell.count for cell in cells if cell.label == cell.predicted}
        return Evaluation(
            count=self.count,
            correct_top1=self._top1,
            correct_top5=self._top5,
            per_class=tuple(ClassResult(name, count[name], right.get(name, 0), predicted[name]) for name in classes),
            confusion=tuple(cells),
            calibration=self._calibration(),
            mean_nll=self._nll / self.count,
            worst=tuple(self._worst),
            broken=tuple(broken),
            notes=tuple(notes),
        )

    def _calibration(self) -> Calibration:
        counts, confidences, right = self._bins
        filled = counts.clamp(min=1.0)
        edges = torch.linspace(0.0, 1.0, BINS + 1, dtype=torch.float64).tolist()
        columns = (
            edges[:-1],
            edges[1:],
            counts.int().tolist(),
            (confidences / filled).tolist(),
            (right / filled).tolist(),
        )
        return Calibration(
            expected_error=float((right - confidences).abs().sum() / counts.sum()),
            mean_confidence=float(confidences.sum() / counts.sum()),
            bins=tuple(CalibrationBin(*row) for row in zip(*columns, strict=True)),
        )


def class_scores(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """Logits (N, K) in float64, or the logarithms of probabilities, which differ from them by a constant an image."""
    if "logits" in outputs:
        return outputs["logits"].double()
    return outputs["probabilities"].double().clamp_min(1e-38).log() if "probabilities" in outputs else None


def bins_of(confidences: Tensor) -> Tensor:
    """(N,) float64 confidences in [0, 1] -> (N,) index of the bin of each, which holds its upper edge."""
    return torch.bucketize(confidences.contiguous(), EDGES[1:-1])


class PredictionWriter:
    """A CSV file with a row an image, of the columns that the task's outcomes have.

    Use it as a context manager: the file is put into place when it ends without an error, else what was there stays.
    InputError, at once, for another suffix than .csv or the data's own file.
    """

    def __init__(self, path: Path, data: Path) -> None:
        if path.suffix.lower() != ".csv":
            raise InputError(
                f"Predictions are written as CSV, and {path} has another suffix. Use a name that ends in .csv."
            )
        if path.exists() and path.resolve() == data.resolve():
            raise InputError(f"{path} is the data itself, and predictions would replace it. Choose another file name.")
        self.path = path
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        temporary = self._open.enter_context(whole_file(self.path))
        stream = self._open.enter_context(temporary.open("w", encoding="utf-8", newline=""))
        self._rows, self._has_header = csv.writer(stream, lineterminator="\n"), False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def add(self, outcome: Any) -> None:
        """Write one row, and the header before the first."""
        if not self._has_header:
            self._rows.writerow(outcome.columns)
            self._has_header = True
        self._rows.writerow(outcome.cells())


def _report_lines(evaluation: Evaluation) -> Iterator[str]:
    rates = (evaluation.macro_precision, evaluation.macro_recall, evaluation.macro_f1)
    yield f"top-1 {evaluation.top1_percent:.2f} %, top-5 {evaluation.top5_percent:.2f} %"
    yield "mean over classes: precision {:.2f} %, recall {:.2f} %, F1 {:.2f} %".format(*(100 * rate for rate in rates))
    calibration = evaluation.calibration
    points = 100 * calibration.mean_confidence - evaluation.top1_percent
    yield (
        f"calibration error {100 * calibration.expected_error:.2f} % ({BINS} bins), mean confidence {abs(points):.2f} "
        f"points {'above' if points > 0 else 'below'} top-1, negative log-likelihood {evaluation.mean_nll:.4f}"
    )
    yield from _class_table(evaluation.per_class)
    pairs = evaluation.confused_pairs
    if pairs:
        yield f"most often confused ({min(LISTED_PAIRS, len(pairs))} of {len(pairs)} pairs):"
    images = {row.name: row.count for row in evaluation.per_class}
    for cell in pairs[:LISTED_PAIRS]:
        share = 100 * cell.count / images[cell.label]
        yield f"  {cell.label} taken for {cell.predicted}: {cell.count} ({share:.1f} % of {cell.label})"
    if evaluation.worst:
        mistakes = evaluation.count - evaluation.correct_top1
        yield f"the most confident mistakes ({len(evaluation.worst)} of {mistakes}):"
    for one in evaluation.worst:
        yield f"  {100 * one.probabilities[0]:6.2f} % {one.classes[0]}, is {one.label}: {one.path}"
    if broken := evaluation.broken:
        yield f"{len(broken)} of {evaluation.count + len(broken)} images cannot be read and are not counted:"
        yield from (f"  {image.reason}" for image in broken[:LISTED_BROKEN])
        if len(broken) > LISTED_BROKEN:
            yield f"  … and {len(broken) - LISTED_BROKEN} more"


def _class_table(rows: Sequence[ClassResult]) -> Iterator[str]:
    shown = rows
    if len(rows) > LISTED_CLASSES:
        shown = sorted((row for row in rows if row.count), key=lambda row: row.f1)[:WORST_CLASSES]
        yield f"the {len(shown)} classes of the lowest F1 of {len(rows)} (all of them: --json):"
    yield f"  {'class':24} {'images':>6} {'correct':>7} {'precision':>9} {'recall':>8} {'F1':>8}"
    for row in shown:
        rates = (f"{'-':>6}  " if math.isnan(rate) else f"{100 * rate:6.2f} %" for rate in (row.recall, row.f1))
        yield f"  {row.name:24} {row.count:>6} {row.correct:>7} {100 * row.precision:>7.2f} % {' '.join(rates)}"
