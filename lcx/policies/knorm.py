"""Key norm: keys with a small norm are the attended ones."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from lcx.axes import Compress
from lcx.policies.base import check_budget


@dataclass(frozen=True)
class KNorm(Compress):
    """Choice of the tokens whose keys have the smallest L2 norm, per KV head, once at the end of the prompt.

    Devoto et al. 2024, arXiv:2406.11430, section 3, as NVIDIA/kvpress runs it: dense prefill, nothing protected.  RoPE does not change
    norms.  Exact while the prompt is within the budget.

    Args:
      budget: tokens kept per KV head, >= 1.
    """

    budget: int = 1_024

    exact = "While the prompt is within the budget."
    small = {"budget": 9}
    budget_is_data = True

    def __post_init__(self):
        check_budget("KNorm", self.budget)

    def score(self, ctx, held):
        k, _ = held.source.tile(0, held.pos.shape[-1])
        return -jnp.linalg.norm(k.astype(jnp.float32), axis=2)
