"""The files that Polygraphy reads, read by the real `polygraphy`; saved results are judged as they were."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import sha256_of_file
from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import image_like_batches
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.verification import saved_results
from cnx_deploy.verification.judging import GateChange, judge_saved
from cnx_deploy.verification.labelled import reference_for
from cnx_deploy.verification.polygraphy_io import load_outputs, save_comparison, save_outputs
from cnx_deploy.verification.saved_results import INDEX_NAME, SavedOutputs, read_saved
from cnx_deploy.verification.verify import Verification, verify_artifact


def polygraphy(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "polygraphy"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def polygraphy_run(model: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    files = ["--load-inputs", str(folder / "inputs.json"), "--load-outputs", str(folder / "reference.json")]
    return polygraphy("run", str(model), "--onnxrt", *files, "--rtol", "1e-3", "--atol", "1e-4", folder=folder)


@pytest.mark.slow
def test_polygraphy_agrees_on_the_saved_images_and_not_on_other_logits(
    tiny_onnx_fp32: Artifact, tmp_path: Path
) -> None:
    batches = [torch.rand(size, 3, 32, 32) for size in (1, 2, 7)]
    runner = OrtRunner(tiny_onnx_fp32.path)
    logits = torch.cat([runner.run(batch).clone() for batch in batches])
    save_comparison(tmp_path / "right", batches, logits)
    done = polygraphy_run(tiny_onnx_fp32.path, tmp_path / "right")
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = logits.clone()
    wrong[5, 3] += 0.1
    save_comparison(tmp_path / "wrong", batches, wrong)
    assert polygraphy_run(tiny_onnx_fp32.path, tmp_path / "wrong").returncode != 0


def test_saving_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_comparison(tmp_path, [torch.zeros(2, 3, 32, 32)], torch.zeros(2, 10))
    assert capfd.readouterr().out == ""


def test_images_and_logits_must_be_as_many(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 images and logits of 2"):
        save_comparison(tmp_path, [torch.zeros(3, 3, 32, 32)], torch.zeros(2, 10))


# Results that can be judged again


@pytest.fixture(scope="module")
def artifact(tiny_onnx_fp32: Artifact) -> Artifact:
    """The tiny FP32 file with a record that says how images are made."""
    manifest = tiny_onnx_fp32.manifest
    made = replace(manifest.model, preprocessing=Preprocessing(image_size=32))
    return replace(tiny_onnx_fp32, manifest=replace(manifest, model=made))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten class folders of one image each; one file more cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(image_like_batches(10, 40, batch_size=1)):
        (folder / str(index)).mkdir()
        Image.fromarray(image[0].numpy()).save(folder / str(index) / "image.png")
    (folder / "3" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def saved(
    artifact: Artifact, images: Path, tiny_variant: Variant, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Verification]]:
    """A folder of results, on images that are made and on labelled ones, and what was said of them. Shared."""
    folder = tmp_path_factory.mktemp("saved")
    model, record = random_model(tiny_variant, 10, seed=0), artifact.manifest.model
    said = []
    with pytest.MonkeyPatch.context() as patch:
        loaded = LoadedModel(model, record.weights, None, record.preprocessing)
        patch.setattr("cnx_deploy.verification.verify.recorded_model", lambda _: loaded)
        patch.setattr("cnx_deploy.verification.verify.open_artifact", lambda _: artifact)
        patch.setattr(saved_results, "LOGITS_A_FILE", 20)  # so that more than one file is written
        outputs = SavedOutputs(folder)
        for data in (None, images):
            found = verify_artifact(artifact, reference_for(artifact, data, None), outputs=outputs)
            outputs.finish(artifact, found.not_run, found.notes)
            said.append(found)
    return folder, said


@pytest.fixture
def copied(saved: tuple[Path, list[Verification]], tmp_path: Path) -> Path:
    """A copy of that folder, free to be changed."""
    return shutil.copytree(saved[0], tmp_path / "saved")


def cnx(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The index after `change`, with a hash of itself that is right."""
    path = folder / INDEX_NAME
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    del document["sha256"]
    path.write_text(json.dumps({**document, "sha256": saved_results._own_hash(document)}), encoding="utf-8")


