"""Scales and gains: what they are measured on, how they are chosen, that they are the same each time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.eight_bits import GAIN_FOLDS, LARGEST, METHODS, PLACEMENTS, EightBits
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.manifest import OnnxRequest
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.diagnosis import calibration
from cnx_deploy.diagnosis.calibration import calibrate
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.quantised import QuantisedBlock

SIDE = 128
"""Here every block has 16 positions at least."""
SPEC = {placement: DeploySpec(placement, SIDE) for placement in PLACEMENTS}


def batches(count: int = 8, size: int = 4, seed: int = 0) -> list[Tensor]:
    pixels = list(image_like_batches(count, SIDE, batch_size=size, seed=seed))
    return [runner_input(batch, "float") for batch in pixels]


def record_of(model: ConvNeXtV2, placement: str = "int8", **words) -> EightBits:
    return calibrate(model, SPEC[placement], words.pop("batches", batches), **words)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_tensor_of_the_placement_has_a_scale(tiny_model, placement):
    record = record_of(tiny_model, placement)
    assert (record.placement, record.images, record.method, record.kept) == (placement, 8, "max", ())
    assert list(record.blocks) == ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"]
    for block in record.blocks.values():
        second = {"s", "w2"} if "s" in block.scales else {"g", "o"}
        expected = ({"x", "w1", "p", "h"} | second) & PLACEMENTS[placement].types.keys()
        assert block.scales.keys() == expected
        assert block.gains.keys() <= set(PLACEMENTS[placement].gains)


def largest_of(model: ConvNeXtV2, record: EightBits, images: list[Tensor]) -> dict[tuple[str, str], float]:
    """The largest value at each tap of the form with the record's gains, by a way of its own."""
    spec = replace(SPEC[record.placement], precision="fp32")
    bare = replace(record, blocks={name: replace(block, scales={}) for name, block in record.blocks.items()})
    form = deploy_form(model, replace(spec, eight_bits=bare))
    found: dict[tuple[str, str], float] = {}

    class Keep(torch.nn.Module):
        def __init__(self, key):
            super().__init__()
            self.key = key

        def forward(self, tensor):
            found[self.key] = max(found.get(self.key, 0.0), float(tensor.abs().max()))
            return tensor

    for name, block in form.named_modules():
        if isinstance(block, QuantisedBlock):
            for letter in record.blocks[name].scales:
                constant = block.constants.get(letter)
                if constant is None:
                    block.taps[letter] = Keep((name, letter))
                else:
                    found[name, letter] = float(constant.weight.abs().max())
    with torch.inference_mode():
        for batch in images:
            form(batch)
    return found


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_scale_maps_the_largest_value_to_the_largest_number(tiny_model, placement):
    record = record_of(tiny_model, placement)
    types = PLACEMENTS[placement].types
    found = largest_of(tiny_model, record, batches())
    for name, block in record.blocks.items():
        for letter, scale in block.scales.items():
            assert scale * LARGEST[types[letter]] == pytest.approx(found[name, letter], rel=1e-3), (name, letter)
            assert float(torch.tensor(scale).half()) == scale


def test_the_same_images_give_the_same_record_in_any_batches_and_others_another(tiny_model):
    first = record_of(tiny_model)
    assert record_of(tiny_model) == first
    assert record_of(tiny_model, batches=lambda: batches(size=8)).data_sha256 == first.data_sha256
    assert record_of(tiny_model, batches=lambda: batches(seed=1)).data_sha256 != first.data_sha256


def test_mse_and_percentile_saturate_a_rare_large_value_and_max_does_not(tiny_model):
    """One value of 30 among thousands around one."""
    values = torch.cat([torch.randn(100_000, generator=torch.manual_seed(0)), torch.tensor([30.0])])
    limits = {}
    for method in ("mse", "percentile"):
        histogram = calibration._Histogram(30.0, "int8", method)
        histogram(values)
        limits[method] = histogram.limit()
    assert limits["percentile"] == pytest.approx(np.quantile(np.abs(values.numpy()), 0.9999), rel=5e-3)
    assert limits["percentile"] < limits["mse"] < 29.0
    scales = {method: record_of(tiny_model, method=method).blocks["stages.0.0"].scales for method in METHODS}
    assert scales["mse"] != scales["max"] != scales["percentile"]
    assert all(scales["percentile"][letter] <= scales["max"][letter] for letter in scales["max"])


