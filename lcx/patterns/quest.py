"""Quest: read the pages whose keys may answer this query."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import lax

from lcx.axes import CAUSAL, Pattern, Visits
from lcx.errors import UserError
from lcx.ops.attention import EMPTY, used_length
from lcx.ops.visits import Visit


@dataclass(frozen=True)
class Quest(Pattern):
    """At decode each query reads the pages with the highest upper bound of q.k, from the pages' element-wise extremes of the keys.

    Quest, Tang et al. 2024, arXiv:2406.10774, section 3.3 and the authors' code: pages of 16, the first two layers dense, at least 3
    pages.  The paper leaves the last page open: the authors' kernels always read it (`force_last`, the default); in their evaluation,
    the code behind the paper's accuracy, it competes (`force_last=False`), and small budgets lose far more.  Pages are those of the held
    tokens, where the authors count the step's own token into the last one; own tokens of the step are read by all.  Prefill is dense,
    and all tokens stay in memory beside the extremes (1/16 more).  Pages are chosen per query head as in the authors' evaluation.
    Exact when the budget covers the context.

    Args:
      budget: tokens read per query head, rounded down to pages.
      page: tokens a page.
      dense_layers: layers at the bottom that read everything.
      group_reduce: None, or "max": one page set for the query heads of a KV head, by their highest score.
      force_last: True where the last page that holds a token is always among those read.
    """

    budget: int = 1_024
    page: int = 16
    dense_layers: int = 2
    group_reduce: str | None = None
    force_last: bool = True

    exact = "While the budget covers the context."
    small = {"budget": 12, "page": 4}
    needs = frozenset({"ordered", "single tokens"})
    visits = ("held",)
    least_pages = 3

    def __post_init__(self):
        if self.page < 1 or self.budget < self.page:
            raise UserError(f"Quest: budget={self.budget} must be at least one page, page={self.page} at least 1")
        if self.dense_layers < 0:
            raise UserError(f"Quest: dense_layers={self.dense_layers} must be at least 0")
        if self.group_reduce not in (None, "max"):
            raise UserError(f"Quest: group_reduce={self.group_reduce!r}: allowed are None, 'max'")
        if not isinstance(self.force_last, bool):
            raise UserError(f"Quest: force_last={self.force_last!r}: allowed are True, False")

    def phase(self, name):
        return Summaries(self.page) if name == "prefill" else self

    def at(self, phase, layer, model):
        return CAUSAL if layer < self.dense_layers else self.phase(phase)

    def layout(self, slots, size):
        return Summaries(self.page).layout(slots, size)

    def summarise(self, ctx, store, before, after, num_new):
        return Summaries(self.page).summarise(ctx, store, before, after, num_new)

    def share(self, slots, group):
        lists = 1 if self.group_reduce else group
        return min(1.0, self.budget * lists / max(slots, 1))

    def visit(self, ctx, held, own):
        return Visits({name: self._pages(ctx, segment) for name, segment in held.items()})

    def _pages(self, ctx, held):
        """Return the pages of one segment with the highest upper bound of q.k."""
        low, high = (held.slots.state[n] for n in ("page_min", "page_max"))
        score = ctx.score_minmax(low, high)
        if self.group_reduce == "max":
            score = score.max(2, keepdims=True)
        pages = score.shape[-1]
        number = jnp.arange(pages)
        if ctx.window is not None:
            score = jnp.where(self._near(ctx, held.pos, pages), score, -jnp.inf)
        used = -(-used_length(held.pos, axis=-1) // self.page)[:, :, None, None, None]  # [B,R|1,1,1,1]
        score = jnp.where(number < used, score, -jnp.inf)
        if self.force_last:
            score = jnp.where(number == used - 1, jnp.inf, score)
        wanted = min(max(self.budget // self.page, self.least_pages), pages)
        _, index = lax.top_k(score, wanted)
        count = jnp.broadcast_to(jnp.minimum(used[..., 0], wanted), index.shape[:-1])
        return Visit(self.page, 1, lists=(index, count))

    def _near(self, ctx, held_pos, pages):
        """Return bool [B,R|1,1,T,pages]: pages with tokens in the model's own window; others would take their places for nothing."""
        pad = pages * self.page - held_pos.shape[-1]
        pos = jnp.pad(held_pos, ((0, 0), (0, 0), (0, pad)), constant_values=EMPTY)
        newest = pos.reshape(*pos.shape[:2], pages, self.page).max(-1)
        return ctx.pos[:, None, None, :, None] - newest[:, :, None, None] < ctx.window

    def at_limit(self, tokens):
        # a budget is rounded down to whole pages
        return replace(self, budget=tokens + self.page)

    def with_budget(self, budget):
        return replace(self, budget=budget)


@dataclass(frozen=True)
class Summaries(Pattern):
    """Pattern that reads everything and keeps the extremes of each page's keys up to date: Quest while it is not choosing."""

    page: int

    exact = "Always."
    needs = frozenset({"ordered", "single tokens"})

    def layout(self, slots, size):
        shape = (size.head_dim, -(-slots // self.page))
        return {"page_min": (shape, size.dtype), "page_max": (shape, size.dtype)}

    def summarise(self, ctx, store, before, after, num_new):
        S = after.pos.shape[-1]
        B, R, _, pages = after.state["page_min"].shape
        # tokens are appended, so only pages from the first free slot on have changed
        touched = used_length(before.pos, axis=-1)[..., None] // self.page + jnp.arange(
            min(num_new // self.page + 2, pages)
        )
        touched = jnp.broadcast_to(touched, (B, R, touched.shape[-1]))
        slots = touched[..., None] * self.page + jnp.arange(self.page)
        inside = slots < S
        slots = jnp.where(inside, slots, S - 1).reshape(B, R, -1)
        k, _ = store.gather(after, slots)
        pos = jnp.take_along_axis(jnp.broadcast_to(after.pos, (B, R, S)), slots, -1)
        valid = (pos != EMPTY).reshape(inside.shape) & inside
        k = k.reshape(B, R, k.shape[2], touched.shape[-1], self.page)
        low = jnp.min(jnp.where(valid[:, :, None], k, jnp.inf), -1)
        high = jnp.max(jnp.where(valid[:, :, None], k, -jnp.inf), -1)
        some = jnp.any(valid, -1)[:, :, None]
        b, r = jnp.arange(B)[:, None, None], jnp.arange(R)[None, :, None]
        state = dict(after.state)
        for name, x in (("page_min", low), ("page_max", high)):
            x = jnp.moveaxis(jnp.where(some, x, 0), 2, 3).astype(state[name].dtype)
            state[name] = state[name].at[b, r, :, touched].set(x, mode="drop")
        return replace(after, state=state)
