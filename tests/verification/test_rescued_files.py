"""A rescued file in the stages that follow: verify, bench, predict, eval, build-trt and the records."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import cnx_deploy as cnx
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.data import image_like_batches
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.recorded import recorded_outputs
from cnx_deploy.verification import originals
from tests.support.foreign_files import SIZE, exported, network

IMAGES = {"mean": 0.4, "std": (0.2, 0.25, 0.3), "crop_ratio": 1.0, "crop_mode": "center", "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def project(tiny_variant, tmp_path_factory) -> Path:
    """A folder with timm's network exported in half, and rescued twice: as values, and as a classifier of images."""
    root = tmp_path_factory.mktemp("rescued")
    exported(network("timm", tiny_variant), root / "timm.onnx", opset=18, half=False)
    words = {"output_dir": root / "export", "batch": (1, 4, 8)}
    cnx.rescue(root / "timm.onnx", name="values", **words)
    names = [f"class {at}" for at in range(10)]
    cnx.rescue(root / "timm.onnx", name="classes", class_names=names, **words, **IMAGES)
    return root


def artifact(project: Path, name: str = "classes") -> cnx.Artifact:
    return open_artifact(project / "export" / f"{name}-{SIZE}-fp16.onnx")


def test_the_manifest_says_where_the_file_is_from_and_what_nobody_said(project) -> None:
    values, classes = artifact(project, "values").manifest, artifact(project).manifest
    record = values.model
    assert (record.variant, record.task, record.weights.origin, record.weights.reference) == (
        "foreign", "foreign", "onnx", "../timm.onnx"
    )  # fmt: skip
    assert set(record.origins.values()) == {"assumed"}
    assert list(record.graph.outputs) == ["answer"]
    assert values.deploy.input_kind == "normalised"
    assert set(classes.model.origins.values()) == {"option"}
    assert (classes.model.task, classes.model.num_classes) == ("classification", 10)
    assert [(spec.name, spec.activation) for spec in recorded_outputs(artifact(project))] == [("logits", "softmax")]
    assert classes.facts.parity[0].passed


def test_verify_compares_with_the_original_file(project, cnx, monkeypatch) -> None:
    monkeypatch.chdir(project)
    files = [f"export/{name}-64-fp16.onnx" for name in ("values", "classes")]
    code, out, err = cnx("verify", *files, "--samples", "4", "--json")
    assert code == 0, err
    results = [row for found in json.loads(out)["verifications"] for row in found["results"]]
    assert {row["reference"] for row in results} == {"the original in FP32 (ONNX Runtime)"}
    assert {row["candidate"] for row in results} == {"onnxruntime fp16", "emulator fp16"}
    assert {row["output"] for row in results} == {"answer", "logits"}


def test_verify_sees_another_network_in_a_rescued_file(project, tmp_path: Path, tiny_variant, monkeypatch) -> None:
    """The original is changed: refused by its hash; its reference is wrong: the gate fails."""
    work = tmp_path / "work"
    work.mkdir()
    exported(network("timm", tiny_variant), work / "timm.onnx", opset=18)
    rescued = cnx.rescue(work / "timm.onnx", output_dir=work / "export", batch=(1, 2, 2))
    model = onnx.load(work / "timm.onnx")
    weight = next(each for each in model.graph.initializer if each.name == "head.fc.weight")  # what no norm undoes
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(1.1)).tobytes()
    onnx.save(model, work / "timm.onnx")
    with pytest.raises(CorruptArtifactError, match="has changed"):
        cnx.verify(rescued.path, samples=2)
    monkeypatch.setattr(originals, "hash_onnx", lambda path, outside: rescued.artifact.manifest.model.weights.sha256)
    assert not cnx.verify(rescued.path, samples=2).passed