def test_logits_come_back_to_the_bit(tmp_path: Path) -> None:
    numbers = torch.randn(3, 5)
    numbers[0, :4] = torch.tensor([math.nan, math.inf, -0.0, 1e-45])
    save_outputs(tmp_path / "out.json", {"one": (numbers[:1], numbers[1:]), "two": (numbers,)})
    found = load_outputs(tmp_path / "out.json")
    assert [part.shape[0] for part in found["one"]] == [1, 2]
    for back in (torch.cat(found["one"]), found["two"][0]):
        assert (back.dtype, torch.equal(back.view(torch.int32), numbers.view(torch.int32))) == (torch.float32, True)


def test_a_file_that_is_no_run_results_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text('{"some": "thing"}')
    with pytest.raises(CorruptArtifactError, match="holds no outputs of this project"):
        load_outputs(tmp_path / "out.json")


def test_judged_at_the_same_gate_the_numbers_are_identical(saved: tuple[Path, list[Verification]]) -> None:
    folder, said = saved
    assert [entry.passed for entry in said] == [True, True]
    assert [entry.to_dict() for entry in judge_saved(folder)] == [entry.to_dict() for entry in said]


def test_the_index_says_what_was_compared_and_by_whom(saved: tuple[Path, list[Verification]], images: Path) -> None:
    plain, labelled = (entry.runs[0] for entry in read_saved(saved[0]))
    assert (len(plain.images), plain.labels, plain.images[0]) == (64, None, "image-like 0 of seed 0")
    assert labelled.images == tuple(str(images / str(index) / "image.png") for index in range(10))
    assert (labelled.labels, labelled.gate.name) == (tuple(range(10)), "fp32")
    assert [entry.path for entry in labelled.details.broken] == [str(images / "3" / "broken.png")]
    assert (labelled.runner.backend, len(labelled.files) > 1) == ("onnxruntime", True)


