"""What is wrong with a model repository of Triton, before a server says so, and what no server says.

Each configuration is read as Triton reads it and compared with the files beside it: networks with their manifests and
hashes, preprocessing with the manifest of the network that it feeds, ensembles with the models that they join. Triton
itself finds neither a wrong output dimension nor another crop.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy.core.artifacts import is_engine, open_artifact
from cnx_deploy.core.errors import CnxDeployError, InputError
from cnx_deploy.core.files import sha256_of_file
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.strict_json import bounded_content, strict_json
from cnx_deploy.serving.triton import (
    PREPROCESSING_FILES,
    capability_of,
    parameters_of,
    preprocessing_record,
    tensors_of,
)
from cnx_deploy.serving.triton_config import DATA_TYPES, ENUMS, config_from_text

__all__ = ["RepositoryCheck", "check_repository"]

MODEL_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
"""Backend -> the file that it loads where the configuration names none."""
SIZES = {"BOOL": 1, "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "FP16": 2, "BF16": 2, "UINT32": 4, "INT32": 4,
         "FP32": 4, "UINT64": 8, "INT64": 8, "FP64": 8}  # fmt: skip
"""Bytes of an element, by Triton's name without TYPE_."""
ENSEMBLE = "ensemble"


@dataclass(frozen=True, slots=True)
class RepositoryCheck:
    """What a check found: the models it read, and a sentence for each thing that is wrong."""

    path: Path
    models: tuple[str, ...]
    findings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as --json prints them."""
        return {"path": str(self.path), "models": list(self.models), "findings": list(self.findings)}

    def __str__(self) -> str:
        verdict = "nothing wrong" if self.passed else f"{len(self.findings)} wrong"
        return "\n".join((f"{self.path}: {len(self.models)} models, {verdict}", *self.findings))


@dataclass(frozen=True, slots=True)
class _Model:
    """A model of the repository: its folder, its configuration (a protobuf message) and its versions' folders."""

    folder: Path
    config: Any
    versions: tuple[Path, ...]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def backend(self) -> str:
        return ENSEMBLE if self.config.platform == ENSEMBLE else str(self.config.backend)

    def tensor(self, name: str, of: str) -> Any:
        """An input or output (`of`) by its name; None where there is none."""
        return next((tensor for tensor in getattr(self.config, of) if tensor.name == name), None)


def check_repository(folder: Path) -> RepositoryCheck:
    """Check a model repository. Raises InputError for a folder that holds no model."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: expected a model repository of Triton. Check the path.")
    folders = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    folders = [entry for entry in folders if not entry.name.startswith(".")]
    if not folders:
        raise InputError(f"{folder} holds no models: expected a folder for each, with its config.pbtxt.")
    models, findings = dict[str, _Model](), list[str]()
    for entry in folders:
        try:
            config = config_from_text(bounded_content(entry / "config.pbtxt").decode())
        except (OSError, ValueError) as error:
            findings.append(f"{entry.name}/config.pbtxt: it cannot be read as a model's configuration ({error}).")
            continue
        numbered = (child for child in entry.iterdir() if child.name.isdecimal() and not child.name.startswith("0"))
        versions = sorted(child for child in numbered if child.is_dir())
        models[entry.name] = _Model(entry, config, tuple(versions))
    for model in models.values():
        for rule in (_files, _tensors, _batching, _labels, _warmup, _network, _preprocessing):
            findings += (f"{model.name}: {text}" for text in rule(model))
        findings += (f"{model.name}: {text}" for text in _ensemble(model, models))
    return RepositoryCheck(folder, tuple(entry.name for entry in folders), tuple(findings))


def _files(model: _Model) -> Iterator[str]:
    """The model's name, its backend, and in each version the files that the backend loads."""
    config = model.config
    if config.name and config.name != model.name:
        yield f"it is called {config.name!r}, and its folder {model.name!r}. Triton takes no other name."
    if not model.versions:
        yield "it has no version: expected a folder with a number for its name, such as 1."
    missing = sorted(set(config.version_policy.specific.versions) - {int(path.name) for path in model.versions})
    if missing:
        yield f"version_policy asks for version {missing[0]}, which has no folder."
    if model.backend == ENSEMBLE:
        return
    if model.backend not in MODEL_FILES:
        yield f"no backend is called {model.backend!r} here; expected {', '.join(MODEL_FILES)} or platform ensemble."
        return
    for version in model.versions:
        for name in _model_files(model):
            if not (version / name).is_file():
                yield f"{version.name}/{name} is not there, and the backend {model.backend} loads it."


