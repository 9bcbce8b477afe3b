"""The HTML page: what stands on it, what it must never do, how the file is written, which documents it refuses."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnx_deploy.bench.conditions import conditions_now
from cnx_deploy.bench.record import Plan
from cnx_deploy.cli.options import _finite
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Compiled, EngineManifest, manifest_from_json
from cnx_deploy.core.variants import find_variant
from cnx_deploy.report.html.page import MARK
from tests.conftest import Command
from tests.support.html_documents import PEER, benchmark, headroom, layers, written
from tests.support.html_page import ROOT, Node, manifest, page_of, parsed, put, rows, section
from tests.support.lies import EVIL, FEW, documents, lying, placed, result_or_error
from tests.support.lies import put as put_bytes

PARITY = ("relative_l2_max", "centred_cosine_min", "top1_agreement", "mean_kl")
ENGINE = "atto-224-fp16-rtx-sm89"


@pytest.fixture(scope="module")
def html() -> str:
    """The page of the repository's own records and benchmark."""
    return page_of(ROOT, bench=(ROOT / "docs" / "data" / "cpu.json",))


@pytest.fixture(scope="module")
def page(html: str) -> Node:
    """It, read back."""
    return parsed(html)


@pytest.fixture
def bench_page(tmp_path: Path) -> Node:
    return parsed(page_of(tmp_path, bench=(written(tmp_path / "bench.json", benchmark()),)))


