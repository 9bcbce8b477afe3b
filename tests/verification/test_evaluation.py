"""Metrics against scikit-learn, torchmetrics and numbers worked out by hand; the command, its text and its plot."""

import csv
import dataclasses
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from torchmetrics.functional.classification import multiclass_calibration_error

from cnx_deploy.cli import main
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CheckFailedError, InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import ImageFiles, find_images, image_like_batches
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.tasks.classification_metrics import BINS, PredictionWriter, RunningMetrics, bins_of
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.verification.evaluation import class_positions, evaluate
from cnx_deploy.verification.evaluation_plot import MOST_CLASSES, write_plot

NAMES = tuple("abcdefghij")
SPEC, PREPROCESSING = DeploySpec(image_size=32), Preprocessing(32)


def drawn(count, classes, *, scale=1.5, seed=0):
    """Logits that are right more often than not, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = scale * torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 2.0
    return logits, labels


def measured(logits, labels, batch=97, name="{:03}", each=None):
    """The metrics, counted in batches."""
    names = tuple(name.format(index) for index in range(logits.shape[1]))
    running = RunningMetrics(names, each)
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        running.add({"logits": logits[part]}, labels[part], [f"{index}.png" for index in range(len(labels))[part]])
    return running.result(names)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "classes"), [(400, 2), (900, 10), (3000, 60)])
def test_rates_confusion_and_likelihood_are_scikit_learns(count, classes):
    logits, labels = drawn(count, classes)
    found, predicted = measured(logits, labels), logits.argmax(dim=1)
    columns = metrics.precision_recall_fscore_support(labels, predicted, zero_division=0)
    rows = [(row.precision, row.recall, row.f1, row.count) for row in found.per_class]
    np.testing.assert_allclose(np.array(rows).T, np.stack(columns), rtol=1e-12)
    means = (found.macro_precision, found.macro_recall, found.macro_f1)
    np.testing.assert_allclose(means, [column.mean() for column in columns[:3]], rtol=1e-12)
    matrix = np.zeros((classes, classes), dtype=int)
    for cell in found.confusion:
        matrix[int(cell.label), int(cell.predicted)] += cell.count
    assert np.array_equal(matrix, metrics.confusion_matrix(labels, predicted))
    assert not np.array_equal(matrix, matrix.T)
    expected = metrics.log_loss(labels, torch.softmax(logits.double(), dim=1).numpy())
    assert found.mean_nll == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [0.5, 1.5, 6.0])
@pytest.mark.parametrize(("count", "classes"), [(400, 2), (3000, 60)])
def test_the_calibration_error_is_torchmetrics(count, classes, scale):
    logits, labels = drawn(count, classes, scale=scale)
    logits = logits.double().clamp(max=12.0)  # torchmetrics puts a confidence of exactly 1 into a bin of its own
    expected = multiclass_calibration_error(logits.softmax(dim=1), labels, classes, n_bins=BINS, norm="l1")
    found = measured(logits, labels).calibration
    assert found.expected_error == pytest.approx(float(expected), rel=1e-5)
    assert found.expected_error > 0.005


def test_the_calibration_error_of_a_small_example_is_the_one_worked_out_by_hand():
    confidences = torch.tensor([0.95, 0.99, 0.51, 0.52], dtype=torch.float64)
    logits = torch.stack([(1 - confidences).log(), confidences.log()], dim=1)  # the second class has the confidence
    found = measured(logits, torch.tensor([1, 0, 1, 1]), batch=3).calibration
    # Last bin: 0.97 against 0.5; eighth bin: 0.515 against 1.
    assert found.expected_error == pytest.approx(0.5 * 0.47 + 0.5 * 0.485)
    assert found.mean_confidence == pytest.approx(0.7425)
    filled = [(index, row.count, row.accuracy) for index, row in enumerate(found.bins) if row.count]
    assert (filled, len(found.bins)) == ([(7, 2, 1.0), (14, 2, 0.5)], BINS)


def test_bins_are_open_on_the_left_and_a_confidence_of_one_is_in_the_last():
    assert bins_of(torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:]).tolist() == list(range(BINS))


def test_confidence_that_is_always_right_or_always_wrong_has_the_error_it_must():
    logits = torch.full((50, 4), -40.0)
    logits[:, 1] = 40.0
    labels = torch.ones(50, dtype=torch.long)
    assert measured(logits, labels).calibration.expected_error == pytest.approx(0.0, abs=1e-12)
    wrong = measured(logits, labels - 1)
    assert (wrong.calibration.expected_error, wrong.mean_nll) == (pytest.approx(1.0, abs=1e-12), pytest.approx(80.0))


def test_a_class_without_images_counts_in_no_mean_and_one_never_predicted_counts_as_zero():
    found = measured(torch.tensor([[2.0, 1.0, 0.0]] * 3), torch.tensor([0, 0, 1]))
    first, second, third = found.per_class
    assert (first.precision, first.recall, first.f1) == (pytest.approx(2 / 3), 1.0, pytest.approx(0.8))
    assert (second.precision, second.recall, second.f1) == (0.0, 0.0, 0.0)
    assert (third.count, third.precision, math.isnan(third.recall), math.isnan(third.f1)) == (0, 0.0, True, True)
    assert (found.macro_recall, found.macro_f1) == (0.5, pytest.approx(0.4))


def test_the_most_confident_mistakes_and_the_most_confused_pairs_come_first_whatever_the_batches():
    logits, labels = drawn(500, 6)
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    wrong = [index for index in confidence.argsort(descending=True).tolist() if predicted[index] != labels[index]]
    for batch in (7, 500):
        worst = measured(logits, labels, batch).worst
        assert [outcome.path for outcome in worst] == [f"{index}.png" for index in wrong[:10]]
        assert [outcome.probabilities[0] for outcome in worst] == pytest.approx(confidence[wrong[:10]].tolist())
    pairs = measured(torch.eye(3)[[0, 1, 1, 2, 2, 2, 2]], torch.tensor([0, 2, 2, 0, 0, 0, 2])).confused_pairs
    assert [(cell.label, cell.predicted, cell.count) for cell in pairs] == [("000", "002", 3), ("002", "001", 2)]


@pytest.mark.parametrize("classes", [10, 3000])
def test_of_equal_logits_the_first_class_is_predicted_as_it_is_counted(classes):
    told = []
    found = measured(torch.zeros(3, classes), torch.tensor([0, 4, 7]), name="{}", each=told.append)
    right = [row.correct for row in found.per_class]
    assert (found.correct_top1, found.correct_top5, right[0], sum(right)) == (1, 2, 1, 1)
    assert {outcome.classes for outcome in told} == {("0", "1", "2", "3", "4")}


# --- a runner over images ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten classes of two images, 32 px."""
    root = tmp_path_factory.mktemp("classes")
    for index, image in enumerate(torch.cat(list(image_like_batches(20, 32, batch_size=20)))):
        path = root / "val" / NAMES[index % 10] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    return root


