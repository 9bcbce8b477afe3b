"""The baseline of `bench --gate`: what it may say, what each lie in it is called, and the gate over any of them."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnx_deploy.bench import run as bench_run
from cnx_deploy.bench.comparison import Benchmark
from cnx_deploy.bench.conditions import conditions_now
from cnx_deploy.bench.gate import Document, judge_against, read_baseline, refuse_incomparable
from cnx_deploy.bench.plan import Plan
from cnx_deploy.bench.report import plan_document
from cnx_deploy.bench.statistics import Ratio
from cnx_deploy.cli.options import _finite
from cnx_deploy.core import artifacts as recorded
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.manifest import Artifact, manifest_from_json
from tests.support.bench_rows import row
from tests.support.html_documents import PEER, benchmark
from tests.support.lies import (
    FEW,
    LONG,
    ODD_JSON,
    QUICK,
    check_command,
    documents,
    placed,
    put,
    refused,
    result_or_error,
)

ROOT = Path(__file__).parents[2]
ONNX = ROOT / "export" / "atto-224-fp32.json"
COMMITTED = ROOT / "docs" / "data" / "cpu.json"
SOUND: dict[str, Any] = json.loads(json.dumps(_finite(benchmark())))
NETWORK = "atto-32"
ANYTHING = documents(SOUND)


def written(folder: Path, document: Any) -> Path:
    return put(folder / "baseline.json", json.dumps(document).encode())


def test_what_bench_writes_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_baseline(written(tmp_path, SOUND)) == SOUND
    assert [verdict.verdict for verdict in judge_against(SOUND, SOUND, 0.05)] == ["ok", "undecided"]


def test_the_committed_benchmark_is_a_baseline() -> None:
    found = read_baseline(COMMITTED)
    assert found == json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert {verdict.verdict for verdict in judge_against(found, found, 0.05)} <= {"ok", "undecided"}


LIES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("environment",), None, "environment: Expected object, got null"),
    (("environment", "machine"), [], "environment.machine: Expected object, got array"),
    (("environment", "machine", "cpu"), 1, "environment.machine.cpu: Expected str, got int"),
    (("environment", "machine", "threads"), "2", "environment.machine.threads: Expected int, got str"),
    (("environment", "machine", "processors"), 0, "environment.machine.processors: Expected int >= 1"),
    (("environment", "machine", "gpus"), "L4", "environment.machine.gpus: Expected array, got str"),
    (("environment", "machine", "gpus"), [1], "environment.machine.gpus[0]: Expected str, got int"),
    (("networks",), [], "networks: Expected object, got array"),
    (("networks", NETWORK), [], "networks[...]: Expected object, got array"),
    (("networks", NETWORK, "variant"), None, "networks[...].variant: Expected str, got null"),
    (("networks", NETWORK, "image_size"), 1.5, "networks[...].image_size: Expected int, got float"),
    (("networks", NETWORK, "num_classes"), 10**400, "networks[...].num_classes: Expected int <= 2147483648"),
    (("networks", NETWORK, "files"), ["a.onnx"], "networks[...].files: Expected object, got array"),
    (("networks", NETWORK, "files"), {"a.onnx": 1}, "networks[...].files[...]: Expected object, got int"),
    (("networks", NETWORK, "files"), {}, "rows: there is none of a file, only of peers or none at all"),
    (("networks",), {}, "rows[0].network: 'atto-32' is none of its networks"),
    (("rows",), {}, "rows: Expected array, got object"),
    (("rows",), [], "rows: there is none of a file, only of peers or none at all"),
    (("rows", 1), None, "rows[1]: Expected object, got null"),
    (("rows", 1, "name"), 7, "rows[1].name: Expected str, got int"),
    (("rows", 1, "network"), "other", "rows[1].network: 'other' is none of its networks"),
    (("rows", 1, "network"), "x" * 9000, "rows[1].network: 'xxxxxxxx"),
    (("rows", 1, "batch"), True, "rows[1].batch: Expected int, got bool"),
    (("rows", 1, "batch"), 0, "rows[1].batch: Expected int >= 1"),
    (("rows", 1, "status"), "FINE", "rows[1].status: Invalid enum value 'FINE'"),
    (("rows", 1, "images_per_second"), "9", "rows[1].images_per_second: Expected float, got str"),
    (("rows", 1, "images_per_second"), 0, "rows[1].images_per_second: Expected float >= 1e-150"),
    (("rows", 1, "images_per_second"), None, "rows[1].images_per_second: Expected float, got null"),
    (("rows", 1, "version"), 1.25, "rows[1].version: Expected str, got float"),
    (("rows", 1, "ratios"), None, "rows[1].ratios: Expected array, got null"),
    (("rows", 1, "ratios", 0, "peer"), [], "rows[1].ratios[0].peer: Expected str, got array"),
    (("rows", 1, "ratios", 0, "ratio"), -1.0, "rows[1].ratios[0].ratio: Expected float >= 1e-150"),
    (("rows", 1, "ratios", 0, "ratio"), 1e200, "rows[1].ratios[0].ratio: Expected float <= 1e+150"),
    (("schema_version",), 1, "it has schema version 1, expected 3"),
    (("schema_version",), 2.5, "it has schema version 2.5, expected 3"),
    (("schema_version",), None, "it has schema version null, expected 3"),
    (("dry_run",), "not measured", "it is a plan (--dry-run) that measured nothing"),
]


@pytest.mark.parametrize(("place", "lie", "reason"), LIES, ids=[reason[:50] for _, _, reason in LIES])
def test_a_lie_is_named_by_its_field(tmp_path: Path, place: tuple[Any, ...], lie: Any, reason: str) -> None:
    path = written(tmp_path, placed(SOUND, place, lie))
    said = refused(lambda: read_baseline(path), InputError, f"{path} is no benchmark: {reason}")
    assert said.endswith("Give what `cnx-deploy bench --json` printed.")
    assert len(said) < 500


@pytest.mark.parametrize("field", ["name", "network", "batch", "status", "version", "images_per_second", "ratios"])
def test_a_missing_field_of_a_row_is_named(tmp_path: Path, field: str) -> None:
    document = copy.deepcopy(SOUND)
    del document["rows"][1][field]
    path = written(tmp_path, document)
    refused(lambda: read_baseline(path), InputError, f"rows[1]: Object missing required field {field}")


def test_a_plan_is_called_one(tmp_path: Path) -> None:
    plan = plan_document(Plan((), {}, ()), conditions_now(threads=1, duration_seconds=1.0, seed=0))
    path = written(tmp_path, plan)
    said = refused(lambda: read_baseline(path), InputError, "it is a plan (--dry-run) that measured nothing")
    assert "expected 3" not in said


@pytest.mark.parametrize("name", ODD_JSON)
def test_what_is_no_document_is_wrong_input(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / "baseline.json", ODD_JSON[name])
    refused(lambda: read_baseline(path), InputError, "cannot be read as JSON (", "Give what `cnx-deploy bench --json`")


def check_gate(folder: Path, content: bytes) -> Document | None:
    """Whatever is taken for a baseline can be judged against, on this machine and another."""
    path = put(folder / "fuzzed.json", content)
    baseline: Document | None = result_or_error(lambda: read_baseline(path), InputError)
    if baseline is not None:
        for machine in (SOUND["environment"]["machine"], {"cpu": "other", "processors": 1, "threads": 1, "gpus": []}):
            result_or_error(lambda machine=machine: refuse_incomparable(baseline, machine, [PEER]), InputError)
        verdicts = result_or_error(lambda: judge_against(baseline, SOUND, 0.05), InputError)
        assert verdicts is None or {each.verdict for each in verdicts} <= {"ok", "regression", "undecided"}
    return baseline


@QUICK
@given(content=ANYTHING)
def test_fuzz_a_baseline_can_be_judged_against_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    check_gate(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@LONG
@given(content=ANYTHING)
def test_fuzz_a_baseline_at_length(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_gate(tmp_path_factory.getbasetemp(), content)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """`bench --gate` over a recorded file with rows that are there already: measuring takes seconds, reads nothing."""
    rows = (row(1, 100.0, name=PEER), row(1, 125.0, name="atto.onnx", ratios=(Ratio(PEER, 1.25, 1.2, 1.31),)))
    facts = {**SOUND["networks"][NETWORK], "parameters": 1, "gmacs": 1.0}
    nothing = {"fp32_layers": None, "tensors_by_type": {}, "sha256": "a" * 64, "precision": "fp32"}
    facts["files"] = {"atto.onnx": nothing}
    found = Benchmark(tuple(replace(each, network=NETWORK) for each in rows), (), {NETWORK: facts})
    monkeypatch.setattr(bench_run, "bench_artifacts", lambda *_: found)
    artifact = Artifact(ONNX.with_suffix(".onnx"), manifest_from_json(ONNX.read_bytes()))
    monkeypatch.setattr(recorded, "select_artifacts", lambda *_: [artifact])
    words = ("bench", "--compare", "timm", "--gate")
    return lambda path: check_command(*words, path, allowed=frozenset({0, 2, 3}))


def test_the_command_takes_a_sound_baseline_and_refuses_a_plan(measured: Callable[[Path], int], tmp_path: Path) -> None:
    assert measured(written(tmp_path, SOUND)) == 0
    assert measured(written(tmp_path, {**SOUND, "dry_run": "not measured"})) == 2
    assert measured(tmp_path / "none.json") == 2


def fuzz_command(measured: Callable[[Path], int], folder: Path, data: st.DataObject) -> None:
    measured(put(folder / "baseline.json", data.draw(ANYTHING)))


@FEW
@given(data=st.data())
def test_fuzz_the_command(measured: Callable[[Path], int], tmp_path: Path, data: st.DataObject) -> None:
    fuzz_command(measured, tmp_path, data)


@pytest.mark.slow
@LONG
@given(data=st.data())
def test_fuzz_the_command_at_length(measured: Callable[[Path], int], tmp_path: Path, data: st.DataObject) -> None:
    fuzz_command(measured, tmp_path, data)
