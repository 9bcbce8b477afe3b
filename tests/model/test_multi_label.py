"""Losses, metrics and thresholds of several labels an image, compared with torch, timm and scikit-learn."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sk
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor

from cnx_deploy.model.tasks import multi_label_metrics
from cnx_deploy.model.tasks.multi_label import asymmetric_loss
from cnx_deploy.model.tasks.multi_label_metrics import RunningLabels, ScoreTable, average_precisions, fit_thresholds

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(16, 7, dtype=torch.float64, generator=GENERATOR) * 4
HELD = (torch.rand(16, 7, generator=GENERATOR) < 0.3).double()
MIXED = 0.7 * HELD + 0.3 * HELD.roll(1, 0)
WEIGHTS = torch.rand(7, dtype=torch.float64, generator=GENERATOR) * 5


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("targets", [HELD, MIXED], ids=["labels", "mixed"])
def test_without_gammas_and_clip_the_loss_is_torchs_binary_cross_entropy_summed_over_labels(targets, smoothing):
    plain: dict[str, Any] = {"gamma_neg": 0.0, "gamma_pos": 0.0, "negative_clip": 0.0}
    smoothed = targets * (1 - smoothing) + smoothing / 2
    expected = F.binary_cross_entropy_with_logits(LOGITS, smoothed, pos_weight=WEIGHTS, reduction="none").sum(dim=1)
    found = asymmetric_loss(LOGITS, targets, label_smoothing=smoothing, positive_weights=WEIGHTS, **plain)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert float((asymmetric_loss(LOGITS, targets, label_smoothing=smoothing) - expected).abs().min()) > 0.1


@pytest.mark.parametrize(("neg", "pos", "clip"), [(4, 1, 0.05), (4, 0, 0.05), (2, 2, 0.0), (0, 0.5, 0.2), (0.5, 0, 0)])
def test_the_asymmetric_loss_is_the_papers_and_timms(neg, pos, clip):
    words: dict[str, Any] = {"gamma_neg": neg, "gamma_pos": pos, "negative_clip": clip}
    p = 1 / (1 + np.exp(-LOGITS.numpy()))
    q = np.maximum(p - clip, 0)
    for targets in (HELD, MIXED):
        t = targets.numpy()
        written = -t * WEIGHTS.numpy() * (1 - p) ** pos * np.log(p) - (1 - t) * q**neg * np.log(1 - q)
        found = asymmetric_loss(LOGITS, targets, positive_weights=WEIGHTS, **words)
        np.testing.assert_allclose(found.numpy(), written.sum(axis=1), rtol=1e-10)
        learning = (LOGITS + 0.01).requires_grad_()
        assert torch.autograd.gradcheck(lambda z, to=targets: asymmetric_loss(z, to, **words), (learning,))
    timms = AsymmetricLossMultiLabel(neg, pos, clip, reduction="none")(LOGITS, HELD).sum(dim=1)
    found = asymmetric_loss(LOGITS, HELD, **words).float()
    torch.testing.assert_close(found, timms, rtol=1e-3, atol=1e-4)  # timm computes in FP32, with 1 - p from p
    assert not torch.allclose(
        asymmetric_loss(LOGITS, HELD, **{**words, "gamma_neg": neg + 1}).float(), timms, rtol=1e-2
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_loss_and_its_gradient_are_finite_for_any_logit(dtype):
    extreme = torch.tensor([[-6e4, -200.0, -20.0, 0.0, 20.0, 200.0, 6e4]]).to(dtype)
    for words in ({}, {"gamma_neg": 0.5, "gamma_pos": 0.5}, {"gamma_neg": 0.0, "gamma_pos": 0.0, "negative_clip": 0.0}):
        for target in (0.0, 0.3, 1.0):
            logits = extreme.clone().requires_grad_()
            loss = asymmetric_loss(logits, torch.full((1, 7), target), **words)
            loss.sum().backward()
            assert logits.grad is not None
            assert bool(torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()), (words, target)
    logits = torch.tensor([[0.05, 0.04, 0.06]]).logit().requires_grad_()
    asymmetric_loss(logits, torch.zeros(1, 3)).sum().backward()
    assert logits.grad is not None
    assert (float(logits.grad[0, 1]), bool(logits.grad[0, 2] > 0)) == (0.0, True), "a negative below the clip is easy"


def table_of(scores: Tensor, held: Tensor, batch: int = 5) -> ScoreTable:
    table = ScoreTable(scores.shape[1])
    for start in range(0, len(scores), batch):
        table.add(scores[start : start + batch], held[start : start + batch])
    return table


@pytest.fixture(scope="module")
def scored() -> tuple[Tensor, Tensor]:
    """200 images and 12 labels of which the last has no image, with scores of two digits, so that many are equal."""
    generator = torch.Generator().manual_seed(1)
    held = torch.rand(200, 12, generator=generator) < torch.linspace(0.5, 0.02, 12)
    held[:, -1] = False
    noise = torch.randn(200, 12, generator=generator)
    return ((held * 1.5 + noise - 1.0).sigmoid() * 50).round().clamp(1, 49) / 50, held


def test_average_precision_is_scikit_learns_also_for_equal_scores(scored):
    scores, held = scored
    found = average_precisions(scores, held)
    expected = [sk.average_precision_score(held[:, at], scores[:, at]) for at in range(11)]
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-12)
    assert math.isnan(found[-1])
    one_by_one = scores + torch.linspace(0, 1e-6, 200)[:, None]
    assert float((average_precisions(one_by_one, held)[:-1] - found[:-1]).abs().max()) > 1e-3, "equal scores matter"


def test_the_metrics_are_scikit_learns_however_many_labels_are_in_memory_at_once(scored, monkeypatch):
    scores, held = scored
    names = [f"label {at}" for at in range(12)]
    thresholds = torch.linspace(0.3, 0.6, 12).tolist()
    given = scores.double().numpy() >= np.array(thresholds)
    for block in (1 << 24, 450, 1):
        monkeypatch.setattr(multi_label_metrics, "BLOCK_VALUES", block)
        running = RunningLabels(names, thresholds)
        for part, labels in zip(scores.split(64), held.split(64), strict=True):
            running.add({"probabilities": part}, labels.float(), [""] * len(part))
        result = running.result(names, notes=("read",))
        truth, judged = held.numpy(), held.numpy()[:, :-1]
        assert result.mean_average_precision == pytest.approx(sk.average_precision_score(judged, scores[:, :-1]))
        assert result.micro_f1 == pytest.approx(sk.f1_score(truth, given, average="micro"))
        assert result.macro_f1 == pytest.approx(sk.f1_score(judged, given[:, :-1], average="macro"))
        assert result.micro_precision == pytest.approx(sk.precision_score(truth, given, average="micro"))
        assert result.micro_recall == pytest.approx(sk.recall_score(truth, given, average="micro"))
        precision, recall, f1, count = sk.precision_recall_fscore_support(truth, given, zero_division=0)
        for at, row in enumerate(result.per_label[:-1]):
            found = (row.precision, row.recall, row.f1, row.count)
            assert found == pytest.approx((precision[at], recall[at], f1[at], count[at]))
        assert result.without_images == ("label 11",)
    text = str(result)
    assert "mAP" in text
    assert "1 labels have no image and are left out of means: label 11" in text
    part = running.result(names[:4])
    assert (part.not_judged, len(part.per_label)) == (8, 4)
    assert part.mean_average_precision != result.mean_average_precision


def test_an_image_has_its_labels_and_those_above_their_thresholds_best_first():
    seen = []
    running = RunningLabels(["a", "b", "c"], [0.5, 0.2, 0.9], seen.append)
    logits = torch.tensor([[0.5, 0.6, 0.85], [0.49, 0.1, 0.95]]).logit()
    running.add({"logits": logits}, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), ["0.png", "1.png"])
    assert [(one.labels, one.predicted) for one in seen] == [(("a", "c"), ("b", "a")), ((), ("c",))]
    assert seen[0].cells() == ["0.png", "a|c", "b|a", "0.600000|0.500000"]


def test_a_threshold_gives_the_largest_f1_that_any_threshold_gives(scored):
    scores, held = scored
    fit = fit_thresholds(table_of(scores, held))
    few = held.sum(dim=0) < 5
    for at in range(12):
        if few[at]:
            assert fit.thresholds[at] == fit.common
            continue
        precision, recall, _ = sk.precision_recall_curve(held[:, at], scores[:, at])
        best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
        found = sk.f1_score(held[:, at], scores[:, at].double() >= fit.thresholds[at])
        assert found == pytest.approx(best)
        assert not bool(torch.isclose(scores[:, at].double(), torch.tensor(fit.thresholds[at]).double()).any())
    assert (fit.shared, fit.count) == (int(few.sum()), 200)
    assert fit.shared >= 1
    micro = [sk.f1_score(held, scores >= cut, average="micro") for cut in np.linspace(0.01, 0.99, 99)]
    assert sk.f1_score(held, scores.double() >= fit.common, average="micro") == pytest.approx(max(micro), abs=1e-3)
    at_half = sk.f1_score(held, scores >= 0.5, average="macro", zero_division=0)
    assert (
        sk.f1_score(held, scores.double() >= torch.tensor(fit.thresholds), average="macro", zero_division=0) > at_half
    )


def test_thresholds_stay_within_their_range_for_scores_of_zero_and_one():
    held = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).repeat(8, 1)
    fit = fit_thresholds(table_of(held * torch.tensor([1.0, 0.0]), held))
    assert fit.thresholds[0] == pytest.approx(0.5)
    assert 0.9e-4 < fit.thresholds[1] < 1.1e-4
    empty = fit_thresholds(table_of(torch.rand(6, 2), torch.zeros(6, 2)))
    assert (empty.common, empty.shared) == (pytest.approx(0.5), 2)
