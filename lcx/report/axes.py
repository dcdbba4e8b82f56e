"""Shared parts of the figures: colours and markers, readable ticks of log axes, labels that do not overlap, failed points."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, blended_transform_factory

from lcx.report.escape import plot_text
from lcx.report.source import has_failed
from lcx.sweep.schema import Row

INK = "#010203"  # text and frames; a page replaces it by the text's colour, so that figures follow dark and light
# Okabe and Ito's, with yellow, black and light blue replaced: contrast of 3 or more on white and on near-black
COLOURS = ("#0077bb", "#d55e00", "#009e73", "#c86fa2", "#a87900", "#7d6bd0", "#c1474f", "#4f8f9e")
MARKERS = "osD^v<>Phd*X"
LINES = ("-", "--", "-.", ":")
MOST_TICKS = 7
SHOWN_FAILURES = 5  # a length, in the strip on top

_RC = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#808080",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "lcx",
}


class Picture(Figure):
    """Figure that a notebook shows with or without pyplot."""

    def _repr_png_(self) -> bytes:
        out = BytesIO()
        self.savefig(out, format="png", dpi=110, facecolor="white")
        return out.getvalue()


@contextlib.contextmanager
def styled() -> Generator[None]:
    """Set our fonts and colours; the caller's settings are restored afterwards."""
    with quiet(), matplotlib.rc_context(_RC):
        yield


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Silence the warning for each character of a name that the font lacks; a box stands for the character."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


@dataclass(frozen=True)
class Style:
    """Look of a method in every figure."""

    color: str
    marker: str
    line: str

    @property
    def plot(self) -> dict[str, Any]:
        return {"color": self.color, "marker": self.marker, "linestyle": self.line, "markersize": 6, "linewidth": 1.5}


def facets(rows: Sequence[Row]) -> dict[tuple[Any, Any, Any], list[Row]]:
    """Return (model, dtype, batch) -> the rows that one panel can show."""
    by_panel: dict[tuple, list[Row]] = {}
    for r in rows:
        by_panel.setdefault((r["model"], r["dtype"], r["batch"]), []).append(r)
    return by_panel


