"""Flush: append, and hand down the oldest pages."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from lcx.axes import Policy
from lcx.cache import Edit, Held, Tokens
from lcx.ops.attention import EMPTY
from lcx.policies.base import check_tokens


@dataclass(frozen=True)
class Flush(Policy):
    """Policy that keeps the newest tokens and hands down the oldest in whole pages, once it holds `keep + page`.

    The first segment of a chain whose next one encodes pages.  It holds keep ... keep + page - 1 tokens after a step.

    Args:
      page: tokens handed down together, >= 1.
      keep: newest tokens that never leave, >= 0.
    """

    page: int
    keep: int = 0

    exact = "Always: it moves tokens and loses none."
    small = {"page": 8, "keep": 8}
    shared = True

    def __post_init__(self):
        check_tokens("Flush", "page", self.page, 1)
        check_tokens("Flush", "keep", self.keep, 0)

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
            """Return the tokens at these places of the text order; EMPTY where `place` is past the end."""
            src = jnp.take_along_axis(order, jnp.minimum(place, S + T - 1), -1)
            wide = jnp.broadcast_to(src, (src.shape[0], k.shape[1], src.shape[2]))[..., None]
            taken = jnp.where(place < count, jnp.take_along_axis(pos, src, -1), EMPTY)
            return Tokens(jnp.take_along_axis(k, wide, 2), jnp.take_along_axis(v, wide, 2), taken)

        stay = Edit(jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (1, 1, S)), take(flushed + jnp.arange(S)))
        width = self.handed(S + T)
        if width == 0:
            return held.slots, stay, None
        place = jnp.broadcast_to(jnp.arange(width), (*flushed.shape[:2], width))
        return held.slots, stay, take(jnp.where(place < flushed, place, S + T))
