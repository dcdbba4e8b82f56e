"""Attention over listed pages of a source: all dynamic sparsity ends here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.attention import DECODE_QUERIES, EMPTY, Partial, Source, begin, finish, slots_of, update, visible
from lcx.ops.masks import Bounds, Mask

# keys that are gathered and attended at a time; a decode step of few queries reads more of them
VISIT_KEYS, VISIT_KEYS_DECODE = 512, 2_048

Listing = tuple[jax.Array, jax.Array]  # index int32 [B,R,g,M], count int32 [B,R,g]


@dataclass(frozen=True)
class Visit:
    """Pages of one source that each block of queries reads, by one of `lists`, `blocks` and `listing`.

    Attributes:
      size: slots a page; page p is the slots p * size ... (p + 1) * size - 1.  1 lists single slots.
      rows: consecutive queries that share a list; Q = ceil(T / rows) blocks of queries.
      lists: index int32 [B,R,g,Q,M] and count int32 [B,R,g,Q]; g is G, or 1 where the query heads of a KV head share a list.  Entries
        from `count` on are ignored.  A page that is listed twice counts twice.  A count above M is an overflow: M pages are read, and
        the rest is counted in `overflow`.
      blocks: bool [B,R,g,Q,N], True for a page to read; the kernels take 128 queries x 128 keys.
      listing: `listing(i) -> Listing` of the i-th block of queries, i traced: lists that are worked out when they are read, and so take
        no memory together.
      most: M, pages that a block of queries reads at most, where `blocks` or `listing` is given; None: all N of `blocks`.
      weigh: `weigh(logits [B,R,G,n,K], slot int32 [B,R,g,K]) -> logits`, applied to what is read of one block of n queries.
    """

    size: int
    rows: int
    lists: Listing | None = None
    blocks: jax.Array | None = None
    listing: Callable[[Any], Listing] | None = None
    most: int | None = None
    weigh: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    def __post_init__(self):
        given = [self.lists, self.blocks, self.listing]
        if sum(x is not None for x in given) != 1 or (self.listing is not None and self.most is None):
            raise ValueError("Visit: give one of lists, blocks, and listing with most")
        if self.size < 1 or self.rows < 1:
            raise ValueError(f"Visit: size={self.size} and rows={self.rows} must be at least 1")

    def check(self, T: int) -> None:
        """Raise ValueError where the lists are not for as many blocks as T queries have."""
        given = self.blocks if self.lists is None else self.lists[0]
        Q = -(-T // self.rows)
        if given is not None and given.shape[3] != Q:
            raise ValueError(
                f"Visit: lists for Q={given.shape[3]} blocks of queries; T={T} with rows={self.rows} has {Q}"
            )

    @property
    def width(self) -> int:
        """Upper bound on the pages that a block of queries reads."""
        if self.lists is not None:
            return self.lists[0].shape[-1]
        pages = self.most if self.blocks is None else self.blocks.shape[-1]
        assert pages is not None  # noqa: S101, __post_init__ has seen to it
        return min(pages, self.most or pages)

    def at(self, i) -> Listing:
        """Return the pages of the i-th block of queries, i traced."""
        if self.lists is not None:
            index, count = self.lists
            return (lax.dynamic_index_in_dim(x, i, 3, keepdims=False) for x in (index, count))  # pyrefly: ignore
        if self.blocks is not None:
            chosen = lax.dynamic_index_in_dim(self.blocks, i, 3, keepdims=False)
            # a stable sort moves the chosen ones to the front and keeps their order
            index = jnp.argsort(~chosen, axis=-1, stable=True)[..., : self.width].astype(jnp.int32)
            return index, chosen.sum(-1, dtype=jnp.int32)
        assert self.listing is not None  # noqa: S101, __post_init__ has seen to it
        return self.listing(i)


def attend_visits(
    q: jax.Array, source: Source, q_pos: jax.Array, visit: Visit, *, scale: float, mask: Mask | None = None
) -> tuple[Partial, jax.Array]:
    """Compute attention over the pages that a visit lists, walked up to the longest list that the step has.

    Args:
      q: [B,R,G,T,D].
      source: keys and values with a `gather`.
      q_pos: int32 [B,T], EMPTY for padding.
      visit: the pages.
      scale, mask: as in `attend`.

    Returns:
      (Partial, overflow): int32 [], pages that were wanted and found no place in the lists.

    Raises:
      ValueError: the source cannot gather, or the lists are for another number of queries.
    """
    B, R, G, T, D = q.shape
    if source.gather is None:
        raise ValueError("this source has no `gather`, so its pages cannot be read; give the Source one")
    visit.check(T)
    gather, size, S = source.gather, visit.size, source.pos.shape[-1]
    n_q, width = min(visit.rows, T), visit.width
    Q = -(-T // n_q)
    if S == 0 or width == 0:
        empty = Partial(jnp.zeros((B, R, G, T, D)), jnp.full((B, R, G, T), -jnp.inf))
        return empty, jnp.zeros((), jnp.int32)
    pos = jnp.broadcast_to(source.pos, (B, R, S))
    keys = VISIT_KEYS_DECODE if T < DECODE_QUERIES else VISIT_KEYS
    per = min(width, max(1, keys // size))

    def block(i):
        index, count = visit.at(i)  # [B,R,g,M], [B,R,g]
        index = jnp.pad(index[..., :width], ((0, 0),) * 3 + ((0, -width % per),))
        g = index.shape[2]
        listed = jnp.minimum(count, width)
        start = jnp.minimum(i * n_q, T - n_q)
        qt = lax.dynamic_slice_in_dim(q, start, n_q, 3)
        qp = lax.dynamic_slice_in_dim(q_pos, start, n_q, 1)
        # lists of their own move into the row axis, with the query heads that share one as the group
        row = lambda x: x.reshape(B, R * g, *x.shape[3:])
        heads = qt.reshape(B, R * g, G // g, n_q, D)

        def body(j, carry):
            pages = lax.dynamic_slice_in_dim(index, j * per, per, 3)
            live = (j * per + jnp.arange(per) < listed[..., None])[..., None]
            live = live & (pages[..., None] * size + jnp.arange(size) < S)
            live = live.reshape(B, R, g, per * size)
            pages = jnp.where(live.reshape(*pages.shape, size)[..., 0], pages, 0)
            flat = pages.reshape(B, R, g * per)
            slots = slots_of(flat, size, S)
            kp = jnp.take_along_axis(pos, slots, 2).reshape(B, R, g, per * size)
            kp = jnp.where(live, kp, EMPTY)
            k, v = gather(flat, size)
            k = jnp.moveaxis(k.reshape(B, R, D, g, per * size), 3, 2)
            v = v.reshape(B, R, g, per * size, D)
            weigh = None
            if visit.weigh is not None:
                own = slots.reshape(B, R, g, per * size)
                weigh = lambda x: visit.weigh(x.reshape(B, R, G, n_q, -1), own).reshape(x.shape)  # pyrefly: ignore
            masked = lambda carry: update(carry, heads, row(k), row(v), visible(qp, row(kp), mask), scale, weigh=weigh)
            if n_q < DECODE_QUERIES:
                return masked(carry)
            # most pages lie before all queries of the block: without a mask they take about half of the time
            every = jnp.all(kp != EMPTY) & (jnp.max(kp) <= jnp.min(qp))
            if mask is not None:
                every &= mask.bounds(Bounds(jnp.min(qp), jnp.max(qp), jnp.min(kp), jnp.max(kp)))[1]
            plain = lambda carry: update(carry, heads, row(k), row(v), None, scale, weigh=weigh)
            return lax.cond(every, plain, masked, carry)

        carry = begin((B, R * g, G // g, n_q), D)
        trips = -(-width // per)
        carry = body(0, carry) if trips == 1 else lax.fori_loop(0, -(-jnp.max(listed) // per), body, carry)
        part = jax.tree.map(lambda x: x.reshape(B, R, G, *x.shape[3:]), finish(*carry))
        return part, jnp.sum(jnp.maximum(count - width, 0))

    if Q == 1:
        return block(0)

    def put(j, carry):
        whole, total = carry
        # from the last block on: where it is a part, its rows begin within the block before, which writes them after it
        i = Q - 1 - j
        part, overflow = block(i)
        start = jnp.minimum(i * n_q, T - n_q)
        joined = (
            lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), start, 3) for x, y in zip(whole, part, strict=True)
        )
        return Partial(*joined), total + overflow

    # in the type of q, as the kernels return it: float32 of a long prompt takes as much as all its queries, keys and values
    empty = Partial(jnp.zeros((B, R, G, T, D), q.dtype), jnp.zeros((B, R, G, T)))
    return lax.fori_loop(0, Q, put, (empty, jnp.zeros((), jnp.int32)))
