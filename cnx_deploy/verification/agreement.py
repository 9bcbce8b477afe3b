"""Two runners on labelled images: how often each is right, how often they agree, and every image where they do not.

The images come in batches and only numbers of an image stay, so a folder of any size is judged in the memory of a
batch. A flip is excused by the rule of `parity.NOISE_MARGIN`, over all images of the run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.gates import Differences, Gate, ParityResult
from cnx_deploy.verification.parity import NOISE_MARGIN, differences

__all__ = ["Agreement", "BrokenImage", "Flip", "LabelledResult", "Tally"]

NO_CLASS = "none (NaN or infinite)"


@dataclass(frozen=True, slots=True)
class BrokenImage:
    """A file of the folder that could not be read, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return self.reason if self.path in self.reason else f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Flip:
    """An image to which reference and candidate give different classes, or one gives logits that are not finite.

    `margin`: the reference's best logit less its second. `largest_error`: the largest difference of this image's
    logits, at least half the margin wherever a class has flipped, so that it excuses nothing by itself.
    """

    path: str
    label: str
    reference: str
    margin: float
    candidate: str
    largest_error: float
    excused: bool


@dataclass(frozen=True, slots=True)
class Agreement:
    """What both sides made of `images` images out of `available` in the folder.

    `rms_error` is over all logits of the run; a flip is excused where the margin is at most `excused_margin`.
    """

    images: int
    available: int
    reference_correct: int
    candidate_correct: int
    agreeing: int
    rms_error: float
    excused_margin: float
    flips: tuple[Flip, ...]
    broken: tuple[BrokenImage, ...] = ()

    @property
    def unexcused(self) -> tuple[Flip, ...]:
        """The flips that rounding noise does not explain."""
        return tuple(flip for flip in self.flips if not flip.excused)