@pytest.fixture
def runner(tiny_model):
    return reference_runner(tiny_model, SPEC)


def counts(result):
    """What rounding does not change where no two logits are equal."""
    return result.count, result.correct_top1, result.correct_top5, result.per_class, set(result.confusion)


def test_top1_and_top5_are_those_of_sorted_logits(runner, tiny_model, folder):
    images = find_images(folder)
    pixels = torch.stack([images.pixels(at, PREPROCESSING) for at in range(20)])
    with torch.inference_mode():
        order = tiny_model(normalise(pixels, PREPROCESSING)).argsort(dim=1, descending=True)
    ranks = (order == torch.tensor(images.labels)[:, None]).int().argmax(dim=1)
    result = evaluate(runner, folder, PREPROCESSING)
    assert (result.count, result.correct_top1, result.correct_top5) == (20, (ranks == 0).sum(), (ranks < 5).sum())
    assert 0 < result.correct_top5 < 20
    assert result.top5_percent == 100 * result.correct_top5 / 20


@pytest.mark.parametrize("bias", [torch.arange(10.0).flip(0), torch.zeros(10)], ids=["always a", "all equal"])
def test_a_head_that_does_not_see_the_image_is_right_on_one_class_only(tiny_model, folder, bias):
    with torch.no_grad():
        tiny_model.head.weight.zero_()
        tiny_model.head.bias.copy_(bias)
    result = evaluate(reference_runner(tiny_model, SPEC), folder, PREPROCESSING)
    assert (result.top1_percent, result.top5_percent) == (10.0, 50.0)
    assert [(row.count, row.correct) for row in result.per_class] == [(2, 2), *[(2, 0)] * 9]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_neither_the_batch_size_nor_a_fixed_batch_nor_the_layout_changes_the_result(
    runner, tiny_model, folder, batch_size
):
    usual, other = (
        evaluate(runner, folder, PREPROCESSING),
        evaluate(runner, folder, PREPROCESSING, batch_size=batch_size),
    )
    assert counts(other) == counts(usual)
    assert [outcome.path for outcome in other.worst] == [outcome.path for outcome in usual.worst]
    assert other.mean_nll == pytest.approx(usual.mean_nll, rel=1e-6)
    assert other.calibration.expected_error == pytest.approx(usual.calibration.expected_error, rel=1e-6)
    runner.input_spec = dataclasses.replace(runner.input_spec, min_batch=8, max_batch=8)
    fixed = evaluate(runner, folder, PREPROCESSING, batch_size=batch_size)
    assert (counts(fixed), sum(row.count for row in fixed.calibration.bins)) == (counts(usual), 20)
    uint8 = deployed_runner(tiny_model, DeploySpec(image_size=32, input_kind="uint8"))
    assert counts(evaluate(uint8, folder, PREPROCESSING, batch_size=batch_size)) == counts(usual)


