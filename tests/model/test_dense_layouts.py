"""Networks of segmentation and detection toolboxes, read from their files as written, give their toolbox's answer."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from timm.models._features import FeatureListNet
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CheckpointError
from cnx_deploy.model.checkpoint import LoadedModel, ModelRequest, load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import create_model
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.verification.inspect import inspect_file
from tests.conftest import TINY_TEST, TINY_V1_TEST
from tests.support.foreign_models import (
    MmDetector,
    MmSegmentor,
    assert_same_weights,
    mm_levels,
    official_backbone,
    randomise,
    saved,
    timm_model,
    torchvision_model,
)

NAMES = ["wall", "sky", "tree", "road", "bed"]
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
VERSIONS = pytest.mark.parametrize("variant", [TINY_TEST, TINY_V1_TEST], ids=["v2", "v1"])


def of_mmengine(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """What mmengine's CheckpointHook writes."""
    meta = {"mmengine_version": "0.10.3", "cfg": "model = dict()", "dataset_meta": {"classes": NAMES, "palette": []}}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    return {"meta": meta, "state_dict": state or model.state_dict(), "optimizer": optimizer}


def answers(loaded: LoadedModel) -> dict[str, Tensor]:
    """Both heads' logits in float64."""
    with torch.no_grad():
        return loaded.model.double().training_outputs(IMAGES)


def segmentor(variant: Any, **words: Any) -> MmSegmentor:
    model = randomise(MmSegmentor(variant, **words)).eval()
    assert isinstance(model, MmSegmentor)
    return model


def upernet(variant: Any, scales: tuple[int, ...] = (1, 2, 3, 6)) -> transformers.PreTrainedModel:
    kind = f"ConvNext{'V2' if variant.version == 2 else ''}Config"
    stages = [f"stage{level}" for level in range(1, 5)]
    backbone = getattr(transformers, kind)(
        depths=list(variant.depths), hidden_sizes=list(variant.dims), out_features=stages
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=variant.dims[2],
        pool_scales=list(scales), id2label=dict(enumerate(NAMES)), label2id={name: at for at, name in enumerate(NAMES)},
    )  # fmt: skip
    return randomise(transformers.UperNetForSemanticSegmentation(config)).eval()


# Segmentation


@VERSIONS
@pytest.mark.parametrize("official", [False, True], ids=["mmpretrain", "facebookresearch"])
def test_a_network_of_mmseg_gives_its_logits_and_class_names(variant: Any, official: bool, tmp_path: Path) -> None:
    theirs = segmentor(variant)
    state = official_backbone(theirs.state_dict()) if official else None
    path = saved(of_mmengine(theirs, state), tmp_path / "iter_160000.pth")
    loaded = load_checkpoint(path, variant)
    assert (loaded.model.task.name, loaded.class_names) == ("segment", tuple(NAMES))
    assert loaded.model.task.options == {"channels": 16, "auxiliary_channels": 8}
    assert f"layout {'official' if official else 'mmpretrain'} with heads of mmseg" in loaded.notes[0]
    assert not [note for note in loaded.notes if "set aside" in note and "head" in note]
    # Nobody says how images are made. A centre crop would leave the edges of a picture without a class.
    images = loaded.preprocessing
    assert (images.crop_mode, images.crop_ratio, images.interpolation) == ("corner", 1.0, "bilinear")
    assert "crop_mode corner" in "".join(loaded.told_of_images())
    with torch.no_grad():
        expected = theirs.double()(IMAGES)
    for name, output in answers(loaded).items():
        torch.testing.assert_close(output, expected[name], rtol=1e-9, atol=1e-9)


@VERSIONS
def test_transformers_upernet_gives_its_logits_pools_and_class_names(variant: Any, tmp_path: Path) -> None:
    theirs = upernet(variant, scales=(1, 2, 5))
    theirs.save_pretrained(tmp_path)
    transformers.SegformerImageProcessor(size={"height": 64, "width": 96}).save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path, variant)
    assert (loaded.model.task.name, loaded.class_names) == ("segment", tuple(NAMES))
    assert loaded.model.task.options["pool_scales"] == [1, 2, 5]
    preprocessing = loaded.preprocessing
    assert (loaded.problem, preprocessing.image_size, preprocessing.crop_mode) == (None, (64, 96), "squash")
    with torch.no_grad():
        single = loaded.model.forward_outputs(IMAGES.float(), ("full-logits",))["full_logits"]
        expected = theirs.double()(IMAGES).logits  # of the images' size
        double = loaded.model.double().forward_outputs(IMAGES, ("full-logits",))["full_logits"]
    assert float((single - expected).abs().max() / expected.std()) < 1e-5
    torch.testing.assert_close(double, expected, rtol=1e-9, atol=1e-9)


