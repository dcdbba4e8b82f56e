"""Attention of one layer: `read` the segments and the step's own tokens, then `write`.

`attention` serves one-shot prefill, chunked prefill and decode alike; `repack` turns the cache of the prompt into that of decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lcx.axes import Compress, Pattern
from lcx.backends import choose
from lcx.cache import Edit, Held, LayerCache, Size, Slots, Store, Tokens
from lcx.ctx import Ctx, last_places
from lcx.ops.attention import EMPTY, Partial, Source, merge, slots_of
from lcx.ops.masks import Far, Near, both
from lcx.ops.visits import Visit
from lcx.recipe import Recipe
from lcx.segments import Chain

Heads = Mapping[str, jax.Array]  # name -> int [R], the KV heads of named segments
Notes = dict[str, jax.Array]  # what a step counts beside its result, int32 []


def is_raw(chain: Chain, pattern: Pattern) -> bool:
    """Return True where a chain's slots hold keys before RoPE: one property of the whole chain, whose tokens move from link to link."""
    return pattern.turns or any(s.codec.raw for s in chain)


@dataclass(frozen=True)
class Reading:
    """One chain prepared for reading in one step.

    Attributes:
      ctx: context of the chain's heads, rotated and masked as the pattern wants.
      turned: segment name -> positions that its keys are rotated by, where they are not the slots' own.
    """

    chain: Chain
    pattern: Pattern
    ctx: Ctx
    turned: Mapping[str, jax.Array]

    @property
    def raw(self) -> bool:
        return is_raw(self.chain, self.pattern)

    def held(self, segments: Mapping[str, Slots]) -> dict[str, Held]:
        """Return the segments as sources."""
        R, D = self.ctx.q.shape[1], self.ctx.q.shape[-1]
        dtype = self.ctx.q.dtype if self.ctx.v is None else self.ctx.v.dtype
        result = {}
        for s in self.chain:
            store = Store(s.codec, Size(R, D, dtype), self.ctx.for_part(s.name, "codec"))
            slots = segments[s.name]
            source = held_source(store, slots, self.ctx.rotate if self.raw else None, self.turned.get(s.name))
            result[s.name] = Held(slots, source, store)
        return result


def open_chain(ctx: Ctx, chain: Chain, pattern: Pattern, segments: Mapping[str, Slots]) -> Reading:
    """Return a chain's ctx: rotated by the pattern's positions where it has some, masked by pattern and model window."""
    turned: dict[str, jax.Array] = {}
    ctx = ctx.for_part("", "pattern")
    if pattern.turns:
        name = chain[0].name
        q_pos, own_pos, turned[name] = pattern.rope_pos(ctx, segments[name].pos)
        q, k = ctx.rotate(ctx.q_raw, q_pos[:, None, None], -1), ctx.rotate(ctx.k_raw, own_pos[:, None], -1)
        ctx = replace(ctx, q=q, k=k)
    window = None if ctx.window is None else Near(ctx.window)
    return Reading(chain, pattern, replace(ctx, mask=both(pattern.mask(ctx), window)), turned)


def held_source(store: Store, slots: Slots, rotate=None, rope_pos=None) -> Source:
    """Return a segment as a source.  `rotate` turns raw keys after decoding, by `rope_pos` [B,R|1,S] (None: the slots' own)."""
    turn = slots.pos if rope_pos is None else rope_pos

    def tile(start, size):
        k, v = store.tile(slots, start, size)
        if rotate is not None:
            k = rotate(k, lax.dynamic_slice_in_dim(turn, start, size, 2), -2)
        return k, v

    def gather(pages, size):
        k, v = store.gather(slots, pages, size)
        if rotate is not None:
            k = rotate(k, gather_pos(turn, pages, size), -2)
        return k, v

    as_stored = rotate is None
    return Source(
        pos=slots.pos,
        tile=tile,
        gather=gather,
        plain=store.plain and as_stored,
        pages=store.codec.pages(slots.payload) if as_stored else None,
    )


def gather_pos(pos: jax.Array, pages: jax.Array, size: int) -> jax.Array:
    """Return the positions [B,R,N * size] of the pages [B,R,N] of `size` slots."""
    at = slots_of(pages, size, pos.shape[2])
    return jnp.take_along_axis(jnp.broadcast_to(pos, (*at.shape[:2], pos.shape[2])), at, 2)


