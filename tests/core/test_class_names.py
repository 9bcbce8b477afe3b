"""Names of classes as people keep them, each form read alike, and what is none refused."""

import json
from pathlib import Path

import pytest

from cnx_deploy.core.class_names import MAX_NAME, read_class_names
from cnx_deploy.core.errors import InputError

NAMES = ("tench", "great white shark", "Küche", "10", "dog", *(f"n{index}" for index in range(6, 13)))
"""Twelve: indices as text sort otherwise than as numbers."""
BY_INDEX = {str(index): name for index, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(NAMES), "\ufeff" + "\r\n".join(NAMES) + "\r\n\r\n", json.dumps(NAMES),
        json.dumps(BY_INDEX), json.dumps(dict(sorted(BY_INDEX.items()))),
        json.dumps({name: index for index, name in sorted(enumerate(NAMES), key=lambda pair: pair[1])}),
        json.dumps({"id2label": BY_INDEX, "label2id": {"wrong": 0}}), json.dumps({"label_names": NAMES}),
    ],
    ids=["lines", "spreadsheet", "list", "id2label", "sorted", "class_to_idx", "config", "timm"],
)  # fmt: skip
def test_every_form_gives_the_names_in_the_order_of_the_outputs(tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_text(text, encoding="utf-8")
    assert read_class_names(tmp_path / "names") == NAMES


def test_names_that_are_numbers_in_text_are_no_indices(tmp_path: Path) -> None:
    (tmp_path / "names").write_text(json.dumps({"0": "1", "1": "10", "2": "0"}))
    assert read_class_names(tmp_path / "names") == ("1", "10", "0")
    (tmp_path / "names").write_text(json.dumps({"1": 0, "10": 1, "0": 2}))
    assert read_class_names(tmp_path / "names") == ("1", "10", "0")


@pytest.mark.parametrize("first", ["[unknown]", "{misc} goods", "[1] cat", "  [no label]"])
def test_a_first_name_in_brackets_is_a_name_and_not_the_begin_of_json(tmp_path: Path, first: str) -> None:
    (tmp_path / "names.txt").write_text(f"{first}\ncat\n[other]\n")
    assert read_class_names(tmp_path / "names.txt") == (first.strip(), "cat", "[other]")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "without names"), (b"\n \n", "without names"), (b"a\n\nb\n", "'' is no class's name"),
        (b"a\nb\x1b[2J\n", "is no class's name"), (b"x" * (MAX_NAME + 1), "is no class's name"),
        ("é".encode("cp1252"), "utf-8"), (b'{"0": "a", "2": "b"}', "not 0 to 1"), (b'{"a": 0, "b": 0}', "not 0 to 1"),
        (b'{"0": "a", "00": "b"}', "not 0 to 1"), (b'{"a": "b"}', "not 0 to 0"), (b'{"0": 1.5}', "1.5 is no class's"),
        (b'{"a": true, "b": false}', "not 0 to 1"), (b"[1, 2]", "1 is no class's"), (b'["a"', "expecting"),
        (b"{}", "without names"), (b"['a', 'b']", "expecting value"), (b"{0: 'a',\n1: 'b'}", "expecting property"),
        (b"[a, b]\nc", "expecting value"), (b"[]x\ncat", "extra data"),
    ],
    ids=str,
)  # fmt: skip
def test_what_names_no_classes_is_refused_with_the_forms_that_do(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(InputError, match="one name a line, or JSON") as refusal:
        read_class_names(tmp_path / "names")
    assert reason.lower() in str(refusal.value).lower()
    with pytest.raises(InputError, match="cannot be read"):
        read_class_names(tmp_path)


def test_the_table_of_a_tagger_gives_its_column_of_names(tmp_path: Path) -> None:
    path = tmp_path / "selected_tags.csv"
    path.write_text('tag_id,name,category,count\n1,1girl,0,9\n2,"hat, red",0,8\n3,:d,0,7\n')
    assert read_class_names(path) == ("1girl", "hat, red", ":d")
    (tmp_path / "plain.csv").write_text("cat\ndog\n")
    assert read_class_names(tmp_path / "plain.csv") == ("cat", "dog")
    for text in ("id,tag\n1,cat\n", "name,name\na,b\n", "id,name\n1\n", 'id,name\n1,"cat\n'):
        path.write_text(text)
        with pytest.raises(InputError, match="cannot be read as class names"):
            read_class_names(path)
