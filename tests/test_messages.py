"""Every message that the package raises was read as a user would read it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnx_deploy import errors
from cnx_deploy.cli import main, options
from tests.message_rules import fault_of

PACKAGE = Path(errors.__file__).parent


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("", "empty"),
        ("It failed.", "one clause"),
        ("The file has 3 bytes. Its manifest says 4.", "what to do"),
        ("a.onnx\x1b[31m has 3 bytes. Make it again.", "control character"),
        ("Traceback (most recent call last): a. Use b.", "traceback"),
    ],
)
def test_a_message_that_owes_something_is_found(message, fault):
    assert fault in fault_of(message)


@pytest.mark.parametrize(
    "message",
    [
        "a.onnx has 3 bytes, its manifest says 4. Make it again with --force.",
        "No variant is called 'attto'. Choose one of: atto, femto.",
        "timm is not installed: pip install timm",
    ],
)
def test_a_message_that_says_all_is_not_blamed(message):
    assert fault_of(message) is None


def raised_texts() -> Iterator[tuple[str, str]]:
    """Place and text of every error of ours in the source whose message is written there; values stand as 7."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors.__all__:
                text = written(node.args[0]) if node.args else ""
                if text is not None:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def written(node: ast.expr) -> str | None:
    """The text of a literal; None where the message is made elsewhere, and is checked when it is raised."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else _value(part) for part in node.values]
        return None if None in parts else "".join(part for part in parts if part is not None)
    return None


def _value(part: ast.expr) -> str | None:
    """A value in a message stands as 7; one that may be a sentence of advice makes the whole unknown."""
    source = ast.unparse(part)
    return (
        None
        if re.search(r"hint|advice|way_out|reason|again|AGAIN|what|command|message|error\b|says|not_run", source)
        else "7"
    )


def test_every_message_in_the_source_says_what_was_found_and_what_to_do():
    texts = list(raised_texts())
    assert len(texts) > 150  # the collection works
    assert [(place, fault, text) for place, text in texts if (fault := fault_of(text)) is not None] == []


def test_log_and_error_hygiene_control_characters_in_a_files_name_are_escaped(capsys, tmp_path):
    """A name that would colour the terminal, ring its bell and erase the line."""
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path / "red\x1b[31m\x07\x9b2K\u202e.onnx")])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert r"red\x1b[31m\x07\x9b2K\u202e.onnx" in said
    assert not [character for character in said if not character.isprintable() and character != "\n"]


def test_log_and_error_hygiene_results_on_stdout_are_escaped_too(capsys):
    options.echo("photo\x1b]0;owned\x07.png: cat")
    assert capsys.readouterr().out == "photo\\x1b]0;owned\\x07.png: cat\n"


def test_log_and_error_hygiene_no_secret_of_the_environment_is_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2-hunter2")
    for words in (
        ["inspect", str(tmp_path / "missing")],
        ["export", "--variant", "atto", "--batch", "x"],
        ["doctor", "--json"],
    ):
        with pytest.raises(SystemExit):
            main(words)
        printed = capsys.readouterr()
        assert "hunter2" not in printed.out + printed.err
