"""Whether two runners give the same answer, by measures that a broken model cannot pass.

All differences are computed in float64. No single number is enough: relative L2 misses a flip of the decision, plain
cosine a common shift of all values, top-1 a slow drift; so a gate holds them all. Max abs is reported in units of the
reference's spread and not gated, for it grows with the number of classes. Each output of a network is compared by
itself; what decisions there are in it, its `OutputSpec` says.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import Differences, Gate, OutputSpec, ParityResult
from cnx_deploy.model.tasks.base import Outputs, joined
from cnx_deploy.runners.base import Runner
from cnx_deploy.verification.detections import RunningDetections, are_detections

__all__ = [
    "OutputComparison", "RunningDifferences", "comparable", "compare", "differences", "margins", "outputs_of",
    "verdicts", "worst_verdict",
]  # fmt: skip

NOISE_MARGIN = 4.0
"""A flip is noise where the reference's margin is below this many RMS errors (over all samples and logits): the
difference of two noisy logits has sqrt(2) of them, so 2.8 of its standard deviations. The sample's own largest error
would excuse every flip, for two logits cannot change places without moving by the margin together."""

TINY = torch.finfo(torch.float64).tiny
LEAST_PROBABILITY = 2.0**-24
"""Half the distance of FP32's numbers below one: a probability nearer to 0 or 1 counts as this far from it."""
LOGITS = OutputSpec("logits", (), "logit", "softmax")


Activation = Literal["softmax", "sigmoid"]


