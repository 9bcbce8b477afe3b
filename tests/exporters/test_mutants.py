"""Faults planted in the network that is exported, one at a time: an export must refuse each, and says by which gate.

A mutant that gets through is a defect of the gates. The faults are those that ports of ConvNeXt V2 really have.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import GraphCheckError, ParityError
from cnx_deploy.core.manifest import ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.exporters.graph_checks import check_graph
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model import deploy, deploy_blocks, deploy_layers
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.deploy_layers import ChannelsFirstNorm, PooledResponseGain, ResponseGain, TokenNorm, widen
from cnx_deploy.model.layers import EPS
from cnx_deploy.verification.verify import verify_export

SIZE = 32
Patch = Callable[[pytest.MonkeyPatch], None]


def export(variant: Variant, spec: DeploySpec, folder: Path) -> Path:
    """What the command does: export, graph check, comparison with PyTorch."""
    model = random_model(variant, 10, seed=0)
    weights = WeightsRecord("random", "0", "0" * 64, "none (random weights)")
    record = ModelRecord(variant.name, 10, SIZE, weights, Preprocessing(image_size=SIZE))
    export_spec = ExportSpec(deploy=spec, batch=(1, 2, 4))
    check = partial(verify_export, model=model)
    return export_onnx(model, record, export_spec, folder, verify=check).path


def epsilon(patch: pytest.MonkeyPatch) -> None:
    """torch's default of 1e-5 in every norm: 5e-6 of a variance of one, which no logits show."""
    patch.setattr(deploy_layers, "EPS", 1e-5)


def response_gain(share_of: Callable[[ResponseGain, Tensor, int, int], Tensor]) -> Patch:
    """GRN with another share of the response, in both layouts."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        if isinstance(self, PooledResponseGain):
            gamma = self.affine.weight.flatten()[None, :, None, None]
            return 1.0 + gamma * share_of(self, hidden.flatten(2), 1, 2)[..., None]
        gain = 1.0 + widen(self.gamma) * share_of(self, widen(hidden), self.channel_axis, self.position_axis)
        return gain.to(hidden.dtype)

    def patch_both(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(ResponseGain, "forward", forward)
        patch.setattr(PooledResponseGain, "forward", forward)

    return patch_both


def share(self: object, hidden: Tensor, channels: int, positions: int, axes: tuple[int, ...] = ()) -> Tensor:
    """GRN's share over `positions`, or over other axes."""
    norm = (hidden * hidden).sum(axes or (positions,), keepdim=True).sqrt()
    return norm / (norm.mean(channels, keepdim=True) + EPS)


def mean_over_positions(self: object, hidden: Tensor, channels: int, positions: int) -> Tensor:
    norm = (hidden * hidden).sum(positions, keepdim=True).sqrt()
    return norm / (norm.mean(positions, keepdim=True) + EPS)


def norm_over_batch(self: object, hidden: Tensor, channels: int, positions: int) -> Tensor:
    return share(self, hidden, channels, positions, (0, positions))


def no_gamma(self: object, hidden: Tensor, channels: int, positions: int) -> Tensor:
    return 0.0 * share(self, hidden, channels, positions)


def no_beta(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(deploy_blocks, "fold_grn_beta", lambda weight, bias, beta: bias)


def tanh_gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(deploy_blocks.nn.GELU, "forward", lambda self, hidden: F.gelu(hidden, approximate="tanh"))


def one_channel_off(patch: pytest.MonkeyPatch) -> None:
    """Every norm gives its first channel 0.1 too much."""
    for norm, axis in ((TokenNorm, -1), (ChannelsFirstNorm, 1)):
        right = norm.forward

        def forward(self: Any, tensor: Tensor, right: Any = right, axis: int = axis) -> Tensor:
            offset = torch.zeros(tensor.shape[axis], dtype=tensor.dtype)
            offset[0] = 0.1
            return right(self, tensor) + (offset if axis == -1 else offset[:, None, None])

        patch.setattr(norm, "forward", forward)


def normalised_twice(patch: pytest.MonkeyPatch) -> None:
    right = deploy.fold_input_normalisation

    def twice(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return right(*right(weight, bias, mean, std, scale), mean, std, 1.0)

    patch.setattr(deploy, "fold_input_normalisation", twice)


def no_island(patch: pytest.MonkeyPatch) -> None:
    """GRN's statistics in the tensor's own type."""
    patch.setattr(deploy_layers, "widen", lambda tensor: tensor)


MUTANTS: dict[str, tuple[Patch, str]] = {
    "eps 1e-5": (epsilon, "every epsilon is 1e-06, found .*1e-05"),
    "gamma dropped": (response_gain(no_gamma), "differs from PyTorch|expected, 0 found"),
    "beta dropped": (no_beta, "differs from PyTorch"),
    "mean over positions": (response_gain(mean_over_positions), "differs from PyTorch|expected, 0 found"),
    "norm over the batch": (response_gain(norm_over_batch), "differs from PyTorch|expected, 0 found"),
    "tanh GELU": (tanh_gelu, "Gelu by erf expected"),
    "one channel off": (one_channel_off, "differs from PyTorch"),
    "normalised twice": (normalised_twice, "differs from PyTorch"),
}
"""The fault, and what the refusal says."""


# Each is an export. tests/model/test_tasks.py has one that is refused by its logits, test_graph_checks.py beside this
# file the checks of written graphs.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("name", MUTANTS)
def test_parity_detects_broken_grn_and_other_faults_at_export(
    tiny_variant, tmp_path, monkeypatch, name, precision
) -> None:
    plant, says = MUTANTS[name]
    plant(monkeypatch)
    with pytest.raises((GraphCheckError, ParityError), match=says) as caught:
        export(tiny_variant, DeploySpec(precision, SIZE), tmp_path)
    assert caught.value.exit_code == 3
    assert not list(tmp_path.glob("*.onnx*"))


def test_parity_fp16_stress_no_overflow_an_island_removed_is_refused(tiny_variant, tmp_path, monkeypatch) -> None:
    no_island(monkeypatch)
    with pytest.raises(GraphCheckError, match=r"stages\.0\.0\.grn/.* computed in FLOAT16"):
        export(tiny_variant, DeploySpec("fp16", SIZE), tmp_path)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_without_a_fault_the_same_export_is_accepted(tiny_variant, tmp_path, precision) -> None:
    assert export(tiny_variant, DeploySpec(precision, SIZE), tmp_path).is_file()


@pytest.mark.parametrize("share_of", [no_gamma, norm_over_batch, mean_over_positions])
def test_what_the_graph_check_sees_the_comparison_sees_too(tiny_variant, tmp_path, monkeypatch, share_of) -> None:
    """The operator counts of a mutant may give it away; the logits have to as well."""
    response_gain(share_of)(monkeypatch)
    monkeypatch.setattr("cnx_deploy.exporters.onnx.check_export", lambda path, **_: check_graph(path))
    with pytest.raises(ParityError, match="differs from PyTorch"):
        export(tiny_variant, DeploySpec("fp16", SIZE), tmp_path)
