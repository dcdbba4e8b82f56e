"""Sinks and a window: the first tokens and the most recent ones stay."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from lcx.ops.attention import FAR
from lcx.policies.base import Evict, check_budget, check_tokens


@dataclass(frozen=True)
class SinkWindow(Evict):
    """Policy that keeps the first `sink` and the last `window` tokens.  Equals dense attention while sink + window covers the context.

    StreamingLLM, arXiv:2309.17453, section 3.2: 4 sinks.  Decides after each step, so the tokens of a step see one another whole:
    with prefill in one shot the prompt is attended densely and cut afterwards, token by token it is the exact window.
    The cache-relative positions of the paper are the pattern `lcx.patterns.streaming.CachePositions`.

    Args:
      sink: first tokens that stay, >= 0.
      window: most recent tokens that stay, the current one included, >= 1.
    """

    sink: int = 4
    window: int = 1_020

    exact = "While sink + window covers the context."
    small = {"sink": 2, "window": 7}
    budget_is_data = True
    shared = True

    def __post_init__(self):
        check_tokens("SinkWindow", "sink", self.sink, 0)
        check_tokens("SinkWindow", "window", self.window, 1)

    @property
    def budget(self) -> int:
        return self.sink + self.window

    def score(self, ctx, held, new):
        rank = lambda pos: jnp.where(pos < self.sink, FAR, pos)
        return rank(held.pos), rank(new.pos)

    def with_budget(self, budget):
        check_budget("SinkWindow (sink + window)", budget, self.sink + 1)
        return replace(self, window=budget - self.sink)
