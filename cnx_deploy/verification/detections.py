"""Detections of two runners, matched by overlap and label and never by order.

Two detections of nearly one score change places under rounding, and the last of a hundred may fall out. So each
detection has as its partner the one of its label that overlaps it most, by MATCH_IOU at least. What is compared is
corners, score and mask of partners. A detection without a partner counts as a flip. It is excused where its score is no
further from the other side's cut (its last place, or the threshold where that is not taken) than the noise of the run
explains.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import DetectionDifferences, Differences, OutputSpec

__all__ = ["MATCH_IOU", "RunningDetections", "are_detections"]

MATCH_IOU = 0.9
"""Detections of one label that suppression leaves overlap by half at most, so that a partner is the only one."""
NAMES = ("boxes", "scores", "labels", "exact")


def are_detections(specs: Sequence[OutputSpec]) -> bool:
    """Whether the outputs of a network are detections: boxes, and what belongs to them."""
    return set(NAMES) <= {spec.name for spec in specs}


class RunningDetections:
    """Differences of detections, batch by batch: boxes (N, D, 4), scores, labels (N, D), masks and `exact` (N, 1).

    `threshold`: the score that a detection exceeds. `noise_margin`: so many RMS errors of a score are noise.
    """

    def __init__(self, specs: Sequence[OutputSpec], noise_margin: float) -> None:
        scores = next(spec for spec in specs if spec.name == "scores")
        self._threshold = scores.thresholds[0] if scores.thresholds else 0.0
        self._noise_margin = noise_margin
        self._relative: list[float] = []
        self._margins: list[float] = []  # of detections without a partner, to the other side's cut
        self._nonfinite = self._matched = self._inexact = self._mask_places = self._mask_flips = 0
        self._box = self._score = self._squares = 0.0

    def add(self, candidate: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
        """All outputs of both sides for the same images. Raises InputError where they are not alike."""
        if candidate.keys() != reference.keys() or not set(NAMES) <= candidate.keys():
            raise InputError(
                f"Cannot compare the outputs {', '.join(candidate)} with {', '.join(reference)}: expected "
                f"{', '.join(NAMES)} and perhaps masks on both sides."
            )
        for name, tensor in candidate.items():
            if tensor.shape != reference[name].shape or not tensor.numel():
                raise InputError(
                    f"Cannot compare {name} of shape {tuple(tensor.shape)} with {tuple(reference[name].shape)}: both "
                    "sides need the same images and as many detections."
                )
        sides = [
            {name: tensor.detach().double().cpu() for name, tensor in side.items()} for side in (candidate, reference)
        ]
        self._nonfinite += sum(int((~torch.isfinite(tensor)).sum()) for side in sides for tensor in side.values())
        self._inexact += int((sides[0]["exact"] != 1.0).sum())
        for at in range(len(sides[0]["boxes"])):
            given, expected = ({name: tensor[at] for name, tensor in side.items()} for side in sides)
            self._add_image(given, expected)

    def _add_image(self, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        rows, columns = _pairs(given, expected)
        self._matched += len(rows)
        for side, own, other in ((given, rows, expected), (expected, columns, given)):
            alone = side["labels"] >= 0
            alone[own] = False
            is_full = bool((other["labels"] >= 0).all())
            cut = float(other["scores"].min()) if is_full else self._threshold
            self._margins += (side["scores"][alone] - cut).tolist()
        if not len(rows):
            self._relative.append(0.0)
            return
        boxes, theirs = given["boxes"][rows], expected["boxes"][columns]
        self._box = max(self._box, float((boxes - theirs).abs().max()))
        self._relative.append(float((boxes - theirs).norm() / theirs.norm()))
        errors = given["scores"][rows] - expected["scores"][columns]
        self._score, self._squares = max(self._score, float(errors.abs().max())), self._squares + float(errors @ errors)
        if "masks" in given:
            flipped = (given["masks"][rows] >= 0.5) != (expected["masks"][columns] >= 0.5)
            self._mask_flips += int(flipped.sum())
            self._mask_places += flipped.numel()

    def result(self) -> Differences:
        """The differences over everything added; relative L2 is of the corners."""
        relative = torch.tensor(self._relative, dtype=torch.float64)
        if self._nonfinite:
            nan = float("nan")
            return Differences(len(relative), self._nonfinite, nan, nan, nan, nan, 0, 0, None, nan)
        noise = self._noise_margin * (self._squares / max(1, self._matched)) ** 0.5
        unmatched, at_cut = len(self._margins), sum(margin <= noise for margin in self._margins)
        return Differences(
            samples=len(relative),
            nonfinite_count=0,
            relative_l2_median=float(relative.median()),
            relative_l2_max=float(relative.max()),
            centred_cosine_min=1.0,
            top1_agreement=1.0 - (unmatched - at_cut) / max(1, self._matched + unmatched),
            flips=unmatched,
            excused_flips=at_cut,
            mean_kl=None,
            max_abs_in_std=0.0,
            detections=DetectionDifferences(
                matched=self._matched,
                unmatched=unmatched,
                at_cut=at_cut,
                box_max=self._box,
                score_max=self._score,
                mask_flips=self._mask_flips / max(1, self._mask_places),
                inexact=self._inexact,
            ),
        )


def _pairs(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Places of the partners on both sides, those that overlap most first; each has one at most."""
    left, right = given["boxes"], expected["boxes"]
    corners = torch.minimum(left[:, None, 2:], right[None, :, 2:]) - torch.maximum(
        left[:, None, :2], right[None, :, :2]
    )
    shared = corners.clamp(min=0).prod(dim=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=-1) for boxes in (left, right)]
    overlap = shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-12)
    overlap[(given["labels"][:, None] != expected["labels"]) | (given["labels"][:, None] < 0)] = 0.0
    pairs: list[tuple[int, int]] = []
    while overlap.numel() and float(overlap.max()) >= MATCH_IOU:
        row, column = divmod(int(overlap.argmax()), overlap.shape[1])
        pairs.append((row, column))
        overlap[row], overlap[:, column] = 0.0, 0.0
    places = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return places[:, 0], places[:, 1]
