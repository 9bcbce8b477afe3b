"""The manifests of both folders as a page needs them: every value checked, one that cannot be read is a row of its own.

A page over many records must not vanish because one of them is broken, and must not show half of it either.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cnx_deploy.core.artifacts import WeightsRecord, read_artifact
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.report.html.fields import Fields

if TYPE_CHECKING:
    from cnx_deploy.verification.parity import Gate

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
    manifest = Fields.of(asdict(read_artifact(path).manifest), "")
    model, request, facts = (manifest.child(key) for key in ("model", "request", "facts"))
    files = manifest.children("files")
    weights = model.child("weights")
    precision = request.text("precision") if request.has("precision") else ""
    parity, compiled = facts.maybe_child("parity"), facts.maybe_child("compiled")
    return Entry(
        kind=manifest.text("kind"),
        stem=manifest.text("stem"),
        file=files[0].text("name"),
        file_count=len(files),
        size_bytes=sum(file.integer("size_bytes") for file in files),
        sha256=files[0].text("sha256"),
        created=manifest.text("created"),
        tools=manifest.text_items("tools"),
        source_name=manifest.text("source_name"),
        source_sha256=manifest.text("source_sha256"),
        variant=model.text("variant"),
        num_classes=model.integer("num_classes"),
        image_size=model.integer("image_size"),
        head_is_new=model.flag("head_is_new"),
        weights=WeightsRecord(
            weights.text("origin"),  # type: ignore[arg-type]  # shown, never acted on
            *(weights.text(key) for key in ("reference", "sha256", "licence")),
        ),
        precision=precision,
        keep_fp32=request.texts("keep_fp32") if request.has("keep_fp32") else (),
        target=_target(request, facts),
        runtime=_runtime(request, facts),
        run=facts.text("run") if facts.has("run") else "",
        parity=_parity(parity, precision) if parity else None,
        compiled=_compiled(compiled) if compiled else None,
    )


def _parity(parity: Fields, precision: str) -> Parity:
    from cnx_deploy.verification.parity import GATES  # loads torch: only where there is something to judge

    found, gate = parity.child("found"), GATES.get(precision)
    return Parity(
        candidate=parity.text("candidate"),
        reference=parity.text("reference"),
        samples=found.integer("samples"),
        relative_l2=found.number("relative_l2_max"),
        cosine=found.number("centred_cosine_min"),
        top1_agreement=found.number("top1_agreement"),
        mean_kl=found.number("mean_kl"),
        nonfinite=found.integer("nonfinite_count"),
        recorded_pass=parity.flag("passed"),
        limits=tuple(_limits(found, gate)) if gate else (),
    )


def _limits(found: Fields, gate: "Gate") -> Iterator[Limit]:
    """The four limits. Of a limit from below the distance to 1 counts: cosine 0.9995 uses half of what 0.999 allows."""
    for name, key, limit_key in MEASURES:
        value, limit = found.number(key), float(getattr(gate, limit_key))
        used, allowed = (1.0 - value, 1.0 - limit) if limit_key.endswith("_min") else (value, limit)
        share = used / allowed if allowed > 0.0 else (math.inf if used > 0.0 else 0.0)
        yield Limit(name, value, limit, math.inf if math.isnan(share) else share)


def _compiled(compiled: Fields) -> Compiled:
    parts = {key: tuple(map(_part, compiled.children(key))) for key in ("by_stage", "by_operation")}
    return Compiled(
        compiled.integer("batch"), compiled.integer("kernels"), compiled.number("megabytes_per_image"), **parts
    )


def _part(part: Fields) -> Part:
    return Part(part.text("name"), part.integer("kernels"), part.number("megabytes"), part.number("share"))


def _target(request: Fields, facts: Fields) -> str:
    """The compute capability an engine is for; of one built for this machine's GPU the manifest says which it was."""
    found = next((fields for fields, key in ((facts, "gpu"), (request, "target")) if fields.has(key)), None)
    return "" if found is None else found.text("gpu" if found is facts else "target")


def _runtime(request: Fields, facts: Fields) -> str:
    """`tensorrt-rtx 1.7.1.116`."""
    if not request.has("runtime"):
        return ""
    version = f" {facts.text('runtime_version')}" if facts.has("runtime_version") else ""
    return f"{request.text('runtime')}{version}"


def _reason(path: Path, error: Exception) -> str:
    """Why, in one line, without the folder that the page names already."""
    return str(error).replace(f"{path} ", "").partition("\n")[0]
