"""What a manifest holds: what an artifact is, from what it was made, under which licence; written and read as types.

A manifest is data from outside, so what does not fit is a ValueError that names the field. docs/manifest.schema.json is
generated from these types; docs/manifest.md describes them and the policy for versions.
"""

import datetime
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self

import msgspec
from typing_extensions import TypeVar

from cnx_deploy.core.deploy_spec import ANSWER_DEFAULTS, DeploySpec
from cnx_deploy.core.eight_bits import EightBitFacts
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import Gate, ParityResult
from cnx_deploy.core.hidden_tensor import FusedMode, Hidden
from cnx_deploy.core.image_size import ImageSize, canonical_size
from cnx_deploy.core.precision import Precision, find_precision
from cnx_deploy.core.preprocessing import Positive, Preprocessing
from cnx_deploy.core.strict_json import strict_json, typed
from cnx_deploy.core.system import tool_versions

__all__ = [
    "FOREIGN",
    "MAX_MANIFEST_BYTES",
    "SCHEMA_VERSION",
    "SUFFIXES",
    "Artifact",
    "ArtifactKind",
    "Batches",
    "Compiled",
    "Count",
    "EngineFacts",
    "EngineManifest",
    "EngineRequest",
    "FileRecord",
    "ForeignGraph",
    "Grouping",
    "Kernel",
    "KernelTotal",
    "Launcher",
    "Manifest",
    "ModelRecord",
    "OnnxFacts",
    "OnnxManifest",
    "OnnxRequest",
    "OwnKernel",
    "OwnKernels",
    "Positive",
    "Sha256",
    "SoupFile",
    "TensorSpec",
    "Timestamp",
    "TrainingOptions",
    "TypeCensus",
    "WeightsRecord",
    "json_schema",
    "manifest_from_json",
    "relative_reference",
]  # fmt: skip

SCHEMA_VERSION: Literal[2] = 2
MAX_MANIFEST_BYTES = 16 << 20
"""The largest that was written, of the huge variant's engine with every kernel, has 95 kB."""

ArtifactKind = Literal["onnx", "engine"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "engine": ".engine"}

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
# Python's $ stands before a closing newline too; (?!\n) says so to both Python and JSON Schema.
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$(?!\\n)")]
PlainName = Annotated[str, msgspec.Meta(pattern=r"^(?!\.\.?$)[^/\\\x00-\x1f\x7f]+$(?!\n)", max_length=255)]
Timestamp = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)$(?!\n)")]
Capability = Annotated[str, msgspec.Meta(pattern="^sm[0-9]{2,3}$(?!\\n)")]
Target = Annotated[str, msgspec.Meta(pattern="^(current|sm[0-9]{2,3})$(?!\\n)")]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Probability = Annotated[float, msgspec.Meta(gt=0, lt=1)]
BatchSize = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Batches = tuple[BatchSize, BatchSize, BatchSize]
FOREIGN = "foreign"
"""The variant of a network that came as an ONNX file."""
TrainingOptions = dict[str, str | float | dict[str, float]]
"""Options of `training.spec.TrainingSpec` by name; weights of classes by the name of the class."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of an artifact, by name within the artifact's folder."""

    name: PlainName
    size_bytes: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class SoupFile:
    """A checkpoint of one or more: its path, the hash over its tensors, and `entry` as in `WeightsRecord`."""

    reference: str
    sha256: Sha256
    entry: str | None = None


