"""A benchmark in words: the table for a terminal, the JSON document, and CSV that lies beside timm's."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from cnx_deploy.bench.comparison import Benchmark, NotRun
from cnx_deploy.bench.conditions import Conditions
from cnx_deploy.bench.gate import SCHEMA_VERSION, Verdict
from cnx_deploy.bench.plan import NOT_MEASURED, Plan, share_of_bound
from cnx_deploy.bench.statistics import PERCENTILES
from cnx_deploy.bench.sweep import Knee
from cnx_deploy.bench.timing import Timing

__all__ = [
    "as_csv",
    "baseline_of",
    "document",
    "gate_lines",
    "head_lines",
    "plan_document",
    "plan_lines",
    "table_lines",
]

CLOCK = "time.perf_counter_ns around blocking calls, images on the runner's device"
CSV_COLUMNS = (
    "model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "param_count",
    "infer_gmacs", "infer_macts", "artifact", "backend", "precision", "images_per_second", "median_ms", "p90_ms",
    "p95_ms", "p99_ms", "min_ms", "max_ms", "cv_percent", "calls", "peer", "ratio", "status",
)  # fmt: skip
"""timm's columns of results/benchmark-infer-*.csv, from means as there; then ours, from medians."""


def document(
    result: Benchmark,
    conditions: Conditions,
    *,
    knees: Sequence[Knee] = (),
    warnings: Sequence[str] = (),
    gate: Sequence[Verdict] = (),
) -> dict[str, Any]:
    """Everything about a run, as `--json` prints it and `--gate` reads it."""
    shares = {id(row): share_of_bound(row, result.networks[row.network]) for row in result.rows}
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": _environment(conditions),
        "clock": CLOCK,
        "warnings": list(warnings),
        "networks": result.networks,
        "rows": [{**row.to_dict(), "roofline": shares[id(row)]} for row in result.rows],
        "not_run": [asdict(row) for row in result.not_run],
        "sweep": [asdict(knee) for knee in knees],
        "gate": [asdict(verdict) for verdict in gate],
    }


def plan_document(plan: Plan, conditions: Conditions) -> dict[str, Any]:
    """A plan as `--dry-run --json` prints it: no row has a figure."""
    return {
        "schema_version": SCHEMA_VERSION,
        "dry_run": NOT_MEASURED,
        "environment": _environment(conditions),
        "networks": plan.networks,
        "planned": [asdict(row) for row in plan.rows],
        "roofline": list(plan.roofline),
    }


