"""One loader for every artifact, and what becomes of good and bad image files."""

import dataclasses
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import (
    CheckFailedError,
    CorruptArtifactError,
    InputError,
    MissingRequirementError,
    RefusedArtifactError,
)
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import find_gpus, package_version
from cnx_deploy.data import ImageFiles, image_like_batches, load_image
from cnx_deploy.data.preprocessing import normalise, to_pixels
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.checkpoint import LoadedModel, WeightsRecord, hash_weights, save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.recorded import model_record
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.predict import Model, find_image_files, open_predictor, predict_images
from tests.support.artifacts import copy_artifact

NAMES = ("cat", "dog", "owl", "ant", "bee", "elk")
PREPROCESSING = Preprocessing(64, crop_ratio=0.9, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def atto():
    return random_model("atto", len(NAMES), seed=3)


@pytest.fixture(scope="module")
def tiny(tiny_variant):
    return random_model(tiny_variant, len(NAMES), seed=3)


@pytest.fixture(scope="module")
def checkpoint(atto, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "best.safetensors"
    return save_checkpoint(path, atto, class_names=NAMES, preprocessing=PREPROCESSING)


def exported_to(folder, model, **changes):
    """An ONNX artifact of `model`, said to have random weights of seed 3."""
    weights = WeightsRecord("random", "3", hash_weights(model), "none")
    record = model_record(LoadedModel(model, weights, NAMES), PREPROCESSING, folder)
    deploy = DeploySpec(image_size=64, mean=PREPROCESSING.mean, std=PREPROCESSING.std, **changes.pop("deploy", {}))
    return export_onnx(model, record, ExportSpec(deploy, **changes), folder)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    return exported_to(tmp_path_factory.mktemp("export"), tiny, batch=(1, 2, 4))


@pytest.fixture
def onnx_copy(exported, tmp_path):
    """The ONNX file and its manifest in a folder that a test may spoil."""
    return copy_artifact(exported, tmp_path).path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images of 80×80 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    for index, image in enumerate(image_like_batches(5, 80, batch_size=1)):
        Image.fromarray(image[0].numpy()).save(folder / f"{index}.png")
    return folder


def answers(path: Path, photos: Path, **options):
    with open_predictor(path) as predictor:
        return list(predict_images(predictor, find_image_files([photos]), **options))


def probabilities(predictions) -> torch.Tensor:
    """(N, classes) by class index."""
    rows = [{score.index: score.probability for score in each.scores} for each in predictions]
    return torch.tensor([[row[index] for index in sorted(row)] for row in rows], dtype=torch.float64)


def expected_probabilities(model, photos) -> torch.Tensor:
    """The training form on pixels normalised by the recorded preprocessing, without the code under test."""
    pixels = torch.stack([to_pixels(load_image(path), PREPROCESSING) for path in sorted(photos.iterdir())])
    with torch.inference_mode():
        return model(normalise(pixels, PREPROCESSING)).double().softmax(dim=1)


def test_a_checkpoint_is_run_with_its_own_preprocessing_and_class_names(atto, checkpoint, photos):
    found = answers(checkpoint, photos, top=6)
    expected = expected_probabilities(atto, photos)
    torch.testing.assert_close(probabilities(found), expected, rtol=1e-4, atol=1e-6)
    assert [each.scores[0].name for each in found] == [NAMES[index] for index in expected.argmax(dim=1)]


def test_an_onnx_file_gives_the_answers_of_its_training_form(tiny, exported, photos):
    found = answers(exported.path, photos, top=6)
    torch.testing.assert_close(probabilities(found), expected_probabilities(tiny, photos), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_an_onnx_file_of_ours_without_its_manifest_gives_the_same_answers_and_says_what_is_missing(
    exported, onnx_copy, photos
):
    onnx_copy.with_suffix(".json").unlink()
    assert answers(onnx_copy, photos) == answers(exported.path, photos)
    notes = " ".join(open_predictor(onnx_copy).notes)
    assert "No manifest" in notes
    assert "random" in notes
    assert "random (seed 3)" in open_predictor(exported.path).notes[0]


@pytest.mark.slow
def test_a_fixed_batch_is_filled_up_and_the_copies_give_no_answers(tiny, photos, tmp_path):
    artifact = exported_to(tmp_path, tiny, batch=(4, 4, 4), deploy={"input_kind": "uint8"})
    found = answers(artifact.path, photos, top=6)
    assert len(found) == 5
    torch.testing.assert_close(probabilities(found), expected_probabilities(tiny, photos), rtol=1e-3, atol=1e-5)


def test_scores_fall_and_are_as_many_as_asked_for_and_no_more_than_classes(checkpoint, photos):
    for asked, got in ((2, 2), (99, 6)):
        scores = [score.probability for score in answers(checkpoint, photos, top=asked)[0].scores]
        assert len(scores) == got
        assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1.0, abs=1e-9)


def test_the_batch_size_changes_no_answer(exported, photos):
    alone, together = answers(exported.path, photos, batch_size=1), answers(exported.path, photos, batch_size=4)
    torch.testing.assert_close(probabilities(alone), probabilities(together), rtol=1e-4, atol=1e-6)
    assert [Path(each.path).name for each in together] == ["0.png", "1.png", "2.png", "3.png", "4.png"]


def test_empty_and_truncated_image_is_answered_in_its_place(checkpoint, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:500])
    found = answers(checkpoint, folder, top=6, batch_size=2)
    assert [each.error is None for each in found] == [True, True, False, True, True]
    assert "2.png" in found[2].error
    whole = answers(checkpoint, photos, top=6, batch_size=2)
    for index in (0, 1, 3, 4):
        torch.testing.assert_close(probabilities([found[index]]), probabilities([whole[index]]), rtol=1e-4, atol=1e-6)


def test_a_file_that_does_not_exist_is_one_row_with_its_reason(checkpoint, photos):
    with open_predictor(checkpoint) as predictor:
        files = find_image_files([photos / "absent.png", photos / "0.png"])
        absent, present = predict_images(predictor, files)
    assert "No such file" in absent.error
    assert present.error is None


def test_a_folder_gives_its_images_at_every_depth_sorted_without_hidden_ones(tmp_path):
    with pytest.raises(InputError, match="holds no image files"):
        find_image_files([tmp_path])
    for name in ("b/2.JPG", "a/1.png", "0.webp", "notes.txt", ".hidden/3.png", "a/.4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_image_files([tmp_path]).paths]
    assert found == ["0.webp", "a/1.png", "b/2.JPG"]


def test_a_size_that_was_given_is_not_called_assumed(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "bare.pth")
    notes = " ".join(open_predictor(tmp_path / "bare.pth", image_size=64).notes)
    assert "Assumed, for nothing beside the weights says it: crop_ratio" in notes
    assert "image_size" not in notes


@pytest.mark.slow
def test_a_backend_that_takes_seconds_an_image_says_so(tiny, tmp_path):
    artifact = exported_to(tmp_path, tiny, deploy={"precision": "fp16"})
    assert "emulate-fp16 proves arithmetic here" in open_predictor(artifact.path, backend="emulate-fp16").notes[-1]


def test_a_checkpoint_that_says_nothing_of_its_images_is_noted_and_taken_at_224_px(atto, tmp_path):
    predictor = open_predictor(save_checkpoint(tmp_path / "bare.safetensors", atto))
    assert predictor.preprocessing == Preprocessing()
    assert predictor.class_names is None
    assert "Assumed" in predictor.notes[0]
    assert "image_size 224" in predictor.notes[0]


def test_an_altered_onnx_file_is_not_run(onnx_copy):
    content = bytearray(onnx_copy.read_bytes())
    content[-1000] ^= 1
    onnx_copy.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="SHA-256"):
        open_predictor(onnx_copy)


def test_a_foreign_onnx_file_that_does_not_say_what_images_it_takes_is_an_input_error(onnx_copy, tmp_path):
    model = onnx.load(onnx_copy)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match="does not say what images"):
        open_predictor(tmp_path / "foreign.onnx")


