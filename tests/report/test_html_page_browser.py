"""The HTML page in a headless Chromium: no request, no complaint, no scrolling sideways, legible in light and dark."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.chromium import BROWSER, DARK, measured, visit
from tests.support.html_documents import benchmark, headroom, layers, written
from tests.support.html_page import ROOT, page_of, put

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: scripts/browser installs Debian's"),
]

LONG = "a-name-without-end-" * 8 + "x" * 90
CHECKS = (ROOT / "tests" / "support" / "html_layout.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's own records and benchmark, and a headroom over six decades: an axis with many labels."""
    path = tmp_path_factory.mktemp("records") / "report.html"
    ranges = written(path.with_name("headroom.json"), headroom(largest=1.0).to_dict())
    text = page_of(ROOT, bench=(ROOT / "docs" / "data" / "cpu.json",), headroom=(ranges,))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def extremes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that can go wrong, in long words: failures, a corrupt manifest, NaN, what was not run."""
    folder = tmp_path_factory.mktemp("extremes")

    def long(data: dict[str, Any]) -> None:
        data["stem"], data["files"][0]["name"] = LONG, f"{LONG}.onnx"
        data["model"]["weights"] |= {"origin": "checkpoint", "reference": f"../{LONG}", "licence": LONG}
        data["tools"][LONG] = LONG
        data["facts"]["parity"][0]["differences"]["relative_l2_max"] = 0.5

    put(folder, "pico-224-fp16", long)
    put(folder, "atto-224-fp16-rtx-sm89", lambda data: data["facts"].update(run=LONG), kind="engines")
    put(folder, "femto-224-fp32").write_text("{", encoding="utf-8")
    path = folder / "report.html"
    documents = {
        "bench": (written(folder / "b.json", benchmark(LONG)),),
        "headroom": (written(folder / "h.json", headroom(largest=float("nan")).to_dict()),),
        "layers": (written(folder / "l.json", layers(float("nan"), "not finite")),),
    }
    path.write_text(page_of(folder, **documents), encoding="utf-8")
    return path


@pytest.fixture(params=["records", "extremes"])
def page(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_the_page_asks_for_nothing_and_the_console_stays_empty(page: Path) -> None:
    seen = visit(page, "--dump-dom")
    assert "Deployment report" in seen.output
    assert (seen.console, seen.addresses) == ((), ())


def test_a_request_and_a_message_would_be_seen(records: Path, tmp_path: Path) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", records.read_text(encoding="utf-8"))
    added = '<img alt="" src="http://127.0.0.1:9/pixel.png"><script>console.error("no")</script></body>'
    (tmp_path / "report.html").write_text(text.replace("</body>", added), encoding="utf-8")
    seen = visit(tmp_path / "report.html", "--dump-dom")
    assert seen.addresses == ("http://127.0.0.1:9/pixel.png",)
    assert len(seen.console) == 1


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_is_wider_than_the_screen_and_labels_of_charts_keep_apart(page: Path, width: int) -> None:
    """But for tables and charts in their boxes, which scroll and can be reached by keyboard."""
    script = f"{CHECKS} return {{widths: widths(), crowded: crowded(), boxes: boxes()}};"
    found = measured(page, script, width)
    assert found["widths"] == {"inner": width, "scroll": width, "wide": [], "tall": []}
    assert (found["crowded"]["pairs"], found["crowded"]["labels"] > 0) == ([], True)
    assert any(is_wider for _, is_wider, _ in found["boxes"]) or width > 320
    assert all((index, overflow) == (0, "auto") for index, _, overflow in found["boxes"])


@pytest.mark.parametrize("flags", [(), (DARK,)], ids=["light", "dark"])
def test_text_and_marks_are_legible_in_both_colour_schemes(page: Path, flags: tuple[str, ...]) -> None:
    scheme = "return window.matchMedia('(prefers-color-scheme: dark)').matches"
    assert measured(page, scheme, 360, *flags) == bool(flags)
    found = measured(page, f"{CHECKS} return contrasts();", 1280, *flags)
    kinds = [kind for kind, _, _ in found]
    assert kinds.count("text") > 100
    assert kinds.count("mark") > 5
    least = {"text": 4.5, "mark": 3.0}
    assert [words for kind, ratio, words in found if not ratio >= least[kind]] == []


def test_what_is_folded_away_is_printed(records: Path, tmp_path: Path) -> None:
    text = records.read_text(encoding="utf-8")
    (tmp_path / "open.html").write_text(text.replace("<details", "<details open"), encoding="utf-8")
    (tmp_path / "none.html").write_text(re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL), encoding="utf-8")
    pages = {name: _pages(path, tmp_path) for name, path in
             {"as it is": records, "open": tmp_path / "open.html", "none": tmp_path / "none.html"}.items()}  # fmt: skip
    assert pages["as it is"] == pages["open"]
    assert pages["none"] < pages["open"]


def _pages(page: Path, folder: Path) -> int:
    """How many pages a print of it has."""
    visit(page, "--no-pdf-header-footer", f"--print-to-pdf={folder / 'print.pdf'}")
    return len(re.findall(rb"/Type\s*/Page\b", (folder / "print.pdf").read_bytes()))
