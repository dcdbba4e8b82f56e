"""A sweep's rows on a terminal: a table, the scores of the tasks, notes on the columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lcx.report import scores
from lcx.sweep.schema import Row
from lcx.terminal import empty_table
from lcx.text import MIB, number, visible

SEVERAL = ("model", "dtype", "batch", "seed")  # shown where a sweep has more than one


COLUMNS = (
    ("method", lambda r: escape(visible(r["method"]))),
    ("tokens", lambda r: f"{r['length']:,}"),
    ("TTFT\ns", lambda r: number(r["ttft_s"], ".2f")),
    ("prefill\ntok/s", lambda r: number(r["prefill_tokens_per_s"], ",.0f")),
    ("decode\nms", lambda r: number(r["decode_s"], ".1f", 1e-3)),
    ("p90\nms", lambda r: number(r["decode_p90_s"], ".1f", 1e-3)),
    ("compile\ns", lambda r: number(r["compile_s"], ".1f")),
    ("cache\nMiB", lambda r: number(r["cache_bytes"], ".1f", MIB)),
    ("of\ndense", lambda r: number(r["cache_over_dense"], ".2f")),
    ("bits a\nvalue", lambda r: number(r["bits_per_value"], ".2f")),
    ("peak\nMiB", lambda r: number(r["peak_bytes"], ",.0f", MIB)),
    ("RSS\nMiB", lambda r: number(r["peak_rss_bytes"], ",.0f", MIB)),
    ("NLL\nnats", lambda r: number(r["nll"], ".3f")),
    ("less\ndense", lambda r: number(r["nll_minus_dense"], "+.3f")),
    ("KL\nnats", lambda r: number(r["kl"], ".3f")),
)


def table(rows: Sequence[Row], title: str) -> Table:
    """Return all rows, grouped by length; a point that is not ok shows its status."""
    result = empty_table(title)
    several = [n for n in SEVERAL if len({r[n] for r in rows}) > 1]
    failed = any(r["status"] != "ok" for r in rows)
    for name in (*several, *(name for name, _ in COLUMNS), *(["status"] if failed else [])):
        left = name in ("method", "status", *several)
        result.add_column(name, justify="left" if left else "right", no_wrap=True)
    before = None
    for row in rows:
        group = (*(row[n] for n in several), row["length"])
        if before not in (None, group):
            result.add_section()
        before = group
        cells = [*(escape(visible(row[n])) for n in several), *(cell(row) for _, cell in COLUMNS)]
        result.add_row(*cells, *([row["status"]] if failed else []))
    return result


def score_tables(rows: Sequence[Row]) -> list[tuple[str, Table, list[str]]]:
    """Return the scores of the tasks: title, table and messages for each length; nothing where no task was requested."""
    printed = []
    for scored in scores.score_tables(rows):
        result = empty_table()
        result.add_column("task", no_wrap=True)
        for method in scored.methods:
            result.add_column(escape(visible(method)), justify="right", no_wrap=True)
        for task, values in scored.lines:
            result.add_row(escape(visible(task)), *(scores.score_text(task, value) for value in values))
        messages = [visible(f"{method}, {task}: {message}") for method, task, message in scored.messages]
        printed.append(
            (f"Tasks at {visible(scored.title)}: scores of 0 to 100; ppl, longppl: perplexities", result, messages)
        )
    return printed


def show(rows: Sequence[Row], title: str) -> None:
    """Print the table, the scores of the tasks and the notes."""
    console = Console(highlight=False)
    wide = Console(highlight=False, width=max(console.width, 132))
    wide.print(table(rows, title))
    for title_of_scores, scored, messages in score_tables(rows):
        console.print(title_of_scores, markup=False, soft_wrap=True)
        wide.print(scored)
        for message in messages:
            console.print(message, markup=False, soft_wrap=True)
    console.print(notes(rows), markup=False)


def notes(rows: Sequence[Row]) -> str:
    """Return notes on the columns."""
    done = [r for r in rows if r["status"] == "ok"]
    if not done:
        return "No point is ok: see the messages above."
    row = done[0]
    devices = ", ".join(dict.fromkeys(visible(r["device"]) for r in done))
    return (
        f"prompt = tokens - {row['length'] - row['prompt']}; quality: NLL of the tokens after it and KL(dense || method), nats.  "
        f"Times measured on {devices}: TTFT is the median of {row['ttft_n']} prefills after {row['warmups']} untimed, compiled ahead; "
        f"decode the median of {row['decode_n']} steps.  "
        "cache: device bytes of all arrays, room for the new tokens included.  "
        "peak: weights + caches + XLA's scratch, predicted by the compiled programs; RSS: peak of the "
        f"{'row' if row['peak_rss_of'] == 'point' else 'whole process'}."
    )
