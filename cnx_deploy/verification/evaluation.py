"""A runner on labelled images: what the metrics of its task say of it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.class_names import NOT_COUNTED, check_class_count
from cnx_deploy.core.errors import CheckFailedError, InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import ImageBatch, ImageSource, evenly, image_source
from cnx_deploy.model.tasks.base import Task, all_finite, find_task
from cnx_deploy.model.tasks.classification_metrics import class_scores
from cnx_deploy.runners.base import Runner

NUMBERED = "Nothing beside the masks names their classes, so that their values are taken as the model's class indices."

__all__ = ["assumed_order", "class_positions", "evaluate"]


def evaluate(
    runner: Runner,
    data: Path | str | ImageSource,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 32,
    task: Task | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
    each: Callable[[Any], None] | None = None,
    scores: Callable[[Tensor, Tensor], None] | None = None,
    counted: Callable[[Any], None] | None = None,
) -> Any:
    """Run labelled images and count.

    Args:
        runner: the network; batches are cut to its range, and filled up with copies that are not counted.
        data: a source of labelled images, or a path that `data.find_images` reads.
        preprocessing: how pixels are made, of the runner's image size.
        batch_size: images run at once.
        task: what the network is for; None is classification.
        class_names: the model's classes in the order of its logits; the data's are found among them by name. None
            takes the data's sorted classes, which then must be as many as the logits, and notes say so.
        num_classes: how many the model has, where that is known; classes that neither the model nor masks name are
            numbered.
        limit: so many images, evenly spread.
        progress: told images done and their total.
        note: told how the data were understood, what is left out and what is assumed, a sentence each.
        each: told every image's outcome, in order.
        scores: told every batch's class scores (n, classes) and labels (n,), of a task that has such scores.
        counted: told the task's running metrics at the end.

    Returns:
        What the task's metrics give: for classification, `model.tasks.classification_metrics.Evaluation`. Images that
        cannot be read are left out and listed; `notes` are all that `note` was told.

    Raises:
        InputError: classes or image size do not fit, no image can be read, or the task has no metrics.
        CheckFailedError: outputs are not finite.
    """
    task = task or find_task("classification")
    images = image_source(data, targets=task.targets)
    if not images.class_names and task.targets != "masks":
        raise InputError(
            f"{images.description} holds images without labels: expected a folder of images for each class. Sort them "
            "into some."
        )
    if task.takes_label_sets != (images.label_sets is not None):
        several, one = "label_sets, any number of labels an image", "labels, one class an image"
        raise InputError(
            f"{images.description} has {one if task.takes_label_sets else several}; the task {task.name} takes "
            f"{several if task.takes_label_sets else one}. Give the images with those."
        )
    tell = note or (lambda text: None)
    if images.class_names:
        positions = torch.tensor(class_positions(images, class_names))
        names = tuple(class_names or images.class_names)
        notes = [*images.notes, *([assumed_order(images)] if class_names is None else [])]
    else:
        names = tuple(class_names or map(str, range(num_classes or 0)))
        positions, notes = torch.arange(len(names)), [*images.notes, NUMBERED]
    for text in notes:
        tell(text)
    chosen = evenly(len(images), limit)
    batches = images.batches(preprocessing, runner.input_spec, batch_size, chosen, leave_out_broken=True)
    metrics = task.metrics(names, each)
    for batch in batches:
        found = runner.run(batch.images.to(runner.device))
        outputs = {name: tensor[: len(batch)].cpu().clone() for name, tensor in found.items()}
        class_output = task.class_output_of(outputs)
        if class_output is not None and tuple(outputs[class_output].shape[1:]) != (len(names),):
            given = {name: tuple(tensor.shape[1:]) for name, tensor in outputs.items()}
            raise InputError(
                f"The model gives {_sizes(given)}; the {len(names)} classes of {images.description} need "
                f"{class_output} of {len(names)}. Evaluate on the classes it was trained for, or give their names."
            )
        if not bool(all_finite(outputs).all()):
            raise CheckFailedError(
                f"The model gave outputs that are not finite on {images.description}. Check it with cnx-deploy verify."
            )
        if task.targets == "masks":
            targets: Any = _moved_maps(batch, outputs, positions, names)
        elif task.targets == "instances":
            targets = [{**target, "labels": positions[target["labels"]]} for target in batch.labels]
        else:
            targets = positions[batch.labels] if batch.labels.ndim == 1 else _moved(batch.labels, positions, len(names))
        metrics.add(outputs, targets, batch.names)
        if scores is not None and (found_scores := class_scores(outputs)) is not None:
            scores(found_scores, targets)
        if progress is not None:
            progress(metrics.count + len(batches.broken), len(chosen))
    broken = list(batches.broken.values())
    if not metrics.count:
        raise InputError(f"No image of {images.description} ({len(broken)}) can be read: {broken[0].reason}")
    observed = images.observed()
    for text in observed:
        tell(text)
    if counted is not None:
        counted(metrics)
    return metrics.result(images.class_names, broken, (*notes, *observed))


def assumed_order(images: ImageSource) -> str:
    """What to say where a network has no class names: in which order its outputs are taken to be the data's classes."""
    return (
        f"Order of classes assumed: the network has no class names, so its outputs are taken to be the sorted names of "
        f"{images.description}: {_some(images.class_names)}. --class-names FILE (class_names) gives them otherwise."
    )


