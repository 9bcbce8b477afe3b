"""How often a runner is right on a labelled image folder: the same images and counting for every backend."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.data import Preprocessing, batches_from_folder, find_images, runner_input, validation_folder
from cnx_deploy.errors import CheckFailedError, InputError
from cnx_deploy.runners.base import InputSpec, Runner

__all__ = ["ClassResult", "Evaluation", "evaluate"]


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class: how many of its images were given that class."""

    name: str
    count: int
    correct: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Right answers among `count` images. `correct_top5` counts the label among the five (or all) best classes."""

    count: int
    correct_top1: int
    correct_top5: int
    per_class: tuple[ClassResult, ...]

    @property
    def top1_percent(self) -> float:
        """Share of images whose best class is the label."""
        return 100.0 * self.correct_top1 / self.count

    @property
    def top5_percent(self) -> float:
        """Share of images whose label is among the five best classes."""
        return 100.0 * self.correct_top5 / self.count

    def to_dict(self) -> dict[str, Any]:
        """Plain types, percentages included."""
        return {**asdict(self), "top1_percent": self.top1_percent, "top5_percent": self.top5_percent}


def evaluate(
    runner: Runner,
    root: Path,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 32,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run every validation image of `root` (`val/`, else `test/`, else all class folders) and count.

    `class_names`: the model's classes in the order of its logits; the folders are found among them by name. None takes
    the sorted folders as the classes, which then must be as many as the logits. `progress` is told images done and
    their total. A batch below the runner's smallest is filled up with copies, which are not counted; batches are cut
    to its largest. Raises InputError when folders, classes or image size do not fit, CheckFailedError for logits that
    are not finite.
    """
    folders, images = find_images(validation_folder(root))
    if not folders:
        raise InputError(f"{root} holds images without labels: expected a folder of images for each class.")
    if preprocessing.image_size != runner.input_spec.image_size:
        raise InputError(
            f"The model takes images of {runner.input_spec.image_size} pixels and the preprocessing makes "
            f"{preprocessing.image_size}. Use the same image size."
        )
    targets = torch.tensor(_class_indices(folders, class_names, root))
    size = min(batch_size, runner.input_spec.max_batch or batch_size)
    ranks, labels = [], []
    total = len(images.paths) if limit is None else min(limit, len(images.paths))
    for pixels, folder_indices, _ in batches_from_folder(root, preprocessing, size, limit):
        logits = _logits(runner, pixels)
        _check_logits(logits, targets, class_names, root)
        ranks.append(_label_ranks(logits, targets[folder_indices]))
        labels.append(folder_indices)
        if progress is not None:
            progress(sum(map(len, labels)), total)
    return _counted(folders, torch.cat(ranks), torch.cat(labels))


def _logits(runner: Runner, pixels: Tensor) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, classes) float32 on the CPU."""
    images = runner_input(_filled_up(pixels, runner.input_spec), runner.input_spec.kind).to(runner.device)
    return runner.run(images)[: len(pixels)].cpu().clone()


def _filled_up(pixels: Tensor, spec: InputSpec) -> Tensor:
    missing = spec.min_batch - len(pixels)
    return pixels if missing <= 0 else torch.cat([pixels, pixels[:1].expand(missing, -1, -1, -1)])


def _class_indices(folders: Sequence[str], class_names: Sequence[str] | None, root: Path) -> list[int]:
    """Index in the logits of each folder."""
    if class_names is None:
        return list(range(len(folders)))
    positions = {name: index for index, name in enumerate(class_names)}
    unknown = [name for name in folders if name not in positions]
    if unknown:
        raise InputError(
            f"{root} has the classes {', '.join(unknown)}, which the model does not know. Its classes: "
            f"{', '.join(list(class_names)[:20])}{' …' if len(class_names) > 20 else ''}. Rename the folders."
        )
    return [positions[name] for name in folders]


def _check_logits(logits: Tensor, targets: Tensor, class_names: Sequence[str] | None, root: Path) -> None:
    expected = len(targets) if class_names is None else len(class_names)
    if logits.shape[1] != expected:
        raise InputError(
            f"The model has {logits.shape[1]} classes, {expected} were expected for {root}. Evaluate on the classes "
            "it was trained for, or give their names."
        )
    if not bool(torch.isfinite(logits).all()):
        raise CheckFailedError(f"The model gave logits that are not finite on {root}. Check it with cnx-deploy verify.")


def _label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) number of classes before the label: 0 when it is the best. Equal logits count in the order of classes."""
    own = logits.gather(1, labels[:, None])  # (N, 1)
    earlier = torch.arange(logits.shape[1])[None, :] < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(dim=1)


def _counted(folders: Sequence[str], ranks: Tensor, labels: Tensor) -> Evaluation:
    right = ranks == 0
    per_class = tuple(
        ClassResult(name, int((labels == index).sum()), int(right[labels == index].sum()))
        for index, name in enumerate(folders)
    )
    return Evaluation(len(ranks), int(right.sum()), int((ranks < 5).sum()), per_class)
