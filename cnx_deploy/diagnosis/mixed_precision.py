"""How accurate a network is with a set of its modules in a wider type: on its deploy form, and on a file.

A set is tried without an export on two deploy forms of the same weights: one in half, one with everything kept in FP32.
A part that is kept is taken from the second, weights not rounded, and put into the first; parts cast their inputs to
their own types, so the result is the form that `DeploySpec.keep_fp32` describes. It is run with the rules of
`emulator.operators`: FP32 inside an operator, rounded to the type in which its result is stored. Files are run by the
emulator's graph, which rounds after every operator in the types that the file has.
"""

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.eight_bits import PARTS
from cnx_deploy.core.errors import InputError, ParityError
from cnx_deploy.core.gates import Differences, Gate
from cnx_deploy.core.manifest import Artifact, ModelRecord, OnnxManifest
from cnx_deploy.diagnosis.images import raw_batches
from cnx_deploy.diagnosis.search import in_order, units_of
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import DeployedConvNeXtV2, deploy_form
from cnx_deploy.model.tasks.base import Outputs, joined, named_outputs, network_outputs
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.runners.emulator.operators import OPERATORS
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.parity import verdicts, worst_verdict
from cnx_deploy.verification.verify import verify_export

__all__ = [
    "Case", "EightBitForm", "ExportedProbe", "MixedForm", "Probe", "RecordedProbe", "RoundedOperators", "case_of",
    "export_and_probe", "is_kept", "outputs_with", "probe_recorded",
]  # fmt: skip

BACKBONE = ("flip_mean", "normalise", "downsample_layers", "stages")
"""Children of the deploy form that do not belong to the head, which has the task's modules under names of its own."""
LAYER_NORM = OPERATORS["LayerNormalization"]
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Probe:
    """One set of modules tried. `exported`: judged on a file written with it, and not on the form alone.

    `found` is of the output that fails or else differs most.
    """

    kept: tuple[str, ...]
    found: Differences
    failures: tuple[str, ...]
    exported: bool

    @property
    def passed(self) -> bool:
        """Whether the gate holds."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return the probe for JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True, slots=True)
class RecordedProbe:
    """The file as it is. `first_nonfinite`: its first operator whose result is no number on some image.

    `infinite_weights`: the modules with weights that are none.
    """

    probe: Probe
    first_nonfinite: str | None
    infinite_weights: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExportedProbe:
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
    """A network and what its outputs are compared with: `expected` (N, ...) for all images of `batches`.

    `spec` is the file's own with nothing kept.
    """

    loaded: LoadedModel
    record: ModelRecord
    spec: ExportSpec
    batches: tuple[Tensor, ...]
    expected: Outputs
    gate: Gate

    @property
    def units(self) -> tuple[str, ...]:
        """The network's units, in the order in which they run."""
        return units_of(self.loaded.model.variant)

    @property
    def reference_nonfinite(self) -> int:
        """PyTorch's values that are no numbers."""
        return sum(int((~torch.isfinite(output)).sum()) for output in self.expected.values())

    def judge(self, kept: Collection[str], outputs: Outputs, *, exported: bool) -> Probe:
        """Compare outputs (N, ...) with the reference."""
        model, names = self.loaded.model, ("", "")
        specs = network_outputs(model.task, model.variant, model.num_classes, self.spec.deploy)
        worst = worst_verdict(verdicts(outputs, self.expected, specs, model.task.gate(self.gate), names, ()))
        return Probe(in_order(kept, self.units), worst.differences, worst.failures, exported)


class MixedForm:
    """A network's deploy form in half, whose parts can be kept in FP32 from one call to the next.

    `spec.keep_fp32` is not looked at. Raises InputError for a spec that is not of half precision.
    """

    def __init__(self, model: ConvNeXtV2, spec: DeploySpec) -> None:
        if not spec.is_half:
            raise InputError(f"Parts are kept in FP32 in a file of fp16 or bf16, not in {spec.precision}.")
        self.half = deploy_form(model, replace(spec, keep_fp32=()))
        self.single = deploy_form(model, replace(spec, keep_fp32=units_of(model.variant)))

    def outputs(self, batches: Sequence[Tensor], kept: Collection[str] = ()) -> Outputs:
        """Run raw images with the modules called `kept` in FP32 and return float32 outputs (N, ...)."""
        whole = [name for name in kept if name != "head"]
        if "head" in kept:
            whole += [name for name, _ in self.half.named_children() if name not in BACKBONE]
        outermost = [name for name in whole if not any(name.startswith(f"{other}.") for other in whole)]
        return outputs_with(self.half, {name: self.single.get_submodule(name) for name in outermost}, batches)


class EightBitForm:
    """A deploy form in eight bits, whose parts can be kept in FP16 from one call to the next, on the same scales.

    Gains stay: they change nothing but what is rounded.
    """

    def __init__(self, model: ConvNeXtV2, spec: DeploySpec) -> None:
        assert spec.eight_bits is not None
        self._blocks = spec.eight_bits.blocks
        self._form = deploy_form(model, spec)
        self._half = deploy_form(model, replace(spec, eight_bits=spec.eight_bits.without_rounding()))

    def outputs(self, batches: Sequence[Tensor], kept: Collection[str] = ()) -> Outputs:
        """Run raw images with the parts called `kept` in FP16 and return float32 outputs (N, ...)."""
        replaced: dict[str, nn.Module] = {}
        for name, block in self._blocks.items():
            taps = self._form.get_submodule(f"{name}.taps")
            for letter in block.scales:
                part = f"{name}.{PARTS[letter]}"
                if not is_kept(part, kept):
                    continue
                if letter in dict(taps.named_children()):
                    replaced[f"{name}.taps.{letter}"] = nn.Identity()
                else:
                    replaced[f"{part}.constant"] = self._half.get_submodule(f"{part}.constant")
        return outputs_with(self._form, replaced, batches)