def class_positions(
    images: ImageSource, class_names: Sequence[str] | None, num_classes: int | None = None
) -> list[int]:
    """Index among the model's classes of each of the data's classes, found by name; -1 for one without images.

    A model without `class_names` takes the data's classes in their order, which must be `num_classes` where that is
    given. Raises InputError where they do not fit.
    """
    if class_names is not None and num_classes is not None:
        check_class_count(class_names, num_classes, "the model")
    if class_names is None:
        if num_classes is not None and len(images.class_names) != num_classes:
            raise InputError(
                f"{images.description} has {len(images.class_names)} class folders ({_some(images.class_names)}): "
                f"expected {num_classes}, one for each class of the model, which has no class names. To compare "
                "without labels, put the images into one folder."
            )
        return list(range(len(images.class_names)))
    positions = {name: index for index, name in enumerate(class_names)}
    present = images.class_counts().keys() or set(range(len(images.class_names)))
    named = [name for at, name in enumerate(images.class_names) if at in present]
    counts = Counter(class_names)
    if twice := [name for name in named if counts[name] > 1]:
        raise InputError(
            f"The model has several classes called {_some(twice)}, so that images of {images.description} may be of "
            "either. Give each a name of its own with --class-names FILE (class_names)."
        )
    unknown = [name for name in named if name not in positions]
    if unknown:
        raise InputError(
            f"{images.description} has the classes {_some(unknown)}, which the model does not know: expected its "
            f"classes, {_some(class_names)}. Rename the folders, give the model's names as the folders have them with "
            "--class-names FILE (class_names), or put the images into one folder to compare without labels."
        )
    return [positions.get(name, -1) for name in images.class_names]


def _moved(labels: Tensor, positions: Tensor, count: int) -> Tensor:
    """Labels (n, the data's classes) of 0 and 1 as (n, the model's); a class without images may have no place."""
    placed = positions >= 0
    return torch.zeros(len(labels), count).index_copy_(1, positions[placed], labels[:, placed])


def _moved_maps(batch: ImageBatch, outputs: Mapping[str, Tensor], positions: Tensor, names: Sequence[str]) -> Tensor:
    """The data's class of each pixel (n, H, W) as the model's; what is not counted stays so."""
    classes = next((outputs[name].shape[1] for name in ("logits", "full_logits") if name in outputs), len(names))
    if not isinstance(batch.labels, Tensor) or batch.labels.ndim != 3 or classes != len(names):
        raise InputError(
            f"The model gives scores of {classes} classes, and there are {len(names)} names and labels of shape "
            f"{tuple(getattr(batch.labels, 'shape', ()))}: expected a class for each pixel, and a name for each class. "
            "Give images with masks, and names with --class-names FILE (class_names)."
        )
    table = torch.full((NOT_COUNTED + 1,), NOT_COUNTED)
    table[: len(positions)] = positions
    return table[batch.labels]


def _sizes(outputs: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} of {'x'.join(map(str, shape))}" for name, shape in outputs.items())


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:20])}{' …' if len(names) > 20 else ''}"
