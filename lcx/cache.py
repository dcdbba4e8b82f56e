"""What a segment of one layer remembers, and the one function that writes it.

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

from lcx.ops.attention import EMPTY, Source


@dataclass(frozen=True)
class Leaf:
    """Shape of one array of a payload: [B, R, *before, S // per, *after]; `per` tokens share an entry."""

    dtype: Any
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    per: int = 1

    @property
    def axis(self) -> int:
        return 2 + len(self.before)

    def zeros(self, batch: int, rows: int, slots: int) -> jax.Array:
        return jnp.zeros((batch, rows, *self.before, slots // self.per, *self.after), self.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["payload", "pos", "state"], meta_fields=[])
@dataclass(frozen=True)
class Slots:
    """One segment of one layer.

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
    """What a layer wants written: token n of `tokens` goes to slot `idx[..., n]`; a slot number of S or more drops it.

    idx is int32 [B,R|1,N].  For a codec with pages it is page-aligned: slots of a page follow one another.
    """

    idx: jax.Array
    tokens: Tokens


@dataclass(frozen=True)
class Store:
    """How a codec's slots are made, read and written, for one head size and one type of exact values."""

    codec: Any
    head_dim: int
    dtype: Any

    @property
    def leaves(self) -> dict[str, Leaf]:
        return self.codec.leaves(self.head_dim, self.dtype)

    @property
    def plain(self) -> bool:
        """Whether slots hold keys and values in the model's own type, so that decoding them is no work."""
        return self.codec.plain and all(leaf.dtype == self.dtype for leaf in self.leaves.values())

    def empty(self, batch: int, rows: int, pos_rows: int, slots: int, state: Mapping[str, Any]) -> Slots:
        """Slots that hold nothing.  `state` maps the name of a per-slot array to its dtype."""
        return Slots(
            payload={name: leaf.zeros(batch, rows, slots) for name, leaf in self.leaves.items()},
            pos=jnp.full((batch, pos_rows, slots), EMPTY, jnp.int32),
            state={name: jnp.zeros((batch, rows, slots), dtype) for name, dtype in state.items()},
        )

    def tile(self, slots: Slots, start, size: int):
        """k [B,R,D,size], v [B,R,size,D] of `size` neighbouring slots; `start` and `size` are multiples of the codec's page."""
        cut = {}
        for name, leaf in self.leaves.items():
            cut[name] = lax.dynamic_slice_in_dim(slots.payload[name], start // leaf.per, size // leaf.per, leaf.axis)
        k, v = self.codec.decode(cut)
        return k[:, :, : self.head_dim], v[..., : self.head_dim]

    def gather(self, slots: Slots, idx: jax.Array):
        """k [B,R,D,N], v [B,R,N,D] of the slots idx [B,R,N].  Only for codecs without pages."""
        cut = {}
        for name, leaf in self.leaves.items():
            shape = idx.shape[:2] + (1,) * len(leaf.before) + idx.shape[2:] + (1,) * len(leaf.after)
            cut[name] = jnp.take_along_axis(slots.payload[name], idx.reshape(shape), leaf.axis)
        return self.codec.decode(cut)

    def commit(self, slots: Slots, edit: Edit) -> Slots:
        """Write an edit, in place when the cache is donated.  The caller puts a barrier between reading the cache and this."""
        payload = self.codec.encode(edit.tokens.k, edit.tokens.v, edit.tokens.pos != EMPTY)
        new = {}
        for name, leaf in self.leaves.items():
            new[name] = _scatter(slots.payload[name], leaf.axis, edit.idx[..., :: leaf.per] // leaf.per, payload[name])
        pos = _scatter(slots.pos, 2, edit.idx, edit.tokens.pos)
        state = {n: _scatter(slots.state[n], 2, edit.idx, x) for n, x in edit.tokens.state.items()}
        return replace(slots, payload=new, pos=pos, state=slots.state | state)


@dataclass(frozen=True)
class Held:
    """A segment's slots with two ways to read them: `source` as attention does (rotated), `store` as they were written."""

    slots: Slots
    source: Source
    store: Store

    @property
    def pos(self) -> jax.Array:
        return self.slots.pos


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
    """Bytes that the arrays occupy on their device; an int4 value counts half a byte."""
    return sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(tree))


def shape_bytes(tree) -> int:
    """The same for shapes and dtypes alone, as `jax.eval_shape` returns them."""
    total = 0
    for x in jax.tree.leaves(tree):
        bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
        total += math.ceil(math.prod(x.shape) * bits / 8)
    return total
