"""StreamingLLM: positions count within the cache, not within the text."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from lcx.axes import Pattern
from lcx.ops.attention import EMPTY


@dataclass(frozen=True)
class CachePositions(Pattern):
    """RoPE by places in the cache: keys turn by their rank among the held tokens, queries by the number of tokens before them in the cache.

    StreamingLLM, Xiao et al. 2023, arXiv:2309.17453, section 3.2; it goes with `policies.SinkWindow` (4 sinks).  Keys are cached
    before RoPE.  All KV heads of a row must hold equally many tokens.  Exact while nothing is evicted.
    """

    exact = "While nothing is evicted."
    needs = frozenset({"one segment"})
    turns = True

    def rope_pos(self, ctx, held_pos):
        # two sorts a step of a few thousand slots; ranks that were stored would change with every eviction
        key = jnp.where(held_pos == EMPTY, jnp.iinfo(jnp.int32).max, held_pos)
        rank = jnp.argsort(jnp.argsort(key, -1), -1).astype(jnp.int32)
        held = jnp.max(jnp.sum(held_pos != EMPTY, -1), 1, initial=0)
        own = held[:, None] + jnp.cumsum(ctx.pos != EMPTY, -1) - 1
        own = jnp.where(ctx.pos == EMPTY, 0, own).astype(jnp.int32)
        return own, own, rank