@pytest.fixture
def cnx(cnx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`cnx-deploy report` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(cnx, "report")


def tiles_of(page: Node) -> str:
    return page.one("dl", class_="tiles").text


def marks(figure: Node, colour: str) -> list[Node]:
    """The marks of a chart in one of the page's colours, those of the legend too."""
    return [node for node in figure.all("use") if f"var(--{colour})" in node.attributes.get("style", "")]


def compiled_of(stem: str) -> Compiled:
    """What the compiler says of one of the repository's own engines."""
    read = manifest_from_json((ROOT / "engines" / f"{stem}.json").read_bytes())
    assert isinstance(read, EngineManifest)
    assert read.facts.compiled is not None
    return read.facts.compiled


# --- what stands on it: manifests -------------------------------------------------------------------------------------


def test_every_committed_artifact_is_in_a_chain_below_its_source(page: Node) -> None:
    chains = section(page, "chains")
    nodes = {node.one("strong").text: node for node in chains.all("div", class_="node")}
    for folder, suffix in (("export", "onnx"), ("engines", "engine")):
        for path in (ROOT / folder).glob("*.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            node = nodes[f"{path.stem}.{suffix}"]
            assert node.one("code").attributes["title"] == record["files"][0]["sha256"]
            assert node.one("time").attributes["datetime"] == record["created"]
    assert "broken chain" not in chains.text
    assert all("licence: none (random weights)" in article.text for article in chains.all("article"))
    atto = next(article for article in chains.all("article") if article.one("h3").text == "atto, 224 px")
    top = [node for node in atto.all("ul", class_="chain")[0].children if isinstance(node, Node)]
    below = {node.all("strong")[0].text: [name.text for name in node.all("strong")[1:]] for node in top}
    assert below == {"atto-224-fp32.onnx": [], "atto-224-fp16.onnx": [f"{ENGINE}.engine"]}


def test_parity_figures_and_the_share_of_the_gate_are_the_manifests_own(page: Node) -> None:
    table, shares = rows(section(page, "parity").one("table")), {}
    assert len(table) == len(list((ROOT / "export").glob("*.json")))
    for stem, row in table.items():
        record = manifest(stem)
        found = record["facts"]["parity"][0]["differences"]
        assert row.values == [found["samples"], *(found[key] for key in PARITY)]
        assert row.all("td")[-1].text == "pass"
        shares[stem] = found["relative_l2_max"] / GATES[record["request"]["deploy"]["precision"]].relative_l2_max
    worst = max(shares, key=lambda stem: shares[stem])
    assert table[worst].all("td")[-2].text == f"{100 * shares[worst]:.0f} % relative L2"
    assert f"{100 * shares[worst]:.0f} % of its gate: {worst}," in tiles_of(page)


def test_marks_of_the_parity_chart_lie_in_the_order_of_the_figures(page: Node) -> None:
    figures = [row.values[1] for row in rows(section(page, "parity").one("table")).values()]
    drawn = marks(section(page, "parity").one("figure"), "accent")
    places = [float(mark.attributes["x"]) for mark in sorted(drawn, key=lambda mark: float(mark.attributes["y"]))]
    assert len(places) == len(figures) + 1  # the first is the legend's
    by_place, by_figure = (sorted(range(len(figures)), key=each.__getitem__) for each in (places[1:], figures))
    assert by_place == by_figure


def test_kernels_and_bytes_are_the_manifests_own(page: Node) -> None:
    engines = section(page, "engines")
    overview = rows(engines.all("table")[0])
    assert len(overview) == len(list((ROOT / "engines").glob("*.json")))
    for stem, row in overview.items():
        compiled = compiled_of(stem)
        assert row.values == [compiled.batch, compiled.kernels, compiled.megabytes_per_image]
        details = next(entry for entry in engines.all("details") if entry.one("summary").text == stem)
        for table, grouping in zip(details.all("table"), ("stage", "operation"), strict=True):
            totals = compiled.totals(grouping)
            wanted = {total.name: [total.kernels, total.megabytes, total.share] for total in totals}
            assert {name: row.values for name, row in rows(table).items()} == wanted


def test_shares_by_stage_count_a_downsampling_with_the_stage_that_it_opens(tmp_path: Path) -> None:
    put(tmp_path, ENGINE, kind="engines")
    totals = compiled_of(ENGINE).totals("stage")
    sums = [sum(total.share for total in totals if total.name.endswith(f".{stage}")) for stage in (1, 2, 3)]
    texts = [text.text for text in section(parsed(page_of(tmp_path)), "engines").one("figure").all("text")]
    assert {f"{100 * share:.0f} %" for share in sums if share >= 0.1} <= set(texts)


def test_what_was_not_run_and_random_weights_are_named_before_anything_else(page: Node) -> None:
    first = next(child for child in page.one("main").children if isinstance(child, Node))
    assert first.attributes["aria-labelledby"] == "not-run"
    engines = {f"{path.stem}.engine" for path in (ROOT / "engines").glob("*.json")}
    assert first.all("li")[0].text.startswith(f"Engines not run on a GPU: {len(engines)}.")
    assert {entry.text for entry in first.all("li")[0].one("details").all("li")} == engines
    models = rows(section(page, "models").one("table"))
    counts = {name: (find_variant(name).parameter_count, find_variant(name).mac_count()) for name in models}
    assert {name: tuple(row.values[1:3]) for name, row in models.items()} == counts
    assert f"Networks with random weights: {len(models)}." in first.text
    assert f"Engines run on a GPU 0 of {len(engines)}" in tiles_of(page)
    assert f"Random weights {len(models)} {len(models)} of {len(models)} networks" in tiles_of(page)
    assert all(row.one("span", class_="tag").text == "random, seed 0" for row in models.values())


def test_published_weights_carry_their_licence_and_are_not_called_random(tmp_path: Path) -> None:
    weights = {"origin": "pretrained", "reference": "a_tag", "licence": "cc-by-nc-4.0"}
    put(tmp_path, "atto-224-fp16", lambda data: data["model"]["weights"].update(weights))
    page = parsed(page_of(tmp_path))
    assert "published, a_tag" in section(page, "models").text
    assert "licence: cc-by-nc-4.0" in section(page, "chains").text
    assert "random" not in page.one("main").text
    assert "Random weights 0" in tiles_of(page)


def differences(manifest: dict[str, Any]) -> dict[str, Any]:
    """What an ONNX file's manifest says of its one output."""
    found: dict[str, Any] = manifest["facts"]["parity"][0]["differences"]
    return found


def test_a_failed_or_missing_comparison_and_unread_kernels_are_told(tmp_path: Path) -> None:
    """A file beyond its gate is a failure whatever its manifest says."""
    put(tmp_path, "atto-224-fp16", lambda data: differences(data).update(relative_l2_max=0.0151))
    put(tmp_path, "pico-224-fp16", lambda data: data["facts"].update(parity=[]))
    put(tmp_path, ENGINE, lambda data: data["facts"].update(compiled=None), kind="engines")
    page = parsed(page_of(tmp_path))
    table = rows(section(page, "parity").one("table"))
    assert {stem: row.all("td")[-1].text for stem, row in table.items()} == {"atto-224-fp16": "FAIL"}
    assert "FAIL atto-224-fp16" in tiles_of(page)
    assert "ONNX files not compared with PyTorch: 1." in section(page, "not-run").text
    engines = section(page, "engines")
    assert [cell.text for cell in rows(engines.one("table"))[ENGINE].all("td")[2:5]] == ["–"] * 3
    assert engines.all("figure") == engines.all("details") == []


def test_an_engine_whose_onnx_file_was_replaced_or_is_not_there_is_a_broken_chain(tmp_path: Path) -> None:
    put(tmp_path, ENGINE, kind="engines")
    assert "is not recorded here" in section(parsed(page_of(tmp_path)), "chains").text
    put(tmp_path, "atto-224-fp16", lambda data: data["files"][0].update(sha256="f" * 64))
    source = manifest(ENGINE, "engines")["source_sha256"]
    told = f"broken chain its source atto-224-fp16.onnx ({source[:12]}) was replaced since"
    assert told in section(parsed(page_of(tmp_path)), "chains").text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not a manifest this version can read"),
        (lambda data: differences(data).update(relative_l2_max="0.1"), "l2_max: Expected float"),
        (lambda data: data.update(tools={"torch": 2}), "tools[...]: Expected str, got int"),
    ],
)  # fmt: skip
def test_a_corrupt_manifest_is_a_row_that_says_why_and_exit_code_4(
    cnx: Command, tmp_path: Path, content: str | Callable[[dict[str, Any]], None], reason: str
) -> None:
    put(tmp_path, "femto-224-fp16")
    bad = put(tmp_path, "atto-224-fp16", None if isinstance(content, str) else content)
    if isinstance(content, str):
        bad.write_text(content, encoding="utf-8")
    code, out, err = cnx("--html", "report.html", "--json")
    told = json.loads(out)
    assert (code, told["html"], told["artifacts"], told["corrupt"]) == (
        4, "report.html", 1, ["export/atto-224-fp16.json"],
    )  # fmt: skip
    assert err.startswith("Error: 1 of 2 manifests cannot be read, and report.html says so: export/atto-224-fp16.json.")
    page = parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    (row,) = section(page, "corrupt").all("li")
    assert row.text.startswith("export/atto-224-fp16.json corrupt")
    assert reason in row.text
    assert list(rows(section(page, "models").one("table"))) == ["femto"]


