"""XAttention: blocks of keys ranked by sums along antidiagonals, the fewest that reach a share of the mass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from lcx.axes import CAUSAL, Pattern, Visits
from lcx.errors import UserError
from lcx.ops.attention import EMPTY
from lcx.ops.visits import Visit


@dataclass(frozen=True)
class XAttention(Pattern):
    """In prefill each block of 128 queries reads the smallest set of 128-key blocks whose estimated attention mass reaches `tau`.

    XAttention, Xu et al. 2025, arXiv:2503.16428, sections 2.1 and 2.2: the estimate is a causal softmax over groups of `stride` tokens,
    whose logits are sums over antidiagonals; per query head; block 0 and the query's own block are always read.  tau 0.9 and stride 8 of
    the paper's runs without per-head thresholds.  Decode is dense.  In chunks a block competes with those of the chunks before: the same
    sets as in one shot.  Differs: the authors' code takes up to two blocks more in its first chunk of 16,384 tokens, where the mark of
    block 0 is overwritten and the running sum lags behind; here every row follows the rule of their later chunks.

    Args:
      tau: share of the mass of a row of blocks, above 0, at most 1.
      stride: tokens of a group, a divisor of `block`; the paper's 4, 8 and 16.
      block: queries and keys of a block; kernels take 128.
    """

    tau: float = 0.9
    stride: int = 8
    block: int = 128

    exact = "At tau = 1."
    small = {"tau": 0.5, "stride": 2, "block": 4}
    needs = frozenset({"ordered", "single tokens"})
    visits = ("held", "own")

    def __post_init__(self):
        if isinstance(self.tau, bool) or not 0 < self.tau <= 1:
            raise UserError(f"XAttention: tau={self.tau!r} must be above 0 and at most 1")
        if self.stride < 1 or self.block < self.stride or self.block % self.stride:
            raise UserError(f"XAttention: stride={self.stride} must divide block={self.block}, both at least 1 token")

    @property
    def step_multiple(self):
        return self.block

    def program(self):
        return replace(self, tau=1.0)

    def data(self):
        return {"tau": self.tau}

    def at_limit(self, tokens):
        return replace(self, tau=1.0)

    def phase(self, name):
        return self if name == "prefill" else CAUSAL

    def at(self, phase, layer, model):
        return self.phase(phase)

    def visit(self, ctx, held, own):
        ((name, past),) = held.items()
        masses = ctx.antidiagonal_mass([past.source, own], stride=self.stride, block=self.block)
        blocks = self._chosen(jnp.concatenate(masses, -1), ctx, past)
        pages = {}
        for source, part in zip((name, "own"), jnp.split(blocks, [masses[0].shape[-1]], -1), strict=True):
            pages[source] = Visit(self.block, self.block, blocks=part)
        return Visits(pages)

    def _chosen(self, mass, ctx, past):
        """bool [B,R,G,Q,N]: block 0, the own block, and the largest others until a row has `tau` of its mass."""
        Q, N = mass.shape[-2:]
        tau = ctx.data.get("tau", self.tau)
        num_held = N - Q  # the step's own blocks follow those that are held
        # block 0 of the text is held, but for the first chunk, of which it is the first own block
        begins = (past.pos[:, :, 0] == EMPTY)[:, :, None, None, None] if num_held else jnp.ones((1,) * 5, bool)
        number, row = jnp.arange(N), jnp.arange(Q)[:, None]
        forced = (number == num_held + row) | (number == jnp.where(begins, num_held, 0))
        order = jnp.argsort(jnp.where(forced, -jnp.inf, -mass), -1, stable=True)
        ranked = jnp.take_along_axis(mass, order, -1)
        # what is left out if a block and all after it are: summed from the smallest on, it ends at exactly 0
        left = jnp.cumsum(ranked[..., ::-1], -1)[..., ::-1]
        take = (left > (1 - tau) * left[..., :1]) | jnp.take_along_axis(jnp.broadcast_to(forced, mass.shape), order, -1)
        back = jnp.argsort(order, -1)
        # a block whose mass has vanished in float32 is still part of dense attention
        return jnp.take_along_axis(take, back, -1) | (jnp.asarray(tau) >= 1)
