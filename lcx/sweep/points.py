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

from lcx import checks, texts
from lcx.config_files import load_config
from lcx.errors import UserError
from lcx.experiment import Experiment, Sweep, Variant
from lcx.model_config import ModelConfig
from lcx.recipe import Recipe
from lcx.sweep import sources
from lcx.sweep.settings import Settings, settings_of
from lcx.sweep.store import Job
from lcx.tasks import local


@dataclass(frozen=True)
class Point:
    """One method at one length on one text.  `length` is prompt + continuation, in tokens.

    Attributes:
      method: name of the config, or of the variant.
      keep_ratio: budget as a fraction of the prompt, as it was asked for.
      budget: tokens a KV head, as it was asked for.
      text_sha256: of the text's file.
      sources: digest of the method's source files.
      task_files: (name, sha256) of each file of the tasks.
      remarks: what is to be said in the row before anything runs, such as a budget that the method does not take.
    """

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
    keep_ratio: float | None = None
    budget: int | None = None
    text_sha256: str = ""
    sources: str = ""
    task_files: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()

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
        parts = (*parts, self.text_sha256, self.sources, self.task_files)
        if self.experiment.implementation is not None:
            parts = (*parts, self.experiment.implementation)
        return hashlib.sha256(repr((*parts, self.model_sha256)).encode()).hexdigest()[:16]

    @property
    def cell(self) -> tuple:
        """Place of the point in its sweep."""
        return (self.method, self.budget, self.keep_ratio, *self.reference_cell)

    @property
    def reference_cell(self) -> tuple:
        """Place that a point shares with the dense one that it is compared with."""
        return (self.model, self.dtype, self.batch, self.length, self.seed, self.settings.text)

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
            "text": texts.short_name(self.settings.text),
            "text_sha256": self.text_sha256,
            "passages": self.settings.passages * self.batch,
            "schedule": repr(self.experiment.schedule),
            "recipe": words(self.experiment),
            "budget": self.kept,
            "keep_ratio": None if self.kept is None else self.kept / self.prompt,
            "sources": self.sources,
            "task_files": dict(self.task_files),
        }

    @property
    def kept(self) -> int | None:
        """Tokens a KV head that the method keeps or reads; None where it has no budget."""
        return self.experiment.recipe.budget

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


def digests(settings: Settings) -> tuple[tuple[str, str], ...]:
    """Return (name, sha256) of each file of the tasks.  Raises UserError, with the line, for a file that is damaged."""
    for path in settings.task_files:
        local.load(path)
    return tuple((Path(path).name, local.sha256(path)) for path in settings.task_files)


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


def remarks_of(experiment: Experiment, spec: Mapping[str, Any], prompt: int) -> tuple[str, ...]:
    """Return what a row must say about a method that cannot act as it was asked to."""
    recipe = experiment.recipe
    if not recipe.has_budget:
        # the reference of a sweep is no method that was asked for a budget, and a sweep's own share is for those that have one
        ignored = spec["asked"] and recipe != Recipe()
        return ("has no single budget: budget or keep_ratio was ignored",) if ignored else ()
    remarks = [part.idle(prompt) for _, _, part in recipe.parts()]
    if recipe.budget is not None and recipe.budget >= prompt:
        remarks.append(f"budget {recipe.budget:,} covers the prompt of {prompt:,} tokens")
    return tuple(r for r in remarks if r)


def words(experiment: Experiment) -> str:
    """Return a method in one line: its parts with their settings."""
    return " + ".join(
        f"{c.name}({', '.join(f'{k}={v}' for k, v in c.settings.items())})" if c.settings else c.name
        for c in experiment.recipe.describe()
    )


