"""The training form of ConvNeXt V2: readable, trainable, the reference for everything else. V1 differs in its blocks.

A network is the backbone, whose stages are here, and the head of a task (`model.tasks`).

Source: Woo et al., arXiv:2301.00808; reference code facebookresearch/ConvNeXt-V2, `models/convnextv2.py` (MIT).
"""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import MAX_CHANNELS, check_image_size
from cnx_deploy.core.variants import Variant, find_variant
from cnx_deploy.model.layers import Block, LayerNormChannelsFirst
from cnx_deploy.model.tasks.base import Outputs, Task, find_task, sole_or_named

__all__ = ["ConvNeXtV2", "create_model", "random_model"]


class ConvNeXtV2(nn.Module):
    """ConvNeXt V2, or V1 where the variant says so, with the head of a task.

    Shape: (N, C, H, W) normalised images -> (N, num_classes) logits of a classifier, or what the task declares; H and W
    at least 32; the strided convolutions leave out rows and columns that do not fill a patch.

    Args:
        variant: depths and widths.
        num_classes: width of the head.
        task: what the network is for.
        in_chans: channels C of an image, 1 to 16; 3 are RGB.
        drop_path_rate: stochastic-depth rate of the last block; it rises linearly from 0 over the blocks.
        head_init_scale: factor on the head's initial weight and bias (0.001 in the paper's fine-tuning).
    """

    norm: nn.LayerNorm  # of a classifier
    head: nn.Linear  # of a classifier

    def __init__(
        self,
        variant: Variant,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        task: Task | str = "classification",
        in_chans: int = 3,
    ) -> None:
        if not 1 <= in_chans <= MAX_CHANNELS:
            raise InputError(f"in_chans is {in_chans}; images have 1 to {MAX_CHANNELS} channels.")
        task = find_task(task) if isinstance(task, str) else task
        if num_classes < 1 and task.has_classes:
            raise InputError(f"num_classes is {num_classes}; a network needs at least 1.")
        if not 0.0 <= drop_path_rate < 1.0:
            raise InputError(f"drop_path_rate is {drop_path_rate}; a stochastic-depth rate is at least 0 and below 1.")
        super().__init__()
        self.variant = variant
        self.task = task
        self.num_classes = num_classes if task.has_classes else 0
        self.in_chans = in_chans
        widths = variant.dims
        stem = nn.Sequential(nn.Conv2d(in_chans, widths[0], kernel_size=4, stride=4), LayerNormChannelsFirst(widths[0]))
        downsamplings = [
            nn.Sequential(LayerNormChannelsFirst(before), nn.Conv2d(before, after, kernel_size=2, stride=2))
            for before, after in itertools.pairwise(widths)
        ]
        self.downsample_layers = nn.ModuleList([stem, *downsamplings])
        self.stages = nn.ModuleList(_stages(variant, drop_path_rate))
        for name, module in task.modules(variant, num_classes).items():
            self.add_module(name, module)
        for part in (self.downsample_layers, self.stages) if task.draws_own_weights else (self,):
            part.apply(_initialise)
        with torch.no_grad():
            for layer in map(self.get_submodule, task.class_layers):
                for parameter in layer.parameters():
                    parameter.mul_(head_init_scale)

    def stem_layers(self) -> tuple[nn.Conv2d, LayerNormChannelsFirst]:
        """The stem's convolution and norm."""
        conv, norm = cast(nn.Sequential, self.downsample_layers[0])
        return cast(nn.Conv2d, conv), cast(LayerNormChannelsFirst, norm)

    def downsampling_layers(self) -> list[tuple[LayerNormChannelsFirst, nn.Conv2d]]:
        """Norm and convolution of each of the three downsamplings."""
        pairs = [tuple(cast(nn.Sequential, layer)) for layer in list(self.downsample_layers)[1:]]
        return cast(list[tuple[LayerNormChannelsFirst, nn.Conv2d]], pairs)

    def stage_blocks(self) -> list[list[Block]]:
        """The blocks of each stage, stage 1 first."""
        return [cast(list[Block], list(cast(nn.Sequential, stage))) for stage in self.stages]

    def forward_outputs(self, images: Tensor, words: Sequence[str] = (), *, temperature: float = 1.0) -> Outputs:
        """(N, C, H, W) -> the outputs of the task by name, or those that `words` of it choose.

        `temperature` divides the logits of a task that allows it.
        """
        return self.task.forward(self, self._maps(images, words), words, temperature=temperature)

    def training_outputs(self, images: Tensor) -> Outputs:
        """(N, C, H, W) -> what the loss of the task reads, which may be more than its outputs."""
        return self.task.training_outputs(self, self._maps(images, ()))

    def _maps(self, images: Tensor, words: Sequence[str]) -> dict[int, Tensor]:
        check_image_size(images.shape[-2], images.shape[-1])
        maps: dict[int, Tensor] = {}  # torch.compile breaks the graph at dict[int, Tensor]()
        levels = self.task.levels_of(words)
        for level, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            images = stage(downsample(images))
            if level in levels:
                maps[level] = images
        return maps

    def forward(self, images: Tensor) -> Any:
        """Return the logits of a classifier, or the one output of another task; several are a dict by name."""
        return sole_or_named(self.forward_outputs(images))


def create_model(
    variant: Variant | str,
    num_classes: int = 1000,
    *,
    drop_path_rate: float = 0.0,
    head_init_scale: float = 1.0,
    task: Task | str = "classification",
    in_chans: int = 3,
) -> ConvNeXtV2:
    """Build a freshly initialised model as the papers do.

    Truncated normal (0.02), zero biases, GRN the identity; in V1 LayerScale at 1e-6.
    """
    found = find_variant(variant) if isinstance(variant, str) else variant
    return ConvNeXtV2(found, num_classes, drop_path_rate, head_init_scale, task, in_chans)


def random_model(
    variant: Variant | str,
    num_classes: int = 1000,
    *,
    seed: int = 0,
    task: Task | str = "classification",
    in_chans: int = 3,
) -> ConvNeXtV2:
    """Build an evaluation-mode model whose every parameter is drawn at random, none of them zero or one.

    For parity and benchmarks: with the paper's initialisation GRN is the identity and a broken GRN would go
    unnoticed. Weights have standard deviation 1/sqrt(fan-in), GRN gamma and LayerScale 1, everything else 0.1 (gains
    around 1).
    The same seed gives the same weights with the same torch, on processors with AVX2; on others it draws others.
    """
    with torch.device("meta"):
        model = create_model(variant, num_classes, task=task, in_chans=in_chans)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # of batch norms
            if not buffer.is_floating_point():
                buffer.zero_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=generator)
            else:
                buffer.normal_(std=0.1, generator=generator)
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim in (2, 4) and "grn" not in name:
                parameter.mul_(parameter[0].numel() ** -0.5)
            elif not name.endswith(".gamma"):
                parameter.mul_(0.1)
                if name.endswith("weight"):  # a LayerNorm gain
                    parameter.add_(1.0)
        model.task.temper(model)
    return model


def _stages(variant: Variant, drop_path_rate: float) -> list[nn.Sequential]:
    rates = iter([drop_path_rate * index / max(1, variant.block_count - 1) for index in range(variant.block_count)])
    return [
        nn.Sequential(*(Block(width, next(rates), variant.version) for _ in range(depth)))
        for depth, width in zip(variant.depths, variant.dims, strict=True)
    ]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
