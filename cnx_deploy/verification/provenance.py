"""Provenance, weights to ONNX file to engine, checked by hashes: nothing is run.

Each artifact's files are held against its manifest, and each manifest's source against what is there under its name. A
checkpoint is read as safetensors, which is data and cannot run anything; one in another format is named and not read.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cnx_deploy.core.artifacts import check_file, find_artifacts, is_engine, read_artifact
from cnx_deploy.core.errors import CnxDeployError, CorruptArtifactError
from cnx_deploy.core.manifest import Artifact, EngineManifest, SoupFile
from cnx_deploy.core.system import find_gpus, tool_versions
from cnx_deploy.exporters.untrusted import check_recorded, hash_onnx

__all__ = ["Finding", "ProvenanceReport", "check_provenance", "corrupt_error"]

Verdict = Literal["ok", "fault", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A "note" says what was not checked or will not run here; it fails nothing."""

    artifact: str
    verdict: Verdict
    text: str


@dataclass(frozen=True, slots=True)
class ProvenanceReport:
    """All findings. `passed`: nothing recorded was changed, swapped, lost or made from something else."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no finding is a fault."""
        return all(finding.verdict != "fault" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return {"passed": self.passed, "findings": [asdict(finding) for finding in self.findings]}


def check_provenance(files: Sequence[Path], export_dir: Path, engines_dir: Path) -> ProvenanceReport:
    """Check the artifacts named, or everything recorded in both folders.

    Raises what `artifacts.read_artifact` raises for a manifest that cannot be read.
    """
    onnx, engines = find_artifacts(export_dir, "onnx"), find_artifacts(engines_dir, "engine")
    chosen = [read_artifact(path) for path in files] or [*onnx, *engines]
    sources = {artifact.path.name: artifact for artifact in (*onnx, *(a for a in chosen if a.manifest.kind == "onnx"))}
    findings = []
    for artifact in chosen:
        pairs = [*_file_findings(artifact, is_named=bool(files)), *_source_findings(artifact, sources)]
        findings += [Finding(artifact.path.name, verdict, text) for verdict, text in pairs]
    for folder, recorded in () if files else ((export_dir, onnx), (engines_dir, engines)):
        listed = {file.name for artifact in recorded for file in artifact.manifest.files}
        for path in sorted(folder.glob("*")):
            if path.suffix in (".onnx", ".engine", ".data") and path.name not in listed:
                text = f"{path} is in no manifest: nothing says where it is from"
                findings.append(Finding(path.name, "fault", text))
    return ProvenanceReport(tuple(findings))


def corrupt_error(report: ProvenanceReport) -> CorruptArtifactError | None:
    """Return what a command ends with once the findings are shown, None where there is no fault."""
    if report.passed:
        return None
    faults = [finding.artifact for finding in report.findings if finding.verdict == "fault"]
    return CorruptArtifactError(
        f"{len(faults)} of {len(report.findings)} findings are faults ({', '.join(dict.fromkeys(faults))}): expected "
        "what the manifests record. Make these again with --force, or fetch them again."
    )


def _file_findings(artifact: Artifact, *, is_named: bool) -> Iterator[tuple[Verdict, str]]:
    """Compare files with the manifest's sizes and hashes, and an ONNX file's outside data with the files it lists."""
    if not is_named and not artifact.path.exists():  # as in a fresh clone, where records are committed and files not
        yield "note", f"{artifact.path} is not here: only its record is"
        return
    is_whole = True
    for record in artifact.manifest.files:
        path = artifact.path.parent / record.name
        try:
            check_file(path, record)
        except CnxDeployError as error:
            is_whole = False
            yield "fault", str(error)
        else:
            yield "ok", f"{path}: {record.size_bytes:,} bytes, SHA-256 {record.sha256[:12]}…"
    if is_whole and artifact.manifest.kind == "onnx":
        try:
            check_recorded(artifact)
        except CnxDeployError as error:
            yield "fault", str(error)


def _source_findings(artifact: Artifact, sources: dict[str, Artifact]) -> Iterator[tuple[Verdict, str]]:
    """Compare what a manifest says of its licence and source with what is there."""
    if not artifact.manifest.model.weights.licence.strip():
        yield "fault", "no licence is recorded for its weights"
    if is_engine(artifact):
        yield _engine_source(artifact, sources.get(artifact.manifest.source_name))
        yield from (("note", reason) for reason in _reasons_not_to_run(artifact))
    else:
        yield from _weights_source(artifact)


def _weights_source(artifact: Artifact) -> Iterator[tuple[Verdict, str]]:
    """Compare the weights' hash in the manifest with the checkpoint, or with each of a soup and with their mean."""
    weights, made_from = artifact.manifest.model.weights, artifact.manifest.source_sha256
    shown = f"weights {weights.sha256[:12]}…"
    if weights.sha256 != made_from:
        yield "fault", f"its manifest names {shown} and was made from {made_from[:12]}…"
        return
    if weights.origin == "onnx":
        yield _original_source(artifact)
        return
    if weights.origin != "checkpoint":
        yield "ok", f"{shown}, {weights.origin} ({weights.reference}), {weights.licence}"
        return
    findings = [_checkpoint_source(artifact, file) for file in weights.files]
    yield from findings
    if not weights.soup or any(verdict != "ok" for verdict, _ in findings):
        return
    from cnx_deploy.model.recorded import recorded_model

    try:
        licence = recorded_model(artifact).weights.licence  # it checks the hash of the mean
    except CnxDeployError as error:
        yield "fault", str(error)
        return
    if licence != weights.licence:
        yield "fault", f"its checkpoints are under {licence!r}, its manifest says {weights.licence!r}"
    else:
        yield "ok", f"{shown}, the mean of {len(weights.soup)} checkpoints, {licence}"


def _original_source(artifact: Artifact) -> tuple[Verdict, str]:
    """Compare the hash of the ONNX file that was rescued with the manifest."""
    weights, path = artifact.manifest.model.weights, artifact.path.parent / artifact.manifest.model.weights.reference
    if not os.path.isfile(path):  # noqa: PTH113 - Path's own raises for a name that no system takes
        return "note", f"the ONNX file {path} that it was made from is not here"
    from cnx_deploy.exporters.graph_checks import admit_onnx

    try:
        outside = admit_onnx(path, allows_half_reductions=True).facts.outside_files
        found = hash_onnx(path, [Path(name) for name in outside])
    except CnxDeployError as error:
        return "fault", str(error)
    if found != weights.sha256:
        return "fault", f"{path} has the hash {found[:12]}…, its manifest says {weights.sha256[:12]}…"
    return "ok", f"made from {path}, SHA-256 {found[:12]}…; {weights.licence}"


def _checkpoint_source(artifact: Artifact, file: SoupFile) -> tuple[Verdict, str]:
    """Compare the hash of one checkpoint, and its licence unless it is one of several, with the manifest."""
    weights, path = artifact.manifest.model.weights, artifact.path.parent / file.reference
    if not os.path.isfile(path):  # noqa: PTH113 - Path's own raises for a name that no system takes
        return "note", f"its checkpoint {path} is not here"
    if path.suffix != ".safetensors":
        return "note", f"its checkpoint {path} is a pickle: not read here, where nothing runs"
    from cnx_deploy.model.checkpoint import load_checkpoint  # torch: only where there are weights to hash

    try:
        model = artifact.manifest.model
        loaded = load_checkpoint(path, model.variant, task=model.task, entry=file.entry).weights
    except CnxDeployError as error:
        return "fault", str(error)
    if loaded.sha256 != file.sha256:
        return "fault", f"{path} holds weights {loaded.sha256[:12]}…, its manifest says {file.sha256[:12]}…"
    if not weights.soup and loaded.licence != weights.licence:
        return "fault", f"{path} is under {loaded.licence!r}, its manifest says {weights.licence!r}"
    return "ok", f"weights {file.sha256[:12]}… of {path}, {loaded.licence}"


def _engine_source(engine: Artifact, source: Artifact | None) -> tuple[Verdict, str]:
    """Compare an engine's manifest with that of the ONNX file it names."""
    if source is None:
        return "note", f"its ONNX file {engine.manifest.source_name} is not recorded here"
    name, made_from = source.path.name, engine.manifest.source_sha256
    if source.sha256 != made_from:
        here = source.sha256[:12]
        return "fault", f"it was built from another {name}: SHA-256 {made_from[:12]}…, the one here has {here}…"
    ours, theirs = engine.manifest.model.weights, source.manifest.model.weights
    if (ours.sha256, ours.licence) != (theirs.sha256, theirs.licence):
        return "fault", f"its manifest names other weights or another licence than {name}'s"
    return "ok", f"built from {name}, SHA-256 {made_from[:12]}…; {ours.licence}"


def _reasons_not_to_run(engine: Artifact[EngineManifest]) -> Iterator[str]:
    """What keeps an engine from running on this machine."""
    runtime, built_with = engine.manifest.request.runtime, engine.manifest.facts.runtime_version
    installed = tool_versions().get(runtime)
    if installed not in (None, built_with):
        yield f"built with {runtime} {built_with}, {installed} is installed: it runs on its own release only"
    target, gpus = engine.manifest.target, find_gpus()
    if gpus and target not in ("current", gpus[0].target):
        yield f"built for {target}, this machine's GPU is {gpus[0].target}"
