"""Saved results judged again, at their own gate or another: no model is run and no artifact is needed."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES, Gate, ParityResult
from cnx_deploy.verification.agreement import Tally
from cnx_deploy.verification.parity import differences
from cnx_deploy.verification.saved_results import SavedRun, read_saved
from cnx_deploy.verification.verify import Verification

__all__ = ["GateChange", "judge_saved"]

LIMITS: dict[str, tuple[str, float, float]] = {
    "relative_l2": ("relative_l2_max", 0.0, math.inf),
    "cosine": ("centred_cosine_min", -1.0, 1.0),
    "top1": ("top1_agreement_min", 0.0, 1.0),
    "kl": ("mean_kl_max", 0.0, math.inf),
}
"""Field of `GateChange` -> field of `Gate`, and the range of its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateChange:
    """Another gate by name, or other limits in place of the saved gate's; None leaves one as it is.

    `relative_l2` and `kl` are the largest allowed, `cosine` (-1 to 1) and `top1` (a share, 0 to 1) the smallest.
    Raises InputError for both at once and for a limit outside its range.
    """

    gate: str | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    top1: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = [f"--{name.replace('_', '-')}" for name in LIMITS if getattr(self, name) is not None]
        if self.gate is not None and given:
            raise InputError(f"--gate {self.gate} sets every limit: leave out {', '.join(given)}, or --gate.")
        if self.gate is not None and self.gate not in GATES:
            raise InputError(f"No gate is called {self.gate!r}. Choose one of: {', '.join(GATES)}.")
        for name, (_, smallest, largest) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not smallest <= value <= largest:
                raise InputError(
                    f"A limit of {value} for {name} cannot be: expected {smallest:g} to {largest:g}. Give such a one."
                )

    def of(self, gate: Gate) -> Gate:
        """The gate to judge by, in place of the saved one."""
        if self.gate is not None:
            return GATES[self.gate]
        limits = {LIMITS[name][0]: value for name in LIMITS if (value := getattr(self, name)) is not None}
        changed: dict[str, Any] = {"name": f"{gate.name}, changed", **limits} if limits else {}
        return replace(gate, **changed)


def judge_saved(folder: Path, change: GateChange | None = None) -> list[Verification]:
    """Judge everything that `verify --save-outputs` wrote in a folder; at the saved gates the numbers are the same.

    Raises InputError when there are no saved results, CorruptArtifactError when a file is missing or was altered.
    """
    return [
        Verification(
            saved.artifact,
            saved.kind,
            tuple(_judged(run, folder, change or GateChange()) for run in saved.runs),
            saved.not_run,
            saved.notes,
        )
        for saved in read_saved(folder)
    ]


def _judged(run: SavedRun, folder: Path, change: GateChange) -> ParityResult:
    gate = change.of(run.gate)
    return _judged_plain(run, folder, gate) if run.labels is None else _judged_labelled(run, folder, gate)


def _judged_plain(run: SavedRun, folder: Path, gate: Gate) -> ParityResult:
    candidates, references = zip(*run.pairs(folder), strict=True)
    found = differences(torch.cat(candidates).double(), torch.cat(references).double())
    return ParityResult(run.candidate, run.reference, gate, run.batches, found, gate.failures(found))


def _judged_labelled(run: SavedRun, folder: Path, gate: Gate) -> ParityResult:
    labels, at = run.labels or (), 0
    tally = Tally(run.details.class_names)
    for candidate, reference in run.pairs(folder):
        here = slice(at, at + len(candidate))
        tally.add(candidate, reference, labels[here], run.images[here])
        at = here.stop
    names, details = (run.candidate, run.reference), run.details
    return tally.result(names, gate, run.batches, available=details.available, broken=details.broken)