def _model_files(model: _Model) -> list[str]:
    """Names of the files that a backend loads in each version's folder."""
    plans = [*model.config.cc_model_filenames.values()]
    usual = [] if plans and not model.config.default_model_filename else [MODEL_FILES.get(model.backend, "")]
    return [*plans, *([model.config.default_model_filename] if model.config.default_model_filename else usual)]


def _tensors(model: _Model) -> Iterator[str]:
    """Inputs and outputs: named once, of a type, with dimensions."""
    for of in ("input", "output"):
        tensors = getattr(model.config, of)
        names = [tensor.name for tensor in tensors]
        if not names:
            yield f"it has no {of}."
        if len(set(names)) < len(names) or "" in names:
            yield f"its {of}s are called {', '.join(map(repr, names))}: expected a name of its own for each."
        for tensor in tensors:
            if _type_of(tensor) == "INVALID":
                yield f"the {of} {tensor.name} has no data_type."
            if not tensor.dims or any(size < 1 and size != -1 for size in tensor.dims):
                yield f"the {of} {tensor.name} has dims {[*tensor.dims]}: expected sizes from 1, or -1."


def _batching(model: _Model) -> Iterator[str]:
    """Batch sizes, queues and instances."""
    config = model.config
    batching = config.dynamic_batching if config.HasField("dynamic_batching") else None
    if config.max_batch_size < 0:
        yield f"max_batch_size is {config.max_batch_size}: expected 0 for a fixed batch, or the largest one."
    if model.backend == ENSEMBLE and (batching is not None or config.instance_group):
        yield "an ensemble has neither dynamic_batching nor instance_group: its models have them."
    if batching is not None:
        if config.max_batch_size == 0:
            yield "dynamic_batching needs a max_batch_size above 0."
        for size in batching.preferred_batch_size:
            if not 1 <= size <= max(1, config.max_batch_size):
                yield f"preferred_batch_size {size} is not from 1 to max_batch_size, {config.max_batch_size}."
    for group in config.instance_group:
        if group.HasField("count") and group.count < 1:
            yield f"an instance_group has a count of {group.count}: expected 1 or more."
        if model.backend == "tensorrt" and group.kind == ENUMS["Kind"].index("KIND_CPU"):
            yield "an instance_group of a TensorRT plan is KIND_CPU, and plans run on GPUs."


def _labels(model: _Model) -> Iterator[str]:
    """Files of class names: there, with one for each class."""
    for output in model.config.output:
        if not output.label_filename or not output.dims:
            continue
        try:
            lines = bounded_content(model.folder / output.label_filename).decode().split("\n")
        except (OSError, ValueError) as error:
            yield f"the class names of {output.name} cannot be read ({error})."
            continue
        count = len(lines) - (not lines[-1])
        if count != output.dims[-1]:
            yield f"{output.label_filename} has {count} names for the {output.dims[-1]} classes of {output.name}."


def _warmup(model: _Model) -> Iterator[str]:
    """Warm-ups: within the batches, of the model's inputs, with their files."""
    for warmup in model.config.model_warmup:
        told = f"the warm-up {warmup.name!r}"
        if warmup.batch_size > max(1, model.config.max_batch_size):
            yield f"{told} has a batch of {warmup.batch_size}, above max_batch_size, {model.config.max_batch_size}."
        expected, given = {tensor.name for tensor in model.config.input}, set(warmup.inputs)
        if expected != given:
            yield f"{told} gives {', '.join(sorted(given)) or 'nothing'}; expected {', '.join(sorted(expected))}."
        for name in sorted(expected & given):
            tensor, declared = warmup.inputs[name], model.tensor(name, "input")
            if not _agree(tensor, declared):
                yield f"{told} gives {name} as {_told(tensor)}; expected {_told(declared)}."
            elif tensor.input_data_file:
                yield from (f"{told}: {text}" for text in _warmup_file(model, tensor))


