"""A folder for NVIDIA DeepStream's element `nvinfer`: its configuration, the labels and the engine or ONNX file.

nvinfer makes y = net-scale-factor * (x - offset) of each 8-bit pixel, with one factor for all channels. The graph takes
raw pixels and normalises them itself, so the factor is 1/255. What nvinfer cannot do as `predict` does is counted in
the file's first lines. Nothing here was run with DeepStream.

Sources: NVIDIA, DeepStream 9.2, "Gst-nvinfer" (https://docs.nvidia.com/deepstream/text/DS_plugin_gst-nvinfer.md): keys
of the group [property]; for the order of labels and for what becomes of scores, libnvds_infer's own source, which comes
with DeepStream.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cnx_deploy import __version__
from cnx_deploy.core.artifacts import is_engine, open_artifact
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.files import WRITER, is_written_here, whole_folder
from cnx_deploy.core.image_size import sides
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model.recorded import recorded_outputs

__all__ = ["CONFIG", "LABELS", "Package", "PackageRequest", "write_package"]

CONFIG, LABELS = "config_infer.txt", "labels.txt"
COLOUR_FORMATS = {3: 0, 1: 2}
"""Channels of an image -> `model-color-format`: RGB and GRAY."""
SCALING_FILTERS = {"nearest": 0, "bilinear": 1, "bicubic": 2, "box": 3, "hamming": 3, "lanczos": 4}
"""`scaling-filter` of what comes closest on a GPU: nearest, bilinear, cubic, super sampling, Lanczos."""
CLASSIFIER, OTHER = 1, 100
"""`network-type`: a classifier, whose best class nvinfer names; anything else, whose tensors it hands on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRequest:
    """What `cnx-deploy package deepstream` takes.

    `files`: one ONNX file in FP32, or an engine of TensorRT. `mode`: "primary" looks at whole frames, "secondary" at
    the objects that the element with unique id 1 has found. `threshold`: a class is named from a probability above it.
    """

    files: tuple[Path, ...]
    to: Path
    mode: Literal["primary", "secondary"] = "primary"
    threshold: float = 0.0
    force: bool = False

    def __post_init__(self) -> None:
        if len(self.files) != 1:
            raise InputError(f"{len(self.files)} artifacts were given, and a folder for nvinfer is of one. Name one.")
        if self.mode not in ("primary", "secondary"):
            raise InputError(f"No mode is called {self.mode!r}. Choose one of: primary, secondary.")
        if not 0.0 <= self.threshold < 1.0:
            raise InputError(f"threshold is {self.threshold}; expected a probability from 0 to below 1.")


@dataclass(frozen=True, slots=True)
class Package:
    """A folder that was written. `differences`: where its images are not those of `predict`."""

    path: Path
    files: tuple[str, ...]
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as --json prints them."""
        lists = {name: list(getattr(self, name)) for name in ("files", "differences", "notes")}
        return {"path": str(self.path), **lists}

    def __str__(self) -> str:
        return f"{self.path}: {', '.join(self.files)}"


def write_package(request: PackageRequest, note: Callable[[str], None]) -> Package:
    """Write the folder, whole or not at all.

    Raises:
        InputError: nvinfer cannot give the network what it takes, or runs no such file.
        OutputExistsError: something is at the place.
    """
    artifact = open_artifact(request.files[0])
    _check_file(artifact)
    scale, offsets = _scale_and_offsets(artifact)
    record, names = artifact.manifest.model, tuple(spec.name for spec in recorded_outputs(artifact))
    is_classifier = record.task == "classification" and names == ("probabilities",)
    differences = _differences(record.preprocessing)
    notes = _notes(artifact, names, is_classifier=is_classifier)
    for text in (f"{_counted(differences)}.", *differences, *notes):
        note(text)
    settings = _settings(artifact, request, scale, offsets, names, is_classifier=is_classifier)
    written = [CONFIG, *([LABELS] if record.class_names else []), *artifact.file_names]
    with whole_folder(request.to, force=request.force, is_own=_is_own, needed_bytes=artifact.size_bytes) as folder:
        for name in artifact.file_names:
            shutil.copyfile(artifact.path.parent / name, folder / name)
        if record.class_names:
            (folder / LABELS).write_text(_labels(record.class_names, is_classifier=is_classifier), encoding="utf-8")
        (folder / CONFIG).write_text(_config_text(artifact, settings, differences, notes), encoding="utf-8")
    return Package(request.to, tuple(written), differences, notes)


def _check_file(artifact: Artifact) -> None:
    """Raise InputError for a file that DeepStream's TensorRT does not run, or not as it was checked."""
    manifest, name = artifact.manifest, artifact.path.name
    if is_engine(artifact):
        request = artifact.manifest.request
        if request.runtime == "tensorrt-rtx":
            raise InputError(
                f"{name} is an engine of TensorRT-RTX, and DeepStream runs TensorRT. Build a plan on the GPU that will "
                "run it, with cnx-deploy build-trt --runtime tensorrt and the TensorRT release of DeepStream."
            )
        if request.fused is not None:
            raise InputError(f"{name} has own kernels, which nvinfer does not launch. Build it without --fused.")
    elif manifest.deploy.precision != "fp32":
        raise InputError(
            f"{name} computes in {manifest.deploy.precision.upper()}, and nvinfer builds ONNX files without strong "
            "typing: parts that have to stay in FP32 may lose it. Build a plan with cnx-deploy build-trt --runtime "
            "tensorrt and package that, or package the FP32 file."
        )
    if manifest.deploy.size_range is not None:
        raise InputError(
            f"{name} leaves height and width open, and nvinfer scales all frames to one size. Export it with one "
            "--image-size."
        )
    if manifest.batch[0] > 1 and manifest.batch[0] != manifest.batch[2]:
        raise InputError(f"{name} takes batches from {manifest.batch[0]}, and nvinfer's last batch of a stream may be "
                         "smaller. Make it again with --batch 1:8:8 or such.")  # fmt: skip


