"""A paper as a value: the choice made on each axis, frozen and hashable, a static argument of jit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx.axes import CAUSAL, LARGE, PHASES, Array, Aux, Part, Pattern
from lcx.cache import LayerCache, Size, shape_bytes
from lcx.errors import UserError, nearest
from lcx.model_config import ModelConfig
from lcx.segments import Chain, Segment, check_chain, check_part, check_segments, num_rows, prompt_segment
from lcx.storage import Shape, capacities, empty_layer, empty_probe, kept_width


class Choice(NamedTuple):
    """One part of a recipe in words.

    Attributes:
      axis: "pattern", "policy", "compress", "codec" or "heads", and " of NAME" where segments have names.
      name: name of the class, or of the heads.
      settings: its fields, as text.
      exact: when it equals dense attention, a sentence; empty where the class does not say.
    """

    axis: str
    name: str
    settings: dict[str, str]
    exact: str


@dataclass(frozen=True)
class Recipe:
    """A method: segments (or chains of segments for the same heads), and a pattern.

    In a chain new tokens enter the first segment; what it hands down enters the next; after the last it is gone.

    Attributes:
      segments: `Segment`s, or tuples of them.
      pattern: which keys a query reads.
      phases: names for which `at` is asked; the first is the prompt's.
      rounding: slots of segments that keep few tokens are a multiple of it, so that layers and budgets of near sizes share a program; the
        price is the bytes of the slots that stay empty.

    Raises:
      UserError: names that repeat, or choices that do not go together; one line that names the pair.
    """

    segments: tuple[Segment | Chain, ...] = field(default_factory=lambda: (Segment(),))
    pattern: Pattern = CAUSAL
    phases: tuple[str, ...] = PHASES
    rounding: int = 1

    def __post_init__(self):
        check_segments(self.segments)
        check_part("pattern", self.pattern)
        names = [s.name for chain in self.chains for s in chain]
        if not names:
            raise UserError("segments=() holds nothing: give at least one Segment")
        if len(set(names)) < len(names):
            raise UserError(f"segment names {names} repeat; each must be unique")
        if self.rounding < 1:
            raise UserError(f"rounding={self.rounding} must be at least 1 slot")
        for phase in reversed(self.phases):
            for chain in self.chains:
                acting = tuple(_in_phase(s, phase) for s in chain)
                if phase == self.phases[0] and chain[0].compress is not None:
                    acting = (replace(prompt_segment(acting), compress=acting[0].compress),)
                check_chain(acting, self.pattern.phase(phase))
        whole = [[s.name for s in chain] for chain in self.chains if chain[0].heads == "all"]
        if whole and len(self.chains) > 1:
            raise UserError(
                f"segments {whole[0]} hold heads='all', and there are {len(self.chains)} chains; give every chain heads of its own by name"
            )

    @property
    def chains(self) -> tuple[Chain, ...]:
        return tuple(c if isinstance(c, tuple) else (c,) for c in self.segments)

    def parts(self) -> Iterator[tuple[str, str, Part]]:
        """Yield (segment name or "", axis, part) for every chosen part."""
        for chain in self.chains:
            for s in chain:
                yield s.name, "policy", s.policy
                yield s.name, "codec", s.codec
                if s.compress is not None:
                    yield s.name, "compress", s.compress
        yield "", "pattern", self.pattern

    def map_parts(self, change) -> Recipe:
        """Return the recipe with `change(part)` in place of each part."""

        def swap(s: Segment) -> Segment:
            compress = None if s.compress is None else change(s.compress)
            return replace(s, policy=change(s.policy), codec=change(s.codec), compress=compress)

        segments = tuple(tuple(map(swap, c)) if isinstance(c, tuple) else swap(c) for c in self.segments)
        return replace(self, segments=segments, pattern=change(self.pattern))

    # ---- budgets

    def _budgeted(self, chain: Chain) -> Part:
        return chain[0].policy if chain[0].compress is None else chain[0].compress

    @property
    def has_budget(self) -> bool:
        """Return True where `with_budget` applies: exactly one part of the recipe keeps or reads a number of tokens."""
        reads = self.pattern.with_budget(LARGE) is not None
        count = reads + sum(self._budgeted(c).with_budget(LARGE) is not None for c in self.chains)
        return count == 1 and (len(self.chains) == 1 or reads)

    @property
    def budget(self) -> int | None:
        """Tokens that its budgeted part keeps or reads; None where there is no single one."""
        if not self.has_budget:
            return None
        (part,) = [p for p in (self.pattern, *map(self._budgeted, self.chains)) if p.with_budget(LARGE) is not None]
        return part.budget  # pyrefly: ignore

    def with_budget(self, budget: int) -> Recipe:
        """Return the recipe with `budget` tokens per KV head, sinks and observation window included.

        Raises:
          UserError: the recipe has no budget, or more than one.
        """
        if not self.has_budget:
            raise UserError(
                f"budget={budget}: this recipe has no single budget (it keeps every token, or several parts have budgets); "
                "leave the budget and keep_ratio out"
            )
        budgeted = {id(self.pattern), *(id(self._budgeted(c)) for c in self.chains)}
        # where a part compresses the prompt, the policy that evicts after it has the same budget
        budgeted |= {id(c[0].policy) for c in self.chains if c[0].compress is not None}

        def change(part: Part) -> Part:
            changed = part.with_budget(budget) if id(part) in budgeted else None
            return part if changed is None else changed

        return self.map_parts(change)

    # ---- by phase and layer

    @property
    def one_shot(self) -> bool:
        """Return True where prefill must take the whole prompt in one step."""
        return self.pattern.one_shot

    @property
    def compresses(self) -> bool:
        """Return True where a part acts at the end of the prompt."""
        return any(chain[0].compress is not None for chain in self.chains)

    @property
    def probe(self) -> int:
        """Number of the prompt's last queries that are kept until its end."""
        return max([0, *(c[0].compress.probe for c in self.chains if c[0].compress is not None)])

    def _layer(self, phase: str, layer: int, model: ModelConfig) -> Recipe:
        """Return the recipe with every part as it acts there; parts that compress are still in their place."""
        if phase not in self.phases:
            raise ValueError(f"phase={phase!r}: allowed are {', '.join(self.phases)}")
        return self.map_parts(lambda part: part.at(phase, layer, model))

    def at(self, phase: str, layer: int, model: ModelConfig) -> Recipe:
        """Return the recipe of this phase and layer (from 0)."""
        recipe = self._layer(phase, layer, model)
        if phase != self.phases[0]:
            return recipe
        return replace(
            recipe, segments=tuple(c if c[0].compress is None else (prompt_segment(c),) for c in recipe.chains)
        )

    def program(self) -> Recipe:
        """Return the recipe that a program is compiled for: without the settings that `data` carries."""
        return self.map_parts(lambda part: part.program())

    def data(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the settings that programs take as numbers: segment name or "" -> axis -> name -> value; without the empty ones."""
        settings: dict[str, dict[str, dict[str, Any]]] = {}
        for segment, axis, part in self.parts():
            if part.data():
                settings.setdefault(segment, {})[axis] = part.data()
        return settings

    # ---- arrays

    def arrays(self, model: ModelConfig) -> dict[str, Array]:
        """Return the arrays that the parts read from `ctx.aux`, by name."""
        declared: dict[str, Array] = {}
        for _, _, part in self.parts():
            for name, array in part.arrays(model).items():
                if declared.setdefault(name, array) != array:
                    raise UserError(
                        f"array {name!r}: {type(part).__name__} declares {array}, another part {declared[name]}; declare it once"
                    )
        return declared

    def check(self, model: ModelConfig, aux: Aux | None = None) -> None:
        """Raise UserError when the recipe does not suit the model: head sizes, or aux that is missing or does not fit."""
        if aux is not None and len(aux) != model.num_layers:
            raise UserError(f"aux has {len(aux)} layers, model {model.name!r} has {model.num_layers}")
        named = {c[0].heads for c in self.chains} - {"all"}
        declared = self.arrays(model)
        for layer in range(model.num_layers):
            given = aux[layer] if aux else {}
            _check_keys(given, layer)
            _check_heads(named, given.get("heads", {}), model, layer)
            _check_arrays(declared, given.get("arrays", {}), model, layer)
            if layer == 0 or named:
                for chain in self.chains:
                    size = Size(num_rows(model, chain[0].heads, aux, layer), model.head_dim, None)
                    for s in chain:
                        s.codec.check(size)

    # ---- storage

    def capacities(self, phase: str, layer: int, shape: Shape) -> dict[str, int]:
        """Return the slots per KV head of every segment of a layer."""
        recipe, now = self._layer(phase, layer, shape.model), self.at(phase, layer, shape.model)
        sizes: dict[str, int] = {}
        for chain, links in zip(recipe.chains, now.chains, strict=True):
            sizes |= capacities(chain, links, phase, shape, self.rounding)
        return sizes

    def kept(self, layer: int, shape: Shape) -> tuple[tuple[str, int], ...]:
        """Return (first segment, most tokens that stay of the prompt) of every chain that compresses, in decode."""
        recipe = self.at(self.phases[-1], layer, shape.model)
        return tuple(
            (c[0].name, kept_width(c, shape, self.rounding)) for c in recipe.chains if c[0].compress is not None
        )

    def init_layer(self, phase: str, layer: int, shape: Shape, aux: Aux | None = None) -> LayerCache:
        """Return an empty cache of one layer."""
        recipe = self.at(phase, layer, shape.model)
        cache = empty_layer(recipe.chains, recipe.pattern, self.capacities(phase, layer, shape), layer, aux, shape)
        if phase != self.phases[0] or not self.probe:
            return cache
        raw = any(c[0].compress is not None and c[0].compress.raw_probe for c in self.chains)
        return replace(cache, probe=empty_probe(self.probe, raw, shape))

    def init(
        self,
        model: ModelConfig,
        prompt: int,
        new_tokens: int = 0,
        *,
        phase="decode",
        aux=None,
        batch=1,
        dtype=jnp.float32,
    ) -> list[LayerCache]:
        """Return the empty cache, one entry per layer."""
        shape = Shape(model, prompt, new_tokens, batch, dtype)
        return [self.init_layer(phase, i, shape, aux) for i in range(model.num_layers)]

    def bytes(self, model: ModelConfig, context: int, new_tokens: int = 0, **settings) -> int:
        """Return the bytes of all arrays of the cache: codes, scales, tails, positions, page summaries, scores.

        Args:
          model: its shape; no weights are needed.
          context: tokens of the prompt.
          new_tokens: tokens after it.
          settings: phase ("decode", or "prefill" for what is held until the end of the prompt), aux, batch, dtype, as in `init`.
        """
        return shape_bytes(jax.eval_shape(lambda: self.init(model, context, new_tokens, **settings)))

    # ---- words

    def describe(self) -> list[Choice]:
        """Describe every choice that differs from its axis's identity, in words; the pattern first."""
        choices = []
        parts = list(self.parts())
        for segment, axis, part in [parts[-1], *parts[:-1]]:
            if part == {"policy": Segment().policy, "codec": Segment().codec, "pattern": CAUSAL}.get(axis):
                continue
            settings = {f.name: repr(getattr(part, f.name)) for f in fields(part)}  # pyrefly: ignore
            where = "" if segment in ("", "all") else f" of {segment}"
            choices.append(Choice(axis + where, type(part).__name__, settings, part.exact))
        choices += [Choice(f"heads of {c[0].name}", c[0].heads, {}, "") for c in self.chains if c[0].heads != "all"]
        return choices or [Choice("pattern", type(CAUSAL).__name__, {}, CAUSAL.exact)]


def _in_phase(s: Segment, phase: str) -> Segment:
    compress = None if s.compress is None else s.compress.phase(phase)
    return replace(s, policy=s.policy.phase(phase), codec=s.codec.phase(phase), compress=compress)


AUX_KEYS = ("heads", "arrays")


def _check_keys(aux: dict[str, Any], layer: int) -> None:
    for key in aux:
        if key not in AUX_KEYS:
            raise UserError(f"aux of layer {layer}: key {key!r} is not read; allowed are {', '.join(AUX_KEYS)}")


def _check_heads(named: set[str], heads: dict[str, Any], model: ModelConfig, layer: int) -> None:
    """Raise UserError unless the named heads are all there and every KV head is in exactly one of them."""
    if not named:
        return
    missing = sorted(named - set(heads))
    if missing:
        raise UserError(f"aux names no heads {missing} in layer {layer}; the recipe needs {sorted(named)}")
    every = sorted(int(h) for n in named for h in heads[n])
    if every != list(range(model.num_kv_heads)):
        raise UserError(f"heads of layer {layer} are {every}; each of 0..{model.num_kv_heads - 1} must appear once")


def _check_arrays(declared: dict[str, Array], given: dict[str, Any], model: ModelConfig, layer: int) -> None:
    """Raise UserError unless the given arrays are those that the parts declare, in their shapes."""
    for name in given:
        if name not in declared:
            raise UserError(
                f"aux array {name!r} of layer {layer} is read by no part of the recipe{nearest(name, declared)}"
                f" ; allowed are {', '.join(declared) or 'none'}"
            )
    for name, array in declared.items():
        if name not in given:
            if array.optional:
                continue
            raise UserError(f"aux has no array {name!r} in layer {layer}, {array.full(model)} per {array.per}")
        shape, kind = jnp.shape(given[name]), jnp.result_type(given[name])
        want = jnp.dtype(array.dtype)
        if shape != array.full(model) or jnp.issubdtype(kind, jnp.integer) != jnp.issubdtype(want, jnp.integer):
            raise UserError(
                f"aux array {name!r} of layer {layer} is {kind} {shape}; allowed is {want} {array.full(model)} per {array.per}"
            )
