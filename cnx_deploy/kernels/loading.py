"""The file of the kernels, compiled for a GPU or interpreted on a CPU: both in one process.

`triton.jit` decides when a file is loaded whether its functions are compiled or interpreted, so the file is loaded
a second time for the interpreter; no environment variable is needed. Triton's interpreter (3.8) treats BF16 as integers
in products, cuts where it should round, and computes erf element by element; `interpreting` corrects this while a
kernel runs.
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from cnx_deploy.core.errors import MissingRequirementError
from cnx_deploy.kernels.settings import KERNELS

__all__ = ["SOURCE", "compiled_kernels", "interpreted_kernels", "interpreting", "load_interpreted"]

SOURCE = Path(__file__).with_name("triton_source.py")
LOCK = threading.RLock()
"""Held while the interpreter runs, which replaces functions of Triton's language, and while a kernel is compiled."""


def compiled_kernels() -> ModuleType:
    """The module of the kernels as Triton compiles them."""
    _require_triton()
    return importlib.import_module("cnx_deploy.kernels.triton_source")


@functools.cache
def interpreted_kernels() -> ModuleType:
    """The same kernels for Triton's interpreter, which runs them on CPU tensors."""
    return load_interpreted(SOURCE)


def load_interpreted(path: Path) -> ModuleType:
    """Load a file of Triton kernels so that they are interpreted."""
    _require_triton()
    from triton import knobs
    from triton.runtime.interpreter import InterpretedFunction

    name = f"{path.stem}_interpreted"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where inspect looks for the source
    with LOCK, knobs.runtime.scope():
        knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    # Called as an interpreted function, a helper replaces all of Triton's language once more, which takes 10 ms a call.
    for name, function in list(vars(module).items()):
        if isinstance(function, InterpretedFunction) and name not in KERNELS:
            setattr(module, name, function.rewrite())
    return module


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Correct Triton's interpreter while kernels of `load_interpreted` run, and keep other threads from compiling."""
    import triton.language as tl
    from triton.runtime.interpreter import ReduceOps, TensorHandle, interpreter_builder

    original_cast = interpreter_builder.cast_impl

    def cast(source: Any, destination: Any) -> Any:
        if (source.dtype.scalar, destination.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if (source.dtype.scalar, destination.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle(_widened(source), tl.float32)
        return original_cast(source, destination)

    def dot(left: Any, right: Any, start: Any, *_: Any) -> Any:
        return TensorHandle(_widened(left) @ _widened(right) + start.data, start.dtype.scalar)

    def erf(value: Any) -> Any:
        return TensorHandle(torch.erf(torch.from_numpy(np.ascontiguousarray(value.data))).numpy(), value.dtype.scalar)

    def total(value: Any, axis: int) -> Any:
        return ReduceOps(axis, tl.standard._sum_combine, False).apply(value)

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (tl, "sum", total),  # Triton's own was loaded to be compiled
        (interpreter_builder, "cast_impl", cast),
        (interpreter_builder, "create_dot", dot),
        (interpreter_builder, "create_erf", erf),
    ]
    # A value that leaves the range of FP16 is infinite, as on a GPU, and no warning.
    with LOCK, np.errstate(over="ignore", invalid="ignore"):
        originals = [(holder, name, getattr(holder, name)) for holder, name, _ in replaced]
        for holder, name, function in replaced:
            setattr(holder, name, function)
        try:
            yield
        finally:
            for holder, name, function in originals:
                setattr(holder, name, function)


def _widened(handle: Any) -> Any:
    """The values of an FP16 or BF16 operand as a NumPy array in FP32."""
    import triton.language as tl

    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise MissingRequirementError(
            "The kernels need Triton, which is not installed. PyTorch for CUDA on Linux brings it (pip install torch); "
            "or install it alone: pip install triton."
        )
