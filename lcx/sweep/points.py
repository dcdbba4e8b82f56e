"""Points of a sweep, resolved before anything runs, and resolved again from their spec in the process that runs them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcx import checks
from lcx.config_files import load_config
from lcx.errors import UserError
from lcx.experiment import Experiment, Sweep
from lcx.model_config import ModelConfig
from lcx.sweep.store import Job

TASKS = ("ppl", "longppl", "passkey", "needle", "ruler")


@dataclass(frozen=True)
class Settings:
    """Settings that all points of a sweep share.

    Attributes:
      continuation: tokens scored after the prompt.
      decode_steps: timed steps of one token.
      repeats: timed prefills.
      warmups: untimed prefills before them, and untimed decode steps.
      text: a name of `lcx.texts`.
      tasks: further quality figures, of TASKS.
      samples: of each task.
      memory_limit: bytes; a point whose predicted peak is above is not run.  None: the memory of the device or the machine.
      allow_extrapolation: lengths beyond the model's context.
    """

    continuation: int = 256
    decode_steps: int = 24
    repeats: int = 5
    warmups: int = 1
    text: str = "pride_and_prejudice"
    tasks: tuple[str, ...] = ()
    samples: int = 10
    memory_limit: int | None = None
    allow_extrapolation: bool = False

    def __post_init__(self):
        for name in ("continuation", "decode_steps", "repeats", "samples"):
            checks.whole(name, getattr(self, name), 1)
        checks.whole("warmups", self.warmups, 0)
        for task in self.tasks:
            if task not in TASKS:
                raise UserError(f"tasks={task!r}; allowed are {', '.join(TASKS)}")


@dataclass(frozen=True)
class Point:
    """One method at one length.  `length` is prompt + continuation, in tokens."""

    method: str
    experiment: Experiment
    model: str
    model_sha256: str
    length: int
    settings: Settings = field(default_factory=Settings)
    dtype: str = "float32"
    batch: int = 1
    seed: int = 0
    aux_sha256: str | None = None

    @property
    def prompt(self) -> int:
        return self.length - self.settings.continuation

    @property
    def new_tokens(self) -> int:
        """Tokens that the cache has room for after the prompt."""
        return self.settings.continuation + self.settings.decode_steps + self.settings.warmups + 1

    @property
    def text_tokens(self) -> int:
        """Tokens of a text that the point reads."""
        return self.prompt + self.new_tokens + 1

    @cached_property
    def key(self) -> str:
        """Return a hash of everything that a row depends on, machine and version apart."""
        parts = (self.experiment.recipe, self.experiment.schedule, self.aux_sha256, self.settings, *self.cell)
        if self.experiment.implementation is not None:
            parts = (*parts, self.experiment.implementation)
        return hashlib.sha256(repr((*parts, self.model_sha256)).encode()).hexdigest()[:16]

    @property
    def cell(self) -> tuple:
        """Place of the point in its sweep."""
        return (self.method, *self.reference_cell)

    @property
    def reference_cell(self) -> tuple:
        """Place that a point shares with the dense one that it is compared with."""
        return (self.model, self.dtype, self.batch, self.length, self.seed)

    @property
    def columns(self) -> dict[str, Any]:
        """Return the columns of a row that are known before it is measured."""
        return {
            "method": self.method,
            "model": self.model,
            "dtype": self.dtype,
            "batch": self.batch,
            "length": self.length,
            "prompt": self.prompt,
            "seed": self.seed,
            "schedule": repr(self.experiment.schedule),
        }

    def check(self, model: ModelConfig) -> None:
        """Raise UserError when the recipe does not suit the model or the prompt."""
        recipe, schedule = self.experiment.recipe, self.experiment.schedule
        recipe.check(model, self.experiment.load_aux(model))
        checks.schedule(recipe, schedule, self.prompt)
        if self.length > model.context and not self.settings.allow_extrapolation:
            raise UserError(
                f"length={self.length} tokens is beyond the context of {self.model}, {model.context}; "
                "shorten it, or pass --allow_extrapolation"
            )


@dataclass(frozen=True)
class Loaded:
    """Facts of a model that resolving needs: no weights."""

    config: ModelConfig
    sha256: str


def aux_digest(experiment: Experiment, model: ModelConfig) -> str | None:
    """Return the sha256 of a method's arrays, names and values; None where it has none."""
    aux = experiment.load_aux(model)
    if aux is None:
        return None
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def experiment_of(spec: Mapping[str, Any], settings: Settings) -> Experiment:
    """Return the method of a spec: its config is read, budgets become tokens.  Raises UserError for a config that is wrong."""
    experiment = load_config(spec["config"], spec["changes"])
    if not isinstance(experiment, Experiment):
        raise UserError(f"configs: {spec['config']!r} is a sweep; allowed are configs of one method")
    if spec["length"] <= settings.continuation:
        raise UserError(f"lengths: {spec['length']} must be above the continuation of {settings.continuation} tokens")
    if spec.get("implementation") is not None:
        experiment = replace(experiment, implementation=spec["implementation"])
    if spec["chunk_size"] is not None:
        experiment = experiment.with_chunks(spec["chunk_size"])
    # a method that keeps all tokens has no budget to share
    if experiment.recipe.has_budget:
        prompt = spec["length"] - settings.continuation
        experiment = experiment.with_budget(prompt, spec["budget"], spec["keep_ratio"])
    return experiment


