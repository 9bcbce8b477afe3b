"""Detection is torchvision's: the training form, the deploy form in float64, the exported file, and the options."""

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, box_iou, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.manifest import ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.tasks import detection_heads
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.model.tasks.detection import MMDET, Detect, training_losses
from cnx_deploy.model.tasks.detection_deploy import BoxDecoder, GatheredRoIAlign, fixed_point_nms
from cnx_deploy.verification.verify import verify_export

CANVAS = (128, 192)
SMALL: dict[str, Any] = {
    "channels": 16, "box_channels": 32, "mask_channels": 16, "anchor_sizes": [16, 32, 64, 96, 128], "pre_nms": 150,
    "proposals": 100, "detections": 30, "candidates": 300, "passes": 6, "training_proposals": 100,
}  # fmt: skip
CLASSES = 5


def lively_model(seed: int, options: Mapping[str, Any]) -> ConvNeXtV2:
    """A random network of the smallest variant whose boxes go far from their anchors."""
    task = find_task("detect").configured({**SMALL, **options})
    model: Any = random_model("tiny-test", CLASSES, seed=seed, task=task)
    with torch.no_grad():
        for layer in (model.rpn.head.bbox_pred, model.roi_heads.box_predictor.bbox_pred):
            layer.weight.mul_(10.0)
    return cast(ConvNeXtV2, model)


@cache
def small_model(seed: int = 0, **options: Any) -> ConvNeXtV2:
    """The same, made once."""
    return lively_model(seed, options)


class Stages(nn.Module):
    """The outputs of the stages and their norms, written out for torchvision's model, which adds its own pyramid."""

    def __init__(self, model: ConvNeXtV2) -> None:
        super().__init__()
        self.model, self.out_channels = model, model.task.config.channels
        self.fpn = FeaturePyramidNetwork(list(model.variant.dims), self.out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        for level, (downsample, stage) in enumerate(zip(self.model.downsample_layers, self.model.stages, strict=True)):
            images = stage(downsample(images))
            norm = self.model.get_submodule(f"norm{level}")
            last = F.layer_norm(images.permute(0, 2, 3, 1), images.shape[1:2], norm.weight, norm.bias, 1e-6)
            outputs[str(level)] = last.permute(0, 3, 1, 2)
        levels: dict[str, Tensor] = self.fpn(outputs)
        return levels


def torchvisions(model: ConvNeXtV2) -> Any:
    """torchvision's own Mask R-CNN, or Faster R-CNN, with the weights of `model`; images come normalised."""
    config = model.task.config
    sizes = {"min_size": CANVAS[0], "max_size": CANVAS[1], "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    words: dict[str, Any] = {
        **sizes,
        "rpn_anchor_generator": AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes), (config.anchor_ratios,) * 5
        ),
        "rpn_pre_nms_top_n_test": config.pre_nms, "rpn_post_nms_top_n_test": config.proposals,
        "rpn_pre_nms_top_n_train": config.training_proposals, "rpn_post_nms_top_n_train": config.training_proposals,
        "box_detections_per_img": config.detections,
        "box_head": TwoMLPHead(49 * config.channels, config.box_channels),
        "box_predictor": FastRCNNPredictor(config.box_channels, CLASSES + 1),
    }  # fmt: skip
    stages = Stages(model)
    words["box_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, config.sampling_ratio)
    if config.masks:
        words["mask_head"] = MaskRCNNHeads(config.channels, (config.mask_channels,) * 4, 1)
        words["mask_predictor"] = MaskRCNNPredictor(config.mask_channels, config.mask_channels, CLASSES + 1)
    own: Any = (MaskRCNN if config.masks else FasterRCNN)(stages, **words).to(next(model.parameters()).dtype)
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("fpn.", "rpn.", "roi_"))}
    renamed = {f"backbone.{name}" if name.startswith("fpn.") else name: tensor for name, tensor in state.items()}
    missing, strangers = own.load_state_dict(renamed, strict=False)
    assert not strangers
    assert all(name.startswith("backbone.model.") for name in missing)
    return own.eval()


