"""The gates of a file in eight bits: accuracy on images held out from the calibration, bytes and structure of engines.

Eight bits that only the file has are worth nothing: what counts is which tensors the compiled engine stores in them. So
each file is compiled beside the same network in FP16, and the kernel lists are compared.
"""

import hashlib
import itertools
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.eight_bits import EightBitFacts, EngineCheck, HeldOut
from cnx_deploy.core.errors import CheckFailedError, InputError, MissingRequirementError, ParityError
from cnx_deploy.core.gates import GATES, Gate, ParityResult
from cnx_deploy.core.image_size import stage_sides
from cnx_deploy.core.manifest import Artifact, Compiled, Kernel, OnnxManifest
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import find_variant
from cnx_deploy.data import ImageBatch, ImageSource, InputSpec, evenly
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import load_backend
from cnx_deploy.exporters.trt.compiling import LISTS_KERNELS, measure_isolated
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.tasks.base import network_outputs
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.runners.registry import RunnerOptions, find_runner, open_runner
from cnx_deploy.verification.evaluation import class_positions
from cnx_deploy.verification.maps import comparison_by_labels
from cnx_deploy.verification.originals import TORCH_REFERENCE
from cnx_deploy.verification.parity import OutputComparison, comparable, worst_verdict

__all__ = [
    "GATE_TARGETS", "MOST_BYTES", "Calibration", "check_accuracy", "check_engines", "compare_engines", "engine_faults",
    "prove",
]  # fmt: skip

MOST_BYTES = 0.80
"""The largest share of FP16's bytes that eight bits may move: above, the accuracy is given away for too little."""
GATE_TARGETS, BATCHES = ("sm89",), (1, 64)
"""What the gates compile for where nobody says: the first target that has both types."""
FEWEST_HELD_OUT, MOST_HELD_OUT = 50, 500
SLOW_IMAGES = 10
PIECE = 8
MOST_LOST = 0.5
"""Points of top-1 that eight bits may cost."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Images to calibrate on and others to judge by, of one source; see `split`."""

    source: ImageSource
    chosen: tuple[int, ...]
    held_out: tuple[int, ...]
    preprocessing: Preprocessing

    @classmethod
    def split(cls, source: ImageSource, samples: int, preprocessing: Preprocessing) -> "Calibration":
        """Take `samples` evenly spread images for the calibration, and up to 500 of the others to judge by.

        Raises InputError where fewer than 50 are left.
        """
        if not isinstance(samples, int) or samples < 1:
            raise InputError(f"samples must be at least 1 and whole, got {samples}: scales are measured on images.")
        chosen = tuple(source.choice(samples))
        taken = set(chosen)
        others = [index for index in range(len(source)) if index not in taken]
        if len(others) < FEWEST_HELD_OUT:
            raise InputError(
                f"{source.description} has {len(source)} images: a calibration on {len(chosen)} leaves {len(others)} "
                f"to judge by, and at least {FEWEST_HELD_OUT} are needed. Give more images, or fewer --samples."
            )
        held_out = tuple(others[at] for at in evenly(len(others), MOST_HELD_OUT))
        return cls(source, chosen, held_out, preprocessing)

    def check_images(self, spec: InputSpec) -> None:
        """Read the images that judge. InputError where one is broken, or fewer than 50 are different pictures."""
        batches = self.batches(spec, self.held_out)
        different = {hashlib.sha256(image.numpy()).digest() for batch in batches for image in batch.images}
        if len(different) < FEWEST_HELD_OUT:
            raise InputError(
                f"Of {self.source.description} {len(self.held_out)} images are to judge the file, and {len(different)} "
                f"of them are different; at least {FEWEST_HELD_OUT} have to be. Give images as the network sees them."
            )

    def batches(self, spec: InputSpec, indices: Sequence[int]) -> Iterable[ImageBatch]:
        """Batches of up to eight of the images, as a file takes them."""
        return self.source.batches(self.preprocessing, spec, PIECE, indices)


