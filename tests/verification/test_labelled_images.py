"""What two runners make of labelled images: every flip is named, and only those within the run's noise are excused."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import ImageSource, image_like_batches, runner_input
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.data.preprocessing import to_pixels
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.model.tasks.base import Outputs, find_task
from cnx_deploy.runners.base import HoldsNothing, Runner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import open_runner
from cnx_deploy.verification.evaluation import evaluate
from cnx_deploy.verification.metrics import LabelledResult, RunningComparison
from cnx_deploy.verification.parity import NOISE_MARGIN, differences
from cnx_deploy.verification.predict import Model, predict_images
from cnx_deploy.verification.saved_results import SavedResults, read_saved
from cnx_deploy.verification.verify import Candidate, Reference, verify_artifact
from tests.support.artifacts import copy_artifact

NAMES = tuple("abcdefghij")
COUNT = 20
Cnx = Callable[..., tuple[int, str, str]]
Recorded = tuple[Artifact, Artifact, LoadedModel]


class Altered(HoldsNothing):
    """A runner whose logits of given images, told by their pixels, go through a function."""

    def __init__(self, runner: Runner, change: Callable[[Tensor], Tensor], images: Tensor) -> None:
        self.info, self.input_spec, self.device = runner.info, runner.input_spec, runner.device
        self.runner, self.change, self.images = runner, change, images

    def run(self, images: Tensor) -> Outputs:
        logits = self.runner.run(images)["logits"].clone()
        for at, image in enumerate(images):
            if any(torch.equal(image, each) for each in self.images):
                logits[at] = self.change(logits[at])
        return {"logits": logits}


def first_two_swapped(logits: Tensor) -> Tensor:
    """The same logits with the best and the second best class in each other's place."""
    (first, second), changed = logits.topk(2).indices, logits.clone()
    changed[first], changed[second] = logits[second], logits[first]
    return changed


@pytest.fixture(scope="module")
def recorded(tiny_onnx_fp32: Artifact, tiny_onnx_fp16: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """The tiny network at 32 px in FP32 and FP16, batches of 1 to 8, ten named classes. Do not change the files."""
    folder = tmp_path_factory.mktemp("recorded")
    single, half = (named(copy_artifact(artifact, folder)) for artifact in (tiny_onnx_fp32, tiny_onnx_fp16))
    return single, half, recorded_model(single)


def named(artifact: Artifact) -> Artifact:
    """The same file with class names in its manifest."""
    manifest = replace(artifact.manifest, model=replace(artifact.manifest.model, class_names=NAMES))
    path = artifact.path.with_suffix(".json")
    path.write_text(manifest.to_json(), encoding="utf-8")
    return open_artifact(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twenty images in ten class folders, two in each."""
    folder = tmp_path / "images"
    for index, image in enumerate(image_like_batches(COUNT, 40, batch_size=1)):
        path = folder / NAMES[index % 10] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return folder


@pytest.fixture
def cnx(cnx: Cnx, recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cnx:
    """The command line in a folder whose export/ holds the FP32 file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "export").mkdir()
    for suffix in (".onnx", ".json"):
        shutil.copy(recorded[0].path.with_suffix(suffix), tmp_path / "export")
    return cnx


def altered(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], *paths: Path) -> None:
    """Have every ONNX runner change its logits of the images in `paths`."""
    pixels = torch.stack([to_pixels(Image.open(path), Preprocessing(image_size=32)) for path in paths])
    chosen = runner_input(pixels, "float")
    monkeypatch.setattr(
        "cnx_deploy.verification.verify.open_runner", lambda *words: Altered(open_runner(*words), change, chosen)
    )


def tallied(candidate: Tensor, reference: Tensor, labels: list[int], gate: str = "fp16") -> LabelledResult:
    """In batches of 1, 2 and 7 in turns."""
    names = tuple(str(index) for index in range(candidate.shape[1]))
    specs = find_task("classification").outputs(len(names))
    comparison, at = RunningComparison(specs, names, "logits"), 0
    for size in [1, 2, 7] * len(labels):
        here = slice(at, at + size)
        if labels[here]:
            paths = [f"{n}.png" for n in range(len(labels))[here]]
            comparison.add({"logits": candidate[here]}, {"logits": reference[here]}, paths, labels[here])
        at += size
    (result,) = comparison.results(("candidate", "reference"), GATES[gate], available=len(labels))
    assert isinstance(result, LabelledResult)
    return result


