"""A fixed number of entries of every token beside its codes: dense-and-sparse storage without pointers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from lcx.cache import Leaf

TOP = float(jnp.finfo(jnp.float16).max)


def half(x: jax.Array) -> jax.Array:
    """Return x in float16, kept inside its range."""
    return jnp.clip(x, -TOP, TOP).astype(jnp.float16)


def num_outliers(share: float, channels: int) -> int:
    """Places at each end of a token's channels: `share` of them on both ends together, rounded up."""
    return math.ceil(round(share * channels / 2, 9))


def outlier_leaves(name: str, places: int, channels: int) -> dict[str, Leaf]:
    """Leaves for `places` entries a token, shared by the layer's rows: value and channel, none where there are no places."""
    if not places:
        return {}
    return {
        name + "_out": Leaf(jnp.float16, after=(places,), rows=1),
        name + "_at": Leaf(index_type(channels), after=(places,), rows=1),
    }


def index_type(channels: int):
    """Return the type of a channel's number; `channels` itself stands for an empty place."""
    return jnp.uint8 if channels < 2**8 else jnp.uint16


def extremes(x: jax.Array, count: int) -> jax.Array:
    """Channels [...,2 count] of the largest and the smallest entries of x [...,C], by rank: none twice, however equal they are."""
    high = lax.top_k(x, count)[1]
    rest = jnp.put_along_axis(x, high, jnp.inf, -1, inplace=False)
    return jnp.concatenate([high, lax.top_k(-rest, count)[1]], -1)


def marked(shape: tuple[int, ...], at: jax.Array) -> jax.Array:
    """Return bool of `shape` [...,C], true at the channels `at` [...,n]."""
    return jnp.put_along_axis(jnp.zeros(shape, bool), at, True, -1, inplace=False)


def value_range(x: jax.Array, outside: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Middle and half width, float16 [...,1], of the entries of x [...,C] that are not `outside`."""
    low = jnp.min(jnp.where(outside, jnp.inf, x), -1, keepdims=True)
    high = jnp.max(jnp.where(outside, -jnp.inf, x), -1, keepdims=True)
    return half((high + low) / 2), half((high - low) / 2)


def put(x: jax.Array, payload, name: str, channel_axis: int) -> jax.Array:
    """Return x with a token's entries in their places.

    Args:
      x: [B,R,D,n] with `channel_axis` 2, or [B,R,n,D] with 3.
      payload: has name_out and name_at, [B,1,n,places]; channel r * D + d is channel d of row r.
      name: of the leaves.
      channel_axis: where D is.
    """
    if name + "_at" not in payload:
        return x
    at = payload[name + "_at"][:, 0].astype(jnp.int32)
    b, slot = jnp.arange(at.shape[0])[:, None, None], jnp.arange(at.shape[1])[:, None]
    # an empty place names a row that is not there
    row, channel = at // x.shape[channel_axis], at % x.shape[channel_axis]
    where = (b, row, channel, slot) if channel_axis == 2 else (b, row, slot, channel)
    return x.at[where].set(payload[name + "_out"][:, 0].astype(x.dtype), mode="drop")
