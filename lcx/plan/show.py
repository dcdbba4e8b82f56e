"""Plans for people: a table, the longest contexts, the arithmetic behind a row, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from lcx.plan.devices import device
from lcx.plan.rows import PlanRow
from lcx.plan.search import STEP, TOLERANCE
from lcx.terminal import empty_table
from lcx.text import GIB, MIB


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}"


COLUMNS = (
    ("method", lambda r: escape(r.method)),
    ("tokens", lambda r: f"{r.length:,}"),
    ("cache\nGiB", lambda r: _gib(r.cache_bytes)),
    ("weights\nGiB", lambda r: _gib(r.weight_bytes)),
    ("temp\nMiB", lambda r: f"{r.temp_bytes / MIB:,.1f}"),
    ("peak\nGiB", lambda r: _gib(r.peak_bytes)),
    ("fits", lambda r: "yes" if r.fits else "no"),
    ("most memory in", lambda r: r.program),
    ("prefill s\npredicted", lambda r: "-" if r.times is None else f"{r.times.prefill_s:,.3g}"),
    ("decode ms\npredicted", lambda r: "-" if r.times is None else f"{r.times.decode_s * 1e3:,.3g}"),
    ("temp is", lambda r: r.source),
)


def table(rows: Sequence[PlanRow], title: str) -> Table:
    """The rows of one device, grouped by length."""
    result = empty_table(title)
    for name, _ in COLUMNS:
        words = name.partition("\n")[0] in ("method", "most memory in", "temp is", "fits")
        result.add_column(name, justify="left" if words else "right", no_wrap=True)
    ordered = sorted(rows, key=lambda r: r.length)
    for before, row in zip([None, *ordered], ordered, strict=False):
        if before is not None and before.length != row.length:
            result.add_section()
        result.add_row(*(cell(row) for _, cell in COLUMNS))
    return result


def limits(rows: Sequence[PlanRow], title: str) -> Table:
    """The longest context of each method on one device, in multiples of 1,024, beside what its paper claims."""
    result = empty_table(title)
    claims = any(_claim(r) for r in rows)
    names = ["method", "longest context\ntokens", "peak there\nGiB", "limited by"]
    for name in (*names, "claimed\ntokens") if claims else names:
        result.add_column(name, justify="left" if name in ("method", "limited by") else "right", no_wrap=True)
    for row in first_of_method(rows):
        claim = _claim(row)
        cells = [escape(row.method), *_limit_cells(row), f"{claim:,.0f}" if claim else ""]
        result.add_row(*(cells if claims else cells[:-1]))
    return result


def _limit_cells(row: PlanRow) -> tuple[str, str, str]:
    if row.limit_tokens is None:
        return "no limit", _gib(row.peak_bytes), "positions alone"
    if row.limit_tokens == 0:
        return f"below {STEP:,}", "-", row.program
    return f"{row.limit_tokens:,}", _gib(row.limit_bytes or 0), row.limit_program or ""


CLAIM = "longest context, tokens, "  # what a config in configs/plans calls the paper's figure, the device behind it


def _claim(row: PlanRow) -> float | None:
    return row.paper.get(CLAIM + row.device)


def first_of_method(rows: Sequence[PlanRow]) -> list[PlanRow]:
    """One row for each method, the first."""
    return list({row.method: row for row in reversed(rows)}.values())[::-1]


def notes(rows: Sequence[PlanRow]) -> list[str]:
    """What the columns count, and what single methods need said."""
    row = rows[0]
    chunks = f"prefill in chunks of {row.chunk_size:,}" if row.chunk_size else "prefill in one step"
    weights = "8-bit matrices in the layers counted, not run" if row.weight_bits else f"weights in {row.dtype}"
    lines = [
        f"One device: {weights}, exact caches in {row.dtype}, batch {row.batch}, {chunks} but for methods that need the whole "
        f"prompt at once, room for {row.new_tokens} tokens after the prompt; fits: peak within {_gib(row.memory_bytes)} GiB "
        f"less {_gib(row.reserve_bytes)} GiB in reserve; the longest context is rounded down to a multiple of {STEP:,}.  "
        f"Attention: {' | '.join(dict.fromkeys(r.implementation for r in rows))}.  "
        "Times are predicted from a roofline, nothing ran."
    ]
    said: dict[str, list[str]] = {}
    for r in first_of_method(rows):
        for note in r.notes:
            said.setdefault(note, []).append(r.method)
    lines += [f"{', '.join(methods)}: {note}." for note, methods in said.items()]
    checks = [r.checks for r in first_of_method(rows) if r.checks]
    if checks:
        first, last = (max((c[i] for c in checks), key=lambda c: c.temp_error) for i in (0, -1))
        lines.append(
            "Interpolated at a random length for each method and compiled then, again where temp was off by more than "
            f"{TOLERANCE:.0%}: at first off by at most {first.temp_error:.1%} of temp, in the end {last.temp_error:.1%}; "
            f"of the peak {max(c[0].peak_error for c in checks):.2%} and {max(c[-1].peak_error for c in checks):.2%}."
        )
    return lines


def arithmetic(row: PlanRow) -> str:
    """How one row comes about, term by term."""
    terms = " + ".join(f"{name} {value:,}" for name, value in row.weights.items() if value)
    lines = [
        f"{row.method}, {row.length:,} tokens on {row.device}",
        f"  weights     {terms} = {row.weight_bytes:,} B",
        f"  cache       {row.cache_bytes:,} B = {row.cache_bytes / row.num_layers / row.length:,.2f} B a token and layer "
        f"x {row.num_layers} layers x {row.length:,}; alive at once, at most {row.peak_cache_bytes:,} B",
        f"  temp        {row.temp_bytes:,} B of {row.program} ({row.source})",
        f"  peak        {row.peak_bytes:,} B = weights + caches alive + temp + "
        f"{row.peak_bytes - row.weight_bytes - row.peak_cache_bytes - row.temp_bytes:,} B of residual stream, results and "
        "caches that differ while another program runs",
        f"  fits        {row.peak_bytes:,} <= {row.memory_bytes:,} - {row.reserve_bytes:,}: {row.fits}",
    ]
    t, target = row.times, device(row.device).target
    if t is not None and target is not None:
        flops, bandwidth = target.bf16_flops, target.bandwidth
        lines += [
            f"  prefill     predicted {t.prefill_s:.4g} s = max(({t.linear_flops:.4g} in matrices + {t.attention_flops:.4g} in attention) "
            f"FLOP / {flops:.4g} FLOP/s, {t.prefill_bytes:.4g} B / {bandwidth:.4g} B/s)",
            f"  decode      predicted {t.decode_s:.4g} s = max({t.decode_flops:.4g} FLOP / {flops:.4g} FLOP/s, "
            f"{t.decode_bytes:.4g} B / {bandwidth:.4g} B/s)",
        ]
    return "\n".join(lines)


def figure(rows: Sequence[PlanRow], path: Path) -> None:
    """Peak memory against context, both logarithmic, a panel for each device with its memory as a line; PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    devices = list(dict.fromkeys(r.device for r in rows))
    fig, panels = plt.subplots(
        1, len(devices), figsize=(8 * len(devices), 6.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, name in zip(panels[0], devices, strict=True):
        _panel(axes, [r for r in rows if r.device == name])
    panels[0, 0].set_ylabel("peak memory of a device, GiB")
    lengths = sorted({r.length for r in rows})
    shown = lengths if len(lengths) <= 8 else lengths[::2]
    for axes in panels[0]:
        axes.set_xticks(shown, [_short(n) for n in shown])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    row = rows[0]
    weights = "8-bit weights counted" if row.weight_bits else f"{row.dtype} weights"
    fig.suptitle(
        f"{row.model}, {weights}, exact caches in {row.dtype}, batch {row.batch}: predicted, nothing ran", fontsize=11
    )
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _panel(axes, rows: Sequence[PlanRow]) -> None:
    """Methods whose peaks agree within 1 % share a line."""
    curves: dict[str, list[PlanRow]] = {}
    for row in rows:
        curves.setdefault(row.method, []).append(row)
    groups: list[list[str]] = []
    for method, mine in curves.items():
        for group in groups:
            other = {r.length: r.peak_bytes for r in curves[group[0]]}
            if all(abs(r.peak_bytes - other[r.length]) <= 0.01 * r.peak_bytes for r in mine):
                group.append(method)
                break
        else:
            groups.append([method])
    groups.sort(key=lambda group: -max(r.peak_bytes for r in curves[group[0]]))
    for i, group in enumerate(groups):
        mine = sorted(curves[group[0]], key=lambda r: r.length)
        x, y = [r.length for r in mine], [r.peak_bytes / GIB for r in mine]
        color = f"C{i % 10}"
        axes.plot(x, y, color=color, linestyle=("-", "--")[i // 10 % 2], linewidth=1.4, label=", ".join(group))
        for r in mine:
            face = color if r.source == "compiled" else "white"
            axes.plot([r.length], [r.peak_bytes / GIB], marker="o", markersize=5, color=color, markerfacecolor=face)
        if mine[0].limit_tokens and mine[0].limit_bytes and x[0] <= mine[0].limit_tokens <= x[-1]:
            axes.plot([mine[0].limit_tokens], [mine[0].limit_bytes / GIB], marker="*", markersize=11, color=color)
    first = rows[0]
    memory = first.memory_bytes / GIB
    axes.axhline(memory, color="black", linewidth=1.2)
    label = f"{first.device}: {first.memory_bytes // MIB:,} MiB = {memory:.1f} GiB"
    if first.reserve_bytes:
        axes.axhline((first.memory_bytes - first.reserve_bytes) / GIB, color="black", linewidth=0.8, linestyle=":")
        label += f"\n(dotted: less {first.reserve_bytes / GIB:g} GiB in reserve)"
    place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 4), "textcoords": "offset points", "fontsize": 9}
    axes.annotate(label, (0.01, memory), **place)
    axes.set(xscale="log", xlabel="context, tokens")
    axes.set_yscale("log", base=2)
    # a method that is far beyond every card must not squeeze the others
    top = min(max(r.peak_bytes for r in rows) / GIB, 16 * memory)
    axes.set_ylim(min(min(r.peak_bytes for r in rows) / GIB, memory) / 1.3, max(top, memory) * 1.6)
    axes.grid(alpha=0.3)
    black = {"linestyle": "none", "color": "black"}
    axes.plot([], [], marker="o", markersize=5, label="compiled", **black)
    axes.plot([], [], marker="o", markersize=5, markerfacecolor="white", label="interpolated", **black)
    axes.plot([], [], marker="*", markersize=10, label="longest that fits", **black)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.11), ncols=3, frameon=False)


def _short(tokens: int) -> str:
    """8k, 1M where that is exact, else the number."""
    for unit, name in ((MIB, "M"), (1_024, "k")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"