def test_an_engine_without_its_manifest_is_refused(tmp_path):
    (tmp_path / "foreign.engine").write_bytes(b"vtrt" + bytes(100))
    with pytest.raises(RefusedArtifactError, match="native code"):
        open_predictor(tmp_path / "foreign.engine")


@pytest.mark.skipif(not package_version("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
@pytest.mark.skipif(bool(find_gpus()), reason="has a GPU, where an engine would run")
def test_an_engine_without_a_gpu_lacks_a_requirement(exported, tmp_path):
    from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine

    spec = BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=((1, 2, 4),), measure=False)
    engine = build_engine(exported, spec, tmp_path)
    with pytest.raises(MissingRequirementError, match="GPU"):
        open_predictor(engine.path)


def test_a_file_that_is_no_artifact_is_an_input_error(tmp_path):
    (tmp_path / "model.onnx").write_text("hello")
    with pytest.raises(InputError, match="neither a checkpoint"):
        open_predictor(tmp_path / "model.onnx")


@pytest.fixture
def tiny_predictor(tiny_model):
    return Model(reference_runner(tiny_model, DeploySpec(image_size=64)), tiny_model.task, Preprocessing(64), None)


def test_nan_inf_input_whose_logits_are_not_finite_is_a_failed_check(tiny_predictor, photos, monkeypatch):
    """Of the second image alone; it is named, not the first of its batch."""
    right = tiny_predictor.runner.run

    def second_is_none(images):
        logits = right(images)["logits"].clone()
        logits[1] = torch.nan
        return {"logits": logits}

    monkeypatch.setattr(tiny_predictor.runner, "run", second_is_none)
    with pytest.raises(CheckFailedError, match=r"logits that are not finite for .*1\.png, and numbers") as caught:
        list(predict_images(tiny_predictor, ImageFiles((photos / "broken.png", photos / "0.png", photos / "1.png"))))
    assert caught.value.exit_code == 3


def test_more_or_fewer_names_than_classes_are_a_corrupt_artifact(tiny_predictor, photos):
    for names in (("a",) * 9, ("a",) * 11):
        with pytest.raises(CorruptArtifactError, match="10 classes"):
            list(
                predict_images(
                    dataclasses.replace(tiny_predictor, class_names=names), find_image_files([photos / "0.png"])
                )
            )
