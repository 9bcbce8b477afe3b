"""Features: what a network makes of an image before it names a class, for retrieval and anomaly detection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnx_deploy.core.variants import Variant
from cnx_deploy.model.tasks.base import Prediction, register_task
from cnx_deploy.model.tasks.pooled import PooledTask

__all__ = ["FeaturePrediction", "Features"]


@dataclass(frozen=True, slots=True)
class FeaturePrediction(Prediction):
    """The embedding of one image, C4 values; empty where it is not given, or the image could not be read."""

    embedding: tuple[float, ...] = ()

    def __str__(self) -> str:
        if self.error is not None:
            return Prediction.__str__(self)
        if not self.embedding:
            return "maps alone: --save FILE.npz keeps them"
        length = torch.tensor(self.embedding, dtype=torch.float64).norm()
        return f"{len(self.embedding)} values of length {length:.4g}"


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
        """The embedding of each image, that of length one where both are given."""
        vectors = outputs.get("unit_embedding", outputs.get("embedding"))
        rows = [()] * len(paths) if vectors is None else [tuple(row) for row in vectors.tolist()]
        return [FeaturePrediction(path, embedding=row) for path, row in zip(paths, rows, strict=True)]

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
