"""Attention over some keys, and the exact union of such parts.

Every method ends here.  A `Source` says how to read a tile of keys and values and where its tokens stand in the text; `attend` walks
tiles of queries and keys with a running maximum and sum; `merge` joins parts; `mass` sums probabilities by key.  Masks talk only
about positions: causality and validity (`pos != EMPTY`, `kv_pos <= q_pos`) are applied here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.masks import Bounds, Mask

EMPTY = -1  # position of a slot that holds no token
FAR = 2**30  # above every position
BIG = 1e30  # finite stand-in for infinity: -inf minus -inf is nan

# measured on 2 CPU cores, D = 64 (docs/design.md): larger tiles waste half of those on the diagonal, smaller ones pay for every operation
Q_TILE, KV_TILE = 256, 256
LONG_QUERIES, LONG_TILE = 2_048, 512
# a step of fewer queries is a decode step: it reads longer tiles, or all keys at once where that makes no copy and few logits
DECODE_QUERIES, DECODE_KV_TILE, DECODE_LOGITS = 16, 2_048, 2**21


class Partial(NamedTuple):
    """Attention over some keys: `out` [B,K,G,T,D] float32 and `lse` [B,K,G,T], the natural log of the sum of exp(logits).

    A row that saw no key has out 0 and lse -inf.
    """

    out: jax.Array
    lse: jax.Array


@dataclass
class Source:
    """Keys and values to read, tile by tile.

    Attributes:
      pos: int32 [B,R,S] or [B,1,S], position of the token in each slot, EMPTY where none.
      tile: `tile(start, size) -> k [B,R,D,size], v [B,R,size,D]`; `start` is a traced multiple of the codec's page.
      gather: `gather(pages [B,R,N], size) -> k [B,R,D,N * size], v [B,R,N * size,D]`; page p is the slots from p * size on.
      held: True where only a prefix is in use; then the walk ends at the last used slot and cannot be differentiated in reverse.
      plain: True where `tile(0, S)` is the stored arrays themselves, so that reading all of it at once makes no copy.
      pages: the stored arrays as the decode kernel reads them, `payloads.Pages`, those of a row in the order of its tokens; None where
        they lie otherwise.
    """

    pos: jax.Array
    tile: Callable
    gather: Callable | None = None
    held: bool = True
    plain: bool = False
    pages: Any = None


def tokens_source(k: jax.Array, v: jax.Array, pos: jax.Array) -> Source:
    """Return this step's own tokens as a source.  `k`, `v` [B,R,T,D] in any float type, `pos` [B,T]."""
    k = k.swapaxes(2, 3)

    def tile(start, size):
        return lax.dynamic_slice_in_dim(k, start, size, 3), lax.dynamic_slice_in_dim(v, start, size, 2)

    def gather(pages, size):
        return take_pages(k, pages, size, 3), take_pages(v, pages, size, 2)

    return Source(pos=pos[:, None, :], tile=tile, gather=gather, held=False, plain=True)


def slots_of(pages: jax.Array, size: int, slots: int) -> jax.Array:
    """Return the slot numbers [...,N * size] of the pages [...,N]; numbers behind the last of `slots` slots name the last one."""
    idx = pages[..., None] * size + jnp.arange(size, dtype=pages.dtype)
    return jnp.minimum(idx.reshape(*pages.shape[:-1], -1), slots - 1)


