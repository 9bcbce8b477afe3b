"""The record of a layer-by-layer comparison: what `diagnose layers --json` prints, and the HTML page reads back.

Reading a record loads neither torch nor a runner. JSON has no NaN: null is what a figure that is not finite became.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from cnx_deploy.core.manifest import Count
from cnx_deploy.core.strict_json import Finite, typed

__all__ = ["BackendResult", "LayerComparison", "OutputDifferences", "OutputResult", "Verdict", "block_of",
           "comparisons_in"]  # fmt: skip

Verdict = Literal["ok", "jumps", "not lined up", "fails", "not finite"]
"""Over a module, the gravest last."""


@dataclass(frozen=True, slots=True)
class OutputDifferences:
    """One module's output against the reference's. Relative L2 and cosine in float64, of the worst sample.

    `nonfinite` counts NaN and infinities of both; where there are any, relative L2 and cosine are NaN. `max_abs` is
    the backend's own largest value.
    """

    relative_l2: Finite | None
    cosine: Finite | None
    nonfinite: Count
    max_abs: Finite | None


@dataclass(frozen=True, slots=True)
class OutputResult:
    """The verdict over one module; `figures` is None where its shape is another than the reference's (`reason`)."""

    module: str
    verdict: Verdict
    figures: OutputDifferences | None
    reason: str = ""

    @property
    def fails(self) -> bool:
        """Whether it is further from the reference than rounding explains."""
        return self.verdict not in ("ok", "jumps")

    @property
    def relative_l2(self) -> float:
        """NaN where there is none."""
        error = self.figures.relative_l2 if self.figures is not None else None
        return math.nan if error is None else error

    def describe(self) -> str:
        """Say in words how far off the output is."""
        if self.figures is None:
            return f"{self.verdict}: {self.reason}"
        if self.figures.nonfinite:
            return f"{self.figures.nonfinite} values are NaN or infinite"
        return f"{self.verdict}, relative L2 {self.relative_l2:.1e}, cosine {self.figures.cosine:.6f}"


@dataclass(frozen=True, slots=True)
class BackendResult:
    """The outputs of one backend in order of depth, or in `not_run` why there are none.

    `relative_l2_max` is the limit above which an output fails.
    """

    backend: str
    relative_l2_max: Finite
    outputs: tuple[OutputResult, ...] = ()
    not_run: str | None = None

    @property
    def diverges(self) -> bool:
        """Whether an output fails."""
        return any(output.fails for output in self.outputs)

    @property
    def begins(self) -> OutputResult | None:
        """The first output that fails or jumps."""
        return next((output for output in self.outputs if output.verdict != "ok"), None)

    @property
    def within(self) -> int:
        """How many modules are within the limit."""
        return sum(not output.fails for output in self.outputs)

    def of_block(self, block: str) -> tuple[Verdict, float | None] | None:
        """Return a block's gravest verdict and its largest relative L2, None where that is not known for each."""
        outputs = [output for output in self.outputs if block_of(output.module) == block]
        if not outputs:
            return None
        errors = [output.relative_l2 for output in outputs]
        worst = max(errors) if all(map(math.isfinite, errors)) else None
        return max((output.verdict for output in outputs), key=get_args(Verdict).index), worst

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            **asdict(self),
            "diverges": self.diverges,
            "begins": None if self.begins is None else self.begins.module,
            "outputs": [{**asdict(output), "block": block_of(output.module)} for output in self.outputs],
        }


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """All backends on one file. `missing` names modules that the file gives no tensor for, and why.

    `not_compared`: modules that run on what was chosen among candidates, see `Task.behind_a_choice`.
    """

    artifact: str
    images: Count
    backends: tuple[BackendResult, ...]
    missing: Mapping[str, str]
    not_compared: tuple[str, ...] = ()

    @property
    def ran(self) -> tuple[BackendResult, ...]:
        """The backends that ran."""
        return tuple(result for result in self.backends if result.outputs)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks in order of depth."""
        return tuple(dict.fromkeys(block_of(output.module) for result in self.ran for output in result.outputs))

    @property
    def first(self) -> tuple[BackendResult, OutputResult] | None:
        """Where the network first diverges: the backend whose divergence begins at the least depth."""
        depth = {output.module: at for result in self.backends for at, output in enumerate(result.outputs)}
        begun = [(result, result.begins) for result in self.backends if result.diverges]
        pairs = [(result, output) for result, output in begun if output is not None]
        return min(pairs, key=lambda pair: depth[pair[1].module], default=None)

    @property
    def passed(self) -> bool:
        """Whether every module was compared and no backend diverges."""
        return self.first is None and not self.missing

    def to_dict(self) -> dict[str, Any]:
        """Return every output of every backend for JSON, and where the network first diverges."""
        place = None
        if self.first is not None:
            result, output = self.first
            place = {
                "backend": result.backend, "module": output.module, "block": block_of(output.module),
                "verdict": output.verdict,
            }  # fmt: skip
        return {
            "artifact": self.artifact,
            "images": self.images,
            "passed": self.passed,
            "first_divergence": place,
            "missing": dict(self.missing),
            "not_compared": list(self.not_compared),
            "backends": [result.to_dict() for result in self.backends],
        }


@dataclass(frozen=True, slots=True)
class _Document:
    layers: tuple[LayerComparison, ...]


def comparisons_in(document: Mapping[str, Any]) -> tuple[LayerComparison, ...]:
    """Read the parsed JSON that `diagnose layers --json` printed; ValueError names a field that is wrong."""
    return typed(document, _Document).layers


def block_of(module: str) -> str:
    """Return the stem, downsampling or block that a module is part of: `stages.2.3` of `stages.2.3.grn.affine`."""
    parts = module.split(".")
    depth = {"stages": 3, "downsample_layers": 2}.get(parts[0], 1)
    return ".".join(parts[:depth])
