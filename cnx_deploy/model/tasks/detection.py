"""Detection and instance segmentation: Mask R-CNN, or Faster R-CNN without masks.

An image has a fixed number of detections, `config.detections`. Those that are missing have score 0, label -1 and no
sides. The training form is torchvision's (`detection_heads`), the deploy form has fixed shapes (`detection_deploy`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec
import torch
from torch import Tensor, nn

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import OutputSpec
from cnx_deploy.core.image_size import size_text
from cnx_deploy.core.variants import Variant
from cnx_deploy.model.tasks import detection_deploy, detection_heads
from cnx_deploy.model.tasks.base import Outputs, Place, Prediction, Task, register_task
from cnx_deploy.model.tasks.detection_metrics import NOT_EXACT, DetectionOutcome, RunningDetections

if TYPE_CHECKING:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.model.convnextv2 import ConvNeXtV2

__all__ = ["MMDET", "Detect", "DetectConfig", "Detection", "DetectionPrediction", "training_losses"]

MASK_SIDE = 2 * detection_heads.MASK_SIDE
LARGEST_TOP_K = 3840
"""TensorRT-RTX 1.7 chooses no more of a row."""

Positive = Annotated[int, msgspec.Meta(ge=1)]
Chosen = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_TOP_K)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Length = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True, slots=True)
class DetectConfig:
    """Sizes and constants of the heads. The defaults are torchvision's, which are the paper's recipe.

    Attributes:
        channels: of the feature pyramid.
        box_channels: of the two linear layers that classes and boxes come from.
        mask_channels: of the four convolutions that masks come from.
        masks: whether there are masks; without, the network is a Faster R-CNN.
        stage_norms: whether the stages' outputs are normalised, as in mmdet; where people wrap timm's or torchvision's
            backbone for torchvision's detection they are not.
        anchor_sizes: side of the anchors in pixels, one a level.
        anchor_ratios: height by width.
        rounded_anchors: whether anchors are rounded to whole pixels: torchvision yes, mmdet no.
        even_strides: whether levels are 4, 8, … 64 pixels apart. torchvision divides image by map: 61 at 800 px.
        pre_nms: proposals of a level before suppression, when not training.
        proposals: proposals of an image, when not training.
        training_proposals: both, when training.
        rpn_nms, box_nms: overlap from which a proposal, or a detection of the same class, is suppressed.
        box_weights: what the changes x, y, width and height are divided by.
        clips_small: whether changes of a side are limited below as above: torchvision no, mmdet yes.
        aligned: RoIAlign's half a pixel: torchvision no, mmdet yes.
        sampling_ratio: samples along a side of a bin; 0 is one a pixel, mmdet's value.
        sampling_limit: with ratio 0, the most samples of the deploy form; where they are not enough, `exact` is 0.
        score_threshold: probability that a detection exceeds.
        detections: of an image.
        candidates: boxes before the last suppression, in the deploy form.
        passes: applications of the suppression's fixed point, in the deploy form.
    """

    channels: Positive = 256
    box_channels: Positive = 1024
    mask_channels: Positive = 256
    masks: bool = True
    stage_norms: bool = True
    anchor_sizes: tuple[Length, Length, Length, Length, Length] = (32, 64, 128, 256, 512)
    anchor_ratios: Annotated[tuple[Length, ...], msgspec.Meta(min_length=1)] = (0.5, 1.0, 2.0)
    rounded_anchors: bool = True
    even_strides: bool = False
    pre_nms: Chosen = 1000
    proposals: Chosen = 1000
    training_proposals: Positive = 2000
    rpn_nms: Share = 0.7
    box_nms: Share = 0.5
    box_weights: tuple[Length, Length, Length, Length] = (10.0, 10.0, 5.0, 5.0)
    clips_small: bool = False
    aligned: bool = False
    sampling_ratio: Annotated[int, msgspec.Meta(ge=0, le=8)] = 2
    sampling_limit: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    score_threshold: Share = 0.05
    detections: Chosen = 100
    candidates: Chosen = 1000
    passes: Positive = 10


MMDET: Mapping[str, Any] = MappingProxyType(
    {"rounded_anchors": False, "even_strides": True, "clips_small": True, "aligned": True, "sampling_ratio": 0}
)
"""What mmdet does otherwise than torchvision, beside the names of its weights."""


@dataclass(frozen=True, slots=True)
class Detection:
    """One object: class, probability, and corners left, top, right, bottom in pixels of the picture.

    They are of the canvas where it is not known how the picture lies on it.
    """

    index: int
    name: str
    probability: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class DetectionPrediction(Prediction):
    """The objects of one image, best first; `error` also says where the deploy form's limits were too low for it.

    `masks`: probabilities (n, 28, 28) inside the boxes, in the same order; None of a network without masks.
    """

    detections: tuple[Detection, ...] = ()
    masks: Any = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, without the masks."""
        values = asdict(replace(self, masks=None))
        del values["masks"]
        return values

    def __str__(self) -> str:
        if self.error is not None:
            return Prediction.__str__(self)
        corners = ("({:.0f}, {:.0f}, {:.0f}, {:.0f})".format(*one.box) for one in self.detections)
        rows = zip(self.detections, corners, strict=True)
        return ", ".join(f"{one.name} {one.probability:.1%} {box}" for one, box in rows) or "nothing"


