"""KeyDiff: keep the keys that point elsewhere than the others."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from lcx.ops.attention import EMPTY
from lcx.policies.base import Evict, check_budget

TINY = 1e-12  # least length of a key or of the anchor, against a division by 0


@dataclass(frozen=True)
class KeyDiff(Evict):
    """Policy that keeps the tokens whose keys are least like the mean direction of all keys, one set per KV head, after every step.

    KeyDiff, Park et al. 2025, arXiv:2504.15364, section 3: the score is minus the cosine between a key (after RoPE) and the anchor,
    the mean of the keys after each is scaled to length 1; the anchor is taken anew over what is held and what is new at each choice.
    No query votes, and nothing is protected, neither sinks nor the newest token.  A prompt in one step is one choice, as
    NVIDIA/kvpress makes it; chunks of 128 are the paper's blocks.  Differs: the cosine is computed in float32.

    Args:
      budget: tokens kept per KV head, >= 1.
    """

    budget: int = 1_024

    exact = "While the budget covers the context."
    small = {"budget": 9}
    needs = frozenset({"rotated keys"})
    lacks = frozenset({"every token"})
    budget_is_data = True

    def __post_init__(self):
        check_budget("KeyDiff", self.budget)

    def score(self, ctx, held, new):
        k, _ = held.source.tile(0, held.pos.shape[-1])
        held_unit, new_unit = _unit(k.swapaxes(2, 3), held.pos), _unit(new.k, new.pos)
        count = sum(jnp.sum(pos != EMPTY, -1, keepdims=True) for pos in (held.pos, new.pos))  # [B,R|1,1]
        anchor = (held_unit.sum(2) + new_unit.sum(2)) / jnp.maximum(count, 1)
        anchor /= jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), TINY)
        cosine = lambda unit: jnp.einsum("brnd,brd->brn", unit, anchor)
        return -cosine(held_unit), -cosine(new_unit)


def _unit(k, pos):
    """Return the keys [B,R,N,D] scaled to length 1, float32; 0 where there is no token."""
    k = jnp.where((pos != EMPTY)[..., None], k.astype(jnp.float32), 0.0)
    return k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), TINY)