@dataclass(frozen=True, slots=True)
class LabelledResult(ParityResult):
    """A verdict over labelled images: the gate's, and a failure for flips that are not excused."""

    agreement: Agreement

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it, with shares in percent."""
        document = ParityResult.to_dict(self)
        found, images = document["agreement"], self.agreement.images
        for name in ("reference_correct", "candidate_correct", "agreeing"):
            found[f"{name}_percent"] = 100.0 * found[name] / images
        return document

    def lines(self, at_most: int = 10) -> list[str]:
        """A summary, at most so many flips (unexcused ones first) and the images that could not be read."""
        found = self.agreement
        share = {
            name: f"{100.0 * getattr(found, name) / found.images:.2f} %"
            for name in ("reference_correct", "candidate_correct", "agreeing")
        }
        text = [
            f"labels, {found.images} of {found.available} images: top-1 {self.reference} {share['reference_correct']}, "
            f"{self.candidate} {share['candidate_correct']}; same class {share['agreeing']}; {self._flips()}"
        ]
        text += [
            f"  {flip.path}: label {flip.label}, {self.reference} {flip.reference} by {flip.margin:.2e}, "
            f"{self.candidate} {flip.candidate}, largest error {flip.largest_error:.2e}: "
            f"{'excused' if flip.excused else 'NOT EXCUSED'}"
            for flip in found.flips[:at_most]
        ]
        if len(found.flips) > at_most:
            text.append(f"  and {len(found.flips) - at_most} more flips: --json lists all")
        text += [f"  not read, not counted: {image}" for image in found.broken]
        return text

    def _flips(self) -> str:
        found = self.agreement
        if not found.flips:
            return "no flips"
        return f"{len(found.flips)} flips, {len(found.unexcused)} not excused (margin above {found.excused_margin:.2e})"


class Tally:
    """Counts batch by batch. Holds a few numbers an image, and no image and no logits."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = class_names
        self._paths: list[str] = []
        self._labels: list[int] = []
        self._rows: list[Tensor] = []
        self._whole: list[Differences] = []
        self._squares = self._largest = self._sum = self._sum_of_squares = 0.0

    def add(self, candidate: Tensor, reference: Tensor, labels: Sequence[int], paths: Sequence[str]) -> None:
        """Logits (N, num_classes) of both sides for the same images; a label is an index of the logits.

        Raises InputError when the shapes differ or there is no image.
        """
        self._whole.append(differences(candidate, reference))
        a, b = candidate.detach().double().cpu(), reference.detach().double().cpu()
        error = a - b
        largest = error.abs().amax(dim=1)
        length = b.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        columns = (error.norm(dim=1) / length, _margins(b), largest, _best(a).double(), _best(b).double())
        self._rows.append(torch.stack(columns, dim=1))
        self._squares += float(error.square().sum())
        self._largest = max(self._largest, float(largest.max()))
        self._sum += float(b.sum())
        self._sum_of_squares += float(b.square().sum())
        self._labels.extend(labels)
        self._paths.extend(paths)

    def result(
        self,
        names: tuple[str, str],
        gate: Gate,
        batches: Sequence[int],
        *,
        available: int,
        broken: tuple[BrokenImage, ...] = (),
    ) -> LabelledResult:
        """The verdict. `names`: candidate and reference; `batches`: sizes that the candidate was run at."""
        agreement = self._agreement(available, broken)
        found = self._differences(agreement)
        failures = gate.failures(found)
        if unexcused := len(agreement.unexcused):
            failures += (f"{unexcused} flips of top-1 by more than noise explains",)
        return LabelledResult(*names, gate, tuple(dict.fromkeys(batches)), found, failures, agreement)

    @property
    def _logits(self) -> int:
        return len(self._paths) * len(self.class_names)

    def _agreement(self, available: int, broken: tuple[BrokenImage, ...]) -> Agreement:
        _, margins, errors, candidate, reference = torch.cat(self._rows).unbind(dim=1)
        labels = torch.tensor(self._labels, dtype=torch.float64)
        rms = math.sqrt(self._squares / self._logits) if math.isfinite(self._squares) else math.nan
        same = (candidate == reference) & (candidate >= 0)
        excused = (margins <= NOISE_MARGIN * rms) & (candidate >= 0) & (reference >= 0)
        flips = [
            Flip(
                path=self._paths[at],
                label=self._name(self._labels[at]),
                reference=self._name(int(reference[at])),
                margin=float(margins[at]),
                candidate=self._name(int(candidate[at])),
                largest_error=float(errors[at]),
                excused=bool(excused[at]),
            )
            for at in (~same).nonzero().flatten().tolist()
        ]
        return Agreement(
            images=len(labels),
            available=available,
            reference_correct=int((reference == labels).sum()),
            candidate_correct=int((candidate == labels).sum()),
            agreeing=int(same.sum()),
            rms_error=rms,
            excused_margin=NOISE_MARGIN * rms,
            flips=tuple(sorted(flips, key=_severity)),
            broken=broken,
        )

    def _differences(self, agreement: Agreement) -> Differences:
        """What `parity.differences` says of all batches together."""
        relative_l2 = torch.cat(self._rows)[:, 0]
        count, nan = agreement.images, float("nan")
        nonfinite = sum(part.nonfinite_count for part in self._whole)
        if nonfinite:
            return Differences(count, nonfinite, nan, nan, nan, nan, 0, 0, nan, nan)
        mean = self._sum / self._logits
        spread = math.sqrt(max(self._sum_of_squares / self._logits - mean * mean, 0.0))
        unexcused = len(agreement.unexcused)
        return Differences(
            samples=count,
            nonfinite_count=0,
            relative_l2_median=float(relative_l2.median()),
            relative_l2_max=float(relative_l2.max()),
            centred_cosine_min=min(part.centred_cosine_min for part in self._whole),
            top1_agreement=1.0 - unexcused / count,
            flips=len(agreement.flips),
            excused_flips=len(agreement.flips) - unexcused,
            mean_kl=sum(part.mean_kl * part.samples for part in self._whole) / count,
            max_abs_in_std=self._largest / max(spread, torch.finfo(torch.float64).tiny),
        )

    def _name(self, index: int) -> str:
        return self.class_names[index] if index >= 0 else NO_CLASS


def _severity(flip: Flip) -> tuple[bool, float]:
    """Unexcused flips first, then by margin, those without a margin before all."""
    return flip.excused, -flip.margin if math.isfinite(flip.margin) else -math.inf


def _best(logits: Tensor) -> Tensor:
    """(N,) index of the best class, the first of equal ones; -1 where a logit is not finite."""
    return torch.where(torch.isfinite(logits).all(dim=1), logits.argmax(dim=1), -1)


def _margins(logits: Tensor) -> Tensor:
    """(N,) best logit less the second best; infinite where there is one class only."""
    if logits.shape[1] == 1:
        return torch.full((len(logits),), math.inf, dtype=torch.float64)
    best = logits.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]
