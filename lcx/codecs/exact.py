"""Slots in a float type narrower than the model's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from lcx.axes import Exact
from lcx.errors import UserError

TYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float8_e4m3": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
}


@dataclass(frozen=True)
class Cast(Exact):
    """Keys and values in a narrower float type, without scales.

    Values beyond the type's range become its largest (a plain cast to float8_e4m3 would give nan).  Exact in the model's own type.

    Args:
      dtype: float32, bfloat16, float16, float8_e4m3 or float8_e5m2.
    """

    dtype: str = "bfloat16"

    exact = "In the model's own type; else values are rounded."

    def __post_init__(self):
        if self.dtype not in TYPES:
            raise UserError(f"Cast: dtype={self.dtype!r}: allowed are {', '.join(TYPES)}")

    def leaves(self, size):
        return super().leaves(replace(size, dtype=TYPES[self.dtype]))

    def encode(self, ctx, tokens, pick):
        kind = TYPES[self.dtype]
        top = float(jnp.finfo(kind).max)
        narrow = lambda x: jnp.clip(x.astype(jnp.float32), -top, top).astype(kind)
        return super().encode(ctx, replace(tokens, k=narrow(tokens.k), v=narrow(tokens.v)), pick)

    def decode(self, ctx, payload, pick):
        # products in float8 are not defined everywhere; bfloat16 holds both float8 types exactly
        wide = lambda x: x.astype(jnp.bfloat16) if x.dtype.itemsize == 1 else x
        return wide(payload["k"]), wide(payload["v"])
