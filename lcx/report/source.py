"""Source of a report: a sweep's rows, its jobs and its runs, every value of its column's kind or missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcx.errors import UserError
from lcx.sweep.rows import whole_rows
from lcx.sweep.schema import BY_NAME, RATIOS, Row
from lcx.sweep.store import FILE, OPEN, Job, Store, salvage


@dataclass(frozen=True)
class Source:
    """Sweep as a report reads it.

    Attributes:
      workdir: where it lies.
      jobs: of its points, in the sweep's order.
      rows: whole rows with ratio columns, as `rows.read_rows` gives, in the same order.
      runs: records of run.json.
      odd: values that were not of their column's kind and are left out.
    """

    workdir: Path
    jobs: list[Job]
    rows: list[Row]
    runs: list[dict[str, Any]]
    odd: int = 0


def load(workdir: Path, damaged: bool = False) -> Source:
    """Read a sweep.

    Args:
      workdir: of the sweep.
      damaged: read what can be read, row by row.

    Raises:
      UserError: no sweep there, or one that is damaged while `damaged` is not set.
    """
    if damaged:
        path = workdir / FILE
        if not path.is_file():
            raise UserError(f"workdir={str(workdir)!r} holds no sweep: it has no {FILE}")
        points = salvage(path)
        if not points:
            raise UserError(f"workdir={str(workdir)!r}: nothing of {FILE} is readable")
    else:
        points = Store(workdir, create=False).points()
    rows, odd = whole_rows(points)
    return Source(workdir, [job for job, _, _ in points], rows, _runs(workdir / "run.json"), odd)


def _runs(path: Path) -> list[dict[str, Any]]:
    """Return the records of run.json, or none where it is missing or damaged: a report needs only the rows."""
    try:
        runs = json.loads(path.read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []


def has_failed(row: Mapping[str, Any]) -> bool:
    """Return True where the point has ended, and not well."""
    return row["status"] not in ("ok", *OPEN)


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
      UserError: it cannot be written; says how many bytes are needed.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"out={str(path)!r} cannot be written: {error.strerror}; {len(content):,} bytes are needed"
        ) from None


ALL_COLUMNS = (*BY_NAME.values(), *RATIOS)
