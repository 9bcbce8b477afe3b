"""Whose state dict is this, and how does it read under the reference code's names?

Layouts: `official` (facebookresearch/ConvNeXt-V2 and ConvNeXt, also ours), `fcmae` (the reference's masked autoencoder,
whose sparse convolutions store `kernel`), `timm`, `transformers`. Nothing here reads a file.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cnx_deploy.core.errors import CheckpointError
from cnx_deploy.core.variants import ALL_VARIANTS, Variant

__all__ = [
    "Difference",
    "Layout",
    "difference_table",
    "official_state",
    "shape_differences",
    "structure_of",
    "variant_with_structure",
]

Layout = Literal["official", "fcmae", "timm", "transformers"]
Structure = tuple[tuple[int, ...], tuple[int, ...], int]
"""Depths and widths of the stages, and the version: 1 where blocks have LayerScale."""

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and Lightning put before every name."""

MARKERS: tuple[tuple[str, Layout], ...] = (
    ("encoder.downsample_layers.", "fcmae"),
    ("stem.", "timm"),
    ("convnextv2.", "transformers"),
    ("convnext.", "transformers"),
    ("embeddings.patch_embeddings.", "transformers"),
    ("downsample_layers.", "official"),
)

# The first pattern that matches the start of a name replaces what it matched; a name that none matches stays.
RENAMES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "official": (),
    "fcmae": (
        (r"encoder\.(.+)\.kernel$", r"\1.weight"),
        (r"encoder\.(.+)\.(?:ln|linear)\.(weight|bias)$", r"\1.\2"),
        (r"encoder\.", ""),
    ),
    "timm": (
        (r"stem\.", "downsample_layers.0."),
        (r"stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
        (r"stages\.(\d+)\.blocks\.(\d+)\.norm\.", r"stages.\1.\2.norm."),
        (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc", r"stages.\1.\2.pwconv"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.gamma", r"stages.\1.\2.gamma"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.weight", r"stages.\1.\2.grn.gamma"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.bias", r"stages.\1.\2.grn.beta"),
        (r"head\.norm\.", "norm."),
        (r"head\.fc\.", "head."),
    ),
    "transformers": (
        (r"(?:convnext(?:v2)?\.)?embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
        (r"(?:convnext(?:v2)?\.)?embeddings\.layernorm\.", "downsample_layers.0.1."),
        (r"(?:convnext(?:v2)?\.)?encoder\.stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
        (r"(?:convnext(?:v2)?\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm\.", r"stages.\1.\2.norm."),
        (r"(?:convnext(?:v2)?\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.grn\.weight", r"stages.\1.\2.grn.gamma"),
        (r"(?:convnext(?:v2)?\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.grn\.bias", r"stages.\1.\2.grn.beta"),
        (r"(?:convnext(?:v2)?\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter", r"stages.\1.\2.gamma"),
        (r"(?:convnext(?:v2)?\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.\2."),
        (r"(?:convnext(?:v2)?\.)?layernorm\.", "norm."),
        (r"classifier\.", "head."),
    ),
}

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


def official_state(tensors: Mapping[str, Tensor], where: str) -> tuple[Layout, dict[str, Tensor]]:
    """Recognise the layout by its names and return it with the tensors under the reference code's names.

    `where` names the file in messages. Names that no rule covers are kept, so that they show up as unexpected.
    Raises CheckpointError for an unknown layout or for two tensors that claim one name.
    """
    unwrapped = _unwrap(tensors)
    layout = _recognise(unwrapped, where)
    state: dict[str, Tensor] = {}
    for name, tensor in unwrapped.items():
        if layout == "fcmae" and FCMAE_DECODER.match(name):
            continue
        official = _rename(name, layout)
        if official in state:
            raise CheckpointError(
                f"{where} mixes layouts: {name} and another tensor both stand for {official}. "
                "A state dict has to be as one library wrote it."
            )
        dense = _dense_kernel(tensor) if layout == "fcmae" and name.endswith(".kernel") else tensor
        state[official] = _official_shape(official, dense)
    return layout, state


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


def _unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the wrappers that stand before every name."""
    state = dict(tensors)
    while prefix := next((each for each in WRAPPERS if state and all(name.startswith(each) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _recognise(names: Iterable[str], where: str) -> Layout:
    listed = list(names)
    for marker, layout in MARKERS:
        if any(name.startswith(marker) for name in listed):
            return layout
    raise CheckpointError(
        f"{where} holds no ConvNeXt weights that are known: its tensors are {', '.join(listed[:5]) or 'none'}, … "
        "Expected names of the official code, FCMAE, timm or transformers. Check what wrote it."
    )


def _rename(name: str, layout: Layout) -> str:
    for pattern, replacement in RENAMES[layout]:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name


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
    if name.endswith(".bias") and tensor.ndim == 2 and tensor.shape[0] == 1:
        return tensor.flatten()
    return tensor
