"""Features: what a network makes of an image before it names a class, for retrieval and anomaly detection."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import Variant
from cnx_deploy.model.tasks.base import Metrics, Prediction, register_task
from cnx_deploy.model.tasks.pooled import FeaturePrediction, PooledTask, feature_predictions

__all__ = ["Features"]


class Features(PooledTask):
    """The pooled and normalised output of the last stage, and the stages' maps, from weights with or without a head.

    Shape: the stages' outputs -> "embedding" (N, C4), or "unit_embedding", or "stage1" to "stage4" (N, C, H, W).
    """

    name = "features"
    answers = ("embedding", "unit-embedding", "maps")
    default = ("embedding",)
    has_classes = False
    prediction = FeaturePrediction

    def predictions(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None, *, top: int
    ) -> list[Prediction]:
        """The embedding of each image."""
        return feature_predictions(outputs, paths)

    def metrics(self, class_names: Sequence[str], each: Callable[[Any], None] | None = None) -> Metrics:
        """Refuse: there are no classes to count."""
        raise InputError(
            "Features name no classes, so there is nothing to count. `cnx-deploy verify FILE --data FOLDER` searches "
            "among them, and says how often an image's neighbours have its label."
        )

    def num_classes_in(self, state: Mapping[str, Tensor]) -> int | None:
        """None: there are no classes."""
        return None

    def own_state(self, state: dict[str, Tensor], variant: Variant) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Leave a head out; without a norm before it, as pre-training leaves one, add one that changes no scale."""
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        notes = []
        if left := sorted(state.keys() - kept.keys()):
            notes.append(f"the head is left out: {', '.join(left)}")
        if not any(name.startswith("norm.") for name in kept):
            width = variant.dims[-1]
            kept |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
            notes.append("the weights have no last norm, so its gain is 1 and its shift 0: nothing was trained there")
        return kept, tuple(notes)


register_task(Features())
