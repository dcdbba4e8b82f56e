"""What one layer does with its attention: read the segments and the step's own tokens, merge, then write.

`attention` serves one-shot prefill, chunked prefill and decode alike; `repack` turns the cache of the prompt into that of decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from lcx.backends.choose import attend, check_visits
from lcx.cache import Edit, Held, Slots, Store, Tokens
from lcx.ops.attention import EMPTY, Near, Partial, Source, attend_visits, merge, tokens_source
from lcx.recipe import Chain, Pattern, Recipe


@dataclass(frozen=True)
class Ctx:
    """What a method may look at, for the KV heads of one chain (R rows).  Arrays that nobody reads cost nothing under jit.

    Attributes:
      q: [B,R,G,T,D], rotated as attention uses it.   q_raw: before RoPE.
      k, k_raw, v: [B,R,T,D], this step's own; k rotated as attention uses it.
      pos: int32 [B,T], positions in the text, EMPTY for padding.
      scale, softcap: of the logits.
      rotate: `rotate(x, pos, axis)`, RoPE of this layer.
      per_head: name -> [R,...], the method's arrays for these heads.
      allow: the combined mask of pattern and model window, None where everything is visible.
      lse, out: of the merged attention [B,R,G,T], [B,R,G,T,D]; None before attention.
      window: the model's own window of this layer, or None.
      implementation: of attention, as `implementation.resolve` returned it.
    """

    q: jax.Array
    q_raw: jax.Array
    k: jax.Array
    k_raw: jax.Array
    v: jax.Array
    pos: jax.Array
    scale: float
    rotate: Callable
    softcap: float | None = None
    per_head: dict[str, jax.Array] | None = None
    allow: Callable | None = None
    lse: jax.Array | None = None
    out: jax.Array | None = None
    window: int | None = None
    implementation: str = "xla"

    @property
    def last_pos(self) -> jax.Array:
        """int32 [B], position of the last real token of each row."""
        return jnp.max(self.pos, axis=-1)

    def mass(self, source: Source, mass_fn) -> jax.Array:
        """Probability that each key of `source` gets from this step's queries, float32 [B,R,G,S].  After attention."""
        return mass_fn(self.q, source, self.pos, self.lse, scale=self.scale, allow=self.allow, softcap=self.softcap)

    def last_queries(self, count: int) -> Ctx:
        """The same with only the last `count` real queries of each row (EMPTY in front where there are fewer)."""
        idx = _last(self.pos, count)
        pick = lambda x: jnp.take_along_axis(x, idx[:, None, None, :, *(None,) * (x.ndim - 4)], 3)  # noqa: E731
        lse = None if self.lse is None else pick(self.lse)
        return replace(
            self, q=pick(self.q), q_raw=pick(self.q_raw), pos=jnp.take_along_axis(self.pos, idx, 1), lse=lse, out=None
        )

    def heads(self, rows: jax.Array | None) -> Ctx:
        """The same for some of the KV heads; None means all."""
        if rows is None:
            return self
        cut = {n: x[rows] for n, x in (self.per_head or {}).items()}
        names = ("q", "q_raw", "k", "k_raw", "v")
        return replace(self, per_head=cut, **{n: getattr(self, n)[:, rows] for n in names})


def _last(pos: jax.Array, count: int) -> jax.Array:
    """int32 [B,count]: where the last `count` real tokens of each row are; rows with fewer begin with padding."""
    order = jnp.argsort(pos != EMPTY, axis=-1, stable=True)
    pad = max(0, count - pos.shape[-1])
    if pad:
        raise ValueError(f"{count} queries wanted of {pos.shape[-1]}")
    return order[:, order.shape[1] - count :]


def update_probe(probe: dict[str, jax.Array], q: jax.Array, pos: jax.Array) -> dict[str, jax.Array]:
    """The last real queries of the prompt so far: {"q": [B,K,G,W,D], "pos": [B,W]}."""
    width = probe["pos"].shape[1]
    both_pos = jnp.concatenate([probe["pos"], pos], 1)
    both_q = jnp.concatenate([probe["q"], q.astype(probe["q"].dtype)], 3)
    idx = _last(both_pos, width)
    return {
        "q": jnp.take_along_axis(both_q, idx[:, None, None, :, None], 3),
        "pos": jnp.take_along_axis(both_pos, idx, 1),
    }


