"""Figures of a sweep's rows, for pages, files and notebooks.

Rows are dicts as `read_rows` or `run_here` give.  Each function makes a figure, one row of panels for each model, type and
batch, or draws one of these on axes that are given.  Seeds are averaged; bars span them.  A point that failed is a cross on top, at its
length, with its status.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lcx.errors import UserError, nearest
from lcx.report import axes
from lcx.report.axes import INK, Label, Picture
from lcx.report.escape import plot_text
from lcx.report.heat import needle as needle
from lcx.report.quality_panels import draw_pareto, draw_share, nothing, share_lengths
from lcx.report.source import has_failed, write
from lcx.sweep.schema import Row

Rows = Sequence[Row]
Looks = dict[str, axes.Style]
Draw = Callable[[Axes, Rows, Looks], list[Label]]  # returns labels to place once the panels have their sizes
FORMATS = (".png", ".svg")
MOST_FACETS = 6  # rows of panels that a figure has at most
MOST_METHODS = 40  # that a figure draws; the legend counts the others
MOST_TEXTS = 3  # panels of quality that a figure has side by side


def facet_title(facet: tuple[Any, Any, Any], rows: Rows, longest: int = 60) -> str:
    model, dtype, batch = facet
    devices = list(dict.fromkeys(r["device"] for r in rows if r["device"]))
    words = (model, dtype, f"batch {batch}" if batch != 1 else "", *devices)
    return plot_text(", ".join(str(word) for word in words if word), longest)


def memory(rows: Rows, ax: Axes | None = None, looks: Looks | None = None) -> Figure:
    """Draw the bytes of the KV cache against context length."""

    return _figure(rows, [_cache], None if ax is None else [ax], looks)


def peak(rows: Rows, ax: Axes | None = None, looks: Looks | None = None, capacity: Sequence[str] = ()) -> Figure:
    """Draw predicted peak memory against context length, with the memory of GPUs.

    Args:
      rows, ax, looks: as in the other figures.
      capacity: names of `lcx.plan.targets.TARGETS`.

    Raises:
      UserError: no such GPU.
    """
    lines = capacities(capacity)

    def draw(ax: Axes, rows: Rows, looks: Looks) -> list[Label]:
        failed = [r for r in rows if has_failed(r) and (r["peak_bytes"] or 0) > 0 and (r["length"] or 0) > 0]
        _against_length(ax, rows, looks, "peak_bytes", extra=[*lines.values(), *(r["peak_bytes"] for r in failed)])
        for r in failed:
            ax.plot([r["length"]], [r["peak_bytes"]], "x", color=looks[r["method"]].color, markersize=7, mew=2)
        ax.set_ylabel("peak memory, predicted")
        for name, size in lines.items():
            ax.axhline(size, color=INK, linestyle=(0, (6, 3)), linewidth=1)
            note = f"{name}, {axes.bytes_text(size)}"
            ax.annotate(
                note,
                (0.01, size),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=8,
            )
        return []

    return _figure(rows, [draw], None if ax is None else [ax], looks)


def capacities(names: Sequence[str]) -> dict[str, int]:
    """Return the memory of GPUs in bytes.  Raises UserError for an unknown name."""
    if not names:
        return {}
    from lcx.plan.targets import TARGETS

    for name in names:
        if name not in TARGETS:
            raise UserError(f"capacity={name!r}: allowed are {', '.join(TARGETS)}{nearest(name, TARGETS)}")
    return {name: TARGETS[name].memory_bytes for name in names}


def latency(rows: Rows, ax: Sequence[Axes] | None = None, looks: Looks | None = None) -> Figure:
    """Draw time to first token and time of a decode step against context length; `ax`: one for each."""
    return _figure(rows, [_ttft, _decode], ax, looks)


def _cache(ax: Axes, rows: Rows, looks: Looks) -> list[Label]:
    _against_length(ax, rows, looks, "cache_bytes")
    ax.set_ylabel("KV cache")
    return []


def _ttft(ax: Axes, rows: Rows, looks: Looks) -> list[Label]:
    _against_length(ax, rows, looks, "ttft_s", "ttft_p10_s", "ttft_p90_s")
    ax.set_ylabel("time to first token")
    return []


def _decode(ax: Axes, rows: Rows, looks: Looks, spread: bool = True) -> list[Label]:
    low, high = ("decode_p10_s", "decode_p90_s") if spread else ("", "")
    _against_length(ax, rows, looks, "decode_s", low, high)
    ax.set_ylabel("decode, a step")
    return []


def pareto(rows: Rows, ax: Axes | None = None, length: int | None = None, looks: Looks | None = None) -> Figure:
    """Draw quality against bytes of the cache at one length, by default the longest that has both quantities; a panel for each text.

    A method is on the front, and filled, when none with as few bytes is as good.  Dense is the line at its bytes.
    """
    draws = [functools.partial(draw_pareto, length=length, text=text) for text in axes.texts_of(rows)[:MOST_TEXTS]]
    return _figure(
        rows,
        draws[:1] if ax is not None else draws,
        None if ax is None else [ax],
        looks,
        legend=False,
        width=6.2,
        height=4.4,
    )


def quality_of_share(
    rows: Rows, ax: Axes | None = None, length: int | None = None, looks: Looks | None = None
) -> Figure:
    """Draw quality against the kept share of the prompt at one length, by default the longest; a panel for each text.

    NLL less dense attention's, under the rows' protocol, with one standard error of the paired difference.  Methods without a budget are
    not drawn: their share is 1.
    """
    draws = [functools.partial(draw_share, length=length, text=text) for text in axes.texts_of(rows)[:MOST_TEXTS]]
    return _figure(
        rows, draws[:1] if ax is not None else draws, None if ax is None else [ax], looks, width=6.2, height=4.4
    )


def overview(rows: Rows, looks: Looks | None = None) -> Figure:
    """Draw memory, decode time, and quality against memory at the longest length in one picture."""

    quality = [functools.partial(draw_pareto, text=text) for text in axes.texts_of(rows)[:2]]
    return _figure(
        rows, [_cache, functools.partial(_decode, spread=False), *quality], None, looks, width=4.35, height=4.0
    )


def every(rows: Rows, capacity: Sequence[str] = ()) -> dict[str, Figure]:
    """Return name -> figure for every figure that the rows have values for."""
    drawn = {
        "overview": overview(rows),
        "share": quality_of_share(rows) if share_lengths(rows) else None,
        "memory": memory(rows),
        "peak": peak(rows, capacity=capacity),
        "latency": latency(rows),
        "pareto": pareto(rows),
        "needle": needle(rows),
    }
    return {name: fig for name, fig in drawn.items() if fig is not None}


def save(fig: Figure, path: Path | str) -> None:
    """Write a figure, PNG or SVG by the name's end, the same bytes for the same rows.

    Raises:
      UserError: another format, or a file that cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(f"out={str(path)!r}: allowed are names that end in {' or '.join(FORMATS)}")
    write(path, render(fig, path.suffix[1:]))


