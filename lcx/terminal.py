"""Tables on a terminal, all in one look."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from lcx.text import visible


def empty_table(title: str | None = None) -> Table:
    """Return a table without columns; the title is text, never markup."""
    return Table(
        title=None if title is None else escape(visible(title)),
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