def test_predict_answers_as_the_network_in_pytorch_does(project, tiny_variant, tmp_path: Path) -> None:
    pixels = next(image_like_batches(2, SIZE, batch_size=2))
    for at, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(tmp_path / f"{at}.png")
    found = cnx.predict(artifact(project), [tmp_path / "0.png", tmp_path / "1.png"], top=10)
    with torch.inference_mode():
        expected = network("timm", tiny_variant)(normalise(pixels, artifact(project).manifest.model.preprocessing))
    for row, logits in zip(found, expected.softmax(dim=1), strict=True):
        for score in row.scores:
            assert score.probability == pytest.approx(float(logits[score.index]), abs=5e-3)


def test_predict_without_preprocessing_is_refused_and_names_what_is_missing(project) -> None:
    with pytest.raises(
        InputError, match=r"mean, std are not known.*--crop-mode, --crop-ratio, --interpolation, --mean, --std"
    ):
        cnx.load(artifact(project, "values"))


@pytest.mark.slow
def test_bench_times_it_and_refuses_peers_of_a_network_that_is_not_in_pytorch(project, cnx, quick_timing) -> None:
    file = project / "export" / "values-64-fp16.onnx"
    code, out, err = cnx("bench", file, "--batch", "1", "--duration", "0.1", "--threads", "1", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["rows"][0]["status"] != "INVALID"
    (facts,) = record["networks"].values()
    assert (facts["variant"], facts["parameters"]) == ("foreign", None)
    code, _, err = cnx("bench", file, "--compare", "torch", "--duration", "0.1", "--threads", "1")
    assert code == 2
    assert "no PyTorch network" in err


@pytest.mark.slow
def test_an_engine_is_built_from_it_and_its_records_hold(project, cnx, monkeypatch) -> None:
    monkeypatch.chdir(project)
    code, _, err = cnx("build-trt", "export/classes-64-fp16.onnx", "--target", "sm89", "--runtime", "tensorrt-rtx")
    assert code == 0, err
    engine = open_artifact(next((project / "engines").glob("*.engine")))
    assert engine.manifest.facts.half_share_of_products == 1.0
    assert engine.manifest.model.graph is not None
    assert [spec.name for spec in recorded_outputs(engine)] == ["logits"]
    code, out, err = cnx("verify", "records")
    assert code == 0, out + err
    assert "made from" in out
    content = (project / "timm.onnx").read_bytes()
    (project / "timm.onnx").write_bytes(content.replace(b"answer", b"Answer"))
    code, out, _ = cnx("verify", "records")
    assert (code, "timm.onnx has the hash" in out) == (4, True)
    (project / "timm.onnx").write_bytes(content)


def test_sides_and_sequences_that_no_manifest_can_record_are_told(tiny_variant, tmp_path: Path) -> None:
    shape = (2, 20, 40)
    path = exported(network("text", tiny_variant), tmp_path / "text.onnx", shape=shape)
    found = cnx.rescue(path, output_dir=tmp_path / "out")
    assert found.islands == {"GRN": 2, "LayerNorm": 2}
    assert found.artifact is None
    assert "take images" in str(found)
    assert found.fp16[0].passed
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.slow
def test_a_tagger_s_output_is_judged_label_by_label(project) -> None:
    found = cnx.rescue(
        project / "timm.onnx", output_dir=project / "export", name="labels", task="multi-label", output="logits"
    )
    (spec,) = recorded_outputs(found.artifact)
    assert (spec.name, spec.activation) == ("logits", "sigmoid")
    (result, *_) = cnx.verify(found.path, samples=2, backends=("onnxruntime",)).results[0].results
    assert result.passed
    assert result.differences.top1_agreement == 1.0
    with pytest.raises(InputError, match="expected one output"):
        cnx.rescue(project / "timm.onnx", output_dir=project / "other", task="multi-label", output="maps")


def test_a_task_that_does_not_fit_the_outputs_is_refused(project) -> None:
    with pytest.raises(InputError, match="No task is called"):
        cnx.rescue(project / "timm.onnx", output_dir=project / "other", task="nothing")
    with pytest.raises(InputError, match="class names"):
        cnx.rescue(project / "timm.onnx", output_dir=project / "other", class_names=["a", "b"])
