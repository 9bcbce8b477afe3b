"""The kernels over sizes and tiles that nobody chose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnx_deploy.kernels.settings import LaunchSettings
from tests.support.kernel_runs import LIMITS, Problem, Tiles, errors, watched

BLOCKS = st.sampled_from([16, 32, 64, 128])
SIDES = st.integers(1, 9)
CASES = {
    "channels": st.integers(1, 100), "height": SIDES, "width": SIDES, "batch": st.integers(1, 2),
    "blocks": st.tuples(*[BLOCKS] * 8), "at_once": st.sampled_from([1, 2, 8]), "dtype": st.sampled_from(list(LIMITS)),
    "channels_last": st.booleans(), "with_grn": st.booleans(), "heat": st.sampled_from([0.0, 2.0, 50.0]),
}  # fmt: skip


def check(
    channels: int, height: int, width: int, batch: int, blocks: tuple[int, ...], at_once: int, dtype: torch.dtype,
    channels_last: bool, with_grn: bool, heat: float,
) -> None:  # fmt: skip
    problem = Problem.random(channels, height * width, batch, dtype=dtype, heat=heat)
    tiles = Tiles(
        LaunchSettings(*blocks[:3], 4, 2),
        LaunchSettings(*blocks[3:6], 4, 2),
        LaunchSettings(blocks[6], 0, blocks[7], 4, 2),
        LaunchSettings(at_once, 512, 0, 4, 1),
    )
    with watched():
        report = errors(problem, tiles, channels_last=channels_last, with_grn=with_grn)
    # Few values can all be unlucky: one rounding is at most 2⁻¹¹ of a value, in FP16, and there are up to three.
    limit = LIMITS[dtype] if channels * height * width > 2000 else 3 * LIMITS[dtype]
    assert max(report.values()) < limit, report


@settings(max_examples=10, deadline=None)
@given(**CASES)
def test_any_size_in_any_tile(**case: object) -> None:
    check(**case)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(**CASES)
def test_many_sizes_in_many_tiles(**case: object) -> None:
    check(**case)
