"""Rotary position embedding, half-split pairs (i, i + D/2).  Angles are float32: bfloat16 cannot count past 256."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lcx.model_config import ModelConfig


def inverse_frequencies(config: ModelConfig, local: bool = False) -> np.ndarray:
    """float32 [D/2], radians a token.  `local`: of the layers that see only the model's window (Gemma 3)."""
    base = config.rope_base
    if local and config.rope_base_local is not None:
        base = config.rope_base_local
    inverse = 1.0 / base ** (np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if not local:
        if config.rope_divisors is not None:
            inverse = inverse / np.asarray(config.rope_divisors, np.float64)
        inverse = inverse / config.rope_scale
    return inverse.astype(np.float32)


def rotate(x: jax.Array, pos: jax.Array, inverse: np.ndarray, axis: int = -1) -> jax.Array:
    """Rotate `x` by its tokens' positions.

    Args:
      x: [..., T, D] with `axis=-1`, or channel-major [..., D, T] with `axis=-2`.
      pos: int32, broadcastable to x without the D axis; EMPTY is fine, such tokens are masked later.
      inverse: float32 [D/2].
      axis: where D is.

    Returns:
      Like x, in its type.
    """
    angle = pos.astype(jnp.float32)[..., None] * inverse
    if axis == -2:
        angle = angle.swapaxes(-1, -2)
    # without the barrier XLA:CPU computes both again for every head
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=axis)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=axis).astype(x.dtype)
