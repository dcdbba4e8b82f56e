"""Masks as values: the visible keys that a query may read, by position, and the bounds of a mask over a whole tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Bounds(NamedTuple):
    """Extremes of the positions in a tile of queries and a tile of keys; scalars, padding and EMPTY left out."""

    q_lo: jax.Array
    q_hi: jax.Array
    kv_lo: jax.Array
    kv_hi: jax.Array


class Mask:
    """Rule by position for the visible keys that a query may read.  Causality and validity are applied by `attend`, not here."""

    def allow(self, q_pos, kv_pos) -> jax.Array:
        """Return bool, broadcastable to [B,R,G,T,S], from q_pos [B,1,1,T,1] and kv_pos [B,R,1,1,S]."""
        raise NotImplementedError

    def bounds(self, tile: Bounds) -> tuple[Any, Any]:
        """Return (some pair of the tile may be allowed, every pair is).  The base answers (True, False)."""
        return True, False


@dataclass(frozen=True)
class Near(Mask):
    """The `window` most recent tokens, the query's own included, and the first `sink` tokens of the text.

    The one mask that the kernels know.
    """

    window: int
    sink: int = 0

    def allow(self, q_pos, kv_pos):
        near = q_pos - kv_pos < self.window
        return near | (kv_pos < self.sink) if self.sink else near

    def bounds(self, tile):
        some = (tile.kv_lo < self.sink) | (tile.q_lo - tile.kv_hi < self.window)
        return some, (tile.kv_hi < self.sink) | (tile.q_hi - tile.kv_lo < self.window)


@dataclass(frozen=True)
class Far(Mask):
    """All but the `window` most recent tokens and the first `sink` ones: the complement of `Near`."""

    window: int
    sink: int = 0

    def allow(self, q_pos, kv_pos):
        return ~Near(self.window, self.sink).allow(q_pos, kv_pos)


@dataclass(frozen=True)
class Both(Mask):
    """Keys that two masks allow, the intersection."""

    one: Mask
    other: Mask

    def allow(self, q_pos, kv_pos):
        return self.one.allow(q_pos, kv_pos) & self.other.allow(q_pos, kv_pos)

    def bounds(self, tile):
        (some, every), (other_some, other_every) = self.one.bounds(tile), self.other.bounds(tile)
        return jnp.logical_and(some, other_some), jnp.logical_and(every, other_every)


def both(one: Mask | None, other: Mask | None) -> Mask | None:
    """Join two masks; None allows every key.  Two windows become one where no sink is cut off."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, Near) and isinstance(other, Near):
        narrow, _ = sorted((one, other), key=lambda mask: mask.window)
        # sinks behind a narrower window without sinks are hidden by it
        if not narrow.sink:
            return narrow
    return Both(one, other)
