"""What a search among embeddings makes of two runners: whether an image has the same nearest neighbours on both sides.

Neighbours are those of the largest cosine similarity among all images but the query itself, in float64. Rounding moves
similarities, so that neighbours of nearly one similarity may change places: a change is excused where the reference
had them no further apart than the noise of the run explains. Any other change fails.

Memory: the rows of both sides in FP32, of at most MOST_IMAGES images, and at the end the same in float64. Of 768 values
these are 50 and 101 MB, of 2,816 values (huge) 185 and 369 MB. Similarities are made for QUERIES images at a time,
which takes 200 MB more.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import ParityResult
from cnx_deploy.verification.parity import NOISE_MARGIN

__all__ = ["MOST_IMAGES", "NeighboursAt", "RankChange", "Retrieval", "RetrievalResult", "RunningRetrieval"]

MOST_IMAGES = 8192
"""Beyond these, every second image is kept, then every fourth. The search among 8,192 takes 28 s on two cores."""
QUERIES = 512
"""Images whose similarities with all are held at once: 34 MB a side."""
NEIGHBOURS = (1, 5, 10)
"""Values of k. One that leaves no image out of the neighbours would always agree, and is not counted."""
LISTED_AT_MOST = 1000
"""Rank changes that a record keeps, the unexcused ones first; all are counted."""


@dataclass(frozen=True, slots=True)
class NeighboursAt:
    """How the k nearest neighbours agree, as shares in 0 to 1.

    `overlap`: of the reference's k nearest those that the candidate has too. `recall`: of the images those whose
    nearest neighbour at the reference is among the candidate's k nearest. `reference_labels` and `candidate_labels`:
    of the images whose label another one has too, those with one such among the k nearest; None without labels.
    """

    k: int
    overlap: float
    recall: float
    reference_labels: float | None = None
    candidate_labels: float | None = None


@dataclass(frozen=True, slots=True)
class RankChange:
    """A neighbour of `image` that the candidate has lost from the k nearest, and the one it has in its place.

    `margin`: by how much the lost one was more similar at the reference; the largest of all such pairs of the image.
    """

    image: str
    k: int
    lost: str
    gained: str
    margin: float
    excused: bool


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What was found over `images` images: of the `available` that ran every `stride`th, from the first on.

    `rms_error` is of the similarities of all pairs. A change is excused where its margin is at most `excused_margin`:
    NOISE_MARGIN times that error, which counts at most as the gate's relative L2, since a larger one is no rounding.
    `changed` and `unexcused` count all changes, `changes` lists LISTED_AT_MOST. `not_computed` says why there is none.
    """

    images: int
    available: int
    neighbours: tuple[NeighboursAt, ...] = ()
    labelled: int = 0
    rms_error: float = math.nan
    excused_margin: float = math.nan
    changed: int = 0
    unexcused: int = 0
    changes: tuple[RankChange, ...] = ()
    stride: int = 1
    not_computed: str | None = None


