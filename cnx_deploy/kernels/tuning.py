"""Which kernels and tiles a stage runs with: by rule on a CPU, by measurement on the GPU that is here, kept in a file.

The file lies in Triton's own cache folder, so that it goes where the compiled kernels go, and is named after the GPU
and the versions that were measured. A result that is not there is measured again, never guessed.
"""

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.core.hidden_tensor import MOST_RECOMPUTED_CHANNELS, Hidden
from cnx_deploy.core.strict_json import strict_json, typed
from cnx_deploy.kernels.launch import gained_linear_residual, gained_mlp_residual, norm_linear_gelu
from cnx_deploy.kernels.loading import SOURCE
from cnx_deploy.kernels.settings import (
    SHARED_BYTES,
    KernelName,
    LaunchSettings,
    candidate_settings,
    default_settings,
)

__all__ = ["StageChoice", "StageShape", "TileCache", "choose", "choose_by_rule"]


@dataclass(frozen=True, slots=True)
class StageShape:
    """What a choice depends on: batch, positions H·W and channels C of a stage, type, and whether it has GRN."""

    batch: int
    positions: int
    channels: int
    dtype: str = "float16"
    has_grn: bool = True


@dataclass(frozen=True, slots=True)
class StageChoice:
    """How the blocks of a stage run. `first` is of `norm_linear_gelu`, `second` of the kernel behind the gain.

    `milliseconds`: what the two kernels took together where they were measured; None where a rule chose.
    """

    hidden: Hidden
    first: LaunchSettings
    second: LaunchSettings
    milliseconds: float | None = None


def choose_by_rule(shape: StageShape, hidden: Hidden | None = None, target: str = "sm89") -> StageChoice:
    """The default tiles; the hidden tensor is recomputed up to 160 channels, or as `hidden` says where a tile fits."""
    hidden = hidden or ("recomputed" if shape.channels <= MOST_RECOMPUTED_CHANNELS else "stored")
    (way,) = _ways(hidden, shape.channels, target)
    first, second = (default_settings(name, shape.channels, target) for name in _kernels(way))
    return StageChoice(way, first, second)


