"""One decoder for the families of `lcx.pretrained.families`.  It knows no attention: `lcx.programs` puts that between `enter` and `leave`.

Weights are per layer.  `nnx` modules hold parameters; every transform is plain jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax

from lcx.model_config import ModelConfig, param_shapes
from lcx.models.rope import inverse_frequencies, rope_of, rotate
from lcx.ops.attention import EMPTY, tile_starts

# rows of a linear layer at a time on a CPU: activations stay in cache and their pages are used again (docs/design.md)
ROWS = 512
# and elsewhere, of a longer step: the wide inner arrays of an MLP would take several times as much as the residual stream
LONG_ROWS = 8_192


class Block(nnx.Module):
    """Parameters of one layer, in the layout of `config.param_shapes`."""

    def __init__(self, weights: Mapping[str, Any]):
        for name, value in weights.items():
            setattr(self, name, nnx.Param(value))


class Model(nnx.Module):
    """Parameters of a decoder.

    Args:
      config: its shape.
      weights: name -> array, names and shapes of `config.param_shapes`.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any]):
        self.config = config
        self.embed = nnx.Param(weights["embed"])
        self.norm = nnx.Param(weights["norm"])
        self.lm_head = None if config.tied else nnx.Param(weights["lm_head"])
        layers = []
        for i in range(config.num_layers):
            start = f"layers.{i}."
            layers.append(Block({n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}))
        self.layers = nnx.List(layers)


