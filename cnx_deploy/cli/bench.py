"""`cnx-deploy bench`, `bench sweep`, `bench plan` and `bench gate`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options
from cnx_deploy.core.errors import CheckFailedError
from cnx_deploy.runners.registry import runner_names

PEERS = (
    "torch", "compile", "torch-half", "compile-half", "timm", "timm-half", "timm-whole", "timm-openvino",
    "timm-openvino-whole", "timm-18",
)  # fmt: skip


def _peers(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> tuple[str, ...]:
    """Peers that were given with commas or one by one, each once."""
    words = tuple(dict.fromkeys(word for text in given for word in text.split(",")))
    if unknown := [word for word in words if word not in PEERS]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PEERS)}.")
    return words


def _share(ctx: click.Context, param: click.Parameter, given: str) -> float:
    """`5%` or `5`; 0.05 to the command."""
    text = given.removesuffix("%")
    if not text.replace(".", "", 1).isdigit() or float(text) >= 100:
        raise click.BadParameter(f"{given!r} is not a percentage from 0 to 100, such as 5%.")
    return float(text) / 100


batches = click.option(
    "--batch", type=click.IntRange(min=1), multiple=True, default=(1, 8), help="Repeatable [default: 1, 8]."
)
compare = click.option(
    "--compare", metavar=",".join(PEERS), multiple=True, callback=_peers,
    help="Measure these in turns and print speed-ups over them.",
)  # fmt: skip


backends = click.option(
    "--backend", "backends", multiple=True,
    type=click.Choice([name for name in runner_names() if name != "tensorrt"]),
    help="What runs ONNX files, each a row (repeat for several) [default: ONNX Runtime].",
)  # fmt: skip


timing_options = options.several(
    click.option(
        "--duration", "duration_seconds", type=click.FloatRange(min=0.1), default=3.0, show_default=True,
        help="Seconds a row.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: all]."),
    click.option(
        "--spin/--no-spin", default=True, show_default=True, help="ONNX Runtime's threads wait by spinning."
    ),
    click.option(
        "--thread-per-image/--whole-batch", default=True, show_default=True,
        help="Threads of ONNX Runtime and OpenVINO get images of their own, or share each operator.",
    ),
    click.option("--cuda-graph", is_flag=True, help="Capture engines in a CUDA graph."),
    options.allow_engine_code,
    click.option("--csv", "as_csv", is_flag=True, help="Print CSV with timm's column names first."),
    options.device,
    options.as_json,
)  # fmt: skip
"""How runners are timed and what is printed, the same for a benchmark and a sweep."""


@click.command("measure")
@options.files
@options.export_dir
@options.engines_dir
@batches
@compare
@backends
@timing_options
def measure(as_csv: bool, as_json: bool, **values: Any) -> None:
    """Time ONNX FILES and engines; by default everything recorded that can run here.

    Exit code 3 when a row is INVALID.
    """
    _measure(values, as_csv=as_csv, as_json=as_json)


@click.command("sweep")
@options.files
@options.export_dir
@options.engines_dir
@click.option(
    "--max-batch", "sweep_to", type=click.IntRange(min=1), default=256, show_default=True, help="The largest batch."
)
@click.option("--slo-ms", type=click.FloatRange(min=0, min_open=True), help="Find the largest batch within this time.")
@compare
@backends
@timing_options
def sweep(as_csv: bool, as_json: bool, **values: Any) -> None:
    """Time batches 1, 2, 4, …, and find the smallest that is nearly as good as the best."""
    _measure(values, as_csv=as_csv, as_json=as_json)


@click.command("plan")
@options.files
@options.export_dir
@options.engines_dir
@batches
@compare
@backends
@options.as_json
def plan(batch: tuple[int, ...], as_json: bool, **values: Any) -> None:
    """Print what would be measured and the bounds of GPUs; measure nothing."""
    from cnx_deploy.bench.comparison import BenchSpec, plan_benchmark
    from cnx_deploy.bench.report import plan_lines

    planned = plan_benchmark(BenchSpec(batches=batch, **values), options.note)
    if as_json:
        options.echo_json(planned.to_document())
    else:
        options.echo("\n".join(plan_lines(planned)))


@click.command("gate")
@click.argument("baseline", type=options.PATH)
@click.argument("current", type=options.PATH)
@click.option(
    "--max-regress", metavar="PERCENT", callback=_share, default="5%", show_default=True,
    help="How much slower is allowed.",
)  # fmt: skip
@options.as_json
def gate(baseline: Path, current: Path, max_regress: float, as_json: bool) -> None:
    """Judge the document CURRENT that `bench --json` printed against BASELINE.

    Exit code 3 when a file got slower than is allowed, or nothing can be judged.
    """
    from cnx_deploy.bench.gate import failures, judge_against
    from cnx_deploy.bench.record import read_benchmark

    verdicts = judge_against(read_benchmark(baseline), read_benchmark(current), max_regress)
    if as_json:
        options.echo_json({"gate": [asdict(verdict) for verdict in verdicts]})
    else:
        options.echo("\n".join(map(str, verdicts)))
    _fail(failures(verdicts), as_json=as_json)


bench = options.DefaultGroup("bench", measure, (sweep, plan, gate))


def _measure(values: dict[str, Any], *, as_csv: bool, as_json: bool) -> None:
    from cnx_deploy import benchmark
    from cnx_deploy.bench.report import as_csv as csv_of

    files = values.pop("files")
    with options.reporter("Measuring") as progress:
        record = benchmark(files, note=options.note, progress=progress, **values)
    if as_json:
        options.echo_json(record.to_document())
    else:
        options.echo(csv_of(record) if as_csv else str(record))
    _fail(record.failures, as_json=as_json)


def _fail(failures: Sequence[str], *, as_json: bool) -> None:
    if failures:
        options.fail(CheckFailedError(" ".join(failures)), as_json=as_json)
