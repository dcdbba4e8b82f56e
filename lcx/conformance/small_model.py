"""Small random model that checks run on, and garbage for slots without a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from lcx.cache import Size
from lcx.model_config import ModelConfig
from lcx.models.decoder import Layers, Model, random_weights
from lcx.ops.attention import EMPTY

TINY = ModelConfig("tiny", 3, 48, 6, 2, 32, 40, 97, 512)  # head_dim suits groups of 32
ATOL = 3e-4  # f32 through 3 layers; logits have a spread of 7


@cache
def layers(config: ModelConfig = TINY, seed: int = 0, dtype: str = "float32") -> Layers:
    """Return a model of random weights, made once for each configuration, seed and type."""
    weights = {name: w.astype(dtype) for name, w in random_weights(config, seed).items()}
    return Layers.of(Model(config, weights))


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Compile programs with few optimisations: they run once or twice, so two thirds of the time to compile them is worth more."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def poison(session, phase: str = "decode") -> None:
    """Put nan, or the largest integer, wherever the session's cache holds no token: payload, the policy's and the pattern's state.

    Layers that have no cache yet get one for `phase`.
    """
    for i, held in enumerate(session.cache):
        layer = session.empty(phase, i) if held is None else held
        segments = dict(layer.segments)
        for s in (s for chain in session.recipes[phase][i].chains for s in chain):
            slots = segments[s.name]
            rows = max(x.shape[1] for x in slots.payload.values())
            leaves = s.codec.leaves(Size(rows, session.config.head_dim, session.layers.dtype))
            payload = {n: spoil(x, slots.pos, leaves[n].axis, leaves[n].per) for n, x in slots.payload.items()}
            state = {n: spoil(x, slots.pos, x.ndim - 1) for n, x in slots.state.items()}
            segments[s.name] = replace(slots, payload=payload, state=state)
        session.cache[i] = replace(layer, segments=segments)


def spoil(x: jax.Array, pos: jax.Array, axis: int, per: int | None = 1) -> jax.Array:
    """Return an array with garbage in the entries of empty slots.

    Args:
      x: [B,R|1,...], with an entry along `axis` for each slot or each page of slots.
      pos: int32 [B,R|1,S].
      axis: of the slots.
      per: slots of an entry; None: the array has no axis of slots and stays as it is.
    """
    if per is None or x.size == 0:
        return x
    count = x.shape[axis]
    size = -(-pos.shape[2] // count)
    free = np.pad(np.asarray(pos), ((0, 0), (0, 0), (0, count * size - pos.shape[2])), constant_values=EMPTY) == EMPTY
    free = free.reshape(*free.shape[:2], count, size).all(-1)
    if x.shape[1] == 1:
        # rows share the entry: it is free where none of them holds a token
        free = free.all(1, keepdims=True)
    free = free.reshape(*free.shape[:2], *(1,) * (axis - 2), count, *(1,) * (x.ndim - axis - 1))
    bad = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max
    return jnp.where(free, jnp.asarray(bad, x.dtype), x)
