"""What an error message owes its reader, checked on every message that a test makes the package raise.

It names what was found, says what was expected, and what to do next: in two clauses or more, one of which begins with
an imperative or names a command or an option.
"""

import re

__all__ = ["fault_of"]

IMPERATIVES = {
    "add",
    "ask",
    "build",
    "check",
    "choose",
    "compile",
    "convert",
    "copy",
    "correct",
    "crop",
    "cut",
    "delete",
    "draw",
    "evaluate",
    "even",
    "export",
    "fetch",
    "fill",
    "free",
    "get",
    "give",
    "go",
    "import",
    "install",
    "keep",
    "lay",
    "leave",
    "load",
    "look",
    "lower",
    "make",
    "measure",
    "mention",
    "move",
    "name",
    "open",
    "permute",
    "pip",
    "point",
    "put",
    "raise",
    "reduce",
    "remove",
    "rename",
    "replace",
    "repeat",
    "reset",
    "resume",
    "run",
    "save",
    "see",
    "set",
    "shorten",
    "show",
    "sign",
    "sort",
    "start",
    "stop",
    "take",
    "train",
    "try",
    "update",
    "use",
    "wait",
    "write",
}
CLAUSE = re.compile(r"(?:[.:;,()]|\bor|\band|\bthen|—)\s+|\n\s*")
MOST = 4000
"""Characters: a table of differing tensors is the longest."""


def fault_of(message: str) -> str | None:
    """What is wrong with a message; None when nothing is."""
    if not message.strip():
        return "it is empty"
    if "Traceback (most recent call last)" in message:
        return "it holds a traceback"
    if odd := [character for character in message if ord(character) < 32 and character not in "\n\t"]:
        return f"it holds the control character {odd[0]!r}"
    if len(message) > MOST:
        return f"it has {len(message)} characters"
    clauses = [clause.strip("`'\" ") for clause in CLAUSE.split(message) if clause.strip("`'\" .")]
    if len(clauses) < 2:
        return "it is one clause: found, expected, what to do"
    says = any(clause.split()[0].lower() in IMPERATIVES for clause in clauses[1:] if clause.split())
    if not says and not re.search(r"(?:^|\s)--[a-z]|cnx-deploy [a-z]|pip install", message):
        return "it does not say what to do"
    return None
