"""How values become text on the page."""

import unicodedata
from collections.abc import Callable
from typing import Any

from cnx_deploy.report.html.figures import percent

__all__ = ["filters", "printable"]

INVISIBLE = ("Cc", "Cf", "Cs")
"""Unicode categories with which a name could hide text, turn it around or break the file; shown as escapes."""
MISSING = "–"


def printable(value: Any) -> Any:
    """Text with what cannot be seen written out, None as a dash; anything else, markup included, as it is."""
    if value is None:
        return MISSING
    if type(value) is not str:
        return value
    line = value.replace("\n", " ").replace("\t", " ")
    return "".join(_escape(letter) if unicodedata.category(letter) in INVISIBLE else letter for letter in line)


def filters() -> dict[str, Callable[..., Any]]:
    """The template's filters. Each takes None for what is not known."""
    return {
        "scientific": _optional(lambda value: f"{value:.2e}"),
        "fixed": _optional(lambda value, digits=2: f"{value:,.{digits}f}"),
        "percent": _optional(percent),
        "megabytes": _optional(lambda value: f"{value / 1e6:,.1f} MB"),
        "count": _optional(lambda value: f"{value:,}"),
        "short": lambda value: str(value)[:12],
        "day": _day,
    }


def _optional(form: Callable[..., str]) -> Callable[..., str | None]:
    return lambda value, *arguments: None if value is None else form(value, *arguments)


def _day(created: str) -> str:
    """`2026-11-25 02:22 UTC` of an ISO time in UTC; other text as it is."""
    return f"{created[:10]} {created[11:16]} UTC" if len(created) == 25 and created.endswith("+00:00") else created


def _escape(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
