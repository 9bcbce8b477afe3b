"""The benchmark over recorded artifacts: rows, what was not run, and the command's three outputs."""

import csv
import importlib.util
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cnx_deploy.api import BuildRequest, ExportRequest, run_builds, run_exports
from cnx_deploy.bench import timing as benchmark
from cnx_deploy.bench.comparison import BenchRequest, bench_artifacts
from cnx_deploy.bench.sweep import knees
from cnx_deploy.cli.bench import bench
from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.errors import CheckFailedError, InputError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.system import find_gpus

ROOT = Path(__file__).parents[2]
DURATION = 0.15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Atto at 32 px in both precisions and an engine for sm89. Shared: do not change it."""
    root = tmp_path_factory.mktemp("bench")
    run_exports(ExportRequest(variant="atto", image_size=32, batch=(1, 2, 4), output_dir=root / "export"), print)
    request = BuildRequest(export_dir=root / "export", output_dir=root / "engines", targets=("sm89",))
    run_builds(request, print)
    return root


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as always, but without the rest before each call and for three windows, whether they agree or not."""
    monkeypatch.setattr(benchmark, "REST_SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "AGREEMENT", {"cpu": 1e9, "cuda": 1e9})


@pytest.fixture(scope="module")
def artifacts(folder: Path) -> list[Artifact]:
    return [open_artifact(path) for path in sorted(folder.glob("*/*.json"))]


def words(folder: Path, *more: str) -> list[str]:
    folders = ["--export-dir", str(folder / "export"), "--engines-dir", str(folder / "engines")]
    return [*folders, "--batch", "2", "--duration", str(DURATION), "--threads", "1", *more]


def test_pytorch_is_the_baseline_and_every_file_has_a_row(artifacts: list[Artifact]) -> None:
    request = BenchRequest(batches=(1, 4), duration=DURATION, compare=("torch",), threads=1)
    result = bench_artifacts(artifacts, request)
    names = [(row.name, row.batch) for row in result.rows if row.backend != "tensorrt-rtx"]
    files = ["torch eager fp32", "atto-32-fp16.onnx", "atto-32-fp32.onnx"]
    assert names == [(name, batch) for batch in (1, 4) for name in files]
    for row in result.rows:
        assert row.status != "INVALID"
        assert (row.ratio_to("torch eager fp32") is None) == (row.name == "torch eager fp32")
        assert row.images_per_second == pytest.approx(row.batch * 1000 / row.latency.median_ms)
        assert row.latency.calls >= 10


@pytest.mark.slow
def test_without_a_comparison_the_first_file_is_the_baseline(artifacts: list[Artifact]) -> None:
    result = bench_artifacts(artifacts, BenchRequest(batches=(1,), duration=DURATION))
    first, second = (row for row in result.rows if row.name.endswith(".onnx"))
    assert first.ratios == ()
    assert [ratio.peer for ratio in second.ratios] == [first.name]


@pytest.mark.slow
def test_a_sweep_goes_by_powers_of_two_through_the_range_and_has_a_knee(artifacts: list[Artifact]) -> None:
    result = bench_artifacts(artifacts, BenchRequest(sweep=True, max_batch=16, duration=DURATION))
    batches = [row.batch for row in result.rows if row.name == "atto-32-fp32.onnx"]
    assert batches in ([1, 2, 4], [1, 2])  # exported for 1 to 4; it ends early where a busy machine slowed it twice
    knee = next(knee for knee in knees(result.rows, slo_ms=1e6) if knee.name == "atto-32-fp32.onnx")
    assert knee.slo_batch == batches[-1]
    assert knee.knee_batch <= knee.best_batch


def test_nothing_else_than_the_known_peers_can_be_compared_with() -> None:
    with pytest.raises(InputError, match=r"called 'jax'\. Choose from: torch, compile, timm"):
        BenchRequest(compare=("torch", "jax"))


def test_a_batch_outside_the_exported_range_is_said_and_not_timed(artifacts: list[Artifact]) -> None:
    result = bench_artifacts(artifacts, BenchRequest(batches=(8,), duration=DURATION))
    assert result.rows == ()
    reasons = {missing.name: missing.reason for missing in result.not_run if missing.name.endswith(".onnx")}
    expected = "a batch of 8 is outside its range of 1 to 4"
    assert reasons == {"atto-32-fp16.onnx": expected, "atto-32-fp32.onnx": expected}


@pytest.mark.skipif(bool(find_gpus()), reason="a GPU is here: engines run")
def test_no_gpu_behaviour_bench_says_that_an_engine_was_not_run(folder: Path, artifacts: list[Artifact]) -> None:
    compiled = next(a for a in artifacts if a.manifest.kind == "engine").manifest.facts.compiled
    (missing,) = bench_artifacts(artifacts, BenchRequest(batches=(1,), duration=DURATION)).not_run
    assert (missing.kernels, missing.batch) == (compiled["kernels"], 4)
    printed = CliRunner().invoke(bench, words(folder)).output
    assert f"{compiled['kernels']} kernels" in printed
    assert "latency: not run (no GPU)" in printed


def test_csv_begins_with_timms_columns(folder: Path) -> None:
    result = CliRunner().invoke(bench, words(folder, "--csv"))
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert list(rows[0])[:8] == [
        "model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "param_count",
        "infer_gmacs", "infer_macts",
    ]  # fmt: skip
    # timm counts 3.81 million activations at 224 px: a 49th of that at 32, but for the head's thousand.
    assert {(row["model"], row["param_count"], row["infer_macts"]) for row in rows} == {
        ("convnextv2_atto", "3.71", "0.08")
    }
    for row in rows:
        assert float(row["infer_samples_per_sec"]) == pytest.approx(2000 / float(row["infer_step_time"]), rel=1e-3)


def test_json_is_one_document_with_versions_and_hashes(folder: Path) -> None:
    document = json.loads(CliRunner().invoke(bench, words(folder, "--json")).stdout)
    assert document["schema_version"] == 3
    environment = document["environment"]
    assert environment["tools"]["torch"]
    assert environment["machine"]["threads"] == 1
    (network,) = document["networks"].values()
    assert len(network["files"]["atto-32-fp32.onnx"]["sha256"]) == 64
    assert len(network["weights"]["sha256"]) == 64
    assert all(row["details"]["provider"] == "CPUExecutionProvider" for row in document["rows"])
    assert {row["name"] for row in document["rows"]} >= {"atto-32-fp16.onnx", "atto-32-fp32.onnx"}


@pytest.mark.slow
def test_the_demo_reads_its_closing_table_from_the_document(folder: Path) -> None:
    """`scripts/demo` takes minutes and is not run here: what it takes from the document must be in the document."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    document = json.loads(CliRunner().invoke(bench, words(folder, "--compare", "torch", "--json")).stdout)
    speed = {(row["name"], row["batch"]): row for row in document["rows"]}
    not_run = {row["name"]: row for row in document["not_run"]}
    assert re.match(r"batch 2: \d+/s \(\d+\.\d\dx torch", demo.speed_of("atto-32-fp32.onnx", speed, not_run))
    if not find_gpus():
        engine = "atto-32-fp16-rtx-sm89.engine"
        assert demo.speed_of(engine, speed, not_run).endswith("latency: not run (no GPU)")


def test_bench_refuses_invalid_and_the_command_fails(folder: Path, tmp_path: Path) -> None:
    """The weights of another seed under a manifest that vouches for them."""
    request = ExportRequest(
        variant="atto", seed=1, image_size=32, batch=(1, 2, 4), precisions=("fp32",), output_dir=tmp_path / "export"
    )
    (wrong,) = run_exports(request, print)
    claimed = open_artifact(folder / "export" / "atto-32-fp32.onnx").manifest
    record = replace(claimed.files[0], size_bytes=wrong.path.stat().st_size, sha256=sha256_of_file(wrong.path))
    wrong.path.with_suffix(".json").write_text(replace(claimed, files=(record,)).to_json(), encoding="utf-8")
    result = CliRunner().invoke(bench, words(tmp_path))
    assert isinstance(result.exception, CheckFailedError)
    assert "INVALID" in result.output


def test_a_dry_run_names_every_row_and_measures_none(folder: Path) -> None:
    result = CliRunner().invoke(bench, words(folder, "--compare", "torch", "--dry-run"))
    assert result.exit_code == 0
    assert "torch eager fp32               batch    2  not measured" in result.stdout
    assert "images/s by" in result.stdout
    document = json.loads(CliRunner().invoke(bench, words(folder, "--dry-run", "--json")).stdout)
    assert {row["status"] for row in document["planned"]} == {"not measured"}
    assert all("bound_images_per_second" in row and "images_per_second" not in row for row in document["roofline"])
    assert "rows" not in document


def test_comparisons_are_given_with_commas_or_one_by_one() -> None:
    joined = CliRunner().invoke(bench, ["--compare", "timm,jax"])
    assert (joined.exit_code, "'jax' is not one of torch, compile, timm" in joined.output) == (2, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sweep", "--batch", "4"], "--sweep chooses the batches"),
        (["--max-batch", "8"], "--max-batch is read with --sweep"),
        (["--max-regress", "5%"], "--max-regress is read with --gate"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(given: list[str], message: str) -> None:
    result = CliRunner().invoke(bench, given)
    assert (result.exit_code, message in result.output) == (2, True), result.output


@pytest.fixture
def baseline(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "baseline.json"
    path.write_text(CliRunner().invoke(bench, words(folder, "--compare", "torch", "--json")).stdout, encoding="utf-8")
    return path


def gated(folder: Path, baseline: Path, *more: str) -> Result:
    return CliRunner().invoke(bench, words(folder, "--compare", "torch", "--gate", str(baseline), *more))


@pytest.mark.slow
def test_the_gate_lets_an_untouched_run_pass(folder: Path, baseline: Path) -> None:
    result = gated(folder, baseline, "--max-regress", "90%")
    assert result.exit_code == 0, result.output
    assert "gate: atto-32-fp32.onnx batch 2: ok, ratio to torch eager fp32" in result.stdout


def test_bench_refuses_invalid_a_planted_regression(folder: Path, baseline: Path) -> None:
    document = json.loads(baseline.read_text(encoding="utf-8"))
    (planted,) = (row for row in document["rows"] if row["name"] == "atto-32-fp32.onnx")
    planted["ratios"][0]["ratio"] *= 1e6  # beyond what a busy machine does to a ratio
    baseline.write_text(json.dumps(document), encoding="utf-8")
    result = gated(folder, baseline, "--max-regress", "90%")
    assert isinstance(result.exception, CheckFailedError)
    assert str(result.exception).startswith("atto-32-fp32.onnx batch 2 slower than")
    assert "gate: atto-32-fp32.onnx batch 2: regression" in result.stdout
    assert "gate: atto-32-fp16.onnx batch 2: ok" in result.stdout


def test_a_baseline_of_another_machine_without_a_common_peer_is_refused_before_measuring(
    folder: Path, baseline: Path
) -> None:
    document = json.loads(baseline.read_text(encoding="utf-8"))
    document["environment"]["machine"]["cpu"] = "Z80"
    baseline.write_text(json.dumps(document), encoding="utf-8")
    result = CliRunner().invoke(bench, words(folder, "--compare", "timm", "--gate", str(baseline)))
    assert isinstance(result.exception, InputError)
    assert "different machines (Z80 with" in str(result.exception)
    assert result.stdout == ""


@pytest.mark.skipif(bool(find_gpus()), reason="a GPU is here: engines run")
def test_no_gpu_behaviour_bench_refuses_an_engine_that_is_named(folder: Path) -> None:
    result = CliRunner().invoke(bench, [str(folder / "engines" / "atto-32-fp16-rtx-sm89.engine")])
    assert isinstance(result.exception, MissingRequirementError)


@pytest.mark.slow
def test_timms_model_takes_turns_with_ours_and_has_the_same_logits(artifacts: list[Artifact]) -> None:
    result = bench_artifacts(artifacts, BenchRequest(batches=(2,), duration=DURATION, compare=("timm",)))
    rows = {row.name: row for row in result.rows if row.backend == "onnxruntime"}
    timm = rows.pop("timm.onnx fp32")
    assert timm.correctness is not None
    assert timm.correctness.failures == ()
    assert timm.details["threads"] == rows["atto-32-fp32.onnx"].details["threads"]
    for row in rows.values():
        assert row.ratio_to("timm.onnx fp32") is not None
        assert row.latency.calls == timm.latency.calls


@pytest.mark.slow
def test_a_peer_that_is_missing_is_said_and_the_next_is_the_baseline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm.models.convnext", None)
    printed = CliRunner().invoke(bench, words(folder, "--compare", "timm,torch")).stdout
    missing = next(line for line in printed.splitlines() if line.startswith("timm.onnx fp32"))
    assert missing.split(maxsplit=2)[2] == "latency: not run (timm is not installed: pip install timm)"
    assert "x torch eager fp32 (95 %)" in printed
