"""Text as a terminal may be given it: what a file's name or a manifest holds must neither steer it nor forge a line."""

import json

__all__ = ["one_line", "printable", "printable_json"]

KEPT = "\n\t"


def printable(text: str, *, kept: str = KEPT) -> str:
    r"""Control characters and lone surrogates as escapes (`\x1b`), line ends and tabs as they are."""
    return "".join(
        character if character in kept or character.isprintable() else ascii(character)[1:-1] for character in text
    )


def one_line(text: object) -> str:
    r"""The same of what comes from outside and has a line of its own: a line end in it is `\n`."""
    return printable(str(text), kept="")


def printable_json(document: str) -> str:
    r"""JSON that means the same, with what steers a terminal as JSON escapes: `\u009b` is one to some of them."""
    return "".join(
        character if character == "\n" or character.isprintable() else json.dumps(character)[1:-1]
        for character in document
    )
