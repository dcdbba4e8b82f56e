"""Base of the policies that forget: rank held and new tokens, keep the best `budget`."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lcx.axes import LARGE, Policy
from lcx.cache import Edit, Held, Tokens
from lcx.errors import UserError
from lcx.ops.attention import EMPTY


def check_tokens(method: str, name: str, value: int, least: int) -> None:
    """Raise UserError unless the argument `name` is an int of at least `least` tokens."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{method}: {name}={value!r} must be an integer of at least {least} tokens")


def check_budget(method: str, budget: int, least: int = 1) -> None:
    """Raise UserError unless `budget` is an int of at least `least` tokens."""
    check_tokens(method, "budget", budget, least)


class Evict(Policy):
    """Policy that keeps the `budget` tokens with the highest score per KV head and decides after every step.

    A method overrides `score`; `update` as well if it keeps per-slot state.  Ties keep the lower slot within a step of many tokens.

    A method whose `score` asks `budget_of(ctx)`, and never `self.budget`, may set `budget_is_data`: then budgets of equal capacity share
    their programs.
    """

    budget: int
    lacks = frozenset({"every token"})
    budget_is_data: ClassVar[bool] = False

    def capacity(self, tokens, page):
        return min(self.budget, tokens)

    def update(self, ctx, held: Held, new: Tokens) -> tuple[Held, Tokens]:
        """Bring per-slot state up to date with this step's attention, before scoring."""
        return held, new

    def score(self, ctx, held: Held, new: Tokens) -> tuple[jax.Array, jax.Array]:
        """Return ([B,R|1,S], [B,R|1,N]) in one type, int32 or float32; higher stays.  EMPTY places are handled by the caller."""
        raise NotImplementedError

    def budget_of(self, ctx) -> jax.Array:
        """Return the budget, int32 []: that of the recipe, or the number that the program was given."""
        return jnp.asarray(ctx.data.get("budget", self.budget), jnp.int32)

    def program(self):
        return self.with_budget(LARGE) if self.budget_is_data else self

    def data(self):
        return {"budget": self.budget} if self.budget_is_data else {}

    def edit(self, ctx, held, new):
        held, new = self.update(ctx, held, new)
        held_score, new_score = self.score(ctx, held, new)
        whole = jnp.issubdtype(held_score.dtype, jnp.integer)
        limits = jnp.iinfo(held_score.dtype) if whole else None
        low, high = (limits.min, limits.max) if limits else (-jnp.inf, jnp.inf)
        # one score may serve all rows whose positions differ, or the other way round
        held_score = jnp.where(held.pos == EMPTY, low, held_score)
        new_score = jnp.where(new.pos == EMPTY, low, new_score)
        rows = max(held_score.shape[1], new_score.shape[1])
        held_score, new_score = (jnp.broadcast_to(s, (s.shape[0], rows, s.shape[2])) for s in (held_score, new_score))
        S = held.pos.shape[-1]
        budget = jnp.minimum(self.budget_of(ctx), S)
        new = replace(new, state={name: x for name, x in new.state.items() if name in self.state})
        return held.slots, Edit(_destinations(held_score, new_score, budget, low, high), new), None

    def with_budget(self, budget):
        return replace(self, budget=budget)


def _destinations(held_score: jax.Array, new_score: jax.Array, budget: jax.Array, low, high) -> jax.Array:
    """Return the slot of every new token, S for dropped ones; free slots are handed out lowest first, among the first `budget`."""
    S, N = held_score.shape[-1], new_score.shape[-1]
    if N == 1:
        # an empty slot has the lowest score of all; slots behind the budget are never given away
        spare = jnp.where(jnp.arange(S) < budget, held_score, high)
        victim = jnp.argmin(jnp.concatenate([spare, new_score], -1), -1, keepdims=True)
        return victim.astype(jnp.int32)
    both = jnp.concatenate([held_score, new_score], -1)
    _, kept = lax.top_k(both, S)
    b, r = jnp.arange(both.shape[0])[:, None, None], jnp.arange(both.shape[1])[None, :, None]
    stays = jnp.zeros(both.shape, bool).at[b, r, kept].set(jnp.arange(S) < budget) & (both > low)
    free = jnp.argsort(stays[..., :S], axis=-1, stable=True)
    enters = stays[..., S:]
    rank = jnp.cumsum(enters, -1) - 1
    slot = jnp.take_along_axis(free, jnp.clip(rank, 0, S - 1), -1)
    return jnp.where(enters, slot, S).astype(jnp.int32)
