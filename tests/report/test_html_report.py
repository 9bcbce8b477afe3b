"""The HTML page of manifests: what stands on it, and what it must never do."""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.core.gates import GATES
from cnx_deploy.core.variants import find_variant
from tests.support.html_page import CREATED, ROOT, Node, manifest, page_of, parsed, put, rows, section

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
PARITY = ("relative_l2_max", "centred_cosine_min", "top1_agreement", "mean_kl")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def html() -> str:
    """The page of the repository's own records."""
    return page_of(ROOT)


@pytest.fixture(scope="module")
def page(html: str) -> Node:
    """It, read back."""
    return parsed(html)


# --- what stands on it ------------------------------------------------------------------------------------------------


def test_every_committed_artifact_is_on_the_page_with_its_hash_and_source_below_it(page: Node) -> None:
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


def test_an_engine_stands_below_the_onnx_file_it_was_built_from(page: Node) -> None:
    atto = next(each for each in section(page, "chains").all("article") if each.one("h3").text == "atto, 224 px")
    top = [node for node in atto.all("ul", class_="chain")[0].children if isinstance(node, Node)]
    below = {node.all("strong")[0].text: [each.text for each in node.all("strong")[1:]] for node in top}
    assert below == {"atto-224-fp32.onnx": [], "atto-224-fp16.onnx": ["atto-224-fp16-rtx-sm89.engine"]}


def test_parity_figures_are_the_manifests_own(page: Node) -> None:
    table = rows(section(page, "parity").one("table"))
    assert len(table) == len(list((ROOT / "export").glob("*.json")))
    for stem, row in table.items():
        found = manifest(stem)["facts"]["parity"]["differences"]
        assert row.values == [found["samples"], *(found[key] for key in PARITY)]
        assert row.all("td")[-1].text == "pass"


def test_the_share_of_the_gate_is_that_of_the_limit_that_most_was_used_of(page: Node) -> None:
    shares = {}
    for path in (ROOT / "export").glob("*.json"):
        record = manifest(path.stem)
        used = record["facts"]["parity"]["differences"]["relative_l2_max"]
        shares[path.stem] = used / GATES[record["request"]["precision"]].relative_l2_max
    worst = max(shares, key=lambda stem: shares[stem])
    row = rows(section(page, "parity").one("table"))[worst]
    assert row.all("td")[-2].text == f"{100 * shares[worst]:.0f} % relative L2"
    assert f"{100 * shares[worst]:.0f} % of its gate: {worst}," in page.one("dl", class_="tiles").text


def test_kernels_and_bytes_are_the_manifests_own(page: Node) -> None:
    engines = section(page, "engines")
    overview = rows(engines.all("table")[0])
    assert len(overview) == len(list((ROOT / "engines").glob("*.json")))
    for stem, row in overview.items():
        compiled = manifest(stem, "engines")["facts"]["compiled"]
        assert row.values == [compiled["batch"], compiled["kernels"], compiled["megabytes_per_image"]]
        details = next(each for each in engines.all("details") if each.one("summary").text == stem)
        for table, key in zip(details.all("table"), ("by_stage", "by_operation"), strict=True):
            wanted = {part["name"]: [part["kernels"], part["megabytes"], part["share"]] for part in compiled[key]}
            assert {name: row.values for name, row in rows(table).items()} == wanted


def test_an_engine_whose_kernels_were_not_read_has_a_row_without_figures(tmp_path: Path) -> None:
    put(tmp_path, "atto-224-fp16-rtx-sm89", lambda data: data["facts"].update(compiled=None), kind="engines")
    engines = section(parsed(page_of(tmp_path)), "engines")
    assert [cell.text for cell in rows(engines.one("table"))["atto-224-fp16-rtx-sm89"].all("td")[2:5]] == ["–"] * 3
    assert engines.all("figure") == engines.all("details") == []


