"""Multi-label classification: each of many labels by itself, from the pooled output of the last stage."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GAMMA_NEG", "GAMMA_POS", "NEGATIVE_CLIP", "asymmetric_loss"]

GAMMA_NEG, GAMMA_POS, NEGATIVE_CLIP = 4.0, 1.0, 0.05
"""Of the reference code's class; the paper's experiments on COCO take 0 for `gamma_pos`."""


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
