"""Pieces of rows: the division of all rows' pages among the blocks of a decode kernel, and the merge of their results."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.payloads import PAGE
from pallas_kernels.tables import DecodeTile

CORES = 132  # streaming multiprocessors of a Hopper GPU
UNEVEN = 4  # a row may have this many times the average number of pieces


class Plan(NamedTuple):
    """Pages that each block takes.

    Attributes:
      piece: int32 [4, I], row, first page, the page behind the last, and tokens of the row; an empty piece has first == last.
      index: int32 [R, X], pieces of each row; None where each row has the same number of neighbouring ones.
      listed: bool [R, X], which entries of `index` are valid.
    """

    piece: jax.Array
    index: jax.Array | None = None
    listed: jax.Array | None = None


def plan_pieces(length: jax.Array, R: int, n: int, splits: int | None, tile: DecodeTile) -> Plan:
    """Cut the pages of R rows in pieces, of equal size for all rows or (`splits`) of equal number.

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
    # pieces behind the last one are empty
    i = jnp.where(number < end[-1], number - (end - count)[row], count[row])
    index = jnp.minimum((end - count)[:, None] + jnp.arange(X), I - 1)
    return Plan(_pieces(row, i, size[row], steps[row], length[row], tile), index, jnp.arange(X) < count[:, None])


def _pieces(row, i, size, steps, length, tile: DecodeTile):
    """Return `Plan.piece`: the i-th piece of `size` slots of each of these rows, which have `steps` slots."""
    first = jnp.minimum(i * size, steps) * tile.pages
    stop = jnp.minimum((i + 1) * size, steps) * tile.pages
    total = -(-length // PAGE)
    first, stop = (jnp.minimum(x, total) for x in (first, stop))
    both = jnp.broadcast_arrays(row, first, stop, length)
    return jnp.stack(both).astype(jnp.int32)


def merge_pieces(out: jax.Array, lse: jax.Array, plan: Plan, R: int):
    """Merge pieces into the exact union: out [I,W,D,N], lse [I,W,N] -> out [R,D,N], lse [R,N].  W: the consumers of a block."""

    def of_rows(x, hidden):
        """Return [R,X,W,...]; a piece of another row may be nan and must not come in with weight 0."""
        if plan.index is None or plan.listed is None:
            return x.reshape(R, -1, *x.shape[1:])
        listed = plan.listed.reshape(*plan.listed.shape, *(1,) * (x.ndim - 1))
        return jnp.where(listed, x[plan.index], hidden)

    lse, out = of_rows(lse, -jnp.inf), of_rows(out, 0.0)
    top = jnp.max(lse, (1, 2))
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp(lse - safe[:, None, None])
    total = jnp.sum(weight, (1, 2))
    share = weight / jnp.where(total == 0, 1.0, total)[:, None, None]
    out = jnp.sum(share[:, :, :, None] * out, (1, 2))
    return out, jnp.where(total == 0, -jnp.inf, safe + jnp.log(total))
