"""Where in a file is a network, whose layout has it, and how does it read under the reference code's names?

Layouts: `official` (facebookresearch/ConvNeXt-V2 and ConvNeXt, also ours), `fcmae` (the reference's masked autoencoder,
whose sparse convolutions store `kernel`), `timm` (also `features_only`), `transformers`, `mmpretrain` (also the
backbones of mmdet and mmseg) and `torchvision`. Heads of dense networks beside a backbone (`HEADS`) tell its task. A
network may lie under any prefix. Nothing here reads a file.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cnx_deploy.core.errors import CheckpointError
from cnx_deploy.core.variants import ALL_VARIANTS, Variant

__all__ = [
    "HEADS", "TOP", "Difference", "Heads", "Layout", "Network", "difference_table", "find_networks", "format_shape",
    "mixed_layouts", "official_state", "shape_differences", "state_for", "structure_of", "unknown_layout",
    "variant_with_structure",
]  # fmt: skip

Layout = Literal["official", "fcmae", "timm", "transformers", "mmpretrain", "torchvision"]
Structure = tuple[tuple[int, ...], tuple[int, ...], int]
"""Depths and widths of the stages, and the version: 1 where blocks have LayerScale."""

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of a name, anywhere in it, that torch.compile, FSDP and activation checkpointing add."""

TOP = "."
"""What a network without a prefix is called."""

MAX_NETWORKS = 16
"""Networks in one file. Each costs a pass over all names."""

# A file holds a network where one of these ends a name; what stands before it is the network's prefix.
ANCHORS = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?P<anchor>downsample_layers\.0\.0|stem[._]0|embeddings\.patch_embeddings|(?:features|body)\.0\.0)"
    r"\.(?:weight|bias)"
)
ANCHORED: dict[str, Layout] = {
    "downsample_layers.0.0": "official",
    "stem.0": "timm",
    "stem_0": "timm",
    "embeddings.patch_embeddings": "transformers",
    "features.0.0": "torchvision",
    "body.0.0": "torchvision",
}

# What begins the names of a network's own modules: a tensor of theirs that fits nothing is an error. Whatever else lies
# beside a network is a stranger. `official` has the modules of the task's head too.
OWN: dict[Layout, str] = {
    "official": r"(?:downsample_layers|stages)\.",
    "fcmae": r"(?:encoder|decoder|proj|pred)\.|mask_token$",
    "timm": r"(?:stem|stages)[._]|(?:norm_pre|head)\.",
    "transformers": r"(?:convnext|convnextv2|embeddings|encoder|layernorm|classifier)\.",
    "mmpretrain": r"(?:backbone\.)?(?:downsample_layers|stages|norm3)\.|head\.",
    "torchvision": r"(?:features|body|classifier)\.",
}

IN_TRANSFORMERS = r"(?:convnext(?:v2)?\.)?"
FEATURES = "(?:features|body)"
"""torchvision's stages, by themselves or as `IntermediateLayerGetter` holds them in a detector."""
TORCHVISION_BLOCK = {0: "dwconv", 2: "norm", 3: "pwconv1", 5: "pwconv2"}

