"""Segmentation from a file: one file of two precisions on a canvas that is not square, through every runner here."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

import cnx_deploy
from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.image_size import size_text
from cnx_deploy.core.manifest import FileRecord, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.checkpoint import hash_weights
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.verification.maps import MapResult
from cnx_deploy.verification.parity import differences
from tests.conftest import TINY_TEST, Command
from tests.support.upernet import transformers_upernet

CANVAS, OPTIONS = (64, 96), {"channels": 16, "auxiliary_channels": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[cnx_deploy.Artifact]:
    return cnx_deploy.export(
        TINY_TEST.name, precision=("fp32", "fp16"), task="segment", task_options=OPTIONS, num_classes=5,
        image_size=CANVAS, crop_ratio=1.0, batch=(1, 2, 7), outputs=("logits", "labels"),
        output_dir=tmp_path_factory.mktemp("files"),
    )  # fmt: skip


def test_the_manifest_names_outputs_with_shapes_and_units_and_the_options_of_the_task(files):
    for artifact in files:
        manifest = open_artifact(artifact.path).manifest
        outputs = {name: (spec.type, spec.shape, spec.unit) for name, spec in manifest.facts.outputs.items()}
        assert outputs == {
            "logits": ("FLOAT", ("batch", 5, 16, 24), "logit"),
            "labels": ("INT64", ("batch", 64, 96), "class"),
        }
        assert (manifest.model.task, manifest.model.task_config) == ("segment", OPTIONS)
        assert manifest.stem == f"{TINY_TEST.name}-segment-{size_text(CANVAS)}-{manifest.precision.name}"


def test_verify_compares_both_outputs_at_batches_of_1_2_and_7(files):
    for artifact, runners in zip(files, (("onnxruntime",), ("onnxruntime", "emulator")), strict=True):
        (result,) = cnx_deploy.verify([artifact]).results
        assert result.passed
        assert {one.output for one in result.results} == {"logits", "labels"}
        assert all(set(one.batches) >= {1, 2, 7} for one in result.results)
        assert len(result.results) == 2 * len(runners)
        if artifact.manifest.precision.name == "fp32":
            logits = next(one.differences for one in result.results if one.output == "logits")
            assert (logits.flips, logits.top1_agreement) == (0, 1.0)


def test_a_fault_in_the_labels_or_the_logits_is_found(files, tmp_path):
    """Negative controls: the classifier's bias of one class, and the resize of the labels."""
    fp32 = files[0]
    for fault in ("conv_seg.bias", "cubic"):
        folder = tmp_path / fault
        shutil.copytree(fp32.path.parent, folder)
        model = onnx.load(folder / fp32.path.name)
        if fault == "cubic":
            resize = [node for node in model.graph.node if node.op_type == "Resize"][-1]
            next(entry for entry in resize.attribute if entry.name == "mode").s = b"cubic"
        else:
            bias = next(each for each in model.graph.initializer if each.name.endswith(fault))
            array = numpy_helper.to_array(bias).copy()
            array[0] += 0.5
            bias.CopyFrom(numpy_helper.from_array(array, bias.name))
        onnx.save(model, folder / fp32.path.name)
        manifest = fp32.manifest
        record = FileRecord(
            fp32.path.name, (folder / fp32.path.name).stat().st_size, sha256_of_file(folder / fp32.path.name)
        )
        (folder / f"{manifest.stem}.json").write_text(dataclasses.replace(manifest, files=(record,)).to_json())
        (report,) = cnx_deploy.verify([folder / fp32.path.name]).results
        failed = {result.output for result in report.results if not result.passed}
        assert failed == ({"labels"} if fault == "cubic" else {"logits", "labels"})


def test_verify_on_masks_gives_the_mean_iou_of_both_sides(files, tmp_path):
    with cnx_deploy.load(files[0].path) as model:
        for at, pixels in enumerate(next(image_like_batches(3, CANVAS, batch_size=3)).numpy()):
            for folder in ("images", "masks"):
                (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{at}.png")
            labels = model.outputs(pixels)["labels"][0].numpy().astype(np.uint8)
            labels[:16, :16] = (labels[:16, :16] + 1) % 5  # so that neither side is right everywhere
            Image.fromarray(labels).save(tmp_path / "data" / "masks" / f"{at}.png")
    (report,) = cnx_deploy.verify([files[1].path], data=tmp_path / "data").results
    masks = [result for result in report.results if isinstance(result, MapResult)]
    assert [result.candidate for result in masks] == ["onnxruntime fp16", "emulator fp16"]
    for result in masks:
        assert (result.images, result.pixels) == (3, 3 * 64 * 96)
        assert 0.5 < result.reference_mean_iou < 0.99
        assert result.changed <= 0.01 * result.pixels  # of random weights many pixels are near a tie
        assert result.passed is (abs(result.iou_change) <= 1e-3)


def test_every_layer_is_compared_also_the_norms_that_the_exporter_merges(cnx: Command, files):
    code, out, err = cnx("diagnose", "layers", files[1].path)
    assert code == 0, err
    assert "no backend diverges\n" in out
    assert "not lined up" not in out + err


@pytest.mark.slow
@pytest.mark.parametrize("kept", [("stages.1.0",), ("stages.1.0", "downsample_layers.2")], ids=str)
def test_a_stage_in_fp32_before_a_downsampling_in_half_has_two_norms(kept, tmp_path):
    words = {"task": "segment", "task_options": OPTIONS, "num_classes": 5, "image_size": CANVAS, "crop_ratio": 1.0}
    (file,) = cnx_deploy.export(
        TINY_TEST.name, precision=("fp16",), keep_fp32=kept, output_dir=tmp_path, batch=(1, 1, 1), **words
    )
    assert {result.passed for result in file.manifest.facts.parity} == {True}


@pytest.mark.slow
@pytest.mark.parametrize("canvas", [(512, 512), (800, 1344)])
def test_plain_half_is_nan_at_dense_sizes_where_the_file_with_islands_passes(tmp_path, canvas):
    """GRN's sum of squares leaves FP16 with ordinary weights (facebookresearch/ConvNeXt-V2 issue 66)."""
    network = random_model("atto", 5, task=find_task("segment").configured(OPTIONS))
    spec = DeploySpec("fp16", canvas)
    images = runner_input(next(image_like_batches(1, canvas, batch_size=1)), "float")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    with torch.inference_mode():
        expected = network((images - mean) / std)

    naive = tmp_path / "naive.onnx"
    theirs = transformers_upernet(network).half()
    torch.onnx.export(theirs, (torch.zeros(1, 3, *canvas).half(),), naive, dynamo=True, opset_version=20, verbose=False)
    tensors = Graph(naive).evaluate(((images - mean) / std).half()).tensors
    assert not any(bool(torch.isfinite(tensor).any()) for tensor in tensors.values())

    record = ModelRecord(
        variant="atto", num_classes=5, image_size=canvas, preprocessing=Preprocessing(canvas), task="segment",
        weights=WeightsRecord("random", "0", hash_weights(network), "none"), task_config=OPTIONS,
    )  # fmt: skip
    artifact = export_onnx(network, record, ExportSpec(spec, batch=(1, 1, 1)), tmp_path)
    ours = EmulatedRunner(artifact.path).run(images)["logits"]
    failures = network.task.gate(GATES["fp16"]).failures(differences(ours, expected, network.task.outputs(5)[0]))
    assert failures == ()
