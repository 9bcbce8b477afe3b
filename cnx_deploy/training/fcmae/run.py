"""Pre-train an encoder on images without labels: which images, and the run.

A run is a folder as training's is, see `training.run`. `best.safetensors` and `last.safetensors` are the encoder,
without a head; `reconstructions/` has pictures of held images.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import cast

from cnx_deploy.core.errors import CheckpointError, InputError
from cnx_deploy.data import Dataset, ImageCheck, ImageFiles, check_images, evenly
from cnx_deploy.data.dataset import VALIDATION_NAMES, LeftOut, images_below, notes_of, training_folder
from cnx_deploy.data.pixels import FORMATS
from cnx_deploy.training.fcmae.autoencoder import MaskedAutoencoder, create_autoencoder
from cnx_deploy.training.fcmae.spec import PretrainingRecord, PretrainingResult, PretrainingSpec
from cnx_deploy.training.records import Progress
from cnx_deploy.training.run import OWN_LICENCE, check_machine
from cnx_deploy.training.run_folder import check_new, open_run

__all__ = ["divide_images", "find_images_below", "pretrain", "readable_images"]

HELD_SHARE = 10
"""At most one image in so many is kept out of training."""


def pretrain(
    spec: PretrainingSpec,
    initial: MaskedAutoencoder | None = None,
    progress: Progress | None = None,
    *,
    images: Dataset | None = None,
    licence: str = OWN_LICENCE,
) -> PretrainingResult:
    """Pre-train an autoencoder and return the run; on Ctrl-C the run so far.

    Args:
        spec: What to pre-train.
        initial: Autoencoder to start from, left as it is; None draws one from the seed.
        progress: Who is told how the run goes.
        images: What `divide_images` gives, in place of the readable ones of all that `find_images_below` finds in
            `spec.data`.
        licence: Goes into the written weights: that of the weights started from.

    Raises:
        InputError: Data, folder or resume do not fit.
        CheckpointError: `initial` is of another variant.
        MissingRequirementError: The `train` extra is missing, or the GPU that FP16 takes.
        TrainingError: The loss stopped being a number.
    """
    check_machine(spec)
    check_new(spec)
    from cnx_deploy.training.fcmae.module import PretrainingModule
    from cnx_deploy.training.loop import run_task

    if images is None:
        readable, _ = readable_images(find_images_below(spec.data), white_level=spec.white_level)
        images = divide_images(readable, spec.held_images)
    if initial is not None and initial.encoder.variant != spec.network:
        raise CheckpointError(
            f"The encoder to start from is {initial.encoder.variant.name} for {initial.encoder.in_chans} channels; "
            f"{spec.network.name} for {spec.in_chans} was asked for. Start from weights of that variant, with "
            "--in-chans (in_chans) as they are."
        )
    model = (
        create_autoencoder(spec.network, seed=spec.seed, in_chans=spec.in_chans)
        if initial is None
        else copy.deepcopy(initial)
    )
    counts = {"train_images": len(images.train.paths), "held_images_taken": len(images.val.paths)}
    run_dir = open_run(spec, f"{spec.network.name}-fcmae", **counts)
    metadata = {
        "preprocessing": spec.preprocessing, "licence": licence, "extra": {"pretraining": "fcmae"},
    }  # fmt: skip
    module = PretrainingModule(model.train(), spec, images, metadata)
    records, interrupted = run_task(module, run_dir, images, progress)
    known = cast(list[PretrainingRecord], records)
    return PretrainingResult.of(
        run_dir,
        len(known),
        interrupted=interrupted,
        first_loss=known[0].loss if known else None,
        last_loss=known[-1].loss if known else None,
        best_held_loss=min((record.held_loss for record in known), default=None),
    )


def find_images_below(root: Path) -> ImageFiles:
    """Find every image below a folder however deep, in class folders or not.

    Beside a folder `train`, folders of validation or test images (see `data.find_images`) are left out: what a
    classifier is judged by later must not be learned from now.

    Raises:
        InputError: There is no folder, or no image in it.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: expected one that holds images, at any depth. Check the path.")
    to_skip, left_out = VALIDATION_NAMES if training_folder(root) is not None else (), LeftOut(str(root))
    paths = tuple(
        path
        for path in images_below(root, left_out)
        if len(below := path.relative_to(root).parts) == 1 or below[0].lower() not in to_skip
    )
    notes = notes_of([left_out], root)
    if not paths:
        raise InputError(f"{root} holds no images at any depth: expected {', '.join(FORMATS)} files. Add some.")
    return ImageFiles(paths, notes=notes)


def readable_images(
    images: ImageFiles,
    *,
    white_level: float | None = None,
    in_chans: int = 3,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ImageFiles, ImageCheck]:
    """Decode all and keep the images that can be read; the report is of all. InputError when none can."""
    report = check_images(images, white_level=white_level, in_chans=in_chans, workers=workers, progress=progress)
    bad = {image.path for image in report.broken}
    kept = [at for at, path in enumerate(images.paths) if str(path) not in bad]
    if not kept:
        raise InputError(f"None of {report.count} images can be read; the first: {report.broken[0].reason}")
    return images.subset(kept), report


def divide_images(images: ImageFiles, held_images: int) -> Dataset:
    """Hold out `held_images` as validation images, at most a tenth and at least one, evenly over the list.

    Raises InputError for a single image.
    """
    total = len(images.paths)
    if total < 2:
        raise InputError("Pre-training takes at least two images, one of them to be held out; there is one. Add some.")
    held = evenly(total, max(1, min(held_images, total // HELD_SHARE)))
    out = set(held)
    kept = [at for at in range(total) if at not in out]
    return Dataset((), images.subset(kept), images.subset(held))
