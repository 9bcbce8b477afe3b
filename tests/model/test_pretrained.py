"""Published weights, served from a cache laid out as the model hub's."""

from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from timm.models import save_for_hf
from timm.models.convnext import default_cfgs
from torch import Tensor, nn

from cnx_deploy.core.artifacts import sha256_of_file
from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model.checkpoint import hash_weights, load_pretrained
from cnx_deploy.model.pretrained import PRETRAINED_TAGS
from tests.support.foreign_models import randomise


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def cache_model(cache: Path, tag: str, model: nn.Module) -> Path:
    """Lay a timm model out as the model hub's cache does; return the weights' blob."""
    repository = cache / f"models--timm--{tag}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    save_for_hf(model, snapshot, safe_serialization=True)
    written = snapshot / "model.safetensors"
    blob = blobs / sha256_of_file(written)
    written.rename(blob)
    written.symlink_to(Path("..", "..", "blobs", blob.name))
    return blob


def test_the_tags_are_those_timm_lists():
    listed = {
        f"{name}.{tag}"
        for name, configs in default_cfgs.items()
        if name.startswith("convnextv2_")
        for tag, config in configs.cfgs.items()
        if config.has_weights
    }
    assert set(PRETRAINED_TAGS) == listed
    assert len(PRETRAINED_TAGS) == 26


def test_cached_weights_load_offline_with_what_their_config_says(offline, tmp_path, images):
    tag = "convnextv2_atto.fcmae_ft_in1k"
    theirs = randomise(timm.create_model(tag, pretrained=False).eval())
    cache_model(tmp_path, tag, theirs)
    loaded = load_pretrained(tag, cache_dir=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), theirs(images), rtol=0, atol=1e-5)
    assert (loaded.weights.origin, loaded.weights.reference) == ("pretrained", tag)
    assert loaded.weights.licence == "CC-BY-NC-4.0"
    assert loaded.weights.sha256 == hash_weights(loaded.model)
    assert loaded.preprocessing == Preprocessing()


def test_a_tag_without_a_head_needs_a_new_one(offline, tmp_path):
    tag = "convnextv2_atto.fcmae"
    cache_model(tmp_path, tag, timm.create_model(tag, pretrained=False))
    with pytest.raises(CheckpointError, match="without a head"):
        load_pretrained(tag, cache_dir=tmp_path)
    loaded = load_pretrained(tag, num_classes=4, reset_head=True, cache_dir=tmp_path)
    assert (loaded.model.num_classes, loaded.head_is_new) == (4, True)


def test_an_altered_cached_file_is_corrupt(offline, tmp_path):
    tag = "convnextv2_atto.fcmae"
    blob = cache_model(tmp_path, tag, timm.create_model(tag, pretrained=False))
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="was altered"):
        load_pretrained(tag, num_classes=4, reset_head=True, cache_dir=tmp_path)


def test_weights_that_are_not_cached_say_how_to_fetch_them(offline, tmp_path):
    with pytest.raises(MissingRequirementError, match=r"hf download timm/convnextv2_atto\.fcmae"):
        load_pretrained("convnextv2_atto.fcmae", cache_dir=tmp_path)


def test_an_unknown_tag_lists_close_ones():
    with pytest.raises(InputError, match=r"convnextv2_atto\.fcmae_ft_in1k"):
        load_pretrained("convnextv2_atto.fcmae_in1k")
