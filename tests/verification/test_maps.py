import pytest
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from cnx_deploy.core.gates import GATES, Differences, ParityResult
from cnx_deploy.verification.maps import RunningMapComparison

VERDICT = ParityResult(
    "candidate", "reference", GATES["fp16"], (1,), "logits",
    Differences(2, 0, 0.0, 0.0, 1.0, 1.0, 0, 0, 0.0, 0.0), (),
)  # fmt: skip


def logits_of(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 4, (2, 32, 48), generator=generator)
    labels = torch.where(torch.rand(targets.shape, generator=generator) < 0.7, targets, (targets + 1) % 4)
    targets[0, :4] = 255
    return targets, labels


def test_mean_iou_of_both_sides_equals_torchmetrics_and_the_same_answers_pass(drawn):
    targets, labels = drawn
    comparison = RunningMapComparison(4, range(4))
    for at in range(2):
        side = {"full_logits": logits_of(labels[at : at + 1], 4)}
        comparison.add(side, {"labels": labels[at : at + 1].float()}, targets[at : at + 1])
    result = comparison.result(VERDICT)
    expected = float(multiclass_jaccard_index(labels, targets, 4, ignore_index=255))
    assert result.reference_mean_iou == pytest.approx(expected, abs=1e-6)
    assert (result.candidate_mean_iou, result.changed, result.passed) == (result.reference_mean_iou, 0, True)
    assert (result.images, result.pixels) == (2, int((targets != 255).sum()))


def test_a_change_of_mean_iou_fails_and_classes_are_found_by_place(drawn):
    targets, labels = drawn
    wrong = labels.clone()
    wrong[:, :8] = (wrong[:, :8] + 1) % 4
    comparison = RunningMapComparison(4, range(4))
    comparison.add({"labels": wrong}, {"labels": labels}, targets)
    result = comparison.result(VERDICT)
    assert not result.passed
    assert any("mean IoU" in failure for failure in result.failures)
    assert result.changed == int((wrong != labels).sum())
    # The data's class 0 is the network's class 2, and so on.
    order = torch.tensor([2, 0, 3, 1])
    moved = RunningMapComparison(4, order.tolist())
    moved.add({"labels": order[labels]}, {"labels": order[labels]}, targets)
    assert moved.result(VERDICT).reference_mean_iou == pytest.approx(result.reference_mean_iou)
