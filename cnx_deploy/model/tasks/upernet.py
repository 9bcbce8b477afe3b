"""UPerNet in training form, in mmsegmentation's names, and in the deploy form of one canvas.

Bilinear resizing has half-pixel centres (`align_corners=False`), as mmsegmentation's configurations of ConvNeXt do. The
deploy form is exact: batch norms and affines are folded, and what the canvas decides is a constant. Why resizes are
gathers, and what they save: docs/decisions/0029-canvas.md.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv:1807.10221; the auxiliary head is that
of mmsegmentation's configurations (Long et al., arXiv:1411.4038).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnx_deploy.core.image_size import sides, stage_sides
from cnx_deploy.model.deploy_layers import convolution, doubles, type_of, widen
from cnx_deploy.model.folds import fold_affine_into_conv, fold_batch_norm

if TYPE_CHECKING:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.model.tasks.segmentation import SegmentConfig

__all__ = ["DeployedUPerNet", "FCNHead", "LabelMap", "UPerNet", "bilinear_matrix", "pooling_matrix"]


class ConvModule(nn.Module):
    """Convolution without bias that keeps the size, batch norm, ReLU: mmcv's module of this name."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H, W)."""
        output: Tensor = F.relu(self.bn(self.conv(images)))
        return output


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class UPerNet(nn.Module):
    """Pyramid pooling of the last map, a feature pyramid over all, one map of all levels, a classifier.

    Shape: four maps (N, C_i, H/2^(i+2), W/2^(i+2)) -> (N, K, H/4, W/4). Bilinear resizing is with half-pixel centres
    (`align_corners=False`), as mmsegmentation's configurations of ConvNeXt have it.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, config: "SegmentConfig") -> None:
        super().__init__()
        channels, scales = config.channels, config.pool_scales
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(widths[-1], channels, 1)) for scale in scales
        )
        self.bottleneck = ConvModule(widths[-1] + len(scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in widths[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in widths[:-1])
        self.fpn_bottleneck = ConvModule(len(widths) * channels, channels, 3)
        self.dropout = nn.Dropout2d(config.dropout)
        self.conv_seg = _classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Apply the head; see the class for shapes."""
        last = maps[-1]
        pooled = [last, *(_resized(pool(last), last) for pool in self.psp_modules)]
        laterals = [conv(each) for conv, each in zip(self.lateral_convs, maps[:-1], strict=True)]
        laterals.append(self.bottleneck(torch.cat(pooled, dim=1)))
        for level in range(len(laterals) - 1, 0, -1):
            laterals[level - 1] = laterals[level - 1] + _resized(laterals[level], laterals[level - 1])
        pyramid = [conv(each) for conv, each in zip(self.fpn_convs, laterals[:-1], strict=True)] + laterals[-1:]
        joined = torch.cat([_resized(each, pyramid[0]) for each in pyramid], dim=1)
        output: Tensor = self.conv_seg(self.dropout(self.fpn_bottleneck(joined)))
        return output