def test_folders_are_matched_to_the_models_classes_by_name(runner, tiny_model, folder):
    straight = evaluate(runner, folder, PREPROCESSING, class_names=NAMES)
    with torch.no_grad():
        tiny_model.head.weight.copy_(tiny_model.head.weight.flip(0))
        tiny_model.head.bias.copy_(tiny_model.head.bias.flip(0))
    flipped = reference_runner(tiny_model, SPEC)
    named = evaluate(flipped, folder, PREPROCESSING, class_names=NAMES[::-1])
    assert counts(named) == counts(straight)
    assert [row.name for row in named.per_class] == list(NAMES)
    assert counts(evaluate(flipped, folder, PREPROCESSING, class_names=NAMES)) != counts(straight)


def test_a_model_with_more_classes_than_folders_needs_their_names(runner, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
    with pytest.raises(InputError, match="gives logits of 10; the 2 classes of"):
        evaluate(runner, tmp_path, PREPROCESSING)
    found = evaluate(runner, tmp_path, PREPROCESSING, class_names=NAMES)
    assert (found.count, [row.name for row in found.per_class]) == (2, ["a", "b"])
    with pytest.raises(InputError, match=r"the classes b, which the model does not know"):
        evaluate(runner, tmp_path, PREPROCESSING, class_names=("a", *"cdefghijk"))


def test_what_cannot_be_evaluated_is_refused(runner, tiny_model, folder, tmp_path):
    with pytest.raises(InputError, match="without labels"):
        evaluate(runner, folder / "val" / "a", PREPROCESSING)
    with pytest.raises(InputError, match="32 pixels and the preprocessing makes 64"):
        evaluate(runner, folder, Preprocessing(64))
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_text("no image")
    with pytest.raises(InputError, match=r"No image of .* \(10\) can be read: .*a/0\.png"):
        evaluate(runner, tmp_path, PREPROCESSING)
    with torch.no_grad():
        tiny_model.head.bias[3] = float("nan")
    with pytest.raises(CheckFailedError, match="not finite"):
        evaluate(reference_runner(tiny_model, SPEC), folder, PREPROCESSING)


def test_a_limit_evaluates_that_many_images_of_every_class_and_reports_them(runner, folder):
    told = []
    result = evaluate(runner, folder, PREPROCESSING, batch_size=4, limit=10, progress=lambda *done: told.append(done))
    assert (result.count, told) == (10, [(4, 10), (8, 10), (10, 10)])
    assert [row.count for row in result.per_class] == [1] * 10


@pytest.mark.parametrize("batch_size", [4, 1])  # of batches of one, a broken image leaves none
def test_dataset_bad_files_are_named_by_an_evaluation(runner, folder, tmp_path, batch_size):
    shutil.copytree(folder, tmp_path / "copy")
    broken = tmp_path / "copy" / "val" / "c" / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    told = []
    words = {"batch_size": batch_size, "progress": lambda *done: told.append(done)}
    found = evaluate(runner, tmp_path / "copy", PREPROCESSING, **words)
    assert (found.count, [image.path for image in found.broken], told[-1]) == (19, [str(broken)], (20, 20))
    assert "cannot be read" in found.broken[0].reason
    assert {row.name: row.count for row in found.per_class} == {name: 1 if name == "c" else 2 for name in NAMES}


def test_a_csv_file_is_evaluated_on_its_validation_rows_as_a_folder_of_them_is(runner, folder):
    paths = sorted((folder / "val").glob("*/*.png"))
    rows = [f"{path.relative_to(folder).as_posix()},{path.parent.name},val" for path in paths]
    Image.new("RGB", (32, 32)).save(folder / "extra.png")
    (folder / "data.csv").write_text("\n".join(["path,label,split", *rows, "extra.png,a,train"]))
    from_file = evaluate(runner, folder / "data.csv", PREPROCESSING)
    assert counts(from_file) == counts(evaluate(runner, folder, PREPROCESSING))


def test_every_outcome_is_told_in_order_and_written(runner, folder, tmp_path):
    with PredictionWriter(tmp_path / "out" / "predictions.csv", folder) as writer:
        found = evaluate(runner, folder, PREPROCESSING, class_names=NAMES, batch_size=7, each=writer.add)
    with (tmp_path / "out" / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == [str(path) for path in sorted((folder / "val").glob("*/*.png"))]
    assert all(row["label"] == row["path"].split("/")[-2] for row in rows)
    assert sum(row["predicted"] == row["label"] for row in rows) == found.correct_top1
    best = [[row["predicted"], *(row[f"predicted_{place}"] for place in range(2, 6))] for row in rows]
    assert sum(row["label"] in names for row, names in zip(rows, best, strict=True)) == found.correct_top5
    confidences = [[float(row["confidence"]), *(float(row[f"confidence_{n}"]) for n in range(2, 6))] for row in rows]
    assert all(1 > sum(row) > 0.5 and row == sorted(row, reverse=True) for row in confidences)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"]


def test_predictions_leave_what_was_there_where_an_evaluation_fails_and_never_replace_the_data(tmp_path):
    target, data = tmp_path / "predictions.csv", tmp_path / "data.csv"
    target.write_text("before")
    with pytest.raises(InputError), PredictionWriter(target, tmp_path):
        raise InputError("stop")
    assert (target.read_text(), len(list(tmp_path.iterdir()))) == ("before", 1)
    data.write_text("path,label\n")
    with pytest.raises(InputError, match="the data itself"):
        PredictionWriter(tmp_path / "." / "data.csv", data)


def test_a_reference_runs_on_the_device_of_its_model(tiny_model):
    # No GPU: torch's device of shapes without data refuses operands on two devices as a GPU does.
    moved = reference_runner(tiny_model.to("meta"), SPEC)
    logits = moved.run(torch.empty(2, 3, 32, 32, device="meta"))["logits"]
    assert (logits.device.type, logits.shape) == ("meta", (2, 10))


# --- as the command shows it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(folder):
    """A random checkpoint of atto at 32 px that knows the ten classes."""
    words = {"class_names": NAMES, "preprocessing": PREPROCESSING}
    return save_checkpoint(folder / "atto.safetensors", random_model("atto", 10), **words)


def run(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_the_command_tells_and_writes_everything_and_a_broken_image_is_no_failure(checkpoint, folder, tmp_path, capsys):
    shutil.copytree(folder / "val", tmp_path / "data")
    (tmp_path / "data" / "d" / "3.png").write_text("no image")
    plot, rows = tmp_path / "out" / "plot.svg", tmp_path / "out" / "rows.csv"
    words = ("eval", checkpoint, tmp_path / "data")
    code, out, err = run(capsys, *words, "--json", "--plot", plot, "--save-predictions", rows)
    found = json.loads(out)
    assert code == 0, err
    assert (found["count"], len(found["broken"]), found["device"] != "", found["mean_nll"] > 0) == (19, 1, True, True)
    assert found["broken"][0]["path"].endswith("d/3.png")
    assert sum(cell["count"] for cell in found["confusion"]) == 19
    assert [row["name"] for row in found["per_class"]] == list(NAMES)
    assert {"precision", "recall", "f1", "count"} <= set(found["per_class"][0])
    assert sum(row["count"] for row in found["calibration"]["bins"]) == 19
    assert len(found["worst"]) == min(10, 19 - found["correct_top1"])
    assert (plot.is_file(), len(rows.read_text().splitlines())) == (True, 20)
    code, out, err = run(capsys, *words)
    lines = out.splitlines()
    assert (code, lines[1].startswith("top-1 ")) == (0, True), err
    for start in ("mean over classes: precision", "calibration error", "most often confused", "the most confident"):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert [line.split()[0] for line in lines if line.startswith("  ") and line.count("%") == 3] == list(NAMES)
    assert "1 of 20 images cannot be read and are not counted:" in lines
    assert "d/3.png cannot be read" in lines[-1]


def test_a_plot_or_predictions_that_cannot_be_written_end_the_command_before_the_work(tmp_path, capsys):
    for words, message in ((("--plot", "plot.png"), ".svg"), (("--save-predictions", "rows.txt"), ".csv")):
        code, out, err = run(capsys, "eval", tmp_path / "absent.onnx", tmp_path, *words)
        assert (code, out, message in err) == (2, "", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, where the device is there")
def test_ep_silent_fallback_of_eval_is_exit_code_5(checkpoint, folder, capsys):
    code, _, err = run(capsys, "eval", checkpoint, folder, "--device", "cuda")
    assert (code, "no GPU" in err) == (5, True)


def test_more_classes_than_can_be_listed_are_told_by_the_worst():
    lines = list(measured(*drawn(2000, 50), name="class {}").lines())
    rates = [float(line.split()[-2]) for line in lines if line.startswith("  class ") and line.count("%") == 3]
    assert (len(rates), rates) == (20, sorted(rates))
    assert any("20 classes of the lowest F1 of 50" in line for line in lines)


@pytest.mark.parametrize("classes", [2, MOST_CLASSES, MOST_CLASSES + 1])
def test_the_plot_has_a_cell_for_each_pair_up_to_forty_classes_and_else_the_most_confused(tmp_path, classes):
    found = measured(*drawn(2000, classes), name="class {}")
    text = " ".join(ElementTree.parse(write_plot(found, tmp_path / "plot.svg", "a title")).getroot().itertext())
    worst = found.confused_pairs[0]
    assert "a title" in text
    if classes <= MOST_CLASSES:
        assert "share of the label" in text
        assert all(f"class {index}" in text for index in range(classes))
    else:
        assert "41 classes are too many for a matrix" in text
        assert "the 25 most confused of" in text
        assert f"{worst.label} → {worst.predicted}" in text


def test_the_same_evaluation_gives_the_same_bytes_and_names_are_taken_as_they_are(tmp_path):
    found = measured(*drawn(200, 3), name="$x^{}$ & <b>")
    first, second = (write_plot(found, tmp_path / name, "t").read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert "$x^2$ & <b>" in " ".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())


# --- which output is which class --------------------------------------------------------------------------------------

NATURAL = tuple(map(str, range(1, 11)))
"""As people number them; as text 10 comes before 2."""


@pytest.fixture
def all_right(tiny_model, tmp_path):
    """A network that gives image i the class i, and its images: one image in each of the folders 1 to 10."""
    images, data = torch.cat(list(image_like_batches(10, 32, batch_size=10))), tmp_path / "data"
    for name, image in zip(NATURAL, images, strict=True):
        for side in ("train", "val"):
            (data / side / name).mkdir(parents=True)
            Image.fromarray(image.numpy()).save(data / side / name / "0.png")
    pixels = torch.stack([ImageFiles((data / "val" / name / "0.png",)).pixels(0, PREPROCESSING) for name in NATURAL])
    features = []
    hook = tiny_model.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        tiny_model(normalise(pixels, PREPROCESSING))
        hook.remove()
        tiny_model.head.weight.copy_(10 * torch.linalg.pinv(features[0]).T)  # logits of the ten images: ten times I
        tiny_model.head.bias.zero_()
    return tiny_model, data


def test_classes_in_natural_order_are_right_by_name_and_else_the_assumed_order_is_said(all_right):
    model, data = all_right
    runner, told = reference_runner(model, SPEC), []
    named = evaluate(runner, data, PREPROCESSING, class_names=NATURAL, note=told.append)
    assert (named.top1_percent, told, named.notes) == (100.0, [], ())
    assumed = evaluate(runner, data, PREPROCESSING, note=told.append)
    assert assumed.top1_percent == 10.0  # of the class 1 alone the place is the same
    (note,) = assumed.notes
    assert (told, note.startswith("Order of classes assumed")) == ([note], True)
    assert "1, 10, 2, 3, 4, 5, 6, 7, 8, 9." in note


@pytest.mark.parametrize("has_names", [True, False])
def test_a_class_without_validation_images_shifts_no_other(all_right, has_names):
    """All answers are right: with the classes of val/ alone, those behind the missing one would be the next one's."""
    model, data = all_right
    names = tuple(f"{int(name):02}" for name in NATURAL)
    for folder in [*data.glob("*/*")]:
        folder.rename(folder.parent / f"{int(folder.name):02}")
    shutil.rmtree(data / "val" / "05")
    runner = reference_runner(model, SPEC)
    found = evaluate(runner, data, PREPROCESSING, class_names=names if has_names else None)
    assert (found.count, found.top1_percent, found.macro_recall) == (9, 100.0, 1.0)
    (without,) = [row for row in found.per_class if not row.count]
    assert (without.name, len(found.per_class), math.isnan(without.recall)) == ("05", 10, True)
    assert any("1 class has no images in" in note and "05" in note for note in found.notes)
    if not has_names:
        with pytest.raises(InputError, match="gives logits of 10; the 9 classes of"):
            evaluate(runner, data / "val", PREPROCESSING)


def test_a_folder_without_images_need_not_be_the_models_and_one_with_images_must(all_right):
    model, data = all_right
    (data / "val" / "fox").mkdir()
    runner = reference_runner(model, SPEC)
    found = evaluate(runner, data, PREPROCESSING, class_names=NATURAL)
    assert (found.top1_percent, found.per_class[-1].name, found.per_class[-1].count) == (100.0, "fox", 0)
    assert class_positions(find_images(data), NATURAL)[-1] == -1  # no output is its
    shutil.copy(data / "val" / "1" / "0.png", data / "val" / "fox")
    with pytest.raises(InputError, match=r"has the classes fox, which the model does not know.*--class-names"):
        evaluate(runner, data, PREPROCESSING, class_names=NATURAL)
    with pytest.raises(InputError, match="several classes called 2"):
        evaluate(runner, data, PREPROCESSING, class_names=("1", "2", "2", *NATURAL[3:]))


def test_the_command_takes_names_from_a_file_and_says_what_it_assumes_without(all_right, tmp_path, capsys):
    model, data = all_right
    weights = save_checkpoint(tmp_path / "tiny.safetensors", model, preprocessing=PREPROCESSING)
    (tmp_path / "names.txt").write_text("\n".join(NATURAL))
    words = ("eval", weights, data, "--json")
    code, out, err = run(capsys, *words)
    assert (code, json.loads(out)["top1_percent"]) == (0, 10.0)
    assert json.loads(out)["notes"][0] in err
    code, out, err = run(capsys, *words, "--class-names", tmp_path / "names.txt")
    assert (code, json.loads(out)["top1_percent"], json.loads(out)["notes"]) == (0, 100.0, [])
    assert "assumed" not in err
    image = data / "val" / "10" / "0.png"
    for more, name in (((), "9"), (("--class-names", tmp_path / "names.txt"), "10")):
        code, out, _ = run(capsys, "predict", weights, image, "--json", *more)
        assert (code, json.loads(out)["predictions"][0]["scores"][0]["name"]) == (0, name)
    (tmp_path / "names.txt").write_text("\n".join(NATURAL[:9]))
    code, _, err = run(capsys, *words, "--class-names", tmp_path / "names.txt")
    assert (code, "9 class names were given and" in err) == (2, True)


def test_commands_note_twelve_bits_and_read_them_by_a_white_level(all_right, tmp_path, capsys):
    """The same ten pictures with 12 bits in 16: by the white level the answers are those of the pictures with 8."""
    model, data = all_right
    weights = save_checkpoint(tmp_path / "tiny.safetensors", model, class_names=NATURAL, preprocessing=PREPROCESSING)
    for path in data.glob("*/*/*.png"):
        eight = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(eight).save(path)
        deep = tmp_path / "deep" / path.relative_to(data)
        deep.parent.mkdir(parents=True)
        Image.fromarray(np.round(eight * (4095 / 255)).astype(np.uint16)).save(deep)
    plain = json.loads(run(capsys, "eval", weights, data, "--json")[1])
    code, out, err = run(capsys, "eval", weights, tmp_path / "deep", "--json", "--white-level", 4095)
    for key in ("confusion", "mean_nll", "top1_percent", "notes"):
        assert json.loads(out)[key] == plain[key]
    assert (code, "white" in err, plain["top1_percent"] > 10) == (0, False, True)
    code, out, err = run(capsys, "eval", weights, tmp_path / "deep", "--json")
    assert "--white-level 4095" in json.loads(out)["notes"][0]
    assert (code, json.loads(out)["notes"][0] in err) == (0, True)
    assert json.loads(out)["mean_nll"] != plain["mean_nll"]
    code, out, err = run(capsys, "predict", weights, tmp_path / "deep" / "val", "--json")
    assert (code, "--white-level 4095" in err, "--white-level 4095" in json.loads(out)["notes"][-1]) == (0, True, True)
    code, _, err = run(capsys, "diagnose", "headroom", weights, "--data", tmp_path / "deep", "--image-size", 32)
    assert (code in (0, 3), "--white-level 4095" in err) == (True, True)
    code, _, err = run(capsys, "diagnose", "headroom", weights, "--data", tmp_path / "deep", "--white-level", 4095)
    assert (code in (0, 3), "white" in err) == (True, False)