def test_judged_at_a_tighter_gate_they_fail_and_at_a_wider_one_they_pass(
    saved: tuple[Path, list[Verification]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = saved
    assert cnx(capsys, "verify", "--judge", folder)[0] == 0
    code, out, _ = cnx(capsys, "verify", "--judge", folder, "--relative-l2", "1e-9", "--json")
    results = [result for entry in json.loads(out)["verifications"] for result in entry["results"]]
    assert (code, [result["passed"] for result in results]) == (3, [False, False])
    assert results[0]["gate"]["name"] == "fp32, changed"
    assert "relative L2" in results[0]["failures"][0]
    assert cnx(capsys, "verify", "--judge", folder, "--kl", "-1")[0] == 2
    assert {entry.results[0].gate.name for entry in judge_saved(folder, GateChange(gate="fp16"))} == {"fp16"}
    code, out, _ = cnx(capsys, "verify", "--judge", folder, "--gate", "fp16")
    assert (code, out.count("  pass"), "labels, 10 of 11 images" in out) == (0, 2, True)


def test_another_gate_does_not_excuse_a_flip(
    tmp_path: Path, artifact: Artifact, images: Path, tiny_variant: Variant
) -> None:
    model, record = random_model(tiny_variant, 10, seed=0), artifact.manifest.model

    class Flipping(OrtRunner):
        def run(self, images: Tensor) -> Tensor:
            logits = super().run(images).clone()
            if len(images) == 1:
                logits[0, logits[0].topk(2).indices] = logits[0].topk(2).values.flip(0)
            return logits

    with pytest.MonkeyPatch.context() as patch:
        loaded = LoadedModel(model, record.weights, None, record.preprocessing)
        patch.setattr("cnx_deploy.verification.verify.recorded_model", lambda _: loaded)
        patch.setattr("cnx_deploy.verification.verify.open_artifact", lambda _: artifact)
        patch.setattr("cnx_deploy.verification.verify.open_runner", lambda artifact, *_: Flipping(artifact.path))
        outputs = SavedOutputs(tmp_path / "flipped")
        found = verify_artifact(artifact, reference_for(artifact, images, None), outputs=outputs)
        outputs.finish(artifact, (), ())
    assert not found.passed
    anything = GateChange(relative_l2=1e9, cosine=-1.0, top1=0.0, kl=1e9)
    (judged,) = judge_saved(tmp_path / "flipped", anything)
    assert len(judged.results[0].failures) == 1
    assert "flips of top-1 by more than noise" in judged.results[0].failures[0]


@pytest.mark.parametrize("place", ["outputs", "index", "missing"])
def test_a_changed_or_missing_file_is_exit_code_4(copied: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    path = copied / INDEX_NAME if place == "index" else sorted(copied.rglob("outputs-*.json"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if place == "missing":
        path.unlink()
    code, out, err = cnx(capsys, "verify", "--judge", copied)
    assert (code, out) == (4, "")
    assert ("is missing" if place == "missing" else "altered" if place == "outputs" else "cannot be trusted") in err


def test_a_gate_or_a_path_that_was_edited_in_the_index_is_found(copied: Path) -> None:
    path = copied / INDEX_NAME
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"relative_l2_max": 1e-05', '"relative_l2_max": 1e+05'), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="does not match"):
        judge_saved(copied)
    path.write_text(text, encoding="utf-8")
    (copied.parent / "outside.json").write_text("{}")
    rewritten(copied, lambda d: d["artifacts"][0]["runs"][0]["files"][0].update(name="../outside.json"))
    with pytest.raises(CorruptArtifactError, match=r"runs\[0\]\.files\[0\]\.name: Expected str of another form"):
        judge_saved(copied)


def test_logits_of_fewer_images_than_the_index_names_are_corrupt(copied: Path) -> None:
    rewritten(copied, lambda document: document["artifacts"][1]["runs"][0]["files"].pop())
    with pytest.raises(CorruptArtifactError, match="10 images"):
        judge_saved(copied)


def test_results_are_not_saved_over_others(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="not an empty folder"):
        SavedOutputs(copied)
    with pytest.raises(InputError, match="holds no saved results"):
        read_saved(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--judge", "x", "--data", "."), "leave --data out"),
        (("--judge", "x", "--layers"), "leave --layers out"),
        (("--judge", "x", "file.onnx"), "leave FILES out"),
        (("--top1", "0.5"), "--top1: a limit for --judge"),
        (("--judge", "x", "--gate", "fp16", "--kl", "1"), "leave out --kl"),
        (("--judge", "x", "--gate", "loose"), "No gate is called 'loose'"),
        (("--judge", "x", "--cosine", "nan"), "expected -1 to 1"),
        (("--layers", "--save-outputs", "x"), "--save-outputs"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    code, _, err = cnx(capsys, "verify", *words)
    assert (code, message in " ".join(err.split())) == (2, True), err


@pytest.mark.slow
def test_polygraphy_inspects_and_compares_what_was_saved(saved: tuple[Path, list[Verification]]) -> None:
    path = sorted(saved[0].rglob("outputs-*.json"))[0]
    done = polygraphy("inspect", "data", str(path), folder=saved[0].parent)
    assert done.returncode == 0, done.stderr
    assert "torch float32" in done.stdout
    assert "onnxruntime fp32" in done.stdout
    for tolerance, agrees in (("1e-4", True), ("0", False)):
        words = ("run", "--load-outputs", str(path), "--rtol", "0", "--atol", tolerance)
        assert (polygraphy(*words, folder=saved[0].parent).returncode == 0) is agrees


def test_the_hashes_of_the_index_are_those_of_the_files(saved: tuple[Path, list[Verification]]) -> None:
    files = [file for entry in read_saved(saved[0]) for run in entry.runs for file in run.files]
    assert len(files) == len(list(saved[0].rglob("outputs-*.json")))
    assert all(file.sha256 == sha256_of_file(saved[0] / file.name) for file in files)
