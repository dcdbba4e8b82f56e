"""Plans for people: a table, the longest contexts, the arithmetic behind a row, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from lcx.plan.rows import PlanRow
from lcx.plan.search import STEP, TOLERANCE
from lcx.terminal import empty_table
from lcx.text import GIB, MIB


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}"


COLUMNS = (
    ("method", lambda r: escape(r.job.method)),
    ("tokens", lambda r: f"{r.at.length:,}"),
    ("cache\nGiB", lambda r: _gib(r.at.cache_bytes)),
    ("weights\nGiB", lambda r: _gib(r.job.setting.weight_bytes)),
    ("temp\nMiB", lambda r: f"{r.at.temp_bytes / MIB:,.1f}"),
    ("peak\nGiB", lambda r: _gib(r.at.peak_bytes)),
    ("fits", lambda r: "yes" if r.fits else "no"),
    ("most memory in", lambda r: r.at.program),
    ("prefill s\npredicted", lambda r: "-" if r.times is None else f"{r.times.prefill_s:,.3g}"),
    ("decode ms\npredicted", lambda r: "-" if r.times is None else f"{r.times.decode_s * 1e3:,.3g}"),
    ("temp is", lambda r: r.at.source),
)


def table(rows: Sequence[PlanRow], title: str) -> Table:
    """Return the table of one device, grouped by length."""
    result = empty_table(title)
    for name, _ in COLUMNS:
        words = name.partition("\n")[0] in ("method", "most memory in", "temp is", "fits")
        result.add_column(name, justify="left" if words else "right", no_wrap=True)
    ordered = sorted(rows, key=lambda r: r.at.length)
    for before, row in zip([None, *ordered], ordered, strict=False):
        if before is not None and before.at.length != row.at.length:
            result.add_section()
        result.add_row(*(cell(row) for _, cell in COLUMNS))
    return result


def limits(rows: Sequence[PlanRow], title: str) -> Table:
    """Return the longest context of each method on one device, in multiples of 1,024, beside the claim of its paper."""
    result = empty_table(title)
    claims = any(_claim(r) for r in rows)
    names = ["method", "longest context\ntokens", "peak there\nGiB", "limited by"]
    for name in (*names, "claimed\ntokens") if claims else names:
        result.add_column(name, justify="left" if name in ("method", "limited by") else "right", no_wrap=True)
    for row in first_of_method(rows):
        claim = _claim(row)
        cells = [escape(row.job.method), *_limit_cells(row), f"{claim:,.0f}" if claim else ""]
        result.add_row(*(cells if claims else cells[:-1]))
    return result


def _limit_cells(row: PlanRow) -> tuple[str, str, str]:
    most = row.need_at_limit
    if row.limit_tokens is None:
        return "no limit", _gib(row.at.peak_bytes), "only positions"
    if most is None:
        return f"below {STEP:,}", "-", row.at.program
    return f"{row.limit_tokens:,}", _gib(most.peak_bytes), most.program


CLAIM = "longest context, tokens, "  # what a config in configs/plans calls the paper's figure, the device behind it


def _claim(row: PlanRow) -> float | None:
    return row.job.experiment.paper.get(CLAIM + row.job.device.name)


def first_of_method(rows: Sequence[PlanRow]) -> list[PlanRow]:
    """Return the first row of each method."""
    return list({row.job.method: row for row in reversed(rows)}.values())[::-1]


def notes(rows: Sequence[PlanRow]) -> list[str]:
    """Return notes on the columns and on single methods."""
    row = rows[0]
    job = row.job
    size = job.experiment.schedule.chunk_size()
    chunks = f"prefill in chunks of {size:,}" if size else "prefill in one step"
    weights = "8-bit matrices in the layers counted, not run" if job.asked.weight_bits else f"weights in {job.dtype}"
    lines = [
        f"One device: {weights}, exact caches in {job.dtype}, batch {job.setting.batch}, {chunks} but for methods that need the whole "
        f"prompt at once, room for {job.setting.new_tokens} tokens after the prompt; fits: peak within "
        f"{_gib(job.device.memory_bytes)} GiB "
        f"less {_gib(job.reserve_bytes)} GiB in reserve; the longest context is rounded down to a multiple of {STEP:,}.  "
        f"Attention: {' | '.join(dict.fromkeys(r.job.setting.implementation for r in rows))}.  "
        "Times are predicted from a roofline, nothing ran."
    ]
    by_note: dict[str, list[str]] = {}
    for r in first_of_method(rows):
        for note in r.notes:
            by_note.setdefault(note, []).append(r.job.method)
    lines += [f"{', '.join(methods)}: {note}." for note, methods in by_note.items()]
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
    """Return the arithmetic of one row, term by term."""
    job, at = row.job, row.at
    rest = at.peak_bytes - job.setting.weight_bytes - at.peak_cache_bytes - at.temp_bytes
    a_token = at.cache_bytes / job.model.num_layers / at.length
    terms = " + ".join(f"{name} {value:,}" for name, value in job.weights.items() if value)
    lines = [
        f"{job.method}, {at.length:,} tokens on {job.device.name}",
        f"  weights     {terms} = {job.setting.weight_bytes:,} B",
        f"  cache       {at.cache_bytes:,} B = {a_token:,.2f} B a token and layer "
        f"x {job.model.num_layers} layers x {at.length:,}; alive at once, at most {at.peak_cache_bytes:,} B",
        f"  temp        {at.temp_bytes:,} B of {at.program} ({at.source})",
        f"  peak        {at.peak_bytes:,} B = weights + caches alive + temp + "
        f"{rest:,} B of residual stream, results and "
        "caches that differ while another program runs",
        f"  fits        {at.peak_bytes:,} <= {job.device.memory_bytes:,} - {job.reserve_bytes:,}: {row.fits}",
    ]
    t, target = row.times, job.device.target
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
    """Draw peak memory against context, both axes logarithmic, a panel for each device with its memory as a line; PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    devices = list(dict.fromkeys(r.job.device.name for r in rows))
    fig, panels = plt.subplots(
        1, len(devices), figsize=(8 * len(devices), 6.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, name in zip(panels[0], devices, strict=True):
        _panel(axes, [r for r in rows if r.job.device.name == name])
    panels[0, 0].set_ylabel("peak memory of a device, GiB")
    lengths = sorted({r.at.length for r in rows})
    ticks = lengths if len(lengths) <= 8 else lengths[::2]
    for axes in panels[0]:
        axes.set_xticks(ticks, [_short(n) for n in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    job = rows[0].job
    weights = "8-bit weights counted" if job.asked.weight_bits else f"{job.dtype} weights"
    title = (
        f"{job.model.name}, {weights}, exact caches in {job.dtype}, batch {job.setting.batch}: predicted, nothing ran"
    )
    fig.suptitle(title, fontsize=11)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _panel(axes, rows: Sequence[PlanRow]) -> None:
    """Draw one panel; methods whose peaks agree within 1 % share a line."""
    curves: dict[str, list[PlanRow]] = {}
    for row in rows:
        curves.setdefault(row.job.method, []).append(row)
    groups: list[list[str]] = []
    for method, mine in curves.items():
        for group in groups:
            other = {r.at.length: r.at.peak_bytes for r in curves[group[0]]}
            if all(abs(r.at.peak_bytes - other[r.at.length]) <= 0.01 * r.at.peak_bytes for r in mine):
                group.append(method)
                break
        else:
            groups.append([method])
    groups.sort(key=lambda group: -max(r.at.peak_bytes for r in curves[group[0]]))
    for i, group in enumerate(groups):
        mine = sorted(curves[group[0]], key=lambda r: r.at.length)
        x, y = [r.at.length for r in mine], [r.at.peak_bytes / GIB for r in mine]
        color = f"C{i % 10}"
        axes.plot(x, y, color=color, linestyle=("-", "--")[i // 10 % 2], linewidth=1.4, label=", ".join(group))
        for r in mine:
            face = color if r.at.source == "compiled" else "white"
            axes.plot(
                [r.at.length], [r.at.peak_bytes / GIB], marker="o", markersize=5, color=color, markerfacecolor=face
            )
        most = mine[0].need_at_limit
        if most is not None and x[0] <= most.length <= x[-1]:
            axes.plot([most.length], [most.peak_bytes / GIB], marker="*", markersize=11, color=color)
    first = rows[0]
    job, where = first.job, first.job.device
    memory = where.memory_bytes / GIB
    axes.axhline(memory, color="black", linewidth=1.2)
    label = f"{where.name}: {where.memory_bytes // MIB:,} MiB = {memory:.1f} GiB"
    if job.reserve_bytes:
        axes.axhline((where.memory_bytes - job.reserve_bytes) / GIB, color="black", linewidth=0.8, linestyle=":")
        label += f"\n(dotted: less {job.reserve_bytes / GIB:g} GiB in reserve)"
    place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 4), "textcoords": "offset points", "fontsize": 9}
    axes.annotate(label, (0.01, memory), **place)
    axes.set(xscale="log", xlabel="context, tokens")
    axes.set_yscale("log", base=2)
    # a method that is far beyond every card must not squeeze the others
    top = min(max(r.at.peak_bytes for r in rows) / GIB, 16 * memory)
    axes.set_ylim(min(min(r.at.peak_bytes for r in rows) / GIB, memory) / 1.3, max(top, memory) * 1.6)
    axes.grid(alpha=0.3)
    black = {"linestyle": "none", "color": "black"}
    axes.plot([], [], marker="o", markersize=5, label="compiled", **black)
    axes.plot([], [], marker="o", markersize=5, markerfacecolor="white", label="interpolated", **black)
    axes.plot([], [], marker="*", markersize=10, label="longest that fits", **black)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.11), ncols=3, frameon=False)


def _short(tokens: int) -> str:
    """Return a length such as 8k or 1M where that is exact, else the number."""
    for unit, name in ((MIB, "M"), (1_024, "k")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"
