"""A runner over the labelled images of a folder or a CSV file, batch by batch."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cnx_deploy.core.errors import CheckFailedError, InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import BrokenImage, find_images, readable_batches, runner_input, validation_folder
from cnx_deploy.data.dataset import evenly
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.runners.base import Runner
from cnx_deploy.verification.evaluation.outcomes import Outcome
from cnx_deploy.verification.evaluation.results import Evaluation
from cnx_deploy.verification.evaluation.tally import Tally

__all__ = ["evaluate"]


def evaluate(
    runner: Runner,
    root: Path,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 32,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    each: Callable[[Outcome], None] | None = None,
) -> Evaluation:
    """Run every validation image of `root` (see `data.validation_folder`; or a CSV file's) and count.

    `class_names`: the model's classes in the order of its logits; the data's are found among them by name. None takes
    the data's sorted classes, which then must be as many as the logits. `progress` is told images done and their total,
    `each` every image's outcome, in order. A batch below the runner's smallest is filled up with copies, which are not
    counted; batches are cut to its largest. Images that cannot be read are left out and listed. Raises InputError when
    classes or image size do not fit or no image can be read, CheckFailedError for logits that are not finite.
    """
    found, images = find_images(validation_folder(root))
    if not found:
        raise InputError(
            f"{root} holds images without labels: expected a folder of images for each class. Sort them into some."
        )
    if preprocessing.image_size != runner.input_spec.image_size:
        raise InputError(
            f"The model takes images of {runner.input_spec.image_size} pixels and the preprocessing makes "
            f"{preprocessing.image_size}. Use the same image size."
        )
    targets = torch.tensor(_class_indices(found, class_names, root))
    size = min(batch_size, runner.input_spec.max_batch or batch_size)
    chosen, broken = evenly(images, limit), list[BrokenImage]()
    tally = Tally(tuple(class_names or found), each)
    for pixels, labels, paths in readable_batches(chosen, preprocessing, size, broken):
        logits = _logits(runner, pixels)
        _check_logits(logits, len(class_names or found), root)
        tally.add(logits, targets[labels], paths)
        if progress is not None:
            progress(tally.count + len(broken), len(chosen.paths))
    if not tally.count:
        raise InputError(f"No image of {root} ({len(broken)}) can be read: {broken[0].reason}")
    return tally.result(found, broken)


def _logits(runner: Runner, pixels: Tensor) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, classes) float32 on the CPU."""
    images = runner_input(_filled_up(pixels, runner.input_spec), runner.input_spec.kind).to(runner.device)
    return runner.run(images)[: len(pixels)].cpu().clone()


def _filled_up(pixels: Tensor, spec: InputSpec) -> Tensor:
    missing = spec.min_batch - len(pixels)
    return pixels if missing <= 0 else torch.cat([pixels, pixels[:1].expand(missing, -1, -1, -1)])


def _class_indices(found: Sequence[str], class_names: Sequence[str] | None, root: Path) -> list[int]:
    """Index in the logits of each of the data's classes."""
    if class_names is None:
        return list(range(len(found)))
    positions = {name: index for index, name in enumerate(class_names)}
    unknown = [name for name in found if name not in positions]
    if unknown:
        raise InputError(
            f"{root} has the classes {', '.join(unknown)}, which the model does not know. Its classes: "
            f"{', '.join(list(class_names)[:20])}{' …' if len(class_names) > 20 else ''}. Rename the folders."
        )
    return [positions[name] for name in found]


def _check_logits(logits: Tensor, expected: int, root: Path) -> None:
    if logits.shape[1] != expected:
        raise InputError(
            f"The model has {logits.shape[1]} classes, {expected} were expected for {root}. Evaluate on the classes "
            "it was trained for, or give their names."
        )
    if not bool(torch.isfinite(logits).all()):
        raise CheckFailedError(f"The model gave logits that are not finite on {root}. Check it with cnx-deploy verify.")
