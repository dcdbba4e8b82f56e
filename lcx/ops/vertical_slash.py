"""Lists of vertical-slash attention: chosen columns and diagonals as whole tiles, and the keys beside them one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.visits import Visit

ROWS = 64  # queries that read together, and keys that one of them reads for a distance
TILE = 128  # queries and keys of a tile, as the kernels take it: two blocks of queries


def vertical_slash(column: jax.Array, diagonal: jax.Array, *, columns: int, distances: int, near: int) -> list[Visit]:
    """Return two disjoint visits of the step's own tokens: tiles of 128 x 128 that are read whole, and the keys beside them.

    The block of queries that ends at e = 64 * (i + 1) reads, for each chosen distance d < e, the 64 keys before max(e - d, 64), and the
    chosen columns before e.  The offsets e - key that distances read are the same for every block, and so are the tiles that they fill:
    both are listed once, and a block's lists are these, moved.  Memory grows with the text alone.

    Args:
      column: bool [B,R,G,T], keys that all later queries read.
      diagonal: bool [B,R,G,T], distances; the first `near` are chosen, or all where there are fewer.
      columns, distances: upper bounds on how many of each are chosen.
      near: distances from 0 on that are always chosen.
    """
    T = column.shape[-1]
    tiles = -(-T // TILE)
    # read[o - 1]: some chosen distance is among o - 64 ... o - 1
    total = jnp.pad(jnp.cumsum(diagonal, -1), ((0, 0),) * 3 + ((1, 0),))
    total = jnp.pad(total, ((0, 0),) * 3 + ((ROWS, tiles * TILE - T),), mode="edge")
    read = total[..., ROWS + 1 :] > total[..., 1:-ROWS]
    whole = _whole(read)
    if near > ROWS:
        # they fill a tile's own; a text of fewer tokens than that is one block
        whole = whole.at[..., 0].set(True)
    first = _packed(whole, min(tiles, (near + ROWS * (1 + max(0, distances - near))) // TILE + 1))
    filled = jnp.repeat(whole, TILE, -1)
    # the tile of an offset is that of another distance for the first 64 queries of a tile than for the others
    early = jnp.pad(filled[..., ROWS:], ((0, 0),) * 3 + ((0, ROWS),))
    alone = read[..., None, :] & ~jnp.stack([early, filled], 3)
    most = near + ROWS - 1 + ROWS * max(0, distances - near)
    offsets = _packed(alone, min(alone.shape[-1], most)) + 1
    # the first 64 keys are read together where a chosen distance is within 64 of the block's end
    forced = jnp.pad(column[..., :ROWS], ((0, 0),) * 3 + ((0, max(0, ROWS - T)),))
    later = _packed(column & (jnp.arange(T) >= ROWS), min(T, columns))
    keys = jnp.concatenate([jnp.broadcast_to(jnp.arange(ROWS), forced.shape), later], -1)
    wide = min(T, columns + most)

    def whole_tiles(i):
        return i - first, jnp.sum(first <= i, -1, dtype=jnp.int32)

    def single_keys(i):
        end = (i + 1) * ROWS
        shared = lax.dynamic_index_in_dim(offsets, i % 2, 3, keepdims=False)
        clipped = lax.dynamic_index_in_dim(total, end + ROWS, 3) > lax.dynamic_index_in_dim(total, end + 1, 3)
        wanted = jnp.concatenate([forced | clipped, jnp.ones(later.shape, bool)], -1) & (keys < end)
        wanted &= ~jnp.take_along_axis(read, jnp.clip(end - keys - 1, 0, read.shape[-1] - 1), -1)
        beside = jnp.take_along_axis(keys, _packed(wanted, keys.shape[-1], keys.shape[-1] - 1), -1)
        num = jnp.sum(wanted, -1, dtype=jnp.int32)
        # the last block may end behind the text
        behind = jnp.sum(shared <= end - T, -1, dtype=jnp.int32)
        place = jnp.arange(wide) - num[..., None]
        moved = end - jnp.take_along_axis(shared, jnp.clip(place + behind[..., None], 0, shared.shape[-1] - 1), -1)
        beside = jnp.pad(beside[..., :wide], ((0, 0),) * 3 + ((0, max(0, wide - beside.shape[-1])),))
        return jnp.where(place < 0, beside, moved), num - behind + jnp.sum(shared <= end, -1, dtype=jnp.int32)

    return [
        Visit(TILE, TILE, listing=whole_tiles, most=first.shape[-1]),
        Visit(1, ROWS, listing=single_keys, most=wide),
    ]


def _whole(read):
    """bool [B,R,G,tiles]: at n, whether every query of a tile reads all that it sees of the tile of keys n tiles before.

    These are the offsets 128 n - 63 ... 128 n + 128, those of keys after the query apart.
    """
    half = read.reshape(*read.shape[:3], -1, 2, ROWS).all(-1)
    before = jnp.pad(half[..., :-1, 1], ((0, 0),) * 3 + ((1, 0),), constant_values=True)
    return half.all(-1) & before


def _packed(chosen, most: int, fill: int | None = None) -> jax.Array:
    """int32 [...,most], places of the True entries of the last axis in order; behind them `fill`, by default that axis's length."""
    length = chosen.shape[-1]
    flat = chosen.reshape(-1, length)
    place = jnp.where(flat, jnp.cumsum(flat, -1, dtype=jnp.int32) - 1, most)
    packed = jnp.full((flat.shape[0], most), length if fill is None else fill, jnp.int32)
    packed = packed.at[jnp.arange(flat.shape[0])[:, None], place].set(jnp.arange(length, dtype=jnp.int32), mode="drop")
    return packed.reshape(*chosen.shape[:-1], most)
