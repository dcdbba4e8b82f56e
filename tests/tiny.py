"""What the test files share: one small model, its weights and texts, quick compilation, and garbage for slots without a token."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.cache import Size
from lcx.model_config import ModelConfig
from lcx.models.decoder import Layers, Model, random_weights
from lcx.ops.attention import EMPTY

TINY = ModelConfig("tiny", 3, 48, 6, 2, 32, 40, 97, 512)  # head_dim suits groups of 32
ATOL = 3e-4  # f32 through 3 layers; logits have a spread of 7


@cache
def weights(config=TINY, seed=0):
    return random_weights(config, seed)


@cache
def layers(config=TINY, seed=0, dtype="float32"):
    return Layers.of(Model(config, {n: w.astype(dtype) for n, w in weights(config, seed).items()}))


def text(length, seed=0):
    """Token ids of a random text, int [length]."""
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, length)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs of a module that imports this: they run once or twice, so two thirds of the time to compile them is worth more."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def poison(session, phase="decode"):
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


def spoil(x, pos, axis, per=1):
    """`x` [B,R|1,...] whose `axis` has an entry for each slot or each page of slots; `per` None: it has no such axis."""
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
