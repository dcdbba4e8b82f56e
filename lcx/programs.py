"""The programs of a layer: a step, a step that writes nothing and its commit, the end of the prompt.

The block is the jitted unit: it compiles once per distinct (recipe, shape) and runs faster on a CPU than one program over all layers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.ctx import Ctx, Step
from lcx.layer import attention, read, repack, write
from lcx.model_config import ModelConfig
from lcx.models.decoder import enter, leave, rotation
from lcx.ops.attention import EMPTY
from lcx.recipe import Recipe


def _arrays(config: ModelConfig, recipe: Recipe, aux) -> tuple[dict[str, jax.Array], frozenset[str]]:
    """The method's arrays of this layer, those by query head as [K,G,...], and the names of those by head."""
    arrays, by_head = {}, set()
    for name, array in recipe.arrays(config).items():
        if name not in aux.get("arrays", {}):
            continue
        x = jnp.asarray(aux["arrays"][name])
        if array.per == "query head":
            x = x.reshape(config.num_kv_heads, config.group, *x.shape[1:])
        if array.per != "layer":
            by_head.add(name)
        arrays[name] = x
    return arrays, frozenset(by_head)


def _ctx(config: ModelConfig, recipe: Recipe, local: bool, aux, implementation: str, **own) -> Ctx:
    """Context of a layer's method, all KV heads of it."""
    arrays, by_head = _arrays(config, recipe, aux)
    return Ctx(
        scale=config.scale,
        rotate=rotation(config, local),
        window=config.window if local else None,
        aux=arrays,
        by_head=by_head,
        settings=aux.get("data", {}),
        implementation=implementation,
        **own,
    )


def layer_ctx(static, aux, step: Step, q_raw, k_raw, v, lse=None) -> Ctx:
    """Return the ctx of a step from its projections, as `enter` gives them; `static` as in `run_block`."""
    config, local, pos = static["config"], static["local"], step.pos
    turn = rotation(config, local)
    q, k = turn(q_raw, pos[:, None, None]), turn(k_raw, pos[:, None])
    own = {"q": q, "q_raw": q_raw, "k": k, "k_raw": k_raw, "v": v, "pos": pos, "left": step.left, "lse": lse}
    return _ctx(config, static["recipe"], local, aux, static["implementation"], **own)


def run_block(w, x, step: Step, cache, aux, *, order: str = "attend", **static):
    """One layer: x [B,T,E] -> (x, cache, notes).

    Args:
      w: name -> weight.
      x: the residual stream.
      step: where its tokens stand.
      cache: of the layer, or None.
      aux: the layer's heads, arrays and data.
      order: as in `layer.attention`.
      static: config, recipe (of this phase and layer), local, implementation (as `backends.choose.resolve` returned it).
    """
    config = static["config"]
    ctx = layer_ctx(static, aux, step, *enter(w, config, x))
    out, cache, notes = attention(ctx, static["recipe"], cache, aux.get("heads", {}), order=order)
    return leave(w, config, x, out), cache, notes


def run_peek(w, x, step: Step, cache, aux, *, as_stored: bool = False, **static):
    """`run_block` that writes nothing: (x, pending, notes); `run_commit` takes the pending arrays.  `as_stored`: as in `layer.read`."""
    config = static["config"]
    own = enter(w, config, x)
    ctx = layer_ctx(static, aux, step, *own)
    out, lse, notes, state = read(ctx, static["recipe"], cache, aux.get("heads", {}), as_stored=as_stored)
    return leave(w, config, x, out), {"own": own, "lse": lse, "state": state}, notes


def run_commit(pending, step: Step, cache, aux, **static):
    """Tokens that a peeked step writes; one whose position is EMPTY is not accepted and leaves no trace."""
    ctx = layer_ctx(static, aux, step, *pending["own"])
    return write(ctx, static["recipe"], cache, aux.get("heads", {}), pending["lse"], pending["state"])


def run_repack(cache, empty, aux, *, config: ModelConfig, recipe: Recipe, old_recipe: Recipe, local: bool, widths):
    """The cache of a layer's prompt turned into that of decoding, `layer.repack`."""
    if cache.probe is not None:
        probe = dict(cache.probe)
    else:
        # no query votes; the last position alone is known
        slots = next(cache[c[0].name] for c in recipe.chains if c[0].compress is not None)
        pos, batch = slots.pos, slots.pos.shape[0]
        last = jnp.max(pos, axis=(1, 2))[:, None] if pos.shape[1] else jnp.full((batch, 1), EMPTY)
        q = jnp.zeros((batch, config.num_kv_heads, config.group, 1, config.head_dim), slots.payload["v"].dtype)
        probe = {"q": q, "pos": last}
    ctx = _ctx(config, recipe, local, aux, "xla", **probe)
    return repack(ctx, old_recipe, recipe, cache, empty, aux.get("heads", {}), dict(widths))


STATIC = ("config", "recipe", "local", "implementation")


def weights_of(graph, state) -> dict[str, jax.Array]:
    """Return the weights of a split block by name."""
    return {n: p[...] for n, p in vars(nnx.merge(graph, state)).items() if isinstance(p, nnx.Param)}


@partial(jax.jit, static_argnames=("graph", "order", *STATIC), donate_argnames=("cache",))
def block_program(state, x, step, cache, aux, *, graph, **static):
    """`run_block` on the split module of one layer; its cache is donated and written in place."""
    return run_block(weights_of(graph, state), x, step, cache, aux, **static)


@partial(jax.jit, static_argnames=("graph", "as_stored", *STATIC))
def peek_program(state, x, step, cache, aux, *, graph, **static):
    """`run_peek`; nothing is donated."""
    return run_peek(weights_of(graph, state), x, step, cache, aux, **static)


@partial(jax.jit, static_argnames=STATIC, donate_argnames=("cache",))
def commit_program(pending, step, cache, aux, **static):
    """`run_commit`; the cache is donated and written in place."""
    return run_commit(pending, step, cache, aux, **static)


@partial(jax.jit, donate_argnames=("cache",))
def forget_program(cache, span):
    """The cache without the tokens at positions span[:, 0] ... span[:, 1] - 1; span int32 [B,2]."""
    first, last = span[:, 0, None, None], span[:, 1, None, None]
    empty = lambda s: replace(s, pos=jnp.where((s.pos >= first) & (s.pos < last), EMPTY, s.pos))
    return replace(cache, segments={name: empty(s) for name, s in cache.segments.items()})


@partial(jax.jit, static_argnames=("config", "recipe", "old_recipe", "local", "widths"), donate_argnames=("empty",))
def repack_program(cache, empty, aux, **static):
    """`run_repack`; the empty cache is donated and filled, the old one is freed by the caller."""
    return run_repack(cache, empty, aux, **static)
