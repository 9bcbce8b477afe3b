"""Every mask, index, constant and sum of the kernels is changed in turn, and the checks must notice each change."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cnx_deploy.kernels import launch
from cnx_deploy.kernels.loading import SOURCE, load_interpreted
from cnx_deploy.kernels.settings import LaunchSettings
from tests.kernels import test_kernels as large
from tests.support.kernel_mutants import Mutant, mutants
from tests.support.kernel_runs import LIMITS, Problem, relative, streamed, watched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LIMIT = LIMITS[torch.float16]
FIRST, SECOND, BOTH = (
    LaunchSettings(32, 64, 16, 4, 2),
    LaunchSettings(32, 16, 32, 4, 2),
    LaunchSettings(32, 0, 32, 4, 2),
)


def problem(channels: int = 20, **words: float) -> Problem:
    """Three samples of 45 positions in tiles of 32, 20 channels in chunks of 16, 80 in 32: nothing divides."""
    return Problem.random(channels, 45, 3, **words)


def faint(channels: int = 20) -> Problem:
    """Tokens whose variance is of the order of eps, 1e-6."""
    made = problem(channels)
    made.tokens.mul_(2e-3)
    return made


def distant() -> Problem:
    """Tokens whose mean is 250 times their deviation."""
    made = problem(72)
    made.tokens.mul_(0.1).add_(32)
    return made


def check_first(made: Problem, channels_last: bool = True) -> None:
    tokens = streamed(made.tokens, channels_last)
    hidden = made.exact_hidden()
    words = {"settings": FIRST, "channels_last": channels_last}
    result, sums = launch.norm_linear_gelu(tokens, made.weight1, made.bias1, **words)
    assert result is not None
    assert sums is not None
    assert relative(result, hidden) < LIMIT
    tiles = torch.stack([part.square().sum(1) for part in result.double().split(FIRST.block_m, 1)], 1)
    assert relative(sums, tiles) < 1e-6


def steady() -> Problem:
    """Tokens that do not vary within a position: what lies behind C would be infinite if it were normalised."""
    made = problem()
    made.tokens.fill_(100.0)
    return made


def check_first_alone() -> None:
    """Of the outputs that may be None, each without the other."""
    made = problem()
    first = (made.tokens, made.weight1, made.bias1)
    hidden, sums = launch.norm_linear_gelu(*first, settings=FIRST, store_hidden=False)
    assert hidden is None
    assert sums is not None
    assert relative(sums.double().sum(1), made.exact_hidden().square().sum(1)) < LIMIT
    hidden, sums = launch.norm_linear_gelu(*first, settings=FIRST, with_sums=False)
    assert sums is None
    assert hidden is not None
    assert relative(hidden, made.exact_hidden()) < LIMIT


def check_gain(scale: float) -> None:
    """Scale 1e-6 makes eps count."""
    made = problem()
    hidden = made.exact_hidden() * scale
    sums = torch.stack([part.square().sum(1) for part in hidden.split(11, 1)], 1).float()
    gain = launch.response_gain(sums, made.gamma, settings=LaunchSettings(2, 128, 0, 4, 1))
    assert relative(gain, made.exact_gain(hidden)) < 1e-6


def check_second(made: Problem, channels_last: bool = True, with_gain: bool = True) -> None:
    hidden = made.exact_hidden().half()
    gain = made.exact_gain(hidden.double()).float() if with_gain else None
    residual = streamed(made.residual, channels_last)
    second = (made.weight2, made.bias2, residual)
    result = launch.gained_linear_residual(hidden, gain, *second, settings=SECOND, channels_last=channels_last)
    exact = made.exact_output(hidden.double(), None if gain is None else gain.double())
    assert relative(streamed(result, channels_last), exact) < LIMIT


def check_both(made: Problem, channels_last: bool = True, with_gain: bool = True) -> None:
    hidden = made.exact_hidden()
    gain = made.exact_gain(hidden).float() if with_gain else None
    tokens, residual = streamed(made.tokens, channels_last), streamed(made.residual, channels_last)
    first, second = (tokens, made.weight1, made.bias1), (made.weight2, made.bias2, residual)
    result = launch.gained_mlp_residual(*first, gain, *second, settings=BOTH, channels_last=channels_last)
    exact = made.exact_output(hidden, None if gain is None else gain.double())
    assert relative(streamed(result, channels_last), exact) < LIMIT


FIRST_CHECKS: tuple[Callable[[], None], ...] = (
    lambda: check_first(problem()),
    lambda: check_first(faint()),
    lambda: check_first(distant()),
    lambda: check_first(steady()),
    lambda: check_first(problem(heat=20.0)),
    check_first_alone,
    lambda: large.test_the_last_sample_of_a_batch_beyond_two_billion_values(True),
)
GAIN_CHECKS: tuple[Callable[[], None], ...] = (
    lambda: check_gain(1.0),
    lambda: check_gain(1e-6),
    large.test_the_recomputing_kernel_and_the_gain_beyond_two_billion_values,
)
SECOND_CHECKS: tuple[Callable[[], None], ...] = (
    lambda: check_second(problem()),
    lambda: check_second(problem(), with_gain=False),
    lambda: check_second(problem(heat=20.0)),
    lambda: large.test_the_last_sample_of_a_batch_beyond_two_billion_values(True),
)
BOTH_CHECKS: tuple[Callable[[], None], ...] = (
    lambda: check_both(problem()),
    lambda: check_both(faint()),
    lambda: check_both(distant()),
    lambda: check_both(problem(12), with_gain=False),
    lambda: check_both(problem(heat=20.0)),
    large.test_the_recomputing_kernel_and_the_gain_beyond_two_billion_values,
)
LAYOUT_CHECKS: tuple[Callable[[], None], ...] = (
    lambda: check_second(problem(), channels_last=False),
    lambda: check_second(problem()),
    lambda: check_first(problem(), channels_last=False),
    lambda: check_both(problem(), channels_last=False),
)
CHECKS = {
    "stream_offsets": LAYOUT_CHECKS, "gelu": FIRST_CHECKS, "norm_linear_gelu": FIRST_CHECKS,
    "response_gain": GAIN_CHECKS, "gained_linear_residual": SECOND_CHECKS, "gained_mlp_residual": BOTH_CHECKS,
}  # fmt: skip

MASKED = "0.0 -> 1.0"
SECOND_LOAD = "value = tl.load(tokens + offsets, mask=inside_m[:, None] & inside_k[None, :], other=0.0) |"
"""Not the first, which the statistics read."""
EQUIVALENT: dict[str, tuple[tuple[str, str, str], ...]] = {
    "what stands for a masked value meets a zero in the product, or lies in a row or column that is not stored": (
        ("norm_linear_gelu", "normed = tl.where(", MASKED),
        ("norm_linear_gelu", SECOND_LOAD, MASKED),
        ("norm_linear_gelu", "weight = ", MASKED),
        ("norm_linear_gelu", "product += tl.load(bias_ptr", MASKED),
        ("response_gain", "gamma = ", MASKED),
        ("gained_linear_residual", "hidden = ", MASKED),
        ("gained_linear_residual", "weight = ", MASKED),
        ("gained_linear_residual", "gain = ", MASKED),
        ("gained_linear_residual", "product += tl.load(bias_ptr", MASKED),
        ("gained_linear_residual", "product += tl.load(residual_ptr", MASKED),
        ("gained_mlp_residual", "weight = tl.load(weight1_ptr + c", MASKED),
        ("gained_mlp_residual", "weight = tl.load(weight2_ptr + h[:, None] * CHANNELS + c", MASKED),
        ("gained_mlp_residual", "weight = tl.load(weight1_ptr + rest_c", MASKED),
        ("gained_mlp_residual", "weight = tl.load(weight2_ptr + h[:, None] * CHANNELS + rest_c", MASKED),
        ("gained_mlp_residual", "hidden += tl.load(bias1_ptr", MASKED),
        ("gained_mlp_residual", "gain = ", MASKED),
        ("gained_mlp_residual", "product += tl.load(bias2_ptr", MASKED),
        ("gained_mlp_residual", "product += tl.load(residual", MASKED),
        ("gained_mlp_residual", "rest_product += tl.load(bias2_ptr", MASKED),
        ("gained_mlp_residual", "rest_product += tl.load(residual", MASKED),
    ),
    "REST is none or at least 16": (("gained_mlp_residual", "if REST > 0:", "0 -> 1"),),
    "the first chunk replaces the mean, and the step to it has no weight": (
        ("norm_linear_gelu", "mean = tl.full(", MASKED),
    ),
    "Triton makes FP32 of an integer that divides": (
        ("norm_linear_gelu", "count = tl.minimum(", "-> tl.minimum(CHANNELS - start, BLOCK_K)"),
    ),
}  # fmt: skip
"""Mutants that compute the same, by reason: function, how the statement begins, and how the change ends."""


def survives(mutant: Mutant, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether every check passes with the mutant in place of the kernels."""
    folder.mkdir()
    path = folder / "mutant.py"
    path.write_text(mutant.source, encoding="utf-8")
    try:
        module = load_interpreted(path)
        monkeypatch.setattr(launch, "interpreted_kernels", lambda: module)
        with watched(), np.errstate(all="ignore"):
            for check in CHECKS[mutant.function]:
                check()
    except Exception:  # noqa: BLE001 - whatever a fault does, it was noticed
        return False
    return True


@pytest.mark.parametrize("function", CHECKS)
def test_every_mutant_is_noticed(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = [mutant for mutant in mutants(SOURCE.read_text(encoding="utf-8")) if mutant.function == function]
    assert len(planted) > 5
    for check in CHECKS[function]:
        with watched():
            check()
    survivors = [m for place, m in enumerate(planted) if survives(m, tmp_path / str(place), monkeypatch)]
    excuses = {excuse for rows in EQUIVALENT.values() for excuse in rows if excuse[0] == function}
    used = {excuse for mutant in survivors for excuse in excuses if is_excused(mutant, excuse)}
    assert [m.name for m in survivors if not any(is_excused(m, excuse) for excuse in excuses)] == []
    assert used == excuses


def is_excused(mutant: Mutant, excuse: tuple[str, str, str]) -> bool:
    line = f"{mutant.statement} | {mutant.change}"
    return mutant.function == excuse[0] and line.startswith(excuse[1]) and mutant.change.endswith(excuse[2])