# The first pattern that matches the start of a name replaces what it matched; a name that none matches stays.
RENAMES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "official": (),
    "fcmae": (
        (r"encoder\.(.+)\.kernel$", r"\1.weight"),
        (r"encoder\.(.+)\.(?:ln|linear)\.(weight|bias)$", r"\1.\2"),
        (r"encoder\.", ""),
    ),
    "timm": (
        (r"stem[._]", "downsample_layers.0."),
        (r"stages[._](\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"stages[._](\d+)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
        (r"stages[._](\d+)\.blocks\.(\d+)\.norm\.", r"stages.\1.\2.norm."),
        (r"stages[._](\d+)\.blocks\.(\d+)\.mlp\.fc", r"stages.\1.\2.pwconv"),
        (r"stages[._](\d+)\.blocks\.(\d+)\.gamma", r"stages.\1.\2.gamma"),
        (r"stages[._](\d+)\.blocks\.(\d+)\.mlp\.grn\.weight", r"stages.\1.\2.grn.gamma"),
        (r"stages[._](\d+)\.blocks\.(\d+)\.mlp\.grn\.bias", r"stages.\1.\2.grn.beta"),
        (r"head\.norm\.", "norm."),
        (r"head\.fc\.", "head."),
    ),
    "transformers": tuple(
        (IN_TRANSFORMERS + pattern, replacement)
        for pattern, replacement in (
            (r"embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
            (r"embeddings\.layernorm\.", "downsample_layers.0.1."),
            (r"encoder\.stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
            (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm\.", r"stages.\1.\2.norm."),
            (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.grn\.weight", r"stages.\1.\2.grn.gamma"),
            (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.grn\.bias", r"stages.\1.\2.grn.beta"),
            (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter", r"stages.\1.\2.gamma"),
            (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.\2."),
            (r"layernorm\.", "norm."),
            (r"classifier\.", "head."),
        )
    ),
    "mmpretrain": (
        (r"(?:backbone\.)?stages\.(\d+)\.(\d+)\.depthwise_conv\.", r"stages.\1.\2.dwconv."),
        (r"(?:backbone\.)?stages\.(\d+)\.(\d+)\.pointwise_conv", r"stages.\1.\2.pwconv"),
        (r"(?:backbone\.)?norm3\.", "norm."),
        (r"backbone\.", ""),
        (r"head\.fc\.", "head."),
    ),
    "torchvision": (
        *((rf"{FEATURES}\.{2 * level}\.", f"downsample_layers.{level}.") for level in range(4)),
        *(
            (rf"{FEATURES}\.{2 * stage + 1}\.(\d+)\.block\.{place}\.", rf"stages.{stage}.\1.{name}.")
            for stage in range(4)
            for place, name in TORCHVISION_BLOCK.items()
        ),
        *((rf"{FEATURES}\.{2 * stage + 1}\.(\d+)\.layer_scale$", rf"stages.{stage}.\1.gamma") for stage in range(4)),
        (r"classifier\.0\.", "norm."),
        (r"classifier\.2\.", "head."),
    ),
}

# The way back, of networks with a pooled head: names of the reference code to those of a library that reads them.
WRITTEN: dict[Literal["timm", "transformers"], tuple[tuple[str, str], ...]] = {
    "timm": (
        (r"downsample_layers\.0\.", "stem."),
        (r"downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"stages\.(\d+)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
        (r"stages\.(\d+)\.(\d+)\.pwconv", r"stages.\1.blocks.\2.mlp.fc"),
        (r"stages\.(\d+)\.(\d+)\.grn\.gamma", r"stages.\1.blocks.\2.mlp.grn.weight"),
        (r"stages\.(\d+)\.(\d+)\.grn\.beta", r"stages.\1.blocks.\2.mlp.grn.bias"),
        (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"norm\.", "head.norm."),
        (r"head\.", "head.fc."),
    ),
    "transformers": (
        (r"downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
        (r"downsample_layers\.0\.1\.", "embeddings.layernorm."),
        (r"downsample_layers\.(\d+)\.", r"encoder.stages.\1.downsampling_layer."),
        (r"stages\.(\d+)\.(\d+)\.norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
        (r"stages\.(\d+)\.(\d+)\.grn\.gamma", r"encoder.stages.\1.layers.\2.grn.weight"),
        (r"stages\.(\d+)\.(\d+)\.grn\.beta", r"encoder.stages.\1.layers.\2.grn.bias"),
        (r"stages\.(\d+)\.(\d+)\.gamma", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
        (r"stages\.(\d+)\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
        (r"norm\.", "layernorm."),
        (r"head\.", "classifier."),
    ),
}


@dataclass(frozen=True, slots=True)
class Heads:
    """How a library calls what a dense network has beside its backbone.

    `mark`: a name that no other heads have. `own`: what begins their names, which count from above `backbone`.
    `renames` lead to the task's names, as `RENAMES` do. `background_is_last`: in the classifier; boxes and masks have
    no rows for it. The task has it first in all of them.
    """

    task: str
    mark: str
    own: str
    renames: tuple[tuple[str, str], ...] = ()
    background_is_last: bool = False


ABOVE = re.compile(r"(^|\.)backbone\.(?:body\.)?$")
"""What stands between a dense network's place and its backbone's."""
NORMS = r"(?:backbone\.)?(?:norm[0-3]|hidden_states_norms\.stage[1-4])\."
"""The norms on the stages' outputs, which belong to the task but lie within the backbone."""
NORM_RENAMES = (
    (r"(?:backbone\.)?norm([0-3])\.", r"norm\1."),
    *((rf"(?:backbone\.)?hidden_states_norms\.stage{level + 1}\.", f"norm{level}.") for level in range(4)),
)
HEADS: dict[str, Heads] = {
    "mmseg": Heads("segment", "decode_head.conv_seg.weight", r"(?:decode|auxiliary)_head\."),
    "transformers": Heads(
        "segment",
        "decode_head.classifier.weight",
        r"(?:decode|auxiliary)_head\.",
        (
            (r"(decode|auxiliary)_head\.classifier\.", r"\1_head.conv_seg."),
            (r"((?:decode|auxiliary)_head\..+)\.batch_norm\.", r"\1.bn."),
        ),
    ),
    "mmdet": Heads(
        "detect",
        "roi_head.bbox_head.shared_fcs.1.weight",
        r"(?:neck|rpn_head|roi_head)\.",
        (
            (r"neck\.lateral_convs\.(\d)\.conv\.", r"fpn.inner_blocks.\1.0."),
            (r"neck\.fpn_convs\.(\d)\.conv\.", r"fpn.layer_blocks.\1.0."),
            (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
            (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
            (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
            (r"roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
            (r"roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
            (r"roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
            (r"roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
            (r"roi_head\.mask_head\.convs\.(\d)\.conv\.", r"roi_heads.mask_head.\1.0."),
            (r"roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
            (r"roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
        ),
        background_is_last=True,
    ),
    "torchvision": Heads(
        "detect",
        "rpn.head.cls_logits.weight",
        r"(?:(?:backbone\.)?fpn|rpn|roi_heads)\.",
        (
            # Before torchvision 0.13, convolutions had no sequences around them.
            (r"(?:backbone\.)?fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)$", r"fpn.\1_blocks.\2.0.\3"),
            (r"rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
            *((rf"roi_heads\.mask_head\.mask_fcn{at + 1}\.", f"roi_heads.mask_head.{at}.0.") for at in range(4)),
            (r"backbone\.fpn\.", "fpn."),
        ),
    ),
}

AVERAGE = re.compile(r"(?:^|[._])ema(?:[._]|$)", re.IGNORECASE)
"""In the name of a dictionary or module, as in `model_ema`, `ema_model.` and `state_dict_ema`."""

FCMAE_DECODER = re.compile(r"decoder\.|mask_token$|proj\.|pred\.")
"""The autoencoder's other half, which a classifier has no use for."""

TABLE_ROWS = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is not what the model has. A shape is None on the side where the tensor is absent."""

    name: str
    in_file: tuple[int, ...] | None
    in_model: tuple[int, ...] | None

    @property
    def problem(self) -> str:
        """What is wrong, in one word."""
        if self.in_file is None:
            return "missing"
        return "unexpected" if self.in_model is None else "shape"


@dataclass(frozen=True, slots=True)
class Network:
    """Where in a file a network lies.

    `names` leads from its own names, without prefix and wrappers, to the file's. `stages` counts those that have a
    depthwise convolution; a whole network has four. `is_average`: it is called an average of weights (EMA). `heads`:
    which of `HEADS` lie beside the backbone, and their names are among `names`; None without any.
    """

    layout: Layout
    prefix: str
    names: Mapping[str, str]
    stages: int
    is_average: bool
    heads: str | None = None

    @property
    def task(self) -> str | None:
        """The task that the heads tell; None without any."""
        return None if self.heads is None else HEADS[self.heads].task

    def without_heads(self) -> "Network":
        """The backbone alone."""
        if self.heads is None:
            return self
        own = re.compile(OWN[self.layout])
        return replace(self, names={name: at for name, at in self.names.items() if own.match(name)}, heads=None)

    @property
    def entry(self) -> str:
        """What it is called: names of dictionaries and the prefix of names, joined by dots."""
        return self.prefix.rstrip(".") or TOP

    def is_called(self, entry: str) -> bool:
        """Whether an entry's name, or some whole parts of it that follow each other, is this one's."""
        return entry == self.entry or (entry != TOP and f".{entry.strip('.')}." in f".{self.entry}.")


def find_networks(names: Iterable[str], modules: Sequence[str] = ("norm", "head")) -> list[Network]:
    """Every ConvNeXt among names of tensors, the one with the most stages first; `modules` are the task's.

    Raises ValueError where one prefix has names of two layouts, or there are more than 16 networks.
    """
    bare: dict[str, str] = {}
    for name in names:
        cleaned = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        bare[name if cleaned in bare else cleaned] = name
    anchors = dict.fromkeys(match.group("prefix", "anchor") for match in map(ANCHORS.fullmatch, bare) if match)
    if len(anchors) > MAX_NETWORKS:
        raise ValueError(f"there are {len(anchors)} networks, expected at most {MAX_NETWORKS}")
    networks = [_network_at(prefix, ANCHORED[anchor], bare, modules) for prefix, anchor in anchors]
    # `stem` and `features` are other networks' names too; `downsample_layers` is not.
    known = [each for each in networks if each.stages or each.layout in ("official", "fcmae", "mmpretrain")]
    for first, second in itertools.combinations(networks, 2):
        if first.prefix == second.prefix and (first in known or second in known):
            raise ValueError(f"names of {first.layout} and of {second.layout} are at {first.entry!r}")
    return sorted(known, key=lambda each: -each.stages)


def official_state(tensors: Mapping[str, Tensor], where: str) -> tuple[Layout, dict[str, Tensor]]:
    """Recognise the layout by its names and return it with the tensors under the reference code's names.

    `where` names the file in messages. Of several networks the one with the most stages is taken. Names that no rule
    covers are kept, so that they show up as unexpected. Raises CheckpointError for an unknown layout or for two
    tensors that claim one name.
    """
    try:
        networks = find_networks(tensors)
    except ValueError as error:
        raise mixed_layouts(error, where) from error
    if not networks:
        raise unknown_layout(tensors, where)
    layout, own = networks[0].layout, {stored: name for name, stored in networks[0].names.items()}
    heads = None if networks[0].heads is None else HEADS[networks[0].heads]
    state: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        name = own.get(stored, stored)
        if layout == "fcmae" and FCMAE_DECODER.match(name):
            continue
        official = _rename(name, layout, heads)
        if official in state:
            raise mixed_layouts(f"{name} and another tensor both stand for {official}", where)
        dense = _dense_kernel(tensor) if layout == "fcmae" and name.endswith(".kernel") else tensor
        state[official] = _official_shape(official, dense)
        if heads is not None and heads.background_is_last:
            state[official] = _with_background_first(official, state[official])
    for name in [name for name in state if name.endswith(".running_mean")]:  # torch counted no batches before 0.4.1
        state.setdefault(name.replace(".running_mean", ".num_batches_tracked"), torch.zeros(()))
    return layout, state


def state_for(
    library: Literal["timm", "transformers"], state: Mapping[str, Tensor], *, version: int
) -> dict[str, Tensor]:
    """The tensors of a network with a pooled head, or with none, under a library's names; `official_state` reads them.

    `version`: 2 or 1, which transformers calls differently. Without a head its names have no prefix, as those of its
    network without one. Raises KeyError for a name that the library has none for.
    """
    family = ("convnextv2." if version == 2 else "convnext.") if "head.weight" in state else ""
    written: dict[str, Tensor] = {}
    for official, tensor in state.items():
        pattern, replacement = next((row for row in WRITTEN[library] if re.match(row[0], official)), (None, ""))
        if pattern is None:
            raise KeyError(official)
        name = re.sub(f"^{pattern}", replacement, official)
        if library == "transformers" and not name.startswith("classifier."):
            name = family + name
        # timm keeps GRN's parameters as (C,), the reference code and transformers as (1, 1, 1, C).
        written[name] = tensor.flatten() if library == "timm" and ".grn." in name else tensor
    return written


def mixed_layouts(reason: object, where: str) -> CheckpointError:
    """Make the error for names that no one library writes together."""
    return CheckpointError(f"{where} mixes layouts: {reason}. A state dict has to be as one library wrote it.")


def unknown_layout(names: Iterable[str], where: str) -> CheckpointError:
    """Make the error for a file without a network."""
    listed = list(itertools.islice(names, 5))
    return CheckpointError(
        f"{where} holds no ConvNeXt weights that are known: its tensors are {', '.join(listed)[:400] or 'none'}, … "
        "Expected names of the official code, FCMAE, timm, transformers, mmpretrain or torchvision, under any prefix. "
        "Check what wrote it."
    )


def structure_of(state: Mapping[str, Tensor]) -> Structure | None:
    """Depths and widths that the depthwise convolutions show, and the version; None when a stage has none."""
    matches = [re.fullmatch(r"stages\.(\d+)\.(\d+)\.dwconv\.weight", name) for name in state]
    blocks = [(int(match[1]), state[match[0]]) for match in matches if match]
    stages = range(1 + max((stage for stage, _ in blocks), default=-1))
    found = [[weight for at, weight in blocks if at == stage] for stage in stages]
    if not found or not all(found):
        return None
    version = 1 if any(re.fullmatch(r"stages\.\d+\.\d+\.gamma", name) for name in state) else 2
    return tuple(map(len, found)), tuple(weights[0].shape[0] for weights in found), version


def variant_with_structure(structure: Structure | None) -> Variant | None:
    """The one of the known sizes with these depths, widths and version, None if it is none of them."""
    return next((each for each in ALL_VARIANTS.values() if (each.depths, each.dims, each.version) == structure), None)


def shape_differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[Difference]:
    """Tensors that are missing, of another shape, or unexpected; in the model's order, unexpected ones last."""
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    return [
        Difference(name, found.get(name), wanted.get(name))
        for name in dict.fromkeys([*wanted, *found])
        if found.get(name) != wanted.get(name)
    ]


def difference_table(differences: list[Difference]) -> str:
    """Aligned columns, at most 20 rows and a count of the rest."""
    rows = [("problem", "tensor", "in the file", "in the model")]
    rows += [
        (row.problem, row.name, format_shape(row.in_file), format_shape(row.in_model))
        for row in differences[:TABLE_ROWS]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(differences) > TABLE_ROWS:
        lines.append(f"and {len(differences) - TABLE_ROWS} more, {len(differences)} in all")
    return "\n".join(lines)


def format_shape(shape: Iterable[int] | None) -> str:
    """`96x3x4x4`; a dash for no tensor."""
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def _network_at(prefix: str, layout: Layout, bare: Mapping[str, str], modules: Sequence[str]) -> Network:
    """The network of an anchor; the layouts whose anchors are alike are told by other names."""
    if layout == "official" and f"{prefix}stages.0.0.depthwise_conv.weight" in bare:
        layout, prefix = "mmpretrain", re.sub(r"(^|\.)backbone\.$", r"\1", prefix)
    elif layout == "official" and re.search(r"(?:^|\.)encoder\.$", prefix):
        parent = prefix.removesuffix("encoder.")
        decoder = [f"{parent}{name}" for name in ("mask_token", "proj.weight", "pred.weight")]
        sparse = (name.startswith(prefix) and name.endswith(".kernel") for name in bare)
        if any(name in bare for name in decoder) or any(sparse):
            layout, prefix = "fcmae", parent
    elif layout == "transformers":
        prefix = re.sub(r"(^|\.)convnext(?:v2)?\.$", r"\1", prefix)
    own = re.compile(OWN[layout] + "".join(rf"|{re.escape(module)}\." for module in modules if layout == "official"))
    names = {
        name.removeprefix(prefix): stored
        for name, stored in bare.items()
        if name.startswith(prefix) and own.match(name, len(prefix))
    }
    depthwise = [re.fullmatch(r"stages\.([0-3])\.\d+\.dwconv\.weight", _rename(name, layout)) for name in names]
    heads, above = _heads_beside(prefix, bare)
    if heads is not None:
        beside, norms = re.compile(HEADS[heads].own), re.compile(NORMS)
        for name, stored in bare.items():
            if name.startswith(prefix) and norms.match(name, len(prefix)):
                names[name.removeprefix(prefix)] = stored
            elif name.startswith(above) and beside.match(name, len(above)):
                names[name.removeprefix(above)] = stored
    # torch's AveragedModel holds the network as `module` beside a count.
    modules_above = re.finditer(r"(?:^|(?<=\.))module\.", prefix)
    is_average = any(f"{prefix[: match.start()]}n_averaged" in bare for match in modules_above)
    is_average = is_average or bool(AVERAGE.search(prefix))
    return Network(layout, prefix, names, len({match[1] for match in depthwise if match}), is_average, heads)


def _heads_beside(prefix: str, bare: Mapping[str, str]) -> tuple[str | None, str]:
    """Whose heads belong to the backbone at `prefix`, and their own prefix; None where there are none."""
    for above in dict.fromkeys((ABOVE.sub(r"\1", prefix), prefix)):
        for name, heads in HEADS.items():
            if f"{above}{heads.mark}" in bare:
                return name, above
    return None, prefix


def _rename(name: str, layout: Layout, heads: Heads | None = None) -> str:
    renames = RENAMES[layout] if heads is None else (*NORM_RENAMES, *heads.renames, *RENAMES[layout])
    if heads is not None and re.match(heads.own, name):
        renames = heads.renames
    for pattern, replacement in renames:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _with_background_first(name: str, tensor: Tensor) -> Tensor:
    """Rows of the last layers of boxes and masks as torchvision orders them."""
    if not tensor.ndim or not name.startswith("roi_heads."):
        return tensor
    if ".box_predictor.cls_score." in name:
        return tensor.roll(1, 0)
    rows = 4 if ".box_predictor.bbox_pred." in name else 1 if ".mask_fcn_logits." in name else 0
    return torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])


def _dense_kernel(kernel: Tensor) -> Tensor:
    """A sparse convolution's kernel as a dense weight.

    Shape: (K·K, I, O) -> (O, I, K, K), or depthwise (K·K, C) -> (C, 1, K, K). The sparse library counts kernel
    positions with the column as the slow index, hence the final transposition.
    Source: facebookresearch/ConvNeXt-V2, `utils.py`, `remap_checkpoint_keys`.
    """
    side = math.isqrt(kernel.shape[0]) if kernel.ndim in (2, 3) else 0
    if side * side != kernel.shape[0]:
        return kernel  # reported as a difference in shape
    inputs = kernel.shape[1] if kernel.ndim == 3 else 1
    outputs_first = kernel.movedim(0, -1).movedim(-2, 0)  # (O, I, K·K) or (C, K·K)
    return outputs_first.reshape(-1, inputs, side, side).transpose(2, 3)


def _official_shape(name: str, tensor: Tensor) -> Tensor:
    """Drop or add axes of length 1, where the layouts write the same numbers differently."""
    if ".grn." in name and all(length == 1 for length in tensor.shape[:-1]):
        return tensor.reshape(1, 1, 1, -1)
    if re.search(r"\.pwconv\d\.weight$", name) and tensor.shape[2:] == torch.Size((1, 1)):
        return tensor.flatten(1)
    if name.endswith(".gamma") and tensor.shape[1:] == torch.Size((1, 1)):  # torchvision's LayerScale
        return tensor.flatten()
    if name.endswith(".bias") and tensor.ndim == 2 and tensor.shape[0] == 1:
        return tensor.flatten()
    return tensor
