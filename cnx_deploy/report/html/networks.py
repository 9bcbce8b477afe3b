"""What is recorded in two folders: manifests, the networks they are of, and what was made from what.

A page over many records must not vanish because one of them is broken, and must not show half of it either: a manifest
that cannot be read is a row of its own.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy.core.artifacts import read_artifact
from cnx_deploy.core.errors import CnxDeployError, InputError
from cnx_deploy.core.gates import ParityResult
from cnx_deploy.core.image_size import sides
from cnx_deploy.core.manifest import Artifact, Compiled, EngineManifest, ModelRecord, OnnxManifest
from cnx_deploy.core.precision import PRECISIONS
from cnx_deploy.core.variants import find_variant

__all__ = ["Entry", "Limit", "Link", "Network", "Records", "read_records"]

MEASURES = (
    ("relative L2", "relative_l2_max", "relative_l2_max"),
    ("centred cosine", "centred_cosine_min", "centred_cosine_min"),
    ("top-1 agreement", "top1_agreement", "top1_agreement_min"),
    ("mean KL", "mean_kl", "mean_kl_max"),
)
"""What a gate limits: for people, as the differences and as the gate name it."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit of a gate. `share`: how much of what it allows was used, 1 at the limit, above it a failure."""

    name: str
    found: float
    limit: float
    share: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One artifact as the page shows it."""

    artifact: Artifact

    @property
    def manifest(self) -> OnnxManifest | EngineManifest:
        """What is recorded of it."""
        return self.artifact.manifest

    @property
    def tools(self) -> tuple[tuple[str, str], ...]:
        """The versions that made it."""
        return tuple(self.manifest.tools.items())

    @property
    def engine(self) -> EngineManifest | None:
        """The manifest of an engine, None for another kind."""
        return self.manifest if isinstance(self.manifest, EngineManifest) else None

    @property
    def run(self) -> str:
        """What an engine's manifest says of a run."""
        return self.engine.facts.run if self.engine else ""

    @property
    def compiled(self) -> Compiled | None:
        """What the compiler says of an engine at a fixed batch."""
        return self.engine.facts.compiled if self.engine else None

    @property
    def megabytes_by_stage(self) -> dict[str, float]:
        """Megabytes (1e6) an image by stage; a downsampling counts with the stage that it opens."""
        total: dict[str, float] = {}
        for part in self.compiled.totals("stage") if self.compiled else ():
            first, _, index = part.name.partition(".")
            name = {"downsample_layers.0": "stem", "norm": "head"}.get(part.name, part.name)
            if name not in ("stem", "head"):
                is_stage = first in ("stages", "downsample_layers") and index in ("0", "1", "2", "3")
                name = f"stage {int(index) + 1}" if is_stage else "other"
            total[name] = total.get(name, 0.0) + part.megabytes
        return total

    @property
    def parity(self) -> ParityResult | None:
        """What the export found against PyTorch."""
        return self.manifest.facts.worst_parity if isinstance(self.manifest, OnnxManifest) else None

    @property
    def limits(self) -> tuple[Limit, ...]:
        """How much of each limit of this version's gate was used; empty without a comparison.

        Of a limit from below the distance to 1 counts: a cosine of 0.9995 uses half of what 0.999 allows.
        """
        gate, limits = self.manifest.precision.gate, []
        differences = self.parity.differences if self.parity else None
        for name, key, limit_key in MEASURES if differences else ():
            if getattr(differences, key) is None:  # an output without decisions
                continue
            value, limit = float(getattr(differences, key)), float(getattr(gate, limit_key))
            used, allowed = (1.0 - value, 1.0 - limit) if limit_key.endswith("_min") else (value, limit)
            share = used / allowed if allowed > 0.0 else (math.inf if used > 0.0 else 0.0)
            limits.append(Limit(name, value, limit, share))
        return tuple(limits)

    @property
    def nearest(self) -> Limit | None:
        """The limit of which most was used."""
        return max(self.limits, key=lambda limit: limit.share, default=None)

    @property
    def passed(self) -> bool:
        """What the manifest says of its parity, held against the gate of this version."""
        return (
            self.parity is not None
            and self.parity.passed
            and not self.manifest.precision.gate.failures(self.parity.differences)
        )


