"""First: keep the first tokens, and hand down the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from lcx.axes import Policy
from lcx.cache import Edit, Held, Tokens
from lcx.ops.attention import EMPTY
from lcx.policies.base import check_tokens


@dataclass(frozen=True)
class First(Policy):
    """Keeps the tokens at positions below `count` and hands down the others, so that the next segment may write them differently.

    Args:
      count: first tokens of the text, >= 1.
    """

    count: int = 1

    exact = "Always: it moves tokens and loses none."
    shared = True

    def __post_init__(self):
        check_tokens("First", "count", self.count, 1)

    def capacity(self, tokens, page):
        return min(self.count, tokens)

    def handed(self, tokens):
        # a text whose first tokens were forgotten, or never fed, hands down all of its tokens
        return tokens

    def edit(self, ctx, held: Held, new: Tokens):
        # capacities are rounded up: there may be more slots than `count`
        stays = (new.pos != EMPTY) & (new.pos < self.count)
        # a token's slot is its position
        edit = Edit(jnp.where(stays, new.pos, held.pos.shape[-1]).astype(jnp.int32), new)
        return held.slots, edit, replace(new, pos=jnp.where(stays, EMPTY, new.pos))
