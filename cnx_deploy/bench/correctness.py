"""Whether the calls that were timed gave the right logits: judged from their own outputs, not from another run."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cnx_deploy.core.gates import Gate
from cnx_deploy.verification.parity import differences

__all__ = ["Correctness", "KeptOutputs", "judge"]


@dataclass(frozen=True, slots=True)
class Correctness:
    """Timed logits against the reference over `calls` calls of one batch; the worst sample where not said.

    `top1_agreement` is the share of images with the reference's class; flips within rounding noise count as agreement.
    All four are None where a logit is NaN or infinite. `failures`: the broken limits in words, empty when right.
    """

    calls: int
    max_abs: float | None
    relative_l2: float | None
    centred_cosine: float | None
    top1_agreement: float | None
    nonfinite_count: int
    failures: tuple[str, ...]


@dataclass(slots=True)
class KeptOutputs:
    """Copies of the first, the last and one seeded random output of a run whose length is not known beforehand."""

    seed: int = 0
    _count: int = 0
    _first: Tensor | None = None
    _random: Tensor | None = None
    _last: Tensor | None = None
    _generator: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._generator = random.Random(self.seed)

    def add(self, logits: Tensor) -> None:
        """Look at one more output, which the runner may overwrite in its next call."""
        self._count += 1
        self._last = logits.clone()
        if self._count == 1:
            self._first = self._last
        # Reservoir of one: each of n calls is kept with the chance 1/n.
        if self._generator.randrange(self._count) == 0:
            self._random = self._last

    def all(self) -> tuple[Tensor, ...]:
        """First, random and last; empty before the first call."""
        return tuple(kept for kept in (self._first, self._random, self._last) if kept is not None)


def judge(outputs: tuple[Tensor, ...], expected: Tensor, gate: Gate | None) -> Correctness:
    """Compare outputs of (N, K) logits with `expected` (N, K); without a gate only NaN and Inf fail."""
    logits = torch.cat([output.double().cpu() for output in outputs])
    wanted = expected.double().cpu().repeat(len(outputs), 1)
    found = differences(logits, wanted)
    failures = gate.failures(found) if gate is not None else ()
    if not found.all_finite:
        failures = (f"{found.nonfinite_count} logits are NaN or infinite",)
        return Correctness(len(outputs), None, None, None, None, found.nonfinite_count, failures)
    return Correctness(
        calls=len(outputs),
        max_abs=float((logits - wanted).abs().max()),
        relative_l2=found.relative_l2_max,
        centred_cosine=found.centred_cosine_min,
        top1_agreement=found.top1_agreement,
        nonfinite_count=0,
        failures=failures,
    )
