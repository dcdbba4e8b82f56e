"""A sweep for people: figures, one HTML page, its comparison with another, and its rows as a file.

`figures` draws in a notebook too.  This package imports no JAX unless a GPU's capacity is requested.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcx.errors import UserError
from lcx.report.source import Source, write


def write_report(source: Source, out: Path, formats: Sequence[str] = (), capacity: Sequence[str] = ()) -> list[Path]:
    """Write the page of a sweep, and its figures to `figures/` beside it.

    Args:
      source: the sweep, of `source.load`.
      out: the page, .html.
      formats: of the figures, png and svg; none: no files.
      capacity: GPUs whose memory is drawn as lines.

    Returns:
      Paths of the written files.

    Raises:
      UserError: another format, no such GPU, or a file that cannot be written.
    """
    # matplotlib takes a second, which a refusal need not wait for
    from lcx.report import figures
    from lcx.report.page import page

    for form in formats:
        if f".{form}" not in figures.FORMATS:
            raise UserError(f"formats={form!r}: allowed are png and svg")
    if out.suffix != ".html" or not out.parent.is_dir() or out.is_dir():
        raise UserError(f"out={str(out)!r}: allowed is a .html file in a folder that exists")
    figures.capacities(capacity)
    write(out, page(source, capacity).encode())
    written = [out]
    if not formats:
        return written
    folder = out.parent / "figures"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {str(folder)!r} cannot be made: {error.strerror}") from None
    for name, fig in figures.every(source.rows, capacity).items():
        for form in formats:
            figures.save(fig, folder / f"{name}.{form}")
            written.append(folder / f"{name}.{form}")
    return written
