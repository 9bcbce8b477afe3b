"""What a candidate's outputs are judged by: gates, measured differences and the verdict, as records without torch.

`verification.parity` computes the differences; manifests and reports keep the verdicts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["GATES", "Differences", "Gate", "OutputSpec", "ParityResult"]


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
class Differences:
    """Candidate against reference over all samples; NaN where a value is not finite.

    A decision is of a sample, or of each place where a sample's scores are a map. `excused_flips`: the decision
    differs, but the reference's margin is within the noise of the run. `top1_agreement` (share of decisions that are
    the same) and `mean_kl` are None for an output of no scores.
    `max_abs_in_std` is in units of the standard deviation of the reference's outputs.
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

    @property
    def all_finite(self) -> bool:
        """Whether both sides hold numbers only."""
        return self.nonfinite_count == 0


@dataclass(frozen=True, slots=True)
class Gate:
    """What a pair must satisfy. Limits on the worst sample (relative L2, cosine) and over all (top-1, KL).

    Top-1 and KL are limits of scores; they hold for outputs without decisions.
    """

    name: str
    relative_l2_max: float
    centred_cosine_min: float
    top1_agreement_min: float
    mean_kl_max: float

    def failures(self, measured: Differences) -> tuple[str, ...]:
        """The limits that `measured` breaks, in words; empty when it passes. NaN and infinity never pass."""
        if not measured.all_finite:
            return (f"{measured.nonfinite_count} values are NaN or infinite",)
        upper = (
            ("relative L2", measured.relative_l2_max, self.relative_l2_max),
            ("mean KL", measured.mean_kl, self.mean_kl_max),
        )
        lower = (
            ("centred cosine", measured.centred_cosine_min, self.centred_cosine_min),
            ("top-1 agreement", measured.top1_agreement, self.top1_agreement_min),
        )
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
        return {**asdict(self), "passed": self.passed}

    def lines(self) -> list[str]:
        """What a table shows below the verdict's row: nothing where it says all."""
        return []


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
        )
    }
)
