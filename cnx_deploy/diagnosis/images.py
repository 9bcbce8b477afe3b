"""The images that an exported file is judged on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cnx_deploy.core.manifest import OnnxManifest
from cnx_deploy.data import ImageLike, ImageSource, evenly, images_to_run
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.model.tasks.base import find_task

__all__ = ["raw_batches"]

BATCH = 8
"""Images run at once, where the file takes as many: this decides memory alone."""


def raw_batches(
    manifest: OnnxManifest,
    samples: int,
    data: Path | None,
    *,
    whole: bool = False,
    white_level: float | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Tensor]:
    """Read `samples` images of a folder, or make them from a seed, in batches that a file takes.

    A batch with fewer images than the file's smallest is filled up with copies of its first one; with `whole` every
    batch is as large as the first. `white_level` takes the place of the recorded one, see `core.preprocessing`. `note`
    is told what is left out and what the images have shown.
    """
    smallest, _, largest = manifest.batch
    size = max(smallest, min(samples, largest, BATCH))
    side = manifest.deploy.image_size
    spec = InputSpec.of(manifest.deploy, size if whole else smallest, largest)
    targets = find_task(manifest.model.task).targets
    source: ImageSource = ImageLike(samples) if data is None else images_to_run(data, targets=targets)
    recorded = manifest.model.preprocessing
    level = recorded.white_level if white_level is None else white_level
    preprocessing = replace(recorded, image_size=side, white_level=level)
    batches = [batch.images for batch in source.batches(preprocessing, spec, size, evenly(len(source), samples))]
    if note is not None:
        for text in (*source.notes, *source.observed()):
            note(text)
    return batches