def held_source(store: Store, slots: Slots, rotate=None, rope_pos=None) -> Source:
    """A segment as a source.  `rotate` turns raw keys after decoding, by `rope_pos` [B,R|1,S] (None: the slots' own)."""
    turn = slots.pos if rope_pos is None else rope_pos

    def tile(start, size):
        k, v = store.tile(slots, start, size)
        if rotate is not None:
            k = rotate(k, lax.dynamic_slice_in_dim(turn, start, size, 2), -2)
        return k, v

    def gather(idx):
        k, v = store.gather(slots, idx)
        if rotate is not None:
            k = rotate(k, jnp.take_along_axis(jnp.broadcast_to(turn, (*idx.shape[:2], turn.shape[2])), idx, 2), -2)
        return k, v

    as_stored = rotate is None
    return Source(
        pos=slots.pos,
        tile=tile,
        gather=gather,
        plain=store.plain and as_stored,
        pages=store.codec.pages(slots.payload) if as_stored else None,
    )


def _is_raw(recipe: Recipe, store: Store) -> bool:
    return recipe.raw_keys or not store.codec.rotated


def _stores(chain: Chain, head_dim: int, dtype) -> list[Store]:
    return [Store(s.codec, head_dim, dtype) for s in chain]


def _with_mask(ctx: Ctx, pattern: Pattern) -> Ctx:
    """`ctx` with what pattern and model window let a query see."""
    if type(pattern).allow is Pattern.allow and ctx.window is None:
        return replace(ctx, allow=None)

    def allow(q_pos, kv_pos):
        mask = pattern.allow(ctx, q_pos, kv_pos)
        if ctx.window is None:
            return mask
        near = q_pos - kv_pos < ctx.window
        return near if mask is None else mask & near

    return replace(ctx, allow=allow)


def _near(ctx: Ctx, pattern: Pattern) -> Near | None:
    """What `_with_mask` lets a query see as a window with sinks; None where it is something else, or nothing is hidden."""
    own = None if ctx.window is None else Near(ctx.window)
    if type(pattern).allow is Pattern.allow:
        return own
    chosen = pattern.near(ctx)
    if chosen is None or own is None:
        return chosen
    # sinks within a window of the model's are no window with sinks
    return own if own.window <= chosen.window else (chosen if chosen.sink == 0 else None)


def _chain_attention(ctx: Ctx, recipe: Recipe, chain: Chain, stores, cache) -> tuple[Partial, Ctx, list]:
    """Merged attention of one chain; `ctx` comes back as it was rotated, with the positions that each segment's keys took."""
    pattern = recipe.pattern
    turned: dict[str, Any] = {}
    own_pos = ctx.pos
    if recipe.raw_keys:
        first = cache[chain[0].name]
        q_pos, own_pos, turned[chain[0].name] = pattern.rope_pos(ctx, first.pos)
        ctx = replace(
            ctx, q=ctx.rotate(ctx.q_raw, q_pos[:, None, None], -1), k=ctx.rotate(ctx.k_raw, own_pos[:, None], -1)
        )

    ctx = _with_mask(ctx, pattern)
    selective, masked = type(pattern).allow is not Pattern.allow, ctx.allow is not None

    def reach(bounds):
        some, every = jnp.ones((), bool), jnp.ones((), bool)
        if selective:
            known = pattern.reach(ctx, bounds)
            some, every = (some, jnp.zeros((), bool)) if known is None else known
        if ctx.window is not None:
            some &= bounds.q_lo - bounds.kv_hi < ctx.window
            every &= bounds.q_hi - bounds.kv_lo < ctx.window
        return some, every

    if pattern.visits:
        check_visits(ctx.implementation, pattern.visits)
    settings = {"scale": ctx.scale, "allow": ctx.allow, "softcap": ctx.softcap}
    held, parts, sources = [], [], []
    for s, store in zip(chain, stores, strict=True):
        slots = cache[s.name]
        raw = ctx.rotate if _is_raw(recipe, store) else None
        here = Held(slots, held_source(store, slots, raw, turned.get(s.name)), store)
        held.append(here)
        if pattern.visits == "held":
            index, count, size = pattern.visit(ctx, here)
            parts.append(
                attend_visits(
                    ctx.q, here.source, ctx.pos, index, count, size=size, block_rows=pattern.block_rows, **settings
                )
            )
        else:
            sources.append(here.source)
    own = tokens_source(ctx.k, ctx.v, ctx.pos)
    if pattern.visits == "own":
        index, count, size = pattern.visit(ctx, held[0])
        parts.append(
            attend_visits(ctx.q, own, ctx.pos, index, count, size=size, block_rows=pattern.block_rows, **settings)
        )
    else:
        sources.append(own)
    if sources:
        hints = {"reach": reach if masked else None, "near": _near(ctx, pattern) if masked else None}
        parts.append(attend(ctx.q, sources, ctx.pos, implementation=ctx.implementation, **hints, **settings))
    part = merge(parts)
    return part, replace(ctx, lse=part.lse, out=part.out), [turned.get(s.name) for s in chain]


