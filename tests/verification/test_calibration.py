"""Rates, confusion and calibration against scikit-learn, torchmetrics and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics
from torchmetrics.functional.classification import multiclass_calibration_error

from cnx_deploy.verification.evaluation.calibration import BINS, CalibrationTally
from cnx_deploy.verification.evaluation.tally import Tally

SIZES = [(400, 2), (900, 10), (3000, 60)]


def drawn(count, classes, *, scale=1.5, seed=0):
    """Logits that are right more often than not, of the labels that come with them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = scale * torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 2.0
    return logits, labels


def tallied(logits, labels, batch=97):
    names = tuple(f"{index:03}" for index in range(logits.shape[1]))
    tally = Tally(names)
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        tally.add(logits[part], labels[part], [f"{index}.png" for index in range(start, start + len(labels[part]))])
    return tally.result(names)


@pytest.mark.parametrize(("count", "classes"), SIZES)
def test_precision_recall_f1_and_support_are_scikit_learns(count, classes):
    logits, labels = drawn(count, classes)
    found = tallied(logits, labels)
    columns = metrics.precision_recall_fscore_support(labels, logits.argmax(dim=1), zero_division=0)
    rows = [(each.precision, each.recall, each.f1, each.count) for each in found.per_class]
    np.testing.assert_allclose(np.array(rows).T, np.stack(columns), rtol=1e-12)
    means = (found.macro_precision, found.macro_recall, found.macro_f1)
    np.testing.assert_allclose(means, [column.mean() for column in columns[:3]], rtol=1e-12)


@pytest.mark.parametrize(("count", "classes"), SIZES)
def test_the_confusion_cells_are_scikit_learns_matrix(count, classes):
    logits, labels = drawn(count, classes)
    matrix = np.zeros((classes, classes), dtype=int)
    for cell in tallied(logits, labels).confusion:
        matrix[int(cell.label), int(cell.predicted)] += cell.count
    assert np.array_equal(matrix, metrics.confusion_matrix(labels, logits.argmax(dim=1)))
    assert not np.array_equal(matrix, matrix.T)


@pytest.mark.parametrize(("count", "classes"), SIZES)
def test_the_likelihood_is_scikit_learns(count, classes):
    logits, labels = drawn(count, classes)
    expected = metrics.log_loss(labels, torch.softmax(logits.double(), dim=1).numpy())
    assert tallied(logits, labels).mean_nll == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [0.5, 1.5, 6.0])
@pytest.mark.parametrize(("count", "classes"), SIZES)
def test_the_calibration_error_is_torchmetrics(count, classes, scale):
    logits, labels = drawn(count, classes, scale=scale)
    logits = logits.double().clamp(max=12.0)  # torchmetrics puts a confidence of exactly 1 into a bin of its own
    expected = multiclass_calibration_error(logits.softmax(dim=1), labels, classes, n_bins=BINS, norm="l1")
    found = tallied(logits, labels).calibration
    assert found.expected_error == pytest.approx(float(expected), rel=1e-5)
    assert found.expected_error > 0.005


def test_the_calibration_error_of_a_small_example_is_the_one_worked_out_by_hand():
    tally = CalibrationTally()
    tally.add(torch.tensor([0.95, 0.99]).double(), torch.tensor([True, False]))  # last bin: 0.97 against 0.5
    tally.add(torch.tensor([0.5, 0.52]).double(), torch.tensor([True, True]))  # eighth bin: 0.51 against 1
    result = tally.result()
    assert result.expected_error == pytest.approx(0.5 * 0.47 + 0.5 * 0.49)
    assert result.mean_confidence == pytest.approx(0.74)
    filled = [(index, each.count, each.accuracy) for index, each in enumerate(result.bins) if each.count]
    assert filled == [(7, 2, 1.0), (14, 2, 0.5)]
    assert len(result.bins) == BINS


def test_bins_are_open_on_the_left_and_a_confidence_of_one_is_in_the_last():
    tally = CalibrationTally()
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    tally.add(edges[1:], torch.ones(BINS, dtype=torch.bool))
    assert [each.count for each in tally.result().bins] == [1] * BINS


def test_confidence_that_is_always_right_or_always_wrong_has_the_error_it_must():
    logits = torch.full((50, 4), -40.0)
    logits[:, 1] = 40.0
    labels = torch.ones(50, dtype=torch.long)
    assert tallied(logits, labels).calibration.expected_error == pytest.approx(0.0, abs=1e-12)
    assert tallied(logits, labels - 1).calibration.expected_error == pytest.approx(1.0, abs=1e-12)
    assert tallied(logits, labels - 1).mean_nll == pytest.approx(80.0)


def test_a_class_without_images_counts_in_no_mean_and_one_never_predicted_counts_as_zero():
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    found = tallied(logits, torch.tensor([0, 0, 1]))
    first, second, third = found.per_class
    assert (first.precision, first.recall, first.f1) == (pytest.approx(2 / 3), 1.0, pytest.approx(0.8))
    assert (second.precision, second.recall, second.f1) == (0.0, 0.0, 0.0)
    assert (third.count, third.precision) == (0, 0.0)
    assert math.isnan(third.recall)
    assert math.isnan(third.f1)
    assert (found.macro_recall, found.macro_f1) == (0.5, pytest.approx(0.4))


def test_the_ten_most_confident_mistakes_are_kept_whatever_the_batches():
    logits, labels = drawn(500, 6)
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    wrong = [index for index in confidence.argsort(descending=True).tolist() if predicted[index] != labels[index]]
    for batch in (7, 500):
        worst = tallied(logits, labels, batch).worst
        assert [each.path for each in worst] == [f"{index}.png" for index in wrong[:10]]
        assert [each.confidence for each in worst] == pytest.approx([float(confidence[index]) for index in wrong[:10]])


def test_confused_pairs_are_off_the_diagonal_and_come_by_their_number():
    logits = torch.eye(3)[[0, 1, 1, 2, 2, 2, 2]]
    pairs = tallied(logits, torch.tensor([0, 2, 2, 0, 0, 0, 2])).confused_pairs
    assert [(cell.label, cell.predicted, cell.count) for cell in pairs] == [("000", "002", 3), ("002", "001", 2)]


@pytest.mark.parametrize("classes", [10, 3000])
def test_of_equal_logits_the_first_class_is_predicted_as_it_is_counted(classes):
    told = []
    tally = Tally(tuple(map(str, range(classes))), told.append)
    tally.add(torch.zeros(3, classes), torch.tensor([0, 4, 7]), ["a", "b", "c"])
    result = tally.result(["0", "4", "7"])
    assert (result.correct_top1, result.correct_top5, [each.correct for each in result.per_class]) == (1, 2, [1, 0, 0])
    assert {each.classes for each in told} == {("0", "1", "2", "3", "4")}
