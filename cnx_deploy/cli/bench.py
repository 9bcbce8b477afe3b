"""`cnx-deploy bench`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cnx_deploy.cli import options
from cnx_deploy.core.errors import CheckFailedError

if TYPE_CHECKING:
    from cnx_deploy.bench.comparison import BenchRequest
    from cnx_deploy.bench.run import BenchReport

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


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@options.export_dir
@options.engines_dir
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Repeatable [default: 1 and 8].")
@click.option("--sweep", is_flag=True, help="Batches 1, 2, 4, … and the smallest that is nearly as good as the best.")
@click.option("--max-batch", type=click.IntRange(min=1), default=256, show_default=True, help="Where --sweep ends.")
@click.option("--slo-ms", type=click.FloatRange(min=0, min_open=True), help="Find the largest batch within this time.")
@click.option("--duration", type=click.FloatRange(min=0.1), default=3.0, show_default=True, help="Seconds a row.")
@click.option("--compare", type=_Peers(), multiple=True, help="Measure these in turns and print speed-ups over them.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: all].")
@click.option("--spin/--no-spin", default=True, show_default=True, help="ONNX Runtime's threads wait by spinning.")
@click.option(
    "--thread-per-image/--whole-batch", default=True, show_default=True,
    help="ONNX Runtime's threads get images of their own, or share each operator.",
)  # fmt: skip
@click.option("--cuda-graph", is_flag=True, help="Capture engines in a CUDA graph.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the images and of the intervals.")
@click.option("--gate", type=click.Path(path_type=Path), help="An earlier --json document; slower is exit code 3.")
@click.option("--max-regress", type=_Percent(), default="5%", show_default=True, help="What --gate allows.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the bounds of GPUs; measure nothing.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV with timm's column names first.")
@options.as_json
def bench(
    slo_ms: float | None, gate: Path | None, max_regress: float, dry_run: bool, as_csv: bool, as_json: bool,
    **arguments: Any,
) -> None:  # fmt: skip
    """Time ONNX FILES and engines; by default everything recorded that can run here.

    Exit code 3 when a row is INVALID or slower than --gate allows.
    """
    _check_used(sweep=arguments["sweep"], gate=gate)
    if not dry_run:
        options.refuse_engines_without_gpu(arguments["files"])
    request = _request(**arguments)
    if dry_run:
        _show_plan(request, as_json=as_json)
        return
    from cnx_deploy.bench.report import as_csv as csv_of
    from cnx_deploy.bench.run import run_bench
    from cnx_deploy.core.artifacts import select_artifacts

    artifacts = list(select_artifacts(request.files, request.export_dir, request.engines_dir, options.note))
    with options.reporter("Measuring") as progress:
        report = run_bench(
            artifacts, request, slo_ms=slo_ms, gate=gate, max_regress=max_regress,
            omp_threads=os.environ.get("OMP_NUM_THREADS"), progress=progress,
        )  # fmt: skip
    _show(report, csv_of(report.benchmark) if as_csv else "\n".join(report.lines()), as_json=as_json)


def _check_used(*, sweep: bool, gate: Path | None) -> None:
    """Refuse an option that was given where nothing reads it."""
    source = click.get_current_context().get_parameter_source
    for name, reader, is_read in (("max_batch", "--sweep", sweep), ("max_regress", "--gate", gate is not None)):
        if source(name) is ParameterSource.COMMANDLINE and not is_read:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is read with {reader}, which was not given: add that, or leave it out.")


def _show(report: "BenchReport", text: str, *, as_json: bool) -> None:
    for warning in report.warnings:
        options.note(f"Warning: {warning}.")
    if as_json:
        options.echo_json(report.to_dict())
    else:
        options.echo(text)
    if report.failures:
        options.fail(CheckFailedError(" ".join(report.failures)), as_json=as_json)


def _request(batches: tuple[int, ...], compare: tuple[tuple[str, ...], ...], **others: Any) -> "BenchRequest":
    if batches and others["sweep"]:
        raise click.UsageError("--sweep chooses the batches: leave out --batch, or use --max-batch.")
    from cnx_deploy.bench.comparison import BenchRequest

    words = dict.fromkeys(word for given in compare for word in given)
    return BenchRequest(batches=batches or (1, 8), compare=tuple(words), **others)


def _show_plan(request: "BenchRequest", *, as_json: bool) -> None:
    from cnx_deploy.bench.conditions import conditions_now
    from cnx_deploy.bench.plan import plan_of
    from cnx_deploy.bench.report import head_lines, plan_document, plan_lines
    from cnx_deploy.core.artifacts import find_artifacts, select_artifacts
    from cnx_deploy.core.manifest import Artifact

    # A plan needs the manifests only, and a fresh clone has no more.
    recorded: list[Artifact] = [
        *find_artifacts(request.export_dir, "onnx"),
        *find_artifacts(request.engines_dir, "engine"),
    ]
    if request.files or not recorded:
        recorded = list(select_artifacts(request.files, request.export_dir, request.engines_dir, options.note))
    conditions = conditions_now(threads=request.threads, duration_seconds=request.duration, seed=request.seed)
    plan = plan_of(recorded, request)
    if as_json:
        options.echo_json(plan_document(plan, conditions))
    else:
        options.echo("\n".join((*head_lines(conditions, plan.networks), *plan_lines(plan))))
