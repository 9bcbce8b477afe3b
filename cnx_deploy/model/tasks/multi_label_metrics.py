"""Metrics of several labels an image: mean average precision, F1 at thresholds, and thresholds of the largest F1.

A rank takes all scores of a label, so they go to a temporary file, 4 bytes each, and come back some labels at a time:
memory is bounded by `BLOCK_VALUES`, whatever the number of images and labels. Labels stay as pairs (image, label).
"""

import json
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.files import write_text
from cnx_deploy.core.preprocessing import BrokenImage
from cnx_deploy.model.tasks.classification_metrics import ClassResult

__all__ = [
    "DEFAULT_THRESHOLD", "FEWEST_POSITIVES", "LabelOutcome", "LabelResult", "MultiLabelEvaluation", "RunningLabels",
    "ScoreTable", "ThresholdFit", "average_precisions", "fit_thresholds", "measured", "probabilities_of",
]  # fmt: skip

BLOCK_VALUES = 1 << 24
"""Scores that are in memory at once: 64 MiB, and about six times that while they are sorted."""
DEFAULT_THRESHOLD = 0.5
FEWEST_POSITIVES = 5
"""Images that a label needs for a threshold of its own: the best one of fewer is chance."""
LIMIT = math.log((1 - 1e-4) / 1e-4)
"""Thresholds are probabilities from 0.0001 to 0.9999; as logits, from -9.21 to 9.21."""
BINS = 4096
"""Steps of the common threshold, 0.0045 as logits."""
LISTED_LABELS, WORST_LABELS = 40, 20
"""Labels that a report lists in full; of more, it lists so many of the lowest average precision."""
LISTED_BROKEN = 10
SHOWN_NAMES = 20


@dataclass(frozen=True, slots=True)
class LabelOutcome:
    """An image, its labels, and those at or above their thresholds with their probabilities, best first."""

    columns: ClassVar[tuple[str, ...]] = ("path", "labels", "predicted", "probabilities")

    path: str
    labels: tuple[str, ...]
    predicted: tuple[str, ...]
    probabilities: tuple[float, ...]

    def cells(self) -> list[str]:
        """The row of a table, with | between the labels."""
        shares = "|".join(f"{probability:.6f}" for probability in self.probabilities)
        return [self.path, "|".join(self.labels), "|".join(self.predicted), shares]


