"""The HTML page of what other commands printed: benchmark, headroom, layers; and documents that it refuses."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.bench.record import Plan, Ratio
from cnx_deploy.cli import main
from cnx_deploy.diagnosis import headroom as analysis
from cnx_deploy.report.html import headroom as reader
from tests.support.bench_rows import QUIET
from tests.support.html_documents import PEER, benchmark, headroom, layers, written
from tests.support.html_page import ROOT, Node, page_of, parsed, put, rows, section


@pytest.fixture
def bench_page(tmp_path: Path) -> Node:
    return parsed(page_of(tmp_path, bench=(written(tmp_path / "bench.json", benchmark()),)))


# --- benchmark --------------------------------------------------------------------------------------------------------


def test_speeds_and_ratios_are_the_documents_own(bench_page: Node) -> None:
    table = rows(section(bench_page, "benchmark").one("table"))
    own = table["atto.onnx"]
    assert own.values == [125.0, 8.0, 8.0, 8.0, 0.0, 1.25]
    assert own.all("td")[-2].text == "1.25 (1.20–1.31)"
    assert table[PEER].all("td")[-2].text == "–"
    assert own.one("th", class_="own").text == "atto.onnx"


def test_the_committed_benchmark_is_shown_row_by_row() -> None:
    path = ROOT / "docs" / "data" / "cpu.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    shown = section(parsed(page_of(Path("nowhere"), bench=(path,))), "benchmark")
    speeds = [row.values[0] for table in shown.all("table") for row in table.one("tbody").all("tr")]
    wanted = sorted(found["rows"], key=lambda each: list(found["networks"]).index(each["network"]))
    assert speeds == [each["images_per_second"] for each in wanted]
    assert len(shown.all("figure")) == len(found["networks"])


def test_an_invalid_row_has_no_speed_no_ratio_and_no_mark(bench_page: Node) -> None:
    shown = section(bench_page, "benchmark")
    wrong = rows(shown.one("table"))["wrong.onnx"]
    assert wrong.values == [0.5]
    assert wrong.all("td")[-1].text == "INVALID 2"
    assert [item.text for item in shown.one("ol").all("li")] == ["medians of 9, 12 ms", "relative L2 0.5, gate 1e-05"]
    (drawn,) = [svg for svg in shown.all("svg", role="img") if "wrong.onnx" in svg.attributes["aria-label"]]
    assert drawn.attributes["aria-label"] == "wrong.onnx, batch 1: INVALID"
    assert not drawn.all("circle")
    assert "999" not in shown.text
    assert "9.99" not in shown.text


def test_an_unstable_row_says_so_and_its_mark_is_hollow(bench_page: Node) -> None:
    shown = section(bench_page, "benchmark")
    assert rows(shown.one("table"))["torch eager fp32"].all("td")[-1].text == "UNSTABLE 1"
    (drawn,) = [svg for svg in shown.all("svg", role="img") if "torch eager" in svg.attributes["aria-label"]]
    assert drawn.attributes["aria-label"].endswith("0.90, 95 % interval 0.50 to 1.40, UNSTABLE")
    assert drawn.one("path", class_="hollow").tag == "path"


def test_conditions_doubts_and_what_was_not_timed_are_told(bench_page: Node) -> None:
    shown = section(bench_page, "benchmark").text
    assert "doubt others are working" in shown
    assert "3 s a row, images of seed 0" in shown
    missing = section(bench_page, "not-run").text
    assert "1 candidate was not timed in bench.json. The reason given: no GPU." in missing
    assert "Nothing was timed" not in missing


def test_an_engine_with_a_row_counts_as_run(tmp_path: Path) -> None:
    put(tmp_path, "atto-224-fp16-rtx-sm89", kind="engines")
    put(tmp_path, "pico-224-fp16-rtx-sm89", kind="engines")
    timed = benchmark("atto-224-fp16-rtx-sm89.engine")
    page = parsed(page_of(tmp_path, bench=(written(tmp_path / "b.json", timed),)))
    assert "1 of 2 1 was not run on a GPU" in page.one("dl", class_="tiles").text
    table = rows(section(page, "engines").all("table")[0])
    runs = {stem: each.all("td")[-1].text for stem, each in table.items()}
    unrun = "not run: built ahead of time"
    assert runs == {"atto-224-fp16-rtx-sm89": "timed, see Benchmark", "pico-224-fp16-rtx-sm89": unrun}
    assert section(page, "chains").text.count(unrun) == 1
    assert section(page, "not-run").all("li")[0].text.startswith("1 engine was not run on a GPU.")


# --- headroom ---------------------------------------------------------------------------------------------------------


def test_headroom_figures_are_the_documents_own(tmp_path: Path) -> None:
    page = parsed(page_of(tmp_path, headroom=(written(tmp_path / "h.json", headroom().to_dict()),)))
    shown = section(page, "headroom")
    first = rows(shown.one("table"))["stage 1"]
    assert first.values == [100.0, 100 / 65504, 57600.0, 57600 / 65504, 8.0, 64 / 65504]
    assert "keeps the margin" in shown.one("h3").text
    assert "would lack the margin in 1 statistic: stages.0.0.grn." in shown.text
    assert "Headroom was not measured on a GPU" in section(page, "not-run").text


@pytest.mark.parametrize(("largest", "shown_as"), [(40_000.0, "40,000.00"), (math.nan, "not finite")])
def test_a_network_without_the_margin_fails_and_names_what_to_keep(
    tmp_path: Path, largest: float, shown_as: str
) -> None:
    page = parsed(page_of(tmp_path, headroom=(written(tmp_path / "h.json", headroom(largest=largest).to_dict()),)))
    shown = section(page, "headroom")
    assert "FAIL" in shown.one("h3").text
    assert "without the margin stages.0.0.dwconv" in shown.text
    assert shown_as in rows(shown.one("table"))["stage 1"].text


def test_the_reader_knows_the_schema_of_headroom() -> None:
    assert reader.SCHEMA_VERSION == analysis.SCHEMA_VERSION


# --- layers -----------------------------------------------------------------------------------------------------------


def test_the_largest_of_a_block_is_shown_for_each_side(tmp_path: Path) -> None:
    page = parsed(page_of(tmp_path, layers=(written(tmp_path / "l.json", layers(0.3, "fails")),)))
    shown = section(page, "layers")
    assert rows(shown.one("table"))["stages.0.0"].values == [1e-4, 0.3]
    assert "first divergence stages.0.0.grn on emulator: fails" in shown.text
    assert "not run tensorrt: no GPU here" in shown.text
    assert "emulator: 1 of 2 modules within 0.015" in shown.text
    assert "was not compared by layer on tensorrt" in section(page, "not-run").text


def test_a_block_that_is_not_finite_has_no_figure(tmp_path: Path) -> None:
    page = parsed(page_of(tmp_path, layers=(written(tmp_path / "l.json", layers(math.nan, "not finite")),)))
    shown = section(page, "layers")
    assert rows(shown.one("table"))["stages.0.0"].all("td")[-1].text == "not finite"
    assert [svg.attributes["aria-label"] for svg in shown.all("svg", role="img")] == [
        "stages.0.0: PyTorch in half 1.0e-04, emulator: not finite"
    ]


def test_without_a_comparison_by_layer_there_is_no_such_section(bench_page: Node) -> None:
    assert not [node for node in bench_page.all("section") if node.attributes["aria-labelledby"] == "layers"]


# --- what is refused --------------------------------------------------------------------------------------------------


def _plan() -> dict[str, Any]:
    return Plan(environment=QUIET, networks={}, planned=(), roofline=()).to_document()


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in benchmark().items() if name != key}


def _renamed() -> dict[str, Any]:
    document = benchmark()
    document["rows"][0]["latency"] = asdict(Ratio("x", 1, 1, 1))
    return document


@pytest.mark.parametrize(
    ("option", "make", "message"),
    [
        ("--bench", _plan, "it is a plan, which measured nothing"),
        ("--bench", lambda: {**benchmark(), "schema_version": 1}, "it has schema version 1, expected 3"),
        ("--bench", lambda: _without("rows"), "it: Object missing required field rows"),
        ("--bench", _renamed, "rows[0].latency: Object missing required field"),
        ("--bench", lambda: {"error": "InputError", "message": "no such file", "exit_code": 2}, "'no such file'"),
        ("--bench", list, "the document is a list, expected an object"),
        ("--headroom", benchmark, "it has schema version 3, expected 1"),
        ("--headroom", lambda: {"schema_version": True}, "schema_version is true or false, expected a whole number"),
        ("--layers", benchmark, "layers is missing"),
        ("--layers", lambda: layers(0.3, "odd"), "a verdict is 'odd', expected one of ok, jumps"),
    ],
)  # fmt: skip
def test_a_document_of_something_else_is_wrong_input_and_no_page_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, make: Callable[[], Any], message: str
) -> None:
    given, target = written(tmp_path / "given.json", make()), tmp_path / "report.html"
    with pytest.raises(SystemExit) as stop:
        main(["report", "--html", str(target), option, str(given)])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    assert message in printed.err
    assert f"Error: {given} " in printed.err
    assert "Give what `cnx-deploy " in printed.err
    assert not target.exists()


def test_a_document_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", "--html", str(tmp_path / "a.html"), "--bench", str(tmp_path / "none.json")])
    assert stop.value.code == 2
    assert f"{tmp_path / 'none.json'} cannot be read as JSON" in capsys.readouterr().err
