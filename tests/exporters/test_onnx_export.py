"""What an export promises: the same bytes each time, nothing of the exporting machine, each type in its place."""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
import torch

from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CorruptArtifactError, ExportError, InputError, OutputExistsError, ParityError
from cnx_deploy.core.gates import GATES, Differences, ParityResult
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.checkpoint import hash_weights
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import FORM
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.parity import differences
from tests.support.artifacts import copy_artifact

FP32 = ExportSpec(DeploySpec("fp32", 32), batch=(1, 4, 8))
FP16 = ExportSpec(DeploySpec("fp16", 32), batch=(1, 4, 8))
PARITY = ParityResult(
    "", "none", GATES["fp32"], (1,), "logits", Differences(1, 0, 0.0, 0.0, 1.0, 1.0, 0, 0, 0.0, 0.0), ()
)
CLASSES = ("Amsel", "Drossel", "Fink", "Star", "Meise", "Specht", "Eule", "Kauz", "Bussard", "Möwe")
LICENCE = "none (random weights)"


@dataclass(frozen=True)
class Exported:
    """An artifact and the model it was made from, with what was known of the model before."""

    artifact: Artifact
    model: ConvNeXtV2
    hash_before: str


def export(model: ConvNeXtV2, record: ModelRecord, spec: ExportSpec, folder: Path, **options: object) -> Exported:
    before = hash_weights(model)
    artifact = export_onnx(model, record, spec, folder, **options)
    return Exported(artifact, model, before)


@pytest.fixture(scope="session")
def fp32_again(tiny_onnx_fp32, tiny_variant, tmp_path_factory) -> Exported:
    """The same request as `tiny_onnx_fp32`, in another folder, from a model in training mode."""
    model = random_model(tiny_variant, 10, seed=0).train()
    return export(model, tiny_onnx_fp32.manifest.model, FP32, tmp_path_factory.mktemp("again"))


@pytest.fixture(scope="session")
def uint8_fp16(tiny_variant, tmp_path_factory) -> Exported:
    """FP16 with raw bytes as input, eight images; class names and preprocessing known."""
    model = random_model(tiny_variant, 10, seed=0)
    weights = WeightsRecord("random", "0", hash_weights(model), LICENCE)
    record = ModelRecord(tiny_variant.name, 10, 32, weights, Preprocessing(image_size=32), CLASSES)
    spec = ExportSpec(DeploySpec("fp16", 32, "uint8"), batch=(8, 8, 8))
    return export(model, record, spec, tmp_path_factory.mktemp("uint8"))


@pytest.fixture(scope="session")
def fixed_external(tiny_variant, tmp_path_factory) -> Exported:
    """A batch of four only, weights in a file of their own, a verification that passes."""
    model = random_model(tiny_variant, 10, seed=0)
    record = ModelRecord(
        tiny_variant.name, 10, 32, WeightsRecord("random", "0", hash_weights(model), LICENCE), Preprocessing()
    )
    spec = ExportSpec(DeploySpec("fp32", 32), batch=(4, 4, 4), name="fixed", external_data_bytes=1000)
    return export(
        model,
        record,
        spec,
        tmp_path_factory.mktemp("external"),
        verify=lambda made: (replace(PARITY, candidate=made.path.name),),
    )


@pytest.mark.slow
def test_a_forced_export_removes_the_weights_file_it_no_longer_has(tiny_variant, tmp_path):
    model = random_model(tiny_variant, 10, seed=0)
    record = ModelRecord(
        tiny_variant.name, 10, 32, WeightsRecord("random", "0", hash_weights(model), LICENCE), Preprocessing()
    )
    spec = ExportSpec(DeploySpec("fp32", 32), batch=(4, 4, 4), external_data_bytes=1000)
    first = export(model, record, spec, tmp_path).artifact
    assert (tmp_path / f"{first.path.name}.data").is_file()
    (tmp_path / "notes.txt").write_text("not ours")
    export(model, record, ExportSpec(DeploySpec("fp32", 32), batch=(4, 4, 4)), tmp_path, force=True)
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert left == ["notes.txt", f"{first.manifest.stem}.json", first.path.name]


@pytest.fixture
def copied(tmp_path, tiny_onnx_fp32) -> Artifact:
    """A copy of the FP32 export, free to be changed."""
    return copy_artifact(tiny_onnx_fp32, tmp_path / "export")


