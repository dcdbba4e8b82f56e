"""TOVA: keep the tokens that the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
      per_head: each KV head decides for itself by the mean over its own query heads, as it must after a part that has kept other tokens
        for each; not the paper's.  Where such a part keeps more than the budget, the votes of the prompt's last queries decide at its end.
    """

    budget: int = 1_024
    keep_last: bool = False
    per_head: bool = False

    exact = "While the budget covers the context."
    small = {"budget": 9}
    budget_is_data = True
    votes = True
    shared = property(lambda self: not self.per_head)

    def __post_init__(self):
        check_budget("TOVA", self.budget)

    @property
    def needs(self):
        return frozenset({"whole steps"} if self.per_head else {"whole steps", "all heads", "one set"})

    def after(self, compress):
        return self if compress.shared else replace(self, per_head=True)

    def score(self, ctx, held, new):
        if "votes" in new.state:  # the end of the prompt: every slot is empty
            return jnp.zeros(held.pos.shape, jnp.float32), new.state["votes"]
        last = ctx.last_queries(1)
        heads = (2,) if self.per_head else (1, 2)
        over_heads = lambda source: last.mass(source).mean(heads).reshape(source.pos.shape[0], -1, source.pos.shape[-1])
        own = over_heads(ctx.own)
        if self.keep_last:
            own = jnp.where(new.pos == ctx.last_pos[:, None, None], BIG, own)
        return over_heads(held.source), own
