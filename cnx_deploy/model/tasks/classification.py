"""Classification: one of several classes, from the pooled output of the last stage. The reference for other tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.errors import CorruptArtifactError
from cnx_deploy.model.tasks.base import Prediction, register_task
from cnx_deploy.model.tasks.classification_metrics import Outcome, RunningMetrics, class_scores
from cnx_deploy.model.tasks.pooled import PooledTask, feature_predictions

__all__ = ["ClassPrediction", "ClassScore", "Classification"]


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class and its probability in [0, 1]."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class ClassPrediction(Prediction):
    """The best classes of one image, best first; none for an image that could not be read."""

    scores: tuple[ClassScore, ...] = ()

    def __str__(self) -> str:
        if self.error is not None:
            return Prediction.__str__(self)
        return ", ".join(f"{score.name} {score.probability:.2%}" for score in self.scores)


class Classification(PooledTask):
    """One class of all: the papers' head. Shape: the last stage's output (N, C, H, W) -> "logits" (N, num_classes)."""

    name = "classification"
    answers = ("logits", "probabilities", "top5", "embedding", "unit-embedding", "maps", "class-maps")
    default = ("logits",)
    activation = "softmax"
    class_output = "logits"
    allows_temperature = True
    prediction = ClassPrediction
    losses = ("cross-entropy", "focal")

    def predictions(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None, *, top: int
    ) -> list[Prediction]:
        """The `top` best classes of each image, or all where there are fewer."""
        if (scores := class_scores(outputs)) is not None:
            if class_names and len(class_names) != scores.shape[1]:
                raise CorruptArtifactError(
                    f"The model has {scores.shape[1]} classes and its record {len(class_names)} names. Export again."
                )
            best = torch.softmax(scores, dim=1).topk(min(top, scores.shape[1]), dim=1)
            values, indices = best.values, best.indices
        elif "top5_classes" in outputs:
            values, indices = (outputs[f"top5_{name}"][:, :top] for name in ("probabilities", "classes"))
        else:
            return feature_predictions(outputs, paths)
        return [
            ClassPrediction(
                path,
                scores=tuple(
                    ClassScore(index, class_names[index] if class_names else str(index), value)
                    for value, index in zip(*row, strict=True)
                ),
            )
            for path, row in zip(paths, zip(values.tolist(), indices.tolist(), strict=True), strict=True)
        ]

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Tensor, *, label_smoothing: float = 0.0,
        class_weights: Tensor | None = None, focal_gamma: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Cross-entropy or focal loss with class indices (N,) or mixed probabilities (N, num_classes).

        The loss is the sum over classes of -t (1 - p)^focal_gamma log p (Lin et al., arXiv:1708.02002, equation 4, for
        any targets); without `focal_gamma` it is cross-entropy. `class_weights` (num_classes,), the paper's alpha, is
        the factor on the loss of an image of a class: an image that is mixed of two has both by their shares.

        Weights go with the class before smoothing. torch's `cross_entropy` weighs the smoothed share of every class:
        at a smoothing of 0.1 and two classes of 100:1, it is least where the rare class is named for every image.
        """
        logits = outputs["logits"]
        if class_weights is None and not focal_gamma:
            return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
        log_p = torch.log_softmax(logits, dim=1)
        shares = (targets if targets.is_floating_point() else F.one_hot(targets, logits.shape[1])).to(log_p.dtype)
        weighted = shares if class_weights is None else shares * class_weights
        smoothed = (1.0 - label_smoothing) * weighted + label_smoothing * weighted.mean(dim=1, keepdim=True)
        # 1 - p without cancellation; at p = 1 a power below one would have an infinite slope.
        others = -torch.expm1(log_p).clamp_max(-torch.finfo(log_p.dtype).tiny)
        return -(smoothed * others**focal_gamma * log_p).sum(dim=1)

    def metrics(self, class_names: Sequence[str], each: Callable[[Outcome], None] | None = None) -> RunningMetrics:
        """Top-1 and top-5, rates by class, confusion and calibration."""
        return RunningMetrics(class_names, each)


register_task(Classification())
