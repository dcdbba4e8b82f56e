"""Escapes for free text in a terminal, a figure, HTML or a spreadsheet, where it must stay text."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Generator
from typing import Any

from lcx.errors import UserError
from lcx.text import visible

# what spreadsheets take for a formula; the last four are the same signs in full width
FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


def plot_text(text: Any, longest: int = 40) -> str:
    """Escape text for matplotlib, which would read $...$ as mathematics."""
    return visible(text, longest).replace("$", r"\$")


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV file: numbers stay numbers, no text is a formula."""
    if not isinstance(value, str):
        return value
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in value)
    return "'" + text if value.startswith(FORMULA) or value.lstrip().startswith(FORMULA) else text


class Safe(str):
    """Markup; everything else is escaped by `el`."""

    __slots__ = ()


def el(tag: str, *children: Any, **attributes: Any) -> Safe:
    """Return an HTML element.  Children and values of attributes are escaped unless `Safe`; a trailing _ of a name is dropped.

    Attributes that are None are left out, True writes only the name.
    """
    words = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            words.append(name)
        elif value is not None:
            text = value if isinstance(value, Safe) else html.escape(visible(value))
            words.append(f'{name}="{text}"')
    start = f"<{' '.join(words)}>"
    if tag in ("meta", "br", "hr"):
        return Safe(start)
    return Safe(f"{start}{join(children)}</{tag}>")


def join(parts: Any) -> Safe:
    """Join elements and texts."""
    return Safe("".join(p if isinstance(p, Safe) else html.escape(visible(p)) for p in parts if p is not None))


@contextlib.contextmanager
def shown_errors() -> Generator[None]:
    """Raise UserErrors without control characters: their messages hold names and paths."""
    try:
        yield
    except UserError as error:
        raise UserError(visible(" ".join(str(error).split()), 2_000)) from None
