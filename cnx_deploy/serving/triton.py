"""A model repository of NVIDIA Triton from artifacts: for each network its file, its preprocessing and an ensemble.

Of a network `NAME` there are three models. `NAME-network` runs the ONNX file or the engine. `NAME-preprocessing` makes
its images of encoded pictures, the same pixels as `predict`. `NAME` joins them: it takes the bytes of picture files.
What the configurations say comes from the artifacts' manifests (docs/decisions/0035-triton.md).
"""

import io
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import PIL

from cnx_deploy import __version__
from cnx_deploy.core.artifacts import is_engine, is_onnx, open_artifact
from cnx_deploy.core.errors import CheckFailedError, InputError
from cnx_deploy.core.files import WRITER, is_written_here, sha256_of_file, whole_folder
from cnx_deploy.core.image_size import sides
from cnx_deploy.core.manifest import Artifact, EngineManifest
from cnx_deploy.core.preprocessing import ASSUMED, Preprocessing
from cnx_deploy.core.variants import find_variant
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.data.pixels import MODES
from cnx_deploy.model.recorded import recorded_task
from cnx_deploy.model.tasks.base import network_outputs
from cnx_deploy.serving.triton_config import DATA_TYPES, config_text

__all__ = [
    "LABELS", "NETWORK", "PREPROCESSING", "PREPROCESSING_FILES", "Package", "PackageRequest",
    "capability_of", "parameters_of", "preprocessing_record", "tensors_of", "write_package",
]  # fmt: skip

NETWORK, PREPROCESSING = "-network", "-preprocessing"
"""What follows a network's name in the names of the models that its ensemble joins."""
LABELS = "labels.txt"
SERVICE = "inference-service.yaml"
PREPROCESSING_FILES: Mapping[str, Path] = {
    "model.py": Path(__file__).with_name("triton_preprocessing.py"),
    "pixels.py": Path(__file__).parents[1] / "data" / "pixels.py",
}
"""Files of a preprocessing model, and those that they are copies of."""
WARMUP_PICTURE = "picture"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TRITON_TYPES = {"float32": "FLOAT", "int64": "INT64", "uint8": "UINT8"}
"""torch's names of element types -> ONNX's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRequest:
    """What `cnx-deploy package triton` takes.

    `name`: of the models, of a single network; None takes the artifact's own. `version`: the number of the versions'
    folder. `device`: where networks run, "auto" on GPUs where there are some. `instances` of each network, on each GPU.
    `max_delay_ms`: how long a request waits for others to fill a batch. `queue_limit`: requests that may wait, None
    four of the largest batches; `queue_timeout_ms`: how long, before it is refused. `storage_uri`: where KServe finds
    the repository, written into a file for it.
    """

    files: tuple[Path, ...]
    to: Path
    name: str | None = None
    version: int = 1
    device: Literal["auto", "cpu", "gpu"] = "auto"
    instances: int = 1
    preprocessing_instances: int = 2
    max_delay_ms: float = 5.0
    queue_limit: int | None = None
    queue_timeout_ms: float = 10_000.0
    storage_uri: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if not self.files:
            raise InputError("No artifact was given. Name the ONNX files or engines to package.")
        counts = ("version", "instances", "preprocessing_instances", "queue_limit")
        for name in (*counts, "max_delay_ms", "queue_timeout_ms"):
            value = getattr(self, name)
            least = 1 if name in counts else 0
            if value is not None and not least <= value < math.inf:
                raise InputError(f"{name} is {value}; expected a finite number, {least} or more.")
        if self.device not in ("auto", "cpu", "gpu"):
            raise InputError(f"No device is called {self.device!r}. Choose one of: auto, cpu, gpu.")


@dataclass(frozen=True, slots=True)
class Package:
    """A repository that was written: its folder, its models in their order, and what is to be known of them."""

    path: Path
    models: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as --json prints them."""
        return {"path": str(self.path), "models": list(self.models), "notes": list(self.notes)}

    def __str__(self) -> str:
        return f"{self.path}: {', '.join(self.models)}"


