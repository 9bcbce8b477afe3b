"""Several checkpoints on the same images, each prepared as that checkpoint has it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cnx_deploy.data import (
    BrokenImage,
    Preprocessing,
    find_images,
    image_like_batches,
    readable_batches,
    validation_folder,
)
from cnx_deploy.data.dataset import evenly
from cnx_deploy.diversity.measure import TensorDiversity, measure_diversity
from cnx_deploy.errors import InputError
from cnx_deploy.model.checkpoint import load_checkpoint

__all__ = ["DiversityRequest", "NetworkDiversity", "run_diversity"]

BATCH = 4
"""Images run at once: the distance is an image's own, so this decides speed and memory alone."""
ONE_CLASS = 1
"""No feature reads the head, so that any head will do, and files without one (pre-trained) are taken too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiversityRequest:
    """What `cnx-deploy diversity` takes.

    `data` None means `samples` seeded image-like images; else a folder or a CSV file, of whose validation images at
    most `samples` are taken evenly. `image_size` None means each checkpoint's own, else 224.
    """

    checkpoints: tuple[Path, ...]
    data: Path | None = None
    samples: int = 64
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(
                f"Diversity is measured on at least one image, not on {self.samples}. Give --samples 1 or more."
            )


@dataclass(frozen=True, slots=True)
class NetworkDiversity:
    """One checkpoint. `name` tells it from the others; `tensors` in the order of the data."""

    name: str
    variant: str
    image_size: int
    images: int
    tensors: tuple[TensorDiversity, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks in order of depth."""
        return tuple(dict.fromkeys(each.block for each in self.tensors))

    def part(self, part: str) -> dict[str, TensorDiversity]:
        """Block -> its tensor of that part; empty where the network has none."""
        return {each.block: each for each in self.tensors if each.part == part}

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "tensors": [{"module": each.module, **asdict(each)} for each in self.tensors]}


def run_diversity(
    request: DiversityRequest, note: Callable[[str], None], progress: Callable[[str, int], None] | None = None
) -> tuple[NetworkDiversity, ...]:
    """Measure every checkpoint; `progress` is told a checkpoint's name and the images of each batch.

    Images that cannot be read are noted and left out. See `load_checkpoint` for what is raised.
    """
    found: list[NetworkDiversity] = []
    for path, name in zip(request.checkpoints, _names(request.checkpoints), strict=True):
        loaded = load_checkpoint(path, num_classes=ONE_CLASS, reset_head=True)
        if not loaded.preprocessing:
            note(f"{name} says nothing of its images: ImageNet's mean and std are taken.")
        preprocessing = Preprocessing.from_dict(loaded.preprocessing or {})
        if request.image_size is not None:
            preprocessing = replace(preprocessing, image_size=request.image_size)
        counts: list[int] = []

        def told(images: int, name: str = name, counts: list[int] = counts) -> None:
            counts.append(images)
            if progress is not None:
                progress(name, images)

        broken: list[BrokenImage] = []
        tensors = measure_diversity(loaded.model, preprocessing, _batches(request, preprocessing, broken), told)
        if broken and not found:  # the others meet the same files
            note(f"{len(broken)} images cannot be read and are left out: {broken[0].reason}")
        variant = loaded.model.variant.name
        found.append(NetworkDiversity(name, variant, preprocessing.image_size, sum(counts), tensors))
    return tuple(found)


def _batches(request: DiversityRequest, preprocessing: Preprocessing, broken: list[BrokenImage]) -> Iterator[Tensor]:
    if request.data is None:
        return image_like_batches(request.samples, preprocessing.image_size, batch_size=BATCH)
    images = evenly(find_images(validation_folder(request.data))[1], request.samples)
    return (pixels for pixels, _, _ in readable_batches(images, preprocessing, BATCH, broken))


def _names(paths: Sequence[Path]) -> list[str]:
    """The files' names, with as many folders as it takes to tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [Path(*path.parts[-depth:]).with_suffix("").as_posix() for path in paths]
        if len(set(names)) == len(paths):
            return names
    return [path.as_posix() for path in paths]