class RunningDifferences:
    """Differences of candidate and reference, batch by batch: a few numbers of a sample stay, and no outputs.

    `spec`: what is compared. Scores are (N, K), or (N, K, H, W) with a decision at each place of a map; values without
    decisions (N, ...). Decisions, their margins and the noise of the run are those of logits; of probabilities they are
    those of the logits that these stand for.
    """

    def __init__(self, spec: OutputSpec = LOGITS) -> None:
        self._spec, self._activation = spec, spec.activation
        self._rows: list[Tensor] = []  # relative L2, centred cosine, KL, margin, largest error, both decisions
        self._nonfinite = self._values = self._places = 0
        self._margins_of_flips: list[Tensor] = []  # of maps, whose places are too many to keep
        self._squares = self._largest = self._mean = self._spread = 0.0

    def add(self, candidate: Tensor, reference: Tensor) -> None:
        """One output (N, ...) of both sides for the same samples.

        Raises InputError when the shapes differ or there is no sample.
        """
        shape = candidate.shape
        fits = len(shape) >= 2 if self._activation is None else len(shape) in (2, 4)
        if shape != reference.shape or not fits or not candidate.numel():
            raise InputError(
                f"Cannot compare outputs of shape {tuple(shape)} with {tuple(reference.shape)}: both sides need the "
                "same images and classes."
            )
        a, b = (side.detach().double().cpu().flatten(1) for side in (candidate, reference))
        error = a - b
        given, expected = (_logits(side, self._spec) for side in (a, b))
        if len(shape) == 4 and self._activation is not None:
            decisions = self._decisions_of_maps(candidate, reference, error.abs().amax(dim=1))
        else:
            decisions = DECISIONS[self._activation](given, expected, error.abs().amax(dim=1), _cuts(self._spec))
        cosine = F.cosine_similarity(a, b, dim=1) if self._spec.is_ranked else _centred_cosine(a, b)
        columns = (
            error.norm(dim=1) / b.norm(dim=1).clamp_min(TINY),
            cosine,
            *decisions,
        )
        self._rows.append(torch.stack(columns, dim=1))
        self._nonfinite += int((~torch.isfinite(a)).sum() + (~torch.isfinite(b)).sum())
        self._squares += float((given - expected).square().sum())
        self._largest = max(self._largest, float(error.abs().max()))
        # Sums of squares about the running mean, which lose no digits where the mean is large (Chan et al., 1979).
        shift, share = float(b.mean()) - self._mean, b.numel() / (self._values + b.numel())
        self._spread += float((b - b.mean()).square().sum()) + shift * shift * self._values * share
        self._mean += shift * share
        self._values += b.numel()

    def _decisions_of_maps(self, candidate: Tensor, reference: Tensor, largest_error: Tensor) -> tuple[Tensor, ...]:
        """Count a decision at each place of (N, K, H, W), image by image; KL is a mean over the places."""
        divergences = []
        for pair in zip(candidate, reference, strict=True):
            a, b = (_logits(side.detach().double().cpu().flatten(1).T, self._spec) for side in pair)  # (H·W, K)
            decided = DECISIONS[self._activation](a, b, a.amax(dim=1), _cuts(self._spec))
            divergence, margin, _, given, expected = decided
            flipped = (given != expected) | (given < 0)
            self._places += len(flipped)
            self._margins_of_flips.append(margin[flipped])
            divergences.append(divergence.mean())
        nothing = torch.zeros_like(largest_error)
        return torch.stack(divergences), nothing, largest_error, nothing, nothing

    @property
    def rms_error(self) -> float:
        """Root mean square of the differences of all values, of scores as logits; NaN where one is not finite."""
        return math.sqrt(self._squares / self._values) if math.isfinite(self._squares) else math.nan

    @property
    def samples(self) -> Tensor:
        """(N, 4) float64: margin of the reference, largest error, decision of candidate and reference.

        A decision is the best class; -1 where a value of the sample is not finite.
        """
        return torch.cat(self._rows)[:, 3:]

    @property
    def flips(self) -> tuple[Tensor, Tensor]:
        """(N,) bool each: where the decisions differ or are none, and where the run's noise explains it."""
        margins, _, candidate, reference = self.samples.unbind(dim=1)
        finite = (candidate >= 0) & (reference >= 0)
        flipped = (candidate != reference) | ~finite
        return flipped, flipped & finite & (margins <= NOISE_MARGIN * self.rms_error)

    def result(self) -> Differences:
        """The differences over everything added; NaN where a value is not finite."""
        rows, decides = torch.cat(self._rows), self._activation is not None
        count, nan = len(rows), math.nan
        if self._nonfinite:
            return Differences(count, self._nonfinite, nan, nan, nan, nan, 0, 0, nan, nan)
        if self._places:  # of maps
            margins, places = torch.cat(self._margins_of_flips), self._places
            flips, excused_flips = len(margins), int((margins <= NOISE_MARGIN * self.rms_error).sum())
            # One place is let through, for of a few thousand it would be more than the one in 10,000 of the gate.
            unexcused = max(0, flips - excused_flips - 1)
        else:
            flipped, excused = self.flips
            flips, excused_flips, places = int(flipped.sum()), int(excused.sum()), count
            unexcused = flips - excused_flips
        spread = math.sqrt(self._spread / self._values)
        return Differences(
            samples=count,
            nonfinite_count=0,
            relative_l2_median=float(rows[:, 0].median()),
            relative_l2_max=float(rows[:, 0].max()),
            centred_cosine_min=float(rows[:, 1].min()),
            top1_agreement=1.0 - unexcused / places if decides else None,
            flips=flips,
            excused_flips=excused_flips,
            mean_kl=max(0.0, float(rows[:, 2].mean())) if decides else None,
            max_abs_in_std=self._largest / max(spread, TINY),
            places=self._places or None,
        )