def head_lines(conditions: Conditions, networks: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What was measured and on what, a few lines."""
    tools = conditions.tools
    commit = f" (commit {conditions.commit})" if conditions.commit else ""
    runtimes = ", ".join(f"{name} {tools[name]}" for name in tools if name.startswith(("torch", "onnxrun", "tensorrt")))
    yield f"cnx-deploy {tools['cnx-deploy']}{commit}, {runtimes}, {conditions.system}, {conditions.date}"
    yield (
        f"{conditions.cpu} ({' '.join(conditions.isa)}), {conditions.processors} processors, {conditions.threads} "
        f"threads; {conditions.duration_seconds:g} s a row, host clock, seed {conditions.seed}"
    )
    for gpu in conditions.gpus:
        clocks = f"SM clock {gpu.sm_clock} of {gpu.max_sm_clock}, power cap {gpu.power_limit}"
        yield f"{gpu.name}, driver {gpu.driver}, {clocks}, ECC {gpu.ecc}, MIG {gpu.mig}"
    for name, facts in networks.items():
        weights = f"{facts['weights']['origin']} weights {facts['weights']['sha256'][:12]}"
        counts = f"{facts['gmacs']:.3g} GMAC, {facts['parameters'] / 1e6:.2f} M parameters"
        yield f"{name}: {facts['variant']}, {facts['image_size']} px {facts['input']}, {weights}, {counts}"
        for file, found in facts["files"].items():
            islands = found["fp32_layers"] or found["tensors_by_type"] or {}
            types = ", ".join(f"{count} {kind}" for kind, count in islands.items())
            label = "in FP32: " if found["fp32_layers"] else "tensors: "
            yield f"  {file} {found['sha256'][:12]}, {found['precision']}" + (f", {label}{types}" if types else "")


def table_lines(result: Benchmark, knees: Sequence[Knee] = (), slo_ms: float | None = None) -> Iterator[str]:
    """One line a row, its remarks below it; then what was not run and what the sweep shows."""
    peer = baseline_of(result.rows)
    ratio = f"x {peer} (95 %)" if peer else ""
    yield (
        f"{'artifact':30} {'batch':>5} {'images/s':>9} {'median ms':>10} {'p95 ms':>8} {'p99 ms':>8} {'CV %':>5} "
        f"{'start s':>8} {'MiB':>6} {'rel. L2':>8} {ratio:>34}  status"
    )
    for row in result.rows:
        yield from _row_lines(row, peer, result.networks[row.network])
    for missing in result.not_run:
        yield _not_run_line(missing)
    for knee in knees:
        yield _knee_line(knee, slo_ms)


def baseline_of(rows: Sequence[Timing]) -> str:
    """The peer whose ratios tables show: the first row that others have a ratio to; empty where there is none."""
    peers = {ratio.peer for row in rows for ratio in row.ratios}
    return next((row.name for row in rows if row.name in peers), "")


def gate_lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """One line a verdict."""
    for verdict in verdicts:
        figures = verdict.reason
        if verdict.change is not None:
            figures = f"{verdict.measure} {verdict.before:.4g} -> {verdict.now:.4g} ({verdict.change - 1:+.1%})"
        yield f"gate: {verdict.name} batch {verdict.batch}: {verdict.verdict}, {figures}"


def plan_lines(plan: Plan) -> Iterator[str]:
    """The rows that would be measured, then the bounds of GPUs; nothing measured in either."""
    yield f"plan, {NOT_MEASURED}:"
    for row in plan.rows:
        missing = f"; would not run here: {row.missing}" if row.missing else ""
        yield f"  {row.name:30} batch {row.batch:>4}  {row.status}{missing}"
    yield f"roofline, bounds from data sheets, {NOT_MEASURED}:"
    for bound in plan.roofline:
        figure = f"at most {bound['bound_images_per_second']:>9.0f} images/s by {bound['bound_by']}"
        where = f"{bound['variant']} {bound['image_size']} px {bound['precision']} batch {bound['batch']}"
        yield f"  {bound['device']:32} {where:32} {figure}{', L2 may pass it' if bound['stage_1_fits_l2'] else ''}"


def as_csv(result: Benchmark) -> str:
    """One line a row under `CSV_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for row in result.rows:
        facts, latency, ratio = result.networks[row.network], row.latency, row.ratio_to(baseline_of(result.rows))
        writer.writerow(
            (
                f"convnextv2_{facts['variant']}", facts["image_size"], f"{row.batch * 1000 / latency.mean_ms:.2f}",
                f"{latency.mean_ms:.3f}", row.batch, f"{facts['parameters'] / 1e6:.2f}", f"{facts['gmacs']:.2f}",
                f"{facts['macts']:.2f}", row.name, row.backend, row.precision, f"{row.images_per_second:.2f}",
                f"{latency.median_ms:.3f}", latency.p90_ms, latency.p95_ms, latency.p99_ms, f"{latency.min_ms:.3f}",
                f"{latency.max_ms:.3f}", f"{latency.cv_percent:.1f}", latency.calls, ratio and ratio.peer,
                ratio and f"{ratio.ratio:.3f}", row.status,
            )
        )  # fmt: skip
    return text.getvalue()


def _environment(conditions: Conditions) -> dict[str, Any]:
    """The conditions, with what has to be equal for absolute speeds to be compared as `machine`."""
    return {**asdict(conditions), "tools": dict(conditions.tools), "machine": conditions.machine}


def _row_lines(row: Timing, peer: str, network: dict[str, Any]) -> Iterator[str]:
    latency, ratio = row.latency, row.ratio_to(peer)
    speed = f"{ratio.ratio:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else ""
    tails = f"{_tail(latency.p95_ms, 95)} {_tail(latency.p99_ms, 99)} {latency.cv_percent:>5.1f}"
    error = row.correctness.relative_l2 if row.correctness else None
    start = f"{row.create_seconds:>8.2f} {_cell(row.peak_memory_mib, '6.0f')} {_cell(error, '8.1e')}"
    widened = "" if row.arithmetic in (row.precision, "float32") else ", computed in FP32"
    numbers = f"{row.images_per_second:>9.1f} {latency.median_ms:>10.2f} {tails}"
    yield f"{row.name:30} {row.batch:>5} {numbers} {start} {speed:>34}  {row.status}{widened}"
    if row.gpu is not None:
        compute = f"compute {row.gpu.compute.median_ms:.3f} ms (CV {row.gpu.compute.cv_percent:.1f} %)"
        transfers = f"in {row.gpu.h2d_ms:.3f} ms, out {row.gpu.d2h_ms:.3f} ms, enqueue {row.gpu.enqueue_ms:.3f} ms"
        yield f"    {compute}, {transfers}"
    if row.device_memory_mib is not None:
        yield f"    device memory {row.device_memory_mib:.0f} MiB after the smallest batch, if alone on the GPU"
    share = share_of_bound(row, network)
    if share is not None:
        yield f"    {share['measured_over_bound']:.0%} of its bound by {share['bound_by']} ({share['traffic']} bytes)"
    for remark in row.remarks:
        yield f"    {remark}"


def _not_run_line(missing: NotRun) -> str:
    figures = (
        f"{missing.kernels} kernels, {missing.megabytes_per_image:.1f} MB an image at batch {missing.batch}; "
        if missing.megabytes_per_image is not None
        else ""
    )
    return f"{missing.name:30} {figures}latency: not run ({missing.reason})"


def _knee_line(knee: Knee, slo_ms: float | None) -> str:
    best = f"best {knee.best_images_per_second:.1f} images/s at batch {knee.best_batch}"
    rising = " (the largest measured: it may still rise)" if knee.still_rising else ""
    line = f"{knee.name:30} {best}{rising}; batch {knee.knee_batch} is the smallest within 5 %"
    if slo_ms is not None:
        within = f"batch {knee.slo_batch} ({knee.slo_percentile})" if knee.slo_batch else "no batch measured"
        line += f"; within {slo_ms:g} ms: {within}"
    return f"{line}; UNSTABLE rows among them" if knee.is_unstable else line


def _tail(value: float | None, rank: int) -> str:
    """A percentile, or how many calls it would have taken."""
    return f"{f'n<{PERCENTILES[rank]}':>8}" if value is None else f"{value:>8.2f}"


def _cell(value: float | None, form: str) -> str:
    return f"{'-':>{form.partition('.')[0]}}" if value is None else f"{value:{form}}"
