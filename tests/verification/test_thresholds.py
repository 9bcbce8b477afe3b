"""Several labels an image from training to files: thresholds are kept, answered by, and their crossings are judged."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn import metrics as sk

import cnx_deploy as cnx
from cnx_deploy.cli import cli
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES, OutputSpec
from cnx_deploy.core.manifest import manifest_from_json
from cnx_deploy.core.thresholds import ASSUMED_THRESHOLD, thresholds_of
from cnx_deploy.data import GivenImages, find_images
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.verification.metrics import RunningComparison, ThresholdResult
from cnx_deploy.verification.parity import NOISE_MARGIN, differences
from cnx_deploy.verification.saved_results import judge_saved
from tests.support.labelled_digits import write_digits

NAMES = ("above six", "even", "hole", "prime")
CUTS = (0.3, 0.6, 0.45, 0.52)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), count=80)


@pytest.fixture(scope="module")
def checkpoint(tiny_variant, tmp_path_factory):
    """Random weights of four labels with a threshold each: the answers are wrong, but they are answers."""
    model = random_model(tiny_variant, 4, task="multi-label")
    path = tmp_path_factory.mktemp("weights") / "own.safetensors"
    return save_checkpoint(path, model, class_names=NAMES, thresholds=CUTS)


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    options = {"checkpoint": checkpoint, "image_size": 64, "batch": (1, 2, 4), "output_dir": folder, "no_verify": True}
    return cnx.export("tiny-test", precision=("fp32", "fp16"), **options)


def run(*words):
    result = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_a_file_gives_probabilities_and_keeps_thresholds_in_manifest_and_metadata(files, tmp_path):
    for artifact in files:
        record = artifact.manifest.model
        assert (record.task, record.thresholds, record.class_names) == ("multi-label", CUTS, NAMES)
        assert list(artifact.manifest.facts.outputs) == ["probabilities"]
        text = artifact.manifest.to_json()
        assert manifest_from_json(text.encode()).model == record
        with pytest.raises(ValueError, match="3 thresholds for 4 classes"):
            manifest_from_json(text.replace("0.52\n", "").replace("0.45,", "0.45").encode())
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(files[0].path.read_bytes())
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    with cnx.load(files[0]) as recorded, cnx.load(alone) as unrecorded:
        assert unrecorded.task.thresholds == recorded.task.thresholds == CUTS
        assert recorded.predict(image) == unrecorded.predict(image)


def test_the_answer_is_each_label_at_or_above_its_threshold_best_first(files, checkpoint):
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    for model in (checkpoint, files[0]):
        with cnx.load(model, thresholds=0.4) as lower, cnx.load(model) as opened:
            scores = opened.outputs(images)["probabilities"]
            answers, told = opened.predict(images), lower.predict(images, top=1)
        for row, answer, first in zip(scores, answers, told, strict=True):
            expected = sorted((at for at in range(4) if row[at] >= CUTS[at]), key=lambda at: -row[at])
            assert [score.index for score in answer.scores] == expected
            assert [score.name for score in answer.scores] == [NAMES[at] for at in expected]
            above = int((row >= 0.4).sum())
            assert (len(first.scores), first.more) == (min(1, above), max(0, above - 1))
            assert str(first).endswith(f" and {above - 1} more") == (above > 1)
    assert len({tuple(score.index for score in answer.scores) for answer in answers}) > 1


def test_evaluation_is_scikit_learns_for_checkpoint_file_and_command(files, checkpoint, digits, tmp_path):
    data = find_images(digits, multi_label=True)
    truth = torch.stack([data.target(at) for at in range(len(data))]).numpy()
    with cnx.load(checkpoint) as model:
        scores = model.outputs(data)["probabilities"].double().numpy()
    found = cnx.evaluate(checkpoint, digits)
    given = scores >= np.array(CUTS)
    assert found.mean_average_precision == pytest.approx(sk.average_precision_score(truth, scores))
    assert found.micro_f1 == pytest.approx(sk.f1_score(truth, given, average="micro"))
    assert found.macro_f1 == pytest.approx(sk.f1_score(truth, given, average="macro"))
    rows = tmp_path / "rows.csv"
    # At 64 px as the file, made by hand from the table's own size of 32.
    document = json.loads(run("eval", files[0].path, digits, "--json", "--save-predictions", rows).stdout)
    of_file = cnx.evaluate(files[0], digits)
    assert document["mean_average_precision"] == of_file.mean_average_precision
    assert [row["threshold"] for row in document["per_label"]] == list(CUTS)
    with rows.open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["labels"] for row in table] == ["|".join(NAMES[at] for at in labels) for labels in data.label_sets]
    assert sum(len(row["predicted"].split("|")) for row in table if row["predicted"]) == sum(
        row.predicted for row in of_file.per_label
    )
    assert "mAP" in run("eval", checkpoint, digits).stdout


def test_labels_are_found_by_name_and_those_that_the_model_does_not_know_are_refused(checkpoint, digits, tmp_path):
    text = digits.read_text().replace("hole", "loop")
    (digits.parent / "other.csv").write_text(text)
    with pytest.raises(InputError, match="has the classes loop, which the model does not know"):
        cnx.evaluate(checkpoint, digits.parent / "other.csv")
    fewer = digits.read_text().replace("hole;", "").replace(";hole", "").replace("hole", "")
    (digits.parent / "fewer.csv").write_text(fewer)
    found = cnx.evaluate(checkpoint, digits.parent / "fewer.csv")
    assert (found.not_judged, [row.name for row in found.per_label]) == (1, ["above six", "even", "prime"])
    whole = {row.name: row for row in cnx.evaluate(checkpoint, digits).per_label}
    assert all(whole[row.name] == row for row in found.per_label)
    single = GivenImages([np.zeros((64, 64, 3), np.uint8)], labels=(0,), class_names=NAMES)
    with pytest.raises(InputError, match="the task multi-label takes label_sets"):
        cnx.evaluate(checkpoint, single)
    sets = replace(single, labels=(), label_sets=((0, 2),))
    assert cnx.evaluate(checkpoint, sets).count == 1
    with pytest.raises(InputError, match="no confusion to draw"):
        run("eval", checkpoint, digits, "--plot", tmp_path / "plot.svg")
    with pytest.raises(InputError, match="no logits of classes"):
        cnx.fit_temperature(checkpoint, digits)


@pytest.mark.slow
def test_fitted_thresholds_go_through_a_file_into_an_export(checkpoint, digits, tiny_variant, tmp_path):
    plain = save_checkpoint(
        tmp_path / "plain.safetensors", random_model(tiny_variant, 4, task="multi-label"), class_names=NAMES
    )
    notes: list[str] = []
    assert run("eval", plain, digits, "--fit-thresholds", tmp_path / "cuts.json").output.count("own, from") == 1
    fit = cnx.fit_thresholds(plain, digits)
    assert json.loads((tmp_path / "cuts.json").read_text()) == fit.to_dict()
    options = {"checkpoint": plain, "image_size": 64, "batch": (1, 1, 1), "precision": "fp32", "note": notes.append}
    made = cnx.export("tiny-test", thresholds=str(tmp_path / "cuts.json"), output_dir=tmp_path, **options)
    assert made.manifest.model.thresholds == fit.thresholds != CUTS
    assert any("Thresholds of 4 labels" in text for text in notes)
    before, after = cnx.evaluate(plain, digits), cnx.evaluate(plain, digits, thresholds=fit.thresholds)
    assert after.macro_f1 > before.macro_f1
    assert ASSUMED_THRESHOLD in cnx.load(plain).notes
    assert cnx.verify(made, samples=2).passed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.5] * 3, "has 3 thresholds for 4 labels"),
        ({"even": 0.5}, "lack 3"),
        ({**dict.fromkeys(NAMES, 0.5), "odd": 0.5}, "also have 1"),
        ([0.5, 0.5, 0.5, 1.0], "between 0 and 1, got 1.0"),
        ("nothing.json", "cannot be read as thresholds"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        thresholds_of(given, NAMES, 4)
    assert thresholds_of(dict(zip(NAMES[::-1], CUTS[::-1], strict=True)), NAMES, 4) == CUTS
    with pytest.raises(InputError, match="classification has no thresholds"):
        cnx.export("tiny-test", thresholds=0.5, num_classes=3, image_size=32, output_dir="nowhere")


@pytest.mark.parametrize("unit", ["probability", "logit"])
def test_a_threshold_that_is_crossed_is_judged_by_the_references_margin_in_logits(unit):
    """Noise of 0.01 in logits over many labels; one label is moved across its threshold from near, or from far."""
    generator = torch.Generator().manual_seed(0)
    cuts = tuple(torch.linspace(0.05, 0.95, 50).tolist())
    limits = torch.tensor(cuts, dtype=torch.float64).logit()
    signs = torch.randint(0, 2, (20, 50), generator=generator) * 2.0 - 1.0
    reference = limits + signs * (0.3 + torch.rand(20, 50, dtype=torch.float64, generator=generator))
    candidate = reference + 0.01 * torch.randn(20, 50, dtype=torch.float64, generator=generator)
    spec = OutputSpec("scores", (50,), unit, "sigmoid", thresholds=cuts)

    def judged(distance: float) -> ThresholdResult:
        there, here = reference.clone(), candidate.clone()
        there[3, 7], here[3, 7] = limits[7] + distance, limits[7] - 0.01
        sides = [side.sigmoid() if unit == "probability" else side for side in (here, there)]
        comparison = RunningComparison((spec,), label_names=[f"label {at}" for at in range(50)])
        for part in (slice(0, 8), slice(8, 20)):
            at = range(20)[part]
            comparison.add(*({"scores": side[part]} for side in sides), [f"{number}.png" for number in at])
        measured = differences(*sides, spec)
        assert (measured.flips, measured.excused_flips) == (1, int(distance < NOISE_MARGIN * 0.0099))
        (result,) = comparison.results(("candidate", "reference"), GATES["fp16"])
        assert isinstance(result, ThresholdResult)
        return result

    near, far = judged(0.02), judged(0.2)
    assert (near.pairs, near.crossed, near.unexcused, near.passed) == (1000, 1, 0, True)
    assert (far.crossed, far.unexcused, far.passed) == (1, 1, False)
    assert far.failures[-1] == "1 thresholds crossed by more than noise explains"
    (crossing,) = far.crossings
    assert (crossing.path, crossing.label) == ("3.png", "label 7")
    assert (crossing.margin, crossing.threshold) == (pytest.approx(0.2), cuts[7])
    assert crossing.reference == pytest.approx(float((limits[7] + 0.2).sigmoid()))
    assert crossing.candidate == pytest.approx(float((limits[7] - 0.01).sigmoid()))
    assert "NOT EXCUSED" in far.lines()[1]


def test_probabilities_of_zero_and_one_are_as_far_from_a_threshold_as_fp32_can_say():
    spec = OutputSpec("probabilities", (2,), "probability", "sigmoid", thresholds=(0.5, 0.5))
    reference = torch.tensor([[1.0, 0.0], [0.9, 0.2]])
    assert differences(reference, reference, spec).flips == 0
    wrong = differences(torch.tensor([[0.0, 0.0], [0.9, 0.2]]), reference, spec)
    assert (wrong.flips, wrong.nonfinite_count) == (1, 0)


def test_verify_judges_crossings_and_saved_outputs_are_judged_the_same(files, digits, tmp_path):
    report = cnx.verify(files, data=digits, samples=8, save_outputs=str(tmp_path / "saved"))
    assert report.passed, str(report)
    results = [result for entry in report.results for result in entry.results]
    assert all(isinstance(result, ThresholdResult) for result in results)
    assert "pairs of image and label" in str(report)
    again = [entry.to_dict()["results"] for entry in judge_saved(tmp_path / "saved")]
    assert again == [entry.to_dict()["results"] for entry in report.results]
    folder = cnx.verify(files[0], data=digits.parent, samples=4)
    assert folder.passed


def test_a_file_of_other_weights_fails_by_its_crossings(files, tiny_variant, checkpoint):
    from cnx_deploy.verification.verify import Reference, verify_artifact

    reference = Reference(files[0], samples=8)
    with torch.no_grad():
        reference.loaded.model.head.bias[1] += 0.5
    (result,) = verify_artifact(files[0], reference).results
    assert not result.passed
    assert load_checkpoint(checkpoint).model.task.thresholds == CUTS


def test_the_mean_of_several_checkpoints_has_no_thresholds_of_one(checkpoint):
    loaded = load_checkpoint(checkpoint, soup=[checkpoint])
    assert loaded.model.task.thresholds is None
    assert any("thresholds of the files are left out" in note for note in loaded.notes)
