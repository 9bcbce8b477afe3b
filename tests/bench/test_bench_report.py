"""What a benchmark prints: figures where they were measured, words where not."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.bench.comparison import Benchmark, BenchRequest, NotRun
from cnx_deploy.bench.conditions import Conditions
from cnx_deploy.bench.devices import find_device
from cnx_deploy.bench.gate import Verdict, judge_against, read_baseline
from cnx_deploy.bench.networks import activation_count
from cnx_deploy.bench.plan import plan_of, share_of_bound
from cnx_deploy.bench.report import as_csv, baseline_of, document, gate_lines, plan_lines, table_lines
from cnx_deploy.bench.roofline import bound_of, work_of
from cnx_deploy.bench.statistics import Ratio
from cnx_deploy.bench.sweep import knees
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.variants import find_variant
from tests.support.bench_rows import row

NETWORK: dict[str, Any] = {
    "variant": "atto", "image_size": 224, "num_classes": 1000, "parameters": 3_708_400, "gmacs": 0.547, "macts": 3.81,
    "files": {"atto.engine": {"compiled": {"batch": 64, "kernels": 98, "megabytes_per_image": 31.23}}},
}  # fmt: skip
TORCH = Ratio("torch", 2.0, 1.9, 2.1)
TIMM = Ratio("timm", 1.5, 1.4, 1.6)


def benchmark_of(*rows: Any, not_run: tuple[NotRun, ...] = ()) -> Benchmark:
    return Benchmark(rows, not_run, {"atto-32": NETWORK})


def test_the_first_peer_of_the_run_is_the_baseline_of_the_table() -> None:
    rows = [row(1, 5, name="timm", ratios=(TORCH,)), row(1, 4, name="torch", ratios=(TIMM,))]
    assert baseline_of([*rows, row(1, 9, ratios=(TIMM, TORCH))]) == "timm"
    assert baseline_of([row(1, 9)]) == ""
    head, *_, last = table_lines(benchmark_of(*rows, row(1, 9, ratios=(TIMM, TORCH))))
    assert "x timm (95 %)" in head
    assert "1.50 (1.40-1.60)" in last
    assert "2.00" not in last


def test_bench_refuses_invalid_a_percentile_takes_more_is_said() -> None:
    *_, line = table_lines(benchmark_of(row(1, 100, milliseconds=[10.0] * 99)))
    assert "n<100" in line
    assert "n<500" in line
    *_, line = table_lines(benchmark_of(row(1, 100, milliseconds=[10.0] * 500)))
    assert "n<" not in line


def test_what_was_not_run_has_kernels_and_no_latency() -> None:
    missing = NotRun("atto.engine", "atto-32", 64, 98, 31.23, "no GPU")
    *_, line = table_lines(benchmark_of(row(1, 100), not_run=(missing,)))
    words = " ".join(line.split())
    assert words == "atto.engine 98 kernels, 31.2 MB an image at batch 64; latency: not run (no GPU)"


def test_csv_has_timms_means_and_our_medians() -> None:
    sample = [10.0] * 60 + [40.0] * 40  # mean 22 ms, median 10 ms
    text = as_csv(benchmark_of(row(2, 200, milliseconds=sample, ratios=(TORCH,)), row(2, 1, name="torch")))
    first, _ = csv.DictReader(io.StringIO(text))
    assert (first["infer_step_time"], first["infer_samples_per_sec"]) == ("22.000", "90.91")
    assert (first["median_ms"], first["images_per_second"]) == ("10.000", "200.00")
    assert (first["model"], first["infer_gmacs"], first["infer_macts"]) == ("convnextv2_atto", "0.55", "3.81")
    assert (first["peer"], first["ratio"], first["p95_ms"], first["p99_ms"]) == ("torch", "2.000", "40.0", "")


@pytest.mark.parametrize(("variant", "millions"), [("atto", 3.81), ("base", 28.75), ("huge", 79.07)])
def test_activations_are_counted_as_timm_publishes_them(variant: str, millions: float) -> None:
    """results/model_metadata-in1k.csv of timm, 224 px."""
    assert round(activation_count(find_variant(variant), 224) / 1e6, 2) == millions


def test_a_row_on_a_known_gpu_is_a_share_of_its_bound() -> None:
    device = find_device("NVIDIA L4")
    assert device is not None
    bound = bound_of(work_of("atto", 224, "fp16"), device, batch=8)
    measured = row(8, 0.25 * bound.images_per_second, device="NVIDIA L4", arithmetic="fp16", name="atto.engine")
    share = share_of_bound(measured, NETWORK)
    assert share is not None
    assert (share["measured_over_bound"], share["traffic"]) == (pytest.approx(0.25), "fused")
    assert "25% of its bound by bandwidth (fused bytes)" in "\n".join(table_lines(benchmark_of(measured)))


def test_the_bytes_are_the_compilers_where_it_counted_this_batch() -> None:
    counted = share_of_bound(row(64, 100, device="NVIDIA L4", arithmetic="fp16", name="atto.engine"), NETWORK)
    assert counted is not None
    assert (counted["traffic"], counted["megabytes_per_image"]) == ("as compiled", 31.23)


@pytest.mark.parametrize("device", ["AMD EPYC", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_a_device_without_a_data_sheet_has_no_bound(device: str) -> None:
    assert share_of_bound(row(8, 100, device=device), NETWORK) is None
    assert "bound" not in "\n".join(table_lines(benchmark_of(row(8, 100, device=device))))


def test_a_plan_leaves_out_batches_that_a_file_does_not_take_and_has_no_speed(tiny_onnx_fp32: Artifact) -> None:
    manifest = tiny_onnx_fp32.manifest
    atto = replace(tiny_onnx_fp32, manifest=replace(manifest, model=replace(manifest.model, variant="atto")))
    plan = plan_of([atto], BenchRequest(batches=(1, 16), compare=("torch",)))
    planned = [(each.name, each.batch) for each in plan.rows]
    assert planned == [("torch eager fp32", 1), (atto.path.name, 1), ("torch eager fp32", 16)]
    lines = list(plan_lines(plan))
    assert all("not measured" in line or "at most" in line for line in lines)
    assert {each["basis"] for each in plan.roofline} == {"bound from the data sheet, not measured"}


def test_a_sweeps_line_says_what_it_does_not_know() -> None:
    rows = (row(1, 50), row(2, 100, status="UNSTABLE"))
    *_, line = table_lines(benchmark_of(*rows), knees(rows, slo_ms=1.0), slo_ms=1.0)
    assert "batch 2 (the largest measured: it may still rise)" in line
    assert "within 1 ms: no batch measured" in line
    assert "UNSTABLE rows among them" in line


def test_the_gates_lines_give_both_figures_or_the_reason() -> None:
    judged = Verdict("a.onnx", 1, "regression", "ratio to torch", 4.0, 3.0, 0.75)
    unjudged = Verdict("a.onnx", 8, "undecided", reason="it is UNSTABLE now")
    assert list(gate_lines([judged, unjudged])) == [
        "gate: a.onnx batch 1: regression, ratio to torch 4 -> 3 (-25.0%)",
        "gate: a.onnx batch 8: undecided, it is UNSTABLE now",
    ]


def test_a_row_says_its_device_memory_where_it_is_known() -> None:
    plain, known = row(8, 1000.0), replace(row(8, 1000.0), device_memory_mib=412.4)
    *rest, memory = table_lines(benchmark_of(known))
    assert memory.strip() == "device memory 412 MiB after the smallest batch, if alone on the GPU"
    assert rest == list(table_lines(benchmark_of(plain)))


CONDITIONS = Conditions("2026-01-01", None, {}, "Linux", "cpu", (), 2, 2, None, (), 0, 3.0, 0)


@pytest.mark.parametrize(("speed", "verdict"), [(100.0, "ok"), (80.0, "regression")])
def test_a_baseline_of_schema_version_2_is_still_read(tmp_path: Path, speed: float, verdict: str) -> None:
    facts = {**NETWORK, "files": {"atto.onnx": {}}, "input": "uint8"}

    def written(images_per_second: float) -> dict[str, Any]:
        found = document(Benchmark((row(1, images_per_second),), (), {"atto-32": facts}), CONDITIONS)
        return dict(json.loads(json.dumps(found)))

    earlier, now = written(100.0), written(speed)
    assert now["schema_version"] == 3
    earlier["schema_version"] = 2
    earlier["rows"][0].update(energy=None, device_memory_source="")
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(earlier), encoding="utf-8")
    assert [each.verdict for each in judge_against(read_baseline(path), now, 0.05)] == [verdict]