class OutputComparison:
    """Every output of candidate and reference, batch by batch."""

    def __init__(self, specs: Sequence[OutputSpec]) -> None:
        self.detections = RunningDetections(specs, NOISE_MARGIN) if are_detections(specs) else None
        self.running = {} if self.detections else {spec.name: RunningDifferences(spec) for spec in specs}
        self._names = [spec.name for spec in specs]

    def add(self, candidate: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
        """All outputs of both sides for the same samples, as `comparable` gives them.

        Raises InputError when names or shapes differ.
        """
        for given in (candidate, reference):
            if given.keys() != set(self._names):
                raise InputError(
                    f"Cannot compare the outputs {', '.join(given)}: expected {', '.join(self._names)}, as the task "
                    "declares them."
                )
        if self.detections is not None:
            self.detections.add(candidate, reference)
        for name, running in self.running.items():
            running.add(candidate[name], reference[name])

    def results(self) -> dict[str, Differences]:
        """The differences of each output over everything added; detections are one, of all outputs together."""
        if self.detections is not None:
            return {"detections": self.detections.result()}
        return {name: running.result() for name, running in self.running.items()}


def comparable(
    candidate: Mapping[str, Tensor], reference: Mapping[str, Tensor], specs: Sequence[OutputSpec]
) -> tuple[Outputs, Outputs]:
    """Both sides as they are compared: of classes by their index the reference's scores of them, NaN outside.

    Two classes of nearly one score may change places, which is then a small difference, and a wrong one is a large one.
    The reference may have more outputs than `specs` declare, which are left out. A reference without those scores, such
    as another file, leaves the indices out as well: their scores are an output of their own.
    """
    places = {spec.name: spec.indexes for spec in specs if spec.indexes is not None}
    pointed_to, declared = set(places.values()), {spec.name for spec in specs}
    left_out = (pointed_to - declared) | {name for name, scores in places.items() if scores not in reference}

    def values(side: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in places or name not in side:
            return side[name]
        scores, at = reference[places[name]], side[name].long()
        inside, at = (at >= 0) & (at < scores.shape[1]), at.clamp(0, scores.shape[1] - 1)
        if at.ndim < scores.ndim:  # one class at each place of a map
            return torch.where(inside, scores.gather(1, at[:, None])[:, 0], math.nan)
        return torch.where(inside, scores.gather(1, at), math.nan)

    return (
        {name: values(candidate, name) for name in candidate if name not in left_out},
        {name: values(reference, name) for name in reference if name in declared and name not in left_out},
    )


def differences(candidate: Tensor, reference: Tensor, spec: OutputSpec = LOGITS) -> Differences:
    """Compare one output: logits (N, num_classes), or what `spec` says.

    Raises InputError when the shapes differ or there is no sample.
    """
    running = RunningDifferences(spec)
    running.add(candidate, reference)
    return running.result()


def outputs_of(runner: Runner, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None) -> Outputs:
    """Run every batch and return all outputs in float64 on the CPU; `progress` is told the images of each batch."""
    collected: list[Outputs] = []
    for images in batches:
        given = runner.run(images.to(runner.device))
        collected.append({name: output.detach().double().cpu() for name, output in given.items()})
        if progress is not None:
            progress(len(images))
    if not collected:
        raise InputError("There is no image to compare on. At least one sample, or a folder with an image, is needed.")
    return joined(collected)


def verdicts(
    candidate: Mapping[str, Tensor], reference: Mapping[str, Tensor], specs: Sequence[OutputSpec], gate: Gate,
    names: tuple[str, str], batches: Iterable[int],
) -> tuple[ParityResult, ...]:  # fmt: skip
    """Judge every output over all samples. `names`: of candidate and reference; `batches`: sizes that were run."""
    pair, sizes = comparable(candidate, reference, specs), tuple(dict.fromkeys(batches))
    comparison = OutputComparison([spec for spec in specs if spec.indexes is None or spec.name in pair[0]])
    comparison.add(*pair)
    return tuple(
        ParityResult(*names, gate, sizes, output, measured, gate.failures(measured))
        for output, measured in comparison.results().items()
    )


def worst_verdict(results: Sequence[ParityResult]) -> ParityResult:
    """The verdict of the output that fails, or else of the one that differs most."""
    return max(results, key=lambda result: (not result.passed, result.differences.relative_l2_max))


def compare(
    candidate: Runner,
    expected: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    specs: Sequence[OutputSpec],
    gate: Gate,
    *,
    reference_name: str,
    progress: Callable[[int], None] | None = None,
) -> tuple[ParityResult, ...]:
    """Judge each output of `candidate` on `batches` against the reference's for the same images, in the same order."""
    names = (f"{candidate.info.backend} {candidate.info.precision}", reference_name)
    return verdicts(outputs_of(candidate, batches, progress), expected, specs, gate, names, map(len, batches))


def _logits(scores: Tensor, spec: OutputSpec) -> Tensor:
    """Scores (N, K) as logits: of probabilities their logarithms, or log-odds where each is by itself."""
    if spec.unit != "probability" or spec.activation is None:
        return scores
    if spec.activation == "softmax":
        return scores.clamp_min(LEAST_PROBABILITY).log()
    return scores.clamp(LEAST_PROBABILITY, 1.0 - LEAST_PROBABILITY).logit()


def margins(scores: Tensor, spec: OutputSpec) -> Tensor:
    """How far each sigmoid score (N, K) is above its threshold, as logits in float64; a yes from 0 on."""
    return _logits(scores.detach().double().cpu(), spec) - _cuts(spec)


def _cuts(spec: OutputSpec) -> Tensor:
    """The thresholds as logits, (K,) or () float64."""
    return torch.tensor(spec.thresholds if spec.thresholds is not None else 0.5, dtype=torch.float64).logit()


def _one_of_all(a: Tensor, b: Tensor, largest_error: Tensor, cuts: Tensor) -> tuple[Tensor, ...]:
    """KL, margin, largest error and decisions where the best of all scores (N, K) is the answer."""
    log_p, log_q = b.log_softmax(dim=1), a.log_softmax(dim=1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return divergence, _margins(b), largest_error, _best(a).double(), _best(b).double()


def _each_by_itself(a: Tensor, b: Tensor, largest_error: Tensor, cuts: Tensor) -> tuple[Tensor, ...]:
    """The same where each logit (N, K) is a yes from its threshold on.

    The margin is the reference's largest distance from a threshold that was crossed; a decision is the number of
    crossings, 0 of the reference.
    """
    logs = [(F.logsigmoid(side), F.logsigmoid(-side)) for side in (b, a)]
    divergence = sum(p.exp() * (p - q) for p, q in zip(*logs, strict=True)).mean(dim=1)
    a, b = a - cuts, b - cuts
    changed = (a >= 0) != (b >= 0)
    finite = [torch.isfinite(side).all(dim=1) for side in (a, b)]
    decisions = (torch.where(finite[0], changed.sum(dim=1), -1), torch.where(finite[1], 0, -1))
    return divergence, (b.abs() * changed).amax(dim=1), largest_error, *(decision.double() for decision in decisions)


def _no_decision(a: Tensor, b: Tensor, largest_error: Tensor, cuts: Tensor) -> tuple[Tensor, ...]:
    nothing = torch.zeros_like(largest_error)
    return nothing, nothing, largest_error, nothing, nothing


DECISIONS: Mapping[Activation | None, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "softmax": _one_of_all, "sigmoid": _each_by_itself, None: _no_decision,
}  # fmt: skip


def _best(logits: Tensor) -> Tensor:
    """(N,) index of the best class, the first of equal ones; -1 where a logit is not finite."""
    return torch.where(torch.isfinite(logits).all(dim=1), logits.argmax(dim=1), -1)


def _margins(logits: Tensor) -> Tensor:
    """(N,) best logit less the second best; infinite where there is one class only."""
    if logits.shape[1] == 1:
        return torch.full((len(logits),), math.inf, dtype=torch.float64)
    best = logits.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def _centred_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the values less their mean: blind neither to a shift common to all classes nor to their spread."""
    if a.shape[1] == 1:
        return torch.ones(len(a), dtype=torch.float64)
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return torch.nn.functional.cosine_similarity(a, b, dim=1)
