"""The regression gate: whether a benchmark is slower than an earlier one, judged only where the two can be compared.

Best is the ratio to a peer that ran in turns with the file in both runs: it holds across machines. Without a common
peer images a second are compared, and only on the same machine. What was UNSTABLE is undecided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cnx_deploy.bench.record import BenchmarkRecord, Timing
from cnx_deploy.core.errors import InputError

__all__ = ["Verdict", "failures", "judge_against"]

IDENTITY = ("variant", "image_size", "num_classes", "input")
"""What has to be equal for a network to be the same; its weights may be trained further."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One file at one batch against the baseline, with the reason where it is undecided.

    `before` and `now` are of `measure`: the ratio to the peer it names, or images a second. `change` is now ÷ before.
    """

    name: str
    batch: int
    verdict: Literal["ok", "regression", "undecided"]
    measure: str = ""
    before: float | None = None
    now: float | None = None
    change: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        figures = self.reason
        if self.change is not None:
            figures = f"{self.measure} {self.before:.4g} -> {self.now:.4g} ({self.change - 1:+.1%})"
        return f"gate: {self.name} batch {self.batch}: {self.verdict}, {figures}"


def judge_against(baseline: BenchmarkRecord, current: BenchmarkRecord, max_regress: float = 0.05) -> list[Verdict]:
    """Give a verdict on each file's row of the baseline; `max_regress` 0.05 allows 5 % less. Peers are not judged.

    Raises:
        InputError: The baseline has no row of a file, or a row has no peer in both runs and the machines differ.
    """
    rows = [row for row in baseline.rows if baseline.is_file(row)]
    if not rows:
        raise InputError("The baseline has no row of a file, only of peers or none at all: there is nothing to judge.")
    now = {(row.name, row.batch): row for row in current.rows}
    return [_verdict(row, now.get((row.name, row.batch)), baseline, current, max_regress) for row in rows]


def failures(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """What makes the verdicts a failed check, a sentence each; empty when nothing does."""
    slower = [f"{verdict.name} batch {verdict.batch}" for verdict in verdicts if verdict.verdict == "regression"]
    if slower:
        return (f"{', '.join(slower)} slower than the baseline allows; see the gate's lines for how much.",)
    if all(verdict.verdict == "undecided" for verdict in verdicts):
        return ("Nothing of the baseline could be judged; measure longer, or on a quieter machine.",)
    return ()


def _verdict(
    before: Timing, now: Timing | None, baseline: BenchmarkRecord, current: BenchmarkRecord, max_regress: float
) -> Verdict:
    reason = _undecidable(before, now, baseline, current)
    if reason or now is None:
        return Verdict(before.name, before.batch, "undecided", reason=reason)
    measure, earlier, later = _figures(before, now, baseline, current)
    change = later / earlier
    verdict: Literal["ok", "regression"] = "regression" if change < 1.0 - max_regress else "ok"
    return Verdict(before.name, before.batch, verdict, measure, earlier, later, change)


def _undecidable(before: Timing, now: Timing | None, baseline: BenchmarkRecord, current: BenchmarkRecord) -> str:
    """Why a pair of rows cannot be judged, empty where it can."""
    if now is None:
        return "it was not measured now"
    for row, when in ((before, "in the baseline"), (now, "now")):
        if row.status != "OK":
            return f"it is {row.status} {when}"
    networks = baseline.networks[before.network], current.networks[now.network]
    differing = [name for name in IDENTITY if len({getattr(network, name) for network in networks}) > 1]
    return f"another network: {', '.join(differing)} differ" if differing else ""


def _figures(
    before: Timing, now: Timing, baseline: BenchmarkRecord, current: BenchmarkRecord
) -> tuple[str, float, float]:
    """What is compared, then and now: the ratio to the first common peer, else images a second."""
    # A ratio to another of our files is none to a peer: both would get slower together and the ratio would hide it.
    ours_then, ours_now = baseline.networks[before.network].file_of, current.networks[now.network].file_of
    theirs = {ratio.peer: ratio.ratio for ratio in now.ratios if ours_now(ratio.peer) is None}
    for ratio in before.ratios:
        if ratio.peer in theirs and ours_then(ratio.peer) is None:
            # The release of the peer's backend: one that got faster itself looks like a regression of ours.
            earlier, later = (
                next((row.version for row in record.rows if row.name == ratio.peer), "unknown")
                for record in (baseline, current)
            )
            changed = f" ({later}, was {earlier})" if earlier != later else ""
            return f"ratio to {ratio.peer}{changed}", ratio.ratio, theirs[ratio.peer]
    machines = baseline.environment.machine, current.environment.machine
    if machines[0] != machines[1]:
        raise InputError(
            f"No peer is in both runs, and they are from different machines ({'; '.join(machines)}): images a second "
            "cannot be compared. Measure both with the same --compare, for example --compare torch."
        )
    return "images/s", before.images_per_second, now.images_per_second