@dataclass(frozen=True, slots=True)
class WeightsRecord:
    """Where weights come from and what may be done with them.

    `reference` is the seed ("0"), the timm tag, or the path relative to the manifest's folder: of the checkpoint, or of
    the ONNX file that `rescue` was given.
    `sha256` is over the tensors (`model.checkpoint.hash_weights`), so it survives a change of file format; of an ONNX
    file it is the file's (`exporters.untrusted.hash_onnx`).
    `entry`: which network of a checkpoint it was, where one was chosen of several; written only there.
    `soup`: every checkpoint whose mean the weights are, `reference` first; written only where there are several.
    """

    origin: Literal["random", "checkpoint", "pretrained", "onnx"]
    reference: str
    sha256: Sha256
    licence: str
    entry: str | None = None
    soup: tuple[SoupFile, ...] = ()

    def __post_init__(self) -> None:
        if self.soup and (self.origin != "checkpoint" or self.soup[0].reference != self.reference):
            raise ValueError("a soup is of checkpoints, and its first is the reference")
        if self.origin == "random" and not re.fullmatch(r"-?[0-9]{1,20}", self.reference):
            raise ValueError(f"reference is no seed: {self.reference[:40]!r}")

    @property
    def files(self) -> tuple[SoupFile, ...]:
        """The checkpoints that the weights were read from: one or those of a soup; none of other origins."""
        if self.origin != "checkpoint":
            return ()
        return self.soup or (SoupFile(self.reference, self.sha256, self.entry),)

    @property
    def source(self) -> str:
        """Where they come from on one line: "random:0", "checkpoint:best.safetensors (mean of 3 files)"."""
        return f"{self.origin}:{self.reference}{f' (mean of {len(self.soup)} files)' if self.soup else ''}"

    def with_paths(self, moved: Callable[[str], str]) -> Self:
        """The same with the path of each checkpoint as `moved` gives it."""
        if self.origin not in ("checkpoint", "onnx"):
            return self
        soup = tuple(replace(file, reference=moved(file.reference)) for file in self.soup)
        return replace(self, reference=moved(self.reference), soup=soup)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a graph: element type as ONNX names it, and its shape with open sizes by name.

    `unit`: what a value of an output is, as `core.gates.OutputSpec` has it, of a task with an answer at each place.
    """

    type: str
    shape: tuple[int | str, ...]
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class ForeignGraph:
    """What a rescued file takes and gives: the name of its input, and its outputs by name, in their order.

    `original_outputs` are the names in the original, `outputs` those in the rescued file. `precision` is that of the
    original, "fp32" or "fp16".
    """

    input: str
    outputs: Mapping[str, TensorSpec]
    original_outputs: tuple[str, ...]
    precision: Literal["fp32", "fp16"]


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """The network inside an artifact.

    `head_is_new`: the head was drawn at random when the weights were loaded, because the classes differed.
    `task`: what the network is for, a word of `model.tasks`. `num_classes` 0: it has none. `origins`: where class
    names and fields of the preprocessing of trained weights were read, by name: a file, an entry of the checkpoint,
    "option" or "assumed".
    `training`: class weights, sampling and loss that the weights were trained with, where they are not the usual ones.
    `thresholds`: the probability from which each label is given, of a task with several labels an image; None is one
    half for all.
    `task_config`: the options of the task that are not the usual ones, by name.
    `graph`: of a network that came as an ONNX file, whose `variant` is FOREIGN; None of others.
    """

    variant: str
    num_classes: Count
    image_size: ImageSize
    weights: WeightsRecord
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    head_is_new: bool = False
    task: PlainName = "classification"
    origins: dict[str, str] = field(default_factory=dict)
    training: TrainingOptions = field(default_factory=dict)
    thresholds: tuple[Probability, ...] | None = None
    task_config: dict[str, Any] = field(default_factory=dict)
    graph: ForeignGraph | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", canonical_size(self.image_size))
        if (self.graph is None) == (self.weights.origin == "onnx"):
            raise ValueError("a graph is recorded of an ONNX file alone, and of each")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        if self.thresholds is not None and len(self.thresholds) != self.num_classes:
            raise ValueError(f"{len(self.thresholds)} thresholds for {self.num_classes} classes")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRequest:
    """What an ONNX file was asked for. `form` is the version of the deploy form, `model.deploy.FORM`."""

    deploy: DeploySpec
    batch: Batches
    opset: Positive
    form: Positive

    def __post_init__(self) -> None:
        _check_rises(self.batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What an engine was asked for: the ONNX file's request and what `trt.builder.BuildSpec` adds.

    `fused`: blocks are computed by own kernels, None where by the compiler's. `launcher_sha256`: of the library that
    launches them, where one travels in the engine. Both are written only where they are set.
    """

    onnx: OnnxRequest
    runtime: Literal["tensorrt", "tensorrt-rtx"]
    target: Target
    batches: Annotated[tuple[Batches, ...], msgspec.Meta(min_length=1)]
    allow_tf32: bool
    fused: FusedMode | None = None
    launcher_sha256: Sha256 | None = None

    def __post_init__(self) -> None:
        if self.launcher_sha256 is not None and self.fused is None:
            raise ValueError("a launcher is recorded of an engine with own kernels alone")
        for sizes in self.batches:
            _check_rises(sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFacts:
    """What an export found of the file it wrote. `half_share`: share of tensors in half precision.

    `parity` has a verdict for each output; it is empty for a file that was not compared with PyTorch. `eight_bits`:
    what a file in FP8 or INT8 was found to be worth.
    """

    operators: Mapping[str, Count]
    types: Mapping[str, Count]
    half_share: Share
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    parity: tuple[ParityResult, ...] = ()
    eight_bits: EightBitFacts | None = None

    @property
    def worst_parity(self) -> ParityResult | None:
        """The verdict of the output that differs most; None where the file was not compared with PyTorch."""
        return max(
            self.parity, key=lambda result: (not result.passed, result.differences.relative_l2_max), default=None
        )


Grouping = Literal["stage", "block", "operation", "kind"]


class Kernel(msgspec.Struct, frozen=True, array_like=True):
    """One kernel launch, in a manifest a row of these fields; bytes are for the whole batch.

    `tensors`: "input 64x40 Half, constant 40 Float, output 64x40 Half".
    """

    name: str
    kind: str
    block: str
    operation: str
    input_bytes: Count
    constant_bytes: Count
    output_bytes: Count
    tensors: str

    @property
    def total_bytes(self) -> int:
        """All it reads and writes."""
        return self.input_bytes + self.constant_bytes + self.output_bytes

    @property
    def stage(self) -> str:
        """The block without its number in the stage: "stages.2" of "stages.2.3"; other parts are their own stage."""
        return ".".join(self.block.split(".")[:2])


@dataclass(frozen=True, slots=True)
class KernelTotal:
    """The kernels of one group: how many, their megabytes (1e6) an image, and the share of all bytes (0 to 1)."""

    name: str
    kernels: int
    megabytes: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What the compiler makes of a graph for a fixed batch: each kernel's inputs, constants and outputs counted once.

    An upper bound on traffic where tensors stay in the L2 cache, and the figure to compare two graphs of one network
    by. It is no latency. `plan_bytes`: size of that build's engine file, None where it was not recorded.
    """

    batch: BatchSize
    target: Target
    kernels: Count
    megabytes_per_image: float
    plan_bytes: Count | None
    kernel_list: Annotated[tuple[Kernel, ...], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        if self.kernels != len(self.kernel_list):
            raise ValueError(f"kernels is {self.kernels} beside a list of {len(self.kernel_list)}")
        if not self.total_bytes:
            raise ValueError("kernel_list has kernels that move no byte between them")
        if abs(self.megabytes_per_image - self.total_bytes / self.batch / 1e6) > 1e-3:
            raise ValueError(f"megabytes_per_image is {self.megabytes_per_image}, which is not what the kernels move")

    @classmethod
    def of(cls, kernels: tuple[Kernel, ...], *, batch: int, target: str, plan_bytes: int) -> Self:
        """The record of a list of kernels."""
        moved = sum(kernel.total_bytes for kernel in kernels) / batch / 1e6
        return cls(
            batch=batch,
            target=target,
            kernels=len(kernels),
            megabytes_per_image=round(moved, 3),
            plan_bytes=plan_bytes,
            kernel_list=kernels,
        )

    @property
    def total_bytes(self) -> int:
        """What all kernels move for the whole batch."""
        return sum(kernel.total_bytes for kernel in self.kernel_list)

    @property
    def largest_kernels(self) -> tuple[Kernel, ...]:
        """The kernels by the bytes they move, the most first."""
        return tuple(sorted(self.kernel_list, key=lambda kernel: kernel.total_bytes, reverse=True))

    def totals(self, grouping: Grouping) -> tuple[KernelTotal, ...]:
        """Kernels and bytes of each stage, block, operation or kind; the shares sum to 1.

        Stages and blocks are in the order they run in, operations and kinds by their bytes, the most first.
        """
        groups: dict[str, list[Kernel]] = {}
        for kernel in self.kernel_list:
            groups.setdefault(getattr(kernel, grouping), []).append(kernel)
        totals = []
        for name, kernels in groups.items():
            moved = sum(kernel.total_bytes for kernel in kernels)
            totals.append(KernelTotal(name, len(kernels), moved / self.batch / 1e6, moved / self.total_bytes))
        if grouping in ("operation", "kind"):
            totals.sort(key=lambda total: total.share, reverse=True)
        return tuple(totals)


@dataclass(frozen=True, slots=True)
class TypeCensus:
    """Layers of a parsed network by output type, and those in FP32 by their kind."""

    types: Mapping[str, Count]
    float_layers: Mapping[str, Count]


Launcher = Literal["python", "engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnKernel:
    """A compiled kernel of `cnx_deploy.kernels` that an engine carries.

    `channels`: C of the blocks that it is for. `tile`: positions, output channels and channels reduced at a time.
    `sha256` is over the image that the driver loads.
    """

    kernel: str
    channels: Positive
    target: Capability
    tile: tuple[Count, Count, Count]
    warps: Positive
    stages: Positive
    sha256: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnKernels:
    """The own kernels of an engine, and for each stage where its blocks keep the hidden tensor.

    `compiler`: what made them, with its version. `launcher`: who gives them to the driver, this package in Python or a
    library that travels in the engine. `needs` says it in words: what has to be there beside the runtime.
    """

    hidden: tuple[Hidden, ...]
    kernels: Annotated[tuple[OwnKernel, ...], msgspec.Meta(min_length=1)]
    compiler: str
    launcher: Launcher
    needs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a build found. `gpu`: what "current" was; `run`: whether the engine was run where it was built.

    `compiled` None: this runtime's log lists no kernels, or they were not asked for. `own_kernels`: of an engine built
    with some; written only there.
    """

    runtime_version: str
    build_seconds: float
    half_share_of_products: Share
    census: TypeCensus
    depthwise_fp32_fallback: bool = False
    depthwise_in_groups_of: Positive = 1
    range_warnings: tuple[str, ...] = ()
    kernels_by_profile: Mapping[str, Count] = field(default_factory=dict)
    run: str = "not run"
    gpu: Capability | None = None
    compiled: Compiled | None = None
    own_kernels: OwnKernels | None = None


OPTIONAL_LIMITS: Mapping[str, Any] = {"flip_share_max": None, "relative_l2_median_max": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What every artifact's manifest says.

    `files`: the main file first. `source_sha256`: the weights of an ONNX file, the ONNX file of an engine. The same
    request on the same source with the same tools makes the same artifact. `created`: UTC, seconds.
    """

    stem: PlainName
    files: tuple[FileRecord, ...]
    model: ModelRecord
    source_name: str
    source_sha256: Sha256
    tools: Mapping[str, str] = field(default_factory=tool_versions)
    created: Timestamp = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )
    schema_version: Literal[2] = 2

    def model_seen_from(self, folder: Path, own_folder: Path) -> ModelRecord:
        """The model record for a manifest in `folder`: a checkpoint's path is relative to the manifest's folder."""
        weights = self.model.weights.with_paths(lambda path: relative_reference(own_folder / path, folder))
        return replace(self.model, weights=weights)

    def to_json(self) -> str:
        """Serialise with sorted keys and a closing newline."""
        plain = msgspec.to_builtins(self)
        plain["model"]["preprocessing"] = self.model.preprocessing.to_dict()
        # Fields that were added since version 2 are written where they are not the default: earlier bytes stay.
        weights, deploy = plain["model"]["weights"], plain["request"].get("onnx", plain["request"])["deploy"]
        parity = plain["facts"].get("parity", ())
        later: list[tuple[dict[str, Any], Mapping[str, Any]]] = [
            (plain["model"], {"origins": {}, "training": {}, "thresholds": None, "task_config": {}, "graph": None}),
            *((record, {"entry": None, "soup": ()}) for record in (weights, *weights["soup"])),
            *((tensor, {"unit": None}) for tensors in _tensors_of(plain) for tensor in tensors.values()),
            *((result["differences"], {"detections": None, "places": None}) for result in parity),
            *((result["gate"], OPTIONAL_LIMITS) for result in parity),
            (deploy, {"size_range": None, "outputs": (), "eight_bits": None, **ANSWER_DEFAULTS}),
            (plain["facts"], {"eight_bits": None}),
            ((plain["facts"].get("eight_bits") or {}).get("held_out", {}), {"metrics": {}}),
            (plain["request"], {"fused": None, "launcher_sha256": None}),
            (plain["facts"], {"own_kernels": None}),
        ]
        for record, defaults in later:
            for name in [name for name, default in defaults.items() if name in record and record[name] == default]:
                del record[name]
        return json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    def _check_files(self, suffix: str) -> None:
        names = [file.name for file in self.files]
        expected = f"{self.stem}{suffix}"
        if not names or names[0] != expected:
            raise ValueError(f"its first file is {names[0] if names else 'missing'!r}, expected {expected!r}")
        if len(set(names)) != len(names) or f"{self.stem}.json" in names:
            raise ValueError("a file is listed twice, or the manifest itself is")


def _tensors_of(plain: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The records of inputs and outputs by name, in a manifest of plain types."""
    facts, graph = plain["facts"], plain["model"]["graph"] or {}
    return facts.get("inputs", {}), facts.get("outputs", {}), graph.get("outputs", {})


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxManifest(Manifest):
    """The manifest of an ONNX file."""

    request: OnnxRequest
    facts: OnnxFacts
    kind: Literal["onnx"] = "onnx"

    def __post_init__(self) -> None:
        self._check_files(SUFFIXES[self.kind])

    @property
    def onnx(self) -> OnnxRequest:
        """The request of the ONNX file: this one's."""
        return self.request

    @property
    def deploy(self) -> DeploySpec:
        """The deploy form in the file."""
        return self.request.deploy

    @property
    def precision(self) -> Precision:
        """What the precision of the file means to every stage."""
        return find_precision(self.request.deploy.precision)

    @property
    def gate(self) -> Gate:
        """What results of the file are judged by."""
        return self.precision.gate

    @property
    def batch(self) -> tuple[int, int, int]:
        """The batches the file takes: smallest, typical, largest."""
        return self.request.batch


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineManifest(Manifest):
    """The manifest of a TensorRT engine."""

    request: EngineRequest
    facts: EngineFacts
    kind: Literal["engine"] = "engine"

    def __post_init__(self) -> None:
        self._check_files(SUFFIXES[self.kind])

    @property
    def onnx(self) -> OnnxRequest:
        """The request of the ONNX file that the engine was built from."""
        return self.request.onnx

    @property
    def deploy(self) -> DeploySpec:
        """The deploy form in the engine."""
        return self.request.onnx.deploy

    @property
    def precision(self) -> Precision:
        """What the precision of the engine means to every stage."""
        return find_precision(self.request.onnx.deploy.precision)

    @property
    def gate(self) -> Gate:
        """What results of the engine are judged by: the gate of its precision, for FP32 one with TF32 on or off."""
        return self.precision.gate_of_engine(allow_tf32=self.request.allow_tf32)

    @property
    def batch(self) -> tuple[int, int, int]:
        """The batches of the ONNX file that it was built from: smallest, typical, largest."""
        return self.request.onnx.batch

    @property
    def target(self) -> str:
        """The GPU it is for, by compute capability: what "current" was where it was built."""
        return self.facts.gpu or self.request.target


MANIFESTS: dict[str, type[OnnxManifest | EngineManifest]] = {"onnx": OnnxManifest, "engine": EngineManifest}

M_co = TypeVar("M_co", bound=OnnxManifest | EngineManifest, covariant=True, default=OnnxManifest | EngineManifest)


@dataclass(frozen=True, slots=True)
class Artifact(Generic[M_co]):
    """A main file and its manifest; `reused` when a stage found it made already."""

    path: Path
    manifest: M_co
    reused: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        model, manifest = self.manifest.model, self.manifest
        return (
            f"{self.path} ({manifest.kind}, {model.variant}, {manifest.deploy.size_text} px, "
            f"{manifest.deploy.precision}, {self.size_bytes / 1e6:.1f} MB)"
        )

    @property
    def sha256(self) -> str:
        """Hash of the main file."""
        return self.manifest.files[0].sha256

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of its files within its folder, the main one first."""
        return tuple(record.name for record in self.manifest.files)

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(record.size_bytes for record in self.manifest.files)


def manifest_from_json(content: bytes, stem: str | None = None) -> OnnxManifest | EngineManifest:
    """Read a manifest. `stem`: the name of the file it was read from, which it has to bear itself.

    Raises ValueError, with the field's path and what is wrong with it, for everything that is no manifest of this
    version.
    """
    data = strict_json(content, MAX_MANIFEST_BYTES)
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema version {data.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    kind = MANIFESTS.get(str(data.get("kind")))
    if kind is None:
        raise ValueError(f"kind {data.get('kind')!r:.80}, expected one of {', '.join(MANIFESTS)}")
    if unknown := data.keys() - kind.__dataclass_fields__.keys():
        raise ValueError(f"unknown fields {', '.join(sorted(map(repr, unknown)))}")
    if stem is not None and data.get("stem") != stem:
        raise ValueError(f"it is of {data.get('stem')!r:.80}, renamed to {stem!r}")
    try:
        return typed(data, kind)
    except InputError as error:  # a record's own check of its values
        raise ValueError(str(error)) from error


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of manifests: one of the two kinds."""
    (*roots,), definitions = msgspec.json.schema_components(MANIFESTS.values(), ref_template="#/$defs/{name}")
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "anyOf": roots, "$defs": definitions}
    return dict(json.loads(json.dumps(whole, sort_keys=True)))


def relative_reference(path: Path, folder: Path) -> str:
    """`path` as a manifest in `folder` names it: relative, so that a moved project keeps its links."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _check_rises(batch: tuple[int, int, int]) -> None:
    if not batch[0] <= batch[1] <= batch[2]:
        raise ValueError(f"the batch range {':'.join(map(str, batch))} does not rise")