def resolve(spec: Mapping[str, Any], loaded: Loaded) -> Point:
    """Return the point of a spec.

    Raises:
      UserError: a config that is wrong, or one that does not suit the point.
    """
    settings = settings_of(spec)
    experiment = experiment_of(spec, settings)
    text, prompt = settings.text, spec["length"] - settings.continuation
    point = Point(
        method=spec["method"],
        experiment=experiment,
        model=spec["model"],
        model_sha256=loaded.sha256,
        length=spec["length"],
        settings=settings,
        dtype=spec["dtype"],
        batch=spec["batch"],
        seed=spec["seed"],
        aux_sha256=aux_digest(experiment, loaded.config),
        keep_ratio=spec["keep_ratio"] if experiment.recipe.has_budget else None,
        budget=spec["budget"] if experiment.recipe.has_budget else None,
        text_sha256=texts.load(text)[1],
        sources=sources.digest(experiment.recipe),
        task_files=digests(settings),
        remarks=remarks_of(experiment, spec, prompt),
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
    texts: Sequence[str] | None = None,
    budgets: Sequence[int] = (),
    keep_ratios: Sequence[float] = (),
    implementation: str | None = None,
    changes: Mapping[str, Mapping[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """Return the specs of all points, length by length, the first config first: the others are compared with it.

    Args:
      sweep: its `keep_ratio` is the budget of every recipe that has one, unless `budgets` or `keep_ratios` say else.
      settings: shared by all, but for the text.
      models, dtypes, batches, seeds: every combination is run.
      texts: names or files; None: the sweep's.
      budgets: tokens per KV head; every recipe with a budget is run with each.
      keep_ratios: fractions of the prompt, likewise.
      implementation: of attention, as in `Experiment`.
      changes: path of a config -> changes of its fields.

    Raises:
      UserError: nothing to run, or something twice.
    """
    if budgets and keep_ratios:
        raise UserError(f"budget={tuple(budgets)} and keep_ratio={tuple(keep_ratios)}: give one of them")
    asked = bool(budgets or keep_ratios)
    if not asked and sweep.keep_ratio is not None:
        keep_ratios = (sweep.keep_ratio,)
    texts = sweep.texts if texts is None else texts
    axes = {
        "lengths": sweep.lengths,
        "models": models,
        "dtypes": dtypes,
        "batches": batches,
        "seeds": seeds,
        "text": texts,
    }
    for name, values in axes.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name}={tuple(values)}: give at least one, each once")
    for name, values in (("budget", budgets), ("keep_ratio", keep_ratios)):
        if len(set(values)) < len(values):
            raise UserError(f"{name}={tuple(values)}: give each once")
    if not sweep.configs:
        raise UserError("configs=() of the sweep: give at least one")
    variants = [Variant(c) if isinstance(c, str | Path) else c for c in sweep.configs]
    names = [variant.label for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"configs: {name!r} appears twice; give one of them a name, lcx.Variant(config, changes, name)"
            )
    plain = json.loads(json.dumps(settings.__dict__))
    shares = [{"budget": b, "keep_ratio": None} for b in budgets] + [
        {"budget": None, "keep_ratio": r} for r in keep_ratios
    ]

    def shares_of(variant: Variant) -> Sequence[Mapping[str, Any]]:
        """Every budget for a recipe that has one; the others are run once."""
        if len(shares) < 2:
            return shares or [{"budget": None, "keep_ratio": None}]
        config = load_config(variant.config, {**(changes or {}).get(variant.config, {}), **dict(variant.changes)})
        has = isinstance(config, Experiment) and config.recipe.has_budget
        return shares if has else [{"budget": None, "keep_ratio": None}]

    methods = [(variant, share) for variant in variants for share in shares_of(variant)]
    return [
        {
            "config": variant.config,
            "method": variant.label,
            "changes": {**(changes or {}).get(variant.config, {}), **dict(variant.changes)},
            "settings": {**plain, "text": text},
            "model": model,
            "dtype": dtype,
            "batch": batch,
            "seed": seed,
            "length": length,
            **share,
            "asked": asked,
            "chunk_size": sweep.chunk_size,
            "implementation": implementation,
        }
        for model in models
        for dtype in dtypes
        for batch in batches
        for seed in seeds
        for length in sweep.lengths
        for variant, share in methods
        for text in texts
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
            "source_files": sources.source_names(point.experiment.recipe),
            "columns": point.columns,
        }
        group = f"{point.model} {point.dtype} {point.batch} {point.method} {point.kept}"
        result.append((point, Job(point.key, whole, group, key)))
    return result
