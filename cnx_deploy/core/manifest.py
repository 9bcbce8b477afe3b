"""What a manifest holds: what an artifact is, from what it was made, under which licence.

The fields are described, with the policy for versions, in docs/manifest.md. `manifest_reading` reads them.
"""

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from cnx_deploy.core.system import tool_versions

__all__ = [
    "SCHEMA_VERSION",
    "SUFFIXES",
    "Artifact",
    "ArtifactKind",
    "Batches",
    "Count",
    "FileRecord",
    "Manifest",
    "ModelRecord",
    "Positive",
    "Sha256",
    "Timestamp",
    "Triple",
    "WeightsRecord",
    "relative_reference",
]

SCHEMA_VERSION = 1

ArtifactKind = Literal["checkpoint", "onnx", "engine"]
SUFFIXES: dict[str, str] = {"checkpoint": ".safetensors", "onnx": ".onnx", "engine": ".engine"}

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
# Python's $ stands before a closing newline too; (?!\n) says so to both Python and JSON Schema.
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$(?!\\n)")]
PlainName = Annotated[str, msgspec.Meta(pattern=r"^(?!\.\.?$)[^/\\\x00-\x1f\x7f]+$(?!\n)", max_length=255)]
Timestamp = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)$(?!\n)")]
Triple = tuple[float, float, float]
BatchSize = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Batches = tuple[BatchSize, BatchSize, BatchSize]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of an artifact, by name within the artifact's folder."""

    name: PlainName
    size_bytes: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class WeightsRecord:
    """Where weights come from and what may be done with them.

    `reference` is the seed ("0"), the checkpoint's path relative to the manifest's folder, or the timm tag.
    `sha256` is over the tensors (`model.checkpoint.hash_weights`), so it survives a change of file format.
    """

    origin: Literal["random", "checkpoint", "pretrained"]
    reference: str
    sha256: Sha256
    licence: str


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """The network inside an artifact. `preprocessing` is `data.Preprocessing` as a dictionary.

    `head_is_new`: the head was drawn at random when the weights were loaded, because the classes differed.
    """

    variant: str
    num_classes: Positive
    image_size: Positive
    weights: WeightsRecord
    preprocessing: Mapping[str, Any]
    class_names: tuple[str, ...] | None = None
    head_is_new: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is, from what it was made and what was found when it was made.

    `files`: the main file first. `request`: what was asked for; the same request on the same source with the same
    tools makes the same artifact. `source_sha256`: the weights of an ONNX file, the ONNX file of an engine.
    `facts`: what the stage found (types, sizes, compiled kernels). `created`: UTC, seconds.
    """

    kind: ArtifactKind
    stem: PlainName
    files: tuple[FileRecord, ...]
    model: ModelRecord
    request: Mapping[str, Any]
    source_name: str
    source_sha256: Sha256
    facts: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=tool_versions)
    created: Timestamp = field(default_factory=lambda: _now())
    schema_version: int = SCHEMA_VERSION

    def model_seen_from(self, folder: Path, own_folder: Path) -> ModelRecord:
        """The model record for a manifest in `folder`: a checkpoint's path is relative to the manifest's folder."""
        weights = self.model.weights
        if weights.origin != "checkpoint":
            return self.model
        moved = relative_reference(own_folder / weights.reference, folder)
        return replace(self.model, weights=replace(weights, reference=moved))

    def to_json(self) -> str:
        """Serialise with sorted keys and a closing newline."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A main file and its manifest; `reused` when a stage found it made already."""

    path: Path
    manifest: Manifest
    reused: bool = field(default=False, compare=False)

    @property
    def sha256(self) -> str:
        """Hash of the main file."""
        return self.manifest.files[0].sha256

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of its files within its folder, the main one first."""
        return tuple(record.name for record in self.manifest.files)


def relative_reference(path: Path, folder: Path) -> str:
    """`path` as a manifest in `folder` names it: relative, so that a moved project keeps its links."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
