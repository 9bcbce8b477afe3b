"""Classification: one of several classes, from the pooled output of the last stage. The reference for other tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnx_deploy.core.errors import CorruptArtifactError
from cnx_deploy.core.gates import OutputSpec
from cnx_deploy.core.variants import Variant
from cnx_deploy.model.deploy_layers import TokenNorm, doubles, linear, widen
from cnx_deploy.model.folds import fold_affine_into_linear
from cnx_deploy.model.layers import EPS
from cnx_deploy.model.tasks.base import Outputs, Prediction, Task, register_task
from cnx_deploy.model.tasks.classification_metrics import Outcome, RunningMetrics

if TYPE_CHECKING:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.model.convnextv2 import ConvNeXtV2

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


class Classification(Task):
    """Global average pooling, LayerNorm and a linear layer, as in the papers.

    Shape: the last stage's output (N, C, H, W) -> "logits" (N, num_classes).
    """

    name = "classification"
    operators = MappingProxyType({"LayerNormalization": 1})
    class_output = "logits"
    allows_flip = True
    allows_temperature = True
    prediction = ClassPrediction

    def outputs(self, num_classes: int) -> tuple[OutputSpec, ...]:
        """One logit a class."""
        return (OutputSpec("logits", (num_classes,), "logit", "softmax"),)

    def modules(self, variant: Variant, num_classes: int) -> dict[str, nn.Module]:
        """The norm of the pooled output and the linear layer."""
        width = variant.dims[-1]
        return {"norm": nn.LayerNorm(width, eps=EPS), "head": nn.Linear(width, num_classes)}

    def forward(self, network: Any, maps: Mapping[int, Tensor]) -> Outputs:
        """Pool, normalise, classify."""
        return {"logits": network.head(network.norm(maps[3].mean(dim=(-2, -1))))}

    def deployed_modules(self, model: "ConvNeXtV2", spec: "DeploySpec") -> dict[str, nn.Module]:
        """The norm's gain and shift are folded into the linear layer, and so is 1 / temperature."""
        weight, bias = doubles(model.head)
        dense, affine = (weight / spec.temperature, bias / spec.temperature), doubles(model.norm)
        if "head-affine" in spec.folds:
            return {"norm": TokenNorm(), "head": linear(*fold_affine_into_linear(*dense, *affine))}
        return {"norm": TokenNorm(*affine), "head": linear(*dense)}

    def deployed_forward(self, network: Any, maps: Mapping[int, Tensor]) -> Outputs:
        """Pool and normalise in FP32, classify in the head's type."""
        pooled = network.norm(widen(maps[3]).mean(dim=(2, 3))).to(network.head.weight.dtype)  # (N, C)
        return {"logits": widen(network.head(pooled))}

    def predictions(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None, *, top: int
    ) -> list[Prediction]:
        """The `top` best classes of each image, or all where there are fewer."""
        logits = outputs["logits"]
        if class_names and len(class_names) != logits.shape[1]:
            raise CorruptArtifactError(
                f"The model has {logits.shape[1]} classes and its record {len(class_names)} names. Export again."
            )
        best = torch.softmax(logits.double(), dim=1).topk(min(top, logits.shape[1]), dim=1)
        return [
            ClassPrediction(
                path,
                scores=tuple(
                    ClassScore(index, class_names[index] if class_names else str(index), value)
                    for value, index in zip(values, indices, strict=True)
                ),
            )
            for path, values, indices in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True)
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
