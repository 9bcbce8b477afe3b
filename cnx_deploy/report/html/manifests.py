"""The manifests of both folders as a page needs them: every value checked, one that cannot be read is a row of its own.

A page over many records must not vanish because one of them is broken, and must not show half of it either.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cnx_deploy.core import manifest as manifests
from cnx_deploy.core.artifacts import read_artifact
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.gates import Differences, Gate, ParityResult
from cnx_deploy.core.manifest import EngineManifest, OnnxManifest, WeightsRecord

__all__ = ["Compiled", "Corrupt", "Entry", "Limit", "Parity", "Part", "Records", "read_records"]

MEASURES = (
    ("relative L2", "relative_l2_max", "relative_l2_max"),
    ("centred cosine", "centred_cosine_min", "centred_cosine_min"),
    ("top-1 agreement", "top1_agreement", "top1_agreement_min"),
    ("mean KL", "mean_kl", "mean_kl_max"),
)
"""What a gate limits: for people, as `parity.Differences` and as `parity.Gate` name it."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit of a gate. `share`: how much of what it allows was used, 1 at the limit, above it a failure."""

    name: str
    found: float
    limit: float
    share: float


@dataclass(frozen=True, slots=True)
class Parity:
    """What an export found against PyTorch. `limits` are empty where no gate is known for the precision."""

    candidate: str
    reference: str
    samples: int
    relative_l2: float
    cosine: float
    top1_agreement: float
    mean_kl: float
    nonfinite: int
    recorded_pass: bool
    limits: tuple[Limit, ...]

    @property
    def nearest(self) -> Limit | None:
        """The limit of which most was used."""
        return max(self.limits, key=lambda limit: limit.share, default=None)

    @property
    def passed(self) -> bool:
        """What the manifest says, held against the gate of this version."""
        nearest = self.nearest
        return self.recorded_pass and not self.nonfinite and (nearest is None or nearest.share <= 1.0)


@dataclass(frozen=True, slots=True)
class Part:
    """Kernels of one stage or operation, and their megabytes (1e6) an image; `share` of the engine's bytes, 0 to 1."""

    name: str
    kernels: int
    megabytes: float
    share: float


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler says of an engine at a fixed batch."""

    batch: int
    kernels: int
    megabytes: float
    by_stage: tuple[Part, ...]
    by_operation: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One artifact as its manifest has it. Texts are "" and numbers None where its kind has no such value."""

    kind: str
    stem: str
    file: str
    file_count: int
    size_bytes: int
    sha256: str
    created: str
    tools: tuple[tuple[str, str], ...]
    source_name: str
    source_sha256: str
    variant: str
    num_classes: int
    image_size: int
    head_is_new: bool
    weights: WeightsRecord
    precision: str
    keep_fp32: tuple[str, ...]
    target: str
    runtime: str
    run: str
    parity: Parity | None
    compiled: Compiled | None


@dataclass(frozen=True, slots=True)
class Corrupt:
    """A manifest that cannot be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Records:
    """Everything recorded in two folders, ONNX files first, each by name. `folders` as they were given."""

    folders: tuple[str, str]
    entries: tuple[Entry, ...]
    corrupt: tuple[Corrupt, ...]

    def of_kind(self, kind: str) -> tuple[Entry, ...]:
        """The entries of one kind: "onnx", "engine" or "checkpoint"."""
        return tuple(entry for entry in self.entries if entry.kind == kind)


def read_records(export_dir: Path, engines_dir: Path) -> Records:
    """Read every manifest of both folders, no artifact; a folder that is not there has none."""
    entries: list[Entry] = []
    corrupt: list[Corrupt] = []
    for folder in dict.fromkeys((export_dir, engines_dir)):
        for path in sorted(folder.glob("*.json")):
            try:
                entries.append(_entry(path))
            except (CorruptArtifactError, InputError, ValueError, OSError) as error:
                corrupt.append(Corrupt(f"{folder.name}/{path.name}", _reason(path, error)))
    return Records((str(export_dir), str(engines_dir)), tuple(entries), tuple(corrupt))


def _entry(path: Path) -> Entry:
    artifact = read_artifact(path)
    manifest, model = artifact.manifest, artifact.manifest.model
    engine = manifest if isinstance(manifest, EngineManifest) else None
    parity = manifest.facts.parity if isinstance(manifest, OnnxManifest) else None
    compiled = engine.facts.compiled if engine else None
    return Entry(
        kind=manifest.kind,
        stem=manifest.stem,
        file=manifest.files[0].name,
        file_count=len(manifest.files),
        size_bytes=artifact.size_bytes,
        sha256=artifact.sha256,
        created=manifest.created,
        tools=tuple(manifest.tools.items()),
        source_name=manifest.source_name,
        source_sha256=manifest.source_sha256,
        variant=model.variant,
        num_classes=model.num_classes,
        image_size=model.image_size,
        head_is_new=model.head_is_new,
        weights=model.weights,
        precision=manifest.precision.name,
        keep_fp32=manifest.deploy.keep_fp32,
        target=engine.target if engine else "",
        runtime=f"{engine.request.runtime} {engine.facts.runtime_version}" if engine else "",
        run=engine.facts.run if engine else "",
        parity=_parity(parity) if parity else None,
        compiled=_compiled(compiled) if compiled else None,
    )


def _parity(parity: ParityResult) -> Parity:
    found = parity.differences
    return Parity(
        candidate=parity.candidate,
        reference=parity.reference,
        samples=found.samples,
        relative_l2=found.relative_l2_max,
        cosine=found.centred_cosine_min,
        top1_agreement=found.top1_agreement,
        mean_kl=found.mean_kl,
        nonfinite=found.nonfinite_count,
        recorded_pass=parity.passed,
        limits=tuple(_limits(found, parity.gate)),
    )


def _limits(found: Differences, gate: Gate) -> Iterator[Limit]:
    """The four limits. Of a limit from below the distance to 1 counts: cosine 0.9995 uses half of what 0.999 allows."""
    for name, key, limit_key in MEASURES:
        value, limit = float(getattr(found, key)), float(getattr(gate, limit_key))
        used, allowed = (1.0 - value, 1.0 - limit) if limit_key.endswith("_min") else (value, limit)
        share = used / allowed if allowed > 0.0 else (math.inf if used > 0.0 else 0.0)
        yield Limit(name, value, limit, math.inf if math.isnan(share) else share)


def _compiled(compiled: manifests.Compiled) -> Compiled:
    groupings: tuple[Literal["stage"], Literal["operation"]] = ("stage", "operation")
    by_stage, by_operation = (
        tuple(Part(total.name, total.kernels, total.megabytes, total.share) for total in compiled.totals(grouping))
        for grouping in groupings
    )
    return Compiled(compiled.batch, compiled.kernels, compiled.megabytes_per_image, by_stage, by_operation)


def _reason(path: Path, error: Exception) -> str:
    """Why, in one line, without the folder that the page names already."""
    return str(error).replace(f"{path} ", "").partition("\n")[0]
