"""Which parameters learn how fast: groups, weight decay, layer-wise decay of the learning rate, and its schedule.

Source: Woo et al., arXiv:2301.00808, appendix A.1 (AdamW, cosine schedule with linear warm-up); no weight decay on
norms, biases and GRN, and the numbering of layers, are the reference code's (facebookresearch/ConvNeXt-V2,
optim_factory.py).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cnx_deploy.core.variants import Variant
from cnx_deploy.training.spec import TrainingSpec

__all__ = ["cosine_with_warmup", "layer_count", "layer_index", "make_optimizer", "parameter_groups"]

MOMENTUM = 0.9
BLOCKS_A_GROUP = 3
STEPS_AT = (27 / 36, 33 / 36)
"""Shares of a run after which the learning rate is a tenth: COCO's schedule of 36 epochs."""


def layer_index(name: str, variant: Variant, groups: str) -> int:
    """The layer that a parameter counts to, from 0; `layer_count` is that of the head.

    "single": every block is a layer, and a downsampling goes with the block after it. "group": stages 1, 2 and 4 are a
    layer each, as is every three blocks of stage 3; a downsampling goes with the layer after it, the stem before all.
    "stage": a stage is a layer, all downsamplings lie before the first, and the head lies as far behind as mmseg's
    `stage_wise` has it.
    """
    part, _, rest = name.partition(".")
    if part not in ("downsample_layers", "stages"):
        return layer_count(variant, groups)
    stage, block = (int(word) for word in (f"{rest}.0").split(".")[:2]) if part == "stages" else (int(rest[0]), 0)
    if groups == "stage":
        return stage + 1 if part == "stages" else 0
    if groups == "single":
        return sum(variant.depths[:stage]) + block + 1
    if part == "downsample_layers" and stage == 0:
        return 0
    return (1, 2, 3 + block // BLOCKS_A_GROUP, layer_count(variant, groups) - 1)[stage]


def layer_count(variant: Variant, groups: str) -> int:
    """The head's layer index."""
    if groups == "single":
        return variant.block_count + 1
    if groups == "stage":
        return 7 if variant.depths[2] <= 9 else 13
    return 4 + -(-variant.depths[2] // BLOCKS_A_GROUP)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    variant: Variant | None = None,
    layer_decay: float = 1.0,
    groups: str = "single",
) -> list[dict[str, Any]]:
    """Group parameters by weight decay and by layer, for the optimiser.

    Matrices and kernels have weight decay; norms, biases, GRN and LayerScale have none. A group's `rate_share` is
    `layer_decay` to the power of the layers between it and the head. Parameters that do not learn are left out.
    `variant` is needed where `layer_decay` is not 1.
    """
    groups_of: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and ".grn." not in name
        share = 1.0
        if variant is not None:
            share = layer_decay ** (layer_count(variant, groups) - layer_index(name, variant, groups))
        groups_of.setdefault((share, weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "rate_share": share, "weight_decay": decay}
        for (share, decay), parameters in groups_of.items()
    ]


def make_optimizer(model: nn.Module, spec: TrainingSpec) -> torch.optim.Optimizer:
    """Make the optimiser, each group at its share of the learning rate."""
    rate, layers = spec.resolved_learning_rate, spec.layer_decay_groups
    groups = parameter_groups(
        model, spec.weight_decay, variant=spec.network, layer_decay=spec.layer_decay, groups=layers
    )
    for group in groups:
        group["lr"] = rate * group["rate_share"]
    if spec.optimizer == "adamw":
        # Fused: 2.8 instead of 8.6 ms a step for atto on two cores.
        return torch.optim.AdamW(groups, rate, betas=(0.9, spec.beta2), fused=True)
    return torch.optim.SGD(groups, rate, momentum=MOMENTUM, fused=True)


def cosine_with_warmup(
    total_steps: int, warmup_steps: int, final_share: float, *, is_linear: bool = False
) -> Callable[[int], float]:
    """Make the factor on the learning rate at a step: linear up to 1, then half a cosine down to `final_share`.

    With `is_linear` it falls evenly.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        left = 1.0 - done if is_linear else 0.5 * (1.0 + math.cos(math.pi * done))
        return final_share + (1.0 - final_share) * left

    return factor


def steps_with_warmup(total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Make the factor on the learning rate at a step: linear up to 1, then a tenth from each of `STEPS_AT` on."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return float(0.1 ** sum(step >= share * total_steps for share in STEPS_AT))

    return factor


def make_schedule(optimizer: torch.optim.Optimizer, spec: TrainingSpec, total_steps: int) -> Any:
    """Make the schedule over all steps of the optimiser."""
    warmup = round(total_steps * spec.resolved_warmup_epochs / spec.epochs)
    if spec.schedule == "step":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, steps_with_warmup(total_steps, warmup))
    final = 1.0 if spec.schedule == "constant" else spec.resolved_final_rate / spec.resolved_learning_rate
    is_linear = spec.schedule == "linear"
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, cosine_with_warmup(total_steps, warmup, final, is_linear=is_linear)
    )
