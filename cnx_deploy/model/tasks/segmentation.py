"""Semantic segmentation by UPerNet on the four stages: a class for each place of a canvas.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv:1807.10221. The head of the paper's
ADE20K results is mmsegmentation's UPerHead with an FCN head on stage 3 that learns along and is not deployed; modules
and tensors have mmsegmentation's names, `decode_head`, `auxiliary_head` and `norm0` to `norm3` on the stages' outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnx_deploy.core.class_names import NOT_COUNTED
from cnx_deploy.core.gates import Gate, OutputSpec
from cnx_deploy.core.image_size import stage_sides
from cnx_deploy.core.variants import Variant
from cnx_deploy.model.deploy_layers import ChannelsFirstNorm, convolution, doubles, type_of, widen
from cnx_deploy.model.folds import fold_affine_into_conv, fold_batch_norm
from cnx_deploy.model.layers import LayerNormChannelsFirst
from cnx_deploy.model.tasks.base import Outputs, Place, Prediction, Task, register_task
from cnx_deploy.model.tasks.segmentation_metrics import MapOutcome, RunningMaps, labels_on

if TYPE_CHECKING:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.model.convnextv2 import ConvNeXtV2

__all__ = ["Segment", "SegmentConfig", "bilinear_matrix", "pooling_matrix"]

STEM = 4
"""Pixels of the canvas to a side of one place of the first stage."""


@dataclass(frozen=True, slots=True)
class SegmentConfig:
    """The sizes of the heads, by default those of the paper's configurations.

    Attributes:
        channels: Width of UPerNet's maps.
        auxiliary_channels: Width of the FCN head on stage 3, which is for training; 0: there is none.
        pool_scales: Sides of the grids to which pyramid pooling averages the last stage.
        dropout: Share of the channels that is dropped before either classifier in training.
        auxiliary_weight: Factor on the loss of the FCN head.
    """

    channels: int = 512
    auxiliary_channels: int = 256
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    auxiliary_weight: float = 0.4

    def __post_init__(self) -> None:
        if self.channels < 1 or self.auxiliary_channels < 0 or not self.pool_scales or min(self.pool_scales) < 1:
            raise ValueError(
                f"channels {self.channels} and pool_scales {self.pool_scales} must be at least 1, and "
                f"auxiliary_channels {self.auxiliary_channels} at least 0"
            )
        if not 0.0 <= self.dropout < 1.0 or self.auxiliary_weight < 0:
            raise ValueError(f"dropout {self.dropout} must be in [0, 1), auxiliary_weight {self.auxiliary_weight} >= 0")


@dataclass(frozen=True, slots=True)
class ClassShare:
    """A class and the share of an image's pixels that it has."""

    index: int
    name: str
    share: float


