"""What a set of kept modules is judged by: the network, images, PyTorch's logits and a gate.

Files are run by the emulator's graph, which rounds after every operator in the types that the file has.
"""

import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError, ParityError
from cnx_deploy.core.gates import Differences, Gate
from cnx_deploy.core.manifest import Artifact, ModelRecord, OnnxManifest
from cnx_deploy.data import ImageLike, evenly, find_images
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.diagnosis.bisect.units import in_order, units_of
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.parity import differences
from cnx_deploy.verification.verify import verify_export

__all__ = ["Case", "Exported", "Probe", "Recorded", "case_of", "exported_with", "recorded_as_it_is"]

BATCH = 8
"""Images run at once, where the file takes as many: this decides memory alone."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One set of modules tried. `exported`: judged on a file written with it, and not on the form alone."""

    kept: tuple[str, ...]
    found: Differences
    failures: tuple[str, ...]
    exported: bool

    @property
    def passed(self) -> bool:
        """Whether the gate holds."""
        return not self.failures


@dataclass(frozen=True, slots=True)
class Recorded:
    """The file as it is. `first_nonfinite`: its first operator whose result is no number on some image.

    `infinite_weights`: the modules with weights that are none.
    """

    probe: Probe
    first_nonfinite: str | None
    infinite_weights: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exported:
    """A file written with a set kept.

    Shares of FP32, 0 to 1: among the parameters and among the results of operators. `verifies`: whether the comparison
    that `export` makes by itself passes.
    """

    probe: Probe
    parameter_share: float
    result_share: float
    verifies: bool


@dataclass(frozen=True, slots=True)
class Case:
    """A network and what its logits are compared with: `expected` (N, num_classes) for all images of `batches`.

    `spec` is the file's own with nothing kept.
    """

    loaded: LoadedModel
    record: ModelRecord
    spec: ExportSpec
    batches: tuple[Tensor, ...]
    expected: Tensor
    gate: Gate

    @property
    def units(self) -> tuple[str, ...]:
        """The network's units, in the order in which they run."""
        return units_of(self.loaded.model.variant)

    @property
    def reference_nonfinite(self) -> int:
        """PyTorch's logits that are no numbers."""
        return int((~torch.isfinite(self.expected)).sum())

    def judged(self, kept: Collection[str], logits: Tensor, *, exported: bool) -> Probe:
        """The verdict over logits (N, num_classes)."""
        found = differences(logits, self.expected)
        return Probe(in_order(kept, self.units), found, self.gate.failures(found), exported)


def case_of(artifact: Artifact[OnnxManifest], loaded: LoadedModel, gate: Gate, data: Path | None, samples: int) -> Case:
    """What a recorded file is judged by: images of the folder `data`, or seeded ones, and PyTorch in FP32.

    Raises InputError when the folder holds fewer images than the file takes at once.
    """
    batch = artifact.manifest.batch
    deploy = replace(artifact.manifest.deploy, keep_fp32=())
    spec, record = ExportSpec(deploy=deploy, batch=batch), artifact.manifest.model
    batches = _batches(record, spec, data, samples)
    with reference_runner(loaded.model, deploy) as runner:
        expected = torch.cat([runner.run(images) for images in batches])
    return Case(loaded, record, spec, batches, expected, gate)


def recorded_as_it_is(artifact: Artifact[OnnxManifest], case: Case) -> Recorded:
    """Run the file and judge it."""
    graph = Graph(artifact.path)
    with torch.inference_mode():
        passes = [graph.evaluate(images) for images in case.batches]
    logits = torch.cat([each.tensors[graph.outputs[0]] for each in passes])
    first = next((each.first_nonfinite for each in passes if each.first_nonfinite is not None), None)
    kept = artifact.manifest.deploy.keep_fp32
    return Recorded(case.judged(kept, logits, exported=True), first, _infinite_weights(graph))


def exported_with(kept: Collection[str], case: Case) -> Exported:
    """Export with `kept` into a temporary folder, as `export --keep-fp32` does, run the file and judge it."""
    spec = replace(case.spec, deploy=replace(case.spec.deploy, keep_fp32=tuple(kept)))
    with tempfile.TemporaryDirectory() as folder:
        artifact = export_onnx(case.loaded.model, case.record, spec, Path(folder))
        graph, verifies = Graph(artifact.path), _verifies(artifact, case)
    with torch.inference_mode():
        logits = torch.cat([graph.evaluate(images).tensors[graph.outputs[0]] for images in case.batches])
    weights = [value for value in graph.constants.values() if value.is_floating_point()]
    single = sum(value.numel() for value in weights if value.dtype == torch.float32)
    return Exported(
        case.judged(kept, logits, exported=True),
        single / sum(value.numel() for value in weights),
        1.0 - float(artifact.manifest.facts.half_share),
        verifies,
    )


def _batches(record: ModelRecord, spec: ExportSpec, data: Path | None, samples: int) -> tuple[Tensor, ...]:
    """Raw images in batches that the file takes; `samples` is rounded up where it takes no fewer."""
    smallest, _, largest = spec.batch
    size = max(smallest, min(largest, BATCH))
    rest = samples % size
    total = samples - rest + max(rest, smallest) if rest else samples
    images = ImageLike(total) if data is None else find_images(data)
    batches = images.batches(
        replace(record.preprocessing, image_size=spec.deploy.image_size),
        InputSpec(spec.deploy.input_kind, spec.deploy.image_size),
        size,
        evenly(len(images), total),
    )
    fitting = [batch.images for batch in batches if len(batch) >= smallest]
    if not fitting:
        raise InputError(f"{data} has fewer images than the {smallest} that the file takes at once. Add some.")
    return tuple(fitting)


def _verifies(artifact: Artifact[OnnxManifest], case: Case) -> bool:
    try:
        verify_export(artifact, case.loaded.model)
    except (ParityError, InputError):  # the latter where all is kept, and nothing is left for the emulator to round
        return False
    return True


def _infinite_weights(graph: Graph) -> tuple[str, ...]:
    wrong = {
        name
        for name, value in graph.constants.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    }
    return tuple(dict.fromkeys(step.name.partition("/")[0] for step in graph.steps if wrong.intersection(step.inputs)))