def test_pools_without_a_configuration_are_the_usual_ones_and_others_are_an_error_or_an_option(tmp_path: Path) -> None:
    path = saved(upernet(TINY_TEST, scales=(1, 2, 5)).state_dict(), tmp_path / "bare.bin")
    with pytest.raises(CheckpointError, match=r"psp_modules\.3"):
        load_checkpoint(path, TINY_TEST)
    told = load_checkpoint(path, TINY_TEST, task_options={"pool_scales": [1, 2, 5]})
    assert told.model.task.options["pool_scales"] == [1, 2, 5]


def test_tensors_that_change_places_change_the_logits(tmp_path: Path) -> None:
    theirs = segmentor(TINY_TEST)
    state = dict(theirs.state_dict())
    one, other = (f"decode_head.fpn_convs.{at}.bn.running_mean" for at in (0, 1))
    state[one], state[other] = state[other], state[one]
    loaded = load_checkpoint(saved(state, tmp_path / "swapped.pt"), TINY_TEST)
    with torch.no_grad():
        expected = theirs.double()(IMAGES)["logits"]
    assert float((answers(loaded)["logits"] - expected).abs().max()) > 1e-3


def test_a_network_without_auxiliary_head_or_counted_batches_is_whole(tmp_path: Path) -> None:
    theirs = segmentor(TINY_TEST, auxiliary=0)
    state = {name: each for name, each in theirs.state_dict().items() if "num_batches" not in name}
    loaded = load_checkpoint(saved({"state_dict": state}, tmp_path / "old.pth"), TINY_TEST)
    assert loaded.model.task.options == {"channels": 16, "auxiliary_channels": 0}
    with torch.no_grad():
        expected = theirs.double()(IMAGES)["logits"]
    torch.testing.assert_close(answers(loaded)["logits"], expected, rtol=1e-9, atol=1e-9)


def test_what_was_read_is_written_and_read_again_as_ours_with_its_options(tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(of_mmengine(segmentor(TINY_TEST)), tmp_path / "theirs.pth"), TINY_TEST)
    path = save_checkpoint(tmp_path / "ours.safetensors", loaded.model, class_names=loaded.class_names)
    again = load_checkpoint(path, TINY_TEST)
    assert_same_weights(again.model, loaded.model)
    assert (again.model.task.name, again.model.task.options) == ("segment", loaded.model.task.options)
    bare = saved(loaded.model.state_dict(), tmp_path / "bare.pt")
    assert_same_weights(load_checkpoint(bare, TINY_TEST).model, loaded.model)


def test_a_prefix_and_an_average_of_weights_are_found_with_their_heads(tmp_path: Path) -> None:
    theirs, average = segmentor(TINY_TEST), segmentor(TINY_TEST)
    with torch.no_grad():
        average.decode_head.conv_seg.weight.mul_(2)
    content = {"state_dict": {f"model.{name}": each for name, each in theirs.state_dict().items()}}
    content["ema_model"] = average.state_dict()
    path = saved(content, tmp_path / "both.ckpt")
    for ema, model in ((None, theirs), (True, average)):
        loaded = load_checkpoint(path, TINY_TEST, ema=ema)
        weight = loaded.model.get_parameter("decode_head.conv_seg.weight")
        assert torch.equal(weight, model.decode_head.conv_seg.weight)


# Detection

DETECTION = {"channels": 16, "box_channels": 32, "mask_channels": 16}


def found_in(loaded: LoadedModel, images: Tensor = IMAGES) -> list[dict[str, Tensor]]:
    """The detections that are there, of each image."""
    with torch.no_grad():
        outputs = loaded.model.double().forward_outputs(images)
    names = [name for name in outputs if name != "exact"]
    return [{name: outputs[name][at][outputs["labels"][at] >= 0] for name in names} for at in range(len(images))]


def assert_same_detections(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Both are in the order of their scores, which differ by more than FP64's rounding."""
    for one, other in zip(found, expected, strict=True):
        assert 3 <= len(other["labels"]) == len(one["labels"])
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)


def unsure(model: nn.Module) -> Any:
    """Random weights with scores between 0 and 1: equal ones have no order that two implementations share."""
    randomise(model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("rpn_cls.weight", "fc_cls.weight", "cls_logits.weight", "cls_score.weight")):
                parameter.mul_(0.05)
    return model


def detector(variant: Any, **words: Any) -> MmDetector:
    model: MmDetector = unsure(MmDetector(variant, **words))
    return model


