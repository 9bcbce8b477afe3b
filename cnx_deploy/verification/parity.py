"""Whether two runners give the same answer, by measures that a broken model cannot pass.

All differences are computed in float64. No single number is enough: relative L2 misses a flip of the decision, plain
cosine a common shift of all logits, top-1 a slow drift; so a gate holds them all. Max abs is reported in units of the
reference's spread and not gated, for it grows with the number of classes.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import Differences, Gate, ParityResult
from cnx_deploy.runners.base import Runner

__all__ = ["RunningDifferences", "compare", "differences", "logits_of"]

NOISE_MARGIN = 4.0
"""A flip is noise where the reference's margin is below this many RMS errors (over all samples and logits): the
difference of two noisy logits has sqrt(2) of them, so 2.8 of its standard deviations. The sample's own largest error
would excuse every flip, for two logits cannot change places without moving by the margin together."""

TINY = torch.finfo(torch.float64).tiny


class RunningDifferences:
    """Differences of candidate and reference, batch by batch: a few numbers of a sample stay, and no logits."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []  # relative L2, centred cosine, KL, margin, largest error, both best classes
        self._nonfinite = self._logits = 0
        self._squares = self._largest = self._mean = self._spread = 0.0

    def add(self, candidate: Tensor, reference: Tensor) -> None:
        """Logits (N, num_classes) of both sides for the same samples.

        Raises InputError when the shapes differ or there is no sample.
        """
        if candidate.shape != reference.shape or candidate.ndim != 2 or not candidate.numel():
            raise InputError(
                f"Cannot compare logits of shape {tuple(candidate.shape)} with {tuple(reference.shape)}: expected the "
                "same. Give both runs the same images and classes."
            )
        a, b = candidate.detach().double().cpu(), reference.detach().double().cpu()
        error, log_p, log_q = a - b, b.log_softmax(dim=1), a.log_softmax(dim=1)
        columns = (
            error.norm(dim=1) / b.norm(dim=1).clamp_min(TINY),
            _centred_cosine(a, b),
            (log_p.exp() * (log_p - log_q)).sum(dim=1),
            _margins(b),
            error.abs().amax(dim=1),
            _best(a).double(),
            _best(b).double(),
        )
        self._rows.append(torch.stack(columns, dim=1))
        self._nonfinite += int((~torch.isfinite(a)).sum() + (~torch.isfinite(b)).sum())
        self._squares += float(error.square().sum())
        self._largest = max(self._largest, float(error.abs().max()))
        # Sums of squares about the running mean, which lose no digits where the mean is large (Chan et al., 1979).
        shift, share = float(b.mean()) - self._mean, b.numel() / (self._logits + b.numel())
        self._spread += float((b - b.mean()).square().sum()) + shift * shift * self._logits * share
        self._mean += shift * share
        self._logits += b.numel()

    @property
    def rms_error(self) -> float:
        """Root mean square of the differences of all logits; NaN where one is not finite."""
        return math.sqrt(self._squares / self._logits) if math.isfinite(self._squares) else math.nan

    @property
    def samples(self) -> Tensor:
        """(N, 4) float64: margin of the reference, largest error, best class of candidate and reference.

        A best class is -1 where a logit of the sample is not finite.
        """
        return torch.cat(self._rows)[:, 3:]

    @property
    def flips(self) -> tuple[Tensor, Tensor]:
        """(N,) bool each: where the best classes differ or are none, and where the run's noise explains it."""
        margins, _, candidate, reference = self.samples.unbind(dim=1)
        finite = (candidate >= 0) & (reference >= 0)
        flipped = (candidate != reference) | ~finite
        return flipped, flipped & finite & (margins <= NOISE_MARGIN * self.rms_error)

    def result(self) -> Differences:
        """The differences over everything added; NaN where a logit is not finite."""
        rows = torch.cat(self._rows)
        count, nan = len(rows), math.nan
        if self._nonfinite:
            return Differences(count, self._nonfinite, nan, nan, nan, nan, 0, 0, nan, nan)
        flipped, excused = self.flips
        spread = math.sqrt(self._spread / self._logits)
        return Differences(
            samples=count,
            nonfinite_count=0,
            relative_l2_median=float(rows[:, 0].median()),
            relative_l2_max=float(rows[:, 0].max()),
            centred_cosine_min=float(rows[:, 1].min()),
            top1_agreement=1.0 - float((flipped & ~excused).double().mean()),
            flips=int(flipped.sum()),
            excused_flips=int(excused.sum()),
            mean_kl=max(0.0, float(rows[:, 2].mean())),
            max_abs_in_std=self._largest / max(spread, TINY),
        )


def differences(candidate: Tensor, reference: Tensor) -> Differences:
    """Compare logits, (N, num_classes) each.

    Raises InputError when the shapes differ or there is no sample.
    """
    running = RunningDifferences()
    running.add(candidate, reference)
    return running.result()


def logits_of(runner: Runner, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None) -> Tensor:
    """Run every batch and return all logits in float64 on the CPU; `progress` is told the images of each batch."""
    collected = []
    for images in batches:
        collected.append(runner.run(images.to(runner.device)).detach().double().cpu())
        if progress is not None:
            progress(len(images))
    if not collected:
        raise InputError(
            "There is no image to compare on: expected at least one. Give more samples, or a folder that holds some."
        )
    return torch.cat(collected)


def compare(
    candidate: Runner,
    reference_logits: Tensor,
    batches: Sequence[Tensor],
    gate: Gate,
    *,
    reference_name: str,
    progress: Callable[[int], None] | None = None,
) -> ParityResult:
    """Judge `candidate` on `batches` against the reference's logits for the same images, in the same order."""
    measured = differences(logits_of(candidate, batches, progress), reference_logits)
    name = f"{candidate.info.backend} {candidate.info.precision}"
    sizes = tuple(dict.fromkeys(len(images) for images in batches))
    return ParityResult(name, reference_name, gate, sizes, measured, gate.failures(measured))


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
    """Cosine of the logits less their mean: blind neither to a shift common to all classes nor to their spread."""
    if a.shape[1] == 1:
        return torch.ones(len(a), dtype=torch.float64)
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return torch.nn.functional.cosine_similarity(a, b, dim=1)
