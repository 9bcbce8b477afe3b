"""A benchmark for people: the table for a terminal, CSV that lies beside timm's, and a plan."""

import csv
import io
from collections.abc import Iterator, Mapping

from cnx_deploy.bench.record import BenchmarkRecord, Conditions, Knee, NetworkFacts, NotRun, Plan, Timing
from cnx_deploy.bench.statistics import PERCENTILES
from cnx_deploy.core.image_size import size_text

__all__ = ["as_csv", "plan_lines", "record_lines"]

CSV_COLUMNS = (
    "model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "param_count",
    "infer_gmacs", "infer_macts", "artifact", "backend", "precision", "images_per_second", "median_ms", "p90_ms",
    "p95_ms", "p99_ms", "min_ms", "max_ms", "cv_percent", "calls", "peer", "ratio", "status",
)  # fmt: skip
"""timm's columns of results/benchmark-infer-*.csv, from means as there; then ours, from medians."""


def record_lines(record: BenchmarkRecord) -> Iterator[str]:
    """What was measured and on what; one line a row with its remarks below; what was not run; what a sweep shows."""
    yield from _head_lines(record.environment, record.networks)
    ratio = f"x {record.baseline} (95 %)" if record.baseline else ""
    yield (
        f"{'artifact':30} {'batch':>5} {'images/s':>9} {'median ms':>10} {'p95 ms':>8} {'p99 ms':>8} {'CV %':>5} "
        f"{'start s':>8} {'MiB':>6} {'rel. L2':>8} {ratio:>34}  status"
    )
    for row in record.rows:
        yield from _row_lines(row, record.baseline)
    yield from map(_not_run_line, record.not_run)
    yield from map(_knee_line, record.sweep)


def plan_lines(plan: Plan) -> Iterator[str]:
    """The rows that would be measured, then the bounds of GPUs; nothing measured in either."""
    yield from _head_lines(plan.environment, plan.networks)
    yield "plan, not measured:"
    for row in plan.planned:
        missing = f"; would not run here: {row.missing}" if row.missing else ""
        yield f"  {row.name:30} batch {row.batch:>4}{missing}"
    yield "roofline, bounds from data sheets, not measured:"
    for bound in plan.roofline:
        figure = f"at most {bound.bound_images_per_second:>9.0f} images/s by {bound.bound_by}"
        where = f"{bound.variant} {size_text(bound.image_size or 0)} px {bound.precision} batch {bound.batch}"
        yield f"  {bound.device:32} {where:32} {figure}{', L2 may pass it' if bound.stage_1_fits_l2 else ''}"


