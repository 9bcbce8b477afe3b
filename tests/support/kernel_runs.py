"""Runs of the kernels in Triton's interpreter: float64 to compare with, and a watch on every address they touch."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, interpreter_builder

from cnx_deploy.kernels import launch
from cnx_deploy.kernels.settings import LaunchSettings

EPS = 1e-6
LIMITS = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative L2 against float64: 1.5 times what the roundings cost, and 8 times that in BF16, which has 3 bits fewer."""
NAIVE_LIMIT = 65504.0
"""Where a sum of squares in FP16 becomes infinite."""
OUTPUTS = {
    "norm_linear_gelu": {"hidden_ptr", "sums_ptr"},
    "response_gain": {"gain_ptr"},
    "gained_linear_residual": {"out_ptr"},
    "gained_mlp_residual": {"out_ptr"},
}
MARGIN = 4096  # values before and behind each tensor, all NaN
Program = tuple[int, int, int]


@dataclass(frozen=True)
class Problem:
    """Inputs of one block behind its depthwise convolution, in half precision, and the answers in float64."""

    tokens: Tensor  # (N, HW, C), and so is the residual
    weight1: Tensor  # (C, 4C)
    bias1: Tensor
    gamma: Tensor  # (4C,), FP32
    weight2: Tensor  # (4C, C)
    bias2: Tensor
    residual: Tensor

    @classmethod
    def random(
        cls, channels: int, positions: int, batch: int = 1, *, dtype: torch.dtype = torch.float16, heat: float = 0.0,
        seed: int = 0,
    ) -> "Problem":  # fmt: skip
        """Random inputs; with `heat` the hidden tensor's sums of squares are so many times what FP16 holds."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        # Each channel with its own mean and scale, as behind a depthwise convolution.
        tokens = normal(batch, positions, channels) * (0.5 + normal(channels).abs()) + normal(channels)
        # Of a normal hidden tensor GELU keeps 0.425 of the squares.
        scale = (heat * NAIVE_LIMIT / positions / 0.425) ** 0.5 if heat else 1.0
        weight1, bias1 = normal(channels, 4 * channels) * scale / channels**0.5, normal(4 * channels) * 0.1
        gamma = normal(4 * channels)
        weight2, bias2 = normal(4 * channels, channels) / (4 * channels) ** 0.5, normal(channels) * 0.1
        residual = normal(batch, positions, channels)
        half = [tensor.to(dtype) for tensor in (tokens, weight1, bias1, weight2, bias2, residual)]
        return cls(*half[:3], gamma, *half[3:])

    def exact_hidden(self) -> Tensor:
        """The hidden tensor in float64."""
        normed = F.layer_norm(self.tokens.double(), self.tokens.shape[-1:], eps=EPS)
        return F.gelu(normed @ self.weight1.double() + self.bias1.double())

    def exact_gain(self, hidden: Tensor) -> Tensor:
        """GRN's gain in float64."""
        norm = hidden.square().sum(1).sqrt()
        return 1.0 + self.gamma.double() * norm / (norm.mean(1, keepdim=True) + EPS)

    def exact_output(self, hidden: Tensor, gain: Tensor | None) -> Tensor:
        """Residual and branch in float64."""
        scaled = hidden if gain is None else hidden * gain[:, None]
        return self.residual.double() + scaled @ self.weight2.double() + self.bias2.double()


def relative(value: Tensor, exact: Tensor) -> float:
    """Relative L2 of the difference, infinite where a value is."""
    difference = torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact)
    return float(difference) if bool(torch.isfinite(value).all()) else float("inf")


def streamed(tensor: Tensor, channels_last: bool) -> Tensor:
    """(N, HW, C) in the layout of a stream, or back."""
    return tensor if channels_last else tensor.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Tiles:
    """Settings of the three kernels with a product; without `recomputed` that kernel is left out."""

    first: LaunchSettings
    second: LaunchSettings
    recomputed: LaunchSettings | None = None
    gain: LaunchSettings | None = None


