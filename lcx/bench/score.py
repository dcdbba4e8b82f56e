"""Scores of blocks, of the last queries and of page extremes: their arguments, programs and references."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp

from lcx.bench.cases import EXTREMES, Case
from lcx.ops import block_scores as scores
from pallas_kernels import score_blocks, score_probe


def abstract(case: Case):
    """Return (q, k), or (q, low, high) of page extremes, as shapes."""
    q, k, _ = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes)
    if case.kernel != "minmax":
        return q, k
    ends = jax.ShapeDtypeStruct((*k.shape[:3], case.tokens // EXTREMES), k.dtype)
    return q, ends, ends


def arrays(case: Case, seed: int = 0):
    """Return random arguments."""
    shapes = abstract(case)
    keys = jax.random.split(jax.random.key(seed), 3)
    made = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=False)]
    if case.kernel == "minmax":
        made[1:] = jnp.minimum(*made[1:]), jnp.maximum(*made[1:])
    return tuple(made)


def program(case: Case, tile=None) -> Callable:
    """Return the kernel; the queries are the last ones.  `tile`: of other sizes."""
    return _call(case, score_blocks if case.kernel != "probe" else score_probe, tile=tile)


def reference(case: Case) -> Callable:
    """Return the plain code of lcx.ops.block_scores, in float32."""
    plain = _call(case, scores)
    return lambda *args: plain(*(x.astype(jnp.float32) for x in args))


def _call(case: Case, module: ModuleType, **more) -> Callable:
    settings = {"scale": case.head_dim**-0.5, "q_offset": case.tokens - case.T} | more
    if case.kernel == "antidiagonal":
        return lambda q, k: (module.score_antidiagonal(q, k, stride=case.stride, **settings),)
    if case.kernel == "probe":
        return lambda q, k: module.score_probe(q, k, **settings)
    return lambda q, low, high: (module.score_minmax(q, low, high, **more),)