def _scale_and_offsets(artifact: Artifact) -> tuple[float, tuple[float, ...]]:
    """`net-scale-factor`, and `offsets` in pixel values, none where they are zero.

    Raises InputError where one factor for all channels does not make what the network takes.
    """
    kind, made, name = artifact.manifest.deploy.input_kind, artifact.manifest.model.preprocessing, artifact.path.name
    if made.in_chans not in COLOUR_FORMATS:
        raise InputError(
            f"{name} takes images of {made.in_chans} channels, and nvinfer makes RGB or grey ones. Feed it by "
            "nvdspreprocess (input-tensor-from-meta), or export a network of 3 channels or 1."
        )
    if kind == "uint8":
        raise InputError(
            f"{name} takes bytes, and nvinfer gives 32-bit floats. Export it with --input float (the default)."
        )
    if kind == "float":
        return 1.0 / 255.0, ()
    if len(set(made.std)) > 1:
        raise InputError(
            f"{name} takes images that are divided by the deviations {made.std}, and nvinfer has one factor for all "
            "channels. Export it from its checkpoint with cnx-deploy export, which puts them into the graph."
        )
    # (x / 255 - m) / s = (x - 255 m) / (255 s)
    return 1.0 / (255.0 * made.std[0]), tuple(255.0 * value for value in made.mean)


def _settings(
    artifact: Artifact, request: PackageRequest, scale: float, offsets: tuple[float, ...], names: tuple[str, ...],
    *, is_classifier: bool,
) -> dict[str, str]:  # fmt: skip
    """The keys of the group [property]."""
    manifest, made = artifact.manifest, artifact.manifest.model.preprocessing
    height, width = sides(manifest.deploy.image_size)
    profile = artifact.manifest.request.batches[0] if is_engine(artifact) else manifest.batch
    keeps_shape = made.crop_mode in ("border", "corner")
    settings: dict[str, Any] = {"gpu-id": 0, "gie-unique-id": 1 if request.mode == "primary" else 2}
    settings["process-mode"] = 1 if request.mode == "primary" else 2
    if request.mode == "secondary":
        settings |= {"operate-on-gie-id": 1, "classifier-async-mode": 0}
    settings["model-engine-file" if is_engine(artifact) else "onnx-file"] = artifact.path.name
    settings |= {
        "batch-size": profile[2],
        "network-mode": 0 if manifest.deploy.precision == "fp32" else 2,
        "network-type": CLASSIFIER if is_classifier else OTHER,
        "network-input-order": 0,
        "infer-dims": f"{made.in_chans};{height};{width}",
        "model-color-format": COLOUR_FORMATS[made.in_chans],
        "net-scale-factor": repr(scale),
    }
    if offsets:
        settings["offsets"] = ";".join(map(repr, offsets))
    settings |= {
        "maintain-aspect-ratio": int(keeps_shape),
        "symmetric-padding": int(made.crop_mode == "border"),
        "scaling-compute-hw": 1,
        "scaling-filter": SCALING_FILTERS[made.interpolation],
        "output-blob-names": ";".join(names),
    }
    if is_classifier:
        settings |= {"classifier-threshold": repr(request.threshold), "classifier-type": "class"}
        settings["num-detected-classes"] = manifest.model.num_classes
    else:
        settings["output-tensor-meta"] = 1
    if manifest.model.class_names:
        settings["labelfile-path"] = LABELS
    return {name: str(value) for name, value in settings.items()}