def render(fig: Figure, form: str, text_as_paths: bool = True, facecolor: str = "white") -> bytes:
    """Render the figure as PNG or SVG, without date; text of an SVG as paths, which look the same everywhere, or as text."""
    out = BytesIO()
    metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    settings = {"svg.hashsalt": "lcx", "svg.fonttype": "path" if text_as_paths else "none"}
    with axes.quiet(), matplotlib.rc_context(settings):
        fig.savefig(out, format=form, dpi=110, metadata=metadata, facecolor=facecolor)
    return out.getvalue()


def _figure(
    rows: Rows,
    draws: Sequence[Draw],
    given: Sequence[Axes] | None,
    looks: Looks | None,
    legend: bool = True,
    width: float = 4.9,
    height: float = 3.7,
) -> Figure:
    """Return panels side by side, a row of them for each facet; or the panels of one facet on the given axes."""
    if draws and getattr(draws[0], "func", None) is not draw_share:
        rows = axes.by_budget(rows)
        looks = axes.styles(rows) if looks is None or {r["method"] for r in rows} - set(looks) else looks
    groups = axes.facets(rows)
    looks = axes.styles(rows) if looks is None else looks
    if given is not None:
        if len(groups) > 1 or len(given) != len(draws):
            raise UserError(
                f"ax: rows hold {len(groups)} combinations of model, dtype and batch; give rows of one, and {len(draws)} axes"
            )
        for ax, draw in zip(given, draws, strict=True):
            axes.label_points(ax, draw(ax, rows, looks))
        return cast(Figure, given[0].get_figure(root=True))
    kept = dict(list(groups.items())[:MOST_FACETS])
    with axes.styled():
        wide = width * len(draws)
        methods = list(dict.fromkeys(r["method"] for own in kept.values() for r in own))
        drawn = set(methods[:MOST_METHODS])
        high = height * max(len(kept), 1) + 0.1 + (0.2 * _legend_lines(methods, wide) if methods and legend else 0)
        fig = Picture(figsize=(wide, high), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
        if not kept:
            fig.text(0.5, 0.5, "no points", ha="center")
            return fig
        panels = fig.subplots(len(kept), len(draws), squeeze=False)
        labels: list[tuple[Axes, list[Label]]] = []
        for line, (facet, own) in zip(panels, kept.items(), strict=True):
            title = facet_title(facet, own, int(wide * 13))
            line[0].set_title(title, loc="left", fontsize=9.5)
            own = [r for r in own if r["method"] in drawn]
            labels += [(ax, draw(ax, own, looks)) for ax, draw in zip(line, draws, strict=True)]
        if legend:
            _legend(fig, methods, looks)
        # only now do the panels have their sizes
        for ax, of_panel in labels:
            axes.label_points(ax, of_panel)
    return fig


def _legend(fig: Figure, methods: Sequence[str], looks: Looks) -> None:
    # matplotlib leaves names that begin with _ out of a legend
    names = [f" {name}" if name.startswith("_") else name for name in _names(methods)]
    handles = [Line2D([], [], **looks[m].plot) for m in methods[:MOST_METHODS]]
    handles += [Line2D([], [], linestyle="none") for _ in names[len(handles) :]]
    columns = -(-len(names) // _legend_lines(methods, fig.get_figwidth()))
    fig.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9, columnspacing=1.4)


def _legend_lines(methods: Sequence[str], width: float) -> int:
    """Return the lines that the legend takes in a figure of this width in inches."""
    names = _names(methods)
    widest = 0.075 * max(len(name) for name in names) + 0.6
    return -(-len(names) // max(1, int(width / widest)))


def _names(methods: Sequence[str]) -> list[str]:
    """Return the legend's names; the last one counts the omitted names."""
    more = len(methods) - MOST_METHODS
    return [plot_text(m, 30) for m in methods[:MOST_METHODS]] + ([f"and {more:,} more, not drawn"] if more > 0 else [])


def _bars(ax: Axes, rows: Rows, looks, name: str, low: str, high: str) -> None:
    """Draw one bar a method: at one length a line would be a dot."""
    spots = {method: s for method in looks for s in axes.curve(rows, method, name, low, high) if s.low > 0}
    if not spots:
        nothing(ax, "no point has this value")
        return
    heights = [s.mean for s in spots.values()]
    ax.bar(range(len(spots)), heights, color=[looks[m].color for m in spots], width=0.7, zorder=3)
    if any(s.low < s.high for s in spots.values()):
        ax.errorbar(
            range(len(spots)), heights, axes.bars(list(spots.values())), fmt="none", ecolor=INK, elinewidth=1, zorder=4
        )
    ax.set_xticks(range(len(spots)), [plot_text(m, 16) for m in spots], rotation=35, ha="right", rotation_mode="anchor")
    in_bytes, top = name.endswith("_bytes"), max(s.high for s in spots.values())
    unit = 1024.0 ** math.floor(math.log(top, 1024)) if in_bytes else 1.0
    places = [p * unit for p in MaxNLocator(6).tick_values(0, top / unit) if p * unit <= 1.1 * top]
    text = axes.bytes_text if in_bytes else axes.seconds_text
    ax.set_yticks(places, [text(p) if p else "0" for p in places])
    ax.grid(False, axis="x")
    ax.set_xlabel(f"{next(iter(spots.values())).length:,} tokens")


def _against_length(
    ax: Axes, rows: Rows, looks, name: str, low: str = "", high: str = "", extra: Sequence[float] = ()
) -> None:
    """Draw one line a method, both axes logarithmic; `extra` are further values that must be seen."""
    values = list(extra)
    lengths = {r["length"] for r in rows if (r["length"] or 0) > 0}
    if len(lengths) == 1 and not extra and not any(has_failed(r) for r in rows):
        _bars(ax, rows, looks, name, low, high)
        return
    for method, look in looks.items():
        spots = [s for s in axes.curve(rows, method, name, low, high) if s.low > 0]
        if not spots:
            continue
        x, y = [s.length for s in spots], [s.mean for s in spots]
        ax.plot(x, y, **look.plot, zorder=3)
        if any(s.low < s.high for s in spots):
            ax.errorbar(x, y, axes.bars(spots), fmt="none", ecolor=look.color, elinewidth=1.2, alpha=0.5)
        values += [v for s in spots for v in (s.low, s.high)]
    if lengths:
        axes.length_axis(ax, sorted(lengths))
    if values:
        in_bytes = name.endswith("_bytes")
        text = axes.bytes_text if in_bytes else axes.seconds_text
        axes.log_axis(ax, "y", min(values), max(values), text, 2 if in_bytes else 10, axes.failure_room(rows))
    else:
        nothing(ax, "no point has this value")
    axes.mark_failures(ax, rows, looks)
