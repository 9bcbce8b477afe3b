"""The document of `cnx-deploy bench --json` as a page needs it."""

from dataclasses import dataclass
from pathlib import Path

from cnx_deploy.bench.gate import check_kind
from cnx_deploy.core.errors import InputError
from cnx_deploy.report.html.fields import Fields, Source, read_document

__all__ = ["BenchNetwork", "BenchRow", "Benchmark", "NotTimed", "Ratio", "read_benchmark"]

COMMAND = "cnx-deploy bench"


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as a peer, with its 95 % interval."""

    peer: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One candidate at one batch. `ratio` is to the baseline, None for the baseline itself and where it did not run.

    A percentile is None where the sample is too small for it, `relative_l2` where a logit is not finite. `notes` are
    the numbers of its remarks among those of its network.
    """

    name: str
    network: str
    batch: int
    is_file: bool
    backend: str
    device: str
    images_per_second: float
    median_ms: float
    p95_ms: float | None
    p99_ms: float | None
    cv_percent: float
    relative_l2: float | None
    ratios: tuple[Ratio, ...]
    ratio: Ratio | None
    status: str
    remarks: tuple[str, ...]
    notes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NotTimed:
    """Something that was not timed, and why."""

    name: str
    reason: str


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
    not_timed: tuple[NotTimed, ...]
    gate: tuple[str, ...]

    @property
    def rows(self) -> tuple[BenchRow, ...]:
        """The rows of all networks."""
        return tuple(row for network in self.networks for row in network.rows)


def read_benchmark(path: Path) -> Benchmark:
    """Read a benchmark's document; InputError for anything else, a plan included."""
    source, fields = read_document(path, COMMAND)
    try:
        return _benchmark(source, fields)
    except ValueError as error:
        raise InputError(f"{path} is no benchmark: {error}. Give what `{COMMAND} --json` printed.") from error


def _benchmark(source: Source, fields: Fields) -> Benchmark:
    check_kind(fields.values)
    environment, rows = fields.child("environment"), fields.children("rows")
    baseline = _baseline(rows)
    networks = fields.child("networks")
    return Benchmark(
        source=source,
        date=environment.text("date"),
        conditions=tuple(_conditions(environment)),
        tools=environment.text_items("tools"),
        warnings=fields.texts("warnings"),
        baseline=baseline,
        networks=tuple(_network(name, networks.child(name), rows, baseline) for name in networks.values),
        not_timed=tuple(NotTimed(row.text("name"), row.text("reason")) for row in fields.children("not_run")),
        gate=tuple(_verdict(verdict) for verdict in fields.children("gate")),
    )


def _baseline(rows: tuple[Fields, ...]) -> str:
    """The first row that others have a ratio to, as the terminal's table has it."""
    peers = {ratio.text("peer") for row in rows for ratio in row.children("ratios")}
    return next((row.text("name") for row in rows if row.text("name") in peers), "")


def _network(name: str, network: Fields, rows: tuple[Fields, ...], baseline: str) -> BenchNetwork:
    weights, files = network.child("weights"), set(network.child("files").values)
    own = [row for row in rows if row.text("network") == name]
    remarks = tuple(dict.fromkeys(remark for row in own for remark in _remarks(row)))
    return BenchNetwork(
        name=name,
        variant=network.text("variant"),
        image_size=network.integer("image_size"),
        weights_origin=weights.text("origin"),
        weights_sha256=weights.text("sha256"),
        rows=tuple(_row(row, files, baseline, remarks) for row in own),
        remarks=remarks,
    )


def _row(row: Fields, files: set[str], baseline: str, known: tuple[str, ...]) -> BenchRow:
    latency, correctness = row.child("latency"), row.maybe_child("correctness")
    ratios = tuple(
        Ratio(each.text("peer"), *(each.number(key) for key in ("ratio", "low", "high")))
        for each in row.children("ratios")
    )
    return BenchRow(
        name=row.text("name"),
        network=row.text("network"),
        batch=row.integer("batch"),
        is_file=row.text("name") in files,
        backend=f"{row.text('backend')} {row.text('version')}",
        device=row.text("device"),
        images_per_second=row.number("images_per_second"),
        median_ms=latency.number("median_ms"),
        p95_ms=latency.maybe_number("p95_ms"),
        p99_ms=latency.maybe_number("p99_ms"),
        cv_percent=latency.number("cv_percent"),
        relative_l2=correctness.maybe_number("relative_l2") if correctness else None,
        ratios=ratios,
        ratio=next((ratio for ratio in ratios if ratio.peer == baseline), None),
        status=row.text("status"),
        remarks=_remarks(row),
        notes=tuple(known.index(remark) + 1 for remark in _remarks(row)),
    )


def _remarks(row: Fields) -> tuple[str, ...]:
    """Its own, and what it was really computed in where that differs: ONNX Runtime widens FP16 on a CPU."""
    precision, arithmetic = row.text("precision"), row.text("arithmetic")
    widened = () if arithmetic in (precision, "float32") else (f"its {precision} was computed in {arithmetic}",)
    return (*row.texts("remarks"), *widened)


def _verdict(verdict: Fields) -> str:
    """One file at one batch against the baseline document."""
    head = f"{verdict.text('name')} at batch {verdict.integer('batch')}: {verdict.text('verdict')}"
    change = verdict.maybe_number("change")
    if change is None:
        return f"{head}, {verdict.text('reason')}"
    figures = f"{verdict.number('before'):.4g} to {verdict.number('now'):.4g} ({change - 1:+.1%})"
    return f"{head}, {verdict.text('measure')} {figures}"


def _conditions(environment: Fields) -> list[tuple[str, str]]:
    """What every latency needs beside it."""
    isa = " ".join(environment.texts("isa"))
    load = environment.maybe_number("load_average")
    gpus = ", ".join(gpu.text("name") for gpu in environment.children("gpus"))
    threads = f"threads: {environment.integer('threads')}, processors: {environment.integer('processors')}"
    return [
        ("Processor", f"{environment.text('cpu')}{f' ({isa})' if isa else ''}, {threads}"),
        ("GPU", gpus or "none"),
        ("System", environment.text("system")),
        (
            "Measured",
            f"{environment.number('duration_seconds'):g} s a row, images of seed {environment.integer('seed')}",
        ),
        ("Load before", "unknown" if load is None else f"{load:.2f}"),
    ]
