"""Pieces of rows: how the pages of all rows are shared out among the blocks of a decode kernel, and how their results become one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.payloads import PAGE
from pallas_kernels.tables import DecodeTile

CORES = 132  # streaming multiprocessors of a Hopper GPU
UNEVEN = 4  # a row may have this many times the average number of pieces


class Plan(NamedTuple):
    """Which pages each block takes.

    Attributes:
      piece: int32 [3, I], row, first page, and the page behind the last; an empty piece has first == last.
      index: int32 [R, X], pieces of each row.
      listed: bool [R, X], which entries of `index` are meant.
    """

    piece: jax.Array
    index: jax.Array
    listed: jax.Array


def plan_pieces(length: jax.Array, n: int, splits: int | None, tile: DecodeTile) -> Plan:
    """Cuts the pages of each row in pieces, of equal size for all rows or (`splits`) of equal number.

    `length` int32 [R], `n` pages of a row at most.  A piece is a whole number of slots; without `splits` there are at most as many pieces
    as blocks run at a time, so a long row takes the blocks that short ones leave.
    """
    R = length.shape[0]
    steps = -(-length // (PAGE * tile.pages))
    if splits is not None:
        size, count = -(-steps // splits), jnp.full((R,), splits, jnp.int32)
        I = R * splits  # noqa: E741
        X = splits
    else:
        I = max(CORES * tile.per_core, R)  # noqa: E741
        X = min(UNEVEN * -(-I // R), I, -(-n // tile.pages))
        # the smallest size of which there are few enough pieces; the last one makes one piece a row
        least = jnp.maximum(jnp.maximum(-(-jnp.sum(steps) // I), -(-jnp.max(steps) // X)), 1)
        sizes = least + least * jnp.arange(48) // 16
        sizes = jnp.append(sizes, jnp.maximum(jnp.max(steps), 1))
        pieces = -(-steps // sizes[:, None])
        size = sizes[jnp.argmax(jnp.sum(pieces, 1) <= I)]
        size, count = jnp.broadcast_to(size, (R,)), -(-steps // size)
    end = jnp.cumsum(count)
    number = jnp.arange(I)
    row = jnp.minimum(jnp.sum(end <= number[:, None], 1), R - 1)
    first = (number - (end - count)[row]) * size[row]
    stop = jnp.minimum(first + size[row], steps[row])
    stop = jnp.where(number < end[-1], stop, first)
    total = -(-length // PAGE)[row]
    first, stop = (jnp.minimum(x * tile.pages, total) for x in (first, stop))
    j = jnp.arange(X)
    index = jnp.minimum((end - count)[:, None] + j, I - 1)
    return Plan(jnp.stack([row, first, jnp.maximum(first, stop)]).astype(jnp.int32), index, j < count[:, None])


def merge_pieces(out: jax.Array, lse: jax.Array, plan: Plan):
    """Exact union of pieces: out [I,W,D,N], lse [I,W,N] -> out [R,D,N], lse [R,N].  W: the consumers of a block."""
    lse = jnp.where(plan.listed[..., None, None], lse[plan.index], -jnp.inf)  # [R,X,W,N]
    top = jnp.max(lse, (1, 2))
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp(lse - safe[:, None, None])
    total = jnp.sum(weight, (1, 2))
    share = weight / jnp.where(total == 0, 1.0, total)[:, None, None]
    # a piece of another row may be nan and must not come in with weight 0
    part = jnp.where(plan.listed[..., None, None, None], out[plan.index], 0.0)
    out = jnp.sum(share[:, :, :, None] * part, (1, 2))
    return out, jnp.where(total == 0, -jnp.inf, safe + jnp.log(total))
