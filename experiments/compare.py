"""`python -m experiments.compare A B`: what changed from one sweep to another, cell by cell; exit 1 on a regression.

A and B are workdirs.  Times are judged by their percentiles, see `lcx.report.compare`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from experiments import cli
from lcx.errors import UserError

FLAGS = flags.FLAGS
MOST_LINES = 20  # of cells in only one sweep
STYLES = {"regression": "bold red", "better": "green"}
SHOWN = (
    ("status", "status"),
    ("TTFT B/A", "ttft_s"),
    ("decode B/A", "decode_s"),
    ("cache", "cache_bytes"),
    ("peak cache", "peak_cache_bytes"),
    ("weights", "weight_bytes"),
    ("scratch", "temp_bytes"),
    ("peak", "peak_bytes"),
    ("NLL", "nll"),
    ("KL", "kl"),
)


def define_flags() -> None:
    flags.DEFINE_float("threshold", 0.05, "A time is a regression from this ratio above 1.", lower_bound=0.0)
    flags.DEFINE_float("quality_tolerance", 1e-6, "NLL and KL may be higher by this, nats a token.", lower_bound=0.0)


def main() -> None:
    from lcx.report.compare import compare
    from lcx.report.escape import shown_errors
    from lcx.report.source import load

    with shown_errors():
        folders = cli.arguments()
        if len(folders) != 2:
            raise UserError(f"give two workdirs, {len(folders)} are given: python -m experiments.compare A B")
        a, b = (load(Path(folder)) for folder in folders)
        comparison = compare(a, b, FLAGS.threshold, FLAGS.quality_tolerance)
        _show(comparison)
    if comparison.regressions:
        sys.exit(1)


def _show(comparison) -> None:
    """Print one line a cell with the columns that changed anywhere, then the regressions with their values, and the omitted comparisons."""
    from rich.console import Console
    from rich.text import Text

    from lcx.report.compare import RULE
    from lcx.text import visible

    console = Console(highlight=False, markup=False, emoji=False)
    console = Console(highlight=False, markup=False, emoji=False, width=max(console.width, 132))

    def say(what: str, style: str = "") -> None:
        console.print(Text(visible(what, 1_000), style), soft_wrap=True)

    changed = {c.name for changes in comparison.cells.values() for c in changes if c.before != c.after}
    compared = {c.name for changes in comparison.cells.values() for c in changes}
    if changed:
        console.print(_table(comparison, changed))
    for cell, change in comparison.regressions:
        say(f"regression: {_name(cell)}: {change.name} {change.text}", "red")
    for name, cells in (("A", comparison.only_before), ("B", comparison.only_after)):
        for cell in cells[:MOST_LINES]:
            say(f"only in {name}: {_name(cell)}")
        if len(cells) > MOST_LINES:
            say(f"only in {name}: {len(cells) - MOST_LINES} more")
    for note in comparison.notes:
        say(note)
    equal = [title for title, name in SHOWN if name not in changed and name in compared]
    if equal:
        say(f"equal in every cell: {', '.join(equal)}")
    verdicts = [c.verdict for changes in comparison.cells.values() for c in changes]
    worse, better = verdicts.count("regression"), verdicts.count("better")
    say(f"{worse} regressions, {better} better, of {len(verdicts)} values in {len(comparison.cells)} cells")
    say(RULE)


def _name(cell) -> str:
    method, model, dtype, batch, length, seed = cell
    return f"{method} at {length} tokens, {model}, {dtype}, batch {batch}, seed {seed}"


def _table(comparison, changed: set[str]):
    from rich.text import Text

    from lcx.report.compare import CELL
    from lcx.terminal import empty_table
    from lcx.text import visible

    def text(value, style: str = "") -> Text:
        # Text, not str: rich would read [red] as markup
        return Text(visible(value, 100), style)

    table = empty_table()
    # method and length always, the others where they differ
    varies = [
        i for i, name in enumerate(CELL) if name in ("method", "length") or len({c[i] for c in comparison.cells}) > 1
    ]
    columns = [(title, name) for title, name in SHOWN if name in changed]
    for i in varies:
        table.add_column(CELL[i], overflow="fold")
    for title, _ in columns:
        table.add_column(title, no_wrap=True)
    for cell, changes in comparison.cells.items():
        by_name = {change.name: change for change in changes}
        line = [text(cell[i]) for i in varies]
        for _, name in columns:
            change = by_name.get(name)
            line.append(text("-") if change is None else text(change.short, STYLES.get(change.verdict, "")))
        table.add_row(*line)
    return table


if __name__ == "__main__":
    define_flags()
    cli.run("compare", main, takes_arguments=True)
