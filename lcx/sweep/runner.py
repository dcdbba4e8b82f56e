"""A sweep in a folder: opened, compared with what the folder holds, run, and put on record."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcx import checks, texts
from lcx.checkout import revision
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.models.loading import Pretrained
from lcx.recipe import Recipe
from lcx.sweep.bench import Bench
from lcx.sweep.line import line
from lcx.sweep.points import Loaded, Point, Settings, aux_digest, jobs, specs
from lcx.sweep.schema import Row, leaves, ratios, whole_row
from lcx.sweep.store import Job, Store

SHOWN = 6  # differences that a refusal lists


def open_sweep(workdir: Path, found: Sequence[Job], fork: Path | None = None) -> Store:
    """Return the store of a sweep, with all its points in it.

    Args:
      workdir: where rows are; the same one again continues.
      found: the sweep's points.
      fork: a new folder that takes over the rows of `workdir` whose points are the same.

    Raises:
      UserError: `workdir` holds other points, with the differences; `fork` exists already, or there is nothing to fork.
    """
    if fork is not None:
        old = Store(workdir, create=False)
        if (fork / old.path.name).exists() and {j.key for j in Store(fork).jobs()} != {j.key for j in found}:
            raise UserError(f"fork={str(fork)!r} holds another sweep already; give a new folder")
        store = Store(fork)
        store.add(found)
        store.take(old)
        return store
    store = Store(workdir)
    there = store.jobs()
    if there and {j.key for j in there} != {j.key for j in found}:
        raise UserError(
            f"workdir={str(workdir)!r} holds another sweep: {differences(there, found)}; give another --workdir, or "
            "--fork=DIR to start anew there with the rows that stay the same"
        )
    store.add(found)
    return store


def differences(old: Sequence[Job], new: Sequence[Job]) -> str:
    """Return the differences between two sets of points, field by field: `field old -> new`."""
    cell = lambda j: tuple(j.spec["columns"][n] for n in ("method", "model", "dtype", "batch", "length", "seed"))
    before, after = {cell(j): j for j in old}, {cell(j): j for j in new}
    changed: dict[str, int] = {}
    for at in before.keys() & after.keys():
        a, b = leaves(before[at].spec), leaves(after[at].spec)
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                text = f"{name} {a.get(name)!r} -> {b.get(name)!r}"
                changed[text] = changed.get(text, 0) + 1
        if before[at].key != after[at].key and a == b:
            text = "the model's file changed"
            changed[text] = changed.get(text, 0) + 1
    for what, ones, others in (("without", before, after), ("new", after, before)):
        for at in [a for a in ones if a not in others]:
            changed[f"{what}: {at[0]} at {at[4]} tokens"] = 1
    listed = list(changed)[:SHOWN]
    rest = len(changed) - len(listed)
    return "; ".join(listed) + (f"; and {rest} more" if rest > 0 else "")


def run_here(model: Pretrained, points: Sequence[Point], on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Run points in this process, for notebooks, and return their rows: no child, no store, no time limit.

    The first point of each (dtype, batch, length, seed) is what the others are compared with.
    """
    bench = Bench(model)
    first: dict[tuple, tuple[Point, Row]] = {}
    rows = []
    for point in points:
        reference = first.get(point.reference_cell)
        figures = bench.row(point, None if reference is None else reference[0])
        row = whole_row(point.key, point.columns, figures["status"], figures)
        first.setdefault(point.reference_cell, (point, row))
        row |= ratios(row, first[point.reference_cell][1])
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def run_methods(
    model: Pretrained,
    methods: Mapping[str, Experiment | Recipe],
    lengths: Sequence[int],
    *,
    keep_ratio: float | None = None,
    settings: Settings | None = None,
    batch: int = 1,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure memory, latency and quality of methods at several lengths, in this process: a sweep for notebooks.

    Args:
      model: as `lcx.load` gives it.
      methods: name -> method; the first is what the others are compared with, so it should be dense.
      lengths: contexts in tokens, prompt and continuation.
      keep_ratio: budget of every method that has one, as a fraction of the prompt; None: their own.
      settings: measurements and their counts; by default 3 timed prefills, 16 decode steps, 256 tokens scored.
      batch: texts side by side.
      on_row: called with each finished row; None: a line is printed.

    Returns:
      Rows as `lcx.report.figures` draws them, one a method and length.

    Raises:
      UserError: a method that does not suit the model or a length; nothing has run then.
    """
    settings = Settings(repeats=3, decode_steps=16) if settings is None else settings
    checks.kind("model", model, Pretrained)
    checks.kind("settings", settings, Settings)
    checks.whole("batch", batch, 1)
    points = []
    for length in checks.listed("lengths", lengths):
        if checks.whole("lengths", length, 1) <= settings.continuation:
            raise UserError(f"lengths: {length} must be above the continuation of {settings.continuation} tokens")
        for name, method in _named(methods).items():
            experiment = method if isinstance(method, Experiment) else Experiment(method)
            if experiment.recipe.has_budget:
                experiment = experiment.with_budget(length - settings.continuation, None, keep_ratio)
            digest = aux_digest(experiment, model.config)
            dtype = str(model.layers.dtype)
            point = Point(name, experiment, model.name, model.sha256, length, settings, dtype, batch, 0, digest)
            point.check(model.config)
            points.append(point)
    if len({point.key for point in points}) < len(points) or not points:
        raise UserError(f"lengths={checks.brief(lengths)}: give at least one, each once")
    bench = Bench(model)
    for point in points:
        checks.token_ids(bench.passages(point), batch, model.config.vocab_size)
    return run_here(model, points, on_row or (lambda row: print(line(row), flush=True)))


def _named(methods: Mapping[str, Experiment | Recipe]) -> Mapping[str, Experiment | Recipe]:
    """Return the methods; raise UserError unless they are named and each is an Experiment or a Recipe."""
    checks.kind("methods", methods, Mapping)
    if not methods:
        raise UserError(f"methods={methods!r}: give at least one, the dense one first")
    for name, method in methods.items():
        checks.kind("methods: name", name, str)
        checks.kind(f"methods[{name!r}]", method, Experiment, Recipe)
    return methods


def write_run(
    workdir: Path, found: Sequence[Job], models: Mapping[str, Any], settings: Settings, flags: Mapping[str, Any]
) -> None:
    """Add this run to `run.json`: points, command, versions and machine.

    Args:
      workdir: of the sweep.
      found: its points.
      models: name -> (sha256, config).
      settings: of the sweep.
      flags: of the command, name -> value.
    """
    packages = ("jax", "jaxlib", "flax", "numpy")
    run = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "argv": sys.argv,
        "flags": dict(flags),
        "git": revision(),
        "versions": {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()},
        "machine": {"host": platform.node(), "system": platform.platform(), "cores": os.cpu_count()},
        "environment": {n: os.environ[n] for n in ("XLA_FLAGS", "JAX_PLATFORMS") if n in os.environ},
        "models": {
            name: {"sha256": sha256, "config": dataclasses.asdict(config)} for name, (sha256, config) in models.items()
        },
        "text": {"name": settings.text, "sha256": texts.TEXTS[settings.text].sha256},
        "points": {j.key: j.spec for j in found},
    }
    path = workdir / "run.json"
    runs = []
    if path.exists():
        try:
            runs = json.loads(path.read_text())["runs"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"workdir: {path} is damaged; move it away and run again") from None
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps({"runs": [*runs, run]}, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        raise UserError(f"workdir: {path} cannot be written: {error.strerror}") from None


def resolve_all(sweep, settings: Settings, models: Mapping[str, Loaded], **axes) -> tuple[list[Point], list[Job]]:
    """Return points and jobs of a sweep; arguments as `points.specs`."""
    pairs = jobs(specs(sweep, settings, models=list(models), **axes), models)
    return [p for p, _ in pairs], [j for _, j in pairs]
