"""Deploy form to ONNX: one exporter, standard operators, the same bytes each time.

torch's exporter does the translation; what is ours is the name of every node (its torch module), the metadata, the
rule for large weights and the checks.
"""

import contextlib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir
import torch

from cnx_deploy.core.artifacts import artifact_stem, is_onnx, reusable_artifact, stage_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.eight_bits import EightBitFacts
from cnx_deploy.core.errors import ExportError, InputError, OutputExistsError
from cnx_deploy.core.gates import OutputSpec, ParityResult
from cnx_deploy.core.image_size import STRIDE, sides
from cnx_deploy.core.manifest import Artifact, ModelRecord, OnnxFacts, OnnxManifest, OnnxRequest, TensorSpec
from cnx_deploy.core.precision import exportable_precisions
from cnx_deploy.core.preprocessing import ASSUMED
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.exporters.graph_checks import GraphFacts, check_export
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import FORM, DeployedConvNeXtV2, deploy_form, separate_norms
from cnx_deploy.model.quantised import ONNX_TRANSLATIONS

__all__ = ["EXTERNAL_DATA_BYTES", "ExportSpec", "export_onnx", "facts_record"]

EXTERNAL_DATA_BYTES = 1 << 30
"""Weights above 1 GiB go to one file beside the model: protobuf ends at 2 GiB, and copies are held while writing."""


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """What to export. `batch` is (smallest, typical, largest); equal ends give a fixed batch.

    `name` is the file name's first part, the variant's name by default.
    """

    deploy: DeploySpec = field(default_factory=DeploySpec)
    batch: tuple[int, int, int] = (1, 8, 64)
    name: str | None = None
    external_data_bytes: int = EXTERNAL_DATA_BYTES

    def __post_init__(self) -> None:
        if not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise InputError(
                f"The batch range is {self.batch}; it has to be (smallest, typical, largest), such as (1, 8, 64)."
            )
        if self.deploy.input_kind == "normalised":
            raise InputError("An export folds the normalisation into the network. Choose float or uint8 as its input.")
        _ = self.opset

    @property
    def request(self) -> OnnxRequest:
        """What the manifest keeps of the request."""
        return OnnxRequest(deploy=self.deploy, batch=self.batch, opset=self.opset, form=FORM)

    @property
    def opset(self) -> int:
        """The opset that the file is written in."""
        opset = self.deploy.row.opset
        if opset is None:
            raise InputError(
                f"{self.deploy.precision} exists to prove the deploy form and is not exported. Choose one of: "
                f"{', '.join(exportable_precisions())}."
            )
        return opset