def choose(
    shape: StageShape,
    device: torch.device,
    hidden: Hidden | None = None,
    cache: "TileCache | None" = None,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> StageChoice:
    """The fastest of all candidates on `device`, from the cache or measured now; by rule on a CPU.

    Args:
        shape: the stage.
        device: where it runs.
        hidden: "stored" or "recomputed" leaves the other out, where a tile fits; None measures both.
        cache: where results are kept; None is the one of this machine's GPU.
        measure: milliseconds of a call; None is Triton's own measurement in a CUDA graph.
    """
    if device.type != "cuda" and measure is None:
        return choose_by_rule(shape, hidden)
    cache, target = cache or TileCache.of(device), _target(device)
    stage = f"{shape.batch}x{shape.positions}x{shape.channels} {shape.dtype} grn={shape.has_grn}"
    keys = {way: f"{stage} {way}" for way in _ways(hidden, shape.channels, target)}
    missing = [way for way, key in keys.items() if cache.get(key) is None]
    measured = _measured(shape, missing, device, target, measure or _milliseconds) if missing else []
    for choice in measured:
        cache.keep(keys[choice.hidden], choice)
    choices = [*measured, *filter(None, (cache.get(keys[way]) for way in keys.keys() - set(missing)))]
    return min(choices, key=lambda choice: choice.milliseconds or 0.0)


class TileCache:
    """Measured choices by shape, in a JSON file that several processes may read and write.

    A file that cannot be read counts as empty: it is written anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, StageChoice] = dict(self._read())

    @classmethod
    def of(cls, device: torch.device) -> "TileCache":
        """The cache of a GPU, for the versions of PyTorch and Triton that are installed."""
        import triton

        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name} {properties.multi_processor_count} {torch.__version__} {triton.__version__}"
        digest = hashlib.sha256(name.encode() + SOURCE.read_bytes()).hexdigest()[:16]
        return _opened(Path(triton.knobs.cache.dir) / f"cnx-deploy-tiles-{digest}.json")

    def get(self, key: str) -> StageChoice | None:
        """A choice by its key; None where it was not measured yet."""
        return self._known.get(key)

    def keep(self, key: str, choice: StageChoice) -> None:
        """Add a choice, beside those that other processes have written since."""
        self._known = {**self._known, **self._read(), key: choice}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({key: asdict(choice) for key, choice in sorted(self._known.items())}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as stream:
            stream.write(text + "\n")
        Path(stream.name).replace(self.path)

    def _read(self) -> Mapping[str, StageChoice]:
        try:
            return dict(typed(strict_json(self.path.read_bytes()), dict[str, StageChoice]))
        except (OSError, ValueError):
            return {}


@functools.cache
def _opened(path: Path) -> TileCache:
    return TileCache(path)


def _ways(hidden: Hidden | None, channels: int, target: str) -> list[Hidden]:
    """What can be done with the hidden tensor: as `hidden` says, None for both; it is stored where no tile holds it."""
    can_recompute = bool(candidate_settings("gained_mlp_residual", channels, target))
    if hidden is None:
        return ["stored", "recomputed"] if can_recompute else ["stored"]
    return [hidden if can_recompute else "stored"]


def _measured(
    shape: StageShape,
    ways: Sequence[Hidden],
    device: torch.device,
    target: str,
    measure: Callable[[Callable[[], object]], float],
) -> list[StageChoice]:
    """The best tiles of each way to treat the hidden tensor; each kernel is measured alone, in every candidate."""
    jobs: list[tuple[Hidden, KernelName, LaunchSettings]] = [
        (way, name, settings)
        for way in ways
        for name in _kernels(way)
        # Without GRN there is no statistic, so where the hidden tensor is recomputed the first kernel does not run.
        if shape.has_grn or way == "stored" or name != "norm_linear_gelu"
        for settings in candidate_settings(name, shape.channels, target)
    ]
    # First compiled, side by side: Triton's passes and NVIDIA's assembler leave Python's lock. No kernel depends on the
    # batch, so a batch of one does.
    tensors = _tensors(replace(shape, batch=1), device)
    with ThreadPoolExecutor() as pool:
        fit = list(pool.map(lambda job: _fits(_call(shape, tensors, *job)), jobs))
    tensors = _tensors(shape, device)
    times = {job: measure(_call(shape, tensors, *job)) for job in compress(jobs, fit)}
    choices = []
    for way in ways:
        best = []
        for name in _kernels(way):
            timed = [(time, settings) for (*job, settings), time in times.items() if job == [way, name]]
            no_time = (0.0, default_settings(name, shape.channels, target))
            best.append(min(timed, key=lambda row: row[0], default=no_time))
        (first_ms, first), (second_ms, second) = best
        choices.append(StageChoice(way, first, second, round(first_ms + second_ms, 5)))
    return choices


def _fits(call: Callable[[], object]) -> bool:
    """Run a kernel once; False where the GPU has less of something than those that the tiles were chosen for."""
    from triton.runtime.errors import OutOfResources

    try:
        call()
    except OutOfResources:
        return False
    return True


def _call(
    shape: StageShape, tensors: dict[str, Tensor], way: Hidden, kernel: KernelName, settings: LaunchSettings
) -> Callable[[], object]:
    weights = tensors["weight1"], tensors["bias1"]
    gain = tensors["gain"] if shape.has_grn else None
    closing = tensors["weight2"], tensors["bias2"], tensors["residual"]
    if kernel == "norm_linear_gelu":
        words: dict[str, Any] = {"store_hidden": way == "stored", "with_sums": shape.has_grn}
        return lambda: norm_linear_gelu(tensors["tokens"], *weights, settings=settings, **words)
    if kernel == "gained_linear_residual":
        return lambda: gained_linear_residual(tensors["hidden"], gain, *closing, settings=settings)
    return lambda: gained_mlp_residual(tensors["tokens"], *weights, gain, *closing, settings=settings)


def _tensors(shape: StageShape, device: torch.device) -> dict[str, Tensor]:
    batch, positions, channels = shape.batch, shape.positions, shape.channels
    shapes = {
        "tokens": (batch, positions, channels), "residual": (batch, positions, channels),
        "hidden": (batch, positions, 4 * channels), "weight1": (channels, 4 * channels), "bias1": (4 * channels,),
        "weight2": (4 * channels, channels), "bias2": (channels,),
    }  # fmt: skip
    dtype = getattr(torch, shape.dtype)
    made = {name: torch.randn(sizes, dtype=dtype, device=device) * 0.1 for name, sizes in shapes.items()}
    return made | {"gain": torch.ones(batch, 4 * channels, device=device)}


def _kernels(way: Hidden) -> tuple[KernelName, KernelName]:
    """The kernels before and behind the gain."""
    return "norm_linear_gelu", "gained_linear_residual" if way == "stored" else "gained_mlp_residual"


def _target(device: torch.device) -> str:
    """The compute capability whose tiles are tried: that of the GPU, or the nearest below that has some."""
    if device.type != "cuda":
        return "sm89"
    major, minor = torch.cuda.get_device_capability(device)
    return [name for name in SHARED_BYTES if int(name.removeprefix("sm")) <= 10 * major + minor][-1]


def _milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=10))