def noisy(noise: float, count: int = 200, seed: int = 0) -> Iterator[Tensor]:
    """Candidate and reference logits of ten classes."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(count, 10, generator=generator)
    yield reference + noise * torch.randn(count, 10, generator=generator)
    yield reference


def json_result(out: str) -> Any:
    (entry,) = json.loads(out)["verifications"]
    (result,) = entry["results"]
    return result


# Counting


def test_agreement_equals_an_independent_count_with_numpy() -> None:
    candidate, reference = noisy(0.1)
    labels = np.random.default_rng(0).integers(0, 10, len(reference))
    found = tallied(candidate, reference, labels.tolist()).agreement
    a, b = candidate.numpy().astype(np.float64), reference.numpy().astype(np.float64)
    rms = np.sqrt(((a - b) ** 2).mean())
    ordered = np.sort(b, axis=1)
    margins = ordered[:, -1] - ordered[:, -2]
    flipped = a.argmax(1) != b.argmax(1)
    assert 3 < flipped.sum() < 30
    assert (found.reference_correct, found.candidate_correct) == (
        (b.argmax(1) == labels).sum(),
        (a.argmax(1) == labels).sum(),
    )
    assert found.agreeing == (~flipped).sum()
    assert found.rms_error == pytest.approx(rms, rel=1e-12)
    expected = {
        f"{at}.png": (
            str(labels[at]), str(b[at].argmax()), str(a[at].argmax()), margins[at], np.abs(a - b)[at].max(),
            margins[at] <= NOISE_MARGIN * rms,
        )
        for at in flipped.nonzero()[0]
    }  # fmt: skip
    rows = {f.path: (f.label, f.reference, f.candidate, f.margin, f.largest_error, f.excused) for f in found.flips}
    assert rows == expected


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.3])
def test_counted_batch_by_batch_the_differences_are_those_of_all_at_once(noise: float) -> None:
    candidate, reference = noisy(noise)
    found, expected = tallied(candidate, reference, [0] * 200).differences, differences(candidate, reference)
    for name in expected.__dataclass_fields__:
        if getattr(expected, name) is not None:  # of no detections
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9, abs=1e-15), name


def test_a_flip_of_a_large_margin_is_not_excused_and_fails_though_the_gate_would_let_it_pass() -> None:
    candidate, reference = noisy(1e-3, count=400)
    candidate[7] = first_two_swapped(reference[7] + torch.nn.functional.one_hot(reference[7].argmax(), 10) * 0.01)
    found = tallied(candidate, reference, [0] * 400)
    margin = float(reference[7].topk(2).values.diff().abs())
    (flip,) = found.agreement.unexcused
    assert (flip.path, flip.excused) == ("7.png", False)
    assert flip.margin == pytest.approx(margin)
    assert flip.margin > found.agreement.excused_margin
    assert found.differences.top1_agreement > found.gate.top1_agreement_min
    assert "1 flips of top-1 by more than noise explains" in found.failures


def test_a_flip_of_a_margin_within_the_noise_is_excused_and_passes() -> None:
    candidate, reference = noisy(1e-3)
    best, second = reference[7].topk(2).indices
    reference[7, best] = reference[7, second] + 1e-3
    candidate[7] = first_two_swapped(reference[7])
    found = tallied(candidate, reference, [0] * 200)
    assert [(flip.path, flip.excused) for flip in found.agreement.flips] == [("7.png", True)]
    assert (found.passed, found.failures) == (True, ())
    assert found.lines()[1].endswith(": excused")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_parity_nan_never_passes_and_its_image_is_named(value: float, side: int) -> None:
    pair = [*noisy(1e-3)]
    pair[side][9, 4] = value
    pair[0][30] = first_two_swapped(pair[1][30])
    found = tallied(pair[0], pair[1], [0] * 200)
    assert not found.passed
    assert found.failures[0] == "1 values are NaN or infinite"
    assert [(flip.path, flip.excused) for flip in found.agreement.flips] == [("9.png", False), ("30.png", False)]
    assert "none (NaN" in (found.agreement.flips[0].candidate, found.agreement.flips[0].reference)[side]


def test_at_most_ten_flips_are_printed_and_all_are_in_json() -> None:
    candidate, reference = noisy(0.5)
    found = tallied(candidate, reference, [0] * 200)
    flips = len(found.agreement.flips)
    assert flips > 20
    assert [line for line in found.lines() if ": label " in line][10:] == []
    assert found.lines()[-1] == f"  and {flips - 10} more flips: --json lists all"
    assert len(json.loads(json.dumps(found.to_dict()))["agreement"]["flips"]) == flips


# A folder of classes


def test_both_precisions_agree_with_pytorch_on_all_images_and_count_the_right_answers(
    recorded: Recorded, images: Path
) -> None:
    *artifacts, loaded = recorded
    reference = Reference(artifacts[0], images)
    pixels, labels = [], []
    for path in sorted(images.rglob("*.png")):
        pixels.append(to_pixels(Image.open(path), Preprocessing(image_size=32)))
        labels.append(NAMES.index(path.parent.name))
    runner = reference_runner(loaded.model, DeploySpec(image_size=32))
    classes = runner.run(runner_input(torch.stack(pixels), "float"))["logits"].argmax(dim=1)
    correct = int((classes == torch.tensor(labels)).sum())
    for artifact in artifacts:
        found = verify_artifact(artifact, reference)
        result = found.results[0]
        assert isinstance(result, LabelledResult)
        assert (found.passed, result.agreement.images, result.agreement.available) == (True, COUNT, COUNT)
        assert (result.agreement.reference_correct, result.batches) == (correct, (1, 2, 7, 8))
    emulated = found.results[1]
    assert isinstance(emulated, LabelledResult)
    assert (emulated.candidate, emulated.agreement.images) == ("emulator fp16", 10)


def test_the_reference_is_computed_once_for_both_precisions(recorded: Recorded, images: Path) -> None:
    told: list[str] = []
    reference = Reference(recorded[0], images)
    for artifact in recorded[:2]:
        verify_artifact(artifact, reference, lambda what, count: told.append(what))
    assert [text for text in told if text.startswith("PyTorch")] == [
        f"PyTorch reference: {done} of 20 images" for done in (8, 16, 20)
    ]
    assert "onnxruntime fp32: 20 images" in told


def test_samples_limit_labelled_images_and_every_class_is_met(recorded: Recorded, images: Path, tmp_path: Path) -> None:
    saved = SavedResults(tmp_path / "saved")
    found = verify_artifact(recorded[0], Reference(recorded[0], images, 10), saved=saved)
    saved.finish(recorded[0], found.not_run, found.notes)
    assert read_saved(tmp_path / "saved")[0].runs[0].labels == tuple(range(10))
    result = found.results[0]
    assert isinstance(result, LabelledResult)
    assert (result.agreement.images, result.agreement.available) == (10, COUNT)
    assert result.lines()[0].startswith("labels, 10 of 20 images: top-1 torch float32 ")


def test_images_without_class_folders_are_compared_without_labels(recorded: Recorded, images: Path) -> None:
    result = verify_artifact(recorded[0], Reference(recorded[0], images / "a")).results[0]
    assert (isinstance(result, LabelledResult), result.differences.samples) == (False, 2)


def test_folders_are_found_by_name_whatever_their_number(recorded: Recorded, images: Path) -> None:
    for name in NAMES[:8]:
        shutil.rmtree(images / name)
    result = verify_artifact(recorded[0], Reference(recorded[0], images)).results[0]
    assert isinstance(result, LabelledResult)
    assert (result.agreement.images, result.passed) == (4, True)


def test_folders_the_model_does_not_know_are_refused_with_what_was_expected(recorded: Recorded, images: Path) -> None:
    (images / "b").rename(images / "zebra")
    with pytest.raises(InputError, match=r"classes zebra, .* expected its classes, a, b, c, .* Rename"):
        Reference(recorded[0], images)


def test_both_sides_are_given_images_by_the_white_level_that_is_asked_for(recorded: Recorded, tmp_path: Path) -> None:
    eight = np.random.default_rng(0).integers(0, 256, (40, 40))
    for name, values in (("plain", eight.astype(np.uint8)), ("deep", np.round(eight * 4095 / 255).astype(np.uint16))):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "0.png")
    plain, dark, bright = (
        Reference(recorded[0], tmp_path / name, 1, white_level=level)
        for name, level in (("plain", None), ("deep", None), ("deep", 4095.0))
    )
    ((expected, outputs),), ((given, same),), ((other, _),) = (
        list(reference.pairs(recorded[0], limit=1)) for reference in (plain, bright, dark)
    )
    assert torch.equal(given, expected)
    assert torch.equal(same["logits"], outputs["logits"])
    assert not torch.equal(other, expected)
    assert [len(reference.notes) for reference in (plain, dark, bright)] == [0, 1, 0]


def test_without_names_the_order_of_classes_is_said_to_be_assumed_and_names_that_are_given_decide_it(
    cnx: Cnx, tiny_onnx_fp32: Artifact, images: Path, tmp_path: Path
) -> None:
    """The classes in the opposite order: labels are counted against the opposite outputs."""
    assumed, opposite = Reference(tiny_onnx_fp32, images), Reference(tiny_onnx_fp32, images, class_names=NAMES[::-1])
    found = [verify_artifact(tiny_onnx_fp32, reference, runners=("onnxruntime",)) for reference in (assumed, opposite)]
    assert [any("Order of classes assumed" in note for note in entry.notes) for entry in found] == [True, False]
    right = [entry.results[0].agreement.reference_correct for entry in found]
    with reference_runner(recorded_model(tiny_onnx_fp32).model, tiny_onnx_fp32.manifest.deploy) as runner:
        counted = [
            evaluate(runner, images, Preprocessing(image_size=32), class_names=names) for names in (None, NAMES[::-1])
        ]
    assert right == [evaluation.correct_top1 for evaluation in counted]
    (tmp_path / "names.txt").write_text("\n".join(NAMES[:9]))
    code, _, err = cnx("verify", "--data", images, "--class-names", tmp_path / "names.txt")
    assert (code, "9 class names were given" in err) == (2, True)


def test_a_model_without_class_names_takes_as_many_folders_as_classes_and_no_other_number(
    recorded: Recorded, images: Path
) -> None:
    manifest = recorded[0].manifest
    unnamed = replace(recorded[0], manifest=replace(manifest, model=replace(manifest.model, class_names=None)))
    assert Reference(unnamed, images).class_names == NAMES
    shutil.rmtree(images / "c")
    with pytest.raises(InputError, match=r"9 class folders \(a, b, d, .*expected 10, one for each"):
        Reference(unnamed, images)


class Arrays(ImageSource):
    """Labelled images in memory, as a caller may bring them."""

    class_names = NAMES

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: int, preprocessing: Preprocessing) -> Tensor:
        return to_pixels(Image.fromarray(self.images[index].numpy()), preprocessing)

    def label(self, index: int) -> int:
        return index % 10


def test_a_source_from_outside_is_verified_evaluated_and_classified_as_the_same_files_are(
    recorded: Recorded, images: Path
) -> None:
    source = Arrays(torch.cat(list(image_like_batches(COUNT, 40, batch_size=COUNT))))
    inside, outside = (
        verify_artifact(recorded[0], Reference(recorded[0], data)).results[0] for data in (images, source)
    )
    assert isinstance(inside, LabelledResult)
    assert isinstance(outside, LabelledResult)
    counts = [(each.agreement.images, each.agreement.reference_correct, each.passed) for each in (inside, outside)]
    assert counts[0] == counts[1] == (COUNT, inside.agreement.reference_correct, True)
    runner = OrtRunner(recorded[0].path)
    evaluations = [evaluate(runner, data, Preprocessing(image_size=32), class_names=NAMES) for data in (images, source)]
    assert evaluations[0].per_class == evaluations[1].per_class
    predictor = Model(runner, find_task("classification"), Preprocessing(image_size=32), NAMES)
    rows = list(predict_images(predictor, source, top=1))
    assert ([row.path for row in rows], len(rows)) == ([f"image {at}" for at in range(COUNT)], COUNT)
    assert sum(row.scores[0].name == NAMES[at % 10] for at, row in enumerate(rows)) == evaluations[0].correct_top1


# As the command shows it


def test_a_planted_flip_is_printed_with_its_path_and_exits_with_3(
    cnx: Cnx, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cnx("verify", "--data", images)[0] == 0
    altered(monkeypatch, first_two_swapped, images / "d" / "13.png")
    code, out, err = cnx("verify", "--data", images)
    assert (code, "differ from PyTorch" in err) == (3, True)
    (line,) = [line for line in out.splitlines() if ": label d, " in line]
    assert str(images / "d" / "13.png") in line
    assert "NOT EXCUSED" in line
    found = json_result(cnx("verify", "--data", images, "--json")[1])
    assert [flip["path"] for flip in found["agreement"]["flips"]] == [str(images / "d" / "13.png")]
    assert found["agreement"]["agreeing_percent"] == 95.0


def test_dataset_bad_files_are_counted_by_verify_and_left_out_of_what_is_saved(
    cnx: Cnx, images: Path, tmp_path: Path
) -> None:
    broken = images / "c" / "02.png"
    broken.write_bytes(broken.read_bytes()[:100])
    code, out, _ = cnx("verify", "--data", images)
    assert code == 0
    assert "labels, 19 of 20 images" in out
    assert f"not read, not counted: {broken} cannot be read" in out
    saved = ("--save-inputs", tmp_path / "inputs", "--save-outputs", tmp_path / "outputs")
    code, out, err = cnx("verify", "--data", images, "--json", *saved)
    found = json_result(out)["agreement"]
    assert ([entry["path"] for entry in found["broken"]], found["images"]) == ([str(broken)], 19)
    assert (code, err.count(f"left out: {broken} cannot be read")) == (0, 1)
    assert len(list((tmp_path / "inputs").rglob("*.json"))) == 2
    assert [path.name for path in (tmp_path / "outputs").iterdir()] != []
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    code, _, err = cnx("verify", "--data", images)
    assert (code, "No image of" in err, "(20) can be read" in err) == (2, True, True)


def test_a_broken_image_of_a_folder_without_classes_is_left_out_and_named(cnx: Cnx, images: Path) -> None:
    loose = images.parent / "loose"
    loose.mkdir()
    for path in images.rglob("*.png"):
        shutil.copy(path, loose / f"{path.parent.name}-{path.name}")
    (loose / "c-02.png").write_bytes(b"no image")
    code, out, err = cnx("verify", "--data", loose)
    assert (code, "pass" in out) == (0, True)
    assert err.count(f"left out: {loose / 'c-02.png'} cannot be read") == 1
    for path in loose.iterdir():
        path.write_bytes(b"no image")
    code, _, err = cnx("verify", "--data", loose)
    assert (code, f"No image of {loose} (20) can be read" in err) == (2, True)


def test_parity_nan_never_passes_and_verify_exits_with_3(
    cnx: Cnx, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered(monkeypatch, lambda logits: logits * math.nan, images / "a" / "00.png")
    code, out, _ = cnx("verify", "--data", images, "--json")
    found = json_result(out)
    assert (code, found["passed"], found["differences"]["nonfinite_count"]) == (3, False, 10)
    assert found["agreement"]["flips"][0]["candidate"].startswith("none")


def test_what_was_saved_is_judged_again_without_the_artifact_and_with_the_same_result(cnx: Cnx, images: Path) -> None:
    code, said, _ = cnx("verify", "--data", images, "--save-outputs", "saved", "--json")
    shutil.rmtree("export")
    shutil.rmtree(images)
    assert (code, *cnx("verify", "saved", "saved", "--json")[:2]) == (0, 0, said)
    assert cnx("verify", "saved", "saved", "--cosine", "1", "--relative-l2", "0")[0] == 3
    assert cnx("verify", "--save-outputs", "saved")[0] == 2


def test_two_runners_of_one_backend_are_saved_apart(cnx: Cnx) -> None:
    runners = ("--backend", "onnxruntime", "--backend", "onnxruntime-plain")
    assert cnx("verify", "--samples", "1", *runners, "--save-outputs", "saved")[0] == 0
    first, second = read_saved(Path("saved"))[0].runs
    assert (first.candidate, first.file != second.file) == (second.candidate, True)


def test_plain_images_are_saved_with_their_paths(cnx: Cnx, images: Path) -> None:
    assert cnx("verify", "--data", images / "a", "--save-outputs", "saved")[0] == 0
    (run,) = read_saved(Path("saved"))[0].runs
    assert (run.images, run.labels) == (tuple(str(images / "a" / name) for name in ("00.png", "10.png")), None)


def test_a_batch_below_a_fixed_one_is_filled_up_and_its_copies_are_not_counted(
    recorded: Recorded, images: Path
) -> None:
    single = recorded[0]
    seen: list[int] = []

    class Counting(OrtRunner):
        def run(self, images: Tensor) -> Outputs:
            seen.append(len(images))
            return super().run(images)

    reference = Reference(single, images)
    (result,) = reference.judge(Candidate(single, Counting(single.path), InputSpec("float", 32, 3, 3), GATES["fp32"]))
    assert isinstance(result, LabelledResult)
    assert seen == [3] * 7
    assert (result.passed, result.agreement.images, result.batches) == (True, COUNT, (3,))