def is_kept(part: str, kept: Collection[str]) -> bool:
    """Whether a part ("stages.2.3.grn") or what it belongs to is among the names."""
    return any(f"{part}.".startswith(f"{name}.") for name in kept)


def outputs_with(form: DeployedConvNeXtV2, replaced: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> Outputs:
    """Run raw images with some modules of a form replaced by name, and return float32 outputs (N, ...).

    Operators are rounded as `RoundedOperators` says. The form is left as it was.
    """
    own = {name: form.get_submodule(name) for name in replaced}
    rounded = RoundedOperators()  # type: ignore[no-untyped-call]
    try:
        for name, module in replaced.items():
            form.set_submodule(name, module)
        with torch.inference_mode(), rounded:
            return joined([named_outputs(form(images), form.output_specs) for images in batches])
    finally:
        for name, module in own.items():
            form.set_submodule(name, module)


class RoundedOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute in FP32 whatever takes half tensors, and round its result once if it takes no wider ones.

    A linear layer over tokens is two operators of the written graph, MatMul and Add, and so it is here; a LayerNorm is
    the emulator's own, which rounds alike to the last bit of FP32. In inference mode torch's layers arrive whole.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.layer_norm.default:
            tokens, _, gain, shift, eps = args
            return LAYER_NORM([tokens, gain, shift], {"axis": -1, "epsilon": eps})
        given = (args, kwargs or {})
        floating = {leaf.dtype for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
        if func is torch.ops.aten.to.dtype or func.is_view or not floating.intersection(HALVES):
            return func(*args, **(kwargs or {}))
        narrow = floating.pop() if len(floating) == 1 else torch.float32
        wide, words = tree_map(
            lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALVES else leaf, given
        )
        if func is torch.ops.aten.linear.default and wide[0].ndim > 2:
            tokens, weight, bias = wide
            return (F.linear(tokens, weight).to(narrow).float() + bias).to(narrow)
        results = func(*wide, **words)
        if func._schema.is_mutable:  # in place, as ReLU may be: what was widened is a copy
            return args[0].copy_(wide[0])
        # An operator may have several results, and indices or truths among them; `dtype` says the type of a sum.
        narrow = words.get("dtype") or narrow
        return tree_map(
            lambda leaf: leaf.to(narrow) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, results
        )


def case_of(
    artifact: Artifact[OnnxManifest],
    loaded: LoadedModel,
    gate: Gate,
    data: Path | None,
    samples: int,
    note: Callable[[str], None] | None = None,
    *,
    white_level: float | None = None,
) -> Case:
    """Make what a recorded file is judged by: images of the folder `data`, or seeded ones, and PyTorch in FP32."""
    deploy = replace(artifact.manifest.deploy, keep_fp32=())
    spec, record = ExportSpec(deploy=deploy, batch=artifact.manifest.batch), artifact.manifest.model
    batches = tuple(raw_batches(artifact.manifest, samples, data, white_level=white_level, note=note))
    with reference_runner(loaded.model, deploy) as runner:
        expected = joined([runner.run(images) for images in batches])
    return Case(loaded, record, spec, batches, expected, gate)


def probe_recorded(artifact: Artifact[OnnxManifest], case: Case) -> RecordedProbe:
    """Run a recorded file as it is and judge it."""
    graph = Graph(artifact.path)
    with torch.inference_mode():
        passes = [graph.evaluate(images) for images in case.batches]
    outputs = joined([{name: evaluation.tensors[name] for name in graph.outputs} for evaluation in passes])
    nonfinite = [evaluation.first_nonfinite for evaluation in passes if evaluation.first_nonfinite is not None]
    kept = artifact.manifest.deploy.keep_fp32
    infinite = {name for name, value in _weights(graph).items() if not bool(torch.isfinite(value).all())}
    modules = [step.name.partition("/")[0] for step in graph.steps if infinite.intersection(step.inputs)]
    probe = case.judge(kept, outputs, exported=True)
    return RecordedProbe(probe, next(iter(nonfinite), None), tuple(dict.fromkeys(modules)))


def export_and_probe(kept: Collection[str], case: Case) -> ExportedProbe:
    """Export with `kept` into a temporary folder, as `export --keep-fp32` does, run the file and judge it."""
    spec = replace(case.spec, deploy=replace(case.spec.deploy, keep_fp32=tuple(kept)))
    with tempfile.TemporaryDirectory() as folder:
        artifact = export_onnx(case.loaded.model, case.record, spec, Path(folder))
        graph, verifies = Graph(artifact.path), True
        try:
            verify_export(artifact, case.loaded.model)
        except (ParityError, InputError):  # the latter where all is kept, and nothing is left for the emulator to round
            verifies = False
    with torch.inference_mode():
        passes = [graph.evaluate(images).tensors for images in case.batches]
    outputs = joined([{name: tensors[name] for name in graph.outputs} for tensors in passes])
    weights = _weights(graph).values()
    single = sum(value.numel() for value in weights if value.dtype == torch.float32)
    return ExportedProbe(
        case.judge(kept, outputs, exported=True),
        single / sum(value.numel() for value in weights),
        1.0 - float(artifact.manifest.facts.half_share),
        verifies,
    )


def _weights(graph: Graph) -> dict[str, Tensor]:
    return {name: value for name, value in graph.constants.items() if value.is_floating_point()}
