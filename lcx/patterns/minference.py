"""MInference: sparse prefill over columns and diagonals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from lcx.axes import CAUSAL, Array, Pattern, Visits
from lcx.errors import UserError
from lcx.ops.attention import EMPTY
from lcx.ops.vertical_slash import ROWS as BLOCK
from lcx.ops.vertical_slash import vertical_slash
from lcx.ops.visits import Visit

PROBE = 64  # last queries that estimate
SINK_COLUMNS, NEAR_DIAGONALS = 30, 100  # ranked first
LEAST_VERTICAL, LEAST_SLASH = 30, 50  # sizes below are raised


@dataclass(frozen=True)
class MInference(Pattern):
    """Vertical-slash attention in prefill: the columns and diagonals that the last 64 queries attend to.

    MInference 1.0, Jiang et al. 2024, arXiv:2407.02490, section 3.2; constants of the authors' code: probe of 64 queries, the first 30
    columns and the nearest 100 distances ranked first, blocks of 64 rows, each chosen distance d reading the 64 keys up to (end of the
    block - d).  With slash below 100 the authors' top-k leaves open which of the 100 are taken; here it is the nearest.  Every query head
    chooses for itself.  Per-head sizes come as the arrays "vertical" and "slash", int [H]; without them all heads have the authors'
    default for heads that their search left out, and prompts of up to 6,096 tokens are read densely.  Decode is dense.  Differs: ranges
    that overlap are joined exactly, where the authors' kernel extends by whole blocks and reads a little more.

    Args:
      vertical: columns, >= 1 (raised to 30).
      slash: diagonals, >= 1 (raised to 50).
    """

    vertical: int = 1_000
    slash: int = 6_096

    exact = "While vertical or slash covers the prompt, and for prompts of up to 64 tokens."
    small = {"vertical": 30, "slash": 50}
    visits = ("own",)
    one_shot = True

    def __post_init__(self):
        if self.vertical < 1 or self.slash < 1:
            raise UserError(f"MInference: vertical={self.vertical} and slash={self.slash} must be at least 1")

    def at_limit(self, tokens):
        return replace(self, vertical=tokens)

    def arrays(self, model):
        size = Array(dtype=jnp.int32, per="query head", optional=True)
        return {"vertical": size, "slash": size}

    def phase(self, name):
        return self if name == "prefill" else CAUSAL

    def at(self, phase, layer, model):
        return self.phase(phase)

    def _sizes(self, ctx, name: str, least: int) -> jax.Array:
        """int32 [1,R,G,1]."""
        R, G = ctx.q.shape[1:3]
        size = ctx.aux.get(name, jnp.full((R, G), getattr(self, name)))
        return jnp.maximum(size, least)[None, :, :, None]

    def _estimate(self, ctx):
        """(columns, diagonals): probability of the probe by key and by distance, float32 [B,R,G,T]."""
        T = ctx.pos.shape[1]
        probe = ctx.last_queries(min(PROBE, T))
        # one shot: slot s of the step holds the s-th token of the text, padding follows
        real = jnp.sum(ctx.pos != EMPTY, -1, dtype=jnp.int32)
        return ctx.score_probe(probe.q, jnp.moveaxis(ctx.k, 3, 2), q_offset=real - probe.pos.shape[1], kv_len=real)

    def visit(self, ctx, held, own):
        T = ctx.pos.shape[1]
        columns, diagonals = self._estimate(ctx)
        number = jnp.arange(T)
        columns = jnp.where(number < SINK_COLUMNS, jnp.inf, jnp.where((ctx.pos != EMPTY)[:, None, None], columns, -1.0))
        diagonals = jnp.where(number < NEAR_DIAGONALS, jnp.inf, diagonals)
        column = _best(columns, self._sizes(ctx, "vertical", LEAST_VERTICAL))
        diagonal = _best(diagonals, self._sizes(ctx, "slash", LEAST_SLASH))
        # sizes by head are known when the program runs
        slash = LEAST_SLASH if "slash" in ctx.aux else max(self.slash, LEAST_SLASH)
        most = {
            "columns": T if "vertical" in ctx.aux else max(self.vertical, LEAST_VERTICAL),
            "distances": T if "slash" in ctx.aux else slash,
        }
        # one shot: nothing is held before this step
        nothing = Visit(1, BLOCK, listing=lambda i: (jnp.zeros((1, 1, 1, 0), jnp.int32),) * 2, most=0)
        pages = {"own": vertical_slash(column, diagonal, near=min(slash, NEAR_DIAGONALS), **most)}
        return Visits(dict.fromkeys(held, nothing) | pages)


def _best(score, size):
    """bool like score: the `size` highest of the last axis; ties keep the first."""
    T = score.shape[-1]
    _, order = lax.top_k(score, T)
    rank = jnp.argsort(order, -1)
    return rank < size
