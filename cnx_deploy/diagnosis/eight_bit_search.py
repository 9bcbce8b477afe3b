"""Sensitivity of an FP8 or INT8 file, and the smallest set of parts to keep in FP16 for it to pass its gate.

Each part is tried alone in eight bits on the deploy form, which rounds as the file does. With the worst first, sets are
searched as `bisect` does, on a few of the images. The result is calibrated anew and exported, judged on all images, and
its engines are compared with FP16's: parts in FP16 cost bytes.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cnx_deploy.core.eight_bits import GAIN_FOLDS, PARTS, EightBits
from cnx_deploy.core.errors import CheckFailedError, InputError
from cnx_deploy.core.gates import GATES, Gate
from cnx_deploy.core.manifest import Artifact, OnnxManifest
from cnx_deploy.core.variants import find_variant
from cnx_deploy.data import evenly
from cnx_deploy.diagnosis.bisect import CachedProbes, command_like, file_to_search, without_one
from cnx_deploy.diagnosis.eight_bit_trials import Trial, Trials
from cnx_deploy.diagnosis.mixed_precision import Case, EightBitForm, Probe, is_kept
from cnx_deploy.diagnosis.search import Passes, find_kept, in_order
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.deploy import block_parts
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.verification.eight_bits import GATE_TARGETS

__all__ = [
    "EightBitSearch", "bisect_artifact", "failure", "parts_in_eight_bits", "report_lines", "run_bisection",
    "sensitivity_of", "smallest_set",
]  # fmt: skip

Note = Callable[[str], None]
Judge = Callable[[Collection[str]], Probe]
Parts = Mapping[str, tuple[str, ...]]
"""Blocks, and the parts of each that have tensors in eight bits."""
BLOCK = "block"
WORST_IMAGES, TYPICAL_IMAGES = 4, 28
"""What sets are tried on: images that the file is worst on, and others evenly spread over its errors."""
ROUNDS = 3
"""Searches, each with images of the file that failed after the one before."""
PLACEHOLDER = "CALIBRATION-IMAGES"


@dataclass(frozen=True, slots=True)
class EightBitSearch:
    """The result for one file: judged on `images`, sets tried on `tried_on` of them first.

    `sensitivity`: by block, of the block and of each part, relative L2 on the worst image with nothing else in eight
    bits; `floor` with nothing at all. `kept` None: none needed, or nothing helps. `final` is the file with `kept`, None
    where that is everything; `other` one in the other precision of eight bits, written where `final` is not worth it.
    """

    artifact: Artifact[OnnxManifest]
    gate: Gate
    data: Path
    images: int
    recorded: Probe
    reference_nonfinite: int
    can_calibrate: bool
    has_engines: bool
    tried_on: int = 0
    sensitivity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    floor: float = 0.0
    probes: tuple[Probe, ...] = ()
    kept: tuple[str, ...] | None = None
    neighbours: tuple[Probe, ...] = ()
    final: Trial | None = None
    other: Trial | None = None

    @property
    def outcome(self) -> str:
        """One of "none needed", "found" and "nothing helps"."""
        if self.recorded.passed:
            return "none needed"
        fails = self.final is not None and not self.final.probe.passed
        return "nothing helps" if self.kept is None or fails else "found"

    @property
    def advised(self) -> Trial | None:
        """The file to export; None is one of FP16."""
        return next((trial for trial in (self.final, self.other) if trial is not None and trial.is_worth_it), None)

    @property
    def command(self) -> str | None:
        """The `cnx-deploy export` of what is advised."""
        if self.outcome != "found":
            return None
        deploy, trial = self.artifact.manifest.deploy, self.advised
        words = [word for part in deploy.keep_fp32 for word in ("--keep-fp32", part)]
        if trial is None:
            return command_like(self.artifact, [*words, "--force"], "fp16")
        assert deploy.eight_bits is not None
        calibration = ["--calibration", str(self.data) if self.can_calibrate else PLACEHOLDER]
        calibration += ["--samples", str(deploy.eight_bits.images), "--calibration-method", deploy.eight_bits.method]
        words += [word for part in trial.kept for word in ("--keep-fp16", part)]
        facts = self.artifact.manifest.facts.eight_bits
        targets = facts.targets if facts is not None else ()
        if self.has_engines and targets not in ((), GATE_TARGETS):
            words += [word for target in targets for word in ("--gate-target", target)]
        words += ["--force"] if self.has_engines else ["--no-engine-gates", "--force"]
        return command_like(self.artifact, [*calibration, *words], trial.precision)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "schema_version": 1,
            "artifact": self.artifact.path.name,
            "precision": self.artifact.manifest.precision.name,
            "gate": asdict(self.gate),
            "images": self.images,
            "outcome": self.outcome,
            "recorded": self.recorded.to_dict(),
            "reference_nonfinite": self.reference_nonfinite,
            "images_of_probes": self.tried_on,
            "sensitivity": self.sensitivity,
            "floor": self.floor,
            "keep_fp16": self.kept,
            "without_one": [probe.to_dict() for probe in self.neighbours],
            "final": self.final and self.final.to_dict(),
            "other": self.other and self.other.to_dict(),
            "advised_precision": (self.advised.precision if self.advised else "fp16") if self.command else None,
            "command": self.command,
            "probes": [probe.to_dict() for probe in self.probes],
        }


def run_bisection(
    file: Path,
    note: Note,
    *,
    data: Path | None = None,
    samples: int = 500,
    gate: str | None = None,
    white_level: float | None = None,
    no_engine_gates: bool = False,
) -> EightBitSearch:
    """Search a recorded file in eight bits on images of the folder or table `data`.

    `samples` of them judge files, at most; the calibration sees others. `no_engine_gates` compiles nothing. `gate`,
    `white_level` and what is raised: see `bisect.run_bisection`. Raises InputError without `data`.
    """
    artifact = file_to_search(file)
    if data is None:
        raise InputError(
            f"{artifact.path.name} is judged on images like those that it will see. Give a folder or a CSV file: "
            "--data DATA."
        )
    words: dict[str, Any] = {"samples": samples, "gate": GATES[gate] if gate else artifact.manifest.precision.gate}
    words |= {"white_level": white_level, "has_engines": not no_engine_gates}
    return bisect_artifact(artifact, recorded_model(artifact), note, data, **words)


def bisect_artifact(
    artifact: Artifact[OnnxManifest],
    loaded: LoadedModel,
    note: Note,
    data: Path,
    *,
    gate: Gate,
    samples: int = 500,
    white_level: float | None = None,
    has_engines: bool = True,
) -> EightBitSearch:
    """Search a file made from `loaded`; see `run_bisection`."""
    trials = Trials(
        artifact, loaded, gate, data, note, samples=samples, white_level=white_level, has_engines=has_engines
    )
    name, broken, can_calibrate = artifact.path.name, trials.case.reference_nonfinite, trials.can_calibrate
    recorded, worst = trials.judge_file(artifact)
    result = EightBitSearch(artifact, gate, data, len(worst), recorded, broken, can_calibrate, has_engines)
    if recorded.passed:
        return result
    note(f"{name} fails on {len(worst)} images: {'; '.join(recorded.failures)}")
    trials.calibrate_as_asked()
    record = trials.case.spec.deploy.eight_bits
    assert record is not None
    form, parts = EightBitForm(loaded.model, trials.case.spec.deploy), parts_in_eight_bits(record)
    some = _some_of(worst)
    note(f"Trying each part alone in eight bits, on {len(some)} images")
    judge = partial(_judged, form, _few(trials, some))
    floor = _error(judge(tuple(parts)))
    result = replace(result, tried_on=len(some), floor=floor, sensitivity=sensitivity_of(parts, judge))
    result = _with_set(result, trials, form, some, parts, note)
    if result.outcome == "found" and result.advised is None and can_calibrate:
        other = "fp8" if record.placement == "int8" else "int8"
        note(f"Writing the file in {other} instead")
        result = replace(result, other=trials.write(other, trials.asked)[0])
    return result


def parts_in_eight_bits(record: EightBits) -> dict[str, tuple[str, ...]]:
    """The blocks with tensors in eight bits, and of each the parts that these belong to."""
    return {
        name: tuple(dict.fromkeys(PARTS[letter] for letter in PARTS if letter in block.scales))
        for name, block in record.blocks.items()
    }


def sensitivity_of(parts: Parts, judge: Judge) -> dict[str, dict[str, float]]:
    """The error of each block and of each of its parts alone in eight bits, the worst block first."""
    errors = {}
    for block, own in parts.items():
        others = [name for name in parts if name != block]
        alone = {part: [*others, *(f"{block}.{other}" for other in own if other != part)] for part in own}
        errors[block] = {BLOCK: _error(judge(others)), **{part: _error(judge(kept)) for part, kept in alone.items()}}
    return dict(sorted(errors.items(), key=lambda item: -item[1][BLOCK]))


def smallest_set(
    parts: Parts, worst_first: Sequence[str], passes: Passes, choices: Sequence[str], units: Sequence[str]
) -> tuple[str, ...] | None:
    """The fewest parts to keep in FP16 for the check to pass, as `search.find_kept` finds them; None where none helps.

    `worst_first`: the blocks. Where small errors add up, the shortest run of them that is enough is one of bad blocks.
    `choices`: parts that a block can keep by themselves. The names come in the order of `units`.
    """
    kept = find_kept(worst_first, passes, choices)
    if kept is None:
        return None
    names = set(kept)
    for block, own in parts.items():
        inside = {f"{block}.{part}" for part in own}
        if len(own) > 1 and inside <= names:
            names = {*names - inside, block}
    return in_order(names, units)


def report_lines(search: EightBitSearch) -> Iterator[str]:
    """Yield the result for a terminal; `failure` says the rest where nothing helps."""
    name, recorded, gate = search.artifact.path.name, search.recorded, search.gate
    judged = f"gate {gate.name}, {search.images} images of {search.data}; on a GPU: not run"
    if recorded.passed:
        yield (
            f"{name} passes as it is (relative L2 {recorded.found.relative_l2_max:.1e}; {judged}): nothing more has to "
            "stay in FP16."
        )
        return
    yield f"{name} fails: {'; '.join(recorded.failures)} ({judged})"
    yield (
        f"Relative L2 of each part alone in eight bits, on the worst of {search.tried_on} images "
        f"({search.floor:.1e} with all in FP16, gate {gate.relative_l2_max:g}):"
    )
    columns = dict.fromkeys(part for row in search.sensitivity.values() for part in row)
    is_v1 = find_variant(search.artifact.manifest.model.variant).version == 1  # whose hidden tensor no GRN reads
    heads = ("hidden" if column == "grn" and is_v1 else column for column in columns)
    yield f"  {'':12}{''.join(f'{head:>10}' for head in heads)}"
    for block, row in search.sensitivity.items():
        errors = (f"{row[column]:>10.1e}" if column in row else f"{'-':>10}" for column in columns)
        yield f"  {block:12}{''.join(errors)}"
    if search.kept is None:
        return
    yield f"To keep in FP16, found with {len(search.probes)} probes:"
    yield f"  {' '.join(search.kept) or 'nothing: with scales of these images it passes'}"
    for part, fewer in zip(search.kept, search.neighbours, strict=True):
        yield f"Without {part} among them: {'FAIL: ' + '; '.join(fewer.failures) if fewer.failures else 'pass'}"
    for trial in (search.final, search.other):
        if trial is not None:
            yield from _trial_lines(trial, search)
    if search.command is None:
        return
    advised = search.advised.precision if search.advised else "fp16"
    if left_out := sorted(set(GAIN_FOLDS.values()) & set(search.artifact.manifest.deploy.leave_out)):
        yield f"The file was made without {', '.join(left_out)}, which even channels out: try it with them."
    if advised == search.artifact.manifest.deploy.precision:
        yield "The same file from the command line, in place of the one that fails:"
    else:
        yield f"What passes and pays is {advised}:" if search.advised else "What is left is fp16:"
    yield f"  {search.command}"
    if PLACEHOLDER in search.command:
        yield (
            f"{PLACEHOLDER} stands for the images that the file was calibrated on. {search.data} has too few to "
            "calibrate on and to judge by."
        )


def failure(search: EightBitSearch) -> CheckFailedError | None:
    """Return what is wrong where nothing helps; None otherwise."""
    if search.outcome != "nothing helps":
        return None
    name = search.artifact.path.name
    if search.reference_nonfinite:
        return CheckFailedError(
            f"PyTorch in FP32 gives {search.reference_nonfinite} values that are NaN or infinite for {name}'s "
            "network; numbers were expected, and no precision of the file mends that. Check the weights and the images."
        )
    if search.final is not None:
        return CheckFailedError(
            f"A file with {' '.join(search.final.kept) or 'nothing'} in FP16 fails "
            f"({'; '.join(search.final.probe.failures)}) where its deploy form passes on fewer images. Export fp16, or "
            "see by `cnx-deploy diagnose layers` where the file differs from its form."
        )
    everything = next(probe for probe in search.probes if set(probe.kept) >= search.sensitivity.keys())
    return CheckFailedError(
        f"{name} fails with every part in FP16 too ({'; '.join(everything.failures)}): eight bits are not its fault. "
        "Export it with --precision fp16 --no-verify; `cnx-deploy diagnose bisect` on that file says what to keep in "
        "FP32."
    )


def _trial_lines(trial: Trial, search: EightBitSearch) -> Iterator[str]:
    how = "calibrated anew" if search.can_calibrate else "on the scales of the file"
    error = f"pass, relative L2 {trial.probe.found.relative_l2_max:.1e}"
    verdict = error if trial.probe.passed else f"FAIL: {'; '.join(trial.probe.failures)}"
    yield f"A file in {trial.precision} with {' '.join(trial.kept) or 'nothing'} in FP16 ({how}): {verdict}"
    if trial.changed:
        yield f"  Its calibration gives other scales or gains for {' '.join(trial.changed)}"
    for check in trial.engines:
        told = f"{check.share:.3f} of FP16's bytes, {check.kernels} kernels (FP16 {check.half_kernels})"
        yield f"  {check.target}, batch {check.batch}: {told}: {'; '.join(check.faults) or 'it pays'}"
    if trial.engines_not_run is not None and trial.probe.passed:
        yield f"  Bytes and kernels of its engines: not run ({trial.engines_not_run})"


def _some_of(order: Sequence[int]) -> list[int]:
    """Images that stand for all, from the worst to the best."""
    typical = (order[at] for at in evenly(len(order), TYPICAL_IMAGES))
    return list(dict.fromkeys((*order[:WORST_IMAGES], *typical)))


def _few(trials: Trials, images: Sequence[int]) -> Case:
    """The case of a few images. One flip is a large share of them; flips beyond noise stay limited."""
    case = trials.some(images)
    return replace(case, gate=replace(case.gate, flip_share_max=None))


def _with_set(
    result: EightBitSearch, trials: Trials, form: EightBitForm, images: Sequence[int], parts: Parts, note: Note
) -> EightBitSearch:
    """Search the set by the form until a file with it passes, each time with images on which the last one failed."""
    choices = tuple(part for part in block_parts(trials.case.loaded.model.variant) if part in PARTS.values())
    for _ in range(ROUNDS):
        note(f"Searching on {len(images)} images")
        case = _few(trials, images)
        cached = CachedProbes(partial(_judged, form, case), None, tuple(parts), note, kept_in="FP16")
        kept = smallest_set(parts, tuple(result.sensitivity), cached.passes, choices, case.units)
        neighbours = tuple(cached.probe(fewer) for fewer in without_one(kept or ()))
        result = replace(result, kept=kept, neighbours=neighbours, probes=(*result.probes, *cached.made))
        if kept is None or all(is_kept(f"{block}.{part}", kept) for block, own in parts.items() for part in own):
            return replace(result, final=None)  # nothing helps, or FP16 does
        note("Calibrating and writing a file with the result")
        final, order = trials.write(trials.record.placement, (*trials.asked, *kept))
        result = replace(result, final=final)
        if final.probe.passed:
            return result
        images = list(dict.fromkeys((*images, *_some_of(order))))
        note(f"  it fails: {'; '.join(final.probe.failures)}")
    return result


def _judged(form: EightBitForm, case: Case, kept: Collection[str]) -> Probe:
    return case.judge(kept, form.outputs(case.batches, kept), exported=False)


def _error(probe: Probe) -> float:
    """Relative L2 on the worst image; infinite where a value is no number."""
    return probe.found.relative_l2_max if probe.found.all_finite else math.inf
