"""What lies beside foreign weights: class names and preprocessing, as the code that trained them wrote them down.

timm and transformers write `config.json` and `preprocessor_config.json` into the folder of the weights; the training
scripts of timm, torchvision and the paper, mmengine and Lightning write entries into the checkpoint itself. A field
that changes pixels is honoured or refused by name; one that nobody wrote down stays open, and who uses it says that it
is assumed.

Sources: timm `timm.data.resolve_data_config` and `timm.models._hub.save_config_for_hf`; transformers
`image_processing_convnext` and `image_processing_backends`; facebookresearch/ConvNeXt-V2 `datasets.py`;
pytorch/vision `references/classification`; mmengine `CheckpointHook`.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cnx_deploy.core.class_names import ordered_names
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.image_size import MAX_CHANNELS, ImageSize, canonical_size, sides
from cnx_deploy.core.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from cnx_deploy.core.strict_json import bounded_content, shortened, strict_json

__all__ = [
    "CONFIG",
    "PROCESSOR",
    "PROCESSORS",
    "TIMM_DEFAULT",
    "WEIGHT_NAMES",
    "SourceConfig",
    "config_beside",
    "config_within",
    "json_object",
    "licence_beside",
    "timm_config",
    "transformers_processor",
    "weights_in",
]

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
"""What timm and transformers call the file of weights in a folder."""
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
TIMM_DEFAULT = "timm's default"
"""Where a field comes from that timm's configuration leaves out."""
FAMILIES = ("convnext", "convnextv2")
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters by their number, as transformers writes them."""
NAME_KEYS = ("class_names", "classes", "CLASSES", "label_names", "id2label", "class_to_idx", "idx_to_class")
"""Entries under which class names are kept in checkpoints; the order is that of the search."""
INDEXED_KEYS = ("id2label", "class_to_idx", "idx_to_class")
INCEPTION = (0.5, 0.5, 0.5)
_STEPS = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "ConvNext": {
        **_STEPS, "size": {"shortest_edge": 384}, "crop_pct": 224 / 256, "resample": 3,
        "image_mean": INCEPTION, "image_std": INCEPTION,
    },
    "ViT": {
        **_STEPS, "size": {"height": 224, "width": 224}, "resample": 2, "image_mean": INCEPTION, "image_std": INCEPTION,
    },
    "Bit": {
        **_STEPS, "do_center_crop": True, "size": {"shortest_edge": 224}, "crop_size": 224, "resample": 3,
        "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    "Segformer": {
        **_STEPS, "size": {"height": 512, "width": 512}, "resample": 2, "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    },
}  # fmt: skip
"""transformers' processors by the beginning of their class's name, and the defaults of each class."""


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Class names, and fields of `Preprocessing` by name; `origins` says where each of them was read.

    `task_options`: fields of the task's `config`, see `model.tasks.base.Task`.
    """

    class_names: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    task_options: Mapping[str, Any] = field(default_factory=dict)

    def __or__(self, other: "SourceConfig") -> "SourceConfig":
        """This one, and what `other` knows besides."""
        return SourceConfig(
            other.class_names if self.class_names is None else self.class_names,
            {**other.preprocessing, **self.preprocessing},
            {**other.origins, **self.origins},
            {**other.task_options, **self.task_options},
        )

    def without_class_names(self) -> "SourceConfig":
        """The same without them."""
        origins = {name: origin for name, origin in self.origins.items() if name != "class_names"}
        return replace(self, class_names=None, origins=origins)


def weights_in(folder: Path) -> Path:
    """Find the file of weights in a folder that timm's or transformers' `save_pretrained` wrote.

    Raises InputError where there is none, or the weights are divided among several files.
    """
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    if shards := sorted(path.name for path in folder.glob("*.index.json")):
        raise InputError(
            f"{folder} has its weights in several files ({shards[0]}): expected one. Save them again with "
            "max_shard_size='100GB'."
        )
    raise InputError(
        f"{folder} is a folder without weights: expected {' or '.join(WEIGHT_NAMES)} in it, or the path of a "
        "checkpoint. Check the path."
    )