class Detect(Task):
    """Mask R-CNN. Shape: the stages' outputs -> boxes (N, D, 4) and what belongs to them; see `outputs`."""

    name = "detect"
    answers = ("boxes", "masks")
    levels = (0, 1, 2, 3)
    config = DetectConfig()
    conventions = MappingProxyType({"mmdet": MMDET})
    draws_own_weights = True
    behind_a_choice = ("proposals.coder", "box_head", "mask_head")
    is_dense = True
    prediction = DetectionPrediction
    targets = "instances"
    usual_top = LARGEST_TOP_K
    training_defaults = MappingProxyType({
        "crop_mode": "corner", "crop_ratio": 1.0, "interpolation": "bilinear", "min_crop_area": 1.0,
        "scale_jitter": (0.6, 1.0), "label_smoothing": 0.0, "randaugment_magnitude": 0.0, "erasing_probability": 0.0,
        "mixup_alpha": 0.0, "cutmix_alpha": 0.0,
    })  # fmt: skip

    @property
    def class_layers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The last layers of the heads."""
        masks = ("roi_heads.mask_predictor.mask_fcn_logits",) if self.config.masks else ()
        return ("roi_heads.box_predictor", *masks)

    def trained_alone(self, network: Any) -> list[nn.Module]:
        """All but the backbone: proposals are nobody else's."""
        return [
            *(network.get_submodule(f"norm{level}") for level in range(4)),
            network.fpn,
            network.rpn,
            network.roi_heads,
        ]

    def outputs(
        self, num_classes: int, words: Sequence[str] = (), maps: Sequence[tuple[int, int, int]] = ()
    ) -> tuple[OutputSpec, ...]:
        """Corners in pixels of the canvas, probabilities, classes from 0, masks inside the boxes, and `exact`.

        `exact` is 1 where the detections are those of the training form, and 0 where a limit of the deploy form
        (`passes`, `candidates`, `sampling_limit`) was too low for the image.
        """
        count = self.config.detections
        masks = (OutputSpec("masks", (count, MASK_SIDE, MASK_SIDE), "probability"),) if self._has_masks(words) else ()
        return (
            OutputSpec("boxes", (count, 4), "pixel"),
            OutputSpec("scores", (count,), "probability", is_ranked=True, thresholds=(self.config.score_threshold,)),
            OutputSpec("labels", (count,), "class", dtype="int64"),
            *masks,
            OutputSpec("exact", (1,), "flag"),
        )

    def modules(self, variant: Variant, num_classes: int) -> dict[str, nn.Module]:
        """Torchvision's modules under torchvision's names, and the norms of the stages' outputs."""
        return detection_heads.heads(self.config, variant.dims, num_classes)

    def temper(self, network: Any) -> None:
        """Let boxes stay near their anchors, as trained ones do.

        With changes of a standard deviation of 1 a box is anywhere, many are alike, and rounding chooses among them: in
        FP16 a fourth of the detections is another one.
        """
        for layer in (network.rpn.head.bbox_pred, network.roi_heads.box_predictor.bbox_pred):
            layer.weight.mul_(0.1)

    def forward(
        self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = (), *, temperature: float = 1.0
    ) -> Outputs:
        """Torchvision's detections, filled up to a fixed number."""
        found, count = detection_heads.detections(network, maps), self.config.detections
        names = ("boxes", "scores", "labels", *(("masks",) if self._has_masks(words) else ()))
        outputs: Outputs = {}
        for name in names:
            # Labels are from 1 there, since 0 is the background.
            rows = [
                one[name] - 1 if name == "labels" else one[name].squeeze(1) if name == "masks" else one[name]
                for one in found
            ]
            full = rows[0].new_full((len(rows), count, *rows[0].shape[1:]), -1 if name == "labels" else 0)
            for place, row in zip(full, rows, strict=True):
                place[: len(row)] = row
            outputs[name] = full
        return {**outputs, "exact": torch.ones_like(outputs["scores"][:, :1])}

    def training_outputs(self, network: Any, maps: Mapping[int, Tensor]) -> Outputs:
        """The stages' outputs, from which `training_losses` goes on with what is to be found."""
        return {f"stage{level}": output for level, output in maps.items()}

    def metrics(
        self, class_names: Sequence[str], each: Callable[[DetectionOutcome], None] | None = None
    ) -> RunningDetections:
        """COCO's average precision of boxes and masks."""
        return RunningDetections(class_names, each)

    def deployed_modules(self, model: "ConvNeXtV2", spec: "DeploySpec") -> dict[str, nn.Module]:
        """Pyramid, proposals, box head and mask head."""
        return detection_deploy.deployed(model, self.config, spec, masks=self._has_masks(spec.outputs))

    def deployed_forward(self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = ()) -> Outputs:
        """The same outputs by plain operators."""
        return detection_deploy.deployed_outputs(network, maps, masks=self._has_masks(words))

    def predictions(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None, *, top: int
    ) -> list[Prediction]:
        """The `top` best detections of each image, by default all: a threshold chose them."""
        return _predictions(outputs, paths, class_names, [None] * len(paths), top)

    def predictions_on_pictures(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None,
        places: Sequence[Place], *, top: int,
    ) -> list[Prediction]:  # fmt: skip
        """The same with boxes in the pixels of the pictures."""
        return _predictions(outputs, paths, class_names, places, top)

    def check_allowed(self, spec: "DeploySpec") -> None:
        """Raise InputError for masks that are not there."""
        super().check_allowed(spec)
        if "masks" in spec.outputs and not self.config.masks:
            raise InputError("The network has no masks (its option masks is false). Leave --output masks out.")

    def operators_of(self, spec: "DeploySpec") -> Mapping[str, int]:
        """The norms of the stages' outputs, of which the exporter merges three: see the task segment."""
        if not self.config.stage_norms:
            return {}
        are_merged = spec.layout == "gpu" or {"lateral-affine", "downsample-affine"} <= spec.folds
        return {"ChannelsFirstNorm": 1 if are_merged else 4}

    def _has_masks(self, words: Sequence[str]) -> bool:
        return self.config.masks and (not words or "masks" in words)

    def fitted(self, state: Mapping[str, Tensor]) -> Self:
        """Channels, number of anchors and whether there are masks."""
        shapes = {
            "channels": ("fpn.inner_blocks.0.0.weight", 0),
            "box_channels": ("roi_heads.box_head.fc6.weight", 0),
            "mask_channels": ("roi_heads.mask_head.0.0.weight", 0),
        }
        told: dict[str, Any] = {
            name: state[key].shape[axis] for name, (key, axis) in shapes.items() if key in state and state[key].ndim
        }
        if "channels" in told:
            told |= {"masks": "mask_channels" in told, "stage_norms": "norm0.weight" in state}
        return self.configured(told)

    def num_classes_in(self, state: Mapping[str, Tensor]) -> int | None:
        """The rows of the classifier without the background's."""
        weight = state.get("roi_heads.box_predictor.cls_score.weight")
        return weight.shape[0] - 1 if weight is not None and weight.ndim else None


