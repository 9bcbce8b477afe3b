"""The kernels against float64, in Triton's interpreter: channel counts, layouts, types, hot weights, odd sizes."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.kernels import launch
from cnx_deploy.kernels.settings import (
    SHARED_BYTES,
    KernelName,
    LaunchSettings,
    candidate_settings,
    default_settings,
    position_tiles,
)
from tests.support.kernel_runs import LIMITS, Problem, Program, Tiles, errors, relative, streamed, watched

STAGES = sorted({(v.dims[stage], 3136 >> 2 * stage) for v in VARIANTS.values() for stage in range(4)})
"""(C, HW) of every stage of all eight variants at 224 px."""
WIDE = LaunchSettings(256, 256, 128, 8, 2)
SMALL = Tiles(
    LaunchSettings(32, 64, 16, 4, 2),
    LaunchSettings(32, 16, 32, 4, 2),
    LaunchSettings(32, 0, 32, 4, 2),
    LaunchSettings(2, 256, 0, 4, 1),
)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
LAYOUTS = pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])


def chosen_tiles(channels: int) -> Tiles:
    """The settings that are used where nothing was measured."""
    recomputed = candidate_settings("gained_mlp_residual", channels)
    first, second = (default_settings(name, channels) for name in ("norm_linear_gelu", "gained_linear_residual"))
    return Tiles(first, second, recomputed[0] if recomputed else None)


@HALVES
@LAYOUTS
@pytest.mark.parametrize("channels", [40, 96])
def test_every_kernel_agrees_with_float64_in_the_chosen_tiles(
    channels: int, channels_last: bool, dtype: torch.dtype
) -> None:
    problem = Problem.random(channels, 7 * 11, 2, dtype=dtype)
    with watched():
        report = errors(problem, chosen_tiles(channels), channels_last=channels_last)
    assert max(report.values()) < LIMITS[dtype], report
    assert report.keys() == {"hidden", "sums", "gain", "stored", "recomputed"}


@LAYOUTS
@pytest.mark.parametrize("channels", [24, 50])
def test_sizes_that_no_tile_divides(channels: int, channels_last: bool) -> None:
    """45 positions in tiles of 32; 4C is 96 and 200 in tiles of 64 and chunks of 32, and C no multiple of 16."""
    with watched():
        report = errors(Problem.random(channels, 45, 2), SMALL, channels_last=channels_last)
    assert max(report.values()) < LIMITS[torch.float16], report


@LAYOUTS
def test_a_block_without_grn_takes_no_gain(channels_last: bool) -> None:
    with watched():
        report = errors(Problem.random(40, 49, 2), SMALL, channels_last=channels_last, with_grn=False)
    assert report.keys() == {"hidden", "stored", "recomputed"}
    assert max(report.values()) < LIMITS[torch.float16], report


@HALVES
@pytest.mark.parametrize("heat", [2, 10, 50])
def test_hot_weights_stay_finite_and_right(heat: int, dtype: torch.dtype) -> None:
    """The sums of squares are 2 to 50 times 65504, where FP16 sums are infinite."""
    problem = Problem.random(40, 49, 1, dtype=dtype, heat=heat)
    squares = problem.exact_hidden().square().sum(1)
    assert 0.8 * heat < squares.mean() / 65504 < 1.25 * heat
    assert max((report := errors(problem, SMALL)).values()) < LIMITS[dtype], report


def test_a_row_that_does_not_vary_is_normalised_to_zero() -> None:
    """C is no multiple of a chunk: behind it (0 - mean) / sqrt(eps) is 100,000, which FP16 does not hold."""
    problem = Problem.random(40, 33, 1)
    tokens = torch.full_like(problem.tokens, 100.0)
    hidden, sums = launch.norm_linear_gelu(tokens, problem.weight1, problem.bias1, settings=SMALL.first)
    assert hidden is not None
    assert sums is not None
    expected = torch.nn.functional.gelu(problem.bias1.double()).expand_as(hidden)
    assert relative(hidden, expected) < LIMITS[torch.float16]
    assert bool(sums.isfinite().all())
    words = (problem.weight1, problem.bias1, None, problem.weight2, problem.bias2, problem.residual)
    recomputed = launch.gained_mlp_residual(tokens, *words, settings=SMALL.recomputed)
    wanted = problem.residual.double() + expected @ problem.weight2.double() + problem.bias2.double()
    assert relative(recomputed, wanted) < LIMITS[torch.float16]


def test_a_channel_without_a_response_gets_a_gain_of_one() -> None:
    sums = torch.zeros(2, 3, 160)
    assert torch.equal(launch.response_gain(sums, torch.randn(160)), torch.ones(2, 160))


def test_a_mean_far_from_zero_costs_the_norm_no_digits() -> None:
    """A difference of large sums would lose all of them: the mean is 250 times the deviation."""
    problem = Problem.random(40, 16)
    tokens = (problem.tokens / problem.tokens.std() * 0.125 + 32).half()
    shifted = Problem(**{name: getattr(problem, name) for name in Problem.__dataclass_fields__} | {"tokens": tokens})
    with watched():
        report = errors(shifted, SMALL)
    assert max(report.values()) < LIMITS[torch.float16], report


def test_the_sums_are_the_same_where_the_hidden_tensor_is_not_stored() -> None:
    problem = Problem.random(40, 49, 2)
    first = (problem.tokens, problem.weight1, problem.bias1)
    _, sums = launch.norm_linear_gelu(*first, settings=SMALL.first)
    hidden, alone = launch.norm_linear_gelu(*first, settings=SMALL.first, store_hidden=False)
    assert hidden is None
    assert sums is not None
    assert alone is not None
    assert torch.equal(sums, alone)


def test_results_repeat_bit_by_bit() -> None:
    """Every value is written once, as `watched` counts, and no sum depends on the order of the programs."""
    problem = Problem.random(24, 45, 2)
    results = []
    for order in (1, -1):
        tiles = SMALL.first

        def backwards(grid: Program, order: int = order) -> list[Program]:
            return [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])][::order]

        with watched(backwards):
            hidden, sums = launch.norm_linear_gelu(problem.tokens, problem.weight1, problem.bias1, settings=tiles)
            assert hidden is not None
            assert sums is not None
            gain = launch.response_gain(sums, problem.gamma)
            second = (problem.weight2, problem.bias2, problem.residual)
            out = launch.gained_linear_residual(hidden, gain, *second, settings=SMALL.second)
            results.append((hidden, sums, gain, out))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_samples_do_not_touch_each_other() -> None:
    """A NaN in one sample stays there; so does its gain."""
    problem = Problem.random(24, 33, 3)
    problem.tokens[1, 5] = float("nan")
    first = (problem.tokens, problem.weight1, problem.bias1)
    hidden, sums = launch.norm_linear_gelu(*first, settings=SMALL.first)
    assert hidden is not None
    assert sums is not None
    gain = launch.response_gain(sums, problem.gamma)
    second = (problem.weight2, problem.bias2, problem.residual)
    stored = launch.gained_linear_residual(hidden, gain, *second, settings=SMALL.second)
    recomputed = launch.gained_mlp_residual(*first, gain, *second, settings=SMALL.recomputed or SMALL.first)
    for result in (hidden, sums, gain, stored, recomputed):
        assert [bool(torch.isfinite(sample).all()) for sample in result] == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(1, 49, 40)}, "float16 or bfloat16"),
        ({"tokens": torch.zeros(1, 49, 32).half()}, r"weight is \(40, 160\)"),
        ({"bias": torch.zeros(160)}, "bias is .* in torch.float32"),
        ({"weight": torch.zeros(160, 40).half().t()}, "not contiguous"),
        ({"tokens": torch.zeros(1, 1, 1).half().expand(1, 2**24, 40)}, "Use smaller images"),
    ],
)
def test_other_tensors_are_refused(change: dict[str, Tensor], message: str) -> None:
    shapes = {"tokens": (1, 49, 40), "weight": (40, 160), "bias": (160,)}
    tensors = {name: torch.zeros(shape).half() for name, shape in shapes.items()}
    with pytest.raises(InputError, match=message):
        launch.norm_linear_gelu(**(tensors | change), settings=SMALL.first)


def test_a_trace_on_a_cpu_is_refused() -> None:
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=torch.float16) for shape in ((1, 49, 40), (40, 160), (160,))]
        with pytest.raises(InputError, match="Compile on a CUDA device"):
            launch.norm_linear_gelu(*tensors, settings=SMALL.first)


@pytest.mark.slow
@HALVES
@pytest.mark.parametrize(("channels", "positions"), STAGES)
def test_every_stage_of_every_variant_in_full(channels: int, positions: int, dtype: torch.dtype) -> None:
    """Tiles wider than a GPU's, which the interpreter runs in seconds: the whole sum of squares of a real stage."""
    recomputed = LaunchSettings(256, 0, 128, 8, 2) if channels <= 320 else None
    report = errors(Problem.random(channels, positions, dtype=dtype), Tiles(WIDE, WIDE, recomputed))
    assert max(report.values()) < LIMITS[dtype], report


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "positions"), STAGES)
def test_every_candidate_tile_of_every_stage(channels: int, positions: int) -> None:
    """The first and the last program of the grid: the first and the last channel, position and sample."""
    problem = Problem.random(channels, positions, 2)
    hidden = problem.exact_hidden()
    gain = problem.exact_gain(hidden)
    exact = problem.exact_output(hidden, gain)
    half = hidden.half()

    def corners(grid: Program) -> list[Program]:
        return [(0, 0, 0), (grid[0] - 1, grid[1] - 1, grid[2] - 1)]

    first, second = (problem.tokens, problem.weight1, problem.bias1), (problem.weight2, problem.bias2, problem.residual)
    with watched(corners):
        for settings in candidates("norm_linear_gelu", channels):
            result, sums = launch.norm_linear_gelu(*first, settings=settings)
            assert result is not None
            assert sums is not None
            check_corners(result, hidden, settings)
            tiles = torch.stack([part.square().sum(1) for part in hidden.split(settings.block_m, 1)], 1)
            check_corners(sums, tiles, LaunchSettings(1, settings.block_n, 0, 1, 1))
        for settings in candidates("gained_linear_residual", channels):
            result = launch.gained_linear_residual(half, gain.float(), *second, settings=settings)
            check_corners(result, exact, settings)
        for settings in candidates("gained_mlp_residual", channels):
            result = launch.gained_mlp_residual(*first, gain.float(), *second, settings=settings)
            check_corners(result, exact, settings)