# --- what stands on it: documents of other commands -------------------------------------------------------------------


def test_the_committed_benchmark_is_shown_row_by_row(page: Node) -> None:
    document = json.loads((ROOT / "docs" / "data" / "cpu.json").read_text(encoding="utf-8"))
    shown = section(page, "benchmark")
    speeds = [row.values[0] for table in shown.all("table") for row in table.one("tbody").all("tr")]
    wanted = sorted(document["rows"], key=lambda row: list(document["networks"]).index(row["network"]))
    assert speeds == [row["images_per_second"] for row in wanted]
    assert len(shown.all("figure")) == len(document["networks"])


def test_a_benchmark_shows_ratios_verdicts_and_no_speed_of_an_invalid_row(bench_page: Node) -> None:
    shown = section(bench_page, "benchmark")
    table = rows(shown.one("table"))
    assert table["atto.onnx"].values == [125.0, 8.0, 8.0, 8.0, 0.0, 1.25]
    assert table["atto.onnx"].all("td")[-2].text == "1.25 (1.20–1.31)"
    assert table["atto.onnx"].one("th", class_="own").text == "atto.onnx"
    assert table[PEER].all("td")[-2].text == "–"
    assert table["torch eager fp32"].all("td")[-1].text == "UNSTABLE 1"
    assert (table["wrong.onnx"].values, table["wrong.onnx"].all("td")[-1].text) == ([0.5], "INVALID 2")
    assert [item.text for item in shown.one("ol").all("li")] == ["medians of 9, 12 ms", "relative L2 0.5, gate 1e-05"]
    assert not re.search("999|9[.]99", shown.one("table").text + " ".join(text.text for text in shown.all("text")))
    assert len(marks(shown.one("figure"), "accent")) == 2  # ours and the legend's, none of the invalid row
    assert len(marks(shown.one("figure"), "paper")) == 2  # the unstable peer is hollow
    assert "doubt others are working" in shown.text
    assert "3 s a row, images of seed 0" in shown.text
    missing = section(bench_page, "not-run").text
    assert "Candidates not timed in bench.json: 1. The reason given: no GPU." in missing
    assert "Nothing was timed" not in missing
    assert not [node for node in bench_page.all("section") if node.attributes["aria-labelledby"] == "layers"]


