"""The benchmark over recorded artifacts: rows, what was not run, plans, and the commands."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import numpy_helper

from cnx_deploy.bench.bounds import bound_of, work_of
from cnx_deploy.bench.comparison import BenchSpec, bound_of_row, plan_benchmark, run_benchmark
from cnx_deploy.bench.record import BenchmarkRecord
from cnx_deploy.bench.report import record_lines
from cnx_deploy.cli import cli
from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.devices import find_device
from cnx_deploy.core.errors import CheckFailedError, InputError, MissingRequirementError
from cnx_deploy.core.system import find_gpus
from tests.support import bench_rows
from tests.support.artifacts import copy_artifact

ROOT = Path(__file__).parents[2]
DURATION = 0.15
PEER = "torch eager fp32"
FILES = ["tiny-test-32-fp16.onnx", "tiny-test-32-fp32.onnx"]
ENGINE = "tiny-test-32-fp16-rtx-sm89.engine"

pytestmark = pytest.mark.usefixtures("quick_timing")


@pytest.fixture(scope="module")
def folder(tiny_project: Path) -> Path:
    """The smallest network at 32 px in both precisions and an engine for sm89. Shared: do not change it."""
    return tiny_project


def spec_of(folder: Path, **values: object) -> BenchSpec:
    chosen = {"batches": (2,), "duration_seconds": DURATION, "threads": 1, **values}
    return BenchSpec(export_dir=folder / "export", engines_dir=folder / "engines", **chosen)


def invoke(folder: Path, *words: str) -> Result:
    """Run `cnx-deploy bench` with these words on the folder."""
    folders = ["--export-dir", str(folder / "export"), "--engines-dir", str(folder / "engines")]
    return CliRunner().invoke(cli, ["bench", *words, *folders])


@pytest.fixture(scope="module")
def record(folder: Path, quick_timing: None) -> BenchmarkRecord:
    """Batches 1, 4 and 16 beside PyTorch; the files were exported for 1 to 8."""
    return run_benchmark(spec_of(folder, batches=(1, 4, 16), compare=("torch",)), print)


def test_pytorch_is_the_baseline_and_every_file_has_a_row(record: BenchmarkRecord) -> None:
    rows = [row for row in record.rows if row.name != ENGINE]
    assert [(row.name, row.batch) for row in rows] == [
        *((name, batch) for batch in (1, 4) for name in [PEER, *FILES]), (PEER, 16),
    ]  # fmt: skip
    assert record.baseline == PEER
    for row in rows:
        assert row.status != "INVALID"
        assert row.correctness is not None
        assert (row.ratio_to(PEER) is None) == (row.name == PEER)
        assert row.images_per_second == pytest.approx(row.batch * 1000 / row.latency.median_ms)
        assert row.latency.calls >= 10


def test_the_record_says_what_the_network_and_its_files_are(record: BenchmarkRecord) -> None:
    (network,) = record.networks.values()
    # 138,104 parameters with a thousand classes, 64 + 1 for each; 7,498 outputs of convolutions and linear layers.
    assert (network.variant, network.parameters, network.macts) == ("tiny-test", 138_104 - 990 * 65, 0.01)
    assert {len(file.sha256) for file in network.files.values()} == {64}
    assert (len(network.weights.sha256), record.environment.threads) == (64, 1)
    assert all(row.details["provider"] == "CPUExecutionProvider" for row in record.rows if row.name in FILES)


def test_a_batch_outside_the_exported_range_is_said_and_not_timed(record: BenchmarkRecord) -> None:
    reasons = {missing.name: (missing.batch, missing.reason) for missing in record.not_run if missing.name != ENGINE}
    assert reasons == dict.fromkeys(FILES, (16, "a batch of 16 is outside its range of 1 to 8"))


@pytest.mark.skipif(bool(find_gpus()), reason="a GPU is here: engines run")
def test_no_gpu_behaviour_bench_says_that_an_engine_was_not_run(folder: Path, record: BenchmarkRecord) -> None:
    compiled = open_artifact(folder / "engines" / ENGINE).manifest.facts.compiled
    missing = next(missing for missing in record.not_run if missing.name == ENGINE)
    assert (missing.kernels, missing.batch) == (compiled.kernels, compiled.batch)
    printed = "\n".join(record_lines(record))
    assert f"{compiled.kernels} kernels" in printed
    assert "latency: not run: Running an engine needs an NVIDIA GPU" in printed


@pytest.mark.slow
def test_without_a_comparison_the_first_file_is_the_baseline(folder: Path) -> None:
    record = run_benchmark(spec_of(folder), print)
    first, second = (row for row in record.rows if row.name in FILES)
    assert ([ratio.peer for ratio in first.ratios], [ratio.peer for ratio in second.ratios]) == ([], [first.name])


@pytest.mark.slow
def test_a_sweep_goes_by_powers_of_two_through_the_range_and_has_a_knee(folder: Path) -> None:
    record = run_benchmark(spec_of(folder, sweep_to=16, slo_ms=1e6), print)
    batches = [row.batch for row in record.rows if row.name == FILES[1]]
    assert batches in (
        [1, 2, 4, 8],
        [1, 2, 4],
        [1, 2],
    )  # exported for 1 to 8; it ends early where a busy machine slowed it twice
    knee = next(knee for knee in record.sweep if knee.name == FILES[1])
    assert (knee.slo_batch, knee.knee_batch <= knee.best_batch) == (batches[-1], True)


def test_nothing_else_than_the_known_peers_can_be_compared_with() -> None:
    with pytest.raises(InputError, match=r"compare takes torch, compile, torch-half, .*, got .jax"):
        BenchSpec(compare=("torch", "jax"))
    result = CliRunner().invoke(cli, ["bench", "--compare", "timm,jax"])
    assert (result.exit_code, "'jax' is not one of torch, compile, torch-half" in result.output) == (2, True)


def test_the_command_prints_one_document_or_csv(folder: Path) -> None:
    words = ("--batch", "2", "--duration", str(DURATION), "--threads", "1")
    read = BenchmarkRecord.from_document(json.loads(invoke(folder, *words, "--json").stdout))
    assert [row.name for row in read.rows if row.name != ENGINE] == FILES
    lines = invoke(folder, "sweep", "--max-batch", "1", *words[2:], "--csv").stdout.splitlines()
    assert (len(lines) >= 3, lines[0].startswith("model,infer_img_size,")) == (True, True)


@pytest.mark.slow
def test_the_demo_reads_its_closing_table_from_the_document(record: BenchmarkRecord) -> None:
    """`scripts/demo` takes minutes and is not run here: what it takes from the document must be in the document."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    document = json.loads(json.dumps(record.to_document()))
    speed = {(row["name"], row["batch"]): row for row in document["rows"]}
    not_run = {row["name"]: row for row in document["not_run"]}
    assert re.match(r"batch 1: \d+/s \(\d+\.\d\dx torch", demo.speed_of(FILES[1], speed, not_run))
    if not find_gpus():
        assert demo.speed_of(ENGINE, speed, not_run).endswith("latency: not run (no GPU)")


