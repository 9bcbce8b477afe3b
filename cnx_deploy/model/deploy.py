"""Training form to deploy form: the same function, written for the engine that will run it.

Two layouts. `gpu`: channels-last tokens (N, HW, C), so that the compiler fuses matmul, bias and GELU. `cpu`:
channels-first throughout with pointwise layers as 1×1 convolutions, which ONNX Runtime's blocked kernels want.
Modules keep the training form's names (`stages.2.3.grn`), and so do the nodes of the exported graph.

Precision is part of the module: in FP16 or BF16 every parameter is half, but each LayerNorm, the pooling and each GRN
statistic are computed in FP32 (an *island*: `widen` in, `.to` out), and logits leave in FP32. Parts named in
`DeploySpec.keep_fp32` are islands as a whole: every part casts its input to its own type, so neighbours that are kept
make one island. What is exported is what is read here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import Variant, check_image_size
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy_blocks import ChannelsFirstBlock, TokenBlock
from cnx_deploy.model.deploy_layers import (
    ChannelsFirstNorm,
    InputNormalisation,
    NormedPatchConvolution,
    PatchConvolution,
    TokenNorm,
    convolution,
    depthwise,
    doubles,
    linear,
    type_of,
    widen,
)
from cnx_deploy.model.folds import (
    FOLDS,
    fold_affine_into_conv,
    fold_affine_into_linear,
    fold_input_normalisation,
    gain_moves_fewer_bytes_in_weight,
    norm_moves_fewer_bytes_on_patches,
)
from cnx_deploy.model.layers import Block

__all__ = [
    "BLOCK_PARTS",
    "FORM",
    "HALVES",
    "DeploySpec",
    "DeployedConvNeXtV2",
    "InputKind",
    "Layout",
    "Precision",
    "block_parts",
    "check_parts",
    "deploy_form",
    "parts_of",
]

Precision = Literal["fp32", "fp16", "bf16", "fp64"]
Layout = Literal["gpu", "cpu"]
InputKind = Literal["float", "uint8"]

FORM = 2
"""Raised whenever the same spec gives another graph, so that a file of an earlier form is not taken for a new one."""

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
HALVES = ("fp16", "bf16")
BLOCK_PARTS = ("dwconv", "pwconv1", "grn", "pwconv2")
"""Parts of a block that can be kept in FP32 by themselves; its norm is in any case."""


@dataclass(frozen=True, slots=True)
class DeploySpec:
    """How a model is deployed.

    `image_size` is the side in pixels (it decides, per block, where GRN's gain is applied). `mean` and `std` are the
    channel statistics of the preprocessing in units of a [0, 1] image; they are folded into the stem, so the deployed
    input is raw: "float" takes (N, 3, S, S) float32 in [0, 1], "uint8" takes (N, S, S, 3) uint8.
    `layout` None means tokens ("gpu") for FP16 and channels-first ("cpu") otherwise. "fp64" exists to prove the
    algebra; it is not exported. `leave_out` names folds (`folds.FOLDS`) that are not to be made; the function stays.
    `keep_fp32` names modules (`parts_of`) that stay in FP32 in a half-precision deployment.
    """

    precision: Precision = "fp32"
    image_size: int = 224
    input_kind: InputKind = "float"
    layout: Layout | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    leave_out: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_image_size(self.image_size, self.image_size)
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("input kind", self.input_kind, get_args(InputKind))
        if self.layout is None:
            object.__setattr__(self, "layout", "gpu" if self.is_half else "cpu")
        _check_choice("layout", str(self.layout), get_args(Layout))
        for fold in self.leave_out:
            _check_choice("fold", fold, tuple(FOLDS))
        object.__setattr__(self, "leave_out", tuple(sorted(set(self.leave_out))))
        object.__setattr__(self, "keep_fp32", tuple(sorted(set(self.keep_fp32))))
        if self.keep_fp32 and not self.is_half:
            raise InputError(
                f"Parts are kept in FP32 in a file of half precision, not in {self.precision}. Leave keep_fp32 out, "
                "or ask for fp16."
            )
        if any(value <= 0.0 for value in self.std):
            raise InputError(
                f"Every std of the normalisation must be positive, not {self.std}. Give the deviations of your "
                "images' channels."
            )

    @property
    def is_half(self) -> bool:
        """Whether tensors are stored in 16 bits."""
        return self.precision in HALVES

    def keeps(self, module: str) -> bool:
        """Whether a module of the deploy form stays in FP32: it or what it is part of is named."""
        return any(f"{module}.".startswith(f"{kept}.") for kept in self.keep_fp32)

    def dtype_of(self, module: str) -> torch.dtype:
        """The type of a module's parameters, by its name in the deploy form."""
        return torch.float32 if self.keeps(module) else DTYPES[self.precision]

    @property
    def scales_input(self) -> bool:
        """Whether a [0, 1] image is brought to [0, 255] before it is rounded to FP16 or BF16.

        There the levels of an 8-bit image are exact; in [0, 1] FP16 is off by up to 0.06 of a level, and the
        normalisation, which is folded and so comes later, would magnify it on images of low contrast.
        """
        return self.is_half and self.input_kind == "float"

    @property
    def folds(self) -> frozenset[str]:
        """The folds that are made."""
        return frozenset(FOLDS) - frozenset(self.leave_out)

    @property
    def reads_patches(self) -> bool:
        """Whether the stem takes the images as they come, in whichever layout."""
        return self.layout == "gpu" and "patches" in self.folds

    @property
    def full_scale(self) -> float:
        """What a white pixel is where the stem reads it."""
        return 255.0 if self.input_kind == "uint8" or self.scales_input else 1.0


class DeployedConvNeXtV2(nn.Module):
    """The deploy form; build it with `deploy_form`.

    Shape: raw images as `spec.input_kind` says -> (N, num_classes) float32 logits (float64 in float64).
    """

    def __init__(self, model: ConvNeXtV2, spec: DeploySpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = model.num_classes
        check_parts(spec.keep_fp32, model.variant)
        self.normalise = None if "input-normalisation" in spec.folds else _input_normalisation(spec)
        # Each part is rounded as it is made: float64 copies of huge take 5 GB.
        self.downsample_layers = nn.ModuleList(
            _rounded(layer, f"downsample_layers.{index}", spec)
            for index, layer in enumerate(_downsample_layers(model, spec))
        )
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in _stages(model, spec))
        dense, affine = doubles(model.head), doubles(model.norm)
        folded = "head-affine" in spec.folds
        self.norm = _rounded(TokenNorm() if folded else TokenNorm(*affine), "head", spec)
        self.head = _rounded(linear(*(fold_affine_into_linear(*dense, *affine) if folded else dense)), "head", spec)

    @property
    def norm_on_patches(self) -> bool:
        """Whether the stem's norm is computed on its patches."""
        return any(isinstance(module, NormedPatchConvolution) for module in self.downsample_layers.modules())

    def forward(self, images: Tensor) -> Tensor:
        """Classify; see the class for shapes."""
        if self.spec.scales_input:
            images = images * 255.0
        hidden = images if self.normalise is None else self.normalise(images)
        hidden = hidden.to(type_of(self.downsample_layers[0]))
        if self.spec.input_kind == "uint8" and not self.spec.reads_patches:
            hidden = hidden.permute(0, 3, 1, 2)  # after the cast: TensorRT's Transpose takes no uint8
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            hidden = stage(downsample(hidden.to(type_of(downsample))))
        pooled = self.norm(widen(hidden).mean(dim=(2, 3))).to(self.head.weight.dtype)  # (N, C)
        return widen(self.head(pooled))


def deploy_form(model: ConvNeXtV2, spec: DeploySpec) -> DeployedConvNeXtV2:
    """Return the deploy form of `model` in evaluation mode; `model` is left as it was.

    Constants are folded in float64 and rounded once to the precision asked for.
    """
    return DeployedConvNeXtV2(model, spec).eval().requires_grad_(False)


def _downsample_layers(model: ConvNeXtV2, spec: DeploySpec) -> list[nn.Module]:
    """The stem and the three downsamplings, with what the folds put into them."""
    return [_stem(model, spec), *(_downsampling(norm, conv, spec) for norm, conv in model.downsampling_layers())]


def _stem(model: ConvNeXtV2, spec: DeploySpec) -> nn.Sequential:
    conv, norm = model.stem_layers()
    weight, bias = doubles(conv)
    if "input-normalisation" in spec.folds:
        weight, bias = fold_input_normalisation(weight, bias, *_statistics(spec), spec.full_scale)
    gain, shift = doubles(norm)
    if spec.reads_patches:
        size, channels_last = spec.image_size, spec.input_kind == "uint8"
        if "stem-norm" in spec.folds and norm_moves_fewer_bytes_on_patches(len(weight), weight[0].numel()):
            scale = spec.full_scale if "input-normalisation" in spec.folds else 1.0
            return nn.Sequential(
                NormedPatchConvolution(
                    weight, bias, gain, shift, full_scale=scale, image_size=size, channels_last=channels_last
                )
            )
        patches = PatchConvolution(weight, bias, image_size=size, channels_last=channels_last)
        return nn.Sequential(patches, ChannelsFirstNorm(True, gain, shift))
    if spec.layout == "cpu" and "blocked" in spec.folds:
        affine = depthwise(gain[:, None, None, None], shift)
        return nn.Sequential(convolution(weight, bias, stride=4), ChannelsFirstNorm(False), affine)
    return nn.Sequential(convolution(weight, bias, stride=4), ChannelsFirstNorm(spec.layout == "gpu", gain, shift))


def _downsampling(norm: nn.LayerNorm, conv: nn.Conv2d, spec: DeploySpec) -> nn.Sequential:
    dense, affine, spelled_out = doubles(conv), doubles(norm), spec.layout == "gpu"
    if "downsample-affine" in spec.folds:
        folded = fold_affine_into_conv(*dense, *affine)
        return nn.Sequential(ChannelsFirstNorm(spelled_out), convolution(*folded, stride=2))
    return nn.Sequential(ChannelsFirstNorm(spelled_out, *affine), convolution(*dense, stride=2))


def _stages(model: ConvNeXtV2, spec: DeploySpec) -> Iterator[Iterator[nn.Module]]:
    """The deployed blocks of each stage."""
    for stage, blocks in enumerate(model.stage_blocks()):
        yield (
            _rounded(_block(block, spec, stage, index, len(blocks)), f"stages.{stage}.{index}", spec)
            for index, block in enumerate(blocks)
        )


def _block(block: Block, spec: DeploySpec, stage: int, index: int, depth: int) -> nn.Module:
    stream_type = spec.dtype_of(f"stages.{stage}.{index}")
    if spec.layout == "cpu":
        return ChannelsFirstBlock(block, folds=spec.folds, stream_type=stream_type)
    side = spec.image_size // (4 << stage)
    in_weight = gain_moves_fewer_bytes_in_weight(
        block.dwconv.in_channels, side * side, before_downsampling=index == depth - 1 and stage < 3
    )
    return TokenBlock(block, gain_in_weight=in_weight, folds=spec.folds, stream_type=stream_type)


def _rounded(module: nn.Module, name: str, spec: DeploySpec) -> Any:
    """The module, called `name` in the deploy form, with each parameter in the type that `spec` gives it."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(spec.dtype_of(name))
    for child_name, child in module.named_children():
        _rounded(child, f"{name}.{child_name}", spec)
    return module


def block_parts(variant: Variant) -> tuple[str, ...]:
    """The parts that each block of a variant has: V1 has no GRN."""
    return tuple(part for part in BLOCK_PARTS if part != "grn" or variant.version == 2)


def parts_of(variant: Variant) -> tuple[str, ...]:
    """The modules that `DeploySpec.keep_fp32` can name: stem and downsamplings, blocks and their parts, the head."""
    blocks = [f"stages.{stage}.{index}" for stage, depth in enumerate(variant.depths) for index in range(depth)]
    parts = [f"{block}.{part}" for block in blocks for part in block_parts(variant)]
    return (*(f"downsample_layers.{index}" for index in range(4)), *blocks, *parts, "head")


def check_parts(names: tuple[str, ...], variant: Variant) -> None:
    """Raise InputError for a name that is none of `parts_of`."""
    known = parts_of(variant)
    for name in names:
        if name not in known:
            last, parts = f"stages.3.{variant.depths[3] - 1}", block_parts(variant)
            raise InputError(
                f"No part of {variant.name} is called {name!r}. Name one: there are downsample_layers.0 to .3, "
                "blocks from "
                f"stages.0.0 to {last}, their parts such as {last}.{parts[-2]} ({', '.join(parts)}), and head."
            )


def _statistics(spec: DeploySpec) -> tuple[Tensor, Tensor]:
    return torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)


def _input_normalisation(spec: DeploySpec) -> InputNormalisation:
    """In FP32 at least: the inputs are images, not yet rounded."""
    module = InputNormalisation(*_statistics(spec), spec.full_scale, channels_last=spec.input_kind == "uint8")
    return module if spec.precision == "fp64" else module.float()


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"No {what} is called {value!r}. Choose one of: {', '.join(allowed)}.")
