"""`python -m experiments.sweep --config=configs/smollm2_quick.py`: memory, latency and quality of many methods at many lengths.

Points run in child processes; rows are on disk as they are done; the same --workdir again continues.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from absl import flags

from experiments import cli
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
    flags.DEFINE_integer("repeats", 5, "Timed prefills of a point.", lower_bound=1)
    flags.DEFINE_integer("warmups", 1, "Untimed prefills before them, and untimed decode steps.", lower_bound=0)
    flags.DEFINE_string(
        "tasks", "", "Further quality figures: ppl, longppl, passkey, needle, ruler, with commas between."
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


def whole_numbers(name: str, text: str, least: int = 1) -> tuple[int, ...]:
    """Numbers with commas between.  Raises UserError naming the flag."""
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(
            f"{name}={text!r}: allowed are whole numbers of at least {least} with commas between, such as 512,1024"
        )
    return tuple(int(part) for part in parts)


def words(name: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Words with commas between, each of `allowed`."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for word in found:
        if word not in allowed:
            raise UserError(f"{name}={word!r}; allowed are {', '.join(allowed)}")
    return found


def _pairs(name: str, text: str) -> dict[str, str | int]:
    """NAME=VALUE pairs with commas between; a whole number becomes one."""
    found: dict[str, str | int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{name}={part!r}: allowed are NAME=VALUE pairs with commas between")
        found[key] = int(value) if value.isdecimal() else value
    return found


def in_bytes(name: str, text: str) -> int:
    """A size such as 16GiB, 500MB or 1000000."""
    units = {
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
        "TiB": 2**40,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "": 1,
    }
    for unit, factor in units.items():
        number = text.strip().removesuffix(unit).strip() if text.strip().endswith(unit) else ""
        if number.replace(".", "", 1).isdecimal():
            return int(float(number) * factor)
    raise UserError(f"{name}={text!r}: allowed are sizes such as 16GiB or 500MB")


def main() -> None:
    from lcx.config_files import load_config
    from lcx.experiment import Sweep
    from lcx.sweep.points import TASKS, Settings

    sweep = load_config(FLAGS.config, cli.changes())
    path = FLAGS.config
    changes = {}
    if not isinstance(sweep, Sweep):
        # one method is a sweep of it beside dense attention
        names = tuple(dict.fromkeys(("configs/dense.py", path)))
        changes = {path: cli.changes()}
        sweep = Sweep(names, model=sweep.model, lengths=sweep.lengths)
    if FLAGS.chunk_size is not None:
        sweep = sweep.with_chunks(FLAGS.chunk_size)
    if FLAGS.lengths is not None:
        sweep = replace(sweep, lengths=whole_numbers("lengths", FLAGS.lengths))
    repeats = FLAGS.repeats if FLAGS["repeats"].present or sweep.repeats is None else sweep.repeats
    settings = Settings(
        continuation=sweep.continuation,
        decode_steps=sweep.decode_steps,
        repeats=repeats,
        warmups=FLAGS.warmups,
        text=sweep.text,
        tasks=words("tasks", FLAGS.tasks, TASKS),
        samples=FLAGS.samples,
        memory_limit=None if FLAGS.memory_limit is None else in_bytes("memory_limit", FLAGS.memory_limit),
        allow_extrapolation=FLAGS.allow_extrapolation,
    )
    axes = {
        "dtypes": words("dtype", FLAGS.dtype, DTYPES),
        "batches": whole_numbers("batch", FLAGS.batch),
        "seeds": whole_numbers("seed", FLAGS.seed, 0),
        "budget": FLAGS.budget,
        "keep_ratio": FLAGS.keep_ratio,
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
    found, shapes = specs(sweep, settings, models=models, **axes), {m: shape(m) for m in models}
    console = Console(highlight=False)
    with console.status("compiling ...") as status:

        def on_row(row) -> None:
            status.update(f"compiled {row.method}, {row.length:,} tokens, {row.device}")

        rows = planned_rows(found, shapes, devices, on_row)
    wide = Console(highlight=False, width=max(console.width, 132))
    for table in dict.fromkeys((r.device, r.model, r.dtype, r.batch) for r in rows):
        mine = [r for r in rows if (r.device, r.model, r.dtype, r.batch) == table]
        where, model, dtype, batch = table
        wide.print(show.table(mine, f"{model} on {where}, {dtype}, batch {batch}, predicted; tokens are the prompt's"))
        for line in show.notes(mine):
            console.print(line, markup=False, soft_wrap=True)


def _run(sweep, settings, models, axes, retry) -> None:
    from lcx import texts
    from lcx.pretrained import load_arrays
    from lcx.sweep.points import Loaded
    from lcx.sweep.runner import open_sweep, read_rows, resolve_all, write_run
    from lcx.sweep.scheduler import Scheduler

    env = dict(os.environ)
    # resolving needs no accelerator, and one that this process had taken would be missing in the children
    import jax

    jax.config.update("jax_platforms", "cpu")
    text = texts.read(settings.text)
    loaded = {}
    for name in dict.fromkeys(models):
        found = load_arrays(name, accept_licence=FLAGS.accept_licence)
        loaded[name] = Loaded(found.config, found.sha256)
        _check_text(settings, sweep, text, found.tokenizer)
    _, jobs = resolve_all(sweep, settings, loaded, **axes)
    name = f"{Path(FLAGS.config).stem}-{hashlib.sha256(repr([j.key for j in jobs]).encode()).hexdigest()[:8]}"
    workdir = Path(FLAGS.workdir or f"runs/{name}")
    fork = None if FLAGS.fork is None else Path(FLAGS.fork)
    launch = _launcher(fork or workdir)
    store = open_sweep(workdir, jobs, fork)
    workdir = fork or workdir
    if retry:
        store.reset(retry)
    given = {name: FLAGS[name].value for name in FLAGS if FLAGS[name].present}
    write_run(workdir, jobs, {n: (m.sha256, m.config) for n, m in loaded.items()}, settings, given)

    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(FLAGS.compile_cache or workdir / "compile_cache").resolve()))
    env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    scheduler = Scheduler(
        store,
        launch(env),
        workers=FLAGS.workers,
        isolate=FLAGS.isolate or ("recipe" if _on_cpu(env) else "point"),
        time_limit=FLAGS.time_limit,
    )
    _watch(scheduler, store, workdir)
    _show(read_rows(store), store, workdir, f"{', '.join(loaded)}, {FLAGS.dtype}, text {settings.text}")


def _launcher(workdir: Path):
    """What makes, from the children's environment, the scheduler's `launch`; refused before a folder is made."""
    if FLAGS.launcher == "local":
        from lcx.sweep.scheduler import children

        command = [sys.executable, "-m", "lcx.sweep.child", str(workdir.resolve())]
        command += ["--accept_licence"] if FLAGS.accept_licence else []
        return lambda env: children(command, workdir / "logs", env)
    from lcx.sweep.slurm import batch_jobs

    cluster = FLAGS.launcher.removeprefix("submitit_")
    parameters = _pairs("slurm_args", FLAGS.slurm_args)
    launch = batch_jobs(cluster, workdir, FLAGS.time_limit, parameters, FLAGS.accept_licence)
    return lambda env: launch


def _on_cpu(env) -> bool:
    """Whether the children will run on a CPU; asked without starting JAX's backends."""
    return env.get("JAX_PLATFORMS", "").startswith("cpu") or not Path("/dev/nvidia0").exists()


