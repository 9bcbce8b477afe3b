"""What a candidate's outputs are judged by: gates, measured differences and the verdict, as records without torch.

`verification.parity` computes the differences; manifests and reports keep the verdicts.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

__all__ = [
    "DETECTION_LIMITS", "GATES", "DetectionDifferences", "DetectionLimits", "Differences", "Gate", "OutputSpec",
    "ParityResult",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One output of a network: its name in the graph and its sizes after the batch.

    `unit`: what a value is ("logit", "probability", "embedding", "feature"). `activation`: what scores along the first
    axis mean, one class of all (softmax) or each by itself (sigmoid); None where the values are no scores, so that no
    decision is compared. `dtype` is torch's name of the element type.
    `indexes`: the values are places in that output, which the reference has; what is compared is its values there.
    `thresholds`: the probability from which each sigmoid score is a yes, one a score; None is one half for all.
    `is_ranked`: the values fall from first to last, so that the cosine of what they differ by says nothing.
    """

    name: str
    shape: tuple[int, ...]
    unit: str
    activation: Literal["softmax", "sigmoid"] | None = None
    dtype: Literal["float32", "int64"] = "float32"
    indexes: str | None = None
    is_ranked: bool = False
    thresholds: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class DetectionDifferences:
    """Detections of candidate and reference: `verification.detections` says how they are matched.

    `unmatched` counts those of either side without a partner, `at_cut` those of them whose score is no further from the
    cut than noise explains. `box_max` is in pixels of the canvas, `score_max` a probability, `mask_flips` the share of
    mask pixels on other sides of one half; all are of partners. `inexact` counts images whose `exact` is not 1.
    """

    matched: int
    unmatched: int
    at_cut: int
    box_max: float
    score_max: float
    mask_flips: float
    inexact: int

    def __str__(self) -> str:
        """The figures on one line."""
        exact = f"exact is 0 on {self.inexact} images" if self.inexact else "exact on every image"
        if not self.matched + self.unmatched:
            return f"detections: none on either side, so that no box, score or mask was compared; {exact}"
        return (
            f"detections: {self.matched} matched, {self.unmatched} unmatched ({self.at_cut} at the cut), box "
            f"{self.box_max:.2g} px, score {self.score_max:.1e}, mask flips {self.mask_flips:.2%}, {exact}"
        )


@dataclass(frozen=True, slots=True)
class DetectionLimits:
    """What detections must satisfy, with the limits of `DetectionDifferences`; `unmatched` is a share of all."""

    unmatched: float
    box_max: float
    score_max: float
    mask_flips: float

    def failures(self, measured: DetectionDifferences) -> tuple[str, ...]:
        """The limits that are broken, in words."""
        counted, among = measured.unmatched - measured.at_cut, measured.matched + measured.unmatched
        values = (
            (f"unmatched detections {counted} of {among},", counted / max(1, among), self.unmatched),
            ("box", measured.box_max, self.box_max),
            ("score", measured.score_max, self.score_max),
            ("mask flips", measured.mask_flips, self.mask_flips),
        )
        broken = [f"{name} {value:.3g}, gate {limit:g}" for name, value, limit in values if not value <= limit]
        if measured.inexact:
            broken.append(
                f"exact is 0 on {measured.inexact} images: a limit of the deploy form is too low for them. Raise "
                "passes, candidates or sampling_limit (--task-option passes=32) and export again"
            )
        return tuple(broken)


@dataclass(frozen=True, slots=True)
class Differences:
    """Candidate against reference over all samples; NaN where a value is not finite.

    A decision is of a sample, or of each place where a sample's scores are a map. `excused_flips`: the decision
    differs, but the reference's margin is within the noise of the run. `top1_agreement` (share of decisions that are
    the same) and `mean_kl` are None for an output of no scores.
    `max_abs_in_std` is in units of the standard deviation of the reference's outputs.
    `places`: how many decisions there are where scores are maps; None where there is one a sample.
    `detections`: of a network that detects, where relative L2 is of the corners of partners and a flip is a detection
    without one; None of others.
    """

    samples: int
    nonfinite_count: int
    relative_l2_median: float
    relative_l2_max: float
    centred_cosine_min: float
    top1_agreement: float | None
    flips: int
    excused_flips: int
    mean_kl: float | None
    max_abs_in_std: float
    detections: DetectionDifferences | None = None
    places: int | None = None

    @property
    def all_finite(self) -> bool:
        """Whether both sides hold numbers only."""
        return self.nonfinite_count == 0