def take_pages(x: jax.Array, pages: jax.Array, size: int, axis: int) -> jax.Array:
    """Entries of the pages [B,R,N] along an axis of x [B,R,...]: N * size of them in its place.

    Pages that begin behind the last entry give any entries.  Where the axis is a whole number of pages, neighbours are copied together: on
    a CPU several times faster than one by one.
    """
    total = x.shape[axis]
    if size > 1 and total % size == 0:
        apart = x.reshape(*x.shape[:axis], total // size, size, *x.shape[axis + 1 :])
        take = lambda row, at: jnp.take(row, at, axis - 2, mode="clip")
        cut = jax.vmap(jax.vmap(take))(apart, jnp.broadcast_to(pages, (*x.shape[:2], pages.shape[2])))
        return cut.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    at = slots_of(pages, size, total)
    shape = at.shape[:2] + (1,) * (axis - 2) + at.shape[2:] + (1,) * (x.ndim - axis - 1)
    return jnp.take_along_axis(x, at.reshape(shape), axis)


def used_length(pos: jax.Array, axis=None) -> jax.Array:
    """Return the number of slots up to the last one that holds a token; over all rows, or per row with `axis=-1`."""
    return jnp.max(jnp.where(pos != EMPTY, jnp.arange(1, pos.shape[-1] + 1), 0), axis=axis, initial=0)


def tile_starts(total: int, size: int) -> jax.Array:
    """Return the first index of each tile; the last tile is moved back so that it ends at `total` (it overlaps the one before)."""
    count = -(-total // size)
    return jnp.minimum(jnp.arange(count, dtype=jnp.int32) * size, total - size)


def _tile_stats(pos: jax.Array, size: int, fresh_only: bool = True):
    """Return per tile of slots: lowest and highest position, and whether every slot of it holds a token that no earlier tile has.

    `fresh_only` leaves out of the extremes what the tile shares with the one before.
    """
    total = pos.shape[-1]
    starts = tile_starts(total, size)
    index = starts[:, None] + jnp.arange(size)
    tiles = pos[..., index]  # [B,R,tiles,size]
    fresh = index >= (jnp.arange(starts.shape[0]) * size)[:, None]
    valid = (tiles != EMPTY) & (fresh | (not fresh_only))
    over = (0, 1, 3)
    low = jnp.min(jnp.where(valid, tiles, FAR), axis=over)
    high = jnp.max(jnp.where(valid, tiles, EMPTY), axis=over)
    return starts, low, high, jnp.all(valid & fresh, axis=over)


def visible(q_pos, kv_pos, mask: Mask | None):
    """Return bool [B,R,1|G,T,S] from q_pos [B,T] and kv_pos [B,R,S]: causal, valid, and allowed by the mask."""
    q_pos = q_pos[:, None, None, :, None]
    kv_pos = kv_pos[:, :, None, None, :]
    seen = (kv_pos != EMPTY) & (kv_pos <= q_pos)
    return seen if mask is None else seen & mask.allow(q_pos, kv_pos)


def _logits(q, k, scale):
    logits = jnp.einsum("brgtd,brds->brgts", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
    return logits if scale is None else logits * scale


def update(carry, q, k, v, seen, scale, careful=True, weigh=None):
    """Update the running softmax by one tile of keys.

    Args:
      carry: maximum, sum and accumulator.
      q, k, v: [B,R,G,T,D], [B,R,D,S], [B,R,S,D].
      seen: bool [B,R,G,T,S], or None where every key is visible to every query.
      scale: of the logits; None where q carries it.
      careful: False lets a hidden value that is not finite make the result nan.
      weigh: maps the logits [B,R,G,T,S] to other ones before the mask.
    """
    m, l, acc = carry
    logits = _logits(q, k, scale)
    if weigh is not None:
        logits = weigh(logits)
    if seen is not None:
        logits = jnp.where(seen, logits, -BIG)
    m_new = jnp.maximum(m, logits.max(-1))
    # a row that has seen nothing takes 0 for its maximum, so that hidden keys are exp(-BIG) = 0 without a second mask
    top = m_new if seen is None else jnp.where(m_new == -BIG, 0.0, m_new)
    p = jnp.exp(logits - top[..., None])
    keep = jnp.exp(m - top)
    l = l * keep + p.sum(-1)
    p, v = p.astype(q.dtype), v.astype(q.dtype)
    new = _weighted(p, v)
    if seen is not None and careful:
        # 0 * nan is nan, so a hidden value that is not finite shows here; looking at every value beforehand costs as much as the product
        new = lax.cond(jnp.any(jnp.isnan(new)), lambda: _careful(p, v, seen), lambda: new)
    return m_new, l, acc * keep[..., None] + new


def _weighted(p, v):
    return jnp.einsum("brgts,brsd->brgtd", p, v, preferred_element_type=jnp.float32)


def _careful(p, v, mask):
    """Compute `_weighted` with values that are not finite taken out of the product; rows that see them get nan."""
    bad = ~jnp.all(jnp.isfinite(v), -1)
    seen = jnp.any(mask & bad[:, :, None, None, :], -1)
    return jnp.where(seen[..., None], jnp.nan, _weighted(p, jnp.where(bad[..., None], 0, v)))


def begin(shape, d):
    """Return the carry of a running softmax over no keys yet."""
    return jnp.full(shape, -BIG), jnp.zeros(shape), jnp.zeros((*shape, d))


def finish(m, l, acc) -> Partial:
    """Return the attention accumulated by a running softmax."""
    some = l > 0
    l = jnp.where(some, l, 1.0)
    # a poisoned accumulator keeps its nan, an empty one is exactly 0
    return Partial(acc / l[..., None], jnp.where(some, m + jnp.log(l), -jnp.inf))


def naive_attend(q, k, v, q_pos, kv_pos, *, scale: float, mask: Mask | None = None) -> Partial:
    """Compute attention in five lines, every logit at once: the formula that `attend` computes in tiles, and its first reference in tests.

    Args:
      q: [B,R,G,T,D].   k: [B,R,D,S].   v: [B,R,S,D].
      q_pos: int32 [B,T].   kv_pos: int32 [B,R,S].
      scale, mask: as in `attend`.
    """
    logits = jnp.einsum("brgtd,brds->brgts", q, k, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(visible(q_pos, kv_pos, mask), logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, -1)
    p = jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])
    return Partial(jnp.einsum("brgts,brsd->brgtd", p, v, preferred_element_type=jnp.float32), lse)


def attend(
    q: jax.Array,
    source: Source | Sequence[Source],
    q_pos: jax.Array,
    *,
    scale: float,
    mask: Mask | None = None,
    q_tile: int | None = None,
    kv_tile: int | None = None,
) -> Partial:
    """Compute attention of `q` over one or several disjoint sources, never holding more than one tile of logits.

    Costs by each source's used length, not by its capacity; tiles that no query of the tile can see are skipped, and tiles that every
    query sees whole take no mask.  Differentiable in reverse when the sources are this step's own tokens (`held=False`).

    Args:
      q: [B,R,G,T,D].
      source: keys and values, R rows; several count as one, of all their keys.
      q_pos: int32 [B,T], EMPTY for padding (such rows give 0).
      scale: factor on the logits.
      mask: which visible keys a query may read; None: all.  Its bounds skip or unmask whole tiles.
      q_tile, kv_tile: tile sizes in tokens; by default 256, or 512 for at least 2,048 queries, and `kv_tile` 2,048 for fewer than 16.

    Returns:
      Partial over the R rows.
    """
    B, R, G, T, D = q.shape
    sources = [s for s in ([source] if isinstance(source, Source) else source) if s.pos.shape[-1]]
    if not sources or T == 0:
        return Partial(jnp.zeros((B, R, G, T, D)), jnp.full((B, R, G, T), -jnp.inf))
    if q.dtype == jnp.float32 or math.log2(scale).is_integer():
        # as exact on q as on the logits, and a pass over every tile less
        q, scale = q * jnp.asarray(scale, q.dtype), None
    tile = LONG_TILE if T >= LONG_QUERIES else Q_TILE
    few = kv_tile is None and T < DECODE_QUERIES
    n_q = min(q_tile or tile, T)
    n_kv = kv_tile or (DECODE_KV_TILE if few else tile)

    def tiles(sources):
        return _attend_tiles(q, sources, q_pos, n_q, n_kv, scale, mask)

    def all_at_once(s, careful):
        k, v = s.tile(0, s.pos.shape[-1])
        seen = visible(q_pos, s.pos, mask)
        return finish(*update(begin((B, R, G, T), D), q, k, v, seen, scale, careful))

    def few_queries(s):
        S = s.pos.shape[-1]
        if not s.plain or B * R * G * T * S > DECODE_LOGITS:
            return tiles([s])
        if not s.held:
            return all_at_once(s, careful=True)
        # a tile is a copy of its slots: about twice the time of reading them in place (S = 4,136, 2 CPU cores)
        full = 2 * used_length(s.pos) >= S
        part = lax.cond(full, lambda: all_at_once(s, careful=False), lambda: finish(*begin((B, R, G, T), D)))
        # hidden values that are not finite: leaving them out of the whole product would take a copy of all values
        return lax.cond(full & ~jnp.any(jnp.isnan(part.out)), lambda: part, lambda: tiles([s]))

    return merge([few_queries(s) for s in sources]) if few else tiles(sources)


def _attend_tiles(q, sources, q_pos, n_q, n_kv, scale, mask) -> Partial:
    """Compute `attend` in tiles of `n_q` queries and `n_kv` keys, up to each source's last used slot."""
    B, R, G, T, D = q.shape
    q_starts = tile_starts(T, n_q)
    sizes = [min(n_kv, s.pos.shape[-1]) for s in sources]
    stats = [_tile_stats(s.pos, size) for s, size in zip(sources, sizes, strict=True)]

    def one_q_tile(q_start):
        qt = lax.dynamic_slice_in_dim(q, q_start, n_q, 3)
        qp = lax.dynamic_slice_in_dim(q_pos, q_start, n_q, 1)
        q_lo, q_hi = jnp.min(qp), jnp.max(qp)  # padding makes q_lo EMPTY: such a tile is masked
        q_lo_real = jnp.min(jnp.where(qp == EMPTY, FAR, qp))

        def walk(source, size, kv_starts, lows, highs, wholes, carry):
            def body(j, carry):
                some = lows[j] <= q_hi
                every = wholes[j] & (highs[j] <= q_lo)
                if mask is not None:
                    may, sure = mask.bounds(Bounds(q_lo_real, q_hi, lows[j], highs[j]))
                    some, every = some & may, every & sure

                def masked(carry):
                    k, v = source.tile(kv_starts[j], size)
                    kp = lax.dynamic_slice_in_dim(source.pos, kv_starts[j], size, 2)
                    kp = jnp.where(kv_starts[j] + jnp.arange(size) >= j * size, kp, EMPTY)
                    return update(carry, qt, k, v, visible(qp, kp, mask), scale)

                def unmasked(carry):
                    k, v = source.tile(kv_starts[j], size)
                    return update(carry, qt, k, v, None, scale)

                branch = jnp.where(some, jnp.where(every, 2, 1), 0)
                return lax.switch(branch, [lambda c: c, masked, unmasked], carry)

            trips = -(-used_length(source.pos) // size) if source.held else kv_starts.shape[0]
            return lax.fori_loop(0, trips, body, carry)

        carry = begin((B, R, G, n_q), D)
        for source, size, stat in zip(sources, sizes, stats, strict=True):
            carry = walk(source, size, *stat, carry)
        return finish(*carry)

    if q_starts.shape[0] == 1:
        return one_q_tile(0)
    # recomputing a query tile in the backward pass keeps its residuals to one tile instead of [T, S]
    tiles = lax.map(jax.checkpoint(one_q_tile), q_starts)
    return jax.tree.map(lambda x: _join(x, T), tiles)


def _join(tiles: jax.Array, total: int) -> jax.Array:
    """Join tiles [tiles,B,R,G,n,...] -> [B,R,G,total,...]; the last tile overlaps the one before."""
    count, n = tiles.shape[0], tiles.shape[4]
    body = jnp.moveaxis(tiles[: count - 1], 0, 3)
    body = body.reshape(*body.shape[:3], (count - 1) * n, *body.shape[5:])
    return jnp.concatenate([body, tiles[-1][:, :, :, count * n - total :]], axis=3)


def merge(parts: list[Partial]) -> Partial:
    """Merge attention over disjoint sets of keys into the exact union."""
    if len(parts) == 1:
        return parts[0]
    top = reduce(jnp.maximum, [p.lse for p in parts])
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = [jnp.exp(p.lse - safe) for p in parts]
    total = sum(weights)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    # a part without keys has weight 0 and out 0
    out = reduce(jnp.add, [p.out * (w / total)[..., None] for p, w in zip(parts, weights, strict=True)])
    return Partial(out, jnp.where(some, safe + jnp.log(total), -jnp.inf))


def mass(q, source: Source, q_pos, lse, *, scale: float, mask: Mask | None = None, q_tile=Q_TILE, kv_tile=KV_TILE):
    """Return the attention probability that each key gets, summed over the queries: float32 [B,R,G,S].

    Blocked attention cannot give column sums in one pass; this is the second, with `lse` known.

    Args:
      q: [B,R,G,T,D].
      source: S keys.
      q_pos: int32 [B,T], EMPTY for padding, which gives nothing.
      lse: [B,R,G,T], over all keys that the query saw, this source's and others'.
      scale, mask: as in `attend`.
    """
    B, R, G, T, D = q.shape
    S = source.pos.shape[-1]
    if S == 0 or T == 0:
        return jnp.zeros((B, R, G, S))
    n_q, n_kv = min(q_tile, T), min(kv_tile, S)
    q_starts, (kv_starts, lows, _, _) = tile_starts(T, n_q), _tile_stats(source.pos, n_kv, fresh_only=False)
    lse = jnp.where(jnp.isneginf(lse), BIG, lse)  # a row that saw nothing gives nothing

    def one_kv_tile(j, total):
        k, _ = source.tile(kv_starts[j], n_kv)
        kp = lax.dynamic_slice_in_dim(source.pos, kv_starts[j], n_kv, 2)

        def add(i, acc):
            start = q_starts[i]
            qt = lax.dynamic_slice_in_dim(q, start, n_q, 3)
            qp = lax.dynamic_slice_in_dim(q_pos, start, n_q, 1)
            qp = jnp.where(start + jnp.arange(n_q) >= i * n_q, qp, EMPTY)  # the last tile overlaps the one before
            row_lse = lax.dynamic_slice_in_dim(lse, start, n_q, 3)

            def some(acc):
                logits = jnp.where(visible(qp, kp, mask), _logits(qt, k, scale), -BIG)
                return acc + jnp.exp(logits - row_lse[..., None]).sum(3)

            return lax.cond(lows[j] <= jnp.max(qp), some, lambda a: a, acc)

        part = lax.fori_loop(0, q_starts.shape[0], add, jnp.zeros((B, R, G, n_kv)))
        return lax.dynamic_update_slice_in_dim(total, part, kv_starts[j], 3)

    trips = -(-used_length(source.pos) // n_kv) if source.held else kv_starts.shape[0]
    return lax.fori_loop(0, trips, one_kv_tile, jnp.zeros((B, R, G, S)))
