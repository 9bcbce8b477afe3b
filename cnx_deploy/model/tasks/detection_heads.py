"""The training form of Mask R-CNN on torchvision's own feature pyramid, proposal network and heads.

torchvision's classes do the work. What is added here are the options by which other toolboxes differ, and what makes
the answer in evaluation a function of the image (docs/decisions/0028-detections-of-fixed-shape.md): proposals are
ranked by their logits, and suppression does not move the boxes.

Source: He et al., "Mask R-CNN", arXiv:1703.06870; torchvision, `models/detection` (BSD-3).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import (
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
    clip_boxes_to_image,
    nms,
    remove_small_boxes,
    roi_align,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from cnx_deploy.model.layers import LayerNormChannelsFirst

if TYPE_CHECKING:
    from cnx_deploy.model.tasks.detection import DetectConfig

__all__ = [
    "BOX_CLIP", "BOX_SIDE", "DETECTION_SIDE", "MASK_SIDE", "PROPOSAL_SIDE", "anchors_of", "detections", "heads",
    "losses",
]  # fmt: skip

BOX_CLIP = math.log(1000.0 / 16)
"""The largest logarithm of a side's change, in torchvision and mmdet alike."""
BOX_SIDE, MASK_SIDE = 7, 14
"""Bins of RoIAlign along a side for classes and boxes, and for masks."""
PROPOSAL_SIDE, DETECTION_SIDE = 1e-3, 1e-2
"""Pixels: torchvision leaves out boxes with a smaller side."""
POOLED_LEVELS = ("0", "1", "2", "3")


class Anchors(AnchorGenerator):
    """torchvision's anchors, by choice not rounded to whole pixels and with the strides 4, 8, … 64 at every size.

    torchvision divides the image by the map: at 800 px the last level has 13 rows, and 800 // 13 is 61.
    """

    def __init__(self, config: "DetectConfig") -> None:
        self.rounded, self.even = config.rounded_anchors, config.even_strides
        super().__init__(tuple((size,) for size in config.anchor_sizes), (config.anchor_ratios,) * 5)

    def generate_anchors(
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - as torchvision has it
    ) -> Tensor:
        """(A, 4) anchors around zero; ratios are height by width."""
        if self.rounded:
            rounded: Tensor = super().generate_anchors(scales, aspect_ratios, dtype, device)
            return rounded
        high = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        widths, heights = ((side[:, None] * sizes).flatten() for side in (1 / high, high))
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> list[Tensor]:
        """Anchors of each level, (H·W·A, 4)."""
        strides = [[4 << level] * 2 for level in range(len(strides))] if self.even else strides
        anchors: list[Tensor] = super().grid_anchors(grid_sizes, strides)
        return anchors


class Coder(BoxCoder):
    """torchvision's box coder, which by choice clips small changes of a side as it clips large ones."""

    def __init__(self, weights: tuple[float, float, float, float], *, clips_small: bool) -> None:
        super().__init__(weights, BOX_CLIP)
        self.clips_small = clips_small

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Changes (n, 4 K) of boxes (n, 4) -> boxes (n, 4 K)."""
        if self.clips_small:
            lowest = rel_codes.new_tensor([-math.inf, -math.inf, *(-BOX_CLIP * weight for weight in self.weights[2:])])
            rel_codes = rel_codes.maximum(lowest.repeat(rel_codes.shape[1] // 4))
        decoded: Tensor = super().decode_single(rel_codes, boxes)
        return decoded


class RoIPool(MultiScaleRoIAlign):
    """RoIAlign on four levels, by choice "aligned": half a pixel to the upper left, and no least size of one pixel."""

    def __init__(self, side: int, config: "DetectConfig") -> None:
        super().__init__(list(POOLED_LEVELS), side, config.sampling_ratio)
        self.aligned = config.aligned

    def forward(self, x: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps by name, boxes of each image -> (boxes of all, C, side, side)."""
        if not self.aligned:
            pooled: Tensor = super().forward(x, boxes, image_shapes)
            return pooled
        levels, numbers = LevelMapper(2, 5)(boxes), range(len(boxes))
        ids = torch.cat([torch.full_like(each[:, :1], number) for number, each in zip(numbers, boxes, strict=True)])
        rois = torch.cat([ids, torch.cat(boxes)], dim=1)
        result = rois.new_zeros(len(rois), x["0"].shape[1], *self.output_size)
        for level, name in enumerate(POOLED_LEVELS):
            at = torch.where(levels == level)[0]
            scale, words = 0.25 / 2**level, (self.sampling_ratio, True)
            result[at] = roi_align(x[name], rois[at], self.output_size, scale, *words)
        return result