def by_budget(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the kept share in the name of each method that was run with several, so that each is a line of its own."""
    shares: dict[Any, set[Any]] = {}
    for r in rows:
        shares.setdefault((r["method"], r["length"]), set()).add(r["budget"])
    several = {method for (method, _), budgets in shares.items() if len(budgets) > 1}
    named = lambda r: f"{r['method']} {r['keep_ratio']:.2g}" if r["keep_ratio"] is not None else r["method"]
    return [{**r, "method": named(r)} if r["method"] in several else r for r in rows]


def texts_of(rows: Sequence[Row]) -> list[Any]:
    """Return the texts of the rows in their order; [None] for rows of before, which have none."""
    return list(dict.fromkeys(r["text"] for r in rows)) or [None]


def reference_of(rows: Sequence[Row]) -> str | None:
    """Return the method that the others are compared with: dense, or the sweep's first."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    return "dense" if "dense" in methods else (methods[0] if methods else None)


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """Return method -> style: the reference in the text's colour, the others in the sweep's order."""
    reference = reference_of(rows)
    result = {}
    if reference is not None:
        result[reference] = Style(INK, "o", "-")
    others = [m for m in dict.fromkeys(r["method"] for r in rows) if m != reference]
    for i, method in enumerate(others):
        marker = MARKERS[(i + 1) % len(MARKERS)]
        result[method] = Style(COLOURS[i % len(COLOURS)], marker, LINES[i // len(COLOURS) % len(LINES)])
    return result


@dataclass(frozen=True)
class Spot:
    """A value at a length: the mean over seeds, and the range that they and their percentiles span."""

    length: int
    mean: float
    low: float
    high: float


def curve(rows: Sequence[Row], method: str | None, name: str, low: str = "", high: str = "") -> list[Spot]:
    """Return the values of one column against length, of points that are ok."""
    by_length: dict[int, list[Row]] = {}
    for r in rows:
        if r["method"] == method and r["status"] == "ok" and r[name] is not None and (r["length"] or 0) > 0:
            by_length.setdefault(r["length"], []).append(r)
    spots = []
    for length in sorted(by_length):
        values = [r[name] for r in by_length[length]]
        every = values + [r[n] for n in (low, high) if n for r in by_length[length] if r[n] is not None]
        spots.append(Spot(length, sum(values) / len(values), min(every), max(every)))
    return spots


def bars(spots: Sequence[Spot]) -> list[list[float]]:
    """Return the ranges in the form of matplotlib's errorbar."""
    return [[s.mean - s.low for s in spots], [s.high - s.mean for s in spots]]


def bytes_text(value: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} B"


def seconds_text(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size * 0.9999:
            return f"{value / size:.4g} {unit}"
    return f"{value:.3g} s"


def number_text(value: float) -> str:
    return f"{value:g}"


def length_text(tokens: int, short: bool = False) -> str:
    return f"{tokens // 1024:,}k" if short and tokens % 1024 == 0 else f"{tokens:,}"


# from fine to coarse: steps within a power of the base, and every how many powers
_STEPS = {
    2: (((1, 1.25, 1.5, 1.75), 1), ((1, 1.5), 1), ((1,), 1), ((1,), 2), ((1,), 4), ((1,), 10)),
    10: (
        ((1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9), 1),
        ((1, 1.5, 2, 3, 4, 5, 7), 1),
        ((1, 2, 5), 1),
        ((1, 3), 1),
        ((1,), 1),
        ((1,), 2),
        ((1,), 5),
    ),
}


def ticks(low: float, high: float, base: int, most: int = MOST_TICKS) -> list[float]:
    """Return round numbers from low to high for a log axis: the finest set of at most `most`, evenly spaced where the range is narrow."""
    numbers: list[float] = []
    for steps, every in _STEPS[base]:
        powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
        numbers = [s * float(base) ** p for p in powers if p % every == 0 for s in steps]
        numbers = [t for t in numbers if low <= t <= high]
        if len(numbers) <= most:
            break
    if len(numbers) >= 3:
        return numbers
    # bytes are round in their own unit
    unit = 1024.0 ** math.floor(math.log(high, 1024)) if base == 2 else 1.0
    return [
        t * unit for t in MaxNLocator(nbins=most - 2).tick_values(low / unit, high / unit) if low <= t * unit <= high
    ]


def log_axis(
    ax: Axes, which: str, low: float, high: float, text, base: int = 10, room: float = 0.0, pad: float = 0.06
) -> None:
    """Make an axis logarithmic from a little below low to a little above high, plus `room` (a fraction of it) on top."""
    around = max((high / low) ** pad, 1.12)
    low, high = low / around, high * around
    end = low * (high / low) ** (1 / (1 - room))
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    (ax.set_xlim if which == "x" else ax.set_ylim)(low, end)
    places = ticks(low, high, base, MOST_TICKS if which == "y" else 5)
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FixedFormatter([text(p) for p in places]))
    axis.set_minor_locator(NullLocator())


def length_axis(ax: Axes, lengths: Sequence[int]) -> None:
    """Set context length as a log axis, with a tick at each length that has the room for it."""
    lengths = sorted(lengths)
    span = max(math.log(lengths[-1] / lengths[0]), 1e-9)
    kept = [lengths[-1]]
    for length in reversed(lengths[:-1]):
        if math.log(kept[-1] / length) >= span / 7.5:
            kept.append(length)
    pad = max((lengths[-1] / lengths[0]) ** 0.09, 1.25)
    ax.set_xscale("log")
    ax.set_xlim(lengths[0] / pad, lengths[-1] * pad)
    short = len(kept) > 4
    ax.xaxis.set_major_locator(FixedLocator(kept))
    ax.xaxis.set_major_formatter(FixedFormatter([length_text(n, short) for n in kept]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("context, tokens")


@dataclass(frozen=True)
class Failed:
    """Failed points of one method; without a method, the number of further methods."""

    method: str | None
    text: str
    lengths: tuple[int, ...] = ()


def failures(rows: Sequence[Row]) -> list[Failed]:
    """Return one entry a method, at most SHOWN_FAILURES and one that counts the others."""
    by_method: dict[str, list[Row]] = {}
    for r in rows:
        if has_failed(r) and (r["length"] or 0) > 0:
            by_method.setdefault(r["method"], []).append(r)
    entries = [
        Failed(
            method,
            plot_text(f"{method}: {', '.join(dict.fromkeys(str(r['status']) for r in mine))}", 60),
            tuple(sorted({r["length"] for r in mine})),
        )
        for method, mine in by_method.items()
    ]
    rest = entries[SHOWN_FAILURES:]
    if len(rest) <= 1:
        return entries
    every = tuple(sorted({n for f in rest for n in f.lengths}))
    return [*entries[:SHOWN_FAILURES], Failed(None, f"and {len(rest)} methods more", every)]


def failure_room(rows: Sequence[Row]) -> float:
    """Return the fraction of the axes that the failed points' lines need on top."""
    failed = failures(rows)
    return 0.05 + 0.06 * len(failed) if failed else 0.0


def mark_failures(ax: Axes, rows: Sequence[Row], looks: Mapping[str, Style]) -> None:
    """Draw a line on top of the axes for each method that failed: crosses at the lengths, and the status."""
    where = blended_transform_factory(ax.transData, ax.transAxes)
    for i, failed in enumerate(failures(rows)):
        y = 0.97 - 0.06 * i
        color = INK if failed.method is None else looks[failed.method].color
        ax.plot(failed.lengths, [y] * len(failed.lengths), "x", transform=where, color=color, markersize=7, mew=2)
        # left of the crosses, or right where there is no room
        place = ax.transAxes.inverted().transform(ax.transData.transform((failed.lengths[0], 1)))[0]
        left = place > 0.4
        at = failed.lengths[0 if left else -1]
        put = {"xytext": (-8 if left else 8, 0), "textcoords": "offset points", "ha": "right" if left else "left"}
        ax.annotate(failed.text, (at, y), xycoords=where, va="center", fontsize=8, color=color, **put).set_in_layout(
            False
        )


def list_failures(ax: Axes, rows: Sequence[Row], looks: Mapping[str, Style]) -> None:
    """List the failed points of one length in the corner of a panel that has no axis of length."""
    for i, failed in enumerate(failures(rows)):
        color = INK if failed.method is None else looks[failed.method].color
        put = {"xycoords": "axes fraction", "va": "center", "fontsize": 8, "color": color}
        ax.annotate(f"\u00d7 {failed.text}", (0.02, 0.97 - 0.06 * i), **put).set_in_layout(False)


_PLACES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]


@dataclass(frozen=True)
class Label:
    """Name beside a point."""

    x: float
    y: float
    text: str
    color: str


def label_points(ax: Axes, labels: Sequence[Label], size: float = 8.5) -> None:
    """Write each label beside its point where it covers no other text, no point, and stays within the axes."""
    fig = ax.get_figure(root=True)
    if fig is None or not labels:
        return
    fig.draw_without_rendering()
    scale = fig.dpi / 72
    room = ax.get_window_extent()
    taken = [t.get_window_extent() for t in ax.texts] + [box for line in ax.lines for box in _segments(line)]
    for at in labels:
        px, py = ax.transData.transform((at.x, at.y))
        taken.append(Bbox.from_extents(px - 5 * scale, py - 5 * scale, px + 5 * scale, py + 5 * scale))
    # from the right: the last ones find the room on their left
    for at in sorted(labels, key=lambda p: -p.x):
        place = {"xycoords": "data", "textcoords": "offset points", "xytext": (0, 0)}
        label = ax.annotate(
            plot_text(at.text, 30), (at.x, at.y), fontsize=size, color=at.color, va="center", ha="center", **place
        )
        label.set_in_layout(False)
        extent = label.get_window_extent()
        point = ax.transData.transform((at.x, at.y))
        box = _free_box(point, extent.width, extent.height, scale, taken, room)
        taken.append(box)
        dx, dy = (box.x0 + box.x1) / 2 - point[0], (box.y0 + box.y1) / 2 - point[1]
        label.xyann = (dx / scale, dy / scale)
        if max(abs(dx) - box.width / 2, abs(dy) - box.height / 2) > 10 * scale:
            line = {"arrowstyle": "-", "color": at.color, "lw": 0.6, "shrinkB": 4}
            far = ax.annotate("", (at.x, at.y), label.xyann, textcoords="offset points", arrowprops=line)
            far.set_in_layout(False)


def _segments(line: Line2D) -> list[Bbox]:
    """Return thin boxes along the upright and level parts of a line."""
    places = line.get_transform().transform(line.get_xydata())
    ends = [(a, b) for a, b in itertools.pairwise(places) if min(abs(b - a)) < 1]
    return [Bbox([np.minimum(a, b) - 2, np.maximum(a, b) + 2]) for a, b in ends]


def _free_box(point, width: float, height: float, scale: float, taken: Sequence[Bbox], room: Bbox) -> Bbox:
    """Return the place near a point that covers least of the taken boxes and of the space outside `room`."""
    best, least = Bbox.null(), math.inf
    for away in (7, 15, 24, 34):
        for dx, dy in _PLACES:
            # a label to the side of its point is lifted by half, one above or below by all of the distance
            rise = (away * scale + height / 2) * (0.6 if dx else 1)
            x, y = point[0] + dx * (away * scale + width / 2), point[1] + dy * rise
            box = Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
            cost = sum(_overlap(box, t) for t in taken) + 4 * (width * height - _overlap(box, room))
            if cost < least - 1e-6:
                best, least = box, cost
    return best


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height