@dataclass(frozen=True, slots=True)
class _Network:
    """One network of a repository: an ONNX file, or plans of one ONNX file for several GPUs."""

    name: str
    artifacts: tuple[Artifact, ...]
    no_pictures: str | None
    """Why there is no preprocessing; None where there is one."""

    @property
    def first(self) -> Artifact:
        return self.artifacts[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """The ensemble, which is the one to call, then what it joins; the network alone where no pictures are taken."""
        network = f"{self.name}{NETWORK}"
        return (network,) if self.no_pictures else (self.name, f"{self.name}{PREPROCESSING}", network)

    @property
    def largest_batch(self) -> int:
        return max(high for _, _, high in _profiles(self.first))

    @property
    def fixed_batch(self) -> int | None:
        """The one batch that the graph takes; None where it is open."""
        smallest, _, largest = self.first.manifest.batch
        return largest if smallest == largest else None


def write_package(request: PackageRequest, note: Callable[[str], None]) -> Package:
    """Write a model repository for Triton, whole or not at all.

    Raises:
        InputError: an artifact that Triton cannot serve, two networks of one name, or a place that cannot be written.
        OutputExistsError: something is at the place.
        CorruptArtifactError: an artifact is not what its manifest says.
        CheckFailedError: `triton_check` finds something wrong with what was written; nothing is left.
    """
    from cnx_deploy.serving.triton_check import check_repository  # which reads what this module writes

    networks = _networks(request)
    notes = [text for network in networks for text in _notes(network)]
    for text in notes:
        note(text)
    size = sum(artifact.size_bytes for network in networks for artifact in network.artifacts)
    models = tuple(name for network in networks for name in network.model_names)
    with whole_folder(request.to, force=request.force, is_own=_is_repository, needed_bytes=size) as folder:
        for network in networks:
            _write_network(folder, network, request)
        if request.storage_uri is not None:
            (folder / SERVICE).write_text(_service(networks[0].name, request.storage_uri), encoding="utf-8")
        if findings := check_repository(folder).findings:
            raise CheckFailedError(f"The repository that was written is wrong, and was removed. {' '.join(findings)}")
    return Package(request.to, models, tuple(notes))


def _networks(request: PackageRequest) -> list[_Network]:
    """The networks of the artifacts; plans that differ in their target alone are one."""
    groups: dict[Any, list[Artifact]] = {}
    for path in request.files:
        artifact = open_artifact(path)
        _check_artifact(artifact, request.device)
        groups.setdefault(_group_of(artifact), []).append(artifact)
    networks: list[_Network] = []
    if request.name is not None and len(groups) > 1:
        raise InputError(
            f"--name {request.name} (name) is of one network, and {len(groups)} were given. Leave it out, or package "
            "one of them."
        )
    for artifacts in groups.values():
        targets = [artifact.manifest.target for artifact in artifacts if is_engine(artifact)]
        if len(set(targets)) < len(artifacts) and len(artifacts) > 1:
            raise InputError(
                f"{' and '.join(str(artifact.path) for artifact in artifacts)} are of the same network and GPU. Give "
                "one of them."
            )
        stem = artifacts[0].manifest.stem
        name = request.name or (stem.replace(f"-{targets[0]}", "") if len(targets) > 1 else stem)
        if not MODEL_NAME.fullmatch(name):
            raise InputError(
                f"{name!r} cannot be a model's name, which is part of an address: expected letters, digits, '.', '_' "
                "and '-'. Give one with --name (name)."
            )
        network = _Network(name, tuple(artifacts), _why_no_pictures(artifacts[0]))
        for known in networks:
            if set(known.model_names) & set(network.model_names):
                raise InputError(
                    f"Models of {known.first.path} and {artifacts[0].path} would have one name. Package them into "
                    "repositories of their own, with --name (name)."
                )
        networks.append(network)
    return networks


def _group_of(artifact: Artifact) -> Any:
    """What plans of one model have in common; an ONNX file is alone."""
    if not is_engine(artifact):
        return artifact.path.resolve()
    manifest = artifact.manifest
    return manifest.source_sha256, replace(manifest.request, target="current"), manifest.facts.runtime_version


def _check_artifact(artifact: Artifact, device: str) -> None:
    """Raise InputError for what Triton cannot serve."""
    name = artifact.path.name
    if is_engine(artifact):
        request = artifact.manifest.request
        if request.runtime == "tensorrt-rtx":
            raise InputError(
                f"{name} is an engine of TensorRT-RTX, and Triton's tensorrt backend loads plans of TensorRT alone. "
                "Package the ONNX file that it was built from, or build a plan with cnx-deploy build-trt --runtime "
                "tensorrt on the GPU that will serve it."
            )
        if request.fused is not None:
            raise InputError(
                f"{name} has own kernels, which this package or a library in the engine launches; Triton's tensorrt "
                "backend does neither. Build it without --fused."
            )
        if device == "cpu":
            raise InputError(f"{name} is an engine and runs on a GPU. Leave --device cpu (device) out.")
    elif artifact.manifest.precision.dtype == "bfloat16" and device != "gpu":
        raise InputError(
            f"{name} computes in BF16, and ONNX Runtime has no BF16 convolution on a CPU. Export it in FP16 or FP32, "
            "or say with --device gpu (device) that the server has a GPU whose ONNX Runtime computes it."
        )
    smallest, largest = min(low for low, _, _ in _profiles(artifact)), artifact.manifest.batch[2]
    if smallest > 1 and artifact.manifest.batch[0] != largest:
        raise InputError(
            f"{name} takes batches from {smallest}, and Triton runs what has arrived, one image too. Make it again "
            f"with --batch 1:{largest}:{largest} or such."
        )
    taken = {size for low, _, high in _profiles(artifact) for size in range(low, high + 1)}
    if missing := [size for size in range(smallest, max(taken)) if size not in taken]:
        raise InputError(
            f"{name} has no profile for a batch of {missing[0]}, and Triton makes batches of any size up to "
            f"{max(taken)}. Build it with --batch 1:{max(taken)}:{max(taken)} besides."
        )


def _profiles(artifact: Artifact) -> tuple[tuple[int, int, int], ...]:
    """The batch ranges that it takes: an engine's profiles, an ONNX file's one."""
    return artifact.manifest.request.batches if is_engine(artifact) else (artifact.manifest.batch,)


def _why_no_pictures(artifact: Artifact) -> str | None:
    """Why no preprocessing can be written; None where it can."""
    record = artifact.manifest.model
    assumed = [name for name, origin in record.origins.items() if origin == ASSUMED]
    if record.graph is not None and assumed:
        flags = " ".join("--" + name.replace("_", "-") for name in assumed)
        return (
            f"the file that it was made from does not say how images are made ({', '.join(assumed)}): rescue it again "
            f"with {flags}"
        )
    channels = record.preprocessing.in_chans
    if channels not in MODES:
        return f"its images have {channels} channels, and picture files have 1 to {max(MODES)}"
    return None


def _notes(network: _Network) -> list[str]:
    """What has to be known of a network in a server."""
    record, notes = network.first.manifest.model, list[str]()
    if record.weights.origin == "random":
        notes.append(f"{network.name}: the weights are random (seed {record.weights.reference}); answers mean nothing.")
    if (assumption := record.preprocessing.assumption(record.origins)) and network.no_pictures is None:
        notes.append(f"{network.name}: {assumption}")
    if network.no_pictures is not None:
        notes.append(f"{network.name}: the network alone, for {network.no_pictures}.")
    for artifact in network.artifacts:
        if is_engine(artifact):
            notes.append(
                f"{network.name}: {artifact.path.name} is a plan of TensorRT {artifact.manifest.facts.runtime_version} "
                f"for {artifact.manifest.target}; the server has to have that version of TensorRT and that GPU."
            )
    row = network.first.manifest.precision
    if is_onnx(network.first) and row.placement is not None:
        notes.append(
            f"{network.name}: {row.name} is stored in eight bits for TensorRT; what ONNX Runtime gains by it is not "
            "known."
        )
    if network.no_pictures is None and record.preprocessing.white_level not in (None, 65535.0):
        notes.append(
            f"{network.name}: the white level {record.preprocessing.white_level:g} takes all bits of a colour, of "
            "which the server's Pillow reads 8; it refuses pictures in colour with 16 bits."
        )
    return notes


def _write_network(folder: Path, network: _Network, request: PackageRequest) -> None:
    """Write the models of a network into the repository."""
    header = f"{WRITER} {__version__} from {network.first.manifest.stem}.json"
    names = network.first.manifest.model.class_names
    makers = (_ensemble_config, _preprocessing_config, _network_config)[-len(network.model_names) :]
    configs = {name: make(network, request) for name, make in zip(network.model_names, makers, strict=True)}
    for name, config in configs.items():
        version = folder / name / str(request.version)
        version.mkdir(parents=True)
        whole = {"name": name, **config, "version_policy": {"latest": {"num_versions": 1}}}
        (folder / name / "config.pbtxt").write_text(config_text(whole, header), encoding="utf-8")
        if names is not None and not name.endswith(PREPROCESSING):
            (folder / name / LABELS).write_text("".join(f"{label}\n" for label in names), encoding="utf-8")
    version = folder / f"{network.name}{NETWORK}" / str(request.version)
    for artifact in network.artifacts:
        for file in (f"{artifact.manifest.stem}.json", *artifact.file_names):
            shutil.copyfile(artifact.path.parent / file, version / file)
    if network.no_pictures is None:
        # Stores of objects, from which Triton reads too, have no empty folders.
        (folder / network.name / str(request.version) / "README.txt").write_text(
            "An ensemble has no file of its own.\n", encoding="utf-8"
        )
        _write_preprocessing(folder / f"{network.name}{PREPROCESSING}", network, request)


def _write_preprocessing(folder: Path, network: _Network, request: PackageRequest) -> None:
    """The files of the model that makes images, and the picture that it is warmed up with."""
    for name, source in PREPROCESSING_FILES.items():
        shutil.copyfile(source, folder / str(request.version) / name)
    record = json.dumps(preprocessing_record(network.first), indent=2) + "\n"
    (folder / str(request.version) / "preprocessing.json").write_text(record, encoding="utf-8")
    (folder / "warmup").mkdir()
    picture = _picture(network.first.manifest.model.preprocessing)
    # A tensor of bytes: the length of each element before it, little endian.
    (folder / "warmup" / WARMUP_PICTURE).write_bytes(len(picture).to_bytes(4, "little") + picture)


def _picture(preprocessing: Preprocessing) -> bytes:
    """A JPEG of the usual shape of photographs, larger than the network's images."""
    from PIL import Image

    side = max(sides(preprocessing.image_size))
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((2 * side, 3 * side // 2)).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


def preprocessing_record(artifact: Artifact) -> dict[str, Any]:
    """What preprocessing.json says: how images are made, the names and kind of the tensors, and Pillow's version."""
    made = artifact.manifest.model.preprocessing
    values = {field.name: getattr(made, field.name) for field in fields(made)}
    return json.loads(json.dumps({  # type: ignore[no-any-return]
        "input": "image", "output": next(iter(tensors_of(artifact)[0])),
        "input_kind": artifact.manifest.deploy.input_kind, "pillow": PIL.__version__,
        "preprocessing": {**values, "fill": made.fill, "in_chans": made.in_chans},
    }))  # fmt: skip


def tensors_of(artifact: Artifact) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs of a network: name -> (type as ONNX names it, shape), an open size as -1."""
    manifest = artifact.manifest
    if not isinstance(manifest, EngineManifest):
        inputs, outputs = (
            {
                name: (tensor.type, tuple(size if isinstance(size, int) else -1 for size in tensor.shape))
                for name, tensor in tensors.items()
            }
            for tensors in (manifest.facts.inputs, manifest.facts.outputs)
        )
        return inputs, outputs
    deploy, record = manifest.deploy, manifest.model
    batch = manifest.batch[2] if manifest.batch[0] == manifest.batch[2] else -1
    if record.graph is not None:
        outputs = {
            name: (tensor.type, (batch, *(size if isinstance(size, int) else -1 for size in tensor.shape[1:])))
            for name, tensor in record.graph.outputs.items()
        }
        name = record.graph.input
    else:
        task, variant = recorded_task(record), find_variant(record.variant)
        by_size = [
            network_outputs(task, variant, record.num_classes, replace(deploy, image_size=size, size_range=None))
            for size in deploy.checked_sizes
        ]
        outputs = {
            specs[0].name: (
                TRITON_TYPES[specs[0].dtype],
                (batch, *(found[0] if len(set(found)) == 1 else -1 for found in zip(*shapes, strict=True))),
            )
            for specs in zip(*by_size, strict=True)
            for shapes in [[spec.shape for spec in specs]]
        }
        name = "images"
    spec = InputSpec.of(deploy)
    ends = [spec.shape(1, size)[1:] for size in deploy.checked_sizes]
    shape = tuple(found[0] if len(set(found)) == 1 else -1 for found in zip(*ends, strict=True))
    return {name: ("UINT8" if spec.kind == "uint8" else "FLOAT", (batch, *shape))}, outputs


def _declared(tensors: Mapping[str, Any], network: _Network) -> list[dict[str, Any]]:
    """Tensors as a configuration has them: without the batch where Triton counts it."""
    first = 0 if network.fixed_batch is not None else 1
    return [
        {"name": name, "data_type": DATA_TYPES[kind], "dims": list(shape[first:]) or [1]}
        for name, (kind, shape) in tensors.items()
    ]


def _network_config(network: _Network, request: PackageRequest) -> dict[str, Any]:
    inputs, outputs = tensors_of(network.first)
    config: dict[str, Any] = {
        "input": _declared(inputs, network),
        "output": _with_labels(_declared(outputs, network), network),
        "instance_group": [_instances(network, request)],
        "parameters": _parameters(network),
        **_batching(network, request, tuple(sorted({size for row in _profiles(network.first) for size in row[1:]}))),
        "model_warmup": [
            {
                "name": f"batch of {size}",
                "batch_size": 0 if network.fixed_batch is not None else size,
                "inputs": {
                    tensor["name"]: {
                        "data_type": tensor["data_type"],
                        "dims": _typical(tensor["dims"], network),
                        # Triton's random data are random bits: as floats they hold NaN, of which a detector makes
                        # places outside of its maps.
                        "zero_data": True,
                    }
                    for tensor in _declared(inputs, network)
                },
            }
            for size in _warmup_batches(network)
        ],
    }
    if is_engine(network.first):
        plans = {capability_of(artifact): artifact.path.name for artifact in network.artifacts if is_engine(artifact)}
        return {"backend": "tensorrt", "cc_model_filenames": plans, **config}
    return {"backend": "onnxruntime", "default_model_filename": network.first.path.name, **config}


def _preprocessing_config(network: _Network, request: PackageRequest) -> dict[str, Any]:
    inputs, _ = tensors_of(network.first)
    typical = [{**tensor, "dims": _typical(tensor["dims"], network)} for tensor in _declared(inputs, network)]
    pictures = network.fixed_batch or 1
    return {
        "backend": "python",
        "input": [{"name": "image", "data_type": "TYPE_STRING", "dims": [pictures]}],
        "output": typical,
        "instance_group": [{"count": request.preprocessing_instances, "kind": "KIND_CPU"}],
        "parameters": _parameters(network),
        **_batching(network, request, (1,)),
        "model_warmup": [
            {
                "name": "a picture",
                "batch_size": 0 if network.fixed_batch is not None else 1,
                "inputs": {
                    "image": {"data_type": "TYPE_STRING", "dims": [1], "input_data_file": WARMUP_PICTURE},
                },
            }
        ] if pictures == 1 else [],
    }  # fmt: skip


def _ensemble_config(network: _Network, request: PackageRequest) -> dict[str, Any]:
    inputs, outputs = tensors_of(network.first)
    (images,) = inputs
    return {
        "platform": "ensemble",
        "max_batch_size": 0 if network.fixed_batch is not None else network.largest_batch,
        "input": [{"name": "image", "data_type": "TYPE_STRING", "dims": [network.fixed_batch or 1]}],
        "output": _with_labels(_declared(outputs, network), network),
        "parameters": _parameters(network),
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": f"{network.name}{PREPROCESSING}",
                    "model_version": -1,
                    "input_map": {"image": "image"},
                    "output_map": {images: "pixels"},
                },
                {
                    "model_name": f"{network.name}{NETWORK}",
                    "model_version": -1,
                    "input_map": {images: "pixels"},
                    "output_map": {name: name for name in outputs},
                },
            ]
        },
    }


def _with_labels(outputs: list[dict[str, Any]], network: _Network) -> list[dict[str, Any]]:
    """The same, with the file of class names at the output that has a score for each class."""
    record = network.first.manifest.model
    scores = recorded_task(record).class_output_of([output["name"] for output in outputs])
    if record.class_names is None:
        return outputs
    return [{**output, "label_filename": LABELS} if output["name"] == scores else output for output in outputs]


def _batching(network: _Network, request: PackageRequest, preferred: Sequence[int]) -> dict[str, Any]:
    """How requests become batches, and how many may wait how long; nothing where the graph fixes the batch."""
    if network.fixed_batch is not None:
        return {"max_batch_size": 0}
    return {
        "max_batch_size": network.largest_batch,
        "dynamic_batching": {
            "preferred_batch_size": list(preferred),
            "max_queue_delay_microseconds": 0 if preferred == (1,) else round(1000 * request.max_delay_ms),
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": round(1000 * request.queue_timeout_ms),
                "max_queue_size": request.queue_limit or 4 * network.largest_batch,
            },
        },
    }


def _instances(network: _Network, request: PackageRequest) -> dict[str, Any]:
    kind = "gpu" if is_engine(network.first) else request.device
    group: dict[str, Any] = {"count": request.instances, "kind": f"KIND_{kind.upper()}"}
    profiles = _profiles(network.first)
    return {**group, "profile": [str(at) for at in range(len(profiles))]} if len(profiles) > 1 else group


def _warmup_batches(network: _Network) -> list[int]:
    sizes = {size for row in _profiles(network.first) for size in row}
    return sorted({1, *sizes} if network.fixed_batch is None else {network.fixed_batch})


def _parameters(network: _Network) -> dict[str, dict[str, str]]:
    return {name: {"string_value": value} for name, value in parameters_of(network.artifacts).items()}


def _typical(dims: Sequence[int], network: _Network) -> list[int]:
    """The same with open height and width at the typical size."""
    spec = InputSpec.of(network.first.manifest.deploy)
    shape = spec.shape(network.fixed_batch or 1)
    return [typical if size < 0 else size for size, typical in zip(dims, shape[len(shape) - len(dims) :], strict=True)]


def parameters_of(artifacts: Sequence[Artifact]) -> dict[str, str]:
    """What a client reads at /config: what the model is and under which licence. Of several plans a hash each."""
    manifest = artifacts[0].manifest
    record = manifest.model
    manifests = [artifact.path.with_name(f"{artifact.manifest.stem}.json") for artifact in artifacts]
    values = {
        "cnx_deploy": __version__,
        "manifest_sha256": " ".join(map(sha256_of_file, manifests)),
        "model_sha256": " ".join(artifact.sha256 for artifact in artifacts),
        "weights_origin": record.weights.source,
        "weights_sha256": record.weights.sha256,
        "weights_licence": record.weights.licence,
        "task": record.task,
        "precision": manifest.precision.name,
        "image_size": manifest.deploy.size_text,
    }
    if record.weights.origin == "random":
        values["note"] = "The weights are random: the answers mean nothing."
    if record.thresholds is not None:
        values["thresholds"] = json.dumps(record.thresholds)
    if isinstance(manifest, EngineManifest):
        values["tensorrt_version"] = manifest.facts.runtime_version
    return values


def capability_of(engine: Artifact[EngineManifest]) -> str:
    """The compute capability of an engine's GPU as Triton writes it: "8.9" for sm89."""
    return f"{int(engine.manifest.target.removeprefix('sm')) / 10:.1f}"


def _service(name: str, storage_uri: str) -> str:
    """An InferenceService of KServe that serves the repository from a place. Strings as in JSON, which YAML reads."""
    label = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")[:40].strip("-")
    return "\n".join((
        f"{WRITER} {__version__}. The server's Python needs Pillow.",
        "apiVersion: serving.kserve.io/v1beta1",
        "kind: InferenceService",
        "metadata:",
        f"  name: {json.dumps(label if label[:1].isalpha() else f'model-{label}'.rstrip('-'))}",
        "spec:",
        "  predictor:",
        "    model:",
        "      modelFormat:",
        "        name: triton",
        "      protocolVersion: v2",
        f"      storageUri: {json.dumps(storage_uri)}",
        "",
    ))  # fmt: skip


def _is_repository(path: Path) -> bool:
    """Whether a folder holds nothing but models that this module wrote, and what it puts beside them."""
    return all(entry.name == SERVICE or is_written_here(entry / "config.pbtxt") for entry in path.iterdir())
