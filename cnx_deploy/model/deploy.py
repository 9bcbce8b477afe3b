"""Training form to deploy form: the same function, written for the engine that will run it.

Two layouts. `gpu`: channels-last tokens (N, HW, C), so that the compiler fuses matmul, bias and GELU. `cpu`:
channels-first throughout with pointwise layers as 1×1 convolutions, which ONNX Runtime's blocked kernels want.
Modules keep the training form's names (`stages.2.3.grn`), and so do the nodes of the exported graph.

Precision is part of the module: in FP16 every parameter is half, but each LayerNorm, the pooling and each GRN
statistic are computed in FP32 (an *island*: `_widen` in, `.to` out), and logits leave in FP32. What is exported is
what is read here.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cnx_deploy.errors import InputError
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy_layers import (
    ChannelsFirstBlock,
    ChannelsFirstNorm,
    TokenBlock,
    TokenNorm,
    convolution,
    doubles,
    linear,
    widen,
)
from cnx_deploy.model.folds import fold_affine_into_conv, fold_affine_into_linear, gain_moves_fewer_bytes_in_weight
from cnx_deploy.variants import check_image_size

__all__ = ["DeploySpec", "DeployedConvNeXtV2", "InputKind", "Layout", "Precision", "deploy_form"]

Precision = Literal["fp32", "fp16", "fp64"]
Layout = Literal["gpu", "cpu"]
InputKind = Literal["float", "uint8"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class DeploySpec:
    """How a model is deployed.

    `image_size` is the side in pixels (it decides, per stage, where GRN's gain is applied). `mean` and `std` are the
    channel statistics of the preprocessing in units of a [0, 1] image; they are folded into the stem, so the deployed
    input is raw: "float" takes (N, 3, S, S) float32 in [0, 1], "uint8" takes (N, S, S, 3) uint8.
    `layout` None means tokens ("gpu") for FP16 and channels-first ("cpu") otherwise. "fp64" exists to prove the
    algebra; it is not exported.
    """

    precision: Precision = "fp32"
    image_size: int = 224
    input_kind: InputKind = "float"
    layout: Layout | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        check_image_size(self.image_size, self.image_size)
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("input kind", self.input_kind, get_args(InputKind))
        if self.layout is None:
            object.__setattr__(self, "layout", "gpu" if self.precision == "fp16" else "cpu")
        _check_choice("layout", str(self.layout), get_args(Layout))
        if any(value <= 0.0 for value in self.std):
            raise InputError(f"Every std of the normalisation must be positive, not {self.std}.")

    @property
    def scales_input(self) -> bool:
        """Whether a [0, 1] image is brought to [0, 255] before it is rounded to FP16.

        There the levels of an 8-bit image are exact; in [0, 1] FP16 is off by up to 0.06 of a level, and the
        normalisation, which is folded and so comes later, would magnify it on images of low contrast.
        """
        return self.precision == "fp16" and self.input_kind == "float"


class DeployedConvNeXtV2(nn.Module):
    """The deploy form; build it with `deploy_form`.

    Shape: raw images as `spec.input_kind` says -> (N, num_classes) float32 logits (float64 in float64).
    """

    def __init__(self, model: ConvNeXtV2, spec: DeploySpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = model.num_classes
        dtype = DTYPES[spec.precision]  # each part is rounded as it is made: float64 copies of huge take 5 GB
        self.downsample_layers = nn.ModuleList(layer.to(dtype) for layer in _downsample_layers(model, spec))
        self.stages = nn.ModuleList()
        for blocks, side in zip(model.stage_blocks(), _stage_sides(spec.image_size), strict=True):
            in_weight = gain_moves_fewer_bytes_in_weight(blocks[0].dwconv.in_channels, side * side)
            deployed = (
                TokenBlock(block, gain_in_weight=in_weight) if spec.layout == "gpu" else ChannelsFirstBlock(block)
                for block in blocks
            )
            self.stages.append(nn.Sequential(*(block.to(dtype) for block in deployed)))
        self.norm = TokenNorm()
        self.head = linear(*fold_affine_into_linear(*doubles(model.head), *doubles(model.norm))).to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Classify; see the class for shapes."""
        if self.spec.scales_input:
            images = images * 255.0
        hidden = images.to(self.head.weight.dtype)
        if self.spec.input_kind == "uint8":
            hidden = hidden.permute(0, 3, 1, 2)  # after the cast: TensorRT's Transpose takes no uint8
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            hidden = stage(downsample(hidden))
        pooled = self.norm(widen(hidden).mean(dim=(2, 3))).to(hidden.dtype)  # (N, C)
        return widen(self.head(pooled))


def deploy_form(model: ConvNeXtV2, spec: DeploySpec) -> DeployedConvNeXtV2:
    """Return the deploy form of `model` in evaluation mode; `model` is left as it was.

    Constants are folded in float64 and rounded once to the precision asked for.
    """
    return DeployedConvNeXtV2(model, spec).eval().requires_grad_(False)


def _downsample_layers(model: ConvNeXtV2, spec: DeploySpec) -> list[nn.Sequential]:
    """The stem with its input normalisation folded, and the downsamplings with their norm's affine folded."""
    spelled_out = spec.layout == "gpu"
    mean, std = torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)
    full_scale = 255.0 if spec.input_kind == "uint8" or spec.scales_input else 1.0
    conv, norm = model.stem_layers()
    weight, bias = fold_affine_into_conv(*doubles(conv), 1.0 / (std * full_scale), -mean / std)
    stem = nn.Sequential(convolution(weight, bias, stride=4), ChannelsFirstNorm(spelled_out, *doubles(norm)))
    downsamplings = [
        nn.Sequential(
            ChannelsFirstNorm(spelled_out),
            convolution(*fold_affine_into_conv(*doubles(conv), *doubles(norm)), stride=2),
        )
        for norm, conv in model.downsampling_layers()
    ]
    return [stem, *downsamplings]


def _stage_sides(image_size: int) -> tuple[int, ...]:
    """Side of each stage's feature map."""
    return tuple(image_size // stride for stride in (4, 8, 16, 32))


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"No {what} is called {value!r}. Choose one of: {', '.join(allowed)}.")
