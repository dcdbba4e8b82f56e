"""Numbers and free text for people, on a terminal, in a page or in a figure."""

from __future__ import annotations

from typing import Any

MIB, GIB = 2**20, 2**30
LONGEST = 600  # characters of a text that are shown


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """Return `value / unit` in a format, "-" where there is no value."""
    return "-" if value is None else format(value / unit, form)


def visible(text: Any, longest: int = LONGEST) -> str:
    """Return the text with control characters, escape sequences and invisible characters written out, cut after `longest`."""
    text = str(text)
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:longest])
    return printable + ("…" if len(text) > longest else "")
