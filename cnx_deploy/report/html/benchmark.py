"""The record of `cnx-deploy bench --json` as the page shows it."""

from dataclasses import dataclass
from pathlib import Path

from cnx_deploy.bench.record import COMMAND, BenchmarkRecord, Conditions, NotRun, Ratio, Timing
from cnx_deploy.core.errors import InputError
from cnx_deploy.report.html.fields import Source, read_document

__all__ = ["BenchNetwork", "BenchRow", "Benchmark", "read_benchmark"]


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One contender at one batch. `ratio` is to the baseline, None for the baseline itself and where it did not run.

    A percentile is None where the sample is too small for it, `relative_l2` where a logit is not finite. `notes` are
    the numbers of its remarks among those of its network.
    """

    name: str
    batch: int
    is_file: bool
    images_per_second: float
    median_ms: float
    p95_ms: float | None
    p99_ms: float | None
    cv_percent: float
    relative_l2: float | None
    ratio: Ratio | None
    status: str
    notes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BenchNetwork:
    """One network with its rows and all their different remarks."""

    name: str
    variant: str
    image_size: int
    weights_origin: str
    weights_sha256: str
    rows: tuple[BenchRow, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A run. `baseline` is the peer that ratios are to, "" without one; `conditions` are pairs for people."""

    source: Source
    date: str
    conditions: tuple[tuple[str, str], ...]
    tools: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    baseline: str
    networks: tuple[BenchNetwork, ...]
    not_run: tuple[NotRun, ...]

    @property
    def rows(self) -> tuple[BenchRow, ...]:
        """The rows of all networks."""
        return tuple(row for network in self.networks for row in network.rows)


def read_benchmark(path: Path) -> Benchmark:
    """Read a benchmark's document; InputError for anything else, a plan included."""
    source, fields = read_document(path, COMMAND)
    try:
        record = BenchmarkRecord.from_document(fields.values)
    except ValueError as error:
        raise InputError(f"{path} is no benchmark: {error}. Give what `{COMMAND} --json` printed.") from error
    return Benchmark(
        source=source,
        date=record.environment.date,
        conditions=_conditions(record.environment),
        tools=tuple(record.environment.tools.items()),
        warnings=record.warnings,
        baseline=record.baseline,
        networks=tuple(_network(name, record) for name in record.networks),
        not_run=record.not_run,
    )


def _network(name: str, record: BenchmarkRecord) -> BenchNetwork:
    facts, rows = record.networks[name], record.rows_of(name)
    remarks = tuple(dict.fromkeys(remark for row in rows for remark in _remarks(row)))
    return BenchNetwork(
        name=name,
        variant=facts.variant,
        image_size=facts.image_size,
        weights_origin=facts.weights.origin,
        weights_sha256=facts.weights.sha256,
        rows=tuple(_row(row, record, remarks) for row in rows),
        remarks=remarks,
    )


def _row(row: Timing, record: BenchmarkRecord, remarks: tuple[str, ...]) -> BenchRow:
    return BenchRow(
        name=row.name,
        batch=row.batch,
        is_file=record.is_file(row),
        images_per_second=row.images_per_second,
        median_ms=row.latency.median_ms,
        p95_ms=row.latency.p95_ms,
        p99_ms=row.latency.p99_ms,
        cv_percent=row.latency.cv_percent,
        relative_l2=row.correctness.relative_l2 if row.correctness else None,
        ratio=row.ratio_to(record.baseline),
        status=row.status,
        notes=tuple(remarks.index(remark) + 1 for remark in _remarks(row)),
    )


def _remarks(row: Timing) -> tuple[str, ...]:
    """Its own, and what it was really computed in where that differs: ONNX Runtime widens FP16 on a CPU."""
    widened = (f"its {row.precision} was computed in {row.arithmetic}",) if row.is_widened else ()
    return (*row.remarks, *widened)


def _conditions(environment: Conditions) -> tuple[tuple[str, str], ...]:
    """The machine and settings that every latency needs beside it."""
    isa, load = " ".join(environment.isa), environment.load_average
    threads = f"threads: {environment.threads}, processors: {environment.processors}"
    return (
        ("Processor", f"{environment.cpu}{f' ({isa})' if isa else ''}, {threads}"),
        ("GPU", ", ".join(gpu.name for gpu in environment.gpus) or "none"),
        ("System", environment.system),
        ("Measured", f"{environment.duration_seconds:g} s a row, images of seed {environment.seed}"),
        ("Load before", "unknown" if load is None else f"{load:.2f}"),
    )
