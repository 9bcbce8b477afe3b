"""Whether confidence is what it says: the expected calibration error, and the bins that it is made of.

Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, equations 2, 3 and 5: bins of equal
width, open on the left; the error is the mean over images of |accuracy - confidence| of their bin.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BINS", "Calibration", "CalibrationBin", "CalibrationTally"]

BINS = 15
"""As in the paper's tables."""


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
    """`expected_error` in [0, 1]; `mean_confidence` in [0, 1] is above the accuracy where a model is overconfident."""

    expected_error: float
    mean_confidence: float
    bins: tuple[CalibrationBin, ...]


class CalibrationTally:
    """Sums by bin over batches, so that no image is kept."""

    def __init__(self) -> None:
        self._edges = torch.linspace(0.0, 1.0, BINS + 1, dtype=torch.float64)
        self._sums = torch.zeros(3, BINS, dtype=torch.float64)  # images, confidence, right answers

    def add(self, confidences: Tensor, right: Tensor) -> None:
        """(N,) float64 probabilities of the best class, (N,) bool whether it is the label."""
        bins = torch.bucketize(confidences.contiguous(), self._edges[1:-1])  # (lower, upper]
        for row, weights in enumerate((torch.ones_like(confidences), confidences, right.double())):
            self._sums[row] += torch.bincount(bins, weights, minlength=BINS)

    def result(self) -> Calibration:
        """The error over everything added, which must be something."""
        counts, confidences, right = self._sums
        total = counts.sum()
        edges, filled = self._edges.tolist(), counts.clamp(min=1.0)
        columns = (
            edges[:-1],
            edges[1:],
            counts.int().tolist(),
            (confidences / filled).tolist(),
            (right / filled).tolist(),
        )
        return Calibration(
            expected_error=float((right - confidences).abs().sum() / total),
            mean_confidence=float(confidences.sum() / total),
            bins=tuple(CalibrationBin(*row) for row in zip(*columns, strict=True)),
        )
