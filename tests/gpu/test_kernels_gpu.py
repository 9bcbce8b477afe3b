"""The kernels on a GPU: every stage of every variant in every tile that is offered (`pytest -m gpu`)."""

import pytest
import torch

from cnx_deploy.core.system import find_gpus
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.kernels import launch
from cnx_deploy.kernels.settings import SHARED_BYTES, candidate_settings
from tests.support.kernel_runs import LIMITS, Problem, relative, streamed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not find_gpus(), reason="no NVIDIA GPU: not run")]

STAGES = sorted({(v.dims[stage], 3136 >> 2 * stage) for v in VARIANTS.values() for stage in range(4)})


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("channels", "positions"), STAGES)
def test_every_tile_agrees_with_float64(channels: int, positions: int, dtype: torch.dtype, channels_last: bool) -> None:
    problem = Problem.random(channels, positions, 2, dtype=dtype)
    values = {name: getattr(problem, name).cuda() for name in Problem.__dataclass_fields__}
    tokens, residual = (streamed(values[name], channels_last) for name in ("tokens", "residual"))
    first, second = (values["weight1"], values["bias1"]), (values["weight2"], values["bias2"], residual)
    hidden = problem.exact_hidden()
    gain = problem.exact_gain(hidden)
    exact, limit, words = problem.exact_output(hidden, gain), LIMITS[dtype], {"channels_last": channels_last}
    target = find_gpus()[0].target
    if target not in SHARED_BYTES:
        pytest.skip(f"no tiles are chosen for {target}: not run")
    half, gains = hidden.to(dtype).cuda(), gain.float().cuda()
    for settings in candidate_settings("norm_linear_gelu", channels, target):
        result, sums = launch.norm_linear_gelu(tokens, *first, settings=settings, **words)
        again, repeated = launch.norm_linear_gelu(tokens, *first, settings=settings, **words)
        assert result is not None and again is not None and sums is not None and repeated is not None  # noqa: PT018
        assert torch.equal(result, again)
        assert torch.equal(sums, repeated)
        assert relative(result.cpu(), hidden) < limit, settings
        assert relative(launch.response_gain(sums, values["gamma"]).cpu(), gain) < limit, settings
    for settings in candidate_settings("gained_linear_residual", channels, target):
        out = launch.gained_linear_residual(half, gains, *second, settings=settings, **words)
        assert relative(streamed(out, channels_last).cpu(), exact) < limit, settings
    for settings in candidate_settings("gained_mlp_residual", channels, target):
        out = launch.gained_mlp_residual(tokens, *first, gains, *second, settings=settings, **words)
        assert relative(streamed(out, channels_last).cpu(), exact) < limit, settings
