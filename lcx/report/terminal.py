"""A sweep's rows on a terminal: a table, the scores of the tasks, notes on the columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lcx.report import scores
from lcx.report.ranking import SIGMAS, rankings
from lcx.report.tables import with_error
from lcx.sweep.schema import Row
from lcx.terminal import empty_table
from lcx.text import MIB, number, visible

SEVERAL = ("model", "dtype", "batch", "seed")  # several where a sweep has more than one
COST = (
    ("TTFT\ns", lambda r: number(r["ttft_s"], ".2f")),
    ("prefill\ntok/s", lambda r: number(r["prefill_tokens_per_s"], ",.0f")),
    ("decode\nms", lambda r: number(r["decode_s"], ".1f", 1e-3)),
    ("p90\nms", lambda r: number(r["decode_p90_s"], ".1f", 1e-3)),
    ("dense's\nms", lambda r: number(r["dense_decode_s"], ".1f", 1e-3)),
    ("compile\ns", lambda r: number(r["compile_s"], ".1f")),
    ("cache\nMiB", lambda r: number(r["cache_bytes"], ".1f", MIB)),
    ("of dense's\nbytes", lambda r: number(r["cache_over_dense"], ".2f")),
    ("bits a\nvalue", lambda r: number(r["bits_per_value"], ".2f")),
    ("peak\nMiB", lambda r: number(r["peak_bytes"], ",.0f", MIB)),
    ("RSS\nMiB", lambda r: number(r["peak_rss_bytes"], ",.0f", MIB)),
)
QUALITY = (
    ("NLL\nnats", lambda r: number(r["nll"], ".3f")),
    ("NLL - dense's\ndecode", lambda r: with_error(r, "nll_minus_dense")),
    ("NLL - dense's\nprompt", lambda r: with_error(r, "prompt_nll_minus_dense") if acts_in_decode(r) else "same"),
    ("far tokens\nNLL - dense's", lambda r: with_error(r, "far_minus_dense", "far_se")),
    ("KL\nnats", lambda r: number(r["kl"], ".3f")),
)
NAMES = ("method", "status", "text", *SEVERAL)


def acts_in_decode(row: Row) -> bool:
    return row["acts_in_decode"] not in (None, "no")


def tables(rows: Sequence[Row], title: str) -> list[Table]:
    """Return two tables: memory and time, which do not depend on the text, and quality, grouped by length and text."""
    once = {tuple(r[n] for n in (*SEVERAL, "method", "length", "budget")): r for r in reversed(rows)}
    cost = _table(f"{title}: memory and time", list(reversed(once.values())), COST, ("length",))
    grouped = sorted(rows, key=lambda r: [rows_index(rows, r, n) for n in (*SEVERAL, "length", "text")])
    dense = next((r for r in rows if r["status"] == "ok"), None)
    if dense is None or dense["text"] is None:
        return [cost]
    return [cost, _table(f"{title}: quality", grouped, QUALITY, ("length", "text"))]


def rows_index(rows: Sequence[Row], row: Row, name: str) -> int:
    """Return the place of a row's value among those of a column, in the order in which they first come."""
    return list(dict.fromkeys(r[name] for r in rows)).index(row[name])


def _table(title: str, rows: Sequence[Row], columns, group: tuple[str, ...]) -> Table:
    """Return a table, a section for each value of the columns `group`; a point that is not ok shows its status."""
    result = empty_table(title)
    several = [n for n in SEVERAL if len({r[n] for r in rows}) > 1]
    texts = ["text"] if "text" in group else []
    kept = (
        [("keep", lambda r: number(r["keep_ratio"], ".2g"))] if any(r["keep_ratio"] is not None for r in rows) else []
    )
    cells = [("tokens", lambda r: f"{r['length']:,}"), *kept, *columns]
    failed = ["status"] if any(r["status"] != "ok" for r in rows) else []
    for name in (*several, *texts, "method", *(name for name, _ in cells), *failed):
        result.add_column(name, justify="left" if name in NAMES else "right", no_wrap=True)
    before = None
    for row in rows:
        place = tuple(row[n] for n in (*several, *group))
        if before not in (None, place):
            result.add_section()
        before = place
        words = [escape(visible(row[n])) for n in (*several, *texts, "method")]
        result.add_row(*words, *(cell(row) for _, cell in cells), *(row[n] for n in failed))
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
    for table in tables(rows, title):
        wide.print(table)
    for text, order in rankings(rows):
        console.print(f"{visible(text)}: {visible(order)}", markup=False, soft_wrap=True)
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
    lines = [
        f"prompt = tokens - {row['length'] - row['prompt']}; {row['passages']} passages of each text.  NLL - dense's: nats a token, ± one "
        "standard error of the paired difference (the larger of that over tokens and over passages).  Of two methods `<` stands only where "
        f"they differ by {SIGMAS:g} of their joint error.  decode: the continuation token by token, as in generation; prompt: in one step, "
        "in which nothing is evicted; far tokens: those that dense attention predicts only with more than the nearest tokens.",
        f"Times measured on {devices}: TTFT is the median of {row['ttft_n']} prefills after {row['warmups']} untimed, compiled ahead; "
        f"decode the median of {row['decode_n']} steps, dense's in turns with the method's.  cache: device bytes of all arrays, room for "
        "the new tokens included.  peak: weights + caches + XLA's scratch, predicted by the compiled programs; RSS: peak of the "
        f"{'row' if row['peak_rss_of'] == 'point' else 'whole process'}.",
    ]
    remarks = dict.fromkeys(
        f"{visible(r['method'])} at {r['length']:,} tokens: {visible(n)}" for r in done for n in r["notes"] or ()
    )
    return "\n".join([*lines, *remarks])