def export_onnx(
    model: ConvNeXtV2,
    record: ModelRecord,
    spec: ExportSpec,
    output_dir: Path,
    *,
    force: bool = False,
    verify: Callable[[Artifact[OnnxManifest]], tuple[ParityResult, ...]] | None = None,
    prove: Callable[[Artifact[OnnxManifest]], tuple[tuple[ParityResult, ...], EightBitFacts]] | None = None,
) -> Artifact[OnnxManifest]:
    """Export `model` to `<output_dir>/<name>-<size>-<precision>.onnx` with its manifest.

    `verify` is called with the written file before it is put into place; it raises to stop the export, and what it
    returns goes into the manifest's facts. `prove` does the same in its place for a file in eight bits. The artifact
    says whether it was made before and used again.

    Raises OutputExistsError when other inputs made what is there, ExportError when torch cannot export,
    GraphCheckError when the graph is not what it should be. `model` is left as it was.
    """
    stem = artifact_stem(spec.name or record.variant, spec.deploy.size_text, spec.deploy.precision)
    with stage_artifact(output_dir, stem) as staging:
        made = reusable_artifact(output_dir, stem, spec.request, record.weights.sha256, force=force)
        if made is not None and is_onnx(made) and _describes(made, record, spec):
            return staging.restate(made, replace(made.manifest, model=record, source_name=record.weights.source))
        path = staging.folder / f"{stem}.onnx"
        deployed = deploy_form(model, spec.deploy)
        norm_on_patches, outputs = deployed.norm_on_patches, deployed.output_specs
        graph = _graph_from_module(deployed, spec)
        del deployed
        _write(graph, record, spec, path)
        del graph  # with it the folded weights, which are not needed while the file is checked
        opened, closed = _open_sides(spec.deploy), InputSpec.of(spec.deploy).shape(1)
        image_shape = tuple(opened[axis][0] if axis in opened else closed[axis] for axis in range(1, len(closed)))
        facts = check_export(
            path,
            variant=model.variant,
            layout=str(spec.deploy.layout),
            batch=spec.batch,
            opset=spec.opset,
            leave_out=spec.deploy.leave_out,
            open_size=spec.deploy.size_range is not None,
            image_shape=image_shape,
            norm_on_patches=norm_on_patches,
            mirrored_axes=() if spec.deploy.tta is None else (spec.deploy.width_axis,),
            outputs=outputs,
            head_operators=_head_operators(model, spec.deploy),
        )
        manifest = OnnxManifest(
            stem=stem,
            files=staging.record(*sorted(file.name for file in staging.folder.iterdir())),
            model=record,
            request=spec.request,
            source_name=record.weights.source,
            source_sha256=record.weights.sha256,
            facts=facts_record(facts, outputs if model.task.is_dense else ()),
        )
        if verify is not None:
            parity = verify(Artifact(path, manifest))
            manifest = replace(manifest, facts=replace(manifest.facts, parity=parity))
        if prove is not None:
            parity, proven = prove(Artifact(path, manifest))
            manifest = replace(manifest, facts=replace(manifest.facts, parity=parity, eight_bits=proven))
        return staging.commit(manifest)


def _head_operators(model: ConvNeXtV2, spec: DeploySpec) -> dict[str, int]:
    """What the head adds to the graph; its norms of stages' outputs are the downsamplings' where both read the same."""
    counts = dict(model.task.operators_of(spec))
    if 0 < counts.get("ChannelsFirstNorm", 0) < len(model.variant.dims):
        counts["ChannelsFirstNorm"] += separate_norms(model.variant, spec)
    return counts


def _describes(found: Artifact[OnnxManifest], record: ModelRecord, spec: ExportSpec) -> bool:
    """Whether the file's metadata is what it would be now; False where only what is assumed is not.

    Raises OutputExistsError where anything else differs: the weights' hash cannot tell.
    """
    old, new = _metadata(found.manifest.model, spec), _metadata(record, spec)
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    # With the same values the file stays what it is but for this word, so it is made again without being asked.
    if differing and differing != ["cnx_deploy.assumed"]:
        raise OutputExistsError(
            f"{found.path} holds the same weights but other metadata ({', '.join(differing)}). "
            "Use --force to replace it, or another --name or --output-dir."
        )
    return not differing


def _graph_from_module(module: DeployedConvNeXtV2, spec: ExportSpec) -> ir.Model:
    smallest, _, largest = spec.batch
    dynamic = smallest != largest
    # torch specialises an example batch of 1 on some versions; 2 stays symbolic on all.
    example_batch = max(smallest, 2) if dynamic else smallest
    inputs = InputSpec.of(spec.deploy)
    opened, shape = _open_sides(spec.deploy), list(inputs.shape(example_batch))
    axes = {axis: torch.export.Dim(name, min=low, max=high) for axis, (name, low, high) in opened.items()}
    if dynamic:
        axes[0] = torch.export.Dim("batch", min=smallest, max=largest)
    for axis in opened:  # torch takes a side of one position in the last stage for a constant: the example has two
        shape[axis] = max(2 * STRIDE, shape[axis])
    example = torch.zeros(shape, dtype=inputs.dtype)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=spec.opset,
                input_names=["images"],
                output_names=[spec.name for spec in module.output_specs],
                dynamic_shapes=(axes,) if axes else None,
                verbose=False,
                custom_translation_table=None if spec.deploy.eight_bits is None else dict(ONNX_TRANSLATIONS),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch {torch.__version__} cannot export the model: {error}") from error
    if program is None:
        raise ExportError(
            f"torch {torch.__version__} exported nothing and gave no reason: expected a program. Use the torch of "
            "constraints.txt."
        )
    return program.model


