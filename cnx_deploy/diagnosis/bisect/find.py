"""Which smallest set of modules must stay in FP32 for a half-precision file to pass its gate.

Sets are tried on the form that would be exported (`bisection.probe`), block by block first, then by the parts of each
block found. What comes out is exported and run by the emulator, and so is each set that lacks one of its names: the
whole has to pass and none of those. Where files and probes disagree, the search is made again with a file a probe.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cnx_deploy.core.artifacts import is_onnx, open_artifact
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES, Gate
from cnx_deploy.core.manifest import Artifact, OnnxManifest
from cnx_deploy.diagnosis.bisect.case import Case, Exported, Probe, Recorded, case_of, exported_with, recorded_as_it_is
from cnx_deploy.diagnosis.bisect.probe import MixedForm
from cnx_deploy.diagnosis.bisect.search import Passes, minimal_set, smallest_subset
from cnx_deploy.diagnosis.bisect.units import in_order, islands_of, parts_of_unit, spelled
from cnx_deploy.exporters.untrusted import check_recorded
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.deploy import BLOCK_PARTS, FORM, block_parts
from cnx_deploy.model.recorded import recorded_model

__all__ = ["Bisection", "Tried", "bisect_artifact", "find_kept", "run_bisection"]

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bisection:
    """What was found of one file.

    `kept` None: nothing is needed (`recorded` passes) or nothing helps. `probes` in the order in which they were made;
    `final` is the file with `kept`, and `neighbours` are the files that lack one name of it. `reference_nonfinite`
    counts PyTorch's own logits that are no numbers.
    """

    artifact: Artifact[OnnxManifest]
    gate: Gate
    images: int
    units: tuple[str, ...]
    recorded: Recorded
    reference_nonfinite: int
    probes: tuple[Probe, ...] = ()
    kept: tuple[str, ...] | None = None
    final: Exported | None = None
    neighbours: tuple[Probe, ...] = ()

    @property
    def outcome(self) -> str:
        """One of "none needed", "found" and "nothing helps"."""
        if self.recorded.probe.passed:
            return "none needed"
        return "nothing helps" if self.kept is None else "found"

    @property
    def islands(self) -> tuple[tuple[str, ...], ...]:
        """`kept` by stretches in which the network stays in FP32."""
        return islands_of(self.kept or (), self.units)


@dataclass(slots=True)
class Tried:
    """A judge that remembers what it was asked; each new set is told to `note`."""

    judge: Callable[[Collection[str]], Probe]
    units: tuple[str, ...]
    note: Note
    probes: dict[frozenset[str], Probe] = field(default_factory=dict)

    def passes(self, kept: Collection[str]) -> bool:
        """Whether the gate holds with these kept."""
        return self.probe(kept).passed

    def probe(self, kept: Collection[str]) -> Probe:
        """The verdict with these kept."""
        key = frozenset(kept)
        if key not in self.probes:
            probe = self.probes[key] = self.judge(kept)
            how = "file" if probe.exported else "probe"
            error = f"relative L2 {probe.found.relative_l2_max:.1e}"
            verdict = f"pass, {error}" if probe.passed else f"FAIL: {'; '.join(probe.failures)}"
            self.note(f"  {how}, in FP32: {spelled(kept, self.units)}: {verdict}")
        return self.probes[key]


def run_bisection(
    file: Path, note: Note, *, data: Path | None = None, samples: int = 4, gate: str | None = None
) -> Bisection:
    """Bisect a recorded half-precision ONNX file on images of the folder `data`, or on seeded ones.

    `gate` names one of `parity.GATES`, by default that of the file's precision. Raises InputError for another kind of
    artifact, and whatever `artifacts.open_artifact` and `model.recorded_model` raise.
    """
    artifact = open_artifact(file)
    if not is_onnx(artifact) or not artifact.manifest.precision.has_islands:
        raise InputError(f"{artifact.path.name} is no ONNX file of half precision. Name one that is FP16 or BF16.")
    check_recorded(artifact)
    if artifact.manifest.request.form != FORM:
        raise InputError(f"{artifact.path.name} has an earlier deploy form. Export it again with --force.")
    if samples < 1:
        raise InputError(f"A file is judged on at least one image, not on {samples}. Give --samples 1 or more.")
    judged_by = GATES[gate] if gate else artifact.manifest.precision.gate
    return bisect_artifact(artifact, recorded_model(artifact), note, gate=judged_by, data=data, samples=samples)


def bisect_artifact(
    artifact: Artifact[OnnxManifest],
    loaded: LoadedModel,
    note: Note,
    *,
    gate: Gate,
    data: Path | None = None,
    samples: int = 4,
) -> Bisection:
    """Bisect a file made from `loaded`; see `run_bisection`."""
    case = case_of(artifact, loaded, gate, data, samples)
    recorded = recorded_as_it_is(artifact, case)
    found = Bisection(artifact, gate, len(case.expected), case.units, recorded, case.reference_nonfinite)
    if recorded.probe.passed:
        return found
    note(f"{artifact.path.name} fails on {found.images} images: {'; '.join(recorded.probe.failures)}")
    tried = _tried_on_the_form(case, recorded, note)
    parts = block_parts(loaded.model.variant)
    kept = find_kept(case.units, tried.passes, parts)
    found = replace(found, probes=_made(tried, recorded))
    del tried  # and with it two copies of the weights, which are not needed while files are written
    return found if kept is None else _confirmed(found, kept, case, note)


def find_kept(units: Sequence[str], passes: Passes, parts: Sequence[str] = BLOCK_PARTS) -> tuple[str, ...] | None:
    """The modules to keep: the minimal set of units, each block replaced by the fewest of its parts that are enough.

    `parts`: those that a block of the network has. None where keeping everything does not pass.
    """
    if not passes(units):
        return None
    if passes(()):
        return ()
    kept = list(minimal_set(units, passes))
    for unit in tuple(kept):
        others = [name for name in kept if name != unit]
        own = parts_of_unit(unit, parts)
        enough = smallest_subset(own, others, passes) if own else None
        if enough is not None:
            kept = [*others, *enough]
    return in_order(kept, units)


def _tried_on_the_form(case: Case, recorded: Recorded, note: Note) -> Tried:
    """A judge without exports, which knows the verdict over the file as it is."""
    form = MixedForm(case.loaded.model, case.spec.deploy)

    def judge(kept: Collection[str]) -> Probe:
        return case.judged(kept, form.logits(case.batches, kept), exported=False)

    tried = Tried(judge, case.units, note)
    if recorded.probe.kept:
        note(f"  it keeps {spelled(recorded.probe.kept, case.units)} in FP32; the search begins with nothing kept")
    else:
        tried.probes[frozenset()] = recorded.probe
    return tried


def _confirmed(found: Bisection, kept: tuple[str, ...], case: Case, note: Note) -> Bisection:
    """The result after files were written with it; another one where they contradict it."""
    files: dict[frozenset[str], Exported] = {}

    def judge(names: Collection[str]) -> Probe:
        files[frozenset(names)] = exported_with(names, case)
        return files[frozenset(names)].probe

    exports = Tried(judge, case.units, note)
    if not found.recorded.probe.kept:
        exports.probes[frozenset()] = found.recorded.probe
    note("Writing files with the result, and with all of it but one")
    better: tuple[str, ...] | None = kept
    if not (exports.passes(kept) and not any(exports.passes(fewer) for fewer in _neighbours(kept))):
        note("The files contradict the probes: searching again with a file a probe")
        better = find_kept(case.units, exports.passes, block_parts(case.loaded.model.variant))
    neighbours = tuple(exports.probe(fewer) for fewer in _neighbours(better or ()))
    final = None if better is None else files[frozenset(better)]
    probes = (*found.probes, *_made(exports, found.recorded))
    return replace(found, probes=probes, kept=better, final=final, neighbours=neighbours)


def _neighbours(kept: Sequence[str]) -> list[list[str]]:
    """The sets that lack one name."""
    return [[other for other in kept if other != name] for name in kept]


def _made(tried: Tried, recorded: Recorded) -> tuple[Probe, ...]:
    """What was tried beyond the file that was there."""
    return tuple(probe for probe in tried.probes.values() if probe is not recorded.probe)
