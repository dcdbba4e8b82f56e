"""Panels of quality: against bytes of the cache, and against the kept share of the prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from lcx.report import axes
from lcx.report.axes import INK, Label
from lcx.report.escape import plot_text
from lcx.sweep.schema import Row

Rows = Sequence[Row]
Looks = dict[str, axes.Style]
LABEL = {"kl": "KL(dense || method), nats a token", "nll_minus_dense": "NLL - dense's, nats a token"}


def pareto_lengths(rows: Rows) -> list[int]:
    """Return the lengths at which `pareto` has something to show, shortest first."""
    quality = _quality(rows)
    lengths = {
        r["length"] for r in rows if r["status"] == "ok" and r["cache_bytes"] and r[quality] is not None and r["length"]
    }
    return sorted(n for n in lengths if n > 0)


def share_lengths(rows: Rows) -> list[int]:
    """Return the lengths at which `quality_of_share` has something to show, shortest first."""
    drawn = {r["length"] for r in rows if _has_share(r) and r["length"]}
    return sorted(drawn)


def _has_share(r: Row) -> bool:
    return r["status"] == "ok" and r["keep_ratio"] is not None and r["nll_minus_dense"] is not None


def nothing(ax: Axes, why: str) -> None:
    ax.set_yticks([])
    ax.text(0.5, 0.4, why, transform=ax.transAxes, ha="center", fontsize=9, color=INK)


def _quality(rows: Rows) -> str:
    """Return the KL column where the sweep has it, else the difference of NLL."""
    return "kl" if any(r["kl"] for r in rows if r["status"] == "ok") else "nll_minus_dense"


def draw_share(ax: Axes, rows: Rows, looks: Looks, length: int | None = None, text: Any = None) -> list[Label]:
    rows = [r for r in rows if r["text"] == text]
    lengths = share_lengths(rows)
    length = length or (lengths[-1] if lengths else None)
    own = [r for r in rows if r["length"] == length and _has_share(r)]
    if not own:
        nothing(ax, "no point with a budget")
        return []
    ax.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    labels = []
    for method, look in looks.items():
        mine: dict[float, list[Row]] = {}
        for r in own:
            if r["method"] == method:
                mine.setdefault(r["keep_ratio"], []).append(r)
        if not mine:
            continue
        x = sorted(mine)
        y = [_mean([r["nll_minus_dense"] for r in mine[share]]) for share in x]
        error = [_joint([r["nll_minus_dense_se"] for r in mine[share]]) for share in x]
        ax.errorbar(x, y, error, **look.plot, elinewidth=1, capsize=2, zorder=3)
        if len(x) == 1:
            labels.append(Label(x[0], y[0], method, look.color))
    ax.set_xlim(0, 1.02)
    ax.set(
        xlabel=f"kept share of the prompt, {length:,} tokens, {text}", ylabel=f"NLL - dense's, nats, {_protocols(own)}"
    )
    return labels


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _joint(errors: Sequence[float | None]) -> float:
    """Return the standard error of a mean over seeds; 0 where none is known."""
    known = [e for e in errors if e is not None]
    return math.sqrt(sum(e * e for e in known)) / len(known) if known else 0.0


def _protocols(rows: Rows) -> str:
    return " and ".join(dict.fromkeys(r["protocol"] for r in rows if r["protocol"])) or "one step"


def draw_pareto(ax: Axes, rows: Rows, looks: Looks, length: int | None = None, text: Any = None) -> list[Label]:
    rows = [r for r in rows if r["text"] == text]
    lengths = pareto_lengths(rows)
    length = length or (lengths[-1] if lengths else None)
    own = [r for r in rows if r["length"] == length]
    axes.list_failures(ax, own, looks)
    if length not in lengths:
        nothing(ax, "no point has bytes and quality" if length is None else f"none at {length:,} tokens")
        return []
    quality, reference = _quality(rows), axes.reference_of(rows)
    spots = {m: (axes.curve(own, m, "cache_bytes"), axes.curve(own, m, quality)) for m in looks}
    spots = {m: (x[0], y[0]) for m, (x, y) in spots.items() if x and y and x[0].mean > 0}
    log = quality == "kl"
    # a log axis has no zero: methods equal to dense stand on the lower edge
    positive = [v for m, (_, y) in spots.items() if m != reference for v in (y.low, y.high) if v > 0]
    floor = min(positive) / 2 if positive else 1e-6
    heights = {m: max(y.mean, floor) if log else y.mean for m, (_, y) in spots.items()}
    sizes = [x.mean for x, _ in spots.values()]
    axes.log_axis(ax, "x", min(sizes), max(sizes), axes.bytes_text, 2, pad=0.2)
    if log:
        axes.log_axis(ax, "y", floor, max(positive, default=2 * floor), axes.number_text, 10, axes.failure_room(own))
    else:
        ax.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        ax.margins(y=0.15)
    others = [m for m in spots if m != reference]
    front = front_of({m: (spots[m][0].mean, spots[m][1].mean) for m in others})
    steps = [(spots[b][0].mean, heights[a]) for a, b in itertools.pairwise(front)]
    corners = [(spots[m][0].mean, heights[m]) for m in front]
    path = [p for pair in itertools.zip_longest(corners, steps) for p in pair if p is not None]
    ax.plot([x for x, _ in path], [y for _, y in path], color="#808080", lw=1, ls="--")
    labels = []
    for m in others:
        x, y = spots[m]
        filled = looks[m].color if m in front else "none"
        ax.plot(
            [x.mean],
            [heights[m]],
            **looks[m].plot | {"linestyle": "none", "markerfacecolor": filled, "markersize": 7},
            zorder=3,
        )
        if y.low < y.high:
            bar = [[heights[m] - max(y.low, floor) if log else y.mean - y.low], [y.high - heights[m]]]
            ax.errorbar(
                [x.mean], [heights[m]], bar, fmt="none", ecolor=looks[m].color, elinewidth=1, capsize=2, alpha=0.7
            )
        labels.append(Label(x.mean, heights[m], f"{m}: 0" if log and y.mean <= 0 else m, looks[m].color))
    if reference in spots:
        _reference_line(ax, reference, spots[reference][0].mean)
    where = "" if text is None else f", {plot_text(str(text), 30)}"
    ax.set(
        xlabel=f"KV cache at {length:,} tokens{where} (filled: front)", ylabel=f"{LABEL[quality]}, {_protocols(own)}"
    )
    return labels


def front_of(points: dict[str, tuple[float, float]]) -> list[str]:
    """Return the names of the (bytes, loss) that no other beats or equals in both coordinates, fewest bytes first."""
    front, best = [], math.inf
    for name, (_, loss) in sorted(points.items(), key=lambda p: p[1]):
        if loss < best:
            front.append(name)
            best = loss
    return front


def _reference_line(ax: Axes, name: str, x: float) -> None:
    ax.axvline(x, color=INK, linestyle=":", linewidth=1.2)
    ax.annotate(
        plot_text(f"{name} (0)"),
        (x, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=8.5,
    ).set_in_layout(False)