def theirs(model: ConvNeXtV2, images: Tensor) -> list[dict[str, Tensor]]:
    """What torchvision's model finds: its own forward, with each mask before it is pasted."""
    own = torchvisions(model)
    found: list[dict[str, Tensor]] = []
    whole, heads = own.transform.postprocess, own.roi_heads.forward

    def keep(*words: Any) -> Any:
        results, losses = heads(*words)
        found.extend({**one, "labels": one["labels"] - 1} for one in results)
        return results, losses

    own.roi_heads.forward, own.transform.postprocess = keep, lambda results, *_: results
    with torch.inference_mode():
        own(list(images))
    own.transform.postprocess = whole
    return found


def assert_same_detections(
    outputs: Mapping[str, Any], expected: Sequence[Mapping[str, Tensor]], box: float, score: float, mask: float
) -> None:
    """Every detection of one side has one of its label on the other: by overlap, not by order."""
    for at, one in enumerate(expected):
        given = {name: torch.as_tensor(tensor)[at] for name, tensor in outputs.items()}
        present = given["labels"] >= 0
        assert int(present.sum()) == len(one["labels"])
        assert float(given["exact"]) == 1.0
        for name in ("boxes", "scores", "masks"):
            assert name not in given or not given[name][~present].any()
        overlap = box_iou(given["boxes"][present].double(), one["boxes"].double())
        overlap[given["labels"][present][:, None] != one["labels"]] = -1.0
        partner = overlap.argmax(dim=1)
        assert len(partner.unique()) == len(partner)
        for name, limit in (("boxes", box), ("scores", score), ("masks", mask)):
            if name in given and name in one:
                worst = (given[name][present].double().flatten() - one[name][partner].double().flatten()).abs().max()
                assert float(worst) <= limit, (name, float(worst))


def pictures(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Raw images in [0, 1] with structure at several scales."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        F.interpolate(torch.rand(count, 3, CANVAS[0] // step, CANVAS[1] // step, generator=generator), size=CANVAS)
        for step in (1, 4, 16)
    ]
    return (sum(layers, torch.zeros(1)) / 3).to(dtype)


def normalised(images: Tensor) -> Tensor:
    usual = Preprocessing()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (usual.mean, usual.std))
    return (images - mean) / std


@pytest.mark.parametrize("masks", [True, False])
def test_the_training_form_gives_torchvisions_detections(masks: bool) -> None:
    model, images = small_model(masks=masks), normalised(pictures(2))
    with torch.inference_mode():
        outputs = model.forward_outputs(images)
    expected = theirs(model, images)
    assert sum(len(one["labels"]) for one in expected) > 20
    assert ("masks" in outputs) == masks
    assert_same_detections(outputs, expected, 1e-3, 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("layout", "leave_out", "options"),
    [
        ("gpu", (), {}),
        ("cpu", (), {"masks": False}),
        ("openvino", (), {"masks": False}),
        ("gpu", ("lateral-affine",), {"passes": 40, "detections": 8}),
        ("gpu", ("finest-level",), {"masks": False, "candidates": 200, "proposals": 60}),
        ("gpu", (), {**MMDET, "sampling_limit": 16, "anchor_ratios": [0.5, 2.0]}),
        ("gpu", (), {"aligned": True, "sampling_ratio": 1, "box_weights": [1.0, 1.0, 1.0, 1.0]}),
    ],
)
def test_the_deploy_form_equals_the_training_form_in_float64(
    layout: Any, leave_out: tuple[str, ...], options: dict[str, Any]
) -> None:
    model = lively_model(1, options).double()
    images = pictures(2, dtype=torch.float64)
    deployed = deploy_form(model, DeploySpec("fp64", CANVAS, layout=layout, leave_out=leave_out))
    with torch.inference_mode():
        expected, given = model.forward_outputs(normalised(images)), deployed(images)
    assert list(given) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(given[name], tensor, rtol=0, atol=1e-8)
    assert (expected["labels"] >= 0).sum() > 10


def boxes_on_a_grid(generator: torch.Generator, count: int) -> Tensor:
    """Boxes whose corners are whole numbers, so that moving them apart is exact in FP32."""
    corners = torch.randint(0, 24, (count, 2), generator=generator)
    lengths = torch.randint(4, 24, (count, 2), generator=generator)
    return torch.cat([corners, corners + lengths], dim=1).float()


