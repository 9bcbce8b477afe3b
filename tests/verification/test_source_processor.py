"""The images of an artifact beside those of the library that its weights come from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import ConvNextImageProcessorPil, ConvNextV2Config, ConvNextV2ForImageClassification

import cnx_deploy as cnx
from cnx_deploy.api import ExportRequest
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.variants import find_variant
from cnx_deploy.model.recorded import model_record
from cnx_deploy.verification.saved_results import judge_saved
from cnx_deploy.verification.source_processor import compare_with_source
from tests.support.foreign_models import randomise, timm_model

NAMES = ["cat", "dog", "Küche"]


@pytest.fixture(scope="module")
def transformers_onnx(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    labels = dict(enumerate(NAMES))
    config = ConvNextV2Config(
        depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 32, 64], id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    randomise(ConvNextV2ForImageClassification(config)).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.9, image_mean=[0.5] * 3).save_pretrained(folder)
    words = {"precision": "fp32", "batch": (2, 2, 2), "output_dir": folder / "export"}
    return cnx.export("tiny-test", checkpoint=folder, **words).path


def changed(onnx: Path, **fields: object) -> Path:
    """The same file whose manifest says something else of its images."""
    manifest = onnx.with_suffix(".json")
    content = json.loads(manifest.read_text())
    content["model"]["preprocessing"] |= fields
    manifest.write_text(json.dumps(content))
    return onnx


def named(onnx: Path, folder: Path, stem: str) -> Path:
    """A copy under another name, made from the same checkpoint."""
    folder.mkdir(exist_ok=True)
    made = open_artifact(onnx)
    record = made.manifest.model_seen_from(folder, onnx.parent)
    files = (replace(made.manifest.files[0], name=f"{stem}.onnx"),)
    shutil.copy(onnx, folder / f"{stem}.onnx")
    (folder / f"{stem}.json").write_text(replace(made.manifest, stem=stem, files=files, model=record).to_json())
    return folder / f"{stem}.onnx"


def test_verify_runs_the_processor_of_transformers_and_says_so(transformers_onnx):
    report = cnx.verify(transformers_onnx, samples=2)
    assert report.passed
    assert "agrees with transformers' preprocessor_config.json" in str(report)


@pytest.mark.parametrize(
    "fields", [{"mean": [0.485, 0.456, 0.406]}, {"crop_ratio": 0.875}, {"crop_mode": "squash"},
               {"interpolation": "bilinear"}, {"std": [0.4, 0.5, 0.5]}]
)  # fmt: skip
def test_images_that_are_made_otherwise_fail(transformers_onnx, tmp_path, fields):
    before = transformers_onnx.with_suffix(".json").read_text()
    try:
        report = cnx.verify(changed(transformers_onnx, **fields), samples=2)
    finally:
        transformers_onnx.with_suffix(".json").write_text(before)
    assert not report.passed
    assert "is not that of transformers' preprocessor_config.json" in str(report)


def test_a_folder_of_timm_is_compared_with_timms_own_transform(transformers_onnx, tmp_path):
    torch.save(randomise(timm_model(find_variant("tiny-test"), 3)).state_dict(), tmp_path / "pytorch_model.bin")
    images = {"crop_mode": "border", "input_size": [3, 64, 64], "mean": [0.3, 0.4, 0.5]}
    config = {"architecture": "convnextv2_atto", "label_names": NAMES, "pretrained_cfg": images}
    (tmp_path / "config.json").write_text(json.dumps(config))
    record = model_record(*ExportRequest(variant="tiny-test", checkpoint=tmp_path).load(print), tmp_path / "export")
    assert record.class_names == tuple(NAMES)
    made = open_artifact(transformers_onnx)
    (tmp_path / "export").mkdir()
    onnx = Artifact(tmp_path / "export" / made.path.name, replace(made.manifest, model=record))
    assert "agrees with timm's config.json" in str(compare_with_source(onnx))


def test_a_configuration_that_is_gone_is_not_taken_for_the_librarys_defaults(transformers_onnx):
    written = transformers_onnx.parents[1] / "preprocessor_config.json"
    content = written.read_bytes()
    written.unlink()
    try:
        assert "not beside the weights any more" in str(compare_with_source(open_artifact(transformers_onnx)))
    finally:
        written.write_bytes(content)


def test_what_an_option_gave_is_not_compared_and_it_is_said(transformers_onnx):
    onnx = open_artifact(transformers_onnx)
    record = replace(onnx.manifest.model, origins={**onnx.manifest.model.origins, "mean": "option"})
    told = compare_with_source(replace(onnx, manifest=replace(onnx.manifest, model=record)))
    assert told is not None
    assert told.passed
    assert "mean came from elsewhere" in str(told)


@pytest.mark.parametrize("config", [{"architecture": "resnet50"}, {"model_type": "vit"}, {"architecture": None}])
def test_a_configuration_that_was_not_read_is_not_compared(transformers_onnx, tmp_path, config):
    onnx = open_artifact(transformers_onnx)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = replace(onnx.manifest.model.weights, reference=str(tmp_path / "model.safetensors"))
    record = replace(
        onnx.manifest.model, weights=weights, origins=dict.fromkeys(onnx.manifest.model.origins, "assumed")
    )
    assert compare_with_source(replace(onnx, manifest=replace(onnx.manifest, model=record))) is None


def test_the_check_of_an_artifact_is_its_own_and_is_saved_with_its_outputs(transformers_onnx, tmp_path):
    right, wrong = (named(transformers_onnx, tmp_path / "copies", name) for name in ("a-right", "z-wrong"))
    changed(wrong, mean=[0.1, 0.2, 0.3])
    report = cnx.verify([right, wrong], samples=2, save_outputs=tmp_path / "saved")
    assert [entry.passed for entry in report.results] == [True, False]
    assert [entry.passed for entry in judge_saved(tmp_path / "saved")] == [True, False]


def test_no_class_that_a_file_names_is_made_but_an_image_processor(transformers_onnx):
    folder = transformers_onnx.parents[1]
    before = (folder / "preprocessor_config.json").read_text()
    try:
        for name in ("AutoModel", "ConvNextV2Model"):
            (folder / "preprocessor_config.json").write_text(
                json.dumps({**json.loads(before), "image_processor_type": name})
            )
            told = str(compare_with_source(open_artifact(transformers_onnx)))
            assert ("the library does not read it" in told) == (name == "AutoModel"), told
    finally:
        (folder / "preprocessor_config.json").write_text(before)


def test_an_export_prints_what_it_assumes_and_records_it(tmp_path, transformers_onnx):
    """What is said and recorded of an export, which itself takes seconds."""
    path, told = tmp_path / "model.safetensors", list[str]()
    path.write_bytes((transformers_onnx.parents[1] / "model.safetensors").read_bytes())
    request = ExportRequest(variant="tiny-test", checkpoint=path, mean=0.5, image_size=64)
    origins = model_record(*request.load(told.append), tmp_path).origins
    assert (origins["mean"], origins["std"], origins["image_size"]) == ("option", "assumed", "option")
    (assumed,) = (text for text in told if text.startswith("Assumed"))
    assert "std (0.229, 0.224, 0.225)" in assumed
    assert "mean" not in assumed
