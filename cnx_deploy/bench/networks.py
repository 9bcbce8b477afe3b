"""Which artifacts hold the same network, and what a benchmark's record has to say of each network and its files."""

from collections.abc import Iterator, Sequence
from typing import Any

from cnx_deploy.core.manifest import Artifact, EngineFacts, OnnxFacts
from cnx_deploy.core.variants import Variant, find_variant

__all__ = ["activation_count", "network_facts", "network_name", "networks_of", "precisions_of"]


def networks_of(artifacts: Sequence[Artifact]) -> Iterator[list[Artifact]]:
    """Artifacts that hold the same weights for the same input, together; in the order they come in."""
    groups: dict[tuple[Any, ...], list[Artifact]] = {}
    for artifact in artifacts:
        model, deploy = artifact.manifest.model, artifact.manifest.deploy
        key = (model.weights.sha256, model.image_size, deploy.input_kind, deploy.mean, deploy.std)
        groups.setdefault(key, []).append(artifact)
    yield from groups.values()


def precisions_of(artifacts: Sequence[Artifact]) -> tuple[str, ...]:
    """The precision of each artifact."""
    return tuple(artifact.manifest.precision.name for artifact in artifacts)


def network_name(artifact: Artifact) -> str:
    """`atto-224-1a2b3c4d`: variant, image size, the first digits of the weights' hash; `-uint8` for that input."""
    model = artifact.manifest.model
    kind = artifact.manifest.deploy.input_kind
    name = f"{model.variant}-{model.image_size}-{model.weights.sha256[:8]}"
    return name if kind == "float" else f"{name}-{kind}"


def network_facts(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """Of the artifacts of one network: size, counts an image, weights, input, and each file's hash and types."""
    model, deploy = artifacts[0].manifest.model, artifacts[0].manifest.deploy
    variant = find_variant(model.variant)
    return {
        "variant": model.variant,
        "image_size": model.image_size,
        "num_classes": model.num_classes,
        "input": "uint8 NHWC" if deploy.input_kind == "uint8" else "float32 NCHW",
        "weights": {"origin": model.weights.origin, "sha256": model.weights.sha256},
        "parameters": variant.parameter_count + (model.num_classes - 1000) * (variant.dims[-1] + 1),
        "gmacs": round(variant.mac_count(model.image_size, model.num_classes) / 1e9, 3),
        "macts": round(activation_count(variant, model.image_size, model.num_classes) / 1e6, 2),
        "files": {artifact.path.name: _file_facts(artifact) for artifact in artifacts},
    }


def activation_count(variant: Variant, image_size: int, num_classes: int = 1000) -> int:
    """Outputs of all convolutions and linear layers for one image, which timm calls activations (atto: 3.81 million).

    A block of width C has 6·C at each position: depthwise C, first pointwise layer 4·C, second C.
    """
    total = num_classes
    for stage, (depth, width) in enumerate(zip(variant.depths, variant.dims, strict=True)):
        side = image_size // (4 * 2**stage)
        total += side * side * width * (1 + 6 * depth)
    return total


def _file_facts(artifact: Artifact) -> dict[str, Any]:
    """Hash and precision; an FP16 file's FP32 islands are its layers in float (engine) or its tensors by type."""
    facts = artifact.manifest.facts
    compiled = facts.compiled if isinstance(facts, EngineFacts) else None
    return {
        "sha256": artifact.sha256,
        "precision": artifact.manifest.precision.name,
        "fp32_layers": facts.census.float_layers if isinstance(facts, EngineFacts) else None,
        "tensors_by_type": facts.types if isinstance(facts, OnnxFacts) else None,
        "compiled": {key: getattr(compiled, key, None) for key in ("batch", "kernels", "megabytes_per_image")},
    }
