"""Mixed-precision search: the smallest set of modules to keep in FP32 for a half-precision file to pass its gate.

Sets are tried on the form that would be exported (`mixed_precision.MixedForm`), block by block first, then by the parts
of each block found. The result is exported and run by the emulator, and so is each set that lacks one of its names: the
whole has to pass and none of those. Where files and probes disagree, the search is made again with a file a probe.
`eight_bit_search` has the same for files in eight bits.
"""

import json
import os
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cnx_deploy.core.artifacts import is_onnx, open_artifact
from cnx_deploy.core.errors import CheckFailedError, InputError
from cnx_deploy.core.gates import GATES, Gate
from cnx_deploy.core.image_size import size_text
from cnx_deploy.core.manifest import Artifact, OnnxManifest
from cnx_deploy.diagnosis.mixed_precision import (
    Case,
    ExportedProbe,
    MixedForm,
    Probe,
    RecordedProbe,
    case_of,
    export_and_probe,
    probe_recorded,
)
from cnx_deploy.diagnosis.search import find_kept
from cnx_deploy.exporters.onnx import ExportSpec
from cnx_deploy.exporters.untrusted import check_recorded
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.deploy import FORM, block_parts
from cnx_deploy.model.recorded import recorded_model

__all__ = [
    "Bisection", "CachedProbes", "bisect_artifact", "command_like", "export_command", "failure", "file_to_search",
    "report_lines", "run_bisection", "without_one",
]  # fmt: skip

SCHEMA_VERSION = 1

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bisection:
    """The result for one file.

    `kept` None: nothing is needed (`recorded` passes) or nothing helps. `probes` in the order in which they were made;
    `final` is the file with `kept`, and `neighbours` are the files that lack one name of it. `reference_nonfinite`
    counts PyTorch's own values that are no numbers.
    """

    artifact: Artifact[OnnxManifest]
    gate: Gate
    images: int
    units: tuple[str, ...]
    recorded: RecordedProbe
    reference_nonfinite: int
    probes: tuple[Probe, ...] = ()
    kept: tuple[str, ...] | None = None
    final: ExportedProbe | None = None
    neighbours: tuple[Probe, ...] = ()

    @property
    def outcome(self) -> str:
        """One of "none needed", "found" and "nothing helps"."""
        if self.recorded.probe.passed:
            return "none needed"
        return "nothing helps" if self.kept is None else "found"

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        final, share, command = self.final, None, None
        if final is not None and self.kept is not None:
            share = {"parameters": round(final.parameter_share, 6), "results": round(final.result_share, 4)}
            command = export_command(self.artifact, self.kept, final)
        return {
            "schema_version": SCHEMA_VERSION,
            "artifact": self.artifact.path.name,
            "precision": self.artifact.manifest.precision.name,
            "gate": asdict(self.gate),
            "images": self.images,
            "outcome": self.outcome,
            "recorded": self.recorded.probe.to_dict(),
            "first_nonfinite": self.recorded.first_nonfinite,
            "infinite_weights": self.recorded.infinite_weights,
            "reference_nonfinite": self.reference_nonfinite,
            "keep_fp32": self.kept,
            "final": final and final.probe.to_dict(),
            "without_one": [probe.to_dict() for probe in self.neighbours],
            "fp32_share": share,
            "command": command,
            "probes": [probe.to_dict() for probe in self.probes],
        }


