"""The kernels compiled ahead of time for a GPU that need not be there: images for a driver, and what they use of it.

Triton brings NVIDIA's assembler, so a CPU is enough. An image is loaded with `cuModuleLoadData`, and `arguments` says
what `cuLaunchKernel` takes. Line information is left out, so an image holds no path, and its bytes depend on Triton's
version alone.
"""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.kernels.loading import LOCK, compiled_kernels
from cnx_deploy.kernels.settings import EPS, SHARED_BYTES, KernelName, LaunchSettings, split_channels

__all__ = ["HalfName", "KernelImage", "compile_kernel"]

HalfName = Literal["float16", "bfloat16"]
SCRATCH = ("global_scratch_ptr", "profile_scratch_ptr")
"""Two pointers that Triton appends to every kernel; these kernels use neither, so null is given."""
FP32_POINTERS = {"sums_ptr", "gamma_ptr", "gain_ptr"}
INTEGERS = {"positions", "tiles"}


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A compiled kernel.

    `arguments` are the launch's arguments in order: names that end in `_ptr` are device pointers, aligned to 16 bytes,
    the others int32. `shared_bytes` is the launch's dynamic shared memory; a block has 32 · `num_warps` threads in x.
    `spills` counts bytes of local memory a thread. `tensor_core` names the matrix instruction, of which the code has
    `tensor_core_count`; empty and 0 without one.
    """

    kernel: KernelName
    cubin: bytes
    entry: str
    arguments: tuple[str, ...]
    registers: int
    shared_bytes: int
    spills: int
    num_warps: int
    tensor_core: str
    tensor_core_count: int


@functools.cache
def compile_kernel(
    kernel: KernelName,
    channels: int,
    settings: LaunchSettings,
    *,
    target: str = "sm89",
    dtype: HalfName = "float16",
    channels_last: bool = True,
    store_hidden: bool = True,
    with_grn: bool = True,
) -> KernelImage:
    """Compile a kernel for C `channels` and a compute capability such as "sm89"; the same call compiles once a process.

    `store_hidden` is of `norm_linear_gelu`. Without `with_grn`, for blocks of ConvNeXt V1, that kernel writes no sums
    and the others take no gain.

    Raises InputError for a target that the kernels are not compiled for, MissingRequirementError for a Triton whose
    kernels take other parameters.
    """
    if target not in SHARED_BYTES:
        raise InputError(f"The kernels are not compiled for {target!r}: choose one of {', '.join(SHARED_BYTES)}.")
    from triton import compile as compile_source
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(compiled_kernels(), kernel)
    values: dict[str, Any] = {
        "EPS": EPS, "CHANNELS": channels, "CHANNELS_LAST": channels_last, "BLOCK_M": settings.block_m,
        "BLOCK_N": settings.block_n, "BLOCK_K": settings.block_k,
    }  # fmt: skip
    values["FIRST"], values["REST"] = split_channels(channels)
    if not store_hidden and kernel == "norm_linear_gelu":
        values["hidden_ptr"] = None
    if not with_grn:
        values |= {"sums_ptr": None, "gain_ptr": None}
    constants = {name: values[name] for name in function.arg_names if name in values}
    arguments = tuple(name for name in function.arg_names if name not in constants)
    half = {"float16": "*fp16", "bfloat16": "*bf16"}[dtype]
    types = {name: "i32" if name in INTEGERS else "*fp32" if name in FP32_POINTERS else half for name in arguments}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if signature[name].startswith("*")
    }
    options = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
    with LOCK, knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        source = ASTSource(function, signature, constants, aligned)
        compiled = compile_source(source, target=GPUTarget("cuda", int(target.removeprefix("sm")), 32), options=options)
    parameters = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0].count(".param")
    scratch = compiled.metadata.global_scratch_size + compiled.metadata.profile_scratch_size
    if parameters != len(arguments) + len(SCRATCH) or scratch:
        raise MissingRequirementError(
            f"Triton {version('triton')} gives {kernel} {parameters} parameters and {scratch} bytes of scratch memory; "
            f"expected {len(arguments) + len(SCRATCH)} and none. Install the Triton that constraints.txt names."
        )
    cubin: bytes = compiled.asm["cubin"]
    registers, spills = _resources(cubin)
    products = re.findall(r"^\s+(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", compiled.asm["ptx"], re.MULTILINE)
    return KernelImage(
        kernel, cubin, compiled.metadata.name, (*arguments, *SCRATCH), registers, compiled.metadata.shared, spills,
        settings.num_warps, products[0] if products else "", len(products),
    )  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as NVIDIA's `cuobjdump` reads them from an image."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(Path(file.name))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if used is None:
        raise ValueError(f"cuobjdump reports no registers: {report!r:.300}")
    return int(used[1]), int(used[2]) + int(used[3])
