"""Faults planted in copies of exported files, and where a comparison by layer says that they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.diagnosis.layer_record import LayerComparison
from cnx_deploy.diagnosis.layerwise import compare_layers
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from tests.conftest import TINY_TEST

Values = np.ndarray[Any, Any]

IMAGES = runner_input(next(image_like_batches(2, 32, batch_size=2)), "float")


def spec_of(artifact: Artifact) -> DeploySpec:
    return artifact.manifest.deploy


def compare(
    artifact: Artifact, path: Path | None = None, model: ConvNeXtV2 | None = None, **words: Any
) -> LayerComparison:
    model = random_model(TINY_TEST, 10, seed=0) if model is None else model
    return compare_layers(path or artifact.path, model, spec_of(artifact), [IMAGES], **words)


def planted(artifact: Artifact, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a file after `change`."""
    model = onnx.load(artifact.path)
    before = model.SerializeToString()
    change(model)
    assert model.SerializeToString() != before
    onnx.save(model, folder / "planted.onnx")
    return folder / "planted.onnx"


def with_constant(name: str, function: Callable[[Values], Values]) -> Callable[[onnx.ModelProto], None]:
    """Apply `function` to a constant; `name` is its own, or that of the node whose only constant it is."""

    def change(model: onnx.ModelProto) -> None:
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        inputs = [each for node in model.graph.node if node.name == name for each in node.input]
        (found,) = [each for each in inputs if each in tensors] or [name]
        values = function(numpy_helper.to_array(tensors[found]))
        tensors[found].CopyFrom(numpy_helper.from_array(values, found))

    return change


def shifted(values: Values) -> Values:
    """One value is another: it is not the whole tensor that is off."""
    changed = values.copy()
    changed.flat[1] += 2
    return changed


def with_epsilon(node_name: str, epsilon: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (node,) = (node for node in model.graph.node if node.name == node_name)
        (attribute,) = (attribute for attribute in node.attribute if attribute.name == "epsilon")
        attribute.f = epsilon

    return change


def with_weights_of(form: nn.Module) -> Callable[[onnx.ModelProto], None]:
    """Give an FP32 file the weights of another network's deploy form: its constants have their names and layout."""

    def change(model: onnx.ModelProto) -> None:
        weights = form.state_dict()
        for tensor in model.graph.initializer:
            if tensor.name in weights:
                tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].numpy(), tensor.name))

    return change


def beginnings(found: LayerComparison) -> dict[str, str | None]:
    """Where each backend that ran diverges, if it does."""
    return {result.backend: result.begins.module if result.diverges and result.begins else None for result in found.ran}


def gamma_of(artifact: Artifact, module: str) -> str:
    """The constant that a GRN multiplies its share with: the one product in its scope that reads a constant."""
    model = onnx.load(artifact.path)
    constants = {tensor.name for tensor in model.graph.initializer}
    (name,) = (
        str(name)
        for node in model.graph.node
        if node.name.startswith(f"{module}/Mul")
        for name in node.input
        if name in constants
    )
    return name