@pytest.mark.parametrize(
    ("variant", "official", "masks"), [(TINY_TEST, False, True), (TINY_V1_TEST, True, True), (TINY_TEST, True, False)]
)
def test_a_detector_of_mmdet_gives_its_boxes_scores_classes_and_masks(
    variant: Any, official: bool, masks: bool, tmp_path: Path
) -> None:
    theirs = detector(variant, masks=masks)
    state = official_backbone(theirs.state_dict()) if official else None
    loaded = load_checkpoint(saved(of_mmengine(theirs, state), tmp_path / "epoch_36.pth"), variant)
    assert (loaded.model.task.name, loaded.class_names) == ("detect", tuple(NAMES))
    assert loaded.model.task.options.items() >= {"rounded_anchors": False, "aligned": True, "masks": masks}.items() - (
        {("masks", True)}
    )
    assert "with heads of mmdet: the task is detect" in loaded.notes[0]
    assert "aligned True" in loaded.notes[0]
    with torch.no_grad():
        expected = [theirs.double()(image[None]) for image in IMAGES]
    assert_same_detections(found_in(loaded), expected)


@pytest.mark.parametrize("option", ["rounded_anchors", "aligned", "sampling_ratio", "clips_small"])
def test_each_value_of_mmdet_that_is_torchvisions_instead_changes_the_detections(option: str, tmp_path: Path) -> None:
    theirs = detector(TINY_TEST)
    usual = {"rounded_anchors": True, "aligned": False, "sampling_ratio": 2, "clips_small": False}
    path = saved(theirs.state_dict(), tmp_path / "mm.pth")
    if option == "clips_small":
        with torch.no_grad():
            theirs.rpn_head.rpn_reg.bias[3::4] = -9.0
    loaded = load_checkpoint(saved(theirs.state_dict(), path), TINY_TEST, task_options={option: usual[option]})
    with torch.no_grad():
        expected = [theirs.double()(image[None]) for image in IMAGES]
    with pytest.raises(AssertionError):
        assert_same_detections(found_in(loaded), expected)


def wrapped(body: str) -> tuple[nn.Module, Any]:
    """A backbone as people give it to torchvision's detection, its maps by name, and its variant."""
    if body == "ours":
        model = randomise(create_model(TINY_TEST, 4, task=find_task("detect").configured(DETECTION)))
        return Stages(model), TINY_TEST
    if body == "timm":
        features = FeatureListNet(timm_model(TINY_TEST), out_indices=(0, 1, 2, 3), flatten_sequential=True)
        return NamedMaps(features), TINY_TEST
    features = torchvision_model(TINY_V1_TEST)
    names = {f"features.{at}": str(level) for level, at in enumerate((1, 3, 5, 7))}
    if body == "extractor":
        return create_feature_extractor(features, names), TINY_V1_TEST
    return IntermediateLayerGetter(features.features, {name[9:]: at for name, at in names.items()}), TINY_V1_TEST


class NamedMaps(FeatureListNet):
    """timm's list of maps by name."""

    def __init__(self, features: FeatureListNet) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(features.__dict__)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(level): maps for level, maps in enumerate(super().forward(images))}