@dataclass(frozen=True, slots=True)
class MapPrediction(Prediction):
    """The classes with the most pixels of one image, first that of the most.

    `labels`: the class of each pixel of the picture, (H, W) uint8; None where it was not known how the picture lies on
    its canvas. Then shares are those of the canvas.
    """

    shares: tuple[ClassShare, ...] = ()
    labels: Any = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, without the map."""
        values = asdict(replace(self, labels=None))
        del values["labels"]
        return values

    def __str__(self) -> str:
        if self.error is not None:
            return Prediction.__str__(self)
        return ", ".join(f"{one.name} {one.share:.1%}" for one in self.shares)


class Segment(Task):
    """UPerNet. Shape: the stages' outputs -> `logits` (N, K, H/4, W/4), or what the words name.

    `logits` are of a quarter of the canvas, as the head computes them; `full-logits` (N, K, H, W) are these brought to
    the canvas bilinearly, and `labels` (N, H, W) their best class.
    """

    name = "segment"
    answers = ("logits", "labels", "full-logits")
    levels = (0, 1, 2, 3)
    draws_own_weights = True
    is_dense = True
    usual_batch = (1, 2, 8)
    targets = "masks"
    prediction = MapPrediction
    training_defaults = MappingProxyType({
        "crop_mode": "corner", "crop_ratio": 1.0, "interpolation": "bilinear", "min_crop_area": 1.0,
        "scale_jitter": (0.5, 2.0), "photometric": True, "label_smoothing": 0.0, "randaugment_magnitude": 0.0,
        "erasing_probability": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0,
    })  # fmt: skip
    config: SegmentConfig = SegmentConfig()

    @property
    def class_layers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The classifiers of the heads."""
        auxiliary = ("auxiliary_head.conv_seg",) if self.config.auxiliary_channels else ()
        return ("decode_head.conv_seg", *auxiliary)

    def outputs(
        self, num_classes: int, words: Sequence[str] = (), maps: Sequence[tuple[int, int, int]] = ()
    ) -> tuple[OutputSpec, ...]:
        """Declare what the words name."""
        height, width = maps[0][1:] if maps else (0, 0)
        canvas = (STEM * height, STEM * width)
        declared = {
            "logits": OutputSpec("logits", (num_classes, height, width), "logit", "softmax"),
            "full-logits": OutputSpec("full_logits", (num_classes, *canvas), "logit", "softmax"),
            "labels": OutputSpec("labels", canvas, "class", dtype="int64", indexes="full_logits"),
        }
        return tuple(declared[word] for word in words or ("logits",))

    def modules(self, variant: Variant, num_classes: int) -> dict[str, nn.Module]:
        """Norms on the stages' outputs, UPerNet, and the auxiliary head where there is one."""
        modules: dict[str, nn.Module] = {
            f"norm{level}": LayerNormChannelsFirst(width) for level, width in enumerate(variant.dims)
        }
        modules["decode_head"] = UPerNet(variant.dims, num_classes, self.config)
        if self.config.auxiliary_channels:
            modules["auxiliary_head"] = FCNHead(variant.dims[2], num_classes, self.config)
        return modules

    def forward(
        self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = (), *, temperature: float = 1.0
    ) -> Outputs:
        """Normalise the maps, and run the head on them."""
        logits = network.decode_head([getattr(network, f"norm{level}")(maps[level]) for level in self.levels])
        return _answers(logits, words)

    def training_outputs(self, network: Any, maps: Mapping[int, Tensor]) -> Outputs:
        """`logits` and, where there is an auxiliary head, `auxiliary_logits`, both at the size of their maps."""
        normed = [getattr(network, f"norm{level}")(maps[level]) for level in self.levels]
        outputs = {"logits": network.decode_head(normed)}
        if self.config.auxiliary_channels:
            outputs["auxiliary_logits"] = network.auxiliary_head(normed[2])
        return outputs

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of each image (N,), a mean over its counted pixels; `targets` (N, H, W), 255 not counted.

        Logits are brought to the size of the targets bilinearly. An image without a counted pixel has a loss of 0.
        """
        counted = (targets != NOT_COUNTED).flatten(1).sum(dim=1).clamp_min(1)  # (N,)

        def of(logits: Tensor) -> Tensor:
            full = F.interpolate(logits.float(), targets.shape[-2:], mode="bilinear", align_corners=False)
            each = F.cross_entropy(
                full, targets, ignore_index=NOT_COUNTED, reduction="none", label_smoothing=label_smoothing
            )
            return each.flatten(1).sum(dim=1) / counted

        loss = of(outputs["logits"])
        if "auxiliary_logits" in outputs:
            loss = loss + self.config.auxiliary_weight * of(outputs["auxiliary_logits"])
        return loss

    def metrics(self, class_names: Sequence[str], each: Callable[[MapOutcome], None] | None = None) -> RunningMaps:
        """Intersection over union and accuracy of pixels."""
        return RunningMaps(class_names, each)

    def deployed_modules(self, model: "ConvNeXtV2", spec: "DeploySpec") -> dict[str, nn.Module]:
        """Batch norms are folded into their convolutions, affines of the first three norms into the laterals."""
        head, folds = cast(UPerNet, model.get_submodule("decode_head")), spec.folds
        norms: dict[str, nn.Module] = {}
        affines: list[tuple[Tensor, Tensor] | None] = []
        for level in self.levels:
            affine = doubles(cast(nn.LayerNorm, model.get_submodule(f"norm{level}")))
            # The last map is read by a padded convolution: its shift is no constant at the edge.
            is_folded = level < 3 and "lateral-affine" in folds
            affines.append(affine if is_folded else None)
            norms[f"norm{level}"] = ChannelsFirstNorm(spec.layout == "gpu", *(() if is_folded else affine))
        return {**norms, "decode_head": DeployedUPerNet(head, affines, spec)}

    def deployed_forward(self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = ()) -> Outputs:
        """Norms in FP32, convolutions in the head's type; the logits leave in FP32."""
        normed = [getattr(network, f"norm{level}")(maps[level]) for level in self.levels]
        return _answers(widen(network.decode_head(normed)), words)

    def operators_of(self, spec: "DeploySpec") -> Mapping[str, int]:
        """The norms on the stages' outputs; the exporter merges one with the downsampling's norm of the same map.

        They are the same node where neither has an affine, or where the affine is spelled out behind it.
        """
        are_merged = spec.layout == "gpu" or {"lateral-affine", "downsample-affine"} <= spec.folds
        return {"ChannelsFirstNorm": 1 if are_merged else 4}

    def predictions(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None, *, top: int
    ) -> list[Prediction]:
        """The shares of the canvas that the `top` most frequent classes have."""
        return [
            MapPrediction(path, shares=_shares(labels, class_names, top))
            for path, labels in zip(paths, _labels_of(outputs), strict=True)
        ]

    def predictions_on_pictures(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None,
        places: Sequence[Place], *, top: int,
    ) -> list[Prediction]:  # fmt: skip
        """The class of each pixel of the pictures, and the shares of the `top` most frequent ones."""
        answers: list[Prediction] = []
        for at, (path, place) in enumerate(zip(paths, places, strict=True)):
            labels = labels_on({name: output[at : at + 1] for name, output in outputs.items()}, place)
            kind = torch.uint8 if int(labels.max()) < NOT_COUNTED else torch.int32
            shares = _shares(labels, class_names, top)
            answers.append(MapPrediction(path, shares=shares, labels=labels.to(kind).numpy()))
        return answers

    def gate(self, gate: Gate) -> Gate:
        """The gate of the precision, but at most one place in 10,000 may have another class without an excuse."""
        return replace(gate, top1_agreement_min=max(gate.top1_agreement_min, 1.0 - 1e-4))

    def fitted(self, state: Mapping[str, Tensor]) -> "Segment":
        """The widths of the heads in a state dict; pooling grids of the usual sides, of which there must be as many."""
        widths = {
            name: weight.shape[1] if (weight := state.get(f"{head}.conv_seg.weight")) is not None else 0
            for name, head in (("channels", "decode_head"), ("auxiliary_channels", "auxiliary_head"))
        }
        return self.configured(widths) if widths["channels"] else self

    def num_classes_in(self, state: Mapping[str, Tensor]) -> int | None:
        """The classes of the head; None without one."""
        weight = state.get("decode_head.conv_seg.weight")
        return weight.shape[0] if weight is not None and weight.ndim else None

    def trained_alone(self, network: Any) -> list[nn.Module]:
        """Everything behind the backbone."""
        return [network.get_submodule(name) for name in self.modules(network.variant, 1)]


