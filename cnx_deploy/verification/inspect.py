"""What is this file? A checkpoint, an ONNX file or an engine, told by its content, and what is known of it.

An engine is not given to a deserialiser: its manifest says what it is and which kernels it has. Without one, and only
where somebody answers for it, `trusted_engine` reads it in a process of its own.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from cnx_deploy.core.artifacts import is_engine, is_onnx, open_artifact, sha256_of_file
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.files import kind_of_weights, open_regular
from cnx_deploy.core.image_size import size_text
from cnx_deploy.core.manifest import MAX_MANIFEST_BYTES, Artifact, Compiled, EngineManifest, Grouping, OnnxManifest
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.strict_json import bounded_content, strict_json
from cnx_deploy.core.targets import find_target

__all__ = [
    "ONNX_CHECKS", "FileKind", "Inspection", "inspect_file", "kind_of_file", "recorded_artifact", "takes_gpu",
    "trusted_engine", "with_compiled",
]  # fmt: skip

FileKind = Literal["safetensors", "pickle", "onnx", "engine", "unknown"]

KINDS: dict[FileKind, tuple[str, tuple[str, ...]]] = {
    "safetensors": ("a safetensors checkpoint", (".safetensors",)),
    "pickle": ("a PyTorch checkpoint", (".pt", ".pth", ".bin", ".ckpt", ".tar")),
    "onnx": ("an ONNX file", (".onnx",)),
    "engine": ("a TensorRT engine", (".engine",)),
}
"""What a kind is called, and how its files' names end."""
GROUPINGS: tuple[Grouping, ...] = ("stage", "operation", "kind")
ENGINE_MAGIC = b"trt"
"""Bytes 2 to 4: an engine of TensorRT-RTX 1.7 begins with "vtrt", one of TensorRT 10 with "ftrt"."""
ONNX_START = re.compile(rb"\x08[\x01-\x7f][\x12\x1a\x22\x28\x32\x3a\x42\x72]")
"""ONNX has no magic number. Protobuf's writers put ModelProto's fields in order: ir_version, a small number, then any
of the next fields, up to the metadata (onnx/onnx.proto)."""
ONNX_CHECKS = (
    "sizes and outside data",
    "ONNX's full check, in a process of its own",
    "standard operators; no reduction in half",
)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file is. `facts` are plain types under names that depend on `kind`; `notes` are for people."""

    path: Path
    kind: FileKind
    size_bytes: int
    sha256: str
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())
    compiled: Compiled | None = None

    @property
    def description(self) -> str:
        """The kind in words, and whether the name says another one."""
        name, suffixes = KINDS[self.kind]
        suffix = self.path.suffix
        return name if suffix in suffixes else f"{name}, although its name ends in {suffix or 'nothing'}"

    def __str__(self) -> str:
        return f"{self.path}: {self.description}, {self.size_bytes / 1e6:.1f} MB, SHA-256 {self.sha256}"

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON has it."""
        compiled: dict[str, Any] | None = None
        if self.compiled is not None:
            totals = {f"by_{grouping}": list(map(asdict, self.compiled.totals(grouping))) for grouping in GROUPINGS}
            compiled = {**msgspec.to_builtins(self.compiled), **totals}
        names = ("kind", "description", "size_bytes", "sha256", "facts", "notes")
        return {"path": str(self.path), **{name: getattr(self, name) for name in names}, "compiled": compiled}


def inspect_file(path: Path) -> Inspection:
    """Say what a file is; a manifest (`.json`) or a folder of timm or transformers stands for the file it describes.

    Where a manifest describes the file, every hash in it is checked before anything is parsed. Raises InputError for
    no such file or one that is no artifact, CorruptArtifactError when bytes are not what they should be,
    GraphCheckError for an ONNX file that breaks a rule of `graph_checks`, and what `model.checkpoint` raises.
    """
    if path.suffix == ".json":
        path = open_artifact(path).path
    path = _weights_of(path) if path.is_dir() else path
    kind = kind_of_file(path)
    artifact = recorded_artifact(path)
    if kind == "unknown" and artifact is not None:
        kind = artifact.manifest.kind  # an engine of a release that begins otherwise
    if kind == "unknown":
        raise InputError(
            f"{path} is neither a checkpoint (safetensors, PyTorch), nor an ONNX file, nor a TensorRT engine by its "
            "content. These three and manifests can be inspected."
        )
    if kind == "engine":
        facts, notes = _engine_facts(artifact if artifact is not None and is_engine(artifact) else None)
    elif kind == "onnx":
        facts, notes = _onnx_facts(path, artifact if artifact is not None and is_onnx(artifact) else None)
    else:
        facts, notes = _checkpoint_facts(path)
    digest = artifact.sha256 if artifact and artifact.path.name == path.name else sha256_of_file(path)
    compiled = artifact.manifest.facts.compiled if artifact is not None and is_engine(artifact) else None
    return Inspection(path, kind, path.stat().st_size, digest, facts, notes, compiled)


