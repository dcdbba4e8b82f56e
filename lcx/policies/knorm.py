"""Key norm: keys with a small norm are the attended ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from lcx.axes import Compress
from lcx.errors import UserError
from lcx.policies.base import check_budget

WHOLE = 1 << 30  # a budget above every prompt


@dataclass(frozen=True)
class KNorm(Compress):
    """Choice of the tokens whose keys have the smallest L2 norm, per KV head, once at the end of the prompt.

    Devoto et al. 2024, arXiv:2406.11430, section 3: dense prefill, no token protected.  RoPE does not change norms.  The first two layers
    keep the whole prompt, as in the authors' README and quick evaluation (their other scripts leave out the first alone);
    NVIDIA/kvpress compresses all layers: skip_layers=().  Exact while the prompt is within the budget.

    Args:
      budget: tokens kept per KV head in the layers that are not skipped, >= 1.
      skip_layers: layers, from 0, that keep the whole prompt.
    """

    budget: int = 1_024
    skip_layers: tuple[int, ...] = (0, 1)

    exact = "While the prompt is within the budget."
    small = {"budget": 9}
    budget_is_data = True

    def __post_init__(self):
        check_budget("KNorm", self.budget)
        if not isinstance(self.skip_layers, tuple) or any(
            isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.skip_layers
        ):
            raise UserError(
                f"KNorm: skip_layers={self.skip_layers!r} must be a tuple of layers, integers of at least 0"
            )

    def at(self, phase, layer, model):
        return replace(self, budget=WHOLE) if layer in self.skip_layers else self

    def score(self, ctx, held):
        k, _ = held.source.tile(0, held.pos.shape[-1])
        return -jnp.linalg.norm(k.astype(jnp.float32), axis=2)