@dataclass(frozen=True, slots=True)
class Gate:
    """What a pair must satisfy. Limits on the worst sample (relative L2, cosine) and over all (top-1, KL).

    Top-1 and KL are limits of scores; they hold for outputs without decisions. `flip_share_max` limits decisions that
    differ, excused ones included, and `relative_l2_median_max` the median sample; None does not, and is not written.
    """

    name: str
    relative_l2_max: float
    centred_cosine_min: float
    top1_agreement_min: float
    mean_kl_max: float
    flip_share_max: float | None = None
    relative_l2_median_max: float | None = None

    def failures(self, measured: Differences) -> tuple[str, ...]:
        """The limits that `measured` breaks, in words; empty when it passes. NaN and infinity never pass."""
        if not measured.all_finite:
            return (f"{measured.nonfinite_count} values are NaN or infinite",)
        if measured.detections is not None and self.relative_l2_max == math.inf:
            return ()  # a gate without limits
        if measured.detections is not None:
            limits = DETECTION_LIMITS.get(self.name.partition(",")[0], DETECTION_LIMITS["fp32"])
            return limits.failures(measured.detections)
        upper: tuple[tuple[str, float | None, float], ...] = (
            ("relative L2", measured.relative_l2_max, self.relative_l2_max),
            ("mean KL", measured.mean_kl, self.mean_kl_max),
        )
        lower = (
            ("centred cosine", measured.centred_cosine_min, self.centred_cosine_min),
            ("top-1 agreement", measured.top1_agreement, self.top1_agreement_min),
        )
        if self.relative_l2_median_max is not None:
            upper = (*upper, ("median relative L2", measured.relative_l2_median, self.relative_l2_median_max))
        if self.flip_share_max is not None and measured.top1_agreement is not None:
            share = measured.flips / (measured.places or measured.samples)
            upper = (*upper, ("share of flips", share, self.flip_share_max))
        broken = [(name, value, limit) for name, value, limit in upper if value is not None and not value <= limit]
        broken += [(name, value, limit) for name, value, limit in lower if value is not None and not value >= limit]
        return tuple(f"{name} {value:.3g}, gate {limit:g}" for name, value, limit in broken)


@dataclass(frozen=True, slots=True)
class ParityResult:
    """The verdict over one output of a pair. `batches` are the batch sizes that the candidate was run at."""

    candidate: str
    reference: str
    gate: Gate
    batches: tuple[int, ...]
    output: str
    differences: Differences
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit of the gate holds."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it."""
        document = {**asdict(self), "passed": self.passed}
        for name in ("detections", "places"):
            if document["differences"][name] is None:
                del document["differences"][name]
        return document

    def lines(self) -> list[str]:
        """What a table shows below the verdict's row: nothing where it says all."""
        return [] if self.differences.detections is None else [str(self.differences.detections)]


GATES: Mapping[str, Gate] = MappingProxyType(
    {
        gate.name: gate
        for gate in (
            # Two FP32 implementations of one network: rounding alone. Seen 5e-7 (atto) to 3e-6.
            Gate("fp32", 1e-5, 0.999999, 1.0, 1e-8),
            # An FP32 engine sums in another order and may use other algorithms.
            Gate("fp32-engine", 1e-4, 0.99999, 1.0, 1e-7),
            # TF32 keeps ten bits of the mantissa, like FP16.
            Gate("tf32-engine", 5e-3, 0.9999, 0.999, 1e-5),
            # FP16 arithmetic: NVIDIA's own ConvNeXt port gates at a relative norm of 0.015 and cosine 0.999.
            Gate("fp16", 1.5e-2, 0.999, 0.995, 1e-3),
            # BF16 keeps eight bits where FP16 keeps eleven.
            Gate("bf16", 4e-2, 0.998, 0.99, 5e-3),
            # Eight bits, on images that were held out from the calibration: no flip beyond noise, and few at all. An
            # image of small logits differs by more: the worst one may, as far as the cosine lets it.
            Gate("fp8", 4.5e-2, 0.999, 1.0, 1e-3, flip_share_max=0.01, relative_l2_median_max=2e-2),
            Gate("int8", 4.5e-2, 0.999, 1.0, 1e-3, flip_share_max=0.01, relative_l2_median_max=2e-2),
        )
    }
)

DETECTION_LIMITS: Mapping[str, DetectionLimits] = MappingProxyType(
    {
        # Seen of two FP32 implementations: 6e-5 px, 2e-6.
        "fp32": DetectionLimits(0.0, 1e-2, 1e-4, 5e-4),
        "fp32-engine": DetectionLimits(1e-3, 5e-2, 1e-3, 1e-3),
        "tf32-engine": DetectionLimits(1e-2, 0.5, 1e-2, 5e-3),
        # Seen of a trained network at 96 px: 0.1 % unmatched, 0.014 px, mask flips 0.09 %.
        "fp16": DetectionLimits(1e-2, 0.5, 1e-2, 5e-3),
        # Three bits fewer than FP16.
        "bf16": DetectionLimits(5e-2, 4.0, 5e-2, 4e-2),
        # Seen of a detector of AP 24 % at 96 px in FP8: 5.6 % unmatched, 0.6 px, 0.041, 0.3 %; AP changed by 0.0025.
        "fp8": DetectionLimits(0.1, 4.0, 0.1, 4e-2),
        "int8": DetectionLimits(0.1, 4.0, 0.1, 4e-2),
    }
)
"""What detections are judged by, by the name of the gate; those of any other gate by the limits of fp32."""