def test_model_counts_are_those_of_the_variants_table(page: Node) -> None:
    for name, row in rows(section(page, "models").one("table")).items():
        variant = find_variant(name)
        assert row.values[:3] == [1000, variant.parameter_count, variant.mac_count()]


def test_a_mark_stands_where_its_figure_lies_on_the_logarithmic_axis(page: Node) -> None:
    (row,) = [
        svg
        for svg in section(page, "parity").all("svg", role="img")
        if svg.attributes["aria-label"].startswith("pico-224-fp16")
    ]
    found = manifest("pico-224-fp16")["facts"]["parity"]["differences"]["relative_l2_max"]
    place = 100 * (math.log10(found) + 7) / 6  # the axis runs from 1e-7 to 1e-1
    assert float(row.one("circle").attributes["cx"].rstrip("%")) == pytest.approx(place, abs=0.01)


def test_engines_that_were_not_run_are_named_before_anything_else(page: Node) -> None:
    main_part = page.one("main")
    first = next(child for child in main_part.children if isinstance(child, Node))
    assert first.attributes["aria-labelledby"] == "not-run"
    item = first.all("li")[0]
    engines = {f"{path.stem}.engine" for path in (ROOT / "engines").glob("*.json")}
    assert item.text.startswith(f"{len(engines)} engines were not run on a GPU.")
    assert {each.text for each in item.one("details").all("li")} == engines
    assert "Nothing was timed" in first.text
    assert f"0 of {len(engines)} none was run on a GPU" in page.one("dl", class_="tiles").text


def test_random_weights_say_so_at_the_top_in_the_table_and_in_the_chain(page: Node) -> None:
    models = rows(section(page, "models").one("table"))
    every = f"{len(models)} of {len(models)} networks"
    assert f"random {every}: predictions mean nothing" in page.one("dl", class_="tiles").text
    assert "All networks have random weights" in section(page, "not-run").text
    for row in models.values():
        assert row.one("span", class_="tag").text == "random, seed 0"


def test_published_weights_carry_their_licence_and_are_not_called_random(tmp_path: Path) -> None:
    def published(data: dict[str, Any]) -> None:
        data["model"]["weights"] |= {"origin": "pretrained", "reference": "a_tag", "licence": "cc-by-nc-4.0"}

    put(tmp_path, "atto-224-fp16", published)
    page = parsed(page_of(tmp_path))
    assert "published, a_tag" in section(page, "models").text
    assert section(page, "models").text.count("cc-by-nc-4.0") == 1
    assert "licence: cc-by-nc-4.0" in section(page, "chains").text
    assert "random" not in page.one("main").text


def test_a_file_beyond_its_gate_is_a_failure_whatever_its_manifest_says(tmp_path: Path) -> None:
    def worse(data: dict[str, Any]) -> None:
        data["facts"]["parity"]["differences"]["relative_l2_max"] = 0.0151

    put(tmp_path, "atto-224-fp16", worse)
    page = parsed(page_of(tmp_path))
    assert rows(section(page, "parity").one("table"))["atto-224-fp16"].all("td")[-1].text == "FAIL"
    assert "FAIL atto-224-fp16" in page.one("dl", class_="tiles").text


def test_a_file_that_was_never_compared_is_named_as_such(tmp_path: Path) -> None:
    put(tmp_path, "atto-224-fp16", lambda data: data["facts"].update(parity=None))
    page = parsed(page_of(tmp_path))
    assert "1 ONNX file was not compared with PyTorch" in section(page, "not-run").text
    assert "No recorded file was compared" in section(page, "parity").text


def test_an_engine_whose_onnx_file_was_replaced_is_a_broken_chain(tmp_path: Path) -> None:
    put(tmp_path, "atto-224-fp16", lambda data: data["files"][0].update(sha256="f" * 64))
    put(tmp_path, "atto-224-fp16-rtx-sm89", kind="engines")
    chains = section(parsed(page_of(tmp_path)), "chains")
    source = manifest("atto-224-fp16-rtx-sm89", "engines")["source_sha256"]
    assert f"broken chain its source atto-224-fp16.onnx ({source[:12]}) was replaced since" in chains.text


