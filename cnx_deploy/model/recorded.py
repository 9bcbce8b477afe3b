"""The network that a manifest records: the record that an export writes, its task, and the weights it leads back to."""

import os
from pathlib import Path
from typing import Any

from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.gates import Gate, OutputSpec
from cnx_deploy.core.manifest import Artifact, ModelRecord, SoupFile, relative_reference
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import find_variant
from cnx_deploy.model.checkpoint import LoadedModel, hash_weights, load_checkpoint, load_pretrained, mean_of
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.tasks.base import Task, find_task, network_outputs

__all__ = ["model_record", "recorded_gate", "recorded_model", "recorded_outputs", "recorded_task"]


def model_record(loaded: LoadedModel, preprocessing: Preprocessing, manifest_dir: Path) -> ModelRecord:
    """What a manifest in `manifest_dir` says of a loaded model."""
    weights = loaded.weights.with_paths(lambda path: relative_reference(Path(path), manifest_dir))
    return ModelRecord(
        variant=loaded.model.variant.name,
        num_classes=loaded.model.num_classes,
        image_size=preprocessing.image_size,
        weights=weights,
        preprocessing=preprocessing,
        class_names=loaded.class_names,
        head_is_new=loaded.head_is_new,
        task=loaded.model.task.name,
        origins=dict(loaded.origins),
        training=dict(loaded.training),
        thresholds=loaded.model.task.thresholds,
        task_config=loaded.model.task.options,
    )


def recorded_task(record: ModelRecord) -> Task:
    """The task of a network, with its configuration and thresholds."""
    return find_task(record.task).configured(record.task_config).with_thresholds(record.thresholds)


def recorded_outputs(artifact: Artifact) -> tuple[OutputSpec, ...]:
    """What the network of an artifact gives, as its task declares it."""
    record = artifact.manifest.model
    if record.graph is not None:
        return _foreign_outputs(record, artifact.manifest.deploy.outputs)
    task, variant = recorded_task(record), find_variant(record.variant)
    return network_outputs(task, variant, record.num_classes, artifact.manifest.deploy)


def _foreign_outputs(record: ModelRecord, words: tuple[str, ...]) -> tuple[OutputSpec, ...]:
    """The outputs of a graph from elsewhere: what the task declares under their names, values without meaning else."""
    assert record.graph is not None
    declared = {spec.name: spec for spec in find_task(record.task).outputs(record.num_classes, words)}
    shapes = {name: tuple(int(size) for size in tensor.shape[1:]) for name, tensor in record.graph.outputs.items()}
    return tuple(declared.get(name) or OutputSpec(name, shape, "value") for name, shape in shapes.items())


def recorded_gate(artifact: Artifact) -> Gate:
    """What the outputs of an artifact are judged by: its task's gate for its precision."""
    return recorded_task(artifact.manifest.model).gate(artifact.manifest.gate)


def recorded_model(artifact: Artifact) -> LoadedModel:
    """Load the weights that an artifact was made from and check that they are the same.

    Raises InputError when a checkpoint is not where the manifest says, CorruptArtifactError when it was changed.
    """
    record = artifact.manifest.model
    weights = record.weights
    if weights.origin == "onnx":
        raise InputError(
            f"{artifact.path.name} was made from the ONNX file {weights.reference}, so that no PyTorch network is "
            "behind it. verify, bench and predict take it; export from a checkpoint for the rest."
        )
    # A head that was new at the export is drawn again, from a fixed seed.
    how: dict[str, Any] = {"num_classes": record.num_classes, "reset_head": True} if record.head_is_new else {}
    how |= {"task": record.task, "in_chans": record.preprocessing.in_chans, "task_options": record.task_config}
    if weights.origin == "random":
        seed, variant = int(weights.reference), find_variant(record.variant)
        task = recorded_task(record)
        model = random_model(variant, record.num_classes, seed=seed, task=task, in_chans=how["in_chans"])
        loaded = LoadedModel(model, weights, record.class_names, record.preprocessing, record.origins)
    elif weights.origin == "checkpoint":
        loaded = mean_of(_recorded_file(artifact, file, **how) for file in weights.files)
    else:
        loaded = load_pretrained(weights.reference, **how)
    _check_hash(artifact, f"{weights.origin} {weights.reference}", hash_weights(loaded.model), weights.sha256)
    loaded.model.task = recorded_task(record)  # its thresholds may be an option's
    return loaded


def _recorded_file(artifact: Artifact, file: SoupFile, **how: Any) -> LoadedModel:
    """Load one checkpoint and check that its weights are the recorded ones."""
    path = artifact.path.parent / file.reference
    if not os.path.isfile(path):  # noqa: PTH113 - Path's own raises for a name that no system takes
        raise InputError(f"{artifact.path.name} was made from {path}, which is not there. Put it back or export again.")
    loaded = load_checkpoint(path, artifact.manifest.model.variant, entry=file.entry, **how)
    _check_hash(artifact, f"checkpoint {file.reference}", loaded.weights.sha256, file.sha256)
    return loaded


def _check_hash(artifact: Artifact, source: str, found: str, recorded: str) -> None:
    if found != recorded:
        raise CorruptArtifactError(
            f"The weights behind {artifact.path.name} ({source}) have changed: hash {found[:12]}…, the manifest says "
            f"{recorded[:12]}…. Export again with --force."
        )
