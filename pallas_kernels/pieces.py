"""Pieces of rows: how the pages of all rows are shared out among the blocks of a decode kernel, and how their results become one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.payloads import PAGE
from pallas_kernels.tables import DecodeTile

CORES = 132  # streaming multiprocessors of a Hopper GPU
UNEVEN = 4  # a row may have this many times the average number of pieces


class Plan(NamedTuple):
    """Which pages each block takes.

    Attributes:
      piece: int32 [4, I], row, first page, the page behind the last, and tokens of the row; an empty piece has first == last.
      index: int32 [R, X], pieces of each row; None where each row has the same number of neighbouring ones.
      listed: bool [R, X], which entries of `index` are meant.
    """

    piece: jax.Array
    index: jax.Array | None = None
    listed: jax.Array | None = None


def plan_pieces(length: jax.Array, R: int, n: int, splits: int | None, tile: DecodeTile) -> Plan:
    """Cuts the pages of R rows in pieces, of equal size for all rows or (`splits`) of equal number.

    `length` int32 [R], or [1] for all rows alike; `n` pages of a row at most.  A piece is a whole number of slots; without `splits` there
    are at most as many pieces as blocks run at a time, so a long row takes the blocks that short ones leave.
    """
    most = max(CORES * tile.per_core, R)
    slots = -(-n // tile.pages)
    if len(length) == 1:
        # without a reduction XLA makes one program of this and of what it is used for
        X = splits or max(1, min(most // R, slots))
        steps = -(-length[0] // (PAGE * tile.pages))
        row, i = jnp.divmod(jnp.arange(R * X), X)
        return Plan(_pieces(row, i, -(-steps // X), steps, length[0], tile))
    steps = -(-length // (PAGE * tile.pages))
    if splits is not None:
        size, count = -(-steps // splits), jnp.full((R,), splits, jnp.int32)
        I = R * splits  # noqa: E741
        X = splits
    else:
        I = most  # noqa: E741
        X = min(UNEVEN * -(-I // R), I, slots)
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
    # those behind the last piece are empty
    i = jnp.where(number < end[-1], number - (end - count)[row], count[row])
    index = jnp.minimum((end - count)[:, None] + jnp.arange(X), I - 1)
    return Plan(_pieces(row, i, size[row], steps[row], length[row], tile), index, jnp.arange(X) < count[:, None])


def _pieces(row, i, size, steps, length, tile: DecodeTile):
    """`Plan.piece`: the i-th piece of `size` slots of each of these rows, which have `steps` slots."""
    first = jnp.minimum(i * size, steps) * tile.pages
    stop = jnp.minimum((i + 1) * size, steps) * tile.pages
    total = -(-length // PAGE)
    first, stop = (jnp.minimum(x, total) for x in (first, stop))
    both = jnp.broadcast_arrays(row, first, stop, length)
    return jnp.stack(both).astype(jnp.int32)


def merge_pieces(out: jax.Array, lse: jax.Array, plan: Plan, R: int):
    """Exact union of pieces: out [I,W,D,N], lse [I,W,N] -> out [R,D,N], lse [R,N].  W: the consumers of a block."""
    if plan.index is not None:
        # a piece of another row may be nan and must not come in with weight 0
        lse = jnp.where(plan.listed[..., None, None], lse[plan.index], -jnp.inf)
        out = jnp.where(plan.listed[..., None, None, None], out[plan.index], 0.0)
    out = out.reshape(R, -1, *out.shape[-2:])
    lse = jnp.broadcast_to(lse.reshape(R, -1, 1, lse.shape[-1]), out.shape)

    def join(a, b):
        (m_a, l_a, acc_a), (m_b, l_b, acc_b) = a, b
        m = jnp.maximum(m_a, m_b)
        safe = jnp.where(jnp.isneginf(m), 0.0, m)
        w_a, w_b = jnp.exp(m_a - safe), jnp.exp(m_b - safe)
        return m, l_a * w_a + l_b * w_b, acc_a * w_a + acc_b * w_b

    # one reduction of maximum, sum and values together: three of them were three programs
    parts = (lse, jnp.where(jnp.isneginf(lse), 0.0, 1.0), out)
    m, l, acc = lax.reduce(parts, (-jnp.inf, 0.0, 0.0), join, (1,))
    some = l != 0
    lse = jnp.where(some, m + jnp.log(l), -jnp.inf)
    return acc / jnp.where(some, l, 1.0), lse[:, 0]
