"""An artifact is judged against the weights its manifest names; altered bytes and records are found before that."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from cnx_deploy.api import (
    BuildRequest,
    ExportRequest,
    VerifyRequest,
    run_builds,
    run_exports,
    run_verifications,
)
from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError, ParityError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import InputSpec
from cnx_deploy.model.checkpoint import hash_weights, save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.recorded import model_record, recorded_model
from cnx_deploy.runners.registry import open_runner
from cnx_deploy.verification.metrics import Verification
from cnx_deploy.verification.verify import Reference, verify_artifact, verify_export
from tests.support.artifacts import copy_artifact

REQUEST = ExportRequest(
    variant="tiny-test", num_classes=10, image_size=32, batch=(1, 4, 8), precisions=("fp32", "fp16")
)  # fmt: skip
"""What the shared artifacts were asked for with."""


def quiet(line: str) -> None:
    return None


@pytest.fixture(scope="module")
def exports(tiny_onnx_fp32, tiny_onnx_fp16) -> tuple[Artifact, Artifact]:
    """The smallest network at 32 px with ten classes, random weights of seed 0: FP32 and FP16."""
    return tiny_onnx_fp32, tiny_onnx_fp16


@pytest.fixture(scope="module")
def reference(exports) -> Reference:
    return Reference(exports[0], samples=18)


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int]]:
    """What `verified` told its progress callback."""
    return []


@pytest.fixture(scope="module")
def verified(exports, reference, told) -> tuple[Verification, Verification]:
    """Both exports judged against one reference, FP32 first."""
    fp32, fp16 = (verify_artifact(artifact, reference, lambda *item: told.append(item)) for artifact in exports)
    return fp32, fp16


@pytest.fixture
def copied(exports, tmp_path) -> Artifact:
    """A copy of the FP32 export, free to be changed."""
    return copy_artifact(exports[0], tmp_path)


def with_manifest(artifact: Artifact, change) -> Artifact:
    """Rewrite the manifest after `change` was applied to its JSON, and read it again."""
    path = artifact.path.with_suffix(".json")
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return open_artifact(path)


def with_bytes(artifact: Artifact, content: bytes) -> Artifact:
    """Replace the file and make the manifest agree: a file that is whole, but another network."""
    artifact.path.write_bytes(content)

    def change(data):
        data["files"][0].update(size_bytes=len(content), sha256=sha256_of_file(artifact.path))

    return with_manifest(artifact, change)


def without_grn_gain(path: Path) -> bytes:
    """The graph with every GRN gamma set to zero."""
    model = onnx.load(path)
    changed = 0
    for tensor in model.graph.initializer:
        if tensor.name.endswith("grn.affine.weight"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 0, tensor.name))
            changed += 1
    assert changed == 5  # blocks
    return model.SerializeToString()


# What verifies


def test_exports_verify_on_onnx_runtime_and_fp16_in_half_arithmetic_too(verified):
    rows = [[(result.candidate, result.gate.name) for result in entry.results] for entry in verified]
    assert rows == [[("onnxruntime fp32", "fp32")], [("onnxruntime fp16", "fp16"), ("emulator fp16", "fp16")]]
    assert [(entry.passed, len(entry.notes)) for entry in verified] == [(True, 0), (True, 1)]
    assert verified[0].results[0].batches == (1, 2, 7, 8)
    assert json.loads(json.dumps(verified[0].to_dict()))["passed"]


def test_the_reference_is_computed_once_for_both_precisions(verified, told):
    assert sum(images for what, images in told if what.startswith("PyTorch reference")) == 18


def test_at_least_the_samples_asked_for_are_compared_or_all_of_a_folder(exports, tmp_path):
    for index in range(3):
        Image.new("RGB", (40, 40), (80 * index, 90, 200)).save(tmp_path / f"{index}.png")
    for data, samples in ((None, 18), (tmp_path, 3)):
        found = verify_artifact(exports[0], Reference(exports[0], data, samples))
        assert (found.passed, found.results[0].differences.samples) == (True, samples)


def test_a_reference_matches_the_other_precision_but_no_other_weights_or_size(exports, reference):
    record = exports[0].manifest.model

    def changed(**values):
        return replace(exports[0], manifest=replace(exports[0].manifest, model=replace(record, **values)))

    others = (exports[1], changed(image_size=64), changed(weights=replace(record.weights, sha256="b" * 64)))
    assert [reference.matches(other) for other in others] == [True, False, False]


def test_everything_recorded_in_a_folder_is_verified(tiny_project):
    request = VerifyRequest(export_dir=tiny_project / "export", engines_dir=tiny_project / "none", samples=3)
    found = run_verifications(request, quiet)
    assert sorted((item.artifact, item.passed) for item in found) == [
        ("tiny-test-32-fp16.onnx", True),
        ("tiny-test-32-fp32.onnx", True),
    ]


# What does not


def test_a_network_without_grn_gain_does_not_verify(copied, reference):
    broken = with_bytes(copied, without_grn_gain(copied.path))
    found = verify_artifact(broken, reference)
    assert (found.passed, "relative L2" in found.results[0].failures[0]) == (False, True)


def test_the_check_before_an_export_is_kept_raises_on_a_broken_network(copied):
    broken = with_bytes(copied, without_grn_gain(copied.path))
    with pytest.raises(ParityError, match="was not written"):
        verify_export(broken, recorded_model(broken).model)


def test_the_check_before_an_export_is_kept_records_batches_of_one_and_two(exports):
    assert [export.manifest.facts.worst_parity.batches for export in exports] == [(1, 2), (1, 2)]
    assert exports[1].manifest.facts.worst_parity.candidate == "emulator fp16"


def test_a_flipped_byte_is_found_before_a_runner_reads_the_file(copied, reference):
    content = bytearray(copied.path.read_bytes())
    content[0] ^= 1
    copied.path.write_bytes(content)
    for read in (lambda: verify_artifact(copied, reference), lambda: open_runner(copied)):
        with pytest.raises(CorruptArtifactError, match="was altered"):
            read()


def test_a_file_that_is_whole_but_no_onnx_is_corrupt(copied, reference):
    broken = with_bytes(copied, b"garbage, not protobuf")
    with pytest.raises(CorruptArtifactError, match="not a valid ONNX file"):
        verify_artifact(broken, reference)


# The weights a manifest names


def test_the_recorded_model_has_the_recorded_weights(exports):
    loaded = recorded_model(exports[0])
    assert hash_weights(loaded.model) == exports[0].manifest.model.weights.sha256


def test_a_changed_seed_in_the_manifest_is_corrupt(copied):
    changed = with_manifest(copied, lambda data: data["model"]["weights"].update(reference="1"))
    with pytest.raises(CorruptArtifactError, match=r"weights behind .* \(random 1\) have changed"):
        recorded_model(changed)


@pytest.fixture
def from_checkpoint(copied, tmp_path) -> Artifact:
    """The copy as if it had been made from a checkpoint in the folder beside its own."""
    (tmp_path / "runs").mkdir()
    save_checkpoint(tmp_path / "runs" / "best.safetensors", random_model("tiny-test", 10, seed=0))
    (tmp_path / "export").mkdir()
    for suffix in (".onnx", ".json"):
        copied.path.with_suffix(suffix).rename(tmp_path / "export" / copied.path.with_suffix(suffix).name)
    weights = {"origin": "checkpoint", "reference": "../runs/best.safetensors"}
    inside = replace(copied, path=tmp_path / "export" / copied.path.name)
    return with_manifest(inside, lambda data: data["model"]["weights"].update(weights))


def test_a_checkpoint_is_found_relative_to_the_manifest(from_checkpoint, monkeypatch):
    monkeypatch.chdir("/")
    assert hash_weights(recorded_model(from_checkpoint).model) == from_checkpoint.manifest.source_sha256


def test_a_record_names_the_checkpoint_relative_to_the_manifests_folder(from_checkpoint, tmp_path):
    loaded = recorded_model(from_checkpoint)
    record = model_record(loaded, Preprocessing(image_size=64), tmp_path / "engines")
    assert (record.weights.origin, record.weights.reference, record.image_size) == (
        "checkpoint",
        "../runs/best.safetensors",
        64,
    )


def test_another_checkpoint_at_the_recorded_path_is_corrupt(from_checkpoint, tmp_path):
    (tmp_path / "runs" / "best.safetensors").unlink()
    save_checkpoint(tmp_path / "runs" / "best.safetensors", random_model("tiny-test", 10, seed=4))
    with pytest.raises(CorruptArtifactError, match="have changed"):
        recorded_model(from_checkpoint)


def test_a_checkpoint_that_is_gone_is_an_input_error(from_checkpoint, tmp_path):
    (tmp_path / "runs" / "best.safetensors").unlink()
    with pytest.raises(InputError, match="which is not there"):
        recorded_model(from_checkpoint)


@pytest.mark.slow
def test_a_head_drawn_anew_at_export_is_drawn_the_same_for_the_reference(tmp_path):
    save_checkpoint(tmp_path / "two.safetensors", random_model("tiny-test", 2, seed=0))
    words = {"checkpoint": tmp_path / "two.safetensors", "num_classes": 5, "reset_head": True}
    told: list[str] = []
    request = replace(REQUEST, **words, precisions=("fp32",), no_verify=True, output_dir=tmp_path / "export")
    (artifact,) = run_exports(request, told.append)
    assert recorded_model(artifact).model.num_classes == 5
    assert any("new head for 5 classes, drawn at random" in text for text in told)


@pytest.mark.slow
def test_an_engine_of_an_earlier_export_is_said_to_be_outdated(tmp_path):
    request = replace(REQUEST, precisions=("fp16",), no_verify=True, output_dir=tmp_path / "export")
    run_exports(request, quiet)
    folders = {"export_dir": tmp_path / "export", "engines_dir": tmp_path / "engines"}
    build = BuildRequest(export_dir=tmp_path / "export", output_dir=tmp_path / "engines", targets=("sm89",))
    run_builds(build, quiet)

    def notes() -> list[str]:
        found = run_verifications(VerifyRequest(**folders, samples=1), quiet)
        return [note for entry in found if entry.kind == "engine" for note in entry.notes]

    assert notes() == []
    run_exports(replace(request, seed=1, force=True), quiet)
    stem = "tiny-test-32-fp16"
    assert notes() == [
        f"{stem}-rtx-sm89.engine was built from an earlier {stem}.onnx: build it again with --force."
    ]  # fmt: skip


# The batches of a reference


def test_a_reference_gives_the_checked_sizes_in_the_runners_layout_with_logits_for_each_image(exports):
    deploy = replace(exports[0].manifest.deploy, input_kind="uint8")
    pairs = list(Reference(exports[0], samples=10).batches(deploy, InputSpec("uint8", 32, 2, 4)))
    assert [(len(batch.images), len(batch), len(outputs["logits"])) for batch, outputs in pairs] == [
        (2, 2, 2),
        (4, 4, 4),
        (4, 4, 4),
    ]
    assert pairs[0][0].images.dtype == torch.uint8


def test_fewer_images_than_a_fixed_batch_are_filled_up_for_the_candidate_and_for_polygraphy(exports, tmp_path):
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "one.png")
    manifest = exports[0].manifest
    fixed = replace(exports[0], manifest=replace(manifest, request=replace(manifest.request, batch=(4, 4, 4))))
    ((images, outputs),) = Reference(exports[0], tmp_path).pairs(fixed)
    logits = outputs["logits"]
    assert (images.shape, logits.shape) == ((4, 3, 32, 32), (4, 10))
    assert torch.equal(logits, logits[:1].expand(4, -1))


# Exports in a row


def test_the_same_exports_again_are_reused_and_another_seed_is_refused_and_both_are_said(exports, tmp_path):
    for artifact in exports:
        copy_artifact(artifact, tmp_path)
    said: list[str] = []
    again = replace(REQUEST, output_dir=tmp_path)
    found = run_exports(again, said.append)
    reused = [line for line in said if line.endswith("reused")]
    assert ([artifact.sha256 for artifact in found], len(reused)) == ([artifact.sha256 for artifact in exports], 2)
    assert "weights are random (seed 0)" in said[0]
    with pytest.raises(OutputExistsError):
        run_exports(replace(again, seed=1), quiet)