def config_beside(weights: Path) -> SourceConfig:
    """Read what `config.json` and `preprocessor_config.json` in the folder of `weights` say of them.

    A configuration of something else than a ConvNeXt is left alone. Raises InputError for a field that cannot be
    honoured, CorruptArtifactError for a file that is no JSON object.
    """
    config, processor = (json_object(weights.parent / name) for name in (CONFIG, PROCESSOR))
    found = SourceConfig()
    if config is not None and "architecture" in config:  # timm
        if str(config["architecture"]).startswith("convnext"):
            found = timm_config(config, f"{weights.parent / CONFIG}")
    elif config is not None and config.get("model_type") in FAMILIES:
        where = f"{weights.parent / CONFIG}"
        _check_network(config, where)
        found = _named(_label_names(config.get("id2label"), where), CONFIG)
    elif config is not None and config.get("model_type") == "upernet":
        found = _upernet(config, f"{weights.parent / CONFIG}")
    elif config is not None:
        return found
    if processor is not None and (config is None or "architecture" not in config):
        fields = transformers_processor(processor, f"{weights.parent / PROCESSOR}")
        found |= SourceConfig(None, fields, dict.fromkeys(fields, PROCESSOR))
    return found


def licence_beside(weights: Path) -> str | None:
    """The `license` that timm's `config.json` beside `weights` states, and where it was read; None without one."""
    try:
        config = json_object(weights.parent / CONFIG) or {}
    except (InputError, CorruptArtifactError):  # whoever reads the rest of it says so
        return None
    data = config.get("pretrained_cfg") or config
    stated = data.get("license") if isinstance(data, Mapping) and "architecture" in config else None
    return f"{stated} ({CONFIG})" if isinstance(stated, str) and stated else None


def config_within(entries: Mapping[str, Any], where: str) -> SourceConfig:
    """Read what the entries of a checkpoint beside its weights say of them.

    Args:
        entries: the entries by name: `args` of timm, torchvision and the official code, mmengine's `meta`, Lightning's
            `hyper_parameters`, or class names under one of `NAME_KEYS`.
        where: the file, for messages.
    """
    found = SourceConfig()
    args = entries.get("args")
    if isinstance(args, argparse.Namespace | dict):
        told = dict(vars(args) if isinstance(args, argparse.Namespace) else args)
        is_official = isinstance(told.get("imagenet_default_mean_and_std"), bool)
        read = _official_args if is_official else _torchvision_args if "val_crop_size" in told else _timm_args
        fields = read(told, where)
        found |= SourceConfig(None, fields, dict.fromkeys(fields, "the checkpoint's args"))
    meta = entries.get("meta")
    places: list[tuple[str, Any]] = (
        [("meta.dataset_meta", meta.get("dataset_meta")), ("meta", meta)] if isinstance(meta, dict) else []
    )
    places += [("hyper_parameters", entries.get("hyper_parameters")), ("", entries)]
    for place, values in places:
        if not isinstance(values, Mapping):
            continue
        for key in NAME_KEYS:
            # Names are lists in some entries and counts or anything in others: what is none there is not ours.
            is_sure = isinstance(values.get(key), Mapping) and key in INDEXED_KEYS
            if found.class_names is None and (is_sure or isinstance(values.get(key), list | tuple)):
                names = _label_names(values[key], f"{where}, entry {key}")
                found |= _named(names, f"the checkpoint's {place + '.' if place else ''}{key}")
    return found


def json_object(path: Path) -> dict[str, Any] | None:
    """Read a file that is a JSON object; None where there is no file. CorruptArtifactError where it is none."""
    if not path.is_file():
        return None
    try:
        content: Any = strict_json(bounded_content(path))
    except (OSError, ValueError) as error:
        raise CorruptArtifactError(f"{path} is not a JSON object ({error}). Fetch or write it again.") from error
    if not isinstance(content, dict):
        raise CorruptArtifactError(f"{path} is not a JSON object: {shortened(json.dumps(content))}. Write it again.")
    return content


def timm_config(config: Mapping[str, Any], where: str) -> SourceConfig:
    """Read timm's `config.json`; `where` names it in messages. Fields that it leaves out have timm's own defaults."""
    data = config.get("pretrained_cfg")
    data = config if data is None else data
    if not isinstance(data, Mapping):
        raise CorruptArtifactError(f"{where} is no timm model's config: its pretrained_cfg is no object.")
    if data.get("crop_border_pixels"):
        raise InputError(
            f"{where} trims crop_border_pixels={data['crop_border_pixels']} pixels, which is not done here."
        )
    fields: dict[str, Any] = {
        "image_size": _size(data.get("input_size") or (3, 224, 224), where),
        "crop_ratio": _number(data.get("crop_pct") or 0.875, "crop_pct", where),
        "crop_mode": data.get("crop_mode") or "center",
        "interpolation": data.get("interpolation") or "bicubic",
        "mean": _per_channel(data.get("mean") or IMAGENET_MEAN, "mean", where),
        "std": _per_channel(data.get("std") or IMAGENET_STD, "std", where),
    }
    names = _label_names(config.get("label_names", data.get("label_names")), where)
    written = {"image_size": "input_size", "crop_ratio": "crop_pct"}
    origins = {name: CONFIG if data.get(written.get(name, name)) else TIMM_DEFAULT for name in fields}
    return SourceConfig(None, fields, origins) | _named(names, CONFIG)


