"""The rows of a sweep as one file: CSV, or Parquet with page checksums."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from lcx.errors import UserError
from lcx.report.escape import csv_cell
from lcx.report.source import ALL_COLUMNS, write
from lcx.sweep.schema import Row

FORMATS = (".csv", ".parquet")


def check(path: Path) -> None:
    """Raise UserError where no export can go to `path`."""
    if path.suffix not in FORMATS:
        raise UserError(f"out={str(path)!r}: allowed are names that end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"out={str(path)!r}: allowed is a file in a folder that exists")
    if path.suffix == ".parquet":
        _pyarrow()


def export(rows: Sequence[Row], path: Path) -> None:
    """Write one line a point, `key` and `status` first, whatever the status.

    Raises:
      UserError: another format, pyarrow is missing, or the file cannot be written.
    """
    check(path)
    write(path, csv_text(rows).encode() if path.suffix == ".csv" else parquet_bytes(rows))


def csv_text(rows: Sequence[Row]) -> str:
    """Return CSV: a missing value is empty, a JSON column is JSON, a text that a spreadsheet would take for a formula begins with '."""
    out = StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow([c.name for c in ALL_COLUMNS])
    table.writerows([csv_cell(_value(r[c.name], c.kind)) for c in ALL_COLUMNS] for r in rows)
    return out.getvalue()


def parquet_bytes(rows: Sequence[Row]) -> bytes:
    """Return Parquet with values as they are.  Without page checksums a flipped bit would be read as another value."""
    pa, pq = _pyarrow()
    kinds = {"str": pa.string(), "json": pa.string(), "int": pa.int64(), "float": pa.float64()}
    columns = {c.name: pa.array([_text(_value(r[c.name], c.kind)) for r in rows], kinds[c.kind]) for c in ALL_COLUMNS}
    out = BytesIO()
    pq.write_table(pa.table(columns), out, write_page_checksum=True)
    return out.getvalue()


def _value(value: Any, kind: str) -> Any:
    return json.dumps(value, sort_keys=True) if kind == "json" and value is not None else value


def _text(value: Any) -> Any:
    """Return text that UTF-8 can hold: JSON may have lone surrogates."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError("out: Parquet needs pyarrow; pip install 'lcx[parquet]', or give a .csv") from None
