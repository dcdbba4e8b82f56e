"""TOVA: keep the tokens that the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from lcx.ops.attention import BIG
from lcx.policies.base import Evict, check_budget


@dataclass(frozen=True)
class TOVA(Evict):
    """Policy that keeps the tokens with the highest attention from the last query, one set for the whole layer.

    TOVA, Oren et al. 2024, arXiv:2401.06104, section 3: the attention of the last query, averaged over all query heads; after every
    step.  Nothing is protected, not even the newest token.

    Args:
      budget: tokens kept, >= 1.
      keep_last: also force the step's last token in, as NVIDIA/kvpress does.
    """

    budget: int = 1_024
    keep_last: bool = False

    exact = "While the budget covers the context."
    small = {"budget": 9}
    needs = frozenset({"all attention", "all heads"})
    budget_is_data = True
    shared = True

    def __post_init__(self):
        check_budget("TOVA", self.budget)

    def score(self, ctx, held, new):
        last = ctx.last_queries(1)
        over_heads = lambda source: last.mass(source).mean((1, 2))[:, None]
        own = over_heads(ctx.own)
        if self.keep_last:
            own = jnp.where(new.pos == ctx.last_pos[:, None, None], BIG, own)
        return over_heads(held.source), own