def candidates(kernel: KernelName, channels: int) -> set[LaunchSettings]:
    """The candidates of all targets."""
    return {settings for target in SHARED_BYTES for settings in candidate_settings(kernel, channels, target)}


def check_corners(result: Tensor, exact: Tensor, settings: LaunchSettings) -> None:
    """Compare the tiles that the first and the last program write."""
    rows, columns = result.shape[1:]
    wide = settings.block_n or columns
    last = (position_tiles(settings, rows) - 1) * settings.block_m, (-(-columns // wide) - 1) * wide
    for corner in ((0, slice(0, settings.block_m), slice(0, wide)), (-1, slice(last[0], None), slice(last[1], None))):
        assert relative(result[corner], exact[corner]) < LIMITS[torch.float16]


def last_program(grid: Program) -> list[Program]:
    return [(grid[0] - 1, grid[1] - 1, grid[2] - 1)]


@pytest.mark.slow
@LAYOUTS
def test_the_last_sample_of_a_batch_beyond_two_billion_values(channels_last: bool) -> None:
    """Offsets of 32 bits would be negative: the hidden tensor has 2.2 · 10⁹ values, and one tile is computed."""
    channels, positions, batch = 40, 3136, 4400
    small = Problem.random(channels, positions)
    hidden = small.exact_hidden()
    gain = small.exact_gain(hidden)
    tokens = torch.empty(batch, positions, channels, dtype=torch.float16)
    shape = tokens.shape if channels_last else (batch, channels, positions)
    tokens, residual = tokens.view(shape), torch.empty(shape, dtype=torch.float16)
    tokens[-1], residual[-1] = streamed(small.tokens, channels_last)[0], streamed(small.residual, channels_last)[0]
    gains = torch.empty(batch, 4 * channels)
    gains[-1] = gain[0].float()
    wide, rows = torch.empty(batch, positions, 4 * channels, dtype=torch.float16), slice(-64, None)
    wide[-1] = hidden[0].half()
    settings, words = LaunchSettings(64, 64, 32, 4, 2), {"channels_last": channels_last}
    first, second = (tokens, small.weight1, small.bias1), (small.weight2, small.bias2, residual)
    exact = small.exact_output(hidden, gain)
    with watched(last_program):
        result, _ = launch.norm_linear_gelu(*first, settings=settings, **words)
        assert result is not None
        assert relative(result[-1, rows, 128:], hidden[0, rows, 128:]) < LIMITS[torch.float16]
        del result
        stored = launch.gained_linear_residual(wide, gains, *second, settings=settings, **words)
        found = streamed(stored[-1:], channels_last)
        assert relative(found[0, rows], exact[0, rows]) < LIMITS[torch.float16]


@pytest.mark.slow
def test_the_recomputing_kernel_and_the_gain_beyond_two_billion_values() -> None:
    channels, positions, batch = 40, 3136, 17200
    small = Problem.random(channels, positions)
    hidden = small.exact_hidden()
    gain = small.exact_gain(hidden)
    tokens, residual = (torch.empty(batch, positions, channels, dtype=torch.float16) for _ in range(2))
    tokens[-1], residual[-1] = small.tokens[0], small.residual[0]
    gains = torch.empty(batch, 4 * channels)
    gains[-1] = gain[0].float()
    first, second = (tokens, small.weight1, small.bias1), (small.weight2, small.bias2, residual)
    with watched(last_program):
        out = launch.gained_mlp_residual(*first, gains, *second, settings=LaunchSettings(64, 0, 32, 4, 2))
    exact = small.exact_output(hidden, gain)
    assert relative(out[-1, -64:], exact[0, -64:]) < LIMITS[torch.float16]
    del tokens, residual, out
    sums = torch.empty(65535, 256, 4 * channels)
    sums[-1] = hidden[0].square().sum(0).float() / 256
    with watched(last_program):
        assert relative(launch.response_gain(sums, small.gamma)[-1], gain[0]) < LIMITS[torch.float16]
