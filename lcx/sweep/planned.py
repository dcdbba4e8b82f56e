"""Needs of a sweep's points on devices that are not installed: compiled, not run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcx.model_config import ModelConfig
from lcx.plan import Device, PlanRow, estimate
from lcx.plan.programs import Compiler
from lcx.sweep.points import Point, experiment_of
from lcx.sweep.settings import settings_of


def planned_rows(
    specs: Sequence[Mapping[str, Any]],
    models: Mapping[str, ModelConfig],
    devices: Sequence[Device],
    on_row: Callable[[PlanRow], None] | None = None,
) -> list[PlanRow]:
    """Yield a row for each device and point, with the programs that the point would run: prefill, the continuation's step, decode.

    Args:
      specs: as `lcx.sweep.points.specs` makes them; points that differ only in seed or text are planned once.
      models: name -> shape, for the models of the specs.
      devices: devices of the plan.
      on_row: called with each row as it is done.

    Raises:
      UserError: a config that is wrong or does not suit the model.
    """
    what = lambda spec: (spec["seed"], spec["settings"]["text"])
    shared = [(where, spec) for where in devices for spec in specs if what(spec) == what(specs[0])]
    with closing(Compiler()) as compiler, ThreadPoolExecutor(max_workers=2) as pool:

        def one(job: tuple[Device, Mapping[str, Any]]) -> PlanRow:
            where, spec = job
            settings = settings_of(spec)
            experiment, name = experiment_of(spec, settings), Path(spec["config"]).stem
            # the point's prompt and the room after it
            point = Point(name, experiment, spec["model"], "", spec["length"], settings, spec["dtype"], spec["batch"])
            row = estimate(
                models[spec["model"]],
                experiment,
                point.prompt,
                point.new_tokens,
                point.dtype,
                where,
                point.batch,
                method=name,
                compiler=compiler,
                steps=(settings.continuation, 1),
            )
            named = replace(row.job.model, name=spec["model"])
            return replace(row, job=replace(row.job, model=named))

        rows = []
        # two threads: while one waits for XLA the other traces
        for row in pool.map(one, shared):
            rows.append(row)
            if on_row is not None:
                on_row(row)
        return rows
