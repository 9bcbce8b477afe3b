"""Documents that `report --html` shows: lies named by their field; whatever is shown is escaped and in one piece."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnx_deploy.cli.options import _finite
from cnx_deploy.core.errors import InputError
from cnx_deploy.report.html.benchmark import read_benchmark
from cnx_deploy.report.html.headroom import read_headroom
from cnx_deploy.report.html.layers import read_layers
from tests.support.html_documents import benchmark, headroom, layers
from tests.support.html_page import ROOT, Node, page_of, parsed
from tests.support.lies import (
    EVIL,
    FEW,
    LONG,
    ODD_JSON,
    check_command,
    documents,
    lying,
    placed,
    put,
    refused,
    result_or_error,
    run,
)

SOUND: dict[str, Any] = {
    name: json.loads(json.dumps(_finite(made)))
    for name, made in (
        ("bench", benchmark()), ("headroom", headroom().to_dict()), ("layers", layers(0.3, "fails")),
    )
}  # fmt: skip
READERS: dict[str, Callable[[Path], Any]] = {
    "bench": read_benchmark, "headroom": read_headroom, "layers": read_layers,
}  # fmt: skip
KINDS = tuple(SOUND)
FOLLOWED = ("href", "src", "xlink:href", "style", "action")
"""Attributes that a browser follows; a label may read like anything."""
FEWER = settings(FEW, max_examples=8)

# The fields of a benchmark's record are lied about in tests/bench/test_record.py.
LIES: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("headroom", ("margin",), 0, "margin is 0, expected more than 0"),
    ("headroom", ("limit",), -1.0, "limit is -1.0, expected more than 0"),
    ("headroom", ("passed",), 1, "passed is 1, expected true or false"),
    ("headroom", ("images", "count"), "1", "images.count is '1', expected a whole number"),
    ("headroom", ("naive", "largest_image_size"), 0.5, "naive.largest_image_size is 0.5, expected a whole number"),
    ("headroom", ("blocks", 0, "stored"), [], "blocks[0].stored is a list, expected an object"),
    ("headroom", ("blocks", 0, "stored", "share"), "all", "blocks[0].stored.share is 'all', expected a number"),
    ("headroom", ("schema_version",), "1", "schema_version is '1', expected a whole number"),
    ("layers", ("layers",), {}, "layers is an object, expected a list"),
    ("layers", ("layers", 0, "artifact"), None, "layers[0].artifact is null, expected text"),
    ("layers", ("layers", 0, "missing"), [], "layers[0].missing is a list, expected an object"),
    (
        "layers",
        ("layers", 0, "backends", 1, "relative_l2_max"),
        "1",
        "layers[0].backends[1].relative_l2_max is '1'",
    ),
    ("layers", ("layers", 0, "backends", 1, "outputs", 0, "verdict"), "odd", "a verdict is 'odd', expected one of ok"),
    (
        "layers",
        ("layers", 0, "backends", 1, "outputs", 0, "figures"),
        1,
        "layers[0].backends[1].outputs[0].figures is 1",
    ),
]


def page(folder: Path, kind: str, content: bytes) -> str:
    return page_of(folder, **{kind: (put(folder / "given.json", content),)})


def check_markup(html: str) -> Node:
    """Nothing of a document is an element, an attribute's name or a handler: strings stand in texts and values."""
    tree = parsed(html)
    for node in tree.walk():
        assert node.tag not in ("script", "img", "iframe", "object", "embed", "form")
        assert not [name for name in node.attributes if name.startswith("on")]
        assert not [each for name in FOLLOWED for each in [node.attributes.get(name, "")] if "javascript:" in each]
    assert "<script" not in html.lower()
    return tree


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_commands_write_is_read_whole(tmp_path: Path, kind: str) -> None:
    path = put(tmp_path / "given.json", json.dumps(SOUND[kind]).encode())
    assert READERS[kind](path)
    assert READERS["bench"](ROOT / "docs" / "data" / "cpu.json").rows


@pytest.mark.parametrize(("kind", "place", "lie", "reason"), LIES, ids=[reason[:50] for *_, reason in LIES])
def test_a_lie_is_named_by_its_field(tmp_path: Path, kind: str, place: tuple[Any, ...], lie: Any, reason: str) -> None:
    path = put(tmp_path / "given.json", json.dumps(placed(SOUND[kind], place, lie)).encode())
    said = refused(lambda: READERS[kind](path), InputError, f": {reason}", "Give what `cnx-deploy ")
    assert len(said) < 500


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ODD_JSON)
def test_what_is_no_document_is_wrong_input(tmp_path: Path, kind: str, name: str) -> None:
    path = put(tmp_path / "given.json", ODD_JSON[name])
    refused(lambda: READERS[kind](path), InputError, "cannot be read as JSON (", "Give what `cnx-deploy ")