def _warmup_file(model: _Model, tensor: Any) -> Iterator[str]:
    path = model.folder / "warmup" / tensor.input_data_file
    if not path.is_file():
        yield f"its file warmup/{tensor.input_data_file} is not there."
        return
    content, kind = path.read_bytes(), _type_of(tensor)
    if kind == "STRING":  # the length of each element before it
        at = elements = 0
        while at + 4 <= len(content):
            at, elements = at + 4 + int.from_bytes(content[at : at + 4], "little"), elements + 1
        if at != len(content) or elements != math.prod(tensor.dims):
            yield f"warmup/{tensor.input_data_file} is no tensor of {math.prod(tensor.dims)} byte strings."
    elif len(content) != (expected := SIZES.get(kind, 0) * math.prod(tensor.dims)):
        yield f"warmup/{tensor.input_data_file} has {len(content)} bytes; expected {expected}."


def _artifacts(model: _Model) -> Iterator[tuple[Path, Artifact | str]]:
    """For each file of a network its artifact, with the hashes checked, or what is wrong with it."""
    if model.backend not in ("onnxruntime", "tensorrt"):
        return
    for version in model.versions:
        for name in _model_files(model):
            if not (version / name).is_file():
                continue  # `_files` says so
            try:
                yield version / name, open_artifact(version / name)
            except CnxDeployError as error:
                yield version / name, str(error)


def _network(model: _Model) -> Iterator[str]:
    """A network's configuration and its manifest: tensors, batches, GPUs, licence."""
    for path, artifact in _artifacts(model):
        if isinstance(artifact, str):
            yield artifact
            continue
        place = f"{path.parent.name}/{path.name}"
        smallest, _, largest = artifact.manifest.batch
        if is_engine(artifact):
            largest = max(high for _, _, high in artifact.manifest.request.batches)
        is_fixed, most = smallest == largest, model.config.max_batch_size
        if is_fixed and most != 0:
            yield f"max_batch_size is {most}, and {place} takes the one batch of {largest}: it has to be 0."
        elif not is_fixed and not 1 <= most <= largest:
            yield f"max_batch_size is {most}, and {place} takes batches of 1 to {largest}."
        for of, tensors in zip(("input", "output"), tensors_of(artifact), strict=True):
            declared = {tensor.name for tensor in getattr(model.config, of)}
            if declared != tensors.keys():
                yield f"its {of}s are {', '.join(sorted(declared))}; {place} has {', '.join(sorted(tensors))}."
            for name in sorted(declared & tensors.keys()):
                kind, shape = tensors[name]
                tensor, dims = model.tensor(name, of), [*shape[0 if is_fixed else 1 :]] or [1]
                if (_type_of(tensor), [*tensor.dims]) != (DATA_TYPES[kind].removeprefix("TYPE_"), dims):
                    expected = f"{DATA_TYPES[kind].removeprefix('TYPE_')} {dims}"
                    yield f"the {of} {name} is {_told(tensor)}; {place} has {expected}."
        if is_engine(artifact):
            if (runtime := artifact.manifest.request.runtime) != "tensorrt":
                yield f"{place} is an engine of {runtime}, which Triton does not load."
            for capability, name in model.config.cc_model_filenames.items():
                if name == path.name and capability != capability_of(artifact):
                    yield f"{name} is for compute capability {capability_of(artifact)}, not {capability}."
        for name, value in parameters_of([artifact]).items():
            given = model.config.parameters[name].string_value if name in model.config.parameters else None
            # Of several plans there is a hash each.
            if name != "cnx_deploy" and value != given and value not in (given or "").split():
                yield f"the parameter {name} is {given!r}; the manifest of {place} says {value!r}."


def _preprocessing(model: _Model) -> Iterator[str]:
    """The files that make images: this version's, and with names and types of the configuration."""
    if model.backend != "python":
        return
    for version in model.versions:
        for name, source in PREPROCESSING_FILES.items():
            if (version / name).is_file() and sha256_of_file(version / name) != sha256_of_file(source):
                yield f"{version.name}/{name} is not that of this version of cnx-deploy. Package it again."
        record = _record_of(version)
        if isinstance(record, str):
            yield record
            continue
        for of, expected in (("input", record["input"]), ("output", record["output"])):
            if {tensor.name for tensor in getattr(model.config, of)} != {expected}:
                yield f"its {of} is not {expected}, which {version.name}/preprocessing.json names."


