"""What a sweep measures: one point for each recipe and length, resolved before anything runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lcx.config import ModelConfig
from lcx.config_files import load_config
from lcx.errors import UserError
from lcx.experiment import Experiment, Sweep


@dataclass(frozen=True)
class Point:
    """One recipe at one length.  `length` is prompt + continuation, in tokens."""

    method: str
    experiment: Experiment
    length: int
    continuation: int
    decode_steps: int
    model: str
    dtype: str
    text: str

    @property
    def prompt(self) -> int:
        return self.length - self.continuation

    @property
    def new_tokens(self) -> int:
        """Tokens that the cache has room for after the prompt."""
        return self.continuation + self.decode_steps

    @property
    def key(self) -> str:
        """Hash of everything that a row depends on, machine and version apart."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def check(self, model: ModelConfig) -> None:
        """Raise UserError when the recipe does not suit the model or the prompt."""
        self.experiment.recipe.check(model, self.experiment.load_aux(model))
        for phase in ("prefill", "decode"):
            self.experiment.recipe.capacities(phase, self.prompt, self.new_tokens)
        if self.experiment.recipe.one_shot and len(self.experiment.schedule.steps(self.prompt)) > 1:
            raise UserError(
                f"{self.method} needs the whole prompt at once; schedule {self.experiment.schedule} cuts it"
            )


def load_experiments(sweep: Sweep) -> dict[str, Experiment]:
    """Name of the config -> the method.  Raises UserError for a config that is not one."""
    found = {}
    for path in sweep.configs:
        experiment = load_config(path)
        if not isinstance(experiment, Experiment):
            raise UserError(f"configs: {path!r} is a sweep; allowed are configs of one method")
        name = Path(path).stem
        if name in found:
            raise UserError(f"configs: {name!r} appears twice")
        found[name] = experiment
    if not found:
        raise UserError("configs=() of the sweep: give at least one")
    return found


def points(sweep: Sweep, dtype: str, budget: int | None = None, keep_ratio: float | None = None) -> list[Point]:
    """All points of a sweep, length by length, the first config first: the others are compared with it.

    Args:
      sweep: its `keep_ratio` is the budget of every recipe that has one, unless `budget` or `keep_ratio` say else.
      dtype: of weights and exact caches.
      budget: tokens per KV head.
      keep_ratio: fraction of the prompt.

    Raises:
      UserError: lengths that do not fit, or configs that are wrong.
    """
    if budget is None and keep_ratio is None:
        keep_ratio = sweep.keep_ratio
    if sweep.decode_steps < 1 or sweep.continuation < 1:
        raise UserError(f"decode_steps={sweep.decode_steps} and continuation={sweep.continuation} must be at least 1")
    if not sweep.lengths or len(set(sweep.lengths)) < len(sweep.lengths):
        raise UserError(f"lengths={sweep.lengths}: give at least one, each once")
    result = []
    for length in sweep.lengths:
        if length <= sweep.continuation:
            raise UserError(f"lengths: {length} must be above the continuation of {sweep.continuation} tokens")
        for name, experiment in load_experiments(sweep).items():
            prompt = length - sweep.continuation
            if sweep.chunk_size is not None:
                experiment = experiment.with_chunks(sweep.chunk_size)
            # what keeps all tokens has no budget to share
            if experiment.recipe.has_budget:
                experiment = experiment.with_budget(prompt, budget, keep_ratio)
            shape = (length, sweep.continuation, sweep.decode_steps, sweep.model, dtype, sweep.text)
            result.append(Point(name, experiment, *shape))
    return result