def with_compiled(
    found: Inspection, *, target: str, batch: int, progress: Callable[[str, float], None] | None = None
) -> Inspection:
    """The inspection of an ONNX file and, in `compiled`, what TensorRT-RTX makes of it now; nothing is run.

    The file is written for the target as `build-trt` writes it, and compiled in a child process: it may be anybody's.
    `target`: "sm89" or "RTX 4090"; `progress` is told a text while the compiler works. Raises InputError for another
    kind of file, a target that does not exist or a batch the graph does not take; BuildError when it cannot be
    compiled; MissingRequirementError without TensorRT-RTX.
    """
    if found.kind != "onnx":
        raise InputError(f"{found.path} is {found.description}; only an ONNX file is compiled. Leave out --compile.")
    from cnx_deploy.exporters.trt.backend import load_backend
    from cnx_deploy.exporters.trt.compiling import measure_isolated

    backend = load_backend("tensorrt-rtx")
    target = find_target(target)
    backend.check_target(target)
    tick = None if progress is None else lambda seconds: progress(f"{found.path.name} {seconds:.0f} s", 0.0)
    compiled = measure_isolated(found.path, target, batch, what=f"Compiling {found.path.name}", tick=tick)
    facts = {**found.facts, "runtime": backend.name, "runtime_version": backend.version}
    notes = (*found.notes, "Compiled now and not run: the figures are no latency.")
    return replace(found, facts=facts, notes=notes, compiled=compiled)


def trusted_engine(found: Inspection) -> Inspection:
    """The inspection of an engine that no manifest names, and in its facts what TensorRT says of it.

    It is deserialised in a child process, and whatever is in it may run there. Raises InputError for another kind of
    file and for an engine with a manifest, CorruptArtifactError where TensorRT refuses it, MissingRequirementError
    where this machine lacks the runtime or a GPU.
    """
    if found.kind != "engine" or found.facts:
        what = "has a manifest, which says what it is" if found.kind == "engine" else f"is {found.description}"
        raise InputError(f"{found.path} {what}: only an engine without one is to be trusted. Leave out --trust.")
    from cnx_deploy.exporters.untrusted import describe_engine

    described = msgspec.to_builtins(describe_engine(found.path))
    tensors = {tensor.pop("name"): tensor for tensor in described.pop("tensors")}
    note = "It was read because you trust it: nothing else says where it is from."
    return replace(found, facts={**described, "tensors": tensors}, notes=(note,))


def _weights_of(folder: Path) -> Path:
    """The file of weights of a folder that timm or transformers wrote; another folder as it is."""
    from cnx_deploy.model.source_config import WEIGHT_NAMES, weights_in

    return weights_in(folder) if any((folder / name).is_file() for name in WEIGHT_NAMES) else folder