def _open_sides(deploy: DeploySpec) -> dict[int, tuple[str, int, int]]:
    """The open axes of the input: name, smallest and largest size."""
    if deploy.size_range is None:
        return {}
    first = 1 if deploy.input_kind == "uint8" else 2
    ends = zip(("height", "width"), *map(sides, deploy.size_range), strict=True)
    return {first + at: (name, low, high) for at, (name, low, high) in enumerate(ends) if low != high}


def _write(graph: ir.Model, record: ModelRecord, spec: ExportSpec, path: Path) -> None:
    """Name, describe and save the graph; weights beyond the limit go to `<file>.data`."""
    _name_nodes(graph)
    _strip_debug_metadata(graph)
    graph.producer_name, graph.producer_version, graph.doc_string = "cnx-deploy", None, None
    graph.metadata_props.clear()
    graph.metadata_props.update(_metadata(record, spec))
    weight_bytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if weight_bytes > spec.external_data_bytes else None
    ir.save(graph, path, external_data=external)


def _name_nodes(graph: ir.Model) -> None:
    """Name each node `<torch module>/<operator>`, numbered where a module has several of a kind."""
    seen: Counter[str] = Counter()
    for node in graph.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
        # The exporter writes the scopes as a Python list of strings, which is JSON but for its quotes.
        modules = [str(scope) for scope in json.loads(scopes.replace("'", '"'))[:-1] if scope]
        base = f"{modules[-1] if modules else 'model'}/{node.op_type}"
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"


def _strip_debug_metadata(graph: ir.Model) -> None:
    """Drop what the exporter keeps for debugging: it holds stack traces with paths of the exporting machine."""
    for node in graph.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    graph.graph.metadata_props.clear()
    graph.graph.name = "convnextv2"


def _metadata(record: ModelRecord, spec: ExportSpec) -> dict[str, str]:
    entries = {
        "variant": record.variant,
        "num_classes": str(record.num_classes),
        "image_size": spec.deploy.size_text,
        "precision": spec.deploy.precision,
        "input": spec.deploy.input_kind,
        "batch": ":".join(str(size) for size in spec.batch),
        "preprocessing": json.dumps(record.preprocessing.to_dict(), sort_keys=True),
        "weights_sha256": record.weights.sha256,
        "weights_origin": record.weights.origin,
        "licence": record.weights.licence,
    }
    # Without what is not the default the files of before keep their bytes.
    if spec.deploy.in_chans != 3:
        entries["in_chans"] = str(spec.deploy.in_chans)
    entries |= {name: str(value) for name, value in spec.deploy.answer.items()}
    if spec.deploy.outputs:
        entries["outputs"] = ",".join(spec.deploy.outputs)
    if record.weights.soup:
        entries["soup"] = ",".join(file.sha256 for file in record.weights.soup)
    if record.task != "classification":
        entries["task"] = record.task
    if assumed := sorted(name for name, origin in record.origins.items() if origin == ASSUMED):
        entries["assumed"] = ",".join(assumed)
    if record.task_config:
        entries["task_config"] = json.dumps(record.task_config, sort_keys=True)
    if record.thresholds is not None:
        entries["thresholds"] = json.dumps(record.thresholds)
    if record.class_names:
        entries["class_names"] = json.dumps(record.class_names, ensure_ascii=False)
    return {f"cnx_deploy.{key}": value for key, value in sorted(entries.items())}


def facts_record(facts: GraphFacts, declared: Sequence[OutputSpec] = ()) -> OnnxFacts:
    """What a manifest keeps of the facts of a graph, with the units of outputs that are `declared`."""
    units = {spec.name: spec.unit for spec in declared}
    return OnnxFacts(
        operators=facts.operators,
        types=facts.types,
        half_share=round(facts.half_share, 4),
        inputs={name: TensorSpec(kind, tuple(shape)) for name, (kind, shape) in facts.inputs.items()},
        outputs={
            name: TensorSpec(kind, tuple(shape), units.get(name)) for name, (kind, shape) in facts.outputs.items()
        },
    )


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress lines and deprecation notices of its own internals from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
