"""`cnx-deploy bench`."""

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnx_deploy.cli import options
from cnx_deploy.errors import CheckFailedError

if TYPE_CHECKING:
    from cnx_deploy.comparison import Benchmark


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@options.export_dir
@options.engines_dir
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(1, 8), show_default=True)
@click.option("--duration", type=click.FloatRange(min=0.1), default=3.0, show_default=True, help="Seconds a row.")
@click.option(
    "--compare", type=click.Choice(["torch"]), multiple=True, help="Measure this in turns and print speed-ups over it."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: all].")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV with timm's column names first.")
@options.as_json
def bench(as_csv: bool, as_json: bool, **arguments: Any) -> None:
    """Time ONNX FILES and engines; by default everything recorded that can run here. Exit code 3 on INVALID rows."""
    options.refuse_engines_without_gpu(arguments["files"])
    from cnx_deploy.comparison import BenchRequest, bench_artifacts
    from cnx_deploy.pipeline import selected

    request = BenchRequest(**arguments)
    artifacts = list(selected(request.files, request.export_dir, request.engines_dir, options.note))
    with options.reporter("Measuring") as progress:
        result = bench_artifacts(artifacts, request, progress)
    if as_json:
        options.echo_json(_document(result, request.duration))
    elif as_csv:
        _write_csv(result)
    else:
        _show(result, request.duration)
    invalid = [row.name for row in result.rows if row.status == "INVALID"]
    if invalid:
        message = f"{', '.join(invalid)} gave wrong logits while timed; `cnx-deploy verify` says how wrong."
        options.fail(CheckFailedError(message), as_json=as_json)


def _document(result: "Benchmark", duration: float) -> dict[str, Any]:
    from dataclasses import asdict

    from cnx_deploy.environment import cpu_count, cpu_name, find_gpus, tool_versions

    return {
        "schema_version": 1,
        "environment": {
            "tools": tool_versions(),
            "cpu": cpu_name(),
            "processors": cpu_count(),
            "gpus": [asdict(gpu) for gpu in find_gpus()],
        },
        "clock": "time.perf_counter_ns around blocking calls, transfers included",
        "duration_seconds": duration,
        "models": result.models,
        "rows": [row.to_dict() for row in result.rows],
        "not_run": [asdict(row) for row in result.not_run],
    }


def _show(result: "Benchmark", duration: float) -> None:
    from cnx_deploy.environment import cpu_count, cpu_name, tool_versions

    tools = tool_versions()
    click.echo(
        f"cnx-deploy {tools['cnx-deploy']}, torch {tools.get('torch')}, {cpu_name()}, {cpu_count()} processors, "
        f"{duration:g} s a row, host clock, median"
    )
    click.echo(
        f"{'artifact':34} {'batch':>5} {'images/s':>9} {'median ms':>10} {'p95 ms':>8} {'start s':>8} {'MiB':>6} "
        f"{'rel. L2':>8} {'speed-up (95 %)':>20}  status"
    )
    for row in result.rows:
        interval = row.speedup_interval
        speedup = f"{row.speedup:.2f} ({interval[0]:.2f}-{interval[1]:.2f})" if row.speedup and interval else ""
        numbers = f"{row.images_per_second:>9.1f} {row.median_ms:>10.2f} {_cell(row.p95_ms, 8, 2)}"
        start = f"{row.create_seconds:>8.2f} {_cell(row.peak_memory_mib, 6, 0)} {_cell(row.relative_l2, 8, 1, 'e')}"
        widened = "" if row.arithmetic in (row.precision, "float32") else ", computed in FP32"
        click.echo(f"{row.name:34} {row.batch:>5} {numbers} {start} {speedup:>20}  {row.status}{widened}")
    for missing in result.not_run:
        figures = (
            f"{missing.kernels} kernels, {missing.megabytes_per_image:.1f} MB an image at batch {missing.batch}; "
            if missing.megabytes_per_image is not None
            else ""
        )
        click.echo(f"{missing.name:34} {figures}latency: not run ({missing.reason})")


def _write_csv(result: "Benchmark") -> None:
    """Columns of timm's results/benchmark-infer-*.csv, then ours."""
    names = (
        "model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "param_count",
        "infer_gmacs", "backend", "precision", "p95_ms", "calls", "status",
    )  # fmt: skip
    writer = csv.writer(sys.stdout)
    writer.writerow(names)
    for row in result.rows:
        facts = result.models.get(row.name) or next(iter(result.models.values()))
        writer.writerow(
            (
                row.name, facts["image_size"], f"{row.images_per_second:.2f}", f"{row.median_ms:.3f}", row.batch,
                f"{facts['parameters'] / 1e6:.2f}", facts["gmacs"], row.backend, row.precision, row.p95_ms, row.calls,
                row.status,
            )
        )  # fmt: skip


def _cell(value: float | None, width: int, digits: int, kind: str = "f") -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}{kind}}"
