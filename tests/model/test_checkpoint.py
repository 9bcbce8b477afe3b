"""Our own files, weights that do not fit, and the choice of a source."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cnx_deploy.core.artifacts import sha256_of_file
from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model.checkpoint import hash_weights, load_checkpoint, resolve_model, save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.pretrained import PRETRAINED_TAGS
from cnx_deploy.model.weight_files import METADATA_KEY
from tests.support.foreign_models import assert_same_weights, saved


def test_a_saved_model_loads_with_the_same_weights(tiny_model, tiny_variant, tmp_path):
    path = save_checkpoint(tmp_path / "own.safetensors", tiny_model)
    assert_same_weights(load_checkpoint(path, tiny_variant).model, tiny_model)


def test_saving_the_same_model_again_gives_the_same_bytes_in_any_order_of_entries(tiny_model, tmp_path):
    entries = [(f"key {index}", "value") for index in range(8)]
    hashes = {
        sha256_of_file(save_checkpoint(tmp_path / f"{index}.safetensors", tiny_model, extra=dict(ordered)))
        for index, ordered in enumerate((entries, entries, entries[::-1], entries[::-1]))
    }
    assert len(hashes) == 1


def test_saving_a_loaded_model_gives_the_same_bytes(tiny_model, tiny_variant, tmp_path):
    first = save_checkpoint(tmp_path / "first.safetensors", tiny_model)
    second = save_checkpoint(tmp_path / "second.safetensors", load_checkpoint(first, tiny_variant).model)
    assert first.read_bytes() == second.read_bytes()


def test_what_is_said_of_a_model_comes_back_with_it(tiny_model, tiny_variant, tmp_path):
    names = tuple(f"class {index}" for index in range(10))
    preprocessing = Preprocessing(image_size=64, crop_ratio=1.0)
    path = save_checkpoint(
        tmp_path / "own.safetensors", tiny_model, class_names=names, preprocessing=preprocessing, licence="CC0-1.0"
    )
    loaded = load_checkpoint(path, tiny_variant)
    assert (loaded.class_names, loaded.preprocessing) == (names, preprocessing)
    assert loaded.weights.licence == "CC0-1.0"
    assert loaded.weights.origin == "checkpoint"
    assert loaded.weights.sha256 == hash_weights(tiny_model)


def test_the_header_states_network_and_extra_entries(tiny_model, tmp_path):
    path = save_checkpoint(tmp_path / "own.safetensors", tiny_model, extra={"epoch": "3"})
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()[METADATA_KEY])
    assert (header["variant"], header["num_classes"], header["epoch"]) == ("tiny-test", 10, "3")


def test_extra_entries_cannot_replace_the_licence(tiny_model, tmp_path):
    with pytest.raises(InputError, match="already has licence"):
        save_checkpoint(tmp_path / "own.safetensors", tiny_model, extra={"licence": "mine"})


def test_a_failed_save_leaves_the_old_file_and_no_other(tiny_model, tmp_path):
    path = save_checkpoint(tmp_path / "own.safetensors", tiny_model)
    before = path.read_bytes()
    with pytest.raises(InputError):
        save_checkpoint(path, tiny_model, class_names=["only one"])
    blocked = tmp_path / "folder.safetensors"
    (blocked / "inside").mkdir(parents=True)
    with pytest.raises(InputError, match="is a folder, where a file was expected"):
        save_checkpoint(blocked, tiny_model)
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder.safetensors", "own.safetensors"]


def test_one_altered_byte_of_our_own_file_is_noticed(tiny_model, tiny_variant, tmp_path):
    path = save_checkpoint(tmp_path / "own.safetensors", tiny_model)
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the lowest bit of a number's fraction
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="was altered"):
        load_checkpoint(path, tiny_variant)


def test_another_format_version_is_an_error(tiny_model, tiny_variant, tmp_path):
    path = tmp_path / "newer.safetensors"
    save_file(tiny_model.state_dict(), path, {METADATA_KEY: json.dumps({"format_version": 2})})
    with pytest.raises(CheckpointError, match="format version 2"):
        load_checkpoint(path, tiny_variant)


def test_the_hash_depends_on_names_types_shapes_and_values():
    layers = [nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False), nn.Sequential(nn.Linear(4, 2, bias=False))]
    layers += [nn.Linear(4, 2, bias=False).half(), nn.Linear(4, 2, bias=False).bfloat16(), nn.Linear(4, 2, bias=False)]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)  # so that neither shape nor name nor half's kind shows in the bytes
    nn.init.ones_(layers[-1].weight)
    assert len({hash_weights(layer) for layer in layers}) == len(layers)
    again = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(again.weight)
    assert hash_weights(again) == hash_weights(layers[0])


def test_the_hash_does_not_depend_on_the_order_of_the_layers():
    layers = {"first": nn.Linear(2, 3), "second": nn.Linear(3, 2)}
    assert hash_weights(nn.ModuleDict(layers)) == hash_weights(nn.ModuleDict(dict(reversed(layers.items()))))


def test_the_variant_is_found_from_the_shapes(tmp_path):
    path = save_checkpoint(tmp_path / "own.safetensors", random_model("femto", 5))
    loaded = load_checkpoint(path)
    assert (loaded.model.variant.name, loaded.model.num_classes) == ("femto", 5)


def test_checkpoint_wrong_variant_names_the_first_tensor_and_both_shapes(tmp_path):
    path = saved(random_model("atto", 5).state_dict(), tmp_path / "atto.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, "pico")
    message = str(caught.value)
    assert "downsample_layers.0.0.weight is 40x3x4x4 in the file, 64x3x4x4 in the model" in message
    assert "Its shapes are those of 'atto'" in message


def test_checkpoint_wrong_variant_that_no_table_has(tiny_variant, tmp_path):
    path = saved(random_model(replace(tiny_variant, depths=(1, 1, 1, 1)), 10).state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(CheckpointError, match=r"depths \(1, 1, 1, 1\) and widths \(8, 16, 32, 64\).*none of the known"):
        load_checkpoint(path)


def test_checkpoint_wrong_variant_the_table_shows_every_kind_of_difference(tiny_model, tiny_variant, tmp_path):
    state = tiny_model.state_dict()
    del state["stages.2.1.grn.gamma"]
    state["stages.0.0.pwconv1.bias"] = torch.ones(7)
    state["stages.0.0.gamma"] = torch.ones(8)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(saved(state, tmp_path / "altered.pt"), tiny_variant)
    assert str(caught.value).splitlines()[1:] == [
        "problem     tensor                   in the file  in the model",
        "shape       stages.0.0.pwconv1.bias  7            32",
        "missing     stages.2.1.grn.gamma     -            1x1x1x128",
        "unexpected  stages.0.0.gamma         8            -",
    ]


def test_a_long_difference_table_ends_in_a_count(tiny_model, tiny_variant, tmp_path):
    state = tiny_model.state_dict() | {f"stages.0.{index}.dwconv.scale": torch.ones(1) for index in range(33)}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(saved(state, tmp_path / "surplus.pt"), tiny_variant)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 1 + 20 + 1
    assert lines[-1] == "and 13 more, 33 in all"


def test_another_class_count_is_an_error_without_reset_head(tiny_model, tiny_variant, tmp_path):
    path = save_checkpoint(tmp_path / "own.safetensors", tiny_model)
    with pytest.raises(CheckpointError, match="has 10 classes, and 4 were asked for"):
        load_checkpoint(path, tiny_variant, num_classes=4)


def test_reset_head_draws_the_same_head_each_time_and_says_so(tiny_model, tiny_variant, tmp_path):
    path = save_checkpoint(tmp_path / "own.safetensors", tiny_model, class_names=[str(each) for each in range(10)])
    first, second = (load_checkpoint(path, tiny_variant, num_classes=500, reset_head=True) for _ in range(2))
    head = first.model.head
    assert_same_weights(first.model, second.model)
    assert (first.head_is_new, first.class_names) == (True, None)
    assert any("new head for 500 classes, drawn at random" in note for note in first.notes)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert head.bias.count_nonzero() == 0
    torch.testing.assert_close(first.model.norm.weight, tiny_model.norm.weight, rtol=0, atol=0)


def test_class_names_that_do_not_match_the_head_are_corrupt(tiny_model, tiny_variant, tmp_path):
    header = {"format_version": 1, "weights_sha256": hash_weights(tiny_model), "class_names": ["one", "two"]}
    path = tmp_path / "own.safetensors"
    save_file(tiny_model.state_dict(), path, {METADATA_KEY: json.dumps(header)})
    with pytest.raises(CorruptArtifactError, match="2 class names"):
        load_checkpoint(path, tiny_variant)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_checkpoint_nan_weights_are_named(tiny_model, tiny_variant, tmp_path, value):
    state = tiny_model.state_dict()
    state["stages.1.0.pwconv2.weight"][3, 5] = value
    with pytest.raises(CorruptArtifactError, match=r"stages\.1\.0\.pwconv2\.weight holds NaN or infinity"):
        load_checkpoint(saved(state, tmp_path / "nan.safetensors"), tiny_variant)


def test_without_a_source_the_weights_are_random_and_say_so(tiny_variant):
    resolved = resolve_model(tiny_variant, seed=7, num_classes=10)
    assert_same_weights(resolved.model, random_model(tiny_variant, 10, seed=7))
    assert (resolved.weights.origin, resolved.weights.reference) == ("random", "7")
    assert resolved.weights.licence == "none (random weights)"
    assert resolved.weights.sha256 == hash_weights(resolved.model)


def test_a_checkpoint_is_resolved_to_its_weights(tiny_model, tiny_variant, tmp_path):
    path = save_checkpoint(tmp_path / "own.safetensors", tiny_model)
    assert_same_weights(resolve_model(tiny_variant, checkpoint=path).model, tiny_model)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"variant": "atto", "checkpoint": "a.pt", "pretrained": PRETRAINED_TAGS[0]}, "expected one source"),
        ({"variant": "tiny", "pretrained": "convnextv2_atto.fcmae_ft_in1k"}, "not of variant 'tiny'"),
        ({"variant": None}, "need a variant"),
        ({"variant": "atto", "reset_head": True}, "no head to replace"),
        ({"variant": "atto", "num_classes": 0}, "at least 1"),
    ],
)
def test_a_contradictory_request_is_wrong_input(asked, message):
    with pytest.raises(InputError, match=message):
        resolve_model(**asked)