@dataclass(slots=True)
class CachedProbes:
    """A judge of sets that remembers its verdicts; each new one is told to `note`.

    The verdict over the file as it is is known where that keeps nothing. `kept_in`: what sets are kept in.
    """

    judge: Callable[[Collection[str]], Probe]
    recorded: RecordedProbe | None
    units: tuple[str, ...]
    note: Note
    kept_in: str = "FP32"
    probes: dict[frozenset[str], Probe] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recorded is not None and not self.recorded.probe.kept:
            self.probes[frozenset()] = self.recorded.probe

    def passes(self, kept: Collection[str]) -> bool:
        """Whether the gate holds with these kept."""
        return self.probe(kept).passed

    def probe(self, kept: Collection[str]) -> Probe:
        """Return the verdict with these kept."""
        key = frozenset(kept)
        if key not in self.probes:
            probe = self.probes[key] = self.judge(kept)
            how = "file" if probe.exported else "probe"
            error = f"relative L2 {probe.found.relative_l2_max:.1e}"
            verdict = f"pass, {error}" if probe.passed else f"FAIL: {'; '.join(probe.failures)}"
            names = "everything" if set(self.units) <= set(kept) else " ".join(probe.kept) or "nothing"
            self.note(f"  {how}, in {self.kept_in}: {names}: {verdict}")
        return self.probes[key]

    @property
    def made(self) -> tuple[Probe, ...]:
        """The verdicts beyond the one over the file that was there."""
        known = None if self.recorded is None else self.recorded.probe
        return tuple(probe for probe in self.probes.values() if probe is not known)


def run_bisection(
    file: Path,
    note: Note,
    *,
    data: Path | None = None,
    samples: int = 4,
    gate: str | None = None,
    white_level: float | None = None,
) -> Bisection:
    """Bisect a recorded half-precision ONNX file on images of the folder `data`, or on seeded ones.

    `white_level` is as in `core.preprocessing`, in place of the recorded one.
    `gate` names one of `gates.GATES`, by default that of the file's precision. Raises InputError for another kind of
    artifact, and whatever `artifacts.open_artifact` and `model.recorded_model` raise.
    """
    artifact = file_to_search(file)
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}: a file is judged on images.")
    judged_by = GATES[gate] if gate else artifact.manifest.precision.gate
    words: dict[str, Any] = {"gate": judged_by, "data": data, "samples": samples, "white_level": white_level}
    return bisect_artifact(artifact, recorded_model(artifact), note, **words)


def file_to_search(file: Path) -> Artifact[OnnxManifest]:
    """Open a file whose parts can be kept in a wider type. Raises InputError for another kind of artifact."""
    artifact = open_artifact(file)
    if not is_onnx(artifact) or not artifact.manifest.precision.has_islands:
        raise InputError(
            f"{artifact.path.name} is no ONNX file of half precision; files of FP16, BF16, FP8 and INT8 are searched."
        )
    check_recorded(artifact)
    if artifact.manifest.request.form != FORM:
        raise InputError(f"{artifact.path.name} has an earlier deploy form. Export it again with --force.")
    return artifact


def bisect_artifact(
    artifact: Artifact[OnnxManifest],
    loaded: LoadedModel,
    note: Note,
    *,
    gate: Gate,
    data: Path | None = None,
    samples: int = 4,
    white_level: float | None = None,
) -> Bisection:
    """Bisect a file made from `loaded`; see `run_bisection`."""
    case = case_of(artifact, loaded, gate, data, samples, note, white_level=white_level)
    recorded = probe_recorded(artifact, case)
    result = Bisection(artifact, gate, sum(map(len, case.batches)), case.units, recorded, case.reference_nonfinite)
    if recorded.probe.passed:
        return result
    note(f"{artifact.path.name} fails on {result.images} images: {'; '.join(recorded.probe.failures)}")
    if recorded.probe.kept:
        note(f"  it keeps {' '.join(recorded.probe.kept)} in FP32; the search begins with nothing kept")
    probes = CachedProbes(form_judge(case), recorded, case.units, note)
    kept = find_kept(case.units, probes.passes, block_parts(loaded.model.variant))
    result = replace(result, probes=probes.made)
    del probes  # and with it two copies of the weights, which are not needed while files are written
    return result if kept is None else _confirmed(result, kept, case, note)


