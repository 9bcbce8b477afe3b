"""What tasks share whose head pools the last stage, normalises it and may classify: their outputs by choice.

The words of `--output`, and the outputs they name: `logits` and `probabilities` (N, K); `top5`, two outputs, the five
best classes of each image and their probabilities; `embedding` (N, C4), what the head's linear layer reads, and
`unit-embedding`, divided by its length; `maps`, the stages' outputs `stage1` to `stage4` (N, C, H, W); `class-maps`
(N, K, H, W), where in the last stage a class gets its logit from.

A class map is the network's own arithmetic. The head is linear once the LayerNorm's mean and deviation are held, which
are those of the pooled vector. So the same affine and the same linear layer, applied to each position of the last
stage, give a map whose mean over the positions is the logit.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import OutputSpec
from cnx_deploy.core.variants import Variant
from cnx_deploy.model.deploy_layers import TokenNorm, doubles, linear, widen
from cnx_deploy.model.folds import fold_affine_into_linear
from cnx_deploy.model.layers import EPS
from cnx_deploy.model.tasks.base import Outputs, Prediction, Task

if TYPE_CHECKING:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.model.convnextv2 import ConvNeXtV2

__all__ = ["FeaturePrediction", "PooledTask", "feature_predictions"]

TOP = 5
"""Classes of the output `top5`, or all where there are fewer."""
OF_EMBEDDING = frozenset({"embedding", "unit-embedding"})
FLIPPED_ALIKE = frozenset({"logits", "probabilities", "embedding"})
"""Words whose values for an image and its mirror can be averaged: no place in the image, no length, no ranking."""


@dataclass(frozen=True, slots=True)
class FeaturePrediction(Prediction):
    """The vectors of one image, C4 values each; empty where they are not given, or the image could not be read."""

    embedding: tuple[float, ...] = ()
    unit_embedding: tuple[float, ...] = ()

    def __str__(self) -> str:
        if self.error is not None:
            return Prediction.__str__(self)
        vector = self.embedding or self.unit_embedding
        if not vector:
            return "maps, which --save FILE.npz keeps"
        return f"{len(vector)} values of length {torch.tensor(vector, dtype=torch.float64).norm():.4g}"


def feature_predictions(outputs: Mapping[str, Tensor], paths: Sequence[str]) -> list[Prediction]:
    """What a network without class scores says of each image."""
    empty: list[tuple[float, ...]] = [()] * len(paths)
    vectors = [
        [tuple(row) for row in outputs[name].tolist()] if name in outputs else empty
        for name in ("embedding", "unit_embedding")
    ]
    return [FeaturePrediction(path, None, *rows) for path, *rows in zip(paths, *vectors, strict=True)]


class PooledTask(Task):
    """Global average pooling, LayerNorm and, where there are classes, a linear layer: modules `norm` and `head`.

    Shape: the last stage's output (N, C4, H, W) -> what the words name.

    Attributes:
        default: the words that stand for what the task gives by itself.
        activation: what makes probabilities of logits; None for a task without classes.
    """

    operators = MappingProxyType({"LayerNormalization": 1})
    allows_flip = True
    default: tuple[str, ...]
    activation: Literal["softmax", "sigmoid"] | None = None

    def outputs(
        self, num_classes: int, words: Sequence[str] = (), maps: Sequence[tuple[int, int, int]] = ()
    ) -> tuple[OutputSpec, ...]:
        """Declare what each word names, in the order of the words."""
        return tuple(spec for word in words or self.default for spec in self._declared(word, num_classes, maps))

    def _declared(self, word: str, classes: int, maps: Sequence[tuple[int, int, int]]) -> tuple[OutputSpec, ...]:
        best = (min(TOP, classes),)
        if word == "top5":
            return (
                OutputSpec("top5_probabilities", best, "probability", is_ranked=True),
                OutputSpec("top5_classes", best, "class", dtype="int64", indexes="probabilities", is_ranked=True),
            )
        if word == "maps":
            return tuple(OutputSpec(f"stage{level}", shape, "feature") for level, shape in enumerate(maps, 1))
        if word == "class-maps":
            return (OutputSpec("class_maps", (classes, *maps[-1][1:]), "logit a position"),)
        if word in OF_EMBEDDING:
            return (OutputSpec(word.replace("-", "_"), (maps[-1][0],), "embedding"),)
        unit = {"logits": "logit", "probabilities": "probability"}[word]
        return (OutputSpec(word, (classes,), unit, self.activation, thresholds=self.thresholds),)

    def modules(self, variant: Variant, num_classes: int) -> dict[str, nn.Module]:
        """The norm of the pooled output and the linear layer, or an identity where there are no classes."""
        width = variant.dims[-1]
        head = nn.Linear(width, num_classes) if self.has_classes else nn.Identity()
        return {"norm": nn.LayerNorm(width, eps=EPS), "head": head}

    def forward(
        self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = (), *, temperature: float = 1.0
    ) -> Outputs:
        """Pool, normalise, classify; then what the words name."""
        words, pooled = words or self.default, maps[3].mean(dim=(-2, -1))  # (N, C4)
        embedding = network.norm(pooled)
        logits = network.head(embedding)
        class_maps = None
        if "class-maps" in words:
            mean, variance = pooled.mean(dim=1)[:, None, None, None], pooled.var(dim=1, correction=0)
            normed = (maps[3] - mean) / torch.sqrt(variance + network.norm.eps)[:, None, None, None]
            shaped = network.norm.weight[:, None, None] * normed + network.norm.bias[:, None, None]
            class_maps = network.head(shaped.movedim(1, -1)).movedim(-1, 1) / temperature
        if temperature != 1.0:
            logits = logits / temperature
        return dict(Answers(self.activation, words)(maps, embedding, logits, class_maps))

    def deployed_modules(self, model: "ConvNeXtV2", spec: "DeploySpec") -> dict[str, nn.Module]:
        """The norm's gain and shift are folded into the linear layer, unless an embedding is given; so is 1 / T."""
        affine, dense = doubles(model.norm), None
        if self.has_classes:
            weight, bias = doubles(model.head)
            dense = (weight / spec.temperature, bias / spec.temperature)
        if dense is not None and "head-affine" in spec.folds and not OF_EMBEDDING & set(spec.outputs):
            modules: dict[str, nn.Module] = {
                "norm": TokenNorm(),
                "head": linear(*fold_affine_into_linear(*dense, *affine)),
            }
        else:
            modules = {"norm": TokenNorm(*affine), "head": nn.Identity() if dense is None else linear(*dense)}
        if "class-maps" in spec.outputs:
            modules["class_maps"] = ClassMaps()
        if not self._is_plain(spec.outputs):
            modules["answers"] = Answers(self.activation, spec.outputs or self.default)
        return modules

    def deployed_forward(self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = ()) -> Outputs:
        """Pool and normalise in FP32, classify in the head's type; what follows is FP32 again."""
        if set(words) == {"maps"}:
            return dict(network.answers(maps, None, None, None))
        pooled = widen(maps[3]).mean(dim=(2, 3))  # (N, C4)
        embedding, logits = network.norm(pooled), None
        if self.has_classes and set(words or self.default) - {*OF_EMBEDDING, "maps", "class-maps"}:
            logits = widen(network.head(embedding.to(network.head.weight.dtype)))
        if self._is_plain(words):
            return {"embedding": embedding} if logits is None else {"logits": logits}
        class_maps = None
        if "class-maps" in words:
            class_maps = network.class_maps(maps[3], pooled, network.norm, network.head)
        return dict(network.answers(maps, embedding, logits, class_maps))

    def _is_plain(self, words: Sequence[str]) -> bool:
        """Whether nothing is computed behind the head."""
        return tuple(words or self.default) in (("logits",), ("embedding",))

    def check_allowed(self, spec: "DeploySpec") -> None:
        """Raise InputError for words that are not the task's, and for those that other options would make wrong."""
        super().check_allowed(spec)
        if spec.tta == "flip" and (odd := [word for word in spec.outputs if word not in FLIPPED_ALIKE]):
            raise InputError(
                f"--tta flip cannot average {', '.join(odd)} over an image and its mirror, but "
                f"{', '.join(sorted(FLIPPED_ALIKE & set(self.answers)))}. Leave one of them out."
            )
        if spec.temperature != 1.0 and spec.outputs and set(spec.outputs) <= {*OF_EMBEDDING, "maps"}:
            raise InputError(
                f"A temperature divides logits, and {', '.join(spec.outputs)} have none. Leave --temperature "
                "(temperature) out, or add an output of scores."
            )
        if spec.size_range is not None and (of_size := {"maps", "class-maps"} & set(spec.outputs)):
            raise InputError(
                f"The output {' and '.join(sorted(of_size))} has a size that follows the image's, and sizes are open. "
                "Export for one image size."
            )

    def levels_of(self, words: Sequence[str]) -> tuple[int, ...]:
        """All four stages where their maps are given, else the last."""
        return (0, 1, 2, 3) if "maps" in words else self.levels

    def operators_of(self, spec: "DeploySpec") -> Mapping[str, int]:
        """One LayerNormalization, unless the maps are all that is given.

        Class maps add an epsilon of their own, and an embedding of length one its ReduceL2.
        """
        words = spec.outputs
        needs_norm = not words or bool(set(words) - {"maps", "class-maps"})
        return {
            "LayerNormalization": int(needs_norm),
            "epsilon": int("class-maps" in words),
            "ReduceL2": int("unit-embedding" in words),
        }

    def class_output_of(self, names: Collection[str]) -> str | None:
        """The logits, or else the probabilities."""
        return next((name for name in ("logits", "probabilities") if name in names), None)


