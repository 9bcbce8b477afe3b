"""Training on a GPU: run by itself where there is one (pytest -m gpu)."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from cnx_deploy.training import TrainingSpec, train
from tests.support.training_data import write_colours

pytestmark = pytest.mark.gpu


@pytest.fixture
def spec(tiny_variant, tmp_path):
    colours = write_colours(tmp_path / "colours")
    return TrainingSpec(colours, tiny_variant, tmp_path / "runs", epochs=2, image_size=32, batch_size=8)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_in_every_precision(spec, precision):
    result = train(dataclasses.replace(spec, precision=precision, ema_decay=0.9, channels_last=True, mixup_alpha=0.8))
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(result.last).values())
    assert (result.run_dir / "best-ema.safetensors").is_file()


def test_deterministic_runs_on_a_gpu_give_the_same_bits(spec):
    runs = [load_file(train(dataclasses.replace(spec, deterministic=True)).last) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
