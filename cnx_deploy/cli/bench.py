"""`cnx-deploy bench`, `bench sweep`, `bench plan` and `bench gate`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options
from cnx_deploy.core.errors import CheckFailedError

PEERS = ("torch", "compile", "timm", "timm-whole", "timm-18")


class _Peers(click.ParamType[Any]):
    """`torch`, or several with commas between them."""

    name = ",".join(PEERS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        words = tuple(str(value).split(","))
        for word in words:
            if word not in PEERS:
                self.fail(f"{word!r} is not one of {', '.join(PEERS)}.", param, ctx)
        return words


class _Percent(click.ParamType[float]):
    """`5%` or `5`; 0.05 to the command."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).removesuffix("%")
        if not text.replace(".", "", 1).isdigit() or float(text) >= 100:
            self.fail(f"{value!r} is not a percentage from 0 to 100, such as 5%.", param, ctx)
        return float(text) / 100


def _merged(ctx: click.Context, param: click.Parameter, given: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Peers that were given with commas or one by one, each once."""
    return tuple(dict.fromkeys(word for words in given for word in words))


files = click.argument("files", nargs=-1, type=click.Path(path_type=Path))
batches = click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(1, 8), help="Repeatable [default: 1, 8]."
)
compare = click.option(
    "--compare", type=_Peers(), multiple=True, callback=_merged,
    help="Measure these in turns and print speed-ups over them.",
)  # fmt: skip
csv = click.option("--csv", "as_csv", is_flag=True, help="Print CSV with timm's column names first.")


def timing_options(command: Callable[..., None]) -> Callable[..., None]:
    """How runners are timed, the same for a benchmark and a sweep."""
    for option in (
        click.option("--cuda-graph", is_flag=True, help="Capture engines in a CUDA graph."),
        click.option(
            "--thread-per-image/--whole-batch", default=True, show_default=True,
            help="ONNX Runtime's threads get images of their own, or share each operator.",
        ),
        click.option(
            "--spin/--no-spin", default=True, show_default=True, help="ONNX Runtime's threads wait by spinning."
        ),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: all]."),
        click.option(
            "--duration", "duration_seconds", type=click.FloatRange(min=0.1), default=3.0, show_default=True,
            help="Seconds a row.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command("measure")
@files
@options.export_dir
@options.engines_dir
@batches
@compare
@timing_options
@csv
@options.as_json
def measure(as_csv: bool, as_json: bool, **values: Any) -> None:
    """Time ONNX FILES and engines; by default everything recorded that can run here.

    Exit code 3 when a row is INVALID.
    """
    _measure(values, as_csv=as_csv, as_json=as_json)


@click.command("sweep")
@files
@options.export_dir
@options.engines_dir
@click.option(
    "--max-batch", "sweep_to", type=click.IntRange(min=1), default=256, show_default=True, help="The largest batch."
)
@click.option("--slo-ms", type=click.FloatRange(min=0, min_open=True), help="Find the largest batch within this time.")
@compare
@timing_options
@csv
@options.as_json
def sweep(as_csv: bool, as_json: bool, **values: Any) -> None:
    """Time batches 1, 2, 4, …, and find the smallest that is nearly as good as the best."""
    _measure(values, as_csv=as_csv, as_json=as_json)


@click.command("plan")
@files
@options.export_dir
@options.engines_dir
@batches
@compare
@options.as_json
def plan(as_json: bool, **values: Any) -> None:
    """Print what would be measured and the bounds of GPUs; measure nothing."""
    from cnx_deploy.bench.comparison import BenchSpec, plan_benchmark
    from cnx_deploy.bench.report import plan_lines

    planned = plan_benchmark(BenchSpec(**values), options.note)
    if as_json:
        options.echo_json(planned.to_document())
    else:
        options.echo("\n".join(plan_lines(planned)))


@click.command("gate")
@click.argument("baseline", type=click.Path(path_type=Path))
@click.argument("current", type=click.Path(path_type=Path))
@click.option("--max-regress", type=_Percent(), default="5%", show_default=True, help="How much slower is allowed.")
@options.as_json
def gate(baseline: Path, current: Path, max_regress: float, as_json: bool) -> None:
    """Judge the document CURRENT that `bench --json` printed against BASELINE.

    Exit code 3 when a file got slower than is allowed, or nothing can be judged.
    """
    from cnx_deploy.bench.gate import failures, judge_files
    from cnx_deploy.bench.report import gate_lines

    verdicts = judge_files(baseline, current, max_regress)
    if as_json:
        options.echo_json({"gate": [asdict(verdict) for verdict in verdicts]})
    else:
        options.echo("\n".join(gate_lines(verdicts)))
    _fail(failures(verdicts), as_json=as_json)


bench = options.DefaultGroup("bench", measure, (sweep, plan, gate))


def _measure(values: dict[str, Any], *, as_csv: bool, as_json: bool) -> None:
    options.refuse_engines_without_gpu(values["files"])
    from cnx_deploy.bench.comparison import BenchSpec, run_benchmark
    from cnx_deploy.bench.report import as_csv as csv_of

    spec = BenchSpec(**values, omp_threads=os.environ.get("OMP_NUM_THREADS"))
    with options.reporter("Measuring") as progress:
        record = run_benchmark(spec, options.note, progress)
    if as_json:
        options.echo_json(record.to_document())
    else:
        options.echo(csv_of(record) if as_csv else str(record))
    _fail(record.failures, as_json=as_json)


def _fail(failures: Sequence[str], *, as_json: bool) -> None:
    if failures:
        options.fail(CheckFailedError(" ".join(failures)), as_json=as_json)