def nms_by_group(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Indices of the kept boxes, best first; of equal scores the lower index is first.

    torchvision's `batched_nms` moves the groups of few boxes apart, label times canvas. In FP32 a corner 107,600 pixels
    away is off by up to 0.004, enough to decide an overlap otherwise.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for group in torch.unique(groups):
        members = torch.where(groups == group)[0]
        kept[members[nms(boxes[members], scores[members], threshold)]] = True
    indices = torch.where(kept)[0]
    return indices[scores[indices].argsort(descending=True, stable=True)]


class RankedProposals(RegionProposalNetwork):
    """torchvision's proposal network with the best of all levels chosen by logit.

    torchvision sorts probabilities, which are 1 in FP32 from a logit of 17 on, with a sort that is not stable: which of
    a thousand equal ones are proposals is then chance.
    """

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes (N, n, 4) and logits of all anchors -> boxes (P, 4) and logits (P,) of each image."""
        logits = objectness.detach().reshape(len(proposals), -1)
        counts = torch.tensor(num_anchors_per_level, device=logits.device)
        levels = torch.arange(len(counts), device=logits.device).repeat_interleave(counts)
        results = []
        for all_boxes, scores, at, shape in zip(
            proposals, logits, self._get_top_n_idx(logits, num_anchors_per_level), image_shapes, strict=True
        ):
            boxes = clip_boxes_to_image(all_boxes[at], shape)
            large = remove_small_boxes(boxes, self.min_size)
            boxes, scores, level = boxes[large], scores[at][large], levels[at][large]
            best = nms_by_group(boxes, scores, level, self.nms_thresh)[: self.post_nms_top_n()]
            results.append((boxes[best], scores[best]))
        return [boxes for boxes, _ in results], [scores for _, scores in results]


class SeparateHeads(RoIHeads):
    """torchvision's heads with `nms_by_group`."""

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What the heads say of the proposals of all images -> boxes, scores and labels of each image, best first."""
        counts = [len(boxes) for boxes in proposals]
        decoded = self.box_coder.decode(box_regression, proposals)[:, 1:].split(counts)
        probabilities = torch.split(class_logits.softmax(dim=-1)[:, 1:], counts)
        results: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for boxes, scores, shape in zip(decoded, probabilities, image_shapes, strict=True):
            rows, labels = torch.where(scores > self.score_thresh)
            boxes, scores = clip_boxes_to_image(boxes[rows, labels], shape), scores[rows, labels]
            large = remove_small_boxes(boxes, DETECTION_SIDE)
            boxes, scores, labels = boxes[large], scores[large], labels[large]
            best = nms_by_group(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            for result, values in zip(results, (boxes[best], scores[best], labels[best] + 1), strict=True):
                result.append(values)
        return results


def heads(config: "DetectConfig", widths: Sequence[int], num_classes: int) -> dict[str, nn.Module]:
    """The modules behind the stages: their norms as mmdet's ConvNeXt has them, pyramid, proposals and heads."""
    channels = config.channels
    norms: dict[str, nn.Module] = {
        f"norm{level}": LayerNormChannelsFirst(width) if config.stage_norms else nn.Identity()
        for level, width in enumerate(widths)
    }
    rpn = RankedProposals(
        Anchors(config), RPNHead(channels, len(config.anchor_ratios)), 0.7, 0.3, 256, 0.5,
        {"training": config.training_proposals, "testing": config.pre_nms},
        {"training": config.training_proposals, "testing": config.proposals}, config.rpn_nms,
    )  # fmt: skip
    masks: list[nn.Module] = []
    if config.masks:
        width = config.mask_channels
        masks = [RoIPool(MASK_SIDE, config), MaskRCNNHeads(channels, (width,) * 4, 1)]
        masks.append(MaskRCNNPredictor(width, width, num_classes + 1))
    roi_heads = SeparateHeads(
        RoIPool(BOX_SIDE, config), TwoMLPHead(channels * BOX_SIDE**2, config.box_channels),
        FastRCNNPredictor(config.box_channels, num_classes + 1), 0.5, 0.5, 512, 0.25, config.box_weights,
        config.score_threshold, config.box_nms, config.detections, *masks,
    )  # fmt: skip
    rpn.box_coder = Coder((1.0, 1.0, 1.0, 1.0), clips_small=config.clips_small)
    roi_heads.box_coder = Coder(config.box_weights, clips_small=config.clips_small)
    fpn = FeaturePyramidNetwork(list(widths), channels, LastLevelMaxPool())
    return {**norms, "fpn": fpn, "rpn": rpn, "roi_heads": roi_heads}


def _pyramid(network: Any, maps: Mapping[int, Tensor]) -> tuple[dict[str, Tensor], ImageList]:
    """The five levels by torchvision's names, and the images, of which the sizes alone are read: all are the canvas."""
    normed = {str(level): network.get_submodule(f"norm{level}")(output) for level, output in sorted(maps.items())}
    count, _, height, width = maps[0].shape
    canvas = (4 * height, 4 * width)
    return network.fpn(normed), ImageList(torch.empty(count, 3, *canvas, device="meta"), [canvas] * count)


def detections(network: Any, maps: Mapping[int, Tensor]) -> list[dict[str, Tensor]]:
    """What torchvision finds in each image: boxes (n, 4), scores (n,), labels (n,) from 1, masks (n, 1, 28, 28)."""
    levels, images = _pyramid(network, maps)
    proposals, _ = network.rpn(images, levels)
    results: list[dict[str, Tensor]] = network.roi_heads(levels, proposals, images.image_sizes)[0]
    return results


def losses(network: Any, maps: Mapping[int, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Torchvision's losses by name, each a mean; labels of `targets` are from 1."""
    levels, images = _pyramid(network, maps)
    proposals, of_proposals = network.rpn(images, levels, targets)
    _, of_heads = network.roi_heads(levels, proposals, images.image_sizes, targets)
    return {**of_proposals, **of_heads}


def anchors_of(network: Any, sizes: Sequence[tuple[int, int]], canvas: tuple[int, int]) -> list[Tensor]:
    """The anchors (H·W·A, 4) of each level, whose maps have these sizes, as the training form has them."""
    generator = network.rpn.anchor_generator
    generator.set_cell_anchors(torch.float64, torch.device("cpu"))
    strides = [[side // size for side, size in zip(canvas, level, strict=True)] for level in sizes]
    anchors: list[Tensor] = generator.grid_anchors([list(size) for size in sizes], strides)
    return anchors