# ---- reading


def read(
    ctx: Ctx, recipe: Recipe, cache: LayerCache, heads: Heads, *, own: bool = True, as_stored: bool = False
) -> tuple[jax.Array, jax.Array, Notes, dict[str, dict[str, jax.Array]]]:
    """Compute one step's attention over the held tokens and, unless they are held already, its own tokens.

    Args:
      ctx: all KV heads of the layer.
      recipe: of this phase and layer, static.
      cache: as it is before the step writes, or after it where `own` is False.
      heads: the KV heads of named segments.
      own: True where the step's own tokens are read as they are, beside the segments.
      as_stored: a token reads those before it in the step as the first segment of its chain will hold them.

    Returns:
      (out [B,K,G,T,D], lse [B,K,G,T], notes, state): state is the pattern's, by segment, where reading changes it.
    """
    parts, rows, notes, state = [], [], {}, {}
    for chain in recipe.chains:
        index = _rows(chain, heads)
        if index is not None and index.shape[0] == 0:
            continue
        reading = open_chain(ctx.heads(index), chain, recipe.pattern, cache.segments)
        part, counted, changed = _read_chain(reading, cache, own, as_stored)
        parts.append(part)
        rows.append(index)
        for name, count in counted.items():
            notes[name] = notes.get(name, 0) + count
        state |= changed
    whole = parts[0] if rows[0] is None else jax.tree.map(lambda *x: _unsplit(x, rows), *parts)
    return whole.out, whole.lse, notes, state


def _read_chain(
    reading: Reading, cache: LayerCache, own: bool, as_stored: bool
) -> tuple[Partial, Notes, dict[str, Any]]:
    ctx, pattern = reading.ctx, reading.pattern
    held = reading.held(cache.segments)
    sources = {name: h.source for name, h in held.items()}
    store = held[reading.chain[0].name].store
    as_stored = own and as_stored and not store.plain
    if own and not as_stored:
        sources["own"] = ctx.own
    settings: dict[str, Any] = {"scale": ctx.scale, "mask": ctx.mask, "implementation": ctx.implementation}
    parts, notes, state, listed = [], {}, {}, {}
    if pattern.visits:
        visits = pattern.visit(ctx, held, ctx.own)
        listed, state = visits.pages, dict(visits.state or {})
    for name, pages in listed.items():
        for visit in [pages] if isinstance(pages, Visit) else pages:
            part, overflow = choose.attend_visits(ctx.q, sources[name], ctx.pos, visit, **settings)
            parts.append(part)
            notes["overflow"] = notes.get("overflow", 0) + overflow
    whole = [source for name, source in sources.items() if name not in listed]
    if whole:
        parts.append(choose.attend(ctx.q, whole, ctx.pos, **settings))
    if as_stored:
        own_mask, past_mask = both(ctx.mask, Near(1)), both(ctx.mask, Far(1))
        for source, mask in ((ctx.own, own_mask), (_own_as_stored(reading, store), past_mask)):
            parts.append(choose.attend(ctx.q, [source], ctx.pos, **settings | {"mask": mask}))
    return merge(parts), notes, state


def _own_as_stored(reading: Reading, store: Store) -> Source:
    """Return the step's own tokens as a segment will hold them: encoded, and decoded where they are read."""
    ctx = reading.ctx
    B, T = ctx.pos.shape
    new = Tokens(ctx.k_raw if reading.raw else ctx.k, ctx.v, ctx.pos[:, None])
    slots = store.commit(store.empty(B, 1, T, {}), Edit(jnp.arange(T, dtype=jnp.int32)[None, None], new))
    return held_source(store, slots, ctx.rotate if reading.raw else None)


def _rows(chain: Chain, heads: Heads) -> jax.Array | None:
    return None if chain[0].heads == "all" else heads[chain[0].heads]


def _unsplit(parts: Sequence[jax.Array], rows: Sequence[jax.Array]) -> jax.Array:
    """Join parts of the KV heads [B,R,...] into one array in the model's order."""
    return jnp.concatenate(parts, 1)[:, jnp.argsort(jnp.concatenate(rows))]


# ---- writing


