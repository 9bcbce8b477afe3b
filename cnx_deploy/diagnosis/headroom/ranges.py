"""What was found of one tensor, one statistic or one parameter, and how much of FP16 that takes."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

__all__ = [
    "HALF_MAX",
    "ParameterRange",
    "Ranged",
    "ResponseRange",
    "Summary",
    "TensorRange",
    "group_of",
    "larger",
    "rank",
    "share_of_limit",
    "stage_of",
    "worst",
]

HALF_MAX = 65504.0
"""The largest finite FP16 number."""


class Ranged(Protocol):
    """What can be ordered by how near it comes to the limit."""

    @property
    def share(self) -> float:
        """The largest value as a share of the limit; above 1 it does not fit."""


AnyRange = TypeVar("AnyRange", bound=Ranged)


@dataclass(frozen=True, slots=True)
class TensorRange:
    """The largest absolute value of a tensor that an FP16 file stores.

    `module` is the torch module as the exported file names it. `what` is the module's "output", the "product" of
    a linear layer before its bias, GRN's "gained weight", the tensor "hidden × gain", or the stem's "normed patches".
    """

    module: str
    what: str
    largest: float

    @property
    def name(self) -> str:
        """For people: the module, and what of it unless that is its output."""
        return self.module if self.what == "output" else f"{self.module} ({self.what})"

    @property
    def share(self) -> float:
        """`largest` as a share of 65504."""
        return share_of_limit(self.largest)

    def to_dict(self) -> dict[str, Any]:
        """The range as JSON has it."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True, slots=True)
class ResponseRange:
    """GRN's input. `rms` is that of a channel over the `positions` of an image, the largest over channels and images.

    `square_sum` is the sum of squares behind it, which the naive form keeps in FP16.
    """

    module: str
    positions: int
    rms: float
    square_sum: float

    @property
    def share(self) -> float:
        """The sum of squares as a share of 65504."""
        return share_of_limit(self.square_sum)

    def to_dict(self) -> dict[str, Any]:
        """The range as JSON has it."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True, slots=True)
class NormRange:
    """LayerNorm's input, by the training form's module. `deviation` is the largest |x - mean| over the channels.

    `rms` is the root of a position's mean squared deviation, the largest over positions and images.
    """

    module: str
    deviation: float
    rms: float

    @property
    def share(self) -> float:
        """The squared deviation, which the naive form keeps in FP16, as a share of 65504."""
        return share_of_limit(self.deviation * self.deviation)

    def to_dict(self) -> dict[str, Any]:
        """The range as JSON has it."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True, slots=True)
class ParameterRange:
    """A parameter of the FP16 deploy form, counted in elements.

    `largest` is before the cast. After it: `subnormal` elements lie in (0, 2^-14), `flushed` ones are zero and were
    not, `nonfinite` ones are infinite or NaN.
    """

    name: str
    count: int
    largest: float
    subnormal: int
    flushed: int
    nonfinite: int

    @property
    def module(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def share(self) -> float:
        """`largest` as a share of 65504."""
        return share_of_limit(self.largest)

    def to_dict(self) -> dict[str, Any]:
        """The range as JSON has it."""
        shares = {"subnormal_share": self.subnormal / self.count, "flushed_share": self.flushed / self.count}
        return {**asdict(self), **shares, "share": self.share}


@dataclass(frozen=True, slots=True)
class Summary:
    """The worst of each kind within a block or a stage; None where it has none of a kind."""

    name: str
    stored: TensorRange | None
    response: ResponseRange | None
    norm: NormRange | None

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON has it."""
        found = {"stored": self.stored, "response": self.response, "norm": self.norm}
        return {"name": self.name, **{kind: each.to_dict() if each else None for kind, each in found.items()}}


def share_of_limit(value: float) -> float:
    """A value as a share of FP16's largest number."""
    return value / HALF_MAX


def larger(first: float, second: float) -> float:
    """The larger of two numbers; NaN when either is, so that a NaN once seen stays."""
    return first if rank(first) > rank(second) or first != first else second


def rank(value: float) -> tuple[bool, float]:
    """A key that orders numbers and puts NaN above infinity."""
    return (True, 0.0) if value != value else (False, value)


def worst(ranges: Iterable[AnyRange]) -> AnyRange | None:
    """The range with the largest share, NaN above all; the first of equals, None of none."""
    return max(ranges, key=lambda each: rank(each.share), default=None)


def stage_of(module: str) -> int:
    """The stage, from 0, that a module counts with.

    Stem and downsampling count with the stage that they open, pooling and head with the last.
    """
    first, _, rest = module.partition(".")
    return int(rest.partition(".")[0]) if first in ("stages", "downsample_layers") else 3


def group_of(module: str) -> str:
    """The block, stem or downsampling that a module belongs to, or "head" for the last norm and the head."""
    words = module.split(".")
    depth = {"stages": 3, "downsample_layers": 2}.get(words[0])
    return "head" if depth is None else ".".join(words[:depth])
