"""Weights in and out: read any known checkpoint into the training form, strictly, and write our own.

Our file is safetensors with the reference code's names, float32; its header says what the network is, what may be
done with the weights, and their hash.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from cnx_deploy.core.class_names import ClassNames, check_class_count, names_of
from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, DiskFullError, InputError
from cnx_deploy.core.files import whole_file
from cnx_deploy.core.image_size import MAX_CHANNELS, ImageSize, canonical_size, size_text
from cnx_deploy.core.manifest import SoupFile, TrainingOptions, WeightsRecord
from cnx_deploy.core.preprocessing import ASSUMED, PerChannel, Preprocessing, given_per_channel
from cnx_deploy.core.strict_json import shortened, typed
from cnx_deploy.core.variants import ALL_VARIANTS, VARIANTS, Variant, find_variant
from cnx_deploy.model.convnextv2 import ConvNeXtV2, create_model, random_model
from cnx_deploy.model.layouts import (
    TOP,
    difference_table,
    format_shape,
    official_state,
    shape_differences,
    state_for,
    structure_of,
    variant_with_structure,
)
from cnx_deploy.model.pretrained import PRETRAINED_LICENCE, fetch_pretrained, variant_name_of_tag
from cnx_deploy.model.source_config import SourceConfig, config_beside, config_within, licence_beside, weights_in
from cnx_deploy.model.tasks.base import Task, find_task
from cnx_deploy.model.weight_files import METADATA_KEY, WeightFile, read_weight_file

__all__ = [
    "LoadedModel", "ModelRequest", "adapt_stem", "hash_weights", "load_checkpoint", "load_pretrained", "mean_of",
    "resolve_model",
    "save_checkpoint",
]  # fmt: skip

FORMAT_VERSION = 1
RANDOM_LICENCE = "none (random weights)"
FOREIGN_LICENCE = "unknown (foreign checkpoint; the published ConvNeXt V2 weights are CC-BY-NC-4.0)"
HEAD_SEED = 0
NOTHING: Mapping[str, Any] = MappingProxyType({})
STEM = "downsample_layers.0.0.weight"
# The white level is the file's, not the weights'; padding is the mean colour unless somebody says otherwise.
_ASSUMED = {each.name: ASSUMED for each in fields(Preprocessing) if each.name not in ("white_level", "pad_value")}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode and what is known of its weights.

    Attributes:
        class_names: names in the order of the classes; None when unknown.
        preprocessing: how images are made.
        origins: where class names and fields of the preprocessing come from, by name; "assumed" for a default that
            nothing beside trained weights contradicts. Empty for random weights.
        head_is_new: the head was drawn at random.
        problem: why what lies beside the weights cannot be followed; who makes images as it says raises it.
        training: loss and sampling of the training, where they are not the usual ones.
        notes: what was chosen or made while loading: the layout, the entry of the file, averaged or plain weights, what
            was set aside, a new head.
    """

    model: ConvNeXtV2
    weights: WeightsRecord
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    origins: Mapping[str, str] = field(default_factory=dict)
    head_is_new: bool = False
    notes: tuple[str, ...] = ()
    problem: str | None = None
    training: TrainingOptions = field(default_factory=dict)

    def told_of_images(self) -> tuple[str, ...]:
        """Say where class names and preprocessing were read, and what is assumed; InputError for a `problem`."""
        if self.problem is not None:
            raise InputError(
                f"{self.problem} Or say how images are made by an export with all of "
                f"{', '.join('--' + name.replace('_', '-') for name in _ASSUMED)}."
            )
        read = {name: place for name, place in self.origins.items() if name != "in_chans"}
        places = [place for place in read.values() if place not in ("header", "option", ASSUMED)]
        lines = [
            f"{', '.join(name for name, where in read.items() if where == place)} from {place}"
            for place in dict.fromkeys(places)
        ]
        return (*lines, *filter(None, (self.preprocessing.assumption(self.origins),)))

    def check_canvas(self, image_size: ImageSize) -> None:
        """Raise InputError for another size of images than a dense task was trained with, where that is known."""
        recorded, place = self.preprocessing.image_size, self.origins.get("image_size", ASSUMED)
        if self.model.task.is_dense and place != ASSUMED and canonical_size(image_size) != recorded:
            raise InputError(
                f"The canvas of {self.weights.reference} is {size_text(recorded)} ({place}), and "
                f"{size_text(image_size)} was asked for: it belongs to the weights, for GRN sums over all of it, "
                "padding included. Leave --image-size (image_size) out, or train on from them at the other size."
            )


