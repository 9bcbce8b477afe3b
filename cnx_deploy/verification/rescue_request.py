"""What `rescue` is asked for, and the inputs that its proof runs on: seeded images and noise, or arrays of the user."""

import math
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from cnx_deploy.core.class_names import ClassNames
from cnx_deploy.core.errors import (
    InputError,
)
from cnx_deploy.core.image_size import MAX_CHANNELS
from cnx_deploy.core.preprocessing import PerChannel
from cnx_deploy.data import image_like_batches
from cnx_deploy.exporters.graph_checks import GraphFacts
from cnx_deploy.model.tasks.base import find_task, task_names
from cnx_deploy.verification.inspect import KINDS as FILE_KINDS
from cnx_deploy.verification.inspect import kind_of_file, recorded_artifact

__all__ = [
    "OPEN_RANGE",
    "Arrays",
    "Note",
    "RescueRequest",
    "as_float",
    "check_axes",
    "check_is_foreign",
    "check_is_onnx",
    "is_open",
    "proof_inputs",
]

OPEN_BATCH, OPEN_SIDE, OPEN_LENGTH = 2, 224, 64
"""What stands for an open axis in the proof: the batch, a side of images, any other."""

MEAN, STD = 0.45, 0.225
"""Of the pixels of the proof's images, near those of ImageNet: what the network was trained with is not in the file."""

OPEN_RANGE = (1, 8, 64)
"""Smallest, typical and largest batch of an open one."""

ARRAY_TYPES = {"FLOAT": "float32", "FLOAT16": "float16", "UINT8": "uint8"}
"""Element types of inputs that images or noise are made for."""

