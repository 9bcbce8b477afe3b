"""Two runners on the same images, batch by batch: how far they differ and, with labels, how often each is right.

Only numbers of an image stay, so a folder of any size is judged in the memory of a batch; of embeddings as much stays
as `verification.retrieval` says. Of labelled images every one
is listed where the two disagree. A flip is excused by the rule of `parity.NOISE_MARGIN`, over all images of the run.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.gates import Gate, OutputSpec, ParityResult
from cnx_deploy.core.preprocessing import BrokenImage
from cnx_deploy.verification.maps import RunningMapComparison, RunningPrecisionComparison
from cnx_deploy.verification.parity import NOISE_MARGIN, OutputComparison, RunningDifferences, margins
from cnx_deploy.verification.retrieval import RetrievalResult, RunningRetrieval

__all__ = ["Agreement", "Flip", "LabelledResult", "RunningComparison", "ThresholdResult", "Verification", "table_of"]

NO_CLASS = "none (NaN or infinite)"
LISTED_CROSSINGS = 100


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
    """What both sides made of `images` images out of `available` in the source.

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

    def percent(self, name: str) -> float:
        """`reference_correct`, `candidate_correct` or `agreeing` among all images."""
        return 100.0 * float(getattr(self, name)) / self.images


@dataclass(frozen=True, slots=True)
class LabelledResult(ParityResult):
    """A verdict over labelled images: the gate's, and a failure for flips that are not excused."""

    agreement: Agreement

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it, with shares in percent."""
        document = ParityResult.to_dict(self)
        for name in ("reference_correct", "candidate_correct", "agreeing"):
            document["agreement"][f"{name}_percent"] = self.agreement.percent(name)
        return document

    def lines(self, at_most: int = 10) -> list[str]:
        """A summary, at most so many flips (unexcused ones first) and the images that could not be read."""
        agreement, flips = self.agreement, "no flips"
        if agreement.flips:
            flips = f"{len(agreement.flips)} flips, {len(agreement.unexcused)} not excused (margin above "
            flips += f"{agreement.excused_margin:.2e})"
        text = [
            f"labels, {agreement.images} of {agreement.available} images: top-1 {self.reference} "
            f"{agreement.percent('reference_correct'):.2f} %, {self.candidate} "
            f"{agreement.percent('candidate_correct'):.2f} %; same class {agreement.percent('agreeing'):.2f} %; {flips}"
        ]
        text += [
            f"  {flip.path}: label {flip.label}, {self.reference} {flip.reference} by {flip.margin:.2e}, "
            f"{self.candidate} {flip.candidate}, largest error {flip.largest_error:.2e}: "
            f"{'excused' if flip.excused else 'NOT EXCUSED'}"
            for flip in agreement.flips[:at_most]
        ]
        if len(agreement.flips) > at_most:
            text.append(f"  and {len(agreement.flips) - at_most} more flips: --json lists all")
        for image in agreement.broken:
            reason = image.reason if image.path in image.reason else f"{image.path}: {image.reason}"
            text.append(f"  not read, not counted: {reason}")
        return text


@dataclass(frozen=True, slots=True)
class Crossing:
    """A label that one side gives to an image and the other does not: both probabilities, and the threshold between.

    `margin`: how far the reference's logit is from that of the threshold.
    """

    path: str
    label: str
    threshold: float
    reference: float
    candidate: float
    margin: float
    excused: bool


@dataclass(frozen=True, slots=True)
class ThresholdResult(ParityResult):
    """A verdict over labels that are decided one by one: the gate's, and a failure for unexcused crossings.

    `pairs` of an image and a label were compared. `crossed` of them lie on different sides of the threshold,
    `unexcused` with a margin above `excused_margin`. `crossings` are the `LISTED_CROSSINGS` of the largest margin.
    """

    pairs: int
    crossed: int
    unexcused: int
    excused_margin: float
    crossings: tuple[Crossing, ...]

    def lines(self, at_most: int = 10) -> list[str]:
        """A summary and the crossings of the largest margin."""
        text = [
            f"thresholds, {self.pairs:,} pairs of image and label: {self.crossed} crossed, {self.unexcused} not "
            f"excused (margin above {self.excused_margin:.2e})"
        ]
        text += [
            f"  {one.path}: {one.label} {one.reference:.4f} by {self.reference}, {one.candidate:.4f} by "
            f"{self.candidate}, threshold {one.threshold:.4f}, margin {one.margin:.2e}: "
            f"{'excused' if one.excused else 'NOT EXCUSED'}"
            for one in self.crossings[:at_most]
        ]
        if self.crossed > at_most:
            text.append(
                f"  and {self.crossed - at_most} more: --json lists the {len(self.crossings)} of largest margin"
            )
        return text


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked of one artifact. `not_run` says what could not be run here and what is missing.

    `failures` are other faults than those of outputs: images that are not made as the source of the weights makes them.
    """

    artifact: str
    kind: str
    results: tuple[ParityResult, ...]
    not_run: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing that ran has failed."""
        return not self.failures and all(result.passed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """The verification as JSON has it."""
        return {
            "artifact": self.artifact,
            "kind": self.kind,
            "passed": self.passed,
            "results": [result.to_dict() for result in self.results],
            "not_run": list(self.not_run),
            "notes": list(self.notes),
            "failures": list(self.failures),
        }


class RunningComparison:
    """Candidate against reference, batch by batch.

    Args:
        specs: the outputs of the task.
        class_names: a name for every label where the images have labels, else none.
        class_output: the output that labels are compared with, with a score for every name.
        label_names: a name for every score that is decided by itself; where there are none, its index.
        maps: compares with the classes of pixels or the objects, of images that have them.
    """

    def __init__(
        self,
        specs: Sequence[OutputSpec],
        class_names: Sequence[str] = (),
        class_output: str | None = None,
        label_names: Sequence[str] = (),
        maps: RunningMapComparison | RunningPrecisionComparison | None = None,
    ) -> None:
        self.maps = maps
        self.class_names = tuple(class_names)
        self.sizes: list[int] = []
        self._paths: list[str] = []
        self._labels: list[int] = []
        self._comparison = OutputComparison(specs)
        self._retrieval = {spec.name: RunningRetrieval() for spec in specs if spec.unit == "embedding"}
        self._class_output = class_output if self.class_names else None
        self._crossings = {
            spec.name: _RunningCrossings(spec, label_names) for spec in specs if spec.activation == "sigmoid"
        }

    def add(
        self,
        candidate: Mapping[str, Tensor],
        reference: Mapping[str, Tensor],
        paths: Sequence[str],
        labels: Sequence[int] = (),
        *,
        size: int = 0,
    ) -> None:
        """Outputs (N, ...) of both sides for the same images; a label is an index of `class_names`.

        `size`: images that the candidate was run on, copies included; 0 for N. Raises InputError when the shapes
        differ or there is no image.
        """
        self._comparison.add(candidate, reference)
        for name, crossings in self._crossings.items():
            crossings.add(candidate[name], reference[name], paths)
        for name, running in self._retrieval.items():
            running.add(candidate[name], reference[name])
        self._labels.extend(labels)
        self._paths.extend(paths)
        self.sizes.append(size or len(paths))

    def results(
        self,
        names: tuple[str, str],
        gate: Gate,
        *,
        sizes: Sequence[int] = (),
        available: int = 0,
        broken: Sequence[BrokenImage] = (),
    ) -> tuple[ParityResult, ...]:
        """The verdict of each output: a RetrievalResult for embeddings, a LabelledResult for labelled class scores.

        Of images with a class for each pixel the first output has a MapResult, of those with objects the detections a
        PrecisionResult.

        `names`: candidate and reference. `sizes`: batch sizes in place of those that were added. `available` and
        `broken` are of the source, whose images need not all have been run.
        """
        results: list[ParityResult] = []
        for output, measured in self._comparison.results().items():
            failures = gate.failures(measured)
            words = (*names, gate, tuple(dict.fromkeys(sizes or self.sizes)), output, measured)
            if self.maps is not None and not results:
                results.append(self.maps.result(ParityResult(*words, failures)))
                continue
            if output in self._crossings:
                noise = NOISE_MARGIN * self._comparison.running[output].rms_error
                results.append(self._crossings[output].result(ParityResult(*words, failures), noise))
                continue
            if output in self._retrieval:
                retrieval = self._retrieval[output].result(self._paths, self._labels, gate.relative_l2_max)
                if retrieval.unexcused:
                    failures += (f"{retrieval.unexcused} rank changes by more than noise explains",)
                results.append(RetrievalResult(*words, failures, retrieval))
                continue
            if output != self._class_output:
                results.append(ParityResult(*words, failures))
                continue
            agreement = self._agreement(self._comparison.running[output], available, tuple(broken))
            if unexcused := len(agreement.unexcused):
                failures += (f"{unexcused} flips of top-1 by more than noise explains",)
            results.append(LabelledResult(*words, failures, agreement))
        return tuple(results)

    def _agreement(self, measured: RunningDifferences, available: int, broken: tuple[BrokenImage, ...]) -> Agreement:
        margins, errors, candidate, reference = measured.samples.unbind(dim=1)
        flipped, excused = measured.flips
        labels, rms = torch.tensor(self._labels, dtype=torch.float64), measured.rms_error
        flips = [
            Flip(
                path=self._paths[at],
                label=self.class_names[self._labels[at]],
                reference=self._name(int(reference[at])),
                margin=float(margins[at]),
                candidate=self._name(int(candidate[at])),
                largest_error=float(errors[at]),
                excused=bool(excused[at]),
            )
            for at in flipped.nonzero().flatten().tolist()
        ]
        return Agreement(
            images=len(labels),
            available=available,
            reference_correct=int((reference == labels).sum()),
            candidate_correct=int((candidate == labels).sum()),
            agreeing=int((~flipped).sum()),
            rms_error=rms,
            excused_margin=NOISE_MARGIN * rms,
            flips=tuple(sorted(flips, key=_severity)),
            broken=broken,
        )

    def _name(self, index: int) -> str:
        return self.class_names[index] if index >= 0 else NO_CLASS


class _RunningCrossings:
    """Labels that two sides give and do not give: all margins stay, and of the largest what they are of."""

    def __init__(self, spec: OutputSpec, names: Sequence[str]) -> None:
        self._spec, self._names = spec, names
        self._margins: list[Tensor] = []
        self._listed: list[Crossing] = []
        self._pairs = 0

    def add(self, candidate: Tensor, reference: Tensor, paths: Sequence[str]) -> None:
        given, expected = margins(candidate, self._spec), margins(reference, self._spec)
        crossed = (given >= 0) != (expected >= 0)
        sizes = expected.abs()[crossed]
        self._pairs += expected.numel()
        self._margins.append(sizes)
        order = sizes.argsort(descending=True, stable=True)[:LISTED_CROSSINGS]
        cuts = self._spec.thresholds
        for row, at in crossed.nonzero()[order].tolist():
            # A probability is what the margin stands for, whatever the output holds.
            cut = 0.5 if cuts is None else cuts[at]
            sides = [torch.sigmoid(side[row, at] + math.log(cut / (1 - cut))) for side in (expected, given)]
            name = self._names[at] if self._names else str(at)
            size = float(expected[row, at].abs())
            self._listed.append(Crossing(paths[row], name, cut, float(sides[0]), float(sides[1]), size, False))
        self._listed = sorted(self._listed, key=lambda one: -one.margin)[:LISTED_CROSSINGS]

    def result(self, verdict: ParityResult, noise: float) -> ThresholdResult:
        sizes, failures = torch.cat(self._margins), verdict.failures
        unexcused = int((~(sizes <= noise)).sum())  # NaN explains nothing
        if unexcused:
            failures += (f"{unexcused} thresholds crossed by more than noise explains",)
        listed = tuple(replace(one, excused=one.margin <= noise) for one in self._listed)
        return ThresholdResult(
            verdict.candidate, verdict.reference, verdict.gate, verdict.batches, verdict.output, verdict.differences,
            failures, self._pairs, len(sizes), unexcused, noise, listed,
        )  # fmt: skip


def table_of(verifications: Sequence[Verification]) -> Iterator[str]:
    """The verifications as the lines of a table, with what could not be run and the notes below."""
    yield f"{'artifact':34} {'run by':22} {'images':>6} {'rel. L2':>9} {'cosine':>10} {'top-1':>7} {'KL':>9}  verdict"
    outputs = {entry.artifact: {result.output for result in entry.results} for entry in verifications}
    for entry in verifications:
        for result in entry.results:
            numbers = result.differences
            top1 = "-" if numbers.top1_agreement is None else f"{numbers.top1_agreement:.2%}"
            divergence = "-" if numbers.mean_kl is None else f"{numbers.mean_kl:.1e}"
            run_by = result.candidate if len(outputs[entry.artifact]) == 1 else f"{result.candidate} {result.output}"
            yield (
                f"{entry.artifact:34} {run_by:22} {numbers.samples:>6} {numbers.relative_l2_max:>9.1e} "
                f"{numbers.centred_cosine_min:>10.7f} {top1:>7} {divergence:>9}  "
                f"{'pass' if result.passed else 'FAIL: ' + '; '.join(result.failures)}"
            )
            yield from (f"  {line}" for line in result.lines())
        yield from (f"{entry.artifact:34} FAIL: {failure}" for failure in entry.failures)
        for reason in entry.not_run:
            yield f"{entry.artifact:34} not run: {reason}"
    for line in dict.fromkeys(line for entry in verifications for line in entry.notes):
        yield f"Note: {line}"


def _severity(flip: Flip) -> tuple[bool, float]:
    """Unexcused flips first, then by margin, those without a margin before all."""
    return flip.excused, -flip.margin if math.isfinite(flip.margin) else -math.inf