def test_an_engine_alone_says_that_its_source_is_not_recorded(tmp_path: Path) -> None:
    put(tmp_path, "atto-224-fp16-rtx-sm89", kind="engines")
    assert "is not recorded here" in section(parsed(page_of(tmp_path)), "chains").text


# --- what it must never do --------------------------------------------------------------------------------------------


def test_the_page_names_no_address_and_runs_nothing(html: str, page: Node) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript:", html, re.IGNORECASE)
    assert {node.tag for node in page.walk()} & {"script", "img", "iframe", "object", "embed", "form", "base"} == set()
    assert [node.attributes["href"] for node in page.all("link")] == ["data:,"]
    targets = {node.attributes["href"] for node in page.all("a")}
    ids = [node.attributes["id"] for node in page.walk() if "id" in node.attributes]
    assert targets <= {f"#{name}" for name in ids}
    assert len(ids) == len(set(ids))
    for node in page.walk():
        assert not [name for name in node.attributes if name.startswith("on") or name in ("src", "srcset", "style")]
    assert """http-equiv="Content-Security-Policy" content="default-src 'none';""" in html


@pytest.mark.parametrize("where", ["source", "tool", "licence", "run"])
def test_text_of_a_manifest_is_shown_and_never_markup(tmp_path: Path, where: str) -> None:
    def hostile(data: dict[str, Any]) -> None:
        if where == "tool":
            data["tools"][HOSTILE] = HOSTILE
        elif where == "licence":
            data["model"]["weights"]["licence"] = HOSTILE
        elif where == "run":
            data["facts"]["run"] = HOSTILE
        else:
            data["source_name"] = HOSTILE

    put(tmp_path, "atto-224-fp16-rtx-sm89", hostile, kind="engines")
    page = parsed(page_of(tmp_path))
    assert page.all("script") == page.all("img") == []
    assert "alert(1)" in page.one("main").text


def test_letters_that_cannot_be_seen_are_written_out(tmp_path: Path) -> None:
    put(tmp_path, "atto-224-fp16", lambda data: data["model"]["weights"].update(licence="a\x1b[31m\u202egpj\x00b"))
    html = page_of(tmp_path)
    html.encode("utf-8")
    assert "a\\x1b[31m\\u202egpj\\x00b" in parsed(html).one("main").text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", html)


def test_it_is_a_page_for_people_with_headings_labels_and_scopes(page: Node) -> None:
    assert page.one("html").attributes["lang"] == "en"
    count = sum(len(list((ROOT / folder).glob("*.json"))) for folder in ("export", "engines"))
    assert page.one("title").text == f"Deployment report: {count} artifacts, cnx-deploy"
    assert "width=device-width" in page.one("meta", name="viewport").attributes["content"]
    levels = [int(node.tag[1]) for node in page.walk() if re.fullmatch(r"h\d", node.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(deeper - above <= 1 for above, deeper in itertools.pairwise(levels))
    assert all(node.attributes.get("scope") in ("row", "col") for node in page.all("th"))
    boxes = page.all("div", class_="scroll")
    assert all(box.attributes["tabindex"] == "0" and box.attributes["aria-label"] for box in boxes)
    assert len(boxes) == len(page.all("table"))
    inner = {id(below) for svg in page.all("svg") for below in svg.all("svg")}
    outer = [svg for svg in page.all("svg") if id(svg) not in inner]
    hidden = {id(svg) for node in page.walk() if node.attributes.get("aria-hidden") for svg in (node, *node.all("svg"))}
    assert all(svg.attributes.get("aria-label") or id(svg) in hidden for svg in outer)


def test_the_same_records_give_the_same_bytes_but_for_the_time(html: str) -> None:
    assert page_of(ROOT) == html
    assert html.count(CREATED) == 1
    assert html.count("2026-01-02 03:04 UTC") == 1