def write(
    ctx: Ctx,
    recipe: Recipe,
    cache: LayerCache,
    heads: Heads,
    lse: jax.Array | None,
    state: Mapping[str, dict[str, jax.Array]] | None = None,
) -> LayerCache:
    """Return the cache with the step's own tokens in it: each chain admits, evicts and hands down.

    Args:
      ctx, recipe, heads: as in `read`; a token whose position is EMPTY leaves no trace.
      cache: before the step.
      lse: result of `read`; None where no policy needs attention.
      state: likewise.
    """
    segments = dict(cache.segments)
    for chain in recipe.chains:
        index = _rows(chain, heads)
        if index is not None and index.shape[0] == 0:
            continue
        reading = open_chain(replace(ctx, lse=lse).heads(index), chain, recipe.pattern, cache.segments)
        held = reading.held(cache.segments)
        for name, changed in (state or {}).items():
            if name in held:
                slots = held[name].slots
                held[name] = replace(held[name], slots=replace(slots, state=slots.state | changed))
        own = reading.ctx
        new = Tokens(own.k_raw if reading.raw else own.k, own.v, own.pos[:, None])
        segments |= _write_chain(reading, held, new)
    probe = None if cache.probe is None else update_probe(cache.probe, ctx)
    return LayerCache(segments, probe)


def _write_chain(reading: Reading, held: Mapping[str, Held], new: Tokens) -> dict[str, Slots]:
    """Pass `new` down the chain: each segment writes what it admits and hands down the rest."""
    written = {}
    incoming: Tokens | None = new
    for s in reading.chain:
        segment = held[s.name]
        if incoming is None or segment.pos.shape[-1] == 0:
            # nothing falls, or no page ever will: the texts are shorter than the segment before holds
            written[s.name] = segment.slots
            continue
        count = incoming.pos.shape[-1]
        slots, edit, handed = s.policy.edit(reading.ctx.for_part(s.name, "policy"), segment, incoming)

        def put(slots: Slots, edit: Edit, store=segment.store, count=count) -> Slots:
            after = store.commit(slots, edit)
            return reading.pattern.summarise(reading.ctx, store, slots, after, count)

        if incoming is new:
            written[s.name] = put(slots, edit)
        else:
            # a page falls once in many steps; the others do not encode or write
            some = jnp.any(incoming.pos != EMPTY)
            written[s.name] = lax.cond(some, put, lambda slots, edit: slots, slots, edit)
        incoming = handed
    return written


def update_probe(probe: dict[str, jax.Array], ctx: Ctx) -> dict[str, jax.Array]:
    """Return the last valid queries of the prompt so far: {"q": [B,K,G,W,D], "pos": [B,W]}, and "q_raw" where it is kept."""
    width = probe["pos"].shape[1]
    both_pos = jnp.concatenate([probe["pos"], ctx.pos], 1)
    idx = last_places(both_pos, width)
    result = {"pos": jnp.take_along_axis(both_pos, idx, 1)}
    for name in probe.keys() - {"pos"}:
        joined = jnp.concatenate([probe[name], getattr(ctx, name).astype(probe[name].dtype)], 3)
        result[name] = jnp.take_along_axis(joined, idx[:, None, None, :, None], 3)
    return result


# ---- a whole layer


def attention(
    ctx: Ctx, recipe: Recipe, cache: LayerCache | None, heads: Heads, *, order: str = "attend"
) -> tuple[jax.Array, LayerCache | None, Notes]:
    """Compute the attention of one layer under a recipe, and its cache afterwards.

    Args:
      ctx: all KV heads of the layer.
      recipe: of this phase and layer (`Recipe.at`), static.
      cache: of this layer; None: no memory, only the step's own tokens.
      heads: the KV heads of named segments.
      order: "attend" reads what is held and the step's own tokens, then writes; "write" writes first and reads every token as it is
        stored.

    Returns:
      (out float32 [B,K,G,T,D], cache or None, notes)
    """
    if cache is None:
        out, _, notes, _ = read(ctx, recipe, _nothing(ctx, recipe, heads), heads)
        return out, None, notes
    if order == "write":
        cache = write(ctx, recipe, cache, heads, None)
        out, _, notes, _ = read(ctx, recipe, cache, heads, own=False)
        return out, cache, notes
    out, lse, notes, state = read(ctx, recipe, cache, heads)
    # XLA:CPU copies a donated cache that is written before it knows that reading is over.  What is written has arrays of its own, or the
    # joint projection of queries, keys and values, three times as large, would live until then
    own = (ctx.k, ctx.k_raw, ctx.v)
    out, cache, (k, k_raw, v) = lax.optimization_barrier((out, cache, own))
    return out, write(replace(ctx, k=k, k_raw=k_raw, v=v), recipe, cache, heads, lse, state), notes