Arrays = dict[str, np.ndarray[Any, Any]]
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RescueRequest:
    """What to rescue, how it is proven, and what the file itself does not say.

    `inputs`: an .npz file with an array for each input of the graph, in place of seeded images. `sizes`: what stands
    for open axes, by the axis' name in the graph; open sides of images are fixed at it. `target` (such as "sm89"):
    compile the original, the naive FP16 file and the rescued one for this GPU, and count kernels and bytes.
    `batch`: smallest, typical and largest batch, where the batch is open; None is 1, 8 and 64. `task` names the meaning
    of the one output, which is then called as the task calls it; `output` is the task's word for it, "logits" or
    "probabilities", None what the graph shows; `class_names` are of classification unless a task is named. `mean` to
    `pad_value` say how images are made, see `core.preprocessing`: nothing is guessed, and `predict` needs all
    but the last.
    """

    file: Path
    output_dir: Path = Path("export")
    name: str | None = None
    inputs: Path | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    target: str | None = None
    batch: tuple[int, int, int] | None = None
    seed: int = 0
    task: str | None = None
    output: str | None = None
    class_names: ClassNames | None = None
    mean: PerChannel | float | None = None
    std: PerChannel | float | None = None
    crop_ratio: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    pad_value: PerChannel | float | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.batch is not None and not _rises(self.batch):
            raise InputError(
                f"batch is {self.batch!r}; expected three whole numbers that rise from 1, smallest, typical and "
                "largest, such as (1, 8, 64)."
            )
        if not isinstance(self.sizes, Mapping):
            raise InputError(f"sizes is {self.sizes!r}; expected sizes by the axes' names, such as {{'height': 512}}.")
        if wrong := {name: size for name, size in self.sizes.items() if not _is_count(size)}:
            raise InputError(f"The sizes of axes are whole numbers from 1; got {wrong}.")
        if self.sizes and self.inputs is not None:
            raise InputError(
                f"--size {' '.join(self.sizes)} (sizes) has nothing to size: the arrays of {self.inputs} have their "
                "own sizes. Leave out --size or --inputs (inputs)."
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = () if value is None else (value,) if isinstance(value, int | float) else tuple(value)
            if not all(math.isfinite(number) and (number > 0 or name == "mean") for number in numbers):
                raise InputError(f"{name} must be finite{' and positive' * (name == 'std')}; got {value}.")
        # Of scores an image: the outputs of a dense task are of its own head.
        taken_tasks = [name for name in task_names() if find_task(name).has_classes and not find_task(name).is_dense]
        if self.task is not None and self.task not in taken_tasks:
            find_task(self.task)  # says which tasks there are
            taken = ", ".join(taken_tasks)
            raise InputError(
                f"The task {self.task} says nothing of a file from elsewhere; expected one of {taken}. Leave --task "
                "(task) out for values without a meaning."
            )


def _is_count(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def _rises(batch: Any) -> bool:
    return (
        isinstance(batch, tuple | list) and len(batch) == 3 and all(map(_is_count, batch)) and sorted(batch) == [*batch]
    )


def check_is_onnx(path: Path) -> None:
    """Raise InputError for what is no file, and for weights and engines; what is unknown ONNX itself has to read."""
    if not os.path.exists(path):  # noqa: PTH110 - Path's own raises for a name that no system takes
        raise InputError(f"{path} does not exist. rescue takes an ONNX file.")
    if path.is_dir():
        raise InputError(f"{path} is a folder. rescue takes an ONNX file.")
    kind = kind_of_file(path)
    if kind in ("pickle", "safetensors"):
        raise InputError(f"{path} is a checkpoint: cnx-deploy export --checkpoint {path} makes an ONNX file of it.")
    if kind == "engine":
        raise InputError(f"{path} is {FILE_KINDS[kind][0]}. rescue takes an ONNX file.")


def check_is_foreign(path: Path, facts: GraphFacts) -> None:
    """Raise InputError for a file of our own, by its metadata or by the manifest beside it."""
    origin = facts.metadata.get("cnx_deploy.weights_origin")
    is_ours = any(key.startswith("cnx_deploy.") for key in facts.metadata)
    if not is_ours and (artifact := recorded_artifact(path)) is not None:
        is_ours, origin = True, artifact.manifest.model.weights.origin
    if is_ours and origin == "onnx":
        raise InputError(f"{path} was written by cnx-deploy rescue: it is rescued already. Rescue its original.")
    if is_ours:
        raise InputError(
            f"{path} was written by cnx-deploy export, which makes a better FP16 file itself: export the network with "
            "--precision fp16."
        )


def is_open(axis: int | str) -> bool:
    """Whether an axis has no fixed size."""
    return not isinstance(axis, int) or axis < 1


def _axis_name(axis: int | str, place: int) -> str:
    return str(axis) if axis else f"axis {place}"


def check_axes(request: RescueRequest, facts: GraphFacts) -> None:
    """Raise InputError for a size of an axis that is not open, and for a batch beside the graph's fixed one."""
    axes = [(axis, place) for _, shape in facts.inputs.values() for place, axis in enumerate(shape)]
    names = dict.fromkeys(_axis_name(axis, place) for axis, place in axes if is_open(axis))
    if unknown := [name for name in request.sizes if name not in names]:
        raise InputError(
            f"{request.file.name} has no open axis {', '.join(unknown)}; open are {', '.join(names) or 'none'}."
        )
    fixed = {axis for axis, place in axes if place == 0 and isinstance(axis, int) and axis > 0}
    if request.batch is not None and fixed and {*request.batch} != fixed:
        raise InputError(
            f"{request.file.name} has a fixed batch of {', '.join(map(str, sorted(fixed)))}; got "
            f"{':'.join(map(str, request.batch))}. Leave --batch (batch) out."
        )


def proof_inputs(request: RescueRequest, facts: GraphFacts) -> tuple[list[Arrays], tuple[str, ...]]:
    """The inputs of the proof, at least two samples of each, and what was assumed of them."""
    if request.inputs is not None:
        return [_given_inputs(request.inputs, facts)], (f"The proof ran on {request.inputs}.",)
    assumed: dict[str, int] = {}
    kinds, shapes = {}, {}
    for name, (kind, shape) in facts.inputs.items():
        if kind not in ARRAY_TYPES:
            raise InputError(
                f"The input {name} of {request.file.name} is {kind} {list(shape)}; images and noise stand for "
                f"{', '.join(ARRAY_TYPES)} alone. Give arrays for all inputs with --inputs FILE.npz (inputs)."
            )
        kinds[name] = kind
        shapes[name] = tuple(_size(request, axis, place, len(shape), assumed) for place, axis in enumerate(shape))
    count = 1 if all(shape and shape[0] > 1 for shape in shapes.values()) else 2
    random = np.random.default_rng(request.seed)
    batches = [{name: _array(kinds[name], shapes[name], random) for name in shapes} for _ in range(count)]
    images = [name for name in shapes if _channel_axis(shapes[name]) is not None]
    notes = [f"The proof ran on {'images' if images else 'noise'} from seed {request.seed}."]
    if assumed:
        notes.append("Open axes were taken as " + ", ".join(f"{name} {size}" for name, size in assumed.items()) + ".")
    return batches, tuple(notes)


def _size(request: RescueRequest, axis: int | str, place: int, rank: int, assumed: dict[str, int]) -> int:
    """The size of an axis in the proof: its own, the one that was asked for, or one that is assumed and told."""
    if isinstance(axis, int) and axis > 0:
        return axis
    name = _axis_name(axis, place)
    if name in request.sizes:
        return request.sizes[name]
    assumed[name] = OPEN_BATCH if place == 0 else OPEN_SIDE if rank == 4 else OPEN_LENGTH
    return assumed[name]


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """1 or 3 where a shape is that of images, else None."""
    if len(shape) != 4:
        return None
    return next((axis for axis in (1, 3) if shape[axis] <= MAX_CHANNELS), None)


def _array(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Seeded images, normalised where they are floats; noise of mean 0 and variance 1 for other shapes."""
    axis = _channel_axis(shape)
    if axis is None:
        return random.standard_normal(shape).astype(np.float32)
    height, width = (side for place, side in enumerate(shape) if place not in (0, axis))
    made = image_like_batches(
        shape[0], (height, width), batch_size=shape[0], seed=int(random.integers(1 << 31)), in_chans=shape[axis]
    )
    images = next(iter(made)).numpy()
    images = images if axis == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images if kind == "UINT8" else ((images / 255.0 - MEAN) / STD).astype(np.float32)


def _given_inputs(path: Path, facts: GraphFacts) -> Arrays:
    """The arrays of a file, as many as the graph has inputs. Raises InputError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no .npz file of arrays ({error}). numpy.savez writes one.") from error
    if arrays.keys() != facts.inputs.keys():
        raise InputError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; expected an array for each input: "
            f"{', '.join(facts.inputs)}."
        )
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        kind, shape = facts.inputs[name]
        # An open axis is bound by the first array that has it.
        fits = array.size > 0 and array.ndim == len(shape)
        for axis, size in zip(shape, array.shape, strict=False):
            fits &= size == (sizes.setdefault(axis, size) if isinstance(axis, str) and axis else axis or size)
        element = np.dtype(ir.DataType[kind].numpy())
        if not fits or (array.dtype != element and not array.dtype.kind == element.kind == "f"):
            raise InputError(
                f"{path} holds {name} {array.dtype} {list(array.shape)}; the graph takes {element} {list(shape)}."
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{path} holds NaN or infinity in {name}; the proof needs finite numbers.")
    return {name: as_float(array) for name, array in arrays.items()}


def as_float(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Floats in float32, other types as they are."""
    return array.astype(np.float32) if array.dtype.kind == "f" else array