def form_judge(case: Case) -> Callable[[Collection[str]], Probe]:
    """Make a judge of sets that needs no export."""
    form = MixedForm(case.loaded.model, case.spec.deploy)
    return lambda kept: case.judge(kept, form.outputs(case.batches, kept), exported=False)


def report_lines(bisection: Bisection) -> Iterator[str]:
    """Yield the result for a terminal; `failure` says the rest where nothing helps."""
    recorded, name = bisection.recorded, bisection.artifact.path.name
    judged = f"gate {bisection.gate.name}, {bisection.images} images, by the emulator; on a GPU: not run"
    if recorded.probe.passed:
        error = f"relative L2 {recorded.probe.found.relative_l2_max:.1e}"
        yield f"{name} passes as it is ({error}; {judged}): nothing more has to stay in FP32."
        return
    yield f"{name} fails: {'; '.join(recorded.probe.failures)} ({judged})"
    if recorded.infinite_weights:
        precision = bisection.artifact.manifest.precision.name.upper()
        yield f"Weights that are infinite in {precision}: {' '.join(recorded.infinite_weights)}"
    if recorded.first_nonfinite is not None:
        yield f"First operator whose result is NaN or infinite: {recorded.first_nonfinite}"
    else:
        yield "Every operator's result is a number: what fails is accuracy."
    kept, final = bisection.kept, bisection.final
    if kept is None or final is None:
        return
    yield f"To keep in FP32, found with {sum(not probe.exported for probe in bisection.probes)} probes:"
    yield f"  {' '.join(kept)}"
    before = 1.0 - float(bisection.artifact.manifest.facts.half_share)
    shares = f"in FP32: {final.parameter_share:.2%} of the parameters, {final.result_share:.1%} of the operators' "
    shares += f"results, {before:.1%} before"
    yield f"With it: pass, relative L2 {final.probe.found.relative_l2_max:.1e} ({shares})"
    for part, fewer in zip(kept, bisection.neighbours, strict=True):
        yield f"Without {part} among them: {'FAIL: ' + '; '.join(fewer.failures) if fewer.failures else 'pass'}"
    if set(bisection.units) <= set(kept):
        yield "That is all of it: an FP32 file (--precision fp32) is the simpler way."
    yield "The same file from the command line, in place of the one that fails:"
    yield f"  {export_command(bisection.artifact, kept, final)}"


def failure(bisection: Bisection) -> CheckFailedError | None:
    """Return what is wrong where nothing helps; None otherwise."""
    if bisection.outcome != "nothing helps":
        return None
    name = bisection.artifact.path.name
    if bisection.reference_nonfinite:
        return CheckFailedError(
            f"PyTorch in FP32 gives {bisection.reference_nonfinite} values that are NaN or infinite for {name}'s "
            "network; numbers were expected, and no precision of the file mends that. Check the weights and the images."
        )
    everything = set(bisection.units)
    probe = next(probe for probe in bisection.probes if not probe.passed and everything <= set(probe.kept))
    return CheckFailedError(
        f"{name} fails with every module in FP32 too ({'; '.join(probe.failures)}): rounding is not its fault, or gate "
        f"{bisection.gate.name} asks for more than FP32 gives. cnx-deploy verify compares the FP32 file with PyTorch."
    )


def export_command(artifact: Artifact[OnnxManifest], kept: Sequence[str], final: ExportedProbe) -> str:
    """Return the `cnx-deploy export` that writes the file again with `kept` in FP32, from the weights of before."""
    words = [word for part in kept for word in ("--keep-fp32", part)]
    return command_like(artifact, [*words, "--force"] if final.verifies else [*words, "--force", "--no-verify"])


