import pytest
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from cnx_deploy.core.gates import GATES, Differences, ParityResult
from cnx_deploy.verification.maps import RunningMapComparison, RunningPrecisionComparison

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


def objects(labels: list[int]) -> dict[str, torch.Tensor]:
    """Squares along the diagonal of a picture that fills its canvas."""
    corners = torch.arange(len(labels), dtype=torch.float32)[:, None] * 20
    boxes = torch.cat([corners, corners, corners + 15, corners + 15], dim=1)
    return {
        "boxes": boxes, "labels": torch.tensor(labels), "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
        "area": torch.full((len(labels),), 225.0), "place": torch.tensor([1.0, 1.0, 0.0, 0.0]),
        "size": torch.tensor([96, 96]),
    }  # fmt: skip


def detected(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as outputs of a batch of one, one place of five left empty."""
    count = len(target["labels"])
    boxes, scores = torch.zeros(1, 5, 4), torch.zeros(1, 5)
    labels = torch.full((1, 5), -1.0)  # a file of outputs keeps them in FP32
    boxes[0, :count], scores[0, :count] = target["boxes"], torch.linspace(0.9, 0.6, count)
    labels[0, :count] = target["labels"]
    return {"boxes": boxes, "scores": scores, "labels": labels, "exact": torch.ones(1, 1)}


def test_average_precision_of_both_sides_is_compared_and_a_lost_object_fails():
    target = objects([0, 1, 0, 2])
    found, lost, unsure = detected(target), detected(target), detected(target)
    lost["labels"][0, 1], lost["scores"][0, 1] = -1, 0
    unsure["exact"][:] = 0
    precision = {}
    for name, candidate in (("found", found), ("lost", lost)):
        comparison = RunningPrecisionComparison("abc", range(3))
        comparison.add(candidate, found, [target])
        comparison.add(unsure, found, [target])  # is left out of both sides: the gate fails because of it
        result = comparison.result(VERDICT)
        assert (result.images, result.objects, result.reference_precision["boxes"]) == (1, 4, pytest.approx(1.0))
        assert result.passed is (name == "found")
        precision[name] = result.candidate_precision["boxes"]
    assert precision == {"found": pytest.approx(1.0), "lost": pytest.approx(2 / 3)}
    # The data's classes are the network's in another order.
    moved = RunningPrecisionComparison("abc", [2, 0, 1])
    other = {**found, "labels": torch.tensor([[2.0, 0.0, 2.0, 1.0, -1.0]])}
    moved.add(other, other, [target])
    assert moved.result(VERDICT).reference_precision["boxes"] == pytest.approx(1.0)
