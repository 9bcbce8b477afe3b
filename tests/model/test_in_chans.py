"""Networks for images of 1 to 16 channels: the numbers are timm's, adapted weights too, and nothing else is guessed."""

import json

import pytest
import torch
from timm.models._manipulate import adapt_input_conv

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CheckpointError, InputError
from cnx_deploy.core.preprocessing import IMAGENET_MEAN, Preprocessing, per_channel
from cnx_deploy.core.variants import find_variant
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.checkpoint import ModelRequest, load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import create_model, random_model
from cnx_deploy.model.deploy import deploy_form
from tests.support.foreign_models import randomise, timm_model

COUNTS = (1, 2, 4, 5, 13, 16)
STEM = "downsample_layers.0.0.weight"


@pytest.fixture
def rgb(tmp_path):
    theirs = randomise(timm_model(find_variant("tiny-test")))
    torch.save(theirs.state_dict(), tmp_path / "rgb.pth")
    return tmp_path / "rgb.pth"


@pytest.mark.parametrize("count", COUNTS)
def test_weights_of_any_channels_load_and_give_timms_logits(tmp_path, count):
    theirs = randomise(timm_model(find_variant("tiny-test"), in_chans=count))
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    loaded = load_checkpoint(tmp_path / "model.pth", "tiny-test")
    images = torch.randn(2, count, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), theirs(images), rtol=0, atol=1e-5)
    assert loaded.model.in_chans == loaded.preprocessing.in_chans == count
    assert loaded.origins["mean"] == "assumed"


@pytest.mark.parametrize("count", COUNTS)
def test_three_channels_are_adapted_by_timms_rule_when_asked_and_said_so(rgb, count):
    loaded = load_checkpoint(rgb, "tiny-test", in_chans=count)
    expected = adapt_input_conv(count, load_checkpoint(rgb, "tiny-test").model.state_dict()[STEM])
    torch.testing.assert_close(loaded.model.state_dict()[STEM], expected, rtol=0, atol=0)
    assert any(f"adapted from 3 channels to {count}" in note for note in loaded.notes)
    assert loaded.origins["in_chans"] == "adapted from 3"
    assert loaded.origins["mean"] == loaded.origins["std"] == "assumed"


def test_a_grey_picture_gives_an_adapted_network_what_its_rgb_gave(rgb):
    """Negative control: with mean and std of a colour picture's own channels it is not the same."""
    colour, grey = (load_checkpoint(rgb, "tiny-test", in_chans=count).model.double() for count in (3, 1))
    pixels = torch.rand(2, 1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(grey(pixels), colour(pixels.expand(-1, 3, -1, -1)), rtol=0, atol=1e-9)
        other = colour(pixels * torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64).view(3, 1, 1))
        assert float((grey(pixels) - other).abs().max()) > 1e-4


def test_three_are_three_and_other_counts_are_not_adapted(tmp_path, rgb):
    assert "in_chans" not in load_checkpoint(rgb, "tiny-test", in_chans=3).origins
    torch.save(timm_model(find_variant("tiny-test"), in_chans=4).state_dict(), tmp_path / "four.pth")
    with pytest.raises(CheckpointError, match=r"4 channels, and 5 were asked for.*--in-chans 4"):
        load_checkpoint(tmp_path / "four.pth", "tiny-test", in_chans=5)
    for count in (0, 17):
        with pytest.raises(InputError, match="1 to 16"):
            load_checkpoint(rgb, "tiny-test", in_chans=count)
        with pytest.raises(InputError, match="1 to 16"):
            create_model("tiny-test", in_chans=count)


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("input_kind", ["float", "uint8"])
@pytest.mark.parametrize("layout", ["gpu", "cpu", "openvino"])
def test_the_deploy_form_is_exact_in_float64(count, input_kind, layout):
    model = random_model("tiny-test", 10, seed=1, in_chans=count)
    preprocessing = Preprocessing(40).for_channels(count)
    words = {"mean": preprocessing.mean, "std": preprocessing.std}
    pixels = torch.randint(0, 256, (2, 40, 40, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    unit = pixels.permute(0, 3, 1, 2).double() / 255.0
    with torch.no_grad():
        expected = model.double()(normalise(unit, preprocessing))
    for left_out in ((), ("input-normalisation",), ("patches",)):
        form = deploy_form(model.float(), DeploySpec("fp64", 40, input_kind, layout, leave_out=left_out, **words))
        with torch.no_grad():
            given = form(pixels if input_kind == "uint8" else unit)
        torch.testing.assert_close(given.double(), expected, rtol=0, atol=1e-9)


def test_counts_of_parameters_and_work_are_those_of_the_network():
    for count in COUNTS:
        tiny = find_variant("tiny-test")
        model = create_model(tiny, 7, in_chans=count)
        assert tiny.parameters_with(7, count) == sum(each.numel() for each in model.parameters())
    atto = find_variant("atto")
    assert atto.mac_count(224, in_chans=4) - atto.mac_count(224) == 56 * 56 * 40 * 16


def test_a_network_with_channels_of_its_own_is_saved_and_loaded(tmp_path):
    model, preprocessing = random_model("tiny-test", 10, in_chans=5), Preprocessing(64, mean=(0.1,) * 5, std=(0.2,) * 5)
    path = save_checkpoint(tmp_path / "five.safetensors", model, preprocessing=preprocessing)
    loaded = load_checkpoint(path, "tiny-test")
    assert (loaded.model.in_chans, loaded.preprocessing) == (5, preprocessing)
    assert set(loaded.origins.values()) == {"header"}


@pytest.mark.parametrize(
    ("mean", "expected", "assumed"),
    [([0.5], (0.5,) * 4, False), ([0.1, 0.2, 0.3, 0.4], (0.1, 0.2, 0.3, 0.4), False),
     ([0.1, 0.2, 0.3], (0.1, 0.2, 0.3, 0.1), True)],
)  # fmt: skip
def test_a_config_beside_the_weights_gives_mean_for_each_channel_or_it_is_assumed(tmp_path, mean, expected, assumed):
    torch.save(timm_model(find_variant("tiny-test"), in_chans=4).state_dict(), tmp_path / "model.pth")
    cfg = {"input_size": [4, 64, 64], "mean": mean, "std": [0.25] * len(mean), "crop_pct": 1.0}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convnextv2_atto", "pretrained_cfg": cfg}))
    loaded = load_checkpoint(tmp_path / "model.pth", "tiny-test")
    assert (loaded.preprocessing.mean, loaded.preprocessing.std) == (expected, (0.25,) * 4)
    assert (loaded.origins["mean"] == "assumed") == assumed
    assert loaded.origins["std"] != "assumed"


def test_options_take_one_number_or_one_a_channel():
    def made(**words):
        return ModelRequest(variant="tiny-test", in_chans=4, **words).load(lambda text: None)[1]

    assert made().mean == per_channel(IMAGENET_MEAN, 4) == (0.485, 0.456, 0.406, 0.485)
    assert made(mean=0.5).mean == (0.5,) * 4
    assert made(mean=(0.1, 0.2, 0.3, 0.4)).mean == (0.1, 0.2, 0.3, 0.4)
    with pytest.raises(InputError, match=r"3 numbers.*4 channels"):
        made(mean=(0.1, 0.2, 0.3))
    with pytest.raises(InputError, match="a number for each channel"):
        Preprocessing(mean=(0.5,) * 4)
    assert per_channel(IMAGENET_MEAN, 1) == (0.449,)