def _write_chain(ctx: Ctx, recipe: Recipe, chain: Chain, stores, held: list[Held], new: Tokens) -> dict[str, Slots]:
    """Pass `new` down the chain: each segment writes what it admits and hands down the rest."""
    written = {}
    incoming: Tokens | None = new
    for s, store, here in zip(chain, stores, held, strict=True):
        if incoming is None or here.pos.shape[-1] == 0:
            # nothing falls, or no page ever will: the texts are shorter than the segment before holds
            written[s.name] = here.slots
            continue
        count = incoming.pos.shape[-1]
        slots, edit, handed = s.policy.edit(ctx, here, incoming)

        def write(slots: Slots, edit: Edit, store=store, count=count) -> Slots:
            return recipe.pattern.summarise(store, slots, store.commit(slots, edit), count)

        if incoming is new:
            written[s.name] = write(slots, edit)
        else:
            # a page falls once in many steps; the others do not encode or write
            some = jnp.any(incoming.pos != EMPTY)
            written[s.name] = lax.cond(some, write, lambda slots, edit: slots, slots, edit)
        incoming = handed
    return written


def attention(ctx: Ctx, recipe: Recipe, cache: dict[str, Any] | None, heads: dict[str, jax.Array]):
    """Attention of one layer under a recipe, and its cache afterwards.

    Args:
      ctx: all KV heads of the layer.
      recipe: of this phase and layer (`Recipe.at`), static.
      cache: segment name -> Slots, and "probe" while the prompt runs; None: no memory, the step's own tokens alone.
      heads: name -> int [R], the KV heads of named segments.

    Returns:
      (out float32 [B,K,G,T,D], cache or None)
    """
    head_dim, dtype = ctx.q.shape[-1], ctx.k.dtype
    new_cache, outs, rows = {}, [], []
    pending = []
    for chain in recipe.chains:
        index = None if chain[0].heads == "all" else heads[chain[0].heads]
        if index is not None and index.shape[0] == 0:
            new_cache |= {s.name: cache[s.name] for s in chain} if cache else {}
            continue
        stores = _stores(chain, head_dim, dtype)
        here = ctx.heads(index)
        if cache is None:
            B, R = here.k.shape[:2]
            none = {s.name: store.empty(B, R, 1, 0, {}) for s, store in zip(chain, stores, strict=True)}
            part, _, _ = _chain_attention(here, recipe, chain, stores, none)
        else:
            part, seen, turned = _chain_attention(here, recipe, chain, stores, cache)
            pending.append((seen, chain, stores, turned))
        outs.append(part.out)
        rows.append(index)
    out = outs[0] if rows[0] is None else _unsplit(outs, rows)
    if cache is None:
        return out, None
    # XLA:CPU copies a donated cache that is written before it knows that reading is over.  What is written has arrays of its own, or the
    # joint projection of queries, keys and values, three times as large, would live until then
    own = [(seen.k_raw if _is_raw(recipe, stores[0]) else seen.k, seen.v) for seen, _, stores, _ in pending]
    out, cache, own = lax.optimization_barrier((out, cache, own))
    for (seen, chain, stores, turned), (k, v) in zip(pending, own, strict=True):
        held = []
        for s, store, rope_pos in zip(chain, stores, turned, strict=True):
            raw = seen.rotate if _is_raw(recipe, store) else None
            held.append(Held(cache[s.name], held_source(store, cache[s.name], raw, rope_pos), store))
        new = Tokens(k, v, seen.pos[:, None])
        new_cache |= _write_chain(seen, recipe, chain, stores, held, new)
    if "probe" in cache:
        new_cache["probe"] = update_probe(cache["probe"], ctx.q, ctx.pos)
    return out, new_cache