def errors(problem: Problem, tiles: Tiles, *, channels_last: bool = True, with_grn: bool = True) -> dict[str, float]:
    """Run all kernels of a block in both forms; relative L2 of each result, by its name."""
    exact_hidden = problem.exact_hidden()
    exact_gain = problem.exact_gain(exact_hidden) if with_grn else None
    exact = problem.exact_output(exact_hidden, exact_gain)
    tokens, residual = streamed(problem.tokens, channels_last), streamed(problem.residual, channels_last)
    found = {}
    first = (tokens, problem.weight1, problem.bias1)
    words = {"settings": tiles.first, "channels_last": channels_last, "with_sums": with_grn}
    hidden, sums = launch.norm_linear_gelu(*first, **words)
    assert hidden is not None
    found["hidden"] = relative(hidden, exact_hidden)
    gain = None
    if sums is not None:
        found["sums"] = relative(sums.double().sum(1), exact_hidden.square().sum(1))
        gain = launch.response_gain(sums, problem.gamma, settings=tiles.gain)
        assert exact_gain is not None
        found["gain"] = relative(gain, exact_gain)
    second = (problem.weight2, problem.bias2, residual)
    out = launch.gained_linear_residual(hidden, gain, *second, settings=tiles.second, channels_last=channels_last)
    found["stored"] = relative(streamed(out, channels_last), exact)
    if tiles.recomputed is not None:
        out = launch.gained_mlp_residual(*first, gain, *second, settings=tiles.recomputed, channels_last=channels_last)
        found["recomputed"] = relative(streamed(out, channels_last), exact)
    return found


@dataclass
class Watch:
    """What runs under `watched` touched."""

    tensors: dict[str, Tensor]
    written: int = 0

    def check(self, pointers: Any, mask: Any, access: str) -> None:
        """Raise where an address that is not masked lies in none of the kernel's tensors."""
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(addresses.shape, bool)
        for tensor in self.tensors.values():
            start = tensor.data_ptr()
            inside |= (addresses >= start) & (addresses + size <= start + tensor.numel() * tensor.element_size())
        if not inside.all():
            raise IndexError(f"a {access} of {int((~inside).sum())} values outside of every tensor")


@contextlib.contextmanager
def watched(choose: Callable[[Program], list[Program]] | None = None) -> Iterator[None]:
    """Run kernels over tensors with NaN around them, and outputs of NaN; raise on an access outside of a tensor.

    `choose` gives the programs to run from the grid; without it all run, and every value of an output must be written
    once and no more.
    """
    original_run, original_load, original_store = (
        InterpretedFunction.run, interpreter_builder.create_masked_load, interpreter_builder.create_masked_store,
    )  # fmt: skip

    def run(self: Any, *args: Any, grid: Program, warmup: bool, **words: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        outputs = OUTPUTS[self.__name__]
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if choose is None:
            tensors = {name: _guarded(value) for name, value in tensors.items()}
        watch = Watch(tensors)
        for name in outputs & tensors.keys() if choose is None else ():
            tensors[name].fill_(float("nan"))

        def load(pointers: Any, mask: Any, *rest: Any) -> Any:
            watch.check(pointers, mask, "load")
            return original_load(pointers, mask, *rest)

        def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            watch.check(pointers, mask, "store")
            watch.written += int(np.broadcast_to(mask.data, value.data.shape).sum())
            return original_store(pointers, value, mask, *rest)

        interpreter_builder.create_masked_load, interpreter_builder.create_masked_store = load, store
        try:
            _execute(self, {**named, **tensors}, grid, choose, words)
        finally:
            del interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
        if choose is None:
            assert watch.written == sum(tensors[name].numel() for name in outputs & tensors.keys())
            for name in outputs & tensors.keys():
                named[name].copy_(tensors[name])

    InterpretedFunction.run = run
    try:
        yield
    finally:
        InterpretedFunction.run = original_run


def _execute(function: Any, named: dict[str, Any], grid: Program, choose: Any, words: dict[str, Any]) -> None:
    """Run a kernel's programs; only the chosen ones where there is a choice."""
    chosen = None if choose is None else choose(grid)
    executor = GridExecutor(function.rewrite(), function.arg_names, grid if chosen is None else (len(chosen), 1, 1))
    if chosen is not None:
        set_index, set_dimensions = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
        interpreter_builder.set_grid_dim = lambda *_: set_dimensions(*grid)
        interpreter_builder.set_grid_idx = lambda at, *_: set_index(*chosen[at])
    try:
        executor(*named.values(), **words)
    finally:
        if chosen is not None:
            del interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx


def _guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy with NaN before and behind it."""
    whole = tensor.new_full((tensor.numel() + 2 * MARGIN,), float("nan"))
    inner = whole[MARGIN : MARGIN + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)
