"""Metrics of a class for each pixel beside torchmetrics and a computation pixel by pixel."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from cnx_deploy.core.class_names import NOT_COUNTED
from cnx_deploy.core.errors import InputError
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.model.tasks.segmentation_metrics import confusion_of, labels_of, mean_iou

NAMES = ("a", "b", "c", "d", "none")


@pytest.fixture(scope="module")
def batch():
    """Logits of 5 images at a quarter, the last class never the best, and targets of which a fifth is not counted."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 5, 8, 12, generator=generator)
    logits[:, 4] -= 100.0
    targets = torch.randint(0, 4, (5, 32, 48), generator=generator)
    targets[torch.rand(5, 32, 48, generator=generator) < 0.2] = NOT_COUNTED
    targets[0] = NOT_COUNTED
    return logits, targets


def test_metrics_equal_torchmetrics_and_a_direct_computation(batch):
    logits, targets = batch
    running = find_task("segment").metrics(NAMES)
    for some in (slice(0, 2), slice(2, 5)):
        running.add({"logits": logits[some]}, targets[some], list("abcde")[some])
    result = running.result(NAMES[:4])
    labels = F.interpolate(logits, (32, 48), mode="bilinear", align_corners=False).argmax(dim=1)
    jaccard = MulticlassJaccardIndex(5, average="macro", ignore_index=NOT_COUNTED)(labels, targets)
    assert result.mean_iou == pytest.approx(float(jaccard), abs=1e-6)
    accuracy = MulticlassAccuracy(5, average="micro", ignore_index=NOT_COUNTED)(labels, targets)
    assert result.pixel_accuracy == pytest.approx(float(accuracy), abs=1e-6)
    said, true = labels.numpy(), targets.numpy()
    for at, row in enumerate(result.per_class):
        mine, theirs, counted = said == at, true == at, true != NOT_COUNTED
        union = (mine & counted | theirs).sum()
        expected = (mine & theirs).sum() / union if union else math.nan
        np.testing.assert_allclose(row.iou, expected)
        assert (row.count, row.predicted) == (theirs.sum(), (mine & counted).sum())
    assert (result.count, result.pixels) == (5, int((true != NOT_COUNTED).sum()))
    assert math.isnan(result.per_class[4].iou)
    assert result.to_dict()["per_class"][4]["iou"] is None
    assert "over 4 of 5 classes" in str(result)


def test_what_is_not_counted_has_no_share(batch):
    logits, targets = batch
    labels = labels_of({"logits": logits}, (32, 48))
    counted = torch.where(targets == NOT_COUNTED, NOT_COUNTED, labels)
    matrix = confusion_of(labels, counted, 5)
    assert mean_iou(matrix) == 1.0
    assert int(matrix.sum()) == int((targets != NOT_COUNTED).sum())
    wrong = confusion_of(labels, torch.where(counted == NOT_COUNTED, 0, counted), 5)
    assert mean_iou(wrong) < 0.9  # as if padding were a class
    assert math.isnan(mean_iou(torch.zeros(5, 5, dtype=torch.int64)))


def test_every_output_gives_the_same_classes(batch):
    logits, _ = batch
    full = F.interpolate(logits, (32, 48), mode="bilinear", align_corners=False)
    outputs = ({"logits": logits}, {"full_logits": full}, {"labels": full.argmax(dim=1)})
    first, *others = (labels_of(each, (32, 48)) for each in outputs)
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, logits.argmax(dim=1).repeat_interleave(4, 1).repeat_interleave(4, 2))
    with pytest.raises(InputError, match="Use the same canvas"):
        labels_of({"labels": first}, (32, 32))
    with pytest.raises(InputError, match="--output logits or labels"):
        labels_of({"maps": first}, (32, 48))


def test_each_image_has_an_outcome_of_its_own(batch):
    logits, targets = batch
    outcomes = []
    running = find_task("segment").metrics(NAMES, outcomes.append)
    running.add({"logits": logits}, targets, list("abcde"))
    assert [outcome.path for outcome in outcomes] == list("abcde")
    assert (outcomes[0].pixels, math.isnan(outcomes[0].pixel_accuracy)) == (0, True)
    assert sum(outcome.pixels for outcome in outcomes) == running.result(NAMES).pixels
    assert len(outcomes[1].cells()) == len(outcomes[1].columns)
