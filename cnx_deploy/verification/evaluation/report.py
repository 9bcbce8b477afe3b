"""What an evaluation says to people: accuracy, classes, what is mistaken for what, confidence, files."""

import math
from collections.abc import Iterator

from cnx_deploy.verification.evaluation.results import ClassResult, Evaluation

__all__ = ["lines_of"]

LISTED = 40
"""Classes that are listed in full; of more, the worst."""
WORST_CLASSES = 20
PAIRS = 10
BROKEN = 10


def lines_of(found: Evaluation) -> Iterator[str]:
    """The report, line by line. `--json` has everything that is cut here."""
    yield f"top-1 {found.top1_percent:.2f} %, top-5 {found.top5_percent:.2f} %"
    macro = f"precision {100 * found.macro_precision:.2f} %, recall {100 * found.macro_recall:.2f} %"
    yield f"mean over classes: {macro}, F1 {100 * found.macro_f1:.2f} %"
    yield from _calibration(found)
    yield from _classes(found)
    yield from _pairs(found)
    if found.worst:
        yield f"the most confident mistakes ({len(found.worst)} of {found.count - found.correct_top1}):"
    for one in found.worst:
        yield f"  {100 * one.confidence:6.2f} % {one.predicted}, is {one.label}: {one.path}"
    if found.broken:
        total = found.count + len(found.broken)
        yield f"{len(found.broken)} of {total} images cannot be read and are not counted:"
        yield from (f"  {image.reason}" for image in found.broken[:BROKEN])
        yield from [f"  … and {len(found.broken) - BROKEN} more"] * (len(found.broken) > BROKEN)


def _calibration(found: Evaluation) -> Iterator[str]:
    confidence = found.calibration.mean_confidence - found.correct_top1 / found.count
    side = "above" if confidence > 0 else "below"
    yield (
        f"calibration error {100 * found.calibration.expected_error:.2f} % ({len(found.calibration.bins)} bins), mean "
        f"confidence {100 * abs(confidence):.2f} points {side} top-1, negative log-likelihood {found.mean_nll:.4f}"
    )


def _classes(found: Evaluation) -> Iterator[str]:
    shown = list(found.per_class)
    if len(shown) > LISTED:
        shown = sorted((each for each in shown if each.count), key=lambda each: each.f1)[:WORST_CLASSES]
        yield f"the {len(shown)} classes of the lowest F1 of {len(found.per_class)} (all of them: --json):"
    yield f"  {'class':24} {'images':>6} {'correct':>7} {'precision':>9} {'recall':>8} {'F1':>8}"
    yield from (_class_line(each) for each in shown)


def _class_line(each: ClassResult) -> str:
    rates = (f"{'-':>6}  " if math.isnan(rate) else f"{100 * rate:6.2f} %" for rate in (each.recall, each.f1))
    return f"  {each.name:24} {each.count:>6} {each.correct:>7} {100 * each.precision:>7.2f} % {' '.join(rates)}"


def _pairs(found: Evaluation) -> Iterator[str]:
    pairs = found.confused_pairs
    if not pairs:
        return
    images = {each.name: each.count for each in found.per_class}
    yield f"most often confused ({min(PAIRS, len(pairs))} of {len(pairs)} pairs):"
    for cell in pairs[:PAIRS]:
        share = 100 * cell.count / images[cell.label]
        yield f"  {cell.label} taken for {cell.predicted}: {cell.count} ({share:.1f} % of {cell.label})"
