"""Tiles by rule, grids, and how channels are split."""

import subprocess
import sys
from typing import get_args

import pytest

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import ALL_VARIANTS
from cnx_deploy.kernels.settings import (
    KERNELS,
    SHARED_BYTES,
    KernelName,
    LaunchSettings,
    candidate_settings,
    default_settings,
    grid,
    position_tiles,
    split_channels,
)

WIDTHS = sorted({width for variant in ALL_VARIANTS.values() for width in variant.dims})
TILE = LaunchSettings(64, 128, 32, 4, 3)


@pytest.mark.parametrize(
    ("kernel", "programs"),
    [
        ("norm_linear_gelu", (2, 4, 3)),  # 160 columns in tiles of 128, 196 positions in tiles of 64, 3 samples
        ("response_gain", (3, 1, 1)),
        ("gained_linear_residual", (1, 4, 3)),
        ("gained_mlp_residual", (4, 3, 1)),
    ],
)
def test_a_grid_covers_every_tile(kernel: KernelName, programs: tuple[int, int, int]) -> None:
    assert grid(kernel, TILE, 3, 196, 40) == programs
    assert [position_tiles(TILE, positions) for positions in (1, 64, 65, 3136)] == [1, 1, 2, 49]


def test_channels_are_split_in_two_powers_of_two_that_a_product_takes() -> None:
    for channels in range(1, 3000):
        first, rest = split_channels(channels)
        assert first >= 16
        assert rest == 0 or rest >= 16
        assert all(part & (part - 1) == 0 for part in (first, rest))
        assert first + rest >= channels
        assert rest == 0 or first < channels
    assert [split_channels(channels) for channels in (40, 80, 96, 128, 160)] == [
        (32, 16), (64, 16), (64, 32), (128, 0), (128, 32),
    ]  # fmt: skip


@pytest.mark.parametrize("target", SHARED_BYTES)
@pytest.mark.parametrize("channels", WIDTHS)
def test_every_width_has_tiles_that_a_product_takes(channels: int, target: str) -> None:
    for kernel in KERNELS:
        candidates = candidate_settings(kernel, channels, target)
        assert len(set(candidates)) == len(candidates)
        assert candidates or (kernel == "gained_mlp_residual" and channels > 320)
        for settings in candidates:
            blocks = [block for block in (settings.block_m, settings.block_n, settings.block_k) if block]
            assert all(block & (block - 1) == 0 for block in (*blocks, settings.num_warps))
            if kernel == "response_gain":
                assert settings.block_n >= 4 * channels
            else:
                assert min(blocks) >= 16
        if candidates:
            assert default_settings(kernel, channels, target) == candidates[0]


def test_a_width_that_no_program_holds_is_refused_with_what_to_do() -> None:
    assert candidate_settings("gained_mlp_residual", 352) == ()
    with pytest.raises(InputError, match="Store the hidden tensor"):
        default_settings("gained_mlp_residual", 352)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(InputError, match=r"sm75.*sm80, sm86, sm89, sm90, sm120"):
        candidate_settings("norm_linear_gelu", 40, "sm75")


def test_every_kernel_has_a_name() -> None:
    assert get_args(KernelName) == KERNELS


def test_settings_import_neither_torch_nor_triton() -> None:
    code = "import sys, cnx_deploy.kernels.settings; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