def kind_of_file(path: Path) -> FileKind:
    """Tell a file's kind from its first bytes; its name is not looked at. Raises InputError when it cannot be read."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a checkpoint, an ONNX file or an engine.")
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(16)
            if head[1:4] == ENGINE_MAGIC:
                return "engine"
            return kind_of_weights(head, size) or ("onnx" if ONNX_START.match(head) else "unknown")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): expected a checkpoint, ONNX file or engine. Check the path."
        ) from error


def takes_gpu(path: Path, device: str | None) -> bool:
    """Whether a model runs on a GPU: with the device "cuda", and an engine in any case."""
    return device == "cuda" or (path.is_file() and kind_of_file(path) == "engine")


def recorded_artifact(path: Path) -> Artifact | None:
    """The artifact that a manifest beside `path` records it as, hashes checked; None when none names this file.

    Raises CorruptArtifactError when bytes differ or when the manifest cannot be read.
    """
    manifest = path.with_suffix(".json")
    if not manifest.is_file() or path == manifest:
        return None
    try:
        content = strict_json(bounded_content(manifest, MAX_MANIFEST_BYTES), MAX_MANIFEST_BYTES)
        is_ours = path.name in [record["name"] for record in content["files"]]
    except ValueError:
        is_ours = path.suffix in (".onnx", ".engine")  # `open_artifact` says what is wrong with it
    except (KeyError, TypeError):
        return None  # some other program's JSON
    return open_artifact(manifest) if is_ours else None


def _checkpoint_facts(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    from cnx_deploy.model.checkpoint import FOREIGN_LICENCE, load_checkpoint
    from cnx_deploy.model.layouts import official_state, structure_of, variant_with_structure
    from cnx_deploy.model.tasks.base import find_task
    from cnx_deploy.model.weight_files import read_weight_file

    file = read_weight_file(path)
    layout, state = official_state(file.tensors, str(path))
    variant = variant_with_structure(structure_of(state))
    task = find_task(file.metadata.get("task") or file.task or "classification")
    classes = task.num_classes_in(state)
    facts: dict[str, Any] = {
        "layout": layout if file.heads is None else f"{layout} with heads of {file.heads}",
        "variant": variant.name if variant else None,
        "task": task.name,
        "classes": classes,
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "licence": file.metadata.get("licence", FOREIGN_LICENCE),
        "entry": file.entry,
        "metadata": dict(file.metadata),
    }
    notes = file.notes
    del file, state  # before the file is read once more
    if classes is None:
        origin = "as backbones and FCMAE pre-training have none"
        return facts, (f"It has no {task.name} head, {origin}: give it one with --reset-head.", *notes)
    if variant is None:
        return facts, ("Its depths and widths are none of the eight variants'.", *notes)
    loaded = load_checkpoint(path, variant)
    told = _told(loaded.class_names, loaded.preprocessing, loaded.origins)
    problem = () if loaded.problem is None else (f"What lies beside the weights cannot be followed: {loaded.problem}",)
    return {**facts, **told, "weights_sha256": loaded.weights.sha256}, (*notes, *problem)


def _onnx_facts(path: Path, artifact: Artifact[OnnxManifest] | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    from cnx_deploy.exporters.graph_checks import admit_onnx, check_graph

    notes: tuple[str, ...] = ()
    if artifact is None:
        admission = admit_onnx(path)
        graph = admission.facts
        more: dict[str, Any] = {"checked": list(ONNX_CHECKS)}
        notes = ("No manifest beside it names it, so neither its hash nor its origin can be checked.",)
    else:
        graph, parity = check_graph(path, artifact.file_names), artifact.manifest.facts.worst_parity
        more = {**_manifest_facts(artifact), "parity": parity.to_dict() if parity else None}
        if (proven := artifact.manifest.facts.eight_bits) is not None:
            more["eight_bits"] = {**more["eight_bits"], **msgspec.to_builtins(proven)}
    facts = {
        "opset": graph.opset,
        "operators": dict(graph.operators),
        "types": dict(graph.types),
        "half_share": round(graph.half_share, 4),
        "inputs": {name: [kind, list(shape)] for name, (kind, shape) in graph.inputs.items()},
        "outputs": {name: [kind, list(shape)] for name, (kind, shape) in graph.outputs.items()},
        "metadata": dict(graph.metadata),
    }
    return {**facts, **more}, notes


def _engine_facts(artifact: Artifact[EngineManifest] | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    if artifact is None:
        return {}, (
            "No manifest beside it names it, so nothing is known of it. An engine is native code: do not run one "
            "whose origin you do not know. Build it again with cnx-deploy build-trt, or give --trust to have it read.",
        )
    manifest = artifact.manifest
    facts: dict[str, Any] = {
        "runtime": manifest.request.runtime,
        "runtime_version": manifest.facts.runtime_version,
        "target": manifest.target,
        "profiles": [list(sizes) for sizes in manifest.request.batches],
        "census": msgspec.to_builtins(manifest.facts.census),
        "source": {"onnx": manifest.source_name, "sha256": manifest.source_sha256},
        "run": manifest.facts.run,
    }
    notes = ["An engine cannot be read without a GPU: this is its manifest."]
    if (own := manifest.facts.own_kernels) is not None:
        facts["own_kernels"] = msgspec.to_builtins(own)
        notes.append(f"It carries {len(own.kernels)} own kernels. To run it needs {own.needs}.")
    return {**facts, **_manifest_facts(artifact)}, tuple(notes)


def _told(names: tuple[str, ...] | None, preprocessing: Preprocessing, origins: Mapping[str, str]) -> dict[str, Any]:
    """Names of the classes, how images are made, and where each was read; no origins of random weights."""
    return {
        "class_names": None if names is None else list(names),
        "preprocessing": {**preprocessing.to_dict(), "crop_mode": preprocessing.crop_mode},
        "origins": dict(origins),
    }


def _manifest_facts(artifact: Artifact) -> dict[str, Any]:
    """What every manifest says; the hashes have been checked by then."""
    manifest, model = artifact.manifest, artifact.manifest.model
    count, soup, eight = len(manifest.files), model.weights.soup, manifest.deploy.eight_bits
    calibration = ("placement", "method", "images", "data_sha256", "kept")
    return {
        "variant": model.variant,
        "task": model.task,
        "classes": model.num_classes,
        "image_size": model.image_size if isinstance(model.image_size, int) else size_text(model.image_size),
        **_told(model.class_names, model.preprocessing, model.origins),
        **({"training": dict(model.training)} if model.training else {}),
        **({"thresholds": list(model.thresholds)} if model.thresholds is not None else {}),
        "precision": manifest.precision.name,
        **({"eight_bits": {name: getattr(eight, name) for name in calibration}} if eight is not None else {}),
        **manifest.deploy.answer,
        **({"chosen_outputs": list(manifest.deploy.outputs)} if manifest.deploy.outputs else {}),
        "weights": {name: getattr(model.weights, name) for name in ("origin", "reference", "sha256")},
        **({"soup": [{"reference": file.reference, "sha256": file.sha256} for file in soup]} if soup else {}),
        "licence": model.weights.licence,
        "hashes": f"match the manifest ({count} of {count} files)",
        "created": manifest.created,
        "tools": dict(manifest.tools),
    }