def outlier(model: ConvNeXtV2, factor: float = 64.0) -> ConvNeXtV2:
    """The same function nearly: two hidden channels of each block are much larger before the second layer."""
    with torch.no_grad():
        for block in (block for stage in model.stages for block in stage):
            block.pwconv1.weight[:2] *= factor
            block.pwconv1.bias[:2] *= factor
            block.pwconv2.weight[:, :2] /= factor
    return model


def test_gains_even_out_channels_and_a_left_out_fold_has_none(tiny_model):
    model = outlier(tiny_model)
    record = record_of(model)
    exponents = record.blocks["stages.0.0"].exponents("p")
    assert min(exponents[2:]) > max(exponents[:2])
    without = calibrate(model, replace(SPEC["int8"], leave_out=tuple(GAIN_FOLDS.values())), batches)
    assert all(not block.gains for block in without.blocks.values())
    for letter, fold in GAIN_FOLDS.items():
        fewer = calibrate(model, replace(SPEC["int8"], leave_out=(fold,)), batches)
        assert letter not in {key for block in fewer.blocks.values() for key in block.gains}
        assert {key for block in fewer.blocks.values() for key in block.gains} == GAIN_FOLDS.keys() - {letter}
    assert without.blocks["stages.0.0"].scales["p"] == pytest.approx(record.blocks["stages.0.0"].scales["p"], rel=0.5)


@pytest.mark.parametrize(
    ("kept", "lacking"),
    [("stages.2.1", "xw1phgosw2"), ("stages.2.0.pwconv1", "xw1p"), ("stages.0.0.grn", "h"), ("head", "")],
)
def test_what_is_kept_has_no_scale(tiny_model, kept, lacking):
    record = record_of(tiny_model, kept=(kept,))
    assert record.kept == (kept,)
    whole = record_of(tiny_model)
    for name, block in whole.blocks.items():
        mine = record.blocks[name].scales if name in record.blocks else {}
        missing = block.scales.keys() - mine.keys()
        if kept.startswith(name):
            assert missing
            assert all(letter in lacking for letter in missing)
        else:
            assert not missing


def test_a_dead_tensor_has_scale_one_and_no_gain(tiny_model):
    with torch.no_grad():
        tiny_model.stages[0][0].pwconv1.weight.zero_()
        tiny_model.stages[0][0].pwconv1.bias.zero_()
    block = record_of(tiny_model).blocks["stages.0.0"]
    assert block.scales["p"] == block.scales["w1"] == 1.0
    assert "p" not in block.gains


def test_bad_requests_are_refused(tiny_model):
    with pytest.raises(InputError, match="fp16 stores nothing in eight bits"):
        calibrate(tiny_model, DeploySpec("fp16", 64), batches)
    with pytest.raises(InputError, match="Choose one of: max, mse, percentile"):
        record_of(tiny_model, method="entropy")
    with pytest.raises(InputError, match="no image to calibrate on"):
        record_of(tiny_model, batches=list)
    with pytest.raises(InputError, match=r"No part of tiny-test is called 'stages\.9'"):
        record_of(tiny_model, kept=("stages.9",))
    with torch.no_grad():
        tiny_model.stages[1][0].pwconv2.bias.fill_(torch.inf)
    with pytest.raises(InputError, match="not finite on the calibration images"):
        record_of(tiny_model)


def test_the_training_form_is_left_as_it_was(tiny_model):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    record_of(tiny_model)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_a_manifest_keeps_the_record(tiny_model):
    import msgspec

    spec = replace(SPEC["int8"], eight_bits=record_of(outlier(tiny_model), kept=("stages.2.1.pwconv2",)))
    request = OnnxRequest(deploy=spec, batch=(1, 1, 8), opset=21, form=1)
    text = msgspec.json.encode(request)
    assert msgspec.json.decode(text, type=OnnxRequest) == request


def test_few_positions_keep_the_scaled_hidden_tensor_in_fp16_which_is_recorded(tiny_model):
    record = calibrate(tiny_model, DeploySpec("int8", 64), lambda: [torch.rand(2, 3, 64, 64)])
    assert record.kept == ("stages.3.0.grn", "stages.3.0.pwconv2")
    for name in record.kept:
        block, _, part = name.rpartition(".")
        assert not {"grn": {"h"}, "pwconv2": {"s", "w2"}}[part] & record.blocks[block].scales.keys()
        assert {"x", "w1", "p"} <= record.blocks[block].scales.keys()