@dataclass(frozen=True, slots=True)
class LabelResult(ClassResult):
    """One label: `count` images have it, `predicted` are at or above its threshold, `correct` are both.

    Average precision is NaN for a label without images.
    """

    threshold: float
    average_precision: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiLabelEvaluation:
    """`count` images that could be read; `broken` could not and count nowhere else.

    `per_label` has the data's labels in their order; `not_judged` is the number of the model's labels that the data do
    not name. Macro rates and the mean average precision are means over the labels that have images; micro rates are of
    all pairs of an image and a label. `notes` say how the data were understood and what was assumed.
    """

    count: int
    per_label: tuple[LabelResult, ...]
    not_judged: int = 0
    broken: tuple[BrokenImage, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def mean_average_precision(self) -> float:
        """Mean over labels of the average precision, 0 to 1."""
        return self._macro("average_precision")

    @property
    def macro_f1(self) -> float:
        """Mean F1."""
        return self._macro("f1")

    @property
    def micro_f1(self) -> float:
        """F1 of all pairs."""
        return 2.0 * self._sum("correct") / max(1, self._sum("count") + self._sum("predicted"))

    @property
    def micro_precision(self) -> float:
        """Precision of all pairs."""
        return self._sum("correct") / max(1, self._sum("predicted"))

    @property
    def micro_recall(self) -> float:
        """Recall of all pairs."""
        return self._sum("correct") / max(1, self._sum("count"))

    @property
    def without_images(self) -> tuple[str, ...]:
        """The labels that no image has, which have no share in mean average precision and macro rates."""
        return tuple(row.name for row in self.per_label if not row.count)

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        rates = ("mean_average_precision", "micro_f1", "macro_f1", "micro_precision", "micro_recall", "without_images")
        values = {name: getattr(self, name) for name in rates}
        return {**asdict(self), **values, "per_label": [row.to_dict() for row in self.per_label]}

    def lines(self) -> Iterator[str]:
        """The report for people, line by line; `to_dict` has everything that is cut here."""
        judged = [row for row in self.per_label if row.count]
        yield f"mAP {100 * self.mean_average_precision:.2f} % over {len(judged)} of {len(self.per_label)} labels"
        if missing := self.without_images:
            more = " …" if len(missing) > SHOWN_NAMES else ""
            names = f"{', '.join(missing[:SHOWN_NAMES])}{more}"
            yield f"{len(missing)} labels have no image and are left out of means: {names}"
        if self.not_judged:
            yield f"{self.not_judged} labels of the model are none of the data's and are not judged"
        low, high = (choose(row.threshold for row in self.per_label) for choose in (min, max))
        yield (
            f"at thresholds {f'of {low:.4g}' if low == high else f'from {low:.4g} to {high:.4g}'}: micro F1 "
            f"{100 * self.micro_f1:.2f} %, macro F1 {100 * self.macro_f1:.2f} %, precision "
            f"{100 * self.micro_precision:.2f} %, recall {100 * self.micro_recall:.2f} %"
        )
        pairs, given = (self._sum(name) / self.count for name in ("count", "predicted"))
        yield f"labels an image: {pairs:.2f}, predicted {given:.2f}"
        yield from _label_table(self.per_label)
        if self.broken:
            yield f"{len(self.broken)} of {self.count + len(self.broken)} images cannot be read and are not counted:"
            yield from (f"  {image.reason}" for image in self.broken[:LISTED_BROKEN])
            if len(self.broken) > LISTED_BROKEN:
                yield f"  … and {len(self.broken) - LISTED_BROKEN} more"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _sum(self, name: str) -> int:
        return sum(getattr(row, name) for row in self.per_label)

    def _macro(self, rate: str) -> float:
        values = [getattr(row, rate) for row in self.per_label if row.count]
        return math.fsum(values) / len(values) if values else math.nan


@dataclass(frozen=True, slots=True)
class ThresholdFit:
    """A threshold for each label of a network, in its order, fitted on `count` images.

    `common` is that of the labels with fewer than `FEWEST_POSITIVES` images, `shared` of them. `names` may be empty.
    """

    thresholds: tuple[float, ...]
    common: float
    shared: int
    count: int
    names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, thresholds by name, or by index where there are no names."""
        names = self.names or tuple(map(str, range(len(self.thresholds))))
        known = {"common": self.common, "shared": self.shared, "count": self.count}
        return {**known, "thresholds": dict(zip(names, self.thresholds, strict=True))}

    def save(self, path: Path) -> Path:
        """Write the file that `export --thresholds` takes, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    def __str__(self) -> str:
        own = len(self.thresholds) - self.shared
        return (
            f"thresholds of the largest F1 on these {self.count} images: {own} of {len(self.thresholds)} labels have "
            f"their own, from {min(self.thresholds):.4g} to {max(self.thresholds):.4g}; {self.shared} with fewer than "
            f"{FEWEST_POSITIVES} images have the common one, {self.common:.4g}"
        )


class ScoreTable:
    """Probabilities (N, labels) of images and which labels they have, kept in a temporary file.

    The file vanishes with the object.
    """

    def __init__(self, labels: int) -> None:
        self.labels, self.count = labels, 0
        self._pairs: list[Tensor] = []
        self._stream = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the object
        weakref.finalize(self, self._stream.close)

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """Scores (n, labels), kept as float32, and targets (n, labels) of 0 and 1."""
        self._stream.write(scores.detach().float().cpu().contiguous().numpy().data)
        pairs = targets.detach().cpu().nonzero().int()
        pairs[:, 0] += self.count
        self._pairs.append(pairs)
        self.count += len(scores)

    def blocks(self, images: int | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some labels at a time: which, their scores (N, some) float32, and (N, some) bool.

        `images` in place of N decides how many labels that is.
        """
        self._stream.flush()
        table = np.memmap(self._stream, np.float32, "r", shape=(self.count, self.labels))
        pairs = torch.cat(self._pairs).long()
        width = max(1, BLOCK_VALUES // (images or self.count))
        for start in range(0, self.labels, width):
            some = slice(start, min(start + width, self.labels))
            inside = pairs[(pairs[:, 1] >= some.start) & (pairs[:, 1] < some.stop)]
            held = torch.zeros(self.count, some.stop - some.start, dtype=torch.bool)
            held[inside[:, 0], inside[:, 1] - some.start] = True
            yield some, torch.from_numpy(table[:, some].copy()), held


class RunningLabels:
    """Scores and labels over batches.

    Args:
        names: the model's labels in the order of the scores.
        thresholds: the probability at which each is given; None is `DEFAULT_THRESHOLD` for all.
        each: told every image's outcome, in order.
    """

    def __init__(
        self,
        names: Sequence[str],
        thresholds: Sequence[float] | None = None,
        each: Callable[[LabelOutcome], None] | None = None,
    ) -> None:
        self.table = ScoreTable(len(names))
        self._names, self._each = names, each
        self._thresholds = torch.tensor(thresholds or [DEFAULT_THRESHOLD] * len(names), dtype=torch.float64)

    @property
    def count(self) -> int:
        """Images so far."""
        return self.table.count

    def add(self, outputs: Mapping[str, Tensor], targets: Tensor, paths: Sequence[str]) -> None:
        """Count finite outputs "probabilities" or "logits" (N, labels), targets (N, labels) and the images' names."""
        scores = probabilities_of(outputs)
        self.table.add(scores, targets)
        if self._each is None:
            return
        given = scores.double() >= self._thresholds
        for path, row, mine, labels in zip(paths, scores, given, targets, strict=True):
            best = mine.nonzero().flatten()
            best = best[row[best].argsort(descending=True, stable=True)]
            held = tuple(self._names[at] for at in labels.nonzero().flatten().tolist())
            predicted = tuple(self._names[at] for at in best.tolist())
            self._each(LabelOutcome(str(path), held, predicted, tuple(row[best].tolist())))

    def result(
        self, classes: Sequence[str], broken: Sequence[BrokenImage] = (), notes: Sequence[str] = ()
    ) -> MultiLabelEvaluation:
        """The metrics over the data's `classes`."""
        whole = measured(self.table, self._thresholds.tolist(), self._names)
        rows = {row.name: row for row in whole.per_label}
        judged = tuple(rows[name] for name in classes if name in rows)
        return MultiLabelEvaluation(
            count=self.count, per_label=judged, not_judged=len(self._names) - len(judged), broken=tuple(broken),
            notes=tuple(notes),
        )  # fmt: skip


def measured(table: ScoreTable, thresholds: Sequence[float], names: Sequence[str]) -> MultiLabelEvaluation:
    """The metrics of all labels of a table at these thresholds."""
    columns = torch.zeros(4, table.labels, dtype=torch.float64)  # images, correct, predicted, average precision
    cuts = torch.tensor(thresholds, dtype=torch.float64)
    for some, scores, held in table.blocks():
        given = scores.double() >= cuts[some]
        columns[:, some] = torch.stack(
            [held.sum(dim=0), (given & held).sum(dim=0), given.sum(dim=0), average_precisions(scores, held)]
        )
    counts, precisions = columns[:3].int().tolist(), columns[3].tolist()
    rows = (LabelResult(*row) for row in zip(names, *counts, thresholds, precisions, strict=True))
    return MultiLabelEvaluation(count=table.count, per_label=tuple(rows))


def probabilities_of(outputs: Mapping[str, Tensor]) -> Tensor:
    """The output "probabilities" (N, labels), or those of the logits in FP32. InputError where a file gives neither."""
    if "probabilities" in outputs or "logits" in outputs:
        return outputs["probabilities"] if "probabilities" in outputs else outputs["logits"].float().sigmoid()
    raise InputError(
        f"A file of {', '.join(outputs)} gives no probability of each label. Export it with --output probabilities."
    )


def average_precisions(scores: Tensor, held: Tensor) -> Tensor:
    """Average precision of each label, float64, from scores (N, labels) and bools (N, labels); NaN without images.

    The sum over the images of a label of the precision at their score, images of one score counted together, over
    their number, as scikit-learn's `average_precision_score` has it.
    """
    _, right, hits, places = _ranked(scores, held)
    return (right * hits / places).sum(dim=0) / held.sum(dim=0)


def fit_thresholds(table: ScoreTable) -> ThresholdFit:
    """Find for each label the threshold of the largest F1, half-way as logits between the scores around it.

    A label with fewer than `FEWEST_POSITIVES` images gets the common one, of the largest micro F1 of all labels.
    """
    thresholds = torch.empty(table.labels, dtype=torch.float64)
    counts = torch.zeros(table.labels, dtype=torch.int64)
    totals = torch.zeros(2, BINS, dtype=torch.int64)  # pairs in all, and those that an image has
    for some, scores, held in table.blocks():
        logits = torch.logit(scores.double()).clamp(-LIMIT, LIMIT)
        bins = ((logits + LIMIT) * (BINS / (2 * LIMIT))).long().clamp_max(BINS - 1)
        totals[0] += torch.bincount(bins.flatten(), minlength=BINS)
        totals[1] += torch.bincount(bins[held], minlength=BINS)
        counts[some] = held.sum(dim=0)
        ordered, _, hits, places = _ranked(logits, held)
        best = (hits / (places + counts[some])).argmax(dim=0, keepdim=True)
        last = places.gather(0, best).long() - 1  # the lowest score that is accepted
        lowest = ordered.gather(0, last)
        # Where every image is accepted there is no score below: a little less, for rounding.
        lower = torch.where(last + 1 < table.count, ordered.gather(0, (last + 1) % table.count), lowest - 1e-6)
        thresholds[some] = torch.sigmoid((lowest + lower) / 2)[0]
    given, right = totals.flip(1).cumsum(1).flip(1).double()  # at or above each bin's lower edge
    at = int((right / (given + counts.sum())).argmax()) if counts.sum() else BINS // 2
    common = float(torch.sigmoid(torch.tensor(at * 2 * LIMIT / BINS - LIMIT, dtype=torch.float64)))
    few = counts < FEWEST_POSITIVES
    thresholds[few] = common
    return ThresholdFit(tuple(thresholds.tolist()), common, int(few.sum()), table.count)


def _ranked(scores: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores from high to low, which of them are held, and hits and places up to the last of the same score."""
    ordered, order = scores.sort(dim=0, descending=True)
    right = held.gather(0, order)
    hits, places = right.cumsum(dim=0).double(), torch.arange(1, len(scores) + 1).double()[:, None].expand_as(scores)
    is_last = torch.ones_like(right)
    is_last[:-1] = ordered[:-1] != ordered[1:]

    def at_the_last(values: Tensor) -> Tensor:
        return torch.where(is_last, values, math.inf).flip(0).cummin(dim=0).values.flip(0)

    return ordered, right.double(), at_the_last(hits), at_the_last(places)


def _label_table(rows: Sequence[LabelResult]) -> Iterator[str]:
    shown = rows
    if len(rows) > LISTED_LABELS:
        shown = sorted((row for row in rows if row.count), key=lambda row: row.average_precision)[:WORST_LABELS]
        yield f"the {len(shown)} labels of the lowest average precision of {len(rows)} (all of them: --json):"
    columns = ("images", "given", "threshold", "AP", "precision", "recall", "F1")
    yield f"  {'label':24} " + " ".join(f"{name:>9}" for name in columns)
    for row in shown:
        rates = (row.average_precision, row.precision, row.recall, row.f1)
        cells = ("-" if math.isnan(rate) else f"{100 * rate:.2f} %" for rate in rates)
        numbers = " ".join(f"{cell:>9}" for cell in (row.count, row.predicted, f"{row.threshold:.4f}", *cells))
        yield f"  {row.name:24} {numbers}"