def load_checkpoint(
    path: Path | str,
    variant: Variant | str | None = None,
    *,
    num_classes: int | None = None,
    reset_head: bool = False,
    ema: bool | None = None,
    entry: str | None = None,
    task: str | None = None,
    in_chans: int | None = None,
    soup: Sequence[Path | str] = (),
    task_options: Mapping[str, Any] = NOTHING,
) -> LoadedModel:
    """Read a checkpoint in any layout of `model.layouts`, under any wrapping, into a model.

    `variant` None takes the known one, V2 or V1, whose shapes the file has. `num_classes` None takes the file's.
    `path` may be a folder that timm or transformers wrote: see `model.source_config` for what is read beside weights.
    `reset_head` draws a new head (truncated normal 0.02, fixed seed). `task` None takes the header's, else
    classification. `in_chans` other than the file's adapts a stem of 3 channels as timm does, see `adapt_stem`.
    `task_options` are fields of the task's `config` in place of what the file says or its shapes tell.
    `ema` and `entry` choose among several networks, see `weight_files.read_weight_file`, also for what a file can have
    wrong. `soup` names more checkpoints, read alike: the weights are the mean of all (`mean_of`).
    Raises CheckpointError when the weights do not fit the model exactly.
    """
    words: dict[str, Any] = {"num_classes": num_classes, "reset_head": reset_head, "ema": ema, "entry": entry}
    words |= {"task": task, "in_chans": in_chans, "task_options": task_options}

    def loaded() -> Iterator[LoadedModel]:
        yield _load_file(path, variant, **words)
        for other in soup:
            try:
                yield _load_file(other, variant, **words)
            except CheckpointError as error:
                raise CheckpointError(f"{other} cannot be averaged with {path}. {error}") from error

    return mean_of(loaded())


def mean_of(models: Iterable[LoadedModel]) -> LoadedModel:
    """Average the weights of several checkpoints of one network in float64; the first model is changed and returned.

    Source: Wortsman et al., "Model soups", arXiv:2203.05482, the uniform soup: networks fine-tuned from one start.
    Raises CheckpointError, which names both files and the tensor or field, where they are not of one network.
    """
    rest = iter(models)
    first = next(rest)
    own, sums = first.model.state_dict(), dict[str, Tensor]()
    files, notes, problem = [first.weights], list(first.notes), first.problem
    for other in rest:
        _check_same_network(first, other)
        # Sums of float32 are exact in float64 for as many equal files as anybody has: their mean is the file.
        sums = sums or {name: tensor.double() for name, tensor in own.items() if tensor.is_floating_point()}
        theirs = other.model.state_dict()
        for name, total in sums.items():
            total += theirs[name]
        files.append(other.weights)
        notes += [f"{other.weights.reference}: {note}" for note in other.notes if note not in first.notes]
        problem = problem or other.problem
    if len(files) == 1:
        return first
    if first.model.task.thresholds is not None:
        first.model.task = find_task(first.model.task.name)
        notes.append("the thresholds of the files are left out: the mean is another network. Fit them again.")
    first.model.load_state_dict({**own, **{name: total / len(files) for name, total in sums.items()}})
    record = replace(
        first.weights,
        sha256=hash_weights(first.model),
        licence="; ".join(dict.fromkeys(file.licence for file in files)),
        soup=tuple(SoupFile(file.reference, file.sha256, file.entry) for file in files),
    )
    notes.insert(0, f"the mean of {len(files)} checkpoints: {', '.join(file.reference for file in files)}")
    return replace(first, weights=record, notes=tuple(notes), problem=problem)