def settings_of(spec: Mapping[str, Any]) -> Settings:
    given: dict[str, Any] = {**spec["settings"], "tasks": tuple(spec["settings"]["tasks"])}
    return Settings(**given)


def resolve(spec: Mapping[str, Any], loaded: Loaded) -> Point:
    """Return the point of a spec.

    Raises:
      UserError: a config that is wrong, or one that does not suit the point.
    """
    settings = settings_of(spec)
    experiment = experiment_of(spec, settings)
    point = Point(
        method=Path(spec["config"]).stem,
        experiment=experiment,
        model=spec["model"],
        model_sha256=loaded.sha256,
        length=spec["length"],
        settings=settings,
        dtype=spec["dtype"],
        batch=spec["batch"],
        seed=spec["seed"],
        aux_sha256=aux_digest(experiment, loaded.config),
    )
    point.check(loaded.config)
    return point


def specs(
    sweep: Sweep,
    settings: Settings,
    *,
    models: Sequence[str],
    dtypes: Sequence[str] = ("float32",),
    batches: Sequence[int] = (1,),
    seeds: Sequence[int] = (0,),
    budget: int | None = None,
    keep_ratio: float | None = None,
    implementation: str | None = None,
    changes: Mapping[str, Mapping[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """Return the specs of all points, length by length, the first config first: the others are compared with it.

    Args:
      sweep: its `keep_ratio` is the budget of every recipe that has one, unless `budget` or `keep_ratio` say else.
      settings: shared by all.
      models, dtypes, batches, seeds: every combination is run.
      budget: tokens per KV head.
      keep_ratio: fraction of the prompt.
      implementation: of attention, as in `Experiment`.
      changes: path of a config -> changes of its fields.

    Raises:
      UserError: nothing to run, or something twice.
    """
    if budget is None and keep_ratio is None:
        keep_ratio = sweep.keep_ratio
    axes = {"lengths": sweep.lengths, "models": models, "dtypes": dtypes, "batches": batches, "seeds": seeds}
    for name, values in axes.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name}={tuple(values)}: give at least one, each once")
    if not sweep.configs:
        raise UserError("configs=() of the sweep: give at least one")
    names = [Path(path).stem for path in sweep.configs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"configs: {name!r} appears twice")
    plain = json.loads(json.dumps(settings.__dict__))
    return [
        {
            "config": str(path),
            "changes": dict((changes or {}).get(str(path), {})),
            "settings": plain,
            "model": model,
            "dtype": dtype,
            "batch": batch,
            "seed": seed,
            "length": length,
            "budget": budget,
            "keep_ratio": keep_ratio,
            "chunk_size": sweep.chunk_size,
            "implementation": implementation,
        }
        for model in models
        for dtype in dtypes
        for batch in batches
        for seed in seeds
        for length in sweep.lengths
        for path in sweep.configs
    ]


def card_of_point(point: Point) -> dict[str, Any]:
    """Return the card of the point's method as data: the config need not be at hand, and is not run, when a page is written."""
    experiment = point.experiment
    return {
        "about": experiment.about,
        "choices": [choice._asdict() for choice in experiment.recipe.describe()],
        "paper": dict(experiment.paper),
    }


def jobs(found: Sequence[Mapping[str, Any]], models: Mapping[str, Loaded]) -> list[tuple[Point, Job]]:
    """Return (point, job) of each spec.  Raises UserError for a point that cannot run; nothing has been compiled then."""
    result: list[tuple[Point, Job]] = []
    dense: dict[tuple, tuple[str, Mapping[str, Any]]] = {}
    for spec in found:
        point = resolve(spec, models[spec["model"]])
        # the other methods of a cell are compared with its first
        key, reference = dense.get(point.reference_cell, (None, None))
        dense.setdefault(point.reference_cell, (point.key, spec))
        recipe = f"{point.experiment.recipe!r} {point.aux_sha256 or ''}".strip()
        whole = {
            **spec,
            "reference": reference,
            "recipe": recipe,
            "card": card_of_point(point),
            "columns": point.columns,
        }
        group = f"{point.model} {point.dtype} {point.batch} {point.method}"
        result.append((point, Job(point.key, whole, group, key)))
    return result
