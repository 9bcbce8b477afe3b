"""Every library's names and shapes become ours."""

import argparse
import copy

import pytest
import torch
import transformers
from safetensors.torch import save_file
from timm.models._features import FeatureListNet
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.model.weight_files import read_weight_file
from tests.conftest import TINY_TEST, TINY_V1_TEST
from tests.support.foreign_models import (
    MmClassifier,
    assert_same_weights,
    fcmae_state,
    randomise,
    reference_remap,
    saved,
    timm_model,
    torchvision_model,
    transformers_model,
)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_checkpoint_layout_variants_official_names(tiny_model, tiny_variant, tmp_path, suffix):
    path = saved(tiny_model.state_dict(), tmp_path / f"bare{suffix}")
    loaded = load_checkpoint(path, tiny_variant)
    assert_same_weights(loaded.model, tiny_model)
    assert loaded.weights.licence.startswith("unknown")


def test_checkpoint_layout_variants_a_training_checkpoint(tiny_model, tiny_variant, tmp_path):
    content = {
        "model": tiny_model.state_dict(),
        "optimizer": torch.optim.AdamW(tiny_model.parameters()).state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="convnextv2_atto"),
    }
    path = saved(content, tmp_path / "checkpoint-3.pth")
    assert_same_weights(load_checkpoint(path, tiny_variant).model, tiny_model)


def test_what_lies_beside_the_weights_comes_with_them(tiny_model, tmp_path):
    said = {"epoch": 3, "args": argparse.Namespace(mean=[0.5] * 3), "meta": {"dataset_meta": {"classes": ["a", "b"]}}}
    optimiser = torch.optim.AdamW(tiny_model.parameters())
    sum(parameter.sum() for parameter in tiny_model.parameters()).backward()
    optimiser.step()
    content = {"state_dict": tiny_model.state_dict(), "optimizer": optimiser.state_dict(), **said}
    assert read_weight_file(saved(content, tmp_path / "training.pth")).beside == said
    knot: list[object] = []
    knot += [knot] * 1000
    knotted = read_weight_file(saved({"model": tiny_model.state_dict(), "knot": knot}, tmp_path / "knot.pth"))
    assert len(knotted.beside["knot"]) == 1000
    assert read_weight_file(saved(tiny_model.state_dict(), tmp_path / "bare.pth")).beside == {}


def test_the_texts_of_a_safetensors_header_come_with_its_weights(tiny_model, tmp_path):
    save_file(tiny_model.state_dict(), tmp_path / "a.safetensors", {"format": "pt"})
    assert read_weight_file(tmp_path / "a.safetensors").beside == {"format": "pt"}


def relative_difference(path, variant, theirs, images) -> float:
    """Of the logits in float64, over the largest."""
    ours = load_checkpoint(path, variant).model.double()
    with torch.no_grad():
        found, expected = ours(images.double()), copy.deepcopy(theirs).double()(images.double())
    expected = getattr(expected, "logits", expected)
    assert expected.std() > 0.1
    return float((found - expected).abs().max() / expected.abs().max())


LIBRARIES = [
    pytest.param(make, TINY_TEST if version == 2 else TINY_V1_TEST, id=f"{make.__name__} v{version}")
    for make, versions in (
        (timm_model, (1, 2)), (transformers_model, (1, 2)), (MmClassifier, (1, 2)), (torchvision_model, (1,)),
    )
    for version in versions
]  # fmt: skip


@pytest.mark.parametrize(("make", "variant"), LIBRARIES)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_checkpoint_layout_variants_give_the_libraries_logits(tmp_path, images, make, variant, suffix):
    theirs = randomise(make(variant))
    path = saved(theirs.state_dict(), tmp_path / f"theirs{suffix}")
    assert relative_difference(path, variant, theirs, images) < 1e-6