def _load_file(
    path: Path | str,
    variant: Variant | str | None,
    *,
    num_classes: int | None,
    reset_head: bool,
    ema: bool | None,
    entry: str | None,
    task: str | None,
    in_chans: int | None,
    task_options: Mapping[str, Any],
) -> LoadedModel:
    path, wanted = Path(path), find_variant(variant) if isinstance(variant, str) else variant
    path = weights_in(path) if path.is_dir() else path
    modules = _head_modules(find_task(task or "classification"))
    file = read_weight_file(path, ema=ema, entry=entry, modules=modules, task=task)
    layout, state = official_state(file.tensors, str(path))
    _check_own_metadata(file, state, path)
    purpose = find_task(task or file.metadata.get("task") or file.task or "classification")
    config, problem = _config_of(file, path)
    _check_same_task(purpose, file, reset_head=reset_head, where=str(path))
    if purpose.name == file.metadata.get("task"):
        purpose = purpose.configured(file.metadata.get("task_config", {}))
        purpose = purpose if reset_head else purpose.with_thresholds(file.metadata.get("thresholds"))
    aside = "".join(f" ({note})" for note in file.notes if note.startswith("set aside"))
    found = _variant_of(state, wanted, where=str(path))
    state, told = purpose.own_state(state, found)
    # A toolbox's own values of what its weights are made for, then what lies beside them says, then the caller.
    purpose = purpose.fitted(state)
    if file.heads is not None:
        purpose = purpose.configured(purpose.conventions.get(file.heads, {})).configured(config.task_options)
    purpose = purpose.configured(task_options)
    classes = _class_count(purpose, state, num_classes, reset_head=reset_head, where=str(path), aside=aside)
    notes = [f"layout {layout}", *file.notes, *told]
    if file.heads is not None:
        notes[0] += f" with heads of {file.heads}: the task is {purpose.name}{_options_text(purpose)}"
    if layout == "fcmae" and len(state) < len(file.tensors):
        notes.append("the decoder of the masked autoencoder is left out")
    if reset_head:
        state = _with_new_head(purpose, state, found, classes)
        notes.append(f"new head for {classes} classes, drawn at random: train it before it is used")
    state, adapted = adapt_stem(state, in_chans, where=str(path))
    model = _filled_model(purpose, found, classes, state, where=str(path))
    licence = file.metadata.get("licence") or licence_beside(path) or FOREIGN_LICENCE
    if config.class_names and (reset_head or len(config.class_names) != model.num_classes):
        reason = "the head is new" if reset_head else f"there are {model.num_classes or 'no'} classes"
        notes.append(f"{len(config.class_names)} class names are left out, for {reason}")
        config = config.without_class_names()
    # Where a choice was made, the record leads back to the same network of the file.
    place = None if ema is None and entry is None else file.entry or TOP
    record = WeightsRecord("checkpoint", path.as_posix(), hash_weights(model), licence, place)
    loaded = LoadedModel(
        model, record, config.class_names, _preprocessing_of(config, purpose, path), {**_ASSUMED, **config.origins},
        head_is_new=reset_head, notes=tuple(notes), problem=problem, training=file.metadata.get("training", {}),
    )  # fmt: skip
    return _with_channels(loaded, adapted)


def load_pretrained(
    tag: str,
    *,
    num_classes: int | None = None,
    reset_head: bool = False,
    cache_dir: Path | None = None,
    task: str | None = None,
    in_chans: int | None = None,
    task_options: Mapping[str, Any] = NOTHING,
) -> LoadedModel:
    """Load published weights by timm's name, from the model hub's cache or the network.

    A tag that ends in `.fcmae` has no head, so it takes `reset_head` and `num_classes`. See `fetch_pretrained` and
    `load_checkpoint` for what is raised.
    """
    files = fetch_pretrained(tag, cache_dir)
    needs_head = find_task(task or "classification").has_classes
    if files.num_classes is None and needs_head and not (reset_head and num_classes):
        raise CheckpointError(
            f"{tag} was pre-trained without a head. Add --reset-head --num-classes N (reset_head and num_classes) for "
            "a new head, or use a fine-tuned tag (fcmae_ft_…)."
        )
    expected = num_classes if num_classes is not None or not needs_head else files.num_classes
    variant = variant_name_of_tag(tag)
    how: dict[str, Any] = {"reset_head": reset_head, "task": task, "in_chans": in_chans, "task_options": task_options}
    loaded = load_checkpoint(files.weights, variant, num_classes=expected, **how)
    record = WeightsRecord("pretrained", tag, loaded.weights.sha256, PRETRAINED_LICENCE)
    return replace(loaded, weights=record)


