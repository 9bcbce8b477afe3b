"""The benchmark over recorded artifacts: rows, what was not run, and the command's three outputs."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from cnx_deploy.artifacts import Artifact, open_artifact, sha256_of_file
from cnx_deploy.cli.bench import bench
from cnx_deploy.comparison import BenchRequest, bench_artifacts
from cnx_deploy.environment import find_gpus
from cnx_deploy.errors import CheckFailedError, MissingRequirementError
from cnx_deploy.pipeline import BuildRequest, ExportRequest, run_builds, run_exports

DURATION = 0.15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Atto at 32 px in both precisions and an engine for sm89. Shared: do not change it."""
    root = tmp_path_factory.mktemp("bench")
    run_exports(ExportRequest(variant="atto", image_size=32, batch=(1, 2, 4), output_dir=root / "export"), print)
    request = BuildRequest(export_dir=root / "export", output_dir=root / "engines", targets=("sm89",))
    run_builds(request, print)
    return root


@pytest.fixture(scope="module")
def artifacts(folder: Path) -> list[Artifact]:
    return [open_artifact(path) for path in sorted(folder.glob("*/*.json"))]


def words(folder: Path, *more: str) -> list[str]:
    folders = ["--export-dir", str(folder / "export"), "--engines-dir", str(folder / "engines")]
    return [*folders, "--batch", "2", "--duration", str(DURATION), *more]


def test_pytorch_is_the_baseline_and_every_file_has_a_row(artifacts: list[Artifact]) -> None:
    request = BenchRequest(batches=(1, 4), duration=DURATION, compare=("torch",))
    result = bench_artifacts(artifacts, request)
    names = [(row.name, row.batch) for row in result.rows if row.backend != "tensorrt-rtx"]
    files = ["torch eager fp32", "atto-32-fp16.onnx", "atto-32-fp32.onnx"]
    assert names == [(name, batch) for batch in (1, 4) for name in files]
    for row in result.rows:
        assert row.status != "INVALID"
        assert (row.speedup is None) == (row.name == "torch eager fp32")
        assert row.images_per_second == pytest.approx(row.batch * 1000 / row.median_ms)


def test_a_batch_outside_the_exported_range_is_said_and_not_timed(artifacts: list[Artifact]) -> None:
    result = bench_artifacts(artifacts, BenchRequest(batches=(8,), duration=DURATION))
    assert result.rows == ()
    reasons = {missing.name: missing.reason for missing in result.not_run if missing.name.endswith(".onnx")}
    expected = "a batch of 8 is outside its range of 1 to 4"
    assert reasons == {"atto-32-fp16.onnx": expected, "atto-32-fp32.onnx": expected}


@pytest.mark.skipif(bool(find_gpus()), reason="a GPU is here: engines run")
def test_an_engine_without_a_gpu_shows_its_kernels_and_that_it_was_not_run(
    folder: Path, artifacts: list[Artifact]
) -> None:
    compiled = next(a for a in artifacts if a.manifest.kind == "engine").manifest.facts["compiled"]
    (missing,) = bench_artifacts(artifacts, BenchRequest(batches=(1,), duration=DURATION)).not_run
    assert (missing.kernels, missing.batch) == (compiled["kernels"], 4)
    printed = CliRunner().invoke(bench, words(folder)).output
    assert f"{compiled['kernels']} kernels" in printed
    assert "latency: not run (no GPU)" in printed


def test_csv_begins_with_timms_columns(folder: Path) -> None:
    result = CliRunner().invoke(bench, words(folder, "--csv"))
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert list(rows[0])[:7] == [
        "model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "param_count",
        "infer_gmacs",
    ]  # fmt: skip
    assert {row["param_count"] for row in rows} == {"3.71"}


def test_json_is_one_document_with_versions_and_hashes(folder: Path) -> None:
    document = json.loads(CliRunner().invoke(bench, words(folder, "--json")).stdout)
    assert document["environment"]["tools"]["torch"]
    assert len(document["models"]["atto-32-fp32.onnx"]["sha256"]) == 64
    assert {row["name"] for row in document["rows"]} >= {"atto-32-fp16.onnx", "atto-32-fp32.onnx"}


def test_a_file_whose_timed_logits_are_wrong_is_invalid_and_fails_the_command(folder: Path, tmp_path: Path) -> None:
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


@pytest.mark.skipif(bool(find_gpus()), reason="a GPU is here: engines run")
def test_an_engine_that_is_named_without_a_gpu_is_an_error(folder: Path) -> None:
    result = CliRunner().invoke(bench, [str(folder / "engines" / "atto-32-fp16-rtx-sm89.engine")])
    assert isinstance(result.exception, MissingRequirementError)