def _nothing(ctx: Ctx, recipe: Recipe, heads: Heads) -> LayerCache:
    """Return segments without slots."""
    segments: dict[str, Slots] = {}
    B, K, _, D = ctx.k.shape
    for chain in recipe.chains:
        index = _rows(chain, heads)
        size = Size(K if index is None else index.shape[0], D, ctx.k.dtype)
        segments |= {s.name: Store(s.codec, size).empty(B, 1, 0, {}) for s in chain}
    return LayerCache(segments)


# ---- the end of the prompt


def repack(
    ctx: Ctx,
    old_recipe: Recipe,
    recipe: Recipe,
    cache: LayerCache,
    empty: Mapping[str, Slots],
    heads: Heads,
    widths: Mapping[str, int],
) -> LayerCache:
    """Turn the cache of the prompt into that of decoding: choose, then write the kept tokens into new segments.

    Args:
      ctx: `q`, `pos` are the probe (the last queries of the prompt); k and v are None.
      old_recipe, recipe: of prefill and of decode for this layer.
      cache: of prefill.
      empty: name -> empty segment of decode, of the chains that compress; the others are passed through.
      heads: as in `read`.
      widths: first segment of a chain -> most tokens that stay.
    """
    result: dict[str, Slots] = {}
    for chain, old_chain in zip(recipe.chains, old_recipe.chains, strict=True):
        compress = chain[0].compress
        index = _rows(chain, heads)
        if compress is None:
            result |= {s.name: cache[s.name] for s in chain}
            continue
        if index is not None and index.shape[0] == 0:
            result |= {s.name: empty[s.name] for s in chain}
            continue
        whole = ctx.heads(index)
        # the probe votes with the keys that it saw
        before = open_chain(whole, old_chain, old_recipe.pattern, cache.segments)
        held = before.held(cache.segments)[old_chain[0].name]
        probe = before.ctx.for_part(chain[0].name, "compress")
        kept = _choose(compress, probe, held, widths[chain[0].name], chain[0].policy.votes)
        after = Reading(chain, recipe.pattern, whole, {})
        result |= _write_chain(after, after.held(empty), kept)
    return LayerCache(result)


def _choose(compress: Compress, ctx: Ctx, held: Held, most: int, votes: bool) -> Tokens:
    """Choose the best tokens of each row in the order of the text; empty places come last.

    `votes`: with the attention that the prompt's last queries paid to each, summed over them and a mean over the group, "votes" of `state`.
    """
    S = held.pos.shape[-1]
    width = min(most, S)
    rows = 1 if compress.shared else held.rows
    pos = jnp.broadcast_to(held.pos, (held.pos.shape[0], rows, S))
    score = jnp.where(pos == EMPTY, -jnp.inf, compress.score(ctx, held))
    keep = compress.keep(ctx, jnp.sum(pos[:, 0] != EMPTY, -1))
    _, kept = lax.top_k(score, width)
    # layers share a width, and have budgets of their own: tokens ranked behind the budget are not kept
    behind = jnp.arange(width) >= jnp.reshape(keep, (-1, 1, 1))
    kept_pos = jnp.where(behind, EMPTY, jnp.take_along_axis(pos, kept, -1))
    order = jnp.argsort(jnp.where(kept_pos == EMPTY, S, kept), -1)
    kept, kept_pos = jnp.take_along_axis(kept, order, -1), jnp.take_along_axis(kept_pos, order, -1)
    k, v = held.store.gather(held.slots, jnp.broadcast_to(kept, (kept.shape[0], held.rows, width)))
    state = {}
    if votes:
        mass = ctx.mass(held.source, ctx.attend(held.source).lse).mean(2)
        state = {"votes": jnp.take_along_axis(mass, jnp.broadcast_to(kept, (*mass.shape[:2], width)), -1)}
    return Tokens(k.swapaxes(2, 3), v, kept_pos, state)
