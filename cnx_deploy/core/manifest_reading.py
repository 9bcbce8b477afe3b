"""How a manifest is read: every field has the type and range that the code relies on.

A manifest is data from outside, so what does not fit is a ValueError that names the field. docs/manifest.schema.json is
generated from these types and those of `manifest`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from cnx_deploy.core.manifest import SCHEMA_VERSION, SUFFIXES, Batches, Count, Manifest, Positive, Triple
from cnx_deploy.core.strict_json import strict_json, typed

__all__ = ["KERNEL_COLUMNS", "MAX_MANIFEST_BYTES", "json_schema", "manifest_from_json"]

MAX_MANIFEST_BYTES = 16 << 20
"""The largest that was written, of the huge variant's engine with every kernel, has 95 kB."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What `data.Preprocessing` reads; the ranges are checked there."""

    image_size: Positive = 224
    crop_ratio: float = 0.875
    interpolation: str = "bicubic"
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRequest:
    """What later stages read of an ONNX file's request; see `model.deploy.DeploySpec` and `onnx_export.ExportSpec`."""

    precision: Literal["fp32", "fp16", "bf16"]
    batch: Batches
    image_size: Positive
    input_kind: Literal["float", "uint8"]
    mean: Triple
    std: Triple
    layout: str | None = None
    leave_out: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    opset: Positive | None = None
    form: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest(OnnxRequest):
    """The request of the ONNX file and what `trt.builder.BuildSpec` adds."""

    runtime: Literal["tensorrt", "tensorrt-rtx"]
    target: Annotated[str, msgspec.Meta(pattern="^(current|sm[0-9]{2,3})$(?!\\n)")]
    batches: Annotated[tuple[Batches, ...], msgspec.Meta(min_length=1)]
    allow_tf32: bool


@dataclass(frozen=True, slots=True)
class Differences:
    samples: Count
    relative_l2_max: float
    centred_cosine_min: float
    top1_agreement: float
    mean_kl: float
    nonfinite_count: Count


@dataclass(frozen=True, slots=True)
class Parity:
    candidate: str
    reference: str
    passed: bool
    found: Differences


@dataclass(frozen=True, slots=True)
class OnnxFacts:
    half_share: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    operators: Mapping[str, Count] | None = None
    types: Mapping[str, Count] | None = None
    parity: Parity | None = None


@dataclass(frozen=True, slots=True)
class Total:
    name: str
    kernels: Count
    megabytes: float
    share: float


@dataclass(frozen=True, slots=True)
class KernelList:
    columns: tuple[str, ...]
    rows: Annotated[tuple[tuple[str, str, str, str, Count, Count, Count, str], ...], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class Compiled:
    batch: Positive
    kernels: Count
    megabytes_per_image: float
    target: str = ""
    how: str = ""
    by_stage: tuple[Total, ...] = ()
    by_operation: tuple[Total, ...] = ()
    by_kind: tuple[Total, ...] = ()
    kernel_list: KernelList | None = None


@dataclass(frozen=True, slots=True)
class Census:
    types: Mapping[str, Count]
    float_layers: Mapping[str, Count]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    runtime_version: str
    build_seconds: float | None = None
    half_share_of_products: float | None = None
    gpu: Annotated[str, msgspec.Meta(pattern="^sm[0-9]{2,3}$(?!\\n)")] | None = None
    run: str | None = None
    census: Census | None = None
    compiled: Compiled | None = None


KERNEL_COLUMNS = ("name", "kind", "block", "operation", "input_bytes", "constant_bytes", "output_bytes", "tensors")
BESIDE_KERNELS = ("by_stage", "by_operation", "by_kind", "target", "how")
"""What is shown with a list of kernels; records of before kernels were listed have none of it."""

PARTS: dict[str, dict[str, Any]] = {
    "onnx": {"request": OnnxRequest, "facts": OnnxFacts},
    "engine": {"request": EngineRequest, "facts": EngineFacts},
}
"""What `request` and `facts` hold by kind; fields beyond these may be there and are kept."""


def manifest_from_json(content: bytes, stem: str | None = None) -> Manifest:
    """Read a manifest. `stem`: the name of the file it was read from, which it has to bear itself.

    Raises ValueError, with the field's path and what is wrong with it, for everything that is no manifest of this
    version.
    """
    data = strict_json(content, MAX_MANIFEST_BYTES)
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema version {data.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    if unknown := data.keys() - Manifest.__dataclass_fields__.keys():
        raise ValueError(f"unknown fields {', '.join(sorted(map(repr, unknown)))}")
    manifest: Manifest = typed(data, Manifest)
    typed(manifest.model.preprocessing, Preprocessing, "model.preprocessing")
    for name, kind in PARTS.get(manifest.kind, {}).items():
        typed(getattr(manifest, name), kind, name)
    _check_together(manifest, stem)
    return manifest


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of manifests, with the requests and facts of each kind as definitions."""
    types = [Manifest, Preprocessing, *(part for parts in PARTS.values() for part in parts.values())]
    (root, *_), definitions = msgspec.json.schema_components(types, ref_template="#/$defs/{name}")
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}
    return dict(json.loads(json.dumps(whole, sort_keys=True)))


def _check_together(manifest: Manifest, stem: str | None) -> None:
    """What one field alone cannot tell."""
    if stem is not None and manifest.stem != stem:
        raise ValueError(f"it is of {manifest.stem!r}, renamed to {stem!r}")
    names = [file.name for file in manifest.files]
    expected = f"{manifest.stem}{SUFFIXES[manifest.kind]}"
    if not names or names[0] != expected:
        raise ValueError(f"its first file is {names[0] if names else 'missing'!r}, expected {expected!r}")
    if len(set(names)) != len(names) or f"{manifest.stem}.json" in names:
        raise ValueError("a file is listed twice, or the manifest itself is")
    classes = manifest.model.class_names
    if classes is not None and len(classes) != manifest.model.num_classes:
        raise ValueError(f"{len(classes)} class names for {manifest.model.num_classes} classes")
    weights = manifest.model.weights
    if weights.origin == "random" and not re.fullmatch(r"-?[0-9]{1,20}", weights.reference):
        raise ValueError(f"model.weights.reference is no seed: {weights.reference[:40]!r}")
    _check_kernels(manifest.facts.get("compiled") or {})
    for smallest, typical, largest in _batches(manifest.request):
        if not smallest <= typical <= largest:
            raise ValueError(f"the batch range {smallest}:{typical}:{largest} does not rise")


def _check_kernels(compiled: Mapping[str, Any]) -> None:
    """A list of kernels comes with its totals, has the columns that its rows are typed by, and moves something."""
    listed = compiled.get("kernel_list")
    if listed is None:
        return
    if missing := [name for name in BESIDE_KERNELS if name not in compiled]:
        raise ValueError(f"facts.compiled lists kernels without {', '.join(missing)}")
    if tuple(listed["columns"]) != KERNEL_COLUMNS:
        raise ValueError(f"facts.compiled.kernel_list.columns are not {', '.join(KERNEL_COLUMNS)}")
    if not any(sum(row[4:7]) for row in listed["rows"]):
        raise ValueError("facts.compiled.kernel_list has kernels that move no byte between them")


def _batches(request: Mapping[str, Any]) -> Sequence[Sequence[int]]:
    return [*([request["batch"]] if "batch" in request else []), *request.get("batches", [])]
