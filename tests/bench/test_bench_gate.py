"""The gate against an earlier benchmark: what fails, what passes, what it will not judge."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.bench.gate import judge_against, read_baseline, refuse_incomparable
from cnx_deploy.core.errors import InputError

MACHINE = {"cpu": "Epyc", "processors": 2, "threads": 2, "gpus": []}
NETWORK = {"variant": "atto", "image_size": 224, "num_classes": 1000, "input": "float32 NCHW", "files": {"a.onnx": {}}}


def line(name: str, batch: int, speed: float, ratio: float | None = None, status: str = "OK") -> dict[str, Any]:
    ratios = [] if ratio is None else [{"peer": "torch", "ratio": ratio, "low": ratio, "high": ratio}]
    common = {"name": name, "network": "atto", "batch": batch, "status": status, "version": "1"}
    return {**common, "images_per_second": speed, "ratios": ratios}


def run_of(*rows: dict[str, Any], machine: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "schema_version": 3,
        "environment": {"machine": machine or MACHINE},
        "networks": {"atto": deepcopy(NETWORK)},
        "rows": list(rows),
    }


@pytest.mark.parametrize(("now", "verdict"), [(1.0, "ok"), (0.951, "ok"), (0.949, "regression"), (2.0, "ok")])
def test_a_ratio_may_fall_by_what_is_allowed_and_no_more(now: float, verdict: str) -> None:
    before, after = run_of(line("a.onnx", 1, 10.0, 4.0)), run_of(line("a.onnx", 1, 10.0, 4.0 * now))
    (found,) = judge_against(before, after, 0.05)
    assert (found.verdict, found.measure, found.change) == (verdict, "ratio to torch", pytest.approx(now))


def test_a_slower_machine_slows_both_and_is_no_regression() -> None:
    other = {**MACHINE, "cpu": "Atom"}
    before, after = run_of(line("a.onnx", 1, 100.0, 4.0)), run_of(line("a.onnx", 1, 10.0, 4.0), machine=other)
    assert [found.verdict for found in judge_against(before, after, 0.05)] == ["ok"]


@pytest.mark.parametrize(("speed", "verdict"), [(96.0, "ok"), (94.0, "regression")])
def test_without_a_peer_images_a_second_are_compared_on_the_same_machine(speed: float, verdict: str) -> None:
    (found,) = judge_against(run_of(line("a.onnx", 1, 100.0)), run_of(line("a.onnx", 1, speed)), 0.05)
    assert (found.verdict, found.measure) == (verdict, "images/s")


@pytest.mark.parametrize("difference", [{"cpu": "Atom"}, {"processors": 4}, {"threads": 1}, {"gpus": ["L4"]}])
def test_without_a_peer_another_machine_is_refused(difference: dict[str, Any]) -> None:
    before = run_of(line("a.onnx", 1, 100.0))
    after = run_of(line("a.onnx", 1, 100.0), machine={**MACHINE, **difference})
    with pytest.raises(InputError, match="different machines"):
        judge_against(before, after, 0.05)
    with pytest.raises(InputError, match="different machines"):
        refuse_incomparable(before, {**MACHINE, **difference}, ["torch"])


def test_a_peer_that_only_one_run_has_is_no_common_one() -> None:
    baseline = run_of(line("a.onnx", 1, 100.0, 4.0))
    refuse_incomparable(baseline, {**MACHINE, "cpu": "Atom"}, ["torch"])
    with pytest.raises(InputError, match="Epyc with 2 threads; Atom with 2 threads"):
        refuse_incomparable(baseline, {**MACHINE, "cpu": "Atom"}, ["timm"])


@pytest.mark.parametrize("status", ["UNSTABLE", "INVALID"])
@pytest.mark.parametrize("when", ["in the baseline", "now"])
def test_a_row_that_is_not_ok_is_undecided_however_fast(status: str, when: str) -> None:
    marked, steady = run_of(line("a.onnx", 1, 1.0, 1.0, status)), run_of(line("a.onnx", 1, 9.0, 9.0))
    pair = (marked, steady) if when == "in the baseline" else (steady, marked)
    (found,) = judge_against(*pair, 0.05)
    assert (found.verdict, found.reason, found.change) == ("undecided", f"it is {status} {when}", None)


def test_a_row_that_is_gone_or_another_network_is_undecided() -> None:
    baseline = run_of(line("a.onnx", 1, 10.0, 4.0), line("a.onnx", 8, 10.0, 4.0))
    after = run_of(line("a.onnx", 8, 10.0, 4.0))
    after["networks"]["atto"]["image_size"] = 384
    reasons = [found.reason for found in judge_against(baseline, after, 0.05)]
    assert reasons == ["it was not measured now", "another network: image_size differ"]


def test_peers_are_not_judged() -> None:
    before, after = run_of(line("torch", 1, 100.0)), run_of(line("torch", 1, 1.0))
    assert judge_against(before, after, 0.05) == []


def test_a_peer_of_another_release_is_named_with_both() -> None:
    rows = (line("torch", 1, 1.0), line("a.onnx", 1, 10.0, 4.0))
    before, after = run_of(*deepcopy(rows)), run_of(*deepcopy(rows))
    assert judge_against(before, after, 0.05)[0].measure == "ratio to torch"
    after["rows"][0]["version"] = "2"
    assert judge_against(before, after, 0.05)[0].measure == "ratio to torch (2, was 1)"


def test_a_ratio_to_another_of_our_files_is_not_used() -> None:
    """Both would get slower together and the ratio would hide it."""
    before, after = run_of(line("a.onnx", 1, 100.0, 2.0)), run_of(line("a.onnx", 1, 50.0, 2.0))
    for document in (before, after):
        document["networks"]["atto"]["files"]["torch"] = {}
    (found,) = judge_against(before, after, 0.05)
    assert (found.verdict, found.measure) == ("regression", "images/s")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1, "rows": []}', '{"schema_version": 3}'])
def test_what_is_no_benchmark_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"baseline\.json"):
        read_baseline(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json cannot be read as JSON"):
        read_baseline(tmp_path / "none.json")


def test_a_benchmark_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(run_of(line("a.onnx", 1, 10.0, 4.0))), encoding="utf-8")
    assert read_baseline(path) == run_of(line("a.onnx", 1, 10.0, 4.0))
