"""The static predicate of the attention kernels: the pairs that it allows, and the tiles of keys that these leave.

The methods are elementwise `jnp` on positions, so the same lines run inside a kernel (on registers), over the tiles of a list (in XLA)
and on scalars.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcx.errors import UserError
from lcx.ops.attention import FAR


class Walk(NamedTuple):
    """Tiles of keys that a tile of queries visits in order: `sinks` first ones, then those from `first` on, `steps` in total.

    With sink = 2 tiles and a window that begins in tile 5 of 8:   [0] [1]  .  .  .  [5] [6] [7]   sinks 2, first 5, steps 5
    """

    steps: jax.Array
    sinks: jax.Array
    first: jax.Array

    def tile(self, step):
        """Return the number of the tile that `step` visits."""
        return jnp.where(step < self.sinks, step, step - self.sinks + self.first)


@dataclass(frozen=True)
class Mask:
    """Static half of the rule for the keys that a query may see; its data come as arrays beside it.

    Attributes:
      causal: keys at the query's position or before it.
      window: only the most recent tokens, the query's own included; None: all.  Needs `causal`.
      sink: first tokens of the text that stay visible beside the window.
      spans: the window is data, one for each KV head (int32 [K] or [B,K], tokens); a head that keeps all takes a number above every length.
      segments: only keys of the query's own segment (int32 [B,T] and [B,S]).
      positions: positions are data (int32 [B,T] and [B,S] or [B,K,S], EMPTY where a slot holds nothing), in any order; otherwise query t
        stands at `q_offset + t` and slot s at s, and slots from `kv_len` on hold nothing.
    """

    causal: bool = True
    window: int | None = None
    sink: int = 0
    spans: bool = False
    segments: bool = False
    positions: bool = False

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise UserError(f"window={self.window}: allowed are at least 1 token, or None")
        if self.sink < 0:
            raise UserError(f"sink={self.sink}: allowed are 0 tokens and more")
        if self.window is not None and self.spans:
            raise UserError(
                f"window={self.window} with spans=True: allowed is one of them, spans are a window for each KV head"
            )
        if self.near and not self.causal:
            raise UserError(
                "causal=False with a window or spans: allowed is causal=True, a window counts back from the query"
            )
        if self.sink and not self.near:
            raise UserError(f"sink={self.sink} without a window or spans: allowed is 0, every key is visible anyway")

    @property
    def near(self) -> bool:
        """True where there is a window, of one size or by head."""
        return self.spans or self.window is not None

    def allow(self, q_pos, kv_pos, span=None):
        """Return bool: the positions of a held key and a query allow the pair; arguments broadcast.  `span`: the window where `spans`."""
        seen = kv_pos <= q_pos if self.causal else True
        if self.near:
            close = q_pos - kv_pos < (span if self.spans else self.window)
            seen = seen & (close | (kv_pos < self.sink) if self.sink else close)
        return seen

    def every(self, q_lo, q_hi, kv_lo, kv_hi, span=None):
        """Return bool: all pairs of these ranges of held positions (both ends inside) are allowed; may be False too often."""
        sure = kv_lo >= 0
        if self.causal:
            sure = sure & (kv_hi <= q_lo)
        if self.near:
            close = q_hi - kv_lo < (span if self.spans else self.window)
            sure = sure & (close | (kv_hi < self.sink) if self.sink else close)
        return sure

    def some(self, q_lo, q_hi, kv_lo, kv_hi, span=None):
        """Return bool: some pair of these ranges may be allowed; may be True too often."""
        maybe = kv_hi >= 0
        if self.causal:
            maybe = maybe & (kv_lo <= q_hi)
        if self.near:
            close = q_lo - kv_hi < (span if self.spans else self.window)
            maybe = maybe & (close | (kv_lo < self.sink) if self.sink else close)
        return maybe

    def walk(self, q_lo, q_hi, kv_len, size: int, span=None) -> Walk:
        """Return the tiles of `size` ordered slots that queries at `q_lo` ... `q_hi` may see, of the first `kv_len` slots; scalars."""
        end = jnp.minimum(kv_len, q_hi + 1) if self.causal else kv_len
        end = lax.div(jnp.maximum(end, 0) + size - 1, size)
        if not self.near:
            return Walk(end, jnp.int32(0), jnp.int32(0))
        sinks = jnp.minimum(end, -(-self.sink // size))
        first = lax.div(jnp.maximum(q_lo - (span if self.spans else self.window) + 1, 0), size)
        first = jnp.clip(first, sinks, end)
        return Walk(end - first + sinks, sinks, first)

    def walk_queries(self, kv_lo, kv_hi, q_start, T: int, kv_len, rows: int, span=None) -> Walk:
        """Return the tiles of `rows` of the T queries from position `q_start` on that may see slots `kv_lo` ... `kv_hi`; scalars."""
        first, end = jnp.int32(0), T
        if self.causal:
            first = jnp.maximum(kv_lo - q_start, 0)
        if self.near:
            # the last query whose window reaches back to the last key; keys of the sink are seen by all
            back = span if self.spans else self.window
            window = jnp.minimum(jnp.asarray(FAR if back is None else back), FAR)
            end = jnp.clip(kv_hi - q_start + window, 0, T)
            end = jnp.where(kv_lo < self.sink, T, end) if self.sink else end
        end = jnp.where(kv_lo < kv_len, end, 0)
        first = lax.div(first, rows)
        return Walk(jnp.maximum(lax.div(end + rows - 1, rows) - first, 0), jnp.int32(0), first)
