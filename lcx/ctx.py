"""Context of a method: one page that its author can read whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from lcx.backends import choose
from lcx.ops import attention as ops
from lcx.ops.antidiagonal import antidiagonal_mass
from lcx.ops.attention import EMPTY, Partial, Source, tokens_source
from lcx.ops.masks import Mask


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """Places of one step's tokens.

    Attributes:
      pos: int32 [B,T], positions in the text, EMPTY for padding.
      left: int32 [B], prompt tokens of each row that are still to come after this step; 0 in decode.
    """

    pos: jax.Array
    left: jax.Array


@dataclass(frozen=True)
class Ctx:
    """View of a step by the KV heads of one chain (R rows).  Unread arrays cost nothing under jit.

    Attributes:
      q: [B,R,G,T,D], rotated as attention uses it.   q_raw: before RoPE.
      k, k_raw, v: [B,R,T,D], this step's own tokens; k rotated as attention uses it.  None at the end of the prompt.
      pos: int32 [B,T], positions in the text, EMPTY for padding.
      left: int32 [B], prompt tokens that are still to come.
      scale: factor on the logits.
      rotate: `rotate(x, pos, axis)`, RoPE of this layer.
      window: the model's own window of this layer, or None.
      aux: name -> the method's arrays, those by head cut to these heads: [R,G,...] by query head, [R,...] by KV head.
      by_head: names of the arrays that are by head.
      settings: segment name -> axis -> settings that parts take as numbers.   data: those of the part that is asked (`Part.data`).
      mask: of pattern and model window; None where everything is visible.
      lse: [B,R,G,T] of the merged attention; None before it.
      implementation: of attention, as `backends.choose.resolve` returned it.
    """

    q: jax.Array
    pos: jax.Array
    scale: float
    rotate: Callable
    q_raw: Any = None
    k: Any = None
    k_raw: Any = None
    v: Any = None
    left: Any = None
    window: int | None = None
    aux: Mapping[str, Any] = field(default_factory=dict)
    by_head: frozenset[str] = frozenset()
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    mask: Mask | None = None
    lse: Any = None
    implementation: str = "xla"

    @property
    def last_pos(self) -> jax.Array:
        """Return int32 [B], the position of the last valid token of each row."""
        return jnp.max(self.pos, axis=-1)

    @property
    def own(self) -> Source:
        """This step's own keys and values."""
        return tokens_source(self.k, self.v, self.pos)

    def attend(self, source: Source, mask: Mask | None = None) -> Partial:
        """Compute attention of these queries over one source, by XLA; `mask` instead of the step's own."""
        return ops.attend(self.q, source, self.pos, scale=self.scale, mask=self.mask if mask is None else mask)

    def mass(self, source: Source, lse: jax.Array | None = None) -> jax.Array:
        """Return the probability that each key of `source` gets from these queries, summed over them, float32 [B,R,G,S].

        `lse` [B,R,G,T] is over all keys that the queries saw; None: that of the step's attention.
        """
        lse = self.lse if lse is None else lse
        return ops.mass(self.q, source, self.pos, lse, scale=self.scale, mask=self.mask)

    def heads(self, rows: jax.Array | None) -> Ctx:
        """Return the ctx for some of the KV heads; None means all."""
        if rows is None:
            return self
        aux = {n: x[rows] if n in self.by_head else x for n, x in self.aux.items()}
        cut = {n: getattr(self, n) for n in ("q", "q_raw", "k", "k_raw", "v", "lse")}
        return replace(self, aux=aux, **{n: None if x is None else x[:, rows] for n, x in cut.items()})

    def for_part(self, segment: str, axis: str) -> Ctx:
        """Return the ctx with the data of one part; the pattern's segment is an empty text."""
        return replace(self, data=self.settings.get(segment, {}).get(axis, {}))

    def last_queries(self, count: int) -> Ctx:
        """Return the ctx with only the last `count` real queries of each row, EMPTY in front where there are fewer."""
        idx = last_places(self.pos, count)
        pick = lambda x: jnp.take_along_axis(x, idx[:, None, None, :, *(None,) * (x.ndim - 4)], 3)
        some = lambda x: None if x is None else pick(x)
        pos = jnp.take_along_axis(self.pos, idx, 1)
        return replace(self, q=pick(self.q), q_raw=some(self.q_raw), pos=pos, lse=some(self.lse))

    def score_minmax(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """Return the upper bound of q.k over pages, `ops.block_scores.score_minmax`."""
        return choose.score_minmax(self.q, low, high, implementation=self.implementation)

    def antidiagonal_mass(self, sources: Sequence[Source], *, stride: int, block: int) -> list[jax.Array]:
        """Return the attention mass between blocks, estimated along antidiagonals, `ops.antidiagonal.antidiagonal_mass`."""
        asked = {"stride": stride, "block": block, "scale": self.scale}
        return antidiagonal_mass(self.q, sources, self.pos, **asked)

    def score_probe(self, q: jax.Array, k: jax.Array, **asked) -> tuple[jax.Array, jax.Array]:
        """Return the attention mass of the last queries by key and by distance, `ops.block_scores.score_probe`."""
        asked = {"scale": self.scale, "window": self.window} | asked
        return choose.score_probe(q, k, implementation=self.implementation, **asked)


def last_places(pos: jax.Array, count: int) -> jax.Array:
    """Return int32 [B,count]: places of the last `count` valid tokens of each row; rows with fewer begin with padding."""
    if count > pos.shape[-1]:
        raise ValueError(f"count={count} places of a step with {pos.shape[-1]} tokens; ask for at most that number")
    order = jnp.argsort(pos != EMPTY, axis=-1, stable=True)
    return order[:, order.shape[1] - count :]