def everywhere(value: Any) -> Any:
    """The document with every text, but for the words that it is understood by, replaced by markup."""
    if isinstance(value, dict):
        return {key: entry if key in ("verdict", "status") else everywhere(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [everywhere(entry) for entry in value]
    return EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("kind", KINDS)
def test_markup_in_every_text_at_once_is_shown_as_text(tmp_path: Path, kind: str) -> None:
    document = everywhere(SOUND[kind])
    if kind == "bench":  # rows say which network they are of
        document["networks"] = {EVIL: document["networks"]["atto-32"]}
        document["networks"][EVIL]["files"] = {EVIL: {}}
    html = page(tmp_path, kind, json.dumps(document).encode())
    assert EVIL in check_markup(html).text
    assert html.count("&lt;script&gt;") > 5


@pytest.mark.parametrize("kind", KINDS)
def test_markup_in_the_name_of_the_file_is_shown_as_text(tmp_path: Path, kind: str) -> None:
    path = put(tmp_path / "<script>a</script>.json".replace("/", "∕"), json.dumps(SOUND[kind]).encode())
    check_markup(page_of(tmp_path, **{kind: (path,)}))


EMPTY = {"bench": ("rows",), "headroom": ("blocks",), "layers": ("layers", 0, "backends")}


@pytest.mark.parametrize("kind", KINDS)
def test_empty_lists_make_a_page_without_figures(tmp_path: Path, kind: str) -> None:
    check_markup(page(tmp_path, kind, json.dumps(placed(SOUND[kind], EMPTY[kind], [])).encode()))


def check_page(folder: Path, kind: str, content: bytes) -> None:
    """A page that is well formed and holds no foreign markup, or one error."""
    html = result_or_error(lambda: page(folder, kind, content), InputError)
    if html is not None:
        check_markup(html)


TEXTS = st.sampled_from([EVIL, "</td>", "javascript:alert(1)", "&lt;", "\u202e", "\x00", "a" * 3000, ""])
NUMBERS = st.one_of(st.floats(-1e150, 1e150), st.sampled_from([0, -1, 1e149, -1e149, 1e-149, 5e-324, 2**40, 0.0]))


def anything(kind: str) -> st.SearchStrategy[bytes]:
    """Lies of every type, and lies of the right type, which reach the page more often."""
    values = st.one_of(TEXTS, NUMBERS)
    near = lying(SOUND[kind], values).map(lambda data: json.dumps(data).encode())
    return st.one_of(documents(SOUND[kind]), near, near)


@pytest.mark.parametrize("kind", KINDS)
@FEWER
@given(data=st.data())
def test_fuzz_a_page_is_made_or_the_document_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    check_page(tmp_path, kind, data.draw(anything(kind)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
@LONG
@given(data=st.data())
def test_fuzz_a_page_at_length(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    check_page(tmp_path, kind, data.draw(anything(kind)))


def check_report(folder: Path, kind: str, content: bytes) -> None:
    given, target = put(folder / "given.json", content), folder / "page.html"
    target.unlink(missing_ok=True)
    words = ("--export-dir", folder / "none", "--engines-dir", folder / "none")
    code = check_command("report", "--html", target, *words, f"--{kind}", given)
    assert target.exists() is (code == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_shows_a_sound_document(tmp_path: Path, kind: str) -> None:
    check_report(tmp_path, kind, json.dumps(SOUND[kind]).encode())
    assert (tmp_path / "page.html").exists()
    code, said = run("report", "--html", tmp_path / "b.html", f"--{kind}", tmp_path / "none.json")
    assert (code, "none.json cannot be read as JSON" in said) == (2, True)


@pytest.mark.parametrize("kind", KINDS)
@FEWER
@given(data=st.data())
def test_fuzz_the_command(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    check_report(tmp_path, kind, data.draw(anything(kind)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
@LONG
@given(data=st.data())
def test_fuzz_the_command_at_length(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    check_report(tmp_path, kind, data.draw(anything(kind)))


def test_a_document_is_not_changed_by_being_spoilt() -> None:
    """The lies are drawn on copies: else the examples would not be those that are named."""
    before = copy.deepcopy(SOUND)
    placed(SOUND["bench"], ("rows", 1, "batch"), None)
    assert before == SOUND
