"""A sweep while it runs: a bar on a terminal, one line a row, and an orderly end for Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lcx.sweep.line import line
from lcx.sweep.rows import read_rows
from lcx.sweep.scheduler import Scheduler, Stopped
from lcx.sweep.store import OPEN, Store


def watch(scheduler: Scheduler, store: Store) -> int | None:
    """Run the points that are not done, and return the signal that stopped the sweep, or None where all points have ended."""
    console = Console(highlight=False)
    caught: list[int] = []

    def stop(number, _frame) -> None:
        caught.append(number)
        scheduler.stop.set()

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    bars = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    rows = {row["key"]: row for row in read_rows(store)}
    try:
        with Progress(*bars, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("points", total=len(rows))

            def show(row, note: str = "") -> None:
                console.print(line(row) + note, markup=False, soft_wrap=True)
                progress.advance(task)

            for row in rows.values():
                if row["status"] not in OPEN:
                    show(row, "  (done before)")

            def on_row(job, _row) -> None:
                show({row["key"]: row for row in read_rows(store)}[job.key])

            scheduler.on_row = on_row
            scheduler.run()
    except Stopped:
        return caught[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return None