def transformers_processor(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read `preprocessor_config.json` as fields of `Preprocessing`; what it leaves out has the class's default.

    A ConvNeXt processor resizes to S / crop_pct and crops below 384 pixels, and squashes from there on; others resize
    as `size` says. Rescaling by another factor than 1/255, or no normalisation, is the same as another mean and std.
    Raises InputError for steps that give no picture of one size, or that are not known.
    """
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "ConvNextImageProcessor")
    defaults = next((PROCESSORS[name] for name in PROCESSORS if kind.startswith(name)), None)
    if defaults is None:
        raise InputError(
            f"{where} names the processor {kind}: expected that of {', '.join(PROCESSORS)}. Delete the file, and give "
            "mean, std, crop ratio, crop mode and interpolation as options."
        )
    # `do_reduce_labels` is of masks: what is 0 in them is not counted, and the others are one less.
    known = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_reduce_labels")
    if unknown := [name for name, value in config.items() if name.startswith("do_") and value and name not in known]:
        raise InputError(f"{where} asks for {', '.join(unknown)}: expected no steps but {', '.join(known)}.")
    values = {**defaults, **{name: value for name, value in config.items() if value is not None}}
    if not values["do_resize"]:
        raise InputError(f"{where} says do_resize: false, and the network takes pictures of one size. Set it to true.")
    resized = (_convnext_resize if kind.startswith("ConvNext") else _resize)(values, where)
    if not isinstance(values["resample"], int) or values["resample"] not in range(len(RESAMPLING)):
        raise InputError(f"{where} has resample {values['resample']!r}: expected 0 to 5, Pillow's number of a filter.")
    mean, std = (_per_channel(values[name], name, where) for name in ("image_mean", "image_std"))
    if not values["do_normalize"]:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = _number(values["rescale_factor"], "rescale_factor", where) if values["do_rescale"] else 1.0
    if not factor > 0.0:
        raise InputError(f"{where} has rescale_factor {factor}: expected a positive number, such as 1/255.")
    if not math.isclose(factor, 1 / 255, rel_tol=1e-9):
        # (x · f - m) / s = (x / 255 - m / (255 f)) / (s / (255 f))
        mean, std = (tuple(value / (255.0 * factor) for value in values) for values in (mean, std))
    return {**resized, "interpolation": RESAMPLING[values["resample"]], "mean": mean, "std": std}


def _convnext_resize(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    size = values["size"]
    side = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if not isinstance(side, int) or side < 1:
        raise InputError(f"{where} has the size {shortened(size)}: expected {{'shortest_edge': pixels}}.")
    if values["do_center_crop"] and _size(values.get("crop_size", side), where) != side:
        raise InputError(f"{where} crops to {values['crop_size']} after a resize to {side}: expected one size.")
    if side >= 384:
        return {"image_size": side, "crop_ratio": 1.0, "crop_mode": "squash"}
    ratio = _number(values["crop_pct"], "crop_pct", where)
    return {"image_size": side, "crop_ratio": ratio, "crop_mode": "center-floor"}


def _resize(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    size, crops = values["size"], values["do_center_crop"]
    keeps_ratio = isinstance(size, Mapping) and "shortest_edge" in size
    if keeps_ratio and not crops:
        raise InputError(f"{where} resizes to {shortened(size)} and crops nothing: expected a crop to one size.")
    resized = _size(size, where)
    cropped = _size(values.get("crop_size", resized), where) if crops else resized
    if not isinstance(cropped, int) or not isinstance(resized, int):
        if keeps_ratio or cropped != resized:
            raise InputError(
                f"{where} crops to {shortened(cropped)}: expected a square, or a resize to that size alone."
            )
        return {"image_size": cropped, "crop_ratio": 1.0, "crop_mode": "squash"}
    ratio = _ratio(cropped, resized)
    return {"image_size": cropped, "crop_ratio": ratio, "crop_mode": "center-floor" if keeps_ratio else "squash"}


def _timm_args(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What timm's `train.py` was told of images; a value of None was left to the model's own configuration."""
    size = values.get("input_size") or values.get("img_size")  # as `timm.data.resolve_data_config` takes them
    readers: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "image_size": (size, lambda value: _size(value, where)),
        "crop_ratio": (values.get("crop_pct"), lambda value: _number(value, "crop_pct", where)),
        "crop_mode": (values.get("crop_mode"), str),
        "interpolation": (values.get("interpolation") or None, str),
        "mean": (values.get("mean"), lambda value: _per_channel(value, "mean", where)),
        "std": (values.get("std"), lambda value: _per_channel(value, "std", where)),
    }
    return {name: read(value) for name, (value, read) in readers.items() if value is not None}


