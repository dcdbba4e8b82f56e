"""H2O: heavy hitters by accumulated attention, and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from lcx.errors import UserError
from lcx.ops.attention import BIG
from lcx.policies.base import Evict, check_budget


@dataclass(frozen=True)
class H2O(Evict):
    """Policy that keeps the tokens with the most attention so far, and the most recent ones: half of the budget each.

    H2O, Zhang et al. 2023, arXiv:2306.14048, section 4.  The score is the plain sum of attention probabilities over all queries of
    prefill and decode, not divided by how many queries saw the token.  After a part that compresses the prompt the sums can begin there:
    a composition, not the paper's.  Differs: the mean over a GQA group decides, one set per KV
    head (the paper's models have no GQA); tokens that arrive in one step attend to one another before any of them is evicted.

    Args:
      budget: tokens kept per KV head, >= 2; budget - budget // 2 of them are the most recent.
      sums: where they begin: "prompt", with the first query, as in the paper; after a part that compresses the prompt "votes", with what
        its last queries paid to each token, or "decode", at 0.
    """

    budget: int = 1_024
    sums: str = "prompt"

    exact = "While the budget covers the context."
    small = {"budget": 9}
    votes = True
    budget_is_data = True
    state = {"mass": jnp.float32}

    def __post_init__(self):
        check_budget("H2O", self.budget, 2)
        if self.sums not in ("prompt", "votes", "decode"):
            raise UserError(f"H2O: sums={self.sums!r}: allowed are prompt, votes, decode")

    @property
    def needs(self):
        return frozenset({"whole steps", "all attention" if self.sums == "prompt" else "votes"})

    def after(self, compress):
        return replace(self, sums="votes") if self.sums == "prompt" else self

    def update(self, ctx, held, new):
        if "votes" in new.state:
            votes = new.state["votes"]
            return held, replace(new, state={"mass": votes if self.sums == "votes" else jnp.zeros_like(votes)})
        past = held.slots.state["mass"] + ctx.mass(held.source).mean(2)
        new = replace(new, state={"mass": ctx.mass(ctx.own).mean(2)})
        return replace(held, slots=replace(held.slots, state=held.slots.state | {"mass": past})), new

    def score(self, ctx, held, new):
        budget = self.budget_of(ctx)
        first_recent = ctx.last_pos[:, None, None] - (budget - budget // 2) + 1
        rank = lambda pos, m: jnp.where(pos >= first_recent, BIG, m)
        return rank(held.pos, held.slots.state["mass"]), rank(new.pos, new.state["mass"])
