"""A labelled image folder as the ground on which an artifact is compared with PyTorch: every image, in bounded memory.

Images are decoded again for each runner; PyTorch's logits are computed once a network and kept in a temporary file.
"""

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import ParityResult
from cnx_deploy.core.manifest import Artifact, ModelRecord
from cnx_deploy.data import find_images, load_image, runner_input, validation_folder
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.data.preprocessing import to_pixels
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.agreement import BrokenImage, Tally
from cnx_deploy.verification.batch_plan import cut_in_batches
from cnx_deploy.verification.saved_results import Labelling, OutputWriter
from cnx_deploy.verification.verify import TORCH_REFERENCE, Candidate, Progress, Reference

__all__ = ["LabelledImages", "LabelledReference", "find_labelled", "reference_for"]

PIECE = 8
"""Images that PyTorch runs at once: it needs no large batch, and memory is the candidate's."""


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Files and the index of each one's class in the logits; `class_names` has a name for every logit."""

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]


class _LogitsFile:
    """Rows of float32 logits in a temporary file that vanishes with this object."""

    def __init__(self) -> None:
        self._stream = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the object
        weakref.finalize(self, self._stream.close)
        self._width = 0

    def append(self, logits: Tensor) -> None:
        rows = np.ascontiguousarray(logits.detach().float().cpu().numpy())
        self._width = rows.shape[1]
        self._stream.write(rows.tobytes())

    def rows(self, indices: Sequence[int]) -> Tensor:
        size = 4 * self._width
        found = []
        for index in indices:
            self._stream.seek(index * size)
            found.append(np.frombuffer(self._stream.read(size), dtype=np.float32))
        return torch.from_numpy(np.stack(found))


class LabelledReference(Reference):
    """The recorded network's model, its logits on labelled images and what those images are called.

    `samples` None means all of them; else so many at most, taken evenly, so that every class is met.
    """

    def __init__(self, artifact: Artifact, images: LabelledImages, samples: int | None = None) -> None:
        super().__init__(artifact, images.root, samples)
        self.labelled = images
        self.broken: tuple[BrokenImage, ...] = ()
        self._chosen = _spread(range(len(images.paths)), samples)
        self._checked = False
        self._files: dict[tuple[object, ...], _LogitsFile] = {}

    def judge(
        self, candidate: Candidate, progress: Progress | None = None, writer: OutputWriter | None = None
    ) -> ParityResult:
        """Run the candidate on the labelled images and count; gives a LabelledResult.

        A last batch below the candidate's smallest is filled up with copies, which are not counted. Raises InputError
        when no image can be read, or one can no longer.
        """
        expected = self._reference_logits(candidate.artifact, progress)
        rows = _spread(range(len(self._chosen)), candidate.limit)
        tally, sizes, done = Tally(self.labelled.class_names), [], 0
        for batch in cut_in_batches(rows, candidate.spec.min_batch, candidate.spec.max_batch or 64):
            chosen = [self._chosen[row] for row in batch]
            pixels = torch.stack([self._pixels(index) for index in chosen])
            logits, reference = _run(candidate.runner, pixels, candidate.spec), expected.rows(batch)
            paths = [str(self.labelled.paths[index]) for index in chosen]
            labels = [self.labelled.labels[index] for index in chosen]
            tally.add(logits, reference, labels, paths)
            if writer is not None:
                writer.add(logits, reference, paths, labels)
            sizes.append(max(len(batch), candidate.spec.min_batch))
            done += len(batch)
            if progress is not None:
                progress(f"{candidate.name}: {done} of {len(rows)} images", len(batch))
        available = len(self.labelled.paths)
        names = (candidate.name, TORCH_REFERENCE)
        result = tally.result(names, candidate.gate, sizes, available=available, broken=self.broken)
        if writer is not None:
            writer.close(result, Labelling(self.labelled.class_names, available, self.broken))
        return result

    def _reference_logits(self, artifact: Artifact, progress: Progress | None) -> _LogitsFile:
        """Logits of the chosen images, in their order; the first time, files that cannot be read leave the choice."""
        spec = artifact.manifest.deploy
        key = (spec.input_kind, spec.mean, spec.std)
        if key in self._files:
            return self._files[key]
        found, done = _LogitsFile(), 0
        with reference_runner(self.loaded.model, spec) as runner:
            for pixels in self._readable():
                found.append(runner.run(runner_input(pixels, spec.input_kind)))
                done += len(pixels)
                if progress is not None:
                    progress(f"PyTorch reference: {done} of {len(self._chosen)} images", len(pixels))
        self._files[key] = found
        return found

    def _readable(self) -> Iterator[Tensor]:
        """Pixels of the chosen images in pieces; on the first pass, unreadable ones are noted and left out."""
        if self._checked:
            for start in range(0, len(self._chosen), PIECE):
                yield torch.stack([self._pixels(index) for index in self._chosen[start : start + PIECE]])
            return
        readable, broken, piece = [], [], []
        for index in self._chosen:
            try:
                piece.append(self._pixels(index))
                readable.append(index)
            except InputError as error:
                broken.append(BrokenImage(str(self.labelled.paths[index]), str(error)))
            if len(piece) == PIECE:
                yield torch.stack(piece)
                piece = []
        if piece:
            yield torch.stack(piece)
        if not readable:
            raise InputError(f"No image of {self.labelled.root} ({len(broken)}) can be read: {broken[0].reason}")
        self._chosen, self.broken, self._checked = readable, tuple(broken), True

    def _pixels(self, index: int) -> Tensor:
        path = self.labelled.paths[index]
        return to_pixels(load_image(path), self.record.preprocessing)