def resolve_model(
    variant: Variant | str | None,
    *,
    checkpoint: Path | str | None = None,
    pretrained: str | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    reset_head: bool = False,
    ema: bool | None = None,
    entry: str | None = None,
    task: str | None = None,
    in_chans: int | None = None,
    soup: Sequence[Path | str] = (),
    task_options: Mapping[str, Any] = NOTHING,
) -> LoadedModel:
    """Load a checkpoint or published weights, or, given neither, draw weights at random from `seed`.

    `ema` and `entry` choose among several networks of a checkpoint, which is averaged with those of `soup`. `task` None
    is the checkpoint's own, else classification. `in_chans` None is the checkpoint's, else 3. Raises InputError when
    both are given, when a tag is of another variant, when random weights get no variant, or when there is a choice or a
    soup and no checkpoint.
    """
    if checkpoint is not None and pretrained is not None:
        raise InputError("Both a checkpoint and pretrained weights were given, expected one source. Leave one out.")
    words: dict[str, Any] = {"num_classes": num_classes, "reset_head": reset_head, "task": task, "in_chans": in_chans}
    words["task_options"] = task_options
    if checkpoint is not None:
        return load_checkpoint(checkpoint, variant, ema=ema, entry=entry, soup=soup, **words)
    if ema is not None or entry is not None or soup:
        raise InputError(
            "--ema, --no-ema (ema) and --entry (entry) choose among the weights of a checkpoint, and --soup (soup) "
            "averages with it: add one with --checkpoint."
        )
    name = variant.name if isinstance(variant, Variant) else variant
    if pretrained is not None:
        if name not in (None, variant_name_of_tag(pretrained)):
            raise InputError(f"{pretrained} is not of variant {name!r}. Take a tag that begins convnextv2_{name}.")
        return load_pretrained(pretrained, **words)
    if variant is None or reset_head:
        raise InputError(
            f"Random weights need a variant and have no head to replace; the variant is {name} and reset_head is "
            f"{reset_head}. The variants are {', '.join(VARIANTS)}; a checkpoint names its own."
        )
    classes = 1000 if num_classes is None else num_classes
    if num_classes and task is not None and not find_task(task).has_classes:
        raise InputError(f"The task {task} has no classes. Leave --num-classes (num_classes) out.")
    purpose = find_task(task or "classification").configured(task_options)
    model = random_model(variant, classes, seed=seed, task=purpose, in_chans=in_chans or 3)
    record = WeightsRecord("random", str(seed), hash_weights(model), RANDOM_LICENCE)
    return LoadedModel(model, record, preprocessing=Preprocessing().for_channels(model.in_chans))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """Which weights a command takes, and how images are made: a checkpoint, published ones, or random ones by `seed`.

    See `resolve_model`, also for `ema`, `entry` and `soup`. Class names and fields of `Preprocessing` take the place of
    what lies beside the weights; None leaves that as it is.
    """

    variant: str | None = None
    checkpoint: Path | None = None
    pretrained: str | None = None
    seed: int = 0
    task: str | None = None
    num_classes: int | None = None
    reset_head: bool = False
    ema: bool | None = None
    entry: str | None = None
    soup: tuple[Path, ...] = ()
    image_size: ImageSize | None = None
    crop_ratio: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    mean: PerChannel | float | None = None
    std: PerChannel | float | None = None
    pad_value: PerChannel | float | None = None
    in_chans: int | None = None
    class_names: ClassNames | None = None
    task_options: Mapping[str, Any] = field(default_factory=dict)

    def load(self, note: Callable[[str], None]) -> tuple[LoadedModel, Preprocessing]:
        """The model and how its images are made; `note` is told what was chosen or made, and of random weights."""
        loaded = resolve_model(
            self.variant, checkpoint=self.checkpoint, pretrained=self.pretrained, seed=self.seed,
            num_classes=self.num_classes, reset_head=self.reset_head, ema=self.ema, entry=self.entry, task=self.task,
            in_chans=self.in_chans, soup=self.soup, task_options=self.task_options,
        )  # fmt: skip
        for text in loaded.notes:
            note(f"Note: {text}")
        if loaded.weights.origin == "random":
            # A fresh network has these without effect; random weights give them one.
            included = "GRN" if loaded.model.variant.version == 2 else "LayerScale"
            note(f"No checkpoint: weights are random (seed {self.seed}), {included} included. Results mean nothing.")
        loaded = self._with_options(loaded)
        for text in loaded.told_of_images():
            note(text if text.startswith("Assumed") else f"Note: {text}")
        return loaded, loaded.preprocessing

    def _with_options(self, loaded: LoadedModel) -> LoadedModel:
        """What the options say in the place of what was read."""
        given = {name: value for name in (*_ASSUMED, "pad_value") if (value := getattr(self, name)) is not None}
        for name in given.keys() & {"mean", "std", "pad_value"}:  # one number is that of every channel
            given[name] = given_per_channel(given[name], loaded.model.in_chans)
        origins = {**loaded.origins, **dict.fromkeys(given, "option")} if loaded.origins else loaded.origins
        if self.image_size is not None:
            loaded.check_canvas(self.image_size)
        names = loaded.class_names
        if (told := names_of(self.class_names)) is not None:
            names, origins = told, {**origins, "class_names": "option"}
            check_class_count(names, loaded.model.num_classes, f"{self.checkpoint or self.pretrained or 'the network'}")
        preprocessing = replace(loaded.preprocessing, **given)
        problem = None if given.keys() >= _ASSUMED.keys() else loaded.problem
        return replace(loaded, class_names=names, preprocessing=preprocessing, origins=origins, problem=problem)


