"""The mean pair-wise cosine distance of channels, block by block: the paper's measure of feature collapse.

Source: Woo et al., "ConvNeXt V2", arXiv:2301.00808, section 4, "Feature cosine distance analysis" and figure 4: for an
activation of C channels, each flattened over space, 1/C² · Σᵢ Σⱼ (1 - cos(Xᵢ, Xⱼ)) / 2 over all pairs, i = j included;
an image at a time, averaged over images. The figure is of "the high-dimensional features from each layer", which are
the 4C channels between a block's two linear layers; the paper does not say on which side of GRN. Here both sides are
measured: `act` is what GELU gives, which ConvNeXt V1 has as well, so the two are compared by it; `grn` is what GRN
makes of it; `output` is the block's own, of C channels. GRN scales each channel and adds beta, and a cosine does not
see a positive scale: `act` and `grn` of one block differ by beta and by channels that change their sign alone.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnx_deploy.data import Preprocessing
from cnx_deploy.errors import CheckFailedError, InputError
from cnx_deploy.model.convnextv2 import ConvNeXtV2

__all__ = ["PARTS", "TensorDiversity", "channel_distance", "measure_diversity"]

PARTS = ("act", "grn", "output")
"""The tensors of a block that are measured, in the order of the data; ConvNeXt V1 has no `grn`."""


@dataclass(frozen=True, slots=True)
class TensorDiversity:
    """One tensor: `part` of PARTS of the block `block` (a torch module's name), means over images.

    `distance` in [0, 1]: 0 where all channels are alike up to a positive factor; NaN where no image had a channel that
    was not zero. `dead_share` in [0, 1]: channels that are zero everywhere, which have no cosine and are left out.
    """

    block: str
    part: str
    channels: int
    distance: float
    dead_share: float

    @property
    def module(self) -> str:
        """The torch module whose output it is."""
        return self.block if self.part == "output" else f"{self.block}.{self.part}"


class _Mean:
    """Sums over images for one tensor, fed by a forward hook."""

    def __init__(self, block: str, part: str) -> None:
        self._block, self._part = block, part
        self._channels = self._images = self._measured = 0
        self._distance = self._dead = 0.0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Hidden tensors are (N, H, W, C), a block's output is (N, C, H, W)."""
        last = output.permute(0, 2, 3, 1) if self._part == "output" else output
        distances, dead = channel_distance(last.flatten(1, 2))
        finite = distances.isfinite()
        if bool((~finite & (dead < last.shape[-1])).any()):
            raise CheckFailedError(
                f"{self._block} ({self._part}) gave values that are NaN or infinite: expected finite ones. Check the "
                "weights with cnx-deploy inspect."
            )
        known = distances[finite]
        self._channels = last.shape[-1]
        self._images += len(last)
        self._measured += len(known)
        self._distance += float(known.sum())
        self._dead += float(dead.sum()) / self._channels

    def result(self) -> TensorDiversity:
        distance = self._distance / self._measured if self._measured else math.nan
        return TensorDiversity(self._block, self._part, self._channels, distance, self._dead / self._images)


def channel_distance(maps: Tensor) -> tuple[Tensor, Tensor]:
    """(N, positions, channels) -> (N,) mean pair-wise distance in float64, (N,) count of channels that are zero.

    All C² pairs, those of a channel with itself included, as in the paper: C orthogonal channels have (1 - 1/C) / 2.
    The sum of all cosines is |Σᵢ Xᵢ/|Xᵢ||², so that no table of pairs is made. Zero channels are left out; NaN where
    there is no other, and where a value is NaN or infinite.
    """
    norms = torch.linalg.vector_norm(maps, dim=1, keepdim=True, dtype=torch.float64)  # (N, 1, C)
    alive = norms != 0  # NaN stays alive, and shows
    # In float64 the sum of C unit vectors loses nothing that float32 maps have.
    units = torch.where(alive, maps / norms.where(alive, 1.0), 0.0)  # (N, P, C)
    count = alive.sum(dim=(1, 2))  # (N,)
    cosines = units.sum(dim=2).square().sum(dim=1) / count.double().square()
    return (1.0 - cosines) / 2.0, maps.shape[2] - count


def measure_diversity(
    model: ConvNeXtV2,
    preprocessing: Preprocessing,
    batches: Iterable[Tensor],
    progress: Callable[[int], None] | None = None,
) -> tuple[TensorDiversity, ...]:
    """Run the model in float32 over (N, S, S, 3) uint8 batches; every block's tensors in the order of the data.

    `progress` is told the images of each batch. InputError when there is no image.
    """
    sums: list[_Mean] = []
    handles = []
    for stage, blocks in enumerate(model.stage_blocks()):
        for index, block in enumerate(blocks):
            for part, module in {"act": block.act, "grn": block.grn, "output": block}.items():
                if not isinstance(module, nn.Identity):  # in V1 nothing takes the place of GRN
                    sums.append(_Mean(f"stages.{stage}.{index}", part))
                    handles.append(module.register_forward_hook(sums[-1]))
    images = 0
    try:
        with torch.inference_mode():
            for pixels in batches:
                model.eval().forward_features(preprocessing.normalise(pixels))
                images += len(pixels)
                if progress is not None:
                    progress(len(pixels))
    finally:
        for handle in handles:
            handle.remove()
    if not images:
        raise InputError("There is no image to measure on. Name a folder that holds some, or leave --data out.")
    return tuple(each.result() for each in sums)
