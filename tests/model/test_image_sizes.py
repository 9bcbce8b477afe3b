"""Images that are not square, and sides that the network's stride of 32 does not divide: the numbers are timm's."""

import pytest
import torch

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import canonical_size, parse_image_size, size_text, stage_sides
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import find_variant
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.deploy import deploy_form
from tests.support.foreign_models import randomise, timm_model

SIZES = ((64, 96), (96, 32), (75, 100), (47, 61), (33, 130))


@pytest.mark.parametrize("size", SIZES)
def test_logits_are_those_of_timm(tmp_path, size):
    theirs = randomise(timm_model(find_variant("tiny-test")))
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    ours = load_checkpoint(tmp_path / "model.pth", "tiny-test").model
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)
        turned = theirs(images.transpose(2, 3).contiguous())
        assert float((ours(images) - turned).abs().max()) > 1e-2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("input_kind", ["float", "uint8"])
@pytest.mark.parametrize("layout", ["gpu", "cpu", "openvino"])
def test_the_deploy_form_is_exact_in_float64(size, input_kind, layout):
    model = random_model("tiny-test", 10, seed=1)
    form = deploy_form(model, DeploySpec("fp64", size, input_kind, layout))
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    unit = pixels.permute(0, 3, 1, 2).double() / 255.0
    with torch.no_grad():
        expected = model.double()(normalise(unit, Preprocessing(size)))
        given = form(pixels if input_kind == "uint8" else unit)
    torch.testing.assert_close(given.double(), expected, rtol=0, atol=1e-9)


def test_a_size_is_written_and_read():
    for text, size in (("224", 224), ("256x512", (256, 512)), ("300x300", 300)):
        assert parse_image_size(text) == size
        assert parse_image_size(size_text(size)) == size
    assert canonical_size((64, 64)) == 64
    assert [stage_sides((300, 64), stage) for stage in range(4)] == [(75, 16), (37, 8), (18, 4), (9, 2)]


@pytest.mark.parametrize("text", ["", "x", "224x", "31", "64x31", "-64", "64,96", "1e3", "99999"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError):
        parse_image_size(text)


def test_counts_of_work_follow_both_sides():
    atto = find_variant("atto")
    assert atto.mac_count((224, 448)) - atto.mac_count((448, 224)) == 0
    head = 320 * 1000
    assert atto.mac_count((224, 448)) - head == 2 * (atto.mac_count(224) - head)
    assert DeploySpec(image_size=(64, 64)).image_size == 64
