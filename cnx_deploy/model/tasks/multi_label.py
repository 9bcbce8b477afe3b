"""Multi-label classification: each of many labels by itself, from the pooled output of the last stage."""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.model.tasks.base import Prediction, register_task
from cnx_deploy.model.tasks.classification import ClassScore
from cnx_deploy.model.tasks.multi_label_metrics import DEFAULT_THRESHOLD, LabelOutcome, RunningLabels, probabilities_of
from cnx_deploy.model.tasks.pooled import PooledTask, feature_predictions

__all__ = ["GAMMA_NEG", "GAMMA_POS", "NEGATIVE_CLIP", "LabelPrediction", "MultiLabel", "asymmetric_loss"]

GAMMA_NEG, GAMMA_POS, NEGATIVE_CLIP = 4.0, 1.0, 0.05
"""Of the reference code's class; the paper's experiments on COCO take 0 for `gamma_pos`."""


@dataclass(frozen=True, slots=True)
class LabelPrediction(Prediction):
    """The labels of one image at or above their thresholds, best first; `more` of them are not told."""

    scores: tuple[ClassScore, ...] = ()
    more: int = 0

    def __str__(self) -> str:
        if self.error is not None:
            return Prediction.__str__(self)
        named = ", ".join(f"{score.name} {score.probability:.2%}" for score in self.scores) or "no label"
        return f"{named} and {self.more} more" if self.more else named


class MultiLabel(PooledTask):
    """Several labels an image. Shape: the last stage's output (N, C, H, W) -> "probabilities" (N, num_classes).

    Probabilities are the logistic function of the logits in FP32, which thresholds are compared with.
    """

    name = "multi-label"
    answers = ("logits", "probabilities", "top5", "embedding", "unit-embedding", "maps", "class-maps")
    default = ("probabilities",)
    activation = "sigmoid"
    class_output = "probabilities"
    prediction = LabelPrediction
    targets = "label-sets"
    usual_top = sys.maxsize  # all that are at or above their thresholds
    losses = ("bce", "asymmetric")
    # Smoothing would hold each of thousands of labels above half its share in every image.
    training_defaults = MappingProxyType({"loss": "bce", "label_smoothing": 0.0})

    def with_thresholds(self, thresholds: Sequence[float] | None) -> "MultiLabel":
        """Return the task with these thresholds, probabilities between 0 and 1."""
        if thresholds is None:
            return self
        if not all(0.0 < value < 1.0 for value in thresholds):
            raise InputError(
                f"Thresholds are probabilities between 0 and 1, and they are from {min(thresholds, default=0)} to "
                f"{max(thresholds, default=0)}. Fit them with cnx-deploy eval --fit-thresholds."
            )
        changed = copy.copy(self)
        changed.thresholds = tuple(map(float, thresholds))
        return changed

    def predictions(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None, *, top: int
    ) -> list[Prediction]:
        """The labels of each image at or above their thresholds, best first, `top` of them."""
        if not {"probabilities", "logits"} & outputs.keys():
            return feature_predictions(outputs, paths)
        scores = probabilities_of(outputs)
        count = scores.shape[1]
        if class_names and len(class_names) != count:
            raise CorruptArtifactError(
                f"The model has {count} labels and its record {len(class_names)} names. Export again."
            )
        cuts = torch.tensor(self.thresholds or [DEFAULT_THRESHOLD] * count, dtype=torch.float64)
        answers: list[Prediction] = []
        for path, row, given in zip(paths, scores, scores.double() >= cuts, strict=True):
            labels = given.nonzero().flatten()
            best = labels[row[labels].argsort(descending=True, stable=True)].tolist()
            told = tuple(
                ClassScore(at, class_names[at] if class_names else str(at), float(row[at])) for at in best[:top]
            )
            answers.append(LabelPrediction(path, scores=told, more=len(best) - len(told)))
        return answers

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Tensor, *, label_smoothing: float = 0.0,
        class_weights: Tensor | None = None, gamma_neg: float = 0.0, gamma_pos: float = 0.0, negative_clip: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Binary cross-entropy, or with gammas and clip `asymmetric_loss`; `class_weights` are of the positives."""
        return asymmetric_loss(
            outputs["logits"], targets, gamma_neg=gamma_neg, gamma_pos=gamma_pos, negative_clip=negative_clip,
            label_smoothing=label_smoothing, positive_weights=class_weights,
        )  # fmt: skip

    def metrics(  # type: ignore[override]
        self, class_names: Sequence[str], each: Callable[[LabelOutcome], None] | None = None
    ) -> RunningLabels:
        """Mean average precision, and F1, precision and recall at the thresholds."""
        return RunningLabels(class_names, self.thresholds, each)


def asymmetric_loss(
    logits: Tensor, targets: Tensor, *, gamma_neg: float = GAMMA_NEG, gamma_pos: float = GAMMA_POS,
    negative_clip: float = NEGATIVE_CLIP, label_smoothing: float = 0.0, positive_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the asymmetric loss of each image (N,), the sum over its labels.

    The loss of a label is -t w (1 - p)^gamma_pos log p - (1 - t) q^gamma_neg log(1 - q) with q = max(p - clip, 0). With
    gammas and clip of 0 it is binary cross-entropy. A sum has the gradient p - t at each logit, as cross-entropy has,
    so that learning rates mean the same for any number of labels; a mean over 9,000 would come near Adam's epsilon.

    Args:
        logits: (N, labels); half precision is computed in FP32.
        targets: shares (N, labels) in [0, 1]; the loss is linear in them, so that mixed images have both losses.
        gamma_neg: exponent of the negatives.
        gamma_pos: exponent of the positives.
        negative_clip: the probability at and below which a negative has no loss.
        label_smoothing: moves each target that far towards one half.
        positive_weights: w, (labels,), the factor on the loss of the positives.

    Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", arXiv:2009.14119, equations 4, 6 and 7; the
    gradient goes through the exponents' bases too, as in equation 8.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    smoothed = targets.to(logits.dtype) * (1.0 - label_smoothing) + 0.5 * label_smoothing
    positive, negative, tiny = -F.logsigmoid(logits), -F.logsigmoid(-logits), torch.finfo(logits.dtype).tiny
    # A power below one has an infinite slope at 0, where the clamp has none: their product would be NaN.
    if gamma_pos:
        positive = positive * torch.sigmoid(-logits).clamp_min(tiny) ** gamma_pos
    if negative_clip:
        # 1 - p comes from -logits, so that it has digits where p is 1.
        negative = -torch.log((torch.sigmoid(-logits) + negative_clip).clamp_max(1.0))
    if gamma_neg:
        negative = negative * (torch.sigmoid(logits) - negative_clip).clamp_min(tiny) ** gamma_neg
    if positive_weights is not None:
        positive = positive * positive_weights
    return (smoothed * positive + (1.0 - smoothed) * negative).sum(dim=1)


register_task(MultiLabel())