@dataclass(frozen=True, slots=True)
class Link:
    """An artifact in its chain: what was made from it, and in words what is wrong with where it comes from."""

    entry: Entry
    made: tuple["Link", ...] = ()
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Network:
    """One network and everything recorded of it, ONNX files first, the precise ones first."""

    entries: tuple[Entry, ...]

    @property
    def model(self) -> ModelRecord:
        """What is recorded of the network itself, the same in every entry."""
        return self.entries[0].manifest.model

    @property
    def counts(self) -> tuple[int | None, int | None]:
        """Parameters and multiply-accumulates of an image; None for a size that this version does not know."""
        try:
            variant, classes = find_variant(self.model.variant), self.model.num_classes
            channels = self.model.preprocessing.in_chans
            return variant.parameters_with(classes, channels), variant.mac_count(
                self.model.image_size, classes, channels
            )
        except InputError:
            return None, None

    @property
    def is_random(self) -> bool:
        """Whether the weights were drawn and mean nothing."""
        return self.model.weights.origin == "random"

    @property
    def weights_words(self) -> str:
        """Where the weights are from: "random, seed 0"."""
        weights = self.model.weights
        label = {"random": "random, seed", "pretrained": "published,"}.get(weights.origin, weights.origin)
        return f"{label} {weights.reference}{f' (mean of {len(weights.soup)} files)' if weights.soup else ''}"

    def of_kind(self, kind: str) -> tuple[Entry, ...]:
        """Return the entries of one kind."""
        return tuple(entry for entry in self.entries if entry.manifest.kind == kind)

    @property
    def chain(self) -> Iterator[Link]:
        """What was made from the weights, with its engines below it; then engines whose ONNX file is not recorded."""
        files, engines = self.of_kind("onnx"), self.of_kind("engine")
        for entry in files:
            made = tuple(Link(engine) for engine in engines if engine.manifest.source_sha256 == entry.artifact.sha256)
            is_sound = entry.manifest.source_sha256 == self.model.weights.sha256
            yield Link(entry, made, "" if is_sound else "its source is not the weights it names")
        hashes = {entry.artifact.path.name: entry.artifact.sha256 for entry in files}
        for engine in engines:
            name, sha256 = engine.manifest.source_name, engine.manifest.source_sha256
            if sha256 not in hashes.values():
                now = hashes.get(name, "")[:12]
                what = f"was replaced since: the file of that name is {now}" if now else "is not recorded here"
                yield Link(engine, remark=f"its source {name} ({sha256[:12]}) {what}")


@dataclass(frozen=True, slots=True)
class Records:
    """Everything recorded in two folders, which are named as they were given.

    `corrupt` says of each manifest that cannot be read why.
    """

    folders: tuple[str, str]
    entries: tuple[Entry, ...]
    corrupt: Mapping[str, str]

    def of_kind(self, kind: str) -> tuple[Entry, ...]:
        """Return the entries of one kind: "onnx" or "engine"."""
        return tuple(entry for entry in self.entries if entry.manifest.kind == kind)

    @property
    def networks(self) -> tuple[Network, ...]:
        """The networks, the smallest first; those of unknown size last."""
        groups: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in self.entries:
            model = entry.manifest.model
            key = (model.variant, model.image_size, model.num_classes, model.weights.sha256)
            groups.setdefault(key, []).append(entry)

        def rank(entry: Entry) -> tuple[bool, int, str]:
            precision = list(PRECISIONS).index(entry.manifest.precision.name)
            return entry.engine is not None, precision, entry.manifest.stem

        def size(network: Network) -> tuple[float, str, tuple[int, int]]:
            macs = network.counts[1]
            return math.inf if macs is None else macs, network.model.variant, sides(network.model.image_size)

        return tuple(sorted((Network(tuple(sorted(group, key=rank))) for group in groups.values()), key=size))

    @property
    def tool_sets(self) -> Mapping[tuple[tuple[str, str], ...], int]:
        """The different sets of versions, in order of appearance, and how many artifacts each has made."""
        return Counter(entry.tools for entry in self.entries)


def read_records(export_dir: Path, engines_dir: Path) -> Records:
    """Read every manifest of both folders, no artifact; a folder that is not there has none."""
    entries: list[Entry] = []
    corrupt: dict[str, str] = {}
    for folder in dict.fromkeys((export_dir, engines_dir)):
        for path in sorted(folder.glob("*.json")):
            try:
                entries.append(Entry(read_artifact(path)))
            except (CnxDeployError, ValueError, OSError) as error:
                # One line, without the folder that the page names already.
                corrupt[f"{folder.name}/{path.name}"] = str(error).replace(f"{path} ", "").partition("\n")[0]
    return Records((str(export_dir), str(engines_dir)), tuple(entries), corrupt)
