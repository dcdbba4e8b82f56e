"""Points of a store as whole rows: every column of the schema, of its kind or missing, with the ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lcx.sweep.schema import BY_NAME, Row, ratios, whole_row
from lcx.sweep.store import Job, Store

Points = Sequence[tuple[Job, str, Row | None]]
LARGEST = 2**63  # what a 64-bit column holds


def read_rows(store: Store) -> list[Row]:
    """Return every point's row in the sweep's order, whatever its status, with the ratio columns."""
    return whole_rows(store.points())[0]


def whole_rows(points: Points) -> tuple[list[Row], int]:
    """Return (whole rows with ratios, values left out); as `rows.read_rows`, and a point may lack its reference."""
    odd, by_key = 0, {}
    for job, status, row in points:
        columns = job.spec.get("columns") if isinstance(job.spec, Mapping) else None
        columns = columns if isinstance(columns, Mapping) else {}
        whole = whole_row(job.key, columns, status, row if isinstance(row, Mapping) else None)
        fit = {name: typed(value, BY_NAME[name].kind) for name, value in whole.items()}
        odd += sum(fit[name] is None and value is not None for name, value in whole.items())
        by_key[job.key] = fit
    rows = []
    for job, _, row in points:
        dense = by_key.get(job.reference or job.key) if row else None
        rows.append(by_key[job.key] | ratios(by_key[job.key], dense))
    return rows, odd


def typed(value: Any, kind: str) -> Any:
    """Return the value if it is of this kind of column, else None."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind == "json":
        return value
    if kind == "str":
        return value if isinstance(value, str) else None
    if kind == "int":
        return value if number and isinstance(value, int) and abs(value) < LARGEST else None
    return value if number and abs(value) < LARGEST else None