def _check_text(settings, sweep, text: str, tokenizer) -> None:
    most = max(sweep.lengths) + settings.decode_steps + settings.warmups + 2
    have = len(tokenizer.encode(text))
    if have < most:
        raise UserError(f"lengths: text {settings.text!r} has {have} tokens, {most} are needed")


def _watch(scheduler, store, workdir: Path) -> None:
    """Run with a bar on a terminal, one line a row; Ctrl-C and SIGTERM end it in order."""
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
    from lcx.sweep.runner import read_rows
    from lcx.sweep.scheduler import Stopped

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

            def tell(row, note: str = "") -> None:
                console.print(show.line(row) + note, markup=False, soft_wrap=True)
                progress.advance(task)

            for row in rows.values():
                if row["status"] not in ("todo", "running"):
                    tell(row, "  (done before)")

            def on_row(job, _row) -> None:
                tell({row["key"]: row for row in read_rows(store)}[job.key])

            scheduler.on_row = on_row
            scheduler.run()
    except Stopped:
        left = store.unfinished()
        where = f"{len(rows) - left} of {len(rows)} points are in {workdir}; the same command with --workdir={workdir} goes on"
        print(f"sweep: stopped by {signal.Signals(caught[0]).name}; {where}", file=sys.stderr)
        sys.exit(128 + caught[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(rows, store, workdir: Path, title: str) -> None:
    from rich.console import Console

    from lcx.sweep import show

    console = Console(highlight=False)
    wide = Console(highlight=False, width=max(console.width, 132))
    wide.print(show.table(rows, title))
    for title_of_scores, scores, messages in show.score_tables(rows):
        console.print(title_of_scores, markup=False, soft_wrap=True)
        wide.print(scores)
        for message in messages:
            console.print(message, markup=False, soft_wrap=True)
    console.print(show.notes(rows), markup=False)
    told = f"rows: {store.path}"
    if FLAGS.report and any(row["status"] == "ok" for row in rows):
        from lcx.report import figures, write_report
        from lcx.report.source import load

        figures.save(figures.overview(rows), workdir / "sweep.png")
        write_report(load(workdir), workdir / "report.html")
        told += f"   figure: {workdir / 'sweep.png'}   page: {workdir / 'report.html'}"
    console.print(told, markup=False, soft_wrap=True)


if __name__ == "__main__":
    define_flags()
    cli.run("sweep", main)
