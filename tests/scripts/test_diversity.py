"""The cosine distance of channels against a double loop over pairs."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from cnx_deploy.core.errors import CheckFailedError, InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import image_like_batches
from cnx_deploy.data.preprocessing import normalise

SCRIPT = Path(__file__).parents[2] / "scripts" / "diversity.py"
IMAGES = Preprocessing(image_size=64)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("diversity_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_double_loop(maps):
    """(positions, channels) -> the paper's sum, a pair at a time in float64."""
    units = [channel / channel.norm() for channel in maps.double().unbind(dim=1)]
    return sum((1.0 - float(one @ other)) / 2.0 for one in units for other in units) / len(units) ** 2


def measured(script, model):
    found = script.measure_diversity(model, IMAGES, image_like_batches(3, 64, batch_size=2))
    return {(each.block, each.part): each for each in found}


def test_the_distance_is_that_of_a_double_loop_over_all_pairs(script):
    for shape, scale in (((1, 7), 1.0), ((49, 24), 1e-30), ((5, 40), 1.0)):  # the square of 1e-30 is zero in float32
        maps = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) + 0.3
        found, dead = script.channel_distance(maps * scale)
        assert found.tolist() == pytest.approx([by_double_loop(each) for each in maps], abs=1e-6)
        assert dead.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ([[1, 2, 3], [2, 4, 6], [0.1, 0.2, 0.3]], 0.0),  # alike up to a positive factor
        ([[1, 0, 0, 0], [0, 5, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]], 0.5 * (1 - 1 / 4)),  # orthogonal
        ([[1, -2, 3], [-2, 4, -6], [3, -6, 9]], 4 / 9),  # four of the nine pairs are opposite
        ([[1, 2], [0, 0], [-1, -2]], 0.5),  # zeros are left out
        ([[0, 0], [0, 0]], math.nan),
    ],
)
def test_known_distances(script, channels, expected):
    found, dead = script.channel_distance(torch.tensor(channels).T[None].float())
    assert float(found) == pytest.approx(expected, abs=1e-7, nan_ok=True)
    assert int(dead) == sum(not any(channel) for channel in channels)


def test_a_blocks_tensors_are_those_that_a_pass_by_hand_gives(script, tiny_model):
    found = measured(script, tiny_model)
    pixels = torch.cat(list(image_like_batches(3, 64, batch_size=2)))
    with torch.inference_mode():
        double = tiny_model.double()
        images = double.downsample_layers[0](normalise(pixels, IMAGES).double())
        block = double.stages[0][0]
        hidden = nn.functional.gelu(block.pwconv1(block.norm(block.dwconv(images).permute(0, 2, 3, 1))))
        after = block.grn(hidden)
        output = (images + block.pwconv2(after).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    for part, maps in (("act", hidden), ("grn", after), ("output", output)):
        one = found["stages.0.0", part]
        by_hand = sum(by_double_loop(each) for each in maps.flatten(1, 2)) / 3
        assert (one.distance, one.channels) == (pytest.approx(by_hand, abs=1e-6), maps.shape[3]), part
    assert len({round(each.distance, 6) for each in found.values()}) == len(found) == 15


def test_copied_and_dead_channels_show_and_v1_has_no_grn(script, tiny_model, tiny_v1_model):
    with torch.no_grad():
        copied, dead = tiny_model.stages[2][1].pwconv1, tiny_model.stages[0][0].pwconv1
        copied.weight.copy_(copied.weight[:1].expand_as(copied.weight))
        copied.bias.fill_(float(copied.bias[0]))
        dead.weight[:4] = dead.bias[:4] = 0.0
    found = measured(script, tiny_model)
    assert found["stages.2.1", "act"].distance == pytest.approx(0.0, abs=1e-6)
    assert found["stages.0.0", "act"].distance > 0.1
    assert found["stages.0.0", "act"].dead_share == pytest.approx(4 / 32)
    assert {part for _, part in measured(script, tiny_v1_model)} == {"act", "output"}


def test_no_image_and_values_that_are_not_finite_are_errors_and_no_number(script, tiny_model):
    with pytest.raises(InputError, match="no image"):
        script.measure_diversity(tiny_model, IMAGES, [])
    with torch.no_grad():
        tiny_model.stages[1][0].pwconv1.bias[0] = float("nan")
    with pytest.raises(CheckFailedError, match=r"stages\.1\.0 \(act\) gave values that are NaN"):
        measured(script, tiny_model)