def _shares(labels: Tensor, class_names: Sequence[str] | None, top: int) -> tuple[ClassShare, ...]:
    """The `top` classes with the most of a map, most first."""
    counts = torch.bincount(labels.flatten(), minlength=1)
    best = counts.argsort(descending=True, stable=True)[:top].tolist()
    return tuple(
        ClassShare(at, class_names[at] if class_names else str(at), float(counts[at]) / labels.numel())
        for at in best
        if counts[at]
    )


def _labels_of(outputs: Mapping[str, Tensor]) -> Tensor:
    """(N, H, W) best classes from whichever output has them."""
    if "labels" in outputs:
        return outputs["labels"]
    name = next(name for name in ("full_logits", "logits") if name in outputs)
    return outputs[name].argmax(dim=1)


def _answers(logits: Tensor, words: Sequence[str]) -> Outputs:
    """What the words name; logits are (N, K, H/4, W/4) in FP32 at least."""
    canvas = [STEM * side for side in logits.shape[2:]]
    outputs: Outputs = {}
    full = None
    if {"labels", "full-logits"} & set(words):
        full = F.interpolate(logits, canvas, mode="bilinear", align_corners=False)
    for word in words or ("logits",):
        if word == "logits":
            outputs["logits"] = logits
        else:
            assert full is not None
            outputs |= {"labels": full.argmax(dim=1)} if word == "labels" else {"full_logits": full}
    return outputs


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

    def __init__(self, widths: Sequence[int], num_classes: int, config: SegmentConfig) -> None:
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

    def __init__(self, width: int, num_classes: int, config: SegmentConfig) -> None:
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
        flat = images.flatten(2)
        parts = [
            widen(torch.index_select(flat, 2, places)) * weights
            for places, weights in zip(cast(Tensor, self.places), cast(Tensor, self.weights), strict=True)
        ]
        resized: Tensor = parts[0] + parts[1] + parts[2] + parts[3]
        return resized.to(images.dtype).reshape(-1, images.shape[1], *self.size)


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


register_task(Segment())
