"""Attention over listed pages of a source: all dynamic sparsity ends here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.attention import DECODE_QUERIES, EMPTY, Partial, Source, begin, finish, slots_of, update
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
    S = source.pos.shape[-1]
    n_q, width = min(visit.rows, T), visit.width
    Q = -(-T // n_q)
    if S == 0 or width == 0:
        empty = Partial(jnp.zeros((B, R, G, T, D)), jnp.full((B, R, G, T), -jnp.inf))
        return empty, jnp.zeros((), jnp.int32)
    walk = _Walk(source, visit, (B, R, G, n_q, D), scale, mask)
    if Q > 1 and n_q >= DECODE_QUERIES and visit.listing is None:
        return _by_length(walk, q, q_pos, Q)

    def block(i):
        index, count = visit.at(i)  # [B,R,g,M], [B,R,g]
        g = index.shape[2]
        start = jnp.minimum(i * n_q, T - n_q)
        qt = lax.dynamic_slice_in_dim(q, start, n_q, 3).reshape(B, R * g, G // g, n_q, D)
        qp = lax.dynamic_slice_in_dim(q_pos, start, n_q, 1)
        part = walk(qt, jnp.broadcast_to(qp[:, None], (B, R * g, n_q)), index, count)
        part = jax.tree.map(lambda x: x.reshape(B, R, G, *x.shape[3:]), part)
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


@dataclass(frozen=True)
class _Walk:
    """Attention of some blocks of queries over their pages, in turns of so many keys.

    `shape`: B, R, G, queries of a block, D.
    """

    source: Source
    visit: Visit
    shape: tuple[int, int, int, int, int]
    scale: float
    mask: Mask | None

    def __call__(self, heads: jax.Array, qp: jax.Array, index: jax.Array, count: jax.Array) -> Partial:
        """Return the attention of n blocks a row.

        Args:
          heads: [B,R * n,G // g,n_q,D], the blocks of a row after one another; the query heads that share a list are a group.
          qp: int32 [B,R * n,n_q].
          index, count: int32 [B,R,n,M], [B,R,n].
        """
        B, R, G, n_q, D = self.shape
        size, width, S, n = self.visit.size, self.visit.width, self.source.pos.shape[-1], index.shape[2]
        keys = VISIT_KEYS_DECODE if n_q < DECODE_QUERIES else VISIT_KEYS
        per = min(width, max(1, keys // size))
        index = jnp.pad(index[..., :width], ((0, 0),) * 3 + ((0, -width % per),))
        listed = jnp.minimum(count, width)
        pos = jnp.broadcast_to(self.source.pos, (B, R, S))
        # lists of their own move into the row axis
        row = lambda x: x.reshape(B, R * n, *x.shape[3:])

        def body(j, carry):
            pages = lax.dynamic_slice_in_dim(index, j * per, per, 3)
            live = (j * per + jnp.arange(per) < listed[..., None])[..., None]
            live = live & (pages[..., None] * size + jnp.arange(size) < S)
            pages = jnp.where(live[..., 0], pages, 0)
            flat = pages.reshape(B, R, n * per)
            slots = slots_of(flat, size, S)
            kp = jnp.take_along_axis(pos, slots, 2).reshape(B, R, n, per * size)
            kp = row(jnp.where(live.reshape(kp.shape), kp, EMPTY))
            k, v = self.source.gather(flat, size)  # pyrefly: ignore
            k = row(jnp.moveaxis(k.reshape(B, R, D, n, per * size), 3, 2))
            v = row(v.reshape(B, R, n, per * size, D))
            weigh = None
            if self.visit.weigh is not None:
                own = slots.reshape(B, R, n, per * size)
                weigh = lambda x: self.visit.weigh(x.reshape(B, R, G, n_q, -1), own).reshape(x.shape)  # pyrefly: ignore
            masked = lambda carry: update(carry, heads, k, v, self._seen(qp, kp), self.scale, weigh=weigh)
            if n_q < DECODE_QUERIES:
                return masked(carry)
            # most pages lie before all queries of their block: without a mask they take about half of the time
            every = jnp.all(kp != EMPTY) & jnp.all(kp.max(-1) <= qp.min(-1))
            if self.mask is not None:
                every &= self.mask.bounds(Bounds(jnp.min(qp), jnp.max(qp), jnp.min(kp), jnp.max(kp)))[1]
            plain = lambda carry: update(carry, heads, k, v, None, self.scale, weigh=weigh)
            return lax.cond(every, plain, masked, carry)

        carry = begin((B, R * n, heads.shape[2], n_q), D)
        if index.shape[-1] == per:
            return finish(*body(0, carry))
        return finish(*lax.fori_loop(0, -(-jnp.max(listed) // per), body, carry))

    def _seen(self, qp: jax.Array, kp: jax.Array) -> jax.Array:
        """Return bool [B,R * n,1,n_q,K]: causal, valid, and allowed by the mask."""
        qp, kp = qp[:, :, None, :, None], kp[:, :, None, None, :]
        seen = (kp != EMPTY) & (kp <= qp)
        return seen if self.mask is None else seen & self.mask.allow(qp, kp)


def _by_length(walk: _Walk, q: jax.Array, q_pos: jax.Array, Q: int) -> tuple[Partial, jax.Array]:
    """Compute all blocks of queries, those with lists of about one length together.

    A turn takes as long as its longest list, and query heads differ: on SmolLM2 the longest of a block's nine lists is several times their
    mean.  So the blocks of all query heads of a row are ranked by their count, and neighbours in rank are walked side by side.
    """
    B, R, G, n_q, D = walk.shape
    T, visit = q.shape[3], walk.visit
    lists = visit.lists if visit.blocks is None else (visit.blocks, visit.blocks.sum(-1, dtype=jnp.int32))
    g = lists[1].shape[2]  # pyrefly: ignore
    entries, count = (x.reshape(B, R, g * Q, *x.shape[4:]) for x in lists)  # pyrefly: ignore
    pad = n_q * Q - T
    blocks = jnp.pad(q, ((0, 0),) * 3 + ((0, pad), (0, 0))).reshape(B, R, g, G // g, Q, n_q, D)
    blocks = jnp.moveaxis(blocks, 4, 3).reshape(B, R, g * Q, G // g, n_q, D)
    places = jnp.pad(q_pos, ((0, 0), (0, pad)), constant_values=EMPTY).reshape(B, Q, n_q)
    order = jnp.argsort(-count, axis=-1)
    b, r = jnp.arange(B)[:, None, None], jnp.arange(R)[None, :, None]

    def turn(j, carry):
        ids = lax.dynamic_slice_in_dim(order, j * g, g, 2)  # [B,R,g]
        index, wanted = entries[b, r, ids], count[b, r, ids]
        if visit.blocks is not None:
            # a stable sort moves the chosen ones to the front and keeps their order
            index = jnp.argsort(~index, axis=-1, stable=True)[..., : visit.width].astype(jnp.int32)
        heads = blocks[b, r, ids].reshape(B, R * g, G // g, n_q, D)
        part = walk(heads, places[b, ids % Q].reshape(B, R * g, n_q), index, wanted)
        put = lambda whole, x: whole.at[b, r, ids].set(x.reshape(B, R, g, *x.shape[2:]).astype(whole.dtype))
        return Partial(*(put(whole, x) for whole, x in zip(carry, part, strict=True)))

    # in the type of q, as the kernels return it
    empty = Partial(jnp.zeros(blocks.shape, q.dtype), jnp.zeros(blocks.shape[:-1]))
    part = lax.fori_loop(0, Q, turn, empty)

    def back(x):
        x = jnp.moveaxis(x.reshape(B, R, g, Q, G // g, n_q, *x.shape[5:]), 3, 4)
        return x.reshape(B, R, G, Q * n_q, *x.shape[6:])[:, :, :, :T]

    overflow = jnp.sum(jnp.maximum(count - visit.width, 0))
    return Partial(back(part.out), back(part.lse)), overflow