def as_csv(record: BenchmarkRecord) -> str:
    """One line a row under `CSV_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for row in record.rows:
        network, latency, ratio = record.networks[row.network], row.latency, row.ratio_to(record.baseline)
        writer.writerow(
            (
                f"convnextv2_{network.variant}", size_text(network.image_size),
                f"{row.batch * 1000 / latency.mean_ms:.2f}",
                f"{latency.mean_ms:.3f}", row.batch, *_work(network), row.name,
                row.backend, row.precision, f"{row.images_per_second:.2f}",
                f"{latency.median_ms:.3f}", latency.p90_ms, latency.p95_ms, latency.p99_ms, f"{latency.min_ms:.3f}",
                f"{latency.max_ms:.3f}", f"{latency.cv_percent:.1f}", latency.calls, ratio and ratio.peer,
                ratio and f"{ratio.ratio:.3f}", row.status,
            )
        )  # fmt: skip
    return text.getvalue()


def _work(network: NetworkFacts) -> tuple[str, str, str]:
    """Millions of parameters, GMAC and MACT; empty where the work was not counted."""
    if network.parameters is None or network.gmacs is None or network.macts is None:
        return "", "", ""
    return f"{network.parameters / 1e6:.2f}", f"{network.gmacs:.2f}", f"{network.macts:.2f}"


def _head_lines(conditions: Conditions, networks: Mapping[str, NetworkFacts]) -> Iterator[str]:
    tools = conditions.tools
    commit = f" (commit {conditions.commit})" if conditions.commit else ""
    timed = ("torch", "onnxrun", "openvino", "tensorrt")
    runtimes = ", ".join(f"{name} {tools[name]}" for name in tools if name.startswith(timed))
    yield f"cnx-deploy {tools['cnx-deploy']}{commit}, {runtimes}, {conditions.system}, {conditions.date}"
    yield (
        f"{conditions.cpu} ({' '.join(conditions.isa)}), {conditions.processors} processors, {conditions.threads} "
        f"threads; {conditions.duration_seconds:g} s a row, host clock, seed {conditions.seed}"
    )
    for gpu in conditions.gpus:
        clocks = f"SM clock {gpu.sm_clock} of {gpu.max_sm_clock}, power cap {gpu.power_limit}"
        yield f"{gpu.name}, driver {gpu.driver}, {clocks}, ECC {gpu.ecc}, MIG {gpu.mig}"
    for name, network in networks.items():
        weights = f"{network.weights.origin} weights {network.weights.sha256[:12]}"
        counts = "work not counted"
        if network.gmacs is not None and network.parameters is not None:
            counts = f"{network.gmacs:.3g} GMAC, {network.parameters / 1e6:.2f} M parameters"
        yield f"{name}: {network.variant}, {size_text(network.image_size)} px {network.input}, {weights}, {counts}"
        for file_name, file in network.files.items():
            parts = file.fp32_layers or file.tensors_by_type or {}
            types = ", ".join(f"{count} {kind}" for kind, count in parts.items())
            label = "in FP32: " if file.fp32_layers else "tensors: "
            yield f"  {file_name} {file.sha256[:12]}, {file.precision}" + (f", {label}{types}" if types else "")


def _row_lines(row: Timing, baseline: str) -> Iterator[str]:
    latency, ratio = row.latency, row.ratio_to(baseline)
    speed = f"{ratio.ratio:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else ""
    tails = f"{_tail(latency.p95_ms, 95)} {_tail(latency.p99_ms, 99)} {latency.cv_percent:>5.1f}"
    error = row.correctness.relative_l2 if row.correctness else None
    start = f"{row.create_seconds:>8.2f} {_cell(row.peak_memory_mib, '6.0f')} {_cell(error, '8.1e')}"
    numbers = f"{row.images_per_second:>9.1f} {latency.median_ms:>10.2f} {tails}"
    widened = ", computed in FP32" if row.is_widened else ""
    yield f"{row.name:30} {row.batch:>5} {numbers} {start} {speed:>34}  {row.status}{widened}"
    if row.gpu is not None:
        compute = f"compute {row.gpu.compute.median_ms:.3f} ms (CV {row.gpu.compute.cv_percent:.1f} %)"
        transfers = f"in {row.gpu.h2d_ms:.3f} ms, out {row.gpu.d2h_ms:.3f} ms, enqueue {row.gpu.enqueue_ms:.3f} ms"
        yield f"    {compute}, {transfers}"
    if row.device_memory_mib is not None:
        yield f"    device memory {row.device_memory_mib:.0f} MiB after the smallest batch, if alone on the GPU"
    if row.roofline is not None and row.roofline.measured_over_bound is not None:
        share = f"{row.roofline.measured_over_bound:.0%} of its bound by {row.roofline.bound_by}"
        yield f"    {share} ({row.roofline.traffic} bytes)"
    for remark in row.remarks:
        yield f"    {remark}"


def _not_run_line(missing: NotRun) -> str:
    figures = ""
    if missing.megabytes_per_image is not None:
        moved = f"{missing.megabytes_per_image:.1f} MB an image at batch {missing.batch}"
        figures = f"{missing.kernels} kernels, {moved}; "
    return f"{missing.name:30} {figures}latency: not run: {missing.reason}"


def _knee_line(knee: Knee) -> str:
    best = f"best {knee.best_images_per_second:.1f} images/s at batch {knee.best_batch}"
    rising = " (the largest measured: it may still rise)" if knee.still_rising else ""
    line = f"{knee.name:30} {best}{rising}; batch {knee.knee_batch} is the smallest within 5 %"
    if knee.slo_ms is not None:
        within = f"batch {knee.slo_batch} ({knee.slo_percentile})" if knee.slo_batch else "no batch measured"
        line += f"; within {knee.slo_ms:g} ms: {within}"
    return f"{line}; UNSTABLE rows among them" if knee.is_unstable else line


def _tail(value: float | None, rank: int) -> str:
    """A percentile, or how many calls it would have taken."""
    return f"{f'n<{PERCENTILES[rank]}':>8}" if value is None else f"{value:>8.2f}"


def _cell(value: float | None, form: str) -> str:
    return f"{'-':>{form.partition('.')[0]}}" if value is None else f"{value:{form}}"