def _differences(made: Preprocessing) -> tuple[str, ...]:
    """Where the images that nvinfer makes are not those of `predict`."""
    found = []
    height, width = sides(made.image_size)
    size = f"{height}x{width}"
    if made.crop_mode.startswith("center"):
        found.append(
            f"predict resizes a picture to cover {math.floor(height / made.crop_ratio)}x"
            f"{math.floor(width / made.crop_ratio)} and crops its centre {size}; nvinfer crops nothing and squashes "
            f"the whole frame to {size}"
        )
    elif made.crop_ratio < 1.0:
        found.append(f"predict keeps {made.crop_ratio:g} of the resized picture; nvinfer shows all of it")
    if made.crop_mode in ("border", "corner") and any(made.fill):
        found.append(f"predict fills what is missing with {made.fill}; nvinfer fills it with black")
    if made.interpolation != "nearest":
        found.append(
            f"predict shrinks with Pillow's {made.interpolation} filter, which averages over all pixels that become "
            "one; nvinfer's scaling reads a few neighbours"
        )
    if made.in_chans == 1:
        found.append("predict makes grey of colours by Pillow's weights; nvinfer takes the frame's own luma")
    return tuple(found)


def _notes(artifact: Artifact, names: tuple[str, ...], *, is_classifier: bool) -> tuple[str, ...]:
    manifest, notes = artifact.manifest, list[str]()
    if not is_classifier:
        task = manifest.model.task
        gives = f"this file gives {', '.join(names)}" + (f" of the task {task}" if task != "classification" else "")
        notes.append(
            f"nvinfer names the best class of a classifier's one output of probabilities, and {gives}: it is handed on "
            f"as tensors (network-type={OTHER}, output-tensor-meta=1)"
        )
        if manifest.model.task == "classification":
            notes[-1] += ". For labels export with --output probabilities"
    if is_engine(artifact):
        facts = artifact.manifest.facts
        notes.append(
            f"the engine was built by TensorRT {facts.runtime_version} for {artifact.manifest.target}: DeepStream has "
            "to have the same release"
        )
        if len(artifact.manifest.request.batches) > 1:
            notes.append("nvinfer uses the first of the engine's profiles alone")
    else:
        notes.append("nvinfer builds an engine of the ONNX file at the first start; TensorRT may use TF32 in it")
    if manifest.model.weights.origin == "random":
        notes.append(f"the weights are random (seed {manifest.model.weights.reference}): answers mean nothing")
    return tuple(notes)


def _labels(names: tuple[str, ...], *, is_classifier: bool) -> str:
    """Labels as nvinfer reads them: of a classifier one line for each output, classes divided by semicolons."""
    if not is_classifier:
        return "".join(f"{name}\n" for name in names)
    for name in names:
        if ";" in name or "\n" in name or not name:
            raise InputError(
                f"The class {name!r} cannot stand in nvinfer's file of labels, where a semicolon or the end of a line "
                "ends a name. Export with other names, --class-names (class_names)."
            )
    return ";".join(names) + "\n"


def _config_text(
    artifact: Artifact, settings: dict[str, str], differences: tuple[str, ...], notes: tuple[str, ...]
) -> str:
    """The file: a GLib key file, comments first."""
    lines = [f"{WRITER} {__version__} from the manifest of {artifact.path.name}: a configuration of nvinfer."]
    lines += ["# Not run with DeepStream.", f"# {_counted(differences)}{':' if differences else '.'}"]
    lines += [f"# {number}. {text}." for number, text in enumerate(differences, start=1)]
    lines += [f"# Note: {text}." for text in notes]
    lines += ["", "[property]", *(f"{name}={value}" for name, value in settings.items())]
    return "\n".join(lines) + "\n"


def _counted(differences: tuple[str, ...]) -> str:
    count = len(differences)
    return f"The images differ from those of `predict` in {count} {'way' if count == 1 else 'ways'}"


def _is_own(path: Path) -> bool:
    """Whether a folder holds a configuration that this module wrote beside its file."""
    names = {entry.name for entry in path.iterdir()}
    rest = {name for name in names - {CONFIG, LABELS} if not name.endswith((".onnx", ".onnx.data", ".engine"))}
    return not rest and is_written_here(path / CONFIG)
