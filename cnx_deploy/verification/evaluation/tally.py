"""Logits and labels counted batch by batch: nothing of an image stays but its share in the sums."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cnx_deploy.data import BrokenImage
from cnx_deploy.verification.evaluation.calibration import CalibrationTally
from cnx_deploy.verification.evaluation.outcomes import TOP, Outcome
from cnx_deploy.verification.evaluation.results import ClassResult, ConfusionCell, Evaluation

__all__ = ["Tally"]

WORST = 10
"""Mistakes that are kept."""


class Tally:
    """Counts over batches.

    Args:
        names: the model's classes in the order of the logits.
        each: told every image's outcome, in order.
    """

    def __init__(self, names: tuple[str, ...], each: Callable[[Outcome], None] | None = None) -> None:
        self.count = 0
        self._names, self._each = names, each
        self._top = [0, 0]
        self._nll = 0.0
        self._cells = Counter[tuple[int, int]]()
        self._calibration = CalibrationTally()
        self._worst: list[Outcome] = []

    def add(self, logits: Tensor, labels: Tensor, paths: Sequence[Path]) -> None:
        """(N, classes) finite logits, (N,) index of each label among them, and the files."""
        ranks = _label_ranks(logits, labels)
        logarithms = torch.log_softmax(logits.double(), dim=1)  # (N, classes)
        # Stable: of equal logits the first class is the better one, as in the ranks.
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
        probabilities = logarithms.gather(1, order).exp()  # (N, 5)
        self.count += len(labels)
        self._top[0] += int((ranks == 0).sum())
        self._top[1] += int((ranks < TOP).sum())
        self._nll -= float(logarithms.gather(1, labels[:, None]).sum())
        self._calibration.add(probabilities[:, 0], ranks == 0)
        self._cells.update(zip(labels.tolist(), order[:, 0].tolist(), strict=True))
        self._tell(labels.tolist(), order.tolist(), probabilities.tolist(), paths)

    def _tell(
        self, labels: list[int], order: list[list[int]], probabilities: list[list[float]], paths: Sequence[Path]
    ) -> None:
        mistakes = []
        for path, label, best, shares in zip(paths, labels, order, probabilities, strict=True):
            classes = tuple(self._names[index] for index in best)
            outcome = Outcome(str(path), self._names[label], classes, tuple(shares))
            if best[0] != label:
                mistakes.append(outcome)
            if self._each is not None:
                self._each(outcome)
        self._worst = sorted([*self._worst, *mistakes], key=lambda one: (-one.confidence, one.path))[:WORST]

    def result(self, classes: Sequence[str], broken: Sequence[BrokenImage] = ()) -> Evaluation:
        """The verdict over the data's `classes`."""
        count, predicted = Counter[str](), Counter[str]()
        cells = [ConfusionCell(self._names[a], self._names[b], n) for (a, b), n in sorted(self._cells.items())]
        for cell in cells:
            count[cell.label] += cell.count
            predicted[cell.predicted] += cell.count
        right = {cell.label: cell.count for cell in cells if cell.label == cell.predicted}
        return Evaluation(
            count=self.count,
            correct_top1=self._top[0],
            correct_top5=self._top[1],
            per_class=tuple(ClassResult(one, count[one], right.get(one, 0), predicted[one]) for one in classes),
            confusion=tuple(cells),
            calibration=self._calibration.result(),
            mean_nll=self._nll / self.count,
            worst=tuple(self._worst),
            broken=tuple(broken),
        )


def _label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) number of classes before the label: 0 when it is the best. Equal logits count in the order of classes."""
    own = logits.gather(1, labels[:, None])  # (N, 1)
    earlier = torch.arange(logits.shape[1])[None, :] < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
