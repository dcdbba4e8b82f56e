"""`python -m experiments.sweep --config=configs/smollm2_quick.py`: memory, latency and quality of many methods at many lengths.

Rows are on disk as they are done; the same --workdir again continues.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from absl import flags

from experiments import cli
from lcx.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    cli.define_flags("configs/smollm2_quick.py")
    flags.DEFINE_string(
        "lengths", None, "Context lengths in tokens, such as 512,1024,2048; the default is the config's."
    )
    flags.DEFINE_string("workdir", None, "Where rows go; the default is runs/NAME-HASH.")


def _lengths(text: str) -> tuple[int, ...]:
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"lengths={text!r}: allowed are tokens with commas between, such as 512,1024")
    return tuple(int(part) for part in parts)


def main() -> None:
    from lcx.experiment import Sweep
    from lcx.sweep.points import points

    sweep = cli.config()
    if not isinstance(sweep, Sweep):
        # one method is a sweep of it beside dense attention
        names = dict.fromkeys(("configs/dense.py", FLAGS.config))
        sweep = Sweep(tuple(names), model=sweep.model, lengths=sweep.lengths, chunk_size=FLAGS.chunk_size)
    if FLAGS.lengths is not None:
        sweep = replace(sweep, lengths=_lengths(FLAGS.lengths))
    todo = points(sweep, FLAGS.dtype, FLAGS.budget, FLAGS.keep_ratio)
    model = cli.load(sweep)
    model.check_length(max(p.length for p in todo), FLAGS.allow_extrapolation)
    name = f"{Path(FLAGS.config).stem}-{hashlib.sha256(repr(todo).encode()).hexdigest()[:8]}"
    workdir = Path(FLAGS.workdir or f"runs/{name}")

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from lcx.sweep import show
    from lcx.sweep.runner import run

    console = Console(highlight=False)
    bars = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*bars, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("points", total=len(todo))

        def on_row(point, row, was_there):
            text = show.line(point, row) + ("  (done before)" if was_there else "")
            console.print(text, markup=False, soft_wrap=True)
            progress.advance(task)

        rows = run(model, todo, workdir, on_row)
    wide = Console(highlight=False, width=max(console.width, 132))
    wide.print(show.table(rows, f"{model.name}, {FLAGS.dtype}, text {sweep.text}"))
    console.print(show.notes(rows), markup=False)
    show.figure(rows, workdir / "sweep.png")
    console.print(f"rows: {workdir / 'rows.sqlite'}   figure: {workdir / 'sweep.png'}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    define_flags()
    cli.run("sweep", main)
