"""Time of the attention part of a prefill on real queries and keys, index included, beside dense attention in the same run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lcx.axes import CAUSAL, Pattern
from lcx.cache import LayerCache
from lcx.ctx import Step
from lcx.errors import UserError
from lcx.layer import attention, open_chain
from lcx.models.decoder import Layers, embed_program, enter
from lcx.ops.attention import EMPTY, FAR
from lcx.programs import layer_ctx, run_block, weights_of
from lcx.recipe import Recipe
from lcx.storage import Shape


@dataclass(frozen=True)
class Part:
    """Attention of one layer over a prompt.

    Attributes:
      layer: from 0.
      density: share of the causal blocks that the pattern lists; 1 for dense attention.
      seconds: of every repetition, dense attention first: {"dense": [...], "method": [...]}.
    """

    layer: int
    density: float
    seconds: dict[str, list[float]]

    @property
    def ratio(self) -> float:
        """Median time of the method over that of dense attention."""
        return float(np.median(self.seconds["method"]) / np.median(self.seconds["dense"]))


class Prompt:
    """A prompt whose residual stream is known in front of one layer, in chunks of `size` tokens.

    Args:
      layers: the model.
      ids: int [T].
      layer: whose attention is looked at; those before it run densely.
      size: tokens a step.
    """

    def __init__(self, layers: Layers, ids: Sequence[int], layer: int, size: int):
        if not 0 <= layer < layers.config.num_layers:
            raise UserError(f"layer={layer}: allowed are 0 to {layers.config.num_layers - 1}")
        self.layers, self.layer, self.size = layers, layer, size
        self.config = layers.config.at_length(len(ids))
        self.shape = Shape(self.config, len(ids), 0, 1, layers.dtype)
        self.local = self.config.is_local(layer)
        tokens = np.asarray(ids, np.int32)[None]
        steps = [(i, min(i + size, len(ids))) for i in range(0, len(ids), size)]
        if steps[-1][1] - steps[-1][0] != size:
            raise UserError(f"length={len(ids)} is not a multiple of chunk_size={size}")
        zero = jnp.zeros(1, jnp.int32)
        self.steps = [Step(jnp.arange(a, b, dtype=jnp.int32)[None], zero) for a, b in steps]
        xs = [embed_program(layers.embed, tokens[:, a:b], scale=self.config.embed_scale) for a, b in steps]
        dense = Recipe()
        for i in range(layer):
            cache = dense.init_layer("prefill", i, self.shape)
            graph, state = layers.layers[i]
            for n, step in enumerate(self.steps):
                xs[n], cache, _ = _block(state, xs[n], step, cache, graph=graph, **self._static(dense, i))
        self.xs = xs

    def _static(self, recipe: Recipe, layer: int):
        local = self.config.is_local(layer)
        return {"config": self.config, "recipe": recipe, "local": local, "implementation": "xla"}

    def run(self, pattern: Pattern) -> float:
        """Seconds of attention over the whole prompt, projections left out."""
        recipe = Recipe(pattern=pattern).at("prefill", self.layer, self.config)
        graph, state = self.layers.layers[self.layer]
        cache = recipe.init_layer("prefill", self.layer, self.shape)
        static = self._static(recipe.program(), self.layer)
        data = jax.tree.map(jnp.asarray, recipe.data())
        own = [_project(state, x, graph=graph, config=self.config) for x in self.xs]
        jax.block_until_ready((own, cache))
        start = time.perf_counter()
        out = None
        for projected, step in zip(own, self.steps, strict=True):
            out, cache = _attention(projected, step, cache, {"data": data}, **static)
        jax.block_until_ready((out, cache))
        return time.perf_counter() - start

    def density(self, pattern: Pattern, block: int) -> float:
        """Share of the causal blocks of `block` x `block` that a pattern which lists blocks reads, over all query heads."""
        recipe = Recipe(pattern=pattern).at("prefill", self.layer, self.config)
        if not recipe.pattern.visits:
            return 1.0
        graph, state = self.layers.layers[self.layer]
        cache = recipe.init_layer("prefill", self.layer, self.shape)
        static = self._static(recipe.program(), self.layer)
        aux = {"data": jax.tree.map(jnp.asarray, recipe.data())}
        read, causal = 0.0, 0
        for x, step in zip(self.xs, self.steps, strict=True):
            own = _project(state, x, graph=graph, config=self.config)
            read += float(_listed(own, step, cache, aux, **static))
            _, cache = _attention(own, step, cache, aux, **static)
            rows = np.asarray(step.pos)[0][::block] // block
            causal += self.config.num_heads * int((rows + 1).sum())
        return read / causal


@partial(jax.jit, static_argnames=("graph", "config", "recipe", "local", "implementation"), donate_argnames=("cache",))
def _block(state, x, step, cache, *, graph, **static):
    return run_block(weights_of(graph, state), x, step, cache, {}, **static)


@partial(jax.jit, static_argnames=("graph", "config"))
def _project(state, x, *, graph, config):
    return enter(weights_of(graph, state), config, x)


@partial(jax.jit, static_argnames=("config", "recipe", "local", "implementation"), donate_argnames=("cache",))
def _attention(own, step, cache, aux, **static):
    ctx = layer_ctx(static, aux, step, *own)
    out, cache, _ = attention(ctx, static["recipe"], cache, {})
    return out, cache


@partial(jax.jit, static_argnames=("config", "recipe", "local", "implementation"))
def _listed(own, step, cache: LayerCache, aux, **static):
    """Causal blocks that the pattern lists for one step, over all query heads."""
    recipe = static["recipe"]
    ((chain),) = recipe.chains
    reading = open_chain(layer_ctx(static, aux, step, *own), chain, recipe.pattern, cache.segments)
    held = reading.held(cache.segments)
    pages = recipe.pattern.visit(reading.ctx, held, reading.ctx.own).pages
    group = reading.ctx.q.shape[2]
    total = jnp.zeros((), jnp.float32)
    for name, visit in pages.items():
        pos = step.pos[:, None] if name == "own" else held[name].pos
        first = _edges(jnp.where(pos == EMPTY, FAR, pos), visit.size, FAR, jnp.min)
        last = _edges(step.pos[:, None], visit.rows, EMPTY, jnp.max)
        causal = (first[..., None, :] <= last[..., None])[:, :, None]
        total += jnp.sum(visit.blocks & causal, dtype=jnp.float32) * (group // visit.blocks.shape[2])
    return total


def _edges(pos: jax.Array, size: int, fill: int, edge) -> jax.Array:
    """The first or last position [B,R|1,N] of each block of `size` of pos [B,R|1,S]."""
    pos = jnp.pad(pos, ((0, 0), (0, 0), (0, -pos.shape[-1] % size)), constant_values=fill)
    return edge(pos.reshape(*pos.shape[:2], -1, size), -1)


def tau_of(prompt: Prompt, pattern, low: float, high: float, tries: int = 12):
    """The pattern with the `tau` at which it reads between `low` and `high` of the causal blocks, and that share.

    Raises:
      UserError: no tau was found.
    """
    least, most = 0.0, 1.0
    density = 1.0
    for _ in range(tries):
        tau = (least + most) / 2
        pattern = replace(pattern, tau=tau)
        density = prompt.density(pattern, pattern.block)
        if low <= density <= high:
            return pattern, density
        least, most = (least, tau) if density > high else (tau, most)
    raise UserError(
        f"tau: none of {tries} tried ones reads {low:.0%} to {high:.0%} of the blocks; the last read {density:.1%}"
    )


def compare(prompt: Prompt, pattern: Pattern, density: float, repeats: int) -> Part:
    """Time a pattern and dense attention in turns; the first run of each, which compiles, is left out."""
    seconds: dict[str, list[float]] = {"dense": [], "method": []}
    for i in range(repeats + 1):
        for name, chosen in (("dense", CAUSAL), ("method", pattern)):
            taken = prompt.run(chosen)
            if i:
                seconds[name].append(taken)
    return Part(prompt.layer, density, seconds)
