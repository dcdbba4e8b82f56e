"""Tables of a page: the columns that people compare, in several orders, and all columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lcx.report import scores
from lcx.report.escape import Safe, el, join
from lcx.report.source import ALL_COLUMNS
from lcx.sweep.schema import Row
from lcx.text import MIB, number


def spread(row: Row, name: str, form: str, unit: float = 1.0) -> str:
    """Format the median, and the 10th to 90th percentile."""
    stem = name.removesuffix("_s")
    low, high = row[f"{stem}_p10_s"], row[f"{stem}_p90_s"]
    text = number(row[name], form, unit)
    return text if low is None or high is None else f"{text} ({number(low, form, unit)}–{number(high, form, unit)})"


def with_error(row: Row, name: str, error: str | None = None, form: str = ".3f") -> str:
    """Format a difference and its standard error."""
    value, error = row[name], row[error or f"{name}_se"]
    text = number(value, f"+{form}")
    return text if value is None or error is None or row["method"] == "dense" else f"{text} ± {number(error, form)}"


# head, columns of the schema under it, text of a row
Shown = tuple[str, tuple[str, ...], Callable[[Row], str]]
COMPARED: tuple[Shown, ...] = (
    ("method", ("method",), lambda r: str(r["method"])),
    ("model", ("model",), lambda r: str(r["model"])),
    ("dtype", ("dtype",), lambda r: str(r["dtype"])),
    ("batch", ("batch",), lambda r: plain(r["batch"])),
    ("tokens", ("length",), lambda r: plain(r["length"])),
    ("seed", ("seed",), lambda r: plain(r["seed"])),
    ("kept share", ("keep_ratio",), lambda r: number(r["keep_ratio"], ".3g")),
    ("text", ("text",), lambda r: plain(r["text"])),
    ("status", ("status",), lambda r: str(r["status"])),
    ("TTFT, s (p10–p90)", ("ttft_s", "ttft_p10_s", "ttft_p90_s"), lambda r: spread(r, "ttft_s", ".3g")),
    (
        "decode, ms (p10–p90)",
        ("decode_s", "decode_p10_s", "decode_p90_s"),
        lambda r: spread(r, "decode_s", ".3g", 1e-3),
    ),
    ("cache, MiB", ("cache_bytes",), lambda r: number(r["cache_bytes"], ",.2f", MIB)),
    ("of dense", ("cache_over_dense",), lambda r: number(r["cache_over_dense"], ".3f")),
    ("bits a value", ("bits_per_value",), lambda r: number(r["bits_per_value"], ".2f")),
    ("peak, MiB", ("peak_bytes",), lambda r: number(r["peak_bytes"], ",.0f", MIB)),
    ("NLL", ("nll",), lambda r: number(r["nll"], ".4f")),
    (
        "NLL − dense's, decode ± se",
        ("nll_minus_dense", "nll_minus_dense_se"),
        lambda r: with_error(r, "nll_minus_dense"),
    ),
    (
        "the same, prompt ± se",
        ("prompt_nll_minus_dense", "prompt_nll_minus_dense_se"),
        lambda r: with_error(r, "prompt_nll_minus_dense"),
    ),
    (
        "far tokens: NLL − dense's ± se",
        ("far_minus_dense", "far_se"),
        lambda r: with_error(r, "far_minus_dense", "far_se"),
    ),
    ("KL", ("kl",), lambda r: number(r["kl"], ".4g")),
    ("top-1 agreement", ("top1_agreement",), lambda r: number(r["top1_agreement"], ".3f")),
    ("notes", ("notes",), lambda r: "; ".join(r["notes"]) if isinstance(r["notes"], list) else ""),
)
ONLY_IF_SEVERAL = ("model", "dtype", "batch", "seed", "kept share", "text")
TEXT = ("method", "model", "dtype", "status", "text", "notes")

ORDERS: dict[str, tuple[str, ...]] = {
    "by length": ("length",),
    "by cache bytes": ("cache_bytes", "length"),
    "by KL": ("kl", "length"),
}


def ordered(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Sort rows by columns, smallest first; rows without a value go last."""
    return sorted(rows, key=lambda r: [(r[n] is None, r[n] or 0) for n in names])


def shown_columns(rows: Sequence[Row]) -> list[Shown]:
    """Return the compared columns, without those that have one value in all rows."""
    return [s for s in COMPARED if s[0] not in ONLY_IF_SEVERAL or len({r[s[1][0]] for r in rows}) > 1]


def compared(rows: Sequence[Row]) -> Safe:
    """Return one table of the columns that people compare."""
    columns = shown_columns(rows)
    head = el("tr", *(el("th", name, class_=None if name in TEXT else "n", scope="col") for name, _, _ in columns))
    body = join(
        el(
            "tr",
            *(el("td", text(r), class_=None if name in TEXT else "n") for name, _, text in columns),
            class_=None if r["status"] == "ok" else "bad",
        )
        for r in rows
    )
    return _table(head, body)


def task_scores(rows: Sequence[Row]) -> list[Safe]:
    """Return the scores of the tasks, a table for each length; nothing where no task was requested."""
    parts = []
    for scored in scores.score_tables(rows):
        head = el("tr", el("th", "task"), *(el("th", method, class_="n", scope="col") for method in scored.methods))
        body = join(
            el("tr", el("td", task), *(el("td", scores.score_text(task, v), class_="n") for v in values))
            for task, values in scored.lines
        )
        parts += [el("h3", scored.title), _table(head, body)]
        parts += [el("p", f"{method}, {task}: {message}", class_="soft") for method, task, message in scored.messages]
    return parts


def everything(rows: Sequence[Row]) -> Safe:
    """Return one table of all columns, a line a point; a column of the page for each point would be too wide."""
    head = el(
        "tr", *(el("th", c.name, class_=None if c.kind in ("str", "json") else "n", scope="col") for c in ALL_COLUMNS)
    )
    body = join(
        el("tr", *(el("td", plain(r[c.name]), class_=None if c.kind in ("str", "json") else "n") for c in ALL_COLUMNS))
        for r in rows
    )
    return _table(head, body)


def plain(value: Any) -> str:
    """Format a value of any kind as text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def meanings() -> Safe:
    """Return the meaning of each column, and which ones another run may change."""
    head = el("tr", *(el("th", name) for name in ("column", "meaning", "measured")))
    lines = [(el("code", c.name), c.meaning, "measured" if c.measured else "") for c in ALL_COLUMNS]
    return _table(head, join(el("tr", *(el("td", cell) for cell in line)) for line in lines), "wrap")


def pairs(found: Sequence[tuple[str, Any]]) -> Safe:
    """Return names and values as a list."""
    cells = [(name, value if isinstance(value, Safe) else plain(value)) for name, value in found]
    return el("dl", *(part for name, value in cells for part in (el("dt", name), el("dd", value))))


def _table(head: Safe, body: Safe, kind: str | None = None) -> Safe:
    return el("div", el("table", el("thead", head), el("tbody", body), class_=kind), class_="scroll")