def adapt_stem(state: dict[str, Tensor], in_chans: int | None, *, where: str) -> tuple[dict[str, Tensor], int | None]:
    """The weights for images of another number of channels, and the number they were for; None where it is the same.

    timm's rule (`timm.models.adapt_input_conv`): one channel gets the sum over RGB; of others each repeats the weights
    of R, G and B in turn, times 3 / `in_chans`. Raises CheckpointError for a stem that is not of 3 channels.
    """
    weight = state.get(STEM)
    if weight is None or weight.ndim != 4 or in_chans in (None, found := weight.shape[1]):
        return state, None
    if found != 3:
        raise CheckpointError(
            f"{where} takes images of {found} channels, and {in_chans} were asked for: only weights for 3 channels can "
            f"be adapted. Ask for its own, --in-chans {found} (in_chans)."
        )
    if not 1 <= in_chans <= MAX_CHANNELS:
        raise InputError(f"in_chans is {in_chans}; images have 1 to {MAX_CHANNELS} channels.")
    if in_chans == 1:
        adapted = weight.sum(dim=1, keepdim=True)
    else:
        adapted = weight.repeat(1, math.ceil(in_chans / 3), 1, 1)[:, :in_chans] * (3 / in_chans)
    return {**state, STEM: adapted}, found


def _with_channels(loaded: LoadedModel, adapted: int | None) -> LoadedModel:
    """Mean and std for as many channels as the network takes; where others were stated, they are assumed."""
    preprocessing, channels, notes = loaded.preprocessing, loaded.model.in_chans, list(loaded.notes)
    origins = dict(loaded.origins)
    if adapted is not None:
        notes.append(f"the stem is adapted from {adapted} channels to {channels}, as timm does; train it further")
        origins["in_chans"] = f"adapted from {adapted}"
    if preprocessing.in_chans != channels:
        for name in ("mean", "std"):
            if len(set(getattr(preprocessing, name))) > 1:
                origins[name] = ASSUMED
        preprocessing = preprocessing.for_channels(channels)
    return replace(loaded, preprocessing=preprocessing, notes=tuple(notes), origins=origins)


