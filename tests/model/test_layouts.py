"""Every library's names and shapes become ours."""

import argparse

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cnx_deploy.core.errors import CheckpointError
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.weight_files import read_weight_file
from tests.support.foreign_models import (
    assert_same_weights,
    fcmae_state,
    randomise,
    reference_remap,
    saved,
    timm_model,
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


@pytest.mark.parametrize("entry", ["model_ema", "state_dict_ema"])
def test_ema_weights_are_taken_when_asked_for_or_alone(tiny_variant, tmp_path, entry):
    plain, averaged = random_model(tiny_variant, 10, seed=1), random_model(tiny_variant, 10, seed=2)
    both = saved({"model": plain.state_dict(), entry: averaged.state_dict()}, tmp_path / "both.pt")
    alone = saved({entry: averaged.state_dict()}, tmp_path / "alone.pt")
    assert_same_weights(load_checkpoint(both, tiny_variant).model, plain)
    assert_same_weights(load_checkpoint(both, tiny_variant, ema=True).model, averaged)
    loaded = load_checkpoint(alone, tiny_variant)
    assert_same_weights(loaded.model, averaged)
    assert f"weights from the entry {entry!r}" in loaded.notes


def test_asking_for_absent_ema_weights_is_an_error(tiny_model, tiny_variant, tmp_path):
    path = saved({"model": tiny_model.state_dict()}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="no EMA weights"):
        load_checkpoint(path, tiny_variant, ema=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod."])
def test_wrappers_around_the_model_are_looked_through(tiny_model, tiny_variant, tmp_path, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in tiny_model.state_dict().items()}
    path = saved({"state_dict": state}, tmp_path / "wrapped.ckpt")
    assert_same_weights(load_checkpoint(path, tiny_variant).model, tiny_model)


@pytest.mark.parametrize("make", [timm_model, transformers_model])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_checkpoint_layout_variants_give_the_libraries_logits(tiny_variant, tmp_path, images, make, suffix):
    theirs = randomise(make(tiny_variant))
    loaded = load_checkpoint(saved(theirs.state_dict(), tmp_path / f"theirs{suffix}"), tiny_variant)
    with torch.no_grad():
        expected, found = theirs(images), loaded.model(images)
    torch.testing.assert_close(found, getattr(expected, "logits", expected), rtol=0, atol=1e-5)


def test_checkpoint_layout_variants_a_transformers_backbone(tiny_variant, tmp_path):
    theirs = randomise(transformers_model(tiny_variant)).convnextv2
    path = saved(theirs.state_dict(), tmp_path / "backbone.safetensors")
    loaded = load_checkpoint(path, tiny_variant, num_classes=3, reset_head=True)
    torch.testing.assert_close(loaded.model.norm.weight, theirs.layernorm.weight, rtol=0, atol=0)


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


def test_float64_weights_are_refused_rather_than_rounded(tiny_model, tiny_variant, tmp_path):
    path = saved(tiny_model.double().state_dict(), tmp_path / "double.pt")
    with pytest.raises(CheckpointError, match="is float64, expected float32"):
        load_checkpoint(path, tiny_variant)


def test_a_state_dict_that_mixes_two_layouts_is_refused(tiny_model, tiny_variant, tmp_path):
    state = tiny_model.state_dict() | {"stem.0.weight": torch.ones(8, 3, 4, 4)}
    with pytest.raises(CheckpointError, match="mixes layouts"):
        load_checkpoint(saved(state, tmp_path / "mixed.pt"), tiny_variant)


def test_another_networks_weights_are_not_recognised(tmp_path):
    path = saved(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(CheckpointError, match=r"holds no ConvNeXt weights.*weight, bias"):
        load_checkpoint(path)
