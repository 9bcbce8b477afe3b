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
from cnx_deploy.core.variants import Variant
from cnx_deploy.model.deploy_layers import doubles, map_norm, widen
from cnx_deploy.model.layers import LayerNormChannelsFirst
from cnx_deploy.model.tasks.base import Outputs, Place, Prediction, Task, register_task
from cnx_deploy.model.tasks.segmentation_metrics import MapOutcome, RunningMaps, labels_on
from cnx_deploy.model.tasks.upernet import DeployedUPerNet, FCNHead, LabelMap, UPerNet

if TYPE_CHECKING:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.model.convnextv2 import ConvNeXtV2

__all__ = ["Segment", "SegmentConfig"]

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
            norms[f"norm{level}"] = map_norm(spec, *(() if is_folded else affine))
        modules = {**norms, "decode_head": DeployedUPerNet(head, affines, spec)}
        if "labels" in spec.outputs:
            modules["label_map"] = LabelMap(model.num_classes, spec)
        return modules

    def deployed_forward(self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = ()) -> Outputs:
        """Norms in FP32, convolutions in the head's type; the logits leave in FP32."""
        normed = [getattr(network, f"norm{level}")(maps[level]) for level in self.levels]
        logits = network.decode_head(normed)
        labels = network.label_map(logits) if "labels" in words else None
        return _answers(widen(logits), words, labels)

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


def _answers(logits: Tensor, words: Sequence[str], labels: Tensor | None = None) -> Outputs:
    """What the words name; logits are (N, K, H/4, W/4) in FP32 at least, `labels` (N, H, W) where they are known."""
    canvas = [STEM * side for side in logits.shape[2:]]
    outputs: Outputs = {}
    full = None
    if "full-logits" in words or ("labels" in words and labels is None):
        full = F.interpolate(logits, canvas, mode="bilinear", align_corners=False)
    for word in words or ("logits",):
        if word == "logits":
            outputs["logits"] = logits
        elif word == "labels" and labels is not None:
            outputs["labels"] = labels
        else:
            assert full is not None
            outputs |= {"labels": full.argmax(dim=1)} if word == "labels" else {"full_logits": full}
    return outputs


register_task(Segment())