class Answers(nn.Module):
    """What the words of a task name, from what its head computed: the same in the training and in the deploy form.

    A module, so that the nodes of the exported graph are known by its name.
    """

    def __init__(self, activation: str | None, words: Sequence[str]) -> None:
        super().__init__()
        self.activation, self.words = activation, tuple(words)

    def forward(
        self, maps: Mapping[int, Tensor], embedding: Tensor | None, logits: Tensor | None, class_maps: Tensor | None
    ) -> Outputs:
        """Name them in the order of the words; what no word needs is None."""
        outputs: Outputs = {}
        for word in self.words:
            if word in ("probabilities", "top5"):
                assert logits is not None
                probabilities = logits.softmax(dim=1) if self.activation == "softmax" else logits.sigmoid()
                best = probabilities.topk(min(TOP, probabilities.shape[1]), dim=1) if word == "top5" else None
                outputs |= (
                    {word: probabilities}
                    if best is None
                    else {"top5_probabilities": best.values, "top5_classes": best.indices}
                )
            elif word == "unit-embedding":
                assert embedding is not None
                outputs["unit_embedding"] = embedding / torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
            elif word == "maps":
                outputs |= {f"stage{level + 1}": widen(output) for level, output in maps.items()}
            else:
                given = {"logits": logits, "embedding": embedding, "class-maps": class_maps}[word]
                assert given is not None
                outputs[word.replace("-", "_")] = given
        return outputs


class ClassMaps(nn.Module):
    """The head of the deploy form at each position, with the LayerNorm statistics of the pooled map.

    Shape: the last stage (N, C4, H, W) and pooled (N, C4) -> (N, K, H, W). What a map holds at a position can leave
    FP16; divided by the deviation in FP32, before it is rounded, it cannot.
    """

    def forward(self, last: Tensor, pooled: Tensor, norm: TokenNorm, head: nn.Linear) -> Tensor:
        """Normalise by the pooled vector's mean and deviation, then classify; see the class for shapes."""
        mean = pooled.mean(dim=1, keepdim=True)
        centred = pooled - mean
        inverse = 1.0 / torch.sqrt((centred * centred).mean(dim=1, keepdim=True) + EPS)  # (N, 1)
        normed = (widen(last) - mean[..., None, None]) * inverse[..., None, None]
        if norm.gain is not None and norm.shift is not None:
            normed = normed * widen(norm.gain)[:, None, None] + widen(norm.shift)[:, None, None]
        return widen(F.conv2d(normed.to(head.weight.dtype), head.weight[:, :, None, None], head.bias))