class Stages(nn.Module):
    """Our network's stages and norms, under their names."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.downsample_layers, self.stages = model.downsample_layers, model.stages
        for level in range(4):
            self.add_module(f"norm{level}", model.get_submodule(f"norm{level}"))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(level): maps for level, maps in enumerate(mm_levels(self, images))}


class Backbone(nn.Module):
    """torchvision's BackboneWithFPN over any body."""

    def __init__(self, body: nn.Module, widths: Any, channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, channels
        self.fpn = FeaturePyramidNetwork(list(widths), channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels: dict[str, Tensor] = self.fpn(self.body(images))
        return levels


@pytest.mark.parametrize(
    ("body", "masks"), [("ours", True), ("timm", False), ("timm", True), ("extractor", True), ("getter", False)]
)
def test_torchvisions_detectors_on_any_backbone_give_what_they_find(body: str, masks: bool, tmp_path: Path) -> None:
    own, variant = wrapped(body)
    words: dict[str, Any] = {
        "min_size": 64, "max_size": 96, "image_mean": [0.0] * 3, "image_std": [1.0] * 3,
        "rpn_anchor_generator": AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        "box_head": TwoMLPHead(49 * 16, 32), "box_predictor": FastRCNNPredictor(32, 5),
    }  # fmt: skip
    if masks:
        words |= {"mask_head": MaskRCNNHeads(16, (16,) * 4, 1), "mask_predictor": MaskRCNNPredictor(16, 16, 5)}
    theirs = unsure((MaskRCNN if masks else FasterRCNN)(Backbone(own, variant.dims, 16), **words))
    loaded = load_checkpoint(saved({"model": theirs.state_dict()}, tmp_path / "checkpoint.pth"), variant)
    assert (loaded.model.task.name, loaded.model.num_classes) == ("detect", 4)
    assert loaded.model.task.config.stage_norms is (body == "ours")
    assert "with heads of torchvision" in loaded.notes[0]
    expected: list[dict[str, Tensor]] = []
    theirs.double().transform.postprocess = lambda results, *_: expected.extend(results)
    with torch.no_grad():
        theirs(list(IMAGES))
    for one in expected:
        one["labels"] -= 1
        one |= {"masks": one["masks"][:, 0]} if masks else {}
    assert_same_detections(found_in(loaded), expected)


@pytest.mark.parametrize("layout", ["gpu", "cpu"])
def test_a_network_without_norms_between_stages_and_pyramid_is_deployed_exactly(layout: Any) -> None:
    few = {"pre_nms": 150, "proposals": 100, "detections": 30, "candidates": 300, "passes": 30}
    task = find_task("detect").configured({**DETECTION, **few, "stage_norms": False})
    model = unsure(create_model(TINY_TEST, 4, task=task)).double()
    spec = DeploySpec("fp64", (64, 96), layout=layout)
    images = torch.rand(1, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (spec.mean, spec.std))
    with torch.no_grad():
        expected, found = model((images - mean) / std), deploy_form(model, spec)(images)
    assert "norm0.weight" not in model.state_dict()
    assert float(found["exact"]) == 1.0
    for name in ("boxes", "scores", "labels", "masks"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-7)


def test_names_of_torchvision_before_sequences_are_todays(tmp_path: Path) -> None:
    model = randomise(create_model(TINY_TEST, 4, task=find_task("detect").configured(DETECTION)))
    old = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^fpn\.(\w+)\.(\d)\.0\.", r"backbone.fpn.\1.\2.", name)
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        name = re.sub(r"mask_head\.(\d)\.0\.", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}.", name)
        old[name if name.startswith(("backbone.", "rpn.", "roi_heads.")) else f"backbone.body.{name}"] = tensor
    assert old.keys() >= {"roi_heads.mask_head.mask_fcn1.weight", "backbone.fpn.inner_blocks.0.weight"}
    assert_same_weights(load_checkpoint(saved(old, tmp_path / "old.pth"), TINY_TEST).model, model)


def test_a_cascade_is_refused_as_no_network_of_the_task(tmp_path: Path) -> None:
    state = {
        name.replace("bbox_head.", "bbox_head.0."): each for name, each in detector(TINY_TEST).state_dict().items()
    }
    path = saved(state, tmp_path / "cascade.pth")
    with pytest.raises(CheckpointError, match=r"has no detect head.*set aside.*roi_head"):
        load_checkpoint(path, TINY_TEST, task="detect")


# The task that a file is of


def test_the_heads_tell_the_task_and_another_one_takes_the_backbone_or_is_refused(tmp_path: Path) -> None:
    theirs = segmentor(TINY_TEST)
    path = saved(of_mmengine(theirs), tmp_path / "segmentor.pth")
    told: list[str] = []
    ModelRequest(checkpoint=path, variant="tiny-test").load(told.append)
    assert "the task is segment" in told[0]
    facts = inspect_file(path).facts
    assert (facts["layout"], facts["task"], facts["classes"]) == ("mmpretrain with heads of mmseg", "segment", 5)
    with pytest.raises(CheckpointError, match=r"a network of the task segment by its heads, and classification was"):
        load_checkpoint(path, TINY_TEST, task="classification")
    classifier = load_checkpoint(path, TINY_TEST, task="classification", num_classes=3, reset_head=True)
    features = load_checkpoint(path, TINY_TEST, task="features")
    again = load_checkpoint(path, TINY_TEST, num_classes=3, reset_head=True)
    assert (again.model.task.name, again.model.num_classes, again.head_is_new) == ("segment", 3, True)
    for loaded in (classifier, features):
        assert torch.equal(loaded.model.norm.weight, theirs.backbone.norm3.weight)
        assert "decode_head" in " ".join(note for note in loaded.notes if note.startswith("set aside"))
    with torch.no_grad():
        expected = mm_levels(theirs.backbone, IMAGES.float())[3]
        maps = features.model.forward_outputs(IMAGES.float(), ("maps",))["stage4"]
    norm = features.model.norm
    found = nn.functional.layer_norm(maps.movedim(1, -1), (64,), norm.weight, norm.bias, 1e-6).movedim(-1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_a_classifier_asked_for_a_dense_task_needs_a_new_head_on_its_backbone(task: str, tmp_path: Path) -> None:
    theirs = randomise(timm_model(TINY_TEST))
    path = saved(theirs.state_dict(), tmp_path / "classifier.pt")
    with pytest.raises(CheckpointError, match=f"has no {task} head"):
        load_checkpoint(path, TINY_TEST, task=task)
    loaded = load_checkpoint(path, TINY_TEST, task=task, num_classes=4, reset_head=True)
    assert (loaded.model.num_classes, loaded.head_is_new) == (4, True)
    assert torch.equal(loaded.model.downsample_layers[0][0].weight, theirs.stem[0].weight)
