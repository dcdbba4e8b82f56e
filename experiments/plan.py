"""`python -m experiments.plan --model=llama3-8b --config=configs/dense.py --device=h200`: memory and times of what is not run.

Programs are compiled for the device from shapes; no weights, no GPU.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from lcx.errors import UserError

# a plan compiles programs that do not fit, and XLA logs each of them
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

FLAGS = flags.FLAGS
LENGTHS = "8192,131072,1048576"


def define_flags() -> None:
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    text("config", "configs/dense.py", "Config files of one method each with commas between, or all.")
    text("model", None, "A name with a shape, such as llama3-8b, a GGUF file or a folder; the default is the config's.")
    text(
        "device", "cpu", "cpu, h200, h100, a100-80gb, l40s, rtx4090, rtx3090, or N of a GPU as 2xh200; commas between."
    )
    text("lengths", LENGTHS, "Prompts in tokens with commas between.")
    flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Type of weights, activations and exact caches.")
    number("weight_bits", None, "8: count the layers' matrices in 8 bits; they are not run so.")
    number("new_tokens", 128, "Tokens that there is room for after the prompt.", lower_bound=0)
    number("batch", 1, "Texts side by side.", lower_bound=1)
    number(
        "chunk_size", 2_048, "Tokens of a prefill step, but for methods that need the prompt at once.", lower_bound=1
    )
    number("budget", None, "Tokens kept per KV head by methods that have a budget.", lower_bound=1)
    flags.DEFINE_float("keep_ratio", None, "The budget as a fraction of the prompt, above 0 and at most 1.")
    number(
        "reserve_mib", 1_024, "MiB of a device that stay unused: CUDA context, cuBLAS, fragmentation.", lower_bound=0
    )
    text(
        "implementation",
        None,
        "Of attention: xla, pallas (the kernels where they can, on Hopper), or both with a comma; the default is a run's own choice.",
    )
    text("out", None, "Where rows go, one JSON object a line.")
    text("figure", None, "Where the picture of memory against context goes, PNG or SVG.")
    flags.DEFINE_bool("show_arithmetic", False, "Print how each row comes about.")
    flags.DEFINE_bool("check", False, "Run on this machine's device, with weights of no meaning, and print its peak.")


def experiments() -> dict:
    """Return name -> method of --config."""
    from lcx.config_files import all_configs, load_config
    from lcx.experiment import Experiment

    changes = cli.changes()
    if FLAGS.config == "all":
        paths = [str(path) for path in all_configs()]
    else:
        paths = [part.strip() for part in FLAGS.config.split(",") if part.strip()]
    if not paths:
        raise UserError(f"config={FLAGS.config!r}: give at least one, or all")
    if changes and len(paths) > 1:
        raise UserError(f"--config.{next(iter(changes))}: changes are for a single config, not for {len(paths)}")
    methods = {}
    for path in paths:
        config = load_config(path, changes)
        if not isinstance(config, Experiment):
            if FLAGS.config == "all":
                continue
            raise UserError(f"config={path!r} is a sweep; allowed here are configs of one method")
        if Path(path).stem in methods:
            raise UserError(f"config: {Path(path).stem!r} appears twice")
        methods[Path(path).stem] = config
    return methods


def names_of_implementations(devices) -> list[str | None]:
    """Return the implementations of --implementation, as `lcx.backends.choose.resolve` takes them."""
    from lcx.backends.choose import AUTO, HOPPER

    if FLAGS.implementation is None:
        return [None]
    names = []
    for name in FLAGS.implementation.split(","):
        if name not in ("xla", "pallas") or name in names:
            raise UserError(f"implementation={name!r}: allowed are xla, pallas, each once, with a comma between")
        names.append(name)
    if "pallas" in names:
        for where in devices:
            if where.target is None or where.target.capability != HOPPER:
                raise UserError(f"implementation='pallas' on {where.name}: the kernels are for Hopper: h100, h200")
    return [AUTO if name == "pallas" else name for name in names]


def _lengths() -> list[int]:
    parts = [part.strip().replace("_", "") for part in FLAGS.lengths.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"lengths={FLAGS.lengths!r}: allowed are tokens with commas between, such as 131072,1048576")
    return [int(part) for part in parts]


def _out(name: str, suffixes: tuple[str, ...]) -> Path | None:
    """Return the path of a flag, refused before anything is compiled where it cannot be written."""
    value = FLAGS[name].value
    if value is None:
        return None
    path = Path(value)
    if path.suffix not in suffixes or not path.parent.is_dir():
        raise UserError(
            f"{name}={value!r}: allowed is a file ending in {' or '.join(suffixes)} in a folder that exists"
        )
    cli.check_writable(name, path)
    return path


def _named_by_implementation(job):
    return replace(job, method=f"{job.method}, {job.setting.implementation.partition(',')[0]}")


def main() -> None:
    from rich.console import Console

    from lcx.plan import device, plan, shape, show
    from lcx.plan.rows import PlanRow

    methods, lengths = experiments(), _lengths()
    out, figure = _out("out", (".json", ".jsonl")), _out("figure", (".png", ".svg"))
    devices = [device(part.strip()) for part in FLAGS.device.split(",")]
    if len({d.name for d in devices}) < len(devices):
        raise UserError(f"device={FLAGS.device!r}: give each once")
    models = {FLAGS.model or e.model for e in methods.values()}
    if len(models) > 1:
        raise UserError(f"config: these configs are for {', '.join(sorted(models))}; name one with --model")
    model = shape(models.pop())
    names = ("new_tokens", "batch", "dtype", "weight_bits", "reserve_mib", "budget", "keep_ratio")
    settings: dict[str, Any] = {name: FLAGS[name].value for name in names}
    console = Console(highlight=False)
    if FLAGS.check:
        from lcx.plan.check import check

        for line in check(model, methods, lengths, FLAGS.chunk_size, settings):
            console.print(line, markup=False, soft_wrap=True)
        return

    def on_rows(rows: list[PlanRow]) -> None:
        if console.is_terminal:
            row = rows[0]
            limit = "no limit" if row.limit_tokens is None else f"{row.limit_tokens:,} tokens"
            console.print(f"{row.job.method} on {row.job.device.name}: longest {limit}", markup=False, soft_wrap=True)

    start = time.perf_counter()
    rows = []
    for name in names_of_implementations(devices):
        more = plan(
            model,
            methods,
            devices,
            lengths,
            chunk_size=FLAGS.chunk_size,
            on_rows=on_rows,
            implementation=name,
            **settings,
        )
        if FLAGS.implementation is not None and "," in FLAGS.implementation:
            more = [replace(row, job=_named_by_implementation(row.job)) for row in more]
        rows += more
    seconds = time.perf_counter() - start
    wide = Console(highlight=False, width=max(console.width, 132))
    for where in devices:
        mine = [row for row in rows if row.job.device.name == where.name]
        title = f"{model.name} on {where.name}, predicted"
        wide.print(show.table(mine, title))
        wide.print(show.limits(mine, f"Longest context on {where.name}"))
        for line in show.notes(mine):
            console.print(line, markup=False, soft_wrap=True)
        if FLAGS.show_arithmetic:
            for row in mine:
                console.print(show.arithmetic(row), markup=False, soft_wrap=True)
    if out is not None:
        out.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    if figure is not None:
        show.figure(rows, figure)
    written = "".join(f"   {name}: {path}" for name, path in (("rows", out), ("figure", figure)) if path)
    console.print(f"{seconds:,.0f} s{written}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    define_flags()
    cli.run("plan", main)