def check_suppression(sets: int, passes: int) -> tuple[int, int]:
    """Sets where all is settled, and those where it is not: the answer is torchvision's up to what is not settled."""
    generator, settled_sets = torch.Generator().manual_seed(passes), 0
    for _ in range(sets):
        count, groups = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 90), (1, 6)))
        boxes = boxes_on_a_grid(generator, count)
        scores = torch.rand(count, generator=generator).sort(descending=True).values
        labels = torch.randint(0, groups, (count,), generator=generator)
        # One half is an overlap that some of these boxes have exactly.
        threshold = 0.5 if count % 2 else float(torch.rand((), generator=generator)) * 0.8
        kept, settled = fixed_point_nms(boxes, torch.ones(count, dtype=torch.bool), threshold, passes, labels)
        expected = torch.zeros(count, dtype=torch.bool)
        expected[batched_nms(boxes, scores, labels, threshold)] = True
        sure = settled.to(torch.int32).cumprod(dim=0) > 0
        assert torch.equal(kept[sure], expected[sure])
        settled_sets += bool(settled.all())
    return settled_sets, sets - settled_sets


def test_suppression_is_torchvisions_on_drawn_sets() -> None:
    assert check_suppression(150, passes=40) == (150, 0)
    settled, unsettled = check_suppression(150, passes=2)
    assert settled
    assert unsettled


@pytest.mark.slow
def test_suppression_is_torchvisions_on_a_thousand_sets() -> None:
    assert check_suppression(1000, passes=60) == (1000, 0)
    assert check_suppression(1000, passes=3)[1] > 50


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_roi_align_is_torchvisions_at_every_level(aligned: bool, ratio: int) -> None:
    config = Detect().configured({"aligned": aligned, "sampling_ratio": ratio, "sampling_limit": 7}).config
    generator = torch.Generator().manual_seed(ratio)
    sizes = [(32, 48), (16, 24), (8, 12), (4, 6)]
    maps = [torch.randn(2, 5, *size, generator=generator, dtype=torch.float64) for size in sizes]
    corners = torch.rand(2, 60, 2, generator=generator, dtype=torch.float64) * torch.tensor([192.0, 128.0])
    lengths = torch.rand(2, 60, 2, generator=generator, dtype=torch.float64) * torch.tensor([192.0, 128.0])
    boxes = torch.cat([corners, (corners + lengths).minimum(torch.tensor([192.0, 128.0]))], dim=-1)
    boxes[:, 0], boxes[:, 1] = torch.tensor([191.9, 127.9, 192.0, 128.0]), torch.tensor([0.0, 0.0, 0.01, 0.01])
    positions = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
    given, fits = GatheredRoIAlign(7, config, sizes, torch.float64)(positions, boxes)
    side = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sqrt()
    level = (4 + (side / 224).log2() + 1e-6).floor().clamp(2, 5) - 2
    assert len(level.unique()) >= 2
    for image in range(2):
        for at in range(60):
            rois = torch.cat([torch.tensor([float(image)]), boxes[image, at]])[None].double()
            step = int(level[image, at])
            expected = roi_align(maps[step], rois, (7, 7), 0.25 / 2**step, ratio, aligned)
            torch.testing.assert_close(given[image, at].T.reshape(1, 5, 7, 7), expected, rtol=0, atol=1e-12)
    assert fits is None if ratio else bool(fits.all())


def test_roi_align_says_where_a_bin_has_more_pixels_than_samples() -> None:
    config = Detect().configured({"sampling_ratio": 0, "sampling_limit": 2}).config
    boxes = torch.tensor([[[0.0, 0.0, 50.0, 50.0]], [[0.0, 0.0, 120.0, 4.0]]])
    _, fits = GatheredRoIAlign(7, config, [(32, 48), (16, 24), (8, 12), (4, 6)], torch.float32)(
        torch.zeros(2, 2040, 3), boxes
    )
    assert fits is not None
    assert fits.tolist() == [True, False]


