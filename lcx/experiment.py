"""Values that a config file returns: a recipe with all that a run of it needs, frozen and typed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from types import MappingProxyType

from lcx import texts
from lcx.artefacts.source import AuxSource
from lcx.axes import Aux
from lcx.errors import UserError, brief
from lcx.model_config import ModelConfig
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked, OneShot

CONFIG_PATHS = "allowed is a tuple of paths of config files, such as ('configs/dense.py', 'mine.py'), and of Variants"
NO_PAPER: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Experiment:
    """One method with the settings of its run.

    Attributes:
      recipe: the method.
      aux: where its arrays come from, or None.
      schedule: how the prompt is read.
      model: default model; the flag --model overrides it.
      lengths: default context lengths in tokens.
      paper: the paper's figures, name -> number, for reports.
      implementation: of attention: None, "xla", "pallas" or "cudnn", see `lcx.backends.choose`.
      verified: how the method was checked beside its exact limit: "oracle" (an independent float64 implementation), "kvpress", or words.
      about: first paragraph of the config's docstring; the loader fills it in.
    """

    recipe: Recipe
    aux: AuxSource | None = None
    schedule: OneShot | Chunked = field(default_factory=OneShot)
    model: str = "smollm2-135m"
    lengths: tuple[int, ...] = (512, 1_024, 2_048)
    paper: Mapping[str, float] = field(default=NO_PAPER, hash=False)
    implementation: str | None = None
    verified: tuple[str, ...] = field(default=(), compare=False)
    about: str = field(default="", compare=False)

    def __post_init__(self):
        if not isinstance(self.recipe, Recipe):
            raise UserError(f"recipe={brief(self.recipe)} is a {type(self.recipe).__name__}; allowed is a Recipe")

    def load_aux(self, model: ModelConfig) -> Aux | None:
        return None if self.aux is None else self.aux.load(model)

    def check_weights(self, model: ModelConfig, sha256: str, tensors: Callable[[], str] | None = None) -> None:
        """Raise UserError where the method's arrays were calibrated on other weights than these; arguments of `AuxSource.check_weights`."""
        if self.aux is not None:
            self.aux.check_weights(model, sha256, tensors)

    def with_chunks(self, size: int) -> Experiment:
        """Return the experiment with the prompt read in chunks of `size` tokens."""
        return replace(self, schedule=Chunked(size))

    def with_budget(self, prompt: int, budget: int | None = None, keep_ratio: float | None = None) -> Experiment:
        """Return the experiment with another budget: tokens per KV head, or a fraction of the prompt, floored.

        Raises:
          UserError: both are given, a value is out of range, or the recipe has no budget.
        """
        if budget is not None and keep_ratio is not None:
            raise UserError(f"budget={budget} and keep_ratio={keep_ratio}: give one of them")
        if budget is None and keep_ratio is None:
            return self
        if keep_ratio is not None:
            if not 0 < keep_ratio <= 1:
                raise UserError(f"keep_ratio={keep_ratio} must be above 0 and at most 1")
            budget = int(prompt * keep_ratio)
        if budget is None or budget < 1:
            raise UserError(f"budget={budget} must be at least 1 token (prompt {prompt}, keep_ratio {keep_ratio})")
        return replace(self, recipe=self.recipe.with_budget(budget))


@dataclass(frozen=True)
class Variant:
    """A config with some of its fields changed, as a method of its own.

    Attributes:
      config: path of the config.
      changes: (dotted field, text) pairs, as `--config.FIELD=VALUE` takes them.
      name: in rows and figures; None: the config's name and the changed values.
    """

    config: str
    changes: tuple[tuple[str, str], ...] = ()
    name: str | None = None

    @property
    def label(self) -> str:
        if self.name is not None:
            return self.name
        return " ".join([Path(self.config).stem, *(f"{key.rpartition('.')[2]}={text}" for key, text in self.changes)])


@dataclass(frozen=True)
class Sweep:
    """Recipes x context lengths on one model.

    Attributes:
      configs: paths of the configs, relative to the checkout, or `Variant`s of them; the first is the dense reference.
      model: as in Experiment.
      lengths: contexts in tokens; each point's prompt is length - continuation.
      continuation: tokens scored after the prompt of each passage.
      passages: of each text.
      keep_ratio: budget of every recipe that has one, as a fraction of the prompt; None: the recipes' own.
      decode_steps: single-token steps timed at each point.
      repeats: prefills timed at each point; None: the command's default.
      chunk_size: tokens of a prefill step; None: the recipes' own schedules.
      texts: names of `lcx.texts` or files; each is a row of its own.
    """

    configs: tuple[str | Variant, ...]
    model: str = "smollm2-135m"
    lengths: tuple[int, ...] = (512, 1_024, 2_048)
    continuation: int = 256
    passages: int = 2
    keep_ratio: float | None = None
    decode_steps: int = 24
    repeats: int | None = None
    chunk_size: int | None = None
    texts: tuple[str, ...] = texts.DEFAULT

    def __post_init__(self):
        if not isinstance(self.configs, tuple | list):
            raise UserError(f"configs={brief(self.configs)} is a {type(self.configs).__name__}; {CONFIG_PATHS}")
        for i, path in enumerate(self.configs):
            if not isinstance(path, str | PurePath | Variant):
                raise UserError(f"configs[{i}]={brief(path)} is an {type(path).__name__}; {CONFIG_PATHS}")

    def with_chunks(self, size: int) -> Sweep:
        """Return the sweep with every prompt read in chunks of `size` tokens."""
        return replace(self, chunk_size=size)