@dataclass(frozen=True, slots=True)
class RetrievalResult(ParityResult):
    """A verdict over embeddings: the gate's, and a failure for rank changes that are not excused."""

    retrieval: Retrieval

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it, which knows no NaN."""
        document, found = ParityResult.to_dict(self), self.retrieval
        numbers = {name: value if math.isfinite(value) else None for name, value in (
            ("rms_error", found.rms_error), ("excused_margin", found.excused_margin))}  # fmt: skip
        return {**document, "retrieval": {**asdict(found), **numbers}}

    def lines(self, at_most: int = 10) -> list[str]:
        """A table of the values of k, and at most so many of the rank changes that are not excused."""
        found = self.retrieval
        if found.not_computed is not None:
            return [f"retrieval was not computed: {found.not_computed}"]
        every = f" (of each {found.stride} the first)" if found.stride > 1 else ""
        changes = (
            f"{found.changed} rank changes, {found.unexcused} not excused (margin above {found.excused_margin:.2e})"
        )
        labels = [f"label among k: {side}" for side in (self.reference, self.candidate)] if found.labelled else []
        text = [
            f"retrieval by cosine, {found.images} of {found.available} images{every}: "
            f"{changes if found.changed else 'no rank changes'}; RMS error of a similarity {found.rms_error:.1e}",
            "  ".join([f"{'k':>4}", "same k nearest", "nearest among k", *labels]),
        ]
        for row in found.neighbours:
            shares = [(row.overlap, 14), (row.recall, 15)]
            if row.reference_labels is not None and row.candidate_labels is not None:
                shares += [(row.reference_labels, len(labels[0])), (row.candidate_labels, len(labels[1]))]
            text.append("  ".join([f"{row.k:>4}", *(f"{100 * share:.2f} %".rjust(width) for share, width in shares)]))
        if found.labelled and found.labelled < found.images:
            text.append(
                f"  {found.images - found.labelled} images are alone with their label, and not counted by labels"
            )
        text += [
            f"  {change.image}: {change.gained} took the place of {change.lost} among the {change.k} nearest, margin "
            f"{change.margin:.2e}: NOT EXCUSED"
            for change in found.changes[:at_most]
            if not change.excused
        ]
        if found.unexcused > at_most:
            text.append(f"  and {found.unexcused - at_most} more, which --json lists")
        return text


class RunningRetrieval:
    """Embeddings of both sides, batch by batch, kept for at most `limit` evenly spread images."""

    def __init__(self, limit: int = MOST_IMAGES) -> None:
        self._limit, self._stride, self._seen = limit, 1, 0
        self._rows: list[Tensor] = []  # (n, 2, C) float32: candidate and reference

    def add(self, candidate: Tensor, reference: Tensor) -> None:
        """Embeddings (n, C) of both sides for the same images. Raises InputError when the shapes differ."""
        if candidate.shape != reference.shape or candidate.ndim < 2:
            raise InputError(
                f"Cannot search among embeddings of shape {tuple(candidate.shape)} and {tuple(reference.shape)}: "
                "both sides need a vector for each of the same images."
            )
        first = -self._seen % self._stride  # of this batch the first image that is kept
        kept = [side.detach().float().cpu().flatten(1)[first :: self._stride] for side in (candidate, reference)]
        self._rows.append(torch.stack(kept, dim=1))
        self._seen += len(candidate)
        while sum(map(len, self._rows)) > self._limit:
            self._rows = [torch.cat(self._rows)[::2].clone()]
            self._stride *= 2

    def result(self, paths: Sequence[str], labels: Sequence[int], largest_error: float) -> Retrieval:
        """Search among everything added.

        Args:
            paths: a name for every image that was added, kept or not.
            labels: the label of each, or none.
            largest_error: a similarity may be wrong by so much on average, the gate's relative L2.
        """
        rows = torch.cat(self._rows)
        count, broken = len(rows), int((~torch.isfinite(rows).flatten(1).all(dim=1)).sum())
        if count < 3 or broken:
            why = f"the embeddings of {broken} images are not finite" if broken else f"{count} images, and it takes 3"
            return Retrieval(count, self._seen, stride=self._stride, not_computed=why)
        candidate, reference = (F.normalize(side.double(), dim=1) for side in rows.unbind(dim=1))
        names, own = list(paths[:: self._stride]), torch.tensor(labels[:: self._stride])
        values = [k for k in NEIGHBOURS if k < count - 1]
        # Of each k: what is shared, nearest that are found, labels that are found at reference and candidate.
        sums, squares, found = torch.zeros(len(values), 4, dtype=torch.float64), 0.0, []
        _, kind, counts = torch.unique(own, return_inverse=True, return_counts=True)
        shares_label = counts[kind] > 1  # (N,), or none without labels
        for start in range(0, count, QUERIES):
            block = torch.arange(start, min(start + QUERIES, count))
            given, expected = candidate[block] @ candidate.T, reference[block] @ reference.T
            for similarities in (given, expected):
                similarities[torch.arange(len(block)), block] = 0.0
            squares += float((given - expected).square().sum())
            for similarities in (given, expected):
                similarities[torch.arange(len(block)), block] = -math.inf
            nearest, theirs = (side.topk(values[-1], dim=1).indices for side in (expected, given))
            for row, k in enumerate(values):
                sums[row, 0] += (nearest[:, :k, None] == theirs[:, None, :k]).sum()
                sums[row, 1] += (nearest[:, :1] == theirs[:, :k]).any(dim=1).sum()
                if len(own):
                    for column, side in ((2, nearest), (3, theirs)):
                        hits = (own[side[:, :k]] == own[block, None]).any(dim=1)
                        sums[row, column] += hits.sum()  # none of an image that is alone with its label
                found += [(k, *change) for change in _changes(expected, nearest[:, :k], theirs[:, :k], block)]
        rms, queries_with_label = math.sqrt(squares / (count * (count - 1))), int(shares_label.sum())
        limit = NOISE_MARGIN * min(rms, largest_error)
        found.sort(key=lambda change: -change[-1])  # the largest margin first, so the unexcused ones
        return Retrieval(
            images=count,
            available=self._seen,
            neighbours=tuple(_neighbours(values, sums, count, queries_with_label)),
            labelled=queries_with_label,
            rms_error=rms,
            excused_margin=limit,
            stride=self._stride,
            changed=len(found),
            unexcused=sum(not margin <= limit for *_, margin in found),
            changes=tuple(
                RankChange(names[image], k, names[lost], names[gained], margin, excused=margin <= limit)
                for k, image, lost, gained, margin in found[:LISTED_AT_MOST]
            ),
        )


def _neighbours(values: Sequence[int], sums: Tensor, count: int, labelled: int) -> Iterator[NeighboursAt]:
    for k, (shared, found, reference, candidate) in zip(values, sums.tolist(), strict=True):
        labels = (reference / labelled, candidate / labelled) if labelled else ()
        yield NeighboursAt(k, shared / (count * k), found / count, *labels)


def _changes(
    similarities: Tensor, nearest: Tensor, theirs: Tensor, images: Tensor
) -> Iterator[tuple[int, int, int, float]]:
    """Image, neighbour lost, neighbour gained, margin, for each image (n,) whose k nearest (n, k) are others.

    The candidate has every gained one before every lost one, so the pair that was furthest apart counts.
    """
    same = nearest[:, :, None] == theirs[:, None]
    lost = similarities.gather(1, nearest).masked_fill(same.any(dim=2), -math.inf).max(dim=1)
    gained = similarities.gather(1, theirs).masked_fill(same.any(dim=1), math.inf).min(dim=1)
    for row in (~same.any(dim=2)).any(dim=1).nonzero().flatten().tolist():
        pair = int(nearest[row, lost.indices[row]]), int(theirs[row, gained.indices[row]])
        yield int(images[row]), *pair, float(lost.values[row] - gained.values[row])
