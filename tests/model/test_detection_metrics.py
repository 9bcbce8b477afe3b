"""COCO's figures of detections are pycocotools', in the pixels of each picture, whatever the canvas is."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from cnx_deploy.core.errors import CheckFailedError
from cnx_deploy.model.tasks.detection_metrics import COLUMNS, DetectionOutcome, RunningDetections, on_picture, pasted

WIDTH, HEIGHT = 120, 90
SCALE, CORNER = (1.5, 1.25), (0.0, 4.0)
"""Of a canvas that squashes the picture and leaves room above."""
CLASSES = ("cup", "dog", "egg", "none of it")


def scene(random: np.random.Generator, count: int = 6) -> dict[str, Tensor]:
    """Objects of a picture, a crowd among them; masks are ellipses in their boxes."""
    corners = random.uniform(0, (WIDTH - 30, HEIGHT - 30), (count, 2))
    boxes = np.concatenate([corners, corners + random.uniform(6, (WIDTH, HEIGHT), (count, 2))], axis=1)
    boxes = boxes.clip(0, (WIDTH, HEIGHT) * 2).round()
    masks = np.stack([ellipse(box) for box in boxes])
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(random.integers(0, 3, count)),
        "masks": torch.tensor(masks, dtype=torch.uint8), "iscrowd": torch.tensor([1] + [0] * (count - 1)),
        "area": torch.tensor(masks.sum(axis=(1, 2)), dtype=torch.float32),
        "place": torch.tensor([*SCALE, *CORNER]), "size": torch.tensor([WIDTH, HEIGHT]),
    }  # fmt: skip


def ellipse(box: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    across, down = (
        (2 * at - low - high) / (high - low) for at, low, high in ((x, box[0], box[2]), (y, box[1], box[3]))
    )
    return across**2 + down**2 <= 1


def detections(random: np.random.Generator, target: dict[str, Tensor], most: int = 12) -> dict[str, Tensor]:
    """Objects found roughly, some with another class, and some that are nothing; on the canvas, filled up."""
    chosen = random.integers(0, len(target["boxes"]), most - 3)
    boxes = target["boxes"].numpy()[chosen] + random.normal(0, 3, (len(chosen), 4))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    boxes = boxes.clip(0, (WIDTH, HEIGHT) * 2)
    labels = np.where(random.random(len(chosen)) < 0.8, target["labels"].numpy()[chosen], 1)
    filled = {"boxes": torch.zeros(most, 4), "scores": torch.zeros(most), "labels": torch.full((most,), -1)}
    on_canvas = boxes * (SCALE * 2) + (CORNER * 2)
    scores = np.sort(random.uniform(0.05, 1, len(chosen)))[::-1].copy()
    for name, value in (("boxes", on_canvas), ("scores", scores), ("labels", labels)):
        filled[name][: len(chosen)] = torch.tensor(value).to(filled[name].dtype)
    disc = (torch.linspace(-1, 1, 28)[:, None] ** 2 + torch.linspace(-1, 1, 28) ** 2 <= 1).float()
    masks = torch.where(filled["labels"][:, None, None] >= 0, disc, 0.0)
    return {**filled, "masks": masks, "exact": torch.ones(1)}


def pycocotools_figures(targets: list[dict[str, Tensor]], found: list[dict[str, Tensor]], kind: str) -> Any:
    """The twelve figures and AP by class, by pycocotools alone."""

    def encoded(mask: Tensor) -> Any:
        return coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    def xywh(box: Tensor) -> list[float]:
        return [float(value) for value in (*box[:2], *(box[2:] - box[:2]))]

    truth, results = COCO(), []
    annotations = [
        {"id": 1 + 100 * image + at, "image_id": image, "category_id": int(one["labels"][at]),
         "bbox": xywh(one["boxes"][at]), "segmentation": encoded(one["masks"][at]), "area": float(one["area"][at]),
         "iscrowd": int(one["iscrowd"][at])}
        for image, one in enumerate(targets) for at in range(len(one["labels"]))
    ]  # fmt: skip
    truth.dataset = {
        "images": [{"id": image, "width": WIDTH, "height": HEIGHT} for image in range(len(targets))],
        "annotations": annotations, "categories": [{"id": at, "name": name} for at, name in enumerate(CLASSES)],
    }  # fmt: skip
    truth.createIndex()
    for image, one in enumerate(found):
        for at in range(len(one["labels"])):
            row = {"image_id": image, "category_id": int(one["labels"][at]), "score": float(one["scores"][at])}
            more = {"bbox": xywh(one["boxes"][at])} if kind == "bbox" else {"segmentation": encoded(one["masks"][at])}
            results.append(row | more)
    evaluation = COCOeval(truth, truth.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    return evaluation.stats, [float(precision[:, :, at][precision[:, :, at] > -1].mean()) for at in range(3)]


@pytest.fixture(scope="module")
def cases() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    random = np.random.default_rng(0)
    targets = [scene(random) for _ in range(20)]
    return targets, [detections(random, target) for target in targets]


def stacked(given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in given]) for name in given[0]}


def test_figures_of_boxes_and_masks_equal_pycocotools(cases, capsys):
    targets, given = cases
    outcomes: list[DetectionOutcome] = []
    running = RunningDetections(CLASSES, outcomes.append)
    for start in range(0, 20, 7):
        part = slice(start, start + 7)
        running.add(stacked(given[part]), targets[part], [f"{at}.png" for at in range(20)][part])
    evaluation = running.result()
    found = [on_picture(one, target) for one, target in zip(given, targets, strict=True)]
    for kind, name in (("bbox", "boxes"), ("segm", "masks")):
        stats, by_class = pycocotools_figures(targets, found, kind)
        stats = [math.nan if value < 0 else value for value in stats]
        expected = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"), stats, strict=False))
        assert evaluation.figures[name] == pytest.approx(expected, abs=1e-6, nan_ok=True)
        assert 0.1 < expected["AP"] < 0.95
        assert [getattr(row, name) for row in evaluation.per_class[:3]] == pytest.approx(by_class, abs=1e-6)
    assert math.isnan(evaluation.per_class[3].boxes)
    assert evaluation.per_class[3].objects == 0
    assert (evaluation.count, evaluation.objects) == (20, 100), "crowds are no objects"
    assert evaluation.detections == sum(outcome.detections for outcome in outcomes) == 180
    assert sum(outcome.found for outcome in outcomes) > 50
    document = evaluation.to_dict()
    assert document["per_class"][3]["boxes"] is None
    assert document["boxes"].keys() == set(COLUMNS.values())
    assert "none of it" in str(evaluation)


def test_boxes_alone_and_pictures_without_objects_or_detections_are_counted(cases):
    targets, given = cases
    nothing = {name: value[:0] if name not in ("place", "size") else value for name, value in targets[0].items()}
    absent = {name: torch.full_like(value, -1 if name == "labels" else 0) for name, value in given[0].items()}
    absent["exact"] = torch.ones(1)
    running, with_masks = RunningDetections(CLASSES), RunningDetections(CLASSES)
    boxes = [{name: value for name, value in one.items() if name != "masks"} for one in (*given, given[0], absent)]
    running.add(stacked(boxes), [*targets, nothing, targets[1]], [str(at) for at in range(22)])
    with_masks.add(stacked([*given, given[0], absent]), [*targets, nothing, targets[1]], [str(at) for at in range(22)])
    evaluation = running.result()
    assert list(evaluation.figures) == ["boxes"]
    assert evaluation.figures["boxes"] == pytest.approx(with_masks.result().figures["boxes"], nan_ok=True)
    assert evaluation.per_class[0].masks is None


def test_detections_that_are_not_exact_are_an_error_with_the_cure(cases):
    targets, given = cases
    inexact = {**given[0], "exact": torch.zeros(1)}
    with pytest.raises(CheckFailedError, match=r"b\.png are not exact.*passes"):
        RunningDetections(CLASSES).add(stacked([given[1], inexact]), targets[:2], ["a.png", "b.png"])


def test_a_mask_fills_its_box_on_the_picture_and_half_of_it_where_half_is_ink():
    masks = torch.stack([torch.ones(28, 28), torch.cat([torch.ones(28, 14), torch.zeros(28, 14)], dim=1)])
    boxes = torch.tensor([[10.0, 20.0, 66.0, 76.0]] * 2)
    whole, half = pasted(masks, boxes, (HEIGHT, WIDTH))
    assert abs(int(whole.sum()) - 56 * 56) <= 4 * 57
    assert bool(whole[21:75, 11:65].all())
    assert abs(int(half.sum()) - 28 * 56) <= 4 * 57
    assert not bool(half[:, 42:].any())
