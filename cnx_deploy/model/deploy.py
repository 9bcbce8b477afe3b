"""Training form to deploy form: the same function, written for the engine that will run it.

Three layouts. `gpu`: channels-last tokens (N, HW, C), so that the compiler fuses matmul, bias and GELU. `cpu`:
channels-first throughout with pointwise layers as 1×1 convolutions, which ONNX Runtime's blocked kernels want.
`openvino`: the same, with norms and statistics from operators that OpenVINO runs on maps that it keeps channels last.
Modules keep the training form's names (`stages.2.3.grn`), and so do the nodes of the exported graph.

Precision is part of the module: in FP16 or BF16 every parameter is half, but each LayerNorm, the pooling and each GRN
statistic are computed in FP32 (an *island*: `widen` in, `.to` out), and outputs leave in FP32. Parts named in
`DeploySpec.keep_fp32` are islands as a whole: every part casts its input to its own type, so neighbours that are kept
make one island. What is exported is what is read here.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import stage_sides
from cnx_deploy.core.variants import Variant
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy_blocks import ChannelsFirstBlock, TokenBlock
from cnx_deploy.model.deploy_layers import (
    InputNormalisation,
    MirrorMean,
    NormedPatchConvolution,
    PatchConvolution,
    convolution,
    depthwise,
    doubles,
    map_norm,
    type_of,
)
from cnx_deploy.model.folds import (
    fold_affine_into_conv,
    fold_input_normalisation,
    gain_moves_fewer_bytes_in_weight,
    norm_moves_fewer_bytes_on_patches,
)
from cnx_deploy.model.layers import Block
from cnx_deploy.model.quantised import QuantisedBlock
from cnx_deploy.model.tasks.base import network_outputs, sole_or_named

__all__ = [
    "BLOCK_PARTS",
    "FORM",
    "DeployedConvNeXtV2",
    "block_parts",
    "check_parts",
    "deploy_form",
    "parts_of",
    "separate_norms",
]

FORM = 2
"""Raised whenever the same spec gives another graph, so that a file of an earlier form is not taken for a new one."""

BLOCK_PARTS = ("dwconv", "pwconv1", "grn", "pwconv2")
"""Parts of a block that can be kept in FP32 by themselves; its norm is in any case."""


class DeployedConvNeXtV2(nn.Module):
    """The deploy form; build it with `deploy_form`.

    Shape: raw images as `spec.input_kind` says -> the task's outputs in float32 (float64 in float64), for a classifier
    (N, num_classes) logits.
    """

    def __init__(self, model: ConvNeXtV2, spec: DeploySpec) -> None:
        super().__init__()
        self.spec = spec
        self.task = model.task
        check_parts(spec.keep_fp32, model.variant)
        if spec.row.placement is not None and spec.eight_bits is None:
            raise InputError(f"{spec.precision} needs scales. Calibrate on images: --calibration DATA.")
        model.task.check_allowed(spec)
        self.output_specs = network_outputs(model.task, model.variant, model.num_classes, spec)
        self.flip_mean = MirrorMean() if spec.tta == "flip" else None
        self.normalise = None if "input-normalisation" in spec.folds else _input_normalisation(spec)
        # Each part is rounded as it is made: float64 copies of huge take 5 GB.
        self.downsample_layers = nn.ModuleList(
            _rounded(layer, f"downsample_layers.{index}", spec)
            for index, layer in enumerate(
                (_stem(model, spec), *(_downsampling(*layers, spec) for layers in model.downsampling_layers()))
            )
        )
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in _stages(model, spec))
        for name, module in model.task.deployed_modules(model, spec).items():
            self.add_module(name, _rounded(module, "head", spec))

    @property
    def norm_on_patches(self) -> bool:
        """Whether the stem's norm is computed on its patches."""
        return any(isinstance(module, NormedPatchConvolution) for module in self.downsample_layers.modules())

    def forward(self, images: Tensor) -> Any:
        """Return the one output of the task, or several as a dict by name."""
        if self.spec.scales_input:
            images = images * 255.0
        hidden = images if self.normalise is None else self.normalise(images)
        hidden = hidden.to(type_of(self.downsample_layers[0]))
        if self.flip_mean is not None:
            # In the same batch every kernel runs once: atto has 99 on sm89, with a pass of their own 195.
            hidden = torch.cat([hidden, hidden.flip(self.spec.width_axis)])
        if self.spec.input_kind == "uint8" and not self.spec.reads_patches:
            hidden = hidden.permute(0, 3, 1, 2)  # after the cast: TensorRT's Transpose takes no uint8
        maps: dict[int, Tensor] = {}  # as in the training form: torch.compile breaks the graph at dict[int, Tensor]()
        levels = self.task.levels_of(self.spec.outputs)
        for level, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            hidden = stage(downsample(hidden.to(type_of(downsample))))
            if level in levels:
                maps[level] = hidden
        outputs = self.task.deployed_forward(self, maps, self.spec.outputs)
        if self.flip_mean is not None:
            outputs = {name: self.flip_mean(output) for name, output in outputs.items()}
        return sole_or_named(outputs)


