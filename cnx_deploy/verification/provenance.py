"""The chain of what was recorded, weights to ONNX file to engine, checked by hashes: nothing is run.

Each artifact's files are held against its manifest, and each manifest's source against what is there under its name. A
checkpoint is read as safetensors, which is data and cannot run anything; one in another format is named and not read.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cnx_deploy.core.artifacts import check_file, find_artifacts, is_engine, read_artifact
from cnx_deploy.core.errors import CnxDeployError, CorruptArtifactError
from cnx_deploy.core.manifest import Artifact, EngineManifest, FileRecord
from cnx_deploy.core.system import find_gpus, tool_versions
from cnx_deploy.exporters.untrusted import check_recorded

__all__ = ["ChainFinding", "Custody", "check_custody", "corrupt_error"]

Verdict = Literal["ok", "fault", "note"]


@dataclass(frozen=True, slots=True)
class ChainFinding:
    """One thing that was looked at. "note" is what was not checked, or what will not run here; it fails nothing."""

    artifact: str
    verdict: Verdict
    text: str


@dataclass(frozen=True, slots=True)
class Custody:
    """All findings. `passed`: nothing recorded was changed, swapped, lost or made from something else."""

    findings: tuple[ChainFinding, ...]

    @property
    def passed(self) -> bool:
        """Whether no finding is a fault."""
        return all(finding.verdict != "fault" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"passed": self.passed, "findings": [asdict(finding) for finding in self.findings]}


def check_custody(files: Sequence[Path], export_dir: Path, engines_dir: Path) -> Custody:
    """Check the artifacts named, or everything recorded in both folders; see the module for what is checked.

    Raises what `artifacts.read_artifact` raises for a manifest that cannot be read.
    """
    onnx, engines = find_artifacts(export_dir, "onnx"), find_artifacts(engines_dir, "engine")
    chosen = [read_artifact(path) for path in files] or [*onnx, *engines]
    known = {artifact.path.name: artifact for artifact in (*onnx, *(a for a in chosen if a.manifest.kind == "onnx"))}
    findings = [finding for artifact in chosen for finding in _of_artifact(artifact, known, named=bool(files))]
    if not files:
        findings += [*_unrecorded(export_dir, onnx), *_unrecorded(engines_dir, engines)]
    return Custody(tuple(findings))


def _of_artifact(artifact: Artifact, known: dict[str, Artifact], *, named: bool) -> list[ChainFinding]:
    name, folder = artifact.path.name, artifact.path.parent
    if named or artifact.path.exists():
        found = [ChainFinding(name, *_of_file(folder / file.name, file)) for file in artifact.manifest.files]
    else:  # as in a fresh clone, where records are committed and files are not
        found = [ChainFinding(name, "note", f"{artifact.path} is not here: only its record is")]
    if artifact.manifest.kind == "onnx" and all(finding.verdict == "ok" for finding in found):
        found += _of_graph(artifact)
    verdict, text = _of_engine(artifact, known) if artifact.manifest.kind == "engine" else _of_weights(artifact)
    licence = artifact.manifest.model.weights.licence
    if not licence.strip():
        found.append(ChainFinding(name, "fault", "no licence is recorded for its weights"))
    found.append(ChainFinding(name, verdict, text))
    if is_engine(artifact):
        found += [ChainFinding(name, "note", text) for text in _misfits(artifact)]
    return found


def _of_file(path: Path, record: FileRecord) -> tuple[Verdict, str]:
    try:
        check_file(path, record)
    except CnxDeployError as error:
        return "fault", str(error)
    return "ok", f"{path}: {record.size_bytes:,} bytes, SHA-256 {record.sha256[:12]}…"


def _of_graph(artifact: Artifact) -> list[ChainFinding]:
    """A fault where a graph reads a file that its manifest does not list, or is beyond the limits."""
    try:
        check_recorded(artifact)
    except CnxDeployError as error:
        return [ChainFinding(artifact.path.name, "fault", str(error))]
    return []


def _of_weights(artifact: Artifact) -> tuple[Verdict, str]:
    """The weights of an ONNX file: its record's hash, held against the checkpoint where there is one."""
    weights = artifact.manifest.model.weights
    if weights.sha256 != artifact.manifest.source_sha256:
        return "fault", (
            f"its manifest names weights {weights.sha256[:12]}… and was made from "
            f"{artifact.manifest.source_sha256[:12]}…"
        )
    if weights.origin != "checkpoint":
        return "ok", f"weights {weights.sha256[:12]}…, {weights.origin} ({weights.reference}), {weights.licence}"
    path = artifact.path.parent / weights.reference
    if not os.path.isfile(path):  # noqa: PTH113 - Path's own raises for a name that no system takes
        return "note", f"its checkpoint {path} is not here"
    if path.suffix != ".safetensors":
        return "note", f"its checkpoint {path} is a pickle: not read here, where nothing runs"
    from cnx_deploy.model.checkpoint import load_checkpoint  # torch: only where there are weights to hash

    try:
        found = load_checkpoint(path, artifact.manifest.model.variant).weights
    except CnxDeployError as error:
        return "fault", str(error)
    if found.sha256 != weights.sha256:
        return "fault", f"{path} holds weights {found.sha256[:12]}…, its manifest says {weights.sha256[:12]}…"
    if found.licence != weights.licence:
        return "fault", f"{path} is under {found.licence!r}, its manifest says {weights.licence!r}"
    return "ok", f"weights {weights.sha256[:12]}… of {path}, {weights.licence}"