def command_like(artifact: Artifact[OnnxManifest], others: Sequence[str], precision: str | None = None) -> str:
    """Return the `cnx-deploy export` that writes the file again from the weights it was made of, with `others` behind.

    Options beyond the defaults are named, so that the same file is written in the same place; `--keep-fp32` is not.
    """
    manifest, deploy = artifact.manifest, artifact.manifest.deploy
    name = manifest.stem.removesuffix(f"-{size_text(deploy.image_size)}-{deploy.precision}")
    words = ["--variant", manifest.model.variant, *_weights_options(artifact)]
    words += ["--task", manifest.model.task] if manifest.model.task != "classification" else []
    for option, value in manifest.model.task_config.items():
        words += ["--task-option", f"{option}={json.dumps(value)}"]
    words += ["--image-size", size_text(manifest.model.image_size), "--precision", precision or deploy.precision]
    words += _image_options(manifest)
    words += ["--batch", ":".join(map(str, manifest.batch))] if manifest.batch != ExportSpec().batch else []
    words += ["--input", deploy.input_kind] if deploy.input_kind != "float" else []
    words += ["--optimize-for", str(deploy.layout)] if deploy.layout != "gpu" else []
    words += [word for fold in deploy.leave_out for word in ("--without-fold", fold)]
    words += [word for name, value in deploy.answer.items() for word in (f"--{name}", str(value))]
    words += [word for output in deploy.outputs for word in ("--output", output)]
    words += ["--name", name] if name != manifest.model.variant else []
    words += ["--output-dir", os.path.normpath(artifact.path.parent)]
    return shlex.join(["cnx-deploy", "export", *words, *others])


def _image_options(manifest: OnnxManifest) -> list[str]:
    """What the export was told of images and classes. The file of names is not recorded: the reader puts it there."""
    words = list[str]()
    for name, origin in manifest.model.origins.items():
        if origin == "option" and name != "image_size":
            value = "class-names.txt" if name == "class_names" else getattr(manifest.model.preprocessing, name)
            words += [
                f"--{name.replace('_', '-')}",
                ",".join(map(str, value if isinstance(value, tuple) else (value,))),
            ]
    return words


def _weights_options(artifact: Artifact) -> list[str]:
    model, weights = artifact.manifest.model, artifact.manifest.model.weights
    classes = ["--num-classes", str(model.num_classes)]
    if (channels := model.preprocessing.in_chans) != 3:
        classes += ["--in-chans", str(channels)]
    if weights.origin == "random":
        return ["--seed", weights.reference, *classes]
    new_head = [*classes, "--reset-head"] if model.head_is_new else classes[2:]
    if weights.origin == "pretrained":
        return ["--pretrained", weights.reference, *new_head]
    entry = [] if weights.entry is None else ["--entry", weights.entry]
    first, *soup = (os.path.normpath(artifact.path.parent / file.reference) for file in weights.files)
    return ["--checkpoint", first, *(word for path in soup for word in ("--soup", path)), *entry, *new_head]


def _confirmed(result: Bisection, kept: tuple[str, ...], case: Case, note: Note) -> Bisection:
    """Write files with the set and with all of it but one; return another result where they contradict it."""
    files: dict[frozenset[str], ExportedProbe] = {}

    def judge(names: Collection[str]) -> Probe:
        files[frozenset(names)] = export_and_probe(names, case)
        return files[frozenset(names)].probe

    exports = CachedProbes(judge, result.recorded, case.units, note)
    note("Writing files with the result, and with all of it but one")
    confirmed: tuple[str, ...] | None = kept
    if not exports.passes(kept) or any(exports.passes(fewer) for fewer in without_one(kept)):
        note("The files contradict the probes: searching again with a file a probe")
        confirmed = find_kept(case.units, exports.passes, block_parts(case.loaded.model.variant))
    neighbours = tuple(exports.probe(fewer) for fewer in without_one(confirmed or ()))
    final = None if confirmed is None else files[frozenset(confirmed)]
    probes = (*result.probes, *exports.made)
    return replace(result, probes=probes, kept=confirmed, final=final, neighbours=neighbours)


def without_one(kept: Sequence[str]) -> list[list[str]]:
    """Return the sets that lack one name."""
    return [[other for other in kept if other != name] for name in kept]
