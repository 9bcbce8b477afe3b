"""Run the kernels in Triton's interpreter at every stage of all variants and print what they are off from float64.

usage: PYTHONPATH=. python scripts/kernel_errors.py [--channels 40,80] [--record FILE]

A row is a stage at 224 px: one image with random weights, in FP16, in BF16, and in FP16 with hot weights, whose sums of
squares are 2 and 50 times what FP16 holds. Tiles are wider than a GPU's: the interpreter takes milliseconds for a
program, whatever its size. Ends with exit code 3 where a limit is passed.
"""

import argparse
import datetime
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from cnx_deploy.core.files import write_text
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.kernels.settings import LaunchSettings
from tests.support.kernel_runs import LIMITS, Problem, Tiles, errors

STAGES = sorted({(v.dims[stage], 3136 >> 2 * stage) for v in VARIANTS.values() for stage in range(4)})
FORMS = (
    ("fp16", torch.float16, 0.0), ("bf16", torch.bfloat16, 0.0), ("hot 2", torch.float16, 2.0),
    ("hot 50", torch.float16, 50.0),
)  # fmt: skip
WIDE = LaunchSettings(256, 512, 128, 8, 2)
MOST_RECOMPUTED = 320


def main() -> int:
    """Print a row a stage and form; 3 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", help="only these channel counts")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    options = parser.parse_args()
    chosen = [int(width) for width in (options.channels or "").split(",") if width]
    rows, passed = [], False
    for channels, positions in STAGES:
        if chosen and channels not in chosen:
            continue
        recomputed = LaunchSettings(256, 0, 128, 8, 2) if channels <= MOST_RECOMPUTED else None
        for form, dtype, heat in FORMS:
            problem = Problem.random(channels, positions, dtype=dtype, heat=heat)
            exact = errors(problem, Tiles(WIDE, WIDE, recomputed))
            report = {name: float(f"{value:.3g}") for name, value in exact.items()}
            passed |= max(report.values()) >= LIMITS[dtype]
            rows.append({"channels": channels, "positions": positions, "form": form, **report})
            figures = "  ".join(f"{name} {value:.1e}" for name, value in report.items())
            print(f"C {channels:4} HW {positions:4} {form:6}  {figures}", flush=True)
    names = ("hidden", "sums", "gain", "stored", "recomputed")
    for form, dtype, _ in FORMS:
        worst = {name: max(row[name] for row in rows if row["form"] == form and name in row) for name in names}
        figures = "  ".join(f"{name} {value:.1e}" for name, value in worst.items())
        print(f"worst {form:6} (limit {LIMITS[dtype]:.0e})  {figures}")
    if options.record:
        head = {
            "command": f"scripts/kernel_errors.py --record {options.record}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "triton": version("triton"), "ran_on_gpu": False,
        }  # fmt: skip
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        write_text(options.record, f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')
    return 3 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
