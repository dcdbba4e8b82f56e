"""Map of the tokens that a method keeps: layers against positions, the share of heads that hold each."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lcx.measure.kept import Kept
from lcx.report import axes
from lcx.report.axes import Picture
from lcx.report.escape import plot_text


def kept_map(kept: Kept, title: str = "") -> Figure:
    """Draw layers x positions, from 0, no KV head holds the position, to 1, all of them do."""
    layers, _, tokens = kept.held.shape
    with axes.styled():
        fig = Picture(figsize=(8.0, min(7.0, 1.6 + 0.13 * layers)), layout="constrained")
        ax = fig.subplots()
        image = ax.imshow(
            kept.by_position,
            cmap="cividis",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, tokens - 0.5, layers - 0.5, -0.5),
        )
        ax.grid(visible=False)
        ax.set_xlabel("position, tokens")
        ax.set_ylabel("layer")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title:
            ax.set_title(plot_text(title, 90), fontsize=9.5)
        fig.colorbar(image, ax=ax, aspect=30).set_label("share of KV heads that keep it")
    return fig
