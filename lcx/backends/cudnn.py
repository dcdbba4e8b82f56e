"""Attention by cuDNN through jax.nn."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lcx.ops.attention import EMPTY, Partial, Source
from lcx.ops.masks import Mask


def why_not(q, source: Source, mask: Mask | None) -> str | None:
    """Return why cuDNN cannot serve a source, or None."""
    T, D = q.shape[3:]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries of {q.dtype}; cuDNN takes bfloat16 and float16"
    if source.held or source.pos.shape[-1] != T:
        return "cuDNN serves only this step's own tokens"
    if mask is not None:
        return "cuDNN serves plain causal attention: no window"
    if D % 8 or D > 256:
        return f"head_dim={D}; cuDNN takes multiples of 8 up to 256"
    return None


def attend(q, source: Source, q_pos, *, mask: Mask | None, scale: float) -> Partial:
    """Compute attention over this step's own tokens, padded on the right; row t reads the valid tokens up to itself."""
    B, K, G, T, D = q.shape
    k, v = source.tile(0, T)
    real = jnp.sum(q_pos != EMPTY, -1, dtype=jnp.int32)
    out, lse = jax.nn.dot_product_attention(
        q.reshape(B, K * G, T, D).swapaxes(1, 2),
        jnp.moveaxis(k.astype(q.dtype), 3, 1),
        v.astype(q.dtype).swapaxes(1, 2),
        scale=scale,
        is_causal=True,
        query_seq_lengths=real,
        key_value_seq_lengths=real,
        implementation="cudnn",
        return_residual=True,
    )
    some = (q_pos != EMPTY)[:, None, None]
    out = out.swapaxes(1, 2).reshape(B, K, G, T, D).astype(jnp.float32)
    lse = lse.swapaxes(1, 2).reshape(B, K, G, T).astype(jnp.float32)
    return Partial(jnp.where(some[..., None], out, 0.0), jnp.where(some, lse, -jnp.inf))
