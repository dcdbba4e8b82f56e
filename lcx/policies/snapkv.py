"""SnapKV: the end of the prompt votes for what to keep of it."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from lcx.axes import Compress
from lcx.errors import UserError
from lcx.ops.attention import BIG, EMPTY
from lcx.policies.base import check_budget, check_tokens


@dataclass(frozen=True)
class SnapKV(Compress):
    """Choice of the observation window and of the tokens that its queries attend to, smoothed over neighbours.

    SnapKV, Li et al. 2024, arXiv:2404.14469, section 4; defaults of the authors' class.  Their LongBench runs, configs/snapkv.py, have
    budget 1,024, window 32, kernel 7 and "max".  Prefill is dense; the cut happens once, at the end of the prompt; decode appends.
    Differs: the mean over a GQA group decides, one set per KV head (the authors store one per query head).  Exact while the prompt is
    within the budget.

    Args:
      budget: tokens kept per KV head, the window included, 256 + 64 by default; a budget of the window alone is allowed and keeps the
        newest tokens, where the authors ask for more.
      window: last prompt tokens whose queries vote, and which always stay.
      kernel: width of the pooling, odd; zeros pad the edges and count in the mean.
      pooling: "avg" or "max", per KV head after the group's mean for "avg"; per query head before it for "max".
    """

    budget: int = 320
    window: int = 64
    kernel: int = 5
    pooling: str = "avg"

    exact = "While the prompt is within the budget."
    small = {"budget": 9, "window": 3}
    budget_is_data = True

    def __post_init__(self):
        check_tokens("SnapKV", "window", self.window, 1)
        check_budget("SnapKV (window included)", self.budget, self.window)
        check_tokens("SnapKV", "kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise UserError(f"SnapKV: kernel={self.kernel} must be odd")
        if self.pooling not in ("avg", "max"):
            raise UserError(f"SnapKV: pooling={self.pooling!r}: allowed are avg, max")

    @property
    def probe(self) -> int:
        return self.window

    def idle(self, prompt):
        # the authors' class asserts that the budget is above the window
        return (
            f"budget {self.budget} is the window: no vote decides, it is a window"
            if self.budget == self.window
            else None
        )

    def score(self, ctx, held):
        votes = ctx.mass(held.source, ctx.attend(held.source).lse)  # [B,R,G,S]
        in_window = held.pos >= ctx.last_pos[:, None, None] - self.window + 1
        # the window's own keys and padding are no candidates; in the pooling they count as 0
        votes = jnp.where((in_window | (held.pos == EMPTY))[:, :, None], 0.0, votes)
        smooth = self._pool(votes).mean(2)
        return jnp.where(in_window, BIG, smooth)

    def _pool(self, votes):
        """Smooth votes [B,R,G,S] over `kernel` neighbours."""
        width, stride = (1, 1, 1, self.kernel), (1, 1, 1, 1)
        if self.pooling == "avg":
            return lax.reduce_window(votes, 0.0, lax.add, width, stride, "SAME") / self.kernel
        return lax.reduce_window(votes, -jnp.inf, lax.max, width, stride, "SAME")
