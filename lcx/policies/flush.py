"""Policies that keep every token: append, or append and hand down the oldest pages."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from lcx.cache import Edit, Held, Tokens
from lcx.errors import UserError
from lcx.ops.attention import EMPTY, used_length
from lcx.recipe import Policy

# kernels read keys [D,S] in boxes of 64 slots, and a cache of another size would be copied; 63 slots of 4,096 are 1.5 %
ALIGNED, ALIGNED_FROM = 64, 4_096


@dataclass(frozen=True)
class KeepAll(Policy):
    """Keeps every token, in the order of the text.  Exact."""

    shared = True
    ordered = True

    def capacity(self, tokens, page):
        if tokens >= ALIGNED_FROM:
            page = math.lcm(page, ALIGNED)
        return -(-tokens // page) * page

    def edit(self, ctx, held: Held, new: Tokens):
        valid = new.pos != EMPTY
        # padding takes no slot: each row of the batch appends at its own end
        slot = used_length(held.pos, axis=-1)[..., None] + jnp.cumsum(valid, -1) - 1
        return held.slots, Edit(jnp.where(valid, slot, held.pos.shape[-1]).astype(jnp.int32), new), None


@dataclass(frozen=True)
class Flush(Policy):
    """Keeps the newest tokens and hands down the oldest in whole pages, once `keep + page` are there.

    The first segment of a chain whose next one encodes pages.  It holds keep ... keep + page - 1 tokens after a step.

    Args:
      page: tokens handed down together, >= 1.
      keep: newest tokens that never leave, >= 0.
    """

    page: int
    keep: int = 0

    shared = True

    def __post_init__(self):
        for name, least in (("page", 1), ("keep", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"Flush: {name}={value!r} must be an integer of at least {least} tokens")

    def capacity(self, tokens, page):
        return min(self.keep + self.page, tokens)

    def handed(self, tokens):
        return max(0, (tokens - self.keep) // self.page) * self.page

    def edit(self, ctx, held: Held, new: Tokens):
        S, T = held.pos.shape[-1], new.pos.shape[-1]
        k, v = held.store.tile(held.slots, 0, S)
        k = jnp.concatenate([k.swapaxes(2, 3).astype(new.k.dtype), new.k], 2)
        v = jnp.concatenate([v.astype(new.v.dtype), new.v], 2)
        rows = max(held.pos.shape[1], new.pos.shape[1])
        pos = jnp.concatenate([jnp.broadcast_to(p, (p.shape[0], rows, p.shape[2])) for p in (held.pos, new.pos)], 2)
        # slots hold the oldest first, so a stable sort that moves empty places back gives the order of the text
        order = jnp.argsort(pos == EMPTY, axis=-1, stable=True)
        count = jnp.sum(pos != EMPTY, -1, keepdims=True)
        flushed = jnp.maximum(0, (count - self.keep) // self.page) * self.page

        def take(place):
            """The tokens at these places of the text order; EMPTY where `place` is past the end."""
            src = jnp.take_along_axis(order, jnp.minimum(place, S + T - 1), -1)
            wide = jnp.broadcast_to(src, (src.shape[0], k.shape[1], src.shape[2]))[..., None]
            here = jnp.where(place < count, jnp.take_along_axis(pos, src, -1), EMPTY)
            return Tokens(jnp.take_along_axis(k, wide, 2), jnp.take_along_axis(v, wide, 2), here)

        stay = Edit(jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (1, 1, S)), take(flushed + jnp.arange(S)))
        width = self.handed(S + T)
        if width == 0:
            return held.slots, stay, None
        place = jnp.broadcast_to(jnp.arange(width), (*flushed.shape[:2], width))
        return held.slots, stay, take(jnp.where(place < flushed, place, S + T))
