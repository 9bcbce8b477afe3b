"""Files in eight bits written with some parts in FP16, and what images and compiled engines say of them."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.eight_bits import PARTS, BlockScales, EightBits, EngineCheck
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.gates import Gate
from cnx_deploy.core.manifest import Artifact, OnnxManifest
from cnx_deploy.data import InputSpec, evenly, images_to_run
from cnx_deploy.diagnosis.calibration import calibrate
from cnx_deploy.diagnosis.mixed_precision import Case, Probe, is_kept
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.tasks.base import Outputs, joined
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions, find_runner, open_runner
from cnx_deploy.verification.eight_bits import (
    FEWEST_HELD_OUT,
    GATE_TARGETS,
    MOST_LOST,
    PIECE,
    SLOW_IMAGES,
    Calibration,
    compare_engines,
)
from cnx_deploy.verification.evaluation import class_positions

__all__ = ["Trial", "Trials", "fewer_scales"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A file written with the parts `kept` in FP16.

    `changed`: tensors ("stages.2.3.h") whose scale or gains its calibration gives otherwise than that of the search.
    `engines_not_run`: why no engine was compiled.
    """

    precision: str
    kept: tuple[str, ...]
    probe: Probe
    changed: tuple[str, ...] = ()
    engines: tuple[EngineCheck, ...] = ()
    engines_not_run: str | None = None

    @property
    def is_worth_it(self) -> bool:
        """Whether it passes and no engine that was compiled breaks a gate."""
        return self.probe.passed and not any(check.faults for check in self.engines)

    def to_dict(self) -> dict[str, Any]:
        """Return the trial for JSON."""
        return {**asdict(self), "probe": self.probe.to_dict(), "is_worth_it": self.is_worth_it}


class Trials:
    """What files of one network are written from and judged by.

    `case` has all images that judge; its spec has the scales that sets are tried with. `can_calibrate`: there are
    enough other images. `asked`: parts that the file was told to keep in FP16, known after `calibrate_as_asked`.
    """

    def __init__(
        self,
        artifact: Artifact[OnnxManifest],
        loaded: LoadedModel,
        gate: Gate,
        data: Path,
        note: Callable[[str], None],
        *,
        samples: int,
        white_level: float | None,
        has_engines: bool,
    ) -> None:
        manifest = artifact.manifest
        record, recorded = manifest.deploy.eight_bits, manifest.model.preprocessing
        assert record is not None
        if samples < 1:
            raise InputError(f"samples must be at least 1, got {samples}: a file is judged on images.")
        self.record, self._note, self._has_engines = record, note, has_engines
        facts = manifest.facts.eight_bits
        self._targets = (facts.targets if facts else ()) or GATE_TARGETS
        level = recorded.white_level if white_level is None else white_level
        preprocessing = replace(recorded, image_size=manifest.deploy.image_size, white_level=level)
        source = images_to_run(data, targets=loaded.model.task.targets)
        self.can_calibrate = len(source) >= record.images + FEWEST_HELD_OUT
        if self.can_calibrate:
            self._images = Calibration.split(source, record.images, preprocessing)
        else:
            self._images = Calibration(source, (), tuple(range(len(source))), preprocessing)
        judging = [self._images.held_out[at] for at in evenly(len(self._images.held_out), samples)]
        inputs = InputSpec.of(manifest.deploy, 1, None)
        given = list(self._images.batches(inputs, judging))
        for text in (*source.notes, *source.observed()):
            note(text)
        batches = tuple(batch.images for batch in given)
        with reference_runner(loaded.model, manifest.deploy) as runner:
            expected = joined([runner.run(images) for images in batches])
        spec = ExportSpec(deploy=manifest.deploy, batch=manifest.batch)
        self.case = Case(loaded, manifest.model, spec, batches, expected, gate)
        self._labels: Tensor | None = None
        if source.class_names and source.label_sets is None and manifest.model.task == "classification":
            places = class_positions(source, manifest.model.class_names, manifest.model.num_classes)
            self._labels = torch.tensor([places[label] for batch in given for label in batch.labels.tolist()])

    def calibrate_as_asked(self) -> None:
        """Measure the scales of the file again, which differ where its images were others, and take those."""
        deploy = self.case.spec.deploy
        if not self.can_calibrate:
            self.asked = self.record.kept
            return
        # What a calibration keeps of itself is not named in a command.
        itself = calibrate(
            self.case.loaded.model, deploy, lambda: [self.case.batches[0][:1]], targets=self._targets
        ).kept
        self.asked = tuple(part for part in self.record.kept if part not in itself)
        record = self._calibrated(deploy, self.asked)
        if record.data_sha256 != self.record.data_sha256:
            self._note(
                f"The file was calibrated on other images; its scales are measured anew, on {record.images} of these"
            )
        self.case = replace(self.case, spec=replace(self.case.spec, deploy=replace(deploy, eight_bits=record)))

    def some(self, indices: Iterable[int]) -> Case:
        """The case with some of its images."""
        at = list(indices)
        images = torch.cat(self.case.batches)[at]
        expected = {name: output[at] for name, output in self.case.expected.items()}
        return replace(self.case, batches=torch.split(images, PIECE), expected=expected)

    def judge_file(self, artifact: Artifact[OnnxManifest]) -> tuple[Probe, list[int]]:
        """Judge a file as `export` does, and order the images by their error, the worst first.

        Runners that take seconds an image run the first few images.
        """
        case, order = self.case, list[int]()
        assert artifact.manifest.deploy.eight_bits is not None
        kept = artifact.manifest.deploy.eight_bits.kept
        for name in artifact.manifest.precision.proven_by:
            if order and find_runner(name).is_slow:
                case = self.some(range(min(SLOW_IMAGES, len(order))))
            with open_runner(artifact, name, RunnerOptions(hashes_hold=True)) as runner:
                outputs = joined([_run(runner, images, artifact.manifest.batch) for images in case.batches])
            probe = case.judge(kept, outputs, exported=True)
            if not order:
                probe = replace(probe, failures=(*probe.failures, *self._lost_labels(outputs)))
                order = _worst_first(outputs, case.expected)
            if not probe.passed:
                break
        return probe, order

    def write(self, precision: str, kept: tuple[str, ...]) -> tuple[Trial, list[int]]:
        """Calibrate, export into a temporary folder, judge, and compare engines where the file passes.

        Returns the images in the order of their error as well, see `judge_file`.
        """
        model, spec = self.case.loaded.model, self.case.spec
        deploy = replace(spec.deploy, precision=precision, eight_bits=None)
        mine = spec.deploy.eight_bits if precision == spec.deploy.precision else None
        expected = None if mine is None else fewer_scales(mine, kept)
        record = self._calibrated(deploy, kept) if self.can_calibrate else expected
        assert record is not None
        with tempfile.TemporaryDirectory() as folder:
            written = replace(spec, deploy=replace(deploy, eight_bits=record))
            artifact = export_onnx(model, self.case.record, written, Path(folder))
            probe, order = self.judge_file(artifact)
            trial = Trial(precision, kept, probe, () if expected is None else _changed(expected, record))
            if not probe.passed or not self._has_engines:
                return replace(trial, engines_not_run="left out"), order
            try:
                return replace(trial, engines=compare_engines(artifact, model, self._note, self._targets)), order
            except MissingRequirementError as error:
                return replace(trial, engines_not_run=str(error)), order

    def _calibrated(self, deploy: DeploySpec, kept: tuple[str, ...]) -> EightBits:
        inputs, images = InputSpec.of(deploy, 1, None), self._images
        return calibrate(
            self.case.loaded.model,
            replace(deploy, eight_bits=None),
            lambda: (batch.images for batch in images.batches(inputs, images.chosen)),
            method=self.record.method,
            kept=kept,
            targets=self._targets,
        )

    def _lost_labels(self, outputs: Outputs) -> tuple[str, ...]:
        """The gate of top-1 on images with labels, in words where it is broken."""
        output = self.case.loaded.model.task.class_output_of(outputs)
        if self._labels is None or output is None:
            return ()
        sides = outputs[output], self.case.expected[output]
        top1, reference = (100.0 * float((side.argmax(dim=1) == self._labels).double().mean()) for side in sides)
        if top1 >= reference - MOST_LOST:
            return ()
        return (f"top-1 {top1:.2f} %, PyTorch {reference:.2f} %, gate {MOST_LOST} points less",)


