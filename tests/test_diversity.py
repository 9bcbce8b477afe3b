"""The cosine distance of channels against a double loop over pairs, and the command."""

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image
from torch import nn

from cnx_deploy.cli import main
from cnx_deploy.data import Preprocessing, image_like_batches
from cnx_deploy.diversity.measure import channel_distance, measure_diversity
from cnx_deploy.errors import CheckFailedError, InputError
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import random_model

IMAGES = Preprocessing(image_size=64)


def by_double_loop(maps):
    """(positions, channels) -> the paper's sum, a pair at a time in float64."""
    total, channels = 0.0, maps.double().unbind(dim=1)
    for one in channels:
        for other in channels:
            cosine = torch.dot(one, other) / (one.norm() * other.norm())
            total += (1.0 - float(cosine)) / 2.0
    return total / len(channels) ** 2


def distance(*channels):
    return float(channel_distance(torch.tensor(channels).T[None].float())[0])


def batches(count=3, size=64):
    return image_like_batches(count, size, batch_size=2)


@pytest.mark.parametrize("shape", [(1, 7), (49, 24), (5, 40)])
def test_the_distance_is_that_of_a_double_loop_over_all_pairs(shape):
    maps = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) + 0.3
    found, dead = channel_distance(maps)
    assert found.tolist() == pytest.approx([by_double_loop(each) for each in maps], abs=1e-7)
    assert dead.tolist() == [0, 0, 0]


def test_channels_that_are_alike_up_to_a_positive_factor_have_no_distance():
    assert distance([1, 2, 3], [2, 4, 6], [0.1, 0.2, 0.3]) == pytest.approx(0.0, abs=1e-7)


def test_orthogonal_channels_have_a_half_less_the_pairs_of_a_channel_with_itself():
    assert distance([1, 0, 0, 0], [0, 5, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]) == pytest.approx(
        0.5 * (1 - 1 / 4), abs=1e-7
    )


def test_opposite_channels_have_a_distance_of_one_each():
    assert distance([1, -2, 3], [-2, 4, -6]) == pytest.approx(0.5, abs=1e-7)  # two of the four pairs
    assert distance([1, -2, 3], [-2, 4, -6], [3, -6, 9]) == pytest.approx(4 / 9, abs=1e-7)


def test_channels_of_zeros_are_left_out_and_counted():
    maps = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0))
    kept = channel_distance(maps[:, :, [0, 2, 5]])[0]
    maps[:, :, [1, 3, 4]] = 0.0
    found, dead = channel_distance(maps)
    torch.testing.assert_close(found, kept)
    assert dead.tolist() == [3]
    assert math.isnan(channel_distance(torch.zeros(1, 4, 5))[0])


def test_channels_too_small_for_a_float32_square_still_count():
    maps = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0))
    found, dead = channel_distance(maps * 1e-30)
    assert float(found) == pytest.approx(by_double_loop(maps[0]), abs=1e-6)
    assert dead.tolist() == [0]


def test_a_blocks_tensors_are_those_that_a_pass_by_hand_gives(tiny_model):
    found = {each.module: each for each in measure_diversity(tiny_model, IMAGES, batches())}
    expected = {}
    pixels = torch.cat(list(batches()))
    with torch.inference_mode():
        double = tiny_model.double()
        images = double.downsample_layers[0](IMAGES.normalise(pixels).double())
        block = double.stages[0][0]
        hidden = nn.functional.gelu(block.pwconv1(block.norm(block.dwconv(images).permute(0, 2, 3, 1))))
        expected["stages.0.0.act"] = hidden.flatten(1, 2)
        expected["stages.0.0.grn"] = block.grn(hidden).flatten(1, 2)
        branch = block.pwconv2(block.grn(hidden)).permute(0, 3, 1, 2)
        expected["stages.0.0"] = (images + branch).flatten(2).transpose(1, 2)
    for module, maps in expected.items():
        distances = [by_double_loop(each) for each in maps]
        assert found[module].distance == pytest.approx(sum(distances) / 3, abs=1e-6), module
        assert found[module].channels == maps.shape[2]
    assert len({round(each.distance, 6) for each in found.values()}) == len(found)


def test_every_block_has_its_three_tensors_in_the_order_of_the_data(tiny_model):
    found = measure_diversity(tiny_model, IMAGES, batches(1))
    blocks = ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"]
    assert [each.module for each in found] == [f"{block}{part}" for block in blocks for part in (".act", ".grn", "")]
    assert not any(module._forward_hooks for module in tiny_model.modules())