def reference_for(artifact: Artifact, data: Path | None, samples: int | None) -> Reference:
    """What `artifact` is compared on: labelled images where `data` has class folders, else `Reference`'s."""
    labelled = find_labelled(data, artifact.manifest.model) if data is not None else None
    return Reference(artifact, data, samples) if labelled is None else LabelledReference(artifact, labelled, samples)


def find_labelled(root: Path, record: ModelRecord) -> LabelledImages | None:
    """The images of `root` (`val/`, else `test/`, else itself) and their classes; None without class folders.

    Folders are found among the record's class names by name; a record without names takes the sorted folders as its
    classes. Raises InputError when the folders do not fit.
    """
    folders, images = find_images(validation_folder(root))
    if not folders:
        return None
    names = record.class_names
    advice = "To compare without labels, put the images into one folder."
    if names is None and len(folders) != record.num_classes:
        raise InputError(
            f"{root} has {len(folders)} class folders ({_some(folders)}): expected {record.num_classes}, one for each "
            f"class of the model, which has no class names. {advice}"
        )
    unknown = [name for name in folders if names is not None and name not in names]
    if names is not None and unknown:
        raise InputError(
            f"{root} has the class folders {_some(unknown)}, which the model does not know: expected its classes, "
            f"{_some(names)}. Rename the folders. {advice}"
        )
    names = names or folders
    positions = [names.index(name) for name in folders]
    return LabelledImages(root, images.paths, tuple(positions[label] for label in images.labels), names)


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:20])}{' …' if len(names) > 20 else ''}"


def _spread(items: Sequence[int], limit: int | None) -> list[int]:
    """At most `limit` of the items, evenly taken."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[at * len(items) // count] for at in range(count)]


def _run(runner: Runner, pixels: Tensor, spec: InputSpec) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, num_classes) float32 on the CPU."""
    missing = spec.min_batch - len(pixels)
    filled = pixels if missing <= 0 else torch.cat([pixels, pixels[:1].expand(missing, -1, -1, -1)])
    return runner.run(runner_input(filled, spec.kind).to(runner.device))[: len(pixels)].float().cpu().clone()
