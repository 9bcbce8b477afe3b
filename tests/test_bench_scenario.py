"""Runners under LoadGen's load: what is VALID, what is not and why, and what the command says of it."""

import json
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from cnx_deploy.artifacts import Artifact, open_artifact, sha256_of_file
from cnx_deploy.bench import scenario as bench_scenario
from cnx_deploy.bench.candidate import Candidate
from cnx_deploy.bench.comparison import BenchRequest
from cnx_deploy.bench.scenario import run_scenario
from cnx_deploy.bench.under_load import ScenarioRequest, ScenarioRow, measure_under_load
from cnx_deploy.cli import main
from cnx_deploy.cli.bench import bench
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.errors import CheckFailedError, InputError, MissingRequirementError
from cnx_deploy.model.checkpoint import hash_weights
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import DeploySpec
from cnx_deploy.parity import GATES
from cnx_deploy.runners.base import HoldsNothing
from cnx_deploy.runners.pytorch import TorchRunner, reference_runner
from cnx_deploy.variants import VARIANTS, Variant
from tests.known_speed import KnownSpeed

PIXELS = next(image_like_batches(64, 32, batch_size=64))
LOGITS = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


@dataclass
class Slow(HoldsNothing, KnownSpeed):
    """A runner of known speed that answers the first rows of its logits; `sizes` are the batches of its calls."""

    sizes: list[int] = field(default_factory=list)

    def run(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return super().run(images)[: len(images)]


def slow(milliseconds: float, logits: Tensor | None = None) -> Slow:
    """A call takes this long whatever its batch; every image has the same logits."""
    same = LOGITS[:1].repeat(64, 1) if logits is None else logits
    return Slow(lambda duration: time.sleep(duration / 1000), lambda index: milliseconds, same)


def under(
    runner: Slow, scenario: str, *, batch: int | None = None, seconds: float = 0.4, **values: float
) -> ScenarioRow:
    request = ScenarioRequest(scenario=scenario, bench=BenchRequest(duration=seconds), batch=batch, **values)
    expected = LOGITS[:1].repeat(64, 1)
    candidate = Candidate("double", runner, 0.0, None, GATES["fp32"])
    return measure_under_load(candidate, PIXELS, lambda indices: expected[indices], request)


def rises(*values: float | None) -> bool:
    """Whether none is missing and none is below the one before."""
    return None not in values and list(values) == sorted(value for value in values if value is not None)


# What LoadGen's verdict is about


def test_a_rate_that_leaves_room_is_valid() -> None:
    row = under(slow(1.0), "server", seconds=1.0, target_qps=800.0, slo_ms=500.0)
    assert (row.status, row.remarks, row.p99_within_slo) == ("VALID", (), True)
    assert row.images >= 500
    assert rises(1.0, row.latency_ms["p50"], row.latency_ms["p90"], row.latency_ms["p99"], 500.0)


def test_more_than_it_can_answer_is_invalid_and_ends_before_its_time() -> None:
    """2000 images a second arrive and at most 4 in 20 ms are answered."""
    row = under(slow(20.0), "server", batch=4, seconds=1.0, target_qps=2000.0, slo_ms=10.0)
    assert (row.status, row.p99_within_slo) == ("INVALID", False)
    assert any("queries took over 10 ms, more than 1 %" in remark for remark in row.remarks)
    assert any("fewer are answered than arrive" in remark for remark in row.remarks)
    assert row.images_per_second <= 200.0


def test_a_limit_that_is_missed_without_a_queue_is_invalid_for_that_reason() -> None:
    row = under(slow(20.0), "server", target_qps=60.0, slo_ms=5.0)
    assert (row.status, row.p99_within_slo) == ("INVALID", False)
    assert "more than 1 %" in row.remarks[0]
    assert not any("fewer are answered" in remark for remark in row.remarks)


def test_too_few_queries_for_a_verdict_are_invalid_and_carry_no_percentile() -> None:
    row = under(slow(20.0), "single-stream")
    assert (row.status, row.latency_ms["p90"], row.latency_ms["p99"]) == ("INVALID", None, None)
    assert "Need to process at least 64 queries" in row.remarks[0]


def test_a_server_answers_what_has_arrived_and_at_most_a_batch() -> None:
    crowded, quiet = slow(20.0), slow(1.0)
    row = under(crowded, "server", batch=4, target_qps=2000.0, slo_ms=10.0)
    assert max(crowded.sizes) == 4
    assert row.mean_batch > 3.0
    assert under(quiet, "server", batch=4, target_qps=20.0, slo_ms=100.0).mean_batch < 2.0


def test_a_single_stream_has_one_image_a_call_and_its_p90() -> None:
    runner = slow(1.0)
    row = under(runner, "single-stream")
    assert (row.status, row.mean_batch, set(runner.sizes)) == ("VALID", 1.0, {1})
    assert rises(1.0, row.latency_ms["p50"], row.latency_ms["p90"], row.p90_estimate_ms)


def test_offline_is_answered_in_whole_batches_and_has_no_latency() -> None:
    row = under(slow(5.0), "offline", batch=16)
    assert (row.status, row.latency_ms, row.p99_within_slo) == ("VALID", {}, None)
    assert 15.0 <= row.mean_batch <= 16.0
    assert row.images_per_second <= 16 / 0.005


@pytest.mark.slow
def test_offline_after_a_slow_warm_up_is_sent_enough_in_a_second_try() -> None:
    runner = slow(0.0)
    runner.milliseconds = lambda index: 100.0 if index < 9 else 20.0  # calls with 1, 2, 4 and 8 images, then five
    assert under(runner, "offline").status == "VALID"


# Whether the answers are right


def test_wrong_logits_under_load_are_invalid() -> None:
    right, wrong = under(slow(1.0), "single-stream"), under(slow(1.0, LOGITS[:1].repeat(64, 1) * 1.01), "single-stream")
    assert (right.status, right.correctness.calls, right.correctness.relative_l2) == ("VALID", 3, 0.0)
    assert (wrong.status, wrong.correctness.failures == wrong.remarks) == ("INVALID", True)
    assert "relative L2" in wrong.remarks[0]


class Shifted(TorchRunner):
    """Gives every image the logits of its neighbour in the batch."""

    def run(self, images: Tensor) -> Tensor:
        return super().run(images).roll(1, 0)


@pytest.mark.parametrize(("kind", "status"), [(TorchRunner, "VALID"), (Shifted, "INVALID")])
def test_every_answer_is_judged_against_its_own_image(tiny_model: ConvNeXtV2, kind: type, status: str) -> None:
    reference = reference_runner(tiny_model, DeploySpec(image_size=32))
    runner = kind(reference.module, reference.input_spec, reference.info)
    candidate = Candidate("tiny", runner, 0.0, None, GATES["fp32"])
    images = runner_input(PIXELS, "float")
    request = ScenarioRequest(scenario="offline", bench=BenchRequest(duration=0.3), batch=8)
    row = measure_under_load(candidate, PIXELS, lambda indices: reference.run(images[indices]), request)
    assert bool(row.correctness.failures) == (status == "INVALID")


# The request and the command


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scenario": "server", "slo_ms": 5.0}, "give both --target-qps and --slo-ms"),
        ({"scenario": "server", "target_qps": 5.0}, "give both --target-qps and --slo-ms"),
        ({"scenario": "offline", "slo_ms": 5.0}, "leave them out for offline"),
        ({"scenario": "single-stream", "batch": 2}, "leave out --batch 2"),
    ],
)
def test_a_request_that_does_not_fit_its_scenario_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScenarioRequest(bench=BenchRequest(), **values)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scenario", "offline", "--sweep"], "leave out --sweep"),
        (["--scenario", "offline", "--compare", "torch"], "leave out --compare"),
        (["--scenario", "offline", "--gate", "base.json"], "leave out --gate"),
        (["--scenario", "offline", "--csv"], "leave out --csv"),
        (["--scenario", "offline", "--max-batch", "8"], "--max-batch is read with --sweep"),
        (["--scenario", "offline", "--max-regress", "5%"], "--max-regress is read with --gate"),
        (["--max-batch", "8"], "--max-batch is read with --sweep"),
        (["--max-regress", "5%"], "--max-regress is read with --gate"),
        (["--scenario", "offline", "--dry-run"], "leave out --dry-run"),
        (["--scenario", "offline", "--batch", "1", "--batch", "2"], "takes one --batch"),
        (["--scenario", "offline", "--target-qps", "5"], "--target-qps is the rate of --scenario server"),
        (["--target-qps", "5"], "--target-qps is the rate of --scenario server"),
        (["--scenario", "multi-stream"], "'multi-stream' is not one of"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(words: list[str], message: str) -> None:
    result = CliRunner().invoke(bench, words)
    assert (result.exit_code, message in result.output) == (2, True), result.output


def test_without_loadgen_the_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--scenario", "offline"])
    assert stopped.value.code == 5
    assert "pip install 'cnx-deploy[loadgen]'" in capsys.readouterr().err


@pytest.fixture
def folder(
    tiny_onnx_fp32: Artifact,
    tiny_variant: Variant,
    tiny_model: ConvNeXtV2,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A copy of the smallest network's FP32 file as `export` would have recorded it."""
    monkeypatch.setitem(VARIANTS, tiny_variant.name, tiny_variant)
    shutil.copytree(tiny_onnx_fp32.path.parent, tmp_path / "export")
    manifest = tiny_onnx_fp32.manifest
    weights = replace(manifest.model.weights, sha256=hash_weights(tiny_model))
    recorded = replace(manifest, model=replace(manifest.model, weights=weights)).to_json()
    file_of(tmp_path).path.with_suffix(".json").write_text(recorded, encoding="utf-8")
    return tmp_path


def words(root: Path, *more: str) -> list[str]:
    return ["--export-dir", str(root / "export"), "--engines-dir", str(root / "none"), "--duration", "0.5", *more]


def file_of(root: Path) -> Artifact:
    (path,) = (root / "export").glob("*.onnx")
    return open_artifact(path)


def test_a_recorded_file_has_a_line_and_a_document(folder: Path) -> None:
    printed = CliRunner().invoke(bench, words(folder, "--scenario", "offline")).stdout
    assert "LoadGen, not an MLPerf submission: MLPerf itself asks for 600 s, this ran for 0.5 s" in printed
    assert "offline, batch 8: " in printed
    server = words(folder, "--scenario", "server", "--target-qps", "50", "--slo-ms", "1000", "--json", "--batch", "2")
    document = json.loads(CliRunner().invoke(bench, server).stdout)
    (row,) = document["scenario"].pop("rows")
    assert document["rows"] == []
    assert document["scenario"].pop("note").startswith("LoadGen, not an MLPerf submission")
    assert document["scenario"].pop("loadgen")
    assert document["scenario"] == {
        "scenario": "server", "duration_seconds": 0.5, "seed": 0, "library_images": 64, "target_qps": 50.0,
        "slo_ms": 1000.0,
    }  # fmt: skip
    assert (row["name"], row["batch"], row["runner"]["details"]["provider"]) == (
        file_of(folder).path.name, 2, "CPUExecutionProvider",
    )  # fmt: skip
    assert row["correctness"]["failures"] == []
    # Twenty-odd queries are too few for LoadGen to say anything of p99.
    assert (row["status"], row["latency_ms"]["p99"]) == ("INVALID", None)


@pytest.mark.slow
def test_a_file_with_another_weight_is_invalid_and_fails_the_command(folder: Path) -> None:
    """One class has another bias, under a manifest that vouches for it."""
    command = words(folder, "--scenario", "single-stream")
    assert CliRunner().invoke(bench, command).exit_code == 0
    right = file_of(folder)
    graph = onnx.load(right.path)
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name == graph.graph.node[-1].input[2])
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0] += 1.0
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(graph, right.path)
    record = replace(right.manifest.files[0], size_bytes=right.path.stat().st_size, sha256=sha256_of_file(right.path))
    right.path.with_suffix(".json").write_text(replace(right.manifest, files=(record,)).to_json(), encoding="utf-8")
    result = CliRunner().invoke(bench, command)
    assert isinstance(result.exception, CheckFailedError)
    assert result.exception.exit_code == 3
    assert "gave wrong logits under load" in str(result.exception)
    assert "INVALID" in result.stdout


def test_what_cannot_run_is_said_with_its_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ScenarioRequest(scenario="offline", bench=BenchRequest(duration=0.1), batch=9)
    report = run_scenario([file_of(folder)], request)
    assert report.rows == ()
    assert report.not_run[0].reason == "it takes 1 to 8 images a call, and the load comes in 1 to 9"

    def refuse(artifact: Artifact, **options: object) -> None:
        raise MissingRequirementError("nothing to run it on")

    monkeypatch.setattr(bench_scenario, "open_runner", refuse)
    report = run_scenario([file_of(folder)], request)
    assert f"{report.not_run[0].name:30} offline: not run (nothing to run it on)" in list(report.lines())
