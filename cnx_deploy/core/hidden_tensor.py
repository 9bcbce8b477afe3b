"""Where own kernels keep a block's hidden tensor: stored between two kernels, or computed a second time.

GRN needs the norm of the hidden tensor over the whole image before the second pointwise layer can start. So a block's
first kernel (LayerNorm, first product, GELU, sums of squares) either stores the hidden tensor of 4C channels for the
second (gain, second product, residual), or keeps the sums alone and the second kernel computes it again: fewer bytes
for 1.5 times the arithmetic. That pays where C is small. The rule is made from data sheets; nothing is measured here.
"""

from collections.abc import Sequence
from typing import Literal

from cnx_deploy.core.devices import Device, typical_device
from cnx_deploy.core.errors import InputError

__all__ = ["FUSED_MODES", "MOST_RECOMPUTED_CHANNELS", "FusedMode", "Hidden", "hidden_by_stage", "hidden_of_stage"]

Hidden = Literal["stored", "recomputed"]
FusedMode = Literal["auto", "stored", "recomputed"]
FUSED_MODES: tuple[FusedMode, ...] = ("auto", "stored", "recomputed")
"""auto: by `hidden_of_stage`; stored: in no stage recomputed; recomputed: in every stage that can be."""

MOST_RECOMPUTED_CHANNELS = 160
"""Beyond, the recomputing kernel keeps too much of a row in registers and loses more than the bytes it saves."""

SHARE_OF_PEAK = 0.6
"""Of a data sheet's FP16 rate, what a matrix product is taken to reach."""


def hidden_of_stage(channels: int, device: Device | None) -> Hidden:
    """Choose for a stage of `channels` on a GPU; for an unknown one (None) the hidden tensor is stored.

    A kernel takes the longer of its bytes and its arithmetic. In bytes for each of the C·H·W places of the stream, with
    r operations in the time of a byte: stored max(10, 8C/r) + max(12, 8C/r), recomputed max(2, 8C/r) + max(6, 16C/r).
    """
    if channels > MOST_RECOMPUTED_CHANNELS or device is None:
        return "stored"
    operations_a_byte = SHARE_OF_PEAK * device.fp16_tflops * 1e12 / (device.bandwidth_gb_s * 1e9)
    product = 8 * channels / operations_a_byte  # C × 4C multiply-adds a position, two operations each, over C
    stored = max(10, product) + max(12, product)
    recomputed = max(2, product) + max(6, 2 * product)
    return "recomputed" if recomputed < stored else "stored"


def hidden_by_stage(mode: FusedMode, dims: Sequence[int], target: str, device: Device | None = None) -> list[Hidden]:
    """Choose for each stage of a network with `dims` channels.

    `target`: the compute capability, such as "sm89"; `device`: the GPU itself where it is known.
    Raises InputError for an unknown mode.
    """
    if mode not in FUSED_MODES:
        raise InputError(f"{mode!r} is no way to keep the hidden tensor. Choose one of: {', '.join(FUSED_MODES)}.")
    if mode == "auto":
        return [hidden_of_stage(channels, device or typical_device(target)) for channels in dims]
    small = [channels <= MOST_RECOMPUTED_CHANNELS for channels in dims]
    return ["recomputed" if mode == "recomputed" and can_be else "stored" for can_be in small]
