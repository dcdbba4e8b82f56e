"""A sweep from its config to its rows: models and points resolved, a folder opened, children started, every row put on disk."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcx import texts
from lcx.errors import UserError
from lcx.experiment import Experiment, Sweep
from lcx.pretrained import load_arrays
from lcx.sweep.points import Loaded
from lcx.sweep.runner import open_sweep, resolve_all, write_run
from lcx.sweep.scheduler import Launch, Scheduler, children
from lcx.sweep.settings import Settings
from lcx.sweep.store import Store
from lcx.sweep.watch import watch

Env = Mapping[str, str]


@dataclass(frozen=True)
class Launching:
    """Settings of the processes that run points.

    Attributes:
      launcher: "local" for children of this machine; "slurm" for jobs, a point each; "submitit_local" and "submitit_debug" try the jobs
        without a cluster.
      parameters: of submitit, such as slurm_partition.
      workers: children side by side.
      isolate: a fresh child for each "point" or "recipe", or "none"; None: "recipe", and "point" on a GPU.
      time_limit: seconds that a point may take.
      compile_cache: folder of compiled programs; None: in the sweep's folder.
      accept_licence: as in `lcx.load`.
    """

    launcher: str = "local"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    isolate: str | None = None
    time_limit: float = 3_600.0
    compile_cache: Path | None = None
    accept_licence: bool = False


@dataclass(frozen=True)
class Ended:
    """Ended sweep.

    Attributes:
      store: its rows.
      workdir: where they are.
      signal: number of the signal that stopped it, or None.
    """

    store: Store
    workdir: Path
    signal: int | None


def as_sweep(config: Experiment | Sweep, path: str) -> Sweep:
    """Return the sweep of a config; one method is a sweep of it beside dense attention."""
    if isinstance(config, Sweep):
        return config
    return Sweep(tuple(dict.fromkeys(("configs/dense.py", path))), model=config.model, lengths=config.lengths)


def run(
    name: str,
    sweep: Sweep,
    settings: Settings,
    models: Sequence[str],
    *,
    axes: Mapping[str, Any] | None = None,
    workdir: Path | None = None,
    fork: Path | None = None,
    retry: Sequence[str] = (),
    launching: Launching | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Ended:
    """Run what is not done of a sweep.

    Args:
      name: of the sweep, for its folder.
      sweep: its recipes and lengths.
      settings: shared by all points.
      models: names, files, folders or hub ids.
      axes: keyword arguments of `points.specs`, such as dtypes.
      workdir: where rows are; the same one again continues.  None: runs/NAME-HASH.
      fork: a new folder that takes over the rows of `workdir` that stay the same.
      retry: statuses of points that run again.
      launching: how processes are started.
      flags: put on record in run.json.

    Raises:
      UserError: anything that is wrong with the points; nothing has run then.
    """
    how = launching or Launching()
    chosen = (axes or {}).get("texts") or sweep.texts
    loaded = load_shapes(models, sweep, settings, chosen, how.accept_licence)
    _, jobs = resolve_all(sweep, settings, loaded, **(axes or {}))
    digest = hashlib.sha256(repr([j.key for j in jobs]).encode()).hexdigest()[:8]
    workdir = workdir or Path(f"runs/{name}-{digest}")
    # a wrong request is refused before a folder is made
    launch = launcher(how, fork or workdir)
    store = open_sweep(workdir, jobs, fork, lambda text: print(text, file=sys.stderr))
    workdir = fork or workdir
    if retry:
        store.reset(retry)
    write_run(workdir, jobs, {n: (m.sha256, m.config) for n, m in loaded.items()}, settings, flags or {})
    env = dict(os.environ)
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(how.compile_cache or workdir / "compile_cache").resolve()))
    env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    isolate = how.isolate or ("recipe" if _on_cpu(env) else "point")
    scheduler = Scheduler(store, launch(env), workers=how.workers, isolate=isolate, time_limit=how.time_limit)
    return Ended(store, workdir, watch(scheduler, store))


def load_shapes(
    models: Sequence[str], sweep: Sweep, settings: Settings, chosen: Sequence[str], accept_licence: bool
) -> dict[str, Loaded]:
    """Return what resolving needs to know of each model.  Raises UserError where a text is too short for the longest context."""
    read = {name: texts.load(name)[0] for name in chosen}
    most = max(sweep.lengths) + settings.decode_steps + settings.warmups + 2
    loaded = {}
    for name in dict.fromkeys(models):
        model = load_arrays(name, accept_licence=accept_licence)
        loaded[name] = Loaded(model.config, model.sha256)
        for text, words in read.items():
            have = len(model.tokenizer.text_ids(words))
            if have < most:
                raise UserError(f"lengths: text {text!r} has {have} tokens, {most} are needed; shorten the lengths")
    return loaded


def launcher(how: Launching, workdir: Path) -> Callable[[Env], Launch]:
    """Return the function that makes, from the children's environment, the scheduler's `launch`."""
    if how.launcher == "local":
        command = [sys.executable, "-m", "lcx.sweep.child", str(workdir.resolve())]
        command += ["--accept_licence"] if how.accept_licence else []
        return lambda env: children(command, workdir / "logs", dict(env))
    from lcx.sweep.slurm import batch_jobs

    cluster = how.launcher.removeprefix("submitit_")
    launch = batch_jobs(cluster, workdir, how.time_limit, how.parameters, how.accept_licence)
    return lambda env: launch


def _on_cpu(env: Env) -> bool:
    """Return True where the children will run on a CPU, without starting JAX's backends."""
    return env.get("JAX_PLATFORMS", "").startswith("cpu") or not Path("/dev/nvidia0").exists()