def _unsplit(outs, rows):
    """Parts of the KV heads [B,R,G,T,D] back into one array in the model's order."""
    order = jnp.argsort(jnp.concatenate(rows))
    return jnp.concatenate(outs, 1)[:, order]


def repack(ctx: Ctx, old_recipe: Recipe, recipe: Recipe, cache, empty, heads: dict[str, jax.Array]):
    """The cache of the prompt turned into that of decoding: choose, then write what stays into new segments.

    Args:
      ctx: `q`, `pos` are the probe (the last queries of the prompt); the rest is not read.
      old_recipe, recipe: of prefill and of decode for this layer.
      cache: of prefill.
      empty: an empty cache of decode for the segments that compress; segments without are passed through.
      heads: as in `attention`.
    """
    head_dim, dtype = ctx.q.shape[-1], ctx.k.dtype
    result = {}
    for chain, old_chain in zip(recipe.chains, old_recipe.chains, strict=True):
        first = chain[0]
        if first.compress is None:
            result |= {s.name: cache[s.name] for s in chain}
            continue
        slots = cache[first.name]
        if slots.payload["k"].shape[1] == 0:
            result |= {s.name: empty[s.name] for s in chain}
            continue
        here = ctx.heads(None if first.heads == "all" else heads[first.heads])
        old = Store(old_chain[0].codec, head_dim, dtype)
        raw = _is_raw(old_recipe, old)
        held = Held(slots, held_source(old, slots, here.rotate if raw else None), old)
        # the probe votes with what it saw
        new = _choose(first.compress, _with_mask(here, old_recipe.pattern), held, old)
        stores = _stores(chain, head_dim, dtype)
        blank = [Held(empty[s.name], held_source(st, empty[s.name]), st) for s, st in zip(chain, stores, strict=True)]
        result |= _write_chain(here, recipe, chain, stores, blank, new)
    return result


def _choose(compress, ctx: Ctx, held: Held, store: Store) -> Tokens:
    """The `budget` best tokens of each row in the order of the text; empty places come last."""
    R, S = held.slots.payload["k"].shape[1], held.pos.shape[-1]
    budget = min(compress.budget, S)
    score = compress.score(ctx, held)
    rows = 1 if compress.shared else R
    pos = jnp.broadcast_to(held.pos, (held.pos.shape[0], rows, S))
    score = jnp.where(pos == EMPTY, -jnp.inf, score)
    _, kept = lax.top_k(score, budget)
    order = jnp.argsort(jnp.where(jnp.take_along_axis(pos, kept, -1) == EMPTY, S, kept), -1)
    kept = jnp.take_along_axis(kept, order, -1)
    kept_pos = jnp.take_along_axis(pos, kept, -1)
    k, v = store.gather(held.slots, jnp.broadcast_to(kept, (kept.shape[0], R, budget)))
    return Tokens(k.swapaxes(2, 3), v, kept_pos)


def split_heads(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B,T,H,D] -> [B,K,G,T,D]."""
    return rearrange(x, "B T (K G) D -> B K G T D", K=num_kv_heads)
