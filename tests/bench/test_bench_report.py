"""What a benchmark prints: figures where they were measured, words where not."""

import csv
import io
from dataclasses import replace

from cnx_deploy.bench.gate import Verdict
from cnx_deploy.bench.record import NotRun, Ratio
from cnx_deploy.bench.report import as_csv, record_lines
from cnx_deploy.bench.statistics import knees
from tests.support.bench_rows import NETWORK, record_of, row

TORCH = Ratio("torch", 2.0, 1.9, 2.1)
TIMM = Ratio("timm", 1.5, 1.4, 1.6)


def last_line(*rows: object, **values: object) -> str:
    return list(record_lines(record_of(*rows, **values)))[-1]


def test_the_first_peer_of_the_run_is_the_baseline_of_the_table() -> None:
    rows = [row(1, 5, name="timm", ratios=(TORCH,)), row(1, 4, name="torch", ratios=(TIMM,))]
    record = record_of(*rows, row(1, 9, ratios=(TIMM, TORCH)))
    assert (record.baseline, record_of(row(1, 9)).baseline) == ("timm", "")
    *_, head, _, _, last = record_lines(record)
    assert "x timm (95 %)" in head
    assert ("1.50 (1.40-1.60)" in last, "2.00" in last) == (True, False)


def test_bench_refuses_invalid_a_percentile_takes_more_is_said() -> None:
    line = last_line(row(1, 100, milliseconds=[10.0] * 99))
    assert ("n<100" in line, "n<500" in line) == (True, True)
    assert "n<" not in last_line(row(1, 100, milliseconds=[10.0] * 500))


def test_what_was_not_run_has_kernels_and_no_latency() -> None:
    line = last_line(row(1, 100), not_run=(NotRun("atto.engine", NETWORK, 64, 98, 31.23, "no GPU"),))
    expected = "atto.engine 98 kernels, 31.2 MB an image at batch 64; latency: not run: no GPU"
    assert " ".join(line.split()) == expected


def test_csv_has_timms_means_and_our_medians() -> None:
    sample = [10.0] * 60 + [40.0] * 40  # mean 22 ms, median 10 ms
    text = as_csv(record_of(row(2, 200, milliseconds=sample, ratios=(TORCH,)), row(2, 1, name="torch")))
    first, _ = csv.DictReader(io.StringIO(text))
    assert list(first)[:8] == [
        "model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "param_count",
        "infer_gmacs", "infer_macts",
    ]  # fmt: skip
    assert (first["infer_step_time"], first["infer_samples_per_sec"]) == ("22.000", "90.91")
    assert (first["median_ms"], first["images_per_second"]) == ("10.000", "200.00")
    assert (first["model"], first["infer_gmacs"], first["infer_macts"]) == ("convnextv2_atto", "0.55", "3.81")
    assert (first["peer"], first["ratio"], first["p95_ms"], first["p99_ms"]) == ("torch", "2.000", "40.0", "")


def test_a_sweeps_line_says_what_it_does_not_know() -> None:
    rows = (row(1, 50), row(2, 100, status="UNSTABLE"))
    line = last_line(*rows, sweep=knees(rows, slo_ms=1.0))
    assert "batch 2 (the largest measured: it may still rise)" in line
    assert "within 1 ms: no batch measured" in line
    assert "UNSTABLE rows among them" in line


def test_the_gates_lines_give_both_figures_or_the_reason() -> None:
    judged = Verdict("a.onnx", 1, "regression", "ratio to torch", 4.0, 3.0, 0.75)
    unjudged = Verdict("a.onnx", 8, "undecided", reason="it is UNSTABLE now")
    assert [str(verdict) for verdict in (judged, unjudged)] == [
        "gate: a.onnx batch 1: regression, ratio to torch 4 -> 3 (-25.0%)",
        "gate: a.onnx batch 8: undecided, it is UNSTABLE now",
    ]


def test_a_row_says_its_device_memory_where_it_is_known_and_that_fp16_was_widened() -> None:
    plain = row(8, 1000.0)
    *rest, memory = record_lines(record_of(replace(plain, device_memory_mib=412.4)))
    assert memory.strip() == "device memory 412 MiB after the smallest batch, if alone on the GPU"
    assert rest == list(record_lines(record_of(plain)))
    assert last_line(replace(plain, precision="fp16")).endswith("OK, computed in FP32")
    assert last_line(replace(plain, precision="float32", arithmetic="float32")).endswith("OK")