def save_checkpoint(
    path: Path | str,
    model: ConvNeXtV2,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    licence: str = "MIT",
    extra: Mapping[str, Any] | None = None,
    thresholds: Sequence[float] | None = None,
    library: Literal["timm", "transformers"] | None = None,
) -> Path:
    """Write a model as `.safetensors`, float32, whole or not at all; the same arguments give the same bytes.

    `extra` goes into the header as it is. `thresholds` None takes those of the model's task, where it has any.
    `library`: whose names the tensors have; None is the reference code's. An existing file is replaced. Raises
    InputError when the path cannot be written, has another suffix, or the class names are not one a class.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no name for a checkpoint of ours: expected the suffix .safetensors. Rename it.")
    if class_names is not None and len(class_names) != model.num_classes:
        raise InputError(
            f"The model has {model.num_classes} classes and class_names has {len(class_names)} names; each class needs "
            "one name."
        )
    state = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in model.state_dict().items()}
    known = {
        "format_version": FORMAT_VERSION,
        "variant": model.variant.name,
        "task": model.task.name,
        "num_classes": model.num_classes,
        "class_names": None if class_names is None else list(class_names),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "licence": licence,
        "weights_sha256": _hash_tensors(state),
    }
    if model.task.options:
        known["task_config"] = model.task.options
    if (cuts := thresholds or model.task.thresholds) is not None:
        known["thresholds"] = list(cuts)
    if clash := sorted(known.keys() & (extra or {}).keys()):
        raise InputError(f"The header already has {', '.join(clash)}: expected other names in extra. Rename them.")
    header = json.dumps({**known, **(extra or {})}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    named = state if library is None else state_for(library, state, version=model.variant.version)
    # Earlier transformers takes a file of format pt and no other: so it takes its own, and refuses one of timm's names,
    # of which it would keep nothing and say so in a warning alone.
    formats = {"format": "pt"} if library == "transformers" else {}
    _write_whole(path, named, {METADATA_KEY: header, **formats})
    return path


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over the sorted names, types, shapes and bytes of a state dict; the same in every file format."""
    return _hash_tensors(model.state_dict())


