"""Line of text for a row, printed as each point is done."""

from __future__ import annotations

from lcx.sweep.schema import Row
from lcx.text import MIB, number, visible


def line(row: Row) -> str:
    """Return one row as one line of text."""
    share = "" if row["keep_ratio"] is None else f" {row['keep_ratio']:.2g}"
    head = f"{visible(row['method']) + share:<14} {row['length']:>7,} tokens  "
    if row["status"] != "ok":
        return f"{head}[{row['status']}] {visible(row['message'])}"
    notes = "".join(f"; {visible(note)}" for note in row["notes"] or ())
    loss = f"{number(row['nll_minus_dense'], '+.4f')} ± {number(row['nll_minus_dense_se'], '.4f')}"
    return (
        f"{head}TTFT {number(row['ttft_s'], '7.3f')} s  "
        f"decode {number(row['decode_s'], '6.1f', 1e-3)} ms  cache {number(row['cache_bytes'], '7.1f', MIB)} MiB "
        f"({number(row['cache_over_dense'], '.2f')} of dense's)  {visible(row['text'] or 'text')}: NLL {number(row['nll'], '.4f')} "
        f"({loss})  KL {number(row['kl'], '.4f')}  [ok]{notes}"
    )
