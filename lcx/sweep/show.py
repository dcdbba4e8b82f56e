"""A sweep's rows for people: a line as each is done, a table at the end, a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lcx.sweep.points import Point

MIB = 2**20


def _number(value, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, form)


def line(point: Point, row: dict[str, Any]) -> str:
    """One row as one line of text."""
    return (
        f"{point.method:<12} {point.length:>7,} tokens  TTFT {_number(row['ttft_s'], '7.3f')} s  "
        f"decode {_number(row['decode_s'], '6.1f', 1e-3)} ms  cache {_number(row['cache_bytes'], '7.1f', MIB)} MiB "
        f"({_number(row['cache_over_dense'], '.2f')} of dense)  NLL {_number(row['nll'], '.4f')} "
        f"({_number(row['nll_minus_dense'], '+.4f')})  KL {_number(row['kl'], '.4f')}  [{row['status']}]"
    )


COLUMNS = (
    ("method", lambda p, r: escape(p.method)),
    ("tokens", lambda p, r: f"{p.length:,}"),
    ("TTFT\ns", lambda p, r: _number(r["ttft_s"], ".2f")),
    ("prefill\ntok/s", lambda p, r: _number(r["prefill_tokens_per_s"], ",.0f")),
    ("decode\nms", lambda p, r: _number(r["decode_s"], ".1f", 1e-3)),
    ("p90\nms", lambda p, r: _number(r["decode_p90_s"], ".1f", 1e-3)),
    ("compile\ns", lambda p, r: _number(r["compile_s"], ".1f")),
    ("cache\nMiB", lambda p, r: _number(r["cache_bytes"], ".1f", MIB)),
    ("of\ndense", lambda p, r: _number(r["cache_over_dense"], ".2f")),
    ("bits a\nvalue", lambda p, r: _number(r["bits_per_value"], ".2f")),
    ("peak\nMiB", lambda p, r: _number(r["peak_bytes"], ",.0f", MIB)),
    ("RSS\nMiB", lambda p, r: _number(r["peak_rss_bytes"], ",.0f", MIB)),
    ("NLL\nnats", lambda p, r: _number(r["nll"], ".3f")),
    ("less\ndense", lambda p, r: _number(r["nll_minus_dense"], "+.3f")),
    ("KL\nnats", lambda p, r: _number(r["kl"], ".3f")),
)


def table(rows: list[tuple[Point, dict[str, Any]]], title: str) -> Table:
    """All rows, grouped by length."""
    result = Table(
        title=escape(title),
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name, _ in COLUMNS:
        result.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    before = None
    for point, row in rows:
        if before not in (None, point.length):
            result.add_section()
        before = point.length
        result.add_row(*(cell(point, row) for _, cell in COLUMNS))
    return result


def notes(rows: list[tuple[Point, dict[str, Any]]]) -> str:
    """What the columns count."""
    point, row = rows[0]
    return (
        f"prompt = tokens - {point.continuation}; quality: NLL of the {point.continuation} tokens after it and "
        "KL(dense || method), nats.  "
        f"Times measured on {row['device']}: one prefill a row, compiled ahead; decode: median of {row['decode_n']} steps.  "
        f"cache: device bytes of all arrays, room for {point.new_tokens} tokens after the prompt included.  "
        "peak: weights + caches + XLA's scratch, predicted by the compiled programs; RSS: peak of the "
        f"{'row' if row['peak_rss_of'] == 'point' else 'whole process'}."
    )


def figure(rows: list[tuple[Point, dict[str, Any]]], path: Path) -> None:
    """Memory and decode time against context length, and quality against memory at the longest length; PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter, NullLocator

    methods = list(dict.fromkeys(p.method for p, _ in rows))
    longest = max(p.length for p, _ in rows)
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    markers = "osD^v<>PX*hd"
    for i, method in enumerate(methods):
        mine = [(p, r) for p, r in rows if p.method == method]
        style = {"color": f"C{i % 10}", "marker": markers[i % len(markers)], "markersize": 6}
        lengths = [p.length for p, _ in mine]
        left.plot(lengths, [r["cache_bytes"] / MIB for _, r in mine], label=method, **style)
        middle.plot(lengths, [_float(r["decode_s"]) * 1e3 for _, r in mine], **style)
        for p, r in mine:
            if p.length == longest and r["kl"]:
                right.plot([r["cache_bytes"] / MIB], [r["kl"]], linestyle="none", **style)
                place = {"xytext": (7, -3), "textcoords": "offset points", "fontsize": 8}
                right.annotate(method, (r["cache_bytes"] / MIB, r["kl"]), **place)
            elif p.length == longest:
                right.axvline(r["cache_bytes"] / MIB, color=style["color"], linestyle=":", label=f"{method}: 0")
    ticks = sorted({p.length for p, _ in rows})
    for axes, what in ((left, "KV cache, MiB"), (middle, "decode, ms a token")):
        axes.set(xscale="log", xlabel="context, tokens", ylabel=what)
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    left.set_yscale("log")
    middle.set_ylim(bottom=0)
    right.set(
        xscale="log",
        yscale="log",
        xlabel=f"KV cache at {longest:,} tokens, MiB",
        ylabel="KL(dense || method), nats a token",
    )
    right.legend(fontsize=8)
    for axis in (left.yaxis, right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.margins(x=0.12)
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=10, fontsize=9, frameon=False)
    title = f"{rows[0][0].model}, {rows[0][0].dtype}, {rows[0][1]['device']}"
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _float(value) -> float:
    return float("nan") if value is None else value