def test_a_network_whose_channels_are_copies_of_one_has_collapsed(tiny_model):
    before = measure_diversity(tiny_model, IMAGES, batches())
    with torch.no_grad():
        layer = tiny_model.stages[2][1].pwconv1
        layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
        layer.bias.fill_(float(layer.bias[0]))
    after = {each.module: each.distance for each in measure_diversity(tiny_model, IMAGES, batches())}
    assert after["stages.2.1.act"] == pytest.approx(0.0, abs=1e-6)
    assert {each.module: each.distance for each in before}["stages.2.1.act"] > 0.1


def test_a_positive_gain_without_beta_leaves_the_distance_as_it_was(tiny_model):
    with torch.no_grad():
        for block in (block for stage in tiny_model.stages for block in stage):
            block.grn.gamma.abs_()
            block.grn.beta.zero_()
    found = {each.module: each.distance for each in measure_diversity(tiny_model, IMAGES, batches())}
    pairs = [(value, found[module[:-3] + "grn"]) for module, value in found.items() if module.endswith("act")]
    assert all(act == pytest.approx(grn, abs=1e-6) for act, grn in pairs)


def test_v1_has_activation_and_output_alone(tiny_v1_model):
    found = measure_diversity(tiny_v1_model, IMAGES, batches(1))
    assert {each.part for each in found} == {"act", "output"}
    assert len(found) == 10


def test_dead_channels_of_a_block_are_told(tiny_model):
    with torch.no_grad():
        layer = tiny_model.stages[0][0].pwconv1
        layer.weight[:4] = 0.0
        layer.bias[:4] = 0.0
    found = {each.module: each for each in measure_diversity(tiny_model, IMAGES, batches())}
    assert found["stages.0.0.act"].dead_share == pytest.approx(4 / 32)
    assert found["stages.1.0.act"].dead_share == 0.0


def test_values_that_are_not_finite_are_an_error_not_a_number(tiny_model):
    with torch.no_grad():
        tiny_model.stages[1][0].pwconv1.bias[0] = float("nan")
    with pytest.raises(CheckFailedError, match=r"stages\.1\.0 \(act\) gave values that are NaN"):
        measure_diversity(tiny_model, IMAGES, batches(1))


def test_no_image_is_an_error(tiny_model):
    with pytest.raises(InputError, match="no image"):
        measure_diversity(tiny_model, IMAGES, [])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two attos at 32 px, of ten and of three classes, under one file name; the second's stage 4 has collapsed."""
    root = tmp_path_factory.mktemp("diversity")
    healthy, collapsed = random_model("atto", 10, seed=0), random_model("atto", 3, seed=1)
    with torch.no_grad():
        for block in collapsed.stages[3]:
            block.pwconv1.weight.copy_(block.pwconv1.weight[:1].expand_as(block.pwconv1.weight))
            block.pwconv1.bias.zero_()
    preprocessing = Preprocessing(image_size=32).to_dict()
    return [
        save_checkpoint(root / name / "best.safetensors", model, preprocessing=preprocessing)
        for name, model in (("healthy", healthy), ("collapsed", collapsed))
    ]


def run(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_the_command_puts_checkpoints_side_by_side(checkpoints, capsys, tmp_path):
    words = (*checkpoints, "--samples", "2", "--image-size", "64")
    code, out, err = run(capsys, "diversity", *words)
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["1:", "healthy/best"], ["2:", "collapsed/best"]]
    rows = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in lines if line.startswith("stages.")}
    assert (len(rows), {len(row) for row in rows.values()}) == (12, {6})
    assert rows["stages.3.0"][0] > 0.1
    assert rows["stages.3.0"][3] == 0.0
    code, out, err = run(capsys, "diversity", *words, "--json", "--plot", tmp_path / "plot.svg")
    first, second = json.loads(out)["networks"]
    table = [each["distance"] for each in first["tensors"] if each["block"] == "stages.1.1"]
    assert rows["stages.1.1"][:3] == pytest.approx(table, abs=5e-5)
    assert (first["images"], second["name"], second["variant"]) == (2, "collapsed/best", "atto")
    text = " ".join(ElementTree.parse(tmp_path / "plot.svg").getroot().itertext())
    assert "healthy/best" in text
    assert "collapsed/best" in text


def test_the_command_measures_the_images_of_a_folder_and_names_broken_ones(checkpoints, capsys, tmp_path):
    for index in range(3):
        Image.new("RGB", (32, 32), (80 * index, 10, 200)).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_text("no image")
    code, out, err = run(capsys, "diversity", checkpoints[0], "--data", tmp_path, "--json")
    (network,) = json.loads(out)["networks"]
    assert (code, network["images"], network["image_size"]) == (0, 3, 32)
    assert "1 images cannot be read and are left out" in err
