"""Lists of the tiles that attention visits, built in XLA: the form of every sparse pattern that a kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lcx.errors import UserError
from lcx.ops.attention import EMPTY, FAR
from pallas_kernels.mask import Mask

ROWS = SIZE = 128  # queries and keys of a listed tile
MASKED, FULL = 0, 1  # flags: the tile needs the predicate of the mask, or every pair in it is allowed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockList:
    """Tiles of ROWS queries x SIZE keys to visit, for each tile of queries.

    Attributes:
      index: int32 [B or 1, H or K or 1, Q, M], numbers of the key tiles, each at most once; entries from `count` on are ignored.
      count: int32 [B or 1, H or K or 1, Q], number of valid entries; the remaining ones are ignored.
      flags: int8, as `index`: MASKED or FULL.
    """

    index: jax.Array
    count: jax.Array
    flags: jax.Array

    def check(self, B: int, K: int, H: int, Q: int):
        """Raise UserError where the shapes are not for B sequences, K KV heads, H query heads and Q tiles of queries."""
        shape = self.index.shape
        if len(shape) != 4 or self.flags.shape != shape or self.count.shape != shape[:3]:
            raise UserError(
                f"blocks: index {shape}, count {self.count.shape}, flags {self.flags.shape}: allowed are [b,h,Q,M], [b,h,Q] and [b,h,Q,M]"
            )
        if shape[0] not in (1, B) or shape[1] not in (1, K, H) or shape[2] != Q:
            raise UserError(
                f"blocks.index of {shape}: allowed are 1 or {B} sequences, 1, {K} or {H} heads, and {Q} tiles of {ROWS} queries"
            )


def _compact(visit: jax.Array, full: jax.Array, width: int | None) -> BlockList:
    """Return the list of the True entries of `visit` [...,Q,N], in order; `full` alike."""
    N = visit.shape[-1]
    M = N if width is None else min(width, N)
    # a stable sort moves the visited ones to the front and keeps their order
    order = jnp.argsort(~visit, axis=-1, stable=True)[..., :M].astype(jnp.int32)
    flags = jnp.take_along_axis(jnp.where(full, FULL, MASKED).astype(jnp.int8), order, -1)
    count = jnp.minimum(visit.sum(-1, dtype=jnp.int32), M)
    return BlockList(order, count, flags)


def _tile_range(pos: jax.Array, size: int):
    """Return the lowest and highest held position of each tile, and whether the tile has an EMPTY slot: [..., tiles]."""
    S = pos.shape[-1]
    tiles = -(-S // size)
    pos = jnp.pad(pos, [(0, 0)] * (pos.ndim - 1) + [(0, tiles * size - S)], constant_values=EMPTY)
    pos = pos.reshape(*pos.shape[:-1], tiles, size)
    held = pos != EMPTY
    return jnp.where(held, pos, FAR).min(-1), jnp.where(held, pos, EMPTY).max(-1), ~held.all(-1)


def _bounds(mask: Mask, T: int, S: int, q_offset, kv_len, q_pos, kv_pos, spans, segments):
    """Return (some pair may be visible, every pair is), bool [b,r,Q,N]."""
    if q_pos is None:
        q_pos = jnp.arange(T) + jnp.reshape(jnp.asarray(q_offset, jnp.int32), (-1, 1))
    if kv_pos is None:
        slots = jnp.arange(S)
        limit = jnp.reshape(jnp.asarray(S if kv_len is None else kv_len, jnp.int32), (-1, 1))
        kv_pos = jnp.where(slots < limit, slots, EMPTY)
    kv_pos = kv_pos if kv_pos.ndim == 3 else kv_pos[:, None]
    q_lo, q_hi, _ = (x[:, None, :, None] for x in _tile_range(q_pos, ROWS))
    # a padding query must see nothing; the rows behind the last one are not written
    padding = _tile_range(jnp.where(q_pos == EMPTY, 1, 0), ROWS)[1][:, None, :, None] > 0
    kv_lo, kv_hi, holes = (x[:, :, None, :] for x in _tile_range(kv_pos, SIZE))
    span = None
    if mask.spans:
        span = jnp.asarray(spans, jnp.int32)
        span = (span if span.ndim == 2 else span[None])[:, :, None, None]
    some = mask.some(q_lo, q_hi, kv_lo, kv_hi, span) & (q_hi >= 0)
    every = mask.every(q_lo, q_hi, kv_lo, kv_hi, span) & ~holes & ~padding
    if mask.segments:
        q_seg, kv_seg = (_tile_range(x, n) for x, n in zip(segments, (ROWS, SIZE), strict=True))
        q_lo, q_hi = q_seg[0][:, None, :, None], q_seg[1][:, None, :, None]
        kv_lo, kv_hi = kv_seg[0][:, None, None, :], kv_seg[1][:, None, None, :]
        some = some & (q_lo <= kv_hi) & (kv_lo <= q_hi)
        every = every & (q_lo == q_hi) & (kv_lo == kv_hi) & (q_lo == kv_lo)
    return some, every & some


def from_mask(
    mask: Mask,
    T: int,
    S: int,
    *,
    q_offset=0,
    kv_len=None,
    q_pos=None,
    kv_pos=None,
    spans=None,
    segments=None,
    width: int | None = None,
) -> BlockList:
    """Return the tiles that a mask leaves, from the extremes of each tile's positions and segments.

    For masks whose data only XLA sees (positions, segments); without a list the kernels work out causal, window and sink themselves.

    Args:
      mask: the predicate.
      T, S: queries and slots.
      q_offset, kv_len, q_pos, kv_pos, spans, segments: as in `attend`; segment numbers are >= 0.
      width: M, at most that many tiles are kept for a tile of queries, the first ones; None: all.
    """
    return _compact(*_bounds(mask, T, S, q_offset, kv_len, q_pos, kv_pos, spans, segments), width)


def from_blocks(
    blocks: jax.Array, mask: Mask, T: int, S: int, *, width: int | None = None, heads: int | None = None, **data
) -> BlockList:
    """Return the chosen tiles without those that the mask hides.

    Args:
      blocks: bool [B or 1, H or K or 1, Q, N], True to visit.
      mask, T, S, data: as in `from_mask`; they say which tiles are FULL.
      width: M, as in `from_mask`.
      heads: needed where `blocks` is by query head and the mask's data are by KV head: the KV heads, K.
    """
    Q, N = -(-T // ROWS), -(-S // SIZE)
    if blocks.ndim != 4 or blocks.shape[2:] != (Q, N):
        raise UserError(
            f"blocks of {blocks.shape}: allowed is [b,h,{Q},{N}], tiles of {ROWS} of {T} queries x {SIZE} of {S} slots"
        )
    defaults = dict(q_offset=0, kv_len=None, q_pos=None, kv_pos=None, spans=None, segments=None)
    some, every = _bounds(mask, T, S, **(defaults | data))
    if some.shape[1] > 1 and blocks.shape[1] > some.shape[1]:
        if heads != some.shape[1]:
            raise UserError(f"heads={heads}: allowed is {some.shape[1]}, the KV heads that the mask's data are for")
        some, every = (jnp.repeat(x, blocks.shape[1] // some.shape[1], axis=1) for x in (some, every))
    visit = blocks & some
    return _compact(visit, jnp.broadcast_to(every, visit.shape), width)


def to_blocks(blocks: BlockList, N: int):
    """Return (bool [b,h,Q,N] visited, bool [b,h,Q,N] full)."""
    listed = jnp.arange(blocks.index.shape[-1]) < blocks.count[..., None]
    # ignored entries go to a tile behind the last, which is dropped
    tiles = jnp.where(listed, blocks.index, N)
    empty = jnp.zeros((*blocks.index.shape[:-1], N), bool)
    put = jax.vmap(jax.vmap(jax.vmap(lambda row, at, what: row.at[at].set(what, mode="drop"))))
    return put(empty, tiles, listed), put(empty, tiles, blocks.flags == FULL)


def transpose(blocks: BlockList, N: int) -> BlockList:
    """Return, by tile of keys, the tiles of queries that visit it: index [b,h,N,Q], count [b,h,N].  N: number of key tiles."""
    visit, full = (jnp.swapaxes(x, 2, 3) for x in to_blocks(blocks, N))
    return _compact(visit, full, None)
