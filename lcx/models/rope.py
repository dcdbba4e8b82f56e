"""Rotary position embedding, half-split pairs (i, i + R/2) of the R channels that turn.

Angles are float32: bfloat16 cannot count past 256.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lcx.model_config import ModelConfig, Rope


def inverse_frequencies(config: ModelConfig, local: bool = False) -> np.ndarray:
    """Return float32 [R/2], radians a token of the pairs that turn.  `local`: those of the layers that see only the model's window."""
    rope = rope_of(config, local)
    pairs = rope.pairs(config.head_dim)
    inverse = 1.0 / rope.base ** (np.arange(pairs, dtype=np.float64) / pairs)
    return (inverse / np.asarray(rope.divisors, np.float64)).astype(np.float32)


def rope_of(config: ModelConfig, local: bool) -> Rope:
    """Return the RoPE of a kind of layer."""
    return config.rope_local if local and config.rope_local is not None else config.rope


def rotate(x: jax.Array, pos: jax.Array, inverse: np.ndarray, axis: int = -1, scale: float = 1.0) -> jax.Array:
    """Rotate `x` by its tokens' positions.

    Args:
      x: [..., T, D] with `axis=-1`, or channel-major [..., D, T] with `axis=-2`.
      pos: int32, broadcastable to x without the D axis; EMPTY is fine, such tokens are masked later.
      inverse: float32 [R/2]; the first R channels turn, the other D - R stay as they are.
      axis: where D is.
      scale: cos and sin are multiplied by it (`Rope.scale`).

    Returns:
      Like x, in its type.
    """
    angle = pos.astype(jnp.float32)[..., None] * inverse
    if axis == -2:
        angle = angle.swapaxes(-1, -2)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    # without the barrier XLA:CPU computes cos and sin again for every head
    cos, sin = jax.lax.optimization_barrier((cos, sin))
    half = len(inverse)
    low, high, *rest = jnp.split(x.astype(jnp.float32), [half, 2 * half][: 1 + (2 * half < x.shape[axis])], axis=axis)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin, *rest], axis=axis).astype(x.dtype)
