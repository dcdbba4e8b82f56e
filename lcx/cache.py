"""Memory of a segment in one layer, and the one function that writes it.

`Slots` is a pytree of static shape: a codec's payload, the position of the token in each slot, and the state that a policy or a pattern
keeps beside.  Slot order carries no meaning: growth, eviction, paging, padding and rejected drafts are one thing, some slots hold tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.attention import EMPTY, Source, slots_of, take_pages


@dataclass(frozen=True)
class Size:
    """Sizes that a codec's leaves depend on: rows of the segment in one layer, channels of a head, type of exact values."""

    rows: int
    head_dim: int
    dtype: Any


@dataclass(frozen=True)
class Leaf:
    """Shape of one array of a payload: [B, R, *before, S // per, *after].

    Attributes:
      dtype: of the entries.
      before, after: axes beside that of the slots.
      per: tokens that share an entry; None: one entry a row, without an axis of slots.
      rows: None for an entry in every row; 1 for one that the rows of the layer share, [B, 1, ...].
    """

    dtype: Any
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    per: int | None = 1
    rows: int | None = None

    @property
    def axis(self) -> int:
        return 2 + len(self.before)

    def zeros(self, batch: int, rows: int, slots: int) -> jax.Array:
        rows = min(rows, self.rows or rows)
        entries = () if self.per is None else (slots // self.per,)
        return jnp.zeros((batch, rows, *self.before, *entries, *self.after), self.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["payload", "pos", "state"], meta_fields=[])
@dataclass(frozen=True)
class Slots:
    """Slots of one segment in one layer.

    Attributes:
      payload: the codec's arrays, see `Leaf`.
      pos: int32 [B,R,S], or [B,1,S] where the policy keeps one set for the layer; EMPTY where no token is.
      state: arrays [B,R,S] of the policy, [B,R,...] of the pattern.
    """

    payload: dict[str, jax.Array]
    pos: jax.Array
    state: dict[str, jax.Array] = field(default_factory=dict)


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "pos", "state"], meta_fields=[])
@dataclass(frozen=True)
class Tokens:
    """Tokens on their way into a segment: k, v [B,R,N,D] as the segment stores them (rotated or raw), pos int32 [B,R|1,N]."""

    k: jax.Array
    v: jax.Array
    pos: jax.Array
    state: dict[str, jax.Array] = field(default_factory=dict)


@partial(jax.tree_util.register_dataclass, data_fields=["idx", "tokens"], meta_fields=[])
@dataclass(frozen=True)
class Edit:
    """Requested write of a layer: token n of `tokens` goes to slot `idx[..., n]`; a slot number of S or more drops it.

    idx is int32 [B,R|1,N].  For a codec with pages it is page-aligned: slots of a page follow one another.
    """

    idx: jax.Array
    tokens: Tokens


@partial(jax.tree_util.register_dataclass, data_fields=["segments", "probe"], meta_fields=[])
@dataclass(frozen=True)
class LayerCache:
    """Memory of one layer.

    Attributes:
      segments: name -> Slots.
      probe: the last queries of the prompt, {"q": [B,K,G,W,D], "pos": [B,W]} and "q_raw" where it is requested; None after the prompt.
    """

    segments: dict[str, Slots]
    probe: dict[str, jax.Array] | None = None

    def __getitem__(self, name: str) -> Slots:
        return self.segments[name]

    def parts(self) -> dict[str, Any]:
        """Return the arrays by name, the probe among them, for those who count bytes."""
        return self.segments | ({} if self.probe is None else {"(probe)": self.probe})


