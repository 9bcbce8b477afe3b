"""The gate against an earlier benchmark: what fails, what passes, what it will not judge."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from cnx_deploy.bench.gate import failures, judge_against
from cnx_deploy.bench.record import BenchmarkRecord, Ratio, Timing
from cnx_deploy.cli import cli
from cnx_deploy.core.errors import CheckFailedError, InputError
from tests.support.bench_rows import NETWORK, QUIET, network_of, record_of, row
from tests.support.lies import check_command


def line(speed: float, ratio: float | None = None, *, name: str = "atto.onnx", batch: int = 1, **values: str) -> Timing:
    ratios = () if ratio is None else (Ratio("torch", ratio, ratio, ratio),)
    return row(batch, speed, name=name, ratios=ratios, **values)


def run_of(*rows: Timing, cpu: str = "Epyc", threads: int = 4) -> BenchmarkRecord:
    return record_of(*rows, environment=replace(QUIET, cpu=cpu, threads=threads))


@pytest.mark.parametrize(("now", "verdict"), [(1.0, "ok"), (0.951, "ok"), (0.949, "regression"), (2.0, "ok")])
def test_a_ratio_may_fall_by_what_is_allowed_and_no_more(now: float, verdict: str) -> None:
    (found,) = judge_against(run_of(line(10.0, 4.0)), run_of(line(10.0, 4.0 * now)), 0.05)
    assert (found.verdict, found.measure, found.change) == (verdict, "ratio to torch", pytest.approx(now))


def test_a_slower_machine_slows_both_and_is_no_regression() -> None:
    before, after = run_of(line(100.0, 4.0)), run_of(line(10.0, 4.0), cpu="Atom")
    assert [found.verdict for found in judge_against(before, after)] == ["ok"]


@pytest.mark.parametrize(("speed", "verdict"), [(96.0, "ok"), (94.0, "regression")])
def test_without_a_peer_images_a_second_are_compared_on_the_same_machine(speed: float, verdict: str) -> None:
    (found,) = judge_against(run_of(line(100.0)), run_of(line(speed)))
    assert (found.verdict, found.measure) == (verdict, "images/s")


@pytest.mark.parametrize("difference", [{"cpu": "Atom"}, {"threads": 1}])
def test_without_a_common_peer_another_machine_is_refused(difference: dict[str, object]) -> None:
    before, after = run_of(line(100.0, 4.0)), run_of(line(100.0), **difference)
    with pytest.raises(InputError, match=r"different machines \(Epyc with 4 threads"):
        judge_against(before, after)


@pytest.mark.parametrize("status", ["UNSTABLE", "INVALID"])
@pytest.mark.parametrize("when", ["in the baseline", "now"])
def test_a_row_that_is_not_ok_is_undecided_however_fast(status: str, when: str) -> None:
    marked, steady = run_of(line(1.0, 1.0, status=status)), run_of(line(9.0, 9.0))
    pair = (marked, steady) if when == "in the baseline" else (steady, marked)
    (found,) = judge_against(*pair)
    assert (found.verdict, found.reason, found.change) == ("undecided", f"it is {status} {when}", None)
    assert failures([found]) == ("Nothing of the baseline could be judged; measure longer, or on a quieter machine.",)


def test_a_row_that_is_gone_or_another_network_is_undecided() -> None:
    baseline = run_of(line(10.0, 4.0), line(10.0, 4.0, batch=8))
    after = replace(run_of(line(10.0, 4.0, batch=8)), networks={NETWORK: network_of("atto.onnx", image_size=384)})
    reasons = [found.reason for found in judge_against(baseline, after)]
    assert reasons == ["it was not measured now", "another network: image_size differ"]


def test_peers_are_not_judged_and_a_baseline_of_peers_alone_is_refused() -> None:
    peer = line(100.0, name="torch")
    slower = run_of(replace(peer, images_per_second=1.0), line(10.0, 4.0))
    assert [found.name for found in judge_against(run_of(peer, line(10.0, 4.0)), slower)] == ["atto.onnx"]
    with pytest.raises(InputError, match="no row of a file"):
        judge_against(run_of(peer), slower)


def test_a_peer_of_another_release_is_named_with_both() -> None:
    before = run_of(line(1.0, name="torch"), line(10.0, 4.0))
    after = run_of(line(1.0, name="torch", version="2"), line(10.0, 4.0))
    assert judge_against(before, before)[0].measure == "ratio to torch"
    assert judge_against(before, after)[0].measure == "ratio to torch (2, was 1)"


def test_a_ratio_to_another_of_our_files_is_not_used() -> None:
    """Both would get slower together and the ratio would hide it."""
    networks = {NETWORK: network_of("atto.onnx", "torch")}
    before, after = (replace(run_of(line(speed, 2.0)), networks=networks) for speed in (100.0, 50.0))
    (found,) = judge_against(before, after)
    assert (found.verdict, found.measure) == ("regression", "images/s")


def written(path: Path, record: BenchmarkRecord) -> str:
    path.write_text(json.dumps(record.to_document()), encoding="utf-8")
    return str(path)


def test_the_command_fails_for_a_regression_and_names_it(tmp_path: Path) -> None:
    base = written(tmp_path / "base.json", run_of(line(10.0, 4.0), line(10.0, 4.0, batch=8)))
    now = written(tmp_path / "now.json", run_of(line(10.0, 3.0), line(10.0, 4.0, batch=8)))
    result = CliRunner().invoke(cli, ["bench", "gate", base, now])
    assert isinstance(result.exception, CheckFailedError)
    assert "atto.onnx batch 1 slower than the baseline allows" in str(result.exception)
    assert "gate: atto.onnx batch 1: regression, ratio to torch 4 -> 3 (-25.0%)" in result.stdout
    assert "gate: atto.onnx batch 8: ok" in result.stdout
    allowed = CliRunner().invoke(cli, ["bench", "gate", base, now, "--max-regress", "30%", "--json"])
    assert allowed.exit_code == 0, allowed.output
    assert [verdict["verdict"] for verdict in json.loads(allowed.stdout)["gate"]] == ["ok", "ok"]


def test_what_is_no_benchmark_is_wrong_input_to_the_command(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text("{}", encoding="utf-8")
    assert check_command("bench", "gate", path, path, allowed=frozenset({2})) == 2
    assert check_command("bench", "gate", tmp_path / "none.json", path, allowed=frozenset({2})) == 2