def test_an_engine_with_a_row_counts_as_run(tmp_path: Path) -> None:
    put(tmp_path, ENGINE, kind="engines")
    put(tmp_path, "pico-224-fp16-rtx-sm89", kind="engines")
    page = parsed(page_of(tmp_path, bench=(written(tmp_path / "b.json", benchmark(f"{ENGINE}.engine")),)))
    assert "Engines run on a GPU 1 of 2" in tiles_of(page)
    table = rows(section(page, "engines").all("table")[0])
    runs = {stem: row.all("td")[-1].text for stem, row in table.items()}
    unrun = "not run: built ahead of time"
    assert runs == {ENGINE: "timed, see Benchmark", "pico-224-fp16-rtx-sm89": unrun}
    assert section(page, "chains").text.count(unrun) == 1
    assert section(page, "not-run").all("li")[0].text.startswith("Engines not run on a GPU: 1.")


@pytest.mark.parametrize(
    ("largest", "shown_as", "verdict"),
    [(100.0, "100.00", "keeps the margin"), (40_000.0, "40,000.00", "FAIL"), (math.nan, "not finite", "FAIL")],
)
def test_headroom_figures_are_the_documents_own(tmp_path: Path, largest: float, shown_as: str, verdict: str) -> None:
    page = parsed(page_of(tmp_path, headroom=(written(tmp_path / "h.json", headroom(largest=largest).to_dict()),)))
    shown = section(page, "headroom")
    by_stage, by_block = map(rows, shown.all("table"))
    for row in (by_stage["stage 1"], by_block["stages.0.0"]):
        assert row.values[-4:] == [57600.0, 57600 / 65504, 8.0, 64 / 65504]
        assert shown_as in row.text
    assert verdict in shown.one("h3").text
    assert ("without the margin stages.0.0.dwconv" in shown.text) is (verdict == "FAIL")
    assert "would lack the margin in 1 statistic: stages.0.0.grn." in shown.text
    assert "Headroom was not measured on a GPU" in section(page, "not-run").text


@pytest.mark.parametrize(("error", "verdict"), [(0.3, "fails"), (math.nan, "not finite")])
def test_the_largest_of_a_block_is_shown_for_each_side(tmp_path: Path, error: float, verdict: Any) -> None:
    page = parsed(page_of(tmp_path, layers=(written(tmp_path / "l.json", layers(error, verdict)),)))
    shown = section(page, "layers")
    row = rows(shown.one("table"))["stages.0.0"]
    assert row.values == [1e-4, *([error] if verdict == "fails" else [])]
    assert row.all("td")[-1].text.endswith(verdict)
    assert f"first divergence stages.0.0.grn on emulator: {verdict}" in shown.text
    assert "not run tensorrt: no GPU here" in shown.text
    assert "emulator: 1 of 2 modules within 0.015" in shown.text


# --- what it must never do --------------------------------------------------------------------------------------------


def check_markup(html: str) -> Node:
    """Nothing of a document is an element, an attribute's name or a handler: strings stand in texts and values."""
    tree = parsed(html)
    for node in tree.walk():
        assert node.tag not in ("script", "img", "iframe", "object", "embed", "form", "base")
        assert not [name for name in node.attributes if name.startswith("on") or name in ("src", "srcset")]
        for name in ("href", "xlink:href", "action", "style"):
            assert not re.search(r"javascript:|https?:|url\((?!#)", node.attributes.get(name, ""))
    assert "<script" not in html.lower()
    return tree


