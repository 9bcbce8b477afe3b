"""Measure what the pipeline itself costs: seconds and peak memory of export and builds, variant by variant.

usage: measure_cost.py [VARIANT ...] [--record FILE]      (default: all eight; two precisions, engines for five targets)

Each command is a process of its own, in a temporary folder that is emptied after each variant.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cnx_deploy.core.system import cpu_count, cpu_name, tool_versions
from cnx_deploy.core.variants import VARIANTS

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")


def main() -> int:
    """Print one line a variant; with --record, write them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    help_seconds = min(run("--help", folder=Path.cwd())[0] for _ in range(5))
    print(f"cnx-deploy --help: {help_seconds:.2f} s")
    print(f"{'variant':8} {'export s':>9} {'MiB':>7} {'build s':>9} {'MiB':>7}   two precisions; engines for {TARGETS}")
    rows = []
    for variant in options.variants:
        row = measured(variant)
        print(
            f"{variant:8} {row['export_seconds']:>9.1f} {row['export_peak_mib']:>7.0f} "
            f"{row['build_seconds']:>9.1f} {row['build_peak_mib']:>7.0f}",
            flush=True,
        )
        rows.append(row)
    if options.record:
        document = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["scripts/measure_cost.py", *sys.argv[1:]]),
            "machine": f"{cpu_name()}, {cpu_count()} processors",
            "tools": tool_versions(),
            "targets": TARGETS,
            "help_seconds": round(help_seconds, 3),
            "rows": rows,
        }
        options.record.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(variant: str) -> dict[str, Any]:
    """Export and build one variant."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_seconds, export_mib = run("export", "--variant", variant, folder=folder)
        targets = [word for target in TARGETS for word in ("--target", target)]
        build_seconds, build_mib = run("build-trt", *targets, folder=folder)

        def megabytes(pattern: str) -> float:
            return round(sum(path.stat().st_size for path in folder.glob(pattern)) / 1e6, 1)

        return {
            "variant": variant,
            "parameters": VARIANTS[variant].parameter_count,
            "export_seconds": round(export_seconds, 2),
            "export_peak_mib": round(export_mib),
            "build_seconds": round(build_seconds, 2),
            "build_peak_mib": round(build_mib),
            "onnx_megabytes": megabytes("export/*fp16.onnx*"),
            "engine_megabytes": megabytes("engines/*sm89.engine"),
        }


def run(*words: str, folder: Path) -> tuple[float, float]:
    """Seconds and peak resident MiB of one `cnx-deploy` command. Raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", "cnx_deploy", *words]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