def _record_of(version: Path) -> Any:
    """What preprocessing.json of a version says, or what is wrong with it."""
    place = f"{version.name}/preprocessing.json"
    try:
        record = strict_json(bounded_content(version / "preprocessing.json"))
    except (OSError, ValueError) as error:
        return f"{place} cannot be read ({error})."
    kinds = {"input": str, "output": str, "input_kind": str, "preprocessing": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return f"{place} does not say how images are made. Package it again."
    return record


def _ensemble(model: _Model, models: Mapping[str, _Model]) -> Iterator[str]:
    """The steps of an ensemble: their models, and each tensor from where it is made to where it is read."""
    if model.backend != ENSEMBLE:
        return
    steps = list(model.config.ensemble_scheduling.step)
    known = {tensor.name: tensor for tensor in model.config.input}
    makers: dict[str, _Model] = {}
    for step in steps:
        part = models.get(step.model_name)
        if part is None:
            yield f"a step is of {step.model_name!r}, which is no model that can be read here."
            continue
        if step.model_version > 0 and str(step.model_version) not in {path.name for path in part.versions}:
            yield f"a step is of version {step.model_version} of {part.name}, which has no such folder."
        if model.config.max_batch_size > part.config.max_batch_size:
            yield f"max_batch_size is {model.config.max_batch_size}, and {part.name} has {part.config.max_batch_size}."
        yield from _mapped(step, part)
        for name, tensor in step.output_map.items():
            if tensor in known:
                yield f"the tensor {tensor} is made twice, the second time by {part.name}."
            known.setdefault(tensor, part.tensor(name, "output"))
            makers.setdefault(tensor, part)
    for step in steps:
        if (reader := models.get(step.model_name)) is None:
            continue
        for name, tensor in step.input_map.items():
            if tensor not in known:
                yield f"{reader.name} reads {tensor}, which is no input of the ensemble and which no step makes."
                continue
            made, read = known[tensor], reader.tensor(name, "input")
            if made is not None and read is not None and not _agree(made, read):
                yield f"{reader.name} takes {name} as {_told(read)}, and {tensor} is {_told(made)}."
            if tensor in makers:
                yield from _same_images(makers[tensor], reader)
    for output in model.config.output:
        made = known.get(output.name)
        if made is None:
            yield f"no step makes its output {output.name}."
        elif not _agree(made, output):
            yield f"its output {output.name} is {_told(output)}, and what makes it gives {_told(made)}."


def _mapped(step: Any, part: _Model) -> Iterator[str]:
    """The names of a step are those of its model's tensors, and no input is left out."""
    for of, mapped in (("input", step.input_map), ("output", step.output_map)):
        names = {tensor.name for tensor in getattr(part.config, of)}
        if unknown := sorted(set(mapped) - names):
            yield f"{part.name} has no {of} {unknown[0]!r}; it has {', '.join(sorted(names))}."
        if of == "input" and (missing := sorted(names - set(mapped))):
            yield f"nothing is given to the input {missing[0]} of {part.name}."


def _same_images(maker: _Model, reader: _Model) -> Iterator[str]:
    """Preprocessing makes the images that the network was exported for."""
    if maker.backend != "python":
        return
    records = [_record_of(version) for version in maker.versions]
    for _, artifact in _artifacts(reader):
        for record in records:
            if isinstance(record, str) or isinstance(artifact, str):
                continue  # said of the model itself
            expected = preprocessing_record(artifact)
            for part in ("input_kind", "preprocessing"):
                if record[part] != expected[part]:
                    yield f"{maker.name} makes images by {_difference(record[part], expected[part])} of {reader.name}."


def _difference(given: Any, expected: Any) -> str:
    if not isinstance(given, dict) or not isinstance(expected, dict):
        return f"{given!r}, not by {expected!r}"
    names = [name for name in {**expected, **given} if given.get(name) != expected.get(name)]
    return f"{names[0]} {given.get(names[0])!r}, not by {expected.get(names[0])!r} as in the manifest"


def _type_of(tensor: Any) -> str:
    name: str = ENUMS["DataType"][tensor.data_type]
    return name.removeprefix("TYPE_")


def _told(tensor: Any) -> str:
    return f"{_type_of(tensor)} {[*tensor.dims]}"


def _agree(one: Any, other: Any) -> bool:
    """The same type and dimensions, where an open one agrees with any."""
    return (
        one.data_type == other.data_type
        and len(one.dims) == len(other.dims)
        and all(a == b or -1 in (a, b) for a, b in zip(one.dims, other.dims, strict=True))
    )