def test_saturated_scores_leave_the_proposals_what_they_are() -> None:
    hot = lively_model(2, {})
    with torch.no_grad():
        hot.rpn.head.cls_logits.weight.mul_(100.0)  # type: ignore[union-attr,operator]
    images = pictures(1)
    with torch.inference_mode():
        full = hot.forward_outputs(normalised(images))
        given = deploy_form(hot, DeploySpec(image_size=CANVAS))(images)
    expected = {name: tensor[0][full["labels"][0] >= 0] for name, tensor in full.items() if name != "exact"}
    assert_same_detections(given, [expected], 1e-2, 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"passes": 1}, "suppression"),
        ({"candidates": 20}, "candidates"),
        ({"sampling_ratio": 0, "sampling_limit": 1}, "samples"),
    ],
)
def test_a_limit_that_is_too_low_for_the_image_is_said(options: dict[str, Any], why: str) -> None:
    model = lively_model(0, options)
    with torch.inference_mode():
        given = deploy_form(model, DeploySpec(image_size=CANVAS))(pictures(1))
    assert float(given["exact"]) == 0.0, why


def test_losses_are_torchvisions_and_reach_every_head() -> None:
    model = lively_model(0, {}).train()
    images = normalised(pictures(2))
    boxes = torch.tensor([[10.0, 12.0, 60.0, 70.0], [80.0, 20.0, 150.0, 120.0]])
    masks = torch.zeros(2, *CANVAS, dtype=torch.uint8)
    masks[0, 12:70, 10:60] = masks[1, 20:120, 80:150] = 1
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 4]), "masks": masks}, {
        "boxes": boxes[:0], "labels": torch.tensor([], dtype=torch.int64), "masks": masks[:0]}]  # fmt: skip
    maps, hidden = {}, images
    for level, (downsample, stage) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
        maps[level] = hidden = stage(downsample(hidden))
    torch.manual_seed(0)
    losses = training_losses(model, maps, CANVAS, targets)
    own, theirs_from_1 = torchvisions(model).train(), [{**one, "labels": one["labels"] + 1} for one in targets]
    torch.manual_seed(0)  # its forward draws a size of the images first
    levels, sizes = own.backbone(images), ImageList(images, [CANVAS] * 2)
    proposals, expected = own.rpn(sizes, levels, theirs_from_1)
    expected = {**expected, **own.roi_heads(levels, proposals, sizes.image_sizes, theirs_from_1)[1]}
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6)
    sum(losses.values(), torch.zeros(())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(InputError, match="canvas"):
        training_losses(model, maps, (120, 192), targets)
    with pytest.raises(InputError, match="train"):
        training_losses(model.eval(), maps, CANVAS, targets)


def direct_anchors(config: Any, size: tuple[int, int], side: float, stride: int) -> Tensor:
    """mmdet's AnchorGenerator written out: base size by ratio, centre at the corner of the cell, not rounded."""
    rows = []
    for y in range(size[0]):
        for x in range(size[1]):
            for ratio in config.anchor_ratios:
                height = side * ratio**0.5
                width = side / ratio**0.5
                middle = (x * stride, y * stride)
                rows.append(
                    [middle[0] - width / 2, middle[1] - height / 2, middle[0] + width / 2, middle[1] + height / 2]
                )
    return torch.tensor(rows)


def test_mmdets_anchors_are_not_rounded_and_evenly_apart() -> None:
    model = random_model("tiny-test", 2, seed=0, task=find_task("detect").configured({**SMALL, **MMDET}))
    deployed = deploy_form(model, DeploySpec(image_size=(160, 224)))
    config, sizes = model.task.config, [(40, 56), (20, 28), (10, 14), (5, 7), (3, 4)]
    for level, size in enumerate(sizes):
        expected = direct_anchors(config, size, config.anchor_sizes[level], 4 << level)
        torch.testing.assert_close(deployed.proposals.get_buffer(f"anchors{level}"), expected, rtol=0, atol=1e-3)  # type: ignore[union-attr,operator]
    own = deploy_form(small_model(), DeploySpec(image_size=(160, 224)))
    rounded = own.proposals.get_buffer("anchors4")  # type: ignore[union-attr,operator]
    assert torch.equal(rounded, rounded.round())
    assert float(rounded[3, 0] - rounded[0, 0]) == 224 // 4


@pytest.mark.parametrize("clips_small", [True, False])
def test_both_forms_decode_as_mmdets_delta2bbox_or_as_torchvision(clips_small: bool) -> None:
    generator, stds = torch.Generator().manual_seed(0), torch.tensor([0.1, 0.1, 0.2, 0.2], dtype=torch.float64)
    config = Detect().configured({"clips_small": clips_small}).config
    changes = 30 * torch.randn(200, 4, generator=generator, dtype=torch.float64)
    corners = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 90
    boxes = torch.cat([corners, corners + 1 + 60 * torch.rand(200, 2, generator=generator)], dim=1)
    deltas, limit = changes * stds, abs(math.log(16 / 1000))
    sides, centres = boxes[:, 2:] - boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2
    grown = sides * deltas[:, 2:].clamp(-limit if clips_small else -math.inf, limit).exp()
    moved = centres + sides * deltas[:, :2]
    expected = torch.cat([moved - grown / 2, moved + grown / 2], dim=1)
    coder = detection_heads.Coder(config.box_weights, clips_small=clips_small)
    torch.testing.assert_close(coder.decode_single(changes, boxes), expected, rtol=0, atol=1e-9)
    expected[:, 0::2], expected[:, 1::2] = expected[:, 0::2].clamp(0, CANVAS[1]), expected[:, 1::2].clamp(0, CANVAS[0])
    decoder = BoxDecoder(config.box_weights, CANVAS, config, torch.float64)
    torch.testing.assert_close(decoder(changes, boxes), expected, rtol=0, atol=1e-9)


def test_what_detection_cannot_give_is_refused() -> None:
    model = small_model()
    for spec, why in (
        (DeploySpec(image_size=(100, 192)), "32 does not divide"),
        (DeploySpec(image_size=128, size_range=(96, 160)), "size"),
        (DeploySpec(image_size=128, outputs=("logits",)), "no output"),
        (DeploySpec(image_size=128, tta="flip"), "tta"),
    ):
        with pytest.raises(InputError, match=why):
            deploy_form(model, spec)
    with pytest.raises(InputError, match="no masks"):
        deploy_form(small_model(masks=False), DeploySpec(image_size=128, outputs=("masks",)))


def test_sizes_are_read_from_the_shapes_of_weights() -> None:
    for options in ({}, {"masks": False}):
        model = small_model(**options)
        task = find_task("detect").fitted(model.state_dict())
        for name in ("channels", "box_channels", *(("mask_channels",) if not options else ()), "masks"):
            assert getattr(task.config, name) == getattr(model.task.config, name)
        assert task.num_classes_in(model.state_dict()) == CLASSES


def record_of(model: ConvNeXtV2) -> ModelRecord:
    weights = WeightsRecord("random", "0", "0" * 64, "none (random weights)")
    return ModelRecord(
        "tiny-test", CLASSES, CANVAS, weights, Preprocessing(image_size=CANVAS), task="detect",
        task_config=model.task.options,
    )  # fmt: skip


def check_file(model: ConvNeXtV2, folder: Path, batches: Sequence[int]) -> None:
    """The FP32 file, for batches of 1 to 8, gives what torchvision's own model finds in each batch."""
    spec = ExportSpec(DeploySpec(image_size=CANVAS), batch=(1, 2, 8))
    path = export_onnx(model, record_of(model), spec, folder).path
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for batch in batches:
        images = pictures(batch, seed=batch)
        given = dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))
        assert_same_detections(given, theirs(model, normalised(images)), 1e-2, 1e-4, 1e-4)


def test_the_exported_file_of_boxes_gives_torchvisions(tmp_path: Path) -> None:
    check_file(small_model(masks=False, passes=3, sampling_ratio=1), tmp_path, [1, 2, 7])


@pytest.mark.slow
def test_the_exported_file_gives_torchvisions_boxes_and_masks(tmp_path: Path) -> None:
    check_file(small_model(), tmp_path, [1, 2, 7])


@pytest.mark.slow
def test_the_fp16_file_passes_in_the_emulator(tmp_path: Path) -> None:
    """The weights are random, with changes of boxes as small as trained ones (`Detect.temper`)."""
    model = random_model("tiny-test", CLASSES, seed=0, task=find_task("detect").configured(SMALL))
    spec = ExportSpec(DeploySpec("fp16", CANVAS), batch=(1, 2, 8))
    made = export_onnx(model, record_of(model), spec, tmp_path, verify=partial(verify_export, model=model))
    (verdict,) = made.manifest.facts.parity
    assert verdict.candidate == "emulator fp16"
    assert verdict.differences.detections is not None
    assert verdict.differences.detections.matched > 50