def types_of(model: onnx.ModelProto) -> dict[str, str]:
    """Element type of every tensor of the graph."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    found.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    return {name: onnx.TensorProto.DataType.Name(kind) for name, kind in found.items()}


def first_axes(artifact: Artifact) -> list[int | str]:
    graph = onnx.load(artifact.path, load_external_data=False).graph
    axes = [value.type.tensor_type.shape.dim[0] for value in (*graph.input, *graph.output)]
    return [axis.dim_param or axis.dim_value for axis in axes]


def images_for(spec: DeploySpec, count: int) -> torch.Tensor:
    return runner_input(torch.cat(list(image_like_batches(count, spec.image_size, batch_size=count))), spec.input_kind)


# The caller's model, and the same bytes


def test_export_leaves_the_callers_weights_and_mode_alone(fp32_again):
    assert hash_weights(fp32_again.model) == fp32_again.hash_before
    assert {module.training for module in fp32_again.model.modules()} == {True}


def test_reproducible_export_gives_the_same_bytes_and_other_weights_give_others(
    tiny_onnx_fp32, fp32_again, fixed_external
):
    assert fp32_again.artifact.path.read_bytes() == tiny_onnx_fp32.path.read_bytes()
    assert sha256_of_file(tiny_onnx_fp32.path) != fixed_external.artifact.sha256


def test_nothing_of_the_exporting_machine_is_in_the_files(tiny_onnx_fp32, uint8_fp16):
    content = tiny_onnx_fp32.path.read_bytes() + uint8_fp16.artifact.path.read_bytes()
    traces = (b"site-packages", b"stack_trace", b"pkg.torch", b"/cnx_deploy/", b".py")
    assert [trace for trace in traces if trace in content] == []


# Names, counts, axes


def test_nodes_are_named_after_their_torch_modules_each_by_a_name_of_its_own(tiny_onnx_fp32):
    names = Counter(node.name for node in onnx.load(tiny_onnx_fp32.path).graph.node)
    assert max(names.values()) == 1
    assert {
        "downsample_layers.0.0/Conv",
        "downsample_layers.3.0/LayerNormalization",
        "stages.2.0.grn/AveragePool",
        "stages.2.1.act/Gelu",
        "head/Gemm",
    } <= names.keys()


@pytest.mark.parametrize(("precision", "statistic"), [("fp32", "AveragePool"), ("fp16", "ReduceSum")])
def test_a_file_has_opset_20_standard_operators_and_one_gelu_and_grn_statistic_a_block(
    request, tiny_variant, precision, statistic
):
    model = onnx.load(request.getfixturevalue(f"tiny_onnx_{precision}").path)
    imported = [(entry.domain, entry.version) for entry in model.opset_import]
    assert (imported, {node.domain for node in model.graph.node}) == ([("", 20)], {""})
    operators = Counter(node.op_type for node in model.graph.node)
    assert (operators["Gelu"], operators[statistic]) == (tiny_variant.block_count, tiny_variant.block_count)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]


def test_input_and_output_have_a_batch_axis_by_name(tiny_onnx_fp32):
    assert first_axes(tiny_onnx_fp32) == ["batch", "batch"]


def test_equal_ends_of_the_batch_range_fix_the_axis(fixed_external):
    assert first_axes(fixed_external.artifact) == [4, 4]


# Precision


@pytest.mark.parametrize(
    ("kind", "operators"),
    [("FLOAT", ("ReduceSum", "ReduceMean", "LayerNormalization")), ("FLOAT16", ("Conv", "MatMul", "Gemm", "Gelu"))],
)
def test_an_fp16_file_reduces_in_float_and_multiplies_in_half(tiny_onnx_fp16, kind, operators):
    model = onnx.load(tiny_onnx_fp16.path)
    types = types_of(model)
    assert (types["images"], types["logits"]) == ("FLOAT", "FLOAT")
    for operator in operators:
        nodes = [node for node in model.graph.node if node.op_type == operator]
        assert {types[node.input[0] if kind == "FLOAT" else node.output[0]] for node in nodes} == {kind}


# Raw bytes as input


def test_a_uint8_file_takes_images_with_channels_last(uint8_fp16):
    value = onnx.load(uint8_fp16.artifact.path).graph.input[0].type.tensor_type
    shape = [axis.dim_param or axis.dim_value for axis in value.shape.dim]
    assert (value.elem_type, shape) == (onnx.TensorProto.UINT8, [8, 32, 32, 3])


def test_onnx_runtime_on_bytes_equals_torch(uint8_fp16):
    spec = uint8_fp16.artifact.manifest.deploy
    images = images_for(spec, 8)
    found = OrtRunner(uint8_fp16.artifact.path).run(images)["logits"]
    expected = reference_runner(uint8_fp16.model, spec).run(images)["logits"]
    assert GATES["fp16"].failures(differences(found, expected)) == ()


# What the file and the manifest say


def test_the_file_says_what_it_is(uint8_fp16):
    props = {entry.key: entry.value for entry in onnx.load(uint8_fp16.artifact.path).metadata_props}
    said = {key.removeprefix("cnx_deploy."): value for key, value in props.items()}
    assert said == {
        "variant": "tiny-test",
        "num_classes": "10",
        "image_size": "32",
        "precision": "fp16",
        "input": "uint8",
        "batch": "8:8:8",
        "preprocessing": json.dumps(Preprocessing(image_size=32).to_dict(), sort_keys=True),
        "class_names": json.dumps(CLASSES, ensure_ascii=False),
        "weights_sha256": uint8_fp16.hash_before,
        "weights_origin": "random",
        "licence": LICENCE,
    }


def test_the_manifests_request_gives_the_deploy_spec_back(uint8_fp16):
    manifest = open_artifact(uint8_fp16.artifact.path).manifest
    assert manifest.deploy == DeploySpec("fp16", 32, "uint8")


def test_what_the_verification_found_is_in_the_manifest_and_none_is_claimed_without(fixed_external, uint8_fp16):
    manifest = open_artifact(fixed_external.artifact.path).manifest
    assert manifest.facts.parity == (replace(PARITY, candidate="fixed-32-fp32.onnx"),)
    assert open_artifact(uint8_fp16.artifact.path).manifest.facts.parity == ()


# Weights in a file of their own


def test_large_weights_lie_beside_the_model(fixed_external):
    files = [(file.name, file.size_bytes > 200_000) for file in fixed_external.artifact.manifest.files]
    assert files == [("fixed-32-fp32.onnx", False), ("fixed-32-fp32.onnx.data", True)]


def test_large_weights_are_found_from_any_working_directory(fixed_external, tmp_path, monkeypatch):
    path = Path(os.path.relpath(fixed_external.artifact.path, tmp_path))
    monkeypatch.chdir(tmp_path)
    spec = fixed_external.artifact.manifest.deploy
    images = images_for(spec, 4)
    expected = reference_runner(fixed_external.model, spec).run(images)["logits"]
    assert GATES["fp32"].failures(differences(OrtRunner(path).run(images)["logits"], expected)) == ()


def test_a_changed_byte_of_the_weights_file_is_corrupt(fixed_external, tmp_path):
    shutil.copytree(fixed_external.artifact.path.parent, tmp_path / "copy")
    data = tmp_path / "copy" / "fixed-32-fp32.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"fixed-32-fp32\.onnx\.data was altered"):
        open_artifact(tmp_path / "copy" / "fixed-32-fp32.onnx")


# Reuse, refusal, replacement


def test_the_same_request_again_is_reused(copied, tiny_model):
    artifact = export_onnx(tiny_model, copied.manifest.model, FP32, copied.path.parent)
    assert (artifact.reused, artifact) == (True, copied)


def test_another_request_at_the_same_place_is_refused(copied, tiny_model):
    with pytest.raises(OutputExistsError, match="--force"):
        export_onnx(tiny_model, copied.manifest.model, replace(FP32, batch=(1, 1, 1)), copied.path.parent)


def test_other_class_names_for_the_same_weights_are_not_reused(copied, tiny_model):
    record = replace(copied.manifest.model, class_names=CLASSES)
    with pytest.raises(OutputExistsError, match="class_names"):
        export_onnx(tiny_model, record, FP32, copied.path.parent)


@pytest.mark.parametrize(
    "told",
    [
        {"origins": {"mean": "option"}}, {"head_is_new": True},
        {"weights": WeightsRecord("random", "1", "", LICENCE, entry="teacher")},
    ],
    ids=lambda told: next(iter(told)),
)  # fmt: skip
def test_a_reused_file_has_a_manifest_that_says_what_holds_now(copied, tiny_model, told):
    """The same weights and numbers from elsewhere, such as a checkpoint that was moved: no byte of the file changes."""
    record, written = replace(copied.manifest.model, **told), copied.path.stat().st_mtime_ns
    record = replace(record, weights=replace(record.weights, sha256=copied.manifest.source_sha256))
    artifact = export_onnx(tiny_model, record, FP32, copied.path.parent)
    manifest = open_artifact(copied.path).manifest
    assert (artifact.reused, artifact.manifest, manifest.model) == (True, manifest, record)
    assert manifest.source_name == f"random:{record.weights.reference}"
    assert (manifest.files, manifest.facts) == (copied.manifest.files, copied.manifest.facts)
    assert copied.path.stat().st_mtime_ns == written
    assert sorted(path.name for path in copied.path.parent.iterdir()) == [
        f"{copied.manifest.stem}.json",
        copied.path.name,
    ]


def test_a_file_whose_metadata_says_assumed_is_made_again_once_the_value_is_given(copied, tiny_model, monkeypatch):
    """Made again shows by the first step of an export, which takes seconds."""

    def begun(*_: object) -> None:
        raise ExportError("made again")

    monkeypatch.setattr("cnx_deploy.exporters.onnx.deploy_form", begun)
    before, record = (
        replace(copied.manifest.model, origins={"mean": origin, "std": "assumed"}) for origin in ("assumed", "option")
    )
    copied.path.with_suffix(".json").write_text(replace(copied.manifest, model=before).to_json())
    assert export_onnx(tiny_model, before, FP32, copied.path.parent).reused
    with pytest.raises(ExportError, match="made again"):
        export_onnx(tiny_model, record, FP32, copied.path.parent)
    with pytest.raises(OutputExistsError, match="class_names"):
        export_onnx(tiny_model, replace(record, class_names=CLASSES), FP32, copied.path.parent)


@pytest.mark.slow
def test_force_replaces(copied, tiny_model):
    spec = replace(FP32, deploy=DeploySpec("fp32", 32, layout="gpu"))
    replaced = export_onnx(tiny_model, copied.manifest.model, spec, copied.path.parent, force=True)
    made = open_artifact(copied.path)
    assert (replaced.reused, made.manifest.deploy.layout, made.sha256 != copied.sha256) == (False, "gpu", True)


@pytest.mark.slow
def test_an_export_whose_verification_fails_leaves_no_file(tmp_path, tiny_model, tiny_onnx_fp16):
    seen = []

    def fails(made: Artifact) -> ParityResult:
        seen.append(made.path.stat().st_size)
        raise ParityError("the logits differ")

    with pytest.raises(ParityError, match="the logits differ"):
        export_onnx(tiny_model, tiny_onnx_fp16.manifest.model, FP16, tmp_path, verify=fails)
    left = [path.name for path in tmp_path.rglob("*")]
    assert (seen, left) == ([tiny_onnx_fp16.path.stat().st_size], [])


def test_a_model_that_torch_cannot_export_is_an_export_error(tmp_path, tiny_model, tiny_onnx_fp32, monkeypatch):
    def branches_on_values(self, hidden):
        return hidden if hidden.sum() > 0 else -hidden

    monkeypatch.setattr("cnx_deploy.model.deploy_layers.PooledResponseGain.forward", branches_on_values)
    with pytest.raises(ExportError, match="cannot export the model"):
        export_onnx(tiny_model, tiny_onnx_fp32.manifest.model, FP32, tmp_path)


@pytest.mark.parametrize("batch", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_a_batch_range_out_of_order_is_refused(batch):
    with pytest.raises(InputError, match=r"it has to be \(smallest, typical, largest\)"):
        ExportSpec(batch=batch)


def test_float64_is_not_exported():
    with pytest.raises(InputError, match="fp64 exists to prove"):
        ExportSpec(DeploySpec("fp64"))


@pytest.mark.slow
def test_a_fold_left_out_is_recorded_and_shows_in_the_graph(tmp_path, tiny_model, tiny_onnx_fp32):
    spec = ExportSpec(DeploySpec("fp32", 32, leave_out=("blocked",)), batch=FP32.batch)
    artifact = export_onnx(tiny_model, tiny_onnx_fp32.manifest.model, spec, tmp_path)
    facts = artifact.manifest.facts.operators
    assert (list(artifact.manifest.deploy.leave_out), facts["ReduceSum"], facts.get("AveragePool")) == (
        ["blocked"],
        5,
        None,
    )


@pytest.mark.slow
def test_a_file_of_an_earlier_form_is_not_taken_for_a_new_one(tmp_path, tiny_model, tiny_onnx_fp32, monkeypatch):
    export_onnx(tiny_model, tiny_onnx_fp32.manifest.model, FP32, tmp_path)
    monkeypatch.setattr("cnx_deploy.exporters.onnx.FORM", FORM + 1)
    with pytest.raises(OutputExistsError, match="--force"):
        export_onnx(tiny_model, tiny_onnx_fp32.manifest.model, FP32, tmp_path)