def _of_engine(engine: Artifact, known: dict[str, Artifact]) -> tuple[Verdict, str]:
    source = known.get(engine.manifest.source_name)
    if source is None:
        return "note", f"its ONNX file {engine.manifest.source_name} is not recorded here"
    if source.sha256 != engine.manifest.source_sha256:
        return "fault", (
            f"it was built from another {source.path.name}: SHA-256 {engine.manifest.source_sha256[:12]}…, the one "
            f"here has {source.sha256[:12]}…"
        )
    ours, theirs = engine.manifest.model.weights, source.manifest.model.weights
    if (ours.sha256, ours.licence) != (theirs.sha256, theirs.licence):
        return "fault", f"its manifest names other weights or another licence than {source.path.name}'s"
    return "ok", f"built from {source.path.name}, SHA-256 {source.sha256[:12]}…; {ours.licence}"


def _misfits(engine: Artifact[EngineManifest]) -> list[str]:
    """What keeps an engine from running on this machine."""
    request, facts = engine.manifest.request, engine.manifest.facts
    installed = tool_versions().get(request.runtime)
    reasons = []
    if installed is not None and installed != facts.runtime_version:
        reasons.append(
            f"built with {request.runtime} {facts.runtime_version}, {installed} is installed: it runs on its own "
            "release only"
        )
    target = engine.manifest.target
    gpus = find_gpus()
    if gpus and target not in ("current", gpus[0].target):
        reasons.append(f"built for {target}, this machine's GPU is {gpus[0].target}")
    return reasons


def _unrecorded(folder: Path, recorded: Sequence[Artifact]) -> list[ChainFinding]:
    """Files of artifacts' kinds that no manifest lists."""
    listed = {file.name for artifact in recorded for file in artifact.manifest.files}
    strangers = [path for path in sorted(folder.glob("*")) if path.suffix in (".onnx", ".engine", ".data")]
    return [
        ChainFinding(path.name, "fault", f"{path} is in no manifest: nothing says where it is from")
        for path in strangers
        if path.name not in listed
    ]


def corrupt_error(custody: Custody) -> CorruptArtifactError | None:
    """What a command ends with once the findings are shown; None where there is no fault."""
    faults = [finding for finding in custody.findings if finding.verdict == "fault"]
    if not faults:
        return None
    names = ", ".join(dict.fromkeys(finding.artifact for finding in faults))
    return CorruptArtifactError(
        f"{len(faults)} of {len(custody.findings)} findings are faults ({names}): expected what the manifests record. "
        "Make these again with --force, or fetch them again."
    )
