"""A whole benchmark: conditions, measurement, sweep, gate, and what of it is a failure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy.bench.comparison import Benchmark, BenchRequest, bench_artifacts
from cnx_deploy.bench.conditions import Conditions, conditions_now, doubts, throttling
from cnx_deploy.bench.gate import Verdict, judge_against, read_baseline, refuse_incomparable
from cnx_deploy.bench.gpu import gpu_states
from cnx_deploy.bench.networks import precisions_of
from cnx_deploy.bench.peers import PEERS, place_of_peers
from cnx_deploy.bench.report import document, gate_lines, head_lines, table_lines
from cnx_deploy.bench.sweep import Knee, knees
from cnx_deploy.core.manifest import Artifact

__all__ = ["BenchReport", "run_bench"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """A benchmark with its conditions. `warnings` are doubts about the machine; `verdicts` are the gate's, if any."""

    benchmark: Benchmark
    conditions: Conditions
    knees: Sequence[Knee]
    warnings: tuple[str, ...]
    verdicts: Sequence[Verdict]
    gate: Path | None
    slo_ms: float | None

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return document(self.benchmark, self.conditions, knees=self.knees, warnings=self.warnings, gate=self.verdicts)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        head = head_lines(self.conditions, self.benchmark.networks)
        return [*head, *table_lines(self.benchmark, self.knees, self.slo_ms), *gate_lines(self.verdicts)]

    @property
    def failures(self) -> tuple[str, ...]:
        """What makes the run a failed check, a sentence each; empty when nothing does."""
        wrong = [f"{row.name} batch {row.batch}" for row in self.benchmark.rows if row.status == "INVALID"]
        slower = [f"{each.name} batch {each.batch}" for each in self.verdicts if each.verdict == "regression"]
        found = []
        if wrong:
            found.append(f"{', '.join(wrong)} gave wrong logits while timed; `cnx-deploy verify` says how wrong.")
        if slower:
            found.append(f"{', '.join(slower)} slower than {self.gate} allows; see the gate's lines for how much.")
        if self.gate is not None and all(verdict.verdict == "undecided" for verdict in self.verdicts):
            found.append(f"Nothing of {self.gate} could be judged; measure longer, or on a quieter machine.")
        return tuple(found)


def run_bench(
    artifacts: Sequence[Artifact],
    request: BenchRequest,
    *,
    slo_ms: float | None = None,
    gate: Path | None = None,
    max_regress: float = 0.05,
    omp_threads: str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> BenchReport:
    """Measure `artifacts` and judge them against the baseline at `gate`, if given; see `doubts` for `omp_threads`.

    Raises InputError for a baseline that cannot be read, or not compared with this machine.
    """
    conditions = conditions_now(threads=request.threads, duration_seconds=request.duration, seed=request.seed)
    warnings = doubts(conditions, omp_threads)
    baseline = read_baseline(gate) if gate is not None else None
    if baseline is not None:
        _, precision = place_of_peers(precisions_of(artifacts))
        peers = [PEERS[word].row_name(precision) for word in request.compare]
        refuse_incomparable(baseline, conditions.machine, peers)
    result = bench_artifacts(artifacts, request, progress)
    verdicts = judge_against(baseline, document(result, conditions), max_regress) if baseline is not None else ()
    return BenchReport(
        benchmark=result,
        conditions=conditions,
        knees=knees(result.rows, slo_ms) if request.sweep or slo_ms is not None else (),
        warnings=(*warnings, *throttling(gpu_states())),
        verdicts=verdicts,
        gate=gate,
        slo_ms=slo_ms,
    )