def _official_args(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the official `main_finetune.py` does with its arguments when it evaluates."""
    side = max(sides(_size(values.get("input_size") or 224, where)))
    is_default = values["imagenet_default_mean_and_std"]
    ratio = _number(values.get("crop_pct") or 224 / 256, "crop_pct", where)
    return {
        "image_size": side,
        "crop_ratio": 1.0 if side >= 384 else ratio,
        "crop_mode": "squash" if side >= 384 else "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN if is_default else INCEPTION,
        "std": IMAGENET_STD if is_default else INCEPTION,
    }


def _torchvision_args(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What torchvision's `train.py` evaluates with: its preset has no other mean and std than ImageNet's."""
    cropped, resized = (values.get(name) for name in ("val_crop_size", "val_resize_size"))
    if not isinstance(cropped, int) or not isinstance(resized, int) or not 0 < cropped <= resized:
        given = f"val_crop_size {shortened(repr(cropped))} and val_resize_size {shortened(repr(resized))}"
        raise InputError(
            f"{where} has {given}: expected pixels, and a crop within the resized picture, as 224 and 256."
        )
    return {
        "image_size": cropped,
        "crop_ratio": _ratio(cropped, resized),
        "crop_mode": "center",
        "interpolation": str(values.get("interpolation") or "bilinear"),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }


def _ratio(cropped: int, resized: int) -> float:
    """The crop ratio that leads back to both sizes: floor(cropped / ratio) is `resized`."""
    ratio = cropped / resized
    while math.floor(cropped / ratio) < resized:
        ratio = math.nextafter(ratio, 0.0)
    return ratio


def _check_network(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError where transformers' configuration names another network than the weights alone would show."""
    for name, expected in (("hidden_act", "gelu"), ("patch_size", 4)):
        if config.get(name, expected) != expected:
            raise InputError(f"{where} has {name} {config[name]!r}: expected {expected!r}, as ConvNeXt V2 has it.")


def _upernet(config: Mapping[str, Any], where: str) -> SourceConfig:
    """Transformers' UperNet: class names, and the pooling grids, which no shape of its weights shows."""
    backbone, scales = config.get("backbone_config"), config.get("pool_scales")
    if not isinstance(backbone, Mapping) or backbone.get("model_type") not in FAMILIES:
        return SourceConfig()
    _check_network(backbone, where)
    named = _named(_label_names(config.get("id2label"), where), CONFIG)
    return named if scales is None else replace(named, task_options={"pool_scales": scales})


def _named(names: tuple[str, ...] | None, origin: str) -> SourceConfig:
    return SourceConfig(names, {}, {"class_names": origin}) if names else SourceConfig()


def _label_names(value: Any, where: str) -> tuple[str, ...] | None:
    """Names in the order of the classes, see `core.class_names.ordered_names`; None for none, or for placeholders."""
    is_list = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    if not value or not (is_list or isinstance(value, Mapping)):
        return None
    try:
        names = ordered_names({str(key): name for key, name in value.items()} if isinstance(value, Mapping) else value)
    except ValueError as error:
        raise InputError(
            f"{where} has class names that cannot be read: {error}. Correct them, or take them out."
        ) from error
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _size(size: Any, where: str) -> ImageSize:
    """The size of a picture: 224, (3, 224, 224), (256, 512) or {"height": 256, "width": 512}."""
    if isinstance(size, Mapping):
        size = (size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge")))
    both = tuple(size)[-2:] if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    if len(both) != 2 or not all(isinstance(side, int) for side in both):
        raise InputError(f"{where} has the image size {shortened(size)}: expected pixels, such as 224 or [256, 512].")
    return canonical_size((both[0], both[1]))


def _number(value: Any, name: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{where} has {name} {shortened(repr(value))}: expected a number.")
    return float(value)


def _per_channel(value: Any, name: str, where: str) -> tuple[float, ...]:
    values = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(values, Sequence) or isinstance(values, str) or not 1 <= len(values) <= MAX_CHANNELS:
        raise InputError(f"{where} has {name} {shortened(repr(value))}: expected a number for each channel.")
    return tuple(_number(each, name, where) for each in values)
