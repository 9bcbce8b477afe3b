"""The record of a benchmark: what is written is read back, and each lie in a document is named by its field."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from cnx_deploy.bench.gate import judge_against
from cnx_deploy.bench.record import BenchmarkRecord, read_benchmark
from cnx_deploy.cli.options import _finite
from cnx_deploy.core.errors import InputError
from tests.support.html_documents import benchmark
from tests.support.lies import LONG, ODD_JSON, QUICK, documents, placed, put, refused, result_or_error

COMMITTED = Path(__file__).parents[2] / "docs" / "data" / "cpu.json"
SOUND: dict[str, Any] = json.loads(json.dumps(_finite(benchmark())))
CURRENT = BenchmarkRecord.from_document(SOUND)
ANYTHING = documents(SOUND)


def written(folder: Path, document: Any) -> Path:
    return put(folder / "baseline.json", json.dumps(document).encode())


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = read_benchmark(written(tmp_path, SOUND))
    assert json.loads(json.dumps(record.to_document())) == SOUND
    assert (record.baseline, record.is_file(record.rows[1]), record.is_file(record.rows[0])) == (
        "timm.onnx fp32", True, False,
    )  # fmt: skip


def test_the_committed_benchmark_of_schema_version_2_is_a_baseline_of_itself() -> None:
    record = read_benchmark(COMMITTED)
    assert (record.schema_version, len(record.networks), len(record.rows)) == (2, 4, 48)
    assert {verdict.verdict for verdict in judge_against(record, record)} <= {"ok", "undecided"}


LIES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("environment", "processors"), 0, "environment.processors: Expected int >= 1"),
    (("environment", "load_average"), "low", "environment.load_average: Expected float | null, got str"),
    (("environment", "tools", "torch"), None, "environment.tools[...]: Expected str, got null"),
    (("networks", "atto-32", "image_size"), 1.5, "networks[...].image_size: Expected int | array, got float"),
    (("networks", "atto-32", "num_classes"), 10**400, "networks[...].num_classes: Expected int <= 2147483648"),
    (("networks",), {}, "rows[0].network: 'atto-32' is none of its networks"),
    (("rows", 1, "network"), "x" * 9000, "rows[1].network: 'xxxxxxxx"),
    (("rows", 1, "batch"), True, "rows[1].batch: Expected int, got bool"),
    (("rows", 1, "status"), "FINE", "rows[1].status: Invalid enum value 'FINE'"),
    (("rows", 1, "images_per_second"), 0, "rows[1].images_per_second: Expected float >= 1e-150"),
    (("rows", 1, "latency", "cv_percent"), 1e308, "rows[1].latency.cv_percent: Expected float <= 1e+150"),
    (("rows", 1, "ratios", 0, "ratio"), -1.0, "rows[1].ratios[0].ratio: Expected float >= 1e-150"),
    (("rows", 1), {"name": "a"}, "rows[1]: Object missing required field"),
    (("schema_version",), 1, "it has schema version 1, expected 3"),
    (("planned",), [], "it is a plan, which measured nothing"),
]


@pytest.mark.parametrize(("place", "lie", "reason"), LIES, ids=[reason[:50] for _, _, reason in LIES])
def test_a_lie_is_named_by_its_field(tmp_path: Path, place: tuple[Any, ...], lie: Any, reason: str) -> None:
    path = written(tmp_path, placed(SOUND, place, lie))
    said = refused(lambda: read_benchmark(path), InputError, f"{path} is no benchmark: {reason}")
    assert len(said) < 500


@pytest.mark.parametrize("name", ODD_JSON)
def test_what_is_no_document_is_wrong_input(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / "baseline.json", ODD_JSON[name])
    refused(
        lambda: read_benchmark(path), InputError, "cannot be read as JSON (", "Expected what `cnx-deploy bench --json`"
    )


def check_record(folder: Path, content: bytes) -> None:
    """Whatever is read can be judged against, and can be written and read again."""
    path = put(folder / "fuzzed.json", content)
    record = result_or_error(lambda: read_benchmark(path), InputError)
    if record is not None:
        verdicts = result_or_error(lambda: judge_against(record, CURRENT), InputError)
        assert verdicts is None or {verdict.verdict for verdict in verdicts} <= {"ok", "regression", "undecided"}
        assert BenchmarkRecord.from_document(record.to_document()) == record


@QUICK
@given(content=ANYTHING)
def test_fuzz_a_document_is_a_record_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_record(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@LONG
@given(content=ANYTHING)
def test_fuzz_a_document_at_length(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_record(tmp_path_factory.getbasetemp(), content)