def deploy_form(model: ConvNeXtV2, spec: DeploySpec) -> DeployedConvNeXtV2:
    """Return the deploy form of `model` in evaluation mode; `model` is left as it was.

    Constants are folded in float64 and rounded once to the precision asked for.
    """
    return DeployedConvNeXtV2(model, spec).eval().requires_grad_(False)


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
        return nn.Sequential(patches, map_norm(spec, gain, shift))
    if {"cpu": "blocked", "openvino": "channels-last"}.get(str(spec.layout)) in spec.folds:
        affine = depthwise(gain[:, None, None, None], shift)
        return nn.Sequential(convolution(weight, bias, stride=4), map_norm(spec), affine)
    return nn.Sequential(convolution(weight, bias, stride=4), map_norm(spec, gain, shift))


def _downsampling(norm: nn.LayerNorm, conv: nn.Conv2d, spec: DeploySpec) -> nn.Sequential:
    dense, affine = doubles(conv), doubles(norm)
    if "downsample-affine" in spec.folds:
        return nn.Sequential(map_norm(spec), convolution(*fold_affine_into_conv(*dense, *affine), stride=2))
    return nn.Sequential(map_norm(spec, *affine), convolution(*dense, stride=2))


def _stages(model: ConvNeXtV2, spec: DeploySpec) -> Iterator[Iterator[nn.Module]]:
    """The deployed blocks of each stage."""
    for stage, blocks in enumerate(model.stage_blocks()):
        yield (
            _rounded(_block(block, spec, stage, index, len(blocks)), f"stages.{stage}.{index}", spec)
            for index, block in enumerate(blocks)
        )


def _block(block: Block, spec: DeploySpec, stage: int, index: int, depth: int) -> nn.Module:
    stream_type, open_size = spec.dtype_of(f"stages.{stage}.{index}"), spec.size_range is not None
    if spec.layout != "gpu":
        return ChannelsFirstBlock(block, spec, stream_type)
    in_weight = gain_moves_fewer_bytes_in_weight(
        block.dwconv.in_channels,
        math.prod(stage_sides(spec.image_size, stage)),
        before_downsampling=index == depth - 1 and stage < 3,
    )
    words: dict[str, Any] = {"gain_in_weight": in_weight, "folds": spec.folds, "stream_type": stream_type}
    words["open_size"] = open_size
    scales = None if spec.eight_bits is None else spec.eight_bits.of(f"stages.{stage}.{index}")
    if spec.eight_bits is None or scales is None:
        return TokenBlock(block, **words)
    return QuantisedBlock(block, scales, spec.eight_bits.placement, **words)


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


def separate_norms(variant: Variant, spec: DeploySpec) -> int:
    """How many stages keep their output in FP32 before a downsampling in half.

    There a head that normalises the output reads other values than the downsampling's norm, which reads rounded ones.
    Elsewhere the exporter makes one node of both norms.
    """
    last = [f"stages.{stage}.{depth - 1}" for stage, depth in enumerate(variant.depths[:3])]
    pairs = [(spec.dtype_of(name), spec.dtype_of(f"downsample_layers.{at}")) for at, name in enumerate(last, 1)]
    return sum(own == torch.float32 != following for own, following in pairs)


def check_parts(names: tuple[str, ...], variant: Variant) -> None:
    """Raise InputError for a name that is none of `parts_of`."""
    known = parts_of(variant)
    for name in names:
        if name not in known:
            last, parts = f"stages.3.{variant.depths[3] - 1}", block_parts(variant)
            raise InputError(
                f"No part of {variant.name} is called {name!r}. Its parts are downsample_layers.0 to .3, "
                f"blocks from stages.0.0 to {last}, their parts such as {last}.{parts[-2]} ({', '.join(parts)}), and "
                "head."
            )


def _statistics(spec: DeploySpec) -> tuple[Tensor, Tensor]:
    return torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)


def _input_normalisation(spec: DeploySpec) -> InputNormalisation:
    """In FP32 at least: the inputs are images, not yet rounded."""
    module = InputNormalisation(*_statistics(spec), spec.full_scale, channels_last=spec.input_kind == "uint8")
    return module if spec.precision == "fp64" else module.float()
