"""How a kernel is launched: tile, warps and stages, the grid that follows, and the tiles that are worth measuring.

Imports neither Triton nor PyTorch. Tiles are chosen by rule from the number of channels and from what each target has;
`scripts/compile_kernels.py` compiles what the rule gives for all variants and refuses spilled registers.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from cnx_deploy.core.errors import InputError

__all__ = [
    "EPS", "KERNELS", "SHARED_BYTES", "KernelName", "LaunchSettings", "candidate_settings", "default_settings", "grid",
    "position_tiles", "split_channels",
]  # fmt: skip

EPS = 1e-6
"""Of LayerNorm and of GRN, in every ConvNeXt V2."""
Tile = tuple[int, int, int]
"""Positions, columns or hidden channels, and warps."""
KernelName = Literal["norm_linear_gelu", "response_gain", "gained_linear_residual", "gained_mlp_residual"]
KERNELS: tuple[KernelName, ...] = get_args(KernelName)

SHARED_BYTES = {"sm80": 163 << 10, "sm86": 99 << 10, "sm89": 99 << 10, "sm90": 227 << 10, "sm120": 99 << 10}
"""Shared memory that one block may use, by compute capability: the targets that the kernels are compiled for.

Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
"""


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """Tile and launch parameters of a kernel.

    `block_m` positions by `block_n` output channels are one program's tile; `block_k` channels are reduced at a time.
    Of `gained_mlp_residual` `block_k` is the chunk of hidden channels and `block_n` 0; of `response_gain` `block_n`
    holds all hidden channels, `block_m` tiles are read at a time and `block_k` is 0.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def position_tiles(settings: LaunchSettings, positions: int) -> int:
    """Tiles that a sample's positions are cut into: the second dimension of `norm_linear_gelu`'s sums of squares."""
    return -(-positions // settings.block_m)


def grid(
    kernel: KernelName, settings: LaunchSettings, batch: int, positions: int, channels: int
) -> tuple[int, int, int]:
    """Number of programs in x, y and z; `channels` is C."""
    if kernel == "response_gain":
        return batch, 1, 1
    tiles = position_tiles(settings, positions)
    if kernel == "gained_mlp_residual":
        return tiles, batch, 1
    width = 4 * channels if kernel == "norm_linear_gelu" else channels
    return -(-width // settings.block_n), tiles, batch


def split_channels(channels: int) -> tuple[int, int]:
    """C as two powers of two that hold it: (40 -> 32, 16), (96 -> 64, 32), (128 -> 128, 0)."""
    first = max(16, 1 << (channels.bit_length() - 1))
    rest = channels - first
    return (first, 0) if rest <= 0 else (first, max(16, _power_of_two(rest)))


def default_settings(kernel: KernelName, channels: int, target: str = "sm89") -> LaunchSettings:
    """The settings to use where nothing was measured: the first candidate.

    Raises InputError where the kernel has none for so many channels.
    """
    candidates = candidate_settings(kernel, channels, target)
    if not candidates:
        raise InputError(
            f"{kernel} has no tile for {channels} channels on {target}: a program holds whole rows, which takes too "
            "many registers. Store the hidden tensor there: norm_linear_gelu and gained_linear_residual."
        )
    return candidates[0]


def candidate_settings(kernel: KernelName, channels: int, target: str = "sm89") -> tuple[LaunchSettings, ...]:
    """Settings worth measuring for C `channels`, the default first; none spills registers on the target.

    They are for streams whose channels are last. With channels first `gained_linear_residual` wants eight warps and at
    most 128 columns: with four a thread spills 16 bytes.

    Empty for `gained_mlp_residual` where no tile fits.

    Raises InputError for a target that the kernels are not compiled for.
    """
    if target not in SHARED_BYTES:
        raise InputError(f"The kernels are not compiled for {target!r}: choose one of {', '.join(SHARED_BYTES)}.")
    if kernel == "response_gain":
        width = _power_of_two(4 * channels)
        at_once = max(1, min(32, 4096 // width))
        return (LaunchSettings(at_once, width, 0, max(4, min(32, at_once * width // 512)), 1),)
    if kernel == "gained_mlp_residual":
        return _recomputing_candidates(channels, target)
    # With chunks of 64 only two blocks of 57 kB fit into the 164 kB of an A100, and one into 100 kB.
    has_room = SHARED_BYTES[target] > 200 << 10
    if kernel == "norm_linear_gelu":
        chunk = 16 if channels % 32 else 64 if has_room and channels % 64 == 0 else 32
        # Each tile of columns computes the norm anew: wide ones where a row is long.
        tiles: tuple[Tile, ...] = ((64, 128, 4), (64, 128, 8), (64, 64, 4), (128, 128, 8))
        if 4 * channels < 256:
            tiles = ((64, 64, 4), (64, 128, 4), (128, 64, 4))
        elif target == "sm120":  # four warps spill a register or two there
            tiles = tiles[1:]
    else:
        chunk = 64 if has_room and channels % 16 == 0 else 32
        tiles = ((64, 128, 4), (128, 128, 8), (64, 256, 8))
        if channels in (256, 512, 1024):  # the wide tile spills on sm86 and sm89
            tiles = ((64, 128, 4), (128, 128, 8))
        elif channels < 256:  # one tile holds all columns, so the hidden tensor is read once
            width = max(16, _power_of_two(channels))
            tiles = ((64, width, 8 if width == 256 else 4), (64, min(width, 64), 4), (128, min(width, 128), 8))
    return tuple(dict.fromkeys(LaunchSettings(m, n, chunk, warps, 3) for m, n, warps in tiles))


def _recomputing_candidates(channels: int, target: str) -> tuple[LaunchSettings, ...]:
    """Of `gained_mlp_residual`: whole rows of C channels twice, tokens and sums, decide."""
    if channels > 320:
        return ()
    tiles: tuple[Tile, ...]
    if channels > 192:
        tiles = ((32, 32 if channels <= 256 else 16, 8), (16, 32, 8))
    elif channels > 128:
        tiles = ((64, 32 if channels <= 160 else 16, 8), (32, 32, 8), (32, 16, 4))
    elif target == "sm120":
        tiles = ((64, 32, 8), (64, 16, 8), (32, 16, 4))
    else:
        tiles = ((64, 32, 4), (64, 32, 8), (64, 16, 4), (128, 32, 8))
    return tuple(LaunchSettings(m, 0, chunk, warps, 2) for m, chunk, warps in tiles)


def _power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()