def test_the_page_names_no_address_runs_nothing_and_is_the_same_for_the_same_records(html: str, page: Node) -> None:
    check_markup(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|javascript:", html, re.IGNORECASE)
    assert [node.attributes["href"] for node in page.all("link")] == ["data:,"]
    ids = [node.attributes["id"] for node in page.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    referred = [
        node.attributes[name] for name in ("href", "xlink:href") for node in page.walk() if name in node.attributes
    ]
    assert {name for name in referred if name != "data:,"} <= {f"#{name}" for name in ids}
    assert """http-equiv="Content-Security-Policy" content="default-src 'none';""" in html
    assert page_of(ROOT, bench=(ROOT / "docs" / "data" / "cpu.json",)) == html
    assert html.count("2026-01-02 03:04 UTC") == 1


def test_it_is_a_page_for_people_with_headings_labels_and_scopes(page: Node) -> None:
    assert page.one("html").attributes["lang"] == "en"
    count = sum(len(list((ROOT / folder).glob("*.json"))) for folder in ("export", "engines"))
    assert page.one("title").text == f"Deployment report: {count} artifacts, cnx-deploy"
    levels = [int(node.tag[1]) for node in page.walk() if re.fullmatch(r"h\d", node.tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(deeper - above <= 1 for above, deeper in itertools.pairwise(levels))
    assert all(node.attributes.get("scope") in ("row", "col") for node in page.all("th"))
    boxes = page.all("div", class_="scroll")
    assert all(box.attributes["tabindex"] == "0" and box.attributes["aria-label"] for box in boxes)
    assert len(boxes) == len(page.all("table")) + len(page.all("figure"))
    assert all(svg.attributes["aria-label"] for svg in page.all("svg"))


def test_text_of_a_manifest_is_shown_and_never_markup_or_hidden(tmp_path: Path) -> None:
    def hostile(data: dict[str, Any]) -> None:
        data["tools"][EVIL] = data["source_name"] = data["facts"]["run"] = EVIL
        data["model"]["weights"]["licence"] = "a\x1b[31m\u202egpj\x00b"

    put(tmp_path, ENGINE, hostile, kind="engines")
    html = page_of(tmp_path)
    text = check_markup(html).one("main").text
    assert text.count("alert(1)") > 3
    assert "a\\x1b[31m\\u202egpj\\x00b" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", html)


# --- how it is written ------------------------------------------------------------------------------------------------


def test_empty_folders_give_a_page_that_says_so_without_loading_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from cnx_deploy.cli import main\ntry: main(['report', '--html', 'report.html'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "report.html\nFalse\n"
    page = parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Nothing is recorded in export and engines" in section(page, "models").text
    assert "No engine is recorded" in section(page, "engines").text
    assert "Artifacts 0" in tiles_of(page)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_only_an_earlier_page_is_replaced_and_index_and_readme_are_left_alone(cnx: Command, tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "péage.html"
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    assert cnx("--html", "new folder/péage.html")[0] == 0
    put(tmp_path, "atto-224-fp16")
    assert cnx("--html", "new folder/péage.html")[0] == 0
    assert "atto-224-fp16.onnx" in target.read_text(encoding="utf-8")
    target.write_text("<!doctype html><p>mine", encoding="utf-8")
    code, _, err = cnx("--html", "new folder/péage.html")
    assert (code, "is no page of cnx-deploy report. Use --force to replace it" in err) == (2, True)
    assert target.read_text(encoding="utf-8") == "<!doctype html><p>mine"
    assert cnx("--html", "new folder/péage.html", "--force")[0] == 0
    assert MARK in target.read_text(encoding="utf-8")
    assert {path.name for path in target.parent.iterdir()} == {"péage.html"}
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"atto-224-fp16.json"}
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--html", ".", "--force"), 2, "is a folder, where a file was expected"),
        (("--html", "file/report.html"), 2, "Cannot write in file: "),
        (("--html", "pipe", "--force"), 2, "is a device or a pipe, where a file was expected"),
        (("--html", "a.html", "--check"), 2, "--html writes a page and nothing else"),
        (("--bench", "b.json"), 2, "add --html FILE"),
        (("--force",), 2, "add --html FILE"),
        (("--html", "a.html", "--bench", "none.json"), 2, "none.json cannot be read as JSON"),
        (("--html", "a.html", "without jinja2"), 5, "jinja2 is not installed"),
    ],
)
def test_what_can_give_no_page_is_one_message_and_nothing_is_written(
    cnx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, message: str
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    if "without jinja2" in words:
        monkeypatch.setitem(sys.modules, "jinja2", None)
        words = words[:-1]
    found, out, err = cnx(*words)
    assert (found, out, message in err) == (code, "", True)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "pipe"}


# --- which documents are refused --------------------------------------------------------------------------------------

SOUND: dict[str, Any] = {
    name: json.loads(json.dumps(_finite(made)))
    for name, made in (
        ("bench", benchmark()), ("headroom", headroom().to_dict()), ("layers", layers(0.3, "fails")),
    )
}  # fmt: skip
PLAN = Plan(
    environment=conditions_now(threads=1, duration_seconds=1.0, seed=0), networks={}, planned=(), roofline=()
).to_document()


@pytest.mark.parametrize(
    ("kind", "place", "lie", "reason"),
    [
        ("bench", (), PLAN, "it is a plan"),
        ("bench", (), [], "the document is a list, expected an object"),
        ("bench", (), {"error": "InputError", "message": "no such file", "exit_code": 2}, "'no such file'"),
        ("bench", ("schema_version",), 1, "it has schema version 1, expected 3"),
        ("bench", ("rows", 1, "latency"), {}, "rows[1].latency: Object missing required field"),
        ("bench", ("rows", 1, "latency", "cv_percent"), 1e308, "rows[1].latency.cv_percent: Expected float <= 1e+150"),
        ("bench", ("rows", 1, "network"), "none", "rows[1].network: 'none' is none of its networks"),
        ("headroom", (), benchmark(), "schema_version: Invalid enum value 3"),
        ("headroom", ("margin",), 0, "margin: Expected float >= 1e-150"),
        ("layers", (), benchmark(), "Object missing required field layers"),
        ("layers", ("layers", 0, "backends", 1, "outputs", 0, "verdict"), "odd", "verdict: Invalid enum value 'odd'"),
    ],
)  # fmt: skip
def test_a_document_of_something_else_is_refused_with_the_field_that_is_wrong(
    cnx: Command, tmp_path: Path, kind: str, place: tuple[Any, ...], lie: Any, reason: str
) -> None:
    written(tmp_path / "given.json", placed(SOUND[kind], place, lie) if place else lie)
    code, out, err = cnx("--html", "report.html", f"--{kind}", "given.json")
    assert (code, out, (tmp_path / "report.html").exists()) == (2, "", False)
    assert reason in err
    assert f"`cnx-deploy {kind if kind == 'bench' else f'diagnose {kind}'}" in err
    assert len(err) < 500


def everywhere(value: Any) -> Any:
    """The document with every text, but for the words that it is understood by, replaced by markup."""
    if isinstance(value, dict):
        return {key: entry if key in ("verdict", "status") else everywhere(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [everywhere(entry) for entry in value]
    return EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("kind", SOUND)
def test_markup_in_every_text_at_once_is_shown_as_text(tmp_path: Path, kind: str) -> None:
    document = everywhere(SOUND[kind])
    if kind == "bench":  # rows say which network they are of
        document["networks"] = {
            EVIL: {
                **document["networks"]["atto-32"],
                "files": {EVIL: next(iter(document["networks"]["atto-32"]["files"].values()))},
            }
        }
    path = put_bytes(tmp_path / "<script>a<∕script>.json", json.dumps(document).encode())
    html = page_of(tmp_path, **{kind: (path,)})
    assert EVIL in check_markup(html).text
    assert html.count("&lt;script&gt;") > 5


TEXTS = st.sampled_from([EVIL, "</td>", "javascript:alert(1)", "&lt;", "\u202e", "\x00", "$x$", "a" * 3000, ""])
NUMBERS = st.one_of(st.floats(-1e150, 1e150), st.sampled_from([0, -1, 1e149, -1e149, 1e-149, 5e-324, 2**40, 0.0]))


def anything(kind: str) -> st.SearchStrategy[bytes]:
    """Lies of every type, and lies of the right type, which reach the page more often; lists without an entry."""
    near = lying(SOUND[kind], st.one_of(TEXTS, NUMBERS, st.just([]))).map(lambda data: json.dumps(data).encode())
    return st.one_of(documents(SOUND[kind]), near, near)


@pytest.mark.parametrize("kind", SOUND)
@settings(FEW, max_examples=8)
@given(data=st.data())
def test_fuzz_a_page_is_made_or_the_document_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """A page that is well formed and holds no foreign markup, or one error."""
    path = put_bytes(tmp_path / "given.json", data.draw(anything(kind)))
    html = result_or_error(lambda: page_of(tmp_path, **{kind: (path,)}), InputError)
    if html is not None:
        check_markup(html)