class FCNHead(nn.Module):
    """A 3×3 convolution and a classifier on stage 3, which learn along. (N, C3, H, W) -> (N, K, H, W)."""

    def __init__(self, width: int, num_classes: int, config: "SegmentConfig") -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(width, config.auxiliary_channels, 3))
        self.dropout = nn.Dropout2d(config.dropout)
        self.conv_seg = _classifier(config.auxiliary_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the head; see the class for shapes."""
        output: Tensor = self.conv_seg(self.dropout(self.convs(images)))
        return output


class DeployedUPerNet(nn.Module):
    """UPerNet's deploy form. Shapes as of `UPerNet`, for the one size of the canvas.

    The pools of all scales are one product with a constant matrix (HW, 50), in FP32, since a mean over a map is a
    reduction; each scale is brought back by a product too, of at most four terms.
    """

    def __init__(self, head: UPerNet, affines: Sequence[tuple[Tensor, Tensor] | None], spec: "DeploySpec") -> None:
        super().__init__()
        scales = [int(cast(Any, pool[0]).output_size) for pool in _sequences(head.psp_modules)]
        last = stage_sides(spec.image_size, 3)
        pools = torch.cat([pooling_matrix(last, scale) for scale in scales], dim=1)
        self.register_buffer("pools", pools if spec.precision == "fp64" else pools.float())
        self.scales = scales
        self.grids_back = nn.ParameterList(bilinear_matrix((scale, scale), last) for scale in scales)
        self.psp_modules = nn.ModuleList(_folded(pool[1]) for pool in _sequences(head.psp_modules))
        self.bottleneck = _folded(head.bottleneck)
        laterals = (_folded(conv, affine) for conv, affine in zip(head.lateral_convs, affines[:-1], strict=True))
        gathers = spec.layout == "gpu" and "gathered-resize" in spec.folds
        # On tokens the product joins bias and ReLU, and the sum with the map above joins the other levels' sums.
        self.lateral_convs = nn.ModuleList(TokenLateral(conv) if gathers else conv for conv in laterals)
        sizes = [stage_sides(spec.image_size, level) for level in range(4)]
        above = [(sizes[level], sizes[level - 1]) for level in (1, 2, 3)]
        to_first = [(sizes[level], sizes[0]) for level in (1, 2, 3)]
        self.resizes = nn.ModuleList(_resize(*pair, gathers=gathers, spec=spec) for pair in above)
        self.resizes_to_first = nn.ModuleList(_resize(*pair, gathers=gathers, spec=spec) for pair in to_first)
        self.fpn_convs = nn.ModuleList(map(_folded, head.fpn_convs))
        self.fpn_bottleneck = _folded(head.fpn_bottleneck)
        self.conv_seg = convolution(*doubles(head.conv_seg))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Apply the head; see the class for shapes."""
        kind = type_of(self)
        *first, last = (each.to(kind) for each in maps)
        laterals = [F.relu(conv(each)) for conv, each in zip(self.lateral_convs, first, strict=True)]
        laterals.append(F.relu(self.bottleneck(torch.cat([last, *self._pyramid(last)], dim=1))))
        for level in (3, 2, 1):
            laterals[level - 1] = laterals[level - 1] + self.resizes[level - 1](laterals[level])
        pyramid = [F.relu(conv(each)) for conv, each in zip(self.fpn_convs, laterals[:-1], strict=True)]
        coarse = zip(self.resizes_to_first, (*pyramid[1:], laterals[-1]), strict=True)
        joined = torch.cat([pyramid[0], *(resize(each) for resize, each in coarse)], dim=1)
        output: Tensor = self.conv_seg(F.relu(self.fpn_bottleneck(joined)))
        return output

    def _pyramid(self, last: Tensor) -> list[Tensor]:
        """The last map (N, C, H, W) averaged to each grid, convolved, and brought back: (N, O, H, W) each."""
        height, width = last.shape[2:]
        pooled = torch.matmul(widen(last).flatten(2), cast(Tensor, self.pools)).to(last.dtype)  # (N, C, 50)
        grids = []
        cells = torch.split(pooled, [scale * scale for scale in self.scales], dim=2)
        for scale, own, conv, back in zip(self.scales, cells, self.psp_modules, self.grids_back, strict=True):
            grid = F.relu(conv(own.reshape(-1, own.shape[1], scale, scale))).flatten(2)  # (N, O, scale²)
            grids.append(torch.matmul(grid, back).reshape(-1, grid.shape[1], height, width))
        return grids


class TokenLateral(nn.Module):
    """A 1×1 convolution as a linear layer on tokens. (N, I, H, W) -> (N, O, H, W)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight, self.bias = nn.Parameter(conv.weight[:, :, 0, 0].detach()), nn.Parameter(conv.bias.detach())

    def forward(self, images: Tensor) -> Tensor:
        """Apply the layer; see the class for shapes."""
        return F.linear(images.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class Bilinear(nn.Module):
    """Bilinear resizing with half-pixel centres to a fixed size, as one operator. (N, C, h, w) -> (N, C, H, W)."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Resize; see the class for shapes."""
        return F.interpolate(images, self.size, mode="bilinear", align_corners=False)


class GatheredBilinear(nn.Module):
    """The same as four gathers with constant weights in FP32, which TensorRT joins with what reads the result.

    A Resize by 4 or 8 is a kernel of its own, which stores a map of 1/4 of the canvas.
    """

    def __init__(self, before: tuple[int, int], size: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.size = size
        (rows, down), (columns, across) = (_neighbours(*pair) for pair in zip(before, size, strict=True))
        places = rows[:, None, :, None] * before[1] + columns[None, :, None, :]  # (2, 2, H, W)
        self.register_buffer("places", places.reshape(4, -1))
        weights = down[:, None, :, None] * across[None, :, None, :]
        self.register_buffer("weights", weights.reshape(4, -1).to(dtype))

    def forward(self, images: Tensor) -> Tensor:
        """Resize; see the class for shapes."""
        return self.widened(images).to(images.dtype)

    def widened(self, images: Tensor) -> Tensor:
        """The same in FP32 at least."""
        flat = images.flatten(2)
        parts = [
            widen(torch.index_select(flat, 2, places)) * weights
            for places, weights in zip(cast(Tensor, self.places), cast(Tensor, self.weights), strict=True)
        ]
        resized: Tensor = parts[0] + parts[1] + parts[2] + parts[3]
        return resized.reshape(-1, images.shape[1], *self.size)


class LabelMap(nn.Module):
    """The best class of each pixel of the canvas. Logits (N, K, H/4, W/4) of any type -> (N, H, W) int64.

    With gathers TensorRT brings the logits to the canvas, compares them and stores the classes in one kernel: 2 MB an
    image of 256 px and 150 classes, where the resized logits are 20. An argmax would store them, as a Resize does. Of
    equal logits the first class counts; where one is NaN, the class is K, which is none.
    """

    def __init__(self, classes: int, spec: "DeploySpec") -> None:
        super().__init__()
        self.gathers = spec.layout == "gpu" and "gathered-resize" in spec.folds
        canvas = sides(spec.image_size)
        self.resize = _resize(stage_sides(canvas, 0), canvas, gathers=self.gathers, spec=spec)
        wide = torch.float64 if spec.precision == "fp64" else torch.float32
        self.register_buffer("classes", torch.arange(classes, dtype=wide)[:, None, None])

    def forward(self, logits: Tensor) -> Tensor:
        """Find the classes; see the class for shapes."""
        if not self.gathers:
            return cast(Tensor, self.resize(widen(logits)).argmax(dim=1))
        full, classes = cast(GatheredBilinear, self.resize).widened(logits), cast(Tensor, self.classes)
        best = full.amax(dim=1, keepdim=True)
        return torch.where(full >= best, classes, float(len(classes))).amin(dim=1).to(torch.int64)


def _resize(before: tuple[int, int], size: tuple[int, int], *, gathers: bool, spec: "DeploySpec") -> nn.Module:
    dtype = torch.float64 if spec.precision == "fp64" else torch.float32
    return GatheredBilinear(before, size, dtype) if gathers else Bilinear(size)


def _neighbours(before: int, after: int) -> tuple[Tensor, Tensor]:
    """The two places (2, after) between which each place along a side lies, and their weights in float64."""
    at = ((torch.arange(after, dtype=torch.float64) + 0.5) * before / after - 0.5).clamp_min(0.0)
    first = at.floor().long()
    share = at - first
    return torch.stack([first, (first + 1).clamp_max(before - 1)]), torch.stack([1.0 - share, share])


def pooling_matrix(size: tuple[int, int], grid: int) -> Tensor:
    """Adaptive average pooling of a map as a product: (H·W, grid²) float64.

    Cell i of n over a side of L is the mean over floor(i·L/n) to ceil((i+1)·L/n), as torch and cuDNN have it.
    """

    def along(side: int) -> Tensor:
        matrix = torch.zeros(side, grid, dtype=torch.float64)
        for cell in range(grid):
            start, end = cell * side // grid, -(-(cell + 1) * side // grid)
            matrix[start:end, cell] = 1.0 / (end - start)
        return matrix

    return torch.kron(along(size[0]), along(size[1]))


def bilinear_matrix(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Bilinear resizing with half-pixel centres as a product: (grid cells, H·W) float64."""
    units = torch.eye(grid[0] * grid[1], dtype=torch.float64).reshape(-1, 1, *grid)  # one cell each
    return F.interpolate(units, size, mode="bilinear", align_corners=False).flatten(1)


def _resized(images: Tensor, like: Tensor) -> Tensor:
    """Bilinear, half-pixel centres, to the height and width of `like`; as it is where it has them."""
    if images.shape[2:] == like.shape[2:]:
        return images
    return F.interpolate(images, like.shape[2:], mode="bilinear", align_corners=False)


def _folded(module: nn.Module, affine: tuple[Tensor, Tensor] | None = None) -> nn.Conv2d:
    """A `ConvModule` as one convolution in float64; `affine` is of its input, where its kernel is 1×1."""
    assert isinstance(module, ConvModule)
    conv, norm = module.conv, module.bn
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance, (gain, shift) = norm.running_mean.double(), norm.running_var.double(), doubles(norm)
    weight, bias = fold_batch_norm(conv.weight.detach().double(), mean, variance, gain, shift, norm.eps)
    if affine is not None:
        weight, bias = fold_affine_into_conv(weight, bias, *affine)
    layer = convolution(weight, bias)
    layer.padding = conv.padding
    return layer


def _sequences(modules: nn.ModuleList) -> list[nn.Sequential]:
    return [cast(nn.Sequential, module) for module in modules]
