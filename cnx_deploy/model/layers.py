"""The two normalisations of ConvNeXt V2 and its block, as the paper has them, and the block of V1.

Source: Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", arXiv:2301.00808,
section 4 and algorithm 1 (GRN), figure 5 (block); reference code facebookresearch/ConvNeXt-V2 (MIT). V1: Liu et al.,
"A ConvNet for the 2020s", arXiv:2201.03545; reference code facebookresearch/ConvNeXt (MIT).
Parameter names and shapes are those of the reference code, so its checkpoints load without renaming.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EPS", "LAYER_SCALE", "Block", "GlobalResponseNorm", "LayerNormChannelsFirst", "StochasticDepth"]

EPS = 1e-6
"""Epsilon of every LayerNorm and GRN of the network; torch's LayerNorm default is 1e-5."""

LAYER_SCALE = 1e-6
"""What V1's LayerScale starts at (V1 paper, table 5)."""


class GlobalResponseNorm(nn.Module):
    """Scale each channel by its share of the global response, add the input.

    Shape: (N, H, W, C) -> (N, H, W, C), any float dtype; the reduction runs in FP32 or wider.
    Formula: gamma · x · n + beta + x with n = ‖x‖₂ / (mean over channels of ‖x‖₂ + eps), the norm over H × W.
    Source: arXiv:2301.00808, algorithm 1. gamma and beta start at zero, so a fresh layer is the identity.
    """

    def __init__(self, channels: int, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the norm; see the class for shapes."""
        # A sum of squares over 56x56 leaves the FP16 range once the RMS passes sqrt(65504 / 3136) = 4.6.
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        norm = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True)  # (N, 1, 1, C)
        share = norm / (norm.mean(dim=-1, keepdim=True) + self.eps)  # (N, 1, 1, C)
        output: Tensor = self.gamma * share.to(hidden.dtype) * hidden + self.beta + hidden
        return output


class LayerNormChannelsFirst(nn.LayerNorm):
    """LayerNorm over the channels of an (N, C, H, W) tensor.

    Permuted to channels-last around torch's own LayerNorm, whose variance is safe in every dtype; the spelled-out
    form of the reference code overflows in FP16 (facebookresearch/ConvNeXt issue 80).
    """

    def __init__(self, channels: int, eps: float = EPS) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        last = F.layer_norm(images.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return last.permute(0, 3, 1, 2)


class StochasticDepth(nn.Module):
    """Drop a whole residual branch, image by image, while training; the kept ones are scaled by 1/(1 - p).

    Shape: (N, …) -> (N, …). Source: Huang et al., "Deep Networks with Stochastic Depth", arXiv:1603.09382. The same as
    torchvision.ops.StochasticDepth(p, "row"), whose import takes four seconds because it loads torch's compiler.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor) -> Tensor:
        """Apply; see the class for shapes."""
        if not self.training or self.p == 0.0:
            return branch
        kept = torch.empty(len(branch), *[1] * (branch.ndim - 1), dtype=branch.dtype, device=branch.device)
        return branch * kept.bernoulli_(1.0 - self.p).div_(1.0 - self.p)


class Block(nn.Module):
    """Depthwise 7×7, LayerNorm, widen to 4C, GELU, GRN, narrow to C, stochastic depth, residual.

    Shape: (N, C, H, W) -> (N, C, H, W). In `version` 1 GRN is missing, and LayerScale multiplies each channel of the
    branch by its `gamma` (C,) (Touvron et al., arXiv:2103.17239).
    """

    def __init__(self, channels: int, drop_path_rate: float = 0.0, version: int = 2) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.grn: GlobalResponseNorm | nn.Identity = GlobalResponseNorm(4 * channels) if version == 2 else nn.Identity()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), LAYER_SCALE)) if version == 1 else None
        self.drop_path = StochasticDepth(drop_path_rate)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block; see the class for shapes."""
        last = self.dwconv(images).permute(0, 2, 3, 1)  # (N, H, W, C)
        hidden = self.grn(self.act(self.pwconv1(self.norm(last))))  # (N, H, W, 4C)
        branch = self.pwconv2(hidden)  # (N, H, W, C)
        if self.gamma is not None:
            branch = self.gamma * branch
        output: Tensor = images + self.drop_path(branch.permute(0, 3, 1, 2))  # (N, C, H, W)
        return output