def test_mmpretrains_classifier_is_found_below_any_module(tmp_path, images):
    theirs = randomise(MmClassifier(TINY_TEST))
    state = {f"image_backbone.{name}": tensor for name, tensor in theirs.backbone.state_dict().items()}
    loaded = load_checkpoint(saved(state, tmp_path / "a.pt"), TINY_TEST, num_classes=3, reset_head=True)
    assert torch.equal(loaded.model.norm.weight, theirs.backbone.norm3.weight)
    assert "weights from the entry 'image_backbone'" in loaded.notes
    whole = {f"model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    assert relative_difference(saved(whole, tmp_path / "b.pt"), TINY_TEST, theirs, images) < 1e-6


@pytest.mark.parametrize(("make", "variant"), LIBRARIES)
def test_two_tensors_that_change_places_change_the_logits(tmp_path, images, make, variant):
    """What the test above would see of a layout that is read wrongly: biases or gains of one length, swapped."""
    theirs = randomise(make(variant))
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    first, second = [name for name, tensor in state.items() if tensor.shape == (variant.dims[3],)][-2:]
    state[first], state[second] = state[second], state[first]
    assert relative_difference(saved(state, tmp_path / "swapped.pt"), variant, theirs, images) > 1e-3


def last_maps(model, images: Tensor) -> Tensor:
    for downsample, stage in zip(model.downsample_layers, model.stages, strict=True):
        images = stage(downsample(images))
    return images


def timm_features(variant):
    return FeatureListNet(
        timm_model(variant), out_indices=(0, 1, 2, 3), flatten_sequential=True
    ), lambda theirs, images: theirs(images)[-1]


def transformers_backbone(variant):
    config = transformers_model(variant).config
    config.out_features = ["stage1", "stage4"]
    theirs = transformers.ConvNextV2Backbone(config)
    return theirs, lambda theirs, images: theirs(images, output_hidden_states=True).hidden_states[-1]


def transformers_encoder(variant):
    return transformers_model(variant).convnextv2, lambda theirs, images: theirs(images).last_hidden_state


def mm_detector(variant):
    """A backbone with a norm for each stage, and the other parts of a detector."""
    theirs = MmClassifier(variant, outputs=(0, 1, 2, 3))
    theirs.head = nn.Identity()
    theirs.neck, theirs.bbox_head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
    return theirs, lambda theirs, images: last_maps(theirs.backbone, images)


@pytest.mark.parametrize(
    ("make", "norm", "strangers"),
    [
        (timm_features, None, ()),
        (transformers_backbone, None, ("hidden_states_norms (4 tensors)",)),
        (transformers_encoder, "layernorm", ()),
        (mm_detector, "backbone.norm3", ("backbone.norm0 (2 tensors)", "neck (2 tensors)", "bbox_head (2 tensors)")),
    ],
)
def test_a_backbone_loads_for_a_new_head_and_gives_its_librarys_maps(
    tiny_variant, tmp_path, images, make, norm, strangers
):
    theirs, run = make(tiny_variant)
    theirs = randomise(theirs).eval()
    path = saved(theirs.state_dict(), tmp_path / "backbone.pt")
    with pytest.raises(CheckpointError, match=r"no classification head.*reset_head"):
        load_checkpoint(path, tiny_variant)
    loaded = load_checkpoint(path, tiny_variant, num_classes=3, reset_head=True)
    with torch.no_grad():
        expected = run(theirs.double(), images.double())
        torch.testing.assert_close(last_maps(loaded.model.double(), images.double()), expected, rtol=1e-6, atol=1e-6)
    if norm is not None:
        kept = theirs.get_parameter(f"{norm}.weight")
        torch.testing.assert_close(loaded.model.norm.weight, kept, rtol=0, atol=0)
    aside = " ".join(note for note in loaded.notes if note.startswith("set aside"))
    assert [name for name in strangers if name not in aside] == []
    assert bool(aside) == bool(strangers)


def test_a_head_that_normalises_before_it_pools_is_no_layout_of_ours(tiny_variant, tmp_path):
    theirs = ConvNeXt(
        depths=tiny_variant.depths, dims=tiny_variant.dims, num_classes=10, use_grn=True, ls_init_value=None,
        head_norm_first=True,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"norm_pre\.weight"):
        load_checkpoint(saved(theirs.state_dict(), tmp_path / "first.pt"), tiny_variant)


def test_checkpoint_layout_variants_fcmae_kernels_are_turned(tiny_model, tiny_variant, tmp_path):
    state = fcmae_state(tiny_model)
    path = saved({"model": state}, tmp_path / "fcmae.pt")
    loaded = load_checkpoint(path, tiny_variant, num_classes=10, reset_head=True).model.state_dict()
    remapped = reference_remap(state)
    fresh = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert remapped.keys() == loaded.keys() - fresh
    torch.testing.assert_close({name: loaded[name] for name in remapped}, remapped, rtol=0, atol=0)
    original = tiny_model.state_dict()
    torch.testing.assert_close(remapped, {name: original[name] for name in remapped}, rtol=0, atol=0)


def test_checkpoint_layout_variants_fcmae_takes_a_new_head(tiny_model, tiny_variant, tmp_path):
    path = saved({"model": fcmae_state(tiny_model)}, tmp_path / "fcmae.pt")
    for incomplete in ({}, {"reset_head": True}, {"num_classes": 10}):
        with pytest.raises(CheckpointError, match=r"no classification head.*reset_head and num_classes"):
            load_checkpoint(path, tiny_variant, **incomplete)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_widened_exactly(tiny_model, tiny_variant, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in tiny_model.state_dict().items()}
    path, wide = saved(state, tmp_path / "half.safetensors"), {name: tensor.float() for name, tensor in state.items()}
    torch.testing.assert_close(read_weight_file(path).tensors, wide, rtol=0, atol=0)
    torch.testing.assert_close(dict(load_checkpoint(path, tiny_variant).model.state_dict()), wide, rtol=0, atol=0)


def test_float64_weights_are_rounded_to_float32_and_said_to_be(tiny_model, tiny_variant, tmp_path):
    state = {name: tensor.double() * (1 + 1e-12) for name, tensor in tiny_model.state_dict().items()}
    loaded = load_checkpoint(saved(state, tmp_path / "double.pt"), tiny_variant)
    assert_same_weights(loaded.model, tiny_model)
    assert "float64 weights, rounded to float32" in loaded.notes
    state["norm.weight"][0] = 1e300
    with pytest.raises(CorruptArtifactError, match=r"norm\.weight holds NaN or infinity"):
        load_checkpoint(saved(state, tmp_path / "large.pt"), tiny_variant)


def test_a_state_dict_that_mixes_two_layouts_is_refused(tiny_model, tiny_variant, tmp_path):
    state = tiny_model.state_dict() | {"stem.0.weight": torch.ones(8, 3, 4, 4)}
    with pytest.raises(CheckpointError, match="mixes layouts"):
        load_checkpoint(saved(state, tmp_path / "mixed.pt"), tiny_variant)


def test_another_networks_weights_are_not_recognised(tmp_path):
    path = saved(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(CheckpointError, match=r"holds no ConvNeXt weights.*weight, bias"):
        load_checkpoint(path)
