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
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcx import checks
from lcx import texts as shipped
from lcx.checkout import revision
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.models.loading import Pretrained
from lcx.recipe import Recipe
from lcx.sweep import sources
from lcx.sweep.bench import Bench
from lcx.sweep.line import line
from lcx.sweep.points import Loaded, Point, aux_digest, digests, jobs, remarks_of, specs
from lcx.sweep.schema import Row, leaves, ratios, whole_row
from lcx.sweep.settings import Settings
from lcx.sweep.store import Job, Store

SHOWN = 6  # differences that a refusal lists


def open_sweep(
    workdir: Path, found: Sequence[Job], fork: Path | None = None, note: Callable[[str], None] = lambda text: None
) -> Store:
    """Return the store of a sweep, with all its points in it.  A point whose method's source has changed takes the place of the old one.

    Args:
      workdir: where rows are; the same one again continues.
      found: the sweep's points.
      fork: a new folder that takes over the rows of `workdir` whose points are the same.
      note: called with a line where points run anew.

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
        stale = changed_sources(there, found)
        if not stale:
            raise UserError(
                f"workdir={str(workdir)!r} holds another sweep: {differences(there, found)}; give another --workdir, or "
                "--fork=DIR to start anew there with the rows that stay the same"
            )
        old = store.replace(stale)
        note(f"{len(stale)} points run anew, as the source of their method changed: {_files(old, found)}")
    store.add(found)
    return store


def changed_sources(old: Sequence[Job], new: Sequence[Job]) -> dict[str, Job]:
    """Return key of an old point -> the point that takes its place, where the two sets differ in the methods' sources alone.

    Empty where anything else differs, or where a row was written before sources counted.
    """
    before, after = {_cell(j): j for j in old}, {_cell(j): j for j in new}
    if before.keys() != after.keys():
        return {}
    stale = {before[at].key: j for at, j in after.items() if before[at].key != j.key}
    by_key = {j.key: j for j in old}

    def plain(j: Job):
        spec = {name: value for name, value in j.spec.items() if name not in ("source_files", "reference")}
        return {**spec, "columns": {n: v for n, v in j.spec["columns"].items() if n != "sources"}}

    for key, j in stale.items():
        reference = by_key[key].reference in stale
        same = plain(by_key[key]) == plain(j) and "source_files" in by_key[key].spec
        changed = by_key[key].spec.get("source_files") != j.spec["source_files"] or reference
        if not (same and changed):
            return {}
    return stale


def _files(old: Sequence[Job], new: Sequence[Job]) -> str:
    """Return the names of the source files that differ, by cell."""
    after = {_cell(j): j.spec["source_files"] for j in new}
    names: dict[str, None] = {}
    for j in old:
        mine, theirs = j.spec["source_files"], after[_cell(j)]
        names |= dict.fromkeys(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
    return ", ".join(names)


CELL = ("method", "model", "dtype", "batch", "length", "seed", "text", "budget", "keep_ratio")


def _cell(job: Job) -> tuple:
    """Place of a point in its sweep, from the columns of its row; rows of before have no text and no budget."""
    return tuple(job.spec["columns"].get(name) for name in CELL)


def differences(old: Sequence[Job], new: Sequence[Job]) -> str:
    """Return the differences between two sets of points, field by field: `field old -> new`."""
    before, after = {_cell(j): j for j in old}, {_cell(j): j for j in new}
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
    keep_ratio: float | Sequence[float] | None = None,
    budget: int | Sequence[int] | None = None,
    texts: Sequence[str] | None = None,
    settings: Settings | None = None,
    batch: int = 1,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure memory, latency and quality of methods at several lengths, in this process: a sweep for notebooks.

    Args:
      model: as `lcx.load` gives it.
      methods: name -> method; the first is what the others are compared with, so it should be dense.
      lengths: contexts in tokens, prompt and continuation.
      keep_ratio: budget of every method that has one, as a fraction of the prompt, or several; None: their own.
      budget: the same in tokens a KV head, instead of keep_ratio.
      texts: names of `lcx.texts` or files, a row for each; None: two that lcx ships.
      settings: measurements and their counts; by default 3 timed prefills, 16 decode steps, two passages of 64 tokens scored.
      batch: texts side by side.
      on_row: called with each finished row; None: a line is printed.

    Returns:
      Rows as `lcx.report.figures` draws them, one a method and length.

    Raises:
      UserError: a method that does not suit the model or a length; nothing has run then.
    """
    settings = Settings(continuation=64, decode_steps=16) if settings is None else settings
    checks.kind("model", model, Pretrained)
    checks.kind("settings", settings, Settings)
    checks.whole("batch", batch, 1)
    if budget is not None and keep_ratio is not None:
        raise UserError(f"budget={budget} and keep_ratio={keep_ratio}: give one of them")
    shares = [(None, ratio) for ratio in _several(keep_ratio)] + [(tokens, None) for tokens in _several(budget)]
    chosen = shipped.DEFAULT if texts is None else tuple(checks.listed("texts", texts))
    digests = {text: shipped.load(text, "texts")[1] for text in chosen}
    points = []
    for length in checks.listed("lengths", lengths):
        if checks.whole("lengths", length, 1) <= settings.continuation:
            raise UserError(f"lengths: {length} must be above the continuation of {settings.continuation} tokens")
        for name, method in _named(methods).items():
            experiment = method if isinstance(method, Experiment) else Experiment(method)
            for share in (shares if experiment.recipe.has_budget else shares[:1]) or [(None, None)]:
                for text in digests:
                    asked = replace(settings, text=text)
                    point = _point(name, experiment, model, length, asked, batch, share, digests[text])
                    point.check(model.config)
                    points.append(point)
    if len({point.key for point in points}) < len(points) or not points:
        raise UserError(f"lengths={checks.brief(lengths)}: give at least one, each once")
    bench = Bench(model)
    for point in points:
        checks.token_ids(bench.passages(point).reshape(batch, -1), batch, model.config.vocab_size)
    return run_here(model, points, on_row or (lambda row: print(line(row), flush=True)))


def _several(value) -> list:
    return [] if value is None else list(value) if isinstance(value, Sequence) else [value]


def _point(name, experiment: Experiment, model: Pretrained, length, settings: Settings, batch, share, digest) -> Point:
    """Return the point of a method at a length, on a text, with a (budget, keep_ratio)."""
    prompt, (budget, keep_ratio) = length - settings.continuation, share
    if experiment.recipe.has_budget:
        experiment = experiment.with_budget(prompt, budget, keep_ratio)
    else:
        budget = keep_ratio = None
    return Point(
        method=name,
        experiment=experiment,
        model=model.name,
        model_sha256=model.sha256,
        length=length,
        settings=settings,
        dtype=str(model.layers.dtype),
        batch=batch,
        aux_sha256=aux_digest(experiment, model.config),
        keep_ratio=keep_ratio,
        budget=budget,
        text_sha256=digest,
        sources=sources.digest(experiment.recipe),
        task_files=digests(settings),
        remarks=remarks_of(experiment, {"asked": share != (None, None)}, prompt),
    )


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
        "texts": {j.spec["columns"]["text"]: j.spec["columns"]["text_sha256"] for j in found},
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
