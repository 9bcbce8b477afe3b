"""A half-precision network with any of its parts in FP32, tried without an export.

Two deploy forms of the same weights are made once: one in half, one with everything kept in FP32. A part that is kept
is taken from the second, weights not rounded, and put into the first; parts cast their inputs to their own types, so
the result is the form that `DeploySpec.keep_fp32` describes. It is run with the rules of `emulator.operators`: FP32
inside an operator, rounded to the type in which its result is stored.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.diagnosis.bisect.units import units_of
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.runners.emulator.operators import OPERATORS

__all__ = ["MixedForm"]

LAYER_NORM = OPERATORS["LayerNormalization"]
HALVES = (torch.float16, torch.bfloat16)


class MixedForm:
    """A network's deploy form in half, whose parts can be kept in FP32 from one call to the next.

    `spec.keep_fp32` is not looked at. Raises InputError for a spec that is not of half precision.
    """

    def __init__(self, model: ConvNeXtV2, spec: DeploySpec) -> None:
        if not spec.is_half:
            raise InputError(
                f"Parts are kept in FP32 in a file of half precision, not in {spec.precision}. Give one of fp16 or "
                "bf16."
            )
        self.half = deploy_form(model, replace(spec, keep_fp32=()))
        self.single = deploy_form(model, replace(spec, keep_fp32=units_of(model.variant)))

    def logits(self, batches: Sequence[Tensor], kept: Collection[str] = ()) -> Tensor:
        """Raw images in batches -> (N, num_classes) float32 logits, with the modules called `kept` in FP32."""
        with _swapped(self.half, self.single, kept), torch.inference_mode(), _rounded_operators():
            return torch.cat([self.half(images) for images in batches])


@contextmanager
def _swapped(form: nn.Module, source: nn.Module, names: Collection[str]) -> Iterator[None]:
    """`form` with the named modules of `source` in place of its own, until the context ends."""
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    own = {name: form.get_submodule(name) for name in outermost}
    try:
        for name in outermost:
            form.set_submodule(name, source.get_submodule(name))
        yield
    finally:
        for name, module in own.items():
            form.set_submodule(name, module)


class _RoundedOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute in FP32 whatever takes half tensors, and round its result once if it takes no wider ones.

    A linear layer over tokens is two operators of the written graph, MatMul and Add, and so it is here; a LayerNorm is
    the emulator's own, which rounds alike to the last bit of FP32. In inference mode torch's layers arrive whole.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.layer_norm.default:
            tokens, _, gain, shift, eps = args
            return LAYER_NORM([tokens, gain, shift], {"axis": -1, "epsilon": eps})
        floating = {each.dtype for each in tree_leaves(args) if isinstance(each, Tensor) and each.is_floating_point()}
        if func is torch.ops.aten.to.dtype or func.is_view or not floating.intersection(HALVES):
            return func(*args, **(kwargs or {}))
        narrow = floating.pop() if len(floating) == 1 else torch.float32
        wide = tree_map(_widened, args)
        if func is torch.ops.aten.linear.default and wide[0].ndim > 2:
            tokens, weight, bias = wide
            return (F.linear(tokens, weight).to(narrow).float() + bias).to(narrow)
        return func(*wide, **(kwargs or {})).to(narrow)


def _rounded_operators() -> TorchDispatchMode:
    return _RoundedOperators()  # type: ignore[no-untyped-call]


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value