def test_bench_refuses_invalid_and_the_command_fails(folder: Path, tmp_path: Path) -> None:
    """The head's weights with the other sign, under a manifest that vouches for them."""
    wrong = copy_artifact(open_artifact(folder / "export" / FILES[1]), tmp_path / "export")
    model = onnx.load(wrong.path)
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    head.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(head), head.name))
    onnx.save(model, wrong.path)
    record = replace(wrong.manifest.files[0], size_bytes=wrong.path.stat().st_size, sha256=sha256_of_file(wrong.path))
    wrong.path.with_suffix(".json").write_text(replace(wrong.manifest, files=(record,)).to_json(), encoding="utf-8")
    result = invoke(tmp_path, "--batch", "2", "--duration", str(DURATION))
    assert isinstance(result.exception, CheckFailedError)
    assert "INVALID" in result.output


def test_a_plan_names_every_row_that_a_file_takes_and_measures_none(folder: Path) -> None:
    plan = plan_benchmark(spec_of(folder, batches=(1, 16), compare=("torch",)), print)
    planned = [(row.name, row.batch) for row in plan.planned]
    assert planned == [(PEER, 1), *((name, 1) for name in [*FILES, ENGINE]), (PEER, 16)]
    assert {bound.basis for bound in plan.roofline} == {"bound from the data sheet, not measured"}
    result = invoke(folder, "plan", "--compare", "torch", "--batch", "2")
    assert (result.exit_code, "images/s by" in result.stdout) == (0, True)
    document = json.loads(invoke(folder, "plan", "--json").stdout)
    assert all("bound_images_per_second" in row and "images_per_second" not in row for row in document["roofline"])
    assert "rows" not in document


@pytest.mark.skipif(bool(find_gpus()), reason="a GPU is here: engines run")
def test_no_gpu_behaviour_bench_refuses_an_engine_that_is_named(folder: Path) -> None:
    result = CliRunner().invoke(cli, ["bench", str(folder / "engines" / ENGINE)])
    assert isinstance(result.exception, MissingRequirementError)


@pytest.mark.slow
def test_timms_model_takes_turns_with_ours_and_has_the_same_logits(folder: Path) -> None:
    record = run_benchmark(spec_of(folder, compare=("timm",)), print)
    rows = {row.name: row for row in record.rows if row.backend == "onnxruntime"}
    timm = rows.pop("timm.onnx fp32")
    assert timm.correctness is not None
    assert timm.correctness.failures == ()
    assert timm.details["threads"] == rows[FILES[1]].details["threads"]
    for row in rows.values():
        assert row.ratio_to("timm.onnx fp32") is not None
        assert row.latency.calls == timm.latency.calls


@pytest.mark.slow
def test_a_peer_that_is_missing_is_said_and_the_next_is_the_baseline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm.models.convnext", None)
    record = run_benchmark(spec_of(folder, compare=("timm", "torch")), print)
    missing = {missing.name: missing.reason for missing in record.not_run}
    assert missing["timm.onnx fp32"] == "timm is not installed: pip install timm"
    assert record.baseline == PEER


def test_a_row_on_a_known_gpu_is_a_share_of_its_bound() -> None:
    network = bench_rows.network_of("atto.engine", image_size=224)
    bound = bound_of(work_of("atto", 224, "fp16"), find_device("NVIDIA L4"), batch=8)
    speed = 0.25 * bound.bound_images_per_second
    share = bound_of_row(bench_rows.row(8, speed, device="NVIDIA L4", arithmetic="fp16", name="atto.engine"), network)
    assert (share.measured_over_bound, share.traffic) == (pytest.approx(0.25), "fused")
    counted = bound_of_row(bench_rows.row(64, 100, device="NVIDIA L4", arithmetic="fp16", name="atto.engine"), network)
    assert (counted.traffic, counted.megabytes_per_image) == ("as compiled", pytest.approx(31.23))
    for other in ("AMD EPYC", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert bound_of_row(bench_rows.row(8, 100, device=other), network) is None


def test_a_benchmark_leaves_torchs_threads_as_they_were(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run_benchmark(spec_of(folder, threads=2), print)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
