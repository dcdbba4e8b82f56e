"""`python -m experiments.sweep --config=configs/smollm2_quick.py`: memory, latency and quality of many methods at many lengths.

Points run in child processes; rows are on disk as they are done; the same --workdir again continues.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.parsers import in_bytes, pairs, shares, whole_numbers, words
from lcx.errors import UserError

FLAGS = flags.FLAGS
DTYPES = ("float32", "bfloat16")
RETRY = ("error", "timeout", "killed", "oom", "oom_predicted", "nonfinite")


def define_flags() -> None:
    cli.define_flags("configs/smollm2_quick.py", several=True)
    flags.DEFINE_string(
        "lengths", None, "Context lengths in tokens, such as 512,1024,2048; the default is the config's."
    )
    flags.DEFINE_string("batch", "1", "Texts side by side, such as 1,4.")
    flags.DEFINE_string("seed", "0", "Which passages of the text, such as 0,1,2; 0 is its start.")
    flags.DEFINE_string(
        "text_file", None, "UTF-8 files, or names of texts that lcx ships, with commas between; a row for each."
    )
    flags.DEFINE_string(
        "protocol", "decode,prompt", "How continuations are fed: decode (token by token), prompt (one step), or both."
    )
    flags.DEFINE_integer(
        "continuation", None, "Tokens scored after each prompt; the default is the config's.", lower_bound=1
    )
    flags.DEFINE_integer("passages", None, "Passages of each text; the default is the config's.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Timed prefills of a point, in turns with dense attention's.", lower_bound=1)
    flags.DEFINE_integer("warmups", 1, "Untimed prefills before them, and untimed decode steps.", lower_bound=0)
    flags.DEFINE_string(
        "tasks",
        "",
        "Further quality figures: ppl, longppl, passkey, needle, ruler, and files that end in .jsonl, with commas between.",
    )
    flags.DEFINE_string(
        "questions", "seen,unseen", "Whether tasks show the question while the prompt is compressed; both."
    )
    flags.DEFINE_integer("samples", 10, "Samples of each task.", lower_bound=1)
    flags.DEFINE_string("workdir", None, "Where rows go; the default is runs/NAME-HASH.")
    flags.DEFINE_string("fork", None, "A new folder: starts anew there with the rows of --workdir that stay the same.")
    flags.DEFINE_string("retry", "", f"Points that ended so run again: {', '.join(RETRY)}, with commas between.")
    flags.DEFINE_enum(
        "isolate", None, ["point", "recipe", "none"], "A fresh child for each; default: recipe, point on a GPU."
    )
    flags.DEFINE_integer("workers", 1, "Children side by side; their times disturb each other.", lower_bound=1)
    flags.DEFINE_enum(
        "launcher",
        "local",
        ["local", "slurm", "submitit_local", "submitit_debug"],
        "Children of this machine, or Slurm jobs, a point each (lcx[slurm]); submitit_* try the jobs without a cluster.",
    )
    flags.DEFINE_string("slurm_args", "", "submitit's parameters, such as slurm_partition=gpu,gpus_per_node=1.")
    flags.DEFINE_float("time_limit", 3_600.0, "Seconds a point may take.", lower_bound=1.0)
    flags.DEFINE_string("memory_limit", None, "Such as 16GiB: points whose predicted peak is above are not run.")
    flags.DEFINE_string("compile_cache", None, "Folder of compiled programs; the default is WORKDIR/compile_cache.")
    flags.DEFINE_string(
        "plan",
        None,
        "Devices such as h200,2xa100-80gb,cpu: compile for them, print what the points need there, run nothing.",
    )
    flags.DEFINE_bool("report", True, "Write report.html and the figure at the end.")


def main() -> None:
    from lcx.config_files import load_config
    from lcx.experiment import Sweep
    from lcx.measure.protocols import PROTOCOLS
    from lcx.sweep.run import as_sweep
    from lcx.sweep.settings import Settings
    from lcx.tasks.sample import QUESTIONS

    config = load_config(FLAGS.config, cli.changes())
    changes = {} if isinstance(config, Sweep) else {FLAGS.config: cli.changes()}
    sweep = as_sweep(config, FLAGS.config)
    if FLAGS.chunk_size is not None:
        sweep = sweep.with_chunks(FLAGS.chunk_size)
    if FLAGS.lengths is not None:
        sweep = replace(sweep, lengths=whole_numbers("lengths", FLAGS.lengths))
    repeats = FLAGS.repeats if FLAGS["repeats"].present or sweep.repeats is None else sweep.repeats
    settings = Settings(
        continuation=FLAGS.continuation or sweep.continuation,
        decode_steps=sweep.decode_steps,
        repeats=repeats,
        warmups=FLAGS.warmups,
        passages=FLAGS.passages or sweep.passages,
        protocols=words("protocol", FLAGS.protocol, PROTOCOLS),
        tasks=tuple(part.strip() for part in FLAGS.tasks.split(",") if part.strip()),
        questions=words("questions", FLAGS.questions, QUESTIONS),
        samples=FLAGS.samples,
        memory_limit=None if FLAGS.memory_limit is None else in_bytes("memory_limit", FLAGS.memory_limit),
        allow_extrapolation=FLAGS.allow_extrapolation,
    )
    axes = {
        "dtypes": words("dtype", FLAGS.dtype, DTYPES),
        "batches": whole_numbers("batch", FLAGS.batch),
        "seeds": whole_numbers("seed", FLAGS.seed, 0),
        "texts": None if FLAGS.text_file is None else tuple(part.strip() for part in FLAGS.text_file.split(",")),
        "budgets": () if FLAGS.budget is None else whole_numbers("budget", FLAGS.budget),
        "keep_ratios": () if FLAGS.keep_ratio is None else shares("keep_ratio", FLAGS.keep_ratio),
        "implementation": FLAGS.implementation,
        "changes": changes,
    }
    retry = words("retry", FLAGS.retry, RETRY)
    models = FLAGS.model.split(",") if FLAGS.model is not None else [sweep.model]
    if FLAGS.plan is not None:
        _plan(sweep, settings, models, axes)
        return
    _run(sweep, settings, models, axes, retry)


def _plan(sweep, settings, models, axes) -> None:
    """Print what the points need on devices that need not be there."""
    from rich.console import Console

    from lcx.plan import device, shape, show
    from lcx.sweep.planned import planned_rows
    from lcx.sweep.points import specs

    devices = [device(part.strip()) for part in FLAGS.plan.split(",")]
    if len({d.name for d in devices}) < len(devices):
        raise UserError(f"plan={FLAGS.plan!r}: give each device once")
    points, shapes = specs(sweep, settings, models=models, **axes), {m: shape(m) for m in models}
    console = Console(highlight=False)
    with console.status("compiling ...") as status:

        def on_row(row) -> None:
            status.update(f"compiled {row.job.method}, {row.at.length:,} tokens, {row.job.device.name}")

        rows = planned_rows(points, shapes, devices, on_row)
    wide = Console(highlight=False, width=max(console.width, 132))
    for table in dict.fromkeys((r.job.device.name, r.job.model.name, r.job.dtype, r.job.setting.batch) for r in rows):
        mine = [r for r in rows if (r.job.device.name, r.job.model.name, r.job.dtype, r.job.setting.batch) == table]
        where, model, dtype, batch = table
        wide.print(show.table(mine, f"{model} on {where}, {dtype}, batch {batch}, predicted; tokens are the prompt's"))
        for line in show.notes(mine):
            console.print(line, markup=False, soft_wrap=True)


def _run(sweep, settings, models, axes, retry) -> None:
    # resolving needs no accelerator, and one that this process had taken would be missing in the children
    import jax

    from lcx.sweep.run import Launching, run

    jax.config.update("jax_platforms", "cpu")
    launching = Launching(
        launcher=FLAGS.launcher,
        parameters={} if FLAGS.launcher == "local" else pairs("slurm_args", FLAGS.slurm_args),
        workers=FLAGS.workers,
        isolate=FLAGS.isolate,
        time_limit=FLAGS.time_limit,
        compile_cache=_path("compile_cache"),
        accept_licence=FLAGS.accept_licence,
    )
    ended = run(
        Path(FLAGS.config).stem,
        sweep,
        settings,
        models,
        axes=axes,
        workdir=_path("workdir"),
        fork=_path("fork"),
        retry=retry,
        launching=launching,
        flags={name: FLAGS[name].value for name in FLAGS if FLAGS[name].present},
    )
    if ended.signal is not None:
        _stopped(ended)
    title = f"{', '.join(dict.fromkeys(models))}, {FLAGS.dtype}"
    _show(ended, title)


def _path(flag: str) -> Path | None:
    """Return the path of a flag; None where it is not given, and for an empty --workdir or --compile_cache."""
    value = FLAGS[flag].value
    return None if value is None or (not value and flag != "fork") else Path(value)


def _stopped(ended) -> None:
    total, left = len(ended.store.jobs()), ended.store.unfinished()
    where = f"{total - left} of {total} points are in {ended.workdir}; the same command with --workdir={ended.workdir} goes on"
    print(f"sweep: stopped by {signal.Signals(ended.signal).name}; {where}", file=sys.stderr)
    sys.exit(128 + ended.signal)


def _show(ended, title: str) -> None:
    """Print the rows; write the page and the figure beside them."""
    from rich.console import Console

    from lcx.report import terminal
    from lcx.sweep.rows import read_rows

    rows, workdir = read_rows(ended.store), ended.workdir
    terminal.show(rows, title)
    written = f"rows: {ended.store.path}"
    if FLAGS.report and any(row["status"] == "ok" for row in rows):
        from lcx.report import figures, write_report
        from lcx.report.source import load

        figures.save(figures.overview(rows), workdir / "sweep.png")
        write_report(load(workdir), workdir / "report.html")
        written += f"   figure: {workdir / 'sweep.png'}   page: {workdir / 'report.html'}"
    Console(highlight=False).print(written, markup=False, soft_wrap=True)


if __name__ == "__main__":
    define_flags()
    cli.run("sweep", main)