def _predictions(
    outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None,
    places: Sequence[Place | None], top: int,
) -> list[Prediction]:  # fmt: skip
    """The detections that are there; an image that a limit was too low for has an error in their place."""
    answers: list[Prediction] = []
    for at, (path, place) in enumerate(zip(paths, places, strict=True)):
        if float(outputs["exact"][at]) != 1.0:
            answers.append(DetectionPrediction(path, f"its detections are not exact: {NOT_EXACT}"))
            continue
        labels = outputs["labels"][at]
        present = torch.where(labels >= 0)[0][:top]
        boxes = outputs["boxes"][at][present]
        boxes = boxes if place is None else place.boxes_of_picture(boxes)
        rows = zip(labels[present].tolist(), outputs["scores"][at][present].tolist(), boxes.tolist(), strict=True)
        found = tuple(
            Detection(label, class_names[label] if class_names else str(label), score, tuple(box))
            for label, score, box in rows
        )
        masks = outputs["masks"][at][present].float().numpy() if "masks" in outputs else None
        answers.append(DetectionPrediction(path, None, found, masks))
    return answers


def training_losses(
    network: Any, maps: Mapping[int, Tensor], image_size: tuple[int, int], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Torchvision's losses of a batch by name; their sum is what is trained on.

    Args:
        network: in training mode.
        maps: outputs (N, C, H, W) of all four stages.
        image_size: height and width of the canvas that they were made of, its padding included.
        targets: for each image `boxes` (M, 4) in pixels of the canvas, `labels` (M,) int64 from 0 and, of a network
            with masks, `masks` (M, H, W) uint8.
    """
    if tuple(image_size) != tuple(4 * side for side in maps[0].shape[2:]):
        raise InputError(
            f"The maps are of images of {4 * maps[0].shape[2]}x{4 * maps[0].shape[3]} pixels, and image_size is "
            f"{size_text(image_size)}. Pass the canvas, whose padding GRN sums over, and not the picture."
        )
    if not network.training:
        raise InputError("The network is in evaluation mode, which has no losses. Call network.train() first.")
    return detection_heads.losses(network, maps, [{**one, "labels": one["labels"] + 1} for one in targets])


register_task(Detect())
