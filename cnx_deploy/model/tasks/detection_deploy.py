"""The deploy form of Mask R-CNN: every shape is fixed, and every operator is a plain one on tensors.

Non-maximum suppression is a fixed point. With the boxes in the order of their scores, M[i, j] says that box j < i
overlaps box i too much. A box is kept where none of the kept ones suppresses it: keep = valid & ~(M · keep > 0). From
keep = valid on, every second pass gives a set that holds the answer, and the others one that the answer holds. So a box
that two passes in a row agree on is settled, if all before its block are. `exact` is 0 where an unsettled box could be
among those that are given: behind the first unsettled one of a level all are worse, and may be wrong.

RoIAlign gathers from all levels in one list of positions. What decides where a box lies and which is kept (scores,
changes, decoding, softmax, weights of the interpolation) is computed in FP32. The reasons and the algebra are in
docs/decisions/0028-detections-of-fixed-shape.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnx_deploy.core.image_size import sides, stage_sides
from cnx_deploy.model.deploy_layers import convolution, doubles, linear, map_norm, type_of, widen
from cnx_deploy.model.folds import fold_affine_into_conv, fold_finest_level, fold_rows_of_patches
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.model.tasks.detection_heads import (
    BOX_CLIP,
    BOX_SIDE,
    DETECTION_SIDE,
    MASK_SIDE,
    PROPOSAL_SIDE,
    anchors_of,
)

if TYPE_CHECKING:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.model.tasks.detection import DetectConfig

__all__ = ["GatheredRoIAlign", "deployed", "deployed_outputs", "fixed_point_nms"]

NO_SCORE = -1e9
"""What a box counts as that is no candidate: below every probability and every logit."""
BLOCKS = 2
"""A block is settled before the next one begins. Two halves read a quarter of the matrix in each pass, twice as often:
of 1,000 boxes a level 50 MB in ten passes, where one block reads 160 MB in sixteen."""
ONES = 8
"""Channels that the sums of the pyramid have more, one of ones and the rest of zeros: kernels take eight at once."""
TINY_AREA = 1e-12
"""Square pixels: two boxes without area overlap by 0 / 0, which torchvision takes for no overlap."""

Sizes = Sequence[tuple[int, int]]


def fixed_point_nms(
    boxes: Tensor, valid: Tensor, threshold: float, passes: int, labels: Tensor | None = None, dtype: Any = None
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression of boxes that are in the order of their scores, best first.

    Args:
        boxes: (…, n, 4) corners in FP32.
        valid: (…, n) bool, the boxes that take part.
        threshold: boxes that overlap by more (intersection over union) are suppressed.
        passes: how often the fixed point is applied to each of BLOCKS blocks.
        labels: (…, n); where given, boxes of different labels do not suppress each other.
        dtype: type of the matrix product, that of `boxes` by default; sums of n ones have to be above 0 in it.

    Returns:
        (…, n) bool each: the boxes that are kept, and those that are settled if all before their block are.
    """
    size = -(-boxes.shape[-2] // BLOCKS)
    kept_before: list[Tensor] = []
    settled: list[Tensor] = []
    for start in range(0, boxes.shape[-2], size):
        rows = slice(start, start + size)
        takes_part = valid[..., rows, None].to(dtype or boxes.dtype)
        if kept_before:
            earlier = _suppression(boxes, labels, rows, slice(0, start), threshold).to(takes_part.dtype)
            takes_part = F.relu(takes_part - earlier @ torch.cat(kept_before, dim=-2))
        matrix = _suppression(boxes, labels, rows, rows, threshold).to(takes_part.dtype)
        kept = before = takes_part
        for _ in range(passes):
            before = kept
            kept = F.relu(takes_part - matrix @ kept)  # 1 - (count of kept boxes that suppress it), or 0
        kept_before.append(kept)
        settled.append(kept == before)
    return (torch.cat(kept_before, dim=-2) > 0.5)[..., 0], torch.cat(settled, dim=-2)[..., 0]


def _suppression(boxes: Tensor, labels: Tensor | None, rows: slice, columns: slice, threshold: float) -> Tensor:
    """(…, rows, columns) bool: the box of the column is before that of the row and overlaps it by more."""
    left, top, right, bottom = boxes[..., rows, :, None].unbind(dim=-2)  # (…, rows, 1) each
    others = boxes[..., None, columns, :].unbind(dim=-1)  # (…, 1, columns)
    wide = (torch.minimum(right, others[2]) - torch.maximum(left, others[0])).clamp(min=0)
    high = (torch.minimum(bottom, others[3]) - torch.maximum(top, others[1])).clamp(min=0)
    areas = (right - left) * (bottom - top), (others[2] - others[0]) * (others[3] - others[1])
    shared = wide * high
    suppresses = shared / (areas[0] + areas[1] - shared).clamp(min=TINY_AREA) > threshold
    if labels is not None:
        suppresses = suppresses & (labels[..., rows, None] == labels[..., None, columns])
    if rows == columns:
        places = torch.arange(suppresses.shape[-1], device=boxes.device, dtype=torch.int32)
        suppresses = suppresses & (places[:, None] > places)
    return suppresses


class Pyramid(nn.Module):
    """The stages' norms and the feature pyramid. Outputs of stages (N, C_l, H_l, W_l) -> five levels (N, C, H_l, W_l).

    The norms' affines are folded into the 1×1 convolutions, which do not pad. On the finest level nobody else reads the
    sum of lateral and upsampled map. So its 3×3 is applied to each by itself: with the lateral 1×1 it is one 3×3 from
    the stage, and with the upsampling a transposed convolution of stride 2, which reads the smaller map. The lateral's
    bias comes with the upsampled map, in a channel of ones: beyond the edge both are zero.
    """

    def __init__(self, network: Any, spec: "DeploySpec") -> None:
        super().__init__()
        folds = spec.folds
        norms: list[nn.Module] = []
        inner: list[nn.Module] = []
        blocks = [doubles(block[0]) for block in network.fpn.layer_blocks]
        self.is_split = spec.layout == "gpu" and "finest-level" in folds
        self.far: nn.ConvTranspose2d | None = None
        for level, block in enumerate(network.fpn.inner_blocks):
            dense, norm = doubles(block[0]), network.get_submodule(f"norm{level}")
            if isinstance(norm, nn.Identity):
                norms.append(norm)
            elif "lateral-affine" in folds:
                norms.append(map_norm(spec))
                dense = fold_affine_into_conv(*dense, *doubles(norm))
            else:
                norms.append(map_norm(spec, *doubles(norm)))
            if self.is_split and level > 0:
                dense = _with_ones(*dense, value=float(level == 3))
                blocks[level] = (F.pad(blocks[level][0], (0, 0, 0, 0, 0, ONES)), blocks[level][1])
            if level == 0 and self.is_split:
                near, far = fold_finest_level(*dense, blocks[0][0])
                far = F.pad(far, (0, 0, 0, 0, 0, 0, 0, ONES - 1))
                inner.append(_padded(near, blocks[0][1]))
                self.far = nn.ConvTranspose2d(
                    far.shape[0], far.shape[1], 4, stride=2, padding=1, bias=False, device="meta"
                )
                self.far.weight = nn.Parameter(far)
            else:
                inner.append(convolution(*dense))
        self.norms, self.inner = nn.ModuleList(norms), nn.ModuleList(inner)
        self.layer = nn.ModuleList(
            nn.Identity() if level == 0 and self.is_split else _padded(*block) for level, block in enumerate(blocks)
        )

    def forward(self, maps: Mapping[int, Tensor]) -> list[Tensor]:
        """From the last stage to the first; see the class for shapes."""
        levels: list[Tensor] = []
        above: Tensor | None = None
        for level in (3, 2, 1, 0):
            normed = self.norms[level](maps[level]).to(type_of(self.inner[level]))
            if level == 0 and self.far is not None and above is not None:
                levels.insert(0, self.inner[0](normed) + self.far(above))
                break
            lateral = self.inner[level](normed)
            if above is not None:
                lateral = lateral + F.interpolate(above, size=lateral.shape[2:], mode="nearest")
            above = lateral
            levels.insert(0, self.layer[level](lateral))
        return [*levels, levels[-1][..., ::2, ::2]]


class BoxDecoder(nn.Module):
    """Changes (…, 4) of boxes (…, 4) -> boxes inside the canvas, by torchvision's operations in their order."""

    def __init__(self, weights: Sequence[float], canvas: tuple[int, int], config: "DetectConfig", wide: Any) -> None:
        super().__init__()
        self.lowest = -BOX_CLIP if config.clips_small else None
        self.register_buffer("weights", torch.tensor(weights, dtype=wide))
        self.register_buffer("limits", torch.tensor([canvas[1], canvas[0]] * 2, dtype=wide))

    def forward(self, changes: Tensor, boxes: Tensor) -> Tensor:
        """See the class; both in FP32."""
        moves, growths = torch.split(changes / self.get_buffer("weights"), 2, dim=-1)
        begin, end = torch.split(boxes, 2, dim=-1)
        lengths = end - begin
        centres = moves * lengths + (begin + 0.5 * lengths)
        halves = 0.5 * (growths.clamp(min=self.lowest, max=BOX_CLIP).exp() * lengths)
        corners = torch.cat([centres - halves, centres + halves], dim=-1)
        return corners.clamp(min=0).minimum(self.get_buffer("limits"))


class Proposals(nn.Module):
    """The region proposal network. Five levels -> boxes (N, P, 4), whether each is one (N, P), and `exact` (N,).

    Scores and changes are rows of one convolution. The best of all levels are chosen by logit, as in the training form.
    """

    def __init__(self, network: Any, config: "DetectConfig", sizes: Sizes, canvas: tuple[int, int], wide: Any) -> None:
        super().__init__()
        head = network.rpn.head
        scores, changes = doubles(head.cls_logits), doubles(head.bbox_pred)
        self.conv = _padded(*doubles(head.conv[0][0]))
        self.predictor = convolution(torch.cat([scores[0], changes[0]]), torch.cat([scores[1], changes[1]]))
        self.coder = BoxDecoder((1.0, 1.0, 1.0, 1.0), canvas, config, wide)
        self.config, self.ratios = config, len(scores[1])
        for level, anchors in enumerate(anchors_of(network, sizes, canvas)):
            self.register_buffer(f"anchors{level}", anchors.to(wide))

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        config, columns = self.config, []
        most = max(min(config.pre_nms, self.get_buffer(f"anchors{level}").shape[0]) for level in range(len(levels)))
        for level, features in enumerate(levels):
            predicted = self.predictor(F.relu(self.conv(features)))  # (N, A + 4 A, H, W)
            scores = widen(predicted[:, : self.ratios]).permute(0, 2, 3, 1).flatten(1)  # (N, H W A)
            shape = (-1, self.ratios, 4, *predicted.shape[2:])
            changes = predicted[:, self.ratios :].reshape(shape).permute(0, 3, 4, 1, 2).flatten(1, 3)
            best, index = scores.topk(min(most, scores.shape[1]), dim=1)
            chosen = widen(changes.gather(1, index[..., None].expand(-1, -1, 4)))
            column: tuple[Tensor, ...] = (best, chosen, F.embedding(index, self.get_buffer(f"anchors{level}")))
            if (missing := most - best.shape[1]) > 0:
                # What is added is an anchor without sides, and so no proposal.
                pads = ((0, missing), (0, 0, 0, missing), (0, 0, 0, missing))
                column = tuple(F.pad(each, pad) for each, pad in zip(column, pads, strict=True))
            columns.append(column)
        logits, changes, anchors = (torch.stack(parts, dim=1) for parts in zip(*columns, strict=True))  # (N, 5, n, …)
        boxes = self.coder(changes, anchors)
        valid = _large(boxes, PROPOSAL_SIDE)
        words = (config.rpn_nms, config.passes, None, type_of(self.conv))
        kept, settled = fixed_point_nms(boxes, valid, *words)
        scores = logits.flatten(1)
        ranked = torch.where(kept.flatten(1), scores, NO_SCORE)
        given, at = ranked.topk(min(config.proposals, ranked.shape[1]), dim=1)
        proposals = boxes.flatten(1, 2).gather(1, at[..., None].expand(-1, -1, 4))
        return proposals, _is_score(given), _settled(scores, settled.flatten(1), given)


class GatheredRoIAlign(nn.Module):
    """RoIAlign on four levels by gathers: positions of all levels (N, S, C) and boxes (N, R, 4) -> (N, R, n·n, C).

    With `backwards` the positions begin with the last level. The compiler reads the levels themselves where a list of
    them is read once; both heads read 46 MB less at 800×1344 when each has a list of its own.

    Equal to torchvision's `MultiScaleRoIAlign` with the same output side n and sampling ratio. With ratio 0 a bin has
    as many samples along a side as it has pixels, rounded up, and `config.sampling_limit` at most: `fits` (N,) says
    whether that was enough.
    """

    def __init__(self, side: int, config: "DetectConfig", sizes: Sizes, wide: Any, *, backwards: bool = False) -> None:
        super().__init__()
        self.side, self.config = side, config
        self.samples = config.sampling_ratio or config.sampling_limit
        counts = [math.prod(size) for size in sizes[:4]]
        bases = [sum(counts[level + 1 :] if backwards else counts[:level]) for level in range(4)]
        rows = [[0.25 / 2**level, bases[level], sizes[level][1], sizes[level][0]] for level in range(4)]
        # A level begins where torchvision's floor(4 + log2(side / 224) + 1e-6) does.
        self.bounds = [224.0 * 2.0 ** (level - 4 - 1e-6) for level in (3, 4, 5)]
        self.register_buffer("levels", torch.tensor(rows, dtype=wide))
        self.register_buffer("bins", torch.arange(side, dtype=wide)[:, None])
        self.register_buffer("middles", torch.arange(self.samples, dtype=wide) + 0.5)

    def forward(self, positions: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Aligned features in the type of `positions`, and `fits`, None of a fixed ratio; see the class."""
        begin, end = torch.split(boxes, 2, dim=-1)  # (N, R, 2): across, down
        sides = torch.sqrt((end - begin)[..., 0] * (end - begin)[..., 1])
        above = [(sides >= bound).to(torch.int32) for bound in self.bounds]
        level = F.embedding(above[0] + above[1] + above[2], self.get_buffer("levels"))
        scale, base, width, height = torch.split(level, 1, dim=-1)
        places, shares, wanted = self._samples(begin * scale, end * scale, torch.cat([width, height], dim=-1))
        across, down = places.unbind(dim=2)  # (N, R, n, 2 samples) each
        starts = base[..., None] + down * width[..., None]  # (N, R, n, 2 samples)
        images = torch.arange(boxes.shape[0], device=boxes.device, dtype=torch.int32) * positions.shape[1]
        index = (starts[:, :, :, None, :, None] + across[:, :, None, :, None, :]).to(torch.int32)
        index = (index + images[:, None, None, None, None, None]).flatten(4)  # (N, R, n, n, (2 samples)²)
        of_column, of_row = shares.unbind(dim=2)
        weight = (of_row[:, :, :, None, :, None] * of_column[:, :, None, :, None, :]).flatten(4)[..., None]
        table = positions.flatten(0, 1)
        total: Tensor | None = None
        for at, share in zip(index.unbind(dim=4), weight.unbind(dim=4), strict=True):
            value = widen(F.embedding(at, table)) * share
            total = value if total is None else total + value
        assert total is not None
        fits = None if self.config.sampling_ratio else wanted.flatten(1).amax(dim=1) <= self.samples
        return total.flatten(2, 3).to(positions.dtype), fits

    def _samples(self, begin: Tensor, end: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places and weights (N, R, 2, n, 2 samples) along both axes, and the samples of a bin (N, R, 2, 1, 1)."""
        if self.config.aligned:
            begin, lengths = begin - 0.5, end - begin
        else:
            lengths = (end - begin).clamp(min=1.0)
        begin, size = begin[..., None, None], size[..., None, None]
        bins = (lengths / self.side)[..., None, None]  # the length of each
        wanted = torch.full_like(bins, self.samples) if self.config.sampling_ratio else bins.ceil()
        count = wanted.clamp(min=1.0)
        at = begin + self.get_buffer("bins") * bins + self.get_buffer("middles") * (bins / count)
        counts = (at >= -1.0) & (at <= size)
        if not self.config.sampling_ratio:
            counts = counts & (self.get_buffer("middles") < wanted)
        at, last = at.clamp(min=0).minimum(size - 1.0), size - 1.0
        low = at.floor()
        beyond = torch.where(counts, at - low, 0.0)
        shares = torch.cat([counts.to(at.dtype) - beyond, beyond], dim=-1) / count
        return torch.cat([low, (low + 1.0).minimum(last)], dim=-1), shares, wanted


class BoxHead(nn.Module):
    """Classes and boxes of proposals, and which are given. -> boxes (N, D, 4), scores and labels (N, D), `exact` (N,).

    fc6 reads the bins in the order of their gathers, position by position. Scores and changes are rows of one linear
    layer, without the changes of the background, which nobody reads.
    """

    def __init__(self, network: Any, config: "DetectConfig", sizes: Sizes, canvas: tuple[int, int], wide: Any) -> None:
        super().__init__()
        box, predictor = network.roi_heads.box_head, network.roi_heads.box_predictor
        weight, bias = doubles(box.fc6)
        self.fc6 = linear(fold_rows_of_patches(weight, config.channels), bias)
        self.fc7 = linear(*doubles(box.fc7))
        scores, changes = doubles(predictor.cls_score), [each[4:] for each in doubles(predictor.bbox_pred)]
        self.predictor = linear(torch.cat([scores[0], changes[0]]), torch.cat([scores[1], changes[1]]))
        self.align = GatheredRoIAlign(BOX_SIDE, config, sizes, wide)
        self.coder = BoxDecoder(config.box_weights, canvas, config, wide)
        self.config, self.classes = config, len(scores[1]) - 1

    def forward(self, positions: Tensor, proposals: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class; absent detections have score 0, label -1 and no sides."""
        config, classes = self.config, self.classes
        aligned, fits = self.align(positions, proposals)
        hidden = F.relu(self.fc7(F.relu(self.fc6(aligned.flatten(2).to(type_of(self.fc6))))))
        logits, changes = self.predictor(hidden).split([classes + 1, 4 * classes], dim=-1)
        scores = widen(logits).softmax(dim=-1)[..., 1:]  # (N, P, K)
        scores = torch.where((scores > config.score_threshold) & valid[..., None], scores, NO_SCORE).flatten(1)
        best, index = scores.topk(min(config.candidates, scores.shape[1]), dim=1)  # (N, n)
        chosen = widen(changes.unflatten(-1, (classes, 4)).flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 4)))
        proposal = ((index.to(best.dtype) + 0.5) / classes).to(torch.int64)  # exact: far fewer than 2^23 scores
        labels = (index - proposal * classes).to(torch.int32)
        origins = proposals.gather(1, proposal[..., None].expand(-1, -1, 4))
        boxes = self.coder(chosen, origins)
        candidates = _is_score(best) & _large(boxes, DETECTION_SIDE)
        words = (config.box_nms, config.passes, labels, type_of(self.fc7))
        kept, settled = fixed_point_nms(boxes, candidates, *words)
        ranked = torch.where(kept, best, NO_SCORE)
        given, at = ranked.topk(min(config.detections, ranked.shape[1]), dim=1)
        # Where more than D have probability 1 in FP32, nothing says which of them are better.
        exact = _settled(best, settled, given) & (given[:, -1] < 1.0)
        if scores.shape[1] > best.shape[1]:
            # Beyond the last candidate there may be more, which do not matter where D better ones are kept.
            exact = exact & (_is_score(given[:, -1]) | ~_is_score(best[:, -1]))
        exact = exact if fits is None else exact & fits
        present, labels = _is_score(given), labels.gather(1, at)
        boxes = boxes.gather(1, at[..., None].expand(-1, -1, 4))
        boxes = torch.where(present[..., None], boxes, 0.0)
        missing = config.detections - given.shape[1]
        given = F.pad(torch.where(present, given, 0.0), (0, missing))
        labels = F.pad(torch.where(present, labels, -1), (0, missing), value=-1)
        return F.pad(boxes, (0, 0, 0, missing)), given, labels, exact


class MaskHead(nn.Module):
    """The mask of each detection for its label. Boxes (N, D, 4), labels (N, D) -> (N, D, 28, 28) probabilities, `fits`.

    The transposed convolution has stride and kernel 2, so that it is a linear layer that gives the four positions of a
    cell. The last 1×1 is computed for the label alone: one row of its weight a detection.
    """

    def __init__(self, network: Any, config: "DetectConfig", sizes: Sizes, wide: Any) -> None:
        super().__init__()
        head, predictor = network.roi_heads.mask_head, network.roi_heads.mask_predictor
        self.convs = nn.ModuleList(_padded(*doubles(block[0])) for block in head)
        weight, bias = doubles(predictor.conv5_mask)  # (I, O, 2, 2)
        self.widen = linear(weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous(), bias.repeat(4))
        weight, bias = (
            each[1:].flatten(1) if each.ndim > 1 else each[1:, None] for each in doubles(predictor.mask_fcn_logits)
        )
        self.rows = nn.Parameter(torch.cat([weight, bias], dim=1))  # (K, O + 1)
        self.register_buffer("own", torch.eye(4)[:, None])
        self.align = GatheredRoIAlign(MASK_SIDE, config, sizes, wide, backwards=True)

    def forward(self, positions: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """See the class; the mask of an absent detection is 0."""
        aligned, fits = self.align(positions, boxes)
        count, side = boxes.shape[1], MASK_SIDE
        hidden = aligned.reshape(-1, side, side, positions.shape[-1]).permute(0, 3, 1, 2).to(type_of(self.widen))
        for conv in self.convs:
            hidden = F.relu(conv(hidden))
        cells = F.relu(self.widen(hidden.flatten(2).transpose(1, 2)))  # (N D, 196, 4 O)
        # The row once for each of the four, with zeros for the others: the widest tensor is not copied into four.
        chosen = F.embedding(labels.clamp(min=0).flatten(), self.rows)  # (N D, O + 1)
        row, bias = torch.split(chosen, [self.rows.shape[1] - 1, 1], dim=1)
        four = (row[:, None, :, None] * self.get_buffer("own").to(row.dtype)).flatten(1, 2)  # (N D, 4 O, 4)
        logits = widen(cells @ four) + widen(bias)[:, None]
        shaped = logits.reshape(-1, side, side, 2, 2).permute(0, 1, 3, 2, 4)  # row, its half, column, its half
        masks = shaped.reshape(-1, count, 2 * side, 2 * side).sigmoid()
        return torch.where((labels >= 0)[..., None, None], masks, 0.0), fits


def deployed(network: Any, config: "DetectConfig", spec: "DeploySpec", *, masks: bool) -> dict[str, nn.Module]:
    """The modules of the deploy form in float64, for the canvas of `spec`; constants are in FP32 at least."""
    canvas, wide = sides(spec.image_size), torch.float64 if spec.precision == "fp64" else torch.float32
    sizes = [stage_sides(spec.image_size, level) for level in range(4)]
    sizes.append(((sizes[3][0] + 1) // 2, (sizes[3][1] + 1) // 2))
    words = (network, config, sizes)
    modules: dict[str, nn.Module] = {
        "pyramid": Pyramid(network, spec), "proposals": Proposals(*words, canvas, wide),
        "box_head": BoxHead(*words, canvas, wide),
    }  # fmt: skip
    return {**modules, "mask_head": MaskHead(*words, wide)} if masks else modules


def deployed_outputs(network: Any, maps: Mapping[int, Tensor], *, masks: bool) -> Outputs:
    """Run them: the outputs that the task declares, by name."""
    levels = network.pyramid(maps)
    proposals, valid, exact = network.proposals(levels)
    positions = torch.cat([level.flatten(2).transpose(1, 2) for level in levels[:4]], dim=1)  # (N, S, C)
    boxes, scores, labels, exact_boxes = network.box_head(positions, proposals, valid)
    outputs, exact = {"boxes": boxes, "scores": scores, "labels": labels.to(torch.int64)}, exact & exact_boxes
    if masks:
        backwards = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in levels[3::-1]], dim=1)
        outputs["masks"], fits = network.mask_head(backwards, boxes, labels)
        exact = exact if fits is None else exact & fits
    return {**outputs, "exact": exact[:, None].to(boxes.dtype)}


def _with_ones(weight: Tensor, bias: Tensor, *, value: float) -> tuple[Tensor, Tensor]:
    """A 1×1 convolution with ONES channels more, of which the first is `value` everywhere."""
    nothing = bias.new_zeros(ONES)
    return F.pad(weight, (0, 0, 0, 0, 0, 0, 0, ONES)), torch.cat([bias, nothing.index_fill(0, torch.tensor(0), value)])


def _padded(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _large(boxes: Tensor, least: float) -> Tensor:
    """(…) bool: boxes (…, 4) whose sides are at least so long."""
    return (boxes[..., 2] - boxes[..., 0] >= least) & (boxes[..., 3] - boxes[..., 1] >= least)


def _settled(scores: Tensor, settled: Tensor, given: Tensor) -> Tensor:
    """(N,) bool: no unsettled box (N, n) is as good as the last that is given (N, m), best first."""
    return torch.where(settled, NO_SCORE, scores).amax(dim=1) < given[:, -1].clamp(min=NO_SCORE / 2)


def _is_score(scores: Tensor) -> Tensor:
    return scores > NO_SCORE / 2
