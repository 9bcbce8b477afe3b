"""Networks of segmentation and detection toolboxes, read from their files as written, give their toolbox's answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from cnx_deploy.core.errors import CheckpointError
from cnx_deploy.model.checkpoint import LoadedModel, ModelRequest, load_checkpoint, save_checkpoint
from cnx_deploy.verification.inspect import inspect_file
from tests.conftest import TINY_TEST, TINY_V1_TEST
from tests.support.foreign_models import (
    MmSegmentor,
    assert_same_weights,
    mm_levels,
    official_backbone,
    randomise,
    saved,
    timm_model,
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


def test_a_classifier_asked_to_segment_needs_a_new_head_on_its_backbone(tmp_path: Path) -> None:
    theirs = randomise(timm_model(TINY_TEST))
    path = saved(theirs.state_dict(), tmp_path / "classifier.pt")
    with pytest.raises(CheckpointError, match="has no segment head"):
        load_checkpoint(path, TINY_TEST, task="segment")
    loaded = load_checkpoint(path, TINY_TEST, task="segment", num_classes=4, reset_head=True)
    assert (loaded.model.num_classes, loaded.head_is_new) == (4, True)
    assert torch.equal(loaded.model.downsample_layers[0][0].weight, theirs.stem[0].weight)
