"""Text as a terminal may be given it: what a file's name holds must not steer it."""

__all__ = ["printable"]

KEPT = "\n\t"


def printable(text: str) -> str:
    r"""Control characters and lone surrogates as escapes (`\x1b`), line ends and tabs as they are."""
    return "".join(
        character if character in KEPT or character.isprintable() else ascii(character)[1:-1] for character in text
    )