def random_weights(config: ModelConfig, seed: int = 0, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Weights with unit-variance activations, for tests: norms 1, matrices normal / sqrt(in)."""
    weights = {}
    for i, (name, shape) in enumerate(param_shapes(config).items()):
        key = jax.random.fold_in(jax.random.key(seed), i)
        value = jax.random.normal(key, shape)
        if name.endswith("norm"):
            value = 1.0 + 0.1 * value
        elif name != "embed":
            value = value / np.sqrt(shape[0]) if len(shape) == 2 else 0.1 * value
        weights[name] = value.astype(dtype)
    return weights


def rms_norm(x, weight, eps):
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (x32 * weight.astype(jnp.float32)).astype(x.dtype)


def _activation(config: ModelConfig, x):
    return jax.nn.silu(x) if config.activation == "silu" else jax.nn.gelu(x, approximate=True)


def _matmul(x, w):
    # one row at a time is a matrix-vector product, which XLA:CPU runs 2 times faster than the same as a matrix product
    return jnp.matmul(x, w, preferred_element_type=x.dtype)


def _by_rows(f, width: int, x, *others):
    """`f(x, *others)` [B,T,width] with its rows computed some at a time where that is faster, or takes much less memory.

    Args:
      f: row by row: row t of the result depends on row t of the arguments alone.
      width: of the result, which has the dtype of `x`.
      x: [B,T,E].
      others: (array, axis of T) pairs.
    """
    B, T = x.shape[:2]
    arrays, axes = [x, *(a for a, _ in others)], [1, *(axis for _, axis in others)]
    if T <= ROWS:
        return f(*arrays)

    def in_parts(size, *arrays):
        starts = tile_starts(T, size)

        def part(i, out):
            rows = [lax.dynamic_slice_in_dim(a, starts[i], size, axis) for a, axis in zip(arrays, axes, strict=True)]
            return lax.dynamic_update_slice_in_dim(out, f(*rows), starts[i], 1)

        return lax.fori_loop(0, starts.shape[0], part, jnp.zeros((B, T, width), x.dtype))

    default = f if T <= LONG_ROWS else partial(in_parts, LONG_ROWS)
    return lax.platform_dependent(*arrays, cpu=partial(in_parts, ROWS), default=default)


def enter(w, config: ModelConfig, x):
    """Norm and projections of one layer: q [B,K,G,T,D], k and v [B,K,T,D], before RoPE."""
    H, K, D = config.num_heads, config.num_kv_heads, config.head_dim

    def project(x):
        qkv = _matmul(rms_norm(x, w["attn_norm"], config.norm_eps), w["qkv"])
        return qkv + w["qkv_bias"] if config.qkv_bias else qkv

    qkv = _by_rows(project, (H + 2 * K) * D, x)
    qkv = rearrange(qkv, "B T (N D) -> B T N D", D=D)
    q, k, v = qkv[:, :, :H], qkv[:, :, H : H + K], qkv[:, :, H + K :]
    if config.qk_norm:
        q, k = rms_norm(q, w["q_norm"], config.norm_eps), rms_norm(k, w["k_norm"], config.norm_eps)
    return rearrange(q, "B T (K G) D -> B K G T D", K=K), k.swapaxes(1, 2), v.swapaxes(1, 2)


def leave(w, config: ModelConfig, x, out):
    """Output projection, residual, MLP, residual.  `out` [B,K,G,T,D]."""

    def rows(x, out):
        out = _matmul(rearrange(out, "B K G T D -> B T (K G D)"), w["o"])
        out = out + w["o_bias"] if config.o_bias else out
        x = x + (rms_norm(out, w["post_attn_norm"], config.norm_eps) if config.post_norms else out)
        gate, up = jnp.split(_matmul(rms_norm(x, w["mlp_norm"], config.norm_eps), w["gate_up"]), 2, axis=-1)
        out = _matmul(_activation(config, gate) * up, w["down"])
        return x + (rms_norm(out, w["post_mlp_norm"], config.norm_eps) if config.post_norms else out)

    return _by_rows(rows, x.shape[-1], x, (out.astype(x.dtype), 3))


def rotation(config: ModelConfig, local: bool):
    """RoPE of a layer, `rotate(x, pos, axis)`; `local`: of one that sees the model's own window."""
    inverse, scale = inverse_frequencies(config, local), rope_of(config, local).scale
    return lambda x, pos, axis=-1: rotate(x, pos, inverse, axis, scale)


@partial(jax.jit, static_argnames=("scale",))
def embed_program(embed, tokens, *, scale):
    """tokens int32 [B,T] -> x [B,T,E]."""
    x = embed[tokens]
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


@partial(jax.jit, static_argnames=("eps", "tied"))
def logits_program(x, norm, head, *, eps, tied):
    """x [N,E] -> float32 logits [N,V].  `head`: the embedding [V,E] when tied, else [E,V]."""
    x = rms_norm(x, norm, eps)
    if not tied:
        return jnp.matmul(x, head, preferred_element_type=jnp.float32)
    if x.shape[0] == 1:
        # matrix times vector reads the embedding in order; XLA:CPU is 3 times slower on vector times its transpose
        return jnp.matmul(head, x[0], preferred_element_type=jnp.float32)[None]
    return jnp.einsum("NE,VE->NV", x, head, preferred_element_type=jnp.float32)


@jax.jit
def last_rows(x, pos):
    """The last real token's row of each batch row: [B,T,E] -> [B,E]."""
    last = jnp.max(jnp.where(pos != EMPTY, jnp.arange(pos.shape[1]), 0), 1)
    return jnp.take_along_axis(x, last[:, None, None], 1)[:, 0]


@dataclass(frozen=True)
class Layers:
    """A model taken apart for running: per-layer graph and state, split once."""

    config: ModelConfig
    embed: jax.Array
    norm: jax.Array
    head: jax.Array
    layers: tuple[tuple[Any, Any], ...]

    def __repr__(self) -> str:
        # the arrays would be thousands of lines
        return f"Layers({self.config.name!r}, {len(self.layers)} layers, {self.dtype})"

    @classmethod
    def of(cls, model: Model) -> Layers:
        config = model.config
        head = model.embed if model.lm_head is None else model.lm_head
        layers = tuple(nnx.split(block) for block in model.layers)
        return cls(config, model.embed[...], model.norm[...], head[...], layers)

    @property
    def dtype(self):
        return self.embed.dtype

    def logits(self, x: jax.Array) -> jax.Array:
        """x [N,E], the residual stream after the last layer -> float32 [N,V]."""
        return logits_program(x, self.norm, self.head, eps=self.config.norm_eps, tied=self.config.tied)