def prove(
    artifact: Artifact[OnnxManifest],
    model: ConvNeXtV2,
    calibration: Calibration,
    note: Callable[[str], None],
    *,
    engines: bool = True,
    targets: Sequence[str] = GATE_TARGETS,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[tuple[ParityResult, ...], EightBitFacts]:
    """Judge a file in eight bits before it is put into place: accuracy, and its engines unless `engines` is False.

    `targets`: the compute capabilities that engines are compiled for.
    `progress` is told a text and the share of the images that was run.
    Raises what `check_accuracy` and `check_engines` raise; without TensorRT-RTX the engines are recorded as not run.
    """
    results, held_out = check_accuracy(artifact, model, calibration, note, progress)
    checks: tuple[EngineCheck, ...] = ()
    reason = None if engines else "left out"
    if engines:
        try:
            checks = check_engines(artifact, model, note, targets)
        except MissingRequirementError as error:
            reason = str(error)
    if reason is not None:
        note(f"  bytes and structure of its engines: not run ({reason})")
    return results, EightBitFacts(held_out=held_out, engines=checks, engines_not_run=reason)


def check_accuracy(
    artifact: Artifact[OnnxManifest],
    model: ConvNeXtV2,
    calibration: Calibration,
    note: Callable[[str], None],
    progress: Callable[[str, float], None] | None = None,
) -> tuple[tuple[ParityResult, ...], HeldOut]:
    """Judge a file in eight bits on the images that were held out.

    First the deploy form without rounding, so that a mistake in the algebra of the gains is not taken for rounding.
    Then the file, by ONNX Runtime on all of them and by the emulator, which rounds FP16 too, on the first few.

    Returns the emulator's verdicts, one an output, and what was held out. Raises ParityError, which says what differs
    and what would pass.
    """
    deploy, name, record = artifact.manifest.deploy, artifact.path.name, artifact.manifest.model
    assert deploy.eight_bits is not None
    specs = network_outputs(model.task, model.variant, model.num_classes, deploy)
    smallest, _, largest = artifact.manifest.batch
    spec = InputSpec.of(deploy, smallest, largest)
    exact = replace(deploy, precision="fp32", keep_fp32=(), eight_bits=deploy.eight_bits.without_rounding())
    runs: list[tuple[str, Gate, int, Callable[[], Runner]]] = [
        (f"The form of {name}", GATES["fp32"], SLOW_IMAGES, partial(deployed_runner, model, exact))
    ]
    for runner_name in deploy.row.proven_by:
        images = SLOW_IMAGES if find_runner(runner_name).is_slow else len(calibration.held_out)
        opened = partial(open_runner, artifact, runner_name, RunnerOptions(hashes_hold=True))
        runs.append((name, deploy.row.gate, images, opened))
    held_out = HeldOut(images=len(calibration.held_out))
    results: tuple[ParityResult, ...] = ()
    for what, gate, images, make in runs:
        comparison, counts, right = OutputComparison(specs), Counter[int](), [0, 0]
        judges_by_labels = images == len(calibration.held_out)  # a few images are too few for IoU and precision
        by_labels = comparison_by_labels(calibration.source, record) if judges_by_labels else None
        positions = label_positions(calibration.source, record.task, record.class_names, record.num_classes)
        class_output = model.task.class_output_of([each.name for each in specs]) if positions else None
        with reference_runner(model, deploy) as reference, make() as runner:
            for batch in calibration.batches(spec, calibration.held_out[:images]):
                expected = {key: value[: len(batch)] for key, value in reference.run(batch.images).items()}
                given = {key: value[: len(batch)].float() for key, value in runner.run(batch.images).items()}
                if by_labels is not None:
                    by_labels.add(given, expected, batch.labels)
                comparison.add(*comparable(given, expected, specs))
                counts[len(batch.images)] += 1
                if progress is not None:
                    progress(f"judging by {runner.info.backend}", sum(size * n for size, n in counts.items()) / images)
                if class_output is not None:
                    labels = torch.tensor([positions[label] for label in batch.labels.tolist()])
                    for at, side in enumerate((given, expected)):
                        right[at] += int((side[class_output].argmax(dim=1) == labels).sum())
            names = (f"{runner.info.backend} {runner.info.precision}", TORCH_REFERENCE)
        judged_by = model.task.gate(gate)
        results = tuple(
            ParityResult(*names, judged_by, tuple(counts), output, found, judged_by.failures(found))
            for output, found in comparison.results().items()
        )
        if by_labels is not None:
            labelled = by_labels.result(results[0])
            results = (replace(results[0], failures=labelled.failures), *results[1:])
            pairs = {name: (round(own, 6), round(other, 6)) for name, (own, other) in labelled.metrics.items()}
            held_out = replace(held_out, metrics=pairs)
        failures = [f"{result.output}: {failure}" for result in results for failure in result.failures]
        accuracy = ""
        if class_output is not None and images == len(calibration.held_out):
            top1, reference_top1 = (100.0 * count / images for count in right)
            held_out = replace(held_out, top1=round(top1, 3), reference_top1=round(reference_top1, 3))
            accuracy = f", top-1 {top1:.2f} % (PyTorch {reference_top1:.2f} %)"
            if top1 < reference_top1 - MOST_LOST:
                failures.append(f"top-1 {top1:.2f} %, PyTorch {reference_top1:.2f} %, gate {MOST_LOST} points less")
        if failures:
            few = images * (judged_by.flip_share_max or 1.0) < 1 and any("flips" in failure for failure in failures)
            more = f"Of {images} images a single flip is too many: judge by more images first. " if few else ""
            raise ParityError(
                f"{what} ({names[0]}) differs from PyTorch on {images} images held out: {'; '.join(failures)}. "
                f"{name} was not written. {more}Keep more of it in FP16 with --keep-fp16 (`cnx-deploy diagnose bisect` "
                "on a file of --no-verify says which parts), calibrate with --calibration-method mse, or export "
                f"{_others(deploy.precision)}."
            )
        worst = worst_verdict(results).differences
        error = f"relative L2 {worst.relative_l2_max:.1e}, {worst.flips} flips"
        if by_labels is not None:
            error += "".join(f", {name} {own:.4f} ({other:.4f})" for name, (own, other) in held_out.metrics.items())
        note(f"  {what} ({names[0]}): {images} images held out, {error}{accuracy}")
    return results, held_out


def check_engines(
    artifact: Artifact[OnnxManifest],
    model: ConvNeXtV2,
    note: Callable[[str], None],
    targets: Sequence[str] = GATE_TARGETS,
) -> tuple[EngineCheck, ...]:
    """Compile a file in eight bits and the same network in FP16 for each target, and compare bytes and structure.

    Raises CheckFailedError, which names the gate, where eight bits move more than 0.80 of FP16's bytes or the engine
    does not store what the file does; MissingRequirementError without TensorRT-RTX.
    """
    checks = compare_engines(artifact, model, note, targets)
    for check in checks:
        if check.faults:
            raise CheckFailedError(
                f"{artifact.path.name} is not worth its eight bits on {check.target} at batch {check.batch}: "
                f"{'; '.join(check.faults)}. It was not written. Keep less of it in FP16, give it larger batches "
                f"(--batch 8:8:64), or export {_others(artifact.manifest.deploy.precision)}."
            )
    return checks


def compare_engines(
    artifact: Artifact[OnnxManifest],
    model: ConvNeXtV2,
    note: Callable[[str], None],
    targets: Sequence[str] = GATE_TARGETS,
) -> tuple[EngineCheck, ...]:
    """Compile both as `check_engines` does, and return what was found, faults included.

    Raises MissingRequirementError without TensorRT-RTX.
    """
    manifest = artifact.manifest
    deploy = manifest.deploy
    load_backend(LISTS_KERNELS)
    smallest, _, largest = manifest.batch
    batches = dict.fromkeys(min(max(batch, smallest), largest) for batch in BATCHES)
    checks = []
    with tempfile.TemporaryDirectory() as folder:
        half = ExportSpec(deploy=replace(deploy, precision="fp16", eight_bits=None), batch=manifest.batch)
        twin = export_onnx(model, manifest.model, half, Path(folder))
        for target, batch in itertools.product(targets, batches):
            mine, other = (measure_isolated(path, target, batch) for path in (artifact.path, twin.path))
            checks.append(
                EngineCheck(
                    target=target,
                    batch=batch,
                    kernels=mine.kernels,
                    half_kernels=other.kernels,
                    megabytes_per_image=round(mine.megabytes_per_image, 3),
                    half_megabytes_per_image=round(other.megabytes_per_image, 3),
                    faults=tuple(engine_faults(mine, other, deploy, manifest.model.variant)),
                )
            )
            note(f"  {target}, batch {batch}: {_told(checks[-1])}")
    return tuple(checks)


def engine_faults(mine: Compiled, half: Compiled, deploy: DeploySpec, variant: str) -> Iterator[str]:
    """What an engine breaks of the gates of bytes and structure, beside the engine of the same network in FP16."""
    share = mine.megabytes_per_image / half.megabytes_per_image
    if share > MOST_BYTES:
        yield f"it moves {share:.3f} of the bytes of FP16, gate {MOST_BYTES:.2f}"
    if mine.kernels > half.kernels:
        yield f"{mine.kernels} kernels, FP16 has {half.kernels}"
    if deploy.eight_bits is None:
        return
    for stage, (depth, width) in enumerate(zip(find_variant(variant).depths, find_variant(variant).dims, strict=True)):
        positions = math.prod(stage_sides(deploy.image_size, stage))
        hidden = mine.batch * deploy.passes * positions * 4 * width
        blocks = [deploy.eight_bits.of(f"stages.{stage}.{index}") for index in range(depth)]
        stored = sum(block is not None and "h" in block.scales for block in blocks)
        # A second product that is kept in FP16 reads the scaled hidden tensor in Half.
        halves = sum(block is not None and block.scales.keys().isdisjoint(("g", "s")) for block in blocks)
        found = Counter(
            kind
            for kernel in mine.kernel_list
            if kernel.stage == f"stages.{stage}"
            for size, kind in _outputs(kernel)
            if size == hidden
        )
        narrow = found["Int8"] + found["FP8"]
        if narrow < stored:
            yield f"stage {stage} stores {narrow} hidden tensors in eight bits, and {stored} were asked for"
        if stored == depth and (wide := found["Half"] + found["Float"]) > halves:
            yield f"stage {stage} stores {wide} tensors of the hidden tensor's size in Half or Float"


OUTPUT = re.compile(r"output ([0-9x]+) (\w+)")


def _outputs(kernel: Kernel) -> Iterator[tuple[int, str]]:
    """Elements and type of each tensor that a kernel writes."""
    for shape, kind in OUTPUT.findall(kernel.tensors):
        yield math.prod(map(int, shape.split("x"))), kind


def label_positions(
    source: ImageSource, task: str, class_names: Sequence[str] | None, num_classes: int
) -> Sequence[int]:
    """The place among the network's classes of each class of the images; empty without labels of one class each.

    Raises InputError where they are not the network's classes.
    """
    if not source.class_names or source.label_sets is not None or task != "classification":
        return ()
    return class_positions(source, class_names, num_classes)


def check_targets(targets: Sequence[str]) -> None:
    """Raise InputError for a GPU that TensorRT-RTX compiles no engine for; where it is missing, nothing is compiled."""
    try:
        backend = load_backend(LISTS_KERNELS)
    except MissingRequirementError:
        return
    if unknown := [target for target in targets if target not in backend.targets]:
        raise InputError(
            f"No engine for {unknown[0]} can judge the file: {backend.name} {backend.version}, which compiles them, "
            f"builds for {', '.join(backend.targets)}. Name one of those with --gate-target, or leave the engines out "
            "with --no-engine-gates."
        )


def _told(check: EngineCheck) -> str:
    return (
        f"{check.megabytes_per_image:.2f} MB an image and {check.kernels} kernels, FP16 "
        f"{check.half_megabytes_per_image:.2f} and {check.half_kernels} ({check.share:.3f})"
    )


def _others(precision: str) -> str:
    return f"--precision {'fp8' if precision == 'int8' else 'int8'}, or fp16"