def _hash_tensors(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {format_shape(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_whole(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    size = sum(tensor.nbytes for tensor in state.values())
    try:
        with whole_file(path, needed_bytes=size) as temporary:
            save_file(state, temporary, metadata)
            if len(metadata) > 1:
                _sort_entries(temporary)
            temporary.chmod(0o644)  # the library makes files that only their owner can read
    except SafetensorError as error:  # the library has no other word for a full disk
        raise DiskFullError(
            f"Cannot write {path} ({error}): expected room for {size / 1e6:,.1f} MB. Free some, or choose another "
            "place."
        ) from error


def _sort_entries(path: Path) -> None:
    """Put the entries of a safetensors header into order: the library writes several in another order each time."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(content) <= length, "the library writes its header as compactly as JSON can be"
        stream.seek(8)
        stream.write(content.ljust(length))


def _check_same_network(one: LoadedModel, other: LoadedModel) -> None:
    """Raise CheckpointError with the first field or tensor in which two models differ, and the files of both."""
    own, theirs = one.model.state_dict(), other.model.state_dict()
    mine, others = one.preprocessing, other.preprocessing
    pairs: list[tuple[str, Any, Any]] = [
        ("variant", one.model.variant.name, other.model.variant.name),
        ("task", one.model.task.name, other.model.task.name),
        ("class_names", one.class_names, other.class_names),
        *((each.name, getattr(mine, each.name), getattr(others, each.name)) for each in fields(Preprocessing)),
        *(
            (entry.name, format_shape(entry.in_model), format_shape(entry.in_file))
            for entry in shape_differences(theirs, own)
        ),
    ]
    for name, here, there in pairs:
        if here != there:
            raise CheckpointError(
                f"{one.weights.reference} and {other.weights.reference} are not of one network: {name} is "
                f"{shortened(here)} in the first and {shortened(there)} in the second. A soup averages copies of one "
                "network that were trained further; leave the other file out."
            )
    for name, tensor in own.items():
        is_count = name.endswith("num_batches_tracked")  # which a batch norm of constant momentum does not use
        if not is_count and not tensor.is_floating_point() and not torch.equal(tensor, theirs[name]):
            raise CheckpointError(
                f"{one.weights.reference} and {other.weights.reference} differ in {name}, which holds no fractions "
                "and has no mean. Leave one of them out."
            )


def _head_modules(task: Task) -> tuple[str, ...]:
    """The names of a task's modules, which are the same in every size."""
    with torch.device("meta"):
        return tuple(task.modules(VARIANTS["atto"], 1))


def _check_same_task(task: Task, file: WeightFile, *, reset_head: bool, where: str) -> None:
    """Raise CheckpointError where classes are asked of a dense network for another task, without a new head."""
    if file.task is not None and file.task != task.name and task.has_classes and not reset_head:
        raise CheckpointError(
            f"{where} is a network of the task {file.task} by its heads, and {task.name} was asked for. Leave --task "
            "(task) out; or add --reset-head --num-classes N (reset_head and num_classes) for a new head on its "
            "backbone."
        )


def _options_text(task: Task) -> str:
    told = ", ".join(f"{name} {value}" for name, value in task.options.items())
    return f" ({told})" if told else ""


def _check_own_metadata(file: WeightFile, state: Mapping[str, Tensor], path: Path) -> None:
    """Nothing for foreign files. A file of ours must be of this format, with the weights and names it was given."""
    if not file.metadata:
        return
    if file.metadata.get("format_version") != FORMAT_VERSION or file.metadata.get("format_version") is True:
        raise CheckpointError(
            f"{path} has format version {file.metadata.get('format_version')!r:.40}, this version of cnx-deploy reads "
            f"{FORMAT_VERSION}. Use the version that wrote it."
        )
    names = file.metadata.get("class_names")
    _check_header_types(file.metadata, path)
    classes = find_task(file.metadata.get("task", "classification")).num_classes_in(state)
    if file.metadata.get("weights_sha256") != _hash_tensors(state):
        raise CorruptArtifactError(f"{path} was altered: its weights are not those its header names. Fetch it again.")
    cuts = file.metadata.get("thresholds")
    if cuts is not None and (len(cuts) != classes or not all(0 < value < 1 for value in cuts)):
        raise CorruptArtifactError(
            f"{path} has {len(cuts)} thresholds that are not one probability a label. Write it again."
        )
    if names is not None and len(names) != classes:
        raise CorruptArtifactError(
            f"{path} has {len(names)} class names, which is not its class count. Write it again."
        )


def _check_header_types(header: Mapping[str, Any], path: Path) -> None:
    """Raise CorruptArtifactError for entries that are read later and are not what they should be."""
    names, licence, preprocessing = (
        header.get(name, default) for name, default in (("class_names", None), ("licence", ""), ("preprocessing", None))
    )
    named = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
    expected = {
        "class_names": (named, "a list of names"),
        "licence": (isinstance(licence, str), "a text"),
        "task": (isinstance(header.get("task", ""), str), "a text"),
        "preprocessing": (preprocessing is None or isinstance(preprocessing, dict), "an object"),
        "training": (_fits(header.get("training", {}), TrainingOptions), "words, numbers and weights by class"),
        "task_config": (_fits(header.get("task_config", {}), dict[str, Any]), "an object"),
        "thresholds": (_fits(header.get("thresholds", []), list[float]), "a list of probabilities"),
    }
    for name, (holds, what) in expected.items():
        if not holds:
            raise CorruptArtifactError(
                f"{path} has {header.get(name)!r:.80} as {name} in its header, expected {what}. Write it again."
            )


def _fits(value: Any, kind: Any) -> bool:
    try:
        typed(value, kind)
    except ValueError:
        return False
    return True


def _config_of(file: WeightFile, path: Path) -> tuple[SourceConfig, str | None]:
    """What is known of a file's class names and preprocessing: from its own header, else from what lies beside it.

    The second is why something of it cannot be followed: weights are read without it, images are not made.
    """
    if not file.metadata:
        config, problem = SourceConfig(), None
        readers: tuple[Callable[[], SourceConfig], ...] = (
            lambda: config_within(file.beside, str(path)), lambda: config_beside(path)
        )  # fmt: skip
        for read in readers:
            try:
                more = config | read()
                Preprocessing.from_dict(more.preprocessing)
                config = more
            except InputError as error:
                problem = problem or str(error)
        return config, problem
    names, preprocessing = file.metadata.get("class_names"), file.metadata.get("preprocessing")
    origins = {"class_names": "header"} if names else {}
    if preprocessing is not None:
        origins |= dict.fromkeys(_ASSUMED, "header")
    return SourceConfig(tuple(names) if names else None, preprocessing or {}, origins), None


def _preprocessing_of(config: SourceConfig, task: Task, path: Path) -> Preprocessing:
    """How images are made as the files say, and for the rest as the task is trained."""
    stated = config.preprocessing
    # A dense task keeps the whole picture: a centre crop would leave its edge without an answer.
    says_crop = "crop_mode" in stated or "crop_ratio" in stated
    usual = ("interpolation",) if says_crop else ("interpolation", "crop_mode", "crop_ratio")
    defaults = {name: task.training_defaults[name] for name in usual if name in task.training_defaults}
    try:
        return Preprocessing.from_dict({**defaults, **stated})
    except InputError as error:
        raise CorruptArtifactError(f"{path} has preprocessing that cannot be used. {error}") from error


def _class_count(
    task: Task, state: Mapping[str, Tensor], num_classes: int | None, *, reset_head: bool, where: str, aside: str
) -> int:
    found = task.num_classes_in(state)
    if not task.has_classes:
        if num_classes or reset_head:
            raise InputError(
                f"The task {task.name} has no classes. Leave --num-classes and --reset-head (num_classes, reset_head) "
                "out."
            )
        return 0
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes is {num_classes}; a classifier needs at least 1.")
    if reset_head and (num_classes or found):
        return num_classes or found or 0
    if found is None:
        raise CheckpointError(
            f"{where} has no {task.name} head, as backbones and FCMAE pre-training have none{aside}. Add --reset-head "
            "--num-classes N (reset_head and num_classes) for a new head."
        )
    if num_classes not in (None, found):
        raise CheckpointError(
            f"{where} has {found} classes, and {num_classes} were asked for or are in the data. Add --reset-head "
            "(reset_head) for a new head, which has to be trained, as `train --init` does by itself; or leave out "
            "--num-classes (num_classes)."
        )
    return found


def _variant_of(state: Mapping[str, Tensor], wanted: Variant | None, *, where: str) -> Variant:
    structure = structure_of(state)
    found = wanted or variant_with_structure(structure)
    if found is None:
        shown = f"depths {structure[0]} and widths {structure[1]}" if structure else "no complete stage"
        raise CheckpointError(
            f"{where} has {shown}, which is none of the known variants ({', '.join(ALL_VARIANTS)}). "
            "A size of your own is added with register_variant."
        )
    return found


def _with_new_head(task: Task, state: Mapping[str, Tensor], variant: Variant, num_classes: int) -> dict[str, Tensor]:
    """Replace the head; add other modules of the task, such as the final norm, where pre-training left none."""
    generator = torch.Generator().manual_seed(HEAD_SEED)
    prefixes = tuple(f"{layer}." for layer in task.class_layers)
    kept, fresh = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}, {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(HEAD_SEED)
        modules = task.modules(variant, num_classes)
    for module_name, module in modules.items():
        own = {f"{module_name}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
        others = {name: tensor for name, tensor in own.items() if not name.startswith(prefixes)}
        if len(kept) < len(state) or others.keys() & kept.keys():
            own = {name: own[name] for name in own if name not in others}  # a file with half of the rest is faulty
        for name, tensor in own.items():
            if task.draws_own_weights:
                continue
            if tensor.ndim > 1:
                nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
            elif name.endswith("bias"):
                tensor.zero_()
        fresh.update(own)
    return {**kept, **fresh}


def _filled_model(
    task: Task, variant: Variant, num_classes: int, state: Mapping[str, Tensor], *, where: str
) -> ConvNeXtV2:
    stem = state.get(STEM)
    channels = stem.shape[1] if stem is not None and stem.ndim == 4 and 1 <= stem.shape[1] <= MAX_CHANNELS else 3
    with torch.device("meta"):
        model = create_model(variant, num_classes, task=task, in_chans=channels)
    if differences := shape_differences(state, model.state_dict()):
        first = next((each for each in differences if each.problem == "shape"), differences[0])
        found = variant_with_structure(structure_of(state))
        hint = f"Its shapes are those of {found.name!r}." if found not in (None, variant) else "Check what wrote it."
        raise CheckpointError(
            f"{where} does not fit {variant.name!r}: {first.name} is {format_shape(first.in_file)} in the file, "
            f"{format_shape(first.in_model)} in the model. {hint}\n{difference_table(differences)}"
        )
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(state)  # strict, and a copy: nothing refers to the file any more
    return model