@dataclass(frozen=True)
class Store:
    """Access to the slots of a codec at one size: they are made, read and written here.  `ctx` is that of the step, where there is one."""

    codec: Any
    size: Size
    ctx: Any = None

    @property
    def leaves(self) -> dict[str, Leaf]:
        return self.codec.leaves(self.size)

    @property
    def plain(self) -> bool:
        """Return True where slots hold keys and values in the model's own type, so that decoding them is no work."""
        return self.codec.plain and all(leaf.dtype == self.size.dtype for leaf in self.leaves.values())

    def empty(self, batch: int, pos_rows: int, slots: int, state: Mapping[str, Any]) -> Slots:
        """Return slots that hold nothing.  `state` maps the name of a per-slot array to its dtype."""
        rows = self.size.rows
        return Slots(
            payload={name: leaf.zeros(batch, rows, slots) for name, leaf in self.leaves.items()},
            pos=jnp.full((batch, pos_rows, slots), EMPTY, jnp.int32),
            state={name: jnp.zeros((batch, rows, slots), dtype) for name, dtype in state.items()},
        )

    def tile(self, slots: Slots, start, size: int):
        """Return k [B,R,D,size], v [B,R,size,D] of neighbouring slots; `start` and `size` are multiples of the codec's page."""
        cut = {}
        for name, leaf in self.leaves.items():
            x = slots.payload[name]
            per = leaf.per
            cut[name] = x if per is None else lax.dynamic_slice_in_dim(x, start // per, size // per, leaf.axis)
        return self._decode(cut, lambda x: lax.dynamic_slice_in_dim(x, start, size, 2))

    def gather(self, slots: Slots, pages: jax.Array, size: int = 1):
        """Return k [B,R,D,N * size], v [B,R,N * size,D] of the pages [B,R,N] of `size` slots, a multiple of the codec's page."""
        cut = {}
        total = slots.pos.shape[-1]
        for name, leaf in self.leaves.items():
            x = slots.payload[name]
            if leaf.per is None:
                cut[name] = x
                continue
            cut[name] = take_pages(x, pages[:, : leaf.rows], size // leaf.per, leaf.axis)
        at = slots_of(pages, size, total)
        return self._decode(cut, lambda x: _take(x, at))

    def _decode(self, cut, pick):
        k, v = self.codec.decode(self.ctx, cut, pick)
        return k[:, :, : self.size.head_dim], v[..., : self.size.head_dim]

    def commit(self, slots: Slots, edit: Edit) -> Slots:
        """Write an edit, in place when the cache is donated.  The caller puts a barrier between reading the cache and this."""
        total = slots.pos.shape[-1]
        payload = self.codec.encode(self.ctx, edit.tokens, lambda x: _take(x, jnp.minimum(edit.idx, total - 1)))
        new = dict(slots.payload)
        for name, leaf in self.leaves.items():
            if leaf.per is None:
                # one entry a row stays as it is unless the codec makes it anew
                new[name] = payload.get(name, new[name])
                continue
            at = edit.idx[:, : leaf.rows, :: leaf.per] // leaf.per
            new[name] = _scatter(slots.payload[name], leaf.axis, at, payload[name])
        pos = _scatter(slots.pos, 2, edit.idx, edit.tokens.pos)
        state = {n: _scatter(slots.state[n], 2, edit.idx, x) for n, x in edit.tokens.state.items()}
        return replace(slots, payload=new, pos=pos, state=slots.state | state)


@dataclass(frozen=True)
class Held:
    """Slots of a segment with two ways to read them: `source` as attention does (rotated), `store` as they were written."""

    slots: Slots
    source: Source
    store: Store

    @property
    def pos(self) -> jax.Array:
        return self.slots.pos

    @property
    def rows(self) -> int:
        """Number R of KV heads of the segment in this layer."""
        return self.store.size.rows


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """Return the slots at [B,R|1,n] of an array [B,R|1,S,...]."""
    at = jnp.broadcast_to(at, (*x.shape[:2], at.shape[2]))
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 3)), 2)


def _scatter(target, axis: int, idx, value):
    B, R = target.shape[:2]
    n = idx.shape[-1]
    idx = jnp.broadcast_to(idx, (B, R, n))
    value = jnp.moveaxis(value, axis, 2).astype(target.dtype)
    value = jnp.broadcast_to(value, (B, R, n, *value.shape[3:]))
    b, r = jnp.arange(B)[:, None, None], jnp.arange(R)[None, :, None]
    where = (b, r, *(slice(None),) * (axis - 2), idx)
    return target.at[where].set(value, mode="drop")


def device_bytes(tree) -> int:
    """Return the bytes that the arrays occupy on their device; an int4 value counts half a byte."""
    return sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(tree))


def shape_bytes(tree) -> int:
    """Return the bytes of shapes and dtypes, as `jax.eval_shape` returns them."""
    total = 0
    for x in jax.tree.leaves(tree):
        bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
        total += math.ceil(math.prod(x.shape) * bits / 8)
    return total