def fewer_scales(record: EightBits, kept: Sequence[str]) -> EightBits:
    """The record with further parts in FP16, and scales and gains of all others as they are."""
    blocks = {
        name: BlockScales(
            scales={
                letter: scale for letter, scale in block.scales.items() if not is_kept(f"{name}.{PARTS[letter]}", kept)
            },
            gains=block.gains,
        )
        for name, block in record.blocks.items()
    }
    left = {name: block for name, block in blocks.items() if block.scales}
    return replace(record, blocks=left, kept=tuple(sorted({*record.kept, *kept})))


def _changed(expected: EightBits, found: EightBits) -> tuple[str, ...]:
    """Tensors that are stored with another scale or other gains."""
    return tuple(
        f"{name}.{letter}"
        for name, block in found.blocks.items()
        for letter in block.scales
        if (block.scales[letter], block.gains.get(letter))
        != (expected.blocks[name].scales[letter], expected.blocks[name].gains.get(letter))
    )


def _run(runner: Runner, images: Tensor, batch: tuple[int, int, int]) -> Outputs:
    """Run images in batches that a file takes, filled up with copies of the first, and return float32 outputs."""
    smallest, _, largest = batch
    pieces = []
    for piece in torch.split(images, max(smallest, min(largest, PIECE))):
        missing = max(0, smallest - len(piece))
        full = torch.cat([piece, piece[:1].expand(missing, *piece.shape[1:])]) if missing else piece
        pieces.append({name: output[: len(piece)].float() for name, output in runner.run(full).items()})
    return joined(pieces)


def _worst_first(outputs: Outputs, expected: Outputs) -> list[int]:
    """Indices of the images by relative L2 over all outputs; those with values that are no numbers are first."""
    errors = sum(
        (
            (output.double() - expected[name].double()).flatten(1).norm(dim=1)
            / expected[name].double().flatten(1).norm(dim=1).clamp_min(1e-30)
            for name, output in outputs.items()
        ),
        torch.zeros(()),
    )
    order: list[int] = torch.argsort(errors.nan_to_num(torch.inf), descending=True).tolist()
    return order
