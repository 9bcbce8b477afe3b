"""Compile every kernel for every variant and target without a GPU, and record what the code uses.

usage: compile_kernels.py [--candidates] [--channels 40,80] [--targets sm89] [--workers 1] [--record FILE]

Ends with exit code 3 where a kernel spills registers, uses no tensor core or takes more shared memory than there is.
"""

import argparse
import contextlib
import datetime
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from cnx_deploy.core.files import write_text
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.kernels.compiling import KernelImage, compile_kernel
from cnx_deploy.kernels.settings import KERNELS, SHARED_BYTES, KernelName, LaunchSettings, candidate_settings

WIDTHS = sorted({width for variant in VARIANTS.values() for width in variant.dims})
REGISTERS = 65536  # a multiprocessor, of every target
LIMITS = {
    "sm80": (64, 32, 164),
    "sm86": (48, 16, 100),
    "sm89": (48, 24, 100),
    "sm90": (64, 32, 228),
    "sm120": (48, 24, 100),
}
"""Warps, blocks and kB of shared memory a multiprocessor.

Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
"""
Job = tuple[KernelName, int, str, LaunchSettings, bool]


def resident_warps(image: KernelImage, target: str) -> int:
    """Warps of a kernel that a multiprocessor holds at a time, by its registers, shared memory and limits.

    Registers are given in units of 256 a warp, and a block takes 1 kB of shared memory more than it asks for.
    """
    warps, blocks, shared_kb = LIMITS[target]
    registers_a_warp = -(-image.registers * 32 // 256) * 256
    by_registers = REGISTERS // registers_a_warp // image.num_warps
    by_shared = (shared_kb << 10) // (image.shared_bytes + 1024)
    return image.num_warps * min(warps // image.num_warps, blocks, by_registers, by_shared)


def jobs(targets: list[str], widths: list[int], candidates: bool) -> list[Job]:
    """Kernel, channels, target, settings and whether the hidden tensor is stored, of everything to compile."""
    return [
        (kernel, width, target, settings, store_hidden)
        for target in targets
        for width in widths
        for kernel in KERNELS
        for settings in candidate_settings(kernel, width, target)[: None if candidates else 1]
        for store_hidden in ((True, False) if kernel == "norm_linear_gelu" else (True,))
    ]


def compiled(job: Job) -> dict[str, object]:
    """A row of the record."""
    kernel, width, target, settings, store_hidden = job
    image = compile_kernel(kernel, width, settings, target=target, store_hidden=store_hidden)
    return {
        "kernel": kernel, "stores_hidden": store_hidden, "channels": width, "target": target, **asdict(settings),
        "registers": image.registers, "shared_bytes": image.shared_bytes, "spills": image.spills,
        "tensor_core": image.tensor_core, "tensor_core_count": image.tensor_core_count,
        "resident_warps": resident_warps(image, target), "cubin_bytes": len(image.cubin),
    }  # fmt: skip


def fault(row: dict[str, object]) -> str | None:
    """Why a kernel must not be used, or None."""
    target = str(row["target"])
    if row["spills"]:
        return f"spills {row['spills']} bytes a thread"
    if int(str(row["shared_bytes"])) > SHARED_BYTES[target]:
        return f"takes {row['shared_bytes']} bytes of shared memory, and {target} has {SHARED_BYTES[target]}"
    if not row["tensor_core"] and row["kernel"] != "response_gain":
        return "uses no tensor core"
    return None


def main() -> int:
    """Compile, print and record; 3 where a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="JSON file to write")
    parser.add_argument("--targets", default=",".join(SHARED_BYTES), help="compute capabilities (default: all)")
    parser.add_argument("--channels", default=",".join(map(str, WIDTHS)), help="channel counts (all variants')")
    parser.add_argument("--candidates", action="store_true", help="every tile that is offered, not only the chosen one")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    options = parser.parse_args()
    widths = [int(width) for width in options.channels.split(",")]
    rows, faults = [], 0
    with contextlib.ExitStack() as stack:
        mapped = map if options.workers == 1 else stack.enter_context(ProcessPoolExecutor(options.workers)).map
        for row in mapped(compiled, jobs(options.targets.split(","), widths, options.candidates)):
            rows.append(row)
            tile = "×".join(str(row[name]) for name in ("block_m", "block_n", "block_k"))
            reason = fault(row)
            faults += reason is not None
            name = f"{row['kernel']}{'' if row['stores_hidden'] else ' (sums only)'}"
            print(
                f"{row['target']:5} C {row['channels']:<4} {name:29} {tile:11} {row['num_warps']:2} warps "
                f"{row['registers']:3} registers {int(str(row['shared_bytes'])) / 1024:5.1f} kB "
                f"{row['resident_warps']:2} resident warps {row['tensor_core_count']:4} {row['tensor_core']:15} "
                f"{reason or ''}".rstrip(),
                flush=True,
            )
    print(f"{len(rows)} kernels, {faults} with a fault")
    if options.record:
        import triton

        head = {
            "command": "scripts/compile_kernels.py --record " + str(options.record),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "triton": triton.__version__, "ran_on_gpu": False,
        }  # fmt: skip
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        write_text(options.record, f'{json.dumps(head)[:-1]}, "kernels": [\n{lines}\n]}}\n')
    return 3 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
