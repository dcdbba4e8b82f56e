"""Needle heat maps: scores, 0 to 100, by depth and context length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lcx.report import axes
from lcx.report.axes import Picture
from lcx.report.escape import plot_text
from lcx.sweep.schema import Row

Rows = Sequence[Row]
MOST_MAPS = 24


def needle(rows: Rows) -> Figure | None:
    """Draw heat maps of the score of the needles, depth against length, one a method; None where no row has them."""
    every = needle_maps(rows)
    maps = dict(list(every.items())[:MOST_MAPS])
    if not maps:
        return None
    columns = min(3, len(maps))
    lines = -(-len(maps) // columns)
    with axes.styled():
        fig = Picture(
            figsize=(4.2 * columns + 0.6, 3.1 * lines + 0.3), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
        )
        grid = fig.subplots(lines, columns, squeeze=False)
        fig.supylabel("depth of the needle", fontsize=9.5)
        if len(every) > MOST_MAPS:
            fig.suptitle(f"the first {MOST_MAPS} of {len(every):,} maps", fontsize=9.5)
        image = None
        for ax in grid.flat[len(maps) :]:
            ax.set_visible(False)
        for ax, (title, (lengths, depths, scores)) in zip(grid.flat, maps.items(), strict=False):
            image = ax.imshow(scores, cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
            ax.grid(visible=False)
            ax.set_facecolor("#80808030")
            ax.set_title(plot_text(title, 60), fontsize=9.5)
            _index_ticks(ax.xaxis, [axes.length_text(n) for n in lengths], 4)
            _index_ticks(ax.yaxis, [f"{d:g} %" for d in depths], 6)
            ax.set_xlabel("context, tokens")
            if len(lengths) * len(depths) <= 60:
                _write_scores(ax, scores)
        if image is not None:
            bar = fig.colorbar(image, ax=grid.ravel().tolist(), shrink=0.8, aspect=30)
            bar.set_label("score")
    return fig


def needle_maps(rows: Rows) -> dict[str, tuple[list[int], list[float], list[list[float]]]]:
    """Return title -> (lengths, depths, scores [depth][length], nan where none), points and seeds put together.

    All maps have the same lengths, so that what failed is seen to be missing.
    """
    several = len(axes.facets(rows)) > 1
    by_title: dict[str, dict[tuple[int, float], list[float]]] = {}
    for r in rows:
        grid = r["tasks"].get("needle") if isinstance(r["tasks"], dict) else None
        title = f"{r['method']}, {r['model']} {r['dtype']} x{r['batch']}" if several else str(r["method"])
        for length, depth, score in _cells(grid):
            by_title.setdefault(title, {}).setdefault((length, depth), []).append(score)
    maps = {}
    lengths = sorted({n for cells in by_title.values() for n, _ in cells})
    for title, cells in by_title.items():
        depths = sorted({d for _, d in cells})
        mean = {at: sum(scores) / len(scores) for at, scores in cells.items()}
        maps[title] = (lengths, depths, [[mean.get((n, d), math.nan) for n in lengths] for d in depths])
    return maps


def _cells(grid: Any) -> list[tuple[int, float, float]]:
    """Return (length, depth, score) of a grid {"lengths", "depths", "scores": [length][depth]}; nothing for a malformed one."""
    try:
        lengths, depths, scores = grid["lengths"], grid["depths"], grid["scores"]
        cells = [(int(n), float(d), float(scores[i][j])) for i, n in enumerate(lengths) for j, d in enumerate(depths)]
        return [cell for cell in cells if all(map(math.isfinite, cell))]
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        return []


def _write_scores(ax: Axes, scores: list[list[float]]) -> None:
    for i, line in enumerate(scores):
        for j, score in enumerate(line):
            if not math.isnan(score):
                # light on the dark end of the map, dark on the light one
                color = "#ffffff" if score < 55 else "#101010"
                ax.text(j, i, f"{score:.0f}", ha="center", va="center", fontsize=8, color=color)


def _index_ticks(axis, labels: list[str], most: int) -> None:
    step = max(1, -(-len(labels) // most))
    axis.set_ticks(range(0, len(labels), step), labels[::step])
